"""The topics on Kafka: what they should be like, what there is, and how the one becomes the other without a loss."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from catalens import events
from catalens.errors import CatalensError, Misconfigured
from catalens.settings import Settings

# aiokafka is imported where it is used: plans are made without it, and the embedded engines have it not installed.
# ruff: noqa: PLC0415
if TYPE_CHECKING:
    from aiokafka.admin import AIOKafkaAdminClient  # type: ignore[import-untyped]  # it has no py.typed

_HOUR_MS: Final = 3_600_000
_TOPIC_SOURCE: Final = 1
"""Kafka's DYNAMIC_TOPIC_CONFIG: set for this topic and not by default."""
_EXISTS: Final = 36

CLEANUP: Final = "cleanup.policy"
RETENTION: Final = "retention.ms"
COMPACTION_LAG: Final = "min.compaction.lag.ms"
IN_SYNC: Final = "min.insync.replicas"


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic as it is or should be."""

    name: str
    partitions: int
    replication: int
    config: Mapping[str, str]
    """By Kafka's own names: what is wanted, or every value that is in force."""
    own: Mapping[str, str] = field(default_factory=dict)
    """Of one that exists: those that were set for it, which have to be stated again in every change."""


@dataclass(frozen=True, slots=True)
class Action:
    """What is to be done about one topic."""

    topic: str
    kind: Literal["create", "change", "keep"]
    new: Topic
    """What it is afterwards."""
    notes: tuple[str, ...] = ()
    """What changes, and what the operator has to know about it."""


def wanted(settings: Settings) -> tuple[Topic, ...]:
    """Return the topics that Catalens needs, with those settings."""
    from catalens.kafka_client import largest

    kafka, log = settings.kafka, settings.log
    deleted: dict[str, float] = {
        # Longer than a retry can still be applied, so that the worker which comes back late says that it is expired.
        **dict.fromkeys(events.RETRIES, (log.dead_letter_days + 7) * 24),
        events.DEAD_LETTERS: log.dead_letter_days * 24,
        events.OUTCOMES: 1,
    }

    def topic(name: str) -> Topic:
        if name in deleted:
            keeping = {CLEANUP: "delete", RETENTION: str(round(deleted[name] * _HOUR_MS))}
        else:
            keeping = {CLEANUP: "compact", COMPACTION_LAG: str(round(kafka.compaction_lag_hours * _HOUR_MS))}
        config = {
            **keeping,
            "max.message.bytes": str(largest(name, kafka)),
            # A record's time is when the log took it: versions and expiry must not hang on a producer's clock.
            "message.timestamp.type": "LogAppendTime",
            IN_SYNC: str(max(1, kafka.replication - 1)),
        }
        partitions = 1 if name in (events.DEAD_LETTERS, events.OUTCOMES) else kafka.partitions
        return Topic(name, partitions, kafka.replication, config)

    return tuple(map(topic, events.TOPICS))


def plan(wanted: Iterable[Topic], existing: Mapping[str, Topic]) -> list[Action]:
    """Return what makes the existing topics the wanted ones, in their order.

    Raises Misconfigured, naming every topic of which partitions or retention would shrink: that loses records, or
    the order of what is on its way.
    """
    actions: list[Action] = []
    refusals: list[str] = []
    for topic in wanted:
        found = existing.get(topic.name)
        if found is None:
            actions.append(Action(topic.name, "create", topic))
            continue
        refusals.extend(_shrinks(topic, found))
        actions.append(_change(topic, found))
    if refusals:
        raise Misconfigured("; ".join(refusals))
    return actions


def _shrinks(topic: Topic, found: Topic) -> Iterable[str]:
    if topic.partitions < found.partitions:
        yield (
            f"{topic.name} has {found.partitions} partitions and {topic.partitions} are asked for, but partitions "
            f"cannot be taken away: set CATALENS_KAFKA__PARTITIONS to {found.partitions}"
        )
    if RETENTION in topic.config and _longer(found.config.get(RETENTION, "-1"), topic.config[RETENTION]):
        yield (
            f"{topic.name} keeps records for {_days(found.config.get(RETENTION, '-1'))} and only "
            f"{_days(topic.config[RETENTION])} are asked for, which would drop some that were promised: raise "
            f"CATALENS_LOG__RETENTION_HOURS or __DEAD_LETTER_DAYS, or shorten {RETENTION} by Kafka's own tools"
        )


def _change(topic: Topic, found: Topic) -> Action:
    notes: list[str] = []
    config = dict(topic.config)
    if topic.replication != found.replication:
        # What is not there cannot be in sync: writing would stop.
        config[IN_SYNC] = str(max(1, min(topic.replication, found.replication) - 1))
        notes.append(
            f"has {found.replication} copies, not {topic.replication}: only kafka-reassign-partitions can change that"
        )
    changed = {name: value for name, value in config.items() if not _same(found.config.get(name), value)}
    notes.extend(f"{name} {found.config.get(name, '?')} → {value}" for name, value in changed.items())
    more = topic.partitions > found.partitions
    if more:
        notes.append(
            f"partitions {found.partitions} → {topic.partitions}: keys move to other partitions, so for a while events "
            "of one product may be read out of order; their versions keep the index right"
        )
    own = {**found.own, **changed}
    new = Topic(topic.name, topic.partitions, found.replication, {**found.config, **changed}, own)
    return Action(topic.name, "change" if changed or more else "keep", new, tuple(notes))


def _same(found: str | None, value: str) -> bool:
    return found is not None and set(found.split(",")) == set(value.split(","))


def _longer(found: str, value: str) -> bool:
    """Tell whether records are kept longer by `found` than by `value`; -1 is for ever."""
    return int(value) >= 0 and (int(found) < 0 or int(found) > int(value))


def _days(milliseconds: str) -> str:
    return "ever" if int(milliseconds) < 0 else f"{int(milliseconds) / (24 * _HOUR_MS):g} days"


async def existing(settings: Settings) -> dict[str, Topic]:
    """Return those of our topics that there are, by name; raises Transient and Misconfigured as opening the log."""
    async with _admin(settings) as admin:
        return await _existing(admin)


async def apply(settings: Settings, *, dry_run: bool = False) -> Sequence[Action]:
    """Make and change topics as `plan` says, and return what was done or, with `dry_run`, would be; safe to repeat."""
    async with _admin(settings) as admin:
        actions = plan(wanted(settings), await _existing(admin))
        if not dry_run:
            await _create(admin, [action.new for action in actions if action.kind == "create"])
            await _alter(admin, [action.new for action in actions if action.kind == "change"])
        return actions


@asynccontextmanager
async def _admin(settings: Settings) -> AsyncIterator[AIOKafkaAdminClient]:
    if not settings.kafka.bootstrap_servers:
        raise Misconfigured("CATALENS_KAFKA__BOOTSTRAP_SERVERS is not set: the embedded log makes its topics by itself")
    try:
        from aiokafka.admin import AIOKafkaAdminClient
        from aiokafka.errors import KafkaError  # type: ignore[import-untyped]  # it has no py.typed

        from catalens.kafka_client import connection, start_client, translate
    except ModuleNotFoundError as error:
        raise Misconfigured(f"{error.name} is not installed: install catalens[kafka]") from error
    options = await connection(settings.kafka)
    admin = AIOKafkaAdminClient(**options)
    try:
        await start_client(admin, settings.kafka, options)
        yield admin
    except (KafkaError, TimeoutError) as error:
        raise translate(error) from error
    finally:
        await admin.close()


async def _existing(admin: AIOKafkaAdminClient) -> dict[str, Topic]:
    from aiokafka.admin.config_resource import (  # type: ignore[import-untyped]  # it has no py.typed
        ConfigResource,
        ConfigResourceType,
    )

    described = {topic["topic"]: topic["partitions"] for topic in await admin.describe_topics()}
    ours = [name for name in events.TOPICS if name in described]
    if not ours:
        return {}
    found: dict[str, Topic] = {}
    for answer in await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, name) for name in ours]):
        for code, message, _, name, entries in answer.resources:
            _check(name, code, message)
            values = {entry[0]: entry[1] for entry in entries if entry[1] is not None}
            own = {entry[0]: entry[1] for entry in entries if entry[3] == _TOPIC_SOURCE and entry[1] is not None}
            copies = min(len(partition["replicas"]) for partition in described[name])
            found[name] = Topic(name, len(described[name]), copies, values, own)
    return found


async def _create(admin: AIOKafkaAdminClient, topics: Sequence[Topic]) -> None:
    from aiokafka.admin import NewTopic

    if not topics:
        return
    answer = await admin.create_topics(
        [
            NewTopic(topic.name, topic.partitions, topic.replication, topic_configs=dict(topic.config))
            for topic in topics
        ]
    )
    for name, code, *message in answer.topic_errors:
        if code != _EXISTS:  # somebody else did the same at the same time
            _check(name, code, message[0] if message else None)


async def _alter(admin: AIOKafkaAdminClient, topics: Sequence[Topic]) -> None:
    from aiokafka.admin import NewPartitions
    from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

    found = await _existing(admin)
    more = {
        topic.name: NewPartitions(topic.partitions)
        for topic in topics
        if topic.partitions > found[topic.name].partitions
    }
    if more:
        await admin.create_partitions(more)
    changed = [topic for topic in topics if topic.own != found[topic.name].own]
    if changed:
        # The request replaces all that was set for a topic, so all of it is stated.
        resources = [ConfigResource(ConfigResourceType.TOPIC, topic.name, dict(topic.own)) for topic in changed]
        for answer in await admin.alter_configs(resources):
            for code, message, _, name in answer.resources:
                _check(name, code, message)


def _check(topic: str, code: int, message: str | None) -> None:
    """Raise what the broker's answer about `topic` means, if it is an error."""
    if code:
        from aiokafka.errors import for_code

        from catalens.kafka_client import translate

        kind: Any = for_code(code)
        error = kind(message or "")
        problem: CatalensError = translate(error)
        if not error.retriable:  # it does not mend itself: too few brokers for the replication, a policy, no right
            raise Misconfigured(f"{topic}: {error}") from error
        raise problem from error
