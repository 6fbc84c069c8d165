"""Zero-shot tags: what the model sees, from the catalogue's list of labels to the filter of a search."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from PIL import Image
from tests.shop import TENANT, TINY, open_shop

from catalens import events
from catalens.domain import AttributeValue, Condition, Filter, ImageRef, IndexDocument, Product, StoredProduct, Tag
from catalens.encoders import open_encoder
from catalens.engines import Engines, open_engines
from catalens.errors import Misconfigured
from catalens.ports import Encoder
from catalens.retry import SystemClock
from catalens.settings import EncoderSettings, PictureSettings, Settings
from catalens.telemetry import Metrics
from catalens_embedder.tagging import read_lists
from catalens_embedder.worker import Embedder

COLORS = {"labels": ["red", "blue", "green"], "template": "{}", "threshold": 0.6, "scale": 10}
LISTS = {"color": COLORS, "shade": {"labels": ["black", "white", "sesquipedalian"], "template": "{}"}}


def jpeg(color: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(out, "JPEG")
    return out.getvalue()


class Tagging:
    """An embedder with lists of labels, and the index behind it."""

    def __init__(self, engines: Engines, encoder: Encoder, settings: Settings) -> None:
        self.engines = engines
        self._encoder = encoder
        self._settings = settings

    def embedder(self, **changes: object) -> Embedder:
        """Return a new one, as a start with other settings would make it."""
        return Embedder(
            log=self.engines.log, index=self.engines.index, encoder=self._encoder, cache=self.engines.cache,
            blobs=self.engines.blobs, images=self.engines.images, settings=self._settings.model_copy(update=changes),
            metrics=Metrics(), clock=SystemClock(),
        )  # fmt: skip

    async def put(self, *products: Product, embedder: Embedder | None = None) -> None:
        """Send products through the embedder, remote pictures included."""
        made = [events.new_event(product, TENANT) for product in products]
        await self.engines.log.append([events.encode(event) for event in made])
        sent = {event.id for event in made}
        records = [one async for one in self.engines.log.scan([events.PRODUCTS]) if one.headers["ce_id"] in sent]
        assert len(records) == len(made)
        await (embedder or self.embedder()).apply(records)

    async def find(self, product_id: str) -> StoredProduct:
        """Return the live product."""
        return (await self.engines.index.get(TENANT, [product_id]))[product_id]

    async def tagged(self, key: str, value: str) -> list[str]:
        """Return the ids of the products that the filter leaves."""
        where = Filter(conditions=(Condition(f"tags.{key}", (value,)),))
        return [
            one.product.product_id for one in await self.engines.index.page(TENANT, after=None, limit=9, where=where)
        ]


@pytest.fixture
async def tagging(tmp_path: Path) -> AsyncIterator[Tagging]:
    path = tmp_path / "tags.json"
    path.write_text(json.dumps(LISTS))
    settings = Settings(
        _env_file=None, data_dir=tmp_path / "data", model=str(TINY), tags_file=path,
        encoder=EncoderSettings(lanes=1), pictures=PictureSettings(allow_private_networks=True),
    )  # fmt: skip
    async with AsyncExitStack() as stack:
        encoder = await stack.enter_async_context(open_encoder(settings, Metrics()))
        engines = await stack.enter_async_context(open_engines(settings, encoder.spec))
        yield Tagging(engines, encoder, settings)


async def test_a_picture_is_tagged_with_its_colour_and_found_by_it(tagging: Tagging) -> None:
    red, blue = [ImageRef(blob=await tagging.engines.blobs.put(jpeg(color))) for color in ("red", "blue")]
    attributes: dict[str, AttributeValue] = {"color": "blue", "shade": "white"}
    await tagging.put(
        Product(product_id="r", name="A blue name", version=1, images=(red,), attributes=attributes),
        Product(product_id="b", name="Thing", version=1, images=(blue,)),
    )
    found = await tagging.find("r")
    assert found.tags["color"].value == "red"
    assert 0.6 <= found.tags["color"].score <= 1
    assert found.product.attributes == attributes  # the catalogue's own are as they were
    assert (await tagging.tagged("color", "red"), await tagging.tagged("color", "blue")) == (["r"], ["b"])
    assert await tagging.tagged("color", "green") == await tagging.tagged("nothing", "red") == []


async def test_without_a_picture_the_text_is_tagged_and_without_a_clear_label_nothing(tagging: Tagging) -> None:
    await tagging.put(
        Product(product_id="text", name="Green thing", version=1),
        Product(product_id="unknown", name="Xyzzy", version=1),
        Product(product_id="unclear", name="grey", version=1),
    )
    assert (await tagging.find("text")).tags["color"].value == "green"
    assert (await tagging.find("unknown")).tags == {}
    assert "color" not in (await tagging.find("unclear")).tags


async def test_a_remote_picture_decides_when_it_arrives(tagging: Tagging) -> None:
    asked, go = asyncio.Event(), asyncio.Event()

    async def answer(request: web.Request) -> web.Response:
        asked.set()
        await go.wait()
        return web.Response(body=jpeg("red"), content_type="image/jpeg")

    app = web.Application()
    app.router.add_get("/red.jpg", answer)
    async with TestServer(app) as server, asyncio.TaskGroup() as tasks:
        image = ImageRef(url=str(server.make_url("/red.jpg")))
        tasks.create_task(tagging.put(Product(product_id="p", name="Blue", version=1, images=(image,), brand="Acme")))
        await asked.wait()
        pending = await tagging.find("p")
        go.set()
    assert (pending.image_status, pending.tags["color"].value) == ("pending", "blue")
    stored = await tagging.find("p")
    assert (stored.image_status, stored.tags["color"].value) == ("ok", "red")
    assert (await tagging.tagged("color", "red"), await tagging.tagged("color", "blue")) == (["p"], [])
    acme = Filter(conditions=(Condition("brand", ("Acme",)),))
    assert len(await tagging.engines.index.page(TENANT, after=None, limit=9, where=acme)) == 1


async def test_another_list_counts_from_then_on(tagging: Tagging, tmp_path: Path) -> None:
    await tagging.put(Product(product_id="old", name="Red", version=1))
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"tone": {"labels": ["red", "yellow"], "template": "{}"}}))
    await tagging.put(Product(product_id="new", name="Red", version=1), embedder=tagging.embedder(tags_file=path))
    await tagging.put(Product(product_id="none", name="Red", version=1), embedder=tagging.embedder(tags_file=None))
    assert {name: set((await tagging.find(name)).tags) for name in ("old", "new", "none")} == {
        "old": {"color", "shade"},
        "new": {"tone"},
        "none": set(),
    }


async def test_answers_show_tags_and_an_export_does_not(tmp_path: Path) -> None:
    async with open_shop(tmp_path / "data") as shop:
        vector = await shop.encoder.embed_text("red")
        for name, tags in (("a", {"color": Tag("red", 0.75)}), ("b", {})):
            product = Product(product_id=name, name="Red", version=1)
            await shop.engines.index.upsert([IndexDocument(TENANT, product, "none", text=vector, tags=tags)])
        found = await shop.search(query="red", filters={"tags.color": ["red", "blue"]}, mode="semantic")
        assert [(hit["product_id"], hit["tags"]) for hit in found["results"]] == [
            ("a", {"color": {"value": "red", "score": 0.75}})
        ]
        counted = await shop.search(query="red", facets=["tags.color"], mode="semantic")
        assert counted["facets"]["tags.color"] == [{"value": "red", "count": 1}]
        assert "tags" not in (await shop.call("GET", "/api/v1/products/b")).json
        only = await shop.search(query="red", include=["tags"], mode="semantic")
        assert {hit["product_id"]: set(hit) for hit in only["results"]} == {
            "a": {"product_id", "score", "tags"},
            "b": {"product_id", "score"},
        }
        export = await shop.call("GET", "/api/v1/products", headers={"Accept": "application/x-ndjson"})
        assert b"tags" not in export.body


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        ("{", "Invalid JSON"),
        ("{}", "at least 1"),
        ('{"color": {}}', "color.labels"),
        ('{"color": {"labels": ["red"]}}', "color.labels"),
        ('{"color": {"labels": ["red", ""]}}', "color.labels.1"),
        ('{"color": {"labels": ["red", "blue"], "template": "a photo"}}', "color.template"),
        ('{"color": {"labels": ["red", "blue"], "threshold": 2}}', "color.threshold"),
        ('{"color": {"labels": ["red", "blue"], "scale": 0}}', "color.scale"),
        ('{"color": {"labels": ["red", "blue"], "treshold": 0.5}}', "color.treshold"),
    ],
)
def test_a_file_that_is_no_list_says_where(tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "tags.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(Misconfigured, match=said):
        read_lists(path)


async def test_labels_need_the_text_tower(tagging: Tagging) -> None:
    with pytest.raises(Misconfigured, match="text tower"):
        tagging.embedder(encoder=EncoderSettings(towers="image"))
