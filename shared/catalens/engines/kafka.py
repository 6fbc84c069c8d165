"""KafkaEventLog: the event log on Apache Kafka, for any number of processes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Final, TypeAlias, TypeVar

import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer  # type: ignore[import-untyped]  # it has no py.typed
from aiokafka import TopicPartition as KafkaPlace
from aiokafka import errors as kafka_errors
from aiokafka.abc import ConsumerRebalanceListener  # type: ignore[import-untyped]  # as above
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete  # type: ignore[import-untyped]  # as above
from aiokafka.coordinator.assignors.range import RangePartitionAssignor  # type: ignore[import-untyped]  # as above
from aiokafka.partitioner import murmur2  # type: ignore[import-untyped]  # as above
from aiokafka.protocol.group import LeaveGroupRequest  # type: ignore[import-untyped]  # as above
from aiokafka.structs import ConsumerRecord  # type: ignore[import-untyped]  # as above

from catalens.domain import Message, Offsets, Record, TopicPartition
from catalens.errors import Conflict, InvalidEvent, Misconfigured, NoTopic, Transient
from catalens.kafka_client import ONWARD_BYTES, RETRY_SECONDS, connection, largest, start_client, translate
from catalens.ports import RevokeCallback
from catalens.settings import Settings

log = structlog.get_logger(__name__)

T = TypeVar("T")
_Encoded: TypeAlias = tuple[str, bytes, bytes, list[tuple[str, bytes]]]

_BATCH_BYTES: Final = 256 * 1024
_RECORD_OVERHEAD: Final = 128
_HEADER_OVERHEAD: Final = 10
_FETCH_WAIT_MS: Final = 100
"""A fetch that waits at the broker delays the next one of every other partition there by as much."""
_MAX_POLL_SECONDS: Final = 300.0
"""A worker that has not polled for this long hangs, and loses its partitions."""
_SLICE_SECONDS: Final = 0.5
_STOP_SECONDS: Final = 5.0
_SCAN_RECORDS: Final = 500
_MANY: Final = 32
"""So many records of one call are sent as whole batches; fewer share theirs with other calls."""


class KafkaEventLog:
    """An EventLog on Kafka: acknowledged means in every in-sync replica. Retention and compaction are the topics'.

    After Transient from `append` the records may be there or not, or come later, but none of them twice.
    """

    def __init__(self, settings: Settings, options: Mapping[str, Any]) -> None:
        """Made by `open`."""
        self._kafka = settings.kafka
        self._options = options
        # Members are waited for while they drain; the dead are noticed by their session.
        self._rebalance = max(
            settings.kafka.session_timeout, settings.embedder.drain_deadline + settings.kafka.request_timeout
        )
        self._admin = AIOKafkaAdminClient(**options)
        self._reader = AIOKafkaConsumer(**options, enable_auto_commit=False)
        self._producer: AIOKafkaProducer | None = None
        self._starting = asyncio.Lock()
        self._room = _Room(settings.kafka.max_request)
        self._in_turn = asyncio.Lock()
        self._topics: dict[str, int] = {}
        self._consumers: set[KafkaConsumer] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    @classmethod
    async def open(cls, settings: Settings, *, required: Collection[str] = ()) -> KafkaEventLog:
        """Connect; raises Transient if no broker answers within the request timeout, Misconfigured if one refuses, and
        NoTopic if one of the topics that are `required` does not exist."""
        log = cls(settings, await connection(settings.kafka))
        try:
            await start_client(log._admin, settings.kafka, log._options)
            await start_client(log._reader, settings.kafka, log._options)
            await log._started_producer()
            await log._check(required)
        except BaseException:
            await log.close()
            raise
        return log

    # --- writing ------------------------------------------------------------------------------------------

    async def append(self, messages: Sequence[Message]) -> Sequence[tuple[TopicPartition, int]]:
        """Append in order; see EventLog.append. Raises InvalidEvent for an event that is larger than its topic takes.

        It waits while too much is on its way, and sends in parts what is too much by itself. A call that was cancelled
        goes on in the background.
        """
        if self._closed:
            raise Transient("the event log is closed")
        if not messages:
            return ()
        await self._check({message.topic for message in messages})
        parts: list[list[_Encoded]] = [[]]
        sizes = [0]
        for record in map(_encode, messages):
            size = _size(record)
            if size > self._kafka.max_message and size > (most := largest(record[0], self._kafka)):
                raise InvalidEvent(f"the event has {size:,} bytes, more than {most:,} (CATALENS_KAFKA__MAX_MESSAGE)")
            if parts[-1] and sizes[-1] + size > self._kafka.max_request:
                parts.append([])
                sizes.append(0)
            parts[-1].append(record)
            sizes[-1] += size
        return await asyncio.shield(self._spawn(self._send_parts(parts, sizes), "kafka.append"))

    async def _send_parts(
        self, parts: Sequence[Sequence[_Encoded]], sizes: Sequence[int]
    ) -> list[tuple[TopicPartition, int]]:
        """Send one after the other what together is more than a request may hold."""
        return [place for part, size in zip(parts, sizes, strict=True) for place in await self._send(part, size)]

    async def _send(self, records: Sequence[_Encoded], size: int) -> list[tuple[TopicPartition, int]]:
        futures: list[asyncio.Future[Any]] = []
        producer: AIOKafkaProducer | None = None
        try:
            async with asyncio.timeout(self._kafka.request_timeout), self._room.take(size):
                producer = await self._started_producer()
                counts = {
                    topic: len(await producer.partitions_for(topic)) for topic in {topic for topic, *_ in records}
                }
                # As every producer of Kafka does by default; left to do it, aiokafka makes two lists a record.
                partitions = [(murmur2(key) & 0x7FFFFFFF) % counts[topic] for topic, key, *_ in records]
                if len(records) < _MANY:
                    places = await _send_each(producer, records, partitions, futures)
                else:
                    async with self._in_turn:  # aiokafka gives up too early where many wait for one partition
                        places = await _send_batches(producer, records, partitions, futures)
                done = await asyncio.gather(*futures)
        except TimeoutError as error:
            raise Transient(f"Kafka has not acknowledged within {self._kafka.request_timeout:g} s") from error
        except kafka_errors.KafkaError as error:
            for future in futures:
                future.cancel()  # nobody is there for their errors
            if producer is not None and not isinstance(error, kafka_errors.KafkaTimeoutError):
                self._retire(producer)
            raise translate(error) from error
        return [
            (TopicPartition(topic, partition), done[number].offset + behind)
            for (topic, *_), partition, (number, behind) in zip(records, partitions, places, strict=True)
        ]

    async def _started_producer(self) -> AIOKafkaProducer:
        async with self._starting:
            if self._producer is None:
                producer = AIOKafkaProducer(
                    **self._options,
                    acks="all",
                    enable_idempotence=True,
                    compression_type=None if self._kafka.compression == "none" else self._kafka.compression,
                    linger_ms=round(self._kafka.linger * 1000),
                    max_batch_size=min(_BATCH_BYTES, self._kafka.max_message),
                    max_request_size=self._kafka.max_message + ONWARD_BYTES,
                )
                try:
                    await start_client(producer, self._kafka, self._options)
                except BaseException:
                    await _stop_producer(producer)
                    raise
                self._producer = producer
            return self._producer

    def _retire(self, producer: AIOKafkaProducer) -> None:
        """Let the next call start another one: a batch that was refused leaves a gap in the sequence numbers, for
        which the broker then refuses everything that follows it."""
        if self._producer is producer:
            self._producer = None
            self._spawn(_stop_producer(producer), "kafka.retire")

    # --- reading ------------------------------------------------------------------------------------------

    async def subscribe(
        self, group: str | None, topics: Sequence[str], *, on_revoke: RevokeCallback | None = None
    ) -> KafkaConsumer:
        """Begin to join `group`; the partitions come while fetching. A rebalance takes all of them from everybody for
        a moment, as aiokafka knows no cooperative one, so `on_revoke` is told of those too that come back."""
        places = await self._places(topics)
        if group is None:
            ends = await self._ask(lambda: self._reader.end_offsets(_theirs(places)))
            return await self._read_from({_ours(place): offset for place, offset in ends.items()})
        consumer = KafkaConsumer(
            AIOKafkaConsumer(
                **{**self._options, "request_timeout_ms": round((self._rebalance + 5) * 1000)},  # joins take that long
                group_id=group,
                enable_auto_commit=False,
                auto_offset_reset="earliest",
                # The same partition of every topic goes to one worker, so one product is written by one at a time.
                partition_assignment_strategy=(RangePartitionAssignor,),
                session_timeout_ms=round(self._kafka.session_timeout * 1000),
                heartbeat_interval_ms=round(self._kafka.session_timeout * 100),
                rebalance_timeout_ms=round(self._rebalance * 1000),
                max_poll_interval_ms=round(_MAX_POLL_SECONDS * 1000),
                fetch_max_wait_ms=_FETCH_WAIT_MS,
            ),
            group,
            timeout=self._kafka.request_timeout,
            left=self._consumers.discard,
        )
        await self._open(consumer)
        consumer.join(topics, on_revoke)
        return consumer

    async def _read_from(self, positions: Offsets) -> KafkaConsumer:
        consumer = KafkaConsumer(
            AIOKafkaConsumer(
                **self._options,
                enable_auto_commit=False,
                auto_offset_reset="earliest",
                fetch_max_wait_ms=_FETCH_WAIT_MS,
            ),
            None,
            timeout=self._kafka.request_timeout,
            left=self._consumers.discard,
        )
        await self._open(consumer)
        consumer.assign(positions)
        return consumer

    async def _open(self, consumer: KafkaConsumer) -> None:
        self._consumers.add(consumer)
        try:
            await start_client(consumer.client, self._kafka, self._options)
        except BaseException:
            await consumer.close()
            raise

    async def scan(self, topics: Sequence[str], *, start: Offsets | None = None) -> AsyncIterator[Record]:
        """Iterate what is there now; see EventLog.scan."""
        places = await self._places(topics)
        earliest = await self._earliest(places)
        found = await self._ask(lambda: self._reader.end_offsets(_theirs(places)))
        ends = {_ours(place): offset for place, offset in found.items()}
        begin = {place: max(first, (start or {}).get(place, 0)) for place, first in earliest.items()}
        left = {place: offset for place, offset in begin.items() if offset < ends[place]}
        if not left:
            return
        consumer = await self._read_from(left)
        silent_since = time.monotonic()
        try:
            while left:
                records = await consumer.fetch(_SCAN_RECORDS, _SLICE_SECONDS)
                for record in records:
                    if record.offset < ends[record.source]:
                        yield record
                positions = await self._ask(partial(consumer.positions, left))
                if positions != left:
                    silent_since = time.monotonic()
                elif time.monotonic() - silent_since > self._kafka.request_timeout:
                    raise Transient(f"Kafka is away: a scan got nothing for {self._kafka.request_timeout:g} s")
                left = {place: offset for place, offset in positions.items() if offset < ends[place]}
                consumer.pause(positions.keys() - left.keys())
        finally:
            await consumer.close()

    # --- asking and steering ------------------------------------------------------------------------------

    async def discard(self, before: Offsets) -> None:
        """Drop what is below the offsets; of a topic that is only compacted Kafka drops nothing (Misconfigured)."""
        if not before:
            return
        ends = await self._ask(lambda: self._reader.end_offsets(_theirs(before)))
        wanted = {place: RecordsToDelete(min(end, before[_ours(place)])) for place, end in ends.items()}
        try:
            await self._ask(lambda: self._admin.delete_records(wanted))
        except kafka_errors.PolicyViolationError as error:
            raise Misconfigured("records of a compacted topic cannot be dropped") from error

    async def committed(self, group: str, topics: Sequence[str]) -> Mapping[TopicPartition, int]:
        """Return where `group` goes on; what was committed and has expired since counts as the earliest record."""
        places = await self._places(topics)
        stored = await self._ask(lambda: self._stored(group, places))
        earliest = await self._earliest(places)
        return {place: max(earliest[place], stored[place]) for place in places}

    async def set_committed(self, group: str, offsets: Offsets) -> None:
        """Durably store where `group` goes on; the broker refuses it while there are members (Conflict)."""
        if not offsets:
            return
        consumer = AIOKafkaConsumer(**self._options, group_id=group, enable_auto_commit=False)
        try:
            await start_client(consumer, self._kafka, self._options)
            consumer.assign([_their(place) for place in offsets])
            stored = {_their(place): offset for place, offset in offsets.items()}
            await self._ask(lambda: consumer.commit(stored))
        except kafka_errors.CommitFailedError as error:
            raise Conflict(f"group {group!r} has members: stop them first") from error
        finally:
            await _stop_consumer(consumer)

    async def members(self, group: str) -> int:
        """Return how many members `group` has, in any process."""

        async def describe() -> int:
            (answer,) = await self._admin.describe_consumer_groups([group])
            (described,) = answer.groups
            code, members = described[0], described[5]
            if code:
                raise kafka_errors.for_code(code)
            return len(members)

        return await self._ask(describe)

    async def expire(self, now: float) -> int:  # noqa: ARG002  # the brokers look at their own clocks
        """Return 0: the brokers drop and compact by the configuration of the topics."""
        return 0

    async def lag(self, group: str, topics: Sequence[str]) -> Mapping[TopicPartition, int]:
        """Return how many records `group` has still to commit, per partition."""
        following = await self.committed(group, topics)
        ends = await self._ask(lambda: self._reader.end_offsets(_theirs(following)))
        return {place: max(0, ends[_their(place)] - offset) for place, offset in following.items()}

    async def close(self) -> None:
        """Finish the appends that were taken, leave the groups, disconnect; may be called twice."""
        self._closed = True
        await asyncio.gather(*(consumer.close() for consumer in tuple(self._consumers)))
        await asyncio.gather(*self._tasks, return_exceptions=True)  # each ends within the request timeout
        if self._producer is not None:
            producer, self._producer = self._producer, None
            await _stop_producer(producer)
        await _stop_consumer(self._reader)
        await self._admin.close()

    async def _ask(self, question: Callable[[], Awaitable[T]]) -> T:
        """Return the answer, asking again while a broker or coordinator is not there, for the request timeout.

        Errors that only some questions can have are raised as they are.
        """
        if self._closed:
            raise Transient("the event log is closed")
        last: Exception | None = None
        try:
            async with asyncio.timeout(self._kafka.request_timeout):
                while True:
                    try:
                        return await question()
                    except (kafka_errors.CommitFailedError, kafka_errors.PolicyViolationError):
                        raise
                    except kafka_errors.KafkaError as error:
                        if not error.retriable:
                            raise translate(error) from error
                        last = error
                    await asyncio.sleep(RETRY_SECONDS)
        except TimeoutError:
            raise Transient(f"Kafka is away: no answer within {self._kafka.request_timeout:g} s") from last

    async def _check(self, topics: Collection[str], *, fresh: bool = False) -> None:
        """Raise Misconfigured unless the topics exist; the cluster is asked if `fresh` or one is not known yet."""
        if not fresh and all(topic in self._topics for topic in topics):
            return
        # All of them: asking for one by name would make it where brokers create topics by themselves.
        described = await self._ask(self._admin.describe_topics)
        self._topics = {topic["topic"]: len(topic["partitions"]) for topic in described}
        for topic in topics:
            if topic not in self._topics:
                raise NoTopic(f"topic {topic!r} does not exist on Kafka: run `catalens topics apply`")

    async def _places(self, topics: Sequence[str]) -> list[TopicPartition]:
        await self._check(topics, fresh=True)  # partitions may have been added
        return [TopicPartition(topic, number) for topic in topics for number in range(self._topics[topic])]

    async def _earliest(self, places: Collection[TopicPartition]) -> dict[TopicPartition, int]:
        found = await self._ask(lambda: self._reader.beginning_offsets(_theirs(places)))
        return {_ours(place): offset for place, offset in found.items()}

    async def _stored(self, group: str, places: Collection[TopicPartition]) -> dict[TopicPartition, int]:
        found = await self._admin.list_consumer_group_offsets(group, partitions=_theirs(places))
        if len(found) < len(places):  # what aiokafka makes of a coordinator that does not answer for the group yet
            raise kafka_errors.GroupCoordinatorNotAvailableError
        return {_ours(place): stored.offset for place, stored in found.items()}

    def _spawn(self, work: Any, name: str) -> asyncio.Task[Any]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # its caller may be gone
        return task


class KafkaConsumer(ConsumerRebalanceListener):  # type: ignore[misc]  # its base is untyped
    """One reader of a KafkaEventLog."""

    def __init__(
        self,
        client: AIOKafkaConsumer,
        group: str | None,
        *,
        timeout: float,
        left: Callable[[KafkaConsumer], None],
    ) -> None:
        """Made by KafkaEventLog; `timeout` is for a commit, in seconds; `left` is called when it closes."""
        self.client = client
        self._group = group
        self._timeout = timeout
        self._left = left
        self._on_revoke: RevokeCallback | None = None
        self._next: dict[KafkaPlace, int] = {}
        """Behind what was returned last, per partition that something was returned of."""
        self._served: set[KafkaPlace] = set()
        self._careful = False
        self._closed = False

    def join(self, topics: Sequence[str], on_revoke: RevokeCallback | None) -> None:
        """Begin to join the group."""
        self._on_revoke = on_revoke
        self.client.subscribe(topics, listener=self)

    def assign(self, positions: Offsets) -> None:
        """Read these from there on, in no group."""
        self.client.assign(_theirs(positions))
        for place, offset in positions.items():
            self.client.seek(_their(place), offset)

    async def fetch(self, max_records: int, timeout: float) -> Sequence[Record]:
        """Return the next records; see EventConsumer.fetch. Empty if the consumer is closed meanwhile.

        While the group rebalances there are none. Raises Misconfigured if the cluster refuses us.
        """
        if self._closed:
            raise RuntimeError("the consumer is closed")
        clock = asyncio.get_running_loop()
        deadline = clock.time() + timeout
        while True:
            # In slices: aiokafka waits for an assignment without end, and for one that closes too.
            left = max(0.0, deadline - clock.time())
            records = await self._get(max_records, min(left, _SLICE_SECONDS))
            if records or self._closed:
                return records
            self._mend()
            if clock.time() >= deadline:
                return records

    async def _get(self, max_records: int, timeout: float) -> Sequence[Record]:
        # Cancelling loses nothing: aiokafka moves its positions in the same step in which it returns the records.
        try:
            async with asyncio.timeout(timeout + 0.05):
                if self._careful:
                    return await self._get_carefully(timeout)
                found = await self._take_turns(max_records, timeout)
        except TimeoutError:
            self._polled()
            return ()
        except asyncio.CancelledError:
            self._polled()
            raise
        except kafka_errors.ConsumerStoppedError:
            return ()
        except UnicodeDecodeError:  # a header's name; nobody says whose
            self._careful = True
            self._polled()
            return ()
        except kafka_errors.KafkaError as error:
            self._polled()
            self._mend()
            raise translate(error) from error
        records: list[Record] = []
        for place, taken in found.items():
            self._next[place] = taken[-1].offset + 1
            records.extend(map(_decode, taken))
        return records

    async def _take_turns(self, max_records: int, timeout: float) -> Mapping[KafkaPlace, Sequence[ConsumerRecord]]:
        """Return what is next, from other partitions than the last times if they have something."""
        found: Mapping[KafkaPlace, Sequence[ConsumerRecord]] = {}
        others = self.client.assignment() - self._served if self._served else ()
        if others:
            found = await self.client.getmany(*others, timeout_ms=0, max_records=max_records)
        if not found:
            self._served.clear()
            found = await self.client.getmany(timeout_ms=round(timeout * 1000), max_records=max_records)
        self._served |= found.keys()
        return found

    async def _get_carefully(self, timeout: float) -> Sequence[Record]:
        """Go record by record until the one is found that aiokafka cannot read; return that one without its bytes."""
        for place in sorted(self.client.assignment()):
            try:
                found = await self.client.getmany(place, timeout_ms=0, max_records=1)
            except UnicodeDecodeError as error:
                self._polled()
                self._careful = False
                offset = await self.client.position(place)
                self.client.seek(place, offset + 1)
                self._next[place] = offset + 1
                log.warning("record.unreadable", topic=place.topic, partition=place.partition, offset=offset)
                unread = {"unreadable": f"a header's name is no UTF-8: {error.reason}"}
                return [Record(place.topic, place.partition, offset, "", b"", unread, time.time())]
            for taken in found.values():
                self._next[place] = taken[-1].offset + 1
                return [_decode(taken[0])]
        await asyncio.sleep(min(timeout, RETRY_SECONDS))
        return ()

    async def commit(self, offsets: Offsets) -> None:
        """Durably store the next offsets to read; what the group has given to others is left alone.

        Raises Transient if that takes longer than the request timeout.
        """
        if self._group is None:
            raise RuntimeError("a reader without a group cannot commit")
        owned = {_their(place): offset for place, offset in offsets.items() if place in self.assignment()}
        if not owned:
            return
        if self.client._coordinator.generation < 0:  # noqa: SLF001  # there is no public way
            # We were put out, and a broker takes such a commit if nobody is left in the group. Whoever relies on there
            # being nobody, as a reindex that switches, would miss what it covers.
            log.warning("commit.refused", group=self._group, error="no member of the group any more")
            return
        try:
            async with asyncio.timeout(self._timeout):
                await self.client.commit(owned)
        except (kafka_errors.CommitFailedError, kafka_errors.IllegalStateError) as error:
            log.warning("commit.refused", group=self._group, error=str(error))  # they are no longer ours
        except TimeoutError as error:
            raise Transient(f"Kafka has not stored a commit within {self._timeout:g} s") from error
        except kafka_errors.KafkaError as error:
            raise translate(error) from error

    def assignment(self) -> frozenset[TopicPartition]:
        """Return the partitions owned now, those being revoked included."""
        return frozenset() if self._closed else frozenset(map(_ours, self.client.assignment()))

    def pause(self, partitions: Collection[TopicPartition]) -> None:
        """Hold back the records of these, as far as they are owned."""
        self.client.pause(*self._owned(partitions))

    def resume(self, partitions: Collection[TopicPartition]) -> None:
        """Undo `pause`."""
        self.client.resume(*self._owned(partitions))

    def rewind(self, record: Record) -> None:
        """Go back to `record`; of several in one partition the earliest counts, one that is not owned does not."""
        place = _their(record.source)
        position = self._next.get(place)
        if position is not None and place in self.client.assignment():
            self._next[place] = min(position, record.offset)
            self.client.seek(place, self._next[place])

    async def positions(self, partitions: Collection[TopicPartition]) -> dict[TopicPartition, int]:
        """Return the offset that is read next, per partition; gaps behind the last record are passed."""
        return {place: await self.client.position(_their(place)) for place in partitions}

    async def close(self) -> None:
        """Leave the group at once, without committing."""
        if not self._closed:
            self._closed = True
            self._left(self)
            await _stop_consumer(self.client)

    async def on_partitions_revoked(self, revoked: Collection[KafkaPlace]) -> None:
        """For aiokafka: have the owner drain and commit."""
        self._next.clear()
        if self._on_revoke is None or not revoked or self._closed:
            return
        try:
            await self._on_revoke(frozenset(map(_ours, revoked)))
        except Exception:  # the owner's fault must not keep the partitions from the others
            log.exception("consumer.revoke_failed", group=self._group)

    async def on_partitions_assigned(self, assigned: Collection[KafkaPlace]) -> None:
        """For aiokafka: begin at the committed offsets."""
        self._next.clear()
        self._served.clear()
        log.info("consumer.assigned", group=self._group, partitions=len(assigned))
        await self._pass_what_is_gone(assigned)

    async def _pass_what_is_gone(self, assigned: Collection[KafkaPlace]) -> None:
        """Commit the earliest offset of partitions whose first records are gone and were never committed, or whose
        commits have expired. Of one that is empty nothing else would ever be committed, and whoever asks the brokers
        for end less committed, as KEDA does, would see a lag for ever."""
        try:
            async with asyncio.timeout(self._timeout):
                earliest = await self.client.beginning_offsets(list(assigned)) if assigned else {}
                cut = [place for place, offset in earliest.items() if offset > 0]
                coordinator = self.client._coordinator  # noqa: SLF001  # the public way asks for each one by itself
                stored = await coordinator.fetch_committed_offsets(cut) if cut else {}
                known = {place: found.offset for place, found in stored.items()}
                gone = {place: earliest[place] for place in cut if known.get(place, -1) < earliest[place]}
                if gone:
                    await self.client.commit(gone)
        except (kafka_errors.KafkaError, TimeoutError) as error:  # the next assignment tries again
            log.warning("consumer.not_passed", group=self._group, error=str(error))

    def _mend(self) -> None:
        """Look after the tasks of aiokafka 0.14, which it does not start again when one has failed: join the group anew
        without a heartbeat, which would be put out of it and never notice; raise if nothing is fetched any more."""
        beats = getattr(self.client._coordinator, "_heartbeat_task", None)  # noqa: SLF001  # there is no public way
        if beats is not None and beats.done():
            self.client._coordinator.request_rejoin()  # noqa: SLF001
        fetches = self.client._fetcher._fetch_task  # noqa: SLF001
        if fetches.done() and not self._closed:
            raise RuntimeError("aiokafka has stopped fetching")

    def _owned(self, partitions: Collection[TopicPartition]) -> list[KafkaPlace]:
        owned = frozenset() if self._closed else self.client.assignment()
        return [place for place in map(_their, partitions) if place in owned]

    def _polled(self) -> None:
        """Note the end of a poll that was cut short: aiokafka 0.14 would take it for one that goes on for ever, and
        never again see that we hang (its fetch_context has no `finally`)."""
        state = self.client._subscription  # noqa: SLF001  # there is no public way
        state._fetch_count = 0  # noqa: SLF001
        state._last_fetch_ended = time.monotonic()  # noqa: SLF001


class _Room:
    """Bytes that may be on their way at once; who finds no room waits in turn. More than all of it goes alone."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._used = 0
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def take(self, size: int) -> AsyncIterator[None]:
        async with self._turn:
            while self._used and self._used + size > self._size:
                self._freed.clear()
                await self._freed.wait()
            self._used += size
        try:
            yield
        finally:
            self._used -= size
            self._freed.set()


def _encode(message: Message) -> _Encoded:
    headers = [(name, value.encode()) for name, value in message.headers.items()]
    return message.topic, message.key.encode(), message.value, headers


def _size(record: _Encoded) -> int:
    _, key, value, headers = record
    named = sum([len(name) + len(text) for name, text in headers])
    return len(key) + len(value) + named + _HEADER_OVERHEAD * len(headers) + _RECORD_OVERHEAD


def _decode(record: ConsumerRecord) -> Record:
    """Return the record as text and bytes; what a foreign producer left out is empty, what is no UTF-8 is escaped."""
    return Record(
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        key=_text(record.key),
        value=record.value or b"",
        headers={name: _text(value) for name, value in record.headers},
        # The broker gives a batch one time, in milliseconds; an event without a version gets its record's time as one,
        # so the offset tells those apart that one batch has of one product. Half a microsecond: no rounding moves it.
        timestamp=(max(0, record.timestamp) * 1000 + record.offset % 1000 + 0.5) / 1_000_000,
    )


def _text(value: bytes | None) -> str:
    return (value or b"").decode(errors="backslashreplace")


def _their(place: TopicPartition) -> KafkaPlace:
    return KafkaPlace(place.topic, place.partition)


def _theirs(places: Collection[TopicPartition]) -> list[KafkaPlace]:
    return [_their(place) for place in places]


def _ours(place: KafkaPlace) -> TopicPartition:
    return TopicPartition(place.topic, place.partition)


async def _send_each(
    producer: AIOKafkaProducer, records: Sequence[_Encoded], partitions: Sequence[int], futures: list[Any]
) -> list[tuple[int, int]]:
    """Send record by record, adding to `futures`; return per record which one is its, and 0."""
    for (topic, key, value, headers), partition in zip(records, partitions, strict=True):
        futures.append(await producer.send(topic, value, key, partition, headers=headers))
    return [(number, 0) for number in range(len(records))]


async def _send_batches(
    producer: AIOKafkaProducer, records: Sequence[_Encoded], partitions: Sequence[int], futures: list[Any]
) -> list[tuple[int, int]]:
    """Send each partition's records as batches of their own, in order, adding to `futures`.

    Return per record which one is its and how far behind that one's offset it lies. It costs half of what a future a
    record does, and no batch waits for company.
    """
    places: list[tuple[int, int]] = [(0, 0)] * len(records)
    filling: dict[tuple[str, int], tuple[Any, list[int]]] = {}

    async def send(topic: str, partition: int) -> None:
        batch, members = filling.pop((topic, partition))
        batch.close()
        for behind, number in enumerate(members):
            places[number] = (len(futures), behind)
        futures.append(await producer.send_batch(batch, topic, partition=partition))

    for number, ((topic, key, value, headers), partition) in enumerate(zip(records, partitions, strict=True)):
        while True:
            if (topic, partition) not in filling:
                filling[topic, partition] = (producer.create_batch(), [])
            batch, members = filling[topic, partition]
            if batch.append(timestamp=None, key=key, value=value, headers=headers) is not None:
                members.append(number)
                break
            await send(topic, partition)  # it is full; an empty one takes any record
    for topic, partition in tuple(filling):
        await send(topic, partition)
    return places


async def _stop_producer(producer: AIOKafkaProducer) -> None:
    """Send what is left and disconnect; what no broker takes within a few seconds is given up."""
    try:
        async with asyncio.timeout(_STOP_SECONDS):
            await producer.stop()
    except (TimeoutError, kafka_errors.KafkaError) as error:
        log.warning("producer.given_up", error=str(error) or repr(error))
        # There is no public way to let go of batches that nobody takes: fail them, so that nobody waits for them.
        producer._message_accumulator.fail_all(kafka_errors.ProducerClosed())  # noqa: SLF001
        task = producer._sender.sender_task  # noqa: SLF001
        if task is not None:
            task.cancel()
            await asyncio.wait([task], timeout=_STOP_SECONDS)
        await producer.client.close()


async def _stop_consumer(consumer: AIOKafkaConsumer) -> None:
    """Leave the group and disconnect."""
    try:
        async with asyncio.timeout(_STOP_SECONDS):
            await asyncio.gather(consumer.stop(), _leave_early(consumer))
    except (TimeoutError, kafka_errors.KafkaError, asyncio.CancelledError) as error:
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            raise
        # Else it is of a fetch that the library itself cancelled and then waited for; it leaves the rest open.
        log.warning("consumer.given_up", error=str(error) or repr(error))
        fetcher = consumer._fetcher  # noqa: SLF001  # there is no public way
        if fetcher is not None:
            with suppress(kafka_errors.KafkaError, asyncio.CancelledError):  # which it has told when it failed
                await fetcher.close()
            for fetch in fetcher._pending_tasks:  # noqa: SLF001  # as above
                fetch.cancel()
            await asyncio.gather(*fetcher._pending_tasks, return_exceptions=True)  # noqa: SLF001  # as above
        await consumer._client.close()  # noqa: SLF001


async def _leave_early(consumer: AIOKafkaConsumer) -> None:
    """Leave a group that is coming together: aiokafka would wait for that, and the group for our session to end."""
    coordinator = consumer._coordinator  # noqa: SLF001  # there is no public way
    if not consumer._group_id or coordinator is None or not coordinator.member_id:  # noqa: SLF001
        return
    if consumer._subscription.reassignment_in_progress and coordinator.coordinator_id is not None:  # noqa: SLF001
        leave = LeaveGroupRequest(coordinator.group_id, coordinator.member_id)
        # On another connection than the one on which the broker holds back the answer to our joining.
        await consumer._client.send(coordinator.coordinator_id, leave)  # noqa: SLF001
