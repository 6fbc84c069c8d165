"""The lag by which KEDA scales is the lag that the workers tell, while they run, stop and start again on a real Kafka.

KEDA's own arithmetic (getLagForPartition and getTotalLag of its Kafka scaler, offsetResetPolicy earliest) is written
down here over what the brokers answer; the other side is `catalens_lag_records` of a worker's /metrics.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping
from typing import Final

import aiohttp
import pytest
from aiokafka import AIOKafkaConsumer  # type: ignore[import-untyped]  # it has no py.typed
from aiokafka import TopicPartition as KafkaPlace
from aiokafka.admin import AIOKafkaAdminClient  # type: ignore[import-untyped]  # it has no py.typed
from tests.cluster import Cluster, Service, settled
from tests.kafka import need_kafka
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

    async def lag(self) -> dict[TopicPartition, int]:
        """Return what each trigger of k8s/components/keda adds up, by partition."""
        described = {topic["topic"]: len(topic["partitions"]) for topic in await self._admin.describe_topics()}
        places = [KafkaPlace(topic, number) for topic in events.CONSUMED for number in range(described[topic])]
        stored = await self._admin.list_consumer_group_offsets(events.EMBEDDER_GROUP, partitions=places)
        latest = await self._reader.end_offsets(places)
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
            cluster.qdrant.refuse_writes(False)
            await settled(log)

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
