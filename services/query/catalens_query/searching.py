"""Answers searches: query → vectors → ranked lists → one ranking → the page that was asked for."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

from pydantic import TypeAdapter, ValidationError

from catalens.domain import Condition, Filter, LegHit, ProductId, SparseVector, StoredProduct
from catalens.embedding import CachedEncoder, Tower
from catalens.errors import NotFound, NotLoaded, Transient
from catalens.lexical import query_vector
from catalens.ports import VectorIndex
from catalens.telemetry import Metrics, stage
from catalens_query import fusion
from catalens_query.planner import (
    LEXICAL,
    LIKED_WORDS_SHARE,
    TIERS,
    UNLIKED_SHARE,
    DenseName,
    Mode,
    RequestMode,
    Using,
    WeightedLeg,
    blend,
    mix,
    plan,
    similar_legs,
)

if TYPE_CHECKING:
    from catalens.domain import Embedding

T = TypeVar("T")
ENCODER_PATIENCE: Final = 10.0
"""Seconds after which an encoder that has not answered counts as away."""
_PRODUCT_ID: Final[TypeAdapter[str]] = TypeAdapter(ProductId)
_SPACES: Final[tuple[DenseName, ...]] = ("image", "text")
_NOTHING: Final[Mapping[DenseName, Embedding | None]] = {}


@dataclass(frozen=True, slots=True)
class Term:
    """Words and how much they count; what has a negative weight is not wanted."""

    text: str
    weight: float = 1.0


Example: TypeAlias = str | bytes
"""What to be like, or unlike: the id of a product, or a picture."""


@dataclass(frozen=True, slots=True)
class Search:
    """What is searched: words, a picture, examples, or several of them. Mode lexical has words alone."""

    words: tuple[Term, ...]
    picture: bytes | None
    where: Filter
    limit: int
    offset: int
    image_weight: float = 0.5
    mode: RequestMode = "auto"
    using: Using = "both"
    like: tuple[Example, ...] = ()
    unlike: tuple[Example, ...] = ()

    @property
    def wanted(self) -> bool:
        """Whether some of the words are wanted: what is not wanted finds nothing by itself."""
        return any(term.weight > 0 for term in self.words)

    @property
    def weight(self) -> float:
        """The picture's weight: what is searched alone weighs all."""
        if self.picture is None:
            return 0.0
        return self.image_weight if self.wanted else 1.0

    @property
    def words_share(self) -> float:
        """How much the words count, to the lexical list."""
        if not self.wanted:
            return 0.0
        return (1 - self.weight) * (LIKED_WORDS_SHARE if self.like else 1)

    @property
    def products(self) -> tuple[str, ...]:
        """The ids among the examples."""
        return tuple(dict.fromkeys(one for one in (*self.like, *self.unlike) if isinstance(one, str)))


@dataclass(frozen=True, slots=True)
class Found:
    """A page of a ranking, best first, and how it came about."""

    hits: Sequence[tuple[StoredProduct, float]]
    mode: Mode
    degraded: str | None = None
    """Why the answer is less than what was asked for."""


class UnknownExample(NotFound):
    """A liked or unliked product does not exist; `field` says where it was named."""

    def __init__(self, field: str, product_id: str) -> None:
        super().__init__(f"product {product_id} does not exist")
        self.field = field


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
        """Return the text's vector; raises Transient (no encoder, none that answers), Overloaded and NotLoaded."""
        return await self._in_time(self._present.text(text))

    async def embed_picture(self, data: bytes) -> Embedding:
        """Return the picture's vector; raises as embed_text, and InvalidPicture."""
        return await self._in_time(self._present.picture(data))

    async def probe(self) -> tuple[Tower, Embedding]:
        """Return a vector that a loaded tower computed just now, and which; raises Transient and Overloaded."""
        return await self._in_time(self._present.probe())

    async def search(self, tenant: str, search: Search) -> Found:
        """Return the page that was asked for; raises InvalidPicture, Transient, Overloaded, NotLoaded."""
        chosen = plan(search.mode, search.using, search.weight, words=search.words_share)
        degraded, dense, lexical = None, _NOTHING, None
        if chosen.mode != "lexical":
            try:
                with stage(self._metrics.search_stages, "encode"):
                    dense = await self._query_vectors(tenant, search)
            except (Transient, NotLoaded) as error:
                if search.mode != "auto" or chosen.mode != "hybrid":
                    raise
                chosen, degraded = LEXICAL, f"searched by words only: {error}"
        if "lexical" in chosen.shares:
            lexical = await asyncio.to_thread(_lexical, search.words)
        upto = search.offset + search.limit
        legs = chosen.legs(dense, lexical)
        where = replace(search.where, exclude=(*search.where.exclude, *search.products))
        by_picture = search.weight == 1 and not search.like and not search.unlike
        ranking = await self._rank(tenant, legs, where, upto, by_picture=by_picture)
        if "lexical" in chosen.shares and len(search.words) == 1:
            named = search.words[0].text.strip()
            if await self._exists(tenant, named, where):
                ranking = fusion.first(ranking, named)
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

    async def _query_vectors(self, tenant: str, search: Search) -> Mapping[DenseName, Embedding | None]:
        """Return what each dense list is asked with: the query, drawn to what is liked, pushed from what is not."""
        asked = await self._query_vector(search)
        drawn = 1.0 if search.wanted or search.picture is not None else UNLIKED_SHARE
        if not search.like and not search.unlike:
            return {"image": asked, "text": asked}
        stored = await self._index.get(tenant, search.products, with_vectors=True) if search.products else {}
        for name, examples in (("like", search.like), ("unlike", search.unlike)):
            for number, one in enumerate(examples):
                if isinstance(one, str) and one not in stored:
                    raise UnknownExample(f"{name}.{number}", one)
        seen = {one: await self.embed_picture(one) for one in (*search.like, *search.unlike) if isinstance(one, bytes)}

        def middle(examples: Sequence[Example], space: DenseName) -> Embedding | None:
            of = (stored[one].vectors.get(space) if isinstance(one, str) else seen[one] for one in examples)
            return mix([(1.0, vector) for vector in of])

        return {
            space: mix(
                [(drawn, asked), (1.0, middle(search.like, space)), (-UNLIKED_SHARE, middle(search.unlike, space))]
            )
            for space in _SPACES
        }

    async def _query_vector(self, search: Search) -> Embedding | None:
        # A picture is embedded even at weight 0: a broken one is a mistake whatever the slider says.
        seen = None if search.picture is None else await self.embed_picture(search.picture)
        if search.weight == 1 and search.wanted:
            return seen
        read = mix([(term.weight, await self.embed_text(term.text)) for term in search.words if term.weight])
        if seen is None or not search.wanted:
            return read if seen is None else mix([(1.0, seen), (UNLIKED_SHARE, read)])
        return seen if read is None else blend(read, seen, search.weight)

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


def _lexical(words: Sequence[Term]) -> SparseVector:
    """Return the terms of all words, each as heavy as its words; what is not wanted counts against a product."""
    if len(words) == 1 and words[0].weight == 1:
        return query_vector(words[0].text)
    terms: defaultdict[int, float] = defaultdict(float)
    for one in words:
        vector = query_vector(one.text)
        for index, value in zip(vector.indices, vector.values, strict=True):
            terms[index] += one.weight * value
    kept = sorted((index, value) for index, value in terms.items() if value)
    return SparseVector(tuple(index for index, _ in kept), tuple(value for _, value in kept))
