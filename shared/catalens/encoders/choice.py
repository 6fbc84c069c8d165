"""Which runtime executes a bundle on this machine, and why; nothing here imports one."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata, util
from typing import Final, Literal, TypeAlias

from catalens.encoders.bundle import WEIGHTS, Bundle
from catalens.errors import Misconfigured
from catalens.settings import EncoderSettings

RuntimeName: TypeAlias = Literal["openvino", "onnx", "torch"]
Device: TypeAlias = Literal["cpu", "cuda"]

NAMES: Final[Mapping[RuntimeName, str]] = {"openvino": "OpenVINO", "onnx": "ONNX Runtime", "torch": "torch"}
# Best first, as measured (docs/adr/0014).
_CANDIDATES: Final[tuple[tuple[RuntimeName, Device, str], ...]] = (
    ("torch", "cuda", "a GPU is here, and torch for it"),
    ("onnx", "cuda", "a GPU is here, and ONNX Runtime for it"),
    ("openvino", "cpu", "the fastest on a CPU"),
    ("onnx", "cpu", "the portable one"),
    ("torch", "cpu", "the only one that is installed"),
)
_MODULES: Final[Mapping[RuntimeName, str]] = {"openvino": "openvino", "onnx": "onnxruntime", "torch": "torch"}
_EXTRAS: Final[Mapping[RuntimeName, str]] = {"openvino": "encoder", "onnx": "onnx", "torch": "torch"}


# Lanes that feed a GPU: beyond, they wait for the interpreter, and all of them get slower.
_LANES_OF_A_GPU: Final = 8


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is to choose from."""

    gpu: bool
    """NVIDIA's driver shows this process a GPU."""
    installed: frozenset[RuntimeName]
    for_gpu: frozenset[RuntimeName]
    """Those of them that were built for CUDA."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What executes the model, where, and why it was chosen."""

    runtime: RuntimeName
    device: Device
    why: str

    def lanes(self, cores: int) -> int:
        """Return how many lanes suit it where `cores` may be used."""
        return min(cores, _LANES_OF_A_GPU) if self.device == "cuda" else cores


def this_machine() -> Machine:
    """Return what this machine has, without importing a runtime."""
    installed: frozenset[RuntimeName] = frozenset(name for name, module in _MODULES.items() if _importable(module))
    for_gpu: set[RuntimeName] = set()
    if "torch" in installed and not metadata.version("torch").endswith("+cpu"):
        for_gpu.add("torch")
    if "onnx" in installed and _has("onnxruntime-gpu"):
        for_gpu.add("onnx")
    return Machine(bool(for_gpu) and _gpus() > 0, installed, frozenset(for_gpu))


def choose(settings: EncoderSettings, bundle: Bundle, machine: Machine) -> Choice:
    """Return the best runtime for `bundle` that the settings allow; raises Misconfigured with what hinders each."""
    hindered: list[str] = []
    for runtime, device, merit in _CANDIDATES:
        if settings.runtime not in ("auto", runtime) or settings.device not in ("auto", device):
            continue
        hindrance = _hindrance(runtime, device, settings, bundle, machine)
        if hindrance is None:
            asked = settings.runtime != "auto"
            return Choice(runtime, device, "; ".join(["as set" if asked else merit, *dict.fromkeys(hindered)]))
        hindered.append(hindrance)
    reasons = "; ".join(dict.fromkeys(hindered)) or "OpenVINO runs on the CPU only: set CATALENS_ENCODER__DEVICE=cpu"
    raise Misconfigured(
        f"nothing can run the model (CATALENS_ENCODER__RUNTIME={settings.runtime}, __DEVICE={settings.device}, "
        f"__PRECISION={settings.precision}): {reasons}"
    )


def _hindrance(
    runtime: RuntimeName, device: Device, settings: EncoderSettings, bundle: Bundle, machine: Machine
) -> str | None:
    """Return why `runtime` cannot run the bundle on `device`; None if it can."""
    name = NAMES[runtime]
    if device == "cuda" and not machine.gpu:
        return "there is no GPU that a runtime installed here could use"
    if runtime not in machine.installed:
        return f"{name} is not installed (catalens[{_EXTRAS[runtime]}])"
    if device == "cuda" and runtime not in machine.for_gpu:
        return f"the installed {name} was not built for GPUs"
    if runtime == "onnx" and settings.precision == "bf16":
        return "ONNX Runtime computes in f32 alone: set CATALENS_ENCODER__PRECISION=f32 for it"
    if runtime == "torch" and (bundle.manifest.precision != "fp32" or WEIGHTS not in bundle.manifest.files):
        return f"torch cannot run {bundle.manifest.id}: that takes an fp32 bundle made by `catalens model pull`"
    return None


def _importable(module: str) -> bool:
    found = util.find_spec(module)
    return found is not None and found.origin is not None  # any folder of that name in the working directory has none


def _has(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _gpus() -> int:
    """Return how many GPUs the driver shows this process; asking torch instead would mean importing it."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0
    found = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(found)) != 0:
        return 0
    return found.value
