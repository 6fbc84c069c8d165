"""What follows the ranking by relevance: boosts, sorting, groups, equal pictures, diversity."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalens.domain import Facts, LegHit
from catalens_query.ordering import EQUAL_PICTURES, Boost, Boosts, Groups, Pictures, Sort, boosted, diverse, sorted_by

if TYPE_CHECKING:
    from catalens.domain import Embedding

HITS = [LegHit("a", 0.9), LegHit("b", 0.8), LegHit("c", 0.7), LegHit("d", 0.6)]
FACTS = {
    "a": Facts(version=3, price=20.0, stock=0, numbers={"margin": 5}),
    "b": Facts(version=1, price=None, stock=7),
    "c": Facts(version=9, price=10.0, stock=1, numbers={"margin": -2.5}),
    "d": Facts(version=3, price=10.0, stock=None, numbers={"margin": 0}),
}


def ids(hits: list[LegHit]) -> str:
    return "".join(hit.product_id for hit in hits)


def unit(*values: float) -> Embedding:
    vector = np.array(values, dtype=np.float32)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("in_stock", {"a": 0, "b": 1, "c": 1, "d": 0}),
        ("stock", {"a": 0, "b": 1, "c": 0.5, "d": 0}),
        ("price", {"a": 1, "b": 0, "c": 0, "d": 0}),
        ("newest", {"a": 1 / 3, "b": 0, "c": 1, "d": 1 / 3}),
        ("attributes.margin", {"a": 1, "b": 0, "c": 0, "d": 0.5}),
        ("attributes.nobody", dict.fromkeys("abcd", 0)),
    ],
)
def test_a_boost_is_worth_the_share_of_candidates_that_have_less(field: str, values: dict[str, float]) -> None:
    boosts = Boosts([Boost(field, 0.5)], FACTS.values())
    assert {name: boosts.values(facts)[0][1] for name, facts in FACTS.items()} == pytest.approx(values)
    assert {name: boosts.multiplier(facts) for name, facts in FACTS.items()} == pytest.approx(
        {name: 1 + value / 2 for name, value in values.items()}
    )
    assert boosts.multiplier(None) == 1


def test_more_than_any_candidate_had_is_worth_no_more_than_the_most() -> None:
    boosts = Boosts([Boost("stock", 1)], FACTS.values())
    assert boosts.multiplier(Facts(version=1, stock=10**9)) == 2
    assert Boosts([Boost("stock", 1)], []).multiplier(Facts(version=1, stock=5)) == 1


def test_boosts_add_up_and_never_turn_a_score_negative() -> None:
    both = Boosts([Boost("stock", 0.5), Boost("newest", -1.0)], FACTS.values())
    assert both.multiplier(FACTS["b"]) == 1.5
    assert both.multiplier(FACTS["c"]) == pytest.approx(0.25)
    assert Boosts([Boost("stock", -1.0), Boost("in_stock", -1.0)], FACTS.values()).multiplier(FACTS["b"]) == 0


def test_boosted_hits_are_in_order_again() -> None:
    raised = boosted(HITS, FACTS, Boosts([Boost("newest", 1.0)], FACTS.values()))
    assert ids(raised) == "cabd"
    assert [hit.score for hit in raised] == pytest.approx([1.4, 1.2, 0.8, 0.8])


@pytest.mark.parametrize(
    ("sort", "order"),
    [("relevance", "abcde"), ("price_asc", "cdabe"), ("price_desc", "acdbe"), ("newest", "cadbe")],
)
def test_sorting_puts_ties_in_id_order_and_what_is_unknown_last(sort: Sort, order: str) -> None:
    assert ids(sorted_by(sort, [*HITS, LegHit("e", 0.5)], FACTS)) == order


def test_the_first_of_each_group_stands_for_it_on_every_page() -> None:
    groups = Groups()
    group_of = {"a": "x", "b": "x", "c": None, "d": None, "e": "y"}.get
    assert ids(groups.first(HITS, group_of)) == "acd"
    assert ids(groups.first([LegHit("e", 0.3), LegHit("f", 0.2), LegHit("b", 0.1)], group_of)) == "ef"


def test_equal_pictures_are_one_and_what_has_none_stands_alone() -> None:
    vectors = {"a": {"image": unit(1, 0)}, "b": {"image": unit(1, 0.001)}, "c": {"text": unit(1, 0)}, "d": {}}
    pictures = Pictures()
    assert ids(pictures.first(HITS, vectors)) == "acd"
    later = {"e": {"image": unit(1, 0)}, "f": {"image": unit(1, 0.1)}, "g": {"image": unit(1, 0.1)}}
    assert ids(pictures.first([LegHit(name, 0.1) for name in "efg"], later)) == "f"


@given(
    chunks=st.lists(st.lists(st.none() | st.integers(0, 12), max_size=8), max_size=5),
    near=st.sampled_from([0.0, 0.005]),
)
def test_chunk_by_chunk_the_pictures_are_those_that_are_compared_one_by_one(
    chunks: list[list[int | None]], near: float
) -> None:
    # Of 13 angles, some so near to one another that neighbours are equal and the next but one is not.
    pictures, let_through = Pictures(), list[np.ndarray]()
    for number, chunk in enumerate(chunks):
        hits = [LegHit(f"{number}.{place}", 0.5) for place in range(len(chunk))]
        vectors = {
            hit.product_id: {"text": unit(1, 0)} if angle is None else {"image": unit(1, angle * 0.01 + near)}
            for hit, angle in zip(hits, chunk, strict=True)
        }
        expected = []
        for hit in hits:
            picture = vectors[hit.product_id].get("image")
            if picture is None or all(float(one @ picture) < EQUAL_PICTURES for one in let_through):
                expected.append(hit)
                let_through += [] if picture is None else [picture]
        assert pictures.first(hits, vectors) == expected


def test_without_diversity_the_order_is_the_rankings() -> None:
    vectors = {hit.product_id: {"image": unit(1, number)} for number, hit in enumerate(HITS)}
    assert diverse(HITS, vectors, 0.0) == HITS
    assert diverse([], {}, 0.5) == []


def test_diversity_puts_what_is_alike_further_down_and_keeps_scores() -> None:
    vectors = {
        "a": {"image": unit(1, 0)},
        "b": {"image": unit(1, 0.01)},
        "c": {"image": unit(0, 1)},
        "d": {"image": unit(0.01, 1)},
    }
    mixed = diverse(HITS, vectors, 0.6)
    assert ids(mixed) == "acbd"
    assert sorted(mixed, key=lambda hit: -hit.score) == HITS


def test_pictures_are_compared_with_pictures_and_texts_with_texts() -> None:
    # "b" has a text like that of "a", but another picture; "d" has no picture and the text of "c".
    vectors = {
        "a": {"image": unit(1, 0), "text": unit(1, 0)},
        "b": {"image": unit(0, 1), "text": unit(1, 0)},
        "c": {"image": unit(1, 0.1), "text": unit(0, 1)},
        "d": {"text": unit(0, 1)},
    }
    assert ids(diverse(HITS, vectors, 0.8)) == "abdc"


def test_equal_scores_are_told_apart_by_likeness_alone() -> None:
    flat = [LegHit(name, 0.5) for name in "abc"]
    vectors = {"a": {"image": unit(1, 0)}, "b": {"image": unit(1, 0.1)}, "c": {"image": unit(0, 1)}}
    assert ids(diverse(flat, vectors, 0.5)) == "acb"
    assert math.isclose(sum(hit.score for hit in diverse(flat, vectors, 1.0)), 1.5)
