"""Writes a checkpoint as a model bundle: two ONNX graphs over one file of weights (docs/adr/0016)."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import onnx_ir
import torch
from onnxscript import FLOAT
from onnxscript import opset20 as op
from onnxscript.optimizer import optimize_ir
from torch import Tensor, nn

from catalens.encoders.bundle import MANIFEST, TEXT, TOKENIZER, VISION, WEIGHTS
from catalens.encoders.checkpoints import Checkpoint
from catalens.encoders.proof import pattern
from catalens.errors import Misconfigured

_OPSET: Final = 20
_ALIGNMENT: Final = 64  # bytes: what vector instructions like to load from a mapped file
_INLINE: Final = 64 * 1024  # bytes of a constant that the graph may hold itself


class Span(NamedTuple):
    """Where a tensor lies in the file of weights."""

    offset: int
    length: int


def export_bundle(checkpoint: Checkpoint, folder: Path, report: Callable[[str], None] = lambda _: None) -> None:
    """Write the bundle into the empty or missing `folder`, its manifest last; `report` hears each step. Blocking.

    Raises Misconfigured: a graph that would hold a second copy of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise Misconfigured(f"{folder} is not empty: a bundle is written into a folder of its own")
    report("weights")
    spans = _write_weights(folder / WEIGHTS, _weights(checkpoint))
    report("image tower")
    many = torch.export.Dim("n", min=1, max=4096)
    pixels = torch.zeros(2, 3, checkpoint.image.size, checkpoint.image.size)
    _write_graph(folder / VISION, checkpoint.vision, {"pixels": pixels}, {"pixels": {0: many}}, spans)
    report("text tower")
    limit = checkpoint.text.max_tokens
    ids = torch.ones(2, min(8, limit), dtype=torch.int64)
    shape = {0: many, 1: torch.export.Dim("t", min=1, max=limit)}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    _write_graph(folder / TEXT, checkpoint.text_model, inputs, dict.fromkeys(inputs, shape), spans)
    checkpoint.tokenizer.save(str(folder / TOKENIZER), pretty=False)
    for name, data in checkpoint.files.items():
        (folder / name).write_bytes(data)
    report("checksums")
    _write_manifest(folder, checkpoint)


def _weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return every weight of both towers, under the name that `load_checkpoint` looks for."""
    weights: dict[str, Tensor] = nn.ModuleDict(
        {"vision": checkpoint.vision, "text": checkpoint.text_model}
    ).state_dict()
    return weights


def _write_weights(path: Path, weights: Mapping[str, Tensor]) -> dict[int, Span]:
    """Write `weights` in the safetensors format, and return where each lies, by the address of its memory.

    Its own writer, because the library's promises no alignment, which readers of a mapped file like.
    """
    tensors = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    # The format allows no holes: what is no multiple of the alignment comes last.
    names = sorted(tensors, key=lambda name: (tensors[name].nbytes % _ALIGNMENT != 0, name))
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        kind = {torch.float32: "F32", torch.int64: "I64"}[tensors[name].dtype]
        header[name] = {"dtype": kind, "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    start = 8 + len(text)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return {
        weights[name].data_ptr(): Span(start + entry["data_offsets"][0], tensors[name].nbytes)
        for name, entry in header.items()
    }


def _write_graph(
    path: Path, tower: nn.Module, inputs: Mapping[str, Tensor], shapes: Mapping[str, Any], spans: Mapping[int, Span]
) -> None:
    """Write the tower as ONNX whose large constants are spans of the file of weights."""
    with warnings.catch_warnings(), torch.no_grad(), _in_the_open():
        warnings.simplefilter("ignore")  # torch's exporter warns about itself with every release
        program = torch.onnx.export(
            tower,
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=["embedding"],
            dynamic_shapes=tuple(shapes[name] for name in inputs),
            opset_version=_OPSET,
            optimize=False,
            verbose=False,
            custom_translation_table={torch.ops.aten.scaled_dot_product_attention.default: _attention},
            dynamo=True,
        )
    model = program.model
    # Not the transposes of weights, which would be copies: each runtime folds them when it loads.
    optimize_ir(model, should_fold=lambda node: False if node.op_type == "Transpose" else None)
    for value in model.graph.initializers.values():
        held = value.const_value
        raw = getattr(held, "raw", None)
        span = spans.get(raw.data_ptr()) if isinstance(raw, Tensor) else None
        if span and span.length == held.nbytes:
            value.const_value = onnx_ir.ExternalTensor(
                WEIGHTS, span.offset, span.length, held.dtype, shape=held.shape, name=value.name
            )
        elif held.nbytes > _INLINE:
            raise Misconfigured(f"{path.name} would hold a copy of {value.name} ({held.nbytes:,} bytes)")
    _forget_its_making(model)
    path.write_bytes(onnx_ir.to_proto(model).SerializeToString(deterministic=True))


@contextmanager
def _in_the_open() -> Iterator[None]:
    """Keep torch from computing attention in one kernel of its own, which has no ONNX."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _attention(
    query: FLOAT,
    key: FLOAT,
    value: FLOAT,
    attn_mask: FLOAT | None = None,
    dropout_p: float = 0.0,  # noqa: ARG001  # nothing is dropped in inference
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> FLOAT:
    """Write attention as runtimes recognise it; what torch's exporter writes turns the keys by way of their shape."""
    if is_causal or enable_gqa or (attn_mask is not None and attn_mask.dtype != onnx_ir.DataType.FLOAT):
        raise Misconfigured("a tower hides its mask inside of torch's attention, which is not known")
    turned = list(range(len(key.shape)))
    turned[-2:] = turned[-1], turned[-2]
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = op.MatMul(op.Mul(query, op.Constant(value_float=factor)), op.Transpose(key, perm=turned))
    if attn_mask is not None:
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def _forget_its_making(model: onnx_ir.Model) -> None:
    """Remove what names the machine that the graph was made on, and what only torch's exporter reads."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _write_manifest(folder: Path, checkpoint: Checkpoint) -> None:
    files = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            files[path.name] = {
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
                "bytes": path.stat().st_size,
            }
    manifest = {
        "format": 1,
        "id": checkpoint.id,
        "revision": checkpoint.revision,
        "family": checkpoint.family,
        "dimension": checkpoint.dimension,
        "precision": "fp32",
        "image": checkpoint.image.model_dump(exclude_defaults=True),
        "text": checkpoint.text.model_dump(exclude_defaults=True),
        "licence": checkpoint.licence,
        "source": checkpoint.source,
        "languages": list(checkpoint.languages),
        "files": files,
        "check": check(checkpoint),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def check(checkpoint: Checkpoint) -> dict[str, list[float]]:
    """Return the reference's answers to the two fixed inputs of docs/model-bundles.md, normalised."""
    ids = torch.arange(1, 1 + min(8, checkpoint.text.max_tokens))[None]
    with torch.no_grad():
        rows = {
            "pixels": checkpoint.vision(torch.from_numpy(pattern(checkpoint.image))),
            "input_ids": checkpoint.text_model(ids, torch.ones_like(ids)),
        }
    return {
        name: [round(float(value), 6) for value in nn.functional.normalize(row[0], dim=0)] for name, row in rows.items()
    }
