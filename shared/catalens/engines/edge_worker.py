"""The embedded index's own process: it owns the Qdrant Edge shard, because every call of that engine holds the GIL.

Run by `EdgeIndex` as a script, so that it imports nothing of Catalens and stays small and quick to start. It speaks
length-prefixed pickles over an inherited socket pair, one call at a time: what a write reads, compares and writes
is atomic. End of file on the socket means that the parent is gone, and ends this process too.

What a point's payload holds is written in `rules.py`. Only live points have vectors, so that no search finds another
and no tombstone weighs on BM25's idf.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import pickle
import select
import shutil
import signal
import socket
import struct
import sys
import time
from array import array
from bisect import bisect_left, bisect_right, insort
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from uuid import UUID, uuid5

import qdrant_edge as edge

if TYPE_CHECKING:
    from catalens.engines import rules
    from catalens.engines.rules import Draft, Outcome, Payload, Rule
else:
    # By its path: what the file beside this one is called, without the package around it.
    _spec = importlib.util.spec_from_file_location("rules", Path(__file__).with_name("rules.py"))
    rules = sys.modules["rules"] = importlib.util.module_from_spec(_spec)  # dataclasses look their module up there
    _spec.loader.exec_module(rules)
    Draft = rules.Draft

FORMAT: Final = 1
"""Version of the folder's layout; a release that changes it upgrades the folder or says what to do."""
LENGTH: Final = struct.Struct("<Q")
FLUSH_EVERY: Final = 5.0
"""Seconds that a write may wait for its fsync; kill -9 costs nothing, power loss at most this."""
DISK_RESERVE: Final = 128 * 1024 * 1024
"""Free bytes below which writes are refused: the engine maps its files, and a full disk would kill it by SIGBUS."""
LOCK_PATIENCE: Final = 3.0
"""Seconds to wait for the folder: the child of a killed process needs a moment to see its end."""
MAX_NUMBER_INDEXES: Final = 64
"""Numeric attributes that get an index of their own; what is asked beyond is scanned."""
MAX_FACET_INDEXES: Final = 64
"""Fields whose values can be counted."""
MAX_FACET_KEYS: Final = 1000
"""Fields of which it is remembered that some product has them: no index is made for what nobody has."""
MARKER: Final = UUID(int=0)
"""The point that counts write batches; compared at start with the count that was acknowledged."""

# An index costs an fsync to create and work at every write, so each is created when it is first asked for. That is
# sound because no HNSW graph, which would have to know it from the start, is ever built here.
_INDEXES: Final[Mapping[str, edge.PayloadSchemaType]] = {
    "terms": edge.PayloadSchemaType.Keyword,
    "tenant": edge.PayloadSchemaType.Keyword,
    "state": edge.PayloadSchemaType.Keyword,
    "blobs": edge.PayloadSchemaType.Keyword,
    "image_status": edge.PayloadSchemaType.Keyword,
    "in_stock": edge.PayloadSchemaType.Integer,
    "offer.price": edge.PayloadSchemaType.Float,
    "offer.stock": edge.PayloadSchemaType.Integer,
    "offer.currency": edge.PayloadSchemaType.Keyword,
}

Plain: TypeAlias = tuple[list[list[tuple[Any, ...]]], list[tuple[Any, ...]]]
"""A filter: AND of ORs of primitives, and primitives of which none may match (see `EdgeIndex`)."""


class Refusal(Exception):
    """An answer other than a value; `kind` names the error that the parent raises."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Entry:
    """What is kept in memory of every point."""

    tenant: str
    product_id: str
    state: str
    pending: bool
    indexed_at: float


@dataclass(slots=True)
class TenantView:
    """One tenant's points, kept in order and counted."""

    live: list[str] = field(default_factory=list)
    """Product ids of live products, ascending by code point."""
    states: Counter[str] = field(default_factory=Counter)
    pending: int = 0


class Directory:
    """Who is stored, in memory: paging in id order, counts and point id → product id without asking the engine."""

    def __init__(self, entries: Iterable[tuple[UUID, Entry]]) -> None:
        self.entries: dict[UUID, Entry] = {}
        self.tenants: defaultdict[str, TenantView] = defaultdict(TenantView)
        for point, entry in entries:
            self.entries[point] = entry
            self._count(entry, 1)
            if entry.state == "live":
                self.tenants[entry.tenant].live.append(entry.product_id)
        for view in self.tenants.values():
            view.live.sort()

    def put(self, point: UUID, entry: Entry) -> None:
        """Remember the newest entry of `point`."""
        self.drop(point)
        self.entries[point] = entry
        self._count(entry, 1)
        if entry.state == "live":
            insort(self.tenants[entry.tenant].live, entry.product_id)

    def drop(self, point: UUID) -> None:
        """Forget `point`, if it is known."""
        entry = self.entries.pop(point, None)
        if entry is None:
            return
        self._count(entry, -1)
        if entry.state == "live":
            live = self.tenants[entry.tenant].live
            del live[bisect_left(live, entry.product_id)]

    def _count(self, entry: Entry, step: int) -> None:
        view = self.tenants[entry.tenant]
        view.states[entry.state] += step
        view.pending += step * entry.pending


class Store:
    """The shard and what the calls do with it."""

    def __init__(self, folder: Path, spec: Mapping[str, Any], namespace: bytes) -> None:
        self._folder = folder
        self._namespace = UUID(bytes=namespace)
        self._lock = _lock(folder)
        _check_meta(folder / "meta.json", spec)
        self._shard = _open_shard(folder / "shard", int(spec["dimension"]))
        self._indexed = set(self._shard.info().payload_schema)
        self._numbers: set[str] = set()
        self._facets: set[str] | None = set()
        """The fields that can be counted; None if products are stored here without them, by an earlier release."""
        self._sequence = 0
        self.directory = Directory(self._scan())
        self._acknowledged = os.open(folder / "acknowledged", os.O_RDWR | os.O_CREAT, 0o644)
        acknowledged = int.from_bytes(os.pread(self._acknowledged, 8, 0), "little")
        self.lost_batches = max(0, acknowledged - self._sequence)
        self.dirty_since: float | None = None

    # --- writes: each call is one batch, one entry of the engine's write-ahead log --------------------------

    def upsert(self, items: Sequence[Mapping[str, Any]]) -> list[Outcome]:
        """Apply contents, and the offers that they carry, in order."""
        return self._write(items, rules.put_content)

    def update_images(self, items: Sequence[Mapping[str, Any]]) -> list[Outcome]:
        """Apply pictures that arrived."""
        return self._write(items, rules.put_image)

    def update_offers(self, items: Sequence[Mapping[str, Any]]) -> list[Outcome]:
        """Merge offers."""
        return self._write(items, rules.put_offer)

    def delete(self, items: Sequence[Mapping[str, Any]]) -> list[Outcome]:
        """Leave tombstones."""
        return self._write(items, rules.put_tombstone)

    def _write(self, items: Sequence[Mapping[str, Any]], rule: Rule) -> list[Outcome]:
        disk = os.statvfs(self._folder)
        if disk.f_bavail * disk.f_frsize < DISK_RESERVE:
            raise Refusal("full", f"less than {DISK_RESERVE >> 20} MiB are free for the index in {self._folder}")
        now = time.time()
        drafts = self._drafts(items)
        outcomes = [rules.apply(rule, drafts[UUID(bytes=item["point"])], item, now) for item in items]
        changed = {point: draft for point, draft in drafts.items() if draft.changed}
        if changed:
            self._commit(changed)
        return outcomes

    def _drafts(self, items: Sequence[Mapping[str, Any]]) -> dict[UUID, Draft]:
        drafts = {UUID(bytes=item["point"]): Draft(rules.absent(item)) for item in items}
        for record in self._shard.retrieve(list(drafts), True, False):
            drafts[_uuid(record.id)].payload = record.payload or {}
        return drafts

    def _commit(self, changed: Mapping[UUID, Draft]) -> None:
        """Write the batch as one operation, then acknowledge it; a failure in between ends the process."""
        kept = [point for point, draft in changed.items() if draft.keeps]
        stored: dict[UUID, Any] = {_uuid(r.id): r.vector for r in self._shard.retrieve(list(kept), False, True)}
        points = [
            edge.Point(point, {**(stored.get(point) or {}), **_vectors(draft)}, draft.payload)
            for point, draft in changed.items()
        ]
        self._sequence += 1
        marker: Payload = {"sequence": self._sequence}
        if self._facets is not None:
            for draft in changed.values():
                new = draft.payload.get("facets", {}).keys() - self._facets
                self._facets.update(sorted(new)[: MAX_FACET_KEYS - len(self._facets)])
            marker["facet_keys"] = sorted(self._facets)
        points.append(edge.Point(MARKER, {}, marker))
        self._shard.update(edge.UpdateOperation.upsert_points(points))
        os.pwrite(self._acknowledged, self._sequence.to_bytes(8, "little"), 0)
        for point, draft in changed.items():
            self.directory.put(point, _entry(draft.payload))
            self._numbers.update(draft.payload.get("numbers", ()))
        if self.dirty_since is None:
            self.dirty_since = time.monotonic()

    def collect_tombstones(self, older_than: float) -> int:
        """Forget old tombstones, and the offers that they kept."""
        old = [
            point
            for point, entry in self.directory.entries.items()
            if entry.state == "deleted" and entry.indexed_at < older_than
        ]
        if old:
            self._shard.update(edge.UpdateOperation.delete_points(list(old)))
            for point in old:
                self.directory.drop(point)
            if self.dirty_since is None:
                self.dirty_since = time.monotonic()
        return len(old)

    # --- reads ----------------------------------------------------------------------------------------------

    def search(self, tenant: str, legs: Sequence[tuple[str, Any, int]], where: Plain) -> list[list[tuple[str, float]]]:
        """Return (product id, score) lists, one a leg."""
        only = self._only(tenant)
        condition = self._filter(where, only)
        corpus = edge.SearchParams(idf=edge.IdfParams(edge.Filter(must=list(only)))) if only else None
        requests = [
            edge.QueryRequest(
                query=edge.Query.Nearest(_sparse(vector) if using == "lexical" else _dense(vector), using=using),
                filter=condition,
                limit=limit,
                params=corpus if using == "lexical" else None,
                with_payload=False,
            )
            for using, vector, limit in legs
        ]
        entries = self.directory.entries
        answers = self._shard.query_batch(edge.QueryBatchRequest(requests))
        return [[(entries[_uuid(hit.id)].product_id, hit.score) for hit in hits] for hits in answers]

    def get(self, points: Sequence[bytes], with_vectors: bool) -> list[Payload]:
        """Return the live ones among `points`: payloads, vectors as bytes under "vectors"."""
        ids = [UUID(bytes=point) for point in points]
        return self._live(ids, with_vectors=with_vectors)

    def facts(self, points: Sequence[bytes]) -> list[Payload]:
        """Return what a ranking needs to know of the live ones among `points`."""
        return self._live([UUID(bytes=point) for point in points], payload=["product_id", "version", "offer", "doc"])

    def sample(self, tenant: str, limit: int) -> list[Payload]:
        """Return the live ones with the lowest point ids, with their vectors."""
        request = edge.ScrollRequest(
            limit=limit, filter=self._living(tenant, ([], [])), with_payload=True, with_vector=["image", "text"]
        )
        return [_with_vectors(record, with_vectors=True) for record in self._shard.scroll(request)[0]]

    def count(self, tenant: str, wheres: Sequence[Plain]) -> list[int]:
        """Return how many live points there are under each filter."""
        return [self._count(tenant, where) for where in wheres]

    def _count(self, tenant: str, where: Plain) -> int:
        if where == ([], []):
            return self.directory.tenants[tenant].states["live"] if tenant in self.directory.tenants else 0
        return int(self._shard.count(edge.CountRequest(exact=True, filter=self._living(tenant, where))))

    def facet(
        self, tenant: str, wheres: Sequence[Plain], asked: Sequence[tuple[str, int]], limit: int
    ) -> list[list[tuple[Any, int]]]:
        """Return, per payload key, its most frequent values under the filter of that number, and how many have each."""
        # Only live products have what is under `facets`; offers and flags are kept of deleted ones too.
        live = [self._filter(where, self._only(tenant)) for where in wheres]
        living = [self._living(tenant, where) for where in wheres]
        return [
            self._counted(key, live[number] if key.startswith("facets.") else living[number], limit)
            for key, number in asked
        ]

    def _counted(self, key: str, condition: edge.Filter | None, limit: int) -> list[tuple[Any, int]]:
        name = key.removeprefix("facets.")
        if name != key:
            if self._facets is None:
                raise Refusal("facet", f"this index was made before values could be counted: {WAY_OUT}")
            if name not in self._facets:
                return []
            indexed = sum(each.startswith("facets.") for each in self._indexed)
            if key not in self._indexed and indexed >= MAX_FACET_INDEXES:
                raise Refusal("facet", f"{MAX_FACET_INDEXES} other fields are counted already, and that is the most")
        self._index(key)
        hits = self._shard.facet(edge.FacetRequest(key, limit=limit, filter=condition)).hits
        return [(hit.value, hit.count) for hit in hits]

    def extremes(self, tenant: str, key: str, where: Plain) -> tuple[float, float] | None:
        """Return the smallest and the largest number of `key` under the filter."""
        self._index(key)
        ends = []
        for direction in (edge.Direction.Asc, edge.Direction.Desc):
            order = edge.OrderBy(key, direction)
            request = edge.ScrollRequest(
                limit=1, filter=self._living(tenant, where), with_payload=["offer"], order_by=order
            )
            ends += [(record.payload or {})["offer"] for record in self._shard.scroll(request)[0]]
        name = key.removeprefix("offer.")
        return (float(ends[0][name]), float(ends[1][name])) if ends else None

    def page(self, tenant: str, after: str | None, limit: int, where: Plain) -> list[Payload]:
        """Return live payloads in id order."""
        live = self.directory.tenants[tenant].live if tenant in self.directory.tenants else []
        start = bisect_right(live, after) if after is not None else 0
        if where == ([], []):
            names = live[start : start + limit]
        else:
            # Nearby first, which is enough for a filter that matches much; then everything that matches.
            span = live[start : start + max(4 * limit, 256)]
            names = self._matching(where, [edge.HasIdCondition({self._point(tenant, name) for name in span})])
            if len(names) < limit and start + len(span) < len(live):
                names = [name for name in self._matching(where, self._only(tenant)) if after is None or name > after]
            del names[limit:]
        return self._live([self._point(tenant, name) for name in names], with_vectors=False)

    def _matching(self, where: Plain, base: Sequence[Any]) -> list[str]:
        """Return the product ids of the live points under `where` and `base`, ascending."""
        entries = self.directory.entries
        request = edge.ScrollRequest(limit=len(entries) + 1, filter=self._filter(where, base), with_payload=False)
        found = (entries.get(_uuid(record.id)) for record in self._shard.scroll(request)[0])  # the marker has none
        return sorted(entry.product_id for entry in found if entry is not None and entry.state == "live")

    def counts(self, tenant: str) -> tuple[int, int, int, int]:
        """Return live, with a picture pending, deleted, lone offers."""
        view = self.directory.tenants[tenant] if tenant in self.directory.tenants else TenantView()
        return view.states["live"], view.pending, view.states["deleted"], view.states["offer"]

    def blobs_in_use(self, tenant: str | None, references: Sequence[str]) -> list[str]:
        """Return the references that some live product names."""
        wanted = set(references)
        must: list[Any] = [self._condition("blobs", match=edge.MatchAny(sorted(wanted)))]
        if tenant is not None:
            must.append(self._condition("tenant", match=edge.MatchAny([tenant])))
        used: set[str] = set()
        offset: Any = None
        while True:
            request = edge.ScrollRequest(
                offset=offset, limit=1000, filter=edge.Filter(must=must), with_payload=["blobs"]
            )
            records, offset = self._shard.scroll(request)
            for record in records:
                used.update(wanted.intersection((record.payload or {}).get("blobs", ())))
            if offset is None or used == wanted:
                return sorted(used)

    def export(self, after: bytes | None, limit: int, with_vectors: bool) -> list[Payload]:
        """Return payloads of every kind in point id order; vectors as in `get`."""
        first = int.from_bytes(after, "big") + 1 if after is not None else MARKER.int + 1
        if first >> 128 or limit < 1:
            return []
        wanted = ["image", "text"] if with_vectors else False
        request = edge.ScrollRequest(offset=UUID(int=first), limit=limit, with_payload=True, with_vector=wanted)
        return [_with_vectors(record, with_vectors) for record in self._shard.scroll(request)[0]]

    def flush(self) -> None:
        """Write everything through to the disk."""
        self._shard.flush()
        os.fsync(self._acknowledged)
        self.dirty_since = None

    def close(self) -> None:
        """Flush and let go of the folder."""
        self.flush()
        self._shard.close()

    # --- inside ---------------------------------------------------------------------------------------------

    def _live(
        self, ids: Sequence[UUID], *, with_vectors: bool = False, payload: bool | list[str] = True
    ) -> list[Payload]:
        entries = self.directory.entries
        live = [point for point in ids if point in entries and entries[point].state == "live"]
        found: dict[UUID, Payload] = {}
        wanted = ["image", "text"] if with_vectors else False
        for record in self._shard.retrieve(list(live), payload, wanted) if live else ():
            found[_uuid(record.id)] = _with_vectors(record, with_vectors)
        return [found[point] for point in live]

    def _point(self, tenant: str, product_id: str) -> UUID:
        return uuid5(self._namespace, f"{tenant}|{product_id}")

    def _only(self, tenant: str) -> list[Any]:
        """Return the condition that keeps tenants apart; none is needed, nor paid for, while there is but one."""
        others = any(name != tenant and view.live for name, view in self.directory.tenants.items())
        return [self._condition("tenant", match=edge.MatchAny([tenant]))] if others else []

    def _living(self, tenant: str, where: Plain) -> edge.Filter:
        live = self._condition("state", match=edge.MatchAny(["live"]))
        return self._filter(where, [*self._only(tenant), live]) or edge.Filter()

    def _filter(self, where: Plain, base: Sequence[Any]) -> edge.Filter | None:
        clauses, none_of = where
        any_of = [edge.Filter(should=[self._primitive(*primitive) for primitive in clause]) for clause in clauses]
        must: list[Any] = [*base, *any_of]
        must_not = [self._primitive(*primitive) for primitive in none_of]
        return edge.Filter(must=must or None, must_not=must_not or None) if must or must_not else None

    def _primitive(self, kind: str, key: str, value: Any) -> Any:
        if kind == "points":
            return edge.HasIdCondition({UUID(bytes=point) for point in value})
        if kind == "any":
            return self._condition(key, match=edge.MatchAny(value))
        gte, gt, lte, lt = value
        return self._condition(key, bounds=edge.RangeFloat(gte=gte, gt=gt, lte=lte, lt=lt))

    def _condition(self, key: str, match: Any = None, bounds: Any = None) -> Any:
        """Return a condition on `key`, which has an index from now on if any product can have the key."""
        if key in _INDEXES or self._deserves_index(key):
            self._index(key)
        return edge.FieldCondition(key, match=match, range=bounds)

    def _index(self, key: str) -> None:
        if key not in self._indexed:
            other = edge.PayloadSchemaType.Keyword if key.startswith("facets.") else edge.PayloadSchemaType.Float
            self._shard.update(edge.UpdateOperation.create_field_index(key, _INDEXES.get(key, other)))
            self._indexed.add(key)

    def _deserves_index(self, key: str) -> bool:
        known = key.removeprefix("numbers.") in self._numbers
        return known and sum(name.startswith("numbers.") for name in self._indexed) < MAX_NUMBER_INDEXES

    def _scan(self) -> Iterable[tuple[UUID, Entry]]:
        fields = ["tenant", "product_id", "state", "image_status", "indexed_at", "numbers", "sequence", "facet_keys"]
        offset: Any = None
        while True:
            records, offset = self._shard.scroll(
                edge.ScrollRequest(offset=offset, limit=5000, with_payload=fields, with_vector=False)
            )
            for record in records:
                payload = record.payload or {}
                if _uuid(record.id) == MARKER:
                    self._sequence = int(payload["sequence"])
                    self._facets = set(payload["facet_keys"]) if "facet_keys" in payload else None
                else:
                    self._numbers.update(payload.get("numbers", ()))
                    yield _uuid(record.id), _entry(payload)
            if offset is None:
                return


# --- from and to the engine's own types ----------------------------------------------------------------------------


def _with_vectors(record: edge.Record, with_vectors: bool) -> Payload:
    payload = record.payload or {}
    if with_vectors:
        vectors: Any = record.vector or {}
        payload["vectors"] = {name: array("f", values).tobytes() for name, values in vectors.items()}
    return payload


def _entry(payload: Payload) -> Entry:
    return Entry(
        sys.intern(payload["tenant"]),
        payload["product_id"],
        sys.intern(payload["state"]),
        payload.get("image_status") == "pending",
        payload["indexed_at"],
    )


def _vectors(draft: Draft) -> dict[str, Any]:
    return {name: _sparse(data) if name == "lexical" else _dense(data) for name, data in draft.vectors.items()}


def _dense(data: bytes) -> list[float]:
    return array("f", data).tolist()  # the engine takes lists faster than arrays


def _sparse(data: tuple[bytes, bytes]) -> edge.SparseVector:
    return edge.SparseVector(indices=array("I", data[0]).tolist(), values=array("f", data[1]).tolist())


def _uuid(point: Any) -> UUID:
    if isinstance(point, UUID):
        return point
    raise TypeError(f"a point id of Catalens is a UUID, not {point!r}")


# --- the folder -------------------------------------------------------------------------------------------------


def _lock(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise Refusal(
                    "config",
                    f"the index in {folder} is open in another process: stop that one, or set CATALENS_DATA_DIR",
                ) from None
            time.sleep(0.05)
        else:
            return handle


WAY_OUT: Final = "make a new one of the event log by `catalens reindex --rebuild`"


def _check_meta(path: Path, spec: Mapping[str, Any]) -> None:
    if not path.exists():
        partial = path.with_suffix(".tmp")
        partial.write_text(json.dumps({"format": FORMAT, "model": dict(spec)}, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
        return
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        version, model = meta["format"], meta["model"]
        fingerprint, name = model["fingerprint"], f"{model['id']} ({model['revision']})"
    except (ValueError, KeyError, TypeError) as error:
        raise Refusal("config", f"{path} is damaged ({error!r}): {WAY_OUT}") from error
    if version != FORMAT:
        raise Refusal(
            "config",
            f"the index in {path.parent} has format {version}, this release reads {FORMAT}: {WAY_OUT}",
        )
    if fingerprint != spec["fingerprint"]:
        raise Refusal(
            "model",
            f"the index in {path.parent} was built by {name}, fingerprint {fingerprint}; the encoder is "
            f"{spec['id']} ({spec['revision']}), fingerprint {spec['fingerprint']}: "
            f"set CATALENS_MODEL back, or change the model by `catalens reindex --model NAME`",
        )


def _open_shard(folder: Path, dimension: int) -> edge.EdgeShard:
    if not folder.exists():
        # Under another name until it is whole, so that a kill in between leaves nothing half made.
        partial = folder.with_suffix(".tmp")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _create_shard(partial, dimension)
        partial.rename(folder)
    try:
        return edge.EdgeShard.load(str(folder))
    except BaseException as error:  # the engine raises bare Exception, and BaseException where Rust panics
        raise Refusal(
            "config",
            f"the index in {folder} cannot be read ({error}): {WAY_OUT}",
        ) from error


def _create_shard(folder: Path, dimension: int) -> None:
    dense = edge.EdgeVectorParams(dimension, edge.Distance.Cosine)
    config = edge.EdgeConfig(
        vectors={"image": dense, "text": dense},
        sparse_vectors={"lexical": edge.EdgeSparseVectorParams(modifier=edge.Modifier.Idf)},
    )
    edge.EdgeShard.create(str(folder), config).close()


# --- the conversation -------------------------------------------------------------------------------------------


def _receive(connection: socket.socket) -> Any:
    (length,) = LENGTH.unpack(_read(connection, LENGTH.size))
    return pickle.loads(_read(connection, length))  # noqa: S301  # our parent's, over a pair that nobody else holds


def _read(connection: socket.socket, size: int) -> bytearray:
    body = bytearray(size)
    view, at = memoryview(body), 0
    while at < size:
        count = connection.recv_into(view[at:])
        if count == 0:
            raise EOFError
        at += count
    return body


def _send(connection: socket.socket, answer: tuple[int, str, Any]) -> None:
    body = pickle.dumps(answer, protocol=5)
    connection.sendall(LENGTH.pack(len(body)) + body)


def _flush_until_called(connection: socket.socket, store: Store) -> None:
    """Return when a call is waiting; flush once what was written is FLUSH_EVERY old."""
    while store.dirty_since is not None:
        due = store.dirty_since + FLUSH_EVERY - time.monotonic()
        if due <= 0:
            store.flush()
        elif select.select([connection], [], [], due)[0]:
            return


def serve(connection: socket.socket) -> None:
    """Answer calls until the parent closes, or is gone."""
    number, _, (folder, spec, namespace) = _receive(connection)
    try:
        store = Store(Path(folder), spec, namespace)
    except Refusal as refusal:
        _send(connection, (number, refusal.kind, str(refusal)))
        return
    _send(connection, (number, "ok", {"lost_batches": store.lost_batches, "points": len(store.directory.entries)}))
    method = ""
    while method != "close":
        _flush_until_called(connection, store)
        number, method, arguments = _receive(connection)
        try:
            answer = (number, "ok", getattr(store, method)(*arguments))
        except Refusal as refusal:
            answer = (number, refusal.kind, str(refusal))
        except BaseException as error:  # noqa: BLE001  # the engine raises bare Exceptions, its panics are BaseExceptions
            # What is on disk and what is in memory may differ now: the next process reads the truth.
            _send(connection, (number, "transient", f"{method}: {type(error).__name__}: {error}"))
            return
        _send(connection, answer)


if __name__ == "__main__":
    # The parent decides when to stop; a signal to the whole group must not end us before it has drained.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        serve(socket.socket(fileno=int(sys.argv[1])))
    # No interpreter shutdown: the engine's threads have nothing left to say.
    sys.stderr.flush()
    os._exit(0)
