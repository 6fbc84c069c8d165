"""The worker on the real embedded engines: what goes into the log comes out of the index, whatever goes wrong."""

from __future__ import annotations

import asyncio
import io
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from PIL import Image
from pydantic import ValidationError

from catalens import events
from catalens.domain import (
    Deletion,
    Filter,
    ImageRef,
    IndexDocument,
    Leg,
    Message,
    OfferChange,
    Product,
    Record,
    SeenPicture,
    StoredProduct,
    TopicPartition,
    WriteOutcome,
    sha256_hex,
)
from catalens.encoders import open_encoder
from catalens.engines import Engines, open_engines
from catalens.errors import InvalidEvent, Misconfigured, StorageFull, Transient
from catalens.events import EventData
from catalens.lexical import query_vector
from catalens.ports import EncodedImage, Encoder, EventConsumer
from catalens.settings import EmbedderSettings, EncoderSettings, LogSettings, PictureSettings, Settings
from catalens.telemetry import Metrics
from catalens_embedder import letters
from catalens_embedder.worker import Embedder

TINY = Path(__file__).parent.parent / "fixtures" / "bundles" / "tiny"


class SteppedClock:
    """Stands still until a test moves it; sleeping moves it too."""

    def __init__(self) -> None:
        self.time = time.time()  # as the log's

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

    async def buried(self) -> list[int]:
        """Return where each dead letter stood, in order."""
        letters = self.engines.log.scan([events.DEAD_LETTERS])
        return sorted([int(letter.headers["dlq_offset"]) async for letter in letters])

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
        self.colour = "red"
        self.etag = ""
        self.sent: list[int] = []
        self.asked = asyncio.Event()
        self.open = asyncio.Event()
        self.open.set()

    async def answer(self, request: web.Request) -> web.Response:
        self.asked.set()
        await self.open.wait()
        known = bool(self.etag) and request.headers.get("If-None-Match") == self.etag
        self.sent.append(304 if known else self.status)
        if known:
            return web.Response(status=304)
        headers = {"ETag": self.etag} if self.etag else {}
        return web.Response(body=jpeg(self.colour), status=self.status, content_type="image/jpeg", headers=headers)


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


async def test_words_are_indexed_in_the_languages_that_are_declared(world: World) -> None:
    asked = Leg("lexical", query_vector("jacke", ("de",)), 10)
    for product_id, languages in (("undeclared", ("en", "fr")), ("declared", ("en", "de"))):
        world.settings = world.settings.model_copy(update={"languages": languages})
        async with world.worker():
            await world.send(Product(product_id=product_id, name="Jacken", version=1))
            await world.idle()
    (hits,) = await world.engines.index.search("default", [asked], Filter())
    assert [hit.product_id for hit in hits] == ["declared"]


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


async def test_a_remote_picture_is_fetched_again_only_when_it_has_changed(
    world: World, pictures: tuple[Pictures, str]
) -> None:
    hosted, url = pictures
    hosted.etag = '"1"'
    seen: list[StoredProduct] = []
    async with world.worker():
        for version in (1, 2, 3):
            if version == 3:
                hosted.etag, hosted.colour = '"2"', "blue"
            await world.send(
                Product(product_id="a", name=f"Thing {version}", version=version, images=(ImageRef(url=url),))
            )
            await world.idle()
            stored = await world.find("a")
            assert stored is not None
            seen.append(stored)
    assert hosted.sent == [200, 304, 200]
    assert [stored.image_status for stored in seen] == ["ok"] * 3
    np.testing.assert_array_equal(seen[0].vectors["image"], seen[1].vectors["image"])
    assert not np.array_equal(seen[1].vectors["image"], seen[2].vectors["image"])


async def test_a_remote_picture_whose_vector_was_forgotten_is_fetched(
    world: World, pictures: tuple[Pictures, str]
) -> None:
    hosted, url = pictures
    hosted.etag = '"1"'
    await world.engines.cache.remember(url, SeenPicture(url=url, sha256=sha256_hex(jpeg()), etag='"1"'))
    async with world.worker():
        await world.send(Product(product_id="a", name="Thing", version=1, images=(ImageRef(url=url),)))
        await world.idle()
        stored = await world.find("a")
    assert stored is not None
    assert stored.image_status == "ok"
    assert hosted.sent == [200]


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
        await world.idle()  # of two batches either may be served first
        await world.send(Product(product_id="a", name="First", version=1))
        await world.idle()
        stored = await world.find("a")
        assert stored is not None
        assert stored.product.name == "Second"
        await world.send(Deletion(product_id="a", version=3))
        await world.idle()
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
    with pytest.raises(letters.FailingWorker, match=r"101 of the last 101 events.*dlq list"):
        async with world.worker() as task:
            await asyncio.wait([task])
    finished = await world.buried()
    assert 101 <= len(finished) <= 101 + world.settings.embedder.in_flight
    assert finished == list(range(len(finished)))
    place = TopicPartition(events.PRODUCTS, 0)
    assert await world.engines.log.committed(events.EMBEDDER_GROUP, [events.PRODUCTS]) == {place: len(finished)}
    async with world.worker():  # started again, it skips nothing and does nothing twice
        await world.idle()
    assert await world.buried() == list(range(150))


async def test_letters_that_fail_again_do_not_stop_the_worker(world: World) -> None:
    again = [Message(events.RETRIES[0], f"default|{number}", b"?", {}) for number in range(150)]
    await world.engines.log.append(again)
    async with world.worker():
        await world.idle()
    assert len(await world.buried()) == 150


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


@pytest.mark.parametrize("refused", [False, True], ids=["poison", "refused by the index"])
async def test_an_event_too_large_to_be_sent_on_ends_as_a_letter_without_its_data(
    world: World, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    """It came compressed, say, which is how a topic's limit measures it."""
    append, upsert = world.engines.log.append, world.engines.index.upsert
    large = Product(product_id="x", name="Large", description="x" * 10_000, version=1)
    message = replace(events.encode(events.new_event(large, "default", event_id="e")), key="default|x" + 20_000 * "x")
    headers = {**message.headers, "note": "x" * 10_000}
    await append([replace(message, headers=headers, value=message.value if refused else b"{" * 10_000)])
    await world.send(Product(product_id="p", name="Good", version=1))

    async def limited(messages: Sequence[Message]) -> Sequence[tuple[TopicPartition, int]]:
        if any(len(one.value) + len(one.key) + len("".join(one.headers.values())) > 9_000 for one in messages):
            raise InvalidEvent("the event is larger than its topic takes")
        return await append(messages)

    async def refusing(documents: Sequence[IndexDocument]) -> Sequence[WriteOutcome]:
        if refused and any(document.product.product_id == "x" for document in documents):
            raise Transient("internal error")
        return await upsert(documents)

    monkeypatch.setattr(world.engines.log, "append", limited)
    monkeypatch.setattr(world.engines.index, "upsert", refusing)
    async with world.worker():
        await world.idle()
    (letter,) = await world.dead_letters()
    assert letter.headers["dlq_reason"] == ("engine_refuses" if refused else "invalid_event")
    assert letter.headers["dlq_error"].startswith("too large to be kept")
    assert (letter.headers["ce_id"], letter.headers["dlq_offset"], letter.value) == ("e", "0", b"")
    assert await world.find("p")


async def test_a_log_that_refuses_us_ends_the_worker_with_that_very_error(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    subscribe = world.engines.log.subscribe

    async def refused(max_records: int, timeout: float) -> Sequence[Record]:
        raise Misconfigured("not authorised")

    async def refusing(*arguments: Any, **options: Any) -> EventConsumer:
        consumer = await subscribe(*arguments, **options)
        monkeypatch.setattr(consumer, "fetch", refused)
        return consumer

    monkeypatch.setattr(world.engines.log, "subscribe", refusing)
    with pytest.raises(Misconfigured):
        async with world.worker() as worker:
            await asyncio.wait([worker])


# --- engines that are away --------------------------------------------------------------------------------


async def test_an_index_that_is_away_for_an_hour_is_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    upsert, started = world.engines.index.upsert, world.clock.now()

    async def away(documents: Sequence[IndexDocument]) -> Sequence[WriteOutcome]:
        if world.clock.now() < started + 3600:
            raise Transient("connection refused")
        return await upsert(documents)

    monkeypatch.setattr(world.engines.index, "upsert", away)
    await world.send(*(Product(product_id=f"p{number}", name="Thing", version=1) for number in range(60)))
    async with world.worker():
        await world.idle()
    assert (await world.engines.index.counts("default")).products == 60
    assert world.counted(events.UPSERTED, "retried") == 0
    assert await world.dead_letters() == []


@pytest.mark.parametrize("forgotten", [False, True], ids=["paused", "assignment forgot the pause"])
async def test_a_worker_that_waits_keeps_polling_and_loses_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, forgotten: bool
) -> None:
    upsert, subscribe = world.engines.index.upsert, world.engines.log.subscribe
    polled_while_away = 0

    async def away(documents: Sequence[IndexDocument]) -> Sequence[WriteOutcome]:
        if polled_while_away < 5:
            raise Transient("connection refused")
        return await upsert(documents)

    async def watched(*arguments: Any, **options: Any) -> EventConsumer:
        consumer = await subscribe(*arguments, **options)
        fetch = consumer.fetch

        async def counted(max_records: int, timeout: float) -> Sequence[Record]:
            nonlocal polled_while_away
            polled_while_away += max_records == 1
            return await fetch(max_records, timeout)

        monkeypatch.setattr(consumer, "fetch", counted)
        if forgotten:
            monkeypatch.setattr(consumer, "pause", lambda _: None)
        return consumer

    monkeypatch.setattr(world.engines.index, "upsert", away)
    monkeypatch.setattr(world.engines.log, "subscribe", watched)
    monkeypatch.setattr("catalens_embedder.worker._POLL_SECONDS", 0.001)
    await world.send(*(Product(product_id=f"p{number}", name="Thing", version=1) for number in range(100)))
    async with world.worker():
        await world.idle()
    assert (await world.engines.index.counts("default")).products == 100


async def test_an_event_that_the_index_refuses_while_it_takes_others_ends_as_a_dead_letter(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    upsert = world.engines.index.upsert

    async def refusing(documents: Sequence[IndexDocument]) -> Sequence[WriteOutcome]:
        if any(document.product.product_id == "x" for document in documents):
            raise Transient("internal error")
        return await upsert(documents)

    monkeypatch.setattr(world.engines.index, "upsert", refusing)
    others = count()
    async with world.worker():
        await world.send(Product(product_id="x", name="Refused", version=1))
        for attempt in range(4):

            async def gone(times: int = attempt + 1) -> bool:
                # The index must be seen to take others, after the one that it refuses was tried too.
                await world.send(Product(product_id=f"p{next(others)}", name="Good", version=1))
                return world.counted(events.UPSERTED, "retried") + world.counted(events.UPSERTED, "dead") == times

            await until(gone)
            world.clock.time += 601
        await world.idle()
    (letter,) = await world.dead_letters()
    assert (letter.headers["dlq_reason"], letter.headers["dlq_attempts"]) == ("engine_refuses", "4")
    assert letter.headers["dlq_topic"] == events.PRODUCTS
    assert (await world.engines.index.counts("default")).products == next(others)


async def test_events_that_the_index_refuses_do_not_hold_up_their_batch(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    upsert = world.engines.index.upsert

    async def refusing(documents: Sequence[IndexDocument]) -> Sequence[WriteOutcome]:
        if any(document.product.product_id.startswith("x") for document in documents):
            raise Transient("internal error")
        return await upsert(documents)

    monkeypatch.setattr(world.engines.index, "upsert", refusing)
    ids = ["x1", *(f"p{number}" for number in range(10)), "x2"]  # nothing else comes that could tell
    await world.send(*(Product(product_id=one, name="Thing", version=1) for one in ids))
    async with world.worker():

        async def told_apart() -> bool:
            return world.counted(events.UPSERTED, "retried") == 2

        await until(told_apart)
        assert (await world.engines.index.counts("default")).products == 10
        monkeypatch.setattr(world.engines.index, "upsert", upsert)
        world.clock.time += 11
        await world.idle()
    assert (await world.engines.index.counts("default")).products == 12
    assert await world.dead_letters() == []


async def test_a_model_that_is_away_fails_no_picture(
    world: World, pictures: tuple[Pictures, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    embed, times = world.encoder.embed_image, count(1)

    async def away(picture: bytes, *, bulk: bool = False) -> EncodedImage:
        if next(times) <= 300:
            raise Transient("the model process is being started again")
        return await embed(picture, bulk=bulk)

    monkeypatch.setattr(world.encoder, "embed_image", away)
    async with world.worker():
        await world.send(Product(product_id="a", name="Red thing", version=1, images=(ImageRef(url=pictures[1]),)))
        await world.idle()
        stored = await world.find("a")
    assert stored is not None
    assert stored.image_status == "ok"
    assert world.counted(events.UPSERTED, "retried") == 0


async def test_a_worker_that_waits_can_be_stopped_and_goes_on_later(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asyncio.Event()

    async def away(documents: Sequence[IndexDocument]) -> Sequence[WriteOutcome]:
        asked.set()
        raise Transient("connection refused")

    async def nothing(*_: object) -> Sequence[WriteOutcome]:
        raise Transient("connection refused")

    world.settings = world.settings.model_copy(
        update={"embedder": world.settings.embedder.model_copy(update={"drain_deadline": 0.05})}
    )
    await world.send(Deletion(product_id="b", version=1), Product(product_id="a", name="A", version=1))
    with monkeypatch.context() as outage:
        outage.setattr(world.engines.index, "upsert", away)
        outage.setattr(world.engines.index, "delete", nothing)
        outage.setattr(world.engines.index, "flush", nothing)
        async with world.worker():
            await asked.wait()
    assert await world.find("a") is None
    async with world.worker():
        await world.idle()
    assert await world.find("a") is not None
    assert await world.dead_letters() == []


# --- what comes back too late (docs/adr/0008) -------------------------------------------------------------


async def test_a_retry_that_is_late_brings_no_deleted_product_back(
    world: World, pictures: tuple[Pictures, str]
) -> None:
    hosted, url = pictures
    hosted.status = 503
    async with world.worker():
        await world.send(Product(product_id="a", name="Red thing", version=1, images=(ImageRef(url=url),)))

        async def retried() -> bool:
            return world.counted(events.UPSERTED, "retried") == 1

        await until(retried)
        await world.send(Deletion(product_id="a", version=2))

        async def deleted() -> bool:
            return world.counted(events.DELETED, "applied") == 1

        await until(deleted)
    hosted.status = 200
    days = 86_400.0
    world.clock.time += (world.settings.embedder.tombstone_days + 1) * days  # nobody worked for so long
    older = world.clock.now() - world.settings.embedder.tombstone_days * days
    assert await world.engines.index.collect_tombstones(older) == 1
    async with world.worker():
        await world.idle()
    assert await world.find("a") is None
    (letter,) = await world.dead_letters()
    assert letter.headers["dlq_reason"] == "expired"
    assert letter.headers["dlq_topic"] == events.PRODUCTS


async def test_a_wait_for_the_index_may_last_until_the_event_has_expired(
    world: World, pictures: tuple[Pictures, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hosted, url = pictures
    hosted.status = 503
    upsert, now = world.engines.index.upsert, world.clock.now()
    product = Product(product_id="a", name="Red thing", version=1, images=(ImageRef(url=url),))
    again = letters.retry(
        events.new_event(product, "default"), Record(events.PRODUCTS, 0, 0, "default|a", b"", {}, now), now, "slow"
    )
    assert again is not None

    async def away(documents: Sequence[IndexDocument]) -> Sequence[WriteOutcome]:
        world.clock.time += 2 * 86_400.0
        raise Transient("connection refused")

    monkeypatch.setattr(world.engines.index, "upsert", away)
    world.clock.time += 11.0
    await world.engines.log.append([again])
    async with world.worker():
        await world.idle()
    monkeypatch.setattr(world.engines.index, "upsert", upsert)
    assert [letter.headers["dlq_reason"] for letter in await world.dead_letters()] == ["expired"]


async def test_a_long_lag_expires_nothing(world: World) -> None:
    await world.send(Product(product_id="a", name="A", version=1))
    world.clock.time += 100 * 86_400.0
    async with world.worker():
        await world.idle()
    assert await world.find("a") is not None


def test_tombstones_must_outlive_replays_by_a_week() -> None:
    with pytest.raises(ValidationError, match=r"7 above log\.dead_letter_days"):
        Settings(_env_file=None, log=LogSettings(dead_letter_days=24))
    Settings(_env_file=None, log=LogSettings(dead_letter_days=23))
