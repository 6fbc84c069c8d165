"""The query side over HTTP: search, similar, products, embeddings, health and the pages."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from aiohttp import hdrs, web
from pydantic import BaseModel

from catalens.access import counts_as
from catalens.domain import DEFAULT_TENANT, Filter, Leg, ModelSpec, PictureInfo, SparseVector, StoredProduct
from catalens.embedding import CachedEncoder
from catalens.errors import CatalensError, InvalidPicture, NoFacet, NotFound, Transient
from catalens.events import CONSUMED, EMBEDDER_GROUP
from catalens.measured import MeasuredImages
from catalens.openapi import PICTURE, Content, Handler, Operation
from catalens.pictures import Picture
from catalens.ports import BlobStore, EmbeddingCache, Encoder, EventLog, ImageSource, VectorIndex
from catalens.problems import Problem, as_problem, invalid
from catalens.settings import Settings
from catalens.telemetry import Metrics
from catalens.web import (
    read_form,
    read_json,
    read_params,
    read_product_id,
    reply,
    request_id_of,
    tenant_of,
    validated,
)
from catalens_query import given, models
from catalens_query.filters import translate
from catalens_query.ordering import Boost
from catalens_query.pages import Pages, conditional, has_current
from catalens_query.presenting import export_line, facet, hit, product_answer
from catalens_query.searching import Example, Found, Order, Search, Searcher, Term, UnknownExample, WrongPicture
from catalens_query.suggesting import Suggester
from catalens_query.vocabularies import Vocabularies

if TYPE_CHECKING:
    from catalens.domain import Embedding

_LISTING: Final = 50
_EXPORT_PAGE: Final = 200
_NDJSON: Final = "application/x-ndjson"
_BATCH_LANES: Final = 8
"""Requests of one batch in work at once: a batch must not fill the encoder's queue on its own."""
_PAIR: Final = ("image1", "image2")


class QueryService:
    """Reads the index, never writes it; without an encoder it still answers searches by words."""

    def __init__(
        self,
        *,
        index: VectorIndex,
        encoder: Encoder | None,
        cache: EmbeddingCache,
        blobs: BlobStore,
        images: ImageSource,
        log: EventLog,
        settings: Settings,
        metrics: Metrics,
        vocabularies: Vocabularies | None = None,
    ) -> None:
        self._index = index
        self._encoder = encoder
        self._cache = cache
        self._blobs = blobs
        self._images = MeasuredImages(images, metrics)
        self._log = log
        self._settings = settings
        cached = None if encoder is None else CachedEncoder(encoder, cache, metrics)
        languages = settings.languages
        vocabularies = vocabularies or Vocabularies(languages)  # never read: nothing is corrected nor suggested
        self._searcher = Searcher(
            index,
            cached,
            metrics,
            vocabularies=vocabularies,
            languages=languages,
            patience=settings.http.search_timeout,
        )
        self._suggester = Suggester(index, vocabularies)
        self._pages = Pages()

    def operations(self) -> list[Operation]:
        """Return the rows of the query table."""
        return [
            *self._search_operations(),
            *self._product_operations(),
            *self._embedding_operations(),
            *self._state_operations(),
            *self._pages.operations(),
        ]

    async def ready(self) -> Mapping[str, str]:
        """Return "ok" or what is wrong, for the encoder and the index: a real embedding and a real query."""
        # A word of its own: the index may answer a question that it was asked before from memory.
        legs = [Leg("lexical", SparseVector((secrets.randbelow(2**31),), (1.0,)), 1)]
        checks: dict[str, str] = {}
        try:
            tower, vector = await self._searcher.probe()
            legs.append(Leg(tower, vector, 1))
            checks["encoder"] = "ok"
        except CatalensError as error:
            checks["encoder"] = str(error)
        try:
            await self._index.search(DEFAULT_TENANT, legs, Filter())
            checks["index"] = "ok"
        except CatalensError as error:
            checks["index"] = str(error)
        return checks

    # --- searching ------------------------------------------------------------------------------------------

    def _search_operations(self) -> list[Operation]:
        def row(method: str, path: str, handler: Handler, summary: str, **more: Any) -> Operation:  # Operation's own
            return Operation(method, f"/api/v1/{path}", handler, summary, "search", "query", **more)

        return [
            row("POST", "search", self._search, "Search by words, by picture or by both",
                params=models.Paging, body=models.SearchRequest, responses={200: models.SearchAnswer},
                problems=(501,)),
            row("POST", "search-image", self._search_image, "Search with an uploaded picture",
                params=models.Paging, form=models.PictureSearchForm, pictures=(PICTURE,),
                responses={200: models.PictureSearchAnswer}, problems=(501,)),
            row("POST", "search/batch", self._search_batch, "Several searches in one call",
                description="Each counts against a key's rate; a batch is answered whole if one request may come, and "
                "what comes after it waits the longer.",
                body=models.SearchBatch, responses={200: models.SearchBatchAnswer}),
            row("GET", "suggest", self._suggest, "Completions of what is being typed",
                description="Words, brands, categories and product names of the catalogue. Case and accents do not "
                "matter, and one word may have one typo. Brands, categories and words are as old as the last reading "
                "of the catalogue, product names are of now.",
                params=models.SuggestParams, responses={200: models.SuggestAnswer}),
            row("GET", "products/{product_id}/similar", self._similar, "More like this",
                params=models.SimilarParams, responses={200: models.SearchAnswer}, problems=(404,)),
        ]  # fmt: skip

    async def _search(self, request: web.Request) -> web.Response:
        paging = read_params(request, models.Paging)
        body = await read_json(request, models.SearchRequest)
        return reply(await self._answer_search(tenant_of(request), body, paging))

    async def _answer_search(
        self, tenant: str, body: models.SearchRequest, paging: models.Paging
    ) -> models.SearchAnswer:
        started, due = time.perf_counter(), self._due()
        where = translate(body.filters)
        pictures = await self._pictures(
            {
                "image": body.image,
                **{f"like.{number}": one for number, one in enumerate(body.like)},
                **{f"unlike.{number}": one for number, one in enumerate(body.unlike)},
            },
            due,
        )
        terms = [models.QueryTerm(text=body.query)] if isinstance(body.query, str) else body.query or []
        search = Search(
            words=tuple(Term(term.text, term.weight) for term in terms),
            picture=pictures.get("image"),
            where=where,
            limit=body.limit if paging.limit is None else paging.limit,
            offset=body.offset if paging.offset is None else paging.offset,
            image_weight=body.image_weight,
            correct=body.correct,
            mode=body.mode,
            using=body.using,
            like=_examples(body.like, "like", pictures),
            unlike=_examples(body.unlike, "unlike", pictures),
            order=Order(
                sort=body.sort,
                group_by=body.group_by,
                boosts=tuple(Boost(boost.field, boost.factor) for boost in body.boosts),
                diversity=body.diversity,
                min_score=body.min_score,
            ),
            facets=tuple(dict.fromkeys(body.facets)),
            explain=body.explain,
        )
        try:
            found = await self._searcher.search(tenant, search, due=due)
        except UnknownExample as error:
            raise invalid((error.field, str(error))) from error
        except NoFacet as error:
            raise invalid(("facets", str(error))) from error
        except WrongPicture as error:
            raise as_problem(error, field=error.field) from error
        return models.SearchAnswer(**self._answer(found, started, body.include))

    async def _search_image(self, request: web.Request) -> web.Response:
        started = time.perf_counter()
        paging = read_params(request, models.Paging)
        form = await read_form(request)
        fields = form.values(models.PictureSearchForm, pictures=PICTURE)
        data = form.picture()
        search = Search(
            words=() if fields.text is None else (Term(fields.text),),
            picture=data,
            where=translate(fields.filters),
            limit=10 if paging.limit is None else paging.limit,
            offset=paging.offset or 0,
            image_weight=fields.image_weight,
        )
        info = await asyncio.to_thread(self._inspect, data)
        spec = self._spec()
        found = await self._searcher.search(tenant_of(request), search)
        return reply(
            models.PictureSearchAnswer(
                **self._answer(found, started),
                query_image=models.QueryImage(**asdict(info)),
                embedding_dimension=spec.dimension,
            )
        )

    async def _search_batch(self, request: web.Request) -> web.Response:
        async def one(body: dict[str, Any]) -> BaseModel:
            search = validated(models.SearchRequest, body)
            return await self._answer_search(tenant_of(request), search, models.Paging())

        batch = await read_json(request, models.SearchBatch)
        return reply({"responses": await self._each(request, batch.requests, one)})

    async def _similar(self, request: web.Request) -> web.Response:
        started = time.perf_counter()
        product_id = read_product_id(request)
        params = read_params(request, models.SimilarParams)
        found = await self._searcher.similar(
            tenant_of(request),
            product_id,
            params.using,
            variants=params.variants,
            offset=params.offset,
            limit=params.limit,
        )
        return reply(models.SearchAnswer(**self._answer(found, started)))

    async def _suggest(self, request: web.Request) -> web.Response:
        params = read_params(request, models.SuggestParams)
        try:
            async with asyncio.timeout_at(self._due()):
                found = await self._suggester.suggest(tenant_of(request), params.q, params.limit)
        except TimeoutError as error:
            longest = self._settings.http.search_timeout
            raise Transient(f"the suggestions took longer than {longest:g} s") from error
        suggestions = [
            models.Suggestion(**{name: value for name, value in asdict(one).items() if value is not None})
            for one in found or ()
        ]
        return reply(models.SuggestAnswer(suggestions=suggestions, count=len(suggestions), ready=found is not None))

    def _answer(self, found: Found, started: float, include: Collection[str] | None = None) -> dict[str, Any]:
        results = [hit(one, include) for one in found.hits]
        answer: dict[str, Any] = {
            "results": results,
            "count": len(results),
            "model": None if self._encoder is None else self._encoder.spec.id,
            "mode": found.mode,
            "took_ms": round((time.perf_counter() - started) * 1000, 2),
        }
        if found.total is not None:
            answer["total"] = found.total
        if found.facets is not None:
            answer["facets"] = {name: facet(counted) for name, counted in found.facets.items()}
        more = {"degraded": found.degraded, "corrected": found.corrected}
        return answer | {name: text for name, text in more.items() if text is not None}

    # --- products -------------------------------------------------------------------------------------------

    def _product_operations(self) -> list[Operation]:
        def row(path: str, handler: Handler, summary: str, **more: Any) -> Operation:  # Operation's own
            return Operation("GET", f"/api/v1/products{path}", handler, summary, "products", "query", **more)

        return [
            row("", self._listing, "The catalogue in the order of its ids",
                description=f"`Accept: {_NDJSON}` streams the whole catalogue, one product a line in the form in which "
                "it is put in, uploaded pictures included, so that it can be imported again.",
                params=models.ListingParams,
                responses={200: (models.Listing, Content(_NDJSON, "Or the export, if asked for."))}),
            row("/{product_id}", self._product, "One product as it is indexed",
                responses={200: models.ProductAnswer}, problems=(404,)),
            row("/{product_id}/image", self._image, "An uploaded picture of the product",
                description="Of a picture that the catalogue gave by its URL, `image` is that URL, and this is 404.",
                params=models.PictureParams,
                responses={200: Content("image/*", "The picture as it was uploaded."), 304: ()}, problems=(404,)),
        ]  # fmt: skip

    async def _product(self, request: web.Request) -> web.Response:
        return reply(product_answer(await self._stored(request)))

    async def _stored(self, request: web.Request) -> StoredProduct:
        product_id = read_product_id(request)
        stored = (await self._index.get(tenant_of(request), [product_id])).get(product_id)
        if stored is None:
            raise NotFound(f"product {product_id} does not exist")
        return stored

    async def _image(self, request: web.Request) -> web.Response:
        params = read_params(request, models.PictureParams)
        images = (await self._stored(request)).product.images
        reference = images[params.index].blob if params.index < len(images) else None
        if reference is None:
            raise NotFound("the product has no uploaded picture there; its `image` field says where its picture is")
        if has_current(request, reference):
            return conditional(request, b"", "image/*", reference)
        body = await self._blobs.get(reference)
        return conditional(request, body, await asyncio.to_thread(self._content_type, body), reference)

    def _content_type(self, picture: bytes) -> str:
        try:
            return f"image/{self._inspect(picture).format}"
        except InvalidPicture:
            return "application/octet-stream"  # a browser neither shows nor runs it

    async def _listing(self, request: web.Request) -> web.StreamResponse:
        params = read_params(request, models.ListingParams)
        if _NDJSON in request.headers.get(hdrs.ACCEPT, ""):
            return await self._export(request, params)
        limit = params.limit or _LISTING
        found = await self._index.page(tenant_of(request), after=params.after, limit=limit + 1, where=Filter())
        products = [product_answer(stored) for stored in found[:limit]]
        following = products[-1].product_id if len(found) > limit else None
        return reply(models.Listing(products=products, count=len(products), next=following))

    async def _export(self, request: web.Request, params: models.ListingParams) -> web.StreamResponse:
        response = web.StreamResponse(headers={hdrs.CONTENT_TYPE: _NDJSON})
        tenant, after, left = tenant_of(request), params.after, params.limit
        while left is None or left > 0:
            size = _EXPORT_PAGE if left is None else left
            found = await self._index.page(tenant, after=after, limit=size, where=Filter())
            if not response.prepared:  # only now: an index that is away is a problem, not a broken stream
                await response.prepare(request)
            for stored in found:
                await response.write(await export_line(stored, self._blobs))
            if len(found) < size:
                break
            after = found[-1].product.product_id
            left = None if left is None else left - len(found)
        await response.write_eof()
        return response

    # --- embeddings -----------------------------------------------------------------------------------------

    def _embedding_operations(self) -> list[Operation]:
        def row(path: str, handler: Handler, summary: str, **more: Any) -> Operation:  # Operation's own
            return Operation("POST", f"/api/v1/{path}", handler, summary, "embeddings", "query", **more)

        return [
            row("embed", self._embed, "Embed a text",
                body=models.EmbedRequest, responses={200: models.EmbedAnswer}, problems=(501,)),
            row("embed-image", self._embed_image, "Embed a picture",
                form=models.NoFields, pictures=(PICTURE,), responses={200: models.EmbedAnswer}, problems=(501,)),
            row("embed/batch", self._embed_batch, "Embed several texts in one call",
                description="Each counts against a key's rate, as in a batch of searches.",
                body=models.EmbedBatch, responses={200: models.EmbedBatchAnswer}),
            row("similarity", self._similarity, "Compare two texts or pictures",
                body=models.SimilarityRequest, form=models.NoFields, pictures=tuple((name,) for name in _PAIR),
                responses={200: models.SimilarityAnswer}, problems=(501,)),
        ]  # fmt: skip

    async def _embed(self, request: web.Request) -> web.Response:
        body = await read_json(request, models.EmbedRequest)
        return reply(self._embedding(await self._searcher.embed_text(body.text)))

    async def _embed_image(self, request: web.Request) -> web.Response:
        form = await read_form(request)
        form.values(models.NoFields, pictures=PICTURE)
        return reply(self._embedding(await self._searcher.embed_picture(form.picture())))

    async def _embed_batch(self, request: web.Request) -> web.Response:
        async def one(body: dict[str, Any]) -> BaseModel:
            wanted = validated(models.EmbedRequest, body)
            return self._embedding(await self._searcher.embed_text(wanted.text))

        batch = await read_json(request, models.EmbedBatch)
        return reply({"responses": await self._each(request, batch.requests, one)})

    async def _similarity(self, request: web.Request) -> web.Response:
        if request.content_type == "multipart/form-data":
            form = await read_form(request)
            form.values(models.NoFields, pictures=_PAIR)
            uploads = {name: form.picture((name,)) for name in _PAIR}
            first, second = [await self._seen(name, picture) for name, picture in uploads.items()]
        else:
            body = await read_json(request, models.SimilarityRequest)
            pictures = await self._pictures({"a.image": body.a.image, "b.image": body.b.image}, self._due())
            first, second = [
                await self._searcher.embed_text(side.text or "")
                if side.image is None
                else await self._seen(f"{name}.image", pictures[f"{name}.image"])
                for name, side in (("a", body.a), ("b", body.b))
            ]
        cosine = float(np.clip(np.dot(first, second), -1.0, 1.0))
        return reply(models.SimilarityAnswer(similarity=cosine))

    async def _seen(self, field: str, picture: bytes) -> Embedding:
        """Return the vector of one of two pictures; the problem of one that is none names it."""
        try:
            return await self._searcher.embed_picture(picture)
        except InvalidPicture as error:
            raise as_problem(error, field=field) from error

    def _embedding(self, vector: Embedding) -> models.EmbedAnswer:
        return models.EmbedAnswer(embedding=vector.tolist(), dimension=len(vector), model=self._spec().id)

    def _spec(self) -> ModelSpec:
        if self._encoder is None:
            raise Transient("no model is loaded")
        return self._encoder.spec

    # --- state ----------------------------------------------------------------------------------------------

    def _state_operations(self) -> list[Operation]:
        return [
            Operation("GET", "/api/v1/health", self._health, "Whether searches are answered, and how well", "state",
                      "public", responses={200: models.Health}),
            Operation("GET", "/api/v1/stats", self._stats, "What is searchable and what is on its way", "state",
                      "keyed", responses={200: models.Stats}),
        ]  # fmt: skip

    async def _health(self, request: web.Request) -> web.Response:  # noqa: ARG002  # every handler takes one
        checks = await self.ready()
        if checks["index"] != "ok":
            raise Transient(f"index: {checks['index']}")
        return reply(
            models.Health(
                status="ok" if checks["encoder"] == "ok" else "degraded",
                model=None if self._encoder is None else self._encoder.spec.id,
                encoder=checks["encoder"],
                version=version("catalens"),
            )
        )

    async def _stats(self, request: web.Request) -> web.Response:
        counts = await self._index.counts(tenant_of(request))
        lag = await self._log.lag(EMBEDDER_GROUP, CONSUMED)
        cache = self._cache.stats()
        spec = None if self._encoder is None else self._encoder.spec
        return reply(
            models.Stats(
                products=counts.products,
                images_pending=counts.images_pending,
                deleted=counts.deleted,
                lag=sum(lag.values()),
                model=None if spec is None else spec.id,
                dimension=None if spec is None else spec.dimension,
                cache=models.CacheStats(
                    hits=cache["hits"],
                    misses=cache["misses"],
                    entries=cache.get("entries"),
                    available=bool(cache.get("available", 1)),
                ),
            )
        )

    # --- shared ---------------------------------------------------------------------------------------------

    async def _each(
        self,
        request: web.Request,
        bodies: Sequence[dict[str, Any]],
        answer: Callable[[dict[str, Any]], Awaitable[BaseModel]],
    ) -> list[dict[str, Any]]:
        """Return each body's own answer or problem, in order."""
        most = self._settings.http.max_batch
        if len(bodies) > most:
            raise invalid(("requests", f"{len(bodies)} requests are more than the {most} allowed in one call"))
        await counts_as(request, len(bodies))
        lanes = asyncio.Semaphore(_BATCH_LANES)

        async def one(body: dict[str, Any]) -> dict[str, Any]:
            async with lanes:
                try:
                    return (await answer(body)).model_dump(mode="json", exclude_unset=True)
                except Problem as problem:
                    return problem.body(request_id_of(request))
                except CatalensError as error:
                    return as_problem(error).body(request_id_of(request))

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(body), name=f"batch.{number}") for number, body in enumerate(bodies)]
        return [task.result() for task in tasks]

    def _due(self) -> float:
        """Return when a search that begins now must be over, on the loop's clock."""
        return asyncio.get_running_loop().time() + self._settings.http.search_timeout

    async def _pictures(self, fields: Mapping[str, models.PictureInput | str | None], due: float) -> dict[str, bytes]:
        """Return the bytes of those fields that give a picture; Problem 422 if one can't be had."""
        wanted = {name: one for name, one in fields.items() if isinstance(one, models.PictureInput)}
        return await given.pictures(wanted, self._images, due)

    def _inspect(self, picture: bytes) -> PictureInfo:
        return Picture(picture, self._settings.pictures).info


def _examples(
    examples: Sequence[str | models.PictureInput], field: str, pictures: Mapping[str, bytes]
) -> tuple[Example, ...]:
    return tuple(one if isinstance(one, str) else pictures[f"{field}.{number}"] for number, one in enumerate(examples))
