"""Ingest, embedder and query in one process, on one port, on embedded engines."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack

import structlog

from catalens.engines import EngineRoom, Engines
from catalens.generations import Encoders, Generation, Generations
from catalens.lifecycle import started, stop_on_signals, supervise
from catalens.retry import SystemClock
from catalens.settings import Settings
from catalens.telemetry import Metrics
from catalens.web import build_app, serving
from catalens_embedder.housekeeping import keep_house
from catalens_embedder.shifts import work
from catalens_embedder.worker import Embedder, require_pictures
from catalens_ingest.service import BundleInfo, IngestService
from catalens_query.current import CurrentQuery
from catalens_query.service import QueryService
from catalens_query.vocabularies import Vocabularies
from catalens_standalone.reindexing import Reindexing

log = structlog.get_logger(__name__)


async def serve(settings: Settings, *, ready: Callable[[str], None] | None = None) -> None:
    """Run until SIGTERM or SIGINT, then drain; `ready` is called once with the address that answers.

    Raises Misconfigured (port or folder taken, unsafe binding, no picture tower) and ModelMismatch before anything is
    served.
    """
    require_pictures(settings)
    metrics = Metrics()
    clock = SystemClock()
    async with AsyncExitStack() as stack:
        stop = await stack.enter_async_context(stop_on_signals())
        room = await stack.enter_async_context(EngineRoom(settings))
        indexes = await room.indexes()
        encoders = Encoders(settings, metrics)
        generations = await stack.enter_async_context(Generations.open(settings, encoders, indexes))
        engines = Engines(
            log=await room.log(),
            index=generations.current.index,
            cache=await room.cache(),
            blobs=await room.blobs(),
            images=await room.images(),
            memory=await room.memory(),
        )

        def bundle() -> BundleInfo:
            spec = generations.current.info.spec
            return BundleInfo(spec.family, spec.dimension)

        vocabularies = Vocabularies(settings.languages)

        def build(generation: Generation) -> QueryService:
            return QueryService(
                index=generation.index,
                encoder=generation.encoder,
                cache=engines.cache,
                blobs=engines.blobs,
                images=engines.images,
                log=engines.log,
                settings=settings,
                metrics=metrics,
                vocabularies=vocabularies,
            )

        def employ(generation: Generation) -> Embedder:
            return Embedder(
                log=engines.log,
                index=generation.index,
                encoder=generation.encoder,
                cache=engines.cache,
                blobs=engines.blobs,
                images=engines.images,
                settings=settings,
                metrics=metrics,
                clock=clock,
            )

        ingest = IngestService(
            log=engines.log,
            blobs=engines.blobs,
            images=engines.images,
            memory=engines.memory,
            bundle=bundle,
            settings=settings,
            metrics=metrics,
        )
        query = CurrentQuery(generations, build)
        reindexing = Reindexing(engines, generations, encoders, indexes, settings, clock)
        operations = [*ingest.operations(), *query.operations(), *reindexing.operations()]
        app = build_app(
            operations, settings, metrics, ready=query.ready, title="Catalens", limiter=await room.limiter()
        )
        url = await stack.enter_async_context(serving(app, settings))
        tasks = {
            "ingest": ingest.run(stop),
            "embedder": work(generations, indexes, employ, stop),
            "generations": generations.follow(stop),
            "vocabularies": vocabularies.run(generations.use_index, stop),
            "reindexing": reindexing.run(stop),
            "housekeeping": keep_house(generations, engines.log, engines.blobs, settings, clock, stop),
        }
        started()
        spec = generations.current.info.spec
        log.info("process.ready", url=url, model=spec.id, data_dir=str(settings.data_dir))
        if ready is not None:
            ready(url)
        await supervise(tasks, stop, drain_deadline=settings.embedder.drain_deadline + 5.0)
        log.info("process.stopped")
