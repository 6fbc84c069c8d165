"""The embedder as a process: `catalens-embedder`. Its HTTP side has probes and metrics only."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AsyncExitStack

import structlog

from catalens.domain import DEFAULT_TENANT, Filter, Leg
from catalens.embedding import probe
from catalens.engines import EngineRoom
from catalens.errors import CatalensError
from catalens.generations import Encoders, Generation, Generations
from catalens.lifecycle import run_service, stop_on_signals, supervise
from catalens.retry import SystemClock
from catalens.settings import Settings
from catalens.starting import Starting
from catalens.telemetry import Metrics
from catalens.web import build_app, serving
from catalens_embedder.housekeeping import keep_house
from catalens_embedder.shifts import work
from catalens_embedder.worker import Embedder, require_pictures

log = structlog.get_logger(__name__)


async def serve(settings: Settings) -> None:
    """Turn events into vectors until SIGTERM or SIGINT, then drain, commit and leave the group.

    Engines that are away are waited for. Raises as EngineRoom, Generations.open and `serving`, Misconfigured without a
    picture tower, FailingWorker when too much ends as dead letters, and Stopped.
    """
    require_pictures(settings)
    metrics = Metrics()
    async with stop_on_signals() as stop, EngineRoom(settings) as room, AsyncExitStack() as stack:
        async with Starting("embedder", settings, metrics, stop) as there:
            indexes = await there("index", room.indexes)
            encoders = Encoders(settings, metrics)
            generations = await there(
                "index", lambda: stack.enter_async_context(Generations.open(settings, encoders, indexes))
            )
            events, blobs = await there("log", room.log), await there("pictures", room.blobs)
            cache, images = await room.cache(), await room.images()

        def employ(generation: Generation) -> Embedder:
            return Embedder(
                log=events,
                index=generation.index,
                encoder=generation.encoder,
                cache=cache,
                blobs=blobs,
                images=images,
                settings=settings,
                metrics=metrics,
                clock=SystemClock(),
            )

        async def ready() -> Mapping[str, str]:
            try:
                with generations.use() as generation:
                    tower, vector = await probe(generation.encoder)
                    await generation.index.search(DEFAULT_TENANT, [Leg(tower, vector, 1)], Filter())
            except CatalensError as error:
                return {"embedder": str(error)}
            return {"embedder": "ok"}

        app = build_app([], settings, metrics, ready=ready, title="Catalens embedder")
        async with serving(app, settings) as url:
            tasks = {
                "embedder": work(generations, indexes, employ, stop),
                "generations": generations.follow(stop),
                "housekeeping": keep_house(generations, events, blobs, settings, SystemClock(), stop),
            }
            log.info("process.ready", service="embedder", url=url, model=generations.current.info.spec.id)
            await supervise(tasks, stop, drain_deadline=settings.embedder.drain_deadline + 5)
    log.info("process.stopped")


def main() -> None:
    """Run the service; the command `catalens-embedder`."""
    run_service("catalens-embedder", serve)


if __name__ == "__main__":
    main()
