"""Runs a bundle's towers through torch: the reference on a CPU, the fast one on a GPU (docs/adr/0014)."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import product
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from catalens.encoders.bundle import GRAPHS, TEXT, VISION, Bundle
from catalens.encoders.choice import Device
from catalens.encoders.towers import Rows
from catalens.errors import Misconfigured, Transient
from catalens.settings import EncoderSettings

# Pictures in one inference on one thread of a CPU.
_PICTURES: Final = 4
# What is captured for a GPU: a batch runs as the smallest that holds it, a larger one in parts.
_BATCHES: Final = (1, 4, 16, 64, 256)
_TOKENS: Final = (8, 16, 32, 64, 128, 256, 512)
_WARM_UPS: Final = 3

Arrays = Sequence[NDArray[Any]]


class TorchRuntime:
    """The towers that are wanted; any number of threads may run them, and on a CPU each computes on its own alone.

    Raises Misconfigured: a bundle whose modules cannot be rebuilt, or a GPU that torch cannot use.
    """

    def __init__(self, bundle: Bundle, settings: EncoderSettings, device: Device) -> None:
        import torch  # noqa: PLC0415  # seconds, and a gigabyte: for those whose runtime it is

        from catalens.encoders.checkpoints import load_checkpoint  # noqa: PLC0415  # imports torch too

        if device == "cuda" and not torch.cuda.is_available():
            raise Misconfigured(
                f"torch {torch.__version__} cannot use the GPU: set CATALENS_ENCODER__DEVICE=cpu, "
                "or install the build of torch that its driver takes"
            )
        manifest = bundle.manifest
        checkpoint = load_checkpoint(bundle.folder)
        modules = {VISION: checkpoint.vision, TEXT: checkpoint.text_model}
        dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        self._pad_id = manifest.text.pad_id
        self._towers: dict[str, _OnCpu | _OnGpu] = {}
        if device == "cpu":
            torch.set_num_threads(1)  # a thread: the lanes are what runs side by side
        else:
            torch.backends.cudnn.allow_tf32 = False  # it rounds to ten bits, and f32 would depend on the machine
        for name in GRAPHS[settings.towers]:
            try:
                module = modules[name].eval().requires_grad_(False).to(device, dtype)
            except RuntimeError as error:  # as a rule the GPU's memory is full
                raise Misconfigured(f"the model does not fit on {device}: {error}") from error
            if device == "cpu":
                self._towers[name] = _OnCpu(torch, module, dtype, settings.inference_batch or _PICTURES)
            else:
                most = settings.inference_batch or settings.max_batch
                batches = [*(size for size in _BATCHES if size < most), min(most, _BATCHES[-1])]
                items = _texts(bundle) if name == TEXT else [(3, manifest.image.size, manifest.image.size)]
                shapes = [(size, *item) for size, item in product(batches, items)]
                self._towers[name] = _OnGpu(torch, module, dtype, shapes)

    def run_vision(self, pixels: NDArray[np.float32]) -> Rows:
        """Return [N, dimension] for pixels [N, 3, H, W]. Raises Transient."""
        return self._run(VISION, [pixels])

    def run_text(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> Rows:
        """Return [N, dimension] for ids and mask [N, T]. Raises Transient."""
        tower = self._towers[TEXT]
        if isinstance(tower, _OnGpu):
            missing = ((0, 0), (0, tower.tokens(input_ids.shape[1]) - input_ids.shape[1]))
            input_ids = np.pad(input_ids, missing, constant_values=self._pad_id)
            attention_mask = np.pad(attention_mask, missing)
        return self._run(TEXT, [input_ids, attention_mask])

    def _run(self, name: str, inputs: Arrays) -> Rows:
        tower = self._towers[name]
        starts = range(0, len(inputs[0]), tower.most)
        try:
            return np.concatenate([tower.run([given[at : at + tower.most] for given in inputs]) for at in starts])
        except RuntimeError as error:
            raise Transient(f"the model failed: {error}") from error


class _OnCpu:
    """One tower, computed by the thread that asks."""

    def __init__(self, torch: Any, module: Any, dtype: Any, most: int) -> None:
        self._torch = torch
        self._module = module
        self._dtype = dtype
        self.most = most

    def run(self, inputs: Arrays) -> Rows:
        tensors = [self._torch.from_numpy(given) for given in inputs]
        with self._torch.inference_mode():
            rows = self._module(*(one.to(self._dtype) if one.is_floating_point() else one for one in tensors))
        return np.asarray(rows.float().numpy(), np.float32)


class _OnGpu:
    """One tower as CUDA graphs of a few shapes: starting one costs the host 0.1 ms, where the layers cost milliseconds.

    The threads that ask prepare their own batches meanwhile; what they ask for runs in the order of one stream.
    """

    def __init__(self, torch: Any, module: Any, dtype: Any, shapes: Sequence[tuple[int, ...]]) -> None:
        self._torch = torch
        self._enqueuing = threading.Lock()
        self._graphs: dict[tuple[int, ...], tuple[Any, Sequence[Any], Any]] = {}
        self.most = max(shape[0] for shape in shapes)
        try:
            self._stream = torch.cuda.Stream()
            pool = torch.cuda.graph_pool_handle()
            for shape in sorted(shapes, key=np.prod, reverse=True):  # the largest makes the room that all of them share
                self._graphs[shape] = self._capture(module, dtype, shape, pool)
        except RuntimeError as error:
            raise Misconfigured(
                f"the GPU cannot run the model ({error}): set CATALENS_ENCODER__INFERENCE_BATCH lower, "
                "or CATALENS_ENCODER__DEVICE=cpu"
            ) from error

    def _capture(self, module: Any, dtype: Any, shape: tuple[int, ...], pool: Any) -> tuple[Any, Sequence[Any], Any]:
        torch = self._torch
        pictures = len(shape) == 4
        inputs = [torch.zeros(shape, device="cuda")] if pictures else [_ids(torch, shape) for _ in range(2)]

        def compute() -> Any:
            return module(*((one.to(dtype) if pictures else one) for one in inputs)).float()

        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):  # libraries choose their kernels and take their memory
                compute()
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Of this thread: another one may use the GPU, for the model that is still answering, say.
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                output = compute()
        return graph, inputs, output

    def tokens(self, wanted: int) -> int:
        """Return the shortest length that was captured and holds `wanted` tokens."""
        return min(shape[1] for shape in self._graphs if shape[1] >= wanted)

    def run(self, inputs: Arrays) -> Rows:
        torch = self._torch
        count, *rest = inputs[0].shape
        size = min(shape[0] for shape in self._graphs if shape[0] >= count and list(shape[1:]) == rest)
        graph, places, output = self._graphs[size, *rest]
        # From pinned memory the copy runs beside the host; torch keeps what is free of it for the next.
        pinned = [torch.from_numpy(given).pin_memory() for given in inputs]
        rows = torch.empty((count, output.shape[1]), pin_memory=True)
        done = torch.cuda.Event(blocking=True)  # spinning would take the core from a lane that decodes
        with self._enqueuing, torch.inference_mode(), torch.cuda.stream(self._stream):
            for place, given in zip(places, pinned, strict=True):
                place[:count].copy_(given, non_blocking=True)
            graph.replay()
            rows.copy_(output[:count], non_blocking=True)
            done.record()
        done.synchronize()
        return np.array(rows.numpy(), np.float32)


def _texts(bundle: Bundle) -> list[tuple[int, ...]]:
    """Return the lengths that texts are padded to."""
    longest = bundle.manifest.text.max_tokens
    return [(length,) for length in (*(length for length in _TOKENS if length < longest), longest)]


def _ids(torch: Any, shape: tuple[int, ...]) -> Any:
    return torch.ones(shape, dtype=torch.int64, device="cuda")
