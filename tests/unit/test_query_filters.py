"""Filters as a storefront writes them: what the index is asked, and what is refused by name."""

from __future__ import annotations

import pytest

from catalens.domain import Condition, Range
from catalens.problems import Problem
from catalens_query.filters import SCHEMA, translate


@pytest.mark.parametrize(
    ("raw", "condition"),
    [
        ({"brand": "Nike"}, Condition("brand", ("Nike",))),
        ({"brand": ["Nike", "Puma"]}, Condition("brand", ("Nike", "Puma"))),
        ({"category": "Sport>Shoes"}, Condition("category", ("Sport > Shoes",))),
        ({"category": "Sport"}, Condition("category", ("Sport",))),
        ({"category": " > "}, Condition("category", (" > ",))),
        ({"price": 20}, Condition("price", (20,))),
        ({"price": {"gte": 20, "lt": 80.5}}, Condition("price", within=Range(gte=20, lt=80.5))),
        ({"stock": {"gt": 0}}, Condition("stock", within=Range(gt=0))),
        ({"in_stock": True}, Condition("in_stock", (True,))),
        ({"image_status": ["ok", "pending"]}, Condition("image_status", ("ok", "pending"))),
        ({"attributes.color": "red"}, Condition("attributes.color", ("red",))),
        ({"attributes.size": [42, 43.5]}, Condition("attributes.size", (42, 43.5))),
        ({"attributes.vegan": False}, Condition("attributes.vegan", (False,))),
        ({"attributes.weight": {"lte": 3}}, Condition("attributes.weight", within=Range(lte=3))),
        ({"attributes.a.b": "x"}, Condition("attributes.a.b", ("x",))),
        ({"tags.color": ["red", "blue"]}, Condition("tags.color", ("red", "blue"))),
        ({"product_id": ["a", "b"]}, Condition("product_id", ("a", "b"))),
        ({"price": 10**300}, Condition("price", (1e300,))),
    ],
)
def test_a_filter_becomes_its_condition(raw: dict[str, object], condition: Condition) -> None:
    assert translate(raw).conditions == (condition,)


def test_keys_are_and() -> None:
    assert [one.key for one in translate({"brand": "Nike", "in_stock": True}).conditions] == ["brand", "in_stock"]
    assert translate({}).conditions == ()


@pytest.mark.parametrize(
    "raw",
    [
        {"colour": "red"},
        {"attributes.": "red"},
        {"tags.": "red"},
        {"tags.color": 5},
        {"tags.color": {"gte": 5}},
        {"attributes": {"color": "red"}},
        {"tenant": "other"},
        {"brand": 5},
        {"brand": None},
        {"brand": []},
        {"brand": [["Nike"]]},
        {"brand": {"gte": 1}},
        {"price": "20"},
        {"price": True},
        {"price": {}},
        {"price": {"gte": "20"}},
        {"price": {"gte": True}},
        {"price": {"min": 20}},
        {"price": {"gte": 20, "max": 80}},
        {"price": 10**400},
        {"price": float("inf")},
        {"price": {"lt": float("nan")}},
        {"stock": [1, None]},
        {"in_stock": 1},
        {"in_stock": "true"},
        {"image_status": "lost"},
        {"attributes.color": None},
        {"attributes.color": {"like": "red"}},
        {"attributes.color": "x" * 5000},
        {"product_id": ["p"] * 1001},
    ],
)
def test_what_is_wrong_is_refused_by_name(raw: dict[str, object]) -> None:
    with pytest.raises(Problem) as refused:
        translate(raw)
    assert refused.value.status == 422
    assert [name for name, _ in refused.value.errors] == [f"filters.{next(iter(raw))}"]


def test_every_wrong_key_is_named() -> None:
    with pytest.raises(Problem) as refused:
        translate({"colour": "red", "brand": "Nike", "price": "cheap"})
    assert [name for name, _ in refused.value.errors] == ["filters.colour", "filters.price"]


def test_too_many_keys_are_refused() -> None:
    with pytest.raises(Problem):
        translate({f"attributes.a{number}": 1 for number in range(65)})


def test_the_schema_names_every_key() -> None:
    assert set(SCHEMA["properties"]) == {
        *("product_id", "brand", "category", "price", "currency", "stock"),
        *("in_stock", "group_id", "locale", "image_status"),
    }
