"""Forgets what nothing can need any more; every worker does it now and then, side by side without harm."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncIterator
from typing import Final

import structlog

from catalens import events
from catalens.errors import CatalensError
from catalens.generations import Generations
from catalens.ports import BlobStore, Clock, EventLog, VectorIndex
from catalens.settings import Settings

log = structlog.get_logger(__name__)

_PAUSE_SECONDS: Final = 600.0
_BLOB_GRACE_SECONDS: Final = 24 * 3600.0
"""Longer than any upload takes to become a product."""
_BLOB: Final = re.compile(rb'"blob"\s*:\s*"([0-9a-f]{64})"')


async def keep_house(
    generations: Generations,
    event_log: EventLog,
    blobs: BlobStore,
    settings: Settings,
    clock: Clock,
    stop: asyncio.Event,
) -> None:
    """Collect garbage every ten minutes or so until `stop`; a failure is logged and tried again the next time."""
    while not stop.is_set():
        try:
            with generations.use() as generation:
                await collect_garbage(event_log, generation.index, blobs, settings, clock)
        except CatalensError as error:
            log.warning("housekeeping.failed", error=str(error))
        try:
            async with asyncio.timeout(_PAUSE_SECONDS * random.uniform(0.8, 1.2)):  # noqa: S311  # spreads the workers
                await stop.wait()
        except TimeoutError:
            continue


async def collect_garbage(
    event_log: EventLog, index: VectorIndex, blobs: BlobStore, settings: Settings, clock: Clock
) -> None:
    """Drop log records past their retention, old tombstones, and pictures that no product, event or dead letter names.

    Pictures wait for a moment in which no event is on its way: it may name one that the index does not know yet.
    """
    now = clock.now()
    await event_log.expire(now)
    await index.collect_tombstones(now - settings.embedder.tombstone_days * 86_400)
    if any((await event_log.lag(events.EMBEDDER_GROUP, events.CONSUMED)).values()):
        return
    before = now - _BLOB_GRACE_SECONDS
    buried: set[str] | None = None
    async for batch in _batches(blobs.references(older_than=before)):
        unused = set(batch) - await index.blobs_in_use(None, batch)
        if unused and buried is None:
            buried = await _named_by_letters(event_log)
        for reference in unused - (buried or set()):
            await blobs.delete(reference, older_than=before)


async def _named_by_letters(event_log: EventLog) -> set[str]:
    """Return the pictures that a dead letter names: it may be replayed."""
    named: set[str] = set()
    async for record in event_log.scan([events.DEAD_LETTERS]):
        named.update(reference.decode() for reference in _BLOB.findall(record.value))
    return named


async def _batches(references: AsyncIterator[str], size: int = 256) -> AsyncIterator[list[str]]:
    batch: list[str] = []
    async for reference in references:
        batch.append(reference)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
