"""The model and the index that are current, exchanged for others while the process runs (docs/adr/0011)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Final

import structlog

from catalens.domain import IndexInfo
from catalens.encoders import open_encoder
from catalens.engines import fitting
from catalens.errors import CatalensError, Transient
from catalens.ports import Encoder, Indexes, VectorIndex
from catalens.settings import Settings
from catalens.telemetry import Metrics

log = structlog.get_logger(__name__)

POLL_SECONDS: Final = 2.0
"""How often a process looks whether another index is current, or a switch is under way."""
_AGAIN_SECONDS: Final = 60.0
"""After a model that could not be loaded: loading costs seconds, and what is missing must be put there first."""


class Generation:
    """One model and its index; both stay open while it is used, and close when it is retired."""

    def __init__(
        self, info: IndexInfo, encoder: Encoder, index: VectorIndex, close: Callable[[], Awaitable[None]]
    ) -> None:
        self.info = info
        self.encoder = encoder
        self.index = index
        self.retired = asyncio.Event()
        """Set once another one is current."""
        self._close = close
        self._users = 0
        self._unused = asyncio.Event()
        self._unused.set()

    @contextmanager
    def using(self) -> Iterator[Generation]:
        """Keep it open for the length of the block."""
        self._users += 1
        self._unused.clear()
        try:
            yield self
        finally:
            self._users -= 1
            if not self._users:
                self._unused.set()

    async def close(self) -> None:
        """Wait until nobody uses it, then release the model and the index."""
        self.retired.set()
        await self._unused.wait()
        await self._close()


class Encoders:
    """The models that this process has loaded: each once, however many use it, and only while somebody does."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._loaded: dict[str, tuple[Encoder, AsyncExitStack]] = {}
        self._users: dict[str, int] = {}
        self._loading = asyncio.Lock()

    @asynccontextmanager
    async def open(self, model: str) -> AsyncIterator[Encoder]:
        """Yield the encoder of `model`, as CATALENS_MODEL would name it; raises as open_encoder."""
        async with self._loading:
            if model not in self._loaded:
                stack = AsyncExitStack()
                settings = self._settings.model_copy(update={"model": model})
                self._loaded[model] = await stack.enter_async_context(open_encoder(settings, self._metrics)), stack
            self._users[model] = self._users.get(model, 0) + 1
        try:
            yield self._loaded[model][0]
        finally:
            self._users[model] -= 1
            if not self._users[model]:
                _, stack = self._loaded.pop(model)
                await stack.aclose()


class Generations:
    """Holds the current generation of this process and follows the installation to the next one."""

    def __init__(self, encoders: Encoders, indexes: Indexes) -> None:
        self._encoders = encoders
        self._indexes = indexes
        self._changing = asyncio.Lock()
        self._current: Generation | None = None
        self._closing: set[asyncio.Task[None]] = set()

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings, encoders: Encoders, indexes: Indexes) -> AsyncIterator[Generations]:
        """Load the model and open its index, made empty if there is none.

        The model is CATALENS_MODEL if that is set, else the one of the current index, else the default. Raises
        ModelMismatch if that is not the model of the current index, Misconfigured and Transient.
        """
        current = await indexes.current()
        model = settings.model if current is None or "model" in settings.model_fields_set else current.model
        generations = cls(encoders, indexes)
        generations._current = await generations._load(model)
        try:
            yield generations
        finally:
            await generations._close()

    @property
    def current(self) -> Generation:
        """The one to begin with; use `use` to keep it open."""
        if self._current is None:
            raise Transient("the process is stopping")
        return self._current

    @contextmanager
    def use(self) -> Iterator[Generation]:
        """Yield the current generation, which stays open until the end of the block, whatever becomes current."""
        with self.current.using() as generation:
            yield generation

    @contextmanager
    def use_index(self) -> Iterator[VectorIndex]:
        """Yield the current index, which stays open until the end of the block."""
        with self.use() as generation:
            yield generation.index

    async def follow(self, stop: asyncio.Event) -> None:
        """Look every few seconds which index is current and load it, until `stop`; the old one answers meanwhile."""
        while not stop.is_set():
            wait = POLL_SECONDS
            try:
                await self.catch_up()
            except Transient as error:
                log.warning("generation.unknown", error=str(error))
            except CatalensError as error:  # the old one goes on; whoever runs this puts the model there
                advice = "the old model answers meanwhile, without what is new"
                log.error("generation.not_loaded", error=str(error), advice=advice)  # noqa: TRY400  # no bug of ours
                wait = _AGAIN_SECONDS
            try:
                async with asyncio.timeout(wait):
                    await stop.wait()
            except TimeoutError:
                continue

    async def catch_up(self) -> None:
        """Make the installation's current index this process's; raises what loading its model raises."""
        async with self._changing:
            wanted = await self._indexes.current()
            old = self.current
            if wanted is None or wanted.name == old.info.name:
                return
            self._current = await self._load(wanted.model)
            log.info("generation.changed", model=wanted.model, index=wanted.name, before=old.info.name)
            closing = asyncio.create_task(old.close(), name="generation.close")
            old.retired.set()
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def _load(self, model: str) -> Generation:
        async with AsyncExitStack() as stack:
            encoder = await stack.enter_async_context(self._encoders.open(model))
            info = await fitting(self._indexes, IndexInfo(model, encoder.spec))
            index = await self._indexes.open(info)
            stack.push_async_callback(index.close)
            return Generation(info, encoder, index, stack.pop_all().aclose)

    async def _close(self) -> None:
        last, self._current = self._current, None
        await asyncio.gather(*self._closing)
        if last is not None:
            await last.close()
