"""Offsets are committed without gaps, whatever the order in which records finish."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from catalens.domain import Record, TopicPartition
from catalens_embedder.offsets import OffsetTracker

PLACE = TopicPartition("catalog.products", 0)


def record(offset: int, partition: int = 0) -> Record:
    return Record("catalog.products", partition, offset, "default|a", b"{}", {}, 0.0)


@given(st.permutations(range(10, 20)))
def test_commits_up_to_the_lowest_open_record(order: list[int]) -> None:
    tracker = OffsetTracker()
    for offset in range(10, 20):
        tracker.take(record(offset))
    finished: set[int] = set()
    for offset in order:
        tracker.done(record(offset))
        finished.add(offset)
        lowest_open = min(set(range(10, 21)) - finished)
        assert tracker.committable()[PLACE] == lowest_open
    assert tracker.in_flight == 0


def test_nothing_to_commit_twice() -> None:
    tracker = OffsetTracker()
    tracker.take(record(5))
    tracker.done(record(5))
    tracker.committed(tracker.committable())
    assert tracker.committable() == {}


def test_gaps_in_the_log_are_no_open_work() -> None:
    tracker = OffsetTracker()
    for offset in (3, 9):  # a compacted log has holes
        tracker.take(record(offset))
        tracker.done(record(offset))
    assert tracker.committable() == {PLACE: 10}


def test_a_dropped_partition_is_forgotten() -> None:
    tracker = OffsetTracker()
    tracker.take(record(1))
    tracker.take(record(1, partition=1))
    assert not tracker.idle([PLACE])
    tracker.drop([PLACE])
    tracker.done(record(1))
    assert tracker.idle([PLACE])
    assert PLACE not in tracker.committable()
    assert tracker.in_flight == 1


def test_a_partition_that_is_read_again_from_further_back_is_begun_anew() -> None:
    tracker = OffsetTracker()
    for offset in (164, 165):  # read ahead of a rebalance that took the partition away and gave it back
        tracker.take(record(offset))
    tracker.take(record(100))
    tracker.done(record(164))
    assert tracker.committable() == {PLACE: 100}, "what was read ahead hides what is open further back"
    tracker.done(record(100))
    assert tracker.committable() == {PLACE: 101}
