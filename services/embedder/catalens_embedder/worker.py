"""The worker loop: poll, decode, embed, write, commit."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import structlog

from catalens import events, lexical
from catalens.domain import (
    Deletion,
    ImageRef,
    ImageStatus,
    ImageUpdate,
    IndexDocument,
    Message,
    OfferChange,
    OfferUpdate,
    Product,
    Record,
    TombstoneWrite,
    TopicPartition,
    WriteOutcome,
)
from catalens.embedding import CachedEncoder, Compute
from catalens.errors import CatalensError, ForbiddenUrl, InvalidEvent, InvalidPicture, NotFound, StorageFull, Transient
from catalens.events import Outcome, ProductEvent
from catalens.ports import (
    BlobStore,
    Clock,
    EmbeddingCache,
    Encoder,
    EventConsumer,
    EventLog,
    ImageSource,
    VectorIndex,
)
from catalens.retry import RetryPolicy, with_retries
from catalens.settings import Settings
from catalens.telemetry import Metrics
from catalens_embedder import letters
from catalens_embedder.offsets import OffsetTracker

if TYPE_CHECKING:
    from catalens.domain import Embedding

log = structlog.get_logger(__name__)

T = TypeVar("T", Product, OfferChange, Deletion)
R = TypeVar("R")
_Vectors: TypeAlias = Mapping[str, "Embedding | InvalidPicture | NotFound"]
_OFFER_FIELDS = frozenset({"price", "currency", "stock"})

_POLL_SECONDS = 1.0
_COMMIT_SECONDS = 1.0  # at most one commit in this time: each makes the index write to disk first
_BATCHES_AT_ONCE = 2  # while one batch is being written the next one is in the encoder


@dataclass(slots=True)
class _Job:
    """One event in work."""

    record: Record
    event: ProductEvent
    pictures: dict[str, Embedding] = field(default_factory=dict)
    """By reference or URL."""
    picture_error: str | None = None
    """Why a picture failed, or all of them if `pictures` is empty."""

    @property
    def product(self) -> Product:
        """The content of an upsert."""
        return _as(Product, self.event)


class Embedder:
    """Turns product events into vectors in the index; every event ends applied, superseded or as a dead letter.

    Offsets are committed per partition up to the lowest event that is not done, after the index has acknowledged.
    """

    def __init__(
        self,
        log: EventLog,
        index: VectorIndex,
        encoder: Encoder,
        cache: EmbeddingCache,
        blobs: BlobStore,
        images: ImageSource,
        settings: Settings,
        metrics: Metrics,
        clock: Clock,
    ) -> None:
        self._log = log
        self._index = index
        self._encoder = CachedEncoder(encoder, cache, metrics)
        self._blobs = blobs
        self._images = images
        self._settings = settings.embedder
        self._metrics = metrics
        self._clock = clock
        self._policy = RetryPolicy(settings.embedder.engine_attempts)
        self._limit = letters.DeadLetterLimit(settings.embedder.dead_letter_limit)
        self._offsets = OffsetTracker()
        self._to_commit = asyncio.Event()
        self._finished = asyncio.Event()
        self._slots = asyncio.Semaphore(_BATCHES_AT_ONCE)
        self._working: set[asyncio.Task[None]] = set()
        # Half of what may be in work: beyond, remote pictures wait in a retry topic and hold up no text.
        self._most_fetches = max(1, settings.embedder.in_flight // 2)
        self._fetches = 0
        self._held: set[TopicPartition] = set()
        self._not_due: dict[TopicPartition, float] = {}

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set, then finish what is in flight, commit and leave the group.

        Raises FailingWorker when too much ends as dead letters.
        """
        consumer = await self._log.subscribe(events.EMBEDDER_GROUP, events.CONSUMED, on_revoke=self._revoked)
        self._consumer = consumer
        try:
            async with asyncio.TaskGroup() as tasks:
                committer = tasks.create_task(self._commit_loop(consumer), name="embedder.commit")
                await self._poll_loop(consumer, stop, tasks)
                await self._drain(consumer.assignment())
                committer.cancel()
                for late in self._working:
                    late.cancel()  # it is not committed, so it is read again
            await self._commit(consumer)
        finally:
            await consumer.close()

    # --- taking records -----------------------------------------------------------------------------------

    async def _poll_loop(self, consumer: EventConsumer, stop: asyncio.Event, tasks: asyncio.TaskGroup) -> None:
        stopping = asyncio.create_task(stop.wait(), name="embedder.stop")
        stopping.add_done_callback(lambda _: self._finished.set())
        try:
            while not stop.is_set():
                if self._offsets.in_flight >= self._settings.in_flight:
                    await self._wait_for_room(consumer, stop)
                    continue
                self._resume_due(consumer)
                fetch = asyncio.create_task(
                    consumer.fetch(self._settings.batch, self._poll_timeout()), name="embedder.fetch"
                )
                await asyncio.wait([fetch, stopping], return_when=asyncio.FIRST_COMPLETED)
                if not fetch.done():
                    fetch.cancel()
                    await asyncio.wait([fetch])
                    return
                try:
                    taken = self._take(consumer, fetch.result())
                except Transient as error:  # for as long as the log is away: nothing was taken
                    log.warning("embedder.fetch_failed", error=str(error))
                    await self._clock.sleep(error.retry_after)
                    continue
                if taken:
                    await self._slots.acquire()
                    self._spawn(tasks, self._work(taken, tasks), "embedder.batch")
        finally:
            stopping.cancel()

    def _spawn(self, tasks: asyncio.TaskGroup, work: Coroutine[Any, Any, None], name: str) -> None:
        task = tasks.create_task(work, name=name)
        self._working.add(task)
        task.add_done_callback(self._working.discard)

    async def _wait_for_room(self, consumer: EventConsumer, stop: asyncio.Event) -> None:
        """Wait with every partition paused; the empty fetch is the poll that keeps a Kafka group membership."""
        consumer.pause(consumer.assignment())
        try:
            async with asyncio.timeout(_POLL_SECONDS * 5):
                while self._offsets.in_flight >= self._settings.in_flight and not stop.is_set():
                    await self._next_finished()
        except TimeoutError:
            await consumer.fetch(1, 0.0)
        consumer.resume(consumer.assignment() - self._not_due.keys() - self._held)

    def _poll_timeout(self) -> float:
        soonest = min(self._not_due.values(), default=float("inf"))
        return max(0.0, min(_POLL_SECONDS, soonest - self._clock.now()))

    def _resume_due(self, consumer: EventConsumer) -> None:
        now = self._clock.now()
        ready = [partition for partition, when in self._not_due.items() if when <= now]
        for partition in ready:
            del self._not_due[partition]
        if self._fetches < self._most_fetches:
            ready += self._held
            self._held.clear()
        consumer.resume(ready)
        held_back = self._not_due.keys() | self._held
        consumer.pause(held_back & consumer.assignment())  # an assignment change forgets pauses

    def _take(self, consumer: EventConsumer, records: Sequence[Record]) -> list[Record]:
        """Keep what is due; a retry that is not stops its partition until it is, as one does that may find no room."""
        taken: list[Record] = []
        now = self._clock.now()
        room = self._most_fetches - self._fetches
        for record in records:
            if record.source in self._not_due or record.source in self._held:
                continue  # behind the one that was rewound
            if record.topic in events.RETRIES:
                if room <= 0:
                    self._held.add(record.source)
                    consumer.rewind(record)
                    consumer.pause([record.source])
                    continue
                room -= 1
            when = letters.due(record)
            if when > now:
                self._not_due[record.source] = when
                consumer.rewind(record)
                consumer.pause([record.source])
                continue
            self._offsets.take(record)
            taken.append(record)
        return taken

    # --- finishing records --------------------------------------------------------------------------------

    def _finish(self, record: Record) -> None:
        self._offsets.done(record)
        self._to_commit.set()
        self._finished.set()

    async def _next_finished(self) -> None:
        """Return when one more record was finished; callers look at their own condition again."""
        self._finished.clear()
        await self._finished.wait()

    async def _commit_loop(self, consumer: EventConsumer) -> None:
        while True:
            await self._to_commit.wait()
            self._to_commit.clear()
            try:
                await self._commit(consumer)
            except Transient as error:  # a full disk, say: the work goes on, and is done again if the process ends
                log.warning("embedder.commit_failed", error=str(error))
                self._to_commit.set()
            await self._clock.sleep(_COMMIT_SECONDS)

    async def _commit(self, consumer: EventConsumer) -> None:
        owned = consumer.assignment()
        offsets = {place: offset for place, offset in self._offsets.committable().items() if place in owned}
        if offsets:
            # What is committed is not read again, so the index must not lose it even to a power cut.
            await with_retries(self._index.flush, self._policy, self._clock, what="flush")
            await with_retries(lambda: consumer.commit(offsets), self._policy, self._clock, what="commit")
            self._offsets.committed(offsets)

    async def _drain(self, partitions: Collection[TopicPartition]) -> None:
        """Wait until nothing of `partitions` is in work, at most the drain deadline."""
        try:
            async with asyncio.timeout(self._settings.drain_deadline):
                while not self._offsets.idle(partitions):
                    await self._next_finished()
        except TimeoutError:
            log.warning("drain.incomplete", in_flight=self._offsets.in_flight)

    async def _revoked(self, partitions: Collection[TopicPartition]) -> None:
        await self._drain(partitions)
        await self._commit(self._consumer)
        self._offsets.drop(partitions)
        for partition in partitions:
            self._not_due.pop(partition, None)
            self._held.discard(partition)

    # --- the work on a batch ------------------------------------------------------------------------------

    async def _work(self, records: Sequence[Record], tasks: asyncio.TaskGroup) -> None:
        try:
            await self._attempt(records, tasks)
        finally:
            self._slots.release()

    async def _attempt(self, records: Sequence[Record], tasks: asyncio.TaskGroup) -> None:
        """Process a batch; one that fails is halved until the culprit stands alone. All writes are repeatable."""
        try:
            remote = await self._persist(lambda: self._process(records), "batch")
        except (letters.FailingWorker, asyncio.CancelledError):
            raise
        except Exception as error:  # the boundary: what nobody foresaw becomes a dead letter with its reason
            if len(records) > 1:
                middle = len(records) // 2
                await self._attempt(records[:middle], tasks)
                await self._attempt(records[middle:], tasks)
            elif isinstance(error, Transient):
                await self._retry_later(records[0], "engine_unavailable", str(error))
            elif isinstance(error, InvalidEvent):
                await self._bury(records[0], "invalid_event", str(error))
            else:
                log.exception("event.failed", topic=records[0].topic, offset=records[0].offset)
                await self._bury(records[0], "internal_error", f"{type(error).__name__}: {error}")
            return
        room = max(0, self._most_fetches - self._fetches)
        for job in remote[:room]:
            self._fetches += 1
            self._spawn(tasks, self._fetch(job), "embedder.pictures")
        if later := remote[room:]:
            await self._append(*(letters.postponed(job.event, job.record, self._clock.now()) for job in later))
            for job in later:
                self._finish(job.record)

    async def _persist(self, call: Callable[[], Awaitable[R]], what: str) -> R:
        """Return what `call` returns, tried as often as set, but on a full disk until there is room.

        The events are not to blame for that, and no retry topic and no dead letter could be written either.
        """
        while True:
            try:
                return await with_retries(call, self._policy, self._clock, what=what)
            except StorageFull as error:
                await self._clock.sleep(error.retry_after)

    async def _process(self, records: Sequence[Record]) -> list[_Job]:
        """Write what can be written now and finish it; return the products whose remote pictures are still to come."""
        upserts: list[_Job] = []
        offers: list[_Job] = []
        deletions: list[_Job] = []
        buried: list[tuple[Record, InvalidEvent]] = []
        for record in records:
            try:
                job = _Job(record, events.decode(record))
            except InvalidEvent as error:
                buried.append((record, error))
                continue
            data = job.event.data
            group = upserts if isinstance(data, Product) else offers if isinstance(data, OfferChange) else deletions
            group.append(job)
        remote = await self._upsert(upserts)
        if offers:
            written = await self._index.update_offers(
                [OfferUpdate(j.event.tenant, _as(OfferChange, j.event)) for j in offers]
            )
            await self._applied(offers, written)
        if deletions:
            gone = [TombstoneWrite(j.event.tenant, _as(Deletion, j.event)) for j in deletions]
            await self._applied(deletions, await self._index.delete(gone))
        for record, invalid in buried:
            await self._bury(record, "invalid_event", str(invalid))
        return remote

    async def _upsert(self, jobs: Sequence[_Job]) -> list[_Job]:
        """Embed texts and stored pictures, write, and return the jobs that wait for a remote picture."""
        needed = await self._without_known(jobs)
        if not needed:
            return []
        for job in needed:
            job.event = await self._with_stored_pictures(job.event)
        vectors = await self._encoder.many(self._computations(needed))
        documents = [self._document(job, vectors) for job in needed]
        written = await self._index.upsert(documents)
        waiting = [
            job
            for job, document, outcome in zip(needed, documents, written, strict=True)
            if document.image_status == "pending" and outcome != "superseded"
        ]
        finished = [(job, outcome) for job, outcome in zip(needed, written, strict=True) if job not in waiting]
        await self._applied([job for job, _ in finished], [outcome for _, outcome in finished])
        return waiting

    async def _without_known(self, jobs: Sequence[_Job]) -> list[_Job]:
        """Finish events whose content the index already has or has newer, so that a replay costs no inference."""
        by_tenant: defaultdict[str, list[_Job]] = defaultdict(list)
        for job in jobs:
            by_tenant[job.event.tenant].append(job)
        needed: list[_Job] = []
        for tenant, group in by_tenant.items():
            stored = await self._index.get(tenant, [job.product.product_id for job in group])
            for job in group:
                known = stored.get(job.product.product_id)
                version, own = (known.product.version if known else None) or 0, job.product.version or 0
                same = version == own and known is not None and known.image_status != "pending"
                if version > own or same:
                    if same and known is not None and known.image_status == "failed":
                        job.picture_error = known.image_error
                    await self._offer_only(job)
                    await self._applied([job], ["known" if same else "superseded"])
                else:
                    needed.append(job)
        return needed

    async def _offer_only(self, job: _Job) -> None:
        """Apply the offer that a product carries, which is versioned apart from its content."""
        product = job.product
        if product.carries_offer:
            fields = {name: getattr(product, name) for name in _OFFER_FIELDS & product.model_fields_set}
            offer = OfferChange.model_validate(
                {"product_id": product.product_id, **fields, "offer_version": product.offer_version}
            )
            await self._index.update_offers([OfferUpdate(job.event.tenant, offer)])

    async def _with_stored_pictures(self, event: ProductEvent) -> ProductEvent:
        """Turn inline pictures, which a foreign producer may send, into blobs."""
        product = event.data
        if not isinstance(product, Product) or all(image.data is None for image in product.images):
            return event
        stored: list[ImageRef] = []
        for image in product.images:
            if image.data is None:
                stored.append(image)
                continue
            try:
                picture = base64.b64decode(image.data, validate=True)
            except (binascii.Error, ValueError) as error:
                raise InvalidEvent(f"images.data: not base64: {error}") from error
            stored.append(ImageRef(blob=await self._blobs.put(picture)))
        return replace(event, data=product.model_copy(update={"images": tuple(stored)}))

    def _computations(self, jobs: Sequence[_Job]) -> dict[str, Compute]:
        wanted: dict[str, Compute] = {}
        for job in jobs:
            text = lexical.text_for_embedding(job.product)
            wanted[self._encoder.text_key(text)] = _text_job(self._encoder, text)
            for image in job.product.images:
                if image.blob is not None:
                    wanted[self._encoder.picture_key(image.blob)] = _picture_job(self._encoder, self._blobs, image.blob)
        return wanted

    def _document(self, job: _Job, vectors: _Vectors) -> IndexDocument:
        product = job.product
        for image in product.images:
            if image.blob is not None:
                self._note_picture(job, image.blob, vectors[self._encoder.picture_key(image.blob)])
        text = vectors[self._encoder.text_key(lexical.text_for_embedding(product))]
        return IndexDocument(
            tenant=job.event.tenant,
            product=product,
            image_status=_status(job, pending=any(image.url is not None for image in product.images)),
            image_error=job.picture_error,
            image=_mean(job.pictures),
            text=None if isinstance(text, Exception) else text,
            lexical=lexical.document_vector(product),
        )

    def _note_picture(self, job: _Job, name: str, result: Embedding | CatalensError) -> None:
        if isinstance(result, CatalensError):
            job.picture_error = str(result)
        else:
            job.pictures[name] = result

    # --- remote pictures ----------------------------------------------------------------------------------

    async def _fetch(self, job: _Job) -> None:
        try:
            await self._fetch_pictures(job)
        finally:
            self._fetches -= 1

    async def _fetch_pictures(self, job: _Job) -> None:
        """Fetch and embed what is remote; unreachable ones come back through the retry topics, then count as failed."""
        try:
            transient = await self._embed_remote(job)
            if transient is not None:
                again = letters.retry(job.event, job.record, self._clock.now(), transient)
                if again is not None:
                    await self._append(again)
                    self._metrics.pictures.labels("retried").inc()
                    self._count(job.event.type, "retried")
                    self._finish(job.record)
                    return
                job.picture_error = transient
            status = _status(job, pending=False)
            update = ImageUpdate(
                tenant=job.event.tenant,
                product_id=job.product.product_id,
                version=job.product.version or 0,
                image_status=status,
                image_error=job.picture_error,
                image=_mean(job.pictures),
            )
            written = await self._persist(lambda: self._index.update_images([update]), "update_images")
            self._metrics.pictures.labels("failed" if status == "failed" else "ok").inc()
            await self._applied([job], written)
        except Transient as error:
            await self._retry_later(job.record, "engine_unavailable", str(error))
        except letters.FailingWorker:
            raise
        except Exception as error:  # the boundary: as in _attempt
            log.exception("event.failed", topic=job.record.topic, offset=job.record.offset)
            await self._bury(job.record, "internal_error", f"{type(error).__name__}: {error}")

    async def _embed_remote(self, job: _Job) -> str | None:
        """Embed every remote picture of the product; returns why one of them should be tried again."""
        transient: str | None = None
        for image in job.product.images:
            if image.url is None:
                continue
            try:
                data = await self._images.fetch(image.url)
                self._note_picture(job, image.url, await self._encoder.picture(data, bulk=True))
            except Transient as error:
                transient = str(error)
            except (InvalidPicture, NotFound, ForbiddenUrl) as error:
                job.picture_error = f"{image.url}: {error}"
            except Exception as error:  # nobody foresaw it: the product stays, as with any picture that fails
                log.exception("picture.failed", product_id=job.product.product_id)
                job.picture_error = f"{image.url}: {type(error).__name__}: {error}"
        return transient

    # --- ends ---------------------------------------------------------------------------------------------

    async def _applied(self, jobs: Sequence[_Job], outcomes: Sequence[WriteOutcome]) -> None:
        """Count, report to whoever waits, and finish."""
        reports = []
        for job, outcome in zip(jobs, outcomes, strict=True):
            self._count(job.event.type, outcome)
            self._limit.note(dead=False)
            if outcome == "applied":
                self._metrics.freshness.observe(max(0.0, self._clock.now() - job.record.timestamp))
            if job.event.awaited:
                reports.append(_outcome(job, outcome))
        if reports:
            await self._log.append([events.encode_outcome(report) for report in reports])
        for job in jobs:
            self._finish(job.record)

    async def _retry_later(self, record: Record, reason: str, error: str) -> None:
        """Send the record to its next retry topic, or to the dead letters when they are used up."""
        try:
            event = events.decode(record)
        except InvalidEvent as invalid:
            await self._bury(record, "invalid_event", str(invalid))
            return
        again = letters.retry(event, record, self._clock.now(), error)
        if again is None:
            await self._bury(record, reason, error)
            return
        await self._append(again)
        self._count(event.type, "retried")
        self._finish(record)

    async def _bury(self, record: Record, reason: str, error: str) -> None:
        log.warning("event.dead", topic=record.topic, offset=record.offset, reason=reason, error=error)
        await self._append(letters.dead_letter(record, reason, error))
        if record.headers.get("ce_awaited") == "true" and record.headers.get("ce_id"):
            failed = Outcome(event_id=record.headers["ce_id"], status="failed", error=error)
            await self._append(events.encode_outcome(failed))
        known = record.headers.get("ce_type", "")
        self._count(known if known in (events.UPSERTED, events.DELETED, events.OFFER_CHANGED) else "unknown", "dead")
        self._finish(record)
        self._limit.note(dead=True)

    async def _append(self, *messages: Message) -> None:
        """Append to the log, waiting as long as it is away: without this the record may not be finished."""
        endless = RetryPolicy(attempts=1_000_000)
        await with_retries(lambda: self._log.append(messages), endless, self._clock, what="append")

    def _count(self, kind: str, outcome: str) -> None:
        self._metrics.processed.labels(kind, outcome).inc()


def _as(kind: type[T], event: ProductEvent) -> T:
    """Return the event's data, which `_process` sorted by its kind."""
    if not isinstance(event.data, kind):
        raise TypeError(f"{event.type} carries {type(event.data).__name__}, not {kind.__name__}")
    return event.data


def _text_job(encoder: CachedEncoder, text: str) -> Compute:
    return lambda: encoder.compute_text(text, bulk=True)


def _picture_job(encoder: CachedEncoder, blobs: BlobStore, reference: str) -> Compute:
    async def compute() -> Embedding:
        return await encoder.compute_picture(await blobs.get(reference), bulk=True)

    return compute


def _status(job: _Job, *, pending: bool) -> ImageStatus:
    if not job.product.images:
        return "none"
    if pending:
        return "pending"
    return "ok" if job.pictures else "failed"


def _mean(pictures: Mapping[str, Embedding]) -> Embedding | None:
    """Return the L2-normalised mean: one image vector a product, however many pictures it has."""
    if not pictures:
        return None
    total: Embedding = np.sum(np.stack(list(pictures.values())), axis=0, dtype=np.float32)
    length = float(np.linalg.norm(total))
    return (total / length).astype(np.float32) if length > 0 else next(iter(pictures.values()))


def _outcome(job: _Job, outcome: WriteOutcome) -> Outcome:
    if outcome == "superseded":
        return Outcome(event_id=job.event.id, status="superseded")
    if job.picture_error is not None and not job.pictures:
        return Outcome(event_id=job.event.id, status="failed", error=job.picture_error)
    return Outcome(event_id=job.event.id, status="indexed")
