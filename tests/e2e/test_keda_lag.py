"""The lag by which KEDA scales is the lag that the workers tell, while they run, stop and start again on a real Kafka.

KEDA's own arithmetic (getLagForPartition and getTotalLag of its Kafka scaler, offsetResetPolicy earliest,
excludePersistentLag) is written down here over what the brokers answer; the other side is `catalens_lag_records` of a
worker's /metrics. And what a worker does that KEDA's fallback starts while the brokers are away.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import aiohttp
import pytest
from aiokafka import AIOKafkaConsumer  # type: ignore[import-untyped]  # it has no py.typed
from aiokafka import TopicPartition as KafkaPlace
from aiokafka.admin import AIOKafkaAdminClient  # type: ignore[import-untyped]  # it has no py.typed
from tests.cluster import Cluster, Service, settled
from tests.kafka import Kafka, create_topics, need_kafka
from tests.models import TINY
from tests.redis_server import need_server

from catalens import events
from catalens.domain import Message, Product, TopicPartition

pytestmark = pytest.mark.timeout(120)  # what never agrees would poll for ever

_NONE: Final = -1
"""The offset of a partition that the group has committed nothing of; KEDA's invalidOffset."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    need_kafka()
    need_server()
    with Cluster(tmp_path_factory.mktemp("cluster"), partitions=3) as cluster:
        yield cluster


class Keda:
    """KEDA's Kafka scaler: one question to the brokers, then its formula."""

    def __init__(self, admin: AIOKafkaAdminClient, reader: AIOKafkaConsumer) -> None:
        self._admin = admin
        self._reader = reader
        self._previous: dict[TopicPartition, int] = {}

    async def look(self) -> int:
        """Return the lag that wants workers: of partitions whose offset has moved since the last look."""
        lag, before = await self.lag(), self._previous
        self._previous = self._committed
        return sum(count for place, count in lag.items() if before.get(place) != self._committed[place])

    async def lag(self) -> dict[TopicPartition, int]:
        """Return what each trigger of k8s/components/keda adds up, by partition."""
        described = {topic["topic"]: len(topic["partitions"]) for topic in await self._admin.describe_topics()}
        places = [KafkaPlace(topic, number) for topic in events.CONSUMED for number in range(described[topic])]
        stored = await self._admin.list_consumer_group_offsets(events.EMBEDDER_GROUP, partitions=places)
        latest = await self._reader.end_offsets(places)
        self._committed = {TopicPartition(place.topic, place.partition): stored[place].offset for place in places}
        return {
            TopicPartition(place.topic, place.partition): latest[place]
            if stored[place].offset == _NONE
            else latest[place] - stored[place].offset
            for place in places
        }


async def told(worker: Service) -> dict[TopicPartition, int]:
    """Return the lag that a worker tells Prometheus."""
    async with aiohttp.ClientSession() as session, session.get(f"{worker.url}/metrics") as answer:
        text = await answer.text()
    return {
        TopicPartition(topic, int(partition)): int(float(value))
        for partition, topic, value in re.findall(
            r'^catalens_lag_records\{partition="(\d+)",topic="([^"]+)"\} (\S+)$', text, re.MULTILINE
        )
    }


async def same(worker: Service, keda: Keda) -> Mapping[TopicPartition, int]:
    """Return the lag once both say the same twice running: the worker looks every few seconds only."""
    while True:
        before = await keda.lag()
        tells = await told(worker)
        if tells == before == await keda.lag():
            return before
        await asyncio.sleep(0.2)  # polls a real process; nothing is asserted about the time it takes


async def test_the_lag_keda_reads_is_the_lag_that_is_told(cluster: Cluster) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=cluster.kafka.bootstrap)
    reader = AIOKafkaConsumer(bootstrap_servers=cluster.kafka.bootstrap, enable_auto_commit=False)
    await admin.start()
    await reader.start()
    keda = Keda(admin, reader)
    try:
        async with cluster.log() as log:

            async def produce(first: int, count: int) -> None:
                names = [f"p{number}" for number in range(first, first + count)]
                made = [events.new_event(Product(product_id=name, name=name, version=1), "default") for name in names]
                await log.append(list(map(events.encode, made)))

            async def ours() -> Mapping[TopicPartition, int]:
                return await log.lag(events.EMBEDDER_GROUP, events.CONSUMED)

            # Nobody has ever worked: everything is to be read, and the topics without events wake nobody.
            await produce(0, 30)
            assert sum((await ours()).values()) == 30  # it asks again until the new broker knows the group
            assert await keda.lag() == await ours()

            # A retry that has expired, and the group's commits with it: KEDA sees it and wakes a worker for nothing …
            (place, _) = (await log.append([Message(events.RETRIES[0], "default|gone", b"{}")]))[0]
            await log.discard({place: 1})
            assert (await keda.lag())[place] == 1
            assert (await ours())[place] == 0

            worker = await asyncio.to_thread(cluster.service, "embedder")
            await settled(log)
            # … which says so to the brokers, or nothing would ever let it go again.
            assert set((await same(worker, keda)).values()) == {0}

            # The index refuses, so that there is lag while the worker runs.
            cluster.qdrant.refuse_writes(True)
            await produce(30, 20)
            lag = await same(worker, keda)
            while sum(lag.values()) != 20:
                lag = await same(worker, keda)
            # It wants no further workers, as nothing has moved since the last look, whoever has looked …
            assert await keda.look() == 20
            assert await keda.look() == 0
            cluster.qdrant.refuse_writes(False)
            await settled(log)
            assert await keda.look() == 0  # … and what has moved has none left

            # Scaled to zero, then from zero.
            assert await asyncio.to_thread(worker.stop) == 0
            await produce(50, 10)
            assert sum((await keda.lag()).values()) == 10
            assert await keda.lag() == await ours()
            await asyncio.to_thread(worker.start)
            await settled(log)
            assert set((await same(worker, keda)).values()) == {0}
            assert await asyncio.to_thread(worker.stop) == 0
    finally:
        await reader.stop()
        await admin.close()


async def statuses(service: Service) -> dict[str, int]:
    """Return what the probes and the metrics of a service answer."""
    async with aiohttp.ClientSession() as session:
        answers = {}
        for path in ("/livez", "/readyz", "/metrics"):
            async with session.get(f"{service.url}{path}") as answer:
                answers[path] = answer.status
        return answers


WAITING: Final = {"/livez": 200, "/readyz": 503, "/metrics": 200}


async def test_a_worker_that_is_started_while_its_engines_are_away_waits_for_them(cluster: Cluster) -> None:
    cluster.qdrant.kill()
    cluster.kafka.kill()
    worker = cluster.prepared("embedder", CATALENS_KAFKA__REQUEST_TIMEOUT="1", CATALENS_QDRANT__TIMEOUT="1")
    worker.launch()
    await asyncio.to_thread(worker.said, "embedder.index_away")
    assert await statuses(worker) == WAITING
    await asyncio.to_thread(cluster.qdrant.start)
    await asyncio.to_thread(worker.said, "embedder.log_away")
    assert await statuses(worker) == WAITING
    await asyncio.to_thread(cluster.kafka.start)
    await asyncio.to_thread(worker.said, "process.ready")
    assert await statuses(worker) == {**WAITING, "/readyz": 200}
    async with cluster.log() as log:
        made = events.new_event(Product(product_id="late", name="late", version=1), "default")
        await log.append([events.encode(made)])
        await settled(log)
    assert await asyncio.to_thread(worker.stop) == 0


@pytest.mark.parametrize("role", ["embedder", "ingest", "query"])
async def test_a_service_that_waits_for_the_log_ends_when_it_is_told_to(role: str, tmp_path: Path) -> None:
    service = Service(
        f"catalens_{role}.main",
        tmp_path,
        role,
        {
            "CATALENS_DATA_DIR": str(tmp_path / "data"),
            "CATALENS_MODEL": str(TINY),
            "CATALENS_LOG_FORMAT": "json",
            "CATALENS_HTTP__PORT": "0",
            "CATALENS_KAFKA__BOOTSTRAP_SERVERS": "127.0.0.1:1",
            "CATALENS_KAFKA__REQUEST_TIMEOUT": "1",
        },
    )
    service.launch()
    try:
        await asyncio.to_thread(service.said, f"{role}.log_away")
        assert await statuses(service) == WAITING
        assert await asyncio.to_thread(service.stop) == 0
    finally:
        service.kill()
    assert "process.stopped" in service.log()
    assert "Traceback" not in service.log()


async def test_services_that_are_started_before_there_are_topics_wait_for_them(
    cluster: Cluster, tmp_path: Path
) -> None:
    """As on Kubernetes, where the Job that makes them starts with all others: a pod that ends is held back."""
    with Kafka(tmp_path / "broker") as bare:
        services = {
            role: cluster.prepared(role, CATALENS_KAFKA__BOOTSTRAP_SERVERS=bare.bootstrap)
            for role in ("embedder", "ingest", "query")
        }
        try:
            for service in services.values():
                service.launch()
            for role, service in services.items():
                await asyncio.to_thread(service.said, f"{role}.log_away")
                assert "run `catalens topics apply`" in service.log()
                assert await statuses(service) == WAITING
            await create_topics(bare.bootstrap, dict.fromkeys(events.TOPICS, 1))
            for service in services.values():
                await asyncio.to_thread(service.said, "process.ready")
                assert await statuses(service) == {**WAITING, "/readyz": 200}
            for service in services.values():
                assert await asyncio.to_thread(service.stop) == 0
        finally:
            for service in services.values():
                service.kill()
