"""A runtime that keeps failing is loaded again, once; one that fails now and then is not."""

# ruff: noqa: ARG002  # a runtime takes the arguments of its port

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from catalens.encoders.restarting import FAILURES, RestartingRuntime
from catalens.encoders.towers import Rows
from catalens.errors import Misconfigured, Transient
from catalens.telemetry import Metrics

PIXELS = np.zeros((1, 3, 2, 2), np.float32)
IDS = np.ones((1, 2), np.int64)


class Scripted:
    """A runtime that answers, or fails, as its script says."""

    def __init__(self, script: Iterator[bool]) -> None:
        self._script = script

    def run_vision(self, pixels: NDArray[np.float32]) -> Rows:
        if not next(self._script):
            raise Transient("the model failed")
        return np.ones((len(pixels), 4), np.float32)

    def run_text(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> Rows:
        return self.run_vision(np.zeros((len(input_ids), 3, 2, 2), np.float32))


def restarts(metrics: Metrics) -> float:
    return metrics.registry.get_sample_value("catalens_encoder_restarts_total") or 0.0


def test_a_runtime_that_keeps_failing_is_loaded_again() -> None:
    metrics = Metrics()
    scripts = iter([iter([False] * FAILURES), iter([True])])
    runtime = RestartingRuntime(lambda: Scripted(next(scripts)), metrics)
    for _ in range(FAILURES):
        with pytest.raises(Transient):
            runtime.run_vision(PIXELS)
    assert restarts(metrics) == 1
    assert runtime.run_text(IDS, IDS).shape == (1, 4)


def test_one_answer_between_failures_and_it_stays() -> None:
    metrics = Metrics()
    script = [False] * (FAILURES - 1) + [True] + [False] * (FAILURES - 1) + [True]
    scripts = iter([iter(script)])
    runtime = RestartingRuntime(lambda: Scripted(next(scripts)), metrics)
    for works in script:
        if works:
            runtime.run_vision(PIXELS)
        else:
            with pytest.raises(Transient):
                runtime.run_vision(PIXELS)
    assert restarts(metrics) == 0


@pytest.mark.parametrize("failure", [Misconfigured("the file is gone"), RuntimeError("out of memory")])
def test_what_cannot_be_loaded_again_is_tried_again_later(failure: Exception) -> None:
    metrics = Metrics()
    made = iter([Scripted(iter([False] * (2 * FAILURES))), None, Scripted(iter([True]))])

    def load() -> Scripted:
        runtime = next(made)
        if runtime is None:
            raise failure
        return runtime

    runtime = RestartingRuntime(load, metrics)
    for _ in range(2 * FAILURES):
        with pytest.raises(Transient):
            runtime.run_vision(PIXELS)
    assert restarts(metrics) == 1
    runtime.run_vision(PIXELS)


def test_one_bad_item_in_a_large_batch_is_no_reason() -> None:
    metrics = Metrics()
    scripts = iter([iter([False] * 10), iter([True])])
    runtime = RestartingRuntime(lambda: Scripted(next(scripts)), metrics, max_batch=256)
    for _ in range(9):  # 256, 128, … 1
        with pytest.raises(Transient):
            runtime.run_vision(PIXELS)
    assert restarts(metrics) == 0
    with pytest.raises(Transient):
        runtime.run_vision(PIXELS)
    assert restarts(metrics) == 1
