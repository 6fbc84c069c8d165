"""Which runtime `auto` takes, on every kind of machine, and what it says when none will do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from catalens.encoders.bundle import WEIGHTS, Bundle, FileEntry, Quantization, read_manifest
from catalens.encoders.choice import Machine, RuntimeName, choose, this_machine
from catalens.errors import Misconfigured
from catalens.settings import EncoderSettings

TINY = Path(__file__).parent.parent / "fixtures" / "bundles" / "tiny"
ALL: frozenset[RuntimeName] = frozenset({"openvino", "onnx", "torch"})
GPU: frozenset[RuntimeName] = frozenset({"onnx", "torch"})


def bundle(*, weights: bool = True, precision: str = "fp32") -> Bundle:
    manifest = read_manifest(TINY)
    files = dict(manifest.files)
    if weights:
        files[WEIGHTS] = FileEntry(sha256="0" * 64, bytes=1)
    made = Quantization(method="ptq", source="f", calibration=1, loss=None) if precision == "int8" else None
    return Bundle(TINY, manifest.model_copy(update={"files": files, "precision": precision, "quantization": made}))


def machine(
    installed: frozenset[RuntimeName] = ALL, *, gpu: bool = False, for_gpu: frozenset[RuntimeName] = GPU
) -> Machine:
    return Machine(gpu, installed, for_gpu & installed)


@pytest.mark.parametrize(
    ("there", "model", "settings", "expected"),
    [
        (machine(), bundle(), {}, ("openvino", "cpu")),
        (machine(gpu=True), bundle(), {}, ("torch", "cuda")),
        (machine(gpu=True), bundle(), {"device": "cpu"}, ("openvino", "cpu")),
        (machine(gpu=True), bundle(weights=False), {}, ("onnx", "cuda")),
        (machine(gpu=True), bundle(precision="int8"), {}, ("onnx", "cuda")),
        (machine(gpu=True, for_gpu=frozenset()), bundle(), {}, ("openvino", "cpu")),
        (machine(gpu=True), bundle(weights=False), {"precision": "bf16"}, ("openvino", "cpu")),
        (machine(gpu=True), bundle(), {"runtime": "openvino"}, ("openvino", "cpu")),
        (machine(gpu=True), bundle(), {"runtime": "onnx", "device": "cpu"}, ("onnx", "cpu")),
        (machine(frozenset({"onnx", "torch"})), bundle(), {}, ("onnx", "cpu")),
        (machine(frozenset({"onnx", "torch"})), bundle(), {"precision": "bf16"}, ("torch", "cpu")),
        (machine(frozenset({"torch"})), bundle(), {}, ("torch", "cpu")),
        (machine(), bundle(), {"runtime": "torch"}, ("torch", "cpu")),
    ],
)
def test_the_best_that_there_is(
    there: Machine, model: Bundle, settings: dict[str, Any], expected: tuple[str, str]
) -> None:
    choice = choose(EncoderSettings(**settings), model, there)
    assert (choice.runtime, choice.device) == expected


@pytest.mark.parametrize(
    ("there", "model", "settings", "told"),
    [
        (machine(frozenset()), bundle(), {}, r"catalens\[encoder\].*catalens\[onnx\].*catalens\[torch\]"),
        (machine(frozenset({"onnx"})), bundle(), {"runtime": "torch"}, r"catalens\[torch\]"),
        (machine(), bundle(), {"device": "cuda"}, "no GPU"),
        (machine(gpu=True), bundle(), {"runtime": "openvino", "device": "cuda"}, "CATALENS_ENCODER__DEVICE=cpu"),
        (machine(), bundle(), {"runtime": "onnx", "precision": "bf16"}, "CATALENS_ENCODER__PRECISION=f32"),
        (machine(), bundle(weights=False), {"runtime": "torch"}, "catalens model pull"),
        (machine(), bundle(precision="int8"), {"runtime": "torch"}, "fp32 bundle"),
        (
            machine(gpu=True, for_gpu=frozenset()),
            bundle(),
            {"runtime": "torch", "device": "cuda"},
            "not built for GPUs",
        ),
    ],
)
def test_what_hinders_is_told(there: Machine, model: Bundle, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(Misconfigured, match=told):
        choose(EncoderSettings(**settings), model, there)


def test_few_lanes_feed_a_gpu_and_each_core_is_a_lane() -> None:
    assert choose(EncoderSettings(), bundle(), machine(gpu=True)).lanes(16) == 8
    assert choose(EncoderSettings(), bundle(), machine(gpu=True)).lanes(2) == 2
    assert choose(EncoderSettings(), bundle(), machine()).lanes(16) == 16


def test_it_says_why() -> None:
    assert choose(EncoderSettings(), bundle(), machine(gpu=True)).why == "a GPU is here, and torch for it"
    assert "not installed" in choose(EncoderSettings(), bundle(), machine(frozenset({"onnx"}))).why
    asked = EncoderSettings(runtime="onnx", device="cpu")
    assert choose(asked, bundle(), machine()).why == "as set"


def test_this_machine_has_what_the_tests_run_on() -> None:
    found = this_machine()
    assert {"openvino", "onnx"} <= found.installed
    assert found.for_gpu <= found.installed


def test_a_folder_of_that_name_is_no_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "onnxruntime", "openvino"):
        (tmp_path / name).mkdir()
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert this_machine().installed == frozenset()
