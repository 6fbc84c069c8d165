"""Which price ranges a storefront is offered."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalens.domain import Condition, Filter, Range
from catalens_query.facets import MOST_RANGES, PATTERN, fine_ranges, merged, without


def test_the_ends_are_round_and_hold_everything() -> None:
    assert fine_ranges(12.5, 80) == [Range(gte=10, lt=20), Range(gte=20, lt=50), Range(gte=50, lt=100)]
    assert fine_ranges(0.19, 1.0) == [
        *(Range(gte=0.1, lt=0.2), Range(gte=0.2, lt=0.5), Range(gte=0.5, lt=1), Range(gte=1, lt=2))
    ]
    assert fine_ranges(50, 50) == [Range(gte=50, lt=100)]
    assert fine_ranges(0, 0) == [Range(gte=0, lt=1)]
    assert fine_ranges(0, 3)[0].gte == 0


@given(st.floats(0, 1.7e308), st.floats(0, 1.7e308))
def test_ranges_are_few_and_leave_no_gap(one: float, other: float) -> None:
    smallest, largest = sorted((one, other))
    ranges = fine_ranges(smallest, largest)
    assert len(ranges) <= 20
    assert ranges[0].gte is not None
    assert ranges[0].gte <= smallest
    assert ranges[-1].lt is None or ranges[-1].lt > largest
    assert all(low.lt == high.gte for low, high in pairwise(ranges))
    assert all(each.lt is None or (each.gte is not None and each.gte < each.lt) for each in ranges)


@given(st.lists(st.integers(0, 1000), max_size=30))
def test_merged_ranges_hold_all_and_are_few(counts: list[int]) -> None:
    ranges = [(Range(gte=number, lt=number + 1), count) for number, count in enumerate(counts)]
    kept = merged(ranges)
    assert len(kept) <= MOST_RANGES
    assert sum(count for _, count in kept) == sum(counts)
    assert all(count for _, count in kept)
    for bounds, count in kept:
        assert bounds.gte is not None
        assert bounds.lt is not None
        assert count == sum(counts[int(bounds.gte) : int(bounds.lt)])


def test_the_emptiest_neighbours_are_joined_first() -> None:
    ranges = [(Range(gte=number, lt=number + 1), count) for number, count in enumerate([9, 1, 2, 0, 9, 9, 9, 9])]
    assert merged(ranges)[1] == (Range(gte=1, lt=3), 3)


def test_a_facet_is_counted_without_its_own_filter() -> None:
    brand, price = Condition("brand", ("Nike",)), Condition("price", within=Range(gte=1))
    where = Filter((brand, price), exclude=("a",), without_groups=("g",))
    assert without(where, "brand") == Filter((price,), exclude=("a",), without_groups=("g",))
    assert without(where, "category") == where


@pytest.mark.parametrize("name", ["brand", "price", "attributes.color", "attributes.a b\n", "in_stock"])
def test_what_can_be_counted(name: str) -> None:
    assert re.search(PATTERN, name)


@pytest.mark.parametrize("name", ["colour", "attributes.", "attributes", "brand ", "product_id", "tenant", "prices"])
def test_what_cannot(name: str) -> None:
    assert not re.search(PATTERN, name)
