"""How a product of the catalogue's export and the indexed one are compared."""

from __future__ import annotations

import json
from base64 import b64encode
from typing import Any

import pytest

from catalens.domain import sha256_hex
from catalens_standalone.reconciling import difference, state_of

INDEXED = {"product_id": "p", "name": "Red shoe", "version": 5, "price": 10.0, "currency": "EUR", "offer_version": 7}


def compared(wanted: dict[str, Any], indexed: dict[str, Any] = INDEXED) -> str | None:
    _, ours = state_of(json.dumps(wanted).encode(), indexed=False)
    _, theirs = state_of(json.dumps(indexed).encode(), indexed=True)
    finding = difference("p", ours, theirs)
    return finding.kind if finding else None


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({}, None),
        ({"version": 6}, "older"),
        ({"version": 4}, "newer"),
        ({"name": "Blue shoe"}, "differs"),
        ({"attributes": {"color": "red"}}, "differs"),
        ({"price": 11.0, "offer_version": 8}, "differs"),
        ({"price": 9.0, "offer_version": 6}, "newer"),
        ({"description": ""}, None),
    ],
)
def test_what_differs_is_told(change: dict[str, Any], kind: str | None) -> None:
    assert compared({**INDEXED, **change}) == kind


def test_an_export_without_versions_and_offers_compares_the_content_only() -> None:
    assert compared({"product_id": "p", "name": "Red shoe"}) is None
    assert compared({"product_id": "p", "name": "Red shoes"}) == "differs"


def test_uploaded_pictures_are_the_same_by_their_bytes() -> None:
    sent = {**INDEXED, "images": [{"data": b64encode(b"picture").decode()}]}
    assert compared(sent, {**INDEXED, "images": [{"blob": sha256_hex(b"picture")}]}) is None
    assert compared(sent, {**INDEXED, "images": [{"data": b64encode(b"another").decode()}]}) == "differs"
    assert compared(sent) == "differs"


def test_a_line_that_is_no_product_is_refused() -> None:
    with pytest.raises(ValueError, match="name"):
        state_of(b'{"product_id": "p"}', indexed=False)
