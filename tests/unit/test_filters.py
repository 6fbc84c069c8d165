"""How a domain filter reaches the embedded engine: typed, and never as a JSON path that a name could break."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalens.domain import Condition, Filter, Product, Range, point_id
from catalens.engines.points import plain_filter, terms_of
from catalens.engines.rules import short_key

SCALAR = st.one_of(
    st.booleans(),
    st.integers(-(2**63) + 1, 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
)


def test_keys_are_and_values_are_or() -> None:
    where = Filter(
        (Condition("price", (5,), Range(gte=10, lt=20)), Condition("in_stock", (True,))),
        exclude=("a",),
        without_groups=("g",),
    )
    clauses, none_of = plain_filter("shop", where)
    assert clauses == [
        [("range", "offer.price", (5, None, 5, None)), ("range", "offer.price", (10, None, None, 20))],
        [("any", "in_stock", [1])],
    ]
    assert none_of == [("points", "", [point_id("shop", "a").bytes]), ("any", "terms", ['["group_id","g"]'])]


def test_no_filter_is_nothing() -> None:
    assert plain_filter("shop", Filter()) == ([], [])


@pytest.mark.parametrize(
    "key", ["brand", "category", "price", "stock", "in_stock", "currency", "product_id", "attributes.x"]
)
def test_a_clause_is_never_empty_since_the_engine_reads_that_as_everything(key: str) -> None:
    ((*clause,),), _ = plain_filter("shop", Filter((Condition(key),)))
    assert clause
    assert not any(values for kind, _, values in clause if kind != "range")


@given(name=st.text(min_size=1, max_size=20), stored=SCALAR, asked=SCALAR)
def test_an_attribute_matches_exactly_the_equal_value_of_the_same_type(
    name: str, stored: bool | int | float | str, asked: bool | int | float | str
) -> None:
    def kind(value: object) -> str:
        return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__

    product = Product(product_id="p", name="n", attributes={name: stored})
    (((_, key, terms),),) = plain_filter("shop", Filter((Condition(f"attributes.{name}", (asked,)),)))[0]
    assert key == "terms"
    assert (terms[0] in terms_of(product, {})) == (stored == asked and kind(stored) == kind(asked))


@given(name=st.text(min_size=1, max_size=128))
def test_a_number_key_is_safe_in_a_path(name: str) -> None:
    assert short_key(name).isalnum()
    assert len(short_key(name)) == 17


def test_an_attribute_cannot_pose_as_a_field() -> None:
    product = Product(product_id="p", name="n", attributes={"brand": "Acme", "x": '","brand'})
    assert [json.loads(term)[0] for term in terms_of(product, {})] == ["attributes.brand", "attributes.x"]
