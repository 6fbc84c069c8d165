"""Runs a bundle's towers through ONNX Runtime, in fp32: the portable one, on any CPU and on CUDA (docs/adr/0014)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from catalens.encoders.bundle import GRAPHS, TEXT, VISION, Bundle
from catalens.encoders.choice import Device
from catalens.encoders.towers import Rows
from catalens.errors import Misconfigured, Transient
from catalens.settings import EncoderSettings

# On one thread more gains nothing, and activations cost memory; a GPU must be given enough to do.
_PICTURES: Final = {"cpu": 4, "cuda": 64}
_PROVIDERS: Final[dict[Device, list[Any]]] = {
    "cpu": ["CPUExecutionProvider"],
    # TF32 rounds to ten bits and would make f32 vectors depend on the machine.
    "cuda": [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"],
}


class OnnxRuntime:
    """The towers that are wanted; any number of threads may run them, and on a CPU each computes on its own alone.

    Raises Misconfigured: a model that ONNX Runtime cannot run, bf16, or a GPU that it cannot use.
    """

    def __init__(self, bundle: Bundle, settings: EncoderSettings, device: Device) -> None:
        if settings.precision != "f32":
            raise Misconfigured("ONNX Runtime computes in f32 alone: set CATALENS_ENCODER__PRECISION=f32")
        ort.disable_telemetry_events()
        self._pictures = settings.inference_batch or _PICTURES[device]
        quantised = bundle.manifest.precision != "fp32"
        self._graphs = {name: _session(bundle.path(name), device, quantised) for name in GRAPHS[settings.towers]}

    def run_vision(self, pixels: NDArray[np.float32]) -> Rows:
        """Return [N, dimension] for pixels [N, 3, H, W]. Raises Transient."""
        parts = range(0, len(pixels), self._pictures)
        return np.concatenate([self._run(VISION, pixels=pixels[part : part + self._pictures]) for part in parts])

    def run_text(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> Rows:
        """Return [N, dimension] for ids and mask [N, T]. Raises Transient."""
        return self._run(TEXT, input_ids=input_ids, attention_mask=attention_mask)

    def _run(self, graph: str, **inputs: NDArray[Any]) -> Rows:
        try:
            answer = self._graphs[graph].run(None, inputs)[0]
        except Exception as error:  # the boundary: each of the library's errors derives from Exception itself
            raise Transient(f"the model failed: {error}") from error
        return np.asarray(answer, np.float32)


def _session(path: Path, device: Device, quantised: bool) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # the lanes are what runs side by side
    options.log_severity_level = 3  # what matters of the rest is raised or checked below
    if not quantised:
        # Weights that are merely stored as int8 would have what they meet rounded to int8 as well.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        session = ort.InferenceSession(str(path), options, providers=_PROVIDERS[device])
    except Exception as error:  # the boundary: as in _run
        raise Misconfigured(f"ONNX Runtime cannot run {path}: {error}") from error
    if device == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        raise Misconfigured(
            "ONNX Runtime cannot use the GPU (it needs CUDA and cuDNN of its own version): "
            "set CATALENS_ENCODER__DEVICE=cpu, or install catalens[torch]"
        )
    return session
