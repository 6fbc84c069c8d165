"""Writes docs/reference/asyncapi.json, the event contract, from the models that decode the events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import models_json_schema

from catalens import events
from catalens.domain import Deletion, OfferChange, Product, Tenant

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference" / "asyncapi.json"

_REF = "#/components/schemas/{model}"
_TEXT: Final = {"type": "string"}
_MESSAGES: Final[Mapping[str, tuple[type[BaseModel], str, str]]] = {
    events.UPSERTED: (Product, events.PRODUCTS, "A whole product. Newest `version` wins, whatever the order."),
    events.DELETED: (Deletion, events.PRODUCTS, "The product is gone as of `version`."),
    events.OFFER_CHANGED: (OfferChange, events.OFFERS, "New price, currency or stock; what is not set stays."),
}
_CHANNELS: Final[Mapping[str, str]] = {
    events.PRODUCTS: "Contents and deletions, keyed by tenant|product_id.",
    events.OFFERS: "Offers, keyed by tenant|product_id; they cost no inference.",
}


def document() -> dict[str, Any]:
    """Return the AsyncAPI 3.0 document."""
    models = [(model, "validation") for model, _, _ in _MESSAGES.values()]
    _, definitions = models_json_schema(models, ref_template=_REF)  # type: ignore[arg-type]  # a Literal in a tuple
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Catalens events",
            "version": "1",
            "description": (
                "CloudEvents 1.0 in the Kafka protocol binding's binary mode: attributes in `ce_` headers, "
                "the value is the JSON data. A producer may write these directly. Unknown fields are ignored, "
                "so that old and new events decode for ever."
            ),
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "channels": {
            topic: {
                "address": topic,
                "description": description,
                "messages": {
                    kind: {"$ref": f"#/components/messages/{kind}"}
                    for kind, (_, home, _) in _MESSAGES.items()
                    if home == topic
                },
            }
            for topic, description in _CHANNELS.items()
        },
        "operations": {
            f"consume-{topic}": {"action": "receive", "channel": {"$ref": f"#/channels/{topic}"}} for topic in _CHANNELS
        },
        "components": {
            "messages": {kind: _message(kind, model, text) for kind, (model, _, text) in _MESSAGES.items()},
            "schemas": definitions["$defs"],
        },
    }


def _message(kind: str, model: type[BaseModel], text: str) -> dict[str, Any]:
    return {
        "name": kind,
        "summary": text,
        "headers": {
            "type": "object",
            "required": ["ce_type"],
            "properties": {
                "ce_specversion": {"const": "1.0"},
                "ce_id": _TEXT | {"description": "topic/partition/offset when left out"},
                "ce_type": {"const": kind},
                "ce_source": _TEXT,
                "ce_time": _TEXT | {"format": "date-time"},
                "ce_tenant": TypeAdapter(Tenant).json_schema() | {"default": "default"},
                "content-type": {"const": "application/json"},
                "ce_awaited": {"const": "true", "description": f"report what became of it on {events.OUTCOMES}"},
                "ce_traceparent": _TEXT,
            },
        },
        "payload": {"$ref": _REF.format(model=model.__name__)},
        "bindings": {"kafka": {"key": _TEXT | {"description": "tenant|product_id"}}},
    }


def text() -> str:
    """Return the file's content."""
    return json.dumps(document(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    REFERENCE.write_text(text(), encoding="utf-8")
