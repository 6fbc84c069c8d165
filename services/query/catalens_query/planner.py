"""Turns a search request into a plan: which ranked lists to take from the index and how much each counts.

Pure: no clock, no I/O. The weights are explained in docs/reference/search.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import numpy as np

from catalens.domain import Leg, SparseVector, VectorName

if TYPE_CHECKING:
    from catalens.domain import Embedding

Mode: TypeAlias = Literal["semantic", "lexical", "hybrid"]
RequestMode: TypeAlias = Literal["auto", "semantic", "lexical", "hybrid"]
Using: TypeAlias = Literal["both", "image", "text"]
DenseName: TypeAlias = Literal["image", "text"]

LEXICAL_SHARE: Final = 0.6
"""Above one half: the best lexical hit stands before every product that has none of the query's words."""
PICTURE_SHARE_FOR_WORDS: Final = 0.5
"""How much the products' pictures count in a search by words; the rest goes to their texts."""
PICTURE_SHARE_FOR_PICTURE: Final = 0.9
"""The same in a search by picture: like is compared with like, so the products' pictures count more."""

LIKED_WORDS_SHARE: Final = 0.5
"""How much the words count beside liked products: half of what they count alone."""
UNLIKED_SHARE: Final = 0.5
"""What is not wanted pushes away half as hard as what is wanted draws (as Rocchio's feedback weighs them)."""

TIERS: Final = (200, 2_000, 10_100)
"""Depths at which the index is asked, one after the other until the page is reached (docs/reference/search.md).

The last is the largest offset plus the largest limit."""

SORTED: Final = 200
"""How many of each list are sorted by price or age: every product has some cosine, so only the best can matter."""
SORTED_LEXICAL: Final = 2_000
"""The same of the products that have some of the words."""


@dataclass(frozen=True, slots=True)
class WeightedLeg:
    """One ranked list of the plan: what is asked of the index, at any depth, and its share of the score."""

    using: VectorName
    vector: Embedding | SparseVector
    weight: float

    def at(self, depth: int) -> Leg:
        """Return the index's leg of that depth."""
        return Leg(using=self.using, vector=self.vector, limit=depth)


@dataclass(frozen=True, slots=True)
class Plan:
    """How a request is answered: the mode that answers it and the share of each list; a missing name is not asked."""

    mode: Mode
    shares: Mapping[VectorName, float]

    def legs(
        self, dense: Mapping[DenseName, Embedding | None], lexical: SparseVector | None
    ) -> tuple[WeightedLeg, ...]:
        """Return the legs for these query vectors; a list whose vector is missing or says nothing is left out."""
        vectors: dict[str, Embedding | SparseVector] = {
            name: vector for name, vector in dense.items() if vector is not None
        }
        if lexical is not None:
            vectors["lexical"] = lexical
        return _legs(self.shares, vectors)


def plan(
    mode: RequestMode, using: Using, image_weight: float, *, words: float | None = None, known: float = 1.0
) -> Plan:
    """Return the plan of a search whose picture weighs `image_weight`: 0 is words only, 1 is picture only.

    `auto` and `hybrid` add the lexical list as far as words count (`words`, by default what the picture leaves), so a
    search by picture alone is `semantic` in every mode but `lexical`, which asks for words only. `known`, above 0,
    is the share of the words that the catalogue has (Vocabulary.share_known): the products that have the one common
    word of three would otherwise count as much as those that have all three.
    """
    if mode == "lexical":
        return LEXICAL
    dense = _dense_shares(using, image_weight)
    lexical = 0.0 if mode == "semantic" else LEXICAL_SHARE * (1 - image_weight if words is None else words)
    if lexical == 0:
        return Plan("semantic", dense)
    total = 1 - lexical * (1 - known)
    shares: dict[VectorName, float] = {name: share * (1 - lexical) / total for name, share in dense.items()}
    return Plan("hybrid", {**shares, "lexical": lexical * known / total})


LEXICAL: Final = Plan("lexical", {"lexical": 1.0})


def similar_legs(vectors: Mapping[str, Embedding], using: Using) -> tuple[WeightedLeg, ...]:
    """Return the legs of "more like this": the product's own picture and text, each against its like."""
    return _legs(_dense_shares(using, 0.0), vectors)


def blend(words: Embedding, picture: Embedding, image_weight: float) -> Embedding:
    """Return the query vector: (1 − w)·words + w·picture, normalised again; both are L2-normalised.

    Exactly the words at 0 and the picture at 1. Opposite vectors cancel out: then the picture is taken.
    """
    if image_weight in (0, 1):
        return picture if image_weight else words
    mixed = (1 - image_weight) * words + image_weight * picture
    length = float(np.linalg.norm(mixed))
    return picture if length < 1e-6 else (mixed / length).astype(np.float32)  # rounding noise


def mix(parts: Sequence[tuple[float, Embedding | None]]) -> Embedding | None:
    """Return the weighted sum of unit vectors, normalised; None where nothing is left of it.

    One vector alone is returned as it is, with a weight above 0; those that are missing are left out.
    """
    there = [(weight, vector) for weight, vector in parts if vector is not None and weight]
    if len(there) == 1 and there[0][0] > 0:
        return there[0][1]
    total = sum((weight * vector for weight, vector in there), np.zeros(1, np.float32))
    length = float(np.linalg.norm(total))
    return (total / length).astype(np.float32) if length >= 1e-6 else None  # rounding noise


def _legs(
    shares: Mapping[VectorName, float], vectors: Mapping[str, Embedding | SparseVector]
) -> tuple[WeightedLeg, ...]:
    return tuple(
        WeightedLeg(name, vectors[name], share)
        for name, share in shares.items()
        if name in vectors and _says_something(vectors[name])
    )


def _says_something(vector: Embedding | SparseVector) -> bool:
    # A model that knows none of a text's tokens answers zeros, as near to one product as to any other.
    return bool(vector.indices) if isinstance(vector, SparseVector) else bool(vector.any())


def _dense_shares(using: Using, image_weight: float) -> dict[VectorName, float]:
    if using != "both":
        return {using: 1.0}
    picture = PICTURE_SHARE_FOR_WORDS + (PICTURE_SHARE_FOR_PICTURE - PICTURE_SHARE_FOR_WORDS) * image_weight
    return {"image": picture, "text": 1 - picture}
