"""Product events by type and version, as CloudEvents 1.0 in binary content mode on Kafka (contracts.md)."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal, TypeAlias

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from catalens.domain import (
    DEFAULT_TENANT,
    Deletion,
    Message,
    OfferChange,
    Product,
    Record,
    Tenant,
    Value,
)
from catalens.errors import InvalidEvent

PRODUCTS: Final = "catalog.products"
OFFERS: Final = "catalog.offers"
RETRIES: Final = ("catalog.retry.10s", "catalog.retry.1m", "catalog.retry.10m")
DEAD_LETTERS: Final = "catalog.dlq"
OUTCOMES: Final = "catalog.outcomes"
"""What became of events that somebody waits for (`ce_awaited`); short retention, read without a group."""

COMPACTED: Final = (PRODUCTS, OFFERS)
"""Of these the newest record of each key is kept for ever: a scan of them rebuilds the index."""
TOPICS: Final = (PRODUCTS, OFFERS, *RETRIES, DEAD_LETTERS, OUTCOMES)
CONSUMED: Final = (PRODUCTS, OFFERS, *RETRIES)
"""What the embedder reads; its lag there is the work that waits."""
EMBEDDER_GROUP: Final = "catalens-embedder"
REINDEX_GROUPS: Final = f"{EMBEDDER_GROUP}-"
"""Followed by the name of an index that is being built: the group that reads for it."""

FIRST_ARRIVAL: Final = "retry_first"
"""Header of a record that came back, by a retry or a replay: when the event first arrived, Unix seconds."""

ORIGIN: Final = ("retry_topic", "retry_partition", "retry_offset")
"""Headers of a record that came back: where it first stood in the log."""

UPSERTED: Final = "catalens.product.upserted.v1"
DELETED: Final = "catalens.product.deleted.v1"
OFFER_CHANGED: Final = "catalens.offer.changed.v1"

EventType: TypeAlias = Literal[
    "catalens.product.upserted.v1", "catalens.product.deleted.v1", "catalens.offer.changed.v1"
]
EventData: TypeAlias = Product | Deletion | OfferChange

_MODELS: Final[Mapping[str, type[Product | Deletion | OfferChange]]] = {
    UPSERTED: Product,
    DELETED: Deletion,
    OFFER_CHANGED: OfferChange,
}
_TOPIC_OF: Final[Mapping[str, str]] = {UPSERTED: PRODUCTS, DELETED: PRODUCTS, OFFER_CHANGED: OFFERS}
_TENANT: Final[TypeAdapter[str]] = TypeAdapter(Tenant)


@dataclass(frozen=True, slots=True)
class ProductEvent:
    """One statement of a catalogue about one product; its versions are always set."""

    type: EventType
    id: str
    tenant: str
    data: EventData
    source: str = "/catalens/ingest"
    time: str = ""
    """RFC 3339."""
    awaited: bool = False
    """Somebody waits for the outcome: the embedder reports it on OUTCOMES."""
    traceparent: str | None = None

    @property
    def key(self) -> str:
        """The Kafka key, so that one product's events keep their order."""
        return f"{self.tenant}|{self.data.product_id}"


def new_event(
    data: EventData, tenant: str, *, awaited: bool = False, traceparent: str | None = None, event_id: str = ""
) -> ProductEvent:
    """Return an event for `data`, whose versions the caller has assigned."""
    kind: EventType
    if isinstance(data, Product):
        kind = UPSERTED
    elif isinstance(data, OfferChange):
        kind = OFFER_CHANGED
    else:
        kind = DELETED
    return ProductEvent(
        type=kind,
        id=event_id or str(uuid.uuid4()),
        tenant=tenant,
        data=data,
        time=datetime.now(UTC).isoformat(),
        awaited=awaited,
        traceparent=traceparent,
    )


def encode(event: ProductEvent) -> Message:
    """Return the log record of `event`."""
    headers = {
        "ce_specversion": "1.0",
        "ce_id": event.id,
        "ce_type": event.type,
        "ce_source": event.source,
        "ce_time": event.time,
        "ce_tenant": event.tenant,
        "content-type": "application/json",
    }
    if event.awaited:
        headers["ce_awaited"] = "true"
    if event.traceparent:
        headers["ce_traceparent"] = event.traceparent
    return Message(
        topic=_TOPIC_OF[event.type],
        key=event.key,
        value=event.data.model_dump_json(exclude_unset=True).encode(),
        headers=headers,
    )


def decode(record: Record) -> ProductEvent:
    """Return the event in `record`, unknown fields ignored; raises InvalidEvent naming what is wrong.

    A foreign producer may leave out the tenant (`default`), the source, the time and the versions: those are then
    the event's first arrival in microseconds, which a retry and a replay repeat exactly.
    """
    headers = record.headers
    kind = headers.get("ce_type", "")
    model = _MODELS.get(kind)
    if model is None:
        raise InvalidEvent(f"unknown event type {kind[:128]!r}")
    try:
        tenant = _TENANT.validate_python(headers.get("ce_tenant", DEFAULT_TENANT))
        data = model.model_validate(from_json(record.value, allow_inf_nan=False))
    except ValidationError as error:
        raise InvalidEvent(_explain(error)) from error
    except ValueError as error:
        raise InvalidEvent(f"the data is not JSON: {error}") from error
    return ProductEvent(
        type=kind,  # type: ignore[arg-type]  # a key of _MODELS
        id=headers.get("ce_id") or f"{record.topic}/{record.partition}/{record.offset}",
        tenant=tenant,
        data=with_versions(data, int(first_arrival(record) * 1_000_000)),
        source=headers.get("ce_source", ""),
        time=headers.get("ce_time", ""),
        awaited=headers.get("ce_awaited") == "true",
        traceparent=headers.get("ce_traceparent"),
    )


def first_arrival(record: Record) -> float:
    """Return when the event in `record` first arrived, Unix seconds: its own time, unless it came back."""
    try:
        first = float(record.headers.get(FIRST_ARRIVAL, ""))
    except ValueError:
        return record.timestamp
    return first if 0 <= first < record.timestamp else record.timestamp  # NaN is neither


def with_versions(data: EventData, assigned: int) -> EventData:
    """Return `data` with each version that it needs and lacks set to `assigned`."""
    missing: dict[str, int] = {}
    if isinstance(data, Product | Deletion) and data.version is None:
        missing["version"] = assigned
    states_offer = isinstance(data, OfferChange) or (isinstance(data, Product) and data.carries_offer)
    if states_offer and data.offer_version is None:  # type: ignore[union-attr]  # both have it
        missing["offer_version"] = assigned
    return data.model_copy(update=missing) if missing else data


class Outcome(Value):
    """What became of an awaited event."""

    event_id: str
    status: Literal["indexed", "superseded", "failed"]
    error: str | None = None


def encode_outcome(outcome: Outcome) -> Message:
    """Return the log record of `outcome`."""
    return Message(topic=OUTCOMES, key=outcome.event_id, value=outcome.model_dump_json().encode())


def decode_outcome(record: Record) -> Outcome:
    """Return the outcome in `record`; raises InvalidEvent."""
    try:
        return Outcome.model_validate_json(record.value)
    except ValidationError as error:
        raise InvalidEvent(_explain(error)) from error


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "event"
    return f"{where}: {first['msg']}"
