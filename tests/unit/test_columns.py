"""Columns count what a plain reading of the products counts, whatever was written, given up and cleared away."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from catalens.engines.columns import LEAST, NAMES, READING, Kept, Mask, Table, stated_in
from catalens.engines.rules import short_key

KEYS = ("facets.n1", "state", "in_stock", "numbers.n2", "offer.price")
PRODUCTS = st.fixed_dictionaries(
    {},
    optional={
        "facets": st.fixed_dictionaries({}, optional={"n1": st.lists(st.sampled_from('abcdé"'), unique=True)}),
        "state": st.sampled_from(["x", "y"]),
        "in_stock": st.sampled_from([0, 1]),
        "numbers": st.fixed_dictionaries({}, optional={"n2": st.sampled_from([-1.5, 0.0, 3.0])}),
        "offer": st.fixed_dictionaries({}, optional={"price": st.sampled_from([None, 0, 5, 1e308])}),
    },
)
BOUND = st.none() | st.sampled_from([-1.5, 0.0, 3.0, 4.0])


class Plain:
    """The same, kept as products."""

    def __init__(self) -> None:
        self.table = Table()
        self.products: dict[int, dict[str, Any]] = {}

    def put(self, product: dict[str, Any]) -> None:
        slot = self.table.new()
        self.table.add(slot, product, KEYS)
        self.products[slot] = product

    def drop(self, slot: int) -> None:
        self.table.drop(slot)
        del self.products[slot]

    def compact(self) -> None:
        slots = self.table.compact()
        self.products = {slots[slot]: product for slot, product in self.products.items()}


def meant(mask: Mask, plain: Plain) -> set[int]:
    return set(np.flatnonzero(mask & plain.table.everybody()).tolist())


@given(st.data())
def test_columns_say_what_the_products_say(data: st.DataObject) -> None:
    plain = Plain()
    for step in data.draw(st.lists(st.one_of(PRODUCTS, st.sampled_from(["drop", "compact"])), max_size=20)):
        if isinstance(step, dict):
            plain.put(step)
        elif step == "compact":
            plain.compact()
        elif plain.products:
            plain.drop(data.draw(st.sampled_from(sorted(plain.products))))
    everybody = plain.table.everybody()
    assert set(np.flatnonzero(everybody).tolist()) == plain.products.keys()
    key = data.draw(st.sampled_from(KEYS[:3]))
    wanted: list[str | int] = data.draw(st.lists(st.sampled_from(["a", "b", "x", 1])))
    having = plain.table.having(key, wanted)
    assert meant(having, plain) == {
        slot for slot, product in plain.products.items() if set(stated_in(product, key)) & set(wanted)
    }
    number, (gte, gt, lte, lt) = data.draw(st.sampled_from(KEYS[3:])), data.draw(st.tuples(BOUND, BOUND, BOUND, BOUND))
    within = plain.table.within(number, (gte, gt, lte, lt))
    numbers = {slot: stated[0] for slot, product in plain.products.items() if (stated := stated_in(product, number))}
    assert meant(within, plain) == {
        slot
        for slot, value in numbers.items()
        if (gte is None or value >= gte)
        and (gt is None or value > gt)
        and (lte is None or value <= lte)
        and (lt is None or value < lt)
    }
    mask = having & everybody if data.draw(st.booleans()) else everybody
    chosen = [value for slot, value in numbers.items() if mask[slot]]
    assert plain.table.extremes(number, mask) == ([min(chosen), max(chosen)] if chosen else [])
    for facet in KEYS[:3]:
        counted: Counter[Any] = Counter()
        for slot, product in plain.products.items():
            counted.update(stated_in(product, facet) if mask[slot] else ())
        for limit in (1, 2, 3, 100):
            expected = sorted(counted.items(), key=lambda one: (-one[1], one[0]))[:limit]
            assert plain.table.most_frequent(facet, mask, limit) == expected


def test_what_was_given_up_is_cleared_away_when_it_is_the_larger_part() -> None:
    plain = Plain()
    plain.put({"state": "x"})
    (kept,) = plain.products
    given_up = 0
    while not plain.table.wasteful:
        plain.put({"state": str(given_up)})
        plain.drop(max(plain.products))
        given_up += 1
    assert given_up == LEAST + 1
    slots = plain.table.compact()
    assert slots[kept] == 0
    assert len(slots) == LEAST + 2
    assert len(plain.table.everybody()) == 1


def test_a_column_that_was_given_up_has_nothing_until_it_is_read_again() -> None:
    plain = Plain()
    plain.put({"facets": {"n1": ["a"]}, "offer": {"price": 5}})
    everybody = plain.table.everybody()
    for key in KEYS:
        plain.table.forget(key)
    assert plain.table.most_frequent("facets.n1", everybody, 5) == []
    assert plain.table.extremes("offer.price", everybody) == []
    plain.table.add(0, plain.products[0], KEYS)
    assert plain.table.most_frequent("facets.n1", everybody, 5) == [("a", 1)]
    assert plain.table.extremes("offer.price", everybody) == [5, 5]


@given(st.lists(st.tuples(st.sampled_from(["facets", "numbers"]), st.text(max_size=5)), max_size=30), st.text())
def test_names_that_are_there_are_known(stated: list[tuple[str, str]], other: str) -> None:
    table = Table()
    assert not table.named(f"facets.{short_key(other)}")
    for kind, name in stated:
        table.add(table.new(), {kind: {short_key(name): ["x"]}}, [NAMES])
    assert all(table.named(f"{kind}.{short_key(name)}") for kind, name in stated)
    # Of thirty names no other one is taken for another, but once in many millions.
    assert table.named(f"facets.{short_key(other)}") == (other in {name for _, name in stated})
    table.forget(NAMES)
    assert not any(table.named(f"{kind}.{short_key(name)}") for kind, name in stated)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sets(st.sampled_from(["v1", "v2", "v3", "n1", "n2", "x", "y"])))))
def test_what_was_asked_for_longest_ago_is_kept_no_more(requests: list[tuple[str, set[str]]]) -> None:
    most = {"v": 2, "n": 1}
    kept = Kept([(lambda key: key[0] == "v", most["v"]), (lambda key: key[0] == "n", most["n"])], most=6)
    asked: dict[tuple[str, str], int] = {}
    for now, (tenant, keys) in enumerate(requests):
        there = set(kept.of(tenant))
        assert kept.ask(tenant, keys, now) == (keys <= there)
        kept.add(tenant, keys - there, READING)
        assert kept.ask(tenant, keys, now) == (keys <= there), "not before it is whole"
        before = {(owner, key) for owner in "abc" for key in kept.of(owner)}
        gone = kept.settle(tenant, keys, now)
        asked.update(dict.fromkeys(((tenant, key) for key in keys), now))
        after = {(owner, key) for owner in "abc" for key in kept.of(owner)}
        assert sorted(gone) == sorted(before - after)
        assert {(tenant, key) for key in keys} <= after, "what is needed stays"
        assert len(after) <= max(6, len(keys))
        for kind, limit in most.items():
            of_a_kind = [key for key in kept.of(tenant) if key[0] == kind]
            assert len(of_a_kind) <= max(limit, len([key for key in keys if key[0] == kind]))
        for owner, key in gone:  # nothing stays that should have gone before it
            of_all = owner != tenant or key[0] not in most
            rivals = after if of_all else {one for one in after if one[0] == owner and one[1][0] == key[0]}
            assert all(asked[one] >= asked[owner, key] for one in rivals)
        assert kept.all() == sorted(after, key=lambda one: (asked[one], one))
