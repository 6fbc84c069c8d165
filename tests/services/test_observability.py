"""What an operator sees: a trace from HTTP to the index, the ids in log lines, the metrics of the pipeline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from structlog.contextvars import get_contextvars
from structlog.testing import capture_logs
from tests.collector import Collector, Seen, collecting

from catalens import events, tracing
from catalens.domain import Message, Product
from catalens.encoders import open_encoder
from catalens.engines import Engines, open_engines
from catalens.retry import SystemClock
from catalens.settings import EncoderSettings, HttpSettings, PictureSettings, Settings, TracingSettings
from catalens.telemetry import Metrics
from catalens.web import build_app, serving
from catalens_embedder import letters
from catalens_embedder.worker import Embedder
from catalens_ingest.service import BundleInfo, IngestService
from catalens_query.service import QueryService

TINY = Path(__file__).parent.parent / "fixtures" / "bundles" / "tiny"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PUT = "PUT /api/v1/products/{product_id}"
SEARCH = "POST /api/v1/search"


@dataclass
class World:
    """All services in one process, a worker that runs on demand, and the collector."""

    url: str
    session: aiohttp.ClientSession
    engines: Engines
    embedder: Embedder
    collector: Collector
    metrics: Metrics

    async def put(self, product_id: str, traceparent: str | None = None, image: str | None = None) -> str:
        """Put a product and return the id of its event."""
        body = {"name": "Red shoe", **({"images": [{"url": image}]} if image else {})}
        headers = {"traceparent": traceparent} if traceparent else {}
        async with self.session.put(f"{self.url}/api/v1/products/{product_id}", json=body, headers=headers) as answer:
            assert answer.status == 202
            event_id: str = (await answer.json())["event_id"]
            return event_id

    async def work(self) -> None:
        """Let the worker take everything that waits, and stop it."""
        stop = asyncio.Event()
        task = asyncio.create_task(self.embedder.run(stop), name="embedder")
        while any((await self.engines.log.lag(events.EMBEDDER_GROUP, events.CONSUMED)).values()):
            assert not task.done()
            await asyncio.sleep(0.01)
        stop.set()
        await task

    def sample(self, name: str, **labels: str) -> float:
        """Return a metric's value as Prometheus would get it."""
        return self.metrics.registry.get_sample_value(f"catalens_{name}", labels) or 0.0

    async def sent(self) -> Collector:
        """Return the collector once it has every span that was recorded."""
        await asyncio.to_thread(tracing.shutdown)
        return self.collector


def settings_for(folder: Path, endpoint: str, sample: float = 1.0) -> Settings:
    return Settings(
        _env_file=None,
        data_dir=folder,
        model=str(TINY),
        http=HttpSettings(port=0),
        encoder=EncoderSettings(lanes=1),
        pictures=PictureSettings(allow_private_networks=True),
        tracing=TracingSettings(endpoint=endpoint, sample=sample),
    )


@pytest.fixture
def sample() -> float:
    return 1.0


@pytest.fixture
async def world(tmp_path: Path, sample: float) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        collector = await stack.enter_async_context(collecting())
        settings, metrics = settings_for(tmp_path, collector.url, sample), Metrics()
        tracing.configure(settings, "catalens-test")
        stack.push_async_callback(asyncio.to_thread, tracing.shutdown)
        encoder = await stack.enter_async_context(open_encoder(settings, metrics))
        engines = await stack.enter_async_context(open_engines(settings, encoder.spec))
        ingest = IngestService(
            log=engines.log, blobs=engines.blobs, images=engines.images, memory=engines.memory,
            bundle=lambda: BundleInfo("tiny", encoder.spec.dimension), settings=settings, metrics=metrics,
        )  # fmt: skip
        query = QueryService(
            index=engines.index, encoder=encoder, cache=engines.cache, blobs=engines.blobs, images=engines.images,
            log=engines.log, settings=settings, metrics=metrics,
        )  # fmt: skip
        embedder = Embedder(
            log=engines.log, index=engines.index, encoder=encoder, cache=engines.cache, blobs=engines.blobs,
            images=engines.images, settings=settings, metrics=metrics, clock=SystemClock(),
        )  # fmt: skip
        app = build_app(
            [*ingest.operations(), *query.operations()], settings, metrics, ready=query.ready, title="Catalens"
        )
        url = await stack.enter_async_context(serving(app, settings))
        session = await stack.enter_async_context(aiohttp.ClientSession())
        yield World(url, session, engines, embedder, collector, metrics)


def only(spans: list[Seen]) -> Seen:
    (span,) = spans
    return span


async def test_a_put_is_one_trace_up_to_the_index(world: World) -> None:
    event_id = await world.put("shoe", f"00-{TRACE}-{PARENT}-01")
    await world.work()
    seen = await world.sent()
    door, append, process = (only(seen.named(name)) for name in (PUT, "append", "process"))
    embed, write = (only(seen.named(name)) for name in ("embed", "index_write"))
    assert {span.trace for span in seen.spans} == {TRACE}
    assert (door.parent, append.parent, process.parent) == (PARENT, door.span, door.span)
    assert (embed.parent, write.parent) == (process.span, process.span)
    assert door.attributes["http.response.status_code"] == 202
    assert door.attributes["http.route"] == "/api/v1/products/{product_id}"
    assert process.attributes["catalens.event_ids"] == [event_id]
    assert process.attributes["catalens.products"] == ["default|shoe"]
    assert {span.service for span in seen.spans} == {"catalens-test"}


async def test_each_event_of_a_batch_keeps_its_own_trace(world: World) -> None:
    for number in range(3):
        await world.put(f"p{number}")
    await world.work()
    seen = await world.sent()
    doors = {span.trace: span for span in seen.named(PUT)}
    assert len(doors) == 3
    processed = seen.named("process")
    assert {span.trace: span.parent for span in processed} == {trace: door.span for trace, door in doors.items()}
    written = seen.named("index_write")
    assert {span.trace for span in written} == doors.keys()
    assert {span.parent for span in written} <= {span.span for span in processed}


async def test_lines_of_one_request_share_its_spans(world: World) -> None:
    lines = b"\n".join(
        Product(product_id=f"p{n}", name="Thing", version=1).model_dump_json().encode() for n in range(5)
    )
    async with world.session.post(
        f"{world.url}/api/v1/products", data=lines, headers={"Content-Type": "application/x-ndjson"}
    ) as answer:
        assert (await answer.json())["accepted"] == 5
    await world.work()
    seen = await world.sent()
    assert len({span.trace for span in seen.spans}) == 1
    assert sum(span.attributes["messaging.batch.message_count"] for span in seen.named("process")) == 5
    assert len(seen.named("index_write")) <= len(seen.named("process")) * 2


async def test_a_remote_picture_is_part_of_the_trace(world: World) -> None:
    app = web.Application()
    async with TestServer(app) as host:  # answers 404: the picture is gone
        await world.put("shoe", f"00-{TRACE}-{PARENT}-01", image=str(host.make_url("/gone.jpg")))
        await world.work()
    seen = await world.sent()
    fetch, pictures = only(seen.named("fetch_picture")), only(seen.named("pictures"))
    assert (fetch.trace, fetch.parent) == (TRACE, pictures.span)
    assert (fetch.failed, fetch.attributes["catalens.outcome"]) == (True, "gone")
    assert pictures.parent == only(seen.named(PUT)).span
    assert world.sample("picture_fetch_seconds_count", outcome="gone") == 1


async def test_a_search_tells_where_its_time_went(world: World) -> None:
    await world.put("shoe")
    await world.work()
    async with world.session.post(f"{world.url}/api/v1/search", json={"query": "red shoe"}) as answer:
        assert (await answer.json())["count"] == 1
    seen = await world.sent()
    search = only(seen.named(SEARCH))
    parts = {span.name for span in seen.spans if span.parent == search.span}
    assert parts == {"encode", "search", "fuse", "load"}


async def test_a_poisoned_event_tells_its_trace_that_it_is_dead(world: World) -> None:
    await world.put("shoe", f"00-{TRACE}-{PARENT}-01")
    message = events.encode(events.new_event(Product(product_id="x", name="X", version=1), "default"))
    headers = {**message.headers, "ce_traceparent": f"00-{TRACE}-{PARENT}-01"}
    await world.engines.log.append([Message(message.topic, message.key, b"{", headers)])
    with capture_logs() as logs:
        await world.work()
    (dead,) = [entry for entry in logs if entry["event"] == "event.dead"]
    assert (dead["trace_id"], dead["product_id"], dead["tenant"]) == (TRACE, "x", "default")
    assert dead["event_id"] == headers["ce_id"]
    seen = await world.sent()
    letter = only(seen.named("dead_letter"))
    assert (letter.trace, letter.attributes["catalens.reason"]) == (TRACE, "invalid_event")


async def test_who_comes_unsampled_stays_unsampled(world: World) -> None:
    await world.put("shoe", f"00-{TRACE}-{PARENT}-00")
    consumer = await world.engines.log.subscribe("test", [events.PRODUCTS])
    (record,) = await consumer.fetch(10, 5.0)
    await consumer.close()
    assert record.headers["ce_traceparent"].startswith(f"00-{TRACE}-")
    assert record.headers["ce_traceparent"].endswith("-00")
    await world.work()
    assert (await world.sent()).spans == []


@pytest.mark.parametrize("sample", [0.0])
async def test_a_trace_that_is_not_sampled_at_the_door_is_not_begun_by_the_worker(world: World) -> None:
    await world.put("shoe")
    await world.work()
    assert (await world.sent()).spans == []


async def test_probes_have_no_traces(world: World) -> None:
    for path in ("/livez", "/readyz", "/metrics"):
        async with world.session.get(world.url + path) as answer:
            assert answer.status == 200
    assert (await world.sent()).spans == []


async def test_what_fails_in_the_service_is_a_failed_span(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("nobody foresaw it")

    monkeypatch.setattr(world.engines.log, "append", broken)
    async with world.session.put(f"{world.url}/api/v1/products/a", json={"name": "A"}) as answer:
        assert answer.status == 500
    seen = await world.sent()
    assert only(seen.named(PUT)).failed
    assert only(seen.named("append")).failed


async def test_an_endpoint_that_is_away_costs_one_line(world: World) -> None:
    world.collector.status = 400
    with capture_logs() as logs:
        for number in range(3):
            await world.put(f"p{number}")
            while world.collector.requests < 1:
                await asyncio.sleep(0.01)
        await asyncio.to_thread(tracing.shutdown)
    assert [entry["event"] for entry in logs if entry["event"].startswith(("tracing.", "library."))] == ["tracing.away"]
    assert world.collector.requests == 1, "left alone for a while"


async def test_log_lines_of_a_request_carry_its_ids(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[dict[str, object]] = []

    async def broken(_reference: str) -> bytes:
        bound.append(get_contextvars())
        raise RuntimeError("nobody foresaw it")

    monkeypatch.setattr(world.engines.blobs, "get", broken)
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "mine"}
    body = {"name": "A", "images": [{"blob": "a" * 64}]}
    async with world.session.put(f"{world.url}/api/v1/products/shoe", json=body, headers=headers) as answer:
        assert answer.status == 500
    assert bound == [{"request_id": "mine", "trace_id": TRACE, "product_id": "shoe", "tenant": "default"}]


# --- metrics ----------------------------------------------------------------------------------------------


async def test_the_pipeline_tells_what_it_does(world: World) -> None:
    for number in range(3):
        await world.put(f"p{number}")
    await world.work()
    assert world.sample("append_seconds_count") == 3
    assert world.sample("batch_records_sum") == 3
    assert world.sample("freshness_seconds_count") == 3
    batches = world.sample("batch_records_count")
    for stage in ("batch", "index_read", "embed", "index_write"):
        assert world.sample("stage_seconds_count", stage=stage) == batches
    assert world.sample("stage_seconds_count", stage="commit") >= 1
    assert world.sample("in_flight_records") == 0
    assert world.sample("encoder_lanes", tower="text") == 1
    assert world.sample("encoder_busy_seconds_total", tower="text") > 0
    models = [sample for family in world.metrics.model.collect() for sample in family.samples]
    assert [(sample.labels["model"], sample.value) for sample in models] == [("tiny", 1.0)]


async def test_the_lag_of_every_partition_is_told(world: World) -> None:
    await world.put("shoe")
    world.metrics.lag.labels(events.PRODUCTS, "0").set(77)
    await world.work()
    told = {sample.labels["topic"] for family in world.metrics.lag.collect() for sample in family.samples}
    assert told == set(events.CONSUMED)
    assert world.sample("lag_records", topic=events.PRODUCTS, partition="0") <= 1


async def test_a_log_that_cannot_tell_its_lag_does_not_stop_the_worker(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    lag = world.engines.log.lag

    async def away(*arguments: Any) -> Any:
        task = asyncio.current_task()
        if task is not None and task.get_name() == "embedder.lag":
            raise RuntimeError("nobody foresaw it")
        return await lag(*arguments)

    monkeypatch.setattr(world.engines.log, "lag", away)
    await world.put("shoe")
    with capture_logs() as logs:
        await world.work()
    assert [entry["error"] for entry in logs if entry["event"] == "embedder.lag_unknown"] == [
        "RuntimeError: nobody foresaw it"
    ]


async def test_freshness_counts_a_retry_in_full(world: World) -> None:
    event = events.new_event(Product(product_id="late", name="Late", version=1), "default")
    message = events.encode(event)
    headers = {**message.headers, events.FIRST_ARRIVAL: str(time.time() - 500)}
    await world.engines.log.append([Message(events.RETRIES[0], message.key, message.value, headers)])
    await world.work()
    assert world.sample("freshness_seconds_sum") >= 500


async def test_what_waits_and_what_fails_is_told(world: World) -> None:
    message = events.encode(events.new_event(Product(product_id="a", name="A", version=1), "default"))
    poison = Message(message.topic, message.key, b"{", message.headers)
    later = {**message.headers, letters.DUE: str(time.time() + 3600)}
    await world.engines.log.append([poison, Message(events.RETRIES[1], message.key, message.value, later)])
    stop = asyncio.Event()
    task = asyncio.create_task(world.embedder.run(stop), name="embedder")
    assert world.sample("dead_letters_left_records") == 100
    while not (
        world.sample("paused_partitions", reason="not_due") == 1 and world.sample("dead_letters_left_records") == 99
    ):
        assert not task.done()
        await asyncio.sleep(0.01)
    assert world.sample("dead_letters_total", reason="invalid_event") == 1
    stop.set()
    await task
