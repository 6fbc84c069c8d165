"""One ranking out of several lists, and pages that never overlap."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalens.domain import LegHit, VectorName
from catalens_query.fusion import Part, RankedList, extend, first, fuse, own_picture, shares


def ranked(using: VectorName, weight: float, **scores: float) -> RankedList:
    hits = sorted((LegHit(key, score) for key, score in scores.items()), key=lambda hit: -hit.score)
    return RankedList(using, weight, hits)


def ids(hits: list[LegHit]) -> list[str]:
    return [hit.product_id for hit in hits]


def test_a_single_list_keeps_its_scores() -> None:
    assert fuse([ranked("image", 1.0, a=0.2, b=0.31)]) == [LegHit("b", 0.31), LegHit("a", 0.2)]


def test_ties_come_in_product_id_order_whatever_the_index_says() -> None:
    hits = [LegHit("c", 0.5), LegHit("a", 0.5), LegHit("b", 0.5)]
    assert ids(fuse([RankedList("text", 1.0, hits)])) == ["a", "b", "c"]


def test_a_list_with_larger_numbers_counts_no_more() -> None:
    """The modality gap: text to text cosines are far above text to image cosines."""
    texts = ranked("text", 0.5, a=0.90, b=0.89, c=0.80)
    pictures = ranked("image", 0.5, b=0.30, a=0.21, c=0.20)
    assert ids(fuse([texts, pictures])) == ["b", "a", "c"]


def test_scores_run_from_zero_to_one() -> None:
    fused = fuse([ranked("text", 0.5, a=0.9, b=0.1), ranked("image", 0.5, a=0.3, b=0.2)])
    assert fused == [LegHit("a", 1.0), LegHit("b", 0.0)]


def test_weights_need_not_sum_to_one() -> None:
    lists = [ranked("text", 0.5, a=0.9, b=0.1), ranked("image", 0.5, a=0.3, b=0.2)]
    halved = [RankedList(one.using, one.weight / 2, one.hits) for one in lists]
    assert fuse(halved) == fuse(lists)


def test_the_best_lexical_hit_stands_before_all_that_have_none_of_the_words() -> None:
    noise = {f"n{number}": 0.5 - number / 100 for number in range(20)}
    lists = [
        ranked("text", 0.2, **noise, code=0.1),
        ranked("image", 0.2, **noise),
        ranked("lexical", 0.6, code=3.2),
    ]
    assert ids(fuse(lists))[0] == "code"


def test_a_weak_lexical_hit_is_measured_against_the_best_one() -> None:
    fused = {hit.product_id: hit.score for hit in fuse([ranked("lexical", 0.5, a=8.0, b=2.0), ranked("text", 0.5)])}
    assert fused == {"a": pytest.approx(0.5), "b": pytest.approx(0.125)}


def test_equal_scores_in_a_list_are_all_the_best() -> None:
    fused = fuse([ranked("text", 0.5, a=0.4, b=0.4), ranked("lexical", 0.5, b=1.0)])
    assert fused == [LegHit("b", 1.0), LegHit("a", 0.5)]


def test_empty_lists_are_no_error() -> None:
    assert fuse([ranked("text", 0.5), ranked("lexical", 0.5)]) == []


@pytest.mark.parametrize("single", [True, False])
def test_pages_are_the_same_at_every_depth_and_never_overlap(single: bool) -> None:
    draw = random.Random(7)
    used: tuple[VectorName, ...] = ("image",) if single else ("image", "text", "lexical")
    names = [f"p{number:03}" for number in range(300)]
    lists = [
        RankedList(using, 1.0, sorted((LegHit(key, draw.random()) for key in names), key=lambda hit: -hit.score))
        for using in used
    ]

    def ranking(upto: int) -> list[LegHit]:
        found: list[LegHit] = []
        for depth in (20, 100, 300):
            tier = fuse([RankedList(one.using, one.weight, one.hits[:depth]) for one in lists])
            found = extend(found, tier, single=single)
            if len(found) >= upto:
                break
        return found

    whole = ranking(300)
    assert sorted(ids(whole)) == names
    assert [hit.score for hit in whole] == sorted((hit.score for hit in whole), reverse=True)
    paged = [hit for start in range(0, 300, 7) for hit in ranking(start + 7)[start : start + 7]]
    assert paged == whole


def test_first_moves_the_product_to_the_front_without_losing_or_repeating_any() -> None:
    ranking = [LegHit("a", 0.9), LegHit("b", 0.5)]
    assert first(ranking, "b") == [LegHit("b", 0.9), LegHit("a", 0.9)]
    assert first(ranking, "c") == [LegHit("c", 0.9), *ranking]
    assert first([], "c") == [LegHit("c", 1.0)]


def test_the_very_same_picture_is_known_by_its_cosine() -> None:
    assert own_picture([ranked("text", 0.1, b=1.0), ranked("image", 0.9, a=0.99998, c=0.99)]) == "a"
    assert own_picture([ranked("image", 0.9, a=0.999)]) is None
    assert own_picture([ranked("image", 0.9), ranked("text", 0.1, a=1.0)]) is None


def test_a_product_without_a_picture_is_not_held_back_by_the_pictures() -> None:
    lexical = RankedList("lexical", 0.6, [LegHit("bare", 9.0), LegHit("shown", 8.0)], complete=True)
    text = RankedList("text", 0.2, [LegHit("bare", 0.9), LegHit("shown", 0.8), LegHit("other", 0.1)], complete=True)
    pictures = [LegHit("shown", 0.5), LegHit("other", 0.1)]
    assert fuse([lexical, text, RankedList("image", 0.2, pictures, complete=True)])[0].product_id == "bare"
    cut_off = fuse([lexical, text, RankedList("image", 0.2, pictures)])
    assert cut_off[0].product_id == "shown", "beyond the end of a longer list it may have a picture that is far off"


scores = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(-1, 1).map(lambda value: round(value, 3)), max_size=8)


@given(
    lists=st.lists(st.tuples(scores, st.sampled_from([0.2, 0.3, 0.5]), st.booleans()), min_size=1, max_size=3),
    calibrate=st.booleans(),
)
def test_what_each_list_adds_sums_to_the_score(
    lists: list[tuple[dict[str, float], float, bool]], calibrate: bool
) -> None:
    names: list[VectorName] = ["text", "image", "lexical"]
    given_lists = [
        RankedList(name, weight, ranked(name, weight, **hits).hits, complete=complete)
        for name, (hits, weight, complete) in zip(names, lists, strict=False)
    ]
    for hit in fuse(given_lists, calibrate=calibrate):
        parts = shares(given_lists, hit.product_id, calibrate=calibrate)
        assert sum(part.contribution for part in parts) == pytest.approx(hit.score)
        assert {part.part for part in parts if part.score is not None} == {
            one.using for one in given_lists if hit.product_id in {each.product_id for each in one.hits}
        }


def test_a_list_that_cannot_judge_has_no_share() -> None:
    pictures = RankedList("image", 0.5, [LegHit("a", 0.3), LegHit("b", 0.2)], complete=True)
    texts = RankedList("text", 0.5, [LegHit("c", 0.9), LegHit("a", 0.8), LegHit("b", 0.7)], complete=True)
    assert shares([pictures, texts], "c") == [Part("text", 1.0, score=0.9, calibrated=1.0, weight=1.0)]
    seen, read = shares([pictures, texts], "a")
    assert seen == Part("image", 0.5, score=0.3, calibrated=1.0, weight=0.5)
    assert (read.part, read.score, read.weight) == ("text", 0.8, 0.5)
    assert (read.calibrated, read.contribution) == pytest.approx((0.5, 0.25))


def test_a_deeper_tier_stays_below_even_where_boosts_raised_it_above_one() -> None:
    deeper = extend([LegHit("a", 0.4)], [LegHit("b", 2.0), LegHit("c", 1.0)], single=False)
    assert deeper == [LegHit("a", 0.4), LegHit("b", 0.4), LegHit("c", 0.2)]
