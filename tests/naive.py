"""What filters and facets mean, said as plainly as can be: the adapters are compared with this."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from catalens.domain import Condition, Filter, Product, Range, Scalar, category_prefixes


def values_of(product: Product, key: str) -> list[Scalar]:
    """Return the values that the product has in the field of a filter or facet."""
    if key == "category":
        return list(category_prefixes(product.category))
    if key == "in_stock":
        return [] if product.stock is None else [product.stock > 0]
    if key.startswith("attributes."):
        value = product.attributes.get(key.removeprefix("attributes."))
        return [] if value is None else list(value) if isinstance(value, list) else [value]
    value = getattr(product, key)
    return [] if value is None else [value]


def same(one: Scalar, other: Scalar) -> bool:
    """Return whether two values are one: 12 is 12.0, and neither is "12" or true."""
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def within(value: Scalar, bounds: Range) -> bool:
    """Return whether a number lies in the range."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and (bounds.gte is None or value >= bounds.gte)
        and (bounds.gt is None or value > bounds.gt)
        and (bounds.lte is None or value <= bounds.lte)
        and (bounds.lt is None or value < bounds.lt)
    )


def _holds(product: Product, condition: Condition) -> bool:
    return any(
        any(same(value, wanted) for wanted in condition.any_of)
        or (condition.within is not None and within(value, condition.within))
        for value in values_of(product, condition.key)
    )


def matches(product: Product, where: Filter) -> bool:
    """Return whether the product passes the filter."""
    return (
        all(_holds(product, condition) for condition in where.conditions)
        and product.product_id not in where.exclude
        and (product.group_id is None or product.group_id not in where.without_groups)
    )


def counted(products: Iterable[Product], key: str) -> dict[tuple[bool, Scalar], int]:
    """Return how many products have each value of `key`; true, 1 and "1" are told apart by the flag beside them."""
    found: Counter[tuple[bool, Scalar]] = Counter()
    for product in products:
        found.update({(isinstance(value, bool), value) for value in values_of(product, key)})
    return dict(found)
