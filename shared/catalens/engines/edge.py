"""The embedded vector index: Qdrant's engine (`qdrant-edge-py`) in a process of its own, behind the VectorIndex port.

Durability: a write that returned survives kill -9 of both processes (the engine's write-ahead log). Power loss may
cost what no `flush` has covered, at most the last 5 seconds: who must not lose those, flushes before committing what
they came from. Acknowledged writes that are missing at a start are said (`index.writes_lost`).
"""

from __future__ import annotations

import asyncio
import itertools
import pickle
import socket
import struct
import sys
from asyncio.subprocess import DEVNULL, Process
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Self
from uuid import UUID

import structlog

from catalens.domain import (
    POINT_NAMESPACE,
    FacetCount,
    FacetKey,
    Facts,
    Filter,
    ImageUpdate,
    IndexCounts,
    IndexDocument,
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
from catalens.engines.points import (
    NUMBERS,
    Clauses,
    content_item,
    distinct,
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
from catalens.errors import CatalensError, Misconfigured, ModelMismatch, NoFacet, StorageFull, Transient
from catalens.retry import RetryPolicy, SystemClock, with_retries

log = structlog.get_logger(__name__)

# Run by its path: as a module it would import the whole package, and need its memory and start-up time, for nothing.
_WORKER: Final = Path(__file__).with_name("edge_worker.py")
_CALL: Final = struct.Struct("<Qq")
"""How many bytes follow, and the number of the call."""
_ANSWER: Final = struct.Struct("<Qq10p")
"""The same, and the kind of the answer."""
GRAPH_FROM: Final = 20_000
"""Points from which a search goes by a graph of the vectors instead of comparing all of them."""
ANSWERS_KEPT: Final = 16 << 20
"""Bytes of answers that are given again until something is written."""
_RESTART: Final = RetryPolicy(attempts=5)
_EXIT_DEADLINE: Final = 30.0
"""Seconds that the process has to flush and end, then it is killed: the write-ahead log has everything."""
_ERRORS: Final[Mapping[str, type[CatalensError]]] = {
    "config": Misconfigured,
    "model": ModelMismatch,
    "facet": NoFacet,
    "full": StorageFull,
    "transient": Transient,
}


class EdgeIndex:
    """A VectorIndex in one folder, for one process at a time. A call whose process dies raises Transient; the next
    one starts another, in at most five tries."""

    def __init__(self, folder: Path, spec: ModelSpec, graph_from: int, engine: _Engine, answers: int) -> None:
        self._folder = folder
        self._spec = spec
        self._graph_from = graph_from
        self._engine = engine
        self._answers = _Answers(answers)
        self._asked: dict[bytes, asyncio.Future[bytes | None]] = {}
        self._restart: asyncio.Task[None] | None = None
        self._closed = False

    @classmethod
    async def open(
        cls, folder: Path, spec: ModelSpec, *, graph_from: int = GRAPH_FROM, answers: int = ANSWERS_KEPT
    ) -> Self:
        """Open or create the index in `folder` for vectors of `spec`; with fewer points than `graph_from` it is exact.

        What is asked again before anything is written costs no search, within `answers` bytes (docs/adr/0030). Raises
        Misconfigured (folder in use, damaged, or of another format) and ModelMismatch.
        """
        return cls(folder, spec, graph_from, await _Engine.start(folder, spec, graph_from), answers)

    async def upsert(self, documents: Sequence[IndexDocument]) -> Sequence[WriteOutcome]:
        """See the port."""
        return await self._write("upsert", [content_item(document, self._spec.dimension) for document in documents])

    async def update_images(self, updates: Sequence[ImageUpdate]) -> Sequence[WriteOutcome]:
        """See the port. Without a vector, only the status is set."""
        return await self._write("update_images", [image_item(update, self._spec.dimension) for update in updates])

    async def update_offers(self, updates: Sequence[OfferUpdate]) -> Sequence[WriteOutcome]:
        """See the port."""
        return await self._write("update_offers", [offer_item(update) for update in updates])

    async def delete(self, tombstones: Sequence[TombstoneWrite]) -> Sequence[WriteOutcome]:
        """See the port."""
        return await self._write("delete", [tombstone_item(write) for write in tombstones])

    async def search(self, tenant: str, legs: Sequence[Leg], where: Filter) -> Sequence[Sequence[LegHit]]:
        """See the port. Exact, until there is a graph (docs/adr/0019); a list shorter than its limit is complete."""
        if not legs:
            return []
        plain = [
            (
                leg.using,
                packed_sparse(leg.vector)
                if isinstance(leg.vector, SparseVector)
                else packed_dense("query", leg.vector, self._spec.dimension),
                leg.limit,
            )
            for leg in legs
        ]
        answer = await self._ask("search", tenant, plain, plain_filter(tenant, where))
        return [list(itertools.starmap(LegHit, hits)) for hits in answer]

    async def get(
        self, tenant: str, product_ids: Sequence[str], *, with_vectors: bool = False
    ) -> Mapping[str, StoredProduct]:
        """See the port."""
        points = [point_id(tenant, product_id).bytes for product_id in dict.fromkeys(product_ids)]
        found = await self._ask("get", points, with_vectors)
        return {payload["product_id"]: stored_product(payload) for payload in found}

    async def facts(self, tenant: str, product_ids: Sequence[str]) -> Mapping[str, Facts]:
        """See the port."""
        points = [point_id(tenant, product_id).bytes for product_id in dict.fromkeys(product_ids)]
        found = await self._ask("facts", points)
        return {payload["product_id"]: product_facts(payload) for payload in found}

    async def sample(self, tenant: str, limit: int) -> Sequence[StoredProduct]:
        """See the port. Those with the lowest point ids, which are hashes."""
        return [stored_product(payload) for payload in await self._ask("sample", tenant, limit)]

    async def count(self, tenant: str, wheres: Sequence[Filter]) -> Sequence[int]:
        """See the port."""
        clauses: Clauses = {}  # what filters have in common is said, and answered, once
        plain = [plain_filter(tenant, where, clauses) for where in wheres]
        counts: list[int] = await self._ask("count", tenant, plain)
        return counts

    async def facet(
        self, tenant: str, asked: Sequence[tuple[FacetKey, Filter]], limit: int
    ) -> Sequence[Sequence[FacetCount]]:
        """See the port."""
        wheres = {distinct(where): where for _, where in asked}  # few, and one may name thousands of products
        number_of = {where: number for number, where in enumerate(wheres)}
        clauses: Clauses = {}
        filters = [plain_filter(tenant, where, clauses) for where in wheres.values()]
        keys = [(facet_field(key), number_of[distinct(where)]) for key, where in asked]
        answer = await self._told("facet", tenant, filters, keys, limit)
        return [
            [(facet_value(key, value), count) for value, count in counts]
            for (key, _), counts in zip(asked, answer, strict=True)
        ]

    async def extremes(self, tenant: str, key: NumberKey, where: Filter) -> tuple[float, float] | None:
        """See the port."""
        ends = await self._told("extremes", tenant, NUMBERS[key], plain_filter(tenant, where))
        return (ends[0], ends[1]) if ends else None

    async def page(self, tenant: str, *, after: str | None, limit: int, where: Filter) -> Sequence[StoredProduct]:
        """See the port."""
        found = await self._ask("page", tenant, after, limit, plain_filter(tenant, where))
        return [stored_product(payload) for payload in found]

    async def counts(self, tenant: str) -> IndexCounts:
        """See the port."""
        return IndexCounts(*await self._ask("counts", tenant))

    async def collect_tombstones(self, older_than: float) -> int:
        """See the port. The offer that a tombstone kept goes with it."""
        return int(await self._change("collect_tombstones", older_than))

    async def blobs_in_use(self, tenant: str | None, references: Sequence[str]) -> frozenset[str]:
        """See the port."""
        return frozenset(await self._call("blobs_in_use", tenant, list(references)))

    async def export(
        self, *, after: UUID | None = None, limit: int = 256, with_vectors: bool = False
    ) -> Sequence[PointState]:
        """See the port."""
        found = await self._call("export", after.bytes if after else None, limit, with_vectors)
        return [point_state(payload) for payload in found]

    async def flush(self) -> None:
        """See the port: an fsync of all that was written."""
        await self._call("flush")

    async def close(self) -> None:
        """See the port. May be called twice; a process that is gone is no error."""
        if self._closed:
            return
        self._closed = True
        if self._restart is not None:
            await asyncio.wait([self._restart])
        await self._engine.close()

    # --- the process behind it ------------------------------------------------------------------------------

    async def _write(self, method: str, items: list[dict[str, Any]]) -> list[WriteOutcome]:
        outcomes: list[WriteOutcome] = await self._change(method, items) if items else []
        return outcomes

    async def _change(self, method: str, *arguments: object) -> Any:  # what the process answers
        """Call what changes the index: whoever asks from now on asks anew."""
        self._forget()
        try:
            return await self._call(method, *arguments)
        finally:
            self._forget()  # the process answers in order, but a call may have had to wait for its start

    def _forget(self) -> None:
        self._answers.clear()
        self._asked.clear()

    async def _told(self, method: str, *arguments: object) -> Any:  # what the process answers
        """Ask until there is an answer: the process says "again" when it has read what it needs to know for one."""
        while (answer := await self._ask(method, *arguments)) is None:
            pass
        return answer

    async def _ask(self, method: str, *arguments: object) -> Any:  # what the process answers
        """Call what changes nothing: what was asked, or is being asked, since the last write is not asked twice."""
        body = _body(method, arguments)
        answer = self._answers.get(body) if self._engine.alive and not self._closed else None
        while answer is None and (asked := self._asked.get(body)) is not None:
            # Shielded: who goes away must not take the answer from the others. None if it was the one who asked.
            answer = await asyncio.shield(asked)
        return _value(await self._ask_first(body) if answer is None else answer)

    async def _ask_first(self, body: bytes) -> bytes | None:
        asked = self._asked[body] = asyncio.get_running_loop().create_future()
        answer = None
        try:
            answer = await self._send(body)
        except CatalensError as error:
            asked.set_exception(error)
            asked.exception()  # nobody else may be waiting for it
            raise
        finally:
            if not asked.done():
                asked.set_result(answer)
            if self._asked.get(body) is asked:  # nothing was written meanwhile
                del self._asked[body]
                if answer is not None:
                    self._answers.keep(body, answer)
        return answer

    async def _call(self, method: str, *arguments: object) -> Any:  # what the process answers
        return _value(await self._send(_body(method, arguments)))

    async def _send(self, body: bytes) -> bytes | None:
        if self._closed:
            raise Transient("the index is closed")
        if not self._engine.alive:
            if self._restart is None or self._restart.done():
                self._restart = asyncio.create_task(self._start_again(), name="index.restart")
                self._restart.add_done_callback(lambda task: task.cancelled() or task.exception())
            # Shielded: a caller that goes away must not stop the restart for the others.
            await asyncio.shield(self._restart)
        return await self._engine.send(body)

    async def _start_again(self) -> None:
        await self._engine.close()
        self._forget()  # the next process may have lost writes, and says so
        log.warning("index.process_ended", folder=str(self._folder))
        try:
            self._engine = await with_retries(
                lambda: _Engine.start(self._folder, self._spec, self._graph_from),
                _RESTART,
                SystemClock(),
                what="index.restart",
            )
        except (Misconfigured, ModelMismatch) as error:
            raise Transient(f"the index cannot be opened again: {error}", retry_after=30.0) from error


class _Answers:
    """The answers last given, by what was asked, as many as there is room for."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._used = 0
        self._kept: OrderedDict[bytes, bytes] = OrderedDict()

    def get(self, body: bytes) -> bytes | None:
        """Return the answer, if it is kept."""
        answer = self._kept.get(body)
        if answer is not None:
            self._kept.move_to_end(body)
        return answer

    def keep(self, body: bytes, answer: bytes) -> None:
        """Keep an answer, unless it would take more than an eighth of the room."""
        size = len(body) + len(answer)
        if size > self._room >> 3:
            return
        self._kept[body] = answer
        self._used += size
        while self._used > self._room:
            self._used -= sum(map(len, self._kept.popitem(last=False)))

    def clear(self) -> None:
        """Forget all of them."""
        self._kept.clear()
        self._used = 0


class _Engine:
    """One process of the engine and the calls that wait for it."""

    def __init__(self, process: Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.alive = True
        self._process = process
        self._writer = writer
        self._calls: dict[int, asyncio.Future[bytes | None]] = {}
        self._numbers = itertools.count()
        self._reading = asyncio.create_task(self._read(reader), name="index.answers")

    @classmethod
    async def start(cls, folder: Path, spec: ModelSpec, graph_from: int) -> _Engine:
        """Start a process and let it open the folder."""
        ours, theirs = socket.socketpair()
        with theirs:
            reader, writer = await asyncio.open_unix_connection(sock=ours)
            try:
                # A session of its own: Ctrl-C is for the parent, which drains and then closes this process.
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P", str(_WORKER), str(theirs.fileno())),
                    pass_fds=[theirs.fileno()],
                    stdin=DEVNULL,
                    stdout=DEVNULL,
                    start_new_session=True,
                )
            except BaseException:
                writer.close()
                raise
        engine = cls(process, reader, writer)
        try:
            opening = (str(folder), asdict(spec), POINT_NAMESPACE.bytes, graph_from)
            opened = _value(await engine.send(_body("open", opening)))
        except BaseException:
            await engine.close()
            raise
        log.info("index.opened", folder=str(folder), points=opened["points"], process=process.pid)
        if opened["lost_batches"]:
            log.error(
                "index.writes_lost",
                folder=str(folder),
                batches=opened["lost_batches"],
                advice="acknowledged writes are gone (power loss or a damaged file): make a new index of the event log "
                "by `catalens reindex --rebuild`",
            )
        return engine

    async def send(self, body: bytes) -> bytes | None:
        """Return the answer to what `_body` made, for `_value` to read, or raise the error that the process names.

        Transient if the process ended; None if the call is to be made again.
        """
        if not self.alive:
            raise Transient("the index process ended")
        number = next(self._numbers)
        answer: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        self._calls[number] = answer
        try:
            self._writer.writelines((_CALL.pack(len(body), number), body))
            with suppress(ConnectionError):  # the process ended: `_read` sees that too and fails the answer
                await self._writer.drain()
            return await answer
        finally:
            del self._calls[number]

    async def close(self) -> None:
        """Let the process flush and end, and wait for it; one that does not end is killed."""
        try:
            async with asyncio.timeout(_EXIT_DEADLINE):
                if self.alive:
                    await self.send(_body("close", ()))
                self._writer.close()
                await self._process.wait()
        except (Transient, TimeoutError, asyncio.CancelledError) as error:
            self._writer.close()
            if self._process.returncode is None:
                self._process.kill()
            await self._process.wait()
            if isinstance(error, asyncio.CancelledError):
                raise
        finally:
            self._reading.cancel()
            await asyncio.wait([self._reading])

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                length, number, name = _ANSWER.unpack(await reader.readexactly(_ANSWER.size))
                body, kind = await reader.readexactly(length), name.decode()
                if kind == "log":
                    level, event, fields = _value(body)
                    getattr(log, level)(event, **fields)
                    continue
                answer = self._calls.get(number)  # None: the caller went away
                if answer is None or answer.done():
                    continue
                if kind in _ERRORS:
                    answer.set_exception(_ERRORS[kind](_value(body)))
                else:
                    answer.set_result(None if kind == "again" else body)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the process ended: told below to everybody who waits
        finally:
            self.alive = False
            for waiting in self._calls.values():
                if not waiting.done():
                    waiting.set_exception(Transient("the index process ended; the write may or may not be stored"))


def _body(method: str, arguments: tuple[object, ...]) -> bytes:
    return pickle.dumps((method, arguments), protocol=5)


def _value(answer: bytes | None) -> Any:  # what the process answers
    return None if answer is None else pickle.loads(answer)  # noqa: S301  # our own child
