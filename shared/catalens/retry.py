"""The retry policy as a value, and the clock that it waits by."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import structlog

from catalens.errors import Transient
from catalens.ports import Clock

T = TypeVar("T")
log = structlog.get_logger(__name__)


class SystemClock:
    """The real time."""

    def now(self) -> float:
        """Return Unix seconds."""
        return time.time()

    async def sleep(self, seconds: float) -> None:
        """Return after that long."""
        await asyncio.sleep(seconds)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often to try and how long to wait before each further try: `first`, doubled up to `longest`, seconds."""

    attempts: int
    first: float = 0.2
    longest: float = 5.0

    def delay(self, failures: int) -> float:
        """Return the wait after that many failures (1, 2, …)."""
        # Not more doublings than a float takes: an engine may be away for hours.
        return float(min(self.longest, self.first * 2 ** min(failures - 1, 60)))


async def with_retries(call: Callable[[], Awaitable[T]], policy: RetryPolicy, clock: Clock, *, what: str) -> T:
    """Return what `call` returns, trying again while it raises Transient; the last failure is raised."""
    failures = 0
    while True:
        try:
            return await call()
        except Transient as error:
            failures += 1
            if failures >= policy.attempts:
                raise
            log.warning("call.retried", what=what, failures=failures, error=str(error))
            await clock.sleep(policy.delay(failures))
