"""A cluster under fire: whatever is killed, the index ends as exactly the last accepted state of every product.

CHAOS_SECONDS is how long each scenario goes on under load (20; `make test-chaos` takes 120).
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from tests.cluster import Cluster, Service, settled
from tests.kafka import need_kafka
from tests.ledger import Load, differences, everything, picture
from tests.redis_server import need_server

from catalens import events
from catalens.domain import Deletion, IndexInfo, Message, Product, Record
from catalens.encoders import open_encoder
from catalens.ports import EventLog
from catalens.settings import Settings
from catalens.telemetry import Metrics

SECONDS = float(os.environ.get("CHAOS_SECONDS", "20"))

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    need_kafka()
    need_server()
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
async def log(cluster: Cluster) -> AsyncIterator[EventLog]:
    async with cluster.log() as log:
        yield log


@pytest.fixture
async def ingest(cluster: Cluster) -> AsyncIterator[Service]:
    service = await asyncio.to_thread(cluster.service, "ingest")
    yield service
    assert await asyncio.to_thread(service.stop) == 0


class Workers:
    """The embedder processes of one scenario."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.all: list[Service] = []

    async def scale(self, wanted: int) -> None:
        """Start or gracefully stop some, until `wanted` run."""
        while len(self.all) > wanted:
            assert await asyncio.to_thread(self.all.pop().stop) == 0
        while len(self.all) < wanted:
            self.all.append(await asyncio.to_thread(self._cluster.service, "embedder"))

    async def kill_one(self, dice: random.Random) -> None:
        """Kill a random one and start it again."""
        worker = dice.choice(self.all)
        await asyncio.to_thread(worker.kill)
        await asyncio.to_thread(worker.start)


@pytest.fixture
async def workers(cluster: Cluster, log: EventLog) -> AsyncIterator[Workers]:
    workers = Workers(cluster)
    yield workers
    await workers.scale(0)


@asynccontextmanager
async def under_load(load: Load, ingest: Service) -> AsyncIterator[None]:
    """Send events for as long as the block runs; leaving it returns when everything that was sent is accepted."""
    load.urls = [ingest.url]
    stop = asyncio.Event()
    sending = asyncio.create_task(load.run(stop), name="load")
    try:
        yield
    finally:
        stop.set()
        load.may_send.set()
        await sending


async def hold_back(load: Load, log: EventLog, groups: Sequence[str]) -> None:
    """Let `load` send only while each group that is being read has little to go.

    Otherwise a busy machine may take more events than it can process, for ever, and who follows never catches up: it
    has caught up when no more is left than may be in work, so that much must be out of the load's reach.
    """
    little = Settings().embedder.in_flight // 2
    while True:
        read = [group for group in groups if await log.members(group)]
        behind = [sum((await log.lag(group, events.COMPACTED)).values()) for group in read]
        if max(behind, default=0) < little:
            load.may_send.set()
        else:
            load.may_send.clear()
        await asyncio.sleep(0.2)


async def compare(cluster: Cluster, log: EventLog, load: Load, prefix: str) -> None:
    """Fail unless the index is exactly what the ledger says."""
    await settled(log)
    async with cluster.index() as (index, encoder):
        wrong = await differences(load.ledger, index, encoder, prefix)
    assert not wrong, f"{len(wrong)} differences, of them {wrong[:5]}"
    assert load.ledger.contents, "nothing was accepted, so nothing was shown"


async def buried(log: EventLog, since: dict[str, int] | None = None) -> list[Record]:
    """Return every dead letter."""
    return [record async for record in log.scan([events.DEAD_LETTERS]) if "dlq_reason" in record.headers]


async def test_workers_killed_under_load(cluster: Cluster, log: EventLog, ingest: Service, workers: Workers) -> None:
    dice, load = random.Random(1), Load("kills", products=300, seed=1)
    await workers.scale(2)
    async with under_load(load, ingest):
        for _ in range(max(2, int(SECONDS // 5))):
            await asyncio.sleep(dice.uniform(1, 4))
            await workers.kill_one(dice)
    await compare(cluster, log, load, "kills")


async def test_two_workers_then_six_then_one(
    cluster: Cluster, log: EventLog, ingest: Service, workers: Workers
) -> None:
    load = Load("scale", products=300, seed=2)
    async with under_load(load, ingest):
        for wanted in (2, 6, 1):
            await workers.scale(wanted)
            await asyncio.sleep(SECONDS / 5)
    await compare(cluster, log, load, "scale")


async def test_kafka_killed_and_started_again(
    cluster: Cluster, log: EventLog, ingest: Service, workers: Workers
) -> None:
    load = Load("kafka", products=300, seed=3)
    await workers.scale(2)
    async with under_load(load, ingest):
        for _ in range(max(1, int(SECONDS // 30))):
            await asyncio.sleep(3)
            await asyncio.to_thread(cluster.kafka.kill)
            await asyncio.sleep(2)
            await asyncio.to_thread(cluster.kafka.start)
            await asyncio.sleep(SECONDS / 5)
    await compare(cluster, log, load, "kafka")
    assert all(worker.running for worker in workers.all), "a worker ended because Kafka was away"


async def test_redis_killed_and_started_again(
    cluster: Cluster, log: EventLog, ingest: Service, workers: Workers
) -> None:
    load = Load("redis", products=300, seed=4)
    await workers.scale(2)
    async with under_load(load, ingest):
        await asyncio.sleep(2)
        await asyncio.to_thread(cluster.redis.kill)
        await asyncio.sleep(SECONDS / 5)
        await asyncio.to_thread(cluster.redis.start)
        await asyncio.sleep(2)
    await compare(cluster, log, load, "redis")
    assert all(worker.running for worker in workers.all), "a worker ended because Redis was away"


async def test_index_refuses_writes(cluster: Cluster, log: EventLog, ingest: Service, workers: Workers) -> None:
    load = Load("refused", products=300, seed=5)
    letters_before = len(await buried(log))
    await workers.scale(2)
    async with under_load(load, ingest):
        await asyncio.sleep(2)
        cluster.qdrant.refuse_writes(True)
        await asyncio.sleep(30 if SECONDS > 20 else 10)
        cluster.qdrant.refuse_writes(False)
        await asyncio.sleep(2)
    await compare(cluster, log, load, "refused")
    assert len(await buried(log)) == letters_before, "good events became dead letters"


async def test_poison_costs_nobody_else(cluster: Cluster, log: EventLog, ingest: Service, workers: Workers) -> None:
    load = Load("poison", products=300, seed=6)
    known = {(record.partition, record.offset) for record in await buried(log)}
    upsert = {"ce_type": events.UPSERTED, "ce_specversion": "1.0"}
    kinds = [
        (b"{not json", upsert),
        (b'{"product_id": "poison-x"}', upsert),
        (b"{}", {"ce_type": "catalens.product.upserted.v99"}),
        (b"\xff\xfe", {}),
        (b'{"product_id": "poison-x", "name": "x", "version": 0}', upsert),
        (b'{"product_id": "poison-x", "name": "x", "version": 1, "images": [{"data": "!"}]}', upsert),
    ]
    await workers.scale(2)
    poisoned = 0
    async with under_load(load, ingest):
        while load.accepted < 600 or poisoned < 12:
            value, headers = kinds[poisoned % len(kinds)]
            await log.append([Message(events.PRODUCTS, f"default|poison-x{poisoned}", value, headers)])
            poisoned += 1
            goal = load.accepted + 100
            while load.accepted < goal:
                await asyncio.sleep(0.05)
    await compare(cluster, log, load, "poison")
    fresh = [record for record in await buried(log) if (record.partition, record.offset) not in known]
    assert sorted(record.key for record in fresh) == sorted(f"default|poison-x{number}" for number in range(poisoned))
    assert {record.headers["dlq_reason"] for record in fresh} == {"invalid_event"}
    assert {(record.value, record.headers["dlq_topic"]) for record in fresh} == {(v, events.PRODUCTS) for v, _ in kinds}


async def test_the_model_dies_in_the_middle_of_a_batch(
    cluster: Cluster, log: EventLog, ingest: Service, tmp_path: Path
) -> None:
    load = Load("deadly", products=200, seed=7)
    worker = await asyncio.to_thread(
        cluster.service, "embedder", "tests.dying_worker", DYING_AFTER="100", DYING_MARK=str(tmp_path / "died")
    )
    async with under_load(load, ingest):
        while worker.running:
            await asyncio.sleep(0.1)
        assert (tmp_path / "died").exists()
        await asyncio.to_thread(worker.start)
        await asyncio.sleep(2)
    await compare(cluster, log, load, "deadly")
    assert await asyncio.to_thread(worker.stop) == 0


async def test_scaled_to_zero_with_a_retry_pending(cluster: Cluster, log: EventLog, workers: Workers) -> None:
    healthy = False

    async def deliver(_request: web.Request) -> web.Response:
        return web.Response(body=picture(1)) if healthy else web.Response(status=503)

    app = web.Application()
    app.router.add_get("/shoe.png", deliver)
    async with TestServer(app) as shop:
        await workers.scale(1)
        body = {
            "product_id": "zero-1",
            "name": "shoe",
            "version": 1,
            "images": [{"url": str(shop.make_url("/shoe.png"))}],
        }
        event = events.new_event(Product.model_validate(body), "default")
        await log.append([events.encode(event)])
        while not (await log.lag(events.EMBEDDER_GROUP, events.RETRIES)) or not any(
            (await log.lag(events.EMBEDDER_GROUP, events.RETRIES)).values()
        ):
            await asyncio.sleep(0.1)
        await workers.scale(0)
        # What a scaler reads while nobody runs: it must see the retry that waits, or nobody would ever wake up.
        assert sum((await log.lag(events.EMBEDDER_GROUP, events.RETRIES)).values()) == 1
        async with cluster.index() as (index, _):
            assert (await everything(index, "zero"))["zero-1"].image_status == "pending"
        healthy = True
        await workers.scale(1)
        await settled(log)
        async with cluster.index() as (index, _):
            point = (await everything(index, "zero"))["zero-1"]
        assert (point.image_status, "image" in point.vectors) == ("ok", True)
        # The shop closes now: a later change of the model would have to fetch the picture again, and wait for it.
        await log.append([events.encode(events.new_event(Deletion(product_id="zero-1", version=2), "default"))])
        await settled(log)


async def test_sigterm_drains_and_commits(cluster: Cluster, log: EventLog, workers: Workers) -> None:
    await settled_somehow(log, workers)
    batch = [
        events.encode(
            events.new_event(
                Product.model_validate({"product_id": f"drain-{n}", "name": f"n {n}", "version": 1}), "default"
            )
        )
        for n in range(3000)
    ]
    places = dict(zip((f"drain-{n}" for n in range(3000)), await log.append(batch), strict=True))
    worker = await asyncio.to_thread(cluster.service, "embedder")
    before = sum((await log.lag(events.EMBEDDER_GROUP, [events.PRODUCTS])).values())
    while sum((await log.lag(events.EMBEDDER_GROUP, [events.PRODUCTS])).values()) == before:
        await asyncio.sleep(0.05)
    assert await asyncio.to_thread(worker.stop) == 0
    committed = await log.committed(events.EMBEDDER_GROUP, [events.PRODUCTS])
    async with cluster.index() as (index, _):
        indexed = (await everything(index, "drain")).keys()
    done = {name for name, (place, offset) in places.items() if offset < committed[place]}
    assert indexed == done, "what was finished is not what was committed"
    assert 0 < len(done) < len(places), "the signal did not come in the middle"
    await workers.scale(1)
    await settled(log)
    async with cluster.index() as (index, _):
        assert (await everything(index, "drain")).keys() == places.keys()


async def test_another_model_under_load_killed_twice(
    cluster: Cluster, log: EventLog, ingest: Service, workers: Workers
) -> None:
    dice, load = random.Random(8), Load("model", products=300, seed=8)
    await workers.scale(2)
    query = await asyncio.to_thread(cluster.service, "query")
    answered: list[str] = []

    async def search(stop: asyncio.Event) -> None:
        async with aiohttp.ClientSession() as session:
            while not stop.is_set():
                async with session.post(f"{query.url}/api/v1/search", json={"query": "red shoe"}) as answer:
                    assert answer.status == 200, await answer.text()
                    answered.append((await answer.json())["model"])
                await asyncio.sleep(0.05)

    async def reindex(seconds: float | None) -> int:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "catalens_standalone.cli", "reindex", "--model", "second"),
            cwd=cluster.folder,
            env={**os.environ, **cluster.environment()},
        )
        if seconds is not None:
            await asyncio.sleep(seconds)
            if process.returncode is None:
                process.kill()
        return await process.wait()

    stop = asyncio.Event()
    searching = asyncio.create_task(search(stop), name="search")
    settings = cluster.settings(CATALENS_MODEL="second")
    async with open_encoder(settings, Metrics()) as encoder:
        second = IndexInfo("second", encoder.spec)
    holding = asyncio.create_task(
        hold_back(load, log, [events.EMBEDDER_GROUP, events.REINDEX_GROUPS + second.name]), name="hold back"
    )
    async with under_load(load, ingest):
        await asyncio.sleep(2)
        for _ in range(2):
            await reindex(dice.uniform(3, 8))
        assert await reindex(None) == 0
        while "second" not in answered:
            assert not searching.done(), searching.result()
            await asyncio.sleep(0.1)
        await asyncio.sleep(2)
        assert not holding.done(), holding.result()
        holding.cancel()
    stop.set()
    await searching
    assert answered == sorted(answered), "an answer of the old model after one of the new"
    await compare(cluster, log, load, "model")
    assert await asyncio.to_thread(query.stop) == 0


async def settled_somehow(log: EventLog, workers: Workers) -> None:
    """Let a worker finish what earlier tests left, then have none."""
    await workers.scale(1)
    await settled(log)
    await workers.scale(0)
