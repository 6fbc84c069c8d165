"""Answers searches: query → vectors → ranked lists → one ranking → the page that was asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, TypeVar

from pydantic import TypeAdapter, ValidationError

from catalens.domain import Condition, Filter, LegHit, ProductId, StoredProduct
from catalens.embedding import CachedEncoder
from catalens.errors import NotFound, Transient
from catalens.lexical import query_vector
from catalens.ports import VectorIndex
from catalens.telemetry import Metrics, stage
from catalens_query import fusion
from catalens_query.planner import (
    LEXICAL,
    TIERS,
    Mode,
    RequestMode,
    Using,
    WeightedLeg,
    blend,
    plan,
    similar_legs,
)

if TYPE_CHECKING:
    from catalens.domain import Embedding

T = TypeVar("T")
ENCODER_PATIENCE: Final = 10.0
"""Seconds after which an encoder that has not answered counts as away."""
_PRODUCT_ID: Final[TypeAdapter[str]] = TypeAdapter(ProductId)


@dataclass(frozen=True, slots=True)
class Search:
    """What is searched: words, a picture or both. Mode lexical has no picture."""

    words: str | None
    picture: bytes | None
    where: Filter
    limit: int
    offset: int
    image_weight: float = 0.5
    mode: RequestMode = "auto"
    using: Using = "both"

    @property
    def weight(self) -> float:
        """The picture's weight: what is searched alone weighs all."""
        if self.picture is None:
            return 0.0
        return 1.0 if self.words is None else self.image_weight


@dataclass(frozen=True, slots=True)
class Found:
    """A page of a ranking, best first, and how it came about."""

    hits: Sequence[tuple[StoredProduct, float]]
    mode: Mode
    degraded: str | None = None
    """Why the answer is less than what was asked for."""


class Searcher:
    """Searches one index with one encoder, or by words alone without one."""

    def __init__(
        self,
        index: VectorIndex,
        encoder: CachedEncoder | None,
        metrics: Metrics,
        *,
        encoder_patience: float = ENCODER_PATIENCE,
    ) -> None:
        self._index = index
        self._encoder = encoder
        self._metrics = metrics
        self._patience = encoder_patience

    async def embed_text(self, text: str) -> Embedding:
        """Return the text's vector; raises Transient (no encoder, none that answers) and Overloaded."""
        return await self._in_time(self._present.text(text))

    async def embed_picture(self, data: bytes) -> Embedding:
        """Return the picture's vector; raises as embed_text, and InvalidPicture."""
        return await self._in_time(self._present.picture(data))

    async def probe(self) -> Embedding:
        """Return a vector that was computed just now, past the cache; raises as embed_text."""
        return await self._in_time(self._present.compute_text("ready", bulk=False))

    async def search(self, tenant: str, search: Search) -> Found:
        """Return the page that was asked for; raises InvalidPicture, Transient, Overloaded."""
        chosen, degraded, dense, lexical = plan(search.mode, search.using, search.weight), None, None, None
        if chosen.mode != "lexical":
            try:
                with stage(self._metrics.search_stages, "encode"):
                    dense = await self._query_vector(search)
            except Transient as error:
                if search.mode != "auto" or chosen.mode != "hybrid":
                    raise
                chosen, degraded = LEXICAL, f"searched by words only: {error}"
        words = search.words if "lexical" in chosen.shares else None
        if words is not None:
            lexical = await asyncio.to_thread(query_vector, words)
        upto = search.offset + search.limit
        legs = chosen.legs(dense, lexical)
        ranking = await self._rank(tenant, legs, search.where, upto, by_picture=search.weight == 1)
        if words is not None and await self._exists(tenant, words.strip(), search.where):
            ranking = fusion.first(ranking, words.strip())
        self._metrics.searches.labels(chosen.mode, str(degraded is not None).lower()).inc()
        return Found(await self._page(tenant, ranking[search.offset : upto]), chosen.mode, degraded)

    async def similar(
        self, tenant: str, product_id: str, using: Using, *, variants: bool, offset: int, limit: int
    ) -> Found:
        """Return products like that one, without it and, unless `variants`, without those of its group.

        Needs no encoder. Raises NotFound, Transient.
        """
        stored = (await self._index.get(tenant, [product_id], with_vectors=True)).get(product_id)
        if stored is None:
            raise NotFound(f"product {product_id} does not exist")
        group = stored.product.group_id
        where = Filter(exclude=(product_id,), without_groups=() if variants or group is None else (group,))
        ranking = await self._rank(tenant, similar_legs(stored.vectors, using), where, offset + limit)
        return Found(await self._page(tenant, ranking[offset : offset + limit]), "semantic")

    @property
    def _present(self) -> CachedEncoder:
        if self._encoder is None:
            raise Transient("no model is loaded")
        return self._encoder

    async def _in_time(self, work: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(self._patience):
                return await work
        except TimeoutError as error:
            raise Transient(f"the encoder did not answer within {self._patience:g} s") from error

    async def _query_vector(self, search: Search) -> Embedding | None:
        # A picture is embedded even at weight 0: a broken one is a mistake whatever the slider says.
        seen = None if search.picture is None else await self.embed_picture(search.picture)
        read = None if search.words is None or search.weight == 1 else await self.embed_text(search.words)
        if seen is None or read is None:
            return read if seen is None else seen
        return blend(read, seen, search.weight)

    async def _rank(
        self, tenant: str, legs: Sequence[WeightedLeg], where: Filter, upto: int, *, by_picture: bool = False
    ) -> list[LegHit]:
        """Return at least the first `upto` places, or all there are, the same whatever `upto` is.

        `by_picture`: a product whose picture is the one that is searched with comes first.
        """
        ranking: list[LegHit] = []
        for depth in TIERS if legs else ():
            with stage(self._metrics.search_stages, "search"):
                answers = await self._index.search(tenant, [leg.at(depth) for leg in legs], where)
            with stage(self._metrics.search_stages, "fuse"):
                lists = [
                    fusion.RankedList(leg.using, leg.weight, hits, complete=len(hits) < depth)
                    for leg, hits in zip(legs, answers, strict=True)
                ]
                own = fusion.own_picture(lists) if by_picture and not ranking else None
                ranking = fusion.extend(ranking, fusion.fuse(lists), single=len(legs) == 1)
                if own is not None:
                    ranking = fusion.first(ranking, own)
            if len(ranking) >= upto or all(len(hits) < depth for hits in answers):
                break
        return ranking

    async def _exists(self, tenant: str, text: str, where: Filter) -> bool:
        """True when `text` is the id of a live product under the filter."""
        try:
            _PRODUCT_ID.validate_python(text, strict=True)
        except ValidationError:
            return False
        itself = replace(where, conditions=(*where.conditions, Condition("product_id", (text,))))
        return bool(await self._index.page(tenant, after=None, limit=1, where=itself))

    async def _page(self, tenant: str, hits: Sequence[LegHit]) -> list[tuple[StoredProduct, float]]:
        with stage(self._metrics.search_stages, "load"):
            stored = await self._index.get(tenant, [hit.product_id for hit in hits]) if hits else {}
        # Deleted since it was ranked: left out.
        return [(stored[hit.product_id], hit.score) for hit in hits if hit.product_id in stored]
