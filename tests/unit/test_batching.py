"""The micro-batcher: when it starts, who goes first, and that nobody is ever left waiting."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from catalens.batching import BatchPolicy, MicroBatcher
from catalens.errors import Overloaded, Transient

POLICY = BatchPolicy(max_batch=4, linger=0.0)


class Killed(BaseException):
    """What ends a thread without being an error of its work."""


class Gate:
    """Work that records its batches and stands still until it is let through; it doubles each number."""

    def __init__(self, *, opened: bool = False) -> None:
        self.batches: list[list[int]] = []
        self.entered = threading.Semaphore(0)
        self._open = threading.Event()
        if opened:
            self._open.set()

    def __call__(self, items: Sequence[int]) -> list[int | Exception]:
        self.batches.append(list(items))
        self.entered.release()
        self._open.wait()
        return [item * 2 for item in items]

    async def until_entered(self, batches: int = 1) -> None:
        """Return when `batches` further batches have been started."""
        for _ in range(batches):
            await asyncio.to_thread(self.entered.acquire)

    def open(self) -> None:
        self._open.set()


Work = Callable[[Sequence[int]], Sequence[int | Exception]]


@asynccontextmanager
async def batcher(
    work: Work, *, policy: BatchPolicy = POLICY, capacity: int = 100
) -> AsyncIterator[MicroBatcher[int, int]]:
    made: MicroBatcher[int, int] = MicroBatcher("test", work, lanes=1, policy=policy, capacity=capacity)
    try:
        yield made
    finally:
        if isinstance(work, Gate):
            work.open()
        await made.close()


def spawn(awaitable: Awaitable[int]) -> asyncio.Task[int]:
    async def run() -> int:
        return await awaitable

    return asyncio.create_task(run(), name="caller")


async def settle() -> None:
    """Let every task run as far as it can without an answer from a thread."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_a_lane_waits_for_company_only_with_bulk_items_that_are_young() -> None:
    policy = BatchPolicy(max_batch=4, linger=0.5)
    assert policy.wait(0, 0, 0.0) is None
    assert policy.wait(1, 0, 0.0) == 0
    assert policy.wait(1, 1, 0.0) == 0
    assert policy.wait(0, 4, 0.0) == 0
    assert policy.wait(0, 3, 0.125) == 0.375
    assert policy.wait(0, 1, 0.5) == 0
    assert policy.wait(0, 1, 9.0) == 0


async def test_everybody_gets_their_own_result() -> None:
    work = Gate(opened=True)
    async with batcher(work) as under_test:
        results = await asyncio.gather(*(under_test.submit(n, bulk=n % 2 == 0) for n in range(25)))
    assert results == [n * 2 for n in range(25)]
    assert sorted(n for batch in work.batches for n in batch) == list(range(25))
    assert max(map(len, work.batches)) <= 4


async def test_what_arrives_while_the_lane_is_busy_goes_as_one_batch_of_at_most_the_limit() -> None:
    work = Gate()
    async with batcher(work) as under_test:
        tasks = [spawn(under_test.submit(0, bulk=True))]
        await work.until_entered()
        tasks += [spawn(under_test.submit(n, bulk=True)) for n in range(1, 7)]
        await settle()
        assert under_test.waiting() == 6
        work.open()
        await asyncio.gather(*tasks)
    assert work.batches == [[0], [1, 2, 3, 4], [5, 6]]


async def test_a_partial_batch_goes_once_it_is_old_enough() -> None:
    work = Gate(opened=True)
    async with batcher(work, policy=BatchPolicy(max_batch=4, linger=0.001)) as under_test:
        assert await under_test.submit(1, bulk=True) == 2


async def test_a_full_batch_does_not_wait_for_its_age() -> None:
    work = Gate(opened=True)
    async with batcher(work, policy=BatchPolicy(max_batch=4, linger=3600)) as under_test:
        assert await asyncio.gather(*(under_test.submit(n, bulk=True) for n in range(4))) == [0, 2, 4, 6]
    assert work.batches == [[0, 1, 2, 3]]


async def test_a_query_does_not_wait_for_a_bulk_batch_to_end() -> None:
    work = Gate()

    def bulk_stands_still(items: Sequence[int]) -> Sequence[int | Exception]:
        return work(items) if items[0] < 100 else [item * 2 for item in items]

    async with batcher(bulk_stands_still) as under_test:
        bulk = spawn(under_test.submit(1, bulk=True))
        await work.until_entered()
        assert await under_test.submit(100, bulk=False) == 200
        assert not bulk.done()
        work.open()
        assert await bulk == 2


async def test_queries_go_before_bulk_items_that_came_earlier() -> None:
    work = Gate()
    async with batcher(work) as under_test:
        tasks = [spawn(under_test.submit(0, bulk=True)), spawn(under_test.submit(1, bulk=False))]
        await work.until_entered(2)  # the bulk lane and the queries' lane are both busy
        tasks += [spawn(under_test.submit(n, bulk=True)) for n in (10, 11)]
        await settle()
        tasks += [spawn(under_test.submit(n, bulk=False)) for n in (20, 21)]
        await settle()
        work.open()
        await asyncio.gather(*tasks)
    assert work.batches[2:] == [[20, 21], [10, 11]]


async def test_a_query_that_finds_the_queue_full_is_told_so_and_bulk_items_wait_for_room() -> None:
    work = Gate()
    async with batcher(work, capacity=2) as under_test:
        tasks = [spawn(under_test.submit(0, bulk=True)), spawn(under_test.submit(1, bulk=False))]
        await work.until_entered(2)
        tasks += [spawn(under_test.submit(n, bulk=False)) for n in (2, 3)]
        await settle()
        with pytest.raises(Overloaded):
            await under_test.submit(4, bulk=False)
        tasks += [spawn(under_test.submit(n, bulk=True)) for n in range(10, 15)]
        await settle()
        assert under_test.waiting() == 4, "two queries and two bulk items: the other three wait outside"
        work.open()
        assert await asyncio.gather(*tasks) == [0, 2, 4, 6, 20, 22, 24, 26, 28]


async def test_a_caller_that_left_is_dropped_and_makes_room() -> None:
    work = Gate()
    async with batcher(work, capacity=1) as under_test:
        busy = [spawn(under_test.submit(0, bulk=True)), spawn(under_test.submit(1, bulk=False))]
        await work.until_entered(2)
        leaving = [spawn(under_test.submit(2, bulk=False)), spawn(under_test.submit(3, bulk=True))]
        await settle()
        for task in leaving:
            task.cancel()
        await settle()
        staying = [spawn(under_test.submit(4, bulk=False)), spawn(under_test.submit(5, bulk=True))]
        await settle()
        work.open()
        assert await asyncio.gather(*busy, *staying) == [0, 2, 8, 10]
    assert all(task.cancelled() for task in leaving)
    assert sorted(n for batch in work.batches for n in batch) == [0, 1, 4, 5]


async def test_a_caller_that_leaves_a_running_batch_breaks_nothing() -> None:
    work = Gate()
    async with batcher(work) as under_test:
        tasks = [spawn(under_test.submit(n, bulk=True)) for n in range(3)]
        await work.until_entered()
        tasks[1].cancel()
        await settle()
        work.open()
        assert await tasks[0] == 0
        assert await tasks[2] == 4
        assert await under_test.submit(9, bulk=True) == 18


async def test_an_error_returned_for_one_item_is_that_items_own() -> None:
    def work(items: Sequence[int]) -> list[int | Exception]:
        return [ValueError(f"{n} is odd") if n % 2 else n for n in items]

    async with batcher(work) as under_test:
        results = await asyncio.gather(*(under_test.submit(n, bulk=True) for n in range(4)), return_exceptions=True)
    assert [results[0], results[2]] == [0, 2]
    assert [str(results[1]), str(results[3])] == ["1 is odd", "3 is odd"]


async def test_a_batch_that_fails_is_halved_down_to_the_culprit() -> None:
    seen: list[list[int]] = []

    def work(items: Sequence[int]) -> list[int | Exception]:
        seen.append(list(items))
        if 2 in items:
            raise RuntimeError("cannot do 2")
        return [n * 2 for n in items]

    async with batcher(work) as under_test:
        results = await asyncio.gather(*(under_test.submit(n, bulk=True) for n in range(4)), return_exceptions=True)
    assert [results[0], results[1], results[3]] == [0, 2, 6]
    assert isinstance(results[2], RuntimeError)
    assert seen == [[0, 1, 2, 3], [0, 1], [2, 3], [2], [3]]


async def test_closing_finishes_what_waits_and_refuses_the_rest() -> None:
    work = Gate()
    under_test: MicroBatcher[int, int] = MicroBatcher(
        "test", work, lanes=1, policy=BatchPolicy(max_batch=4, linger=3600), capacity=2
    )
    tasks = [spawn(under_test.submit(n, bulk=False)) for n in range(2)]
    await work.until_entered()
    tasks += [spawn(under_test.submit(n, bulk=True)) for n in (2, 3)]
    outside = [spawn(under_test.submit(n, bulk=True)) for n in range(4, 9)]
    await settle()
    closing = asyncio.create_task(under_test.close(), name="closing")
    await settle()
    with pytest.raises(Transient):
        await under_test.submit(9, bulk=False)
    work.open()
    await closing
    assert await asyncio.gather(*tasks) == [0, 2, 4, 6]
    refused = await asyncio.gather(*outside, return_exceptions=True)
    assert [type(result) for result in refused] == [Transient] * 5
    await under_test.close()  # twice is once


@pytest.mark.parametrize("bulk", [True, False])
async def test_a_lane_that_dies_leaves_nobody_waiting(bulk: bool) -> None:
    work = Gate()

    def dies(items: Sequence[int]) -> Sequence[int | Exception]:
        work(items)
        raise Killed

    async with batcher(dies, capacity=2) as under_test:
        tasks = [spawn(under_test.submit(n, bulk=bulk)) for n in range(1)]
        await work.until_entered()
        tasks += [spawn(under_test.submit(n, bulk=True)) for n in range(1, 5)]
        await settle()
        work.open()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [Transient] * 5
        with pytest.raises(Transient):
            await under_test.submit(9, bulk=False)
