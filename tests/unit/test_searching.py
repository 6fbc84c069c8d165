"""What a search does when the encoder or a part of the index is busy, away or silent: what can be told is told."""

# ruff: noqa: ARG002  # fakes take the arguments of their ports

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalens.domain import (
    FacetCount,
    FacetKey,
    Facts,
    Filter,
    Leg,
    LegHit,
    ModelSpec,
    PictureInfo,
    Product,
    StoredProduct,
)
from catalens.embedding import CachedEncoder
from catalens.engines.memory import MemoryCache
from catalens.errors import CatalensError, Overloaded, Transient
from catalens.lexical import query_vector
from catalens.ports import EncodedImage
from catalens.telemetry import Metrics
from catalens_query.planner import RequestMode
from catalens_query.searching import Order, Search, Searcher, Term, beginnings

if TYPE_CHECKING:
    from catalens.domain import Embedding


class AwayEncoder:
    """An encoder that raises what it is told to, or never answers."""

    spec = ModelSpec(id="away", revision="1", family="test", dimension=2, fingerprint="f")

    def __init__(self, error: CatalensError | None = None) -> None:
        self._error = error

    async def embed_text(self, text: str, *, bulk: bool = False) -> Embedding:
        if self._error is not None:
            raise self._error
        await asyncio.Event().wait()
        return np.zeros(2, dtype=np.float32)

    async def embed_image(self, picture: bytes, *, bulk: bool = False) -> EncodedImage:
        await self.embed_text("")
        raise AssertionError("never reached")

    async def close(self) -> None:
        """Nothing to release."""


class OneProductIndex:
    """An index whose every leg finds one product; only its reads are here. What is in `broken` is run first."""

    def __init__(self, broken: Mapping[str, Callable[[], Awaitable[None]]] | None = None) -> None:
        self._broken = broken or {}

    async def _may_break(self, method: str) -> None:
        if method in self._broken:
            await self._broken[method]()

    async def search(self, tenant: str, legs: Sequence[Leg], where: Filter) -> Sequence[Sequence[LegHit]]:
        await self._may_break("search")
        return [[LegHit("p", 1.0)] for _ in legs]

    async def facts(self, tenant: str, product_ids: Sequence[str]) -> Mapping[str, Facts]:
        return {"p": Facts(version=1, group_id="g")}

    async def count(self, tenant: str, wheres: Sequence[Filter]) -> Sequence[int]:
        await self._may_break("count")
        return [3 for _ in wheres]

    async def facet(
        self, tenant: str, asked: Sequence[tuple[FacetKey, Filter]], limit: int
    ) -> Sequence[Sequence[FacetCount]]:
        await self._may_break("facet")
        return [[("Acme", 1)] for _ in asked]

    async def get(
        self, tenant: str, product_ids: Sequence[str], *, with_vectors: bool = False
    ) -> Mapping[str, StoredProduct]:
        await self._may_break("get")
        product = Product(product_id="p", name="P", version=1, group_id="g")
        return {"p": StoredProduct(tenant, product, "none", None, 0.0)}

    async def page(self, tenant: str, *, after: str | None, limit: int, where: Filter) -> Sequence[StoredProduct]:
        return []


def searcher(error: CatalensError | None) -> Searcher:
    metrics = Metrics()
    encoder = CachedEncoder(AwayEncoder(error), MemoryCache(10), metrics)
    patience = 0.01 if error is None else None  # an error is told however busy the machine is
    return Searcher(OneProductIndex(), encoder, metrics, encoder_patience=patience)  # type: ignore[arg-type]  # reads only


def search(mode: RequestMode, *, words: str | None = "red shoe", picture: bytes | None = None) -> Search:
    terms = () if words is None else (Term(words),)
    return Search(words=terms, picture=picture, where=Filter(), limit=10, offset=0, mode=mode)


AWAY = [None, Transient("the runtime is away"), Overloaded("the queue is full")]


@pytest.mark.parametrize("error", AWAY)
@pytest.mark.parametrize("picture", [None, b"picture"])
async def test_auto_answers_by_words_and_says_why(error: CatalensError | None, picture: bytes | None) -> None:
    found = await searcher(error).search("default", search("auto", picture=picture))
    assert found.mode == "lexical"
    assert [hit.stored.product.product_id for hit in found.hits] == ["p"]
    assert found.degraded is not None
    assert (str(error) if error else "did not answer within 0.01 s") in found.degraded


async def test_the_encoder_has_its_share_of_what_time_is_left() -> None:
    metrics = Metrics()
    encoder = CachedEncoder(AwayEncoder(), MemoryCache(10), metrics)
    patient = Searcher(OneProductIndex(), encoder, metrics)  # type: ignore[arg-type]  # reads only
    found = await patient.search("default", search("auto"), due=asyncio.get_running_loop().time() + 3)
    assert "did not answer within" in (found.degraded or "")


@pytest.mark.parametrize("error", AWAY)
@pytest.mark.parametrize(
    "asked", [search("semantic"), search("hybrid"), search("auto", words=None, picture=b"picture")]
)
async def test_what_needs_the_encoder_says_that_it_is_away(error: CatalensError | None, asked: Search) -> None:
    with pytest.raises(type(error) if error else Transient):
        await searcher(error).search("default", asked)


async def test_a_cancelled_search_is_cancelled_and_not_degraded() -> None:
    metrics = Metrics()
    encoder = CachedEncoder(AwayEncoder(), MemoryCache(10), metrics)
    patient = Searcher(OneProductIndex(), encoder, metrics)  # type: ignore[arg-type]  # reads only
    task = asyncio.create_task(patient.search("default", search("auto")))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# --- long texts -------------------------------------------------------------------------------------------------

TEXTS = st.lists(st.text("ab \n", min_size=1, max_size=60).filter(str.strip), min_size=1, max_size=5)


@given(texts=TEXTS, most=st.integers(5, 100))
def test_of_a_long_text_whole_words_of_its_beginning_are_looked_up(texts: list[str], most: int) -> None:
    terms = tuple(Term(text, number) for number, text in enumerate(texts))
    kept = beginnings(terms, most)
    assert [one.weight for one in kept] == [one.weight for one in terms]
    if sum(map(len, texts)) <= most:
        assert kept == terms
        return
    assert sum(len(one.text) for one in kept) <= most
    for one, text in zip(kept, texts, strict=True):
        words, whole = one.text.split(), text.split()
        assert words[1:] == whole[1 : len(words)]
        assert words[:1] == whole[:1] or whole[0].startswith(words[0])  # a word that is too long for all is cut
        assert len(text) > most // len(texts) or one.text == text


def test_what_short_texts_leave_is_the_long_ones() -> None:
    kept = beginnings((Term("a " * 50), Term("red"), Term("b " * 50)), 42)
    assert [len(one.text.split()) for one in kept] == [10, 1, 10]


class ListeningEncoder(AwayEncoder):
    """An encoder that keeps what it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    async def embed_text(self, text: str, *, bulk: bool = False) -> Embedding:
        self.texts.append(text)
        return np.array([1.0, 0.0], np.float32)


class ListeningIndex(OneProductIndex):
    """An index that keeps the legs it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.legs: list[Leg] = []

    async def search(self, tenant: str, legs: Sequence[Leg], where: Filter) -> Sequence[Sequence[LegHit]]:
        self.legs += legs
        return await super().search(tenant, legs, where)


@pytest.mark.parametrize("mode", ["hybrid", "semantic"])
async def test_the_encoder_gets_a_long_text_whole_and_the_index_the_words_of_its_beginning(mode: RequestMode) -> None:
    index, listening, metrics = ListeningIndex(), ListeningEncoder(), Metrics()
    encoder = CachedEncoder(listening, MemoryCache(100), metrics)
    searcher = Searcher(index, encoder, metrics)  # type: ignore[arg-type]  # reads only
    text = " ".join(f"word{number}" for number in range(1_200))
    await searcher.search("default", search(mode, words=text))
    assert listening.texts == [text]
    asked = [leg.vector for leg in index.legs if leg.using == "lexical"]
    head = text[: text.rindex(" ", 0, 2_001)]
    assert asked == [query_vector(head)] * (mode == "hybrid")


class TogetherEncoder(ListeningEncoder):
    """An encoder that answers `at_once` callers together, and fewer never."""

    def __init__(self, at_once: int) -> None:
        super().__init__()
        self._full = asyncio.Barrier(at_once)

    async def embed_text(self, text: str, *, bulk: bool = False) -> Embedding:
        await self._full.wait()
        return await super().embed_text(text, bulk=bulk)

    async def embed_image(self, picture: bytes, *, bulk: bool = False) -> EncodedImage:
        await self._full.wait()
        return EncodedImage(np.array([0.0, 1.0], np.float32), PictureInfo(1, 1, "png", ""))


async def test_several_words_and_pictures_are_embedded_side_by_side() -> None:
    index, metrics = ListeningIndex(), Metrics()
    encoder = CachedEncoder(TogetherEncoder(3), MemoryCache(10), metrics)
    searcher = Searcher(index, encoder, metrics, encoder_patience=600)  # type: ignore[arg-type]  # reads only
    words = (Term("dress"), Term("stripes", -0.5), Term("nothing", 0.0))
    like, unlike = (b"a", b"b"), (b"a", b"c")
    asked = replace(search("semantic", picture=b"picture"), words=words, like=like, unlike=unlike)
    assert (await searcher.search("default", asked, due=math.inf)).degraded is None
    assert {leg.using for leg in index.legs} == {"image", "text"}


# --- work that takes long ---------------------------------------------------------------------------------------


class Hits(list[LegHit]):
    """Hits that note which thread goes through them."""

    def __init__(self, hits: Iterable[LegHit], threads: set[int]) -> None:
        super().__init__(hits)
        self._threads = threads

    def __iter__(self) -> Iterator[LegHit]:
        self._threads.add(threading.get_ident())
        return super().__iter__()


class Vectors(dict[str, "Embedding"]):
    """A product's vectors, which note which thread takes one."""

    threads: set[int]

    def __getitem__(self, name: str) -> Embedding:
        self.threads.add(threading.get_ident())
        return super().__getitem__(name)


class LargeIndex(OneProductIndex):
    """An index with so many products that have the same picture, and what goes through them."""

    def __init__(self, products: int) -> None:
        super().__init__()
        self.fusing: set[int] = set()
        self._names = [f"p{number}" for number in range(products)]
        self.vectors = Vectors(image=np.array([1.0, 0.0], np.float32))
        self.vectors.threads = set()

    async def search(self, tenant: str, legs: Sequence[Leg], where: Filter) -> Sequence[Sequence[LegHit]]:
        return [Hits((LegHit(name, 1.0) for name in self._names), self.fusing) for _ in legs]

    async def get(
        self, tenant: str, product_ids: Sequence[str], *, with_vectors: bool = False
    ) -> Mapping[str, StoredProduct]:
        (stored,) = (await super().get(tenant, ["p"])).values()
        return {name: replace(stored, vectors=self.vectors) for name in product_ids}


async def test_long_lists_are_fused_and_pictures_compared_beside_the_loop() -> None:
    index, metrics = LargeIndex(600), Metrics()
    searcher = Searcher(index, CachedEncoder(ListeningEncoder(), MemoryCache(10), metrics), metrics)  # type: ignore[arg-type]  # reads only
    asked = replace(search("semantic"), order=Order(group_by="image"))
    assert len((await searcher.search("default", asked)).hits) == 1
    for threads in (index.fusing, index.vectors.threads):
        assert threads
        assert threading.get_ident() not in threads


# --- parts of the index that are late or away -------------------------------------------------------------------


@pytest.fixture
def too_late(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Awaitable[None]]:
    """Return what passes the time of every search and never ends."""

    async def wait() -> None:
        loop = asyncio.get_running_loop()
        now = loop.time
        monkeypatch.setattr(loop, "time", lambda: now() + 1000)
        await asyncio.Event().wait()

    return wait


async def refuse() -> None:
    raise Transient("the index process ended")


def shopping(
    broken: Mapping[str, Callable[[], Awaitable[None]]],
    error: CatalensError | None = None,
    metrics: Metrics | None = None,
) -> Searcher:
    metrics = metrics or Metrics()
    encoder = CachedEncoder(AwayEncoder(error), MemoryCache(10), metrics) if error else None
    return Searcher(OneProductIndex(broken), encoder, metrics)  # type: ignore[arg-type]  # reads only


INCOMPLETE = "catalens_search_incomplete_total"
GROUPED = replace(search("lexical"), order=Order(group_by="group_id"), facets=("brand",), explain=True)


@pytest.mark.parametrize(("method", "part"), [("facet", "facets"), ("count", "variants")])
async def test_hits_are_answered_without_what_the_index_refuses(method: str, part: str) -> None:
    whole = await shopping({}).search("default", GROUPED)
    assert (whole.degraded, whole.facets, whole.hits[0].variants) == (None, {"brand": [("Acme", 1)]}, 3)
    found = await shopping({method: refuse}).search("default", GROUPED)
    assert found.degraded == f"without {part}: the index process ended"
    assert found.facets == (None if part == "facets" else whole.facets)
    assert [hit.variants for hit in found.hits] == [None if part == "variants" else 3]
    assert (found.hits[0].score, found.hits[0].parts, found.total) == (whole.hits[0].score, whole.hits[0].parts, 1)


async def test_hits_are_answered_without_facets_that_are_late(too_late: Callable[[], Awaitable[None]]) -> None:
    found = await shopping({"facet": too_late}).search("default", GROUPED)
    assert found.degraded == "without facets: the search took longer than 15 s"
    assert (found.facets, [hit.variants for hit in found.hits]) == (None, [3])


async def test_every_part_that_is_missing_is_named(too_late: Callable[[], Awaitable[None]]) -> None:
    away = Transient("the runtime is away")
    index = {"count": too_late, "facet": too_late}
    found = await shopping(index, away).search("default", replace(GROUPED, mode="auto"))
    assert found.degraded == (
        "searched by words only: the runtime is away; without variants: the search took longer than 15 s; "
        "without facets: the search took longer than 15 s"
    )
    assert len(found.hits) == 1


async def test_after_its_time_a_search_gives_the_index_no_more_work(too_late: Callable[[], Awaitable[None]]) -> None:
    asked = []

    async def ask() -> None:
        asked.append("facet")

    metrics = Metrics()
    found = await shopping({"count": too_late, "facet": ask}, metrics=metrics).search("default", GROUPED)
    assert (asked, found.facets) == ([], None)
    assert found.degraded is not None
    assert "without facets: the search took longer than 15 s" in found.degraded
    counted = {part: metrics.registry.get_sample_value(INCOMPLETE, {"part": part}) for part in ("facets", "variants")}
    assert counted == {"facets": 1, "variants": 1}


async def test_a_whole_answer_counts_as_none_that_is_incomplete() -> None:
    metrics = Metrics()
    await shopping({}, metrics=metrics).search("default", GROUPED)
    assert metrics.registry.get_sample_value(INCOMPLETE, {"part": "facets"}) == 0


@pytest.mark.parametrize("method", ["search", "get"])
async def test_a_search_whose_hits_are_late_is_not_answered(
    method: str, too_late: Callable[[], Awaitable[None]]
) -> None:
    with pytest.raises(Transient, match="longer than 15 s"):
        await shopping({method: too_late}).search("default", GROUPED)
    with pytest.raises(Transient, match="process ended"):
        await shopping({method: refuse}).search("default", GROUPED)
