"""The embedded vector index: Qdrant's engine (`qdrant-edge-py`) in a process of its own, behind the VectorIndex port.

Durability: a write that returned survives kill -9 of both processes (the engine's write-ahead log). Power loss may
cost what no `flush` has covered, at most the last 5 seconds: who must not lose those, flushes before committing what
they came from. Acknowledged writes that are missing at a start are said (`index.writes_lost`).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import pickle
import socket
import struct
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import structlog
from pydantic_core import from_json

from catalens.domain import (
    POINT_NAMESPACE,
    Condition,
    Filter,
    ImageUpdate,
    IndexCounts,
    IndexDocument,
    Leg,
    LegHit,
    ModelSpec,
    Offer,
    OfferUpdate,
    Product,
    Range,
    Scalar,
    SparseVector,
    StoredProduct,
    TombstoneWrite,
    WriteOutcome,
    category_prefixes,
    point_id,
)
from catalens.errors import CatalensError, InvalidEvent, Misconfigured, ModelMismatch, StorageFull, Transient
from catalens.retry import RetryPolicy, SystemClock, with_retries

if TYPE_CHECKING:
    from catalens.domain import Embedding

log = structlog.get_logger(__name__)

# Run by its path: as a module it would import the whole package, and need its memory and start-up time, for nothing.
_WORKER: Final = Path(__file__).with_name("edge_worker.py")
_LENGTH: Final = struct.Struct("<Q")
_RESTART: Final = RetryPolicy(attempts=5)
_EXIT_DEADLINE: Final = 30.0
"""Seconds that the process has to flush and end, then it is killed: the write-ahead log has everything."""
_ERRORS: Final[Mapping[str, type[CatalensError]]] = {
    "config": Misconfigured,
    "model": ModelMismatch,
    "full": StorageFull,
    "transient": Transient,
}
_OFFER_FIELDS: Final = frozenset(Offer.model_fields)
_TERMS: Final = frozenset({"brand", "group_id", "locale"})
"""Fields that are stored as terms, as attributes are: one payload index serves them all."""
_KEYWORDS: Final = {"currency": "offer.currency", "image_status": "image_status"}
"""Fields that change without the content, each with an index of its own."""
_NUMBERS: Final = {"price": "offer.price", "stock": "offer.stock"}

Primitive: TypeAlias = tuple[str, str, Any]
"""("any", payload key, values) · ("range", payload key, (gte, gt, lte, lt)) · ("points", "", point ids)."""
PlainFilter: TypeAlias = tuple[list[list[Primitive]], list[Primitive]]
"""AND of ORs of primitives, and primitives of which none may match: what the engine's process understands."""


class EdgeIndex:
    """A VectorIndex in one folder, for one process at a time. A call whose process dies raises Transient; the next
    one starts another, in at most five tries."""

    def __init__(self, folder: Path, spec: ModelSpec, engine: _Engine) -> None:
        self._folder = folder
        self._spec = spec
        self._engine = engine
        self._restart: asyncio.Task[None] | None = None
        self._closed = False

    @classmethod
    async def open(cls, folder: Path, spec: ModelSpec) -> EdgeIndex:
        """Open or create the index in `folder` for vectors of `spec`.

        Raises Misconfigured (folder in use, damaged, or of another format) and ModelMismatch.
        """
        return cls(folder, spec, await _Engine.start(folder, spec))

    async def upsert(self, documents: Sequence[IndexDocument]) -> Sequence[WriteOutcome]:
        """See the port."""
        return await self._write("upsert", [self._content(document) for document in documents])

    async def update_images(self, updates: Sequence[ImageUpdate]) -> Sequence[WriteOutcome]:
        """See the port. Without a vector, only the status is set."""
        items = [
            {
                **_identity(update.tenant, update.product_id),
                "version": update.version,
                "fields": _present(image_status=update.image_status, image_error=update.image_error),
                "image": self._vector("image", update.image),
            }
            for update in updates
        ]
        return await self._write("update_images", items)

    async def update_offers(self, updates: Sequence[OfferUpdate]) -> Sequence[WriteOutcome]:
        """See the port."""
        items = [
            {**_identity(update.tenant, update.offer.product_id), "offer": _stated_offer(update.offer)}
            for update in updates
        ]
        return await self._write("update_offers", items)

    async def delete(self, tombstones: Sequence[TombstoneWrite]) -> Sequence[WriteOutcome]:
        """See the port."""
        items = [
            {
                **_identity(write.tenant, write.deletion.product_id),
                "version": _known(write.deletion.version, "version"),
            }
            for write in tombstones
        ]
        return await self._write("delete", items)

    async def search(self, tenant: str, legs: Sequence[Leg], where: Filter) -> Sequence[Sequence[LegHit]]:
        """See the port. Every leg is exact: all vectors under the filter are compared."""
        if not legs:
            return []
        plain = [
            (
                leg.using,
                _packed(leg.vector) if isinstance(leg.vector, SparseVector) else self._vector("query", leg.vector),
                leg.limit,
            )
            for leg in legs
        ]
        answer = await self._call("search", tenant, plain, plain_filter(tenant, where))
        return [[LegHit(product_id, score) for product_id, score in hits] for hits in answer]

    async def get(
        self, tenant: str, product_ids: Sequence[str], *, with_vectors: bool = False
    ) -> Mapping[str, StoredProduct]:
        """See the port."""
        points = [point_id(tenant, product_id).bytes for product_id in dict.fromkeys(product_ids)]
        found = await self._call("get", points, with_vectors)
        return {payload["product_id"]: _stored(payload) for payload in found}

    async def page(self, tenant: str, *, after: str | None, limit: int, where: Filter) -> Sequence[StoredProduct]:
        """See the port."""
        found = await self._call("page", tenant, after, limit, plain_filter(tenant, where))
        return [_stored(payload) for payload in found]

    async def counts(self, tenant: str) -> IndexCounts:
        """See the port."""
        return IndexCounts(*await self._call("counts", tenant))

    async def collect_tombstones(self, older_than: float) -> int:
        """See the port. The offer that a tombstone kept goes with it."""
        return int(await self._call("collect_tombstones", older_than))

    async def blobs_in_use(self, tenant: str | None, references: Sequence[str]) -> frozenset[str]:
        """See the port."""
        return frozenset(await self._call("blobs_in_use", tenant, list(references)))

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
        outcomes: list[WriteOutcome] = await self._call(method, items) if items else []
        return outcomes

    async def _call(self, method: str, *arguments: object) -> Any:  # what the process answers
        if self._closed:
            raise Transient("the index is closed")
        if not self._engine.alive:
            if self._restart is None or self._restart.done():
                self._restart = asyncio.create_task(self._start_again(), name="index.restart")
                self._restart.add_done_callback(lambda task: task.cancelled() or task.exception())
            # Shielded: a caller that goes away must not stop the restart for the others.
            await asyncio.shield(self._restart)
        return await self._engine.call(method, *arguments)

    async def _start_again(self) -> None:
        await self._engine.close()
        log.warning("index.process_ended", folder=str(self._folder))
        try:
            self._engine = await with_retries(
                lambda: _Engine.start(self._folder, self._spec), _RESTART, SystemClock(), what="index.restart"
            )
        except (Misconfigured, ModelMismatch) as error:
            raise Transient(f"the index cannot be opened again: {error}", retry_after=30.0) from error

    # --- from the domain to what is stored ------------------------------------------------------------------

    def _content(self, document: IndexDocument) -> dict[str, Any]:
        product = document.product
        return {
            **_identity(document.tenant, product.product_id),
            "version": _known(product.version, "version"),
            "offer": _stated_offer(product) if product.carries_offer else None,
            "image": self._vector("image", document.image),
            "text": self._vector("text", document.text),
            "lexical": _packed(document.lexical) if document.lexical and document.lexical.indices else None,
            "fields": _present(
                doc=product.model_dump_json(exclude_unset=True, exclude={*_OFFER_FIELDS, "version"}),
                terms=_terms(product),
                numbers={
                    _number_key(key): float(value)
                    for key, value in product.attributes.items()
                    if isinstance(value, int | float) and not isinstance(value, bool)
                },
                blobs=[image.blob for image in product.images if image.blob],
                image_status=document.image_status,
                image_error=document.image_error,
            ),
        }

    def _vector(self, name: str, vector: Embedding | None) -> bytes | None:
        """Return the vector's bytes; the engine would take NaN silently, so it never sees one."""
        if vector is None:
            return None
        if vector.shape != (self._spec.dimension,) or not np.isfinite(vector).all():
            raise InvalidEvent(f"the {name} vector is not {self._spec.dimension} finite numbers")
        return np.ascontiguousarray(vector, dtype=np.float32).tobytes()


class _Engine:
    """One process of the engine and the calls that wait for it."""

    def __init__(self, process: Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.alive = True
        self._process = process
        self._writer = writer
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count()
        self._reading = asyncio.create_task(self._read(reader), name="index.answers")

    @classmethod
    async def start(cls, folder: Path, spec: ModelSpec) -> _Engine:
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
            opened = await engine.call("open", str(folder), asdict(spec), POINT_NAMESPACE.bytes)
        except BaseException:
            await engine.close()
            raise
        log.info("index.opened", folder=str(folder), points=opened["points"], process=process.pid)
        if opened["lost_batches"]:
            log.error(
                "index.writes_lost",
                folder=str(folder),
                batches=opened["lost_batches"],
                advice="acknowledged writes are gone (power loss or a damaged file): import the catalogue again "
                "(`catalens reindex` is not built yet)",
            )
        return engine

    async def call(self, method: str, *arguments: object) -> Any:  # what the process answers
        """Return the answer, or raise the error that the process names; Transient if it ended."""
        if not self.alive:
            raise Transient("the index process ended")
        number = next(self._numbers)
        body = pickle.dumps((number, method, arguments), protocol=5)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[number] = answer
        try:
            self._writer.writelines((_LENGTH.pack(len(body)), body))
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
                    await self.call("close")
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
                (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
                number, kind, value = pickle.loads(await reader.readexactly(length))  # noqa: S301  # our own child
                answer = self._calls.get(number)  # None: the caller went away
                if answer is None or answer.done():
                    continue
                if kind == "ok":
                    answer.set_result(value)
                else:
                    answer.set_exception(_ERRORS[kind](value))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the process ended: told below to everybody who waits
        finally:
            self.alive = False
            for waiting in self._calls.values():
                if not waiting.done():
                    waiting.set_exception(Transient("the index process ended; the write may or may not be stored"))


# --- the translation, pure ----------------------------------------------------------------------------------------


def plain_filter(tenant: str, where: Filter) -> PlainFilter:
    """Return `where` as the engine's process understands it.

    A value of the wrong type for its key (a number for a brand) matches nothing; a key that no product can have is a
    ValueError.
    """
    none_of: list[Primitive] = []
    if where.exclude:
        none_of.append(_points(tenant, where.exclude))
    if where.without_groups:
        none_of.append(("any", "terms", [_term("group_id", group) for group in where.without_groups]))
    return [_clause(tenant, condition) for condition in where.conditions], none_of


def _clause(tenant: str, condition: Condition) -> list[Primitive]:
    key, values, within = condition.key, condition.any_of, condition.within
    if key == "product_id":
        return [_points(tenant, _texts(values))]
    if key in _TERMS:
        return [("any", "terms", [_term(key, value) for value in _texts(values)])]
    if key in _KEYWORDS:
        return [("any", _KEYWORDS[key], _texts(values))]
    if key == "category":
        paths = [path for value in _texts(values) for path in category_prefixes(value)[-1:]]
        return [("any", "terms", [_term("category", path) for path in paths])]
    if key == "in_stock":
        # Flags are stored as 0 and 1: this engine matches no boolean, and says nothing.
        return [("any", "in_stock", [int(value) for value in values if isinstance(value, bool)])]
    if key in _NUMBERS:
        equal = [
            Range(gte=value, lte=value)
            for value in values
            if isinstance(value, int | float) and not isinstance(value, bool)
        ]
        ranges = [*equal, *([within] if within else [])]
        return [_range(_NUMBERS[key], bounds) for bounds in ranges] or [_points(tenant, ())]
    name = key.removeprefix("attributes.")
    if name == key or not name:
        raise ValueError(f"no filter is known for {key!r}")
    terms: list[Primitive] = [("any", "terms", [_term(key, value) for value in values])]
    return [*terms, *([_range(f"numbers.{_number_key(name)}", within)] if within else [])]


def _points(tenant: str, product_ids: Iterable[str]) -> Primitive:
    return ("points", "", [point_id(tenant, product_id).bytes for product_id in product_ids])


def _range(key: str, bounds: Range) -> Primitive:
    return ("range", key, (bounds.gte, bounds.gt, bounds.lte, bounds.lt))


def _texts(values: Iterable[Scalar]) -> list[str]:
    return [value for value in values if isinstance(value, str)]


def _terms(product: Product) -> list[str]:
    terms = [_term(key, value) for key in sorted(_TERMS) if (value := getattr(product, key)) is not None]
    terms += [_term("category", path) for path in category_prefixes(product.category)]
    for name, value in product.attributes.items():
        members: Sequence[Scalar] = value if isinstance(value, list) else [value]
        terms += [_term(f"attributes.{name}", member) for member in members]
    return terms


def _term(key: str, value: Scalar) -> str:
    """Return a filter key and value as one keyword. 12 and 12.0 are one value; 12, "12" and true are three."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps([key, value], ensure_ascii=False, separators=(",", ":"))


def _number_key(name: str) -> str:
    """Return a payload key without the dots, quotes and brackets that mean something in a JSON path."""
    return "n" + blake2b(name.encode(), digest_size=8).hexdigest()


def _identity(tenant: str, product_id: str) -> dict[str, Any]:
    return {"point": point_id(tenant, product_id).bytes, "tenant": tenant, "product_id": product_id}


def _stated_offer(offer: Offer) -> dict[str, Any]:
    _known(offer.offer_version, "offer_version")
    return offer.model_dump(include=set(_OFFER_FIELDS), exclude_unset=True)


def _known(version: int | None, name: str) -> int:
    if version is None:
        raise ValueError(f"{name} must be set before a write")
    return version


def _packed(vector: SparseVector) -> tuple[bytes, bytes]:
    values = np.asarray(vector.values, dtype=np.float32)
    if not np.isfinite(values).all():
        raise InvalidEvent("the lexical vector's weights are not finite")
    return np.asarray(vector.indices, dtype=np.uint32).tobytes(), values.tobytes()


def _present(**fields: object) -> dict[str, object]:
    return {name: value for name, value in fields.items() if value is not None and value not in ([], {})}


def _stored(payload: Mapping[str, Any]) -> StoredProduct:
    content = from_json(payload["doc"])
    return StoredProduct(
        tenant=payload["tenant"],
        product=Product.model_validate({**content, **payload["offer"], "version": payload["version"]}),
        image_status=payload["image_status"],
        image_error=payload.get("image_error"),
        indexed_at=payload["indexed_at"],
        vectors={name: np.frombuffer(data, dtype=np.float32) for name, data in payload.get("vectors", {}).items()},
    )
