"""Runs a bundle's two towers on the CPU through OpenVINO (docs/adr/0005)."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import structlog
from numpy.typing import NDArray

# Importing openvino imports its converter, which reports the import to its makers over the network and leaves
# files in the home directory, unless their telemetry package cannot be had: then it uses a stub.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None is how Python spells "not importable"

import openvino as ov  # noqa: E402  # only after the line above
from openvino.passes import ConstantFolding, Manager  # noqa: E402  # as above

from catalens.encoders.bundle import GRAPHS, TEXT, VISION, WEIGHTS, Bundle  # noqa: E402  # as above
from catalens.errors import Misconfigured, Transient  # noqa: E402  # as above
from catalens.settings import EncoderSettings  # noqa: E402  # as above

log = structlog.get_logger(__name__)

Rows = NDArray[np.float32]

# Pictures in one inference on one thread (docs/adr/0015). What costs memory is activations: some 40 MB a picture in a
# convolutional tower, where more than two at once gain little; few in a transformer, whose matrices they fill.
_PICTURES_CONVOLUTIONAL: Final = 2
_PICTURES: Final = 8
# Seconds: a query that was is followed by others, and what gives way to them goes on all the same.
# In f32 one picture takes as long as three or four do in bf16.
_PICTURES_BESIDE_QUERIES: Final = 2
_PICTURES_BESIDE_QUERIES_F32: Final = 1
_RECENT: Final = 1.0
_PATIENCE: Final = 0.25
# A transformer cuts its picture into patches by one convolution.
_CONVOLUTIONS: Final = 4


class _Graph:
    """One compiled tower; any number of threads may run it, each with a request of its own."""

    def __init__(self, core: ov.Core, path: Path, dimension: int, config: Mapping[str, Any], *, unfold: bool) -> None:
        try:
            if unfold:
                self._compiled = core.compile_model(_unfolded(core, path), "CPU", dict(config))
            else:  # by its path, so that a start that finds it compiled does not read it
                self._compiled = core.compile_model(str(path), "CPU", dict(config))
            shape = self._compiled.output(0).get_partial_shape()
        except RuntimeError as error:
            raise Misconfigured(f"OpenVINO cannot run {path}: {error}") from error
        if shape.rank.get_length() != 2 or not shape[1].compatible(ov.Dimension(dimension)):
            raise Misconfigured(f"{path} gives {shape} where bundle.json says {dimension} values an item")
        self._per_thread = threading.local()

    def convolutional(self) -> bool:
        """Whether it is made of convolutions."""
        layers = [node.get_rt_info() for node in self._compiled.get_runtime_model().get_ordered_ops()]
        kinds = [str(layer["layerType"].astype(str)) for layer in layers]
        return kinds.count("Convolution") > _CONVOLUTIONS

    def run(self, **inputs: NDArray[Any]) -> Rows:
        request = getattr(self._per_thread, "request", None)
        try:
            if request is None:
                request = self._per_thread.request = self._compiled.create_infer_request()
            request.infer(inputs, share_inputs=True)
            return np.array(request.get_output_tensor(0).data, np.float32)
        except RuntimeError as error:
            raise Transient(f"the model failed: {error}") from error


class _Singles:
    """Pictures that are computed by themselves: batches give way, so that each waits for a stream but a moment."""

    def __init__(self, beside: int) -> None:
        self._beside = beside
        self._changed = threading.Condition()
        self._running = 0
        self._last = -_RECENT

    def __enter__(self) -> None:
        with self._changed:
            self._running += 1
            self._last = time.monotonic()

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._running -= 1
            self._changed.notify_all()

    def give_way(self, most: int) -> int:
        """Wait while there are some, for a moment at most, and return how many pictures to take next: up to `most`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._running, _PATIENCE)
            recent = time.monotonic() - self._last < _RECENT
        return min(most, self._beside) if recent else most


class OpenVinoRuntime:
    """The towers that are wanted, compiled; `lanes` inferences of each run at once, on one thread each.

    Compiling is blocking and takes a second; what it makes is kept under `cache`, which makes the next start quick.
    Raises Misconfigured: a model OpenVINO cannot run, or a precision that this processor has not.
    """

    def __init__(self, bundle: Bundle, settings: EncoderSettings, lanes: int, cache: Path) -> None:
        core = ov.Core()
        if settings.precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise Misconfigured("this processor has no bf16: set CATALENS_ENCODER__PRECISION=f32")
        if bundle.manifest.precision == "int8" and _saturates():
            log.warning(
                "encoder.int8_saturates",
                model=bundle.manifest.id,
                advice="this processor has no VNNI and adds int8 products up in 16 bits: its vectors are farther from "
                "the model's own than bundle.json says (docs/adr/0017); serve the fp32 bundle here",
            )
        try:
            cache.mkdir(parents=True, exist_ok=True)
            core.set_property({"CACHE_DIR": str(cache)})
        except OSError as error:  # a full or read-only disk: the next start takes a second longer, that is all
            log.warning("encoder.uncached", error=str(error))
        config = {
            # Left alone it picks bf16 by processor, and a mixed fleet would mix vectors.
            "INFERENCE_PRECISION_HINT": settings.precision,
            "NUM_STREAMS": str(lanes),
            "INFERENCE_NUM_THREADS": str(lanes),
            "ENABLE_CPU_PINNING": False,
        }
        dimension = bundle.manifest.dimension
        # A quantised graph stays as it is, or it would be computed in floats; and weights in fp32 need no unfolding.
        unfold = bundle.manifest.precision == "fp32" and WEIGHTS not in bundle.manifest.files
        halve = settings.precision == "bf16" and WEIGHTS in bundle.manifest.files
        # One after the other: each compilation sets the process' locale to "C" and back; two at once leave it there.
        self._graphs: dict[str, _Graph] = {}
        for name in GRAPHS[settings.towers]:
            path = _halved(core, bundle.path(name), cache) if halve else bundle.path(name)
            self._graphs[name] = _Graph(core, path, dimension, config, unfold=unfold)
        slow = settings.precision == "f32" and bundle.manifest.precision == "fp32"
        self._singles = _Singles(_PICTURES_BESIDE_QUERIES_F32 if slow else _PICTURES_BESIDE_QUERIES)
        self._pictures = settings.inference_batch or _PICTURES
        if not settings.inference_batch and VISION in self._graphs and self._graphs[VISION].convolutional():
            self._pictures = _PICTURES_CONVOLUTIONAL
        # Whoever proves it (encoders/proof.py) runs each tower once and on one thread, which this runtime needs too:
        # OpenVINO's binding sets numpy up at its first tensor, behind a lock that it holds while it waits for the
        # interpreter, so two lanes that both make their first tensor would stop the process.

    def run_vision(self, pixels: NDArray[np.float32]) -> Rows:
        """Return [N, dimension] for pixels [N, 3, H, W]. Raises Transient."""
        graph = self._graphs[VISION]
        if len(pixels) == 1:  # a query, as a rule
            with self._singles:
                return graph.run(pixels=pixels)
        rows: list[Rows] = []
        at = 0
        while at < len(pixels):
            most = self._singles.give_way(self._pictures)
            rows.append(graph.run(pixels=pixels[at : at + most]))
            at += most
        return np.concatenate(rows)

    def run_text(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> Rows:
        """Return [N, dimension] for ids and mask [N, T]. Raises Transient."""
        return self._graphs[TEXT].run(input_ids=input_ids, attention_mask=attention_mask)


def _saturates() -> bool:
    """Whether int8 products overflow here, as on x86 before VNNI; False where the system does not say."""
    try:
        about = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "avx2" in about and "vnni" not in about


def _unfolded(core: ov.Core, path: Path) -> ov.Model:
    """Read a graph with all its constants computed.

    Weights that are stored smaller are unfolded here, not by the compiler: with several streams it keeps them in a
    cache by address, finds another layer's at an address that was used before, and computes nonsense.
    """
    model = core.read_model(str(path))
    folding = Manager()
    folding.register_pass(ConstantFolding())
    folding.run_passes(model)
    return model


def _halved(core: ov.Core, path: Path, cache: Path) -> Path:
    """Return a copy of the graph whose weights are stored in half the bytes, made under `cache` if it is not there.

    For bf16, which keeps fewer bits than fp16 does: it starts in half of the time and memory. Where it cannot be
    written the graph itself is returned.
    """
    copy = cache / "halved" / f"{path.stem}.xml"
    if copy.is_file():
        return copy
    try:
        with tempfile.TemporaryDirectory(dir=cache) as making:
            ov.save_model(_unfolded(core, path), str(Path(making) / copy.name), compress_to_fp16=True)
            copy.parent.mkdir(exist_ok=True)
            # The weights first, and on the disk: a graph that is there is whole, even after the power failed. Its proof
            # looks at few rows of the words' table, and would not see a hole in the others.
            for made in (copy.with_suffix(".bin"), copy):
                with (Path(making) / made.name).open("rb+") as file:
                    os.fsync(file.fileno())
                (Path(making) / made.name).replace(made)
    except (OSError, RuntimeError) as error:
        log.warning("encoder.uncached", error=str(error))
        return path
    return copy


def release(folder: Path) -> None:
    """Give back the memory of what was read from files under `folder`, on Linux: it was packed for the processor since.

    They are mapped to be read only, so that a page that is needed all the same comes from the file again.
    """
    if sys.platform != "linux":
        return
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    inside = f"{folder.resolve()}/"
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        place, mode, _, _, _, *path = line.split(maxsplit=5)
        if path and path[0].startswith(inside) and mode.startswith("r-") and mode.endswith("s"):
            begin, end = (int(address, 16) for address in place.split("-"))
            advise(begin, end - begin, mmap.MADV_DONTNEED)  # advice: where it is not taken, nothing is lost
