"""What is done to a ranking by relevance: boosts, sorting, grouping, collapsing equal pictures, diversity.

Pure: no clock, no I/O. The rules are explained in docs/reference/search.md.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import numpy as np

from catalens.domain import Facts, LegHit
from catalens_query.filters import ATTRIBUTE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from catalens.domain import Embedding

Sort: TypeAlias = Literal["relevance", "price_asc", "price_desc", "newest"]
GroupBy: TypeAlias = Literal["group_id", "image"]
Vectors: TypeAlias = Mapping[str, "Embedding"]

EQUAL_PICTURES: Final = 0.9999
"""The cosine from which two products' pictures count as one."""
WINDOW: Final = 200
"""How many of the best are put into a more diverse order; what comes after them keeps its own."""


@dataclass(frozen=True, slots=True)
class Boost:
    """A field that raises the score, by at most `factor` of it; a negative factor lowers it."""

    field: str
    factor: float


class Boosts:
    """The boosts of one search, measured against its candidates.

    The value of `in_stock` is 1 or 0; of any other field it is the share of the candidates that have less of it, so
    that a margin in cents and a stock in pallets count alike. Who has no such number gets 0.
    """

    def __init__(self, boosts: Sequence[Boost], candidates: Iterable[Facts]) -> None:
        self._boosts = boosts
        among = list(candidates)
        self._known = {
            boost.field: sorted(value for facts in among if (value := _number(facts, boost.field)) is not None)
            for boost in boosts
        }

    def values(self, facts: Facts | None) -> list[tuple[Boost, float]]:
        """Return each boost with the product's value, 0 to 1."""
        return [(boost, self._value(facts, boost.field)) for boost in self._boosts]

    def multiplier(self, facts: Facts | None) -> float:
        """Return what the score is multiplied by: 1 + the sum of factor · value, never below 0."""
        return max(0.0, 1.0 + sum(boost.factor * value for boost, value in self.values(facts)))

    def _value(self, facts: Facts | None, field: str) -> float:
        number = None if facts is None else _number(facts, field)
        if number is None:
            return 0.0
        if field == "in_stock":
            return number
        others = self._known[field]
        return min(1.0, bisect_left(others, number) / max(1, len(others) - 1))


def _number(facts: Facts, field: str) -> float | None:
    if field.startswith(ATTRIBUTE):
        return facts.numbers.get(field.removeprefix(ATTRIBUTE))
    if field == "in_stock":
        return None if facts.stock is None else float(facts.stock > 0)
    known: Mapping[str, float | None] = {"price": facts.price, "stock": facts.stock, "newest": facts.version}
    return known[field]


def boosted(hits: Sequence[LegHit], facts: Mapping[str, Facts], boosts: Boosts) -> list[LegHit]:
    """Return `hits` with their scores multiplied, best first, ties in product_id order."""
    raised = [hit._replace(score=hit.score * boosts.multiplier(facts.get(hit.product_id))) for hit in hits]
    return sorted(raised, key=lambda hit: (-hit.score, hit.product_id))


def sorted_by(sort: Sort, hits: Sequence[LegHit], facts: Mapping[str, Facts]) -> list[LegHit]:
    """Return `hits` in that order, ties in product_id order; who has no price comes last either way."""
    if sort == "relevance":
        return list(hits)

    def key(hit: LegHit) -> tuple[bool, float, str]:
        known = facts.get(hit.product_id)
        if sort == "newest":
            return known is None, -(known.version if known else 0), hit.product_id
        price = known.price if known else None
        if price is None:
            return True, 0.0, hit.product_id
        return False, price if sort == "price_asc" else -price, hit.product_id

    return sorted(hits, key=key)


class Groups:
    """Lets through the first product of each group, in order; a product without a group stands alone."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def first(self, hits: Sequence[LegHit], group_of: Callable[[str], str | None]) -> list[LegHit]:
        """Return those of `hits` whose group has not been seen before."""
        kept = []
        for hit in hits:
            group = group_of(hit.product_id)
            if group is None or group not in self._seen:
                kept.append(hit)
            if group is not None:
                self._seen.add(group)
        return kept


class Pictures:
    """Lets through the first product of each picture, in order; a product without a picture stands alone."""

    def __init__(self) -> None:
        self._seen: NDArray[np.float32] | None = None
        """The pictures that were let through, a row each."""

    def first(self, hits: Sequence[LegHit], vectors: Mapping[str, Vectors]) -> list[LegHit]:
        """Return those of `hits` whose picture equals none that was let through before."""
        places = [place for place, hit in enumerate(hits) if "image" in vectors.get(hit.product_id, {})]
        if not places:
            return list(hits)
        pictures = np.array([vectors[hits[place].product_id]["image"] for place in places])
        alike = pictures @ pictures.T >= EQUAL_PICTURES
        seen = np.zeros(len(places), bool)
        if self._seen is not None:
            seen |= (pictures @ self._seen.T >= EQUAL_PICTURES).any(axis=1)
        new: list[int] = []
        for row in range(len(places)):
            if not seen[row]:
                new.append(row)
                seen |= alike[row]
        fresh = pictures[new]
        self._seen = fresh if self._seen is None else np.concatenate((self._seen, fresh))
        dropped = {*places} - {places[row] for row in new}
        return [hit for place, hit in enumerate(hits) if place not in dropped]


def diverse(hits: Sequence[LegHit], vectors: Mapping[str, Vectors], diversity: float) -> list[LegHit]:
    """Return `hits` by maximal marginal relevance (Carbonell and Goldstein 1998), their scores as they are.

    Each next one has the most of (1 − diversity) · its score, mapped to 0…1, − diversity · its likeness to the one
    already chosen that it is most like: of their pictures where both have one, else of their texts.
    """
    if not hits:
        return []
    scores = np.array([hit.score for hit in hits])
    spread = float(scores.max() - scores.min())
    worth = (scores - scores.min()) / spread if spread > 0 else np.ones(len(hits))
    alike = _likeness([vectors.get(hit.product_id, {}) for hit in hits])
    closest = np.zeros(len(hits))
    left = np.ones(len(hits), dtype=bool)
    order: list[int] = []
    for _ in hits:
        value = np.where(left, (1 - diversity) * worth - diversity * closest, -np.inf)
        best = int(value.argmax())  # the first of equals: the ranking decides
        order.append(best)
        left[best] = False
        closest = np.maximum(closest, alike[best])
    return [hits[place] for place in order]


def _likeness(vectors: Sequence[Vectors]) -> np.ndarray:
    """Return the cosines of every pair, 0 where two have nothing that can be compared."""
    alike = np.zeros((len(vectors), len(vectors)))
    for name in ("text", "image"):  # a picture says more of a likeness than a text, so it comes last
        there = [place for place, known in enumerate(vectors) if name in known]
        if there:
            matrix = np.array([vectors[place][name] for place in there])
            alike[np.ix_(there, there)] = matrix @ matrix.T
    return alike
