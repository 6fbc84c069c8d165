"""One cut-off for every query: what stands out among random products, and what share of the words was found."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from catalens_query.calibration import HALF, Standing, reachable, relevance
from catalens_query.planner import WeightedLeg

if TYPE_CHECKING:
    from catalens.domain import Embedding

EAST = np.array([1.0, 0.0], dtype=np.float32)


def at(cosine: float) -> Embedding:
    return np.array([cosine, np.sqrt(1 - cosine**2)], dtype=np.float32)


def sample(middle: float, spread: float) -> list[dict[str, Embedding]]:
    draw = np.random.default_rng(7).normal(middle, spread, 2000)
    return [{"image": at(float(np.clip(cosine, -1, 1)))} for cosine in draw]


@pytest.mark.parametrize(("middle", "spread"), [(0.2, 0.03), (0.7, 0.05), (0.0, 0.1)])
def test_what_stands_out_as_much_is_as_likely_whatever_the_cosines(middle: float, spread: float) -> None:
    standing = Standing([WeightedLeg("image", EAST, 1.0)], sample(middle, spread))
    assert standing.likely({"image": at(middle + HALF * spread)}) == pytest.approx(0.5, abs=0.06)
    assert standing.likely({"image": at(middle)}) < 0.05
    assert standing.likely({"image": at(middle + 1.4 * HALF * spread)}) > 0.75


def test_a_product_is_judged_by_the_vectors_that_it_has() -> None:
    legs = [WeightedLeg("image", EAST, 0.5), WeightedLeg("text", EAST, 0.5)]
    standing = Standing(legs, [{**one, "text": at(0.5)} for one in sample(0.2, 0.03)])
    near = {"image": at(0.4)}
    assert standing.likely(near) == pytest.approx(Standing(legs[:1], sample(0.2, 0.03)).likely(near))
    assert standing.likely({**near, "text": at(0.5)}) < standing.likely(near)
    assert standing.likely({}) == 0


def test_without_a_sample_there_is_an_answer_too() -> None:
    assert 0 <= Standing([WeightedLeg("image", EAST, 1.0)], []).likely({"image": EAST}) <= 1
    alike = [{"image": at(0.5)}] * 3
    assert Standing([WeightedLeg("image", EAST, 1.0)], alike).likely({"image": at(0.51)}) < 0.1


def test_a_word_that_nobody_has_counts_as_the_rarest() -> None:
    assert reachable([4.0, 2.0], [1.0, 1.0]) == 6.0
    assert reachable([4.0, 0.0], [1.0, 0.5]) == 6.0
    assert reachable([0.0], [1.0]) == 0
    assert reachable([], []) == 0
    assert reachable([4.0, 0.0], [1.0, 0.0]) == 4.0  # a weight of 5e-324, halved


def test_vectors_and_words_convince_together() -> None:
    assert relevance(0.5, 3.0, 6.0) == 0.75
    assert relevance(0.0, 6.1, 6.0) == 1.0
    assert relevance(0.3, -2.0, 6.0) == relevance(0.3, 0.0, 0.0) == pytest.approx(0.3)
