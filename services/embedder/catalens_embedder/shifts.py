"""Lets one worker follow another: each works for one index, and all stand aside while another becomes current."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from catalens.errors import CatalensError, Transient
from catalens.generations import POLL_SECONDS, Generation, Generations
from catalens.ports import Indexes
from catalens_embedder.worker import Embedder

log = structlog.get_logger(__name__)

_SAY_SECONDS: Final = 60.0


async def work(
    generations: Generations, indexes: Indexes, employ: Callable[[Generation], Embedder], stop: asyncio.Event
) -> None:
    """Run a worker for the current generation, and the next one for the next, until `stop`; raises as Embedder.run.

    A worker that joins its group while a switch is under way leaves it without having read anything.
    """
    said = 0.0
    loop = asyncio.get_running_loop()
    while not stop.is_set():
        with generations.use() as generation:
            if await _may_work(indexes, generation):
                try:
                    await _shift(employ(generation), indexes, generation, stop)
                except Transient as error:  # the log is away, so that the group cannot be joined
                    log.warning("embedder.log_away", error=str(error))
                    await _pause(stop)
                continue
        if loop.time() - said > _SAY_SECONDS:
            said = loop.time()
            log.warning(
                "embedder.held",
                advice="a switch to another index is under way; if nobody runs it any more, `catalens reindex` goes on",
            )
        await _pause(stop)


async def _shift(worker: Embedder, indexes: Indexes, generation: Generation, stop: asyncio.Event) -> None:
    over = asyncio.Event()
    watch = asyncio.create_task(_watch(indexes, generation, stop, over), name="embedder.watch")
    try:
        await worker.run(over, allowed=lambda: _may_work(indexes, generation))
    finally:
        watch.cancel()
        await asyncio.wait([watch])
    if not watch.cancelled():
        watch.result()  # raises what nobody foresaw


async def _watch(indexes: Indexes, generation: Generation, stop: asyncio.Event, over: asyncio.Event) -> None:
    """Set `over` on `stop`, and as soon as this worker should not work any more."""
    try:
        while not stop.is_set() and not generation.retired.is_set():
            if not await _may_work(indexes, generation, unknown=True):
                return
            await _pause(stop)
    finally:
        over.set()  # whatever happened: a worker that nobody watches could not be stopped


async def _may_work(indexes: Indexes, generation: Generation, *, unknown: bool = False) -> bool:
    try:
        current = await indexes.current()
        return current is not None and current.name == generation.info.name and not await indexes.held()
    except CatalensError as error:  # asked again soon; who works goes on, because nobody switches what is away
        log.warning("embedder.index_away", error=str(error))
        return unknown


async def _pause(stop: asyncio.Event) -> None:
    try:
        async with asyncio.timeout(POLL_SECONDS):
            await stop.wait()
    except TimeoutError:
        return
