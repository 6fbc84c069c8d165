"""The adapters that each contract suite runs on: a further one is one more parameter here, the tests stay."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest
from pydantic import SecretStr
from qdrant_client import grpc
from tests.kafka import create_topics, kafka_settings, running_kafka
from tests.qdrant_server import QdrantServer
from tests.redis_server import redis_url
from tests.s3_server import s3_bucket

from catalens.engines.blobs import FileBlobStore
from catalens.engines.kafka import KafkaEventLog
from catalens.engines.memory import MemoryCache
from catalens.engines.objects import ObjectBlobStore
from catalens.engines.qdrant_wire import Connection
from catalens.engines.redis import RedisCache, RedisMemory
from catalens.engines.sqlite_log import SqliteEventLog
from catalens.engines.sqlite_memory import SqliteMemory
from catalens.ports import BlobStore, EmbeddingCache, EventLog, RequestMemory
from catalens.settings import BlobSettings, QdrantSettings, RedisSettings


@dataclass
class LogUnderTest:
    """An event log with two empty topics that no other test uses."""

    log: EventLog
    narrow: str
    """A topic of one partition."""
    wide: str
    """A topic of four partitions."""
    start: Callable[[], Awaitable[EventLog]]

    async def restart(self) -> EventLog:
        """Close the log and open it again on what it has stored."""
        await self.log.close()
        self.log = await self.start()
        return self.log


@pytest.fixture(scope="session")
def kafka_bootstrap(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real broker, started once; skips where there is none to be had."""
    with running_kafka(tmp_path_factory.mktemp("kafka")) as bootstrap:
        yield bootstrap


@pytest.fixture(params=["sqlite", "kafka"])
async def event_log(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[LogUnderTest]:
    narrow, wide = (f"{kind}-{uuid4().hex}" for kind in ("narrow", "wide"))
    if request.param == "kafka":
        bootstrap = request.getfixturevalue("kafka_bootstrap")
        await create_topics(bootstrap, {narrow: 1, wide: 4})

    async def start() -> EventLog:
        if request.param == "kafka":
            return await KafkaEventLog.open(kafka_settings(bootstrap))
        return await SqliteEventLog.open(tmp_path / "events.sqlite3", topics=(narrow, wide), partitions={wide: 4})

    under_test = LogUnderTest(await start(), narrow, wide, start)
    yield under_test
    await under_test.log.close()


@pytest.fixture(scope="session")
def qdrant_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QdrantSettings]:
    """The server of CATALENS_TEST_QDRANT_URL (gRPC port: CATALENS_TEST_QDRANT_GRPC_PORT), else Qdrant's engine behind
    its gRPC API, which is no Qdrant server, in its strict mode."""
    url = os.environ.get("CATALENS_TEST_QDRANT_URL")
    if url:
        port = int(os.environ.get("CATALENS_TEST_QDRANT_GRPC_PORT", "6334"))
        yield QdrantSettings(url=url, grpc_port=port, timeout=60)
        return
    with QdrantServer(tmp_path_factory.mktemp("qdrant") / "data", strict=True) as server:
        yield QdrantSettings(url=server.url, grpc_port=server.grpc_port, timeout=60)


@pytest.fixture
async def qdrant_settings(qdrant_server: QdrantSettings) -> AsyncIterator[QdrantSettings]:
    """Settings of collections that no other test uses."""
    settings = qdrant_server.model_copy(update={"collection": f"test-{uuid4().hex}"})
    yield settings
    connection = Connection(settings)
    answer = await connection.call(connection.collections.List, grpc.ListCollectionsRequest())
    for name in [each.name for each in answer.collections if each.name.startswith(settings.collection)]:
        await connection.call(connection.collections.Delete, grpc.DeleteCollection(collection_name=name))
    await connection.close()


@pytest.fixture(params=["file", "s3"])
async def blob_store(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[BlobStore]:
    async with AsyncExitStack() as stack:
        store: BlobStore
        if request.param == "s3":
            await stack.enter_async_context(s3_bucket(monkeypatch))
            store = await ObjectBlobStore.open(BlobSettings(url="s3://pictures/of/the shop"))
        else:
            store = FileBlobStore(tmp_path / "blobs")
        stack.push_async_callback(store.close)
        yield store


CACHE_ENTRIES = 8


@pytest.fixture(params=["memory", "redis"])
async def embedding_cache(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[EmbeddingCache]:
    """A cache with room for at least CACHE_ENTRIES vectors, which keeps every bit of them."""
    async with AsyncExitStack() as stack:
        cache: EmbeddingCache
        if request.param == "redis":
            cache = await RedisCache.open(redis_settings(stack.enter_context(redis_url(tmp_path / "redis"))))
        else:
            cache = MemoryCache(CACHE_ENTRIES)
        stack.push_async_callback(cache.close)
        yield cache


def redis_settings(url: str) -> RedisSettings:
    """Return settings for a Redis of the tests; its time limit is for a machine that is busy with other things."""
    return RedisSettings(url=SecretStr(url), precision="float32", timeout=30)


class SettableClock:
    """The `now` of a test."""

    def __init__(self) -> None:
        self.seconds = 1_800_000_000.0

    def __call__(self) -> float:
        return self.seconds


@dataclass
class MemoryUnderTest:
    """A request memory and the time it lives in."""

    memory: RequestMemory
    clock: SettableClock
    start: Callable[[], Awaitable[RequestMemory]]

    async def restart(self) -> RequestMemory:
        """Close the memory and open it again on what it has stored."""
        await self.memory.close()
        self.memory = await self.start()
        return self.memory


@pytest.fixture(params=["sqlite", "redis"])
async def request_memory(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[MemoryUnderTest]:
    clock = SettableClock()
    with ExitStack() as stack:
        if request.param == "redis":
            settings = redis_settings(stack.enter_context(redis_url(tmp_path / "redis")))

        async def start() -> RequestMemory:
            if request.param == "redis":
                return await RedisMemory.open(settings, now=clock)
            return await SqliteMemory.open(tmp_path / "requests.sqlite3", now=clock)

        under_test = MemoryUnderTest(await start(), clock, start)
        yield under_test
        await under_test.memory.close()
