"""Search over HTTP on the real engines: modes, filters, paging, pictures and words, more like this, and refusals."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer
from pydantic import SecretStr
from tests.shop import Shop, open_shop, picture

from catalens.domain import Product
from catalens.settings import ApiKey
from catalens_query import searching

pytestmark = pytest.mark.asyncio(loop_scope="module")

RED, BLUE, GREEN = picture(220, 10, 10), picture(10, 10, 220), picture(10, 160, 10)
TOWELS = 30
ALL_FIELDS = {
    *("product_id", "score", "name", "description", "brand", "category", "price", "currency", "stock", "in_stock"),
    *("image", "image_status", "url", "locale", "group_id", "attributes", "version", "offer_version"),
}
RED_SHOE = Product(
    product_id="red-shoe",
    name="Runner red",
    description="Light on long roads",
    brand="Velo",
    category="Sport > Shoes",
    price=59.9,
    currency="EUR",
    stock=3,
    attributes={"color": "red", "sku": "RX-1001", "size": ["41", "42"], "weight": 280, "vegan": True},
    group_id="runner",
    url="https://shop.example/red-shoe",
    locale="en",
    version=7,
    offer_version=9,
)
BLUE_SHOE = RED_SHOE.model_copy(
    update={
        "product_id": "blue-shoe",
        "name": "Runner blue",
        "stock": 0,
        "attributes": {"color": "blue", "sku": "RX-1002", "size": ["43"], "weight": 300.5, "vegan": False},
    }
)
SHIRT = Product(
    product_id="shirt",
    name="Green shirt",
    brand="Linea",
    category="Clothing > Shirts",
    price=20,
    currency="USD",
    stock=10,
    locale="fr",
    offer_version=1,
)
DECOY = Product(product_id="decoy", name="red-shoe red-shoe red-shoe", brand="Other", category="Sportswear")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shop]:
    """A shop with a few telling products and many towels."""
    async with open_shop(tmp_path_factory.mktemp("shop") / "data") as opened:
        await opened.put(RED_SHOE, RED)
        await opened.put(BLUE_SHOE, BLUE)
        await opened.put(SHIRT, GREEN)
        await opened.put(DECOY)
        for number in range(TOWELS):
            await opened.put(
                Product(product_id=f"towel-{number:02}", name=f"White cotton towel {number}", category="Home")
            )
        yield opened


def data(content: bytes) -> dict[str, str]:
    return {"data": b64encode(content).decode()}


async def refused(shop: Shop, status: int, field: str, **body: Any) -> None:
    answer = await shop.call("POST", "/api/v1/search", json=body)
    assert answer.status == status, answer.body
    assert answer.headers["Content-Type"].startswith("application/problem+json")
    assert field in [error["field"] for error in answer.json.get("errors", [])], answer.json


# --- the answer ---------------------------------------------------------------------------------------------


async def test_an_answer_has_every_field_of_the_contract(shop: Shop) -> None:
    answer = await shop.search(query="runner", limit=2)
    assert answer.keys() == {"results", "count", "total", "model", "mode", "took_ms"}
    assert answer["total"] == 2
    assert answer["count"] == len(answer["results"]) == 2
    assert answer["model"] == shop.encoder.spec.id
    assert answer["mode"] == "hybrid"
    assert answer["took_ms"] > 0
    found = {result["product_id"]: result for result in answer["results"]}["red-shoe"]
    assert found.keys() == ALL_FIELDS
    assert found == {
        **RED_SHOE.model_dump(exclude={"images"}),
        "score": found["score"],
        "in_stock": True,
        "image": "/api/v1/products/red-shoe/image",
        "image_status": "ok",
    }


async def test_what_is_unknown_is_null(shop: Shop) -> None:
    (found,) = (await shop.search(query="decoy", filters={"product_id": "decoy"}))["results"]
    unknown = ("price", "currency", "stock", "in_stock", "image", "url", "locale", "group_id", "offer_version")
    assert [found[name] for name in unknown] == [None] * len(unknown)
    assert found["image_status"] == "none"


async def test_include_trims_the_results(shop: Shop) -> None:
    answer = await shop.search(query="runner", include=["name", "image"], limit=1)
    assert answer["results"][0].keys() == {"product_id", "score", "name", "image"}
    answer = await shop.search(query="runner", include=[], limit=1)
    assert answer["results"][0].keys() == {"product_id", "score"}
    await refused(shop, 422, "include.1", query="runner", include=["name", "colour"])


# --- modes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("using", ["both", "image", "text"])
@pytest.mark.parametrize("mode", ["auto", "semantic", "hybrid"])
async def test_every_mode_with_every_using_falls_in_score(shop: Shop, mode: str, using: str) -> None:
    answer = await shop.search(query="green shirt", mode=mode, using=using, limit=50)
    scores = [result["score"] for result in answer["results"]]
    assert scores == sorted(scores, reverse=True)
    assert answer["mode"] == ("semantic" if mode == "semantic" else "hybrid")
    if using == "image":
        assert {result["product_id"] for result in answer["results"]} == {"red-shoe", "blue-shoe", "shirt"}
    else:
        assert answer["count"] == TOWELS + 4


async def test_lexical_finds_the_words_and_nothing_else(shop: Shop) -> None:
    answer = await shop.search(query="shirts", mode="lexical")
    assert [result["product_id"] for result in answer["results"]] == ["shirt"]
    assert answer["mode"] == "lexical"
    assert answer["results"][0]["score"] > 0
    assert await shop.ids(query="zzzz", mode="lexical") == []


async def test_a_list_on_its_own_scores_by_the_cosine(shop: Shop) -> None:
    words = "green shirt"
    answer = await shop.search(query=words, mode="semantic", using="text", limit=1)
    best = answer["results"][0]
    stored = (await shop.engines.index.get("default", [best["product_id"]], with_vectors=True))[best["product_id"]]
    cosine = float(stored.vectors["text"] @ await shop.encoder.embed_text(words))
    assert best["score"] == pytest.approx(cosine, abs=1e-4)


@pytest.mark.parametrize("mode", ["auto", "hybrid", "lexical"])
async def test_a_query_that_is_a_product_id_comes_first(shop: Shop, mode: str) -> None:
    found = await shop.ids(query="red-shoe", mode=mode, limit=100)
    assert found[0] == "red-shoe"
    assert len(found) == len(set(found))
    assert (await shop.ids(query="red-shoe", mode=mode, filters={"brand": "Other"}))[:1] == ["decoy"]


async def test_it_comes_first_whatever_the_other_lists_say(shop: Shop) -> None:
    await shop.put(Product(product_id="white-lime", name="Widget", version=1))
    await shop.put(Product(product_id="echo", name="White lime, lime white, white-lime", version=1), picture(0, 255, 0))
    found = (await shop.search(query=" white-lime\n", limit=2))["results"]
    assert [result["product_id"] for result in found] == ["white-lime", "echo"]
    assert found[0]["score"] >= found[1]["score"]
    await shop.delete("white-lime", 2)
    await shop.delete("echo", 2)


@pytest.mark.parametrize(("query", "expected"), [("RX-1002", "blue-shoe"), ("rx-1001", "red-shoe"), ("Linea", "shirt")])
async def test_codes_and_brands_win_in_auto(shop: Shop, query: str, expected: str) -> None:
    assert (await shop.ids(query=query))[0] == expected


# --- pictures -----------------------------------------------------------------------------------------------


async def test_a_picture_finds_its_product(shop: Shop) -> None:
    for content, product_id in ((RED, "red-shoe"), (BLUE, "blue-shoe"), (GREEN, "shirt")):
        answer = await shop.search(image=data(content), using="image")
        assert answer["mode"] == "semantic"
        assert answer["results"][0]["product_id"] == product_id
        assert answer["results"][0]["score"] == pytest.approx(1.0, abs=1e-3)
        assert (await shop.ids(image=data(content)))[0] == product_id


async def test_a_products_own_picture_finds_it_before_a_twin_with_a_better_text(shop: Shop) -> None:
    await shop.put(Product(product_id="own", name="Widget", version=1), picture(200, 200, 0))
    await shop.put(Product(product_id="twin", name="Yellow", version=1), picture(201, 201, 0))
    assert (await shop.ids(image=data(picture(200, 200, 0))))[:2] == ["own", "twin"]
    assert (await shop.ids(image=data(picture(201, 201, 0))))[:2] == ["twin", "own"]
    await shop.delete("own", 2)
    await shop.delete("twin", 2)


async def test_a_picture_is_fetched_from_its_url(shop: Shop) -> None:
    async def serve(_request: web.Request) -> web.Response:
        return web.Response(body=BLUE, content_type="image/png")

    app = web.Application()
    app.router.add_get("/blue.png", serve)
    async with TestServer(app) as host:
        found = await shop.ids(image={"url": str(host.make_url("/blue.png"))}, using="image")
        assert found[0] == "blue-shoe"
        await refused(shop, 422, "image.url", image={"url": str(host.make_url("/lost.png"))})
    await refused(shop, 422, "image.url", image={"url": "ftp://example.org/a.png"})
    await refused(shop, 422, "image.url", image={"url": "no url"})


@pytest.mark.parametrize("mode", ["auto", "semantic", "hybrid"])
async def test_the_ends_of_image_weight_are_the_pure_searches(shop: Shop, mode: str) -> None:
    both: dict[str, Any] = {"query": "blue cotton towel", "image": data(RED), "mode": mode, "limit": 100}
    words = await shop.search(query="blue cotton towel", mode=mode, limit=100)
    seen = await shop.search(image=data(RED), mode=mode, limit=100)
    at_zero = await shop.search(**both, image_weight=0)
    at_one = await shop.search(**both, image_weight=1)
    assert (at_zero["results"], at_zero["mode"]) == (words["results"], words["mode"])
    assert (at_one["results"], at_one["mode"]) == (seen["results"], seen["mode"])
    assert words["results"] != seen["results"]


async def test_a_picture_and_words_together_take_from_both(shop: Shop) -> None:
    body = {"query": "Linea", "image": data(BLUE)}
    assert (await shop.ids(**body, image_weight=0.1))[0] == "shirt"
    assert (await shop.ids(**body, image_weight=0.95, using="image"))[0] == "blue-shoe"


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("image.data", {"image": {"data": "not base64!"}}),
        ("image.data", {"image": {"data": "AAA"}}),
        ("image.data", {"image": {"data": "AAAA!"}}),
        ("image", {"image": {}}),
        ("image", {"image": {"url": "http://localhost/a.png", "data": "AAAA"}}),
        ("image.blob", {"image": {"blob": "0" * 64}}),
        ("image_weight", {"query": "a", "image_weight": 1.1}),
        ("image_weight", {"query": "a", "image_weight": -0.1}),
        ("image_weight", {"query": "a", "image_weight": "0.5"}),
    ],
)
async def test_a_wrong_picture_field_is_named(shop: Shop, field: str, body: dict[str, Any]) -> None:
    await refused(shop, 422, field, **body)


async def test_what_is_no_picture_is_415_and_a_large_one_413(shop: Shop) -> None:
    for content, status in ((b"hello", 415), (RED[: len(RED) // 2], 415), (b"\x89PNG" + bytes(500_001), 413)):
        await refused(shop, status, "image", query="towel", image=data(content))
        await refused(shop, status, "like.1", like=["shirt", data(content)], unlike=[data(RED)])
        await refused(shop, status, "unlike.0", query="towel", unlike=[data(content)])
        for side, other in ("ab", "ba"):
            body = {side: {"image": data(content)}, other: {"text": "towel"}}
            answer = await shop.call("POST", "/api/v1/similarity", json=body)
            assert (answer.status, answer.json["errors"][0]["field"]) == (status, f"{side}.image")


# --- weighted words, and examples ----------------------------------------------------------------------------


async def test_one_term_is_the_same_as_its_words(shop: Shop) -> None:
    plain = await shop.search(query="blue runner", limit=100)
    term = await shop.search(query=[{"text": "blue runner"}], limit=100)
    assert term["results"] == plain["results"]
    assert (await shop.ids(query=[{"text": "red-shoe"}]))[0] == "red-shoe"


@pytest.mark.parametrize("mode", ["lexical", "hybrid"])
async def test_the_heavier_words_win_and_the_unwanted_lose(shop: Shop, mode: str) -> None:
    async def order(red: float, blue: float) -> list[str]:
        terms = [{"text": "runner"}, {"text": "red", "weight": red}, {"text": "blue", "weight": blue}]
        found = await shop.ids(query=terms, mode=mode, filters={"brand": "Velo"})
        return [product_id for product_id in found if product_id in ("red-shoe", "blue-shoe")]

    assert (await order(2, 1))[0] == "red-shoe"
    assert (await order(1, 2))[0] == "blue-shoe"
    assert (await order(1, -1))[0] == "red-shoe"
    assert (await order(-1, 1))[0] == "blue-shoe"


async def test_what_has_only_unwanted_words_is_not_found_by_words(shop: Shop) -> None:
    unwanted = {"text": "runner", "weight": -0.5}
    assert await shop.ids(query="runner", mode="lexical")
    assert await shop.ids(query=[{"text": "violin"}, unwanted], mode="lexical") == []


async def test_like_a_product_finds_its_kind_and_not_itself(shop: Shop) -> None:
    answer = await shop.search(like=["red-shoe"], limit=3)
    assert answer["mode"] == "semantic"
    assert answer["count"] == 3
    assert "red-shoe" not in [result["product_id"] for result in answer["results"]]
    similar = await shop.call("GET", "/api/v1/products/red-shoe/similar?variants=true&limit=3")
    assert similar.json["results"] == answer["results"]


async def test_like_a_picture_is_the_search_by_that_picture(shop: Shop) -> None:
    assert (await shop.ids(like=[data(BLUE)], using="image"))[0] == "blue-shoe"
    assert (await shop.ids(like=[data(GREEN)], using="image"))[0] == "shirt"


async def test_unlike_pushes_away(shop: Shop) -> None:
    near = await shop.search(like=["shirt"], limit=100, using="image")
    pushed = await shop.search(like=["shirt"], unlike=[data(RED)], limit=100, using="image")
    score = {one["product_id"]: one["score"] for one in near["results"]}
    after = {one["product_id"]: one["score"] for one in pushed["results"]}
    assert after["red-shoe"] < score["red-shoe"]
    assert "blue-shoe" not in await shop.ids(query="runner", unlike=["blue-shoe"], limit=100)


async def test_words_and_an_example_take_from_both(shop: Shop) -> None:
    like: dict[str, Any] = {"like": ["red-shoe"], "using": "image", "limit": 100}
    assert set(await shop.ids(**like)) == {"blue-shoe", "shirt"}
    answer = await shop.search(query="cotton", **like)
    assert answer["mode"] == "hybrid"
    found = {result["product_id"] for result in answer["results"]}
    assert found == {"blue-shoe", "shirt", *(f"towel-{number:02}" for number in range(TOWELS))}


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("like.0", {"like": ["nothing-of-this-name"]}),
        ("unlike.1", {"query": "a", "unlike": ["shirt", "nothing-of-this-name"]}),
        ("like.0.data", {"like": [{"data": "AAA"}]}),
        ("body", {"query": [{"text": "a", "weight": -1}]}),
        ("body", {"unlike": ["shirt"]}),
        ("body", {"like": ["shirt"], "query": "a", "mode": "lexical"}),
    ],
)
async def test_a_wrong_example_or_term_is_named(shop: Shop, field: str, body: dict[str, Any]) -> None:
    answer = await shop.call("POST", "/api/v1/search", json=body)
    assert answer.status == 422, answer.body
    fields = [error["field"] for error in answer.json.get("errors", [])]
    assert any(one.startswith(field) or (field == "body" and one in ("", "body")) for one in fields), answer.json


# --- filters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"brand": "Velo"}, {"red-shoe", "blue-shoe"}),
        ({"brand": ["Linea", "Other"]}, {"shirt", "decoy"}),
        ({"brand": "velo"}, set()),
        ({"category": "Sport"}, {"red-shoe", "blue-shoe"}),
        ({"category": "Sport > Shoes"}, {"red-shoe", "blue-shoe"}),
        ({"category": "Sport>Shoes"}, {"red-shoe", "blue-shoe"}),
        ({"category": "Shoes"}, set()),
        ({"category": ["Clothing", "Sportswear"]}, {"shirt", "decoy"}),
        ({"price": 20}, {"shirt"}),
        ({"price": {"gte": 20, "lte": 59.9}}, {"red-shoe", "blue-shoe", "shirt"}),
        ({"price": {"gt": 20}}, {"red-shoe", "blue-shoe"}),
        ({"price": {"lt": 59.9}}, {"shirt"}),
        ({"currency": "USD"}, {"shirt"}),
        ({"stock": {"gte": 3}}, {"red-shoe", "shirt"}),
        ({"stock": [0, 10]}, {"blue-shoe", "shirt"}),
        ({"in_stock": True}, {"red-shoe", "shirt"}),
        ({"in_stock": False}, {"blue-shoe"}),
        ({"in_stock": [True, False]}, {"red-shoe", "blue-shoe", "shirt"}),
        ({"group_id": "runner"}, {"red-shoe", "blue-shoe"}),
        ({"locale": "fr"}, {"shirt"}),
        ({"image_status": "ok"}, {"red-shoe", "blue-shoe", "shirt"}),
        ({"product_id": ["shirt", "nothing"]}, {"shirt"}),
        ({"attributes.color": "red"}, {"red-shoe"}),
        ({"attributes.size": ["42", "43"]}, {"red-shoe", "blue-shoe"}),
        ({"attributes.weight": {"gt": 280}}, {"blue-shoe"}),
        ({"attributes.weight": 280}, {"red-shoe"}),
        ({"attributes.vegan": False}, {"blue-shoe"}),
        ({"attributes.nothing": "x"}, set()),
        ({"brand": "Velo", "in_stock": True}, {"red-shoe"}),
    ],
)
async def test_filters_keep_what_matches(shop: Shop, filters: dict[str, Any], expected: set[str]) -> None:
    answer = await shop.search(query="red or blue", filters=filters, limit=100)
    assert {result["product_id"] for result in answer["results"]} == expected
    assert set(await shop.ids(query="red or blue", mode="semantic", using="text", filters=filters)) == expected


@pytest.mark.parametrize("key", ["colour", "attributes.", "attributes", "tenant"])
async def test_an_unknown_filter_is_named(shop: Shop, key: str) -> None:
    await refused(shop, 422, f"filters.{key}", query="a", filters={key: "x"})


async def test_a_filter_of_the_wrong_type_is_named(shop: Shop) -> None:
    await refused(shop, 422, "filters.price", query="a", filters={"price": "20", "brand": "Velo"})
    await refused(shop, 422, "filters.stock", query="a", filters={"stock": True})
    await refused(shop, 422, "filters", query="a", filters=["brand"])


# --- paging -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body", [{"query": "blue cotton towel 7"}, {"query": "towel", "mode": "lexical"}, {"image": data(RED)}]
)
async def test_pages_follow_one_another_without_gap_or_overlap(shop: Shop, body: dict[str, Any]) -> None:
    whole = (await shop.search(**body, limit=100))["results"]
    assert len(whole) > 3
    paged: list[Any] = []
    for offset in range(0, len(whole) + 7, 7):
        paged += (await shop.search(**body, limit=7, offset=offset))["results"]
    assert paged == whole
    assert (await shop.search(**body, offset=10_000))["results"] == []


@pytest.mark.parametrize("body", [{"query": "blue cotton towel 7"}, {"query": "towel", "mode": "lexical"}])
async def test_pages_beyond_the_first_look_follow_too(
    shop: Shop, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "TIERS", (5, 12, 10_100))
    paged: list[Any] = []
    for offset in range(0, TOWELS, 4):
        paged += (await shop.search(**body, limit=4, offset=offset))["results"]
    whole = (await shop.search(**body, limit=100))["results"]
    assert paged == whole[: len(paged)]
    assert len({result["product_id"] for result in whole}) == len(whole) >= TOWELS
    scores = [result["score"] for result in whole]
    assert scores == sorted(scores, reverse=True)


async def test_ties_come_in_product_id_order(shop: Shop) -> None:
    results = (await shop.search(query="home", mode="lexical", limit=100))["results"]
    order = [(-result["score"], result["product_id"]) for result in results]
    assert len(order) == TOWELS
    assert order == sorted(order)


@pytest.mark.parametrize("limit", [-1, 0, 101, 10**9, 1.5, "10", True])
async def test_a_limit_out_of_range_is_refused_and_never_clamped(shop: Shop, limit: Any) -> None:
    await refused(shop, 422, "limit", query="towel", limit=limit)


@pytest.mark.parametrize("offset", [-1, 10_001, 10**30])
async def test_an_offset_out_of_range_is_refused(shop: Shop, offset: int) -> None:
    await refused(shop, 422, "offset", query="towel", offset=offset)


@pytest.mark.parametrize("path", ["search", "search-image", "products/red-shoe/similar"])
@pytest.mark.parametrize("query", ["limit=-1", "limit=0", "limit=101", "limit=1000000000", "offset=10001", "size=3"])
async def test_the_url_is_checked_as_the_body_is(shop: Shop, path: str, query: str) -> None:
    method = "GET" if path.endswith("similar") else "POST"
    answer = await shop.call(method, f"/api/v1/{path}?{query}")
    assert answer.status == 422, answer.body
    assert answer.json["errors"][0]["field"] == query.partition("=")[0]


async def test_the_url_wins_over_the_body(shop: Shop) -> None:
    body = {"query": "towel", "limit": 5, "offset": 0}
    answer = await shop.call("POST", "/api/v1/search?limit=2&offset=1", json=body)
    whole = await shop.search(query="towel", limit=5)
    assert answer.json["results"] == whole["results"][1:3]


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("surprise", 1),
    ],
)
async def test_what_is_not_built_or_unknown_is_refused_by_name(shop: Shop, field: str, value: Any) -> None:
    await refused(shop, 422, field, **{"query": "towel", field: value})


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("", {}),
        ("", {"mode": "lexical", "query": "a", "image": data(RED)}),
        ("query", {"query": ""}),
        ("query", {"query": " \n "}),
        ("query", {"query": "x" * 10_001}),
        ("query", {"query": ["a"]}),
        ("mode", {"query": "a", "mode": "fast"}),
        ("using", {"query": "a", "using": "video"}),
    ],
)
async def test_a_search_without_sense_is_refused(shop: Shop, field: str, body: dict[str, Any]) -> None:
    await refused(shop, 422, field, **body)


@pytest.mark.parametrize(
    "body",
    [
        b'{"query": ',
        b"[" * 50_000,
        b'{"filters":' * 50_000,
        b'{"query": "a", "image_weight": NaN}',
        b'{"query": "\xff"}',
        b'{"query": "\\ud800"}',
        b"",
    ],
)
async def test_malformed_json_is_400(shop: Shop, body: bytes) -> None:
    answer = await shop.call("POST", "/api/v1/search", data=body, headers={"Content-Type": "application/json"})
    assert answer.status == 400, answer.body


@pytest.mark.parametrize("query", ["🧦 👟", "\x00\x01", "ﷺ" * 100, "' OR 1=1 --", "x" * 10_000, "́̂̃"])
async def test_strange_words_are_searched_like_any_other(shop: Shop, query: str) -> None:
    for mode in ("auto", "lexical", "semantic"):
        await shop.search(query=query, mode=mode)


async def test_words_that_the_model_does_not_know_are_left_to_the_lexical_list(shop: Shop) -> None:
    assert not (await shop.encoder.embed_text("cotton")).any()
    assert await shop.ids(query="cotton", mode="semantic") == []
    known = await shop.search(query="cotton", limit=100)
    assert known["mode"] == "hybrid"
    assert known["results"] == (await shop.search(query="cotton", mode="lexical", limit=100))["results"]


# --- without an encoder -------------------------------------------------------------------------------------


async def test_auto_falls_back_to_words_and_says_why(shop: Shop) -> None:
    answer = await shop.search(query="green shirt", wordless=True)
    assert answer["mode"] == "lexical"
    assert "no model" in answer["degraded"]
    assert answer["model"] is None
    assert answer["results"] == (await shop.search(query="green shirt", mode="lexical"))["results"]
    both = await shop.search(query="green shirt", image=data(RED), wordless=True)
    assert both["results"] == answer["results"]


@pytest.mark.parametrize(
    "body",
    [
        {"query": "shirt", "mode": "semantic"},
        {"query": "shirt", "mode": "hybrid"},
        {"image": data(RED)},
        {"image": data(RED), "query": "shirt", "image_weight": 1},
    ],
)
async def test_what_needs_the_encoder_is_503_without_one(shop: Shop, body: dict[str, Any]) -> None:
    answer = await shop.call("POST", "/api/v1/search", json=body, wordless=True)
    assert answer.status == 503, answer.body
    assert int(answer.headers["Retry-After"]) >= 1


async def test_lexical_needs_no_encoder(shop: Shop) -> None:
    answer = await shop.search(query="shirt", mode="lexical", wordless=True)
    assert "degraded" not in answer
    assert answer["count"] == 1


# --- more like this -----------------------------------------------------------------------------------------


async def similar(shop: Shop, product_id: str, query: str = "") -> list[str]:
    answer = await shop.call("GET", f"/api/v1/products/{product_id}/similar?limit=100{query}")
    assert answer.status == 200, answer.body
    assert answer.json["mode"] == "semantic"
    return [result["product_id"] for result in answer.json["results"]]


async def test_similar_leaves_out_itself_and_its_variants(shop: Shop) -> None:
    found = await similar(shop, "red-shoe")
    assert "red-shoe" not in found
    assert "blue-shoe" not in found
    assert len(found) == TOWELS + 2
    assert "blue-shoe" in await similar(shop, "red-shoe", "&variants=true")
    assert "red-shoe" not in await similar(shop, "red-shoe", "&variants=true")


async def test_similar_by_picture_or_text_alone(shop: Shop) -> None:
    assert await similar(shop, "red-shoe", "&using=image") == ["shirt"]
    assert len(await similar(shop, "red-shoe", "&using=text")) == TOWELS + 2
    assert await similar(shop, "decoy", "&using=image") == []


async def test_similar_pages_and_needs_no_encoder(shop: Shop) -> None:
    whole = await similar(shop, "towel-03")
    answer = await shop.call("GET", "/api/v1/products/towel-03/similar?limit=4&offset=2", wordless=True)
    assert [result["product_id"] for result in answer.json["results"]] == whole[2:6]


async def test_similar_to_nothing_is_404_and_to_no_id_422(shop: Shop) -> None:
    assert (await shop.call("GET", "/api/v1/products/nothing/similar")).status == 404
    assert (await shop.call("GET", "/api/v1/products/a%20b/similar")).status == 422
    assert (await shop.call("GET", "/api/v1/products/red-shoe/similar?using=video")).status == 422


# --- several at once ----------------------------------------------------------------------------------------


async def test_a_batch_counts_against_a_rate_as_what_it_holds(tmp_path: Path) -> None:
    one = {"search": {"query": "shoe", "mode": "lexical"}, "embed": {"text": "shoe"}}
    keys = tuple(ApiKey(name=name, secret=SecretStr(name * 4), rate=0.001) for name in one)
    async with open_shop(tmp_path, api_keys=keys) as shop:
        for name, body in one.items():
            call = partial(shop.call, "POST", f"/api/v1/{name}/batch", headers={"X-API-Key": name * 4})
            answer = await call(json={"requests": [body] * 4})
            assert (answer.status, len(answer.json["responses"])) == (200, 4)
            refused = await call(json={"requests": [body]})
            assert refused.status == 429
            assert 3_000 < int(refused.headers["Retry-After"]) <= 4_000


async def test_a_batch_answers_each_on_its_own(shop: Shop) -> None:
    requests = [
        {"query": "green shirt", "limit": 2},
        {"query": "green shirt", "limit": 101},
        {"like": ["nothing-of-this-name"]},
        {"query": "green shirt", "filters": {"colour": "red"}},
        {"image": data(b"hello")},
    ]
    answer = await shop.call("POST", "/api/v1/search/batch", json={"requests": requests})
    assert answer.status == 200
    first, *problems = answer.json["responses"]
    alone = await shop.search(query="green shirt", limit=2)
    assert {**first, "took_ms": 0} == {**alone, "took_ms": 0}
    assert [problem["status"] for problem in problems] == [422, 422, 422, 415]
    assert {problem["request_id"] for problem in problems} == {answer.headers["X-Request-Id"]}


@pytest.mark.parametrize("requests", [[], [{"query": "a"}] * 6, ["a"], {"query": "a"}, None])
async def test_a_batch_that_is_none_is_refused(shop: Shop, requests: Any) -> None:
    answer = await shop.call("POST", "/api/v1/search/batch", json={"requests": requests})
    assert answer.status == 422
    assert answer.json["errors"][0]["field"].startswith("requests")


# --- deletions ----------------------------------------------------------------------------------------------


async def test_what_is_deleted_is_nowhere(shop: Shop) -> None:
    await shop.put(Product(product_id="gone", name="Gone with the wind", version=1), picture(9, 9, 9))
    assert (await shop.ids(query="gone"))[0] == "gone"
    await shop.delete("gone", 2)
    for body in ({"query": "gone wind"}, {"query": "gone", "mode": "lexical"}, {"image": data(picture(9, 9, 9))}):
        assert "gone" not in await shop.ids(**body, limit=100)
    assert "gone" not in await similar(shop, "red-shoe")
    for path in ("gone", "gone/similar", "gone/image"):
        assert (await shop.call("GET", f"/api/v1/products/{path}")).status == 404
    listing = await shop.call("GET", "/api/v1/products?limit=100")
    assert "gone" not in [product["product_id"] for product in listing.json["products"]]
    export = await shop.call("GET", "/api/v1/products", headers={"Accept": "application/x-ndjson"})
    assert "gone" not in [json.loads(line)["product_id"] for line in export.body.splitlines()]
