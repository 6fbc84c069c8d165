"""The embedded index's own process: it owns the Qdrant Edge shard, because every call of that engine holds the GIL.

Run by `EdgeIndex` as a script, so that it imports nothing of Catalens and stays small and quick to start. It speaks
length-prefixed pickles over an inherited socket pair, one call at a time: what a write reads, compares and writes
is atomic. End of file on the socket means that the parent is gone, and ends this process too.

What a point's payload holds is written in `rules.py`. Only live points have vectors, so that no search finds another
and no tombstone weighs on BM25's idf.

Run as `edge_worker.py optimise …` it is the process that gives a copy of the shard an HNSW graph (docs/adr/0019).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import gc
import importlib.util
import itertools
import json
import os
import pickle
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from array import array
from bisect import bisect_left, bisect_right, insort
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from uuid import UUID, uuid5

import qdrant_edge as edge

if TYPE_CHECKING:
    from catalens.engines import columns, rules
    from catalens.engines.rules import Draft, Outcome, Payload, Rule
else:

    def _beside(name):
        """Load the file beside this one that is called so, without the package around it."""
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
        spec.loader.exec_module(module)
        return module

    rules = _beside("rules")
    Draft = rules.Draft
    if __name__ != "__main__" or sys.argv[1] != "optimise":  # which counts nothing
        columns = _beside("columns")

FORMAT: Final = 1
"""Version of the folder's layout; a release that changes it upgrades the folder or says what to do."""
FIRST_SHARD: Final = "shard"
"""The folder of the shard until meta.json names another, which is what OPTIMISED folders do."""
OPTIMISED: Final = 2
"""The format of a folder whose meta.json names the shard; a release that knows FORMAT alone leaves it alone."""
CALL: Final = struct.Struct("<Qq")
"""How many bytes follow, and the number of the call."""
ANSWER: Final = struct.Struct("<Qq10p")
"""The same, and the kind of the answer."""
COLUMNS: Final = "columns.json"
"""The tenants and columns that were asked for, so that the next process reads them when it opens the folder."""
FLUSH_EVERY: Final = 5.0
"""Seconds that a write may wait for its fsync; kill -9 costs nothing, power loss at most this."""
GONE: Final = ("deleted", "offer")
"""The states of what is stored and hidden."""
DISK_RESERVE: Final = 128 * 1024 * 1024
"""Free bytes below which writes are refused: the engine maps its files, and a full disk would kill it by SIGBUS."""
LOCK_PATIENCE: Final = 3.0
"""Seconds to wait for the folder: the child of a killed process needs a moment to see its end."""
MAX_NUMBER_INDEXES: Final = 64
"""Numeric attributes that get an index of their own, and of each tenant those that get a column; what is asked beyond
is scanned."""
MAX_COLUMNS: Final = 100
"""Attributes and tags of one tenant that have a column; what every product may have is beside them."""
MAX_FILTERED: Final = 64
"""The same, from which on no filter makes another column, but is left to the engine, while they are asked for."""
IDLE: Final = 600.0
"""Seconds after which a column that nobody asked for may make room for one that only a filter wants."""
MAX_ALL_COLUMNS: Final = 4096
"""Columns of all tenants together, some KiB each beside what their products have in them."""
MAX_REMEMBERED: Final = 200
"""Columns that a process reads when it opens the folder: each makes every point dearer to read, whosoever it is."""
MAX_FACET_KEYS: Final = 1000
"""Fields that the marker names, for a release that reads no column for what nobody has, be it of another tenant."""
READ: Final = 100
"""Points that are read into new columns at once."""
STEP: Final = 0.01
"""Seconds until what is being read looks whether a call waits."""
READ_REST: Final = 1
"""While calls wait, columns are read at most 1 / (1 + READ_REST) of the time."""
MARKER: Final = UUID(int=0)
"""The point that counts write batches; compared at start with the count that was acknowledged."""

LOOSE: Final = 4
"""A graph is due when it lacks one of `graph_from / LOOSE` points and one in LOOSE_SHARE of all: they are compared one
by one, a quarter of what is done where there is no graph."""
LOOSE_SHARE: Final = 20
REST: Final = 3
"""Graphs are built at most 1 / (1 + REST) of the time, however much is written."""
RETRY_AFTER: Final = 600.0
"""Seconds until an optimisation that failed, or had no room, is tried again."""
REPLAY: Final = 256
"""Points that are brought into the optimised shard at a time, while calls wait."""

# An index costs an fsync to create and work at every write, so each is created when it is first asked for, and the
# rest when a graph is built, which has to know them: what it links for a filter makes that filter's searches complete.
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

_EXACT: Final = edge.SearchParams(exact=True)

Plain: TypeAlias = tuple[list[list[tuple[Any, ...]]], list[tuple[Any, ...]]]
"""A filter: AND of ORs of primitives, and primitives of which none may match (see `EdgeIndex`)."""


class Refusal(Exception):
    """An answer other than a value; `kind` names the error that the parent raises."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Unread(Exception):
    """What is asked for is being read: ask again when nothing of this tenant is."""

    def __init__(self, tenant: str) -> None:
        super().__init__(tenant)
        self.tenant = tenant


@dataclass(slots=True)
class Entry:
    """What is kept in memory of every point."""

    tenant: str
    product_id: str
    state: str
    pending: bool
    indexed_at: float
    slot: int = -1
    """Of a live product, where its tenant's columns have it."""


@dataclass(slots=True)
class TenantView:
    """One tenant's points, kept in order and counted."""

    live: list[str] = field(default_factory=list)
    """Product ids of live products, ascending by code point."""
    states: Counter[str] = field(default_factory=Counter)
    pending: int = 0
    table: columns.Table = field(default_factory=lambda: columns.Table())  # noqa: PLW0108  # `optimise` loads no `columns`


class Directory:
    """Who is stored, in memory: paging in id order, counts and point id → product id without asking the engine."""

    def __init__(self, points: Iterable[tuple[UUID, Payload]], kept: columns.Kept) -> None:
        self.entries: dict[UUID, Entry] = {}
        self.tenants: defaultdict[str, TenantView] = defaultdict(TenantView)
        self._kept = kept
        for point, payload in points:
            entry = self._put(point, payload)
            if entry.state == "live":
                self.tenants[entry.tenant].live.append(entry.product_id)
        for view in self.tenants.values():
            view.live.sort()

    def put(self, point: UUID, payload: Payload) -> None:
        """Remember the newest payload of `point`."""
        self.drop(point)
        entry = self._put(point, payload)
        if entry.state == "live":
            insort(self.tenants[entry.tenant].live, entry.product_id)

    def _put(self, point: UUID, payload: Payload) -> Entry:
        entry = self.entries[point] = _entry(payload)
        self._count(entry, 1)
        if entry.state == "live":
            table = self.tenants[entry.tenant].table
            entry.slot = table.new()
            table.add(entry.slot, payload, self._kept.of(entry.tenant))
        return entry

    def drop(self, point: UUID) -> None:
        """Forget `point`, if it is known."""
        entry = self.entries.pop(point, None)
        if entry is None:
            return
        self._count(entry, -1)
        if entry.state == "live":
            view = self.tenants[entry.tenant]
            del view.live[bisect_left(view.live, entry.product_id)]
            view.table.drop(entry.slot)
            if view.table.wasteful:
                slots = view.table.compact()
                for other in self.entries.values():
                    if other.state == "live" and other.tenant == entry.tenant:
                        other.slot = slots[other.slot]

    def _count(self, entry: Entry, step: int) -> None:
        view = self.tenants[entry.tenant]
        view.states[entry.state] += step
        view.pending += step * entry.pending


@dataclass(slots=True)
class Reading:
    """Columns that are being read from a tenant's live products, in the order of their ids."""

    tenant: str
    keys: list[str]
    needed: set[str]
    """What the call needs that they are read for."""
    after: str = ""
    written: set[UUID] = field(default_factory=set)
    """What was written since it began: the columns have that."""


class Store:
    """The shard and what the calls do with it."""

    def __init__(
        self, folder: Path, spec: Mapping[str, Any], namespace: bytes, graph_from: int, say: Callable[..., None]
    ) -> None:
        self._folder = folder
        self._spec = spec
        self._namespace = UUID(bytes=namespace)
        self._graph_from = graph_from
        self._say = say
        self._lock = _lock(folder)
        self._shard_folder = folder / _check_meta(folder / "meta.json", spec)
        self._shard = _open_shard(self._shard_folder, int(spec["dimension"]))
        for leftover in folder.glob(f"{FIRST_SHARD}*"):
            if leftover != self._shard_folder:
                shutil.rmtree(leftover, ignore_errors=True)
        self._indexed = set(self._shard.info().payload_schema)
        self._numbers: set[str] = set()
        self._facets: set[str] | None = set()
        """MAX_FACET_KEYS of the fields; None if products are stored here without them, by an earlier release."""
        self._sequence = 0
        self._loose: set[UUID] = set()
        """Points that were written since the graph was built."""
        self._loose_before = 0
        """The same, of earlier processes."""
        self._optimising: Optimising | None = None
        self._not_before = 0.0
        self._kept = columns.Kept(
            [(_is_limited, MAX_COLUMNS), (_is_attribute_number, MAX_NUMBER_INDEXES)], most=MAX_ALL_COLUMNS
        )
        for tenant, key in _remembered(folder / COLUMNS):
            self._kept.add(tenant, [key], time.monotonic())
        self._readings: dict[str, Reading] = {}
        """One of a tenant at a time; the first is next."""
        self._read_again = 0.0
        """When calls have waited long enough for reading to go on before them."""
        self.directory = Directory(self._scan(), self._kept)
        for tenant, key in self._kept.all():
            if not self._lives(tenant):
                self._kept.drop(tenant, key)
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
        if self._facets is not None:
            for draft in changed.values():
                new = draft.payload.get("facets", {}).keys() - self._facets
                self._facets.update(sorted(new)[: MAX_FACET_KEYS - len(self._facets)])
        if self._has_graph:
            self._loose.update(changed)
        for point, draft in changed.items():
            if (reading := self._readings.get(draft.payload["tenant"])) is not None:
                reading.written.add(point)
        points.append(self._marker())
        self._update(edge.UpdateOperation.upsert_points(points), changed)
        os.pwrite(self._acknowledged, self._sequence.to_bytes(8, "little"), 0)
        for point, draft in changed.items():
            self.directory.put(point, draft.payload)
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
            self._update(edge.UpdateOperation.delete_points(list(old)), old)
            for point in old:
                self.directory.drop(point)
            if self.dirty_since is None:
                self.dirty_since = time.monotonic()
        return len(old)

    def _update(self, operation: edge.UpdateOperation, points: Iterable[UUID] = ()) -> None:
        """Let the shard change, and remember what changed in it since it was copied."""
        if self._optimising is not None:
            self._optimising.wait_for_copy()
            self._optimising.changed.update(points)
        self._shard.update(operation)

    def _marker(self) -> edge.Point:
        loose = self._loose_before + len(self._loose)
        payload: Payload = {"sequence": self._sequence, "loose": loose}
        if self._facets is not None:
            payload["facet_keys"] = sorted(self._facets)
        return edge.Point(MARKER, {}, payload)

    # --- reads ----------------------------------------------------------------------------------------------

    def search(self, tenant: str, legs: Sequence[tuple[str, Any, int]], where: Plain) -> list[list[tuple[str, float]]]:
        """Return (product id, score) lists, one a leg; one that is shorter than its limit holds all there is."""
        only = self._only(tenant)
        condition = self._filter(where, only)
        corpus = edge.SearchParams(idf=edge.IdfParams(edge.Filter(must=list(only)))) if only else None
        # The graph has links for what had an index when it was built; a number may have got its own later.
        late = any(key.startswith("numbers.") for clause in where[0] for _, key, _ in clause)
        requests = [
            edge.QueryRequest(
                query=edge.Query.Nearest(_sparse(vector) if using == "lexical" else _dense(vector), using=using),
                filter=condition,
                limit=limit,
                params=corpus if using == "lexical" else _by_graph(limit, unlinked=late),
                with_payload=False,
            )
            for using, vector, limit in legs
        ]
        entries = self.directory.entries
        answers = self._shard.query_batch(edge.QueryBatchRequest(requests))
        for number, (using, vector, limit) in enumerate(legs):
            if using != "lexical" and len(answers[number]) < limit and self._has_graph:
                # A filter can cut parts of a graph off from the rest; what matches is few, so all of it is compared.
                nearest = edge.Query.Nearest(_dense(vector), using=using)
                answers[number] = self._shard.query(
                    edge.QueryRequest(query=nearest, filter=condition, limit=limit, params=_EXACT, with_payload=False)
                )
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
        masks: dict[int, columns.Mask] = {}
        return [self._count(tenant, where, masks) for where in wheres]

    def _count(self, tenant: str, where: Plain, masks: dict[int, columns.Mask]) -> int:
        if not self._lives(tenant):
            return 0
        if where == ([], []):
            return self.directory.tenants[tenant].states["live"]
        if self._has_columns(tenant, self._columns_of(tenant, where)):
            return int(self._under(tenant, where, masks).sum())
        if not where[0]:
            return self._counted_under(self._living(tenant, where))
        # To ask each point for its state as well takes a quarter longer, and few are not live.
        only = self._only(tenant)
        every = self._counted_under(self._filter(where, only))
        if len(self.directory.entries) == sum(len(view.live) for view in self.directory.tenants.values()):
            return every
        gone = self._condition("state", match=edge.MatchAny(list(GONE)))
        return every - self._counted_under(self._filter(where, [*only, gone]))

    def _counted_under(self, condition: edge.Filter | None) -> int:
        return int(self._shard.count(edge.CountRequest(exact=True, filter=condition)))

    def facet(
        self, tenant: str, wheres: Sequence[Plain], asked: Sequence[tuple[str, int]], limit: int
    ) -> list[list[tuple[Any, int]]]:
        """Return, per payload key, its most frequent values under the filter of that number, and how many have each.

        Raises Unread.
        """
        if self._facets is None and any(key.startswith("facets.") for key, _ in asked):
            raise Refusal("facet", f"this index was made before values could be counted: {WAY_OUT}")
        if not self._lives(tenant):
            return [[] for _ in asked]
        wanted = {key for key, _ in asked if self._somebody_has(tenant, key)}
        self._need(tenant, wanted.union(*(self._worth_a_column(tenant, where) for where in wheres)))
        masks: dict[int, columns.Mask] = {}
        under = [self._under(tenant, where, masks) for where in wheres]
        table = self.directory.tenants[tenant].table
        return [table.most_frequent(key, under[number], limit) for key, number in asked]

    def extremes(self, tenant: str, key: str, where: Plain) -> list[float]:
        """Return the smallest and the largest number of `key` under the filter, nothing if there is none.

        Raises Unread.
        """
        if not self._lives(tenant):
            return []
        self._need(tenant, {key} | self._worth_a_column(tenant, where))
        return self.directory.tenants[tenant].table.extremes(key, self._under(tenant, where, {}))

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
        if self._optimising is not None:
            self._optimising.wait_for_copy()
        self._shard.flush()
        os.fsync(self._acknowledged)
        self.dirty_since = None

    def close(self) -> None:
        """Flush and let go of the folder."""
        if self._optimising is not None:
            self._give_up(self._optimising)
        self.flush()
        self._shard.close()

    # --- the graph: built in a copy of the shard, which then takes the shard's place (docs/adr/0019) ------------

    def tend(self, *, called: bool) -> float | None:
        """Do a step of what is due; return the seconds until more is, None if nothing is. `called`: a call waits."""
        now = time.monotonic()
        if self.dirty_since is not None and now >= self.dirty_since + FLUSH_EVERY:
            self.flush()
        due = [self.dirty_since + FLUSH_EVERY] if self.dirty_since is not None else []
        if self._readings:  # who asked may have gone away, but somebody will ask again
            if not called or now >= self._read_again:
                self._read_on(self._readings.pop(next(iter(self._readings))))
            due.append(now)
        if self._optimising is not None:
            if self._step(self._optimising):
                due.append(now)
        elif self._wants_graph:
            if now >= self._not_before:
                self._optimise()
            due.append(self._not_before)
        return max(0.0, min(due) - now) if due else None

    @property
    def news(self) -> list[int]:
        """What tells that `tend` has something to do before its time."""
        return [] if self._optimising is None or self._optimising.ended else [self._optimising.output]

    def reads(self, tenant: str) -> bool:
        """Return whether columns of `tenant` are being read, and who was told Unread waits."""
        return tenant in self._readings

    @property
    def _has_graph(self) -> bool:
        return self._shard_folder.name != FIRST_SHARD

    @property
    def _loose_count(self) -> int:
        return self._loose_before + len(self._loose) if self._has_graph else len(self.directory.entries)

    @property
    def _wants_graph(self) -> bool:
        points = len(self.directory.entries)
        least = max(self._graph_from // LOOSE, points // LOOSE_SHARE) if self._has_graph else self._graph_from
        return self._loose_count >= least

    def _optimise(self) -> None:
        """Start the process that optimises a copy, if the disk has room for it."""
        disk = os.statvfs(self._folder)
        free = disk.f_bavail * disk.f_frsize
        # The copy, what is made of it, and what is written meanwhile.
        needed = DISK_RESERVE + 3 * sum(path.stat().st_blocks * 512 for path in self._shard_folder.rglob("*"))
        if free < needed:
            self._not_before = time.monotonic() + RETRY_AFTER
            self._say("warning", "index.optimise_skipped", free_mib=free >> 20, needed_mib=needed >> 20)
            return
        self.flush()
        target = self._folder / f"{FIRST_SHARD}-{time.time_ns():x}"
        work = Optimising(self._shard_folder, target, int(self._spec["dimension"]), self._graph_from)
        self._optimising = work
        points = len(self.directory.entries)
        self._say("info", "index.optimise_started", points=points, loose=self._loose_count, process=work.process.pid)

    def _step(self, work: Optimising) -> bool:
        """Go on with what was begun; return whether there is more to do at once."""
        if not work.ended_within(0):
            return False
        try:
            self._replay(work)
        except BaseException as error:  # noqa: BLE001  # as in `serve`; the shard that serves was only read
            self._give_up(work)
            self._say("error", "index.optimise_failed", error=f"{type(error).__name__}: {error}")
            return True
        if not work.changed:
            self._swap(work)
        return True

    def _replay(self, work: Optimising) -> None:
        """Bring some of what was written since the copy into the optimised shard, as it is now."""
        shard = work.opened()
        chunk = list(itertools.islice(work.changed, REPLAY))
        records = self._shard.retrieve(list(chunk), True, True) if chunk else []
        if records:
            points = [edge.Point(record.id, record.vector or {}, record.payload or {}) for record in records]
            shard.update(edge.UpdateOperation.upsert_points(points))
        gone = set(chunk).difference(_uuid(record.id) for record in records)
        if gone:
            shard.update(edge.UpdateOperation.delete_points(list(gone)))
        work.changed.difference_update(chunk)
        work.replayed.update(chunk)

    def _swap(self, work: Optimising) -> None:
        """Let the optimised shard take the place of the one that serves; a failure in here ends the process."""
        old, old_folder = self._shard, self._shard_folder
        shard = work.opened()
        self._loose, self._loose_before = work.replayed, 0
        shard.update(edge.UpdateOperation.upsert_points([self._marker()]))
        shard.flush()
        meta = {"format": OPTIMISED, "model": dict(self._spec), "shard": work.folder.name}
        _write_meta(self._folder / "meta.json", meta)  # from here on it is the one that counts
        self._shard, self._shard_folder, self._optimising = shard, work.folder, None
        self._indexed = set(shard.info().payload_schema)
        old.close()
        shutil.rmtree(old_folder, ignore_errors=True)
        seconds = time.monotonic() - work.began
        self._not_before = time.monotonic() + REST * seconds
        self._say("info", "index.optimised", seconds=round(seconds, 1), loose=self._loose_count)

    def _give_up(self, work: Optimising) -> None:
        self._optimising = None
        self._not_before = time.monotonic() + RETRY_AFTER
        work.discard()

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

    # --- columns (docs/adr/0028, docs/adr/0031) ---

    def _lives(self, tenant: str) -> bool:
        """Return whether `tenant` has a product that could have something in a column."""
        return tenant in self.directory.tenants and bool(self.directory.tenants[tenant].live)

    def _somebody_has(self, tenant: str, key: str) -> bool:
        """Return whether products of `tenant` may have something in the column `key`; nobody else's are asked."""
        if not _is_named(key) or (self._facets is None and key.startswith("facets.")):
            return True
        return not self._has_columns(tenant, [columns.NAMES]) or self.directory.tenants[tenant].table.named(key)

    def _columns_of(self, tenant: str, where: Plain) -> set[str]:
        """Return the columns without which `where` cannot be told."""
        clauses, none_of = where
        keys: set[str] = set()
        for kind, key, value in itertools.chain(none_of, *clauses):
            if key == "terms":
                keys.update(_facet_of(term)[0] for term in value)
            elif kind != "points":
                keys.add(key)
        return {key for key in keys if self._somebody_has(tenant, key)}

    def _worth_a_column(self, tenant: str, where: Plain) -> set[str]:
        """Return the columns of `where` that it may have read: of attributes and tags, and of numbers, if there is
        room for them, and of values only where every product has what belongs there."""
        keys = self._columns_of(tenant, where)
        kept = self._kept.of(tenant)
        used = {key for key, asked in kept.items() if asked >= time.monotonic() - IDLE}
        for counts, most in ((_is_limited, MAX_FILTERED), (_is_attribute_number, MAX_NUMBER_INDEXES)):
            some = set(filter(counts, keys))
            if len(some.union(filter(counts, used))) > most:
                keys -= some - kept.keys()
        if self._facets is None:
            keys = {key for key in keys if key in kept or not key.startswith("facets.")}
        return keys

    def _has_columns(self, tenant: str, keys: Iterable[str]) -> bool:
        """Return whether these, which are asked for now, are there and whole."""
        return self._kept.ask(tenant, keys, time.monotonic())

    def _need(self, tenant: str, keys: set[str]) -> None:
        """Return if there are these columns; else raise Unread, and `tend` reads them."""
        if self._has_columns(tenant, keys):
            return
        if tenant not in self._readings:
            missing = keys - self._kept.of(tenant).keys()
            if any(map(_is_named, missing)) and columns.NAMES not in self._kept.of(tenant):
                missing.add(columns.NAMES)
            self._kept.add(tenant, missing, columns.READING)
            self._readings[tenant] = Reading(tenant, sorted(missing), keys | missing)
        raise Unread(tenant)

    def _read_on(self, work: Reading) -> None:
        """Read products until all are, or a STEP is over, and it is the turn of another tenant's."""
        view = self.directory.tenants[work.tenant]
        fields = work.keys
        if columns.NAMES in fields:
            fields = sorted({"facets", "numbers", *(key.partition(".")[0] for key in fields)})
        began = time.monotonic()
        while True:
            start = bisect_right(view.live, work.after)
            names = view.live[start : start + READ]
            points = {self._point(work.tenant, name) for name in names} - work.written
            for record in self._shard.retrieve(list(points), fields, False) if points else ():
                entry = self.directory.entries[_uuid(record.id)]
                view.table.add(entry.slot, record.payload or {}, work.keys)
            now = time.monotonic()
            if whole := start + READ >= len(view.live):
                break
            work.after = names[-1]
            if now >= began + STEP:
                break
        self._read_again = now + READ_REST * (now - began)
        if whole:
            self._keep(work, now)
        else:
            self._readings[work.tenant] = work

    def _keep(self, work: Reading, now: float) -> None:
        """Keep what was read of what there is, and give up for it what was asked for longest ago."""
        table = self.directory.tenants[work.tenant].table
        for key in set(work.keys):
            if columns.NAMES in work.keys and _is_named(key) and not table.named(key):
                self._kept.drop(work.tenant, key)
        for other in self._readings.values():  # or it would be gone when the rest of it is read
            self._kept.ask(other.tenant, other.needed, now)
        for tenant, key in self._kept.settle(work.tenant, work.needed, now):
            self.directory.tenants[tenant].table.forget(key)
        try:
            _remember(self._folder / COLUMNS, self._kept.all())
        except OSError as error:  # the next process reads them when they are asked for
            self._say("warning", "index.columns_not_noted", error=str(error))

    def _under(self, tenant: str, where: Plain, masks: dict[int, columns.Mask]) -> columns.Mask:
        """Return which live products are under `where`; `masks` are those of clauses, by identity, for other calls."""
        table = self.directory.tenants[tenant].table
        if not self._has_columns(tenant, self._columns_of(tenant, where)):
            request = edge.ScrollRequest(
                limit=len(self.directory.entries) + 1, filter=self._living(tenant, where), with_payload=False
            )
            entries = self.directory.entries
            return table.these([entries[_uuid(record.id)].slot for record in self._shard.scroll(request)[0]])
        under = table.everybody()
        for clause in where[0]:
            if id(clause) not in masks:
                masks[id(clause)] = self._any_of(table, clause)
            under &= masks[id(clause)]
        if where[1]:
            under &= ~self._any_of(table, where[1])
        return under

    def _any_of(self, table: columns.Table, primitives: Sequence[tuple[Any, ...]]) -> columns.Mask:
        some = table.these(())
        for kind, key, value in primitives:
            if kind == "points":
                entries = (self.directory.entries.get(UUID(bytes=point)) for point in value)
                some |= table.these([entry.slot for entry in entries if entry is not None and entry.state == "live"])
            elif kind == "range":
                some |= table.within(key, value)
            elif key == "terms":
                values = defaultdict(list)
                for term in value:
                    facet, stated = _facet_of(term)
                    values[facet].append(stated)
                for facet, wanted in values.items():
                    some |= table.having(facet, wanted)
            else:
                some |= table.having(key, value)
        return some

    # --- filters ---

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
        any_of = []
        for clause in clauses:
            some = [self._primitive(*primitive) for primitive in clause]
            # As a filter in the filter, the engine asks every point instead of the index: five times the work.
            any_of.append(some[0] if len(some) == 1 else edge.Filter(should=some))
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
            schema = _INDEXES.get(key, edge.PayloadSchemaType.Float)
            self._update(edge.UpdateOperation.create_field_index(key, schema))
            self._indexed.add(key)

    def _deserves_index(self, key: str) -> bool:
        known = key.removeprefix("numbers.") in self._numbers
        return known and sum(name.startswith("numbers.") for name in self._indexed) < MAX_NUMBER_INDEXES

    def _scan(self) -> Iterable[tuple[UUID, Payload]]:
        names = ["tenant", "product_id", "state", "image_status", "indexed_at", "numbers"]
        fields = [*names, "sequence", "facet_keys", "loose", *{key for _, key in self._kept.all()}]
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
                    self._loose_before = int(payload.get("loose", 0))
                    if self._facets is None:  # that release wrote to it since
                        for tenant, key in self._kept.all():
                            if key.startswith("facets."):
                                self._kept.drop(tenant, key)
                else:
                    self._numbers.update(payload.get("numbers", ()))
                    yield _uuid(record.id), payload
            if offset is None:
                return


# --- from and to the engine's own types ----------------------------------------------------------------------------


def _by_graph(limit: int, *, unlinked: bool) -> edge.SearchParams:
    """Return how a graph is searched: candidates by the int8 copies, of few more, put in order by the vectors.

    `unlinked`: through the neighbours of points that a filter excludes, which finds what else would be cut off.
    """
    return edge.SearchParams(
        quantization=edge.QuantizationSearchParams(rescore=True, oversampling=2.0 if limit < 100 else None),
        acorn=edge.AcornSearchParams(enable=True) if unlinked else None,
    )


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


def _check_meta(path: Path, spec: Mapping[str, Any]) -> str:
    """Return the name of the folder that holds the shard; of a new index, note what it is."""
    if not path.exists():
        _write_meta(path, {"format": FORMAT, "model": dict(spec)})
        return FIRST_SHARD
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        version, model = meta["format"], meta["model"]
        fingerprint, name = model["fingerprint"], f"{model['id']} ({model['revision']})"
        shard = str(meta["shard"]) if version == OPTIMISED else FIRST_SHARD
    except (ValueError, KeyError, TypeError) as error:
        raise Refusal("config", f"{path} is damaged ({error!r}): {WAY_OUT}") from error
    if version not in (FORMAT, OPTIMISED):
        raise Refusal(
            "config",
            f"the index in {path.parent} has format {version}, this release reads {FORMAT} and {OPTIMISED}: {WAY_OUT}",
        )
    if fingerprint != spec["fingerprint"]:
        raise Refusal(
            "model",
            f"the index in {path.parent} was built by {name}, fingerprint {fingerprint}; the encoder is "
            f"{spec['id']} ({spec['revision']}), fingerprint {spec['fingerprint']}: "
            f"set CATALENS_MODEL back, or change the model by `catalens reindex --model NAME`",
        )
    return shard


def _write_meta(path: Path, meta: Mapping[str, Any]) -> None:
    """Replace meta.json as a whole, on the disk when this returns."""
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    _sync(partial)
    partial.replace(path)
    _sync(path.parent)


def _remembered(path: Path) -> list[tuple[str, str]]:
    """Return the tenants and columns to begin with; only time is lost where the file says none."""
    try:
        said = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return []
    pairs = [
        (one[0], one[1])
        for one in (said if isinstance(said, list) else ())  # of an earlier release, without tenants
        if isinstance(one, list) and len(one) == 2 and all(isinstance(name, str) for name in one)
        if _COLUMN.fullmatch(one[1])  # nor of a later one, which may have others
    ]
    last = list(dict.fromkeys(key for _, key in reversed(pairs)))[:MAX_REMEMBERED]
    return [(tenant, key) for tenant, key in pairs if key in last]


_COLUMN: Final = re.compile(r"(facets|numbers)\.n[0-9a-f]{16}|offer\.(price|stock|currency)|in_stock|image_status")


def _remember(path: Path, kept: Iterable[tuple[str, str]]) -> None:
    new = path.with_suffix(".tmp")
    new.write_text(json.dumps([pair for pair in kept if pair[1] != columns.NAMES]) + "\n", encoding="utf-8")
    new.replace(path)


def _is_limited(key: str) -> bool:
    """Return whether it is a column of an attribute's or tag's values, of which there can be any number."""
    return key.startswith("facets.") and key not in _EVERYBODYS


def _is_attribute_number(key: str) -> bool:
    return key.startswith("numbers.")


def _is_named(key: str) -> bool:
    """Return whether a product names what the column `key` is about: no column is read for what nobody has."""
    return _is_limited(key) or _is_attribute_number(key)


_EVERYBODYS: Final = frozenset(
    f"facets.{rules.short_key(name)}" for name in ("brand", "category", "group_id", "locale")
)


@lru_cache(maxsize=4096)
def _facet_of(term: str) -> tuple[str, str]:
    """Return the column and the value in it that tell whether a product has `term`, the JSON of a pair."""
    key, end = _PAIR.raw_decode(term, 1)
    return f"facets.{rules.short_key(key)}", term[end + 1 : -1]


_PAIR: Final = json.JSONDecoder()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _open_shard(folder: Path, dimension: int) -> edge.EdgeShard:
    # One that is missing beside others is no new index, but one that lost its meta.json or its shard.
    if not folder.exists() and not any(folder.parent.glob(f"{FIRST_SHARD}-*")):
        # Under another name until it is whole, so that a kill in between leaves nothing half made.
        partial = folder.with_suffix(".tmp")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        edge.EdgeShard.create(str(partial), edge.EdgeConfig(**_vectors_config(dimension))).close()
        partial.rename(folder)
    try:
        return edge.EdgeShard.load(str(folder))
    except BaseException as error:  # the engine raises bare Exception, and BaseException where Rust panics
        raise Refusal(
            "config",
            f"the index in {folder} cannot be read ({error}): {WAY_OUT}",
        ) from error


def _vectors_config(dimension: int) -> dict[str, Any]:
    dense = edge.EdgeVectorParams(dimension, edge.Distance.Cosine)
    return {
        "vectors": {"image": dense, "text": dense},
        "sparse_vectors": {"lexical": edge.EdgeSparseVectorParams(modifier=edge.Modifier.Idf)},
    }


# --- the optimised copy -----------------------------------------------------------------------------------------


class Optimising:
    """A process that optimises a copy of the shard, and what was written since it was copied."""

    def __init__(self, source: Path, target: Path, dimension: int, scan: int) -> None:
        self.folder = target
        self.began = time.monotonic()
        self.changed: set[UUID] = set()
        """What the copy does not have yet."""
        self.replayed: set[UUID] = set()
        """What it was given after it had got its graph."""
        self.output, theirs = os.pipe()
        self.process = subprocess.Popen(  # noqa: S603  # this very script
            [sys.executable, "-P", __file__, "optimise", *map(str, (source, target, dimension, scan, os.getpid()))],
            stdin=subprocess.DEVNULL,
            stdout=theirs,
        )
        os.close(theirs)
        self.ended = False
        self._copied = False
        self._shard: edge.EdgeShard | None = None

    def ended_within(self, seconds: float | None) -> bool:
        """Hear what the process says, waiting so long for a word (None: for ever); return whether it has ended."""
        if not self.ended and select.select([self.output], [], [], seconds)[0]:
            self._copied = True
            if not os.read(self.output, 64):
                self.ended = True
                os.close(self.output)
                self.process.wait()
        return self.ended

    def wait_for_copy(self) -> None:
        """Return when the shard that serves may change."""
        while not (self._copied or self.ended):
            self.ended_within(None)

    def opened(self) -> edge.EdgeShard:
        """Return the optimised copy, once its process has ended."""
        if self._shard is None:
            if self.process.returncode:
                raise RuntimeError(f"the process that optimises ended with {self.process.returncode}")
            self._shard = edge.EdgeShard.load(str(self.folder))
        return self._shard

    def discard(self) -> None:
        """End the process and forget what it made."""
        self.process.kill()
        while not self.ended_within(None):
            pass
        if self._shard is not None:
            self._shard.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def optimise(source: Path, target: Path, dimension: int, scan: int, parent: int) -> None:
    """Copy the shard in `source` to `target`, say so on stdout, and give the copy its payload indexes and its graph.

    What matches at most `scan` points is not looked for in the graph, but compared.
    """
    if sys.platform == "linux":
        # PR_SET_PDEATHSIG: while the engine works no Python runs here that could see that the parent is gone.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        return
    os.nice(10)
    shutil.copytree(source, target, copy_function=_copy)
    os.write(1, b"copied")
    graph = edge.EdgeConfig(
        **_vectors_config(dimension),
        hnsw_config=edge.HnswIndexConfig(
            m=16, ef_construct=100, full_scan_threshold=max(1, scan * dimension * 4 >> 10)
        ),
        quantization_config=edge.ScalarQuantizationConfig(edge.ScalarType.Int8, memory=edge.Memory.Pinned),
        optimizers=edge.EdgeOptimizersConfig(indexing_threshold=1, default_segment_number=1),
    )
    shard = edge.EdgeShard.load(str(target), graph)
    there = shard.info().payload_schema.keys()
    for key in _INDEXES.keys() - there:
        shard.update(edge.UpdateOperation.create_field_index(key, _INDEXES[key]))
    for key in there:
        if key.startswith("facets."):  # by which an earlier release counted
            shard.update(edge.UpdateOperation.delete_field_index(key))
    shard.optimize()
    shard.flush()
    shard.close()
    for path in (target, *target.rglob("*")):
        _sync(path)


def _copy(source: str, target: str) -> None:
    """Copy a file without its holes: the engine's files are mostly that."""
    with Path(source).open("rb", buffering=0) as old, Path(target).open("wb", buffering=0) as new:
        size = old.seek(0, os.SEEK_END)
        new.truncate(size)
        at = 0
        while at < size:
            try:
                at = old.seek(at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                return  # there is but a hole from here on
            end = old.seek(at, os.SEEK_HOLE)
            old.seek(at)
            new.seek(at)
            while at < end and (data := old.read(min(1 << 20, end - at))):
                at += new.write(data)


# --- the conversation -------------------------------------------------------------------------------------------


def _receive(connection: socket.socket) -> tuple[int, str, Any]:
    """Return the number of the call, the method and its arguments."""
    length, number = CALL.unpack(_read(connection, CALL.size))
    method, arguments = pickle.loads(_read(connection, length))  # noqa: S301  # our parent's, and nobody else holds it
    return number, method, arguments


def _read(connection: socket.socket, size: int) -> bytearray:
    body = bytearray(size)
    view, at = memoryview(body), 0
    while at < size:
        count = connection.recv_into(view[at:])
        if count == 0:
            raise EOFError
        at += count
    return body


def _send(connection: socket.socket, number: int, kind: str, value: object) -> None:
    body = pickle.dumps(value, protocol=5)
    connection.sendall(ANSWER.pack(len(body), number, kind.encode()) + body)


def _tend_until_called(
    connection: socket.socket, store: Store, waiting: dict[int, tuple[str, str, Any]]
) -> tuple[int, str, Any] | None:
    """Return when a call is there; before it, and while none is, do what is due.

    Of those who were `waiting` for a tenant's columns that are read now, the first, for whom they were read, is
    returned to be answered before others are read, which could take their place. The rest are told to ask again."""
    seconds: float | None = 0.0
    called = False
    while not called:
        ready, _, _ = select.select([connection.fileno(), *store.news], [], [], seconds)
        called = connection.fileno() in ready
        seconds = store.tend(called=called)
        numbers = [number for number, (tenant, _, _) in waiting.items() if not store.reads(tenant)]
        for number in numbers[1:]:
            _send(connection, number, "again", None)
            del waiting[number]
        if numbers:
            return (numbers[0], *waiting.pop(numbers[0])[1:])
    return None


def serve(connection: socket.socket) -> None:
    """Answer calls until the parent closes, or is gone."""
    number, _, (folder, spec, namespace, graph_from) = _receive(connection)

    def say(level: str, event: str, **fields: object) -> None:
        _send(connection, -1, "log", (level, event, {"folder": folder, **fields}))

    try:
        store = Store(Path(folder), spec, namespace, graph_from, say)
    except Refusal as refusal:
        _send(connection, number, refusal.kind, str(refusal))
        return
    _send(connection, number, "ok", {"lost_batches": store.lost_batches, "points": len(store.directory.entries)})
    gc.freeze()  # what is kept of every point is no garbage, and looking through it would stop all calls
    waiting: dict[int, tuple[str, str, Any]] = {}
    """The calls that wait for the columns of a tenant."""
    method = ""
    while method != "close":
        number, method, arguments = _tend_until_called(connection, store, waiting) or _receive(connection)
        try:
            kind, value = "ok", getattr(store, method)(*arguments)
        except Unread as unread:
            waiting[number] = unread.tenant, method, arguments
            continue
        except Refusal as refusal:
            kind, value = refusal.kind, str(refusal)
        except BaseException as error:  # noqa: BLE001  # the engine raises bare Exceptions, its panics are BaseExceptions
            # What is on disk and what is in memory may differ now: the next process reads the truth.
            _send(connection, number, "transient", f"{method}: {type(error).__name__}: {error}")
            return
        _send(connection, number, kind, value)


if __name__ == "__main__" and sys.argv[1] == "optimise":
    optimise(Path(sys.argv[2]), Path(sys.argv[3]), *map(int, sys.argv[4:]))
elif __name__ == "__main__":
    # The parent decides when to stop; a signal to the whole group must not end us before it has drained.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        serve(socket.socket(fileno=int(sys.argv[1])))
    # No interpreter shutdown: the engine's threads have nothing left to say.
    sys.stderr.flush()
    os._exit(0)
