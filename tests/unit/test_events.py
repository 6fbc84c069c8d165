"""Events: every version ever published still decodes, what we write we read, what is wrong is named."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalens import events
from catalens.domain import MAX_VERSION, Deletion, Message, OfferChange, Product, Record
from catalens.errors import InvalidEvent

GOLDEN = Path(__file__).parent.parent / "fixtures" / "events"
EXAMPLES = sorted(GOLDEN.glob("*/*.json"))


def record_of(message: Message, *, timestamp: float = 1_795_339_800.25, offset: int = 7) -> Record:
    return Record(message.topic, 0, offset, message.key, message.value, message.headers, timestamp)


def product_record(value: bytes | str, **headers: str) -> Record:
    data = value.encode() if isinstance(value, str) else value
    return record_of(Message(events.PRODUCTS, "default|p", data, {"ce_type": events.UPSERTED, **headers}))


# --- golden examples: they are never edited ---------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_golden_example_decodes_as_it_always_did(path: Path) -> None:
    example: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    expected = example["expected"]
    event = events.decode(
        Record(
            example["topic"],
            example["partition"],
            example["offset"],
            example["key"],
            example["value"].encode(),
            example["headers"],
            example["timestamp"],
        )
    )
    assert event.type == path.parent.name
    assert event.data.model_dump(mode="json", exclude_unset=True) == expected["data"]
    assert {
        "id": event.id,
        "tenant": event.tenant,
        "source": event.source,
        "time": event.time,
        "awaited": event.awaited,
        "traceparent": event.traceparent,
        "key": event.key,
    } == {key: value for key, value in expected.items() if key != "data"}


def test_every_event_type_has_golden_examples() -> None:
    kinds = {path.parent.name for path in EXAMPLES}
    assert kinds == {events.UPSERTED, events.DELETED, events.OFFER_CHANGED}
    for kind in kinds:
        assert len([path for path in EXAMPLES if path.parent.name == kind]) >= 4


# --- round trip -------------------------------------------------------------------------------------------

IDS = st.text(string.ascii_letters + string.digits + "._:-", min_size=1, max_size=128)
TENANTS = st.text(string.ascii_lowercase + string.digits + "-", min_size=1, max_size=63)
TEXT = st.text(st.characters(codec="utf-8"), max_size=60)
LABELS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=60)
VERSIONS = st.integers(1, MAX_VERSION)
ATTRIBUTE_VALUES = st.one_of(
    TEXT,
    st.booleans(),
    st.integers(-MAX_VERSION, MAX_VERSION),
    st.floats(allow_nan=False, allow_infinity=False),
    st.lists(TEXT, max_size=3),
)
OFFER_FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "price": st.none() | st.floats(0, allow_infinity=False),
    "currency": st.none() | st.text(string.ascii_uppercase, min_size=3, max_size=3),
    "stock": st.none() | st.integers(0, MAX_VERSION),
}
PRODUCTS = st.fixed_dictionaries(
    {"product_id": IDS, "name": LABELS, "version": VERSIONS, "offer_version": VERSIONS},
    optional={
        "description": TEXT,
        "brand": st.none() | LABELS,
        "category": st.none() | LABELS,
        "images": st.lists(
            st.one_of(
                st.fixed_dictionaries({"url": LABELS}),
                st.fixed_dictionaries({"blob": st.text("0123456789abcdef", min_size=64, max_size=64)}),
            ),
            max_size=3,
        ),
        "attributes": st.dictionaries(LABELS, ATTRIBUTE_VALUES, max_size=4),
        "group_id": st.none() | LABELS,
        "url": st.none() | TEXT,
        "locale": st.none() | st.text(string.ascii_letters + "-", max_size=35),
        **OFFER_FIELDS,
    },
).map(Product.model_validate)
OFFERS = st.fixed_dictionaries({"product_id": IDS, "offer_version": VERSIONS}, optional=OFFER_FIELDS).map(
    OfferChange.model_validate
)
DELETIONS = st.fixed_dictionaries({"product_id": IDS, "version": VERSIONS}).map(Deletion.model_validate)


@given(
    data=PRODUCTS | OFFERS | DELETIONS, tenant=TENANTS, awaited=st.booleans(), trace=st.none() | st.just("00-a-b-01")
)
def test_what_is_encoded_decodes_to_the_same(
    data: events.EventData, tenant: str, awaited: bool, trace: str | None
) -> None:
    event = events.new_event(data, tenant, awaited=awaited, traceparent=trace)
    message = events.encode(event)
    assert message.key == f"{tenant}|{data.product_id}"
    decoded = events.decode(record_of(message))
    assert decoded == event
    assert decoded.data.model_fields_set == data.model_fields_set  # unset is not the same as null


@pytest.mark.parametrize(
    ("data", "kind", "topic"),
    [
        (Product(product_id="p", name="n", version=1), events.UPSERTED, events.PRODUCTS),
        (Deletion(product_id="p", version=1), events.DELETED, events.PRODUCTS),
        (OfferChange(product_id="p", offer_version=1), events.OFFER_CHANGED, events.OFFERS),
    ],
)
def test_each_event_goes_to_its_topic_in_cloudevents_form(data: events.EventData, kind: str, topic: str) -> None:
    message = events.encode(events.new_event(data, "default", event_id="id-1"))
    assert message.topic == topic
    assert message.headers["ce_type"] == kind
    assert message.headers["ce_specversion"] == "1.0"
    assert message.headers["ce_id"] == "id-1"
    assert message.headers["content-type"] == "application/json"
    assert "ce_awaited" not in message.headers
    assert "ce_traceparent" not in message.headers


def test_events_have_ids_of_their_own() -> None:
    data = Deletion(product_id="p", version=1)
    assert events.new_event(data, "default").id != events.new_event(data, "default").id


def test_every_topic_that_events_go_to_exists() -> None:
    assert {events.PRODUCTS, events.OFFERS, events.DEAD_LETTERS, events.OUTCOMES, *events.RETRIES} == set(events.TOPICS)


def test_assigned_versions_fill_only_what_is_needed_and_missing() -> None:
    bare = Product(product_id="p", name="n")
    assert events.with_versions(bare, 9) == Product(product_id="p", name="n", version=9)
    assert not events.with_versions(bare, 9).model_fields_set & {"offer_version"}
    priced = Product(product_id="p", name="n", price=None, version=3)
    assert events.with_versions(priced, 9) == Product(product_id="p", name="n", price=None, version=3, offer_version=9)
    own = OfferChange(product_id="p", offer_version=4)
    assert events.with_versions(own, 9) is own


# --- what is wrong is named -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        (b'{"product_id":"p","name":"\xff"}', "not JSON"),
        ('{"product_id":"p","name":"\\ud800"}', "not JSON"),
        ('{"product_id":"p","name":"n","price":NaN}', "not JSON"),
        ("[" * 50_000 + "]" * 50_000, "not JSON"),
        ("null", "event"),
        ("[]", "event"),
        ('{"product_id":"p"}', "name"),
        ('{"product_id":"a/b","name":"n"}', "product_id"),
        ('{"product_id":7,"name":"n"}', "product_id"),
        ('{"product_id":"p","name":"n","price":1e999}', "price"),
        ('{"product_id":"p","name":"n","price":"12"}', "price"),
        ('{"product_id":"p","name":"n","stock":-1}', "stock"),
        ('{"product_id":"p","name":"n","version":0}', "version"),
        ('{"product_id":"p","name":"n","version":9223372036854775808}', "version"),
        ('{"product_id":"p","name":"n","images":[{"url":"https://x/1.jpg","blob":"b"}]}', "images.0"),
        ('{"product_id":"p","name":"n","images":[{}]}', "images.0"),
        ('{"product_id":"p","name":"n","attributes":{"a":null}}', "attributes.a"),
    ],
)
def test_bad_data_is_an_invalid_event_that_says_where(value: bytes | str, says: str) -> None:
    with pytest.raises(InvalidEvent, match=says):
        events.decode(product_record(value))


@pytest.mark.parametrize("kind", ["", "catalens.product.upserted.v2", "com.example.other"])
def test_an_unknown_type_is_an_invalid_event(kind: str) -> None:
    with pytest.raises(InvalidEvent, match="unknown event type"):
        events.decode(product_record('{"product_id":"p","name":"n"}', ce_type=kind))


@pytest.mark.parametrize("tenant", ["", "Acme", "a b", "a" * 64])
def test_a_bad_tenant_is_an_invalid_event(tenant: str) -> None:
    with pytest.raises(InvalidEvent):
        events.decode(product_record('{"product_id":"p","name":"n"}', ce_tenant=tenant))


# --- outcomes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "outcome",
    [
        events.Outcome(event_id="e", status="indexed"),
        events.Outcome(event_id="e", status="superseded"),
        events.Outcome(event_id="e", status="failed", error="not_a_picture ⛔"),
    ],
)
def test_outcomes_round_trip(outcome: events.Outcome) -> None:
    message = events.encode_outcome(outcome)
    assert (message.topic, message.key) == (events.OUTCOMES, "e")
    assert events.decode_outcome(record_of(message)) == outcome


def test_a_bad_outcome_is_an_invalid_event() -> None:
    with pytest.raises(InvalidEvent, match="status"):
        events.decode_outcome(record_of(Message(events.OUTCOMES, "e", b'{"event_id":"e","status":"lost"}')))
