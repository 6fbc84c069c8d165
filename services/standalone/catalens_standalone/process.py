"""Ingest, embedder and query in one process, on one port, on embedded engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import structlog

from catalens import events
from catalens.encoders import open_encoder
from catalens.engines import Engines, open_engines
from catalens.errors import CatalensError
from catalens.lifecycle import stop_on_signals, supervise
from catalens.ports import Clock
from catalens.retry import SystemClock
from catalens.settings import Settings
from catalens.telemetry import Metrics
from catalens.web import build_app, serving
from catalens_embedder.worker import Embedder
from catalens_ingest.service import BundleInfo, IngestService
from catalens_query.service import QueryService

log = structlog.get_logger(__name__)

_HOUSEKEEPING_SECONDS = 600.0
_BLOB_GRACE_SECONDS = 24 * 3600.0  # longer than any upload takes to become a product


async def serve(settings: Settings, *, ready: Callable[[str], None] | None = None) -> None:
    """Run until SIGTERM or SIGINT, then drain; `ready` is called once with the address that answers.

    Raises Misconfigured (port or folder taken, unsafe binding) and ModelMismatch before anything is served.
    """
    metrics = Metrics()
    async with AsyncExitStack() as stack:
        stop = await stack.enter_async_context(stop_on_signals())
        encoder = await stack.enter_async_context(open_encoder(settings, metrics))
        engines = await stack.enter_async_context(open_engines(settings, encoder.spec))
        ingest = IngestService(
            log=engines.log,
            blobs=engines.blobs,
            images=engines.images,
            memory=engines.memory,
            bundle=BundleInfo(encoder.spec.family, encoder.spec.dimension),
            settings=settings,
            metrics=metrics,
        )
        query = QueryService(
            index=engines.index,
            encoder=encoder,
            cache=engines.cache,
            blobs=engines.blobs,
            images=engines.images,
            log=engines.log,
            settings=settings,
            metrics=metrics,
        )
        clock = SystemClock()
        embedder = Embedder(
            log=engines.log,
            index=engines.index,
            encoder=encoder,
            cache=engines.cache,
            blobs=engines.blobs,
            images=engines.images,
            settings=settings,
            metrics=metrics,
            clock=clock,
        )
        app = build_app(
            [*ingest.operations(), *query.operations()], settings, metrics, ready=query.ready, title="Catalens"
        )
        url = await stack.enter_async_context(serving(app, settings))
        tasks = {
            "ingest": ingest.run(stop),
            "embedder": embedder.run(stop),
            "housekeeping": _housekeeping(engines, settings, clock, stop),
        }
        log.info("process.ready", url=url, model=encoder.spec.id, data_dir=str(settings.data_dir))
        if ready is not None:
            ready(url)
        await supervise(tasks, stop, drain_deadline=settings.embedder.drain_deadline + 5.0)
        log.info("process.stopped")


async def _housekeeping(engines: Engines, settings: Settings, clock: Clock, stop: asyncio.Event) -> None:
    """Now and then forget what nothing can need any more; a failure is logged and tried again the next time."""
    while not stop.is_set():
        try:
            await collect_garbage(engines, settings, clock)
        except CatalensError as error:
            log.warning("housekeeping.failed", error=str(error))
        try:
            async with asyncio.timeout(_HOUSEKEEPING_SECONDS):
                await stop.wait()
        except TimeoutError:
            continue


async def collect_garbage(engines: Engines, settings: Settings, clock: Clock) -> None:
    """Drop read log records past their retention, old tombstones, and blobs that no product or event refers to."""
    now = clock.now()
    await engines.log.expire(now)
    await engines.index.collect_tombstones(now - settings.embedder.tombstone_days * 86_400)
    lag = await engines.log.lag(events.EMBEDDER_GROUP, events.CONSUMED)
    if any(lag.values()):
        return  # an event that waits may name a blob that the index does not know yet
    async for batch in _batches(engines.blobs.references(older_than=now - _BLOB_GRACE_SECONDS)):
        used = await engines.index.blobs_in_use(None, batch)
        for reference in batch:
            if reference not in used:
                await engines.blobs.delete(reference, older_than=now - _BLOB_GRACE_SECONDS)


async def _batches(references: AsyncIterator[str], size: int = 256) -> AsyncIterator[list[str]]:
    batch: list[str] = []
    async for reference in references:
        batch.append(reference)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
