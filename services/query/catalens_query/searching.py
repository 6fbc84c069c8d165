"""Answers searches: query → vectors → ranked lists → one ranking → the page that was asked for."""

from __future__ import annotations

import asyncio
import math
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar, cast

import structlog
from pydantic import TypeAdapter, ValidationError

from catalens.domain import (
    DEFAULT_LANGUAGES,
    Condition,
    FacetCount,
    Facts,
    Filter,
    Language,
    Leg,
    LegHit,
    NumberKey,
    ProductId,
    Range,
    SparseVector,
    StoredProduct,
)
from catalens.embedding import CachedEncoder, RefusedPicture, Tower
from catalens.errors import InvalidPicture, NotFound, NotLoaded, Transient
from catalens.lexical import Written, query_vector, query_words, vector_of_any
from catalens.ports import VectorIndex
from catalens.telemetry import Metrics, stage
from catalens_query import calibration, facets, fusion
from catalens_query.ordering import WINDOW, Boost, Boosts, GroupBy, Groups, Pictures, Sort, boosted, diverse, sorted_by
from catalens_query.planner import (
    LEXICAL,
    LIKED_WORDS_SHARE,
    SORTED,
    SORTED_LEXICAL,
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
from catalens_query.vocabularies import Vocabularies
from catalens_query.vocabulary import MOST_READ, Reading, Vocabulary, read

if TYPE_CHECKING:
    from catalens.domain import Embedding

log = structlog.get_logger(__name__)

T = TypeVar("T")
PATIENCE: Final = 15.0
"""Seconds that a search takes at most."""
ENCODER_SHARE: Final = 2 / 3
"""How much of them the encoder has: then it counts as away."""
_PRODUCT_ID: Final[TypeAdapter[str]] = TypeAdapter(ProductId)
_SPACES: Final[tuple[DenseName, ...]] = ("image", "text")
_NOTHING: Final[Mapping[DenseName, Embedding | None]] = {}
_SAMPLE_AGE: Final = 600.0
"""Seconds until random products are drawn again, once there are enough of them."""
_SAMPLE_AGE_EACH: Final = 0.01
"""Seconds for each of them until they are drawn again, while there are fewer."""
_MOST_SAMPLES: Final = 16
"""Tenants whose random products are kept."""
_MOST_WORDS: Final = 32
"""Words of a query that are looked at one by one."""
_COMMON: Final = 20
"""Products with a number or a letter that make it common; rarer ones are counted."""
_MOST_CHARACTERS: Final = 2_000
"""Characters of a query that are looked up as words, the first; the encoder gets them all."""
_PARTIAL: Final = re.compile(r"\s\S*\Z")
_SHORT: Final = 100
"""Characters of a query that are read within a millisecond where all of its words are known, mostly a tenth."""
_CHUNK: Final = 500
"""Products about which the index is asked at once, at most."""
_LEAST_CHUNK: Final = 50
"""The same, at least, where a page of groups is filled bit by bit."""
_LONG: Final = 1_000
"""Hits that are fused in a few milliseconds; of more a thread does it."""


@dataclass(frozen=True, slots=True)
class Term:
    """Words and how much they count; what has a negative weight is not wanted."""

    text: str
    weight: float = 1.0


Example: TypeAlias = str | bytes
"""What to be like, or unlike: the id of a product, or a picture."""


@dataclass(frozen=True, slots=True)
class Order:
    """What is done to the ranking by relevance before it is cut into pages."""

    sort: Sort = "relevance"
    group_by: GroupBy | None = None
    boosts: tuple[Boost, ...] = ()
    diversity: float = 0.0
    min_score: float | None = None


_BY_RELEVANCE: Final = Order()


@dataclass(frozen=True, slots=True)
class Search:
    """What is searched: words, a picture, examples, or several of them. Mode lexical has words alone."""

    words: tuple[Term, ...]
    picture: bytes | None
    where: Filter
    limit: int
    offset: int
    image_weight: float = 0.5
    correct: bool = True
    """Read words that seem misspelt as the catalogue writes them."""
    mode: RequestMode = "auto"
    using: Using = "both"
    like: tuple[Example, ...] = ()
    unlike: tuple[Example, ...] = ()
    order: Order = _BY_RELEVANCE
    facets: tuple[str, ...] = ()
    explain: bool = False

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
class Hit:
    """A product of the page."""

    stored: StoredProduct
    score: float
    variants: int | None = None
    """How many products under the filters are of its group, itself included; None if that was not asked."""
    parts: Sequence[fusion.Part] | None = None
    """What its score is made of; None if that was not asked."""
    relevance: float | None = None
    """What `min_score` was compared with; None without one."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """A facet of numbers: from where to where they go, and how many products are in which range."""

    smallest: float | None
    largest: float | None
    ranges: Sequence[tuple[Range, int]]


@dataclass(frozen=True, slots=True)
class Found:
    """A page of a ranking and how it came about."""

    hits: Sequence[Hit]
    mode: Mode
    degraded: str | None = None
    """Why the answer is less than what was asked for."""
    total: int | None = None
    """How many there are on all pages; None if the index was not asked that deep."""
    facets: Mapping[str, Sequence[FacetCount] | Numbers] | None = None
    """What was asked to be counted."""
    corrected: str | None = None
    """The words as they were read, where some seemed misspelt."""


@dataclass(slots=True)
class _Ranking:
    """A ranking, as deep as it was needed, and what it takes to explain it."""

    hits: list[LegHit] = field(default_factory=list)
    """In the order of the answer."""
    complete: bool = False
    """There is nothing beyond `hits`."""
    tiers: list[Sequence[fusion.RankedList]] = field(default_factory=list)
    tier_of: dict[str, int] = field(default_factory=dict)
    boosts: Boosts | None = None
    facts: dict[str, Facts] = field(default_factory=dict)
    exact: str | None = None
    """The product that was asked for itself."""
    relevance: dict[str, float] = field(default_factory=dict)

    def explain(self, hit: LegHit) -> list[fusion.Part]:
        """Return what the score of `hit` is made of."""
        lists = self.tiers[self.tier_of[hit.product_id]] if self.tiers else ()
        parts = fusion.shares(lists, hit.product_id, calibrate=self.boosts is not None)
        base = sum(part.contribution for part in parts)
        if self.boosts is not None:
            known = self.facts.get(hit.product_id)
            values = self.boosts.values(known)
            raised = sum(boost.factor * value for boost, value in values)
            least = -1 / raised if raised < -1 else 1.0  # no score falls below 0
            parts += [
                fusion.Part(
                    "boost", base * boost.factor * value * least, boost.field, calibrated=value, weight=boost.factor
                )
                for boost, value in values
            ]
        total = sum(part.contribution for part in parts)
        if hit.product_id == self.exact:
            return [*parts, fusion.Part("exact", hit.score - total)]
        # What a deeper look added was scaled below what was ranked before.
        scale = hit.score / total if total else 1.0
        return [replace(part, contribution=part.contribution * scale) for part in parts]


class UnknownExample(NotFound):
    """A liked or unliked product does not exist; `field` says where it was named."""

    def __init__(self, field: str, product_id: str) -> None:
        super().__init__(f"product {product_id} does not exist")
        self.field = field


class WrongPicture(InvalidPicture):
    """A picture of the search is none, or too large; `field` says which."""

    def __init__(self, field: str, error: InvalidPicture) -> None:
        super().__init__(error.reason, str(error))
        self.field = field


class Searcher:
    """Searches one index with one encoder, or by words alone without one."""

    def __init__(
        self,
        index: VectorIndex,
        encoder: CachedEncoder | None,
        metrics: Metrics,
        *,
        vocabularies: Vocabularies | None = None,
        languages: tuple[Language, ...] = DEFAULT_LANGUAGES,
        patience: float = PATIENCE,
        encoder_patience: float | None = None,
    ) -> None:
        self._index = index
        self._encoder = encoder
        self._metrics = metrics
        self._vocabularies = vocabularies or Vocabularies(languages)
        self._languages = languages
        self._patience = patience
        self._encoder_patience = patience * ENCODER_SHARE if encoder_patience is None else encoder_patience
        self._samples: dict[str, tuple[float, Sequence[Mapping[str, Embedding]]]] = {}

    async def embed_text(self, text: str) -> Embedding:
        """Return the text's vector; raises Transient (no encoder, none that answers), Overloaded and NotLoaded."""
        async with self._encoder_in_time():
            return await self._present.text(text)

    async def embed_picture(self, data: bytes) -> Embedding:
        """Return the picture's vector; raises as embed_text, and InvalidPicture."""
        async with self._encoder_in_time():
            return await self._present.picture(data)

    async def _embed(
        self, texts: Sequence[str], pictures: Mapping[bytes, str]
    ) -> tuple[Sequence[Embedding], Sequence[Embedding]]:
        """Return their vectors; without any, no encoder is needed. `pictures` says which field gave each."""
        if not texts and not pictures:
            return (), ()
        try:
            async with self._encoder_in_time():
                return await self._present.vectors(texts=texts, pictures=list(pictures))
        except RefusedPicture as error:
            raise WrongPicture(list(pictures.values())[error.number], error) from error

    async def probe(self) -> tuple[Tower, Embedding]:
        """Return a vector that a loaded tower computed just now, and which; raises Transient and Overloaded."""
        async with self._encoder_in_time():
            return await self._present.probe()

    async def search(self, tenant: str, search: Search, *, due: float | None = None) -> Found:
        """Return the page that was asked for; raises WrongPicture, UnknownExample, Transient, Overloaded, NotLoaded.

        Facets and numbers of variants that are late, or that the index does not answer, are left out: `degraded` names
        them. Without its hits in time a search is Transient. `due`: the loop's time at which its time is over, for a
        search that began before; by default it begins now.
        """
        due = asyncio.get_running_loop().time() + self._patience if due is None else due
        async with self._search_in_time(due):
            matched = await self._match(tenant, search, due)
            loaded = await self._load(tenant, matched.ranking.hits[search.offset : search.offset + search.limit])
        lost = [] if matched.degraded is None else [matched.degraded]
        sizes = counted = None
        if search.order.group_by == "group_id":
            sizes = await self._spare("variants", lambda: self._sizes(tenant, loaded, matched.where), due, lost)
        if search.facets:
            counted = await self._spare("facets", lambda: self._count(tenant, search, matched), due, lost)
        self._metrics.searches.labels(matched.mode, str(matched.degraded is not None).lower()).inc()
        return Found(
            _page(loaded, matched.ranking, sizes, search),
            matched.mode,
            "; ".join(lost) or None,
            len(matched.ranking.hits) if matched.ranking.complete else None,
            counted,
            matched.words.corrected,
        )

    async def _match(self, tenant: str, search: Search, due: float) -> _Matched:
        """Return the ranking, as deep as the page is."""
        words = await self._words(tenant, search)
        known = await self._known(tenant, words) if search.mode in ("auto", "hybrid") else 1.0
        chosen = plan(search.mode, search.using, search.weight, words=search.words_share, known=known)
        degraded, dense = None, _NOTHING
        if chosen.mode != "lexical":
            try:
                with stage(self._metrics.search_stages, "encode"):
                    # Beside words, what was written: a correction may be wrong, and the words do without it (ADR 21).
                    either = search.words if words.read == words.looked_up else (*search.words, *words.read)
                    asked = replace(search, words=either) if chosen.mode == "semantic" else search
                    async with self._encoder_in_time(due):
                        dense = await self._query_vectors(tenant, asked)
            except (Transient, NotLoaded) as error:
                if search.mode != "auto" or chosen.mode != "hybrid":
                    raise
                chosen, degraded = LEXICAL, f"searched by words only: {error}"
        legs = chosen.legs(dense, words.vector)
        where = replace(search.where, exclude=(*search.where.exclude, *search.products))
        by_picture = search.weight == 1 and not search.like and not search.unlike
        name = search.words[0].text.strip() if "lexical" in chosen.shares and len(search.words) == 1 else None
        named = await self._named(tenant, name, where)
        upto = search.offset + search.limit
        ranking = await self._rank(
            tenant, legs, where, upto, search.order, by_picture=by_picture, named=named, words=words.read
        )
        return _Matched(words, chosen.mode, degraded, legs, where, ranking, name, by_picture)

    async def similar(
        self, tenant: str, product_id: str, using: Using, *, variants: bool, offset: int, limit: int
    ) -> Found:
        """Return products like that one, without it and, unless `variants`, without those of its group.

        Needs no encoder. Raises NotFound, Transient.
        """
        async with self._search_in_time(asyncio.get_running_loop().time() + self._patience):
            stored = (await self._index.get(tenant, [product_id], with_vectors=True)).get(product_id)
            if stored is None:
                raise NotFound(f"product {product_id} does not exist")
            group = stored.product.group_id
            where = Filter(exclude=(product_id,), without_groups=() if variants or group is None else (group,))
            ranking = await self._rank(tenant, similar_legs(stored.vectors, using), where, offset + limit)
            hits = await self._load(tenant, ranking.hits[offset : offset + limit])
        return Found(
            [Hit(stored, hit.score) for hit, stored in hits],
            "semantic",
            total=len(ranking.hits) if ranking.complete else None,
        )

    async def _words(self, tenant: str, search: Search) -> _Words:
        words, vocabulary = beginnings(search.words, _MOST_CHARACTERS), self._vocabularies.of(tenant)
        short = sum(len(term.text) for term in words) <= _SHORT  # a thread would cost more than it saves
        if short and (vocabulary is None or all(vocabulary.covers(term.text) for term in words)):
            return _read(words, vocabulary, self._languages, correct=search.correct)
        return await asyncio.to_thread(_read, words, vocabulary, self._languages, correct=search.correct)

    async def _known(self, tenant: str, words: _Words) -> float:
        """Return the share of the wanted words that the catalogue has, above 0; of those not read the index knows."""
        vocabulary = self._vocabularies.of(tenant)
        if vocabulary is None or not any(word.spelt for word in words.unread):
            return 1.0  # codes and numbers that nobody has count for nothing
        legs = [Leg("lexical", vector, _COMMON) for vector in words.unread.values()]
        answers = await self._index.search(tenant, legs, Filter())
        spreads = dict(words.spreads)
        for word, hits in zip(words.unread, answers, strict=True):
            common = len(hits) == _COMMON and not word.spelt
            spreads[word] = vocabulary.products if common else len(hits)  # what is common says next to nothing
        return vocabulary.share_known(spreads)

    @property
    def _present(self) -> CachedEncoder:
        if self._encoder is None:
            raise Transient("no model is loaded")
        return self._encoder

    @asynccontextmanager
    async def _encoder_in_time(self, due: float = math.inf) -> AsyncIterator[None]:
        left = (due - asyncio.get_running_loop().time()) * ENCODER_SHARE
        patience = max(0.0, min(self._encoder_patience, left))
        try:
            async with asyncio.timeout(patience):
                yield
        except TimeoutError as error:
            raise Transient(f"the encoder did not answer within {patience:.3g} s") from error

    @asynccontextmanager
    async def _search_in_time(self, due: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout_at(due):
                yield
        except TimeoutError as error:
            raise self._late() from error

    def _late(self) -> Transient:
        return Transient(f"the search took longer than {self._patience:g} s")

    async def _spare(self, what: str, work: Callable[[], Awaitable[T]], due: float, lost: list[str]) -> T | None:
        """Return what an answer can do without; None where it is late or the index is away, and `lost` says why."""
        try:
            if asyncio.get_running_loop().time() >= due:  # else the index would be given work before the first pause
                raise self._late()
            async with self._search_in_time(due):
                return await work()
        except Transient as error:
            self._metrics.search_incomplete.labels(what).inc()
            log.warning("search.incomplete", without=what, error=str(error))
            lost.append(f"without {what}: {error}")
            return None

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
        pictures: dict[bytes, str] = {}
        for name, examples in (("like", search.like), ("unlike", search.unlike)):
            for number, one in enumerate(examples):
                if isinstance(one, bytes):
                    pictures.setdefault(one, f"{name}.{number}")
        _, vectors = await self._embed((), pictures)
        seen = dict(zip(pictures, vectors, strict=True))

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
        pictures = {} if search.picture is None else {search.picture: "image"}
        said = [] if search.weight == 1 and search.wanted else [term for term in search.words if term.weight]
        texts, pictured = await self._embed([term.text for term in said], pictures)
        seen = pictured[0] if pictured else None
        if search.weight == 1 and search.wanted:
            return seen
        read = mix([(term.weight, vector) for term, vector in zip(said, texts, strict=True)])
        if seen is None or not search.wanted:
            return read if seen is None else mix([(1.0, seen), (UNLIKED_SHARE, read)])
        return seen if read is None else blend(read, seen, search.weight)

    async def _rank(
        self,
        tenant: str,
        legs: Sequence[WeightedLeg],
        where: Filter,
        upto: int,
        order: Order = _BY_RELEVANCE,
        *,
        by_picture: bool = False,
        named: str | None = None,
        words: Sequence[Term] = (),
    ) -> _Ranking:
        """Return at least the first `upto` places, or all there are, the same whatever `upto` is.

        `by_picture`: a product whose picture is the one that is searched with comes first, as `named` does; under a
        sort it is among what is sorted.
        """
        if order.sort != "relevance":
            order = replace(order, boosts=(), diversity=0.0)  # they have no effect beside it, nor on the scores
        ranking = _Ranking(complete=not legs)
        if not legs and named is not None:
            ranking.hits, ranking.exact = fusion.first([], named), named
        collapse = self._collapser(tenant, order.group_by, ranking)
        relevant: list[LegHit] = []
        depths = _depths(legs, order) if legs else ()
        for depth in depths:
            lists = await self._lists(tenant, legs, where, depth)
            with stage(self._metrics.search_stages, "fuse"):
                long = sum(len(one.hits) for one in lists) > _LONG
                fuse = partial(fusion.fuse, lists, calibrate=bool(order.boosts))
                found = await asyncio.to_thread(fuse) if long else fuse()
            exact = None if relevant else named or (fusion.own_picture(lists) if by_picture else None)
            if order.min_score is not None:
                ranking.relevance = await self._relevance(tenant, legs, lists, words)
                if exact is not None:
                    ranking.relevance[exact] = 1.0
                found = [hit for hit in found if ranking.relevance[hit.product_id] >= order.min_score]
            with stage(self._metrics.search_stages, "fuse"):
                fresh = [hit for hit in found if hit.product_id not in ranking.tier_of]
                ranking.tier_of |= dict.fromkeys((hit.product_id for hit in fresh), len(ranking.tiers))
                ranking.tiers.append(lists)
            complete = all(one.complete for one in lists) or len(depths) == 1
            if order.boosts or order.sort != "relevance":
                names = [hit.product_id for hit in fresh]
                await self._learn(tenant, [*names, exact] if exact else names, ranking)
            if order.boosts:
                ranking.boosts = ranking.boosts or Boosts(order.boosts, ranking.facts.values())
                fresh = boosted(fresh, ranking.facts, ranking.boosts)
            ranked = len(relevant)
            relevant = fusion.extend(relevant, fresh, single=len(legs) == 1 and not order.boosts)
            if exact is not None:
                relevant, ranking.exact = fusion.first(relevant, exact), exact
                ranking.tier_of.setdefault(exact, 0)
            new = sorted_by(order.sort, relevant[ranked:], ranking.facts)
            # Without a total, and without a window to put in order, what lies beyond the page need not be looked at.
            wanted = len(new) if complete or order.diversity else upto - len(ranking.hits)
            ranking.hits += await collapse(new, wanted)
            if not ranked and order.diversity:
                ranking.hits[:WINDOW] = await self._diverse(tenant, ranking.hits[:WINDOW], order.diversity)
            if len(ranking.hits) >= upto or complete:
                ranking.complete = complete
                break
        return ranking

    async def _relevance(
        self, tenant: str, legs: Sequence[WeightedLeg], lists: Sequence[fusion.RankedList], words: Sequence[Term]
    ) -> dict[str, float]:
        """Return how sure it is that each product of `lists` is what was asked for, 0 to 1."""
        names = sorted({hit.product_id for one in lists for hit in one.hits})
        vectors: dict[str, Mapping[str, Embedding]] = {}
        likely: dict[str, float] = {}
        if any(leg.using != "lexical" for leg in legs):
            for start in range(0, len(names), _CHUNK):
                vectors |= await self._vectors(tenant, names[start : start + _CHUNK])
            standing = calibration.Standing(legs, await self._sample(tenant))
            likely = {name: standing.likely(known) for name, known in vectors.items()}
        found = {hit.product_id: hit.score for one in lists if one.using == "lexical" for hit in one.hits}
        reach = await self._reach(tenant, words) if found else 0.0
        return {name: calibration.relevance(likely.get(name, 0.0), found.get(name, 0.0), reach) for name in names}

    async def _sample(self, tenant: str) -> Sequence[Mapping[str, Embedding]]:
        """Return the vectors of random products of the tenant, the same for a while.

        A catalogue that is still coming in, its pictures included, would be measured by its first products: the fewer
        it has, the sooner they are drawn again, which costs as much less.
        """
        now = asyncio.get_running_loop().time()
        until, sample = self._samples.get(tenant, (-math.inf, ()))
        if now >= until:
            products = await self._index.sample(tenant, calibration.SAMPLE)
            sample = tuple(stored.vectors for stored in products)
            settled = sum(stored.image_status != "pending" for stored in products)
            age = _SAMPLE_AGE if settled == calibration.SAMPLE else settled * _SAMPLE_AGE_EACH
            self._samples[tenant] = now + age, sample
            while len(self._samples) > _MOST_SAMPLES:  # not those of a large catalogue for a small one's
                del self._samples[min(self._samples, key=lambda one: self._samples[one][0])]
        return sample

    async def _reach(self, tenant: str, words: Sequence[Term]) -> float:
        """Return the lexical score of a product that has each word as well as any product of the tenant has it."""
        single = await asyncio.to_thread(
            lambda: [one for term in words if term.weight > 0 for one in _weighted(term, self._languages)]
        )
        legs = [Leg("lexical", vector, 1) for vector, _ in single[:_MOST_WORDS]]
        best = [hits[0].score if hits else 0.0 for hits in await self._index.search(tenant, legs, Filter())]
        return calibration.reachable(best, [share for _, share in single[:_MOST_WORDS]])

    async def _lists(
        self, tenant: str, legs: Sequence[WeightedLeg], where: Filter, depth: int
    ) -> list[fusion.RankedList]:
        with stage(self._metrics.search_stages, "search"):
            answers = await self._index.search(tenant, [leg.at(depth) for leg in legs], where)
        lists = []
        for leg, hits in zip(legs, answers, strict=True):
            # What has more of the unwanted words than of the others is at the end, and is not what was asked for.
            found = [hit for hit in hits if hit.score > 0] if leg.using == "lexical" else hits
            lists.append(fusion.RankedList(leg.using, leg.weight, found, complete=len(found) < depth))
        return lists

    async def _learn(self, tenant: str, product_ids: Sequence[str], ranking: _Ranking) -> None:
        """Ask the index what is known of these products, and keep it in `ranking`."""
        with stage(self._metrics.search_stages, "load"):
            for start in range(0, len(product_ids), _CHUNK):
                ranking.facts.update(await self._index.facts(tenant, product_ids[start : start + _CHUNK]))

    def _collapser(
        self, tenant: str, group_by: GroupBy | None, ranking: _Ranking
    ) -> Callable[[list[LegHit], int], Awaitable[list[LegHit]]]:
        """Return what lets one product of each group through, whatever was let through before, at least `wanted`."""
        groups, pictures = Groups(), Pictures()

        def group_of(product_id: str) -> str | None:
            facts = ranking.facts.get(product_id)
            return facts.group_id if facts else None

        async def collapse(hits: list[LegHit], wanted: int) -> list[LegHit]:
            if group_by is None:
                return hits
            kept: list[LegHit] = []
            for start in range(0, len(hits), size := min(_CHUNK, max(_LEAST_CHUNK, 2 * wanted))):
                if len(kept) >= wanted:
                    break
                some = hits[start : start + size]
                names = [hit.product_id for hit in some]
                if group_by == "group_id":
                    await self._learn(tenant, [name for name in names if name not in ranking.facts], ranking)
                    kept += groups.first(some, group_of)
                else:
                    kept += await asyncio.to_thread(pictures.first, some, await self._vectors(tenant, names))
            return kept

        return collapse

    async def _vectors(self, tenant: str, product_ids: Sequence[str]) -> dict[str, Mapping[str, Embedding]]:
        with stage(self._metrics.search_stages, "load"):
            stored = await self._index.get(tenant, product_ids, with_vectors=True)
        return {product_id: one.vectors for product_id, one in stored.items()}

    async def _diverse(self, tenant: str, hits: Sequence[LegHit], diversity: float) -> list[LegHit]:
        vectors = await self._vectors(tenant, [hit.product_id for hit in hits])
        return await asyncio.to_thread(diverse, hits, vectors, diversity)

    async def _count(
        self, tenant: str, search: Search, asked_as: _Matched
    ) -> Mapping[str, Sequence[FacetCount] | Numbers]:
        """Return the facets, each over what its own filter would hide too.

        Every product is near to a vector; where there are only words, or what is near must be near enough, what
        matches is counted.
        """
        keys, where = search.facets, asked_as.where
        matched = {among: among for among in (facets.without(where, key) for key in keys)}
        if search.order.min_score is not None or all(leg.using == "lexical" for leg in asked_as.legs):
            for among in matched:
                these = Condition("product_id", await self._matching(tenant, search.order, among, asked_as))
                matched[among] = replace(among, conditions=(*among.conditions, these))
        among_of = {key: matched[facets.without(where, key)] for key in keys}
        with stage(self._metrics.search_stages, "facets"):
            asked = [(key, among) for key, among in among_of.items() if key not in facets.NUMBERS]
            counts = await self._index.facet(tenant, asked, facets.MOST_VALUES) if asked else ()
            values = dict(zip((key for key, _ in asked), counts, strict=True))
            return {
                key: values[key] if key in values else await self._numbers(tenant, cast("NumberKey", key), among)
                for key, among in among_of.items()
            }

    async def _matching(self, tenant: str, order: Order, where: Filter, asked_as: _Matched) -> tuple[str, ...]:
        """Return the products that a search by words alone, or with `min_score`, finds under `where`."""
        exact, legs = await self._named(tenant, asked_as.name, where), asked_as.legs
        found: list[str] = []
        if legs and order.min_score is None:
            found = [hit.product_id for hit in (await self._lists(tenant, legs, where, TIERS[-1]))[0].hits]
        elif legs and order.min_score is not None:
            lists = await self._lists(tenant, legs, where, _depths(legs, order)[0])
            exact = exact or (fusion.own_picture(lists) if asked_as.by_picture else None)
            relevance = await self._relevance(tenant, legs, lists, asked_as.words.read)
            found = [name for name, sure in relevance.items() if sure >= order.min_score]
        return tuple(found if exact is None or exact in found else [*found, exact])

    async def _numbers(self, tenant: str, key: NumberKey, among: Filter) -> Numbers:
        ends = await self._index.extremes(tenant, key, among)
        if ends is None:
            return Numbers(None, None, ())
        ranges = facets.fine_ranges(*ends)
        wheres = [replace(among, conditions=(*among.conditions, Condition(key, within=each))) for each in ranges]
        counts = await self._index.count(tenant, wheres)
        return Numbers(*ends, facets.merged(list(zip(ranges, counts, strict=True))))

    async def _named(self, tenant: str, name: str | None, where: Filter) -> str | None:
        """Return `name` if it is the id of a live product under the filter."""
        try:
            named = _PRODUCT_ID.validate_python(name, strict=True)
        except ValidationError:
            return None
        itself = replace(where, conditions=(*where.conditions, Condition("product_id", (named,))))
        return named if await self._index.page(tenant, after=None, limit=1, where=itself) else None

    async def _sizes(
        self, tenant: str, loaded: Sequence[tuple[LegHit, StoredProduct]], where: Filter
    ) -> Mapping[str, int]:
        """Return how many products under the filters each group of the page has."""
        groups = [stored.product.group_id for _, stored in loaded if stored.product.group_id is not None]
        wheres = [replace(where, conditions=(*where.conditions, Condition("group_id", (group,)))) for group in groups]
        return dict(zip(groups, await self._index.count(tenant, wheres), strict=True)) if groups else {}

    async def _load(self, tenant: str, hits: Sequence[LegHit]) -> list[tuple[LegHit, StoredProduct]]:
        with stage(self._metrics.search_stages, "load"):
            stored = await self._index.get(tenant, [hit.product_id for hit in hits]) if hits else {}
        # Deleted since it was ranked: left out.
        return [(hit, stored[hit.product_id]) for hit in hits if hit.product_id in stored]


def _page(
    loaded: Sequence[tuple[LegHit, StoredProduct]], ranking: _Ranking, sizes: Mapping[str, int] | None, search: Search
) -> list[Hit]:
    return [
        Hit(
            stored,
            hit.score,
            None if sizes is None else sizes.get(stored.product.group_id or "", 1),
            ranking.explain(hit) if search.explain else None,
            ranking.relevance[hit.product_id] if search.order.min_score is not None else None,
        )
        for hit, stored in loaded
    ]


def _depths(legs: Sequence[WeightedLeg], order: Order) -> Sequence[int]:
    """Return how deep the index is asked, one after the other; what is sorted or judged must be whole, so only once."""
    if order.sort == "relevance" and order.min_score is None:
        return TIERS
    return (SORTED_LEXICAL if all(leg.using == "lexical" for leg in legs) else SORTED,)


def beginnings(words: tuple[Term, ...], most: int) -> tuple[Term, ...]:
    """Return the words if they have at most so many characters together, else whole words of the beginning of each.

    Each has the same share of `most`; what the short ones leave is the long ones'.
    """
    kept, left = list(words), most
    by_length = sorted(range(len(words)), key=lambda number: len(words[number].text))
    for longer, number in zip(range(len(words), 0, -1), by_length, strict=True):
        text, share = words[number].text, left // longer
        if len(text) > share:
            text = " ".join(text.split())
            if len(text) > share:
                text = _PARTIAL.sub("", text[: share + 1])[:share]
            kept[number] = replace(words[number], text=text)
        left -= len(text)
    return tuple(kept)


def _weighted(term: Term, languages: tuple[Language, ...]) -> list[tuple[SparseVector, float]]:
    """Return each word of the term on its own, as heavy as the term makes it."""
    return [
        (SparseVector(vector.indices, tuple(term.weight * value for value in vector.values)), term.weight * share)
        for vector, share in query_words(term.text, languages)
    ]


@dataclass(frozen=True, slots=True)
class _Words:
    """The words of a search as they were read."""

    vector: SparseVector
    looked_up: tuple[Term, ...]
    """As they were written, of a long text the beginning."""
    read: tuple[Term, ...]
    """With the likeliest correction of each that seemed misspelt."""
    corrected: str | None = None
    spreads: Mapping[Written, int] = field(default_factory=dict)
    """How many products had each word that is wanted, as it was read."""
    unread: Mapping[Written, SparseVector] = field(default_factory=dict)
    """Those that none had, each as the index is asked for it."""


@dataclass(frozen=True, slots=True)
class _Matched:
    """What a search matched, and by which means."""

    words: _Words
    mode: Mode
    degraded: str | None
    legs: Sequence[WeightedLeg]
    where: Filter
    ranking: _Ranking
    name: str | None
    """What the product is asked for by, if it is the id of one."""
    by_picture: bool
    """A product may be asked for by its very picture."""


def _read(
    words: tuple[Term, ...], vocabulary: Vocabulary | None, languages: tuple[Language, ...], *, correct: bool
) -> _Words:
    """Return the words with what may, if `correct`, have been meant by those that the catalogue does not know."""
    most = MOST_READ // max(1, len(words))
    readings = [read(one.text, vocabulary, most) if vocabulary is not None and correct else None for one in words]
    vector = _lexical(words, readings, languages)
    if not any(readings):
        return _Words(vector, words, words, None, *_spreads(words, vocabulary))
    read_as = tuple(
        one if reading is None else replace(one, text=reading.text)
        for one, reading in zip(words, readings, strict=True)
    )
    corrected = " ".join(one.text for one in read_as if one.weight > 0)
    changed = any(reading is not None and one.weight > 0 for one, reading in zip(words, readings, strict=True))
    return _Words(vector, words, read_as, corrected if changed else None, *_spreads(read_as, vocabulary))


def _spreads(
    words: tuple[Term, ...], vocabulary: Vocabulary | None
) -> tuple[dict[Written, int], dict[Written, SparseVector]]:
    """Return how many products had each wanted word, and how to ask for those that none had: the first of too many."""
    if vocabulary is None:
        return {}, {}
    spreads = vocabulary.spreads(" ".join(one.text for one in words if one.weight > 0))
    unread = [word for word, spread in spreads.items() if not spread]
    for word in unread[_MOST_WORDS:]:
        del spreads[word]
    asked = {
        word: vector_of_any(vocabulary.lacks(word), word.chunk, vocabulary.languages) for word in unread[:_MOST_WORDS]
    }
    return spreads, asked


def _lexical(
    words: Sequence[Term], readings: Sequence[Reading | None], languages: tuple[Language, ...]
) -> SparseVector:
    """Return the terms of all words, each as heavy as its words; what is not wanted counts against a product."""
    terms: defaultdict[int, float] = defaultdict(float)
    for one, reading in zip(words, readings, strict=True):
        vector = query_vector(one.text, languages, meant=() if reading is None else reading.meant)
        for index, value in zip(vector.indices, vector.values, strict=True):
            terms[index] += one.weight * value
    kept = sorted((index, value) for index, value in terms.items() if value)
    return SparseVector(tuple(index for index, _ in kept), tuple(value for _, value in kept))
