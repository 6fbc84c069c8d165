"""Records that did not go through: when they come back, and where they end."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import Final

from catalens import events
from catalens.domain import Message, Record
from catalens.errors import CatalensError
from catalens.events import ProductEvent

_DELAYS: Final = {"catalog.retry.10s": 10.0, "catalog.retry.1m": 60.0, "catalog.retry.10m": 600.0}
ATTEMPT: Final = "retry_attempt"
DUE: Final = "retry_due"
_DAY: Final = 86_400.0
_KEPT: Final = (
    *("ce_id", "ce_type", "ce_source", "ce_tenant", "ce_traceparent", "dlq_reason", "dlq_error"),
    *("dlq_topic", "dlq_partition", "dlq_offset", "dlq_attempts", "dlq_first"),
)
"""Headers of a dead letter without data: those that tell what it was."""


class FailingWorker(CatalensError):
    """So many events end as dead letters that the fault is the worker's: it stops."""


class Expired(CatalensError):
    """The event came back so late that the deletion it may precede need not be remembered any more."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a record first came from, and how often it was tried."""

    topic: str
    partition: str
    offset: str
    attempts: int


def origin(record: Record) -> Origin:
    """Return where `record` first stood in the log."""
    headers = record.headers
    topic, partition, offset = (
        headers.get(name, str(own))
        for name, own in zip(events.ORIGIN, (record.topic, record.partition, record.offset), strict=True)
    )
    attempts = headers.get(ATTEMPT, "0")
    return Origin(topic, partition, offset, int(attempts) if attempts.isdecimal() and len(attempts) < 10 else 0)


def due(record: Record) -> float:
    """Return when a record of a retry topic may be tried again, Unix seconds; 0 for any other record."""
    if record.topic not in _DELAYS:
        return 0.0
    try:
        return float(record.headers.get(DUE, "0"))
    except ValueError:
        return 0.0


def refuse_if_expired(record: Record, now: float, days: float) -> None:
    """Raise Expired for a record that came back and first arrived more than `days` days before `now`.

    What waits in the main topics never expires: there the deletion is still behind it (docs/adr/0008).
    """
    came_back = events.FIRST_ARRIVAL in record.headers or record.topic in _DELAYS
    age = (now - events.first_arrival(record)) / _DAY
    if came_back and age > days:
        raise Expired(f"it first arrived {age:.1f} days ago, {days:g} are allowed: send the product's current state")


def retry(event: ProductEvent, record: Record, now: float, error: str) -> Message | None:
    """Return the record's next stop: the first, second, third retry topic; None when all were used up."""
    came = origin(record)
    if came.attempts >= len(events.RETRIES):
        return None
    topic = events.RETRIES[came.attempts]
    message = _onward(event, record, topic, attempts=came.attempts + 1, due=now + _DELAYS[topic])
    return replace(message, headers={**message.headers, "retry_error": error[:500]})


def postponed(event: ProductEvent, record: Record, now: float) -> Message:
    """Return the record as the next one of the first retry topic, due at once: it was not its turn, which is no try."""
    return _onward(event, record, events.RETRIES[0], attempts=origin(record).attempts, due=now)


def _onward(event: ProductEvent, record: Record, topic: str, *, attempts: int, due: float) -> Message:
    came, first = origin(record), events.first_arrival(record)
    message = events.encode(event)  # with its versions, which a foreign event may not have stated
    headers = {
        **message.headers,
        ATTEMPT: str(attempts),
        DUE: f"{due:.3f}",
        events.FIRST_ARRIVAL: str(first),
        **dict(zip(events.ORIGIN, (came.topic, came.partition, came.offset), strict=True)),
    }
    return replace(message, topic=topic, headers=headers)


def dead_letter(record: Record, reason: str, error: str) -> Message:
    """Return the dead letter of `record`: its bytes and headers as they came, with reason and origin."""
    came = origin(record)
    headers = {
        **record.headers,
        "dlq_reason": reason,
        "dlq_error": error[:2000],
        "dlq_topic": came.topic,
        "dlq_partition": came.partition,
        "dlq_offset": came.offset,
        "dlq_attempts": str(came.attempts + 1),
        "dlq_first": str(events.first_arrival(record)),
    }
    return Message(topic=events.DEAD_LETTERS, key=record.key, value=record.value, headers=headers)


def without_data(letter: Message) -> Message:
    """Return a dead letter that is too large for its topic as one that tells the same, and where the event stood."""
    headers = {name: letter.headers[name][:2000] for name in _KEPT if name in letter.headers}
    error = f"too large to be kept here, it is where it came from: {headers['dlq_error']}"
    return replace(letter, key=letter.key[:512], value=b"", headers={**headers, "dlq_error": error})


class DeadLetterLimit:
    """Stops a worker that is failing everything: `share` of the last `window` events."""

    def __init__(self, share: float, window: int = 200) -> None:
        self._recent: deque[bool] = deque(maxlen=window)
        self._most = share * window

    @property
    def left(self) -> int:
        """How many of the next events may become dead letters."""
        return int(self._most) - sum(self._recent)

    def note(self, *, dead: bool) -> None:
        """Count one finished event; raises FailingWorker beyond the limit."""
        self._recent.append(dead)
        failed = sum(self._recent) if dead else 0
        if failed > self._most:
            raise FailingWorker(
                f"{failed} of the last {len(self._recent)} events became dead letters: the worker stops. "
                "`catalens dlq list` tells why. Mend the cause and start it again, it goes on behind the last of them; "
                "then `catalens dlq replay --all` brings them back. CATALENS_EMBEDDER__DEAD_LETTER_LIMIT=1 never stops"
            )
