"""What only KafkaEventLog has: foreign producers, a broker that dies, logins, rebalances, limits of size."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, cast
from uuid import uuid4

import pytest
from aiokafka import AIOKafkaProducer  # type: ignore[import-untyped]  # it has no py.typed
from aiokafka.errors import KafkaError  # type: ignore[import-untyped]  # it has no py.typed
from aiokafka.protocol.group import LeaveGroupRequest  # type: ignore[import-untyped]  # it has no py.typed
from aiokafka.record.util import calc_crc32c  # type: ignore[import-untyped]  # it has no py.typed
from pydantic import SecretStr
from tests.kafka import PASSWORD, USER, Kafka, create_topics, kafka_settings, need_kafka
from typer.testing import CliRunner

from catalens import events, topics
from catalens.domain import Message, Product, Record, TopicPartition
from catalens.engines.kafka import KafkaConsumer, KafkaEventLog
from catalens.errors import InvalidEvent, Misconfigured, Transient
from catalens.settings import Settings
from catalens_standalone import cli_topics

LONG = 60.0
"""Seconds to wait for what is sure to come."""


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kafka]:
    """A broker that these tests may kill."""
    need_kafka()
    with Kafka(tmp_path_factory.mktemp("broker")) as started:
        yield started


@pytest.fixture
async def topic(broker: Kafka) -> str:
    """An empty topic of four partitions."""
    return await new_topic(broker)


@pytest.fixture
async def log(broker: Kafka) -> AsyncIterator[KafkaEventLog]:
    async with opened(kafka_settings(broker.bootstrap)) as log:
        yield log


@pytest.fixture
async def foreign(broker: Kafka) -> AsyncIterator[AIOKafkaProducer]:
    """A producer that knows nothing of Catalens."""
    producer = AIOKafkaProducer(bootstrap_servers=broker.bootstrap)
    await producer.start()
    yield producer
    await producer.stop()


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[KafkaEventLog]:
    log = await KafkaEventLog.open(settings)
    try:
        yield log
    finally:
        await log.close()


async def new_topic(broker: Kafka, partitions: int = 4, **config: str) -> str:
    name = f"topic-{uuid4().hex}"
    await create_topics(broker.bootstrap, {name: partitions}, **config)
    return name


async def everything(log: KafkaEventLog, topic: str) -> list[Record]:
    return [record async for record in log.scan([topic])]


def values(records: Sequence[Record]) -> list[int]:
    return [int(record.value) for record in records]


def numbered(topic: str, first: int, count: int, *, keys: int = 10) -> list[Message]:
    return [Message(topic, f"default|p{number % keys}", str(number).encode()) for number in range(first, first + count)]


# --- foreign producers ------------------------------------------------------------------------------------


async def test_a_foreign_cloud_event_is_decoded_like_ours(
    log: KafkaEventLog, foreign: AIOKafkaProducer, topic: str
) -> None:
    data = {"product_id": "sku-1", "name": "Robe rouge", "price": 20, "currency": "EUR", "their_own": {"field": 1}}
    headers = [("ce_specversion", b"1.0"), ("ce_id", b"42"), ("ce_type", events.UPSERTED.encode()), ("traced", b"\xff")]
    sent = await foreign.send_and_wait(topic, json.dumps(data).encode(), b"default|sku-1", headers=headers)
    consumer = await log.subscribe(f"group-{topic}", [topic])
    (record,) = await consumer.fetch(10, LONG)
    event = events.decode(record)
    assert (event.id, event.tenant, event.key) == ("42", "default", record.key)
    assert isinstance(event.data, Product)
    assert (event.data.name, event.data.version) == ("Robe rouge", sent.timestamp * 1000 + sent.offset % 1000)
    assert record.headers["traced"] == "\\xff"


async def test_of_two_foreign_events_in_one_batch_the_later_one_is_newer(
    log: KafkaEventLog, foreign: AIOKafkaProducer, topic: str
) -> None:
    headers = [("ce_type", events.UPSERTED.encode())]
    batch = foreign.create_batch()
    for name in ("older", "newer"):
        data = json.dumps({"product_id": "sku-1", "name": name}).encode()
        batch.append(timestamp=None, key=b"default|sku-1", value=data, headers=headers)
    await (await foreign.send_batch(batch, topic, partition=0))
    records = [record async for record in log.scan([topic])]
    older, newer = (cast("Product", events.decode(record).data) for record in records)
    assert (older.name, newer.name) == ("older", "newer")
    assert cast("int", newer.version) == cast("int", older.version) + 1


async def test_a_foreign_producer_agrees_on_the_partition(
    log: KafkaEventLog, foreign: AIOKafkaProducer, topic: str
) -> None:
    keys = [f"default|sku-{number}" for number in range(40)]
    ours = [place for place, _ in await log.append([Message(topic, key, b"{}") for key in keys])]
    theirs = [await foreign.send_and_wait(topic, b"{}", key.encode()) for key in keys]
    assert [place.partition for place in ours] == [place.partition for place in theirs]
    # Hashes that Kafka's own tests expect of the Java client.
    hashes = {"21": -973932308, "foobar": -790332482, "a-little-bit-long-string": -985981536}
    placed = await log.append([Message(topic, key, b"{}") for key in hashes])
    assert [place.partition for place, _ in placed] == [(value & 0x7FFFFFFF) % 4 for value in hashes.values()]


async def test_what_a_foreign_producer_left_out_or_garbled_is_an_invalid_event_and_holds_up_nothing(
    log: KafkaEventLog, foreign: AIOKafkaProducer, broker: Kafka
) -> None:
    topic = await new_topic(broker, 1)
    kind = ("ce_type", events.UPSERTED.encode())
    await foreign.send_and_wait(topic, None, b"no value", headers=[kind])
    await foreign.send_and_wait(
        topic, b'{"product_id": "a", "name": "b"}', None, headers=[kind, ("ce_tenant", b"\xff")]
    )
    await foreign.send_and_wait(topic, b'{"product_id": "a", "name": "b"}', b"\xff\xfe", headers=[("ce_type", b"\x80")])
    await foreign.send_and_wait(topic, b"good", b"good")
    records = await everything(log, topic)
    assert [record.key for record in records] == ["no value", "", "\\xff\\xfe", "good"]
    assert [record.value for record in records[:2]] == [b"", b'{"product_id": "a", "name": "b"}']
    for record in records[:3]:
        with pytest.raises(InvalidEvent):
            events.decode(record)
        (copied,) = await log.append([Message(topic, record.key, record.value, record.headers)])  # as a dead letter is
        assert copied[0].topic == topic


async def test_a_header_name_that_nobody_can_read_costs_that_record_only(
    log: KafkaEventLog, foreign: AIOKafkaProducer, broker: Kafka
) -> None:
    topic = await new_topic(broker, 1)
    good = [await foreign.send_and_wait(topic, str(number).encode(), b"k") for number in (0, 1)]
    batch = foreign.create_batch()
    batch.append(timestamp=None, key=b"k", value=b"2", headers=[("NAME", b"")])
    batch.close()
    # Patched below the library, which only writes what it can read: name and checksum.
    data = bytearray(batch._build()).replace(b"NAME", b"\xff\xfe\xfd\xfc")
    data[17:21] = calc_crc32c(data[21:]).to_bytes(4, "big")
    batch._buffer = data
    bad = await (await foreign.send_batch(batch, topic, partition=0))
    await foreign.send_and_wait(topic, b"3", b"k")
    assert bad.offset == good[-1].offset + 1
    consumer = await log.subscribe(f"group-{topic}", [topic])
    records: list[Record] = []
    async with asyncio.timeout(LONG):
        while len(records) < 4:
            records += await consumer.fetch(10, LONG)
    assert [record.offset for record in records] == [0, 1, 2, 3]
    assert [record.value for record in records] == [b"0", b"1", b"", b"3"]
    with pytest.raises(InvalidEvent):
        events.decode(records[2])


# --- a broker that dies -----------------------------------------------------------------------------------


async def test_a_killed_broker_loses_nothing_acknowledged_and_doubles_nothing(broker: Kafka, topic: str) -> None:
    acknowledged: dict[int, tuple[TopicPartition, int]] = {}
    stop = asyncio.Event()

    async def write(log: KafkaEventLog, writer: int) -> None:
        number = writer * 1_000_000
        while not stop.is_set():
            batch = [Message(topic, f"default|{writer}-{part % 5}", str(number + part).encode()) for part in range(20)]
            try:
                places = await log.append(batch)
            except Transient:
                pass  # there or not: nobody was told
            else:
                acknowledged.update(zip(range(number, number + 20), places, strict=True))
            number += 20

    async with opened(kafka_settings(broker.bootstrap)) as log:
        async with asyncio.TaskGroup() as writers:
            for writer in range(4):
                writers.create_task(write(log, writer))
            for _ in range(2):
                before = len(acknowledged)
                await until(lambda before=before: len(acknowledged) > before + 500)
                await asyncio.to_thread(broker.restart)
            before = len(acknowledged)
            await until(lambda: len(acknowledged) > before + 500)
            stop.set()
        records = await everything(log, topic)
    found = {int(record.value): (record.source, record.offset) for record in records}
    assert len(found) == len(records), "a record was written twice"
    assert {number: found.get(number) for number in acknowledged} == acknowledged
    for key in {record.key for record in records}:
        mine = values([record for record in records if record.key == key])
        assert mine == sorted(mine)


async def test_a_broker_that_hangs_is_transient_and_its_return_is_noticed(broker: Kafka, topic: str) -> None:
    async with opened(kafka_settings(broker.bootstrap, request_timeout=2)) as log:
        consumer = await log.subscribe(f"group-{topic}", [topic])
        await log.append(numbered(topic, 0, 10))
        async with asyncio.timeout(LONG):
            while not (records := await consumer.fetch(100, LONG)):
                pass
        broker.freeze()
        try:
            with pytest.raises(Transient):
                await log.append(numbered(topic, 10, 10))
            with pytest.raises(Transient):
                await consumer.commit({records[0].source: records[0].offset + 1})
            with pytest.raises(Transient):
                await log.lag("group", [topic])
            with pytest.raises(Transient):
                await everything(log, topic)
            with pytest.raises(Transient, match="within 2 s"):
                await KafkaEventLog.open(kafka_settings(broker.bootstrap, request_timeout=2))
        finally:
            broker.thaw()

        async def works() -> bool:
            try:
                await log.append(numbered(topic, 20, 10))
            except Transient:
                return False
            return True

        async with asyncio.timeout(LONG):
            while not await works():
                pass
        await consumer.commit({records[0].source: records[0].offset + 1})
        assert set(values(await everything(log, topic))) >= {*range(10), *range(20, 30)}


async def test_closing_does_not_wait_for_a_broker_that_is_gone(broker: Kafka, topic: str) -> None:
    log = await KafkaEventLog.open(kafka_settings(broker.bootstrap, request_timeout=2))
    await log.subscribe(f"group-{topic}", [topic])
    await log.append(numbered(topic, 0, 10))
    broker.kill()
    try:
        with pytest.raises(Transient):
            await log.append(numbered(topic, 10, 10))
        async with asyncio.timeout(LONG):
            await log.close()
    finally:
        await asyncio.to_thread(broker.start)


async def test_nobody_there_is_transient_after_the_request_timeout() -> None:
    with pytest.raises(Transient, match=r"within 0\.5 s"):
        await KafkaEventLog.open(kafka_settings("127.0.0.1:1", request_timeout=0.5))


# --- logins -----------------------------------------------------------------------------------------------


def login(broker: Kafka, **more: Any) -> Settings:
    return kafka_settings(
        broker.secured,
        **{"security_protocol": "SASL_PLAINTEXT", "username": USER, "password": SecretStr(PASSWORD), **more},
    )


@pytest.mark.filterwarnings("ignore:Sending username and password in the clear")
async def test_who_knows_the_password_gets_in(broker: Kafka, topic: str) -> None:
    async with opened(login(broker)) as log:
        await log.append(numbered(topic, 0, 3))
        assert len(await everything(log, topic)) == 3


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"password": SecretStr("wrong")}, "password"), ({"sasl_mechanism": "SCRAM-SHA-256"}, "UnsupportedSaslMechanism")],
)
async def test_who_does_not_is_told_at_once(broker: Kafka, wrong: dict[str, Any], said: str) -> None:
    started = time.monotonic()
    with pytest.raises(Misconfigured, match=said):
        await KafkaEventLog.open(login(broker, **wrong))
    assert time.monotonic() - started < login(broker).kafka.request_timeout


async def test_unreadable_tls_files_are_named(broker: Kafka, tmp_path: Any) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    for file in ("ca.pem", "missing.pem"):
        with pytest.raises(Misconfigured, match="CATALENS_KAFKA__CA_FILE"):
            await KafkaEventLog.open(kafka_settings(broker.bootstrap, security_protocol="SSL", ca_file=tmp_path / file))


# --- size -------------------------------------------------------------------------------------------------


async def test_what_is_too_large_is_refused_before_anything_is_sent(broker: Kafka, topic: str) -> None:
    async with opened(kafka_settings(broker.bootstrap, max_message=10_000)) as log:
        with pytest.raises(InvalidEvent, match="CATALENS_KAFKA__MAX_MESSAGE"):
            await log.append([*numbered(topic, 0, 3), Message(topic, "k", bytes(100_000))])
        assert await everything(log, topic) == []


async def test_what_the_topic_finds_too_large_is_refused_and_the_next_is_taken(
    log: KafkaEventLog, broker: Kafka
) -> None:
    """The broker refuses the batch, which leaves a gap in the producer's sequence numbers."""
    topic = await new_topic(broker, 1, max_message_bytes="2000", compression_type="uncompressed")
    noise = b"".join(uuid4().bytes for _ in range(2000))
    for number in range(3):
        with pytest.raises(InvalidEvent, match=r"max\.message\.bytes"):
            await log.append([Message(topic, "k", noise)])
        await log.append(numbered(topic, number, 1))
    assert values(await everything(log, topic)) == [0, 1, 2]


async def test_a_large_event_makes_the_round(log: KafkaEventLog, broker: Kafka) -> None:
    topic = await new_topic(broker, 1, max_message_bytes=str(9 * 1024 * 1024))
    large = b"".join(uuid4().bytes for _ in range(7 * 65536))
    await log.append([Message(topic, "k", large), Message(topic, "k", b"small")])
    consumer = await log.subscribe(f"group-{topic}", [topic])
    records: list[Record] = []
    async with asyncio.timeout(LONG):
        while len(records) < 2:
            records += await consumer.fetch(10, LONG)
    assert [record.value for record in records] == [large, b"small"]


async def test_more_than_may_be_on_its_way_waits_its_turn(log: KafkaEventLog, broker: Kafka) -> None:
    topic = await new_topic(broker, 4, max_message_bytes=str(9 * 1024 * 1024))
    body = bytes(1024 * 1024)
    await asyncio.gather(*(log.append([Message(topic, str(number), body)] * 3) for number in range(40)))
    ends = await log.lag("group", [topic])
    assert sum(ends.values()) == 120


async def test_no_request_is_larger_than_the_brokers_take(tmp_path: Path) -> None:
    """As Event Hubs do: a broker that closes the connection of whoever sends more, and does so again each time."""
    need_kafka()
    with Kafka(tmp_path, "socket.request.max.bytes=300000") as strict:
        topic = await new_topic(strict, 12)
        settings = kafka_settings(strict.bootstrap, compression="none", max_message=200_000, max_request=250_000)
        async with opened(settings) as log:
            body = bytes(2000)
            many = [Message(topic, f"default|p{number}", body) for number in range(400)]
            few = [Message(topic, f"default|p{number}", bytes(90_000)) for number in range(12)]
            places = [*await log.append(many), *await log.append(few)]
            await asyncio.gather(*(log.append([message]) for message in few))
            assert len(set(places)) == 412
            assert sum((await log.lag("group", [topic])).values()) == 424
            found = {(record.partition, record.offset): record.key for record in await everything(log, topic)}
        assert [found[place.partition, offset] for place, offset in places] == [one.key for one in [*many, *few]]


async def test_a_cancelled_call_of_many_batches_is_whole_or_absent(broker: Kafka) -> None:
    topic = await new_topic(broker, 1)
    settings = kafka_settings(broker.bootstrap, compression="none")
    padding = b" " * 1000
    async with opened(settings) as log:
        await log.append([Message(topic, "k", b"-1")])
        for call in range(20):
            body = [Message(topic, "k", str(call * 1000 + number).encode() + padding) for number in range(600)]
            doomed = asyncio.create_task(log.append(body))
            for _ in range(call):
                await asyncio.sleep(0)
            doomed.cancel()
            await asyncio.gather(doomed, return_exceptions=True)
    async with opened(settings) as log:
        found = values(await everything(log, topic))
    for call in range(20):
        mine = [number for number in found if number // 1000 == call]
        assert mine in ([], list(range(call * 1000, call * 1000 + 600)))
    assert len(found) > 1, "none was begun"


# --- groups -----------------------------------------------------------------------------------------------


async def test_a_rebalance_under_load_loses_nothing(broker: Kafka, topic: str) -> None:
    """Two processes' worth of logs; each member commits what it handled, as the worker does."""
    async with opened(kafka_settings(broker.bootstrap)) as log, opened(kafka_settings(broker.bootstrap)) as other:
        handled: dict[int, int] = {}
        owed: list[dict[TopicPartition, int]] = []
        group = f"group-{topic}"

        async def work(log: KafkaEventLog, stop: asyncio.Event) -> None:
            mine: dict[TopicPartition, int] = {}
            owed.append(mine)

            async def revoked(partitions: Collection[TopicPartition]) -> None:
                await consumer.commit(mine)
                for partition in partitions:
                    mine.pop(partition, None)

            consumer = await log.subscribe(group, [topic], on_revoke=revoked)
            while not stop.is_set():
                for record in await consumer.fetch(50, 0.2):
                    handled[int(record.value)] = handled.get(int(record.value), 0) + 1
                    mine[record.source] = record.offset + 1
            await consumer.commit(mine)
            await consumer.close()

        async with asyncio.TaskGroup() as tasks:
            ends = [asyncio.Event() for _ in range(3)]
            tasks.create_task(work(log, ends[0]))
            for first in range(0, 6000, 500):
                await log.append(numbered(topic, first, 500, keys=40))
                if first == 1500:
                    tasks.create_task(work(other, ends[1]))
                    await until(lambda: len(handled) >= 2000)
                if first == 3000:
                    tasks.create_task(work(other, ends[2]))
                    await until(lambda: len(handled) >= 3500)
                if first == 4500:
                    ends[1].set()
            await until(lambda: len(handled) == 6000)
            for end in ends:
                end.set()
        assert set(handled) == set(range(6000))
        assert set(handled.values()) == {1}, "what was committed on revoke came again"
        assert set((await log.lag(group, [topic])).values()) == {0}


async def test_partitions_take_turns(log: KafkaEventLog, topic: str) -> None:
    await log.append(numbered(topic, 0, 2000, keys=200))
    consumer = await log.subscribe(f"group-{topic}", [topic])
    seen: list[Record] = []
    async with asyncio.timeout(LONG):
        while len(seen) < 200:  # of 500 a partition
            seen += await consumer.fetch(10, LONG)
    assert len({record.partition for record in seen}) == 4


async def test_who_leaves_while_the_group_comes_together_holds_up_nobody(broker: Kafka, topic: str) -> None:
    """Its session would end long after this test has given up."""
    patient = kafka_settings(broker.bootstrap, session_timeout=10 * LONG)
    drained = asyncio.Event()

    async def drain(partitions: Collection[TopicPartition]) -> None:
        await drained.wait()

    async with opened(patient) as log, opened(kafka_settings(broker.bootstrap)) as other:
        first = await other.subscribe(f"group-{topic}", [topic], on_revoke=drain)
        async with asyncio.timeout(LONG):
            while len(first.assignment()) < 4:
                await first.fetch(1, 0.1)
        second = await log.subscribe(f"group-{topic}", [topic])
        async with asyncio.timeout(LONG):
            while await log.members(f"group-{topic}") < 2:
                await second.fetch(1, 0.1)
        await second.close()
        drained.set()
        await log.append(numbered(topic, 0, 1))
        async with asyncio.timeout(LONG):
            while not await first.fetch(1, 1):
                pass


async def test_who_was_put_out_of_the_group_commits_nothing_even_if_nobody_is_left_in_it(
    broker: Kafka, log: KafkaEventLog, topic: str
) -> None:
    """A broker takes what somebody without a membership commits for a group that is empty."""
    group = f"group-{topic}"
    await log.append(numbered(topic, 0, 100))
    seen: list[Record] = []
    revoked, drained = asyncio.Event(), asyncio.Event()

    async def drain(partitions: Collection[TopicPartition]) -> None:
        revoked.set()
        await drained.wait()
        await consumer.commit({record.source: record.offset + 1 for record in seen})

    consumer = await log.subscribe(group, [topic], on_revoke=drain)
    async with asyncio.timeout(LONG):
        while len(seen) < 100:
            seen += await consumer.fetch(100, 1)
        coordinator = consumer.client._coordinator  # as if its session had ended
        leave = LeaveGroupRequest(group, coordinator.member_id)
        await consumer.client._client.send(coordinator.coordinator_id, leave)
        await revoked.wait()
        assert await log.members(group) == 0
        drained.set()
        while not await consumer.fetch(100, 1):  # it has joined again, and gets again what it has not committed
            pass
    assert set((await log.committed(group, [topic])).values()) == {0}


async def test_a_heartbeat_that_failed_is_no_end_of_the_membership(log: KafkaEventLog, topic: str) -> None:
    """aiokafka does not go on with it after an answer that it does not know."""
    consumer = await log.subscribe(f"group-{topic}", [topic])
    await log.append(numbered(topic, 0, 1))
    async with asyncio.timeout(LONG):
        while not await consumer.fetch(10, 1):
            pass
        coordinator = consumer.client._coordinator
        beat = coordinator._do_heartbeat

        async def unknown() -> bool:
            coordinator._do_heartbeat = beat
            raise KafkaError("unexpected")

        coordinator._do_heartbeat = unknown
        with pytest.raises(Transient, match="unexpected"):
            await for_ever(consumer)
        await log.append(numbered(topic, 1, 1))
        seen: list[int] = []
        while 1 not in seen:
            with suppress(Transient):  # it may be told more than once
                seen += values(await consumer.fetch(10, 1))
    assert await log.members(f"group-{topic}") == 1


async def test_a_consumer_that_fetches_no_more_says_so(log: KafkaEventLog, topic: str) -> None:
    consumer = await log.subscribe(f"group-{topic}", [topic])
    await log.append(numbered(topic, 0, 1))
    async with asyncio.timeout(LONG):
        while not await consumer.fetch(10, 1):
            pass

        def broken(_: Any) -> None:
            raise ValueError("a bug")

        consumer.client._fetcher._get_actions_per_node = broken
        await log.append(numbered(topic, 1, 2))
        with pytest.raises(RuntimeError, match="stopped fetching"):
            await for_ever(consumer)
    await consumer.close()


async def for_ever(consumer: KafkaConsumer) -> NoReturn:
    while True:
        await consumer.fetch(10, 1)


async def test_a_cancelled_fetch_does_not_hide_that_the_worker_hangs(log: KafkaEventLog, topic: str) -> None:
    """aiokafka counts the polls that are going on, and takes itself for alive while there is one."""
    consumer = await log.subscribe(f"group-{topic}", [topic])
    await consumer.fetch(1, 0.1)
    fetching = asyncio.create_task(consumer.fetch(1, LONG))
    await asyncio.sleep(0.01)
    fetching.cancel()
    await asyncio.gather(fetching, return_exceptions=True)
    await asyncio.sleep(0.01)
    assert 0 < consumer.client._subscription.fetcher_idle_time < LONG


async def test_one_worker_gets_the_same_partition_of_every_topic(broker: Kafka, log: KafkaEventLog) -> None:
    """So that a product's content and offer are written by one worker, not by two that get in each other's way."""
    one, two = await new_topic(broker), await new_topic(broker)
    consumers = [await log.subscribe(f"group-{one}", [one, two]) for _ in range(3)]
    async with asyncio.timeout(LONG):
        while sorted(len(consumer.assignment()) for consumer in consumers) != [2, 2, 4]:
            await asyncio.gather(*(consumer.fetch(1, 0.1) for consumer in consumers))
    for consumer in consumers:
        owned = consumer.assignment()
        assert {place.partition for place in owned if place.topic == one} == {
            place.partition for place in owned if place.topic == two
        }


async def test_records_of_a_compacted_topic_are_not_discarded(log: KafkaEventLog, broker: Kafka) -> None:
    topic = await new_topic(broker, 1, cleanup_policy="compact")
    await log.append(numbered(topic, 0, 3))
    with pytest.raises(Misconfigured, match="compacted"):
        await log.discard({TopicPartition(topic, 0): 2})


# --- topics -----------------------------------------------------------------------------------------------


async def test_topics_are_made_changed_and_never_shrunk(broker: Kafka) -> None:
    before = await topics.existing(kafka_settings(broker.bootstrap))
    assert before == {}
    with pytest.raises(Misconfigured, match="InvalidReplicationFactor"):  # with one broker
        await topics.apply(kafka_settings(broker.bootstrap, partitions=3, replication=2))
    settings = kafka_settings(broker.bootstrap, partitions=3)
    assert {action.kind for action in await topics.apply(settings, dry_run=True)} == {"create"}
    assert await topics.existing(settings) == {}
    for actions in await asyncio.gather(*(topics.apply(settings) for _ in range(3))):  # who comes second does no harm
        assert {action.kind for action in actions} == {"create"}
    await until_async(lambda: has_topics(settings))
    assert {action.kind for action in await topics.apply(settings)} == {"keep"}
    found = await topics.existing(settings)
    for topic in topics.wanted(settings):
        there = found[topic.name]
        assert (there.partitions, there.replication) == (topic.partitions, topic.replication)
        assert {name: there.config[name] for name in topic.config} == topic.config

    more = kafka_settings(broker.bootstrap, partitions=5, compaction_lag_hours=48)
    changed = {action.topic for action in await topics.apply(more) if action.kind == "change"}
    assert changed == {events.PRODUCTS, events.OFFERS, *events.RETRIES}
    await until_async(lambda: same(more))
    found = await topics.existing(more)
    assert found[events.PRODUCTS].partitions == 5
    assert found[events.PRODUCTS].config[topics.COMPACTION_LAG] == str(48 * 3_600_000)
    assert found[events.PRODUCTS].config[topics.CLEANUP] == "compact"  # stated again with the change

    with pytest.raises(Misconfigured, match="CATALENS_KAFKA__PARTITIONS to 5"):
        await topics.apply(settings)


def test_the_commands_say_what_they_did(broker: Kafka, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CATALENS_KAFKA__BOOTSTRAP_SERVERS", broker.bootstrap)
    monkeypatch.setenv("CATALENS_KAFKA__REPLICATION", "1")
    monkeypatch.setenv("COLUMNS", "200")
    said = CliRunner().invoke(cli_topics.app, ["apply", "--dry-run"], catch_exceptions=False)
    assert said.exit_code == 0
    assert "would be" in said.output
    assert events.PRODUCTS in CliRunner().invoke(cli_topics.app, ["apply"], catch_exceptions=False).output
    deadline = time.monotonic() + LONG
    while "would be" in CliRunner().invoke(cli_topics.app, ["apply", "--dry-run"], catch_exceptions=False).output:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    shown = CliRunner().invoke(cli_topics.app, [], catch_exceptions=False).output
    assert events.DEAD_LETTERS in shown
    assert "21 days" in shown


async def has_topics(settings: Settings) -> bool:
    return len(await topics.existing(settings)) == len(events.TOPICS)


async def same(settings: Settings) -> bool:
    return {action.kind for action in await topics.apply(settings, dry_run=True)} == {"keep"}


async def until(true: Any) -> None:
    async with asyncio.timeout(LONG):
        while not true():
            await asyncio.sleep(0.01)


async def until_async(true: Any) -> None:
    async with asyncio.timeout(LONG):
        while not await true():
            await asyncio.sleep(0.05)
