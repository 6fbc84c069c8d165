"""How many requests an API key may make: a token bucket, and the one of a single process."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

BURST_SECONDS: Final = 5.0
"""A bucket holds what comes in within this time: a page sends several requests at once."""

WHOLE: Final = 1 - 1e-9
"""What counts as one request's worth: sums of fractions fall short of 1 by what floats round away."""


def capacity(rate: float) -> float:
    """Return how many requests may come at once."""
    return max(1.0, rate * BURST_SECONDS)


@dataclass(frozen=True, slots=True)
class Allowance:
    """Whether one request may go on, and what the bucket holds after it."""

    granted: bool
    left: float
    """Below 0 while a batch is being paid off."""
    rate: float

    @property
    def retry_after(self) -> int:
        """Whole seconds until the next request is granted."""
        return max(1, math.ceil((1 - self.left) / self.rate))

    def headers(self) -> Mapping[str, str]:
        """Return the RateLimit fields of an answer (draft-ietf-httpapi-ratelimit-headers)."""
        most = capacity(self.rate)
        full = math.ceil(max(0.0, most - self.left) / self.rate)
        return {
            "RateLimit-Policy": f'"key";q={math.floor(most)};w={math.ceil(most / self.rate)}',
            "RateLimit": f'"key";r={max(0, math.floor(self.left))};t={full}',
        }


class TokenBuckets:
    """A RateLimiter of one process: it holds a bucket for each client that came, and there are few."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._held: dict[str, tuple[float, float]] = {}
        """What is in the bucket, and as of when."""

    async def take(self, client: str, rate: float) -> Allowance:
        """See RateLimiter."""
        left = self._left(client, rate)
        if left < WHOLE:
            return Allowance(False, left, rate)
        left = max(0.0, left - 1)
        self._held[client] = left, self._held[client][1]
        return Allowance(True, left, rate)

    async def owe(self, client: str, rate: float, requests: int) -> Allowance:
        """See RateLimiter."""
        left = self._left(client, rate) - requests
        self._held[client] = left, self._held[client][1]
        return Allowance(True, left, rate)

    def _left(self, client: str, rate: float) -> float:
        """Fill the bucket up to now and return what it holds."""
        now, most = self._now(), capacity(rate)
        left, since = self._held.get(client, (most, now))
        left = min(most, left + max(0.0, now - since) * rate)
        self._held[client] = left, now
        return left

    async def close(self) -> None:
        """Nothing is held but numbers."""
