"""The ports: what the services need from the outside world, each with its guarantee.

An adapter is named by what it is (`SqliteEventLog`, `EdgeIndex`); one contract suite per port in
tests/contracts runs on every adapter.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol
from uuid import UUID

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
    Message,
    ModelSpec,
    NumberKey,
    OfferUpdate,
    Offsets,
    PictureInfo,
    PointState,
    Record,
    SeenPicture,
    StoredProduct,
    TombstoneWrite,
    TopicPartition,
    WriteOutcome,
)
from catalens.limits import Allowance

if TYPE_CHECKING:
    from catalens.domain import Embedding

RevokeCallback = Callable[[Collection[TopicPartition]], Awaitable[None]]


class EventLog(Protocol):
    """An ordered, durable, partitioned log with consumer groups (Kafka's model)."""

    async def append(self, messages: Sequence[Message]) -> Sequence[tuple[TopicPartition, int]]:
        """Append in order and return each message's place, only once all of them survive kill -9.

        Records of one key keep their order. Raises StorageFull, Transient (log away), Misconfigured
        (a topic that does not exist). Nothing is appended twice by one call.
        """
        ...

    async def subscribe(
        self, group: str | None, topics: Sequence[str], *, on_revoke: RevokeCallback | None = None
    ) -> EventConsumer:
        """Join `group` on `topics`, starting at the committed offsets, or at the earliest record.

        With no group, every partition is read from its end as of this call, and nothing can be committed.
        Within a group each partition has one owner at a time; `on_revoke` is awaited before a partition goes.
        """
        ...

    def scan(self, topics: Sequence[str], *, start: Offsets | None = None) -> AsyncIterator[Record]:
        """Iterate every record of `topics` present as of this call, from `start` or the earliest, then end.

        In offset order per partition, outside any group. Raises Transient (log away), Misconfigured (no such topic).
        """
        ...

    async def discard(self, before: Offsets) -> None:
        """Drop, per partition, every record below the offset; what is gone already is no error."""
        ...

    async def committed(self, group: str, topics: Sequence[str]) -> Mapping[TopicPartition, int]:
        """Return the offset that `group` goes on from, per partition of `topics` (the earliest if none is stored)."""
        ...

    async def set_committed(self, group: str, offsets: Offsets) -> None:
        """Durably store where `group` goes on from; raises Conflict while the group has members."""
        ...

    async def members(self, group: str) -> int:
        """Return how many members `group` has now, in any process."""
        ...

    async def expire(self, now: float) -> int:
        """Drop records past their retention that every group has read; returns how many. Offsets never restart.

        Of products and offers the newest record of each key is kept for ever, so that a scan rebuilds the index.
        """
        ...

    async def lag(self, group: str, topics: Sequence[str]) -> Mapping[TopicPartition, int]:
        """Return end offset − committed offset (or − earliest) per partition."""
        ...

    async def close(self) -> None:
        """Release everything; consumers still open are closed."""
        ...


class EventConsumer(Protocol):
    """One member of a group."""

    async def fetch(self, max_records: int, timeout: float) -> Sequence[Record]:
        """Return up to `max_records` records, in offset order per partition, waiting at most `timeout` seconds.

        Returns as soon as there is at least one. Records of paused partitions are not returned.
        """
        ...

    async def commit(self, offsets: Offsets) -> None:
        """Durably store, per partition, the offset of the next record to read. Only owned partitions count."""
        ...

    def assignment(self) -> frozenset[TopicPartition]:
        """Return the partitions owned now."""
        ...

    def pause(self, partitions: Collection[TopicPartition]) -> None:
        """Stop returning records of these until `resume`; an assignment change clears it."""
        ...

    def resume(self, partitions: Collection[TopicPartition]) -> None:
        """Undo `pause`."""
        ...

    def rewind(self, record: Record) -> None:
        """Return `record` and what follows it again at the next fetches, as a retry that is not due needs."""
        ...

    async def close(self) -> None:
        """Leave the group at once, without committing."""
        ...


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """A picture's embedding and what was seen while decoding it."""

    embedding: Embedding
    info: PictureInfo


class Encoder(Protocol):
    """Turns texts and pictures into vectors of one space. One future an item; batching is inside."""

    @property
    def spec(self) -> ModelSpec:
        """What model this is."""
        ...

    async def embed_text(self, text: str, *, bulk: bool = False) -> Embedding:
        """Return the text's vector.

        `bulk=False` (queries) goes first and raises Overloaded when the queue is full; `bulk=True` waits for room.
        Raises Transient if the runtime is away, InvalidEvent if the model gives no finite vector for this text.
        """
        ...

    async def embed_image(self, picture: bytes, *, bulk: bool = False) -> EncodedImage:
        """Return the picture's vector; as embed_text, and raises InvalidPicture with the reason."""
        ...

    async def close(self) -> None:
        """Finish what is in flight, refuse the rest, release the model."""
        ...


class VectorIndex(Protocol):
    """Versioned documents with named vectors. Every write is conditional on its version and durable on return
    (kill -9; see the adapter on power loss). Hidden from every read but `counts`: tombstones, lone offers."""

    async def upsert(self, documents: Sequence[IndexDocument]) -> Sequence[WriteOutcome]:
        """Write contents that are newer than what is stored, content tombstones included; per document.

        An equal version is "known" and changes nothing; an offer that the product carries is applied by its own
        version in the same write. One batch may name a product twice: the result is as if written one by one.
        """
        ...

    async def update_images(self, updates: Sequence[ImageUpdate]) -> Sequence[WriteOutcome]:
        """Set picture vector and status where the stored content version is exactly that of the update."""
        ...

    async def update_offers(self, updates: Sequence[OfferUpdate]) -> Sequence[WriteOutcome]:
        """Merge newer offers' set fields; one without a product is kept hidden and joins it when it comes."""
        ...

    async def delete(self, tombstones: Sequence[TombstoneWrite]) -> Sequence[WriteOutcome]:
        """Replace the content by a versioned tombstone, hidden from every query; the offer's version stays."""
        ...

    async def search(self, tenant: str, legs: Sequence[Leg], where: Filter) -> Sequence[Sequence[LegHit]]:
        """Return each leg's best live products under `where`, best first, at most `leg.limit`."""
        ...

    async def get(
        self, tenant: str, product_ids: Sequence[str], *, with_vectors: bool = False
    ) -> Mapping[str, StoredProduct]:
        """Return the live products among `product_ids`."""
        ...

    async def facts(self, tenant: str, product_ids: Sequence[str]) -> Mapping[str, Facts]:
        """Return what is known of the live products among `product_ids`: cheaper than `get`."""
        ...

    async def sample(self, tenant: str, limit: int) -> Sequence[StoredProduct]:
        """Return up to `limit` live products with their vectors, chosen by nothing that says anything about them.

        The same ones as long as nothing is written.
        """
        ...

    async def count(self, tenant: str, wheres: Sequence[Filter]) -> Sequence[int]:
        """Return how many live products there are under each filter."""
        ...

    async def facet(
        self, tenant: str, asked: Sequence[tuple[FacetKey, Filter]], limit: int
    ) -> Sequence[Sequence[FacetCount]]:
        """Return, per key, its most frequent values among live products under the filter, ties in value order.

        A product counts once for each of its values, and for a category for every path above it. Raises NoFacet.
        """
        ...

    async def extremes(self, tenant: str, key: NumberKey, where: Filter) -> tuple[float, float] | None:
        """Return the smallest and the largest number among live products under `where`; None if none has one."""
        ...

    async def page(self, tenant: str, *, after: str | None, limit: int, where: Filter) -> Sequence[StoredProduct]:
        """Return live products in ascending product_id order (code points), those after `after`."""
        ...

    async def counts(self, tenant: str) -> IndexCounts:
        """Return how many documents of each kind there are."""
        ...

    async def collect_tombstones(self, older_than: float) -> int:
        """Forget tombstones that were written before `older_than` (Unix seconds); returns how many."""
        ...

    async def blobs_in_use(self, tenant: str | None, references: Sequence[str]) -> frozenset[str]:
        """Return those blob references that some stored product (of any tenant if None) still names."""
        ...

    async def export(
        self, *, after: UUID | None = None, limit: int = 256, with_vectors: bool = False
    ) -> Sequence[PointState]:
        """Return every kind of point of every tenant in ascending point id order, those after `after`."""
        ...

    async def flush(self) -> None:
        """Make everything written so far survive power loss, where the adapter can."""
        ...

    async def close(self) -> None:
        """Flush and release."""
        ...


class Indexes(Protocol):
    """The vector indexes of one installation side by side, one a model; the current one is what queries read."""

    async def current(self) -> IndexInfo | None:
        """Return what queries read now, as every process sees it; None before the first index."""
        ...

    async def all(self) -> Sequence[IndexInfo]:
        """Return every index there is."""
        ...

    async def open(self, info: IndexInfo) -> VectorIndex:
        """Open the index of `info.spec`, made empty if there is none; the first one ever becomes the current one.

        Raises Misconfigured, Transient. Whether it is the current one is the caller's to check.
        """
        ...

    async def switch(self, info: IndexInfo) -> None:
        """Make the index of `info` the current one, atomically and durably."""
        ...

    async def drop(self, info: IndexInfo) -> None:
        """Delete an index for good; raises Conflict if it is the current one."""
        ...

    async def notes(self, info: IndexInfo) -> Mapping[str, str]:
        """Return what `set_notes` last stored with that index; empty if nothing."""
        ...

    async def set_notes(self, info: IndexInfo, notes: Mapping[str, str]) -> None:
        """Durably keep these few words with that index, such as how far a copy has come."""
        ...

    async def held(self) -> bool:
        """Return whether the workers are asked to stand aside because a switch is under way."""
        ...

    async def hold(self, on: bool) -> None:
        """Ask the workers to stand aside, or to go on; forgotten by nobody's end but `hold(False)` or `switch`."""
        ...

    async def close(self) -> None:
        """Close every index that was opened here."""
        ...


class EmbeddingCache(Protocol):
    """Vectors by content hash and model fingerprint, and what pictures at URLs were.

    Losing it costs time, never data; it never raises.
    """

    async def get(self, keys: Sequence[str]) -> Sequence[Embedding | None]:
        """Return what is known, in order, in one round trip."""
        ...

    async def put(self, items: Mapping[str, Embedding]) -> None:
        """Remember; may evict others."""
        ...

    async def recall(self, url: str) -> SeenPicture | None:
        """Return what was last remembered of the picture at `url`."""
        ...

    async def remember(self, url: str, seen: SeenPicture) -> None:
        """Remember what the picture at `url` was; may forget others."""
        ...

    def stats(self) -> Mapping[str, int]:
        """Return hits, misses and what else the adapter knows: entries, errors, available (0 while it is away)."""
        ...

    async def close(self) -> None:
        """Release."""
        ...


@dataclass(frozen=True, slots=True)
class FetchedPicture:
    """A picture's bytes and what its host said of them."""

    data: bytes
    seen: SeenPicture | None
    """What to remember of it; None if the host gave nothing to ask by the next time."""


class ImageSource(Protocol):
    """Fetches pictures from a hostile world."""

    def check(self, url: str) -> None:
        """Raise ForbiddenUrl if the URL is malformed or visibly forbidden, without any network access."""
        ...

    async def fetch(self, url: str) -> bytes:
        """Return the bytes. Raises ForbiddenUrl, InvalidPicture (too many bytes), NotFound (404, 410) or
        Transient (unreachable, slow, 5xx)."""
        ...

    async def fetch_changed(self, url: str, seen: SeenPicture | None) -> FetchedPicture | None:
        """Return the picture, or None if its host says that it is still the one that was `seen`; raises as fetch."""
        ...

    async def close(self) -> None:
        """Release."""
        ...


class BlobStore(Protocol):
    """Uploaded pictures by the SHA-256 of their bytes."""

    async def put(self, data: bytes) -> str:
        """Store durably and return the reference (lower-case hex SHA-256). Storing twice is storing once."""
        ...

    async def get(self, reference: str) -> bytes:
        """Return the bytes; raises NotFound, Transient."""
        ...

    def references(self, *, older_than: float) -> AsyncIterator[str]:
        """Iterate the references last stored before `older_than` (Unix seconds)."""
        ...

    async def delete(self, reference: str, *, older_than: float | None = None) -> None:
        """Forget; unknown references are no error. With `older_than` only what was not stored again since then."""
        ...

    async def close(self) -> None:
        """Release."""
        ...


class RequestMemory(Protocol):
    """Remembers answers by Idempotency-Key, durably, for a limited time."""

    async def remember(self, key: str, value: bytes, *, ttl: float) -> bytes:
        """Store `value` under `key` unless it holds one that is not older than `ttl` seconds; return what it
        then holds. Atomic: of two concurrent callers one value wins, and both are told which."""
        ...

    async def close(self) -> None:
        """Release."""
        ...


class RateLimiter(Protocol):
    """Counts the requests of a client against its rate; whatever happens to what it counts with, it never raises."""

    async def take(self, client: str, rate: float) -> Allowance:
        """Grant one request if the client's bucket, which `rate` tokens a second flow into, holds one."""
        ...

    async def owe(self, client: str, rate: float, requests: int) -> Allowance:
        """Take so many tokens more for a request that was granted, whether they are there or not: what comes next waits
        until they are."""
        ...

    async def close(self) -> None:
        """Release."""
        ...


class Clock(Protocol):
    """Time, so that waiting can be tested without waiting."""

    def now(self) -> float:
        """Return Unix seconds."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Return after that long."""
        ...
