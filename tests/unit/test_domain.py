"""The vocabulary's own rules: what is a valid value, and the ids that never change."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from catalens.domain import (
    ImageRef,
    Product,
    Record,
    TopicPartition,
    assigned_version,
    category_prefixes,
    point_id,
    sha256_hex,
)


def product(**fields: Any) -> Product:
    return Product.model_validate({"product_id": "p", "name": "n", **fields})


def test_point_ids_never_change() -> None:
    """They are stored in every index: another value here means every catalogue is indexed twice."""
    assert str(point_id("default", "allstar-sneakers")) == "a3f272fb-9f93-58a8-b9a5-8391dd5030a3"
    assert point_id("default", "a") != point_id("other", "a")


@pytest.mark.parametrize(
    ("category", "prefixes"),
    [
        (None, ()),
        ("", ()),
        (" > ", ()),
        ("Sport", ("Sport",)),
        ("Sport > Shoes > Running", ("Sport", "Sport > Shoes", "Sport > Shoes > Running")),
        ("Sport>Shoes", ("Sport", "Sport > Shoes")),
        (" Sport >  > Shoes > ", ("Sport", "Sport > Shoes")),
    ],
)
def test_a_category_names_everything_above_it(category: str | None, prefixes: tuple[str, ...]) -> None:
    assert category_prefixes(category) == prefixes


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters=">")), max_size=6))
def test_category_prefixes_are_their_own_prefixes(parts: list[str]) -> None:
    prefixes = category_prefixes(" > ".join(parts))
    for depth, prefix in enumerate(prefixes):
        assert category_prefixes(prefix) == prefixes[: depth + 1]


@pytest.mark.parametrize("product_id", ["a", "A.b_c:d-9", "x" * 128])
def test_product_ids(product_id: str) -> None:
    assert product(product_id=product_id).product_id == product_id


@pytest.mark.parametrize("product_id", ["", "a/b", "a b", "é", "a\n", "x" * 129, 7, None])
def test_what_is_no_product_id(product_id: object) -> None:
    with pytest.raises(ValidationError, match="product_id"):
        product(product_id=product_id)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", "n" * 513),
        ("description", "d" * 20_001),
        ("price", -0.01),
        ("price", float("inf")),
        ("price", float("nan")),
        ("price", True),
        ("currency", "eur"),
        ("currency", "EURO"),
        ("stock", 1.5),
        ("stock", -1),
        ("version", 0),
        ("version", 2**63),
        ("offer_version", True),
        ("images", [{"url": "https://example.com/1.jpg"}] * 17),
        ("attributes", {f"key{number}": 1 for number in range(65)}),
        ("attributes", {"": 1}),
        ("attributes", {"a": {"nested": 1}}),
        ("attributes", {"a": [1]}),
        ("attributes", {"a": float("nan")}),
        ("attributes", {"a": 10**400}),
    ],
)
def test_what_is_no_product(field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=field):
        product(**{field: value})


@pytest.mark.parametrize("value", ["x", True, 7, -3, 0.5, 0, 1, [], ["red", "white"]])
def test_attributes_keep_their_type(value: object) -> None:
    kept = product(attributes={"a": value}).attributes["a"]
    assert kept == value
    assert type(kept) is type(value)


def test_an_attribute_beyond_64_bits_is_a_float() -> None:
    assert type(product(attributes={"a": 2**63}).attributes["a"]) is float


@pytest.mark.parametrize("price", [0, 10, 19.99, 1e308])
def test_prices_are_numbers(price: float) -> None:
    assert product(price=price).price == price


def test_a_product_carries_an_offer_if_it_sets_any_of_its_fields() -> None:
    assert not product(version=3).carries_offer
    for field, value in {"price": None, "currency": "EUR", "stock": 0, "offer_version": 1}.items():
        assert product(**{field: value}).carries_offer


def test_values_are_frozen_and_ignore_what_they_do_not_know() -> None:
    value = product(warranty="2 years")
    assert "warranty" not in value.model_dump()
    with pytest.raises(ValidationError, match="frozen"):
        value.name = "other"  # type: ignore[misc]  # that is the test


@pytest.mark.parametrize(
    "given", [{}, {"url": "https://a/1.jpg", "data": "eA=="}, {"blob": "A" * 64}, {"blob": "ab"}, {"url": ""}]
)
def test_a_picture_is_exactly_one_of_url_data_blob(given: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        ImageRef.model_validate(given)


def test_assigned_versions_are_unix_microseconds() -> None:
    first, second = assigned_version(), assigned_version()
    assert 1_700_000_000_000_000 < first <= second < 2**63


def test_sha256_is_lower_case_hex() -> None:
    assert sha256_hex(b"abc") == hashlib.sha256(b"abc").hexdigest() == sha256_hex(b"abc").lower()


def test_a_record_knows_where_it_came_from() -> None:
    assert Record("t", 3, 9, "k", b"", {}, 0.0).source == TopicPartition("t", 3)
