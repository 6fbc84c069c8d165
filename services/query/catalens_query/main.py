"""The query service as a process: `catalens-query`. It reads the index and never writes it."""

from __future__ import annotations

from contextlib import AsyncExitStack

import structlog

from catalens.engines import EngineRoom
from catalens.generations import Encoders, Generation, Generations
from catalens.lifecycle import run_service, started, stop_on_signals, supervise
from catalens.settings import Settings
from catalens.starting import Starting
from catalens.telemetry import Metrics
from catalens.web import build_app, serving
from catalens_query.current import CurrentQuery
from catalens_query.service import QueryService
from catalens_query.vocabularies import Vocabularies

log = structlog.get_logger(__name__)


async def serve(settings: Settings) -> None:
    """Answer searches until SIGTERM or SIGINT, then finish those in work.

    Engines that are away are waited for. Raises as EngineRoom, `Generations.open` and `serving`, and Stopped.
    """
    metrics = Metrics()
    async with stop_on_signals() as stop, EngineRoom(settings) as room, AsyncExitStack() as stack:
        async with Starting("query", settings, metrics, stop) as there:
            indexes = await there("index", room.indexes)
            encoders = Encoders(settings, metrics)
            generations = await there(
                "index", lambda: stack.enter_async_context(Generations.open(settings, encoders, indexes))
            )
            blobs = await there("pictures", lambda: room.blobs(read_only=True))
            events = await there("log", room.log)
            cache, images = await room.cache(), await room.images()

        vocabularies = Vocabularies(settings.languages)

        def build(generation: Generation) -> QueryService:
            return QueryService(
                index=generation.index,
                encoder=generation.encoder,
                cache=cache,
                blobs=blobs,
                images=images,
                log=events,
                settings=settings,
                metrics=metrics,
                vocabularies=vocabularies,
            )

        query = CurrentQuery(generations, build)
        app = build_app(
            query.operations(),
            settings,
            metrics,
            ready=query.ready,
            title="Catalens query",
            limiter=await room.limiter(),
        )
        async with serving(app, settings) as url:
            started()
            log.info("process.ready", service="query", url=url, model=generations.current.info.spec.id)
            tasks = {
                "generations": generations.follow(stop),
                "vocabularies": vocabularies.run(generations.use_index, stop),
            }
            await supervise(tasks, stop, drain_deadline=5.0)
    log.info("process.stopped")


def main() -> None:
    """Run the service; the command `catalens-query`."""
    run_service("catalens-query", serve)


if __name__ == "__main__":
    main()
