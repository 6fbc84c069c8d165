"""Facets: what may be counted, and price ranges that a storefront can offer. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from catalens.domain import Filter, Range

NUMBERS: Final = ("price", "stock")
"""Facets that are ranges; every other one is a list of values."""
PATTERN: Final = (
    r"^(?:brand|category|group_id|locale|currency|image_status|in_stock|price|stock|"
    r"(?:attributes|tags)\.[\s\S]{1,256})$"
)
MOST_VALUES: Final = 100
"""Values of one facet: its most frequent ones."""
MOST_RANGES: Final = 6
_DECADES: Final = 5
_STEPS: Final = (1, 2, 5)


def without(where: Filter, key: str) -> Filter:
    """Return the filter less its condition on `key`, so that a facet shows what one could choose instead."""
    return Filter(
        tuple(condition for condition in where.conditions if condition.key != key), where.exclude, where.without_groups
    )


def fine_ranges(smallest: float, largest: float) -> list[Range]:
    """Return ranges that hold all from `smallest` to `largest`, with the ends 1, 2, 5, 10, 20, 50 and so on.

    What is five decades below the largest is all in the first range.
    """
    if largest <= 0:
        return [Range(gte=0, lt=1)]
    top = math.floor(math.log10(largest))
    ends = [float(f"{step}e{decade}") for decade in range(top - _DECADES, top + 2) for step in _STEPS]
    below = [end for end in ends if end <= smallest]
    first = below[-1] if below else 0.0
    inner = [end for end in ends if first < end <= largest]
    last = next((end for end in ends if end > largest), math.inf)
    edges = [first, *inner, last]
    return [Range(gte=low, lt=None if math.isinf(high) else high) for low, high in pairwise(edges)]


def merged(counted: Sequence[tuple[Range, int]]) -> list[tuple[Range, int]]:
    """Return at most MOST_RANGES ranges, none empty: again and again the two neighbours with the fewest are joined."""
    ranges = [(bounds, count) for bounds, count in counted if count]
    while len(ranges) > MOST_RANGES:
        place = min(range(len(ranges) - 1), key=lambda at: ranges[at][1] + ranges[at + 1][1])
        (low, few), (high, more) = ranges[place : place + 2]
        ranges[place : place + 2] = [(Range(gte=low.gte, lt=high.lt), few + more)]
    return ranges
