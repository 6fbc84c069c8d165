"""Retries take the three topics in turn; dead letters name their origin; a worker that fails everything stops."""

from __future__ import annotations

import pytest

from catalens import events
from catalens.domain import Message, Product, Record
from catalens_embedder import letters


def stored(message: Message, offset: int, timestamp: float = 1000.0) -> Record:
    return Record(message.topic, 0, offset, message.key, message.value, message.headers, timestamp)


def event() -> events.ProductEvent:
    return events.new_event(Product(product_id="a", name="A", version=3), "default")


def test_retries_use_each_topic_once_and_keep_the_origin() -> None:
    record = stored(events.encode(event()), 7)
    seen = []
    for now in (100.0, 200.0, 300.0):
        again = letters.retry(event(), record, now, "host is slow")
        assert again is not None
        seen.append((again.topic, float(again.headers[letters.DUE]) - now))
        record = stored(again, offset=0)
        assert letters.origin(record).offset == "7"
        assert events.decode(record).data == event().data
    assert seen == [("catalog.retry.10s", 10.0), ("catalog.retry.1m", 60.0), ("catalog.retry.10m", 600.0)]
    assert letters.retry(event(), record, 0.0, "still slow") is None


def test_only_retry_topics_make_records_wait() -> None:
    message = events.encode(event())
    first = stored(Message(message.topic, message.key, message.value, {letters.DUE: "9e9"}), 0)
    assert letters.due(first) == 0.0
    again = letters.retry(event(), first, 100.0, "x")
    assert again is not None
    assert letters.due(stored(again, 0)) == 110.0


def test_a_dead_letter_keeps_the_bytes_and_says_where_they_came_from() -> None:
    record = Record("catalog.products", 2, 41, "k", b"\xff not json", {"ce_type": "x", "retry_attempt": "2"}, 0.0)
    letter = letters.dead_letter(record, "invalid_event", "unknown event type 'x'")
    assert letter.topic == "catalog.dlq"
    assert letter.value == record.value
    assert letter.headers == {
        "ce_type": "x",
        "retry_attempt": "2",
        "dlq_reason": "invalid_event",
        "dlq_error": "unknown event type 'x'",
        "dlq_topic": "catalog.products",
        "dlq_partition": "2",
        "dlq_offset": "41",
        "dlq_attempts": "3",
        "dlq_first": "0.0",
    }


@pytest.mark.parametrize("told", ["9" * 5000, "-1", "²", ""])
def test_a_number_of_attempts_that_cannot_be_is_none(told: str) -> None:
    record = Record("catalog.products", 2, 41, "k", b"", {"retry_attempt": told}, 0.0)
    assert letters.dead_letter(record, "invalid_event", "x").headers["dlq_attempts"] == "1"


def test_the_first_arrival_goes_along_with_retries_and_dead_letter() -> None:
    record = stored(events.encode(event()), 7, timestamp=1000.25)
    for now in (2000.0, 3000.0):
        again = letters.retry(event(), record, now, "host is slow")
        assert again is not None
        record = stored(again, 0, timestamp=now)
        assert events.first_arrival(record) == 1000.25
    assert letters.postponed(event(), record, 4000.0).headers["retry_first"] == "1000.25"
    assert letters.dead_letter(record, "x", "x").headers["dlq_first"] == "1000.25"


@pytest.mark.parametrize("told", ["", "soon", "nan", "-1", "1e999", "2000"])
def test_a_first_arrival_that_cannot_be_is_the_records_own_time(told: str) -> None:
    record = Record("catalog.products", 0, 0, "k", b"", {"retry_first": told}, 1000.0)
    assert events.first_arrival(record) == 1000.0


def test_a_version_that_was_left_out_is_the_same_when_the_event_comes_back() -> None:
    headers = {"ce_type": events.UPSERTED}
    first = Record("catalog.products", 0, 5, "default|a", b'{"product_id": "a", "name": "A"}', headers, 1000.123457)
    back = Record("catalog.retry.10s", 0, 0, first.key, first.value, {**headers, "retry_first": "1000.123457"}, 9000.0)
    assert events.decode(first).data == events.decode(back).data


def test_only_what_came_back_expires() -> None:
    late = Record("catalog.products", 0, 0, "k", b"", {}, 1000.0)
    again = letters.retry(event(), late, 2000.0, "x")
    assert again is not None
    days = 86_400.0
    letters.refuse_if_expired(late, 1000.0 + 99 * days, 21)
    letters.refuse_if_expired(stored(again, 0, timestamp=2000.0), 1000.0 + 21 * days, 21)
    with pytest.raises(letters.Expired, match=r"21\.5 days ago, 21 are allowed"):
        letters.refuse_if_expired(stored(again, 0, timestamp=2000.0), 1000.0 + 21.5 * days, 21)
    unmarked = Record("catalog.retry.10s", 0, 0, "k", b"", {}, 1000.0)  # written by a release that kept no first time
    with pytest.raises(letters.Expired):
        letters.refuse_if_expired(unmarked, 1000.0 + 22 * days, 21)


def test_the_limit_counts_a_share_of_the_recent_events() -> None:
    limit = letters.DeadLetterLimit(0.5, window=10)
    for _ in range(20):
        limit.note(dead=False)
    for _ in range(5):
        limit.note(dead=True)
    with pytest.raises(letters.FailingWorker, match="6 of the last 10"):
        limit.note(dead=True)


def test_the_limit_forgives_dead_letters_among_good_events() -> None:
    limit = letters.DeadLetterLimit(0.5, window=10)
    for number in range(100):
        limit.note(dead=number % 2 == 0)
