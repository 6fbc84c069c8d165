"""What a ranking is worth, against figures worked out by hand, and what the statistics promise."""

from __future__ import annotations

import json
from math import log2

import numpy as np
import pytest

from catalens.errors import CatalensError
from catalens_standalone.evaluating import (
    MEASURES,
    Query,
    changes,
    from_titles,
    groups,
    intervals,
    measure,
    most_changed,
    queries,
    worst,
)


def line(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def test_measures_of_one_ranking() -> None:
    ranking = ["x", "good", "y", "z", "w", "v", "fair"]
    found = dict(zip(MEASURES, measure(ranking, {"good": 3, "fair": 1, "elsewhere": 2, "x": 0}), strict=True))
    assert found["recall@1"] == 0
    assert found["recall@5"] == pytest.approx(1 / 3)
    assert found["recall@10"] == pytest.approx(2 / 3)
    assert found["MRR"] == 1 / 2
    ideal = 3 / log2(2) + 2 / log2(3) + 1 / log2(4)
    assert found["nDCG@10"] == pytest.approx((3 / log2(3) + 1 / log2(8)) / ideal)


def test_a_perfect_ranking_is_worth_one_and_nothing_found_nothing() -> None:
    assert measure(["a", "b"], {"a": 1}) == (1, 1, 1, 1, 1)
    assert measure([], {"a": 1}) == (0, 0, 0, 0, 0)


def test_more_than_ten_right_products_can_still_be_ranked_perfectly() -> None:
    products = [f"p{number}" for number in range(30)]
    found = dict(zip(MEASURES, measure(products, dict.fromkeys(products, 1.0)), strict=True))
    assert found["nDCG@10"] == pytest.approx(1)
    assert found["recall@10"] == pytest.approx(1 / 3)


def test_what_stands_below_the_tenth_place_counts_in_the_reciprocal_rank_only() -> None:
    found = dict(zip(MEASURES, measure([*map(str, range(19)), "a"], {"a": 1}), strict=True))
    assert (found["MRR"], found["nDCG@10"], found["recall@10"]) == (1 / 20, 0, 0)


def test_the_interval_holds_the_true_mean_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(7)
    held = 0
    for _ in range(60):
        (found,) = intervals((random.random((80, 1)) < 0.3).astype(np.float64))
        assert found.low <= found.mean <= found.high
        held += found.low <= 0.3 <= found.high
    assert 50 <= held <= 60


def test_equal_queries_have_no_width() -> None:
    (found,) = intervals(np.full((20, 1), 0.25))
    assert (found.mean, found.low, found.high) == (0.25, 0.25, 0.25)


def test_what_did_not_change_is_not_significant_and_what_always_improves_is() -> None:
    random = np.random.default_rng(3)
    before = random.random((40, 1))
    (same,) = changes(before, before)
    assert (same.difference, same.p) == (0, 1)
    (better,) = changes(before, before + 0.1)
    assert better.difference == pytest.approx(0.1)
    assert better.p < 0.001
    (worse,) = changes(before, before - 0.1)
    assert worse.difference == pytest.approx(-0.1)
    assert worse.p == better.p


def test_p_of_few_queries_is_the_share_of_signs_that_reach_it() -> None:
    # Four queries, all better by one: of the 16 ways to set the signs, two give a difference as large.
    (found,) = changes(np.zeros((4, 1)), np.ones((4, 1)))
    assert found.p == pytest.approx(2 / 16, abs=0.01)


def test_p_is_uniform_where_nothing_changed() -> None:
    random = np.random.default_rng(11)
    small = sum(changes(random.random((30, 1)), random.random((30, 1)))[0].p < 0.2 for _ in range(25))
    assert 0 < small < 12  # five are to be expected


def test_queries_are_read_with_gains_or_only_named() -> None:
    read = queries(
        [
            line(query="red shoe", language="en", kind="title", relevant={"a": 3, "b": 0}),
            b"",
            line(image="shoe.jpg", relevant=["a", "b"]),
        ]
    )
    assert read[0].relevant == {"a": 3, "b": 0}
    assert read[1].relevant == {"a": 1, "b": 1}
    assert (read[1].query, read[1].shown, read[1].language) == (None, "shoe.jpg", "")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([b'{"query": "a", "relevant": ["p"]}', b"{"], "line 2: not JSON"),
        ([line(relevant=["p"])], "line 1: give query, image or both"),
        ([line(query="a", relevant=[])], "line 1: relevant names no product"),
        ([line(query="a", relevant={"p": 0})], "line 1: relevant names no product"),
        ([line(query="a", relevant=["p", 5])], "line 1: relevant: the ids of products are texts"),
        ([line(query="a", relevant={"p": -1})], "line 1: relevant.p"),
        ([line(query="a")], "line 1: relevant"),
        ([line(query=5, relevant=["p"])], "line 1: query"),
        ([b"[]"], "line 1"),
        ([b" "], "no query"),
    ],
)
def test_a_line_that_is_no_query_is_named(lines: list[bytes], said: str) -> None:
    with pytest.raises(CatalensError, match=said):
        queries(lines)


def test_titles_make_the_same_queries_again_and_a_shared_name_is_right_for_all() -> None:
    products = [{"product_id": f"p{number}", "name": f"Lamp {number}", "locale": "fr"} for number in range(20)]
    products += [{"product_id": "twin", "name": "Lamp 3"}, {"product_id": "nameless"}]
    made = from_titles(products, 5)
    assert len(made) == 5
    again = from_titles(reversed(products), 5)
    assert [(one.query, one.relevant) for one in again] == [(one.query, one.relevant) for one in made]
    everything = {one.query: one.relevant for one in from_titles(products, 100)}
    assert len(everything) == 20
    assert everything["Lamp 3"] == {"p3": 1, "twin": 1}


def test_groups_are_shown_where_there_are_several() -> None:
    judged = [Query(query="a", language=language, kind="title", relevant={"p": 1}) for language in ("fr", "en", "en")]
    assert list(groups(judged)) == [("all", [0, 1, 2]), ("language en", [1, 2]), ("language fr", [0])]


def test_the_queries_that_changed_most_come_first_and_the_unchanged_not_at_all() -> None:
    before = np.array([[0, 0, 0, 1.0, 1.0], [0, 0, 0, 0.5, 0.5], [0, 0, 0, 0.02, 0], [0, 0, 0, 0.1, 0.2]])
    after = before.copy()
    after[1, 4], after[3, 4], after[2, 3] = 0.1, 0.9, 0.05
    assert most_changed(before, after, 10) == [3, 1, 2]
    assert most_changed(before, after, 1) == [3]
    assert most_changed(before, before, 10) == []
    assert worst(before, 10) == [2, 3, 1]
