"""The ingest service as a process: `catalens-ingest`. It needs a log, a picture store and no model runtime."""

from __future__ import annotations

import asyncio

import structlog

from catalens.domain import ModelSpec
from catalens.encoders.bundle import Bundle, read_manifest, resolve
from catalens.engines import EngineRoom
from catalens.lifecycle import run_service, stop_on_signals, supervise
from catalens.settings import Settings
from catalens.starting import Starting
from catalens.telemetry import Metrics
from catalens.web import build_app, serving
from catalens_ingest.service import BundleInfo, IngestService

log = structlog.get_logger(__name__)


async def serve(settings: Settings) -> None:
    """Take events over HTTP until SIGTERM or SIGINT, then drain.

    Engines that are away are waited for. Raises as EngineRoom and `serving`, and Stopped.
    """
    metrics = Metrics()
    spec = await asyncio.to_thread(_spec, settings)
    async with stop_on_signals() as stop, EngineRoom(settings) as room:
        async with Starting("ingest", settings, metrics, stop) as there:
            events, blobs = await there("log", room.log), await there("pictures", room.blobs)
        ingest = IngestService(
            log=events,
            blobs=blobs,
            images=await room.images(),
            memory=await room.memory(),
            bundle=lambda: BundleInfo(spec.family, spec.dimension),
            settings=settings,
            metrics=metrics,
        )
        app = build_app(
            ingest.operations(),
            settings,
            metrics,
            ready=ingest.ready,
            title="Catalens ingest",
            limiter=await room.limiter(),
        )
        async with serving(app, settings) as url:
            log.info("process.ready", service="ingest", url=url)
            await supervise({"ingest": ingest.run(stop)}, stop, drain_deadline=settings.embedder.drain_deadline)
    log.info("process.stopped")


def _spec(settings: Settings) -> ModelSpec:
    """Return what the model calls itself: its manifest is all that there need be of it here."""
    folder = resolve(settings.model, settings.data_dir)
    return Bundle(folder, read_manifest(folder)).spec(settings.encoder.precision)


def main() -> None:
    """Run the service; the command `catalens-ingest`."""
    run_service("catalens-ingest", serve)


if __name__ == "__main__":
    main()
