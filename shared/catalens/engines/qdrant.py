"""The vector index on a Qdrant server: one collection a model, `<collection>-<12 digits of the fingerprint>`.

The alias `<collection>` names the current one; what an index was built by, its notes and whether the workers should
stand aside are kept as the collection's metadata, which every process sees and no search can find.

Writes are compare-and-set (docs/adr/0009): read the payloads, apply the rules (`rules.py`), write on the condition that
the points' `etag` is still the one that was read, read again to see who won, and go on with the losers. A write that
returned was applied by as many replicas as `write_consistency` says and is in their write-ahead logs.

Strict mode: every filter is on an indexed field. A stricter server must allow `filter_max_conditions` ≥ 32,
`condition_max_size` ≥ 256, `max_query_limit` ≥ the largest limit asked for, `upsert_max_batchsize` ≥ 256,
`search_max_oversampling` ≥ 2, `max_payload_index_count` ≥ 160 and rate limits above the pipeline's; what it refuses
raises Misconfigured with its words. A range on a numeric attribute beyond the first 64 of a collection is scanned, and
strict mode refuses that.

Driven in the tests against Qdrant's engine behind its gRPC API, not against a Qdrant server, unless
CATALENS_TEST_QDRANT_URL names one: clustering, HNSW and quantisation were not checked.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, takewhile
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias, cast
from uuid import UUID

import structlog

from catalens.domain import (
    FacetCount,
    FacetKey,
    Facts,
    Filter,
    ImageUpdate,
    IndexCounts,
    IndexDocument,
    IndexInfo,
    Leg,
    LegHit,
    ModelSpec,
    NumberKey,
    OfferUpdate,
    PointState,
    SparseVector,
    StoredProduct,
    TombstoneWrite,
    WriteOutcome,
    point_id,
)
from catalens.engines import fitting, rules
from catalens.engines.points import (
    FACETS,
    NUMBERS,
    Item,
    content_item,
    facet_field,
    facet_value,
    image_item,
    offer_item,
    packed_dense,
    packed_sparse,
    plain_filter,
    point_state,
    product_facts,
    stored_product,
    tombstone_item,
)
from catalens.engines.qdrant_messages import pb
from catalens.engines.qdrant_wire import (
    Connection,
    Message,
    NoCollection,
    all_but,
    any_of,
    clause,
    dense,
    fields,
    from_payload,
    from_point_id,
    from_vectors,
    named_vectors,
    point_ids,
    points_are,
    primitive,
    side_by_side,
    sparse,
    to_payload,
    to_value,
    to_vectors,
    within,
)
from catalens.errors import Conflict, Misconfigured, NoFacet, Transient

if TYPE_CHECKING:
    from catalens.settings import QdrantSettings

log = structlog.get_logger(__name__)

FORMAT: Final = 2
"""Version of a collection's layout; a release that changes it makes another collection of it."""
WITHOUT_FACETS: Final = 1
"""The layout before: read and written as ever, but what was stored in it has no fields to count."""
BATCH: Final = 256
"""Points of one request at most."""
BATCH_BYTES: Final = 3 * 1024 * 1024
"""Bytes of one request, unless a single point has more: below the 4 MiB that gRPC servers take by default."""
WRITERS: Final = 4
"""Write requests of one index side by side."""
ROUNDS: Final = 12
"""Attempts of one write call; each lost one means that another writer's was applied."""
TRAIL: Final = 8
"""Earlier etags that a point remembers, so that who was replaced at once still learns that his write was applied."""
MAX_NUMBER_INDEXES: Final = 64
"""Numeric attributes that get an index of their own; what is asked beyond is scanned."""
MAX_FACET_INDEXES: Final = 64
"""Attributes whose values can be counted: the first ones that came."""
OVERSAMPLING: Final = 2.0
"""Candidates per hit that quantised vectors bring up and original vectors decide."""
TENANTS_KNOWN: Final = 30.0
"""Seconds that it may take until a search notices that another process wrote the first product of a second tenant."""

_RULE_FIELDS: Final = all_but("doc", "terms", "facets", "numbers", "blobs", "order")
"""What the rules read: what only reads need is large, and is written, never read, by a write."""
_STORED_FIELDS: Final = fields(
    *("tenant", "product_id", "state", "version", "offer", "doc", "image_status", "image_error", "indexed_at", "tags")
)
_FACT_FIELDS: Final = fields("product_id", "state", "version", "offer", "doc")
_EXPORTED_FIELDS: Final = all_but("terms", "facets", "numbers", "blobs", "order", "etag")
_Conditions: TypeAlias = tuple[list[Message], list[Message]]
_MANY: Final = ("numbers", "facets")
"""Payload keys that hold as many fields as the catalogue has attributes: not all of these are indexed."""
_NEVER: Final = "-"
"""An etag that no point has."""

_CHUNK: Final = 8
_RADIX: Final = 67
_DIGITS: Final = {
    character: digit
    for digit, character in enumerate(sorted("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._:-"), 1)
}


def order_keys(product_id: str) -> list[int]:
    """Return integers that sort as the ids do by code point: 8 characters each in base 67, the end of the id as 0.

    Each is below 2**53, so that it survives the engine's doubles. No list begins another one.
    """
    digits = [_DIGITS[character] for character in product_id]
    digits += [0] * (_CHUNK - len(digits) % _CHUNK)
    keys = []
    for start in range(0, len(digits), _CHUNK):
        key = 0
        for digit in digits[start : start + _CHUNK]:
            key = key * _RADIX + digit
        keys.append(key)
    return keys


def _index_of(key: str) -> tuple[pb.FieldType.ValueType, pb.PayloadIndexParams | None]:
    """Return the type of the payload index on `key` and its parameters.

    HNSW links are only made for what searches filter by; what only writes and housekeeping read stays on disk.
    """
    cold = pb.Memory.Cold
    if key == "tenant":
        params = pb.PayloadIndexParams(keyword_index_params=pb.KeywordIndexParams(is_tenant=True))
        return pb.FieldType.FieldTypeKeyword, params
    if key in ("etag", "blobs") or key.startswith("facets."):
        keyword = pb.KeywordIndexParams(enable_hnsw=False, memory=cold)
        return pb.FieldType.FieldTypeKeyword, pb.PayloadIndexParams(keyword_index_params=keyword)
    if key.startswith("order."):
        integer = pb.IntegerIndexParams(enable_hnsw=False, memory=cold)
        return pb.FieldType.FieldTypeInteger, pb.PayloadIndexParams(integer_index_params=integer)
    if key == "indexed_at":
        real = pb.FloatIndexParams(enable_hnsw=False, memory=cold)
        return pb.FieldType.FieldTypeFloat, pb.PayloadIndexParams(float_index_params=real)
    if key in ("state", "terms", "image_status", "offer.currency"):
        return pb.FieldType.FieldTypeKeyword, None
    if key in ("in_stock", "offer.stock"):
        return pb.FieldType.FieldTypeInteger, None
    return pb.FieldType.FieldTypeFloat, None


INDEXES: Final = (
    *("tenant", "state", "terms", "blobs", "image_status", "etag", "in_stock", "indexed_at"),
    *("offer.price", "offer.stock", "offer.currency"),
    *(f"order.l{level}" for level in range(5)),  # ids of up to 39 characters; longer ones make theirs when they come
)
"""The payload indexes of every collection, made before its first point."""


@dataclass(slots=True)
class _Write:
    """A point on its way: what was read (None: nothing), what the rules made of it, and the new etag."""

    point: bytes
    stored: dict[str, Any] | None
    draft: rules.Draft
    etag: str
    whole: pb.PointStruct | None = None
    """Set if all of the point is written; else only what changed is."""


@dataclass(slots=True)
class _Progress:
    """A point of a write call: its writes in order, and what became of them under each etag tried so far."""

    places: list[int] = field(default_factory=list)
    tried: dict[str, list[WriteOutcome]] = field(default_factory=dict)


class QdrantIndex:
    """A VectorIndex in one collection of a Qdrant server, for any number of processes at a time."""

    def __init__(self, connection: Connection, name: str, spec: ModelSpec, info: Message) -> None:
        self._format: int = _about(info)["format"]
        self._connection = connection
        self._name = name
        self._spec = spec
        self._owner: QdrantIndexes | None = None
        self._closed = False
        config = info.config
        self._quantized = config.HasField("quantization_config")
        # With replicas, all writes of a shard go through one of them: else two writers could each win on another.
        self._ordering = (
            pb.WriteOrdering(type=pb.WriteOrderingType.Strong) if config.params.replication_factor > 1 else None
        )
        self._writers = asyncio.Semaphore(WRITERS)
        self._changing = asyncio.Lock()
        self._read_at = time.monotonic()
        self._indexed = set(info.payload_schema)
        self._scanned: set[str] = set()
        self._tenants = _tenants(info)

    @classmethod
    async def open(cls, settings: QdrantSettings, spec: ModelSpec) -> QdrantIndex:
        """Open the current index, made if there is none; raises ModelMismatch if it is of another model."""
        indexes = await QdrantIndexes.connect(settings)
        try:
            index = await indexes.open(await fitting(indexes, IndexInfo(spec.id, spec)))
        except BaseException:
            await indexes.close()
            raise
        index._owner = indexes  # noqa: SLF001  # an alternative constructor
        return index

    # --- writes -----------------------------------------------------------------------------------------------

    async def upsert(self, documents: Sequence[IndexDocument]) -> Sequence[WriteOutcome]:
        """See the port."""
        items = [content_item(document, self._spec.dimension) for document in documents]
        return await self._write(items, rules.put_content)

    async def update_images(self, updates: Sequence[ImageUpdate]) -> Sequence[WriteOutcome]:
        """See the port. Without a vector, only the status is set."""
        return await self._write([image_item(update, self._spec.dimension) for update in updates], rules.put_image)

    async def update_offers(self, updates: Sequence[OfferUpdate]) -> Sequence[WriteOutcome]:
        """See the port."""
        return await self._write([offer_item(update) for update in updates], rules.put_offer)

    async def delete(self, tombstones: Sequence[TombstoneWrite]) -> Sequence[WriteOutcome]:
        """See the port."""
        return await self._write([tombstone_item(write) for write in tombstones], rules.put_tombstone)

    async def _write(self, items: Sequence[Item], rule: rules.Rule) -> list[WriteOutcome]:
        """Apply `items` in order, each point by compare-and-set until it is in or refused by the rules."""
        if not items:
            return []
        keys = {f"{kind}.{key}" for item in items for kind in _MANY for key in item.get("fields", {}).get(kind, ())}
        longest = max(len(item["product_id"]) for item in items) // _CHUNK + 1
        await self._prepare({*keys, *(f"order.l{level}" for level in range(longest))}, {i["tenant"] for i in items})
        outcomes: list[WriteOutcome] = ["superseded"] * len(items)
        waiting: defaultdict[bytes, _Progress] = defaultdict(_Progress)
        for place, item in enumerate(items):
            waiting[item["point"]].places.append(place)
        now = time.time()
        for attempt in range(ROUNDS + 1):
            if attempt > 1:
                await asyncio.sleep(secrets.randbelow(10 * attempt) / 1000)  # so that two writers fall out of step
            stored = await self._stored(waiting)
            writes = []
            for point, progress in list(waiting.items()):
                payload = stored.get(point)
                ended = _ended(payload, progress.tried)
                if ended is None:
                    draft = rules.Draft(_without_marks(payload) if payload else rules.absent(items[progress.places[0]]))
                    ended = [rules.apply(rule, draft, items[place], now) for place in progress.places]
                    if draft.changed:
                        etag = secrets.token_urlsafe(12)
                        progress.tried[etag] = ended
                        writes.append(_Write(point, payload, draft, etag))
                        continue
                for place, outcome in zip(progress.places, ended, strict=True):
                    outcomes[place] = outcome
                del waiting[point]
            if not waiting:
                return outcomes
            if attempt == ROUNDS:
                break
            await side_by_side(self._send(batch) for batch in _batches(writes))
        raise Transient(
            f"Qdrant: {len(waiting)} points could not be written in {ROUNDS} attempts: others write them too"
        )

    async def _stored(self, points: Iterable[bytes]) -> dict[bytes, dict[str, Any]]:
        """Return what the rules need of these points, those that exist."""
        found = await self._retrieve(points, _RULE_FIELDS)
        return {from_point_id(record.id): from_payload(record.payload) for record in found}

    async def _send(self, batch: Sequence[_Write]) -> None:
        """Write a batch, each point on the condition that it is as it was read; who lost is found by reading."""
        whole = [write for write in batch if write.whole is not None]
        parts = [write for write in batch if write.whole is None]
        pictures = [write for write in parts if write.draft.vectors]
        operations = []
        if whole:
            # An etag belongs to one point at one time, so that "one of those" compares each point with its own. Points
            # that do not exist are inserted whatever the condition; those that were not there when read have none here.
            upsert = pb.PointsUpdateOperation.PointStructList(
                points=[write.whole for write in whole if write.whole], update_filter=_unchanged(whole)
            )
            operations.append(pb.PointsUpdateOperation(upsert=upsert))
        if pictures:
            # Before the payload, which has the new etag: who loses in between leaves a vector that the winner replaces
            # or that the next round sets again.
            vectors = pb.PointsUpdateOperation.UpdateVectors(
                points=[
                    pb.PointVectors(id=point_ids([write.point])[0], vectors=to_vectors(write.draft.vectors))
                    for write in pictures
                ],
                update_filter=_unchanged(pictures),
            )
            operations.append(pb.PointsUpdateOperation(update_vectors=vectors))
        for write in parts:
            selected = pb.Filter(must=[points_are([write.point]), *_unchanged([write]).must])
            change = pb.PointsUpdateOperation.SetPayload(
                payload=to_payload(_difference(write)), points_selector=pb.PointsSelector(filter=selected)
            )
            operations.append(pb.PointsUpdateOperation(set_payload=change))
        request = pb.UpdateBatchPoints(
            collection_name=self._name, wait=True, operations=operations, ordering=self._ordering
        )
        async with self._writers:
            await self._call(self._connection.points.UpdateBatch, request)

    async def collect_tombstones(self, older_than: float) -> int:
        """See the port. The offer that a tombstone kept goes with it."""
        old = pb.Filter(must=[any_of("state", ["deleted"]), within("indexed_at", lt=older_than)])
        count = await self._count(old)
        if count:
            selector = pb.PointsSelector(filter=old)
            request = pb.DeletePoints(collection_name=self._name, wait=True, points=selector, ordering=self._ordering)
            await self._call(self._connection.points.Delete, request)
        return count

    # --- reads ------------------------------------------------------------------------------------------------

    async def search(self, tenant: str, legs: Sequence[Leg], where: Filter) -> Sequence[Sequence[LegHit]]:
        """See the port. Dense legs are approximate where the server has built a graph."""
        legs = list(legs)
        must, must_not = await self._conditions(tenant, where)
        condition = pb.Filter(must=must, must_not=must_not)
        asked = {
            place: leg
            for place, leg in enumerate(legs)
            if not isinstance(leg.vector, SparseVector) or leg.vector.indices  # no word finds nothing
        }
        if not asked:
            return [[] for _ in legs]
        corpus = await self._corpus(tenant) if any(leg.using == "lexical" for leg in asked.values()) else None
        queries = [self._query(leg, condition, corpus) for leg in asked.values()]
        request = pb.QueryBatchPoints(collection_name=self._name, query_points=queries)
        answers = (await self._call(self._connection.points.QueryBatch, request)).result
        found: list[Sequence[LegHit]] = [[] for _ in legs]
        for place, answer in zip(asked, answers, strict=True):
            found[place] = [LegHit(hit.payload["product_id"].string_value, hit.score) for hit in answer.result]
        return found

    def _query(self, leg: Leg, condition: Message, corpus: Message | None) -> Message:
        params = None
        if isinstance(leg.vector, SparseVector):
            nearest = pb.VectorInput(sparse=sparse(packed_sparse(leg.vector)))
            if corpus is not None:
                params = pb.SearchParams(idf=pb.IdfParams(corpus=corpus))
        else:
            nearest = pb.VectorInput(dense=dense(packed_dense("query", leg.vector, self._spec.dimension)))
            if self._quantized:
                rescored = pb.QuantizationSearchParams(rescore=True, oversampling=OVERSAMPLING)
                params = pb.SearchParams(quantization=rescored)
        return pb.QueryPoints(
            collection_name=self._name,
            query=pb.Query(nearest=nearest),
            using=leg.using,
            filter=condition,
            params=params,
            limit=leg.limit,
            with_payload=fields("product_id"),
        )

    async def get(
        self, tenant: str, product_ids: Sequence[str], *, with_vectors: bool = False
    ) -> Mapping[str, StoredProduct]:
        """See the port."""
        points = [point_id(tenant, product_id).bytes for product_id in dict.fromkeys(product_ids)]
        found = await self._retrieve(points, _STORED_FIELDS, with_vectors=with_vectors)
        payloads = {record.payload["product_id"].string_value: _payload(record) for record in found}
        return {
            product_id: stored_product(payload)
            for product_id, payload in payloads.items()
            if payload["state"] == "live"
        }

    async def facts(self, tenant: str, product_ids: Sequence[str]) -> Mapping[str, Facts]:
        """See the port."""
        points = [point_id(tenant, product_id).bytes for product_id in dict.fromkeys(product_ids)]
        payloads = [from_payload(record.payload) for record in await self._retrieve(points, _FACT_FIELDS)]
        return {payload["product_id"]: product_facts(payload) for payload in payloads if payload["state"] == "live"}

    async def sample(self, tenant: str, limit: int) -> Sequence[StoredProduct]:
        """See the port. Those with the lowest point ids, which are hashes."""
        must, must_not = await self._conditions(tenant, Filter())
        request = pb.ScrollPoints(
            collection_name=self._name,
            filter=pb.Filter(must=must, must_not=must_not),
            limit=limit,
            with_payload=_STORED_FIELDS,
            with_vectors=named_vectors("image", "text"),
        )
        records = (await self._call(self._connection.points.Scroll, request)).result
        return [stored_product(_payload(record)) for record in records]

    async def count(self, tenant: str, wheres: Sequence[Filter]) -> Sequence[int]:
        """See the port."""
        conditions = [await self._conditions(tenant, where) for where in wheres]
        return await side_by_side(self._count(pb.Filter(must=must, must_not=none)) for must, none in conditions)

    async def facet(
        self, tenant: str, asked: Sequence[tuple[FacetKey, Filter]], limit: int
    ) -> Sequence[Sequence[FacetCount]]:
        """See the port. While the server moves points between its segments, a count may be a few off."""
        conditions = {where: await self._conditions(tenant, where) for where in {where for _, where in asked}}
        filters = {where: pb.Filter(must=must, must_not=must_not) for where, (must, must_not) in conditions.items()}
        return await side_by_side(self._facet(key, filters[where], limit) for key, where in asked)

    async def _facet(self, key: FacetKey, condition: Message, limit: int) -> list[FacetCount]:
        path = facet_field(key)
        if path.startswith("facets."):
            if self._format == WITHOUT_FACETS:
                raise NoFacet(
                    "this index was made before values could be counted: make a new one of the event log by "
                    "`catalens reindex --rebuild`"
                )
            if path not in self._indexed:
                await self._refresh()
            if path not in self._indexed:
                if path not in FACETS and self._all_indexed("facets"):
                    raise NoFacet(f"{MAX_FACET_INDEXES} other attributes are counted, and that is the most")
                return []
        request = pb.FacetCounts(collection_name=self._name, key=path, filter=condition, limit=limit)
        hits = (await self._call(self._connection.points.Facet, request)).hits
        return [(facet_value(key, getattr(hit.value, hit.value.WhichOneof("variant"))), hit.count) for hit in hits]

    async def extremes(self, tenant: str, key: NumberKey, where: Filter) -> tuple[float, float] | None:
        """See the port."""
        must, must_not = await self._conditions(tenant, where)
        requests = [
            pb.ScrollPoints(
                collection_name=self._name,
                filter=pb.Filter(must=must, must_not=must_not),
                limit=1,
                with_payload=fields("offer"),
                order_by=pb.OrderBy(key=NUMBERS[key], direction=direction),
            )
            for direction in (pb.Direction.Asc, pb.Direction.Desc)
        ]
        answers = await side_by_side(self._call(self._connection.points.Scroll, request) for request in requests)
        ends = [float(from_payload(record.payload)["offer"][key]) for answer in answers for record in answer.result]
        return (ends[0], ends[1]) if len(ends) == len(requests) else None

    async def page(self, tenant: str, *, after: str | None, limit: int, where: Filter) -> Sequence[StoredProduct]:
        """See the port. Two round trips, and one more for each 8 characters that all ids of the first page share."""
        base = await self._conditions(tenant, where)
        page: list[StoredProduct] = []
        while len(page) < limit:
            names = await self._following(base, after, limit - len(page))
            found = await self.get(tenant, names)
            page += [found[name] for name in names if name in found]  # one may have been deleted meanwhile
            if len(names) < limit or len(page) == limit:
                break
            after = names[-1]
        return page

    async def _following(self, base: _Conditions, after: str | None, count: int) -> list[str]:
        """Return the ids of the first `count` products under `base` that sort after `after`."""
        if after is None:
            return await self._run(base, [], count)
        keys = order_keys(after)
        if f"order.l{len(keys) - 1}" not in self._indexed:
            await self._refresh()
        # An id that long makes its indexes before it is written: below a level that has none, nobody is.
        known = list(takewhile(lambda level: f"order.l{level}" in self._indexed, range(len(keys))))
        # Deepest first: what has most of its beginning in common with `after` follows it first.
        levels = reversed(known)
        runs = await side_by_side(self._run(base, keys[:level], count, above=keys[level]) for level in levels)
        return list(chain.from_iterable(runs))[:count]

    async def _run(
        self, base: _Conditions, prefix: Sequence[int], count: int, *, above: int | None = None
    ) -> list[str]:
        """Return the first `count` ids among those whose keys begin with `prefix` and go on with more than `above`."""
        level = len(prefix)
        must = [*base[0], *(any_of(f"order.l{depth}", [key]) for depth, key in enumerate(prefix))]
        if above is not None:
            must.append(within(f"order.l{level}", gt=above))
        request = pb.ScrollPoints(
            collection_name=self._name,
            filter=pb.Filter(must=must, must_not=base[1]),
            limit=count + 1,
            with_payload=fields("product_id"),
            order_by=pb.OrderBy(key=f"order.l{level}", direction=pb.Direction.Asc),
        )
        rows = [
            (record.order_value.int, record.payload["product_id"].string_value)
            for record in (await self._call(self._connection.points.Scroll, request)).result
        ]
        if len(rows) <= count or rows[count - 1][0] < rows[count][0]:
            # Whoever shares a key with another is here too, so that the ids themselves decide.
            return sorted(name for _, name in rows[:count])
        shared = rows[count][0]
        names = sorted(name for key, name in rows if key < shared)
        return names + await self._run(base, [*prefix, shared], count - len(names))

    async def counts(self, tenant: str) -> IndexCounts:
        """See the port."""

        def of(state: str, *more: Message) -> Message:
            return pb.Filter(must=[any_of("tenant", [tenant]), any_of("state", [state]), *more])

        wanted = (of("live"), of("live", any_of("image_status", ["pending"])), of("deleted"), of("offer"))
        return IndexCounts(*await side_by_side(self._count(each) for each in wanted))

    async def blobs_in_use(self, tenant: str | None, references: Sequence[str]) -> frozenset[str]:
        """See the port."""
        only = [any_of("tenant", [tenant])] if tenant is not None else []
        used: set[str] = set()
        wanted = sorted(set(references))
        for start in range(0, len(wanted), BATCH):
            open_ = set(wanted[start : start + BATCH])
            while open_:
                request = pb.ScrollPoints(
                    collection_name=self._name,
                    filter=pb.Filter(must=[*only, any_of("blobs", sorted(open_))]),
                    limit=BATCH,
                    with_payload=fields("blobs"),
                )
                records = (await self._call(self._connection.points.Scroll, request)).result
                named = {
                    value.string_value for record in records for value in record.payload["blobs"].list_value.values
                }
                if open_.isdisjoint(named):
                    break
                used |= open_ & named
                open_ -= named
        return frozenset(used)

    async def export(
        self, *, after: UUID | None = None, limit: int = 256, with_vectors: bool = False
    ) -> Sequence[PointState]:
        """See the port."""
        states: list[PointState] = []
        while len(states) < limit:
            first = after.int + 1 if after is not None else 0
            if first >> 128:
                break
            asked = min(BATCH, limit - len(states))
            request = pb.ScrollPoints(
                collection_name=self._name,
                offset=pb.PointId(uuid=str(UUID(int=first))),
                limit=asked,
                with_payload=_EXPORTED_FIELDS,
                with_vectors=named_vectors(*(("image", "text") if with_vectors else ())),
            )
            records = (await self._call(self._connection.points.Scroll, request)).result
            states += [point_state(_payload(record)) for record in records]
            if len(records) < asked:
                break
            after = states[-1].point
        return states

    async def flush(self) -> None:
        """See the port. Nothing to do: a write that returned is in the server's write-ahead log."""

    async def close(self) -> None:
        """See the port. May be called twice."""
        self._closed = True
        if self._owner is not None:
            await self._owner.close()

    # --- inside -----------------------------------------------------------------------------------------------

    async def _call(self, rpc: Any, request: Message) -> Message:
        if self._closed:
            raise Transient("the index is closed")
        return await self._connection.call(rpc, request)

    async def _retrieve(self, points: Iterable[bytes], wanted: Message, *, with_vectors: bool = False) -> list[Message]:
        ids = point_ids(points)
        requests = [
            pb.GetPoints(
                collection_name=self._name,
                ids=ids[start : start + BATCH],
                with_payload=wanted,
                with_vectors=named_vectors(*(("image", "text") if with_vectors else ())),
            )
            for start in range(0, len(ids), BATCH)
        ]
        answers = await side_by_side(self._call(self._connection.points.Get, request) for request in requests)
        return [record for answer in answers for record in answer.result]

    async def _count(self, condition: Message) -> int:
        request = pb.CountPoints(collection_name=self._name, filter=condition, exact=True)
        return int((await self._call(self._connection.points.Count, request)).result.count)

    async def _conditions(self, tenant: str, where: Filter) -> _Conditions:
        """Return what live products of `tenant` under `where` must be, and must not."""
        clauses, none_of = plain_filter(tenant, where)
        asked = {key for primitives in clauses for _, key, _ in primitives if key.startswith("numbers.")}
        if not asked <= self._indexed:
            await self._refresh()
        # Every numeric attribute has an index until there are too many: what has none, nobody has.
        unknown = set() if self._all_indexed("numbers") else asked - self._indexed
        known = [[each for each in primitives if each[1] not in unknown] for primitives in clauses]
        must = [any_of("tenant", [tenant]), any_of("state", ["live"]), *(clause(each) for each in known)]
        return must, [primitive(*each) for each in none_of]

    async def _corpus(self, tenant: str) -> Message | None:
        """Return the products over which the rarity of words is computed; None, which costs nothing, while all are."""
        if not self._tenants - {tenant} and time.monotonic() - self._read_at > TENANTS_KNOWN:
            await self._refresh()
        return pb.Filter(must=[any_of("tenant", [tenant])]) if self._tenants - {tenant} else None

    async def _refresh(self) -> None:
        """See what other processes made known: payload indexes and tenants."""
        if self._closed:
            raise Transient("the index is closed")
        info = await self._connection.collection(self._name)
        if info is None:
            raise NoCollection(f"the collection {self._name} is gone: make it again by catalens reindex --rebuild")
        self._read_at = time.monotonic()
        self._indexed.update(info.payload_schema)
        self._tenants |= _tenants(info)

    async def _prepare(self, keys: set[str], tenants: set[str]) -> None:
        """Make the indexes of `keys` and make `tenants` known before anything is written that needs them."""

        def nothing_new() -> bool:
            return keys <= self._indexed | self._scanned and (tenants <= self._tenants or len(self._tenants) > 1)

        if nothing_new():
            return
        async with self._changing:
            if nothing_new():
                return
            await self._refresh()
            for key in sorted(keys - self._indexed - self._scanned):
                kind = key.partition(".")[0]
                if key not in FACETS and self._all_indexed(kind):
                    log.warning("index.field_not_indexed", key=key)
                    self._scanned.add(key)
                    continue
                await _create_index(self._connection, self._name, key)
                self._indexed.add(key)
            # Two are enough to know that there are several.
            new = sorted(tenants - self._tenants)[: max(0, 2 - len(self._tenants))]
            if new:
                await _set_metadata(self._connection, self._name, {f"tenant:{tenant}": True for tenant in new})
                self._tenants |= set(new)

    def _all_indexed(self, kind: str) -> bool:
        """Return whether no further field of that kind gets an index."""
        most = {"numbers": MAX_NUMBER_INDEXES, "facets": MAX_FACET_INDEXES + len(FACETS & self._indexed)}.get(kind)
        return most is not None and sum(key.startswith(f"{kind}.") for key in self._indexed) >= most


def _ended(payload: Mapping[str, Any] | None, tried: Mapping[str, list[WriteOutcome]]) -> list[WriteOutcome] | None:
    """Return the outcomes of the attempt that was applied, as the stored point tells."""
    if payload is None:
        return None
    return next((tried[etag] for etag in (payload["etag"], *payload["trail"]) if etag in tried), None)


def _without_marks(payload: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in payload.items() if name not in ("etag", "trail")}


def _marks(write: _Write) -> dict[str, Any]:
    before = [write.stored["etag"], *write.stored["trail"]] if write.stored else []
    return {"etag": write.etag, "trail": before[:TRAIL]}


def _unchanged(writes: Iterable[_Write]) -> Message:
    """Return the condition that a point is as one of `writes` read it."""
    return pb.Filter(must=[any_of("etag", [write.stored["etag"] for write in writes if write.stored] or [_NEVER])])


def _difference(write: _Write) -> dict[str, Any]:
    """Return the payload keys that changed; None removes one."""
    before, after = _without_marks(write.stored or {}), write.draft.payload
    changed = {name: value for name, value in after.items() if name not in before or before[name] != value}
    return {**dict.fromkeys(before.keys() - after.keys()), **changed, **_marks(write)}


def _batches(writes: Sequence[_Write]) -> list[list[_Write]]:
    """Return `writes` in requests bounded in points and bytes, their points made where all of one is written."""
    batches: list[list[_Write]] = []
    size = BATCH_BYTES
    for write in writes:
        weight = 512 + sum(len(data) for data in write.draft.vectors.values())
        if write.stored is None or not write.draft.keeps:
            payload = write.draft.payload
            order = {f"l{level}": key for level, key in enumerate(order_keys(payload["product_id"]))}
            write.whole = pb.PointStruct(
                id=point_ids([write.point])[0],
                payload=to_payload({**payload, "order": order, **_marks(write)}),
                vectors=to_vectors(write.draft.vectors),
            )
            weight = write.whole.ByteSize()
        if size + weight > BATCH_BYTES or len(batches[-1]) == BATCH:
            batches.append([])
            size = 0
        batches[-1].append(write)
        size += weight
    return batches


def _payload(record: Message) -> dict[str, Any]:
    payload = from_payload(record.payload)
    if record.HasField("vectors"):
        payload["vectors"] = from_vectors(record.vectors)
    return payload


def _about(info: Message) -> dict[str, Any]:
    """Return what a collection of Catalens says of itself."""
    about: dict[str, Any] = json.loads(info.config.metadata["catalens"].string_value)
    return about


def _tenants(info: Message) -> set[str]:
    """Return the first tenants that wrote, two at most."""
    return {key.removeprefix("tenant:") for key in info.config.metadata if key.startswith("tenant:")}


# --- the collections ----------------------------------------------------------------------------------------------


class QdrantIndexes:
    """The Indexes of a Qdrant server that belong to one alias."""

    def __init__(self, settings: QdrantSettings, connection: Connection) -> None:
        self._settings = settings
        self._alias = settings.collection
        self._connection = connection

    @classmethod
    async def connect(cls, settings: QdrantSettings) -> Self:
        """Connect. Raises Transient (away) and Misconfigured (not let in, too old)."""
        connection = Connection(settings)
        try:
            await connection.check()
        except BaseException:
            await connection.close()
            raise
        return cls(settings, connection)

    async def current(self) -> IndexInfo | None:
        """See the port."""
        name = await self._current_name()
        return self._info_of(name, await self._described(name)) if name else None

    async def all(self) -> Sequence[IndexInfo]:
        """See the port."""
        answer = await self._connection.call(self._connection.collections.List, pb.ListCollectionsRequest())
        # Whole names: another installation's alias may begin with ours.
        ours = re.compile(rf"{re.escape(self._alias)}-[0-9a-f]{{12}}(-[0-9]+)?")
        names = sorted(each.name for each in answer.collections if ours.fullmatch(each.name))
        found = await side_by_side(self._connection.collection(name) for name in names)
        return [
            self._info_of(name, info)
            for name, info in zip(names, found, strict=True)
            if info is not None and "catalens" in info.config.metadata
        ]

    async def open(self, info: IndexInfo) -> QdrantIndex:
        """See the port. What an open that was killed left half made is completed."""
        name = self._name(info)
        described = await self._connection.collection(name)
        if described is None:
            await self._create(name, info)
            described = await self._described(name)
        found = self._info_of(name, described)
        if found.spec.fingerprint != info.spec.fingerprint:
            raise Misconfigured(f"the collection {name} is of another model, {found.spec.id} ({found.spec.revision})")
        for key in INDEXES:
            if key not in described.payload_schema:
                await _create_index(self._connection, name, key)
        if await self._current_name() is None:
            await self._point_alias_to(name)
        index = QdrantIndex(self._connection, name, found.spec, await self._described(name))
        log.info("index.opened", collection=name, points=described.points_count)
        return index

    async def switch(self, info: IndexInfo) -> None:
        """See the port. The hold was kept with the index that is left."""
        name = self._name(info)
        self._info_of(name, await self._described(name))
        await _set_metadata(self._connection, name, {"hold": False})  # of a switch that went the other way
        await self._point_alias_to(name)

    async def drop(self, info: IndexInfo) -> None:
        """See the port. What does not exist is no error."""
        name = self._name(info)
        if name == await self._current_name():
            raise Conflict(f"{name} is the current index: switch to another one before it is dropped")
        request = pb.DeleteCollection(collection_name=name)
        await self._connection.call(self._connection.collections.Delete, request)

    async def notes(self, info: IndexInfo) -> Mapping[str, str]:
        """See the port."""
        stored = (await self._described(self._name(info))).config.metadata
        return cast("dict[str, str]", json.loads(stored["notes"].string_value)) if "notes" in stored else {}

    async def set_notes(self, info: IndexInfo, notes: Mapping[str, str]) -> None:
        """See the port."""
        await _set_metadata(self._connection, self._name(info), {"notes": json.dumps(dict(notes))})

    async def held(self) -> bool:
        """See the port."""
        name = await self._current_name()
        if name is None:
            return False
        stored = (await self._described(name)).config.metadata
        return "hold" in stored and bool(stored["hold"].bool_value)

    async def hold(self, on: bool) -> None:
        """See the port."""
        name = await self._current_name()
        if name is not None:
            await _set_metadata(self._connection, name, {"hold": on})

    async def close(self) -> None:
        """See the port. May be called twice."""
        await self._connection.close()

    def _name(self, info: IndexInfo) -> str:
        return f"{self._alias}-{info.name}"

    async def _current_name(self) -> str | None:
        answer = await self._connection.call(self._connection.collections.ListAliases, pb.ListAliasesRequest())
        return next((each.collection_name for each in answer.aliases if each.alias_name == self._alias), None)

    async def _described(self, name: str) -> Message:
        described = await self._connection.collection(name)
        if described is None:
            raise NoCollection(f"the collection {name} does not exist: make it by catalens reindex")
        return described

    def _info_of(self, name: str, described: Message) -> IndexInfo:
        stored = described.config.metadata
        if "catalens" not in stored:
            raise Misconfigured(
                f"the collection {name} is not of Catalens: set CATALENS_QDRANT__COLLECTION to another name"
            )
        about = _about(described)
        if about["format"] not in (WITHOUT_FACETS, FORMAT):
            raise Misconfigured(
                f"the collection {name} has format {about['format']}, this release reads {FORMAT}: "
                "make it again by catalens reindex --rebuild"
            )
        return IndexInfo(about["model"], ModelSpec(**about["spec"]), about["generation"])

    async def _create(self, name: str, info: IndexInfo) -> None:
        settings = self._settings
        vector = pb.VectorParams(
            size=info.spec.dimension,
            distance=pb.Distance.Cosine,
            memory=pb.Memory.Cold if settings.on_disk else pb.Memory.Cached,
        )
        lexical = pb.SparseVectorParams(modifier=pb.Modifier.Idf)
        quantization = None
        if settings.quantization == "int8":
            scalar = pb.ScalarQuantization(type=pb.QuantizationType.Int8, quantile=0.99, memory=pb.Memory.Pinned)
            quantization = pb.QuantizationConfig(scalar=scalar)
        request = pb.CreateCollection(
            collection_name=name,
            vectors_config=pb.VectorsConfig(params_map=pb.VectorParamsMap(map={"image": vector, "text": vector})),
            sparse_vectors_config=pb.SparseVectorConfig(map={"lexical": lexical}),
            quantization_config=quantization,
            payload=pb.PayloadStorageParams(memory=pb.Memory.Cold if settings.on_disk else pb.Memory.Cached),
            shard_number=settings.shards or None,
            replication_factor=settings.replication,
            write_consistency_factor=settings.write_consistency,
            metadata={"catalens": to_value(json.dumps({"format": FORMAT, **asdict(info)}))},
        )
        try:
            await self._connection.call(self._connection.collections.Create, request)
        except Misconfigured:
            if await self._connection.collection(name) is None:  # else another process was first, with the same request
                raise
        log.info("index.created", collection=name, model=info.model)

    async def _point_alias_to(self, name: str) -> None:
        create = pb.CreateAlias(collection_name=name, alias_name=self._alias)
        actions = [pb.AliasOperations(create_alias=create)]
        if await self._current_name() is not None:
            delete = pb.DeleteAlias(alias_name=self._alias)
            actions.insert(0, pb.AliasOperations(delete_alias=delete))
        await self._connection.call(self._connection.collections.UpdateAliases, pb.ChangeAliases(actions=actions))


async def _create_index(connection: Connection, name: str, key: str) -> None:
    kind, params = _index_of(key)
    request = pb.CreateFieldIndexCollection(
        collection_name=name, wait=True, field_name=key, field_type=kind, field_index_params=params
    )
    await connection.call(connection.points.CreateFieldIndex, request)


async def _set_metadata(connection: Connection, name: str, metadata: Mapping[str, Any]) -> None:
    """Set these keys and leave the others."""
    request = pb.UpdateCollection(collection_name=name, metadata=to_payload(metadata))
    await connection.call(connection.collections.Update, request)
