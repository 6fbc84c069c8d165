"""The worker on the real embedded engines: what goes into the log comes out of the index, whatever goes wrong."""

from __future__ import annotations

import asyncio
import io
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from PIL import Image

from catalens import events
from catalens.domain import (
    Deletion,
    Filter,
    ImageRef,
    IndexDocument,
    Message,
    OfferChange,
    Product,
    Record,
    StoredProduct,
    WriteOutcome,
    sha256_hex,
)
from catalens.encoders import open_encoder
from catalens.engines import Engines, open_engines
from catalens.errors import StorageFull, Transient
from catalens.events import EventData
from catalens.ports import EncodedImage, Encoder
from catalens.settings import EmbedderSettings, EncoderSettings, PictureSettings, Settings
from catalens.telemetry import Metrics
from catalens_embedder import letters
from catalens_embedder.worker import Embedder

TINY = Path(__file__).parent.parent / "fixtures" / "bundles" / "tiny"


class SteppedClock:
    """Stands still until a test moves it; sleeping moves it too."""

    def __init__(self) -> None:
        self.time = 1_800_000_000.0

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.time += seconds
        await asyncio.sleep(0)


@dataclass
class World:
    """A worker at work, and hands to reach into what surrounds it."""

    engines: Engines
    encoder: Encoder
    settings: Settings
    clock: SteppedClock = field(default_factory=SteppedClock)
    metrics: Metrics = field(default_factory=Metrics)

    @asynccontextmanager
    async def worker(self) -> AsyncIterator[asyncio.Task[None]]:
        """Run the worker; leaving stops it gracefully."""
        embedder = Embedder(
            log=self.engines.log,
            index=self.engines.index,
            encoder=self.encoder,
            cache=self.engines.cache,
            blobs=self.engines.blobs,
            images=self.engines.images,
            settings=self.settings,
            metrics=self.metrics,
            clock=self.clock,
        )
        stop = asyncio.Event()
        task = asyncio.create_task(embedder.run(stop), name="embedder")
        try:
            yield task
        finally:
            stop.set()
            await task

    async def send(self, *data: EventData, awaited: bool = False) -> list[str]:
        """Append events and return their ids."""
        made = [events.new_event(entry, "default", awaited=awaited) for entry in data]
        await self.engines.log.append([events.encode(event) for event in made])
        return [event.id for event in made]

    async def idle(self) -> None:
        """Return when every record was finished and committed."""

        async def nothing_left() -> bool:
            return not any((await self.engines.log.lag(events.EMBEDDER_GROUP, events.CONSUMED)).values())

        await until(nothing_left)

    async def find(self, product_id: str) -> StoredProduct | None:
        """Return the live product."""
        return (await self.engines.index.get("default", [product_id], with_vectors=True)).get(product_id)

    async def dead_letters(self) -> list[Record]:
        """Return all dead letters."""
        consumer = await self.engines.log.subscribe("test", [events.DEAD_LETTERS])
        try:
            return list(await consumer.fetch(100, 0.0))
        finally:
            await consumer.close()

    def counted(self, kind: str, outcome: str) -> float:
        """Return the counter of processed events."""
        labels = {"type": kind, "outcome": outcome}
        return self.metrics.registry.get_sample_value("catalens_events_processed_total", labels) or 0.0

    def encoded(self) -> float:
        """Return how many look-ups the cache could not answer."""
        return self.metrics.registry.get_sample_value("catalens_embedding_cache_total", {"result": "miss"}) or 0.0


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Ask the real engines until it holds; the suite's timeout is the limit."""
    while not await condition():
        await asyncio.sleep(0.005)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    settings = Settings(
        _env_file=None,
        data_dir=tmp_path,
        model=str(TINY),
        encoder=EncoderSettings(lanes=1),
        pictures=PictureSettings(allow_private_networks=True),
        embedder=EmbedderSettings(batch=16, in_flight=32, engine_attempts=2),
    )
    async with AsyncExitStack() as stack:
        encoder = await stack.enter_async_context(open_encoder(settings, Metrics()))
        engines = await stack.enter_async_context(open_engines(settings, encoder.spec))
        yield World(engines, encoder, settings)


def jpeg(colour: str = "red") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(out, "JPEG")
    return out.getvalue()


class Pictures:
    """A picture server that a test controls."""

    def __init__(self) -> None:
        self.status = 200
        self.asked = asyncio.Event()
        self.open = asyncio.Event()
        self.open.set()

    async def answer(self, _request: web.Request) -> web.Response:
        self.asked.set()
        await self.open.wait()
        return web.Response(body=jpeg(), status=self.status, content_type="image/jpeg")


@pytest.fixture
async def pictures() -> AsyncIterator[tuple[Pictures, str]]:
    hosted = Pictures()
    app = web.Application()
    app.router.add_get("/red.jpg", hosted.answer)
    async with TestServer(app) as server:
        yield hosted, str(server.make_url("/red.jpg"))


async def test_a_product_with_a_stored_picture_is_complete_at_once(world: World) -> None:
    reference = await world.engines.blobs.put(jpeg())
    async with world.worker():
        await world.send(Product(product_id="a", name="Red thing", version=1, images=(ImageRef(blob=reference),)))
        await world.idle()
        stored = await world.find("a")
    assert stored is not None
    assert stored.image_status == "ok"
    assert set(stored.vectors) == {"image", "text"}


async def test_a_product_answers_by_its_text_while_its_remote_picture_is_fetched(
    world: World, pictures: tuple[Pictures, str]
) -> None:
    hosted, url = pictures
    hosted.open.clear()
    async with world.worker():
        await world.send(Product(product_id="a", name="Red thing", version=1, images=(ImageRef(url=url),)))
        await hosted.asked.wait()
        pending = await world.find("a")
        hosted.open.set()
        await world.idle()
        complete = await world.find("a")
    assert pending is not None
    assert (pending.image_status, set(pending.vectors)) == ("pending", {"text"})
    assert complete is not None
    assert (complete.image_status, set(complete.vectors)) == ("ok", {"image", "text"})


async def test_a_picture_that_is_gone_fails_at_once_and_the_product_stays(
    world: World, pictures: tuple[Pictures, str]
) -> None:
    hosted, url = pictures
    hosted.status = 404
    async with world.worker():
        await world.send(Product(product_id="a", name="Red thing", version=1, images=(ImageRef(url=url),)))
        await world.idle()
        stored = await world.find("a")
    assert stored is not None
    assert stored.image_status == "failed"
    assert stored.image_error is not None
    assert url in stored.image_error


async def test_an_unreachable_picture_is_tried_again_when_its_retry_is_due(
    world: World, pictures: tuple[Pictures, str]
) -> None:
    hosted, url = pictures
    hosted.status = 503
    async with world.worker():
        await world.send(Product(product_id="a", name="Red thing", version=1, images=(ImageRef(url=url),)))

        async def retried() -> bool:
            return world.counted(events.UPSERTED, "retried") == 1

        await until(retried)
        pending = await world.find("a")
        hosted.status = 200
        world.clock.time += 11
        await world.idle()
        stored = await world.find("a")
    assert pending is not None
    assert pending.image_status == "pending"
    assert stored is not None
    assert stored.image_status == "ok"


async def test_a_picture_that_stays_away_ends_as_failed(world: World, pictures: tuple[Pictures, str]) -> None:
    hosted, url = pictures
    hosted.status = 500
    async with world.worker():
        [event_id] = await world.send(
            Product(product_id="a", name="Red thing", version=1, images=(ImageRef(url=url),)), awaited=True
        )
        for attempt, seconds in enumerate((11, 61, 601), start=1):

            async def retried(times: int = attempt) -> bool:
                return world.counted(events.UPSERTED, "retried") == times

            await until(retried)
            world.clock.time += seconds
        await world.idle()
        stored = await world.find("a")
    assert event_id
    assert stored is not None
    assert stored.image_status == "failed"
    assert await world.dead_letters() == []


async def test_poison_goes_to_the_dead_letters_and_costs_nothing_else(world: World) -> None:
    good = [Product(product_id=f"p{number}", name="Good", version=1) for number in range(5)]
    bad = Message(events.PRODUCTS, "default|x", b"\xff\x00 no json", {"ce_type": events.UPSERTED, "ce_id": "bad"})
    unknown = Message(events.PRODUCTS, "default|y", b"{}", {"ce_type": "catalens.product.renamed.v9"})
    await world.send(*good[:2])
    await world.engines.log.append([bad, unknown])
    await world.send(*good[2:])
    async with world.worker():
        await world.idle()
    assert (await world.engines.index.counts("default")).products == 5
    letter, other = await world.dead_letters()
    assert letter.value == bad.value
    assert letter.headers["dlq_reason"] == "invalid_event"
    assert (letter.headers["dlq_topic"], letter.headers["dlq_offset"]) == (events.PRODUCTS, "2")
    assert "catalens.product.renamed.v9" in other.headers["dlq_error"]


async def test_inline_pictures_of_a_foreign_producer_become_blobs(world: World) -> None:
    picture = jpeg("blue")
    async with world.worker():
        inline = ImageRef(data=b64encode(picture).decode())
        await world.send(Product(product_id="a", name="Blue thing", version=1, images=(inline,)))
        await world.idle()
        stored = await world.find("a")
    assert stored is not None
    assert stored.product.images == (ImageRef(blob=sha256_hex(picture)),)
    assert await world.engines.blobs.get(sha256_hex(picture)) == picture


async def test_inline_data_that_is_no_base64_is_a_dead_letter(world: World) -> None:
    async with world.worker():
        await world.send(
            Product(product_id="a", name="Broken", version=1, images=(ImageRef(data="***"),)),
            Product(product_id="b", name="Whole", version=1),
        )
        await world.idle()
    assert [letter.headers["dlq_reason"] for letter in await world.dead_letters()] == ["invalid_event"]
    assert await world.find("b") is not None


async def test_newest_wins_and_deleted_stays_deleted(world: World) -> None:
    async with world.worker():
        await world.send(Product(product_id="a", name="Second", version=2))
        await world.send(Product(product_id="a", name="First", version=1))
        await world.idle()
        stored = await world.find("a")
        assert stored is not None
        assert stored.product.name == "Second"
        await world.send(Deletion(product_id="a", version=3))
        await world.send(Product(product_id="a", name="Second again", version=2))
        await world.idle()
        assert await world.find("a") is None
    assert world.counted(events.UPSERTED, "superseded") == 2


async def test_an_offer_may_come_before_its_product(world: World) -> None:
    async with world.worker():
        await world.send(OfferChange(product_id="a", price=5.0, currency="EUR", stock=2, offer_version=7))
        await world.idle()
        assert await world.find("a") is None
        await world.send(Product(product_id="a", name="Late", version=1))
        await world.idle()
        stored = await world.find("a")
    assert stored is not None
    assert (stored.product.price, stored.product.stock, stored.product.offer_version) == (5.0, 2, 7)


async def test_a_known_content_costs_no_inference_but_its_offer_counts(world: World) -> None:
    product = Product(product_id="a", name="Same", version=1, price=5.0, offer_version=1)
    async with world.worker():
        await world.send(product)
        await world.idle()
        before = world.encoded()
        await world.send(product, product.model_copy(update={"price": 4.0, "offer_version": 2}))
        await world.idle()
        stored = await world.find("a")
    assert world.encoded() == before
    assert world.counted(events.UPSERTED, "known") == 2
    assert stored is not None
    assert stored.product.price == 4.0


async def test_whoever_waits_is_told(world: World) -> None:
    outcomes = await world.engines.log.subscribe(None, [events.OUTCOMES])
    async with world.worker():
        await world.send(Product(product_id="a", name="A", version=2), awaited=True)
        await world.idle()
        await world.send(Product(product_id="a", name="A", version=1), awaited=True)
        await world.idle()
    told = [events.decode_outcome(record).status for record in await outcomes.fetch(10, 1.0)]
    assert told == ["indexed", "superseded"]


async def test_work_goes_on_where_it_stopped(world: World) -> None:
    async with world.worker():
        await world.send(Product(product_id="a", name="A", version=1))
        await world.idle()
    await world.send(Product(product_id="b", name="B", version=1))
    async with world.worker():
        await world.idle()
    assert world.counted(events.UPSERTED, "applied") == 2
    assert world.counted(events.UPSERTED, "known") == 0


async def test_a_long_queue_is_worked_off_within_bounds(world: World) -> None:
    await world.send(*(Product(product_id=f"p{number}", name=f"Thing {number}", version=1) for number in range(300)))
    async with world.worker():
        await world.idle()
    page = await world.engines.index.page("default", after=None, limit=400, where=Filter())
    assert len(page) == 300


async def test_a_worker_that_fails_everything_stops(world: World) -> None:
    poison = [Message(events.PRODUCTS, f"default|{number}", b"?", {}) for number in range(150)]
    await world.engines.log.append(poison)
    with pytest.raises(ExceptionGroup) as failure:
        async with world.worker() as task:
            await asyncio.wait([task])
    assert failure.group_contains(letters.FailingWorker)
    letters_kept = await world.dead_letters()
    assert len(letters_kept) == 100


async def test_an_encoder_that_breaks_on_a_remote_picture_costs_that_picture_only(
    world: World, pictures: tuple[Pictures, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(picture: bytes, *, bulk: bool = False) -> EncodedImage:
        raise RuntimeError(f"no kernel for {len(picture)} bytes, bulk {bulk}")

    monkeypatch.setattr(world.encoder, "embed_image", broken)
    async with world.worker():
        await world.send(Product(product_id="a", name="Red thing", version=1, images=(ImageRef(url=pictures[1]),)))
        await world.send(Product(product_id="b", name="Blue thing", version=1))
        await world.idle()
        first, second = await world.find("a"), await world.find("b")
    assert first is not None
    assert first.image_status == "failed"
    assert "no kernel" in (first.image_error or "")
    assert second is not None


async def test_a_full_disk_is_waited_out_and_makes_no_dead_letters(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    upsert, times = world.engines.index.upsert, count(1)

    async def full(documents: Sequence[IndexDocument]) -> Sequence[WriteOutcome]:
        if next(times) <= 50:
            raise StorageFull("no room")
        return await upsert(documents)

    monkeypatch.setattr(world.engines.index, "upsert", full)
    async with world.worker():
        await world.send(Product(product_id="a", name="A", version=1))
        await world.idle()
    assert world.counted(events.UPSERTED, "applied") == 1
    assert world.counted(events.UPSERTED, "retried") == 0


async def test_a_commit_that_fails_does_not_end_the_worker(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    flush, times = world.engines.index.flush, count(1)

    async def away() -> None:
        if next(times) <= 10:
            raise Transient("the index is away")
        await flush()

    monkeypatch.setattr(world.engines.index, "flush", away)
    async with world.worker():
        await world.send(Product(product_id="a", name="A", version=1))
        await world.idle()
    assert next(times) > 10


async def test_a_stop_does_not_wait_for_a_slow_host_beyond_the_deadline(
    world: World, pictures: tuple[Pictures, str]
) -> None:
    hosted, url = pictures
    hosted.open.clear()
    world.settings = world.settings.model_copy(
        update={"embedder": world.settings.embedder.model_copy(update={"drain_deadline": 0.05})}
    )
    await world.send(Product(product_id="a", name="A", version=1))
    await world.send(Product(product_id="b", name="B", version=1, images=(ImageRef(url=url),)))
    async with world.worker():
        await hosted.asked.wait()
    lag = await world.engines.log.lag(events.EMBEDDER_GROUP, events.CONSUMED)
    hosted.open.set()
    assert sum(lag.values()) == 1
    async with world.worker():
        await world.idle()
        stored = await world.find("b")
    assert stored is not None
    assert stored.image_status == "ok"


async def test_whoever_waits_for_a_repeated_event_hears_that_its_picture_failed(
    world: World, pictures: tuple[Pictures, str]
) -> None:
    hosted, url = pictures
    hosted.status = 404
    product = Product(product_id="a", name="A", version=1, images=(ImageRef(url=url),))
    outcomes = await world.engines.log.subscribe(None, [events.OUTCOMES])
    async with world.worker():
        for _ in range(2):
            await world.send(product, awaited=True)
            await world.idle()
    told = [events.decode_outcome(record) for record in await outcomes.fetch(10, 1.0)]
    assert [outcome.status for outcome in told] == ["failed", "failed"]
    assert told[0].error == told[1].error


async def test_a_host_that_hangs_keeps_no_product_from_being_found(
    world: World, pictures: tuple[Pictures, str]
) -> None:
    hosted, url = pictures
    hosted.open.clear()
    many = [Product(product_id=f"p{n}", name=f"Thing {n}", version=1, images=(ImageRef(url=url),)) for n in range(100)]
    await world.send(*many)
    async with world.worker():

        async def all_found() -> bool:
            return (await world.engines.index.counts("default")).products == 100

        await until(all_found)
        assert (await world.engines.index.counts("default")).images_pending == 100
        hosted.open.set()
        await world.idle()
    assert (await world.engines.index.counts("default")).images_pending == 0
    assert await world.dead_letters() == []


async def test_an_unreadable_picture_is_tried_again_without_its_batch(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    unreadable, readable = await world.engines.blobs.put(jpeg()), world.engines.blobs.get

    async def get(reference: str) -> bytes:
        if reference == unreadable:
            raise Transient("input/output error")
        return await readable(reference)

    monkeypatch.setattr(world.engines.blobs, "get", get)
    await world.send(*(Product(product_id=f"p{number}", name="Good", version=1) for number in range(10)))
    await world.send(Product(product_id="x", name="Red thing", version=1, images=(ImageRef(blob=unreadable),)))
    async with world.worker():

        async def settled() -> bool:
            return (await world.engines.index.counts("default")).products == 10

        await until(settled)

        async def retried() -> bool:
            return world.counted(events.UPSERTED, "retried") == 1

        await until(retried)
        monkeypatch.setattr(world.engines.blobs, "get", readable)
        world.clock.time += 11
        await world.idle()
    assert (await world.engines.index.counts("default")).products == 11
    assert world.counted(events.UPSERTED, "retried") == 1
