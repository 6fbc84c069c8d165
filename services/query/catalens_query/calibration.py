"""How sure it is that a product is what was asked for, from 0 to 1: one cut-off for any query. Pure.

A cosine says nothing by itself: of one query 0.3 is the best there is, of another the middle. So it is measured against
random products: by how many of their standard deviations it stands out. Of the words it is the share that was found.
The choice was measured: docs/adr/0020.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from catalens_query.planner import WeightedLeg

if TYPE_CHECKING:
    from catalens.domain import Embedding

SAMPLE: Final = 500
"""Random products that stand for all."""
HALF: Final = 3.3
"""Deviations above the middle at which a product is as likely right as wrong."""
LEAST_SPREAD: Final = 0.02
"""Of cosines; below it, a few products that are much alike would make any other one stand out."""

Vectors = Mapping[str, "Embedding"]


class Standing:
    """How far products stand out among random ones, by the dense legs of one search."""

    def __init__(self, legs: Sequence[WeightedLeg], sample: Sequence[Vectors]) -> None:
        self._legs = [leg for leg in legs if leg.using != "lexical"]
        self._usual = {
            leg.using: _usual([_cosine(leg, one) for one in sample if leg.using in one]) for leg in self._legs
        }

    def likely(self, vectors: Vectors) -> float:
        """Return 0 to 1 for the product with these vectors; 0 where it has none that can be compared."""
        judging = [leg for leg in self._legs if leg.using in vectors]
        if not judging:
            return 0.0
        deviations = sum(
            leg.weight * (_cosine(leg, vectors) - self._usual[leg.using][0]) / self._usual[leg.using][1]
            for leg in judging
        )
        return 1 / (1 + math.exp(min(500.0, HALF - deviations / sum(leg.weight for leg in judging))))


def reachable(best: Sequence[float], shares: Sequence[float]) -> float:
    """Return the lexical score of a product that has each word as well as any has it.

    `best` is the best score of each word alone, `shares` how much each word counts. A word that nobody has is at least
    as rare as the rarest that somebody has.
    """
    # A weight may be so small that a word's share of it is 0.
    rarest = max((score / share for score, share in zip(best, shares, strict=True) if share), default=0.0)
    return sum(score or rarest * share for score, share in zip(best, shares, strict=True))


def relevance(likely: float, lexical: float, reach: float) -> float:
    """Return how sure the vectors and the words are together: either may convince, both convince more."""
    found = min(1.0, max(0.0, lexical / reach)) if reach > 0 else 0.0
    return 1 - (1 - likely) * (1 - found)


def _cosine(leg: WeightedLeg, vectors: Vectors) -> float:
    return float(np.dot(np.asarray(leg.vector), vectors[leg.using]))


def _usual(cosines: Sequence[float]) -> tuple[float, float]:
    """Return the middle and one deviation; of the lower half, where nothing is that was asked for."""
    if not cosines:
        return 0.0, 1.0
    middle, low = np.quantile(cosines, (0.5, 0.1587))
    return float(middle), max(LEAST_SPREAD, float(middle - low))
