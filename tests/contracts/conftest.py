"""The adapters that each contract suite runs on: a further one is one more parameter here, the tests stay."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from catalens.engines.blobs import FileBlobStore
from catalens.engines.memory import MemoryCache
from catalens.engines.sqlite_log import SqliteEventLog
from catalens.engines.sqlite_memory import SqliteMemory
from catalens.ports import BlobStore, EmbeddingCache, EventLog, RequestMemory


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


@pytest.fixture(params=["sqlite"])
async def event_log(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[LogUnderTest]:
    async def start() -> EventLog:
        return await SqliteEventLog.open(tmp_path / "events.sqlite3", topics=("narrow", "wide"), partitions={"wide": 4})

    under_test = LogUnderTest(await start(), "narrow", "wide", start)
    yield under_test
    await under_test.log.close()


@pytest.fixture(params=["file"])
async def blob_store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[BlobStore]:
    store = FileBlobStore(tmp_path / "blobs")
    yield store
    await store.close()


CACHE_ENTRIES = 8


@pytest.fixture(params=["memory"])
async def embedding_cache(request: pytest.FixtureRequest) -> AsyncIterator[EmbeddingCache]:
    """A cache with room for at least CACHE_ENTRIES vectors."""
    cache = MemoryCache(CACHE_ENTRIES)
    yield cache
    await cache.close()


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


@pytest.fixture(params=["sqlite"])
async def request_memory(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[MemoryUnderTest]:
    clock = SettableClock()

    async def start() -> RequestMemory:
        return await SqliteMemory.open(tmp_path / "requests.sqlite3", now=clock)

    under_test = MemoryUnderTest(await start(), clock, start)
    yield under_test
    await under_test.memory.close()
