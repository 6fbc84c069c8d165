"""A micro-batcher: single items in, batches on a few threads, one future an item, a bounded queue in front."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

import structlog

from catalens.errors import Overloaded, Transient

log = structlog.get_logger(__name__)

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    """When a free lane starts: with queries at once, with bulk items when there are enough or the first is old."""

    max_batch: int
    """Items in one batch at most."""
    linger: float
    """Seconds that a bulk item waits for company at most."""

    def wait(self, queries: int, bulk: int, oldest_bulk: float) -> float | None:
        """Return how many seconds a free lane waits: 0 to start now, None until something arrives.

        `oldest_bulk` is the age in seconds of the bulk item that has waited longest.
        """
        if queries or bulk >= self.max_batch:
            return 0.0
        if not bulk:
            return None
        return max(0.0, self.linger - oldest_bulk)


@dataclass(slots=True, eq=False)
class _Entry(Generic[T, R]):
    item: T
    future: asyncio.Future[R]
    since: float


class MicroBatcher(Generic[T, R]):
    """Gives every item its own result or its own error, while the work is done in batches off the event loop.

    `work` gets 1 to `policy.max_batch` items on one of `lanes` threads and returns a result or an exception for each.
    If it raises instead, the batch is halved until the culprit stands alone: only that item gets the error.
    One more lane takes queries only, so that a query never waits for a bulk batch to end. A query that finds
    `capacity` others waiting raises Overloaded, a bulk item then waits for room. A caller that is cancelled leaves
    the batch to the others. Once closed, or if a lane dies, everybody is told by Transient.

    Make it, call it and close it on one event loop.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[Sequence[T]], Sequence[R | Exception]],
        *,
        lanes: int,
        policy: BatchPolicy,
        capacity: int,
    ) -> None:
        self._name = name
        self._work = work
        self._policy = policy
        self._capacity = capacity
        self._queries: deque[_Entry[T, R]] = deque()
        self._bulk: deque[_Entry[T, R]] = deque()
        self._room = asyncio.Semaphore(capacity)
        self._arrived = asyncio.Event()
        self._closing = False
        self._loop = asyncio.get_running_loop()
        self._threads = ThreadPoolExecutor(lanes + 1, thread_name_prefix=name)
        self._lanes = [
            asyncio.create_task(self._lane(queries_only=number == 0), name=f"{name}-lane-{number}")
            for number in range(lanes + 1)
        ]
        for lane in self._lanes:
            lane.add_done_callback(self._lane_ended)

    def waiting(self) -> int:
        """Return how many items wait for a lane."""
        return len(self._queries) + len(self._bulk)

    async def submit(self, item: T, *, bulk: bool) -> R:
        """Return the item's result; see the class for what it raises."""
        self._refuse_when_closed()
        if bulk:
            await self._room.acquire()
            if self._closing:
                self._room.release()  # the next in line must hear it too
        elif len(self._queries) >= self._capacity:
            self._queries = deque(entry for entry in self._queries if not entry.future.done())
            if len(self._queries) >= self._capacity:
                raise Overloaded(f"{self._capacity} items already wait for the {self._name} encoder")
        self._refuse_when_closed()
        entry: _Entry[T, R] = _Entry(item, self._loop.create_future(), self._loop.time())
        (self._bulk if bulk else self._queries).append(entry)
        self._arrived.set()
        return await entry.future

    async def close(self) -> None:
        """Refuse new items, finish those that wait, end the lanes."""
        self._closing = True
        self._arrived.set()
        await asyncio.gather(*self._lanes, return_exceptions=True)
        self._threads.shutdown(wait=False)  # the lanes have ended: nothing runs on them

    async def _lane(self, *, queries_only: bool) -> None:
        while batch := await self._next_batch(queries_only=queries_only):
            try:
                items = [entry.item for entry in batch]
                results = await self._loop.run_in_executor(self._threads, self._attempt, items)
                for entry, result in zip(batch, results, strict=True):
                    _settle(entry.future, result)
            except BaseException:
                self._fail(batch)
                raise

    async def _next_batch(self, *, queries_only: bool) -> list[_Entry[T, R]]:
        """Wait until there is something to do and take it; empty when closed and drained."""
        while True:
            delay = self._delay(queries_only=queries_only)
            if delay == 0:
                if batch := self._take():
                    return batch
                continue  # everybody who waited had left
            if delay is None and self._closing:
                return []
            self._arrived.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._arrived.wait()

    def _delay(self, *, queries_only: bool) -> float | None:
        bulk = 0 if queries_only else len(self._bulk)
        if bulk and self._closing:
            return 0.0
        oldest = self._loop.time() - self._bulk[0].since if bulk else 0.0
        return self._policy.wait(len(self._queries), bulk, oldest)

    def _take(self) -> list[_Entry[T, R]]:
        """Take queries, or bulk items where there are none; those whose caller is gone are dropped."""
        if self._queries:
            return _pop(self._queries, self._policy.max_batch)
        before = len(self._bulk)
        batch = _pop(self._bulk, self._policy.max_batch)
        for _ in range(before - len(self._bulk)):
            self._room.release()
        return batch

    def _attempt(self, items: Sequence[T]) -> list[R | Exception]:
        """Do the work on a lane's thread, halving a batch that fails down to the culprit."""
        try:
            results = list(self._work(items))
        except Exception as error:  # noqa: BLE001  # the boundary to the caller: it becomes the item's own error
            if len(items) == 1:
                return [error]
            half = len(items) // 2
            return self._attempt(items[:half]) + self._attempt(items[half:])
        return results

    def _lane_ended(self, lane: asyncio.Task[None]) -> None:
        """Let nobody wait for a lane that is gone: what is left fails, and so does what comes."""
        if not lane.cancelled() and lane.exception() is None:
            return
        if not self._closing:
            log.error("lane.died", lane=lane.get_name(), error=None if lane.cancelled() else repr(lane.exception()))
        self._closing = True
        self._arrived.set()
        left = [*self._queries, *self._bulk]
        for _ in self._bulk:
            self._room.release()
        self._queries.clear()
        self._bulk.clear()
        self._fail(left)

    def _fail(self, entries: Sequence[_Entry[T, R]]) -> None:
        for entry in entries:
            _settle(entry.future, self._gone())

    def _refuse_when_closed(self) -> None:
        if self._closing:
            raise self._gone()

    def _gone(self) -> Transient:
        return Transient(f"the {self._name} encoder is shutting down")


def _settle(future: asyncio.Future[R], result: R | Exception) -> None:
    if future.done():  # the caller has left
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)


def _pop(line: deque[_Entry[T, R]], count: int) -> list[_Entry[T, R]]:
    batch: list[_Entry[T, R]] = []
    while line and len(batch) < count:
        entry = line.popleft()
        if not entry.future.done():
            batch.append(entry)
    return batch
