"""The text side: a table of word vectors, and the graph that adds up the words of a text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from colour import Array
from onnx import TensorProto, helper, numpy_helper


def quantise(table: Array) -> tuple[np.ndarray, Array]:
    """int8 rows and one scale a row; a row of zeros stays zeros."""
    scale = np.maximum(np.abs(table).max(axis=1, keepdims=True), 1e-12).astype(np.float32) / 127
    return np.clip(np.rint(table / scale), -127, 127).astype(np.int8), scale


def build_graph(table: Array) -> onnx.ModelProto:
    """input_ids, attention_mask [N, T] → the normalised sum of rows; nothing known or all masked → zeros."""
    rows, scale = quantise(table)
    tensors = {
        "rows": rows,
        "scale": scale,
        "last": np.array([-1], np.int64),
        "tokens": np.array([1], np.int64),
        "floor": np.array(1e-12, np.float32),
    }
    nodes = [
        helper.make_node("Gather", ["rows", "input_ids"], ["picked"]),
        helper.make_node("Cast", ["picked"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Gather", ["scale", "input_ids"], ["sized"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["mask3"]),
        helper.make_node("Mul", ["sized", "mask3"], ["factor"]),
        helper.make_node("Mul", ["wide", "factor"], ["vectors"]),
        helper.make_node("ReduceSum", ["vectors", "tokens"], ["sum"], keepdims=0),
        helper.make_node("ReduceL2", ["sum", "last"], ["length"], keepdims=1),
        helper.make_node("Max", ["length", "floor"], ["divisor"]),
        helper.make_node("Div", ["sum", "divisor"], ["embedding"]),
    ]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["n", "t"]) for name in ("input_ids", "attention_mask")
    ]
    output = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", table.shape[1]])
    initialisers = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "starter-text", inputs, [output], initialisers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def save(table: Array, path: Path) -> None:
    onnx.save(build_graph(table), str(path))
