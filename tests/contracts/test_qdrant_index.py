"""What the Qdrant adapter guarantees beyond the port: several writers, several indexes, and a server that fails.

Driven against Qdrant's engine behind its gRPC API, not against a Qdrant server, unless CATALENS_TEST_QDRANT_URL is set.
"""

from __future__ import annotations

import asyncio
import inspect
import random
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc  # type: ignore[import-untyped]  # has no types
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr
from qdrant_client import grpc as pb
from tests.qdrant_server import QdrantServer

from catalens.domain import (
    Condition,
    Deletion,
    Filter,
    ImageStatus,
    ImageUpdate,
    IndexCounts,
    IndexDocument,
    IndexInfo,
    Leg,
    ModelSpec,
    OfferChange,
    OfferUpdate,
    Product,
    Range,
    SparseVector,
    TombstoneWrite,
)
from catalens.engines import qdrant as adapter
from catalens.engines.qdrant import QdrantIndex, QdrantIndexes, order_keys
from catalens.errors import Conflict, InvalidEvent, Misconfigured, ModelMismatch, NoFacet, StorageFull, Transient
from catalens.settings import QdrantSettings

SPEC = ModelSpec(id="test", revision="1", family="test", dimension=4, fingerprint="a" * 64)
OTHER = replace(SPEC, id="other", fingerprint="b" * 64)
INFO = IndexInfo("models/test", SPEC)
NEXT = IndexInfo("models/other", OTHER)
SHOP = "shop"
ALL = Filter()
PICTURE = np.asarray([0, 0, 0, 1], dtype=np.float32)


def document(product_id: str, version: int = 1, *, image_status: ImageStatus = "none", **fields: Any) -> IndexDocument:
    product = Product(product_id=product_id, name=f"v{version}", version=version, **fields)
    vector = np.asarray([1, version, 0, 0], dtype=np.float32)
    return IndexDocument(
        SHOP, product, image_status, text=vector / np.linalg.norm(vector), lexical=SparseVector((7,), (1.0,))
    )


def offer(product_id: str, version: int, **fields: Any) -> OfferUpdate:
    return OfferUpdate(SHOP, OfferChange(product_id=product_id, offer_version=version, **fields))


def tombstone(product_id: str, version: int) -> TombstoneWrite:
    return TombstoneWrite(SHOP, Deletion(product_id=product_id, version=version))


@pytest.fixture
async def indexes(qdrant_settings: QdrantSettings) -> AsyncIterator[QdrantIndexes]:
    opened = await QdrantIndexes.connect(qdrant_settings)
    yield opened
    await opened.close()


@pytest.fixture
async def elsewhere(qdrant_settings: QdrantSettings) -> AsyncIterator[QdrantIndexes]:
    """The same as another process sees it."""
    opened = await QdrantIndexes.connect(qdrant_settings)
    yield opened
    await opened.close()


# --- the indexes of one installation ------------------------------------------------------------------------------


async def test_the_first_index_becomes_the_current_one_and_no_other(
    indexes: QdrantIndexes, elsewhere: QdrantIndexes
) -> None:
    assert await indexes.current() is None
    assert list(await indexes.all()) == []
    await indexes.open(INFO)
    assert await elsewhere.current() == INFO
    await elsewhere.open(NEXT)
    assert await indexes.current() == INFO
    assert list(await indexes.all()) == [INFO, NEXT]


async def test_indexes_lie_side_by_side(indexes: QdrantIndexes) -> None:
    old, new = await indexes.open(INFO), await indexes.open(NEXT)
    await old.upsert([document("p", 5)])
    assert await new.upsert([document("p", 3)]) == ["applied"]
    assert {name: s.product.version for name, s in (await old.get(SHOP, ["p"])).items()} == {"p": 5}
    again = await indexes.open(INFO)
    assert (await again.counts(SHOP)).products == 1


async def test_the_indexes_of_another_installation_are_not_ours(
    indexes: QdrantIndexes, qdrant_settings: QdrantSettings
) -> None:
    longer = qdrant_settings.model_copy(update={"collection": f"{qdrant_settings.collection}-too"})
    neighbour = await QdrantIndexes.connect(longer)
    await neighbour.open(NEXT)
    await neighbour.close()
    await indexes.open(INFO)
    assert list(await indexes.all()) == [INFO]


async def test_a_switch_is_seen_by_everybody_and_forgets_the_hold(
    indexes: QdrantIndexes, elsewhere: QdrantIndexes
) -> None:
    await indexes.open(INFO)
    await indexes.open(NEXT)
    assert not await elsewhere.held()
    await indexes.hold(True)
    assert await elsewhere.held()
    await elsewhere.hold(False)
    assert not await indexes.held()
    await indexes.hold(True)
    await indexes.switch(NEXT)
    assert await elsewhere.current() == NEXT
    assert not await elsewhere.held()
    await elsewhere.switch(INFO)  # back: what was held before it was left is not held now
    assert await indexes.current() == INFO
    assert not await indexes.held()


async def test_nothing_is_held_where_there_is_no_index(indexes: QdrantIndexes) -> None:
    await indexes.hold(True)
    assert not await indexes.held()
    with pytest.raises(Misconfigured, match="catalens reindex"):
        await indexes.switch(NEXT)


async def test_notes_are_kept_with_their_index(indexes: QdrantIndexes, elsewhere: QdrantIndexes) -> None:
    await indexes.open(INFO)
    index = await indexes.open(NEXT)
    assert dict(await elsewhere.notes(NEXT)) == {}
    await indexes.set_notes(NEXT, {"after": "x", "done": "12"})
    await indexes.set_notes(NEXT, {"after": 'y"ü'})
    assert dict(await elsewhere.notes(NEXT)) == {"after": 'y"ü'}
    assert dict(await elsewhere.notes(INFO)) == {}
    assert list(await elsewhere.all()) == [INFO, NEXT]
    assert await index.counts(SHOP) == IndexCounts(0, 0, 0, 0)
    assert list(await index.export()) == []


async def test_the_current_index_cannot_be_dropped(indexes: QdrantIndexes) -> None:
    await indexes.open(INFO)
    index = await indexes.open(NEXT)
    await index.upsert([document("p")])
    with pytest.raises(Conflict):
        await indexes.drop(INFO)
    await indexes.drop(NEXT)
    await indexes.drop(NEXT)
    assert list(await indexes.all()) == [INFO]
    with pytest.raises(Misconfigured, match="catalens reindex"):
        await index.counts(SHOP)
    assert (await (await indexes.open(NEXT)).counts(SHOP)).products == 0


async def test_another_model_is_refused_and_the_way_out_named(qdrant_settings: QdrantSettings) -> None:
    index = await QdrantIndex.open(qdrant_settings, SPEC)
    await index.close()
    with pytest.raises(ModelMismatch, match="catalens reindex"):
        await QdrantIndex.open(qdrant_settings, OTHER)
    await (await QdrantIndex.open(qdrant_settings, SPEC)).close()


async def test_what_was_made_half_is_completed(indexes: QdrantIndexes, qdrant_settings: QdrantSettings) -> None:
    await indexes._create(indexes._name(INFO), INFO)  # and killed, before the first payload index and the alias
    index = await indexes.open(INFO)
    assert await indexes.current() == INFO
    described = await index._connection.collection(index._name)
    assert described is not None
    assert set(adapter.INDEXES) <= set(described.payload_schema)


async def test_two_processes_open_the_first_index_at_once(indexes: QdrantIndexes, elsewhere: QdrantIndexes) -> None:
    first, second = await asyncio.gather(indexes.open(INFO), elsewhere.open(INFO))
    await first.upsert([document("p")])
    assert (await second.counts(SHOP)).products == 1
    assert await indexes.current() == INFO


async def test_a_collection_is_made_as_the_settings_say(qdrant_settings: QdrantSettings) -> None:
    settings = qdrant_settings.model_copy(update={"shards": 2, "write_consistency": 1})
    index = await QdrantIndex.open(settings, SPEC)
    described = await index._connection.collection(index._name)
    await index.close()
    assert described is not None
    params = described.config.params
    assert params.shard_number == 2
    vectors = params.vectors_config.params_map.map
    assert vectors.keys() == {"image", "text"}
    assert all((each.size, each.distance) == (4, pb.Distance.Cosine) for each in vectors.values())
    assert vectors["image"].memory == pb.Memory.Cold
    assert params.payload.memory == pb.Memory.Cold
    scalar = described.config.quantization_config.scalar
    assert (scalar.type, scalar.memory, round(scalar.quantile, 4)) == (pb.QuantizationType.Int8, pb.Memory.Pinned, 0.99)
    assert params.sparse_vectors_config.map["lexical"].modifier == pb.Modifier.Idf
    assert described.payload_schema["tenant"].params.keyword_index_params.is_tenant


# --- several writers ----------------------------------------------------------------------------------------------


@pytest.fixture
async def pair(indexes: QdrantIndexes, elsewhere: QdrantIndexes) -> tuple[QdrantIndex, QdrantIndex]:
    """One index, opened by two processes."""
    return await indexes.open(INFO), await elsewhere.open(INFO)


async def test_of_two_writers_each_version_is_applied_at_most_once_and_the_newest_stays(
    pair: tuple[QdrantIndex, QdrantIndex],
) -> None:
    products = [f"p{number}" for number in range(6)]
    applied: Counter[tuple[str, int]] = Counter()

    async def write(index: QdrantIndex, seed: int) -> None:
        chance = random.Random(seed)
        events = [(product, version) for product in products for version in range(1, 13)]
        chance.shuffle(events)
        while events:
            batch, events = events[:9], events[9:]
            outcomes = await index.upsert([document(product, version) for product, version in batch])
            applied.update(event for event, outcome in zip(batch, outcomes, strict=True) if outcome == "applied")

    await asyncio.gather(*(write(index, seed) for seed, index in enumerate((*pair, *pair))))
    assert set(applied.values()) == {1}
    assert all(applied[product, 12] == 1 for product in products)
    stored = await pair[0].get(SHOP, products, with_vectors=True)
    for product in products:
        expected = document(product, 12)
        assert stored[product].product == expected.product
        assert expected.text is not None
        np.testing.assert_allclose(stored[product].vectors["text"], expected.text, atol=1e-6)
    assert await pair[1].counts(SHOP) == IndexCounts(6, 0, 0, 0)


async def test_contents_offers_pictures_and_deletions_of_two_writers_lose_nothing_to_each_other(
    pair: tuple[QdrantIndex, QdrantIndex],
) -> None:
    products = [f"p{number}" for number in range(5)]
    one, two = pair

    async def contents() -> None:
        for version in range(2, 12):
            if version % 4 == 0:
                await one.delete([tombstone(product, version) for product in products])
            else:
                await one.upsert([document(product, version, image_status="pending") for product in products])

    async def offers(index: QdrantIndex, versions: Sequence[int], **fields: Callable[[int], Any]) -> None:
        for version in versions:
            stated = {name: value(version) for name, value in fields.items()}
            await index.update_offers([offer(product, version, **stated) for product in products])

    async def pictures() -> None:
        for version in (*range(2, 12), 11, 11):
            for product in products:
                await two.update_images([ImageUpdate(SHOP, product, version, "ok", image=PICTURE)])

    await asyncio.gather(
        contents(),
        offers(two, range(1, 20, 2), price=float),
        offers(one, range(2, 21, 2), stock=int),
        pictures(),
    )
    await two.update_images([ImageUpdate(SHOP, product, 11, "ok", image=PICTURE) for product in products])
    stored = await one.get(SHOP, products, with_vectors=True)
    assert stored.keys() == set(products)
    for each in stored.values():
        product = each.product
        assert (product.version, product.price, product.stock, product.offer_version) == (11, 19.0, 20, 20)
        assert each.image_status == "ok"
        assert set(each.vectors) == {"image", "text"}
        np.testing.assert_allclose(each.vectors["image"], PICTURE, atol=1e-6)
    in_stock = Filter((Condition("in_stock", (True,)), Condition("price", (19.0,))))
    assert len(await two.page(SHOP, after=None, limit=10, where=in_stock)) == len(products)


async def test_one_process_finds_by_what_another_wrote_first(
    pair: tuple[QdrantIndex, QdrantIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "TENANTS_KNOWN", 0.0)
    writer, reader = pair
    assert len((await reader.search(SHOP, [Leg("lexical", SparseVector((7,), (1.0,)), 5)], ALL))[0]) == 0
    await writer.upsert([document("p", attributes={"size": 4}), document("q", attributes={"size": 9})])
    large = Filter((Condition("attributes.size", within=Range(gt=5)),))
    assert [s.product.product_id for s in await reader.page(SHOP, after=None, limit=5, where=large)] == ["q"]
    words = [Leg("lexical", SparseVector((7,), (1.0,)), 5)]
    ((alone, *_),) = await reader.search(SHOP, words, ALL)
    await writer.upsert([replace(document(f"o{n}", brand="B"), tenant="other", lexical=None) for n in range(3)])
    await writer.upsert(
        [replace(document(f"n{n}"), tenant="other", lexical=SparseVector((8,), (1.0,))) for n in range(50)]
    )
    ((among, *_),) = await reader.search(SHOP, words, ALL)
    assert among.score == pytest.approx(alone.score, abs=1e-4)


async def test_numeric_attributes_beyond_the_limit_get_no_index(
    pair: tuple[QdrantIndex, QdrantIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "MAX_NUMBER_INDEXES", 2)
    index = pair[0]
    assert await index.upsert([document("p", attributes={"a": 1, "b": 2, "c": 3})]) == ["applied"]
    assert await pair[1].upsert([document("q", attributes={"c": 4})]) == ["applied"]
    described = await index._connection.collection(index._name)
    assert described is not None
    assert sum(key.startswith("numbers.") for key in described.payload_schema) == 2
    assert (await index.get(SHOP, ["p"]))["p"].product.attributes == {"a": 1, "b": 2, "c": 3}


async def test_attributes_beyond_the_limit_are_not_counted_and_said_so(
    pair: tuple[QdrantIndex, QdrantIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "MAX_FACET_INDEXES", 1)
    await pair[0].upsert([document("p", brand="B", attributes={"a": "x"})])
    await pair[0].upsert([document("q", brand="B", attributes={"b": "y"})])
    for index in pair:
        asked = [("brand", ALL), ("attributes.a", ALL)]
        assert await index.facet(SHOP, asked, 5) == [[("B", 2)], [("x", 1)]]
        with pytest.raises(NoFacet, match="1 other"):
            await index.facet(SHOP, [("attributes.b", ALL)], 5)


async def test_a_collection_of_before_facets_goes_on_working_and_says_what_to_do(
    pair: tuple[QdrantIndex, QdrantIndex],
) -> None:
    index = pair[0]
    index._format = adapter.WITHOUT_FACETS
    assert await index.upsert([document("p", brand="B")]) == ["applied"]
    with pytest.raises(NoFacet, match="catalens reindex --rebuild"):
        await index.facet(SHOP, [("brand", ALL)], 5)
    assert await index.facet(SHOP, [("image_status", ALL)], 5) == [[("none", 1)]]


# --- the order of pages -------------------------------------------------------------------------------------------


async def test_a_page_may_begin_after_an_id_longer_than_all_that_are_stored(
    pair: tuple[QdrantIndex, QdrantIndex],
) -> None:
    writer, reader = pair

    async def following(after: str) -> list[str]:
        found = await reader.page(SHOP, after=after, limit=10, where=ALL)
        return [stored.product.product_id for stored in found]

    await writer.upsert([document("a"), document("b")])
    for length in (39, 40, 41, 128):
        assert await following("a" * length) == ["b"]
    await writer.upsert([document("a" * 127), document("a" * 100)])
    assert await following("a" * 99) == ["a" * 100, "a" * 127, "b"]
    assert await following("a" * 126) == ["a" * 127, "b"]


IDS = st.text("ABYZabyz059._:-", min_size=1, max_size=128)


@given(first=IDS, second=IDS, common=st.text("az-", max_size=100))
def test_order_keys_sort_as_the_ids_do(first: str, second: str, common: str) -> None:
    one, two = (common + first)[:128], (common + second)[:128]
    assert (order_keys(one) < order_keys(two)) == (one < two)
    assert (order_keys(one) == order_keys(two)) == (one == two)
    assert all(0 <= key < 2**53 for key in order_keys(one))
    if one != two:
        shared = min(len(order_keys(one)), len(order_keys(two)))
        assert order_keys(one)[:shared] != order_keys(two)[:shared]


# --- a server that fails ------------------------------------------------------------------------------------------


@dataclass
class Proxy:
    """A gRPC server between index and server that forwards every call, unless it is told to answer something else."""

    settings: QdrantSettings
    upstream: Any
    faults: defaultdict[str, list[Callable[[bytes], Any]]] = field(default_factory=lambda: defaultdict(list))
    """By RPC: what answers the next calls, one each: an error's code, details and metadata, bytes, None (the server),
    or what can be awaited for one of these."""
    seen: defaultdict[str, list[bytes]] = field(default_factory=lambda: defaultdict(list))
    keys: set[str] = field(default_factory=set)
    server: Any = None

    def fail(self, rpc: str, code: Any, details: str = "told to", *, retry_after: str = "", times: int = 1) -> None:
        """Answer the next calls of `rpc` by an error."""
        metadata = (("retry-after", retry_after),) if retry_after else ()
        self.faults[rpc] += [lambda _: (code, details, metadata)] * times

    def service(self, details: Any) -> Any:
        """Return the handler of one call."""
        rpc = details.method.rsplit("/", 1)[1]
        self.keys.update(value for name, value in details.invocation_metadata if name == "api-key")

        async def answer(request: bytes, context: Any) -> bytes:
            self.seen[rpc].append(request)
            told: Any = self.faults[rpc].pop(0)(request) if self.faults[rpc] else None
            if inspect.isawaitable(told):
                told = await told
            if isinstance(told, tuple):
                await context.abort(*told)
            if isinstance(told, bytes):
                return told
            try:
                return bytes(await self.forward(details.method, request))
            except grpc.aio.AioRpcError as error:
                await context.abort(error.code(), error.details())
                raise

        return grpc.unary_unary_rpc_method_handler(answer)

    def forward(self, method: str, request: bytes) -> Any:
        """Return the server's answer."""
        return self.upstream.unary_unary(method)(request)


UPDATE = "/qdrant.Points/UpdateBatch"
ACCEPTED: bytes = pb.UpdateBatchResponse(
    result=[pb.UpdateResult(status=pb.UpdateStatus.Acknowledged)]
).SerializeToString()


@pytest.fixture
async def proxy(qdrant_settings: QdrantSettings) -> AsyncIterator[Proxy]:
    upstream = grpc.aio.insecure_channel(f"{urlsplit(qdrant_settings.url).hostname}:{qdrant_settings.grpc_port}")
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    proxy = Proxy(
        qdrant_settings.model_copy(update={"grpc_port": port, "url": "http://127.0.0.1", "api_key": SecretStr("key")}),
        upstream,
    )

    class Handler(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
        def service(self, details: Any) -> Any:
            return proxy.service(details)

    server.add_generic_rpc_handlers([Handler()])
    await server.start()
    yield proxy
    await server.stop(grace=None)
    await upstream.close()


@pytest.fixture
async def behind(proxy: Proxy) -> AsyncIterator[QdrantIndex]:
    """An index behind the proxy."""
    index = await QdrantIndex.open(proxy.settings, SPEC)
    proxy.seen.clear()
    yield index
    await index.close()


async def test_every_call_carries_the_key_and_goes_over_grpc(behind: QdrantIndex, proxy: Proxy) -> None:
    # Nobody answers at the URL's own port, so that whatever did not go over gRPC would have failed.
    assert await behind.upsert([document("p", brand="B")]) == ["applied"]
    assert len(await behind.page(SHOP, after=None, limit=5, where=Filter((Condition("brand", ("B",)),)))) == 1
    assert proxy.keys == {"key"}
    assert proxy.seen.keys() >= {"Get", "UpdateBatch", "Scroll"}


async def test_a_server_that_is_away_is_transient_and_then_works(behind: QdrantIndex, proxy: Proxy) -> None:
    proxy.fail("UpdateBatch", grpc.StatusCode.UNAVAILABLE, times=2)
    for _ in range(2):
        with pytest.raises(Transient, match="UNAVAILABLE"):
            await behind.upsert([document("p")])
    assert await behind.upsert([document("p")]) == ["applied"]


@pytest.mark.parametrize(
    ("code", "details", "retry_after", "error", "says"),
    [
        ("RESOURCE_EXHAUSTED", "Rate limiting exceeded: 10 per minute", "7", Transient, "Rate"),
        ("RESOURCE_EXHAUSTED", "too many requests, retry after 7s", "", Transient, "too many"),
        ("DEADLINE_EXCEEDED", "Operation timed out", "", Transient, "timed out"),
        ("INTERNAL", "Service internal error: No space left on device", "", StorageFull, "disk is full"),
        ("INTERNAL", "Service internal error: shard is dead", "", Transient, "shard"),
        ("INVALID_ARGUMENT", 'Bad request: Index required but not found for "x"', "", Misconfigured, "Index required"),
        ("UNAUTHENTICATED", "Invalid API key", "", Misconfigured, "CATALENS_QDRANT__API_KEY"),
        ("PERMISSION_DENIED", "Forbidden", "", Misconfigured, "CATALENS_QDRANT__API_KEY"),
        ("NOT_FOUND", "Not found: Collection `x` doesn't exist!", "", Misconfigured, "catalens reindex"),
        ("OUT_OF_RANGE", "Error, message length too large: found 9 bytes", "", InvalidEvent, "too large"),
        ("UNIMPLEMENTED", "", "", Misconfigured, "UNIMPLEMENTED"),
    ],
)
async def test_what_a_servers_error_means(
    behind: QdrantIndex,
    proxy: Proxy,
    code: str,
    details: str,
    retry_after: str,
    error: type[Exception],
    says: str,
) -> None:
    for rpc, call in (
        ("UpdateBatch", lambda: behind.upsert([document("p")])),
        ("QueryBatch", lambda: behind.search(SHOP, [Leg("lexical", SparseVector((7,), (1.0,)), 5)], ALL)),
        ("Get", lambda: behind.get(SHOP, [f"p{number}" for number in range(600)])),
    ):
        proxy.fail(rpc, grpc.StatusCode[code], details, retry_after=retry_after)
        with pytest.raises(error, match=says) as raised:
            await call()
        assert type(raised.value) is error or isinstance(raised.value, Misconfigured)
        if "7" in f"{details}{retry_after}":
            assert isinstance(raised.value, Transient)
            assert raised.value.retry_after == 7
        proxy.faults.clear()


async def test_a_write_that_was_acknowledged_but_never_seen_is_written_again(behind: QdrantIndex, proxy: Proxy) -> None:
    proxy.faults["UpdateBatch"].append(lambda _: ACCEPTED)
    assert await behind.upsert([document("p", 2), document("q", 2)]) == ["applied", "applied"]
    proxy.faults["UpdateBatch"].append(lambda _: ACCEPTED)
    assert await behind.update_offers([offer("p", 1, price=3.0)]) == ["applied"]
    assert (await behind.get(SHOP, ["p"]))["p"].product.price == 3.0
    assert (await behind.counts(SHOP)).products == 2
    assert len(proxy.seen["UpdateBatch"]) == 4


async def test_a_write_that_was_acknowledged_and_seen_late_is_applied_once(behind: QdrantIndex, proxy: Proxy) -> None:
    late: list[bytes] = []

    def keep(request: bytes) -> bytes:
        late.append(request)
        return ACCEPTED

    upstream = proxy.upstream

    class Late:
        def unary_unary(self, method: str) -> Any:
            async def call(request: bytes) -> bytes:
                if method == UPDATE:
                    while late:
                        await upstream.unary_unary(method)(late.pop(0))
                return bytes(await upstream.unary_unary(method)(request))

            return call

    proxy.upstream = Late()
    await behind.upsert([document("p", 1, price=1.0, offer_version=1)])
    writes: list[Callable[[], Awaitable[Sequence[str]]]] = [
        lambda: behind.upsert([document("p", 2), document("new", 1)]),
        lambda: behind.update_offers([offer("p", 2, stock=4), offer("lone", 2, stock=1)]),
        lambda: behind.delete([tombstone("new", 2), tombstone("never", 2)]),
    ]
    for write in writes:
        proxy.faults["UpdateBatch"].append(keep)
        assert await write() == ["applied", "applied"]
    product = (await behind.get(SHOP, ["p"]))["p"].product
    assert (product.version, product.price, product.stock) == (2, 1.0, 4)
    assert await behind.counts(SHOP) == IndexCounts(products=1, images_pending=0, deleted=2, offers_only=1)


async def test_a_write_that_others_always_win_is_transient(behind: QdrantIndex, proxy: Proxy) -> None:
    proxy.faults["UpdateBatch"] += [lambda _: ACCEPTED] * adapter.ROUNDS
    with pytest.raises(Transient, match="attempts"):
        await behind.upsert([document("p")])
    assert not proxy.faults["UpdateBatch"]
    assert await behind.upsert([document("p")]) == ["applied"]


@pytest.mark.parametrize(
    ("stored", "late", "first", "outcome", "end"),
    [
        ([], document("p", 3), document("p", 5), "superseded", (5, "none", None, {"text"})),
        ([document("p", 1)], document("p", 3), document("p", 5), "superseded", (5, "none", None, {"text"})),
        ([document("p", 1)], tombstone("p", 3), document("p", 5), "superseded", (5, "none", None, {"text"})),
        ([document("p", 1)], document("p", 3), tombstone("p", 5), "superseded", None),
        ([document("p", 1)], document("p", 3), offer("p", 2, price=2.0), "applied", (3, "none", 2.0, {"text"})),
        ([document("p", 1)], offer("p", 2, price=2.0), document("p", 5), "applied", (5, "none", 2.0, {"text"})),
        (
            [document("p", 1)],
            offer("p", 2, price=2.0),
            offer("p", 3, price=3.0),
            "superseded",
            (1, "none", 3.0, {"text"}),
        ),
        ([], offer("p", 2, price=2.0), document("p", 5), "applied", (5, "none", 2.0, {"text"})),
        ([document("p", 5)], "picture", document("p", 6), "superseded", (6, "none", None, {"text"})),
        ([document("p", 5)], "picture", tombstone("p", 6), "superseded", None),
        ([document("p", 5)], "picture", offer("p", 2, price=2.0), "applied", (5, "ok", 2.0, {"text", "image"})),
    ],
)
async def test_who_was_overtaken_between_reading_and_writing_changes_nothing_newer(
    behind: QdrantIndex,
    proxy: Proxy,
    elsewhere: QdrantIndexes,
    stored: Sequence[IndexDocument],
    late: object,
    first: object,
    outcome: str,
    end: tuple[int, str, float | None, set[str]] | None,
) -> None:
    other = await elsewhere.open(INFO)
    await other.upsert(stored)
    upstream = proxy.upstream
    to_come = [first]

    async def write(index: QdrantIndex, what: object) -> Sequence[str]:
        if isinstance(what, IndexDocument):
            return await index.upsert([what])
        if isinstance(what, OfferUpdate):
            return await index.update_offers([what])
        if isinstance(what, TombstoneWrite):
            return await index.delete([what])
        return await index.update_images([ImageUpdate(SHOP, "p", 5, "ok", image=PICTURE)])

    class Overtaking:
        def unary_unary(self, method: str) -> Any:
            async def call(request: bytes) -> bytes:
                if method == UPDATE and to_come:
                    assert await write(other, to_come.pop()) == ["applied"]
                return bytes(await upstream.unary_unary(method)(request))

            return call

    proxy.upstream = Overtaking()
    assert await write(behind, late) == [outcome]
    found = (await behind.get(SHOP, ["p"], with_vectors=True)).get("p")
    seen = found and (found.product.version, found.image_status, found.product.price, set(found.vectors))
    assert seen == end
    for using in ("image", "text"):
        legs = [Leg(using, PICTURE, 5)]
        (hits,) = await behind.search(SHOP, legs, ALL)
        assert len(hits) == (end is not None and using in end[3])


async def test_who_was_replaced_at_once_still_learns_that_he_was_applied(
    behind: QdrantIndex, proxy: Proxy, elsewhere: QdrantIndexes
) -> None:
    other = await elsewhere.open(INFO)
    upstream = proxy.upstream

    class Overtaken:
        def unary_unary(self, method: str) -> Any:
            async def call(request: bytes) -> bytes:
                answer = bytes(await upstream.unary_unary(method)(request))
                if method == UPDATE:
                    for version in range(5, 5 + adapter.TRAIL):
                        await other.upsert([document("p", version)])
                return answer

            return call

    proxy.upstream = Overtaken()
    assert await behind.upsert([document("p", 2)]) == ["applied"]
    assert await behind.upsert([document("p", 3)]) == ["superseded"]


async def test_requests_are_bounded_in_points_and_bytes(
    behind: QdrantIndex, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [document(f"p{number}") for number in range(600)]
    assert await behind.upsert(many) == ["applied"] * 600

    def sizes() -> list[int]:
        requests = [pb.UpdateBatchPoints.FromString(request) for request in proxy.seen.pop("UpdateBatch")]
        return [sum(len(operation.upsert.points) or 1 for operation in request.operations) for request in requests]

    assert sorted(sizes()) == [88, 256, 256]
    monkeypatch.setattr(adapter, "BATCH_BYTES", 4000)
    wordy = [document(f"w{number}", description="x" * 900) for number in range(9)]
    huge = document("huge", description="x" * 9000)
    assert await behind.upsert([*wordy, huge]) == ["applied"] * 10
    assert max(len(request) for request in proxy.seen["UpdateBatch"]) < 12_000
    assert all(1 <= size <= 3 for size in sizes())
    await behind.update_offers([offer(f"p{number}", 1, price=1.0) for number in range(300)])
    assert len(await behind.get(SHOP, [f"p{number}" for number in range(600)])) == 600


async def test_a_page_costs_few_calls(behind: QdrantIndex, proxy: Proxy) -> None:
    await behind.upsert([document(f"a-long-common-beginning-{number:03}") for number in range(60)])
    proxy.seen.clear()
    first = await behind.page(SHOP, after=None, limit=20, where=ALL)
    assert (len(proxy.seen["Scroll"]), len(proxy.seen["Get"])) == (4, 1)  # three levels are the same for all
    proxy.seen.clear()
    await behind.page(SHOP, after=first[-1].product.product_id, limit=20, where=ALL)
    assert (len(proxy.seen["Scroll"]), len(proxy.seen["Get"])) == (4, 1)  # side by side


async def test_a_server_that_is_too_old_or_away_is_refused_at_the_door(proxy: Proxy) -> None:
    old = pb.HealthCheckReply(version="1.12.4").SerializeToString()
    proxy.faults["HealthCheck"].append(lambda _: old)
    with pytest.raises(Misconfigured, match=r"1\.12\.4"):
        await QdrantIndexes.connect(proxy.settings)
    with pytest.raises(Transient):
        await QdrantIndexes.connect(proxy.settings.model_copy(update={"grpc_port": 1}))
    with pytest.raises(Misconfigured, match="CATALENS_QDRANT__URL"):
        await QdrantIndexes.connect(proxy.settings.model_copy(update={"url": "qdrant.example.org"}))


async def test_a_foreign_collection_is_left_alone(indexes: QdrantIndexes) -> None:
    vectors = pb.VectorsConfig(params=pb.VectorParams(size=2, distance=pb.Distance.Dot))
    theirs = pb.CreateCollection(collection_name=indexes._name(INFO), vectors_config=vectors)
    await indexes._connection.call(indexes._connection.collections.Create, theirs)
    with pytest.raises(Misconfigured, match="CATALENS_QDRANT__COLLECTION"):
        await indexes.open(INFO)
    assert list(await indexes.all()) == []


async def test_a_closed_index_is_transient(indexes: QdrantIndexes) -> None:
    index = await indexes.open(INFO)
    await index.close()
    await index.close()
    with pytest.raises(Transient, match="closed"):
        await index.upsert([document("p")])
    other = await indexes.open(INFO)
    await indexes.close()
    await indexes.close()
    with pytest.raises(Transient):
        await other.counts(SHOP)


async def test_calls_in_flight_when_the_index_is_closed_are_transient(proxy: Proxy) -> None:
    indexes = await QdrantIndexes.connect(proxy.settings)
    index = await indexes.open(INFO)
    asked = asyncio.Event()

    async def forever() -> None:
        asked.set()
        await asyncio.Event().wait()

    proxy.faults["Get"].append(lambda _: forever())
    call = asyncio.create_task(index.get(SHOP, ["p"]))
    await asked.wait()
    await indexes.close()
    with pytest.raises(Transient, match="closed"):
        await call


async def test_a_caller_that_goes_away_is_cancelled_and_the_index_serves_on(behind: QdrantIndex, proxy: Proxy) -> None:
    asked = asyncio.Event()

    async def forever() -> None:
        asked.set()
        await asyncio.Event().wait()

    proxy.faults["UpdateBatch"].append(lambda _: forever())
    call = asyncio.create_task(behind.upsert([document(f"p{number}") for number in range(600)]))
    await asked.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert set(await behind.upsert([document(f"p{number}") for number in range(600)])) <= {"applied", "known"}
    assert (await behind.counts(SHOP)).products == 600


async def test_kill_9_of_the_server_loses_no_acknowledged_write(tmp_path: Path) -> None:
    with QdrantServer(tmp_path / "data", strict=True) as server:
        index = await QdrantIndex.open(QdrantSettings(url=server.url, grpc_port=server.grpc_port, timeout=60), SPEC)
        applied = await index.upsert([document(f"p{number}") for number in range(50)])
        server.kill()
        with pytest.raises(Transient):
            await index.upsert([document("late")])
        server.start()
        for _ in range(100):  # the channel reconnects in its own time
            try:
                assert await index.upsert([document("p1", 1), document("p2", 2)]) == ["known", "applied"]
                break
            except Transient:
                await asyncio.sleep(0.1)
        assert applied == ["applied"] * 50
        assert (await index.counts(SHOP)).products == 50
        await index.close()
