"""Waiting for what becomes of an event: the embedder reports on the outcomes topic, the waiting request listens."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import structlog

from catalens import events
from catalens.errors import InvalidEvent, Transient
from catalens.events import Outcome
from catalens.ports import EventConsumer, EventLog

log = structlog.get_logger(__name__)

_FETCH = 256
_POLL_SECONDS = 30.0


class Outcomes:
    """Hands each outcome to the requests that wait for it."""

    def __init__(self, event_log: EventLog) -> None:
        self._log = event_log
        self._listening = asyncio.Event()
        self._waiting: dict[str, set[asyncio.Future[Outcome | None]]] = {}

    async def run(self, stop: asyncio.Event) -> None:
        """Listen until `stop` is set; those who still wait are then told None."""
        consumer = await self._log.subscribe(None, [events.OUTCOMES])
        self._listening.set()
        listening = asyncio.create_task(self._listen(consumer), name="outcomes")
        stopping = asyncio.create_task(stop.wait(), name="outcomes-stop")
        try:
            await asyncio.wait([listening, stopping], return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            listening.cancel()
            await asyncio.wait([listening, stopping])
            self._listening.clear()
            for event_id in self._waiting:
                self._settle(event_id, None)
            await consumer.close()
        if not listening.cancelled():
            listening.result()  # it only ends by failing

    async def _listen(self, consumer: EventConsumer) -> NoReturn:
        while True:
            try:
                records = await consumer.fetch(_FETCH, _POLL_SECONDS)
            except Transient as error:  # for as long as it lasts: who waits gets a 202 when its time is up
                log.warning("outcomes.away", error=str(error))
                await asyncio.sleep(error.retry_after)
                continue
            for record in records:
                try:
                    outcome = events.decode_outcome(record)
                except InvalidEvent as error:
                    log.warning("outcome.invalid", error=str(error), offset=record.offset)
                    continue
                self._settle(outcome.event_id, outcome)

    def _settle(self, event_id: str, outcome: Outcome | None) -> None:
        for future in self._waiting.get(event_id, ()):
            if not future.done():
                future.set_result(outcome)

    async def listening(self) -> None:
        """Return once no outcome of an event that is appended from now on can be missed."""
        await self._listening.wait()

    @contextmanager
    def expect(self, event_id: str) -> Iterator[asyncio.Future[Outcome | None]]:
        """Yield the future outcome of `event_id`; enter before the event is appended."""
        future: asyncio.Future[Outcome | None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(event_id, set()).add(future)
        try:
            yield future
        finally:
            self._waiting[event_id].discard(future)
            if not self._waiting[event_id]:
                del self._waiting[event_id]
