"""A query service on real engines, with a small catalogue put straight into the index."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp.test_utils import TestServer
from tests.pictures import encode, plain

from catalens import lexical
from catalens.domain import Deletion, ImageRef, IndexDocument, Product, TombstoneWrite
from catalens.encoders import open_encoder
from catalens.engines import Engines, open_engines
from catalens.ports import Encoder
from catalens.settings import EncoderSettings, HttpSettings, PictureSettings, Settings
from catalens.telemetry import Metrics
from catalens.web import build_app
from catalens_query.service import QueryService
from catalens_query.vocabularies import Vocabularies

TINY = Path(__file__).parent / "fixtures" / "bundles" / "tiny"
TENANT = "default"


def picture(red: int, green: int, blue: int, kind: str = "PNG") -> bytes:
    """Return a picture with a white square in one corner, so that it is no plain colour."""
    image = plain((red, green, blue), 48, 48)
    image.paste((255, 255, 255), (0, 0, 16, 16))
    return encode(image, kind)


@dataclass
class Answer:
    """One HTTP answer, read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    json: Any


@dataclass
class Shop:
    """The service under test, and hands on the index behind it."""

    engines: Engines
    encoder: Encoder
    settings: Settings
    server: TestServer
    wordless: TestServer
    """The same, without an encoder."""
    session: aiohttp.ClientSession
    vocabularies: Vocabularies
    """Of both; nothing reads them unasked."""

    async def call(self, method: str, path: str, *, wordless: bool = False, **options: Any) -> Answer:
        """Send one request and read the answer."""
        url = (self.wordless if wordless else self.server).make_url(path)
        async with self.session.request(method, url, allow_redirects=False, **options) as response:
            body = await response.read()
            is_json = response.content_type.endswith("json") and "ndjson" not in response.content_type
            return Answer(
                response.status, response.headers, body, await response.json(content_type=None) if is_json else None
            )

    async def search(self, *, wordless: bool = False, **body: Any) -> Any:
        """Return the answer to one search that must succeed."""
        answer = await self.call("POST", "/api/v1/search", json=body, wordless=wordless)
        assert answer.status == 200, answer.body
        return answer.json

    async def ids(self, **body: Any) -> list[str]:
        """Return the product ids that a search finds, best first."""
        return [result["product_id"] for result in (await self.search(**body))["results"]]

    async def put(self, product: Product, *pictures: bytes, tenant: str = TENANT) -> None:
        """Index a product, with uploaded pictures."""
        uploads = tuple([ImageRef(blob=await self.engines.blobs.put(data)) for data in pictures])
        product = product.model_copy(update={"images": (*uploads, *product.images), "version": product.version or 1})
        if product.carries_offer:
            product = product.model_copy(update={"offer_version": product.offer_version or 1})
        image = (await self.encoder.embed_image(pictures[0])).embedding if pictures else None
        document = IndexDocument(
            tenant=tenant,
            product=product,
            image_status="ok" if pictures else "pending" if product.images else "none",
            image=image,
            text=await self.encoder.embed_text(lexical.text_for_embedding(product)),
            lexical=lexical.document_vector(product),
        )
        assert list(await self.engines.index.upsert([document])) == ["applied"]

    async def delete(self, product_id: str, version: int) -> None:
        """Delete a product."""
        deletion = Deletion(product_id=product_id, version=version)
        assert list(await self.engines.index.delete([TombstoneWrite(TENANT, deletion)])) == ["applied"]


@asynccontextmanager
async def open_shop(data_dir: Path, **given: Any) -> AsyncIterator[Shop]:
    """Open an empty shop on real engines and the tiny model; `given` are more settings."""
    usual: dict[str, Any] = {
        "model": str(TINY),
        "http": HttpSettings(max_batch=5),
        "encoder": EncoderSettings(lanes=1),
        "pictures": PictureSettings(max_bytes=500_000, max_pixels=4_000_000, allow_private_networks=True),
    }
    settings = Settings(data_dir=data_dir, **(usual | given))
    async with AsyncExitStack() as stack:
        metrics = Metrics()
        vocabularies = Vocabularies(settings.languages)
        encoder = await stack.enter_async_context(open_encoder(settings, metrics))
        engines = await stack.enter_async_context(open_engines(settings, encoder.spec))

        async def start(towers: Encoder | None) -> TestServer:
            service = QueryService(
                index=engines.index,
                encoder=towers,
                cache=engines.cache,
                blobs=engines.blobs,
                images=engines.images,
                log=engines.log,
                settings=settings,
                metrics=metrics,
                vocabularies=vocabularies,
            )
            app = build_app(service.operations(), settings, metrics, ready=service.ready, title="test")
            server = TestServer(app)
            await server.start_server()
            stack.push_async_callback(server.close)
            return server

        session = await stack.enter_async_context(aiohttp.ClientSession())
        yield Shop(engines, encoder, settings, await start(encoder), await start(None), session, vocabularies)
