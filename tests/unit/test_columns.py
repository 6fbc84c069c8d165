"""Columns count what a plain reading of the products counts, whatever was written, given up and cleared away."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from catalens.engines.columns import LEAST, Mask, Table, stated_in

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
