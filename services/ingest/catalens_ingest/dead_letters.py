"""Dead letters over HTTP: what did not go through, why, and how it is brought back or dropped for good.

The topic itself holds all state: a letter is resolved by a further record in it, so that every process knows.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from bisect import bisect_right, insort
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, TypeAlias
from weakref import WeakValueDictionary

import structlog
from aiohttp import web
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from catalens import events
from catalens.domain import DEFAULT_TENANT, Message, Record, Tenant, TopicPartition
from catalens.errors import Conflict, NotFound
from catalens.openapi import Operation
from catalens.ports import EventLog
from catalens.settings import Settings
from catalens.web import invalid, read_params, reply, tenant_of
from catalens_ingest.models import (
    DeadLetterContent,
    DeadLetterList,
    DeadLetterParams,
    DeadLetterReceipt,
    DeadLetterState,
    ReplayParams,
)

log = structlog.get_logger(__name__)

_REASON: Final = "dlq_reason"
_RESOLVES: Final = "dlq_resolves"
_RESOLUTION: Final = "dlq_resolution"
_OURS: Final = ("dlq_", "retry_")
_ERROR_SHOWN: Final = 300
_TEXT_SHOWN: Final = 512
"""Characters of a letter's error, and of what else its event states, in the list; the letter itself has all of it."""
_FRESH_SECONDS: Final = 5.0
"""A call about a letter that is known relies on what was read of the topic this long ago."""
_MOST: Final = 200_000
"""Letters that are listed, the newest; some 100 MB."""
_AHEAD: Final = 64
_AHEAD_BYTES: Final = 16 * 1024 * 1024
"""Letters that are read at once, because their neighbours are likely to be asked for next."""
_DISCARD: Final = 1_000
"""Resolved records at the beginning of a partition that are worth a call to drop them."""
_AT_ONCE: Final = 5_000
"""Letters that are looked through in one go."""
_IN_THREAD: Final = 256 * 1024
_DAY: Final = 86_400.0
_TENANT: Final[TypeAdapter[str]] = TypeAdapter(Tenant)
_Place: TypeAlias = tuple[int, int]
_Key: TypeAlias = tuple[float, int, int]


@dataclass(slots=True)
class _Letter:
    """What is remembered of a dead letter: no headers, no data."""

    partition: int
    offset: int
    tenant: str
    reason: str
    error: str
    type: str
    product_id: str
    topic: str
    origin: _Place
    attempts: int
    failed_at: float
    first_seen: float
    size: int
    state: DeadLetterState = "open"

    @property
    def key(self) -> _Key:
        """The order of the list: as they failed."""
        return self.failed_at, self.partition, self.offset

    def shown(self) -> dict[str, object]:
        """Return the fields of a DeadLetter."""
        return {
            "id": f"{self.partition}-{self.offset}",
            "reason": self.reason,
            "error": self.error,
            "type": self.type,
            "product_id": self.product_id,
            "tenant": self.tenant,
            "topic": self.topic,
            "partition": self.origin[0],
            "offset": self.origin[1],
            "attempts": self.attempts,
            "failed_at": datetime.fromtimestamp(self.failed_at, UTC).isoformat(),
            "first_seen": datetime.fromtimestamp(self.first_seen, UTC).isoformat(),
            "bytes": self.size,
            "state": self.state,
        }


class DeadLetters:
    """The dead letters of every tenant; each key sees and moves those of its own only."""

    def __init__(self, event_log: EventLog, settings: Settings, now: Callable[[], float]) -> None:
        self._log = event_log
        self._days = settings.log.dead_letter_days
        self._now = now
        self._letters: dict[_Place, _Letter] = {}
        self._order: list[_Key] = []
        self._positions: dict[TopicPartition, int] = {}
        self._unresolved: defaultdict[int, deque[int]] = defaultdict(deque)
        """Offsets by partition, in order; those in front may be resolved by now."""
        self._discarded: dict[int, int] = {}
        self._unlisted: dict[int, int] = {}
        """The first offset, by partition, of an open letter for which the list had no room: it stays in the topic."""
        self._caught_up = float("-inf")
        self._reading = asyncio.Lock()
        self._ahead: dict[_Place, Record] = {}
        self._fetching = asyncio.Lock()
        self._locks: WeakValueDictionary[_Place, asyncio.Lock] = WeakValueDictionary()

    def operations(self) -> list[Operation]:
        """Return this part of the HTTP contract."""
        return [
            Operation(
                "GET",
                "/api/v1/dead-letters",
                self._list,
                "List dead letters",
                "dead letters",
                "admin",
                description="Events that could not be processed, in the order in which they failed, and only those of "
                f"the key's tenant. They are kept for {self._days:g} days.",
                params=DeadLetterParams,
                responses={200: DeadLetterList},
            ),
            Operation(
                "GET",
                "/api/v1/dead-letters/{letter_id}",
                self._show,
                "Show a dead letter with its headers and data",
                "dead letters",
                "admin",
                responses={200: DeadLetterContent},
                problems=(404,),
            ),
            Operation(
                "POST",
                "/api/v1/dead-letters/{letter_id}/replay",
                self._replay,
                "Send a dead letter's event through the embedder again",
                "dead letters",
                "admin",
                description="Its versions stay what they were, so that nothing newer is undone. Safe to repeat: a "
                "letter that is resolved already is left alone unless `force=true`.",
                params=ReplayParams,
                responses={200: DeadLetterReceipt},
                problems=(404, 409),
            ),
            Operation(
                "DELETE",
                "/api/v1/dead-letters/{letter_id}",
                self._purge,
                "Drop a dead letter for good",
                "dead letters",
                "admin",
                description="Safe to repeat: a letter that is resolved already is left alone.",
                responses={200: DeadLetterReceipt},
                problems=(404,),
            ),
        ]

    # --- the calls --------------------------------------------------------------------------------------------

    async def _list(self, request: web.Request) -> web.StreamResponse:
        params = read_params(request, DeadLetterParams)
        after = _cursor(params.after)
        await self._catch_up(0.0 if after is None else _FRESH_SECONDS)
        found, more = await self._page(tenant_of(request), params, after)
        return reply(
            {
                "dead_letters": [letter.shown() for letter in found],
                "next": ":".join(map(str, found[-1].key)) if more else None,
            }
        )

    async def _page(self, tenant: str, params: DeadLetterParams, after: _Key | None) -> tuple[list[_Letter], bool]:
        """Return the letters that were asked for, those behind `after`, and whether there are more."""
        names = ("reason", "topic", "type", "product_id")
        exact = {name: getattr(params, name) for name in names if getattr(params, name) is not None}
        if params.state != "all":
            exact["state"] = params.state
        since = _seconds("since", params.since, float("-inf"))
        until = _seconds("until", params.until, float("inf"))
        found: list[_Letter] = []
        first = 0 if after is None else bisect_right(self._order, after)
        while keys := self._order[first : first + _AT_ONCE]:
            for _, partition, offset in keys:
                letter = self._letters[partition, offset]
                if (
                    letter.tenant == tenant
                    and since <= letter.failed_at < until
                    and all(getattr(letter, name) == value for name, value in exact.items())
                ):
                    found.append(letter)
                    if len(found) > params.limit:
                        return found[:-1], True
            await asyncio.sleep(0)  # others get their turn, and may change the order
            first = bisect_right(self._order, keys[-1])
        return found, False

    async def _show(self, request: web.Request) -> web.StreamResponse:
        letter = await self._find(request)
        record = await self._read(letter)
        headers = dict(record.headers)
        content = {
            **letter.shown(),
            "error": headers.get("dlq_error", ""),
            "headers": headers,
        }
        data = await asyncio.to_thread(_data, record.value) if len(record.value) > _IN_THREAD else _data(record.value)
        return reply({**content, **data})

    async def _replay(self, request: web.Request) -> web.StreamResponse:
        params = read_params(request, ReplayParams)
        letter = await self._find(request)
        async with self._alone_with(letter):
            if letter.state != "open" and not params.force:
                return reply({"id": letter.shown()["id"], "state": letter.state, "changed": False})
            if self._now() - letter.first_seen > self._days * _DAY:
                raise Conflict(
                    f"the event first arrived more than {self._days:g} days ago and is not applied any more: "
                    "send the product's current state"
                )
            record = await self._read(letter)
            # Only once the log has the event again may the letter count as resolved.
            await self._log.append([_again(record, letter)])
            return await self._resolve(letter, record.key, "replayed")

    async def _purge(self, request: web.Request) -> web.StreamResponse:
        letter = await self._find(request)
        async with self._alone_with(letter):
            if letter.state != "open":
                return reply({"id": letter.shown()["id"], "state": letter.state, "changed": False})
            record = await self._read(letter)
            answer = await self._resolve(letter, record.key, "purged")
        await self._discard()
        return answer

    async def _resolve(self, letter: _Letter, key: str, state: DeadLetterState) -> web.StreamResponse:
        name = f"{letter.partition}-{letter.offset}"
        # The same key: the record that resolves stands behind its letter, in its partition.
        await self._log.append([Message(events.DEAD_LETTERS, key, b"", {_RESOLVES: name, _RESOLUTION: state})])
        letter.state = state
        log.info("dead_letter.resolved", id=name, state=state, tenant=letter.tenant, product_id=letter.product_id)
        return reply({"id": name, "state": state, "changed": True})

    def _alone_with(self, letter: _Letter) -> asyncio.Lock:
        """Return what lets one request at a time resolve this letter."""
        return self._locks.setdefault((letter.partition, letter.offset), asyncio.Lock())

    # --- what the topic holds ---------------------------------------------------------------------------------

    async def _find(self, request: web.Request) -> _Letter:
        """Return the letter of the path; of another tenant's nothing is told, not even that it is there."""
        name = request.match_info["letter_id"]
        place = _place(name)
        if place is None:
            raise invalid(("letter_id", "is no id of a dead letter, such as 0-17"))
        await self._catch_up(_FRESH_SECONDS)
        if place not in self._letters:
            await self._catch_up(0.0)
        letter = self._letters.get(place)
        if letter is None or letter.tenant != tenant_of(request):
            raise NotFound(f"there is no dead letter {name}")
        return letter

    async def _catch_up(self, fresh: float) -> None:
        """Take in what was appended since the last time, unless that is at most `fresh` seconds ago."""
        loop = asyncio.get_running_loop()
        async with self._reading:
            if fresh and loop.time() - self._caught_up <= fresh:
                return
            started = loop.time()
            async for record in self._log.scan([events.DEAD_LETTERS], start=dict(self._positions)):
                self._fold(record)
                self._positions[record.source] = record.offset + 1
                if len(self._order) >= 2 * _MOST:
                    self._forget_old()
            self._caught_up = started
            self._forget_old()

    def _fold(self, record: Record) -> None:
        resolved = record.headers.get(_RESOLVES)
        # A letter has the headers of its event, and those may say anything.
        if resolved is None or _REASON in record.headers:
            letter = _letter(record)
            self._letters[record.partition, record.offset] = letter
            insort(self._order, letter.key)
            self._unresolved[record.partition].append(record.offset)
            return
        place = _place(resolved)
        found = self._letters.get(place) if place is not None else None
        if found is not None:
            found.state = "purged" if record.headers.get(_RESOLUTION) == "purged" else "replayed"

    def _forget_old(self) -> None:
        """Drop what the log drops about now as well, and what is too much."""
        expired = bisect_right(self._order, (self._now() - self._days * _DAY, 0, 0))
        gone = max(expired, len(self._order) - _MOST)
        for number, (_, partition, offset) in enumerate(self._order[:gone]):
            letter = self._letters.pop((partition, offset))
            if number >= expired and letter.state == "open":
                self._unlisted[partition] = min(offset, self._unlisted.get(partition, offset))
        del self._order[:gone]

    async def _read(self, letter: _Letter) -> Record:
        """Return the letter's record, and keep those behind it for the next calls."""
        wanted = letter.partition, letter.offset
        async with self._fetching:
            if wanted not in self._ahead:
                place = TopicPartition(events.DEAD_LETTERS, letter.partition)
                self._ahead.clear()
                room = _AHEAD_BYTES
                records = self._log.scan([events.DEAD_LETTERS], start={**self._positions, place: letter.offset})
                try:
                    async for record in records:
                        if record.partition == letter.partition:
                            self._ahead[record.partition, record.offset] = record
                            room -= len(record.value)
                        if len(self._ahead) >= _AHEAD or room <= 0:
                            break
                finally:
                    if isinstance(records, AsyncGenerator):
                        await records.aclose()
            found = self._ahead.get(wanted)
        if found is None:
            raise NotFound("the dead letter is gone: it was kept long enough, or somebody dropped it")
        return found

    async def _discard(self) -> None:
        """Drop, per partition, the records before the first open letter, when there are enough of them."""
        for place, end in list(self._positions.items()):
            partition, waiting = place.partition, self._unresolved[place.partition]
            while waiting and not self._is_open(partition, waiting[0]):
                waiting.popleft()
            before = min(waiting[0] if waiting else end, self._unlisted.get(partition, end))
            if before - self._discarded.get(partition, 0) < (_DISCARD if waiting else 1):
                continue
            await self._log.discard({place: before})
            self._discarded[partition] = before
            for one in [one for one in self._letters if one[0] == partition and one[1] < before]:
                del self._letters[one]
            self._order = [key for key in self._order if (key[1], key[2]) in self._letters]

    def _is_open(self, partition: int, offset: int) -> bool:
        letter = self._letters.get((partition, offset))
        return letter is not None and letter.state == "open"


def _letter(record: Record) -> _Letter:
    headers = record.headers
    tenant = _tenant(headers.get("ce_tenant", DEFAULT_TENANT))
    return _Letter(
        partition=record.partition,
        offset=record.offset,
        tenant=sys.intern(tenant),
        reason=sys.intern(headers.get(_REASON, "unknown")[:_TEXT_SHOWN]),
        error=sys.intern(headers.get("dlq_error", "")[:_ERROR_SHOWN]),
        type=sys.intern(headers.get("ce_type", "")[:_TEXT_SHOWN]),
        product_id=record.key.removeprefix(f"{tenant}|")[:_TEXT_SHOWN],
        topic=sys.intern(headers.get("dlq_topic", "")[:_TEXT_SHOWN]),
        origin=(_number(headers.get("dlq_partition")), _number(headers.get("dlq_offset"))),
        attempts=_number(headers.get("dlq_attempts")),
        failed_at=record.timestamp,
        first_seen=_first_seen(record),
        size=len(record.value),
    )


def _tenant(told: str) -> str:
    """Return the tenant whose letter it is; one that can be nobody's is the default tenant's to look after."""
    try:
        return _TENANT.validate_python(told)
    except ValidationError:
        return DEFAULT_TENANT


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isascii() and text.isdecimal() and len(text) < 20 else 0


def _first_seen(record: Record) -> float:
    try:
        first = float(record.headers.get("dlq_first", ""))
    except ValueError:
        return record.timestamp
    return first if 0 <= first < record.timestamp else record.timestamp


def _again(record: Record, letter: _Letter) -> Message:
    """Return the event of a letter as it first came, for the embedder to try now.

    It goes through a retry topic, not to where it came from: as the newest record of its key there, it could replace
    a newer version when the topic is compacted.
    """
    headers = {name: text for name, text in record.headers.items() if not name.startswith(_OURS)}
    headers[events.FIRST_ARRIVAL] = str(letter.first_seen)
    if letter.topic:
        headers |= zip(events.ORIGIN, (letter.topic, *map(str, letter.origin)), strict=True)
    return Message(events.RETRIES[0], record.key, record.value, headers)


def _data(value: bytes) -> dict[str, object]:
    try:
        data = from_json(value, allow_inf_nan=False)
        json.dumps(data, allow_nan=False)  # 1e999 is JSON and too large for a number: the answer could not say it
    except ValueError:
        return {"base64": base64.b64encode(value).decode()}
    return {"data": data}


def _place(name: str) -> _Place | None:
    partition, dash, offset = name.partition("-")
    known = dash and all(part.isascii() and part.isdecimal() and len(part) < 20 for part in (partition, offset))
    return (int(partition), int(offset)) if known else None


def _cursor(text: str | None) -> _Key | None:
    """Return the place that a `next` names; its pattern was checked."""
    if text is None:
        return None
    failed_at, partition, offset = text.split(":")
    return float(failed_at), int(partition), int(offset)


def _seconds(name: str, text: str | None, otherwise: float) -> float:
    if text is None:
        return otherwise
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise invalid((name, "is no moment, such as 2026-11-22 or 2026-11-22T18:30:00Z")) from error
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
