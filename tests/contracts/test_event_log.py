"""What every EventLog promises; an adapter that joins groups in the background passes as well."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from catalens.domain import Message, Offsets, Record, TopicPartition
from catalens.errors import Conflict, Misconfigured, Transient
from catalens.ports import EventConsumer, EventLog

if TYPE_CHECKING:
    from tests.contracts.conftest import LogUnderTest

LONG = 30.0
"""Seconds that a fetch waits for what is sure to come."""
SHORT = 0.05
"""Seconds that a fetch waits for what must not come."""


def message(topic: str, key: str, value: str) -> Message:
    return Message(topic, key, value.encode(), {"ce_id": value})


def numbered(topic: str, count: int, *, keys: int = 1, start: int = 0) -> list[Message]:
    return [message(topic, f"default|p{number % keys}", str(number)) for number in range(start, start + count)]


def values(records: Sequence[Record]) -> list[int]:
    return [int(record.value) for record in records]


def places(topic: str, count: int) -> list[TopicPartition]:
    return [TopicPartition(topic, number) for number in range(count)]


async def collect(consumer: EventConsumer, count: int, *, at_once: int = 100) -> list[Record]:
    """Fetch until `count` records are there."""
    records: list[Record] = []
    async with asyncio.timeout(LONG):
        while len(records) < count:
            records += await consumer.fetch(min(at_once, count - len(records)), LONG)
    return records


async def collect_all(consumer: EventConsumer, wanted: set[int]) -> None:
    """Fetch until these were all there; a rebalance may bring again what was not committed."""
    missing = set(wanted)
    async with asyncio.timeout(LONG):
        while missing:
            missing -= set(values(await consumer.fetch(100, LONG)))


async def commit_all(consumer: EventConsumer, records: Sequence[Record]) -> None:
    await consumer.commit({record.source: record.offset + 1 for record in records})


async def settle(consumers: Sequence[EventConsumer], cover: Collection[TopicPartition]) -> list[list[Record]]:
    """Fetch until the consumers own `cover` among them; return what each was given meanwhile."""
    given: list[list[Record]] = [[] for _ in consumers]
    async with asyncio.timeout(LONG):
        while not all(c.assignment() for c in consumers) or sorted(
            place for consumer in consumers for place in consumer.assignment()
        ) != sorted(cover):
            fetched = await asyncio.gather(*(consumer.fetch(100, SHORT) for consumer in consumers))
            given = [[*before, *more] for before, more in zip(given, fetched, strict=True)]
    return given


async def read_all(log: EventLog, topic: str, count: int, *, group: str = "auditor") -> list[Record]:
    """Return the topic's records, of which there must be `count` and no more."""
    consumer = await log.subscribe(group, [topic])
    records = await collect(consumer, count)
    assert list(await consumer.fetch(1, SHORT)) == []
    await consumer.close()
    return records


class TestAppend:
    async def test_returns_where_each_message_went(self, event_log: LogUnderTest) -> None:
        narrow = TopicPartition(event_log.narrow, 0)
        first = await event_log.log.append(numbered(event_log.narrow, 2))
        second = await event_log.log.append(numbered(event_log.narrow, 1))
        start = first[0][1]
        assert [*first, *second] == [(narrow, start), (narrow, start + 1), (narrow, start + 2)]

    async def test_records_come_back_as_they_were(self, event_log: LogUnderTest) -> None:
        headers = {"ce_type": "catalens.product.upserted.v1", "ce_source": "/läden/東京 🛍", "empty": ""}
        sent = Message(event_log.narrow, "default|ä🎈", b"\x00\xff not JSON \x80", headers)
        before = time.time()
        ((place, offset),) = await event_log.log.append([sent])
        after = time.time()
        (record,) = await read_all(event_log.log, event_log.narrow, 1)
        assert (record.source, record.offset) == (place, offset)
        assert (record.topic, record.key, record.value, record.headers) == (
            sent.topic,
            sent.key,
            sent.value,
            sent.headers,
        )
        assert before - 0.001 <= record.timestamp <= after + 0.001  # a log may keep whole milliseconds

    async def test_one_call_may_write_to_several_topics(self, event_log: LogUnderTest) -> None:
        appended = await event_log.log.append(
            [message(event_log.wide, "k", "1"), message(event_log.narrow, "k", "2"), message(event_log.wide, "k", "3")]
        )
        assert [place.topic for place, _ in appended] == [event_log.wide, event_log.narrow, event_log.wide]
        assert values(await read_all(event_log.log, event_log.wide, 2)) == [1, 3]
        assert values(await read_all(event_log.log, event_log.narrow, 1, group="other")) == [2]

    async def test_a_key_keeps_its_partition_and_its_order(self, event_log: LogUnderTest) -> None:
        await event_log.log.append(numbered(event_log.wide, 40, keys=8))
        await event_log.restart()
        await event_log.log.append(numbered(event_log.wide, 40, keys=8))
        records = await read_all(event_log.log, event_log.wide, 80)
        for key in {record.key for record in records}:
            mine = [record for record in records if record.key == key]
            assert len({record.source for record in mine}) == 1
            assert values(mine) == [*range(int(key[-1]), 40, 8)] * 2

    async def test_keys_spread_over_the_partitions(self, event_log: LogUnderTest) -> None:
        appended = await event_log.log.append(numbered(event_log.wide, 200, keys=200))
        assert {place for place, _ in appended} == set(places(event_log.wide, 4))

    async def test_nothing_is_no_work(self, event_log: LogUnderTest) -> None:
        assert list(await event_log.log.append([])) == []

    async def test_an_unknown_topic_is_refused_and_nothing_written(self, event_log: LogUnderTest) -> None:
        with pytest.raises(Misconfigured, match="no-such-topic"):
            await event_log.log.append([message(event_log.narrow, "k", "0"), message("no-such-topic", "k", "1")])
        with pytest.raises(Misconfigured, match="no-such-topic"):
            await event_log.log.subscribe("group", ["no-such-topic"])
        await read_all(event_log.log, event_log.narrow, 0)

    async def test_concurrent_calls_are_each_written_once(self, event_log: LogUnderTest) -> None:
        results = await asyncio.gather(*(event_log.log.append([one]) for one in numbered(event_log.wide, 300, keys=50)))
        records = await read_all(event_log.log, event_log.wide, 300)
        assert sorted(values(records)) == list(range(300))
        stored = {(record.source, record.offset): int(record.value) for record in records}
        assert [stored[place] for (place,) in results] == list(range(300))

    async def test_a_cancelled_call_is_whole_or_absent_and_harms_no_other(self, event_log: LogUnderTest) -> None:
        doomed = asyncio.create_task(event_log.log.append(numbered(event_log.narrow, 3)))
        other = asyncio.create_task(event_log.log.append([message(event_log.narrow, "k", "7")]))
        await asyncio.sleep(0)
        doomed.cancel()
        await other
        await event_log.log.append([message(event_log.narrow, "k", "8")])
        await asyncio.gather(doomed, return_exceptions=True)
        consumer = await event_log.log.subscribe("auditor", [event_log.narrow])
        found: list[int] = []
        while 8 not in found:
            found += values(await consumer.fetch(100, LONG))
        assert found in ([7, 8], [0, 1, 2, 7, 8])

    async def test_a_closed_log_refuses(self, event_log: LogUnderTest) -> None:
        await event_log.log.close()
        with pytest.raises(Transient):
            await event_log.log.append(numbered(event_log.narrow, 1))
        with pytest.raises(Transient):
            await event_log.log.subscribe("group", [event_log.narrow])


class TestFetch:
    async def test_takes_no_more_than_asked(self, event_log: LogUnderTest) -> None:
        await event_log.log.append(numbered(event_log.wide, 20, keys=20))
        consumer = await event_log.log.subscribe("group", [event_log.wide])
        seen: list[Record] = []
        while len(seen) < 20:
            batch = await consumer.fetch(3, LONG)
            assert 1 <= len(batch) <= 3
            seen += batch
        assert sorted(values(seen)) == list(range(20))

    async def test_gives_up_after_the_timeout(self, event_log: LogUnderTest) -> None:
        consumer = await event_log.log.subscribe("group", [event_log.narrow])
        await settle([consumer], places(event_log.narrow, 1))
        assert list(await consumer.fetch(10, SHORT)) == []
        assert list(await consumer.fetch(10, 0)) == []

    async def test_wakes_when_something_is_appended(self, event_log: LogUnderTest) -> None:
        consumer = await event_log.log.subscribe("group", [event_log.narrow, event_log.wide])
        waiting = asyncio.create_task(consumer.fetch(10, LONG))
        await asyncio.sleep(0)
        await event_log.log.append(numbered(event_log.wide, 1))
        assert values(await waiting) == [0]

    async def test_a_cancelled_fetch_loses_nothing(self, event_log: LogUnderTest) -> None:
        consumer = await event_log.log.subscribe("group", [event_log.narrow])
        await settle([consumer], places(event_log.narrow, 1))
        got: list[Record] = []
        for turns in range(4):
            await event_log.log.append(numbered(event_log.narrow, 5, start=5 * turns))
            doomed = asyncio.create_task(consumer.fetch(10, LONG))
            for _ in range(turns):
                await asyncio.sleep(0)
            doomed.cancel()
            with suppress(asyncio.CancelledError):
                got += await doomed  # what was at hand may be returned before the cancellation comes
        assert values([*got, *await collect(consumer, 20 - len(got))]) == list(range(20))

    async def test_a_busy_partition_does_not_starve_another(self, event_log: LogUnderTest) -> None:
        await event_log.log.append(numbered(event_log.narrow, 1000))
        await event_log.log.append([message(event_log.wide, "k", "-1")])
        consumer = await event_log.log.subscribe("group", [event_log.narrow, event_log.wide])
        assert -1 in values(await collect(consumer, 500, at_once=50))

    async def test_close_ends_a_waiting_fetch(self, event_log: LogUnderTest) -> None:
        consumer = await event_log.log.subscribe("group", [event_log.narrow])
        waiting = asyncio.create_task(consumer.fetch(10, 10 * LONG))
        await asyncio.sleep(0)
        await consumer.close()
        await consumer.close()
        assert list(await asyncio.wait_for(waiting, LONG)) == []
        with pytest.raises(RuntimeError):
            await consumer.fetch(1, 0)

    async def test_closing_the_log_closes_its_consumers(self, event_log: LogUnderTest) -> None:
        consumer = await event_log.log.subscribe("group", [event_log.narrow])
        waiting = asyncio.create_task(consumer.fetch(10, 10 * LONG))
        await asyncio.sleep(0)
        await event_log.log.close()
        await event_log.log.close()
        assert list(await asyncio.wait_for(waiting, LONG)) == []
        await consumer.close()


class TestPauseAndRewind:
    async def test_paused_partitions_are_silent_until_resumed(self, event_log: LogUnderTest) -> None:
        consumer = await event_log.log.subscribe("group", [event_log.narrow, event_log.wide])
        await settle([consumer], [*places(event_log.narrow, 1), *places(event_log.wide, 4)])
        consumer.pause(places(event_log.narrow, 1))
        await event_log.log.append([message(event_log.narrow, "k", "1"), message(event_log.wide, "k", "2")])
        assert values(await collect(consumer, 1)) == [2]
        assert list(await consumer.fetch(1, SHORT)) == []
        waiting = asyncio.create_task(consumer.fetch(1, LONG))
        await asyncio.sleep(0)
        consumer.resume(places(event_log.narrow, 1))
        assert values(await waiting) == [1]

    async def test_a_pause_during_a_fetch_holds(self, event_log: LogUnderTest) -> None:
        consumer = await event_log.log.subscribe("group", [event_log.narrow])
        await settle([consumer], places(event_log.narrow, 1))
        await event_log.log.append(numbered(event_log.narrow, 3))
        fetching = asyncio.create_task(consumer.fetch(10, SHORT))
        await asyncio.sleep(0)
        before_the_pause = values(fetching.result()) if fetching.done() else []
        consumer.pause(places(event_log.narrow, 1))
        assert values(await fetching) == before_the_pause
        assert list(await consumer.fetch(10, SHORT)) == []
        consumer.resume(places(event_log.narrow, 1))
        left = 3 - len(before_the_pause)
        assert before_the_pause + values(await collect(consumer, left)) == [0, 1, 2]

    async def test_pausing_what_is_not_owned_is_no_error(self, event_log: LogUnderTest) -> None:
        consumer = await event_log.log.subscribe("group", [event_log.narrow])
        consumer.pause(places(event_log.wide, 4))
        consumer.resume(places(event_log.wide, 4))

    async def test_rewind_returns_the_record_and_what_follows(self, event_log: LogUnderTest) -> None:
        await event_log.log.append(numbered(event_log.narrow, 6))
        consumer = await event_log.log.subscribe("group", [event_log.narrow])
        records = await collect(consumer, 5)
        consumer.rewind(records[2])
        consumer.rewind(records[4])
        assert values(await collect(consumer, 4)) == [2, 3, 4, 5]

    async def test_a_rewind_wakes_and_leaves_other_partitions_alone(self, event_log: LogUnderTest) -> None:
        await event_log.log.append([message(event_log.narrow, "k", "1"), message(event_log.wide, "k", "2")])
        consumer = await event_log.log.subscribe("group", [event_log.narrow, event_log.wide])
        records = await collect(consumer, 2)
        waiting = asyncio.create_task(consumer.fetch(10, LONG))
        await asyncio.sleep(0)
        consumer.rewind(next(record for record in records if record.topic == event_log.wide))
        assert values(await waiting) == [2]
        assert list(await consumer.fetch(10, SHORT)) == []


class TestGroups:
    async def test_a_new_group_begins_with_the_earliest_record(self, event_log: LogUnderTest) -> None:
        await event_log.log.append(numbered(event_log.narrow, 3))
        assert values(await read_all(event_log.log, event_log.narrow, 3)) == [0, 1, 2]

    async def test_every_group_gets_everything(self, event_log: LogUnderTest) -> None:
        await event_log.log.append(numbered(event_log.narrow, 3))
        one = await event_log.log.subscribe("one", [event_log.narrow])
        await commit_all(one, await collect(one, 3))
        assert values(await read_all(event_log.log, event_log.narrow, 3, group="two")) == [0, 1, 2]

    async def test_a_group_goes_on_after_its_commit(self, event_log: LogUnderTest) -> None:
        await event_log.log.append(numbered(event_log.narrow, 5))
        consumer = await event_log.log.subscribe("group", [event_log.narrow])
        await commit_all(consumer, await collect(consumer, 2))
        assert len(await collect(consumer, 2)) == 2  # read, not committed
        await consumer.close()
        again = await event_log.log.subscribe("group", [event_log.narrow])
        assert values(await collect(again, 3)) == [2, 3, 4]

    async def test_records_and_commits_survive_a_restart(self, event_log: LogUnderTest) -> None:
        await event_log.log.append(numbered(event_log.wide, 40, keys=8))
        consumer = await event_log.log.subscribe("group", [event_log.wide])
        done = await collect(consumer, 15)
        await commit_all(consumer, done)
        log = await event_log.restart()
        again = await log.subscribe("group", [event_log.wide])
        rest = await collect(again, 25)
        assert sorted(values(done) + values(rest)) == list(range(40))
        await log.append([message(event_log.wide, "default|p0", "40")])
        assert values(await collect(again, 1)) == [40]

    async def test_commits_count_for_owned_partitions_only(self, event_log: LogUnderTest) -> None:
        await event_log.log.append(numbered(event_log.narrow, 3))
        owner = await event_log.log.subscribe("group", [event_log.narrow])
        await settle([owner], places(event_log.narrow, 1))
        other = await event_log.log.subscribe("group", [event_log.wide])
        await settle([other, owner], [*places(event_log.narrow, 1), *places(event_log.wide, 4)])
        await other.commit({TopicPartition(event_log.narrow, 0): 3})
        assert await event_log.log.lag("group", [event_log.narrow]) == {TopicPartition(event_log.narrow, 0): 3}

    async def test_lag_is_what_is_not_committed(self, event_log: LogUnderTest) -> None:
        narrow = TopicPartition(event_log.narrow, 0)
        assert await event_log.log.lag("group", [event_log.narrow]) == {narrow: 0}
        await event_log.log.append(numbered(event_log.narrow, 5))
        assert await event_log.log.lag("group", [event_log.narrow]) == {narrow: 5}
        consumer = await event_log.log.subscribe("group", [event_log.narrow])
        await commit_all(consumer, (await collect(consumer, 5))[:3])
        lag = await event_log.log.lag("group", [event_log.narrow, event_log.wide])
        assert lag == {narrow: 2, **dict.fromkeys(places(event_log.wide, 4), 0)}
        await event_log.restart()
        assert await event_log.log.lag("group", [event_log.narrow]) == {narrow: 2}

    async def test_members_share_the_partitions_and_read_each_record_once(self, event_log: LogUnderTest) -> None:
        members = [await event_log.log.subscribe("group", [event_log.wide]) for _ in range(3)]
        await settle(members, places(event_log.wide, 4))
        assert sorted(len(member.assignment()) for member in members) == [1, 1, 2]
        await event_log.log.append(numbered(event_log.wide, 60, keys=30))
        seen: list[int] = []
        while len(seen) < 60:
            for member in members:
                records = await member.fetch(100, SHORT)
                assert {record.source for record in records} <= member.assignment()
                seen += values(records)
        assert sorted(seen) == list(range(60))

    async def test_more_members_than_partitions_is_no_error(self, event_log: LogUnderTest) -> None:
        one = await event_log.log.subscribe("group", [event_log.narrow])
        await settle([one], places(event_log.narrow, 1))
        two = await event_log.log.subscribe("group", [event_log.narrow])
        await event_log.log.append(numbered(event_log.narrow, 3))
        seen: list[int] = []
        while len(seen) < 3:
            first, second = await asyncio.gather(one.fetch(10, SHORT), two.fetch(10, SHORT))
            seen += values(first) + values(second)
        assert sorted(seen) == [0, 1, 2]
        assert len(one.assignment() | two.assignment()) == 1
        assert not one.assignment() & two.assignment()

    async def test_the_owner_drains_and_commits_before_a_partition_goes(self, event_log: LogUnderTest) -> None:
        await event_log.log.append(numbered(event_log.wide, 40, keys=20))
        handled: list[Record] = []
        revoked: set[TopicPartition] = set()
        asked, drained = asyncio.Event(), asyncio.Event()

        async def drain(partitions: Collection[TopicPartition]) -> None:
            revoked.update(partitions)
            asked.set()
            await drained.wait()
            await commit_all(first, handled)

        first = await event_log.log.subscribe("group", [event_log.wide], on_revoke=drain)
        handled += await collect(first, 40)
        joining = asyncio.create_task(event_log.log.subscribe("group", [event_log.wide]))
        async with asyncio.timeout(LONG):
            while not asked.is_set():
                handled += await first.fetch(100, SHORT)
        assert revoked <= first.assignment()
        drained.set()
        second = await joining
        given = await settle([first, second], places(event_log.wide, 4))
        assert second.assignment() <= revoked
        # Everything was committed, so the new owner starts behind it and nobody sees a record twice.
        assert given == [[], []]
        assert sorted(values(handled)) == list(range(40))
        assert set((await event_log.log.lag("group", [event_log.wide])).values()) == {0}

    async def test_a_failing_on_revoke_does_not_keep_the_partition(self, event_log: LogUnderTest) -> None:
        async def fail(partitions: Collection[TopicPartition]) -> None:
            raise ValueError("the drain broke")

        first = await event_log.log.subscribe("group", [event_log.wide], on_revoke=fail)
        await settle([first], places(event_log.wide, 4))
        second = await event_log.log.subscribe("group", [event_log.wide])
        await settle([first, second], places(event_log.wide, 4))

    async def test_a_leaving_member_hands_over_what_it_did_not_commit(self, event_log: LogUnderTest) -> None:
        revoked: list[TopicPartition] = []

        async def note(partitions: Collection[TopicPartition]) -> None:
            revoked.extend(partitions)

        first = await event_log.log.subscribe("group", [event_log.wide])
        second = await event_log.log.subscribe("group", [event_log.wide], on_revoke=note)
        await settle([first, second], places(event_log.wide, 4))
        revoked.clear()
        mine = second.assignment()
        await event_log.log.append(numbered(event_log.wide, 40, keys=20))
        seen: list[Record] = []
        while {record.source for record in seen} != mine:
            seen += await second.fetch(100, LONG)
        await second.close()
        assert revoked == []  # it left by itself
        assert second.assignment() == frozenset()
        await commit_all(second, seen)  # too late to count
        (given,) = await settle([first], places(event_log.wide, 4))
        await collect_all(first, set(range(40)) - set(values(given)))

    async def test_an_assignment_change_clears_pauses(self, event_log: LogUnderTest) -> None:
        first = await event_log.log.subscribe("group", [event_log.wide])
        second = await event_log.log.subscribe("group", [event_log.wide])
        await settle([first, second], places(event_log.wide, 4))
        first.pause(first.assignment())
        await second.close()
        await settle([first], places(event_log.wide, 4))
        await event_log.log.append(numbered(event_log.wide, 40, keys=20))
        assert sorted(values(await collect(first, 40))) == list(range(40))

    async def test_a_cancelled_join_leaves_the_group_whole(self, event_log: LogUnderTest) -> None:
        asked, drained, finished = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def drain(partitions: Collection[TopicPartition]) -> None:
            asked.set()
            await drained.wait()
            finished.set()

        first = await event_log.log.subscribe("group", [event_log.wide], on_revoke=drain)
        await settle([first], places(event_log.wide, 4))
        joining = asyncio.create_task(event_log.log.subscribe("group", [event_log.wide]))
        async with asyncio.timeout(LONG):
            while not asked.is_set() and not joining.done():
                await first.fetch(1, SHORT)
        joining.cancel()
        for joined in await asyncio.gather(joining, return_exceptions=True):
            if not isinstance(joined, BaseException):  # it had joined before it could be cancelled
                await joined.close()
        drained.set()
        if asked.is_set():
            await asyncio.wait_for(finished.wait(), LONG)  # the owner's drain was not cut short
        await settle([first], places(event_log.wide, 4))
        await event_log.log.append(numbered(event_log.wide, 40, keys=20))
        await collect_all(first, set(range(40)))


class TestReadersWithoutAGroup:
    async def test_read_from_the_end_as_of_the_call(self, event_log: LogUnderTest) -> None:
        await event_log.log.append(numbered(event_log.narrow, 5))
        reader = await event_log.log.subscribe(None, [event_log.narrow])
        assert reader.assignment() == frozenset(places(event_log.narrow, 1))
        await event_log.log.append([message(event_log.narrow, "k", "5")])
        assert values(await collect(reader, 1)) == [5]
        assert list(await reader.fetch(1, SHORT)) == []

    async def test_each_reads_everything_and_takes_nothing_from_groups(self, event_log: LogUnderTest) -> None:
        readers = [await event_log.log.subscribe(None, [event_log.wide]) for _ in range(2)]
        await event_log.log.append(numbered(event_log.wide, 12, keys=6))
        for reader in readers:
            assert sorted(values(await collect(reader, 12))) == list(range(12))
        assert len(await read_all(event_log.log, event_log.wide, 12)) == 12

    async def test_cannot_commit(self, event_log: LogUnderTest) -> None:
        reader = await event_log.log.subscribe(None, [event_log.narrow])
        with pytest.raises(RuntimeError):
            await reader.commit({TopicPartition(event_log.narrow, 0): 1})


async def scanned(log: EventLog, topics: Sequence[str], start: Offsets | None = None) -> list[Record]:
    return [record async for record in log.scan(topics, start=start)]


class TestScan:
    async def test_gives_every_record_of_every_partition_in_order_and_ends(self, event_log: LogUnderTest) -> None:
        await event_log.log.append(numbered(event_log.wide, 700, keys=9))
        await event_log.log.append([message(event_log.narrow, "k", str(number)) for number in range(700, 1400)])
        records = await scanned(event_log.log, [event_log.wide, event_log.narrow])
        assert sorted(values(records)) == list(range(1400))
        for place in {record.source for record in records}:
            mine = [record.offset for record in records if record.source == place]
            assert mine == sorted(mine)
        assert await scanned(event_log.log, []) == []

    async def test_records_are_those_that_a_group_reads(self, event_log: LogUnderTest) -> None:
        await event_log.log.append([Message(event_log.narrow, "k", b"\xff", {"ce_id": "ä"})])
        assert await scanned(event_log.log, [event_log.narrow]) == await read_all(event_log.log, event_log.narrow, 1)

    async def test_what_comes_later_is_not_in_it(self, event_log: LogUnderTest) -> None:
        await event_log.log.append(numbered(event_log.narrow, 3))
        records = event_log.log.scan([event_log.narrow])
        found = [await anext(aiter(records))]
        await event_log.log.append(numbered(event_log.narrow, 3))
        found.extend([record async for record in records])
        assert values(found) == [0, 1, 2]

    async def test_begins_where_it_is_told(self, event_log: LogUnderTest) -> None:
        appended = await event_log.log.append(numbered(event_log.narrow, 4))
        narrow, third = appended[2]
        await event_log.log.append([message(event_log.wide, "k", "9")])
        records = await scanned(event_log.log, [event_log.narrow, event_log.wide], {narrow: third})
        assert sorted(values(records)) == [2, 3, 9]
        assert await scanned(event_log.log, [event_log.narrow], {narrow: third + 2}) == []

    async def test_leaves_the_groups_alone(self, event_log: LogUnderTest) -> None:
        await event_log.log.append(numbered(event_log.narrow, 4))
        consumer = await event_log.log.subscribe("group", [event_log.narrow])
        await commit_all(consumer, await collect(consumer, 2))
        await scanned(event_log.log, [event_log.narrow])
        assert await event_log.log.lag("group", [event_log.narrow]) == {TopicPartition(event_log.narrow, 0): 2}
        assert values(await collect(consumer, 2)) == [2, 3]

    async def test_an_unknown_topic_and_a_closed_log_are_refused(self, event_log: LogUnderTest) -> None:
        with pytest.raises(Misconfigured, match="no-such-topic"):
            await scanned(event_log.log, ["no-such-topic"])
        await event_log.log.close()
        with pytest.raises(Transient):
            await scanned(event_log.log, [event_log.narrow])


class TestDiscard:
    async def test_drops_what_is_below_and_nothing_else(self, event_log: LogUnderTest) -> None:
        appended = await event_log.log.append(numbered(event_log.narrow, 6))
        await event_log.log.append(numbered(event_log.wide, 6, keys=6))
        narrow, fourth = appended[3]
        for _ in range(2):  # the second time there is nothing left to drop
            await event_log.log.discard({narrow: fourth})
        await event_log.restart()
        assert values(await scanned(event_log.log, [event_log.narrow])) == [3, 4, 5]
        assert len(await scanned(event_log.log, [event_log.wide])) == 6

    async def test_offsets_go_on_after_everything_went(self, event_log: LogUnderTest) -> None:
        narrow, last = (await event_log.log.append(numbered(event_log.narrow, 3)))[-1]
        await event_log.log.discard({narrow: last + 1})
        assert await scanned(event_log.log, [event_log.narrow]) == []
        assert await event_log.log.append(numbered(event_log.narrow, 1)) == [(narrow, last + 1)]
        assert values(await scanned(event_log.log, [event_log.narrow])) == [0]


class TestCommitted:
    async def test_a_new_group_goes_on_from_the_earliest_record(self, event_log: LogUnderTest) -> None:
        narrow, first = (await event_log.log.append(numbered(event_log.narrow, 5)))[0]
        assert await event_log.log.committed("group", [event_log.narrow]) == {narrow: first}
        await event_log.log.discard({narrow: first + 2})
        assert await event_log.log.committed("group", [event_log.narrow]) == {narrow: first + 2}

    async def test_is_what_the_group_committed(self, event_log: LogUnderTest) -> None:
        narrow, first = (await event_log.log.append(numbered(event_log.narrow, 5)))[0]
        consumer = await event_log.log.subscribe("group", [event_log.narrow])
        await commit_all(consumer, await collect(consumer, 3))
        assert await event_log.log.committed("group", [event_log.narrow]) == {narrow: first + 3}
        assert sorted(await event_log.log.committed("group", [event_log.narrow, event_log.wide])) == sorted(
            [narrow, *places(event_log.wide, 4)]
        )

    async def test_can_be_set_for_a_group_without_members(self, event_log: LogUnderTest) -> None:
        narrow, first = (await event_log.log.append(numbered(event_log.narrow, 5)))[0]
        await event_log.log.set_committed("group", {narrow: first + 4})
        await event_log.restart()
        consumer = await event_log.log.subscribe("group", [event_log.narrow])
        assert values(await collect(consumer, 1)) == [4]
        await consumer.close()
        await nobody_in(event_log.log, "group")
        await event_log.log.set_committed("group", {narrow: first + 1})
        again = await event_log.log.subscribe("group", [event_log.narrow])
        assert values(await collect(again, 4)) == [1, 2, 3, 4]

    async def test_cannot_be_set_while_the_group_has_members(self, event_log: LogUnderTest) -> None:
        narrow, first = (await event_log.log.append(numbered(event_log.narrow, 5)))[0]
        consumer = await event_log.log.subscribe("group", [event_log.narrow])
        await settle([consumer], places(event_log.narrow, 1))
        with pytest.raises(Conflict, match="group"):
            await event_log.log.set_committed("group", {narrow: first + 4})
        assert await event_log.log.committed("group", [event_log.narrow]) == {narrow: first}

    async def test_members_are_counted(self, event_log: LogUnderTest) -> None:
        assert await event_log.log.members("group") == 0
        consumers = [await event_log.log.subscribe("group", [event_log.wide]) for _ in range(2)]
        await settle(consumers, places(event_log.wide, 4))
        assert await event_log.log.members("group") == 2
        assert await event_log.log.members("other") == 0
        for consumer in consumers:
            await consumer.close()
        await nobody_in(event_log.log, "group")


async def nobody_in(log: EventLog, group: str) -> None:
    """Return when the last member has left, which a broker may learn a little later."""
    async with asyncio.timeout(LONG):
        while await log.members(group):
            await asyncio.sleep(SHORT)
