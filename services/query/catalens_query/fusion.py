"""Fuses ranked lists whose scores cannot be compared, and ranks so that pages never overlap.

Cosines of text to text, cosines of text to image and BM25 live on different scales, so each list is first mapped
to 0…1 and then weighted: the convex combination of Bruch, Gai and Ingber, "An Analysis of Fusion Functions for
Hybrid Retrieval", 2023 (arXiv 2210.11934).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
from operator import itemgetter
from typing import Final, Literal

from catalens.domain import LegHit, VectorName

IDENTICAL: Final = 0.9999
"""The cosine of two equal pictures, less what float32 and the index round away."""


@dataclass(frozen=True, slots=True)
class RankedList:
    """What the index answered to one leg, best first, and how much it counts."""

    using: VectorName
    weight: float
    hits: Sequence[LegHit]
    complete: bool = False
    """There is nothing beyond `hits`: a product that a dense list lacks has no such vector."""

    def judges(self, *, known: bool) -> bool:
        """False where the list says nothing about a product, because it has no such picture or text."""
        return known or not self.complete or self.using == "lexical"


@dataclass(frozen=True, slots=True)
class Part:
    """What one list, one boost or being exactly what was asked for adds to a score; the parts of a hit sum to it."""

    part: Literal["image", "text", "lexical", "boost", "exact"]
    contribution: float
    field: str | None = None
    """What a boost is by."""
    score: float | None = None
    """A list's own, cosine or BM25; None where the list does not hold the product."""
    calibrated: float | None = None
    """The same from 0 to 1, as it was weighted; of a boost, its value."""
    weight: float | None = None
    """The list's share among those that can judge the product; of a boost, its factor."""


def fuse(lists: Sequence[RankedList], *, calibrate: bool = False) -> list[LegHit]:
    """Return every product of `lists`, best first, ties in product_id order.

    A single list keeps its own scores (cosine or BM25) unless `calibrate`. Of several, each is mapped to 0…1 and the
    weighted mean is the score: 1 is the best of every list, 0 the worst of each or absent from it. A product without
    a picture is not held against it where that is known: the mean is over the lists that can judge it.
    """
    if len(lists) == 1 and not calibrate:
        return _ordered(dict(lists[0].hits))
    sums: dict[str, float] = {}
    holders: dict[str, int] = {}  # which of the lists that can't judge all hold the product, a bit each
    for number, one in enumerate(lists):
        worst, spread = _ends(one)
        weight = one.weight
        for product_id, score in one.hits:
            value = (score - worst) / spread if spread > 0 else 1.0
            sums[product_id] = sums.get(product_id, 0.0) + weight * value
        if not one.judges(known=False):
            for product_id, _ in one.hits:
                holders[product_id] = holders.get(product_id, 0) | 1 << number
    totals = {
        held: sum(one.weight for number, one in enumerate(lists) if one.judges(known=bool(held >> number & 1)))
        for held in {0, *holders.values()}
    }
    scores = {product_id: value / totals[holders.get(product_id, 0)] for product_id, value in sums.items()}
    return _ordered(scores)


def shares(lists: Sequence[RankedList], product_id: str, *, calibrate: bool = False) -> list[Part]:
    """Return what each list that can judge the product adds to the score that `fuse` gives it.

    That is its weight times what it is calibrated to; of a single list that is not calibrated, its own score.
    """
    scores = [next((hit.score for hit in one.hits if hit.product_id == product_id), None) for one in lists]
    judging = [(one, score) for one, score in zip(lists, scores, strict=True) if one.judges(known=score is not None)]
    total = sum(one.weight for one, _ in judging)
    found = []
    for one, score in judging:
        value, weight = 0.0 if score is None else _calibrated(one, score), one.weight / total
        raw = score if len(lists) == 1 and not calibrate else None
        contribution = weight * value if raw is None else raw
        found.append(Part(one.using, contribution, score=score, calibrated=value, weight=weight))
    return found


def extend(ranking: Sequence[LegHit], deeper: Sequence[LegHit], *, single: bool) -> list[LegHit]:
    """Return `ranking` followed by what only the deeper tier knows, scores falling throughout.

    What was ranked keeps its place and score whatever the depth: that makes pages consistent. Fused scores of the
    deeper tier are scaled below the last one; those of a single list are comparable as they are.
    """
    if not ranking:
        return list(deeper)
    known = {hit.product_id for hit in ranking}
    last = ranking[-1].score
    scale, most = (1.0, math.inf) if single else (last / max(1.0, deeper[0].score if deeper else 1.0), last)
    fresh = (hit for hit in deeper if hit.product_id not in known)
    return [*ranking, *(LegHit(hit.product_id, min(most, hit.score * scale)) for hit in fresh)]


def first(ranking: Sequence[LegHit], product_id: str) -> list[LegHit]:
    """Return `ranking` with that product moved, or put, in front, at least as high as the best."""
    best = ranking[0].score if ranking else 1.0
    return [LegHit(product_id, best), *(hit for hit in ranking if hit.product_id != product_id)]


def own_picture(lists: Sequence[RankedList]) -> str | None:
    """Return the product whose picture is the very one that was searched with, if there is one."""
    best = next((one.hits[0] for one in lists if one.using == "image" and one.hits), None)
    return best.product_id if best is not None and best.score >= IDENTICAL else None


def _ends(one: RankedList) -> tuple[float, float]:
    """Return which of the list's scores is mapped to 0, and how far above it the best is; with no spread all are 1."""
    best = one.hits[0].score if one.hits else 0.0
    # BM25 has a natural zero, no word in common; a cosine has none, so the end of the list stands for it.
    worst = one.hits[-1].score if one.hits and one.using != "lexical" else 0.0
    return worst, best - worst


def _calibrated(one: RankedList, score: float) -> float:
    worst, spread = _ends(one)
    return (score - worst) / spread if spread > 0 else 1.0


def _ordered(scores: Mapping[str, float]) -> list[LegHit]:
    ranked = sorted(scores.items())
    ranked.sort(key=itemgetter(1), reverse=True)  # stable: ties stay in product_id order
    return list(starmap(LegHit, ranked))
