"""What a storefront does to a ranking, over HTTP on the real engines: explain, sort, group, boost, diversify, count."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests import naive
from tests.shop import Shop, open_shop, picture

from catalens.domain import Condition, Filter, ImageRef, Product, Range, StoredProduct
from catalens.embedding import CachedEncoder
from catalens.engines.memory import MemoryCache
from catalens.telemetry import Metrics
from catalens_query import calibration, searching
from catalens_query.searching import Order, Search, Searcher, Term

pytestmark = pytest.mark.asyncio(loop_scope="module")

COLORS = {"red": (220, 10, 10), "blue": (10, 10, 220), "green": (10, 160, 10)}
KINDS = ("shirt", "shoe", "towel")


def _product(number: int) -> Product:
    color = list(COLORS)[number % 3]
    return Product(
        product_id=f"p{number:02}",
        name=f"{color} {KINDS[number // 3 % 3]} {number}",
        brand=("Velo", "Linea", None)[number % 5 % 3],
        category=("Sport", "Sport > Shoes", "Home", None)[number % 4],
        price=None if number % 7 == 0 else float(number * 11 % 60),
        stock=None if number % 6 == 0 else number % 4,
        group_id=f"g{number % 9}" if number % 2 else None,
        attributes={"color": color, "margin": number * 5 % 17, "size": [str(number % 3), str(number % 5)]},
        version=1000 + number * 29 % 48,
        offer_version=1,
    )


def pictures_of(number: int) -> list[bytes]:
    """Return the picture of that product, if it has one."""
    red, green, blue = COLORS[str(_product(number).attributes["color"])]
    shade = number // 6 * 6  # so that each is the picture of two products
    return [] if number % 3 == 2 else [picture(red, min(255, green + shade), blue)]


PRODUCTS = [_product(number) for number in range(48)]
BY_ID = {product.product_id: product for product in PRODUCTS}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shop]:
    """A shop with PRODUCTS; two thirds have a picture, and some of these are the same."""
    async with open_shop(tmp_path_factory.mktemp("shop") / "data") as opened:
        for number, product in enumerate(PRODUCTS):
            await opened.put(product, *pictures_of(number))
        yield opened


async def ranking(shop: Shop, **body: Any) -> list[dict[str, Any]]:
    """Return all results of a search."""
    answer = await shop.search(**{"query": "red shirt", **body, "limit": 100})
    assert answer["count"] == len(answer["results"])
    found: list[dict[str, Any]] = answer["results"]
    return found


def ids(results: list[dict[str, Any]]) -> list[str]:
    return [result["product_id"] for result in results]


async def refused(shop: Shop, field: str, **body: Any) -> None:
    answer = await shop.call("POST", "/api/v1/search", json={"query": "red", **body})
    assert answer.status == 422, answer.body
    assert field in [error["field"] for error in answer.json["errors"]], answer.json


# --- pages ----------------------------------------------------------------------------------------------------

FILTERS: dict[str, Any] = {
    "brand": "Velo",
    "category": "Sport",
    "price": {"gte": 10, "lt": 45},
    "in_stock": True,
    "attributes.color": ["red", "blue"],
}
requests = st.fixed_dictionaries(
    {
        "query": st.sampled_from(
            ["red shirt", "shoe", "velo", "p07", [{"text": "green"}, {"text": "towel", "weight": -0.5}]]
        )
    },
    optional={
        "mode": st.sampled_from(["auto", "semantic", "lexical"]),
        "using": st.sampled_from(["image", "text"]),
        "sort": st.sampled_from(["price_asc", "price_desc", "newest"]),
        "group_by": st.sampled_from(["group_id", "image"]),
        "boosts": st.lists(
            st.fixed_dictionaries(
                {
                    "field": st.sampled_from(["stock", "in_stock", "price", "newest", "attributes.margin"]),
                    "factor": st.sampled_from([-1, -0.3, 0.2, 2]),
                }
            ),
            max_size=3,
        ),
        "diversity": st.sampled_from([0.0, 0.3, 1.0]),
        "min_score": st.sampled_from([0.0, 0.2, 0.6]),
        "filters": st.sets(st.sampled_from(sorted(FILTERS)), max_size=2).map(
            lambda keys: {key: FILTERS[key] for key in sorted(keys)}
        ),
    },
)


def where(filters: dict[str, Any]) -> Filter:
    return Filter(
        tuple(
            Condition(key, within=Range(**value))
            if isinstance(value, dict)
            else Condition(key, tuple(value) if isinstance(value, list) else (value,))
            for key, value in filters.items()
        )
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=requests, size=st.integers(6, 15))
@example(body={"query": [{"text": "green"}, {"text": "towel", "weight": -0.5}], "using": "text"}, size=6)
async def test_pages_neither_repeat_nor_skip_and_scores_are_explained(
    shop: Shop, body: dict[str, Any], size: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:  # a catalogue much larger than what is looked at first
        patch.setattr(searching, "TIERS", (7, 20, 10_100))
        patch.setattr(searching, "SORTED", 20)
        patch.setattr(searching, "WINDOW", 10)
        whole = await ranking(shop, **body, explain=True)
        paged: list[dict[str, Any]] = []
        for offset in range(0, len(whole) + size, size):
            answer = await shop.search(**body, explain=True, limit=size, offset=offset)
            assert answer.get("total", len(whole)) == len(whole)
            paged += answer["results"]
    assert paged == whole
    assert len(set(ids(whole))) == len(whole)
    assert all(naive.matches(BY_ID[name], where(body.get("filters", {}))) for name in ids(whole))
    if "mode" not in body and not body.get("boosts"):
        assert all(result["score"] >= 0 for result in whole)
    if "sort" not in body and not body.get("diversity"):
        scores = [result["score"] for result in whole]
        assert scores == sorted(scores, reverse=True)
    if body.get("group_by") == "group_id":
        groups = [result["group_id"] for result in whole if result["group_id"] is not None]
        assert len(set(groups)) == len(groups)
    for result in whole:
        assert sum(part["contribution"] for part in result["explain"]) == pytest.approx(result["score"], abs=1e-6)


# --- explain --------------------------------------------------------------------------------------------------


async def test_explain_says_what_each_part_is_worth(shop: Shop) -> None:
    plain = await shop.search(query="red shirt", limit=1)
    assert "explain" not in plain["results"][0]
    boosts = [{"field": "in_stock", "factor": 0.5}]
    (best, *_) = await ranking(shop, explain=True, boosts=boosts, filters={"product_id": ["p27", "p01"]})
    assert best["product_id"] == "p27"
    parts = {part["part"]: part for part in best["explain"]}
    assert parts.keys() == {"image", "text", "lexical", "boost"}
    assert parts["lexical"].keys() == {"part", "score", "calibrated", "weight", "contribution"}
    assert parts["lexical"]["weight"] == pytest.approx(0.6)
    assert (parts["lexical"]["calibrated"], parts["lexical"]["contribution"]) == pytest.approx((1.0, 0.6))
    assert parts["lexical"]["score"] > 1
    assert -1 <= parts["image"]["score"] <= 1
    base = sum(part["contribution"] for name, part in parts.items() if name != "boost")
    assert parts["boost"] == {
        "part": "boost",
        "field": "in_stock",
        "calibrated": 1.0,
        "weight": 0.5,
        "contribution": pytest.approx(base / 2),
    }
    assert best["score"] == pytest.approx(base * 1.5)


async def test_a_product_asked_for_by_its_id_says_so(shop: Shop) -> None:
    best = (await ranking(shop, query="p07", explain=True))[0]
    assert best["product_id"] == "p07"
    assert "exact" in [part["part"] for part in best["explain"]]
    shown = picture(*COLORS["red"])
    seen = (await shop.search(image={"data": b64encode(shown).decode()}, explain=True))["results"][0]
    assert [part["part"] for part in seen["explain"]] == ["image", "text", "exact"]


# --- sort -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sort", ["price_asc", "price_desc", "newest"])
async def test_sorting_orders_everything_that_has_the_words(shop: Shop, sort: str) -> None:
    found = await ranking(shop, query="shirt", mode="lexical", sort=sort)
    expected = [product for product in PRODUCTS if "shirt" in product.name]

    def key(product: Product) -> tuple[bool, float, str]:
        if sort == "newest":
            return False, -(product.version or 0), product.product_id
        price = product.price
        return price is None, (price or 0) * (1 if sort == "price_asc" else -1), product.product_id

    assert ids(found) == [product.product_id for product in sorted(expected, key=key)]
    relevance = {result["product_id"]: result["score"] for result in await ranking(shop, query="shirt", mode="lexical")}
    assert {result["product_id"]: result["score"] for result in found} == relevance


async def test_sorting_what_is_alike_takes_the_best_only(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "SORTED", 8)
    best = await ranking(shop, mode="semantic", using="text")
    cheap = await ranking(shop, mode="semantic", using="text", sort="price_asc")
    assert set(ids(cheap)) == set(ids(best)[:8])
    prices = [result["price"] for result in cheap if result["price"] is not None]
    assert prices == sorted(prices)


# --- groups ---------------------------------------------------------------------------------------------------


async def test_one_result_a_group_and_how_many_it_stands_for(shop: Shop) -> None:
    whole = await ranking(shop)
    grouped = await ranking(shop, group_by="group_id", filters={"attributes.color": "red"})
    red = [product for product in PRODUCTS if product.attributes["color"] == "red"]
    for result in grouped:
        group = result["group_id"]
        assert result["variants"] == (1 if group is None else sum(product.group_id == group for product in red))
    assert sum(result["variants"] for result in grouped) == len(red)
    first = [next(name for name in ids(whole) if BY_ID[name].group_id == f"g{number}") for number in range(9)]
    assert set(first) <= set(ids(await ranking(shop, group_by="group_id")))
    assert "variants" not in whole[0]


async def test_a_page_of_groups_is_full(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "TIERS", (3, 12, 10_100))
    answer = await shop.search(query="red shirt", group_by="group_id", limit=20)
    assert answer["count"] == 20


async def test_equal_pictures_are_shown_once(shop: Shop) -> None:
    found = await ranking(shop, group_by="image", using="image", mode="semantic")
    vectors = await shop.engines.index.get("default", list(BY_ID), with_vectors=True)
    shown = [vectors[name].vectors["image"] for name in ids(found)]
    alike = [float(one @ other) for number, one in enumerate(shown) for other in shown[:number]]
    assert max(alike) < 0.9999
    assert len(found) < len(await ranking(shop, using="image", mode="semantic"))
    bare = [name for name, stored in vectors.items() if "image" not in stored.vectors]
    assert set(bare) <= set(ids(await ranking(shop, group_by="image")))


# --- boosts and diversity -------------------------------------------------------------------------------------


async def test_a_boost_lifts_and_a_negative_one_lowers(shop: Shop) -> None:
    whole = await ranking(shop)
    last = {result["product_id"]: place for place, result in enumerate(whole)}
    lifted = await ranking(shop, boosts=[{"field": "attributes.margin", "factor": 10}])
    margins = [result["attributes"]["margin"] for result in lifted]
    assert sum(margins[:10]) > sum(result["attributes"]["margin"] for result in whole[:10])
    sunk = await ranking(shop, boosts=[{"field": "in_stock", "factor": -1}])
    assert sunk[-1]["score"] == 0
    assert {name for name in ids(sunk) if BY_ID[name].stock} == {
        result["product_id"] for result in sunk if result["score"] == 0 and BY_ID[result["product_id"]].stock
    }
    assert sorted(ids(lifted)) == sorted(last)


@pytest.mark.parametrize("mode", ["hybrid", "lexical"])
async def test_beside_a_sort_boosts_and_diversity_have_no_effect(shop: Shop, mode: str) -> None:
    body: dict[str, Any] = {"query": "shirt", "mode": mode, "sort": "price_desc", "explain": True}
    boosts = [{"field": "stock", "factor": 5}, {"field": "in_stock", "factor": -1}]
    assert await ranking(shop, **body, boosts=boosts, diversity=0.9) == await ranking(shop, **body)


async def test_boosts_of_nothing_change_no_order(shop: Shop) -> None:
    assert ids(await ranking(shop, boosts=[{"field": "attributes.nobody", "factor": 5}])) == ids(await ranking(shop))


async def test_diversity_shows_other_colors_sooner(shop: Shop) -> None:
    def colors(found: list[dict[str, Any]]) -> int:
        return len({result["attributes"]["color"] for result in found[:4]})

    plain = await ranking(shop, query="red", using="image", mode="semantic")
    mixed = await ranking(shop, query="red", using="image", mode="semantic", diversity=0.7)
    assert colors(plain) == 1
    assert colors(mixed) == 2, "the products whose picture is green have none"
    assert sorted(ids(plain)) == sorted(ids(mixed))
    assert mixed[0] == plain[0]


# --- facets ---------------------------------------------------------------------------------------------------


def counts(facet: list[dict[str, Any]]) -> dict[tuple[bool, Any], int]:
    return {(isinstance(one["value"], bool), one["value"]): one["count"] for one in facet}


@pytest.mark.parametrize("mode", ["auto", "semantic", "lexical"])
@pytest.mark.parametrize(
    "filters", [{}, {"brand": "Velo"}, {"price": {"gte": 10, "lt": 45}, "attributes.color": ["red"]}]
)
async def test_facets_equal_a_naive_count(shop: Shop, mode: str, filters: dict[str, Any]) -> None:
    keys = ["brand", "category", "attributes.color", "attributes.size", "in_stock", "group_id", "price", "stock"]
    body: dict[str, Any] = {"query": "red", "mode": mode, "filters": filters}
    answer = await shop.search(**body, facets=[*keys, "brand"], limit=1)
    assert answer["facets"].keys() == set(keys)
    for key in keys:
        others = {name: value for name, value in filters.items() if name != key}
        among = [
            product
            for product in PRODUCTS
            if naive.matches(product, where(others)) and (mode != "lexical" or "red" in product.name)
        ]
        facet = answer["facets"][key]
        if key not in ("price", "stock"):
            assert counts(facet) == naive.counted(among, key), key
            assert [one["count"] for one in facet] == sorted((one["count"] for one in facet), reverse=True)
            continue
        numbers = [value for product in among if (value := getattr(product, key)) is not None]
        assert (facet["min"], facet["max"]) == (min(numbers), max(numbers))
        for one in facet["ranges"]:
            assert one["count"] == sum(one["gte"] <= number < one.get("lt", 1e309) for number in numbers)
        assert sum(one["count"] for one in facet["ranges"]) == len(numbers)
        shown = await ranking(shop, **{**body, "filters": {**others, key: {"gte": facet["ranges"][0]["gte"]}}})
        assert len(shown) == len(numbers)


async def test_words_that_the_model_does_not_know_are_counted_as_words(shop: Shop) -> None:
    assert not (await shop.encoder.embed_text("shirt")).any()
    answer = await shop.search(query="shirt", facets=["attributes.color"])
    assert sum(one["count"] for one in answer["facets"]["attributes.color"]) == answer["total"] == 18
    answer = await shop.search(query="shirt", mode="semantic", facets=["brand"])
    assert (answer["total"], answer["facets"]) == (0, {"brand": []})


async def test_a_facet_of_nothing_is_empty(shop: Shop) -> None:
    answer = await shop.search(query="zzzz", mode="lexical", facets=["brand", "price", "attributes.nobody"])
    assert answer["facets"] == {"brand": [], "price": {"min": None, "max": None, "ranges": []}, "attributes.nobody": []}
    assert (answer["results"], answer["total"]) == ([], 0)


async def test_facets_need_no_encoder(shop: Shop) -> None:
    answer = await shop.search(query="shirt", facets=["brand"], wordless=True)
    assert answer["facets"] == (await shop.search(query="shirt", mode="lexical", facets=["brand"]))["facets"]


# --- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("facets.1", {"facets": ["brand", "colour"]}),
        ("facets", {"facets": ["brand"] * 11}),
        ("facets", {"facets": "brand"}),
        ("group_by", {"group_by": "brand"}),
        ("sort", {"sort": "price"}),
        ("boosts.0.field", {"boosts": [{"field": "name", "factor": 1}]}),
        ("boosts.0.factor", {"boosts": [{"field": "stock", "factor": 11}]}),
        ("boosts.0.factor", {"boosts": [{"field": "stock"}]}),
        ("boosts", {"boosts": [{"field": "stock", "factor": 1}] * 9}),
        ("diversity", {"diversity": 1.5}),
        ("diversity", {"diversity": "0.5"}),
        ("explain", {"explain": "yes"}),
    ],
)
async def test_what_makes_no_sense_is_named(shop: Shop, field: str, body: dict[str, Any]) -> None:
    await refused(shop, field, **body)


# --- min_score ------------------------------------------------------------------------------------------------


async def test_what_is_not_relevant_enough_is_left_out(shop: Shop) -> None:
    bodies: list[dict[str, Any]] = [
        {"query": "red shirt"},
        {"query": "shirt", "mode": "lexical"},
        {"query": "green", "mode": "semantic"},
    ]
    for body in bodies:
        everything = await ranking(shop, **body, min_score=0)
        assert ids(everything) == ids(await ranking(shop, **body))
        cut = sorted(result["relevance"] for result in everything)[len(everything) // 2]
        kept = await ranking(shop, **body, min_score=cut)
        assert ids(kept) == [result["product_id"] for result in everything if result["relevance"] >= cut]
        assert kept
        assert all(0 <= result["relevance"] <= 1 for result in everything)
        answer = await shop.search(**body, min_score=cut, limit=1)
        assert answer["total"] == len(kept)
    assert "relevance" not in (await ranking(shop))[0]


async def test_the_share_of_the_words_that_was_found_is_the_relevance_of_words(shop: Shop) -> None:
    found = {result["product_id"]: result for result in await ranking(shop, mode="lexical", min_score=0)}
    assert found["p27"]["relevance"] > 0.9, "red shirt"
    assert 0.2 < found["p03"]["relevance"] < 0.7, "red shoe"
    missing = await ranking(shop, query="shirt zzzz", mode="lexical", min_score=0)
    assert all(result["relevance"] < 0.6 for result in missing)
    assert await ranking(shop, query="shirt zzzz", mode="lexical", min_score=0.8) == []


async def test_words_of_hardly_any_weight_are_no_fault(shop: Shop) -> None:
    words = [{"text": "red shirt", "weight": 1}, {"text": "t-shirt", "weight": 5e-324}]
    found = ids((await shop.search(query=words, min_score=0.8))["results"])
    assert found == ids((await shop.search(query="red shirt", min_score=0.8))["results"]) != []


async def test_facets_count_what_is_relevant_enough(shop: Shop) -> None:
    body: dict[str, Any] = {"query": "red shirt", "min_score": 0.8, "filters": {"brand": "Velo"}}
    answer = await shop.search(**body, facets=["attributes.color", "brand"], limit=100)
    shown = [BY_ID[name] for name in ids(answer["results"])]
    assert counts(answer["facets"]["attributes.color"]) == naive.counted(shown, "attributes.color")
    others = await ranking(shop, query="red shirt", min_score=0.8)
    assert counts(answer["facets"]["brand"]) == naive.counted([BY_ID[name] for name in ids(others)], "brand")


@pytest.mark.parametrize("sort", ["relevance", "price_asc", "price_desc", "newest"])
@pytest.mark.parametrize("body", [{"query": "p07"}, {"query": "p07", "mode": "lexical"}, {"image": None}])
async def test_a_product_asked_for_itself_is_relevant_whatever_the_sort(
    shop: Shop, body: dict[str, Any], sort: str
) -> None:
    if "image" in body:
        body = {"image": {"data": b64encode(pictures_of(7)[0]).decode()}}
    answer = await shop.search(**body, min_score=1, sort=sort, explain=True, facets=["image_status", "brand"])
    (found,) = answer["results"]
    assert found["product_id"] in (["p07", "p10"] if "image" in body else ["p07"])  # two have that picture
    assert found["relevance"] == 1
    assert sum(part["contribution"] for part in found["explain"]) == pytest.approx(found["score"], abs=1e-6)
    assert counts(answer["facets"]["image_status"]) == {(False, "ok"): 1}
    assert counts(answer["facets"]["brand"]) == naive.counted([BY_ID[found["product_id"]]], "brand")


@pytest.mark.parametrize(("name", "mode"), [("de", "lexical"), ("--", "lexical"), ("do", "auto")])
async def test_a_product_whose_id_is_no_word_is_counted(shop: Shop, name: str, mode: str) -> None:
    await shop.put(Product(product_id=name, name="Widget", brand="Acme"))
    body: dict[str, Any] = {"query": name, "mode": mode, "facets": ["brand", "in_stock"]}
    for more in ({}, {"min_score": 0.99}, {"sort": "newest"}, {"min_score": 0.99, "sort": "newest"}):
        answer = await shop.search(**body, **more)
        assert ids(answer["results"]) == [name]
        assert counts(answer["facets"]["brand"]) == {(False, "Acme"): 1}
        answer = await shop.search(**body, **more, filters={"brand": "Velo"})
        assert answer["results"] == []
        assert counts(answer["facets"]["brand"]) == {(False, "Acme"): 1}  # nothing else stands in its way
        assert answer["facets"]["in_stock"] == []
    await shop.delete(name, 2)


asked_for_itself = st.one_of(
    st.sampled_from([{"query": "p07"}, {"query": "p30"}, {"query": "p07", "mode": "lexical"}, {"query": "red shirt"}]),
    st.integers(0, 47).filter(lambda number: number % 3 != 2).map(lambda number: {"image": number}),
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=asked_for_itself,
    least=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    sort=st.sampled_from(["relevance", "price_asc", "newest"]),
    keys=st.sets(st.sampled_from(sorted(FILTERS)), max_size=2),
)
async def test_facets_count_the_results_of_min_score_whatever_was_asked_for(
    shop: Shop, body: dict[str, Any], least: float, sort: str, keys: set[str]
) -> None:
    if "image" in body:
        body = {"image": {"data": b64encode(pictures_of(body["image"])[0]).decode()}}
    filters = {key: FILTERS[key] for key in sorted(keys)}
    whole = {**body, "min_score": least, "sort": sort, "limit": 100}
    answer = await shop.search(**whole, filters=filters, facets=["brand", "image_status", "attributes.color"])
    for key in ("brand", "image_status", "attributes.color"):
        others = {name: value for name, value in filters.items() if name != key}
        shown = (await shop.search(**whole, filters=others))["results"]
        if key == "image_status":
            statuses = ["ok" if pictures_of(int(name[1:])) else "none" for name in ids(shown)]
            expected: dict[tuple[bool, Any], int] = dict(Counter((False, status) for status in statuses))
        else:
            expected = naive.counted([BY_ID[name] for name in ids(shown)], key)
        assert counts(answer["facets"][key]) == expected


async def test_what_is_coming_in_is_measured_anew_and_what_is_there_kept_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "SAMPLE", 12)
    async with open_shop(tmp_path) as shop:
        index, draws = shop.engines.index, 0
        sample = index.sample

        async def drawn(tenant: str, limit: int) -> Sequence[StoredProduct]:
            nonlocal draws
            draws += 1
            return await sample(tenant, limit)

        monkeypatch.setattr(index, "sample", drawn)
        body = Search((Term("red"),), None, Filter(), limit=100, offset=0, mode="semantic", order=Order(min_score=0))

        def searcher() -> Searcher:
            metrics = Metrics()
            return Searcher(index, CachedEncoder(shop.encoder, MemoryCache(10), metrics), metrics)

        async def judged(by: Searcher) -> dict[str, float | None]:
            hits = (await by.search("default", body)).hits
            return {hit.stored.product.product_id: hit.relevance for hit in hits}

        loop = asyncio.get_running_loop()
        started, passed = loop.time(), 0.0
        monkeypatch.setattr(loop, "time", lambda: started + passed)  # stands still
        early = searcher()
        assert await judged(early) == {}
        for numbers in (range(6), range(6, 11), range(11, 12)):
            for number in numbers:
                away = number == 11  # its picture has not come yet
                images = (ImageRef(url="https://example.org/11.png"),) if away else ()
                product = PRODUCTS[number].model_copy(update={"images": images})
                await shop.put(product, *([] if away else pictures_of(number)))
            assert await judged(early) == (some := await judged(searcher()))
            draws = 0
            assert await judged(early) == some
            assert draws == 0
            passed += 0.12
        await shop.put(PRODUCTS[11].model_copy(update={"version": 5000}), picture(1, 2, 3))
        assert await judged(early) == (whole := await judged(searcher()))
        passed += 599
        monkeypatch.setattr(searching, "_MOST_SAMPLES", 1)
        await early.search("empty", body)  # whose sample is over at once, and leaves the other
        draws = 0
        await shop.delete("p03", 5000)
        kept = await judged(early)
        assert (draws, kept) == (0, {name: sure for name, sure in whole.items() if name != "p03"})
        passed += 1
        assert await judged(early) == await judged(searcher())
        assert draws == 2


@pytest.mark.parametrize("value", [-0.1, 1.1, "0.5", True])
async def test_a_min_score_out_of_range_is_named(shop: Shop, value: Any) -> None:
    await refused(shop, "min_score", min_score=value)
