"""What SqliteEventLog promises beyond its port: kill -9, a full disk, one process at a time, retention."""

from __future__ import annotations

import asyncio
import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from catalens import events
from catalens.domain import Message, Record, TopicPartition
from catalens.engines.folder import DataFolder
from catalens.engines.sqlite_log import SqliteEventLog, deal
from catalens.errors import Misconfigured

TOPIC = events.PRODUCTS
PLACE = TopicPartition(TOPIC, 0)
HOUR = 3600.0
WEEK = 7 * 24 * HOUR


def message(value: str, topic: str = TOPIC) -> Message:
    return Message(topic, "default|p", value.encode(), {"ce_id": value})


async def fill(log: SqliteEventLog, count: int, topic: str = TOPIC) -> None:
    await log.append([message(str(number), topic) for number in range(count)])


async def everything(log: SqliteEventLog, topic: str = TOPIC) -> list[Record]:
    """Return what a new group finds in `topic`."""
    consumer = await log.subscribe("everything", [topic])
    records: list[Record] = []
    while batch := await consumer.fetch(1000, 0):
        records += batch
    await consumer.close()
    return records


async def read_and_commit(log: SqliteEventLog, group: str, count: int, topic: str = TOPIC) -> None:
    consumer = await log.subscribe(group, [topic])
    seen: list[Record] = []
    while len(seen) < count:
        seen += await consumer.fetch(count - len(seen), 10)
    await consumer.commit({seen[-1].source: seen[-1].offset + 1})
    await consumer.close()


# --- kill -9 ----------------------------------------------------------------------------------------------

WRITER = """
import asyncio, itertools, sys
from pathlib import Path
from catalens.domain import Message
from catalens.engines.sqlite_log import SqliteEventLog

async def write(log, writer, batch):
    for number in itertools.count():
        names = [f"{sys.argv[2]}.{writer}.{number}.{part}" for part in range(batch)]
        await log.append([Message("catalog.products", f"default|{writer}", name.encode()) for name in names])
        sys.stdout.write("".join(f"{name}\\n" for name in names))
        sys.stdout.flush()

async def main():
    log = await SqliteEventLog.open(Path(sys.argv[1]))
    await asyncio.gather(*(write(log, writer, 1 + writer % 3) for writer in range(6)))

asyncio.run(main())
"""


@pytest.mark.parametrize("acknowledgements", [1, 40, 400])
async def test_kill_9_loses_and_doubles_nothing_that_was_acknowledged(tmp_path: Path, acknowledgements: int) -> None:
    path = tmp_path / "events.sqlite3"
    acknowledged: list[str] = []
    for life in range(2):
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", WRITER, str(path), str(life), stdout=asyncio.subprocess.PIPE
        )
        assert child.stdout is not None
        told = [await child.stdout.readline() for _ in range(acknowledgements)]
        child.send_signal(signal.SIGKILL)
        told += (await child.stdout.read()).splitlines(keepends=True)
        assert await child.wait() == -signal.SIGKILL
        acknowledged += [line.decode().strip() for line in told if line.endswith(b"\n")]
        log = await SqliteEventLog.open(path)
        records = await everything(log)
        await log.close()
        found = [record.value.decode() for record in records]
        assert len(found) == len(set(found))
        assert set(acknowledged) <= set(found)
        assert [record.offset for record in records] == list(range(len(records)))
        for writer in range(6):  # and in the order in which each writer wrote
            mine = [name for name in found if name.startswith(f"{life}.{writer}.")]
            assert mine == sorted(mine, key=lambda name: [int(part) for part in name.split(".")])


# --- a full disk ------------------------------------------------------------------------------------------

FULL_DISK = """
import asyncio, json, resource, sys
from pathlib import Path
from catalens.domain import Message
from catalens.engines.sqlite_log import SqliteEventLog
from catalens.errors import StorageFull

async def main():
    log = await SqliteEventLog.open(Path(sys.argv[1]))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, limits[1]))
    acknowledged, refused = [], 0

    async def write(name, size, batch):
        nonlocal refused
        names = [f"{name}.{part}" for part in range(batch)]
        try:
            await log.append([Message("catalog.products", "k", one.encode() + b" " * size) for one in names])
            acknowledged.extend(names)
        except StorageFull:
            refused += 1

    number = 0
    while refused < 3:
        await asyncio.gather(*(write(f"{number}.{size}", size, 3) for size in (1, 10_000, 60_000)))
        number += 1
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    before, refused = refused, 0
    await asyncio.gather(*(write(f"room.{size}", size, 3) for size in (1, 10_000, 60_000)))
    await log.close()
    print(json.dumps({"acknowledged": acknowledged, "refused": before, "refused with room": refused}))

asyncio.run(main())
"""


async def test_a_full_disk_refuses_whole_appends_and_heals(tmp_path: Path) -> None:
    """The file size limit stands for the full disk: it takes as many bytes as fit, then fails the write."""
    path = tmp_path / "events.sqlite3"
    child = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True
    )
    told = json.loads(child.stdout)
    assert told["refused"] >= 3
    assert told["refused with room"] == 0
    log = await SqliteEventLog.open(path)
    records = await everything(log)
    assert [record.value.decode().strip() for record in records] == told["acknowledged"]
    assert [record.offset for record in records] == list(range(len(records)))
    await log.close()


# --- one process, one schema ------------------------------------------------------------------------------

HOLDER = """
import asyncio, sys
from pathlib import Path
from catalens.engines.sqlite_log import SqliteEventLog

async def main():
    log = await SqliteEventLog.open(Path(sys.argv[1]))
    print("open", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_second_process_is_told_who_has_it_until_that_one_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "events.sqlite3"
    holder = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOLDER, str(path), stdout=asyncio.subprocess.PIPE
    )
    assert holder.stdout is not None
    assert await holder.stdout.readline() == b"open\n"
    with pytest.raises(Misconfigured) as refusal:
        await SqliteEventLog.open(path)
    assert f"{tmp_path} is in use by process {holder.pid}:" in str(refusal.value)
    holder.kill()
    await holder.wait()
    log = await SqliteEventLog.open(path)
    with pytest.raises(Misconfigured, match="in use"):  # nor twice in one process
        await SqliteEventLog.open(path)
    await log.close()
    await (await SqliteEventLog.open(path)).close()


async def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "events.sqlite3"
    log = await SqliteEventLog.open(path)
    await fill(log, 3)
    await log.close()
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 3")
    database.close()
    with pytest.raises(Misconfigured, match=r"schema version 3, this release knows 2.*newer release"):
        await SqliteEventLog.open(path)
    database = sqlite3.connect(path)
    assert database.execute("SELECT count(*) FROM records").fetchone() == (3,)
    database.close()


SCHEMA_1 = """
CREATE TABLE partitions (
    id INTEGER PRIMARY KEY, topic TEXT NOT NULL, number INTEGER NOT NULL, next INTEGER NOT NULL DEFAULT 0,
    UNIQUE (topic, number));
CREATE TABLE records (
    partition INTEGER NOT NULL, offset INTEGER NOT NULL, timestamp REAL NOT NULL, key TEXT NOT NULL,
    headers TEXT NOT NULL, value BLOB NOT NULL, PRIMARY KEY (partition, offset));
CREATE TABLE commits (
    consumers TEXT NOT NULL, partition INTEGER NOT NULL, offset INTEGER NOT NULL,
    PRIMARY KEY (consumers, partition)) WITHOUT ROWID;
INSERT INTO partitions VALUES (1, 'catalog.products', 0, 2);
INSERT INTO records VALUES (1, 0, 5.0, 'default|p', '{}', x'6f6c64'), (1, 1, 5.0, 'default|p', '{}', x'6e6577');
INSERT INTO commits VALUES ('group', 1, 2);
PRAGMA user_version = 1
"""


async def test_a_file_of_the_first_release_is_upgraded(tmp_path: Path) -> None:
    path = tmp_path / "events.sqlite3"
    database = sqlite3.connect(path)
    database.executescript(SCHEMA_1)
    database.close()
    for expired in (1, 0):  # the second start finds it upgraded
        log = await SqliteEventLog.open(path)
        assert await log.lag("group", [TOPIC]) == {PLACE: 0}
        assert await log.expire(time.time()) == expired
        assert [record.value async for record in log.scan([TOPIC])] == [b"new"]
        await log.close()


async def test_what_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "events.sqlite3"
    path.write_text("product_id,name\n" * 100)
    with pytest.raises(Misconfigured, match="no database"):
        await SqliteEventLog.open(path)


async def test_partitions_are_added_but_never_lost(tmp_path: Path) -> None:
    path = tmp_path / "events.sqlite3"
    for asked, expected in ((1, 1), (3, 3), (1, 3)):
        log = await SqliteEventLog.open(path, topics=(TOPIC,), partitions={TOPIC: asked})
        assert len(await log.lag("group", [TOPIC])) == expected
        await log.close()


async def test_a_key_has_the_same_partition_in_every_process(tmp_path: Path) -> None:
    log = await SqliteEventLog.open(tmp_path / "events.sqlite3", topics=(TOPIC,), partitions={TOPIC: 4})
    appended = await log.append([Message(TOPIC, f"default|p{number}", b"") for number in range(8)])
    assert [place.partition for place, _ in appended] == [1, 3, 1, 3, 0, 2, 0, 2]
    await log.close()


def test_a_data_folder_has_one_owner_and_a_version(tmp_path: Path) -> None:
    path = tmp_path / "data"
    with DataFolder(path), pytest.raises(Misconfigured, match="in use by process"):
        DataFolder(path)
    with DataFolder(path):
        assert (path / "version").read_text() == "1\n"
    (path / "version").write_text("")  # killed while it was new
    with DataFolder(path):
        assert (path / "version").read_text() == "1\n"
    (path / "version").write_text("2\n")
    for _ in range(2):  # a refusal lets go of the lock
        with pytest.raises(Misconfigured, match="version 2, this release knows 1"):
            DataFolder(path)


def test_a_data_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Misconfigured, match="CATALENS_DATA_DIR"):
        DataFolder(tmp_path / "file")


# --- retention --------------------------------------------------------------------------------------------


@pytest.fixture
async def log(tmp_path: Path) -> AsyncIterator[SqliteEventLog]:
    """A log with a retention of a week."""
    opened = await SqliteEventLog.open(tmp_path / "events.sqlite3")
    yield opened
    await opened.close()


def offsets(records: Sequence[Record]) -> list[int]:
    return [record.offset for record in records]


RETRIED = events.RETRIES[0]
RETRIED_PLACE = TopicPartition(RETRIED, 0)


async def test_what_is_old_and_read_by_every_group_is_dropped(log: SqliteEventLog) -> None:
    await fill(log, 10, RETRIED)
    await read_and_commit(log, "fast", 10, RETRIED)
    await read_and_commit(log, "slow", 4, RETRIED)
    now = time.time()
    assert await log.expire(now + WEEK - 60) == 0
    assert await log.expire(now + WEEK + 60) == 4
    assert offsets(await everything(log, RETRIED)) == [4, 5, 6, 7, 8, 9]
    assert await log.lag("slow", [RETRIED]) == {RETRIED_PLACE: 6}
    assert await log.lag("new", [RETRIED]) == {RETRIED_PLACE: 6}


async def test_offsets_go_on_after_everything_has_expired(log: SqliteEventLog, tmp_path: Path) -> None:
    await fill(log, 10, RETRIED)
    await read_and_commit(log, "group", 10, RETRIED)
    assert await log.expire(time.time() + WEEK + 60) == 10
    await log.close()
    log = await SqliteEventLog.open(tmp_path / "events.sqlite3")
    assert await log.lag("group", [RETRIED]) == {RETRIED_PLACE: 0}
    assert await log.lag("new", [RETRIED]) == {RETRIED_PLACE: 0}
    assert await log.append([message("next", RETRIED)]) == [(RETRIED_PLACE, 10)]
    assert offsets(await everything(log, RETRIED)) == [10]
    await log.close()


async def test_more_than_a_chunk_expires(log: SqliteEventLog) -> None:
    await fill(log, 2500, RETRIED)
    await read_and_commit(log, "group", 2500, RETRIED)
    assert await log.expire(time.time() + WEEK + 60) == 2500


async def test_a_topic_that_no_group_has_read_keeps_everything(log: SqliteEventLog) -> None:
    await fill(log, 3, RETRIED)
    await fill(log, 3)
    assert await log.expire(time.time() + 100 * WEEK) == 0


async def test_a_group_that_has_joined_but_not_committed_counts(log: SqliteEventLog) -> None:
    await fill(log, 3, RETRIED)
    await read_and_commit(log, "group", 3, RETRIED)
    member = await log.subscribe("joined", [RETRIED])
    assert await log.expire(time.time() + WEEK + 60) == 0
    await member.close()
    assert await log.expire(time.time() + WEEK + 60) == 3


async def test_dead_letters_go_after_their_days_and_outcomes_after_an_hour_read_or_not(log: SqliteEventLog) -> None:
    for topic in (events.DEAD_LETTERS, events.OUTCOMES):
        await fill(log, 3, topic)
        await read_and_commit(log, "group", 2, topic)
    now = time.time()
    assert await log.expire(now + HOUR - 60) == 0
    assert await log.expire(now + HOUR + 60) == 3
    assert await everything(log, events.OUTCOMES) == []
    assert await log.expire(now + 3 * WEEK - 60) == 0
    assert offsets(await everything(log, events.DEAD_LETTERS)) == [0, 1, 2]
    assert await log.expire(now + 3 * WEEK + 60) == 3


# --- compaction -------------------------------------------------------------------------------------------


async def say(log: SqliteEventLog, *keys: str, topic: str = TOPIC) -> None:
    await log.append([Message(topic, f"default|{key}", b"{}") for key in keys])


async def left(log: SqliteEventLog, topic: str = TOPIC) -> list[int]:
    return [record.offset async for record in log.scan([topic])]


@pytest.mark.parametrize("topic", [events.PRODUCTS, events.OFFERS])
async def test_the_newest_record_of_each_key_stays_for_ever(log: SqliteEventLog, topic: str) -> None:
    await say(log, "a", "b", "a", "c", "a", "b", topic=topic)
    await read_and_commit(log, "group", 6, topic)
    now = time.time()
    assert await log.expire(now + WEEK - 60) == 0
    assert await log.expire(now + WEEK + 60) == 3
    assert await left(log, topic) == [3, 4, 5]
    assert await log.expire(now + 100 * WEEK) == 0
    await say(log, "c", "d", topic=topic)  # replaces a record that compaction has been past long ago
    await read_and_commit(log, "group", 2, topic)
    assert await log.expire(now + 200 * WEEK) == 1
    assert await left(log, topic) == [4, 5, 6, 7]
    assert await log.committed("new", [topic]) == {TopicPartition(topic, 0): 4}


async def test_compaction_goes_on_after_a_restart(log: SqliteEventLog, tmp_path: Path) -> None:
    await say(log, "a", "b", "a")
    await read_and_commit(log, "group", 3)
    assert await log.expire(time.time() + WEEK + 60) == 1
    await log.close()
    log = await SqliteEventLog.open(tmp_path / "events.sqlite3")
    await say(log, "b")
    await read_and_commit(log, "group", 1)
    assert await log.expire(time.time() + WEEK + 60) == 1
    assert await left(log) == [2, 3]
    assert values_of(await everything(log)) == [b"{}", b"{}"]
    assert await log.lag("group", [TOPIC]) == {PLACE: 0}
    await log.close()


def values_of(records: Sequence[Record]) -> list[bytes]:
    return [record.value for record in records]


async def test_a_record_goes_only_when_the_one_that_replaces_it_was_read_by_every_group(log: SqliteEventLog) -> None:
    await say(log, "a", "a", "a")
    await read_and_commit(log, "fast", 3)
    await read_and_commit(log, "slow", 2)
    assert await log.expire(time.time() + WEEK + 60) == 1
    assert await left(log) == [1, 2]
    await read_and_commit(log, "slow", 1)
    assert await log.expire(time.time() + WEEK + 60) == 1
    assert await left(log) == [2]


async def test_a_short_retention_does_not_shorten_the_compaction_lag(tmp_path: Path) -> None:
    log = await SqliteEventLog.open(tmp_path / "events.sqlite3", retention_hours=1)
    await say(log, "a", "a")
    await read_and_commit(log, "group", 2)
    assert await log.expire(time.time() + 23 * HOUR) == 0
    assert await log.expire(time.time() + 25 * HOUR) == 1
    await log.close()


async def test_more_than_a_chunk_is_compacted(log: SqliteEventLog) -> None:
    await say(log, *(f"p{number % 30}" for number in range(2500)))
    await read_and_commit(log, "group", 2500)
    assert await log.expire(time.time() + WEEK + 60) == 2470
    assert await left(log) == list(range(2470, 2500))
    reader = await log.subscribe("new", [TOPIC])
    assert len(await reader.fetch(100, 10)) == 30


async def test_a_reader_whose_records_expire_goes_on_behind_them(log: SqliteEventLog) -> None:
    reader = await log.subscribe(None, [events.OUTCOMES])
    await fill(log, 3, events.OUTCOMES)
    assert await log.expire(time.time() + HOUR + 60) == 3
    assert await reader.fetch(10, 0) == ()
    await log.append([message("next", events.OUTCOMES)])
    assert offsets(await reader.fetch(10, 10)) == [3]


# --- sharing ----------------------------------------------------------------------------------------------


async def test_large_records_come_in_several_fetches(log: SqliteEventLog) -> None:
    await log.append([Message(TOPIC, "k", bytes(7_000_000)) for _ in range(5)])
    consumer = await log.subscribe("group", [TOPIC])
    assert [len(await consumer.fetch(100, 10)) for _ in range(2)] == [3, 2]


async def test_more_callers_than_may_wait_take_turns(log: SqliteEventLog) -> None:
    await asyncio.gather(*(log.append([message(str(number))]) for number in range(2500)))
    assert len(await everything(log)) == 2500


def test_partitions_are_dealt_evenly_and_stay_where_that_is_even_too() -> None:
    four = frozenset(TopicPartition("wide", number) for number in range(4))
    nothing: frozenset[TopicPartition] = frozenset()
    (alone,) = deal([(four, nothing)])
    assert alone == four
    first, second = deal([(four, alone), (four, nothing)])
    assert (len(first), len(second)) == (2, 2)
    assert first | second == four
    assert deal([(four, first), (four, second)]) == [first, second]
    again = deal([(four, first), (four, second), (four, nothing)])
    assert sorted(map(len, again)) == [1, 1, 2]
    assert again[0] <= first
    assert again[1] <= second
    assert deal([(four, nothing), (nothing, nothing)]) == [four, nothing]
    assert deal([]) == []
