"""Rewrites an ONNX graph to int8: what it multiplies by constants becomes QuantizeLinear/DequantizeLinear pairs.

Weights: symmetric, a scale per output channel. Activations: symmetric, one fixed scale per tensor from calibration,
so that a vector cannot depend on what else is in its batch. Before that each activation is smoothed: what makes one of
its channels large moves into the weights that follow (SmoothQuant, arXiv 2211.10438), because transformers have a few
channels so large that one scale for all would leave nothing of the others. Embedding tables: a scale per row.
Everything else stays float. Needs the package onnx, which the extra `quantize` brings.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from catalens.errors import Misconfigured

Array = NDArray[np.float32]

_MULTIPLYING: Final = ("MatMul", "Gemm", "Conv")
# How much of a channel's size moves into the weights: one half, as in the paper (docs/adr/0017).
_SMOOTHING: Final = 0.5
_OPSET: Final = 13
_TABLE: Final = 1 << 20  # elements from which an embedding table is worth storing in int8


class Int8Graph:
    """An fp32 graph on its way to int8: measure the channels of its `sites`, then `quantize`, then `save`.

    A site is a tensor that is multiplied by constant weights, by one node or several.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._model = onnx.load(str(path))  # with its external weights
        except Exception as error:  # the boundary: onnx raises protobuf's, its own and the system's errors alike
            raise Misconfigured(f"{path} is no ONNX graph that can be read: {error}") from error
        if max(opset.version for opset in self._model.opset_import if opset.domain == "") < _OPSET:
            raise Misconfigured(f"{path} is of an ONNX opset below {_OPSET}, which has no scales per channel")
        self._graph = self._model.graph
        self._makers = {output: node for node in self._graph.node for output in node.output}
        self._readers = Counter(name for node in self._graph.node for name in node.input)
        self._readers.update(output.name for output in self._graph.output)
        self._stored = {tensor.name: tensor for tensor in self._graph.initializer}
        self._before: dict[str, list[Any]] = defaultdict(list)
        self._sites: dict[str, list[Any]] = {}
        for node in self._graph.node:
            if node.op_type in _MULTIPLYING and self._weights(node) is not None:
                self._sites.setdefault(node.input[0], []).append(node)

    @property
    def sites(self) -> Mapping[str, int]:
        """The names of the sites, each with the axis of its channels."""
        return {name: 1 if nodes[0].op_type == "Conv" else -1 for name, nodes in self._sites.items()}

    def quantize(self, largest: Mapping[str, Array]) -> None:
        """Rewrite the graph, given the largest absolute value in each channel of each site; once."""
        for name, nodes in self._sites.items():
            self._quantize_site(name, nodes, largest[name])
        for node in list(self._graph.node):
            if node.op_type == "Gather":
                self._quantize_table(node)
        self._rebuild()

    def save(self, path: Path) -> None:
        """Write the graph, weights inside."""
        path.write_bytes(self._model.SerializeToString(deterministic=True))

    # --- one site

    def _quantize_site(self, name: str, nodes: Sequence[Any], largest: Array) -> None:
        weights = [held for node in nodes if (held := self._weights(node)) is not None]
        source = name
        if all(node.op_type != "Conv" for node in nodes):
            factors = _factors(largest, [np.abs(held).max(axis=1) for held in weights])
            source = self._smooth(name, nodes, factors)
            weights = [held * factors[:, None] for held in weights]
            largest = largest / factors
        rounded = self._round(source, max(float(largest.max()), 1e-6) / 127, nodes[0])
        for place, (node, held) in enumerate(zip(nodes, weights, strict=True)):
            node.input[0] = rounded
            node.input[1] = self._store(f"{name}.weights{place}", held, 0 if node.op_type == "Conv" else 1, node)
            for attribute in node.attribute:
                if attribute.name == "transB":
                    attribute.i = 0  # they are stored turned

    def _weights(self, node: Any) -> Array | None:
        """Return the constant that `node` multiplies by, as [in, out] or [out, in, …] of a Conv; None if none fits."""
        held = self._constant(node.input[1])
        if held is None or held.dtype != np.float32 or self._constant(node.input[0]) is not None:
            return None
        attributes = _attributes(node)
        if node.op_type == "Conv":
            return held if held.ndim == 4 else None
        if held.ndim != 2 or attributes.get("transA") or attributes.get("alpha", 1.0) != 1.0:
            return None
        return held.T if attributes.get("transB") else held

    def _smooth(self, name: str, nodes: Sequence[Any], factors: Array) -> str:
        """Divide the site's channels by `factors`; return the name of the tensor that has them so."""
        maker = self._makers.get(name)
        if maker is not None and maker.op_type == "LayerNormalization" and self._readers[name] == len(nodes):
            held = [constant for stored in maker.input[1:] if (constant := self._constant(stored)) is not None]
            if [constant.shape for constant in held] == [factors.shape] * len(maker.input[1:]):
                # For nothing: a normalisation ends with a factor and a summand per channel.
                for place, constant in enumerate(held, start=1):
                    maker.input[place] = self._keep(f"{name}.smooth{place}", np.asarray(constant / factors))
                return name
        inverse = self._keep(f"{name}.factors", (1 / factors).astype(np.float32))
        return self._insert("Mul", [name, inverse], f"{name}.smooth", nodes[0])

    def _round(self, name: str, scale: float, before: Any) -> str:
        """Put the activation `name` through int8."""
        grid = [self._keep(f"{name}.scale", np.array(scale, np.float32)), self._keep(f"{name}.zero", np.int8(0))]
        rounded = self._insert("QuantizeLinear", [name, *grid], f"{name}.int8", before)
        return self._insert("DequantizeLinear", [rounded, *grid], f"{name}.rounded", before)

    def _store(self, name: str, weights: Array, axis: int, before: Any) -> str:
        """Keep `weights` in int8, a scale for each place along `axis`."""
        whole, scale = _grid(weights, axis)
        held = [self._keep(name, whole), self._keep(f"{name}.scale", scale.reshape(-1))]
        held.append(self._keep(f"{name}.zero", np.zeros(scale.size, np.int8)))
        return self._insert("DequantizeLinear", held, f"{name}.float", before, axis=axis)

    def _quantize_table(self, node: Any) -> None:
        """Keep a large embedding table in int8; only the rows that are looked up become float."""
        table = self._constant(node.input[0])
        if table is None or table.dtype != np.float32 or table.ndim != 2 or table.size < _TABLE:
            return
        if _attributes(node).get("axis"):
            return
        whole, scale = _grid(table, 0)
        name, ids, [output] = node.input[0], node.input[1], node.output
        rows = self._insert("Gather", [self._keep(f"{name}.int8", whole), ids], f"{output}.int8", node)
        scales = self._insert("Gather", [self._keep(f"{name}.scale", scale), ids], f"{output}.scale", node)
        floats = self._insert("Cast", [rows], f"{output}.float", node, to=onnx.TensorProto.FLOAT)
        node.CopyFrom(helper.make_node("Mul", [floats, scales], [output], name=node.name))

    # --- the graph

    def _constant(self, name: str) -> NDArray[Any] | None:
        """Return the value of `name` if it is stored in the graph, turned or of another float type maybe."""
        if name in self._stored:
            return np.asarray(numpy_helper.to_array(self._stored[name]))
        node = self._makers.get(name)
        if node is None or node.op_type not in ("Transpose", "Cast", "Identity", "Constant", "DequantizeLinear"):
            return None
        attributes = _attributes(node)
        if node.op_type == "Constant":
            return np.asarray(numpy_helper.to_array(attributes["value"])) if "value" in attributes else None
        held = self._constant(node.input[0])
        if held is None or node.op_type == "Identity":
            return held
        if node.op_type == "DequantizeLinear":
            return self._unfolded(node, held)
        if node.op_type == "Transpose":
            return held.transpose(attributes.get("perm"))
        return held.astype(helper.tensor_dtype_to_np_dtype(attributes["to"]))

    def _unfolded(self, node: Any, held: NDArray[Any]) -> NDArray[Any] | None:
        """Return the value of weights that are stored smaller than they are meant."""
        grid = [self._constant(name) for name in node.input[1:]]
        if any(part is None for part in grid):
            return None
        scale, zero = (np.asarray(part, np.float32) for part in (*grid, 0)[:2])
        if scale.ndim == 1 and held.ndim > 1:
            shape = [1] * held.ndim
            shape[_attributes(node).get("axis", 1)] = -1
            scale, zero = scale.reshape(shape), zero.reshape(shape) if zero.ndim else zero
        return np.asarray((held - zero) * scale, np.float32)

    def _keep(self, name: str, value: Any) -> str:
        """Store a constant; of equal names the first one is meant."""
        if name not in self._stored:
            self._stored[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def _insert(self, kind: str, inputs: Sequence[str], output: str, before: Any, **attributes: Any) -> str:
        self._before[before.output[0]].append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def _rebuild(self) -> None:
        """Put the new nodes in and leave out what nothing reads any more."""
        nodes = [new for node in self._graph.node for new in (*self._before[node.output[0]], node)]
        needed = {output.name for output in self._graph.output}
        kept = []
        for node in reversed(nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                kept.append(node)
        constants = [tensor for name, tensor in self._stored.items() if name in needed]
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in reversed(kept)]
        for field, values in (("node", nodes), ("initializer", constants), ("value_info", [])):
            self._graph.ClearField(field)
            getattr(self._graph, field).extend(values)


def _factors(largest: Array, reach: Iterable[Array]) -> Array:
    """Return what each input channel is divided by, so that activations and weights become equally hard to round."""
    weights = np.maximum(np.max(list(reach), axis=0), 1e-5)
    factors = np.maximum(largest, 1e-5) ** _SMOOTHING / weights ** (1 - _SMOOTHING)
    return np.asarray(np.maximum(factors, 1e-5), np.float32)


def _grid(weights: Array, axis: int) -> tuple[NDArray[np.int8], Array]:
    """Return `weights` in whole steps and the size of a step for each place along `axis`, in broadcastable shape."""
    others = tuple(place for place in range(weights.ndim) if place != axis)
    scale = np.maximum(np.abs(weights).max(axis=others, keepdims=True), 1e-12) / np.float32(127)
    return np.rint(weights / scale).astype(np.int8), scale.astype(np.float32)


def _attributes(node: Any) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
