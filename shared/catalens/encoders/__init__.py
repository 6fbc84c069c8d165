"""Model bundles and the runtimes that execute them; `open_encoder` is the only place that chooses one.

Importing this package needs no model runtime: a service that only reads a manifest stays without.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from catalens.encoders.bundle import GRAPHS, TEXT, TOKENIZER, VISION, Bundle, load_bundle, refuse_unmeasured, resolve
from catalens.encoders.choice import NAMES, Choice, choose, this_machine
from catalens.errors import Misconfigured, Transient
from catalens.ports import Encoder
from catalens.settings import EncoderSettings, Settings
from catalens.telemetry import Metrics

if TYPE_CHECKING:
    from catalens.encoders.towers import Runtime

log = structlog.get_logger(__name__)

_KEPT_SECONDS = 30 * 86400.0


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


def load_runtime(
    bundle: Bundle, settings: EncoderSettings, lanes: int, cache: Path, choice: Choice | None = None
) -> Runtime:
    """Load `bundle`'s graphs into the runtime of `choice`, the best one if None, and prove it; blocking.

    Raises Misconfigured: no runtime that could run it, a graph that it cannot run, wrong vectors.
    """
    from catalens.encoders.proof import prove  # noqa: PLC0415  # numpy, which ingest's image has not

    chosen = choice or choose(settings, bundle, this_machine())
    log.info(
        "encoder.chosen",
        runtime=chosen.runtime,
        device=chosen.device,
        precision=settings.precision,
        towers=settings.towers,
        why=chosen.why,
    )
    # Each imports its library, which costs from 0.1 to 3 seconds: none but the one that runs.
    runtime: Runtime
    if chosen.runtime == "openvino":
        from catalens.encoders.openvino import OpenVinoRuntime, release  # noqa: PLC0415  # as above

        # A folder of its own for each fingerprint: what was compiled from one model never serves another.
        folder = cache / "openvino" / bundle.spec(settings.precision).fingerprint
        found = folder.is_dir()
        try:
            runtime = OpenVinoRuntime(bundle, settings, lanes, folder)
            prove(bundle, runtime, towers=settings.towers, name=NAMES[chosen.runtime])
        except (Misconfigured, Transient) as error:
            if not found:
                raise
            # What was kept of the last start may be spoilt: it is made again, and then it is the model that is wrong.
            log.warning("encoder.cache_discarded", error=str(error))
            shutil.rmtree(folder, ignore_errors=True)
            runtime = OpenVinoRuntime(bundle, settings, lanes, folder)
            prove(bundle, runtime, towers=settings.towers, name=NAMES[chosen.runtime])
        release(folder)
        _forget_unused(folder)
        return runtime
    if chosen.runtime == "onnx":
        from catalens.encoders.onnx import OnnxRuntime  # noqa: PLC0415  # as above

        runtime = OnnxRuntime(bundle, settings, chosen.device)
    else:
        from catalens.encoders.torch import TorchRuntime  # noqa: PLC0415  # as above

        try:
            runtime = TorchRuntime(bundle, settings, chosen.device)
        except ModuleNotFoundError as error:  # torch is there, a library that this model is built by is not
            raise Misconfigured(f"{error.name} is not installed: install catalens[torch]") from error
    prove(bundle, runtime, towers=settings.towers, name=NAMES[chosen.runtime])
    return runtime


def _forget_unused(used: Path) -> None:
    """Delete what was compiled for models that no process here has loaded for a month: it can be compiled again."""
    if not used.is_dir():  # nothing can be kept here
        return
    os.utime(used)
    for other in used.parent.iterdir():
        if other.stat().st_mtime < time.time() - _KEPT_SECONDS:
            shutil.rmtree(other, ignore_errors=True)


def _load(settings: Settings, metrics: Metrics) -> Callable[[], Encoder]:
    """Load and compile the model (blocking); what is returned starts the lanes on the loop that calls it."""
    try:
        # Here, because importing them costs half a second, and ingest's image has none of them.
        from catalens.encoders.batched import BatchedEncoder  # noqa: PLC0415
        from catalens.encoders.preprocess import Preprocessor  # noqa: PLC0415
        from catalens.encoders.restarting import RestartingRuntime  # noqa: PLC0415
        from catalens.encoders.towers import TextTower, VisionTower  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise Misconfigured(f"the encoder is not installed ({error.name}): install catalens[encoder]") from error
    started = time.perf_counter()
    folder, cache = resolve(settings.model, settings.data_dir), settings.data_dir / "cache"
    place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    bundle = load_bundle(folder, verified=cache / "verified" / f"{place}.json")
    refuse_unmeasured(bundle.manifest, allow=settings.encoder.allow_unmeasured)
    spec = bundle.spec(settings.encoder.precision)
    choice = choose(settings.encoder, bundle, this_machine())
    lanes = settings.encoder.lanes or choice.lanes(cores())
    runtime = RestartingRuntime(
        lambda: load_runtime(bundle, settings.encoder, lanes, cache, choice),
        metrics,
        max_batch=settings.encoder.max_batch,
    )
    wanted = GRAPHS[settings.encoder.towers]
    vision = VisionTower(runtime, Preprocessor(bundle.manifest.image), settings.pictures) if VISION in wanted else None
    text = TextTower(runtime, bundle.path(TOKENIZER), bundle.manifest.text) if TEXT in wanted else None
    seconds = round(time.perf_counter() - started, 3)
    log.info("encoder.loaded", model=spec.id, revision=spec.revision, lanes=lanes, seconds=seconds)
    return lambda: BatchedEncoder(spec, vision, text, settings.encoder, lanes, metrics)


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
