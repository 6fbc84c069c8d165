"""SqliteEventLog: the embedded event log, one file with Kafka's model of partitions, groups and offsets."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import time
from typing import Final

import structlog

from catalens import events
from catalens.domain import Message, Offsets, Record, TopicPartition
from catalens.engines.folder import FileLock
from catalens.engines.sqlite import GroupWriter, connect, open_database, translate
from catalens.errors import Conflict, Misconfigured, Transient
from catalens.ports import RevokeCallback

log = structlog.get_logger(__name__)

SCHEMA_VERSION: Final = 2
_COMPACTION: Final = """
ALTER TABLE partitions ADD COLUMN compacted INTEGER NOT NULL DEFAULT 0;
CREATE TABLE newest (
    partition INTEGER NOT NULL, key TEXT NOT NULL, offset INTEGER NOT NULL, PRIMARY KEY (partition, key)) WITHOUT ROWID
"""
"""Below `compacted` each key has one record left, whose offset `newest` tells."""
_SCHEMA: Final = f"""
CREATE TABLE partitions (
    id INTEGER PRIMARY KEY, topic TEXT NOT NULL, number INTEGER NOT NULL, next INTEGER NOT NULL DEFAULT 0,
    UNIQUE (topic, number));
CREATE TABLE records (
    partition INTEGER NOT NULL, offset INTEGER NOT NULL, timestamp REAL NOT NULL, key TEXT NOT NULL,
    headers TEXT NOT NULL, value BLOB NOT NULL, PRIMARY KEY (partition, offset));
CREATE TABLE commits (
    consumers TEXT NOT NULL, partition INTEGER NOT NULL, offset INTEGER NOT NULL,
    PRIMARY KEY (consumers, partition)) WITHOUT ROWID;
{_COMPACTION}"""
_FETCH_BYTES: Final = 16 * 1024 * 1024
"""A fetch stops after the record that passes this, so that large events do not fill the memory."""
_EXPIRY_CHUNK: Final = 1_000
"""Records dropped in one transaction, so that appends need not wait for long."""
_SCAN_RECORDS: Final = 500
_OUTCOME_SECONDS: Final = 3600.0
_COMPACTION_LAG: Final = 24 * 3600.0
"""A record that a newer one of its key replaces stays this long at least, however short the retention."""


class SqliteEventLog:
    """An EventLog in one SQLite file, for one process; what it acknowledged survives kill -9 and power loss."""

    def __init__(self, store: _Store, *, retention: float, dead_letters: float) -> None:
        """Take over what `open` opened; `retention` and `dead_letters` in seconds."""
        self._store = store
        self._retention = retention
        self._dead_letters = dead_letters
        self._consumers: set[SqliteConsumer] = set()
        self._groups: dict[str, _Group] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    @classmethod
    async def open(
        cls,
        path: Path,
        *,
        topics: Collection[str] = events.TOPICS,
        partitions: Mapping[str, int] | None = None,
        retention_hours: float = 24 * 7,
        dead_letter_days: float = 21,
    ) -> SqliteEventLog:
        """Open or create the log at `path`; a topic has 1 partition unless `partitions` says more, and never loses one.

        Raises Misconfigured if somebody else has the file open or a newer release wrote it, StorageFull, Transient.
        """
        wanted = [(topic, number) for topic in topics for number in range((partitions or {}).get(topic, 1))]
        store = await _Store.open(path, wanted)
        return cls(store, retention=retention_hours * 3600, dead_letters=dead_letter_days * 86_400)

    async def append(self, messages: Sequence[Message]) -> Sequence[tuple[TopicPartition, int]]:
        """Append in order; see EventLog.append. A call that was cancelled has appended all of it or nothing."""
        return await self._store.append(messages, self._appended) if messages else ()

    async def subscribe(
        self, group: str | None, topics: Sequence[str], *, on_revoke: RevokeCallback | None = None
    ) -> SqliteConsumer:
        """Join `group`; returns when the partitions are dealt, so after the other members' `on_revoke`."""
        self._refuse_if_closed()
        places = frozenset(place for topic in topics for place in self._store.partitions(topic))
        if group is None:
            reader = SqliteConsumer(self._store, None, places, None, self._left)
            reader.grant({place: self._store.ends[place] for place in places})
            self._consumers.add(reader)
            return reader
        joined = self._groups.setdefault(group, _Group(group))
        consumer = SqliteConsumer(self._store, joined, places, on_revoke, self._left)
        self._consumers.add(consumer)
        joined.members.append(consumer)
        try:
            await asyncio.shield(self._rebalance(joined))
        except BaseException:
            await consumer.close()
            raise
        return consumer

    async def lag(self, group: str, topics: Sequence[str]) -> Mapping[TopicPartition, int]:
        """Return how many records `group` has still to commit, per partition."""
        places = [place for topic in topics for place in self._store.partitions(topic)]
        return {place: self._store.ends[place] - self._store.start(group, place) for place in places}

    async def expire(self, now: float) -> int:
        """Drop what is older than the retention and read by every group of its topic; return how many records.

        A group counts that is joined or ever committed on the topic; a topic without any keeps everything. Of products
        and offers only what a newer record of its key has replaced goes, once that one is old enough and read as well.
        Dead letters go by their own age, outcomes after an hour, whoever reads them. `now` in Unix seconds.
        """
        dropped = 0
        for place in self._store.everywhere():
            if place.topic in events.COMPACTED:
                cutoff = now - max(self._retention, _COMPACTION_LAG)
                dropped += await self._store.compact(place, self._read_by_all(place), cutoff)
            elif place.topic == events.OUTCOMES:
                dropped += await self._store.drop(place, self._store.ends[place], now - _OUTCOME_SECONDS)
            elif place.topic == events.DEAD_LETTERS:
                dropped += await self._store.drop(place, self._store.ends[place], now - self._dead_letters)
            else:
                dropped += await self._store.drop(place, self._read_by_all(place), now - self._retention)
        return dropped

    def scan(self, topics: Sequence[str], *, start: Offsets | None = None) -> AsyncIterator[Record]:
        """Iterate what is there now, one partition after the other; see EventLog.scan."""
        self._refuse_if_closed()
        ends = {place: self._store.ends[place] for topic in topics for place in self._store.partitions(topic)}
        return self._scan(ends, start or {})

    async def _scan(self, ends: Offsets, start: Offsets) -> AsyncIterator[Record]:
        for place, end in ends.items():
            position = start.get(place, 0)
            while position < end:
                self._refuse_if_closed()
                ((_, records),) = await self._store.read([_Want(place, position, end)], _SCAN_RECORDS)
                for record in records:
                    if record.offset < end:
                        yield record
                position = records[-1].offset + 1 if records else end

    async def discard(self, before: Offsets) -> None:
        """Drop, per partition, every record below the offset, read or not."""
        for place, offset in before.items():
            self._store.check(place)
            await self._store.drop(place, offset, float("inf"))

    async def committed(self, group: str, topics: Sequence[str]) -> Mapping[TopicPartition, int]:
        """Return where `group` goes on, per partition."""
        return {place: self._store.start(group, place) for topic in topics for place in self._store.partitions(topic)}

    async def set_committed(self, group: str, offsets: Offsets) -> None:
        """Durably store where `group` goes on; raises Conflict while it has members."""
        for place in offsets:
            self._store.check(place)
        if await self.members(group):
            raise Conflict(f"the group {group} has members: stop them first")
        if offsets:
            await self._store.commit(group, offsets)

    async def members(self, group: str) -> int:
        """Return how many consumers are in `group` now."""
        return len(self._groups[group].members) if group in self._groups else 0

    async def close(self) -> None:
        """Finish the appends that were taken, close the consumers, let go of the file; may be called twice."""
        self._closed = True
        for consumer in self._consumers:
            consumer.drop()
        self._consumers.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._store.close()

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise Transient("the event log is closed")

    def _appended(self, places: Collection[TopicPartition]) -> None:
        for consumer in self._consumers:
            consumer.wake(places)

    def _read_by_all(self, place: TopicPartition) -> int:
        # A reindex that nobody runs holds nothing back: it knows how to go on without (docs/adr/0011).
        groups = {name for name in self._store.groups(place.topic) if not name.startswith(events.REINDEX_GROUPS)}
        groups |= {name for name, group in self._groups.items() if group.reads(place)}
        return min((self._store.start(group, place) for group in groups), default=0)

    def _left(self, consumer: SqliteConsumer, group: _Group | None) -> None:
        self._consumers.discard(consumer)
        if group is not None and not self._closed:
            group.members.remove(consumer)
            self._rebalance(group)

    def _rebalance(self, group: _Group) -> asyncio.Task[None]:
        task = asyncio.create_task(group.rebalance(self._store.start), name=f"rebalance {group.name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class SqliteConsumer:
    """One reader of a SqliteEventLog; its state lives on the event loop only."""

    def __init__(
        self,
        store: _Store,
        group: _Group | None,
        subscribed: frozenset[TopicPartition],
        on_revoke: RevokeCallback | None,
        left: Callable[[SqliteConsumer, _Group | None], None],
    ) -> None:
        """Made by SqliteEventLog.subscribe; `left` is called when it closes."""
        self.subscribed = subscribed
        self._store = store
        self._group = group
        self._on_revoke = on_revoke
        self._left = left
        self._positions: dict[TopicPartition, int] = {}
        self._leaving: frozenset[TopicPartition] = frozenset()
        self._paused: set[TopicPartition] = set()
        self._turn = 0
        self._awake = asyncio.Event()
        self._closed = False

    async def fetch(self, max_records: int, timeout: float) -> Sequence[Record]:
        """Return the next records; see EventConsumer.fetch. Empty if the consumer is closed meanwhile."""
        if self._closed:
            raise RuntimeError("the consumer is closed")
        deadline = asyncio.get_running_loop().time() + timeout
        while not self._closed:
            self._awake.clear()
            if wants := self._wanted():
                if records := self._take(await self._store.read(wants, max_records)):
                    return records
                continue
            try:
                async with asyncio.timeout_at(deadline):
                    await self._awake.wait()
            except TimeoutError:
                break
        return ()

    async def commit(self, offsets: Offsets) -> None:
        """Durably store the next offsets to read; partitions that others own are left alone."""
        if self._group is None:
            raise RuntimeError("a reader without a group cannot commit")
        owned = {place: offset for place, offset in offsets.items() if place in self._positions}
        if owned:
            await self._store.commit(self._group.name, owned)

    def assignment(self) -> frozenset[TopicPartition]:
        """Return the partitions owned now, those being revoked included."""
        return frozenset(self._positions)

    def pause(self, partitions: Collection[TopicPartition]) -> None:
        """Hold back the records of these, as far as they are owned."""
        self._paused |= self._positions.keys() & set(partitions)

    def resume(self, partitions: Collection[TopicPartition]) -> None:
        """Undo `pause`."""
        self._paused -= set(partitions)
        self._awake.set()

    def rewind(self, record: Record) -> None:
        """Go back to `record`; of several in one partition the earliest counts, one that is not owned does not."""
        position = self._positions.get(record.source)
        if position is not None:
            self._positions[record.source] = min(position, record.offset)
            self._awake.set()

    async def close(self) -> None:
        """Leave at once; the other members share out the partitions in the background."""
        if not self._closed:
            self.drop()
            self._left(self, self._group)

    # --- for the log and the group ------------------------------------------------------------------------

    def drop(self) -> None:
        """Own nothing any more; a fetch that waits returns."""
        self._closed = True
        self._positions.clear()
        self._awake.set()

    def wake(self, places: Collection[TopicPartition]) -> None:
        """Something was appended at `places`."""
        if not self._positions.keys().isdisjoint(places):
            self._awake.set()

    async def revoke(self, places: frozenset[TopicPartition]) -> None:
        """Return no more records of `places`, let the owner drain and commit, then let go of them."""
        if not places:
            return
        self._leaving = places
        try:
            if self._on_revoke is not None:
                await self._on_revoke(places)
        except Exception:  # the owner's fault must not keep the partition from the others
            log.exception("consumer.revoke_failed")
        finally:
            for place in places:
                self._positions.pop(place, None)
            self._leaving = frozenset()
            self._paused.clear()

    def grant(self, positions: Mapping[TopicPartition, int]) -> None:
        """Own these too, from these offsets on."""
        if positions and not self._closed:
            self._positions.update(positions)
            self._paused.clear()
            self._awake.set()

    def _open(self, place: TopicPartition) -> bool:
        return place not in self._paused and place not in self._leaving

    def _wanted(self) -> list[_Want]:
        """Return where there is something to read; the partitions take turns in being first."""
        ends = self._store.ends
        wants = [
            _Want(place, position, ends[place])
            for place, position in sorted(self._positions.items())
            if position < ends[place] and self._open(place)
        ]
        self._turn += 1
        turn = self._turn % len(wants) if wants else 0
        return wants[turn:] + wants[:turn]

    def _take(self, found: Iterable[tuple[_Want, Sequence[Record]]]) -> list[Record]:
        """Move on, except in partitions that went, were paused or were rewound during the read."""
        taken: list[Record] = []
        for want, records in found:
            if self._positions.get(want.place) == want.start and self._open(want.place):
                # Nothing there although the end is further: what there was has expired.
                self._positions[want.place] = records[-1].offset + 1 if records else want.end
                taken.extend(records)
        return taken


class _Group:
    """The members of one consumer group."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.members: list[SqliteConsumer] = []
        self._dealing = asyncio.Lock()

    def reads(self, place: TopicPartition) -> bool:
        return any(place in member.subscribed for member in self.members)

    async def rebalance(self, start: Callable[[str, TopicPartition], int]) -> None:
        """Deal anew: first everybody lets go of what moves, then it is granted. One dealing at a time.

        Who joins or leaves meanwhile has a dealing of its own waiting.
        """
        async with self._dealing:
            members = tuple(self.members)
            dealt = deal([(member.subscribed, member.assignment()) for member in members])
            async with asyncio.TaskGroup() as revocations:
                for member, places in zip(members, dealt, strict=True):
                    revocations.create_task(member.revoke(member.assignment() - places), name=f"revoke {self.name}")
            for member, places in zip(members, dealt, strict=True):
                member.grant({place: start(self.name, place) for place in places - member.assignment()})


def deal(
    members: Sequence[tuple[frozenset[TopicPartition], frozenset[TopicPartition]]],
) -> list[frozenset[TopicPartition]]:
    """Return who gets what, for members given as (subscribed, owned): even, and what is even stays where it is."""
    dealt: list[set[TopicPartition]] = [set() for _ in members]
    for place in sorted({place for subscribed, _ in members for place in subscribed}):
        readers = [index for index, (subscribed, _) in enumerate(members) if place in subscribed]
        best = min(readers, key=lambda index: (len(dealt[index]), place not in members[index][1]))
        dealt[best].add(place)
    return [frozenset(places) for places in dealt]


@dataclass(frozen=True, slots=True)
class _Want:
    """Records to read: from `start` up to the `end` that was known."""

    place: TopicPartition
    start: int
    end: int


class _Store:
    """The file. Ends and commits are also in memory, as the file has them: the lock makes that sound."""

    def __init__(self, lock: FileLock, database: sqlite3.Connection, reader: sqlite3.Connection) -> None:
        self.ends: dict[TopicPartition, int] = {}
        self._earliest: dict[TopicPartition, int] = {}
        self._committed: dict[tuple[str, TopicPartition], int] = {}
        self._ids: dict[TopicPartition, int] = {}
        self._topics: dict[str, tuple[TopicPartition, ...]] = {}
        self._lock = lock
        self._load(database)
        self._writer = GroupWriter(database, name="event log")
        self._reader = reader
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="event log reader")

    @classmethod
    async def open(cls, path: Path, wanted: Collection[tuple[str, int]]) -> _Store:
        def prepare() -> tuple[FileLock, sqlite3.Connection, sqlite3.Connection]:
            with ExitStack() as undo:
                lock = FileLock(path.with_name(f"{path.name}.lock"))
                undo.callback(lock.release)
                database = open_database(path, _SCHEMA, SCHEMA_VERSION, upgrades={1: _COMPACTION})
                undo.callback(database.close)
                try:
                    database.execute("BEGIN IMMEDIATE")
                    database.executemany("INSERT OR IGNORE INTO partitions (topic, number) VALUES (?, ?)", wanted)
                    database.execute("COMMIT")
                    reader = connect(path)
                except sqlite3.Error as error:
                    raise translate(error) from error
                undo.pop_all()
                return lock, database, reader

        store = cls(*await asyncio.to_thread(prepare))
        topics = {topic for topic, _ in wanted}
        store._topics = {topic: places for topic, places in store._topics.items() if topic in topics}
        return store

    def _load(self, database: sqlite3.Connection) -> None:
        rows = database.execute(
            "SELECT id, topic, number, next, (SELECT min(offset) FROM records WHERE partition = id) FROM partitions"
            " ORDER BY topic, number"
        ).fetchall()
        places: dict[int, TopicPartition] = {}
        for identity, topic, number, end, earliest in rows:
            place = places[identity] = TopicPartition(topic, number)
            self._topics[topic] = (*self._topics.get(topic, ()), place)
            self._ids[place] = identity
            self.ends[place] = end
            self._earliest[place] = end if earliest is None else earliest
        for group, identity, offset in database.execute("SELECT consumers, partition, offset FROM commits"):
            self._committed[group, places[identity]] = offset

    def partitions(self, topic: str) -> tuple[TopicPartition, ...]:
        try:
            return self._topics[topic]
        except KeyError:
            known = ", ".join(sorted(self._topics))
            raise Misconfigured(f"topic {topic!r} does not exist; those that do: {known}") from None

    def check(self, place: TopicPartition) -> None:
        """Raise Misconfigured unless `place` exists."""
        if place not in self.partitions(place.topic):
            raise Misconfigured(f"topic {place.topic!r} has no partition {place.partition}")

    def everywhere(self) -> list[TopicPartition]:
        return [place for places in self._topics.values() for place in places]

    def start(self, group: str, place: TopicPartition) -> int:
        """Return where `group` begins: its commit, else the earliest record."""
        return self._committed.get((group, place), self._earliest[place])

    def groups(self, topic: str) -> set[str]:
        """Return the groups that ever committed on `topic`."""
        return {group for group, place in self._committed if place.topic == topic}

    async def append(
        self, messages: Sequence[Message], done: Callable[[Collection[TopicPartition]], None]
    ) -> Sequence[tuple[TopicPartition, int]]:
        """Append; `done` is told the partitions when the records can be read."""
        places = [self._place(message) for message in messages]

        def appended(result: Sequence[tuple[TopicPartition, int]]) -> None:
            for place, offset in result:
                self.ends[place] = offset + 1
            done(frozenset(places))

        return await self._writer.write(partial(self._insert, messages, places), appended)

    def _place(self, message: Message) -> TopicPartition:
        places = self.partitions(message.topic)
        return places[zlib.crc32(message.key.encode()) % len(places)]

    def _insert(
        self, messages: Sequence[Message], places: Sequence[TopicPartition], database: sqlite3.Connection
    ) -> list[tuple[TopicPartition, int]]:
        following: dict[TopicPartition, int] = {}
        for place, count in Counter(places).items():
            (end,) = database.execute(
                "UPDATE partitions SET next = next + ? WHERE id = ? RETURNING next", (count, self._ids[place])
            ).fetchone()
            following[place] = end - count
        now = time()
        appended: list[tuple[TopicPartition, int]] = []
        rows: list[tuple[int, int, float, str, str, bytes]] = []
        for place, message in zip(places, messages, strict=True):
            offset = following[place]
            following[place] = offset + 1
            appended.append((place, offset))
            headers = json.dumps(dict(message.headers), separators=(",", ":"))
            rows.append((self._ids[place], offset, now, message.key, headers, message.value))
        database.executemany("INSERT INTO records VALUES (?, ?, ?, ?, ?, ?)", rows)
        return appended

    async def commit(self, group: str, offsets: Offsets) -> None:
        rows = [(group, self._ids[place], offset) for place, offset in offsets.items()]

        def store(database: sqlite3.Connection) -> None:
            database.executemany("INSERT OR REPLACE INTO commits VALUES (?, ?, ?)", rows)

        def stored(_: None) -> None:
            self._committed.update({(group, place): offset for place, offset in offsets.items()})

        await self._writer.write(store, stored)

    async def read(self, wants: Sequence[_Want], max_records: int) -> list[tuple[_Want, list[Record]]]:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._reading, self._select, wants, max_records)
        except sqlite3.Error as error:
            raise translate(error) from error

    def _select(self, wants: Sequence[_Want], max_records: int) -> list[tuple[_Want, list[Record]]]:
        found: list[tuple[_Want, list[Record]]] = []
        room = _FETCH_BYTES
        for want in wants:
            rows = self._reader.execute(
                "SELECT offset, timestamp, key, headers, value FROM records WHERE partition = ? AND offset >= ?"
                " ORDER BY offset LIMIT ?",
                (self._ids[want.place], want.start, max_records),
            )
            records: list[Record] = []
            for offset, timestamp, key, headers, value in rows:
                topic, number = want.place.topic, want.place.partition
                records.append(Record(topic, number, offset, key, value, json.loads(headers), timestamp))
                room -= len(value)
                if room <= 0:
                    break
            rows.close()  # ends the read transaction, which would hold up checkpoints
            found.append((want, records))
            max_records -= len(records)
            if max_records <= 0 or room <= 0:
                break
        return found

    async def drop(self, place: TopicPartition, before: int, cutoff: float) -> int:
        """Drop the records of `place` below offset `before` up to the first one not taken before `cutoff`."""

        def delete(database: sqlite3.Connection) -> tuple[int, int]:
            identity = self._ids[place]
            rows = database.execute(
                "SELECT offset, timestamp FROM records WHERE partition = ? AND offset < ? ORDER BY offset LIMIT ?",
                (identity, before, _EXPIRY_CHUNK),
            ).fetchall()
            count = next((index for index, (_, taken) in enumerate(rows) if taken >= cutoff), len(rows))
            if count:
                last = rows[count - 1][0]
                database.execute("DELETE FROM records WHERE partition = ? AND offset <= ?", (identity, last))
            return count, self._first(database, place)

        total = 0
        while count := (await self._writer.write(delete, partial(self._dropped, place)))[0]:
            total += count
        return total

    async def compact(self, place: TopicPartition, before: int, cutoff: float) -> int:
        """Go on through the records below offset `before` and taken before `cutoff`: each drops the older of its key.

        So nothing is looked at twice, and appends pay nothing for it.
        """

        def replace(database: sqlite3.Connection) -> tuple[int, int, bool]:
            identity = self._ids[place]
            rows = database.execute(
                "SELECT offset, key, timestamp FROM records WHERE partition = ? AND offset < ?"
                " AND offset >= (SELECT compacted FROM partitions WHERE id = ?) ORDER BY offset LIMIT ?",
                (identity, before, identity, _EXPIRY_CHUNK),
            ).fetchall()
            count = 0
            following: int | None = None
            for offset, key, taken in rows:
                if taken >= cutoff:
                    break
                following = offset + 1
                older = database.execute(
                    "SELECT offset FROM newest WHERE partition = ? AND key = ?", (identity, key)
                ).fetchone()
                if older is not None:
                    count += database.execute(
                        "DELETE FROM records WHERE partition = ? AND offset = ?", (identity, older[0])
                    ).rowcount
                database.execute("INSERT OR REPLACE INTO newest VALUES (?, ?, ?)", (identity, key, offset))
            if following is not None:
                database.execute("UPDATE partitions SET compacted = ? WHERE id = ?", (following, identity))
            return count, self._first(database, place), following is not None

        total, more = 0, True
        while more:
            count, _, more = await self._writer.write(replace, lambda found: self._dropped(place, found[:2]))
            total += count
        return total

    def _first(self, database: sqlite3.Connection, place: TopicPartition) -> int:
        """Return the earliest offset that is left, -1 if none is."""
        (earliest,) = database.execute(
            "SELECT min(offset) FROM records WHERE partition = ?", (self._ids[place],)
        ).fetchone()
        return -1 if earliest is None else int(earliest)

    def _dropped(self, place: TopicPartition, found: tuple[int, int]) -> None:
        count, earliest = found
        if count:
            self._earliest[place] = self.ends[place] if earliest < 0 else earliest

    async def close(self) -> None:
        await asyncio.to_thread(self._reading.shutdown)
        self._reader.close()
        await self._writer.close()  # the last connection: it folds the write-ahead log into the file
        self._lock.release()
