"""The Qdrant stand-in answers as a server does where the adapter relies on it, driven by Qdrant's own client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import grpc  # type: ignore[import-untyped]  # has no types
import pytest
from qdrant_client import AsyncQdrantClient, models
from tests.qdrant_server import QdrantServer

IDS = [str(UUID(int=number)) for number in range(1, 10)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QdrantServer]:
    with QdrantServer(tmp_path_factory.mktemp("qdrant") / "store") as running:
        yield running


@asynccontextmanager
async def connected(server: QdrantServer) -> AsyncIterator[AsyncQdrantClient]:
    client = AsyncQdrantClient(
        url=server.url, grpc_port=server.grpc_port, prefer_grpc=True, check_compatibility=False, timeout=30
    )
    yield client
    await client.close()


@pytest.fixture
async def client(server: QdrantServer) -> AsyncIterator[AsyncQdrantClient]:
    async with connected(server) as client:
        yield client


async def create(client: AsyncQdrantClient, **more: Any) -> str:
    name = f"c-{uuid4().hex}"
    await client.create_collection(
        name,
        vectors_config={"image": models.VectorParams(size=2, distance=models.Distance.COSINE)},
        sparse_vectors_config={"lexical": models.SparseVectorParams(modifier=models.Modifier.IDF)},
        **more,
    )
    return name


@pytest.fixture
async def collection(client: AsyncQdrantClient) -> str:
    return await create(client)


def point(number: int, vector: Any = None, **payload: object) -> models.PointStruct:
    return models.PointStruct(id=IDS[number], vector={} if vector is None else vector, payload=payload)


def equals(key: str, value: Any) -> models.FieldCondition:
    return models.FieldCondition(key=key, match=models.MatchValue(value=value))


async def payloads(client: AsyncQdrantClient, collection: str) -> dict[str, Any]:
    records, _ = await client.scroll(collection, limit=100)
    return {str(record.id): record.payload for record in records}


async def refused(call: Awaitable[object], code: grpc.StatusCode) -> str:
    """Return what the server says when it answers `call` with `code`."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() == code
    return str(caught.value.details())


# --- conditional writes ---------------------------------------------------------------------------------------------


async def test_a_conditional_upsert_skips_what_does_not_match_and_inserts_what_is_missing(
    client: AsyncQdrantClient, collection: str
) -> None:
    await client.upsert(collection, [point(0, {"image": [1.0, 0.0]}, etag="a", old=1), point(1, etag="b")])
    answer = await client.upsert(
        collection,
        [point(0, etag="new"), point(1, etag="new"), point(2, etag="new")],
        update_filter=models.Filter(must=[equals("etag", "a")]),
    )
    assert answer.status == models.UpdateStatus.COMPLETED
    assert await payloads(client, collection) == {
        IDS[0]: {"etag": "new"},  # replaced whole
        IDS[1]: {"etag": "b"},
        IDS[2]: {"etag": "new"},
    }
    assert (await client.retrieve(collection, IDS[:1], with_vectors=True))[0].vector == {}


async def test_update_modes(client: AsyncQdrantClient, collection: str) -> None:
    await client.upsert(collection, [point(0, n=1)])
    await client.upsert(collection, [point(0, n=2), point(1, n=2)], update_mode=models.UpdateMode.INSERT_ONLY)
    await client.upsert(collection, [point(1, n=3), point(2, n=3)], update_mode=models.UpdateMode.UPDATE_ONLY)
    assert await payloads(client, collection) == {IDS[0]: {"n": 1}, IDS[1]: {"n": 3}}


async def test_conditional_vectors_and_payload_touch_only_what_matches(
    client: AsyncQdrantClient, collection: str
) -> None:
    await client.upsert(collection, [point(0, {"image": [1.0, 0.0]}, v=1), point(1, {"image": [1.0, 0.0]}, v=2)])
    second = models.Filter(must=[equals("v", 2)])
    await client.update_vectors(
        collection,
        [models.PointVectors(id=each, vector={"image": [0.0, 1.0]}) for each in IDS[:2]],
        update_filter=second,
    )
    found = await client.retrieve(collection, IDS[:2], with_vectors=["image"])
    assert [each.vector for each in found] == [{"image": [1.0, 0.0]}, {"image": [0.0, 1.0]}]
    await client.set_payload(collection, {"w": 3}, points=second)
    await client.set_payload(collection, {"deep": 4}, points=[IDS[0]], key="offer")
    await client.overwrite_payload(collection, {"only": 1}, points=models.Filter(must=[equals("w", 3)]))
    assert await payloads(client, collection) == {IDS[0]: {"v": 1, "offer": {"deep": 4}}, IDS[1]: {"only": 1}}
    await client.delete_payload(collection, ["v", "offer.deep"], points=[IDS[0]])
    assert (await payloads(client, collection))[IDS[0]] == {"offer": {}}


async def test_a_batch_of_operations_is_applied_in_order(client: AsyncQdrantClient, collection: str) -> None:
    await client.upsert(collection, [point(0, n=1), point(1, n=1)])
    old = models.Filter(must=[equals("n", 1)])
    await client.batch_update_points(
        collection,
        [
            models.SetPayloadOperation(set_payload=models.SetPayload(payload={"n": 2}, points=[IDS[0]])),
            models.UpsertOperation(upsert=models.PointsList(points=[point(0, n=3)], update_filter=old)),
            models.UpsertOperation(upsert=models.PointsList(points=[point(2, n=3)])),
            models.OverwritePayloadOperation(
                overwrite_payload=models.SetPayload(payload={"m": 1}, filter=models.Filter(must=[equals("n", 3)]))
            ),
            models.UpdateVectorsOperation(
                update_vectors=models.UpdateVectors(points=[models.PointVectors(id=IDS[0], vector={"image": [0, 1]})])
            ),
            models.DeleteOperation(delete=models.FilterSelector(filter=old)),
        ],
    )
    assert await payloads(client, collection) == {IDS[0]: {"n": 2}, IDS[2]: {"m": 1}}
    assert (await client.retrieve(collection, IDS[:1], with_vectors=True))[0].vector == {"image": [0.0, 1.0]}


async def test_a_payload_for_a_missing_point_is_not_found(client: AsyncQdrantClient, collection: str) -> None:
    assert IDS[3] in await refused(client.set_payload(collection, {"n": 1}, points=[IDS[3]]), grpc.StatusCode.NOT_FOUND)


# --- collections and aliases ----------------------------------------------------------------------------------------


async def test_a_collection_reports_what_it_was_created_with(client: AsyncQdrantClient) -> None:
    name = await create(
        client,
        shard_number=3,
        replication_factor=2,
        on_disk_payload=False,
        hnsw_config=models.HnswConfigDiff(m=8),
        quantization_config=models.ScalarQuantization(
            scalar=models.ScalarQuantizationConfig(type=models.ScalarType.INT8, always_ram=True)
        ),
        metadata={"model": {"id": "one"}, "old": 1},
    )
    await client.create_payload_index(name, "tenant", models.KeywordIndexParams(type="keyword", is_tenant=True))
    await client.update_collection(name, metadata={"format": 2, "old": None})
    await client.upsert(name, [point(0, tenant="a"), point(1)])
    info = await client.get_collection(name)
    params = info.config.params
    assert (params.shard_number, params.replication_factor, params.on_disk_payload) == (3, 2, False)
    assert (info.config.hnsw_config.m, info.config.hnsw_config.ef_construct) == (8, 100)
    assert isinstance(info.config.quantization_config, models.ScalarQuantization)
    assert info.config.metadata == {"model": {"id": "one"}, "format": 2}
    assert isinstance(params.vectors, dict)
    assert params.vectors["image"].size == 2
    assert (info.status, info.points_count) == (models.CollectionStatus.GREEN, 2)
    index = info.payload_schema["tenant"]
    assert (index.data_type, index.points) == (models.PayloadSchemaType.KEYWORD, 1)
    await refused(client.create_collection(name, vectors_config={}), grpc.StatusCode.ALREADY_EXISTS)
    assert await client.delete_collection(name)
    assert not await client.collection_exists(name)
    await refused(client.count(name), grpc.StatusCode.NOT_FOUND)


def switch(alias: str, to: str) -> list[models.AliasOperations]:
    return [
        models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=alias)),
        models.CreateAliasOperation(create_alias=models.CreateAlias(alias_name=alias, collection_name=to)),
    ]


async def test_an_alias_is_switched_at_once(client: AsyncQdrantClient) -> None:
    one, two, alias = await create(client), await create(client), f"alias-{uuid4().hex}"
    await client.upsert(one, [point(0, at=1)])
    await client.upsert(two, [point(0, at=2)])
    await client.update_collection_aliases(switch(alias, one))
    seen: set[int] = set()
    done = asyncio.Event()

    async def read() -> None:
        while not done.is_set():
            seen.update(payload["at"] for payload in (await payloads(client, alias)).values())

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(read())
        tasks.create_task(read())
        for to in [two, one] * 25:
            await client.update_collection_aliases(switch(alias, to))
        done.set()
    assert seen == {1, 2}  # and no read found no collection

    actions = [*switch(alias, two), *switch(alias, "missing")]
    await refused(client.update_collection_aliases(actions), grpc.StatusCode.NOT_FOUND)
    assert [each.alias_name for each in (await client.get_collection_aliases(one)).aliases] == [alias]
    await client.update_collection_aliases(
        [
            models.RenameAliasOperation(
                rename_alias=models.RenameAlias(old_alias_name=alias, new_alias_name=f"{alias}-2")
            )
        ]
    )
    assert await client.collection_exists(f"{alias}-2")
    assert not await client.collection_exists(alias)
    await client.delete_collection(one)
    assert f"{alias}-2" not in {each.alias_name for each in (await client.get_aliases()).aliases}


# --- reads ----------------------------------------------------------------------------------------------------------


async def test_scroll_pages_in_id_order(client: AsyncQdrantClient, collection: str) -> None:
    await client.upsert(collection, [point(number, n=number) for number in (4, 1, 3, 0, 2)])
    seen: list[str] = []
    offset: Any = None
    while True:
        records, offset = await client.scroll(collection, limit=2, offset=offset, with_payload=False)
        seen += [str(record.id) for record in records]
        if offset is None:
            break
    assert seen == IDS[:5]


async def test_scroll_in_the_order_of_a_key_needs_a_range_index(client: AsyncQdrantClient, collection: str) -> None:
    await client.upsert(collection, [point(number, at=number * 10, f=-number / 4) for number in range(5)])

    async def ordered(**order: Any) -> list[str]:
        order_by = models.OrderBy(**order)
        return [str(each.id) for each in (await client.scroll(collection, limit=3, order_by=order_by))[0]]

    assert "No range index for `order_by` key: `at`" in await refused(
        ordered(key="at"), grpc.StatusCode.INVALID_ARGUMENT
    )
    await client.create_payload_index(collection, "at", models.PayloadSchemaType.INTEGER)
    await client.create_payload_index(collection, "f", models.PayloadSchemaType.FLOAT)
    assert await ordered(key="at", start_from=20) == IDS[2:5]
    assert await ordered(key="at", direction=models.Direction.DESC, start_from=10) == [IDS[1], IDS[0]]
    assert await ordered(key="f") == [IDS[4], IDS[3], IDS[2]]
    both = client.scroll(collection, order_by="at", offset=IDS[1])
    assert "offset" in await refused(both, grpc.StatusCode.INVALID_ARGUMENT)
    await client.delete_payload_index(collection, "at")
    await refused(ordered(key="at"), grpc.StatusCode.INVALID_ARGUMENT)


def by(**condition: Any) -> models.FieldCondition:
    return models.FieldCondition(**condition)


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        (models.Filter(must=[equals("word", "a")]), {0}),
        (models.Filter(must=[equals("n", 1)]), {1}),
        (models.Filter(must=[equals("flag", True)]), {0, 2}),
        (models.Filter(must=[equals("flag", False)]), {1}),
        (models.Filter(must_not=[equals("flag", True)]), {1, 3}),
        (models.Filter(must=[by(key="words", match=models.MatchAny(any=["x", "y"]))]), {0, 1}),
        (models.Filter(must=[by(key="n", match=models.MatchAny(any=[0, 2]))]), {0, 2}),
        (models.Filter(must=[by(key="word", match=models.MatchExcept(**{"except": ["a"]}))]), {1, 2}),
        (models.Filter(must=[by(key="o.f", range=models.Range(gt=0.5, lte=1.5))]), {1}),
        (models.Filter(must=[models.HasIdCondition(has_id=[IDS[0], IDS[8]])]), {0}),
        (models.Filter(must=[models.IsEmptyCondition(is_empty=models.PayloadField(key="word"))]), {3}),
        (models.Filter(should=[equals("n", 0), models.Filter(must=[equals("word", "c"), equals("n", 2)])]), {0, 2}),
        (
            models.Filter(
                min_should=models.MinShould(
                    conditions=[equals("n", 1), equals("word", "b"), equals("flag", True)], min_count=2
                )
            ),
            {1},
        ),
    ],
)
async def test_filters(
    client: AsyncQdrantClient, collection: str, condition: models.Filter, expected: set[int]
) -> None:
    await client.upsert(
        collection,
        [
            point(0, word="a", n=0, flag=True, words=["x", "z"], o={"f": 0.5}),
            point(1, word="b", n=1, flag=False, words=["y"], o={"f": 1.5}),
            point(2, word="c", n=2, flag=True, words=["z"]),
            point(3, n=3),
        ],
    )
    records, _ = await client.scroll(collection, scroll_filter=condition)
    assert {IDS.index(str(each.id)) for each in records} == expected
    assert (await client.count(collection, count_filter=condition)).count == len(expected)
    await client.delete(collection, points_selector=condition)
    assert (await client.count(collection)).count == 4 - len(expected)


async def test_a_batch_of_queries(client: AsyncQdrantClient, collection: str) -> None:
    def words(*indices: int) -> models.SparseVector:
        return models.SparseVector(indices=list(indices), values=[1.0] * len(indices))

    await client.upsert(
        collection,
        [
            point(0, {"image": [1.0, 0.0], "lexical": words(1, 2)}, tenant="a", name="zero"),
            point(1, {"image": [1.0, 1.0], "lexical": words(1)}, tenant="a", name="one"),
            point(2, {"image": [0.0, 1.0], "lexical": words(1)}, tenant="b", name="two"),
            point(3, tenant="a", name="no vector"),
        ],
    )
    only = models.Filter(must=[equals("tenant", "a")])
    dense = models.QueryRequest(query=[1.0, 0.0], using="image", limit=5, with_payload=["name"], with_vector=["image"])
    near = dense.model_copy(update={"score_threshold": 0.9, "with_payload": False, "with_vector": False})
    word = models.QueryRequest(query=words(2), using="lexical", filter=only, limit=5)
    own = word.model_copy(update={"params": models.SearchParams(idf=models.IdfCorpusParams(corpus=only))})
    answers = [answer.points for answer in await client.query_batch_points(collection, [dense, near, word, own])]
    assert [str(hit.id) for hit in answers[0]] == IDS[:3]
    assert [hit.score for hit in answers[0]] == pytest.approx([1.0, 0.5**0.5, 0.0], abs=1e-5)
    assert answers[0][0].payload == {"name": "zero"}
    assert answers[0][0].vector == {"image": [1.0, 0.0]}
    assert [str(hit.id) for hit in answers[1]] == IDS[:1]
    assert not answers[1][0].payload
    assert [str(hit.id) for hit in answers[2]] == [str(hit.id) for hit in answers[3]] == IDS[:1]
    assert answers[2][0].score > answers[3][0].score  # rarer among all than among one's own
    single = await client.query_points(collection, query=[1.0, 0.0], using="image", query_filter=only, limit=1)
    assert [str(hit.id) for hit in single.points] == IDS[:1]


# --- refusals, faults and restarts ----------------------------------------------------------------------------------


async def test_a_field_that_is_not_served_is_refused_by_name(client: AsyncQdrantClient, collection: str) -> None:
    phrase = models.Filter(must=[by(key="t", match=models.MatchPhrase(phrase="x"))])
    nested = models.Filter(should=[models.Filter(must_not=[phrase])])
    upsert = models.UpsertOperation(upsert=models.PointsList(points=[point(0)], shard_key="s"))
    for call, name in [
        (client.count(collection, shard_key_selector="s"), "CountPoints.shard_key_selector"),
        (client.count(collection, count_filter=nested), "Match.phrase"),
        (client.batch_update_points(collection, [upsert]), "PointStructList.shard_key_selector"),
        (client.query_points(collection, prefetch=[models.Prefetch()]), "QueryPoints.prefetch"),
        (create(client, strict_mode_config=models.StrictModeConfig(enabled=True)), "CreateCollection.strict_mode"),
    ]:
        assert name in await refused(call, grpc.StatusCode.INVALID_ARGUMENT)
    await refused(client.search_matrix_pairs(collection), grpc.StatusCode.UNIMPLEMENTED)
    assert "index for faceting" in await refused(client.facet(collection, "t"), grpc.StatusCode.INVALID_ARGUMENT)
    assert (await client.count(collection)).count == 0
    wrong = client.query_points(collection, query=[1.0, 2.0, 3.0], using="image")
    assert "expected dim: 2" in await refused(wrong, grpc.StatusCode.INVALID_ARGUMENT)


async def test_strict_mode_wants_an_index_for_every_filter(tmp_path: Path) -> None:
    only = models.Filter(must=[models.Filter(should=[equals("tenant", "a")])])
    with QdrantServer(tmp_path / "store", strict=True) as server:
        async with connected(server) as client:
            name = await create(client)
            await client.upsert(name, [point(0, tenant="a")])
            for call in (
                client.count(name, count_filter=only),
                client.scroll(name, scroll_filter=only),
                client.query_points(name, query=[1.0, 0.0], using="image", query_filter=only),
                client.upsert(name, [point(1)], update_filter=only),
                client.set_payload(name, {"n": 1}, points=only),
                client.delete(name, points_selector=only),
            ):
                assert (await refused(call, grpc.StatusCode.INVALID_ARGUMENT)).startswith(
                    'Bad request: Index required but not found for "tenant" of one of the following types: [keyword'
                )
            await client.create_payload_index(name, "tenant", models.PayloadSchemaType.INTEGER)
            await refused(client.count(name, count_filter=only), grpc.StatusCode.INVALID_ARGUMENT)
            await client.create_payload_index(name, "tenant", models.PayloadSchemaType.KEYWORD)
            assert (await client.count(name, count_filter=only)).count == 1


async def test_what_was_acknowledged_outlives_a_kill(tmp_path: Path) -> None:
    with QdrantServer(tmp_path / "store") as server:
        async with connected(server) as client:
            name = await create(client, metadata={"model": "one"})
            gone = await create(client)
            await client.create_payload_index(name, "n", models.PayloadSchemaType.INTEGER)
            await client.update_collection_aliases(switch("catalogue", name))
            await client.update_collection(name, metadata={"format": 1})
            await client.upsert(name, [point(number, {"image": [1.0, number]}, n=number) for number in range(5)])
            await client.set_payload(name, {"late": True}, points=[IDS[2]])
            await refused(client.upsert(name, [point(5, {"image": [1.0]})]), grpc.StatusCode.INVALID_ARGUMENT)
            await client.delete(name, points_selector=[IDS[4]])
            await client.delete_collection(gone)
            before = await client.scroll("catalogue", with_vectors=True)
        server.restart()
        async with connected(server) as client:
            assert await client.scroll("catalogue", with_vectors=True) == before
            assert len(before[0]) == 4
            info = await client.get_collection("catalogue")
            assert info.config.metadata == {"model": "one", "format": 1}
            assert info.payload_schema["n"].points == 4
            assert len((await client.scroll("catalogue", order_by="n"))[0]) == 4
            assert [each.name for each in (await client.get_collections()).collections] == [name]


async def test_refused_writes_leave_no_trace_and_are_counted(tmp_path: Path) -> None:
    with QdrantServer(tmp_path / "store") as server:
        async with connected(server) as client:
            name = await create(client)
            server.refuse_writes(True)
            operation = models.UpsertOperation(upsert=models.PointsList(points=[point(0)]))
            for call in (
                client.upsert(name, [point(0)]),
                client.batch_update_points(name, [operation]),
                client.update_collection_aliases(switch("catalogue", name)),
                client.create_payload_index(name, "n", models.PayloadSchemaType.INTEGER),
                create(client),
            ):
                await refused(call, grpc.StatusCode.UNAVAILABLE)
            assert (await client.count(name)).count == 0
            server.refuse_writes(False)
            await client.upsert(name, [point(0)])
            assert (await client.count(name)).count == 1
            assert not (await client.get_aliases()).aliases
            calls = server.calls()
            assert (calls["Points.Upsert"], calls["Points.Count"], calls["Collections.Create"]) == (2, 2, 2)
            server.slow(5000)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await client.count(name, timeout=1)
            assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
