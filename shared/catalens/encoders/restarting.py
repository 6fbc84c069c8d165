"""A runtime that is loaded again when it fails again and again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

import numpy as np
import structlog
from numpy.typing import NDArray

from catalens.encoders.towers import Rows, Runtime
from catalens.errors import Transient
from catalens.telemetry import Metrics

log = structlog.get_logger(__name__)

FAILURES: Final = 8
"""In a row at least, and always more than one item that the model fails on costs while its batch is halved."""


class RestartingRuntime:
    """Runtime: that of `load`, exchanged for a new one after FAILURES failures in a row, more for large batches.

    Each failure is the caller's Transient all the same; while the new one is loaded those that fail wait for it. The
    old one, which other lanes may be using, stays until then: a restart takes the memory of both.
    """

    def __init__(self, load: Callable[[], Runtime], metrics: Metrics, *, max_batch: int = 1) -> None:
        self._load = load
        self._restarts = metrics.encoder_restarts
        self._runtime = load()
        self._patience = max(FAILURES, max_batch.bit_length() + 1)
        self._failures = 0
        self._lock = threading.Lock()

    def run_vision(self, pixels: NDArray[np.float32]) -> Rows:
        """Return [N, dimension] for pixels [N, 3, H, W]. Raises Transient."""
        return self._run(lambda runtime: runtime.run_vision(pixels))

    def run_text(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> Rows:
        """Return [N, dimension] for ids and mask [N, T]. Raises Transient."""
        return self._run(lambda runtime: runtime.run_text(input_ids, attention_mask))

    def _run(self, call: Callable[[Runtime], Rows]) -> Rows:
        runtime = self._runtime
        try:
            rows = call(runtime)
        except Transient as error:
            self._failed(runtime, error)
            raise
        self._failures = 0
        return rows

    def _failed(self, runtime: Runtime, error: Transient) -> None:
        with self._lock:
            if runtime is not self._runtime:
                return  # another lane has seen to it
            self._failures += 1
            if self._failures < self._patience:
                return
            self._failures = 0
            log.error("encoder.failing", failures=self._patience, error=str(error), advice="the model is loaded again")
            try:
                self._runtime = self._load()
            except Exception as failure:  # noqa: BLE001  # the boundary: a GPU that is full raises torch's own, and
                # the caller must hear that its item can be tried again; so is the loading, after as many failures more
                log.error("encoder.not_restarted", error=str(failure))  # noqa: TRY400  # no bug of ours
                return
            self._restarts.inc()
            log.warning("encoder.restarted")
