"""Signals, supervision of named tasks and the drain deadline: how a process starts, lives and stops."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import structlog

from catalens import tracing
from catalens.errors import CatalensError
from catalens.settings import Settings, load_settings
from catalens.starting import Stopped
from catalens.telemetry import configure_logging

log = structlog.get_logger(__name__)

_M_ARENA_MAX: Final = -8
"""As malloc.h has it."""


@asynccontextmanager
async def stop_on_signals() -> AsyncIterator[asyncio.Event]:
    """Yield an event that SIGTERM or SIGINT sets; only the owner of the process may use this."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        loop.add_signal_handler(number, stop.set)
    try:
        yield stop
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


def one_heap() -> None:
    """Let all threads of this process allocate from one heap, where the C library is glibc.

    With one for every thread, what a thread let go of served no other: the standalone process grew by a MiB with every
    11,000 answers, and by a quarter of that with one heap.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


def started() -> None:
    """Leave what start-up made out of garbage collections from now on.

    It lives as long as the process, and each full collection would stop every request to look through it.
    """
    gc.collect()
    gc.freeze()


async def supervise(
    tasks: Mapping[str, Coroutine[Any, Any, None]], stop: asyncio.Event, *, drain_deadline: float
) -> None:
    """Run named tasks until `stop` is set or one of them ends; then let the others drain, and end them.

    Each task watches `stop` itself and returns when drained. A task that fails, or returns before `stop`, sets `stop`
    for all; those still running `drain_deadline` seconds later are cancelled. The first failure is raised.
    """
    running = [asyncio.create_task(work, name=name) for name, work in tasks.items()]
    stopper = asyncio.create_task(stop.wait(), name="stop")
    try:
        await asyncio.wait([*running, stopper], return_when=asyncio.FIRST_COMPLETED)
        stop.set()
        _, late = await asyncio.wait(running, timeout=drain_deadline)
        for task in late:
            log.warning("drain.deadline", task=task.get_name(), seconds=drain_deadline)
    finally:
        stopper.cancel()
        for task in running:
            task.cancel()
        results = await asyncio.gather(*running, return_exceptions=True)
    for task, result in zip(running, results, strict=True):
        if isinstance(result, Exception):
            log.error("task.failed", task=task.get_name(), error=str(result))
            raise result


def run_service(name: str, serve: Callable[[Settings], Coroutine[Any, Any, None]]) -> None:
    """Be the process of one service, of that name in traces: settings, logging, `serve` until a signal.

    What is wrong is one line on stderr.
    """
    one_heap()
    try:
        settings = load_settings()
        configure_logging(settings)
        tracing.configure(settings, name)
        asyncio.run(serve(settings))
    except Stopped:
        log.info("process.stopped")
    except CatalensError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201  # for whoever started it, logging set up or not
        sys.exit(1)
