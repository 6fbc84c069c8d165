"""The adapters behind the ports; `EngineRoom` is the only place that chooses among them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from catalens.domain import IndexInfo, ModelSpec
from catalens.errors import Misconfigured, ModelMismatch
from catalens.events import TOPICS
from catalens.ports import (
    BlobStore,
    EmbeddingCache,
    EventLog,
    ImageSource,
    Indexes,
    RateLimiter,
    RequestMemory,
    VectorIndex,
)
from catalens.settings import Settings

# The adapters are imported where they are opened: each brings its own dependencies, which a process that does not
# use it has not installed.
# ruff: noqa: PLC0415


class EngineRoom:
    """Opens the engines that the settings name, each when asked for, and closes them in the reverse order.

    Opening raises Misconfigured (folder in use or of a newer release, an extra that is not installed, a server that
    refuses us), NoTopic, ModelMismatch, StorageFull and Transient (a server that is away).
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stack = AsyncExitStack()
        self._opened_folder: Path | None = None
        self._opened_indexes: Indexes | None = None

    async def __aenter__(self) -> Self:
        """Open nothing yet."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close what was opened."""
        await self._stack.aclose()

    async def log(self) -> EventLog:
        """Open the event log: Kafka, or the file of one process."""
        log: EventLog
        if self._settings.kafka.bootstrap_servers:
            with _extra("kafka"):
                from catalens.engines.kafka import KafkaEventLog
            log = await KafkaEventLog.open(self._settings, required=TOPICS)
        else:
            from catalens.engines.sqlite_log import SqliteEventLog

            log = await SqliteEventLog.open(
                self._folder() / "events.sqlite",
                retention_hours=self._settings.log.retention_hours,
                dead_letter_days=self._settings.log.dead_letter_days,
            )
        self._stack.push_async_callback(log.close)
        return log

    async def indexes(self) -> Indexes:
        """Open what looks after the vector indexes: of a Qdrant server, or of this process."""
        if self._opened_indexes is None:
            if self._settings.qdrant.url:
                with _extra("qdrant"):
                    from catalens.engines.qdrant import QdrantIndexes
                self._opened_indexes = await QdrantIndexes.connect(self._settings.qdrant)
            else:
                with _extra("embedded"):
                    from catalens.engines.edge_home import EdgeIndexes
                self._opened_indexes = EdgeIndexes(self._folder(), self._settings.model)
            self._stack.push_async_callback(self._opened_indexes.close)
        return self._opened_indexes

    async def index(self, info: IndexInfo) -> VectorIndex:
        """Open the current index, made of `info` if there is none; ModelMismatch if it is of another model."""
        indexes = await self.indexes()
        index = await indexes.open(await fitting(indexes, info))
        self._stack.push_async_callback(index.close)
        return index

    async def cache(self) -> EmbeddingCache:
        """Open the embedding cache: Redis, or this process's memory."""
        cache: EmbeddingCache
        if self._settings.redis.url is not None:
            with _extra("redis"):
                from catalens.engines.redis import RedisCache
            cache = await RedisCache.open(self._settings.redis)
        else:
            from catalens.engines.memory import MemoryCache

            cache = MemoryCache(self._settings.encoder.cache_entries)
        self._stack.push_async_callback(cache.close)
        return cache

    async def blobs(self, *, read_only: bool = False) -> BlobStore:
        """Open the store of uploaded pictures: an object store, or a folder of several processes or of this one.

        With `read_only` a folder is never written to, so it may be mounted for reading alone.
        """
        blobs: BlobStore
        url = self._settings.blobs.url
        if url and not url.startswith("file://"):
            with _extra("objects"):
                from catalens.engines.objects import ObjectBlobStore
            blobs = await ObjectBlobStore.open(self._settings.blobs)
        else:
            from catalens.engines.blobs import FileBlobStore, folder_of

            blobs = FileBlobStore(folder_of(url) if url else self._folder() / "blobs", read_only=read_only)
        self._stack.push_async_callback(blobs.close)
        return blobs

    async def images(self) -> ImageSource:
        """Open what fetches remote pictures."""
        from catalens.engines.images import HttpImages

        images = HttpImages(self._settings.pictures)
        self._stack.push_async_callback(images.close)
        return images

    async def memory(self) -> RequestMemory:
        """Open the memory of Idempotency-Keys: Redis, or a file of one process."""
        memory: RequestMemory
        if self._settings.redis.url is not None:
            with _extra("redis"):
                from catalens.engines.redis import RedisMemory
            memory = await RedisMemory.open(self._settings.redis)
        else:
            from catalens.engines.sqlite_memory import SqliteMemory

            memory = await SqliteMemory.open(self._folder() / "requests.sqlite")
        self._stack.push_async_callback(memory.close)
        return memory

    async def limiter(self) -> RateLimiter:
        """Open what counts the requests of API keys: Redis, or this process's memory."""
        limiter: RateLimiter
        if self._settings.redis.url is not None:
            with _extra("redis"):
                from catalens.engines.redis import RedisLimiter
            limiter = await RedisLimiter.open(self._settings.redis)
        else:
            from catalens.limits import TokenBuckets

            limiter = TokenBuckets()
        self._stack.push_async_callback(limiter.close)
        return limiter

    def _folder(self) -> Path:
        """Return the data folder, which nobody else may use from now on."""
        if self._opened_folder is None:
            from catalens.engines.folder import DataFolder

            self._opened_folder = self._stack.enter_context(DataFolder(self._settings.data_dir)).path
        return self._opened_folder


async def fitting(indexes: Indexes, info: IndexInfo) -> IndexInfo:
    """Return the current index if it is of the model of `info`, `info` if there is none, else raise ModelMismatch."""
    current = await indexes.current()
    if current is None:
        return info
    if current.spec.fingerprint != info.spec.fingerprint:
        there, ours = (
            f"{one.spec.id} ({one.spec.revision}), fingerprint {one.spec.fingerprint[:12]}" for one in (current, info)
        )
        raise ModelMismatch(
            f"the index was built by {there}, the encoder is {ours}: set CATALENS_MODEL={current.model} or unset it, "
            f"or change the model of the index by `catalens reindex --model {info.model}`"
        )
    return current


class _extra:  # noqa: N801  # a context manager, used like a function
    """Says which extra to install when an import in the block fails."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, ModuleNotFoundError):
            raise Misconfigured(
                f"the settings need {error.name}, which is not installed: install catalens[{self._name}]"
            ) from error


@dataclass(frozen=True, slots=True)
class Engines:
    """Every port of one process, opened."""

    log: EventLog
    index: VectorIndex
    cache: EmbeddingCache
    blobs: BlobStore
    images: ImageSource
    memory: RequestMemory


@asynccontextmanager
async def open_engines(settings: Settings, spec: ModelSpec) -> AsyncIterator[Engines]:
    """Open every engine, as the process does that is all services in one; raises as EngineRoom."""
    async with EngineRoom(settings) as room:
        yield Engines(
            log=await room.log(),
            index=await room.index(IndexInfo(settings.model, spec)),
            cache=await room.cache(),
            blobs=await room.blobs(),
            images=await room.images(),
            memory=await room.memory(),
        )
