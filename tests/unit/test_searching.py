"""What a search does when the encoder is busy, away or silent: words still find, and the answer says so."""

# ruff: noqa: ARG002  # fakes take the arguments of their ports

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pytest

from catalens.domain import Filter, Leg, LegHit, ModelSpec, Product, StoredProduct
from catalens.embedding import CachedEncoder
from catalens.engines.memory import MemoryCache
from catalens.errors import CatalensError, Overloaded, Transient
from catalens.ports import EncodedImage
from catalens.telemetry import Metrics
from catalens_query.planner import RequestMode
from catalens_query.searching import Search, Searcher, Term

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
    """An index whose every leg finds one product; only its reads are here."""

    async def search(self, tenant: str, legs: Sequence[Leg], where: Filter) -> Sequence[Sequence[LegHit]]:
        return [[LegHit("p", 1.0)] for _ in legs]

    async def get(
        self, tenant: str, product_ids: Sequence[str], *, with_vectors: bool = False
    ) -> Mapping[str, StoredProduct]:
        product = Product(product_id="p", name="P", version=1)
        return {"p": StoredProduct(tenant, product, "none", None, 0.0)}

    async def page(self, tenant: str, *, after: str | None, limit: int, where: Filter) -> Sequence[StoredProduct]:
        return []


def searcher(error: CatalensError | None) -> Searcher:
    metrics = Metrics()
    encoder = CachedEncoder(AwayEncoder(error), MemoryCache(10), metrics)
    return Searcher(OneProductIndex(), encoder, metrics, encoder_patience=0.01)  # type: ignore[arg-type]  # reads only


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
