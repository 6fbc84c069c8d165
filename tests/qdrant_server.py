"""A Qdrant server to test against where none can be installed: Qdrant's engine behind Qdrant's own gRPC API.

The engine is `qdrant-edge-py`, the API are the services and messages that ship with `qdrant-client`. It is a test
tool: clustering, HNSW and quantisation are not there (their settings are accepted, remembered and reported, searches
are exact), a write is always applied before it is answered, and of REST there are a collection's snapshots alone. A
request that sets a field which is not served here is refused with INVALID_ARGUMENT, so that no typo hides.

    python tests/qdrant_server.py FOLDER PORT [--rest PORT] [--strict]

prints one line when it is ready and serves until SIGTERM. Each line on stdin is a JSON object, `{"refuse_writes":
true}`, `{"slow_ms": 50}` or `{}`, answered by a line with the number of calls so far; if stdin is a pipe, its end is
the end of the server, so that a test that dies leaves none behind. `QdrantServer` does all that.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeAlias
from uuid import UUID

import grpc  # type: ignore[import-untyped]  # has no types
import qdrant_edge as edge
from aiohttp import BodyPartReader, web
from google.protobuf import json_format  # type: ignore[import-untyped]  # has no types
from qdrant_client import grpc as q
from qdrant_client.conversions.conversion import grpc_to_payload, payload_to_grpc

Message: TypeAlias = Any  # one of the protobuf messages of qdrant_client.grpc
Update: TypeAlias = edge.UpdateOperation

VERSION: Final = "1.20.0"
"""The server version that clients are told: the one of the messages served here."""
MAX_MESSAGE: Final = 32 * 1024 * 1024
"""Bytes of the largest request, a server's default."""

WHOLE: Final = frozenset(
    """
    HealthCheckRequest VectorsConfig VectorParamsMap SparseVectorConfig SparseVectorParams GetCollectionInfoRequest
    CollectionExistsRequest ListCollectionsRequest DeleteCollection ChangeAliases AliasOperations CreateAlias
    RenameAlias DeleteAlias ListAliasesRequest ListCollectionAliasesRequest PointStruct Vectors NamedVectors
    PointsSelector PointsIdsList WithPayloadSelector PayloadIncludeSelector PayloadExcludeSelector WithVectorsSelector
    VectorsSelector PointVectors DeleteFieldIndexCollection IdfParams OrderBy Filter MinShould
    """.split()  # noqa: SIM905  # a list would be one line a name
)
"""Messages that are served whole; what they hold is checked too."""
LEAVES: Final = frozenset(
    """
    Value DenseVector SparseVector PointId Range RepeatedStrings RepeatedIntegers IsEmptyCondition IsNullCondition
    HasIdCondition HasVectorCondition WriteOrdering ReadConsistency QuantizationSearchParams HnswConfigDiff
    WalConfigDiff OptimizersConfigDiff QuantizationConfig SparseIndexConfig PayloadStorageParams IdTrackerParams
    """.split()  # noqa: SIM905  # a list would be one line a name
)
"""Messages that are served whole with all they hold."""
PARTS: Final = {
    "CreateCollection": "hnsw_config wal_config optimizers_config shard_number on_disk_payload vectors_config payload "
    "replication_factor write_consistency_factor quantization_config sparse_vectors_config metadata id_tracker",
    "VectorParams": "size distance hnsw_config quantization_config on_disk datatype memory",
    "UpdateCollection": "metadata optimizers_config hnsw_config",
    "UpsertPoints": "points update_filter update_mode",
    "Vector": "dense sparse",
    "DeletePoints": "points",
    "GetPoints": "ids with_payload with_vectors",
    "UpdatePointVectors": "points update_filter",
    "DeletePointVectors": "points_selector vectors",
    "SetPayloadPoints": "payload points_selector key",
    "DeletePayloadPoints": "keys points_selector",
    "ClearPayloadPoints": "points",
    "CreateFieldIndexCollection": "field_name field_type field_index_params",
    "PayloadIndexParams": "keyword_index_params integer_index_params float_index_params bool_index_params "
    "datetime_index_params uuid_index_params",
    "KeywordIndexParams": "is_tenant on_disk enable_hnsw memory",
    "IntegerIndexParams": "lookup range is_principal on_disk enable_hnsw memory",
    "FloatIndexParams": "on_disk is_principal enable_hnsw memory",
    "BoolIndexParams": "on_disk enable_hnsw memory",
    "DatetimeIndexParams": "on_disk is_principal enable_hnsw memory",
    "UuidIndexParams": "is_tenant on_disk enable_hnsw memory",
    "QueryPoints": "query using filter params score_threshold limit offset with_vectors with_payload",
    "QueryBatchPoints": "query_points",
    "Query": "nearest",
    "VectorInput": "dense sparse",
    "SearchParams": "hnsw_ef exact quantization indexed_only idf",
    "ScrollPoints": "filter offset limit with_payload with_vectors order_by",
    "StartFrom": "float integer",
    "CountPoints": "filter exact",
    "FacetCounts": "key filter limit exact",
    "UpdateBatchPoints": "operations",
    "PointsUpdateOperation": "upsert set_payload overwrite_payload delete_payload update_vectors delete_vectors "
    "delete_points clear_payload",
    "PointsUpdateOperation.PointStructList": "points update_filter update_mode",
    "PointsUpdateOperation.SetPayload": "payload points_selector key",
    "PointsUpdateOperation.OverwritePayload": "payload points_selector key",
    "PointsUpdateOperation.DeletePayload": "keys points_selector",
    "PointsUpdateOperation.UpdateVectors": "points update_filter",
    "PointsUpdateOperation.DeleteVectors": "points_selector vectors",
    "PointsUpdateOperation.DeletePoints": "points",
    "PointsUpdateOperation.ClearPayload": "points",
    "Condition": "field is_empty has_id filter is_null has_vector",
    "FieldCondition": "key match range",
    "Match": "keyword integer boolean keywords integers except_integers except_keywords",
}
"""What is served of the other messages, besides the fields that most requests have; any further message is refused."""
COMMON: Final = frozenset({"collection_name", "wait", "ordering", "timeout", "read_consistency"})

DEFAULTS: Final = q.CreateCollection(
    shard_number=1,
    replication_factor=1,
    write_consistency_factor=1,
    on_disk_payload=True,
    hnsw_config=q.HnswConfigDiff(m=16, ef_construct=100, full_scan_threshold=10_000, max_indexing_threads=0),
    optimizers_config=q.OptimizersConfigDiff(
        deleted_threshold=0.2, vacuum_min_vector_number=1000, default_segment_number=0, flush_interval_sec=5
    ),
    wal_config=q.WalConfigDiff(wal_capacity_mb=32, wal_segments_ahead=0, wal_retain_closed=1),
)
"""What a server reports of a collection that was created without it."""

FIELD_TYPES: Final = {number: name.removeprefix("FieldType") for name, number in q.FieldType.items()}


class Refusal(Exception):
    """An answer with a status other than OK."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def bad(message: str) -> Refusal:
    """Return the answer to a request that is wrong."""
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, message)


def check_served(message: Message) -> None:
    """Refuse a request that sets, at any depth, a field that is not served here."""
    kind = message.DESCRIPTOR.full_name.removeprefix("qdrant.")
    for descriptor, value in message.ListFields():
        if kind not in WHOLE and descriptor.name not in COMMON.union(PARTS.get(kind, "").split()):
            raise bad(f"the stand-in does not serve the field {kind}.{descriptor.name}")
        inner = descriptor.message_type
        if inner is not None and inner.GetOptions().map_entry:
            inner = inner.fields_by_name["value"].message_type
            value = value.values()  # noqa: PLW2901  # the same field, without its keys
        if inner is not None and inner.name not in LEAVES:
            for child in (value,) if hasattr(value, "ListFields") else value:
                check_served(child)


# --- from messages to the engine and back ---------------------------------------------------------------------------


def _id(point: Message) -> int | UUID:
    if point.WhichOneof("point_id_options") == "num":
        return int(point.num)
    try:
        return UUID(point.uuid)
    except ValueError:
        raise bad(f"Unable to parse UUID: {point.uuid}") from None


def _point_id(point: int | UUID | str) -> Message:
    return q.PointId(num=point) if isinstance(point, int) else q.PointId(uuid=str(point))


def _vector(vector: Message) -> Any:
    """Return a `Vector` or `VectorInput` as the engine takes it."""
    if vector.HasField("sparse"):
        return edge.SparseVector(list(vector.sparse.indices), list(vector.sparse.values))
    if vector.HasField("dense"):
        return list(vector.dense.data)
    raise bad("a vector is neither dense nor sparse")


def _vectors(vectors: Message) -> Any:
    if vectors.HasField("vector"):
        return _vector(vectors.vector)
    return {name: _vector(vector) for name, vector in vectors.vectors.vectors.items()}


def _vectors_output(stored: Any) -> Message:
    def output(vector: Any) -> Message:
        if isinstance(vector, edge.SparseVector):
            return q.VectorOutput(sparse=q.SparseVector(indices=vector.indices, values=vector.values))
        return q.VectorOutput(dense=q.DenseVector(data=vector))

    if isinstance(stored, dict):
        named = {name: output(vector) for name, vector in stored.items()}
        return q.VectorsOutput(vectors=q.NamedVectorsOutput(vectors=named))
    return q.VectorsOutput(vector=output(stored))


def _found(record: Any, kind: Any, **more: Any) -> Message:
    """Return an engine's record as `RetrievedPoint` or `ScoredPoint`."""
    found = kind(id=_point_id(record.id), payload=payload_to_grpc(record.payload or {}), **more)
    if record.vector is not None:
        found.vectors.CopyFrom(_vectors_output(record.vector))
    if record.order_value is not None:
        name = "int" if isinstance(record.order_value, int) else "float"
        found.order_value.CopyFrom(q.OrderValue(**{name: record.order_value}))
    return found


def _with_payload(request: Message, default: bool) -> Any:
    chosen = request.with_payload.WhichOneof("selector_options") if request.HasField("with_payload") else None
    if chosen is None:
        return default
    if chosen == "enable":
        return request.with_payload.enable
    fields = list(getattr(request.with_payload, chosen).fields)
    return edge.PayloadSelector.Include(fields) if chosen == "include" else edge.PayloadSelector.Exclude(fields)


def _with_vectors(request: Message) -> Any:
    chosen = request.with_vectors
    return list(chosen.include.names) if chosen.HasField("include") else chosen.enable


def _fields(filtered: Message) -> Iterator[tuple[str, set[str]]]:
    """Yield every payload key under a filter with the index types that serve it; none: any index does."""
    for condition in [
        *(*filtered.must, *filtered.should, *filtered.must_not),
        *filtered.min_should.conditions,
    ]:
        kind = condition.WhichOneof("condition_one_of")
        if kind == "filter":
            yield from _fields(condition.filter)
        elif kind in ("is_empty", "is_null"):
            yield getattr(condition, kind).key, set()
        elif kind == "field":
            match = condition.field.match.WhichOneof("match_value") or ""
            if "integer" in match:
                types = {"Integer"}
            elif match == "boolean":
                types = {"Bool"}
            else:
                types = {"Keyword", "Uuid"} if match else {"Float", "Integer"}
            yield condition.field.key, types


# --- collections ----------------------------------------------------------------------------------------------------


@dataclass
class Collection:
    """One collection: what it was created with, and its shard."""

    folder: Path
    created: Message
    """The `CreateCollection`, with later changes of metadata and configuration merged into it."""
    indexes: dict[str, Message] = field(default_factory=dict)
    """The `CreateFieldIndexCollection` of each payload index."""
    operations: int = 0
    shard: edge.EdgeShard = field(init=False)

    @classmethod
    def described(cls, root: Path, stored: Any) -> Collection:
        """Return, not opened, the collection that `description` told of."""
        return cls(
            root / stored["folder"],
            json_format.ParseDict(stored["created"], q.CreateCollection()),
            {
                key: json_format.ParseDict(index, q.CreateFieldIndexCollection())
                for key, index in stored["indexes"].items()
            },
        )

    def description(self) -> dict[str, Any]:
        """Return all but the points, as JSON."""
        return {
            "folder": self.folder.name,
            "created": json_format.MessageToDict(self.created),
            "indexes": {key: json_format.MessageToDict(each) for key, each in self.indexes.items()},
        }

    def open(self) -> None:
        """Open the shard, or create it."""
        if self.folder.exists():
            self.shard = edge.EdgeShard.load(str(self.folder))
            return
        config = self.created.vectors_config
        named = dict(config.params_map.map)
        if config.HasField("params"):
            named[""] = config.params
        dense = {
            name: edge.EdgeVectorParams(
                params.size,
                getattr(edge.Distance, q.Distance.Name(params.distance)),
                datatype=getattr(edge.VectorStorageDatatype, q.Datatype.Name(params.datatype))
                if params.datatype
                else None,
            )
            for name, params in named.items()
        }
        sparse = {
            name: edge.EdgeSparseVectorParams(modifier=edge.Modifier.Idf if params.modifier == q.Modifier.Idf else None)
            for name, params in self.created.sparse_vectors_config.map.items()
        }
        self.shard = edge.EdgeShard.create(str(self.folder), edge.EdgeConfig(vectors=dense, sparse_vectors=sparse))

    def filter(self, message: Message) -> edge.Filter:
        """Return a `Filter` as the engine's."""

        def conditions(messages: Iterable[Message]) -> list[Any] | None:
            return [self._condition(each) for each in messages] or None

        at_least = message.min_should
        return edge.Filter(
            must=conditions(message.must),
            should=conditions(message.should),
            must_not=conditions(message.must_not),
            min_should=edge.MinShould(conditions(at_least.conditions) or [], at_least.min_count)
            if message.HasField("min_should")
            else None,
        )

    def filter_of(self, request: Message, name: str = "filter") -> edge.Filter | None:
        """Return the filter in a request's field, if it is set."""
        return self.filter(getattr(request, name)) if request.HasField(name) else None

    def _condition(self, condition: Message) -> Any:
        kind = condition.WhichOneof("condition_one_of")
        if kind == "filter":
            return self.filter(condition.filter)
        if kind == "has_id":
            return edge.HasIdCondition({_id(point) for point in condition.has_id.has_id})
        if kind == "is_empty":
            return edge.IsEmptyCondition(condition.is_empty.key)
        if kind == "is_null":
            return edge.IsNullCondition(condition.is_null.key)
        if kind == "has_vector":
            return edge.HasVectorCondition(condition.has_vector.has_vector)
        if kind != "field":
            raise bad("Bad request: malformed condition: nothing is set")
        key, message = condition.field.key, condition.field
        if message.HasField("range"):
            bounds = {descriptor.name: value for descriptor, value in message.range.ListFields()}
            return edge.FieldCondition(key, range=edge.RangeFloat(**bounds))
        match message.match.WhichOneof("match_value"):
            case "boolean":
                return edge.HasIdCondition(self._where(key, message.match.boolean))
            case "keyword" | "integer" as which:
                match: Any = edge.MatchValue(getattr(message.match, which))
            case "keywords" | "except_keywords" as which:
                words = list(getattr(message.match, which).strings)
                match = edge.MatchAny(words) if which == "keywords" else edge.MatchExcept(words)
            case "integers" | "except_integers" as which:
                numbers = list(getattr(message.match, which).integers)
                match = edge.MatchAny(numbers) if which == "integers" else edge.MatchExcept(numbers)
            case _:
                raise bad(f'Bad request: malformed condition on "{key}": neither match nor range')
        return edge.FieldCondition(key, match=match)

    def _where(self, key: str, flag: bool) -> set[Any]:
        """Return the points whose `key` is `flag`, by reading all: this engine matches no boolean, silently."""
        everything = edge.ScrollRequest(limit=self.shard.info().points_count + 1, with_payload=[key])
        found = set()
        for record in self.shard.scroll(everything)[0]:
            value: Any = record.payload or {}
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if flag in [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, bool)]:
                found.add(record.id)
        return found

    def by(self, selector: Message, ids: Callable[..., Update], filtered: Callable[..., Update], *rest: Any) -> Update:
        """Return the operation on the points that a `PointsSelector` names."""
        if selector.HasField("filter"):
            return filtered(self.filter(selector.filter), *rest)
        if selector.HasField("points"):
            return ids([_id(point) for point in selector.points.ids], *rest)
        raise bad("Bad request: No points selector: neither ids nor a filter")

    def operation(self, kind: str, message: Message) -> Update:
        """Return a write as the engine's; the messages of single and batched writes share their fields."""
        op = edge.UpdateOperation
        if kind == "upsert":
            points = [
                edge.Point(_id(point.id), _vectors(point.vectors), grpc_to_payload(point.payload))
                for point in message.points
            ]
            mode = getattr(edge.UpdateMode, {0: "Upsert", 1: "InsertOnly", 2: "UpdateOnly"}[message.update_mode])
            return op.upsert_points(points, self.filter_of(message, "update_filter"), mode)
        if kind == "update_vectors":
            changed = [edge.PointVectors(_id(point.id), _vectors(point.vectors)) for point in message.points]
            return op.update_vectors(changed, self.filter_of(message, "update_filter"))
        if kind == "delete_points":
            return self.by(message.points, op.delete_points, op.delete_points_by_filter)
        if kind == "clear_payload":
            return self.by(message.points, op.clear_payload, op.clear_payload_by_filter)
        ids, filtered = getattr(op, kind), getattr(op, f"{kind}_by_filter")
        if kind == "delete_vectors":
            return self.by(message.points_selector, ids, filtered, list(message.vectors.names))
        if kind == "delete_payload":
            return self.by(message.points_selector, ids, filtered, list(message.keys))
        key = message.key if message.HasField("key") else None
        return self.by(message.points_selector, ids, filtered, grpc_to_payload(message.payload), key)


class Store:
    """What the calls do, one at a time: `points_scroll` is the RPC Scroll of the service Points."""

    def __init__(self, folder: Path, *, strict: bool) -> None:
        self._folder = folder
        self._strict = strict
        self._collections: dict[str, Collection] = {}
        self._aliases: dict[str, str] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "catalogue.json").exists():
            catalogue = json.loads((folder / "catalogue.json").read_bytes())
            self._aliases = catalogue["aliases"]
            for name, stored in catalogue["collections"].items():
                collection = self._collections[name] = Collection.described(folder, stored)
                collection.open()
        known = {collection.folder for collection in self._collections.values()}
        for leftover in set(folder.glob("collection-*")) - known:  # of a Create or Delete that was killed
            shutil.rmtree(leftover)

    def _save(self) -> None:
        catalogue = {
            "aliases": self._aliases,
            "collections": {name: collection.description() for name, collection in self._collections.items()},
        }
        fresh = self._folder / "catalogue.json.new"
        fresh.write_text(json.dumps(catalogue, indent=1), encoding="utf-8")
        fresh.replace(self._folder / "catalogue.json")

    def close(self) -> None:
        """Flush and let go of the shards."""
        for collection in self._collections.values():
            collection.shard.flush()
            collection.shard.close()

    def _collection(self, request: Message) -> Collection:
        name = request.collection_name
        found = self._collections.get(self._aliases.get(name, name))
        if found is None:
            raise Refusal(grpc.StatusCode.NOT_FOUND, f"Not found: Collection `{name}` doesn't exist!")
        return found

    def _check_indexes(self, collection: Collection, filtered: Message) -> None:
        if not self._strict:
            return
        for key, types in _fields(filtered):
            index = collection.indexes.get(key)
            if index is None or (types and FIELD_TYPES[index.field_type] not in types):
                wanted = ", ".join(sorted(each.lower() for each in types or FIELD_TYPES.values()))
                raise bad(
                    f'Bad request: Index required but not found for "{key}" of one of the following types: [{wanted}]. '
                    "Help: Create an index for this key or use a different filter."
                )

    # --- the server and its collections ----------------------------------------------------------------------

    def qdrant_health_check(self, _request: Message) -> Message:
        return q.HealthCheckReply(title="qdrant - stand-in for tests", version=VERSION)

    def collections_create(self, request: Message) -> Message:
        name = request.collection_name
        if name in self._collections:
            raise Refusal(grpc.StatusCode.ALREADY_EXISTS, f"Wrong input: Collection `{name}` already exists!")
        if name in self._aliases:
            raise bad(f"Wrong input: Can't create collection with name {name}. Alias with the same name already exists")
        folder = self._folder / f"collection-{time.time_ns()}"
        created = q.CreateCollection()
        created.CopyFrom(DEFAULTS)
        created.MergeFrom(request)
        collection = Collection(folder, created)
        collection.open()
        self._collections[name] = collection
        self._save()
        return q.CollectionOperationResponse(result=True)

    def collections_update(self, request: Message) -> Message:
        created = self._collection(request).created
        created.hnsw_config.MergeFrom(request.hnsw_config)
        created.optimizers_config.MergeFrom(request.optimizers_config)
        for key, value in request.metadata.items():
            if value.HasField("null_value"):
                created.metadata.pop(key, None)
            else:
                created.metadata[key].CopyFrom(value)
        self._save()
        return q.CollectionOperationResponse(result=True)

    def collections_delete(self, request: Message) -> Message:
        collection = self._collections.pop(request.collection_name, None)
        if collection is not None:
            self._aliases = {alias: to for alias, to in self._aliases.items() if to != request.collection_name}
            self._save()
            collection.shard.close()
            shutil.rmtree(collection.folder)
        return q.CollectionOperationResponse(result=collection is not None)

    def collections_list(self, _request: Message) -> Message:
        return q.ListCollectionsResponse(collections=[q.CollectionDescription(name=name) for name in self._collections])

    def collections_collection_exists(self, request: Message) -> Message:
        name = request.collection_name
        exists = self._aliases.get(name, name) in self._collections
        return q.CollectionExistsResponse(result=q.CollectionExists(exists=exists))

    def collections_get(self, request: Message) -> Message:
        collection = self._collection(request)
        created, info = collection.created, collection.shard.info()
        config = q.CollectionConfig()
        for part in (config, config.params):
            given = {descriptor.name: value for descriptor, value in created.ListFields()}
            part.MergeFrom(type(part)(**{name: given[name] for name in {*part.DESCRIPTOR.fields_by_name} & {*given}}))
        config.optimizer_config.CopyFrom(created.optimizers_config)
        schema = {}
        for key, index in collection.indexes.items():
            data_type = q.PayloadSchemaType.Value(FIELD_TYPES[index.field_type])
            points = info.payload_schema[key].points if key in info.payload_schema else 0
            schema[key] = q.PayloadSchemaInfo(data_type=data_type, points=points)
            if index.HasField("field_index_params"):
                schema[key].params.CopyFrom(index.field_index_params)
        return q.GetCollectionInfoResponse(
            result=q.CollectionInfo(
                status=q.CollectionStatus.Green,
                optimizer_status=q.OptimizerStatus(ok=True),
                segments_count=info.segments_count,
                config=config,
                payload_schema=schema,
                points_count=info.points_count,
                indexed_vectors_count=info.indexed_vectors_count,
            )
        )

    def collections_update_aliases(self, request: Message) -> Message:
        aliases = dict(self._aliases)
        for action in request.actions:
            if action.HasField("create_alias"):
                alias, name = action.create_alias.alias_name, action.create_alias.collection_name
                if name not in self._collections:
                    raise Refusal(grpc.StatusCode.NOT_FOUND, f"Not found: Collection `{name}` doesn't exist!")
                if alias in self._collections:
                    raise Refusal(grpc.StatusCode.ALREADY_EXISTS, f"Wrong input: Collection `{alias}` already exists!")
                aliases[alias] = name
            elif action.HasField("rename_alias"):
                old = action.rename_alias.old_alias_name
                if old not in aliases:
                    raise Refusal(grpc.StatusCode.NOT_FOUND, f"Not found: Alias {old} does not exists!")
                aliases[action.rename_alias.new_alias_name] = aliases.pop(old)
            else:
                aliases.pop(action.delete_alias.alias_name, None)
        self._aliases = aliases
        self._save()
        return q.CollectionOperationResponse(result=True)

    def collections_list_aliases(self, _request: Message) -> Message:
        return self._alias_list(self._aliases)

    def collections_list_collection_aliases(self, request: Message) -> Message:
        collection = self._collection(request)
        return self._alias_list(each for each, name in self._aliases.items() if self._collections[name] is collection)

    def _alias_list(self, names: Iterable[str]) -> Message:
        described = [q.AliasDescription(alias_name=each, collection_name=self._aliases[each]) for each in names]
        return q.ListAliasesResponse(aliases=described)

    # --- snapshots -------------------------------------------------------------------------------------------

    def take_snapshot(self, name: str, target: Path) -> None:
        """Write the collection as it is now, its configuration and metadata included, into the tar `target`."""
        collection = self._collection(q.GetCollectionInfoRequest(collection_name=name))
        collection.shard.flush()
        collection.shard.close()  # the engine's files are whole only at rest
        try:
            (collection.folder / "collection.json").write_text(json.dumps(collection.description()), encoding="utf-8")
            # Most of the files is holes, hundreds of megabytes of them, which Python's tarfile would write.
            tar = ["tar", "--create", "--sparse", "--format=gnu", "--file", str(target)]
            subprocess.run([*tar, "--directory", str(collection.folder), "."], check=True)
        finally:
            (collection.folder / "collection.json").unlink(missing_ok=True)
            collection.open()

    def recover_snapshot(self, name: str, source: Path) -> None:
        """Make the collection `name` what the tar `source` holds: a new one, or in place of what is there."""
        folder = self._folder / f"collection-{time.time_ns()}"
        try:
            with tarfile.open(source) as tar:
                tar.extractall(folder, filter="data")
            described = folder / "collection.json"
            collection = Collection.described(self._folder, {**json.loads(described.read_bytes()), "folder": folder})
            described.unlink()
        except (tarfile.TarError, OSError, ValueError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise bad(f"failed to read the snapshot: {error}") from error
        collection.created.collection_name = name
        replaced = self._collections.get(name)
        if replaced is not None and replaced.created.vectors_config != collection.created.vectors_config:
            shutil.rmtree(folder)
            raise bad("Wrong input: Snapshot is not compatible with existing collection")
        collection.open()
        self._collections[name] = collection
        self._save()
        if replaced is not None:
            replaced.shard.close()
            shutil.rmtree(replaced.folder)

    # --- writes ----------------------------------------------------------------------------------------------

    def write(self, kind: str, request: Message) -> Message:
        """Apply one of the writes that a batch may hold too."""
        return q.PointsOperationResponse(result=self._write(self._collection(request), kind, request))

    def _write(self, collection: Collection, kind: str, message: Message) -> Message:
        if "update_filter" in message.DESCRIPTOR.fields_by_name:
            self._check_indexes(collection, message.update_filter)
        else:
            selector = message.points if kind in ("delete_points", "clear_payload") else message.points_selector
            self._check_indexes(collection, selector.filter)
        collection.shard.update(collection.operation(kind, message))
        return self._done(collection)

    def _done(self, collection: Collection) -> Message:
        collection.operations += 1
        return q.UpdateResult(operation_id=collection.operations, status=q.UpdateStatus.Completed)

    def points_update_batch(self, request: Message) -> Message:
        collection = self._collection(request)
        results = []
        for operation in request.operations:
            kind = operation.WhichOneof("operation")
            if kind is None:
                raise bad("Bad request: operation is missing")
            results.append(self._write(collection, kind, getattr(operation, kind)))
        return q.UpdateBatchResponse(result=results)

    def points_create_field_index(self, request: Message) -> Message:
        collection = self._collection(request)
        if not request.HasField("field_type"):
            raise bad("Bad request: field_type is missing")
        schema: Any = getattr(edge.PayloadSchemaType, FIELD_TYPES[request.field_type])
        given = request.field_index_params.integer_index_params
        if request.field_index_params.HasField("integer_index_params"):  # the one whose options decide what works
            lookup, bounds = (getattr(given, name) if given.HasField(name) else True for name in ("lookup", "range"))
            schema = edge.IntegerIndexParams(lookup=lookup, range=bounds)
        collection.shard.update(edge.UpdateOperation.create_field_index(request.field_name, schema))
        collection.indexes[request.field_name] = request
        self._save()
        return q.PointsOperationResponse(result=self._done(collection))

    def points_delete_field_index(self, request: Message) -> Message:
        collection = self._collection(request)
        collection.shard.update(edge.UpdateOperation.delete_field_index(request.field_name))
        collection.indexes.pop(request.field_name, None)
        self._save()
        return q.PointsOperationResponse(result=self._done(collection))

    # --- reads -----------------------------------------------------------------------------------------------

    def points_get(self, request: Message) -> Message:
        ids: list[int | UUID | str] = [_id(point) for point in request.ids]
        shard = self._collection(request).shard
        records = shard.retrieve(ids, _with_payload(request, True), _with_vectors(request))
        return q.GetResponse(result=[_found(record, q.RetrievedPoint) for record in records])

    def points_count(self, request: Message) -> Message:
        collection = self._collection(request)
        self._check_indexes(collection, request.filter)
        exact = request.exact if request.HasField("exact") else True
        count = collection.shard.count(edge.CountRequest(exact, collection.filter_of(request)))
        return q.CountResponse(result=q.CountResult(count=count))

    def points_facet(self, request: Message) -> Message:
        collection = self._collection(request)
        self._check_indexes(collection, request.filter)
        if request.key not in collection.indexes:  # whatever the mode
            raise bad(f"Bad request: No appropriate index for faceting: `{request.key}`. Please create one.")
        limit = request.limit if request.HasField("limit") else 10
        found = collection.shard.facet(
            edge.FacetRequest(request.key, limit, request.exact, collection.filter_of(request))
        )
        return q.FacetResponse(
            hits=[
                q.FacetHit(
                    value=q.FacetValue(string_value=hit.value)
                    if isinstance(hit.value, str)
                    else q.FacetValue(integer_value=hit.value),
                    count=hit.count,
                )
                for hit in found.hits
            ]
        )

    def points_scroll(self, request: Message) -> Message:
        collection = self._collection(request)
        self._check_indexes(collection, request.filter)
        order_by = None
        if request.HasField("order_by"):
            if request.HasField("offset"):
                raise bad(
                    "Wrong input: Cannot use an `offset` when using `order_by`. The alternative for paging is to use "
                    "`order_by.start_from` and a filter to exclude the IDs that you've already seen for the "
                    "`order_by.start_from` value"
                )
            given = request.order_by
            start = given.start_from.WhichOneof("value")
            order_by = edge.OrderBy(
                given.key,
                edge.Direction.Desc if given.direction == q.Direction.Desc else edge.Direction.Asc,
                getattr(given.start_from, start) if start else None,
            )
        records, following = collection.shard.scroll(
            edge.ScrollRequest(
                _id(request.offset) if request.HasField("offset") else None,
                _limit(request),
                collection.filter_of(request),
                _with_payload(request, True),
                _with_vectors(request),
                order_by,
            )
        )
        answer = q.ScrollResponse(result=[_found(record, q.RetrievedPoint) for record in records])
        if following is not None:
            answer.next_page_offset.CopyFrom(_point_id(following))
        return answer

    def points_query(self, request: Message) -> Message:
        return q.QueryResponse(result=self._query(self._collection(request), [request])[0].result)

    def points_query_batch(self, request: Message) -> Message:
        collection = self._collection(request)
        for each in request.query_points:
            if each.collection_name != request.collection_name:
                raise bad("Bad request: a batched query names another collection than its batch")
        return q.QueryBatchResponse(result=self._query(collection, request.query_points))

    def _query(self, collection: Collection, requests: Iterable[Message]) -> list[Message]:
        queries = []
        for request in requests:
            given = request.params
            for filtered in (request.filter, given.idf.corpus):
                self._check_indexes(collection, filtered)
            nearest = (
                edge.Query.Nearest(_vector(request.query.nearest), request.using or None)
                if request.HasField("query")
                else None
            )
            corpus = collection.filter_of(given.idf, "corpus") if given.HasField("idf") else None
            queries.append(
                edge.QueryRequest(
                    _limit(request),
                    request.offset,
                    nearest,
                    with_vector=_with_vectors(request),
                    with_payload=_with_payload(request, False),
                    filter=collection.filter_of(request),
                    score_threshold=request.score_threshold if request.HasField("score_threshold") else None,
                    params=edge.SearchParams(exact=given.exact, idf=edge.IdfParams(corpus) if corpus else None),
                )
            )
        return [
            q.BatchResult(result=[_found(hit, q.ScoredPoint, score=hit.score, version=hit.version) for hit in hits])
            for hits in collection.shard.query_batch(edge.QueryBatchRequest(queries))
        ]


def _limit(request: Message) -> int:
    if not request.HasField("limit"):
        return 10
    if request.limit < 1:
        raise bad("Validation error in body: [limit: value 0 invalid, must be 1 or larger]")
    return int(request.limit)


# --- the process ----------------------------------------------------------------------------------------------------


WRITES: Final = {
    "points_upsert": "upsert",
    "points_delete": "delete_points",
    "points_update_vectors": "update_vectors",
    "points_delete_vectors": "delete_vectors",
    "points_set_payload": "set_payload",
    "points_overwrite_payload": "overwrite_payload",
    "points_delete_payload": "delete_payload",
    "points_clear_payload": "clear_payload",
}
OTHER_WRITES: Final = frozenset(
    {
        *("collections_create", "collections_update", "collections_delete", "collections_update_aliases"),
        *("points_update_batch", "points_create_field_index", "points_delete_field_index"),
    }
)


class Faults:
    """What tests switch while the server runs, and what they count."""

    refuse_writes = False
    slow_ms = 0.0

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        """Calls by RPC, refused ones too."""


class Service:
    """One gRPC service; an RPC that the store has no method for answers UNIMPLEMENTED."""

    def __init__(self, name: str, store: Store, faults: Faults, thread: ThreadPoolExecutor) -> None:
        self._name = name
        self._store = store
        self._faults = faults
        self._thread = thread

    def __getattr__(self, rpc: str) -> Callable[[Message, Any], Any]:
        """Return what serves the RPC of that name."""
        snake = re.sub(r"(?<!^)(?=[A-Z])", "_", f"{self._name}{rpc}").lower()
        write = WRITES.get(snake)
        call: Any = partial(self._store.write, write) if write else getattr(self._store, snake, None)
        refusable = write is not None or snake in OTHER_WRITES

        async def serve(request: Message, context: Any) -> Message:
            self._faults.calls[f"{self._name}.{rpc}"] += 1
            began = time.perf_counter()
            if call is None:
                await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"the stand-in does not serve {self._name}.{rpc}")
            if self._faults.slow_ms:
                await asyncio.sleep(self._faults.slow_ms / 1000)
            if refusable and self._faults.refuse_writes:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "writes are refused for a test")
            try:
                check_served(request)
                answer = await asyncio.get_running_loop().run_in_executor(self._thread, call, request)
            except Refusal as refusal:
                await context.abort(refusal.code, str(refusal))
            except Exception as error:  # noqa: BLE001  # whatever it is must reach the client
                code, prefix = grpc.StatusCode.INTERNAL, "Service internal error"
                if type(error) is Exception:  # the engine's only type
                    code, prefix = grpc.StatusCode.INVALID_ARGUMENT, "Wrong input"
                    if str(error).startswith("No point with id"):
                        code, prefix = grpc.StatusCode.NOT_FOUND, "Not found"
                await context.abort(code, f"{prefix}: {error}")
            if hasattr(answer, "time"):
                answer.time = time.perf_counter() - began
            return answer

        return serve


class Snapshots:
    """The REST routes of a collection's snapshots, and of what a server says of its cluster."""

    def __init__(self, folder: Path, store: Store, thread: ThreadPoolExecutor) -> None:
        self._folder = folder
        self._store = store
        self._thread = thread
        folder.mkdir(parents=True, exist_ok=True)

    def app(self) -> web.Application:
        """Return the application."""
        app = web.Application(middlewares=[_answering])
        one = "/collections/{collection}/snapshots/{snapshot}"
        app.router.add_get("/cluster", self.cluster)
        app.router.add_post("/collections/{collection}/snapshots", self.take)
        app.router.add_post("/collections/{collection}/snapshots/upload", self.upload)
        app.router.add_get(one, self.download)
        app.router.add_delete(one, self.delete)
        return app

    async def cluster(self, _request: web.Request) -> web.Response:
        return _result({"status": "disabled"})

    async def take(self, request: web.Request) -> web.Response:
        collection = request.match_info["collection"]
        target = self._folder / f"{collection}-{time.time_ns()}.snapshot"
        await asyncio.get_running_loop().run_in_executor(self._thread, self._store.take_snapshot, collection, target)
        data = target.read_bytes()
        created = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
        described = {"name": target.name, "creation_time": created, "size": len(data)}
        return _result({**described, "checksum": sha256(data).hexdigest()})

    async def download(self, request: web.Request) -> web.StreamResponse:
        return web.FileResponse(self._there(request))

    async def delete(self, request: web.Request) -> web.Response:
        self._there(request).unlink()
        return _result(True)

    async def upload(self, request: web.Request) -> web.Response:
        if unknown := request.query.keys() - {"wait", "priority", "checksum"}:
            raise bad(f"the stand-in does not serve the parameters {sorted(unknown)}")
        if request.query.get("priority", "replica") not in ("replica", "snapshot", "no_sync"):
            raise bad("unknown variant of priority")
        part = await (await request.multipart()).next()
        if not isinstance(part, BodyPartReader) or part.name != "snapshot":
            raise bad("Multipart error: the field `snapshot` is missing")
        source = self._folder / f"upload-{time.time_ns()}"
        try:
            with source.open("wb") as out:
                while chunk := await part.read_chunk():
                    out.write(chunk)
            given, found = request.query.get("checksum"), sha256(source.read_bytes()).hexdigest()
            if given is not None and given != found:
                raise bad(f"Snapshot checksum mismatch: expected {given}, got {found}")
            await asyncio.get_running_loop().run_in_executor(
                self._thread, self._store.recover_snapshot, request.match_info["collection"], source
            )
        finally:
            source.unlink()
        return _result(True)

    def _there(self, request: web.Request) -> Path:
        name = request.match_info["snapshot"]
        found = [path for path in self._folder.iterdir() if path.name == name]
        if not found:
            raise Refusal(grpc.StatusCode.NOT_FOUND, f"Not found: Snapshot {name} not found")
        return found[0]


def _result(result: object) -> web.Response:
    return web.json_response({"result": result, "status": "ok", "time": 0.0})


@web.middleware
async def _answering(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except Refusal as refusal:
        status = 404 if refusal.code is grpc.StatusCode.NOT_FOUND else 400
        return web.json_response({"status": {"error": str(refusal)}, "time": 0.0}, status=status)


async def serve(folder: Path, port: int, *, rest: int | None, strict: bool) -> None:
    """Serve until SIGTERM, or until a piped stdin ends."""
    loop = asyncio.get_running_loop()
    # One thread: the engine's calls hold the interpreter anyway, and each call sees and leaves whole states.
    thread = ThreadPoolExecutor(1, "engine")
    store = await loop.run_in_executor(thread, lambda: Store(folder, strict=strict))
    faults = Faults()
    server = grpc.aio.server(
        options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", MAX_MESSAGE)],
    )
    q.add_QdrantServicer_to_server(Service("Qdrant", store, faults, thread), server)  # type: ignore[no-untyped-call]  # generated
    q.add_CollectionsServicer_to_server(Service("Collections", store, faults, thread), server)  # type: ignore[no-untyped-call]  # generated
    q.add_PointsServicer_to_server(Service("Points", store, faults, thread), server)  # type: ignore[no-untyped-call]  # generated
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    runner = web.AppRunner(Snapshots(folder / "snapshots", store, thread).app())
    await runner.setup()
    if rest is not None:
        await web.TCPSite(runner, "127.0.0.1", rest).start()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    threading.Thread(target=_listen, args=(faults, loop, stopped), daemon=True).start()
    print(f"ready on 127.0.0.1:{port}", flush=True)  # noqa: T201  # what the parent waits for
    await stopped.wait()
    await runner.cleanup()
    await server.stop(grace=5)
    await loop.run_in_executor(thread, store.close)


def _listen(faults: Faults, loop: asyncio.AbstractEventLoop, stopped: asyncio.Event) -> None:
    for line in sys.stdin:
        for name, value in json.loads(line).items():
            setattr(faults, name, value)
        print(json.dumps(faults.calls), flush=True)  # noqa: T201  # the answer
    if stat.S_ISFIFO(os.fstat(0).st_mode):
        loop.call_soon_threadsafe(stopped.set)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


class QdrantServer:
    """The server as a child process with a folder and a port that survive its restarts; `with` starts and stops it."""

    def __init__(self, folder: Path, *, strict: bool = False) -> None:
        self.folder = folder
        self.strict = strict
        self.grpc_port, rest = _free_ports(2)
        self.url = f"http://127.0.0.1:{rest}"
        """Where snapshots are served, and nothing else of REST."""
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start and wait until it answers; raises with the log if it does not come up."""
        rest = self.url.rpartition(":")[2]
        arguments = [str(self.folder), str(self.grpc_port), "--rest", rest, *(["--strict"] if self.strict else [])]
        log = self.folder.parent / f"{self.folder.name}.log"
        with log.open("a", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                [sys.executable, __file__, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        if not self._line().startswith("ready"):
            self.kill()
            raise RuntimeError(f"the Qdrant stand-in did not start:\n{log.read_text(encoding='utf-8')[-4000:]}")

    @property
    def pid(self) -> int:
        """The process id of the server."""
        assert self._process is not None
        return self._process.pid

    def stop(self) -> None:
        """Send SIGTERM and wait for the end."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL, and reap."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Kill it, if it runs, and start it on the same folder and port."""
        self.kill()
        self.start()

    def refuse_writes(self, on: bool) -> None:
        """Answer UNAVAILABLE to every write from now on, or no longer; a restart forgets it."""
        self._control(refuse_writes=on)

    def slow(self, milliseconds: float) -> None:
        """Wait so long before each answer from now on; a restart forgets it."""
        self._control(slow_ms=milliseconds)

    def calls(self) -> dict[str, int]:
        """Return the calls by RPC since the start, refused ones too."""
        return self._control()

    def _control(self, **switches: float) -> dict[str, int]:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(switches) + "\n")
        self._process.stdin.flush()
        calls: dict[str, int] = json.loads(self._line())
        return calls

    def _line(self) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def _end(self, number: int) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(number)
            process.wait(timeout=60)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Qdrant's engine behind Qdrant's gRPC API, for tests")
    parser.add_argument("folder", type=Path)
    parser.add_argument("port", type=int)
    parser.add_argument("--rest", type=int, help="the port of the REST routes")
    parser.add_argument("--strict", action="store_true", help="a filter on a key without an index is refused")
    options = parser.parse_args()
    asyncio.run(serve(options.folder, options.port, rest=options.rest, strict=options.strict))
