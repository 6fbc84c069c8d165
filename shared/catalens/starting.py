"""How a service starts while an engine is away: it waits, says so, and can be asked how it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import Final, Self, TypeVar

import structlog

from catalens.errors import CatalensError, NoTopic, Transient
from catalens.retry import RetryPolicy
from catalens.settings import Settings
from catalens.telemetry import Metrics
from catalens.web import build_app, serving

T = TypeVar("T")
log = structlog.get_logger(__name__)

_WAITS: Final = RetryPolicy(attempts=0)
"""The waits alone: it is tried for as long as the process is wanted."""


class Stopped(Exception):
    """SIGTERM or SIGINT came before the service was ready: it ends at once, and nothing is wrong."""


class Starting:
    """Opens what a service needs, each part tried until it is there; calls raise Stopped as soon as `stop` is set.

    From the first engine that is away until the block ends, /livez and /metrics are served, and /readyz answers 503.
    """

    def __init__(self, service: str, settings: Settings, metrics: Metrics, stop: asyncio.Event) -> None:
        self._service = service
        self._settings = settings
        self._metrics = metrics
        self._stop = stop
        self._away: dict[str, str] = {}
        self._url: str | None = None
        self._serving = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Serve nothing yet."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the address to the service."""
        await self._serving.aclose()

    async def __call__(self, what: str, opening: Callable[[], Awaitable[T]]) -> T:
        """Return what `opening` returns, tried again while it raises Transient or NoTopic: `what`, log say, is away."""
        failures = 0
        while True:
            try:
                async with _unless(self._stop):
                    opened = await opening()
            except (Transient, NoTopic) as error:
                failures += 1
                self._away = {what: str(error)}
                await self._say(what, error)
            else:
                self._away = {"start": "under way"}
                return opened
            async with _unless(self._stop):
                await asyncio.sleep(_WAITS.delay(failures))

    async def _say(self, what: str, error: CatalensError) -> None:
        if self._url is None:
            app = build_app([], self._settings, self._metrics, ready=self._ready, title=f"Catalens {self._service}")
            self._url = await self._serving.enter_async_context(serving(app, self._settings))
        event = f"{self._service}.{what}_away"
        log.warning(event, error=str(error), url=self._url)

    async def _ready(self) -> Mapping[str, str]:
        return self._away


@asynccontextmanager
async def _unless(stop: asyncio.Event) -> AsyncIterator[None]:
    """Raise Stopped as soon as `stop` is set; what is awaited in the block is cancelled."""

    async def watch() -> None:
        await stop.wait()
        limit.reschedule(asyncio.get_running_loop().time())

    try:
        async with asyncio.timeout(None) as limit:
            watcher = asyncio.create_task(watch(), name="starting.stop")
            try:
                yield
            finally:
                watcher.cancel()
                await asyncio.wait([watcher])
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise Stopped from error
