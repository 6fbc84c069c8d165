"""What a search asks of the index, and how much each list counts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest

from catalens.domain import SparseVector
from catalens_query.planner import (
    LEXICAL,
    LEXICAL_SHARE,
    TIERS,
    DenseName,
    RequestMode,
    Using,
    blend,
    mix,
    plan,
    similar_legs,
)

if TYPE_CHECKING:
    from catalens.domain import Embedding

EAST = np.array([1.0, 0.0], dtype=np.float32)
NORTH = np.array([0.0, 1.0], dtype=np.float32)
TERMS = SparseVector((7,), (1.0,))
BOTH: dict[DenseName, Embedding | None] = {"image": EAST, "text": EAST}


@pytest.mark.parametrize("mode", ["auto", "semantic", "lexical", "hybrid"])
@pytest.mark.parametrize("using", ["both", "image", "text"])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_shares_are_positive_and_sum_to_one(mode: RequestMode, using: Using, weight: float) -> None:
    shares = plan(mode, using, weight).shares
    assert math.isclose(sum(shares.values()), 1.0)
    assert all(share > 0 for share in shares.values())


def test_auto_and_hybrid_fuse_words_with_both_vectors() -> None:
    chosen = plan("auto", "both", 0.0)
    assert chosen.mode == "hybrid"
    assert chosen.shares.keys() == {"image", "text", "lexical"}
    assert chosen == plan("hybrid", "both", 0.0)


def test_the_best_lexical_hit_outweighs_all_dense_lists_together() -> None:
    shares = plan("auto", "both", 0.0).shares
    assert shares["lexical"] == LEXICAL_SHARE > shares["image"] + shares["text"]


def test_words_that_the_catalogue_has_not_count_less_and_the_vectors_as_before() -> None:
    all_known, half = plan("auto", "both", 0.0).shares, plan("auto", "both", 0.0, known=0.5).shares
    assert math.isclose(sum(half.values()), 1.0)
    assert half["lexical"] / half["text"] == pytest.approx(0.5 * all_known["lexical"] / all_known["text"])
    assert half["image"] / half["text"] == pytest.approx(all_known["image"] / all_known["text"])
    assert plan("lexical", "both", 0.0, known=0.5) == LEXICAL
    assert plan("semantic", "both", 0.0, known=0.5) == plan("semantic", "both", 0.0)


@pytest.mark.parametrize(("using", "lists"), [("image", {"image"}), ("text", {"text"}), ("both", {"image", "text"})])
def test_semantic_takes_the_vectors_that_using_names(using: Using, lists: set[str]) -> None:
    chosen = plan("semantic", using, 0.0)
    assert chosen.mode == "semantic"
    assert chosen.shares.keys() == lists


def test_lexical_takes_words_only() -> None:
    assert plan("lexical", "both", 0.0) == LEXICAL
    assert LEXICAL.shares == {"lexical": 1.0}


@pytest.mark.parametrize("mode", ["auto", "hybrid", "semantic"])
def test_a_picture_alone_is_semantic_in_every_mode(mode: RequestMode) -> None:
    chosen = plan(mode, "both", 1.0)
    assert chosen.mode == "semantic"
    assert chosen.shares["image"] > chosen.shares["text"]


def test_words_count_less_as_the_picture_counts_more() -> None:
    shares = [plan("hybrid", "both", weight / 10).shares["lexical"] for weight in range(10)]
    assert shares == sorted(shares, reverse=True)
    assert shares[5] == pytest.approx(LEXICAL_SHARE / 2)


def test_legs_carry_their_vector_and_any_depth() -> None:
    legs = {leg.using: leg for leg in plan("hybrid", "both", 0.0).legs(BOTH, TERMS)}
    assert legs["image"].vector is EAST
    assert legs["text"].vector is EAST
    assert legs["lexical"].vector is TERMS
    assert legs["image"].at(TIERS[0]).limit == TIERS[0]


def test_a_list_whose_vector_is_missing_or_says_nothing_is_not_asked() -> None:
    chosen = plan("hybrid", "text", 0.0)
    assert [leg.using for leg in chosen.legs({}, TERMS)] == ["lexical"]
    assert [leg.using for leg in chosen.legs(BOTH, SparseVector((), ()))] == ["text"]
    assert [leg.using for leg in chosen.legs({"text": 0 * EAST}, TERMS)] == ["lexical"]
    assert chosen.legs({}, None) == ()


def test_the_last_tier_reaches_the_last_page() -> None:
    assert TIERS[-1] == 10_000 + 100
    assert list(TIERS) == sorted(set(TIERS))


def test_blend_is_the_normalised_weighted_sum() -> None:
    mixed = blend(EAST, NORTH, 0.25)
    assert mixed.dtype == np.float32
    assert np.linalg.norm(mixed) == pytest.approx(1.0)
    assert mixed[1] / mixed[0] == pytest.approx(0.25 / 0.75)


def test_blend_ends_are_exactly_the_words_and_the_picture() -> None:
    odd = np.array([0.6, 0.80000001], dtype=np.float32)
    assert blend(odd, EAST, 0.0) is odd
    assert blend(EAST, odd, 1.0) is odd


def test_opposites_that_cancel_out_leave_the_picture() -> None:
    assert np.array_equal(blend(-EAST, EAST, 0.5), EAST)


def test_similar_compares_picture_with_pictures_and_text_with_texts() -> None:
    legs = {leg.using: leg.vector for leg in similar_legs({"image": EAST, "text": NORTH}, "both")}
    assert legs == {"image": EAST, "text": NORTH}


def test_similar_leaves_out_what_the_product_has_not() -> None:
    assert [leg.using for leg in similar_legs({"text": NORTH}, "both")] == ["text"]
    assert [leg.using for leg in similar_legs({"image": 0 * EAST, "text": NORTH}, "both")] == ["text"]
    assert similar_legs({"text": NORTH}, "image") == ()


def test_words_count_as_much_as_the_caller_says() -> None:
    assert plan("auto", "both", 0.0, words=0.5).shares["lexical"] == pytest.approx(LEXICAL_SHARE / 2)
    assert plan("auto", "both", 0.0, words=0.0).mode == "semantic"


def test_a_mix_is_a_unit_vector_between_what_is_wanted_and_away_from_what_is_not() -> None:
    assert mix([(2.0, EAST), (1.0, None)]) is EAST
    between = mix([(1.0, EAST), (1.0, NORTH)])
    assert between is not None
    assert between == pytest.approx(np.array([0.5**0.5, 0.5**0.5]))
    away = mix([(1.0, EAST), (-0.5, NORTH)])
    assert away is not None
    assert away[1] < 0 < away[0]
    assert mix([(-1.0, EAST)]) == pytest.approx(-EAST)


def test_a_mix_of_nothing_or_of_opposites_is_nothing() -> None:
    assert mix([]) is None
    assert mix([(1.0, None)]) is None
    assert mix([(1.0, EAST), (-1.0, EAST)]) is None
    assert mix([(0.0, EAST)]) is None
