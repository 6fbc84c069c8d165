"""The rules of versions, pure and on one point: what a write makes of what is stored, the same on every engine.

Standard library only: `edge_worker.py`, which imports nothing of Catalens, loads this file by its path.

A point's payload is `{tenant, product_id, state, version?, offer, offer_at?, in_stock?, indexed_at, doc?, …fields}`;
`state` is `live`, `deleted` (a tombstone), `offer` (an offer that waits for its product) or, of a point that is not
stored, empty.
Vectors are bytes as the writes carry them (float32; for `lexical` a pair, uint32 indices and float32 values).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Final, Literal, TypeAlias

_OFFER_FIELDS: Final = ("price", "currency", "stock")
Payload: TypeAlias = dict[str, Any]  # JSON as the engine hands it out
Outcome: TypeAlias = Literal["applied", "known", "superseded"]


@dataclass(slots=True)
class Draft:
    """A point while a batch is applied to it. `keeps`: the stored vectors stay, under the new `vectors`."""

    payload: Payload
    vectors: dict[str, Any] = field(default_factory=dict)
    keeps: bool = True
    changed: bool = False


Rule: TypeAlias = Callable[[Draft, Mapping[str, Any]], Outcome]


def short_key(name: str) -> str:
    """Return a payload key without the dots, quotes and brackets that mean something in a JSON path."""
    return "n" + blake2b(name.encode(), digest_size=8).hexdigest()


def absent(item: Mapping[str, Any]) -> Payload:
    """Return the payload from which the first write of a point starts."""
    return {"tenant": item["tenant"], "product_id": item["product_id"], "state": "", "offer": {}}


def apply(rule: Rule, draft: Draft, item: Mapping[str, Any], now: float) -> Outcome:
    """Apply one write to its point at `now` (Unix seconds) and return what became of it."""
    outcome = rule(draft, item)
    # A tombstone keeps the time of its deletion, whatever offers follow.
    if draft.changed and (draft.payload["state"] != "deleted" or rule is put_tombstone):
        draft.payload["indexed_at"] = now
    return outcome


def put_content(draft: Draft, item: Mapping[str, Any]) -> Outcome:
    """Replace the content by a newer one, and merge the offer that it carries."""
    outcome = _compare(item["version"], draft.payload.get("version", 0))
    if outcome == "applied":
        _replace(draft, "live", item["version"])
        draft.payload.update(item["fields"])
        draft.vectors = {name: item[name] for name in ("image", "text", "lexical") if item[name] is not None}
    # Content and offer are versioned apart: an older content may carry a newer offer.
    if item["offer"] is not None:
        put_offer(draft, item)
    return outcome


def put_tombstone(draft: Draft, item: Mapping[str, Any]) -> Outcome:
    """Replace the content by a newer tombstone; the offer stays."""
    outcome = _compare(item["version"], draft.payload.get("version", 0))
    if outcome == "applied":
        _replace(draft, "deleted", item["version"])
    return outcome


def put_offer(draft: Draft, item: Mapping[str, Any]) -> Outcome:
    """Set each stated field that no newer offer has stated, so that the order of arrival does not matter.

    `offer_at` holds the version of those fields that are older than the whole offer's `offer_version`.
    """
    payload, offer = draft.payload, item["offer"]
    stored, version = payload["offer"], offer["offer_version"]
    newest = stored.get("offer_version", 0)
    outcome = _compare(version, newest)
    if outcome == "known":
        return outcome
    at = {name: newest for name in _OFFER_FIELDS if name in stored} | payload.get("offer_at", {})
    fresh = {name: offer[name] for name in _OFFER_FIELDS if name in offer and version > at.get(name, 0)}
    if outcome == "superseded" and not fresh:
        return outcome
    newest = max(version, newest)
    older = {name: seen for name, seen in {**at, **dict.fromkeys(fresh, version)}.items() if seen < newest}
    payload["offer"] = {**stored, **fresh, "offer_version": newest}
    payload.pop("offer_at", None)
    if older:
        payload["offer_at"] = older
    payload["state"] = payload["state"] or "offer"
    payload.pop("in_stock", None)
    stock = payload["offer"].get("stock")
    if stock is not None:
        payload["in_stock"] = int(stock > 0)
    draft.changed = True
    return "applied"


def put_image(draft: Draft, item: Mapping[str, Any]) -> Outcome:
    """Set the picture's vector and status, if the stored content is that very version."""
    payload = draft.payload
    if payload["state"] != "live" or payload["version"] != item["version"]:
        return "superseded"
    payload.pop("image_error", None)
    payload.update(item["fields"])
    if item["image"] is not None:
        draft.vectors["image"] = item["image"]
    draft.changed = True
    return "applied"


def _compare(new: int, stored: int) -> Outcome:
    if new > stored:
        return "applied"
    return "known" if new == stored else "superseded"


def _replace(draft: Draft, state: str, version: int) -> None:
    kept = ("tenant", "product_id", "offer", "offer_at", "in_stock")
    payload = {name: draft.payload[name] for name in kept if name in draft.payload}
    draft.payload = {**payload, "state": state, "version": version}
    draft.vectors, draft.keeps, draft.changed = {}, False, True
