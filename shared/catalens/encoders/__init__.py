"""Model bundles and the runtimes that execute them; `open_encoder` is the only place that chooses one.

Importing this package needs no model runtime: a service that only reads a manifest stays without.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import structlog

from catalens.encoders.bundle import TOKENIZER, load_bundle, resolve
from catalens.errors import Misconfigured
from catalens.ports import Encoder
from catalens.settings import Settings
from catalens.telemetry import Metrics

log = structlog.get_logger(__name__)


@asynccontextmanager
async def open_encoder(settings: Settings, metrics: Metrics) -> AsyncIterator[Encoder]:
    """Load the model that `settings` name, off the event loop, and yield its encoder; close it after.

    Raises Misconfigured: no such bundle, a file that is not what its manifest says, a runtime that is not installed.
    """
    start = await asyncio.to_thread(_load, settings, metrics)
    encoder = start()
    try:
        yield encoder
    finally:
        await encoder.close()


def _load(settings: Settings, metrics: Metrics) -> Callable[[], Encoder]:
    """Load and compile the model (blocking); what is returned starts the lanes on the loop that calls it."""
    try:
        # Here, because importing them costs half a second, and ingest's image has none of them.
        from catalens.encoders.batched import BatchedEncoder  # noqa: PLC0415
        from catalens.encoders.openvino import OpenVinoRuntime  # noqa: PLC0415
        from catalens.encoders.preprocess import Preprocessor  # noqa: PLC0415
        from catalens.encoders.towers import TextTower, VisionTower  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise Misconfigured(f"the model runtime is not installed ({error.name}): install catalens[encoder]") from error
    started = time.perf_counter()
    bundle = load_bundle(resolve(settings.model, settings.data_dir))
    spec = bundle.spec(settings.encoder.precision)
    lanes = settings.encoder.lanes or _cores()
    # A folder of its own for each fingerprint: what was compiled from one model never serves another.
    cache = settings.data_dir / "cache" / "openvino" / spec.fingerprint
    runtime = OpenVinoRuntime(bundle, settings.encoder, lanes, cache)
    vision = VisionTower(runtime, Preprocessor(bundle.manifest.image), settings.pictures)
    text = TextTower(runtime, bundle.path(TOKENIZER), bundle.manifest.text)
    seconds = round(time.perf_counter() - started, 3)
    log.info("encoder.loaded", model=spec.id, revision=spec.revision, lanes=lanes, seconds=seconds)
    return lambda: BatchedEncoder(spec, vision, text, settings.encoder, lanes, metrics)


def _cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
