"""Typing, and mistyping, over HTTP on the real engines: suggestions, corrected searches, and whose words they are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from tests.shop import TENANT, Shop, open_shop

from catalens import lexical
from catalens.domain import IndexDocument, Product
from catalens.errors import Transient
from catalens.ports import VectorIndex
from catalens_query.suggesting import Suggester
from catalens_query.vocabularies import Vocabularies

pytestmark = pytest.mark.asyncio(loop_scope="module")

PRODUCTS = [
    Product(product_id="red-shoe", name="Runner red", brand="Velo", category="Sport > Shoes"),
    Product(product_id="blue-shoe", name="Runner blue", brand="Velo", category="Sport > Shoes"),
    Product(product_id="shirt", name="Green shirt", brand="Linea", category="Clothing", description="woven"),
    Product(product_id="towel", name="Serviette d'été", description="Brand Vela", attributes={"sku": "RX-1001"}),
]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def shop(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shop]:
    async with open_shop(tmp_path_factory.mktemp("suggest")) as shop:
        for product in PRODUCTS:
            await shop.put(product)
        other = Product(product_id="secret", name="Runaway secret", brand="Rundel", category="Rum", version=1)
        document = IndexDocument("other", other, "none", lexical=lexical.document_vector(other))
        assert list(await shop.engines.index.upsert([document])) == ["applied"]
        await shop.vocabularies.read(TENANT, shop.engines.index)
        yield shop


async def suggest(shop: Shop, **params: Any) -> Any:
    answer = await shop.call("GET", "/api/v1/suggest", params=params)
    assert answer.status == 200, answer.body
    assert answer.json["count"] == len(answer.json["suggestions"])
    return answer.json


async def texts(shop: Shop, text: str) -> list[str]:
    return [one["text"] for one in (await suggest(shop, q=text))["suggestions"]]


async def test_suggestions_have_the_time_of_a_search(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    now, passed = loop.time, 0.0
    monkeypatch.setattr(loop, "time", lambda: now() + passed)

    async def never(*_: object) -> None:
        nonlocal passed
        passed = 16.0
        await loop.create_future()

    with monkeypatch.context() as late:
        late.setattr(shop.engines.index, "search", never)
        answer = await shop.call("GET", "/api/v1/suggest", params={"q": "Run"})
        assert (answer.status, answer.json["detail"]) == (503, "the suggestions took longer than 15 s")
        assert "Retry-After" in answer.headers


async def test_suggestions(shop: Shop) -> None:
    answer = await suggest(shop, q="Run")
    assert answer["ready"] is True
    assert answer["suggestions"] == [
        {"text": "runner", "kind": "words", "count": 2},
        {"text": "Runner blue", "kind": "product", "product_id": "blue-shoe"},
        {"text": "Runner red", "kind": "product", "product_id": "red-shoe"},
    ]
    assert await texts(shop, "vel") == ["Velo"]
    assert await texts(shop, "ETE") == ["été", "Serviette d'été"]
    assert await texts(shop, "runer r") == ["runner red"]  # and not the product of that name beside it
    assert await texts(shop, "RX-1001") == ["Serviette d'été"]
    assert await texts(shop, "nothing-like-it") == []
    assert len((await suggest(shop, q="r", limit=1))["suggestions"]) == 1


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({}, "q"),
        ({"q": ""}, "q"),
        ({"q": " "}, "q"),
        ({"q": "x" * 201}, "q"),
        ({"q": "x", "limit": "0"}, "limit"),
        ({"q": "x", "limit": "21"}, "limit"),
        ({"q": "x", "size": "2"}, "size"),
    ],
)
async def test_what_is_no_beginning_is_refused(shop: Shop, params: dict[str, str], field: str) -> None:
    answer = await shop.call("GET", "/api/v1/suggest", params=params)
    assert answer.status == 422
    assert [error["field"] for error in answer.json["errors"]] == [field]


async def test_tenants_see_their_own_words_only(shop: Shop) -> None:
    for text in ("run", "secret", "rundel", "rum"):
        assert not {"Runaway secret", "Rundel", "Rum", "runaway", "secret"} & set(await texts(shop, text))
    vocabularies = Vocabularies()
    await vocabularies.read("other", shop.engines.index)
    found = await Suggester(shop.engines.index, vocabularies).suggest("other", "r", 20)
    assert found is not None
    assert {one.text for one in found} == {"Rundel", "Rum", "runaway", "Runaway secret"}
    assert (await shop.search(query="secrat", mode="lexical"))["results"] == []


@pytest.mark.parametrize(
    ("query", "corrected", "first"),
    [
        ("runnr blue", "runner blue", "blue-shoe"),
        ("Green shrit", "Green shirt", "shirt"),
        ("sreviette", "serviette", "towel"),
        ("wowen", "woven", "shirt"),
    ],
)
async def test_a_misspelt_search_finds_and_says_how_it_was_read(
    shop: Shop, query: str, corrected: str, first: str
) -> None:
    for mode in ("lexical", "hybrid", "auto"):
        answer = await shop.search(query=query, mode=mode)
        assert answer["corrected"] == corrected
        assert answer["results"][0]["product_id"] == first
    sure = await shop.search(query=query, mode="lexical", min_score=0.5)
    assert first in [result["product_id"] for result in sure["results"]]
    unsure = await shop.search(query=query, mode="lexical", min_score=0.99)
    assert unsure["results"] == []
    listed = await shop.search(query=[{"text": query}, {"text": "towel", "weight": -0.5}], mode="lexical")
    assert listed["corrected"] == corrected


async def test_words_that_are_meant_as_they_are_written_are_not_corrected(shop: Shop) -> None:
    assert (await shop.search(query="wowen", mode="lexical"))["results"]
    meant = await shop.search(query="wowen", mode="lexical", correct=False)
    assert (meant["results"], "corrected" in meant) == ([], False)


@pytest.mark.parametrize("query", ["runner blue", "runners", "RX-1001", "RX-1002", "shirt", "Velo", "une serviette"])
async def test_what_the_catalogue_knows_is_searched_as_it_is_written(shop: Shop, query: str) -> None:
    for mode in ("lexical", "hybrid"):
        assert "corrected" not in await shop.search(query=query, mode=mode)


async def test_what_was_written_weighs_more_than_what_may_have_been_meant(shop: Shop) -> None:
    # Indexed after the words were read: unknown to the vocabulary, and found all the same.
    await shop.put(Product(product_id="newcomer", name="Sharp Ranner"))
    try:
        answer = await shop.search(query="ranner", mode="lexical")
        assert answer["corrected"] == "runner"
        assert answer["results"][0]["product_id"] == "newcomer"
        assert len(answer["results"]) == 3
    finally:
        await shop.delete("newcomer", 2)


async def weight(shop: Shop, query: str, **asked: Any) -> float:
    """Return how much the words' list counts for the best product."""
    (best, *_) = (await shop.search(query=query, explain=True, **asked))["results"]
    return next(float(part["weight"]) for part in best["explain"] if part["part"] == "lexical")


async def test_words_that_the_catalogue_has_not_make_the_others_count_less(shop: Shop) -> None:
    whole = await weight(shop, "runner blue")
    assert await weight(shop, "RX-1001 blue") == pytest.approx(whole)  # a code is in no vocabulary, but in the index
    some = await weight(shop, "runner blue qqqq")
    assert 0 < await weight(shop, "runner blue qqqq pppp") < some < whole
    assert await weight(shop, "runner blue qqqq", correct=False) == pytest.approx(some)
    before = await weight(shop, "blue glorp")
    await shop.put(Product(product_id="glorp", name="Glorp"))  # after the words were read
    try:
        assert before < await weight(shop, "blue glorp") == pytest.approx(whole)
        assert (await shop.search(query="glorp shoe"))["results"][0]["product_id"] == "glorp"
    finally:
        await shop.delete("glorp", 2)


async def test_what_the_catalogue_writes_in_another_way_is_known(tmp_path: Path) -> None:
    names = {
        "RX-1002": "Runner blue",
        "router": "blue WiFi router",
        "dress": "Dress red size M",
        "headphones": "blue noise cancelling headphones",
        "case": "iPhone 8 blue leather case",
        "shampoo": "blue shampoo 500ml",
    }
    async with open_shop(tmp_path) as shop:
        for product_id, name in names.items():
            await shop.put(Product(product_id=product_id, name=name))
        parts = [Product(product_id=f"part-{n}", name=f"Part 2 {n + 100}", version=1) for n in range(30)]
        await shop.engines.index.upsert(
            [IndexDocument(TENANT, part, "none", lexical=lexical.document_vector(part)) for part in parts]
        )
        await shop.vocabularies.read(TENANT, shop.engines.index)
        whole = await weight(shop, "blue runner")
        for query in (
            "RX-1002 blue",
            "RX-1002 runner blue",
            "blue wi-fi router",
            "dress m red",
            "blue noise-cancelling headphones",
            "iphone 8 blue case",
            "blue shampoo 500 ml",
            "2 blue routers",
            f"blue {' '.join(map(str, range(100, 130)))} 500ml 2 8 m",  # more than are asked for
            "RX-9999 blue",  # nobody has the code, and no vector knows it
            "blue RX-1002 497555",
        ):
            assert await weight(shop, query) == pytest.approx(whole), query
        assert await weight(shop, "jaune blue") < whole
        # A number that is everywhere says nothing, so two words that nobody has leave next to nothing of the list.
        only = {"product_id": list(names)}
        assert await weight(shop, "2 jaune vert", filters=only) < 0.01


# --- the reading ----------------------------------------------------------------------------------------------


class HandClock:
    """Time that passes only where it is told to."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.time += seconds


class Away:
    """An index that is away; only what is asked for is here."""

    async def page(self, *_: object, **__: object) -> list[object]:
        raise Transient("the index is away")


def using(index: VectorIndex) -> Any:
    @contextmanager
    def use() -> Iterator[VectorIndex]:
        yield index

    return use


async def test_before_the_words_are_read_nothing_is_suggested_nor_corrected(tmp_path_factory: Any) -> None:
    async with open_shop(tmp_path_factory.mktemp("unread")) as shop:
        await shop.put(PRODUCTS[0])
        answer = await shop.call("GET", "/api/v1/suggest", params={"q": "run"})
        assert answer.json == {"suggestions": [], "count": 0, "ready": False}
        assert "corrected" not in await shop.search(query="runnr", mode="lexical")
        await shop.vocabularies.catch_up(using(shop.engines.index), asyncio.Event())
        assert (await suggest(shop, q="run"))["ready"] is True
        assert (await shop.search(query="runnr", mode="lexical"))["corrected"] == "runner"


async def test_words_are_read_again_when_the_catalogue_has_grown_or_time_has_passed(tmp_path_factory: Any) -> None:
    async with open_shop(tmp_path_factory.mktemp("growing")) as shop:
        clock, index, never = HandClock(), shop.engines.index, asyncio.Event()
        vocabularies = Vocabularies(clock=clock)

        async def known(seconds: float) -> int:
            clock.time += seconds
            before = len(vocabularies.of(TENANT) or ())
            await vocabularies.catch_up(using(index), never)
            after = vocabularies.of(TENANT)
            assert after is not None
            assert len(after) >= before
            return len(after)

        assert await known(0) == 0
        await shop.put(PRODUCTS[0])
        assert await known(1) == 0  # too soon
        grown = await known(60)
        assert grown > 0
        assert await known(60) == grown
        changed = PRODUCTS[0].model_copy(update={"name": "Runner red extraordinary", "version": 2})
        await shop.put(changed)
        assert await known(60) == grown  # as many products as before
        assert await known(3600) == grown + 1


async def test_who_is_not_asked_for_is_not_read_and_forgotten_first(shop: Shop) -> None:
    vocabularies = Vocabularies(most_words=12)
    never = asyncio.Event()
    await vocabularies.catch_up(using(shop.engines.index), never)
    vocabularies.of("other")
    await vocabularies.catch_up(using(shop.engines.index), never)
    assert vocabularies.of("other") is not None
    vocabularies.of(TENANT)
    await vocabularies.catch_up(using(shop.engines.index), never)
    assert vocabularies.of("other") is None
    assert vocabularies.of(TENANT) is not None


async def test_an_index_that_is_away_is_asked_again_later(shop: Shop) -> None:
    clock = HandClock()
    vocabularies = Vocabularies(clock=clock)
    vocabularies.of(TENANT)
    await vocabularies.catch_up(using(Away()), asyncio.Event())  # type: ignore[arg-type]  # only what is asked for
    await vocabularies.catch_up(using(shop.engines.index), asyncio.Event())
    assert vocabularies.of(TENANT) is None
    clock.time += 60
    await vocabularies.catch_up(using(shop.engines.index), asyncio.Event())
    assert vocabularies.of(TENANT) is not None


async def test_reading_ends_when_it_is_told_to(shop: Shop) -> None:
    stop = asyncio.Event()
    vocabularies = Vocabularies()
    vocabularies.of(TENANT)
    stop.set()
    await vocabularies.run(using(shop.engines.index), stop)
    await vocabularies.read(TENANT, shop.engines.index, stop)
    assert vocabularies.of(TENANT) is None
