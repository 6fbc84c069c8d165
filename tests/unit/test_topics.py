"""What `catalens topics apply` decides, case by case."""

from __future__ import annotations

from dataclasses import replace

import pytest

from catalens import events, topics
from catalens.errors import Misconfigured
from catalens.settings import KafkaSettings, LogSettings, Settings
from catalens.topics import Topic

HOUR = 3_600_000


def settings(*, dead_letter_days: float = 21, **kafka: float) -> Settings:
    return Settings(
        _env_file=None,
        kafka=KafkaSettings.model_validate({"partitions": 6, **kafka}),
        log=LogSettings(dead_letter_days=dead_letter_days),
    )


def there(settings: Settings) -> dict[str, Topic]:
    """What a cluster has after `apply`: other values are in force too, and ours are set for the topic."""
    return {
        topic.name: replace(topic, config={"segment.bytes": "1073741824", **topic.config}, own=topic.config)
        for topic in topics.wanted(settings)
    }


def test_every_topic_is_wanted_as_the_contract_says() -> None:
    wanted = {topic.name: topic for topic in topics.wanted(settings())}
    assert tuple(wanted) == events.TOPICS
    for name in (events.PRODUCTS, events.OFFERS):
        assert (wanted[name].partitions, wanted[name].config["cleanup.policy"]) == (6, "compact")
        assert wanted[name].config["min.compaction.lag.ms"] == str(24 * HOUR)
        assert wanted[name].config["max.message.bytes"] == str(8 * 1024 * 1024)
    kept = {events.DEAD_LETTERS: 21 * 24, events.OUTCOMES: 1, **dict.fromkeys(events.RETRIES, 28 * 24)}
    for name, hours in kept.items():
        assert wanted[name].config["cleanup.policy"] == "delete"
        assert wanted[name].config["retention.ms"] == str(hours * HOUR)
        assert int(wanted[name].config["max.message.bytes"]) > 8 * 1024 * 1024  # it carries an event and its reasons
    assert [wanted[name].partitions for name in (*events.RETRIES, events.DEAD_LETTERS, events.OUTCOMES)] == [
        *(6, 6, 6),
        *(1, 1),
    ]


@pytest.mark.parametrize(("replication", "in_sync"), [(1, "1"), (2, "1"), (3, "2"), (5, "4")])
def test_one_broker_may_be_away(replication: int, in_sync: str) -> None:
    for topic in topics.wanted(settings(replication=replication)):
        assert (topic.replication, topic.config["min.insync.replicas"]) == (replication, in_sync)


def test_what_is_missing_is_made_and_what_is_right_is_kept() -> None:
    wanted = topics.wanted(settings())
    found = there(settings())
    del found[events.DEAD_LETTERS]
    actions = topics.plan(wanted, found)
    assert [action.topic for action in actions] == list(events.TOPICS)
    assert {action.topic: action.kind for action in actions} == {
        name: "create" if name == events.DEAD_LETTERS else "keep" for name in events.TOPICS
    }
    assert not any(action.notes for action in actions)


def test_settings_that_differ_are_changed_and_the_operators_own_stay() -> None:
    found = there(settings())
    products = found[events.PRODUCTS]
    own = {**products.own, "cleanup.policy": "delete", "segment.bytes": "1000"}
    found[events.PRODUCTS] = replace(products, config={**products.config, **own}, own=own)
    actions = {action.topic: action for action in topics.plan(topics.wanted(settings()), found)}
    assert {name for name, action in actions.items() if action.kind != "keep"} == {events.PRODUCTS}
    changed = actions[events.PRODUCTS]
    assert changed.notes == ("cleanup.policy delete → compact",)
    assert changed.new.own == {**products.own, "segment.bytes": "1000"}


def test_the_order_of_a_list_does_not_matter() -> None:
    wanted = replace(topics.wanted(settings())[0], config={"cleanup.policy": "compact,delete"})
    found = replace(wanted, config={"cleanup.policy": "delete,compact"})
    assert [action.kind for action in topics.plan([wanted], {wanted.name: found})] == ["keep"]


def test_more_partitions_are_added_with_a_warning() -> None:
    actions = topics.plan(topics.wanted(settings(partitions=12)), there(settings()))
    changed = {action.topic: action for action in actions if action.kind == "change"}
    assert set(changed) == {events.PRODUCTS, events.OFFERS, *events.RETRIES}
    for action in changed.values():
        assert action.new.partitions == 12
        (note,) = action.notes
        assert "keys move" in note


def test_fewer_partitions_are_refused_naming_every_topic() -> None:
    with pytest.raises(Misconfigured) as refusal:
        topics.plan(topics.wanted(settings(partitions=3)), there(settings()))
    for name in (events.PRODUCTS, events.OFFERS, *events.RETRIES):
        assert f"{name} has 6 partitions" in str(refusal.value)
    assert events.DEAD_LETTERS not in str(refusal.value)


def test_a_shorter_retention_is_refused_and_a_longer_one_taken() -> None:
    with pytest.raises(Misconfigured, match=r"catalog\.dlq keeps records for 21 days and only 14 days"):
        topics.plan(topics.wanted(settings(dead_letter_days=14)), there(settings()))
    with pytest.raises(Misconfigured, match=r"catalog\.retry\.10s keeps records for 28 days and only 21 days"):
        topics.plan(topics.wanted(settings(dead_letter_days=14)), there(settings()))
    longer = topics.plan(topics.wanted(settings(dead_letter_days=22)), there(settings()))
    assert {action.topic for action in longer if action.kind == "change"} == {*events.RETRIES, events.DEAD_LETTERS}


def test_records_kept_for_ever_stay_for_ever() -> None:
    found = there(settings())
    letters = found[events.DEAD_LETTERS]
    found[events.DEAD_LETTERS] = replace(letters, config={**letters.config, "retention.ms": "-1"})
    with pytest.raises(Misconfigured, match=r"catalog\.dlq keeps records for ever"):
        topics.plan(topics.wanted(settings()), found)


def test_copies_are_not_changed_and_no_more_must_be_in_sync_than_there_are() -> None:
    actions = topics.plan(topics.wanted(settings(replication=3)), there(settings(replication=1)))
    for action in actions:
        assert action.kind == "keep"
        assert action.new.replication == 1
        assert action.new.config["min.insync.replicas"] == "1"
        (note,) = action.notes
        assert "has 1 copies, not 3" in note
