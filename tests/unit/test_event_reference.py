"""The published event contract is what the models say, and every golden event keeps it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from scripts.event_reference import REFERENCE, document, text

from catalens import events

GOLDEN = sorted((Path(__file__).parents[1] / "fixtures" / "events").glob("*/*.json"))


def schema(part: dict[str, Any]) -> dict[str, Any]:
    return {**part, "components": document()["components"]}


def test_the_file_is_in_step() -> None:
    assert REFERENCE.read_text(encoding="utf-8") == text(), "run .venv/bin/python scripts/event_reference.py"


def test_every_reference_leads_somewhere() -> None:
    whole = document()

    def follow(node: object) -> None:
        if isinstance(node, dict):
            if isinstance(reference := node.get("$ref"), str):
                target: Any = whole
                for step in reference.removeprefix("#/").split("/"):
                    target = target[step]
            for child in node.values():
                follow(child)
        elif isinstance(node, list):
            for child in node:
                follow(child)

    follow(whole)


def test_every_event_type_has_its_channel() -> None:
    channels = document()["channels"]
    assert set(channels[events.PRODUCTS]["messages"]) == {events.UPSERTED, events.DELETED}
    assert set(channels[events.OFFERS]["messages"]) == {events.OFFER_CHANGED}


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_golden_events_keep_the_contract(path: Path) -> None:
    golden = json.loads(path.read_text(encoding="utf-8"))
    message = document()["components"]["messages"][path.parent.name]
    jsonschema_rs.validate(schema(message["headers"]), golden["headers"])
    jsonschema_rs.validate(schema(message["payload"]), json.loads(golden["value"]))


def test_a_broken_event_does_not() -> None:
    message = document()["components"]["messages"][events.UPSERTED]
    with pytest.raises(jsonschema_rs.ValidationError):
        jsonschema_rs.validate(schema(message["payload"]), {"product_id": "a/b", "name": "x"})
