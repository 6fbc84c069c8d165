"""A port with a meter on it: what fetches of remote pictures cost, and what came of them."""

from __future__ import annotations

import time
from collections.abc import Awaitable
from typing import Final, TypeVar

from catalens import tracing
from catalens.domain import SeenPicture
from catalens.errors import ForbiddenUrl, InvalidPicture, NotFound, Transient
from catalens.ports import FetchedPicture, ImageSource
from catalens.telemetry import Metrics

T = TypeVar("T", bytes, FetchedPicture | None)
_OUTCOMES: Final = {ForbiddenUrl: "forbidden", InvalidPicture: "invalid", NotFound: "gone", Transient: "unreachable"}


class MeasuredImages:
    """An ImageSource as it is, with every fetch counted, timed and traced."""

    def __init__(self, images: ImageSource, metrics: Metrics) -> None:
        self._images = images
        self._metrics = metrics

    def check(self, url: str) -> None:
        """As the port says."""
        self._images.check(url)

    async def fetch(self, url: str) -> bytes:
        """As the port says."""
        return await self._measured(self._images.fetch(url))

    async def fetch_changed(self, url: str, seen: SeenPicture | None) -> FetchedPicture | None:
        """As the port says."""
        return await self._measured(self._images.fetch_changed(url, seen))

    async def close(self) -> None:
        """As the port says."""
        await self._images.close()

    async def _measured(self, fetch: Awaitable[T]) -> T:
        started, outcome = time.perf_counter(), "cancelled"
        with tracing.span("fetch_picture") as span:
            try:
                fetched = await fetch
                outcome = "unchanged" if fetched is None else "ok"
            except (ForbiddenUrl, InvalidPicture, NotFound, Transient) as error:
                outcome = next(name for kind, name in _OUTCOMES.items() if isinstance(error, kind))
                raise
            finally:
                self._metrics.fetch_seconds.labels(outcome).observe(time.perf_counter() - started)
                span.set({"catalens.outcome": outcome})
            size = len(fetched if isinstance(fetched, bytes) else fetched.data if fetched is not None else b"")
            self._metrics.fetched_bytes.inc(size)
            span.set({"catalens.bytes": size})
        return fetched
