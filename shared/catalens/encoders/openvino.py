"""Runs a bundle's two towers on the CPU through OpenVINO (docs/adr/0005)."""

from __future__ import annotations

import sys
import threading
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

from catalens.encoders.bundle import TEXT, VISION, Bundle, ImageInput  # noqa: E402  # as above
from catalens.errors import Misconfigured, Transient  # noqa: E402  # as above
from catalens.settings import EncoderSettings  # noqa: E402  # as above

log = structlog.get_logger(__name__)

Rows = NDArray[np.float32]

# Pictures in one inference. Activations are what costs memory (some 40 MB a picture in a convolutional tower), and
# more than two at once gain little on one thread (docs/adr/0005).
_PICTURES: Final = 2


# A runtime's rounding, bf16 included, stays well above; a wrong weight falls well below.
_CLOSE: Final = 0.97


def _pattern(image: ImageInput) -> Rows:
    """Return the picture of the bundle's check as pixels [1, 3, size, size]: rgb = (7x + 13y + 29c) mod 256."""
    channel, y, x = np.indices((3, image.size, image.size), np.float32)
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (image.mean, image.std))
    rgb = (7 * x + 13 * y + 29 * channel) % 256
    return np.asarray((rgb * image.rescale - mean) / std, np.float32)[None]


class _Graph:
    """One compiled tower; any number of threads may run it, each with a request of its own."""

    def __init__(self, core: ov.Core, path: Path, dimension: int, config: Mapping[str, Any]) -> None:
        try:
            model = core.read_model(str(path))
            # Weights that are stored smaller are unfolded here, not by the compiler: with several streams it keeps them
            # in a cache by address, finds another layer's at an address that was used before, and computes nonsense.
            folding = Manager()
            folding.register_pass(ConstantFolding())
            folding.run_passes(model)
            self._compiled = core.compile_model(model, "CPU", dict(config))
            shape = self._compiled.output(0).get_partial_shape()
        except RuntimeError as error:
            raise Misconfigured(f"OpenVINO cannot run {path}: {error}") from error
        if shape.rank.get_length() != 2 or not shape[1].compatible(ov.Dimension(dimension)):
            raise Misconfigured(f"{path} gives {shape} where bundle.json says {dimension} values an item")
        self._per_thread = threading.local()

    def run(self, **inputs: NDArray[Any]) -> Rows:
        request = getattr(self._per_thread, "request", None)
        try:
            if request is None:
                request = self._per_thread.request = self._compiled.create_infer_request()
            request.infer(inputs, share_inputs=True)
            return np.array(request.get_output_tensor(0).data, np.float32)
        except RuntimeError as error:
            raise Transient(f"the model failed: {error}") from error


class OpenVinoRuntime:
    """Both towers, compiled; `lanes` inferences of each run at once, on one thread each.

    Compiling is blocking and takes a second; what it makes is kept under `cache`, which makes the next start quick.
    Raises Misconfigured: a model OpenVINO cannot run, or a precision that this processor has not.
    """

    def __init__(self, bundle: Bundle, settings: EncoderSettings, lanes: int, cache: Path) -> None:
        core = ov.Core()
        if settings.precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise Misconfigured("this processor has no bf16: set CATALENS_ENCODER__PRECISION=f32")
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
        # One after the other: each compilation sets the process' locale to "C" and back; two at once leave it there.
        self._vision = _Graph(core, bundle.path(VISION), dimension, config)
        self._text = _Graph(core, bundle.path(TEXT), dimension, config)
        self._prove(bundle)

    def _prove(self, bundle: Bundle) -> None:
        """Run each tower once, here, and compare with what the bundle says comes out; raises Misconfigured.

        Once and on this thread also because OpenVINO's binding sets numpy up at its first tensor, behind a lock that it
        holds while it waits for the interpreter: two lanes that both make their first tensor would stop the process.
        """
        manifest = bundle.manifest
        ids = np.arange(1, 9, dtype=np.int64)[None]
        answers = {TEXT: self.run_text(ids, np.ones_like(ids)), VISION: self.run_vision(_pattern(manifest.image))}
        if manifest.check is None:
            return
        expected = {TEXT: manifest.check.input_ids, VISION: manifest.check.pixels}
        for name, [answer] in answers.items():
            cosine = float(answer @ np.array(expected[name], np.float32) / np.linalg.norm(answer))
            if not cosine >= _CLOSE:
                raise Misconfigured(
                    f"{bundle.path(name)} gives wrong vectors on this machine (cosine {cosine:.3f} to the reference): "
                    "report it, with the processor and the version of OpenVINO"
                )

    def run_vision(self, pixels: NDArray[np.float32]) -> Rows:
        """Return [N, dimension] for pixels [N, 3, H, W]. Raises Transient."""
        parts = range(0, len(pixels), _PICTURES)
        return np.concatenate([self._vision.run(pixels=pixels[part : part + _PICTURES]) for part in parts])

    def run_text(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> Rows:
        """Return [N, dimension] for ids and mask [N, T]. Raises Transient."""
        return self._text.run(input_ids=input_ids, attention_mask=attention_mask)
