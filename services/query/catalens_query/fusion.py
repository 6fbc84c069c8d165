"""Fuses ranked lists whose scores cannot be compared, and ranks so that pages never overlap.

Cosines of text to text, cosines of text to image and BM25 live on different scales, so each list is first mapped
to 0…1 and then weighted: the convex combination of Bruch, Gai and Ingber, "An Analysis of Fusion Functions for
Hybrid Retrieval", 2023 (arXiv 2210.11934).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

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

    def judges(self, product_id: str, known: Mapping[str, float]) -> bool:
        """False where the list says nothing about a product, because it has no such picture or text."""
        return product_id in known or not self.complete or self.using == "lexical"


def fuse(lists: Sequence[RankedList]) -> list[LegHit]:
    """Return every product of `lists`, best first, ties in product_id order.

    A single list keeps its own scores (cosine or BM25). Of several, each is mapped to 0…1 and the weighted mean is
    the score: 1 is the best of every list, 0 the worst of each or absent from it. A product without a picture is
    not held against it where that is known: the mean is over the lists that can judge it.
    """
    if len(lists) == 1:
        return _ordered({hit.product_id: hit.score for hit in lists[0].hits})
    calibrated = [(one, _calibrated(one)) for one in lists]
    scores: dict[str, float] = {}
    for product_id in {hit.product_id for one in lists for hit in one.hits}:
        judging = [
            (one.weight, known.get(product_id, 0.0)) for one, known in calibrated if one.judges(product_id, known)
        ]
        scores[product_id] = sum(weight * value for weight, value in judging) / sum(weight for weight, _ in judging)
    return _ordered(scores)


def extend(ranking: Sequence[LegHit], deeper: Sequence[LegHit], *, single: bool) -> list[LegHit]:
    """Return `ranking` followed by what only the deeper tier knows, scores falling throughout.

    What was ranked keeps its place and score whatever the depth: that makes pages consistent. Fused scores of the
    deeper tier are scaled below the last one; those of a single list are comparable as they are.
    """
    if not ranking:
        return list(deeper)
    known = {hit.product_id for hit in ranking}
    scale = 1.0 if single else ranking[-1].score
    return [*ranking, *(LegHit(hit.product_id, hit.score * scale) for hit in deeper if hit.product_id not in known)]


def first(ranking: Sequence[LegHit], product_id: str) -> list[LegHit]:
    """Return `ranking` with that product moved, or put, in front, at least as high as the best."""
    best = ranking[0].score if ranking else 1.0
    return [LegHit(product_id, best), *(hit for hit in ranking if hit.product_id != product_id)]


def own_picture(lists: Sequence[RankedList]) -> str | None:
    """Return the product whose picture is the very one that was searched with, if there is one."""
    best = next((one.hits[0] for one in lists if one.using == "image" and one.hits), None)
    return best.product_id if best is not None and best.score >= IDENTICAL else None


def _calibrated(one: RankedList) -> Mapping[str, float]:
    if not one.hits:
        return {}
    best = one.hits[0].score
    # BM25 has a natural zero, no word in common; a cosine has none, so the end of the list stands for it.
    worst = 0.0 if one.using == "lexical" else one.hits[-1].score
    spread = best - worst
    if spread <= 0:
        return {hit.product_id: 1.0 for hit in one.hits}
    return {hit.product_id: (hit.score - worst) / spread for hit in one.hits}


def _ordered(scores: Mapping[str, float]) -> list[LegHit]:
    return sorted((LegHit(key, score) for key, score in scores.items()), key=lambda hit: (-hit.score, hit.product_id))
