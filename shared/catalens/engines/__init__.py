"""The adapters behind the ports; `open_engines` is the only place that chooses among them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from catalens.domain import ModelSpec
from catalens.ports import BlobStore, EmbeddingCache, EventLog, ImageSource, RequestMemory, VectorIndex
from catalens.settings import Settings


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
    """Open the embedded engines in `settings.data_dir`, and close them in the reverse order.

    Raises Misconfigured (the folder is in use, unusable or a newer release's), ModelMismatch and StorageFull.
    """
    # Imported here: each adapter brings its own dependencies, which a process without it does not install.
    from catalens.engines.blobs import FileBlobStore  # noqa: PLC0415
    from catalens.engines.edge import EdgeIndex  # noqa: PLC0415
    from catalens.engines.folder import DataFolder  # noqa: PLC0415
    from catalens.engines.images import HttpImages  # noqa: PLC0415
    from catalens.engines.memory import MemoryCache  # noqa: PLC0415
    from catalens.engines.sqlite_log import SqliteEventLog  # noqa: PLC0415
    from catalens.engines.sqlite_memory import SqliteMemory  # noqa: PLC0415

    async with AsyncExitStack() as stack:
        folder = stack.enter_context(DataFolder(settings.data_dir)).path
        log = await SqliteEventLog.open(folder / "events.sqlite", retention_hours=settings.log.retention_hours)
        stack.push_async_callback(log.close)
        index = await EdgeIndex.open(folder / "index", spec)
        stack.push_async_callback(index.close)
        cache = MemoryCache(settings.encoder.cache_entries)
        stack.push_async_callback(cache.close)
        blobs = FileBlobStore(folder / "blobs")
        stack.push_async_callback(blobs.close)
        images = HttpImages(settings.pictures)
        stack.push_async_callback(images.close)
        memory = await SqliteMemory.open(folder / "requests.sqlite")
        stack.push_async_callback(memory.close)
        yield Engines(log, index, cache, blobs, images, memory)
