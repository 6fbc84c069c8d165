"""What the index must hold after any sequence of accepted events: newest wins, whatever the order."""

from __future__ import annotations

import asyncio
import base64
import io
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import UUID

import aiohttp
import numpy as np
from PIL import Image

from catalens import lexical
from catalens.domain import PointState, Product, sha256_hex
from catalens.ports import Encoder, VectorIndex

if TYPE_CHECKING:
    from catalens.domain import Embedding

WORDS = (
    "red",
    "blue",
    "green",
    "wool",
    "cotton",
    "shoe",
    "lamp",
    "table",
    "chair",
    "jacket",
    "summer",
    "winter",
    "small",
)
CLIENTS = 8


def picture(number: int) -> bytes:
    """Return a small picture, another one for each number below 4,096."""
    colour = ((number * 37) % 256, (number * 91) % 256, (number * 53) % 256)
    out = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(out, "PNG")
    return out.getvalue()


@dataclass
class Ledger:
    """Every product's newest accepted content and offer."""

    contents: dict[str, tuple[int, dict[str, Any] | None]] = field(default_factory=dict)
    """version and body, None once deleted"""
    offers: dict[str, tuple[int, dict[str, Any]]] = field(default_factory=dict)

    def upserted(self, product_id: str, body: dict[str, Any]) -> None:
        """Note an accepted product."""
        if body["version"] > self.contents.get(product_id, (0, None))[0]:
            self.contents[product_id] = (body["version"], body)
        if "offer_version" in body:
            self.offered(product_id, body)

    def deleted(self, product_id: str, version: int) -> None:
        """Note an accepted deletion."""
        if version > self.contents.get(product_id, (0, None))[0]:
            self.contents[product_id] = (version, None)

    def offered(self, product_id: str, body: dict[str, Any]) -> None:
        """Note an accepted offer; it states all fields, so that the newest says everything."""
        if body["offer_version"] > self.offers.get(product_id, (0, {}))[0]:
            stated = {name: body[name] for name in ("price", "currency", "stock", "offer_version")}
            self.offers[product_id] = (body["offer_version"], stated)


class Load:
    """Sends random products, offers and deletions to an ingest service until told to stop, and keeps the ledger.

    What was not acknowledged is sent again, so that in the end everything was accepted. One event in ten is an old one
    once more, and pairs overtake each other, because several clients send at once.
    """

    def __init__(self, prefix: str, *, products: int, seed: int = 0, pictures: int = 40) -> None:
        self.ledger = Ledger()
        self.accepted = 0
        self.repeated = 0
        """Requests that were answered by nobody or by 429 or 503, and were sent again."""
        self.urls: list[str] = []
        self.may_send = asyncio.Event()
        """Cleared, it sends nothing more until it is set again."""
        self.may_send.set()
        self._prefix = prefix
        self._products = products
        self._pictures = pictures
        self._dice = random.Random(seed)
        self._versions: dict[str, int] = {}
        self._sent: list[tuple[str, str, dict[str, Any]]] = []

    def next_version(self, product_id: str) -> int:
        """Return a version that nothing of that product has yet."""
        version = self._versions[product_id] = self._versions.get(product_id, 0) + 1
        return version

    async def run(self, stop: asyncio.Event, *, at_most: int | None = None) -> None:
        """Send until `stop` is set, or until `at_most` events were accepted."""
        goal = None if at_most is None else self.accepted + at_most
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session,
            asyncio.TaskGroup() as all_,
        ):
            for number in range(CLIENTS):
                all_.create_task(self._client(session, stop, goal), name=f"client {number}")

    async def gently(self, stop: asyncio.Event) -> None:
        """Send until `stop` is set, and no more than workers can follow on a busy machine."""
        while not stop.is_set():
            await self.run(stop, at_most=5)
            await asyncio.sleep(0.1)

    async def _client(self, session: aiohttp.ClientSession, stop: asyncio.Event, goal: int | None) -> None:
        while not stop.is_set() and (goal is None or self.accepted < goal):
            await self.may_send.wait()
            method, product_id, body = self._draw()
            await self._deliver(session, method, product_id, body)
            if method == "PUT":
                self.ledger.upserted(product_id, body)
            elif method == "PATCH":
                self.ledger.offered(product_id, body)
            else:
                self.ledger.deleted(product_id, body["version"])
            self.accepted += 1

    async def _deliver(
        self, session: aiohttp.ClientSession, method: str, product_id: str, body: dict[str, Any]
    ) -> None:
        """Send until it is accepted, whatever is down meanwhile."""
        while True:
            path = f"{self._dice.choice(self.urls)}/api/v1/products/{product_id}"
            try:
                if method == "DELETE":
                    call = session.delete(f"{path}?version={body['version']}")
                else:
                    call = session.request(method, path + ("/offer" if method == "PATCH" else ""), json=body)
                async with call as answer:
                    if answer.status == 202:
                        return
                    assert answer.status in (429, 503), f"{answer.status}: {await answer.text()}"
            except (aiohttp.ClientError, TimeoutError):
                pass
            self.repeated += 1
            await asyncio.sleep(0.1)  # the service is away; sent again until it is back

    def _draw(self) -> tuple[str, str, dict[str, Any]]:
        dice = self._dice
        if self._sent and dice.random() < 0.1:
            return dice.choice(self._sent)
        product_id = f"{self._prefix}-{dice.randrange(self._products)}"
        version = self.next_version(product_id)
        kind = dice.random()
        offer = {
            "price": round(dice.uniform(1, 500), 2),
            "currency": "EUR",
            "stock": dice.randrange(9),
            "offer_version": version,
        }
        drawn: tuple[str, str, dict[str, Any]]
        if kind < 0.12:
            drawn = ("DELETE", product_id, {"version": version})
        elif kind < 0.4:
            drawn = ("PATCH", product_id, offer)
        else:
            body: dict[str, Any] = {
                "name": f"{dice.choice(WORDS)} {dice.choice(WORDS)} {version}",
                "version": version,
                "brand": dice.choice(["Ada", "Bo", "Cy"]),
                "category": "Home > " + dice.choice(["Kitchen", "Garden"]),
                "attributes": {"size": dice.randrange(40), "tags": [dice.choice(WORDS)]},
            }
            if dice.random() < 0.5:
                body |= offer
            if dice.random() < 0.3:
                data = picture(dice.randrange(self._pictures))
                body["images"] = [{"data": base64.b64encode(data).decode()}]
            drawn = ("PUT", product_id, body)
        if len(self._sent) < 5000:
            self._sent.append(drawn)
        return drawn


async def everything(index: VectorIndex, prefix: str) -> dict[str, PointState]:
    """Return what the index holds of the products whose id begins with `prefix`, hidden ones included."""
    found: dict[str, PointState] = {}
    async for point in _points(index):
        if point.product_id.startswith(f"{prefix}-"):
            assert point.product_id not in found, f"{point.product_id} is there twice"
            found[point.product_id] = point
    return found


async def _points(index: VectorIndex) -> AsyncIterator[PointState]:
    after: UUID | None = None
    while page := await index.export(after=after, limit=256, with_vectors=True):
        for point in page:
            yield point
        after = page[-1].point


async def differences(ledger: Ledger, index: VectorIndex, encoder: Encoder, prefix: str) -> list[str]:
    """Return each way in which the index differs from the ledger: ids, versions, content, offers, vectors."""
    found = await everything(index, prefix)
    expected = ledger.contents.keys() | ledger.offers.keys()
    wrong = [f"{name}: not in the index" for name in sorted(expected - found.keys())]
    wrong += [f"{name}: was never accepted" for name in sorted(found.keys() - expected)]
    vectors: dict[tuple[str, bytes], Embedding] = {}
    for name in sorted(expected & found.keys()):
        point = found[name]
        version, body = ledger.contents.get(name, (None, None))
        state = "offer" if version is None else "deleted" if body is None else "live"
        if (point.state, point.version) != (state, version):
            wrong.append(f"{name}: {point.state} {point.version}, not {state} {version}")
            continue
        offer = ledger.offers.get(name, (None, None))[1]
        stored = point.offer.model_dump(exclude_unset=True, exclude={"product_id"}) if point.offer else None
        if stored != offer:
            wrong.append(f"{name}: offer {stored}, not {offer}")
        if body is not None:
            wrong += [f"{name}: {text}" for text in await _content(point, body, encoder, vectors)]
    return wrong


async def _content(
    point: PointState, body: dict[str, Any], encoder: Encoder, vectors: dict[tuple[str, bytes], Embedding]
) -> list[str]:
    wrong: list[str] = []
    offer_fields = ("price", "currency", "stock", "offer_version")
    pictures = [base64.b64decode(image["data"]) for image in body.get("images", [])]
    content = {name: value for name, value in body.items() if name not in (*offer_fields, "images")}
    if pictures:
        content["images"] = [{"blob": sha256_hex(data)} for data in pictures]
    product = Product.model_validate({"product_id": point.product_id, **content})
    if point.product is None or point.product.model_dump(exclude_unset=True) != product.model_dump(exclude_unset=True):
        wrong.append(f"content {point.product}, not {product}")
    if point.image_status != ("ok" if pictures else "none"):
        wrong.append(f"image_status {point.image_status}: {point.image_error}")
    text = lexical.text_for_embedding(product)
    if ("text", text.encode()) not in vectors:
        vectors["text", text.encode()] = await encoder.embed_text(text, bulk=True)
    expected = {"text": vectors["text", text.encode()]}
    for data in pictures:
        if ("image", data) not in vectors:
            vectors["image", data] = (await encoder.embed_image(data, bulk=True)).embedding
        expected["image"] = vectors["image", data]
    if point.vectors.keys() != expected.keys():
        return [*wrong, f"vectors {sorted(point.vectors)}, not {sorted(expected)}"]
    for tower, vector in expected.items():
        if not np.allclose(point.vectors[tower], vector, atol=2e-3):  # float16 in the cache
            wrong.append(f"{tower} vector is another one: cosine {float(point.vectors[tower] @ vector):.4f}")
    return wrong
