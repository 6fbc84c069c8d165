"""The worker loop: poll, decode, embed, write, commit."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import structlog

from catalens import events, lexical, tracing
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
from catalens.errors import (
    CatalensError,
    ForbiddenUrl,
    InvalidEvent,
    InvalidPicture,
    Misconfigured,
    NotFound,
    StorageFull,
    Transient,
)
from catalens.events import Outcome, ProductEvent
from catalens.measured import MeasuredImages
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
from catalens.telemetry import Metrics, stage
from catalens_embedder import letters
from catalens_embedder.offsets import OffsetTracker
from catalens_embedder.tagging import Tagger

if TYPE_CHECKING:
    from catalens.domain import Embedding

log = structlog.get_logger(__name__)

T = TypeVar("T", Product, OfferChange, Deletion)
R = TypeVar("R")
_Vectors: TypeAlias = Mapping[str, "Embedding | InvalidPicture | NotFound"]
_OFFER_FIELDS = frozenset({"price", "currency", "stock"})

_POLL_SECONDS = 1.0
_COMMIT_SECONDS = 1.0  # at most one commit in this time: each makes the index write to disk first
_LAG_SECONDS = 5.0
_STAGES = {"index reads": "index_read", "index writes": "index_write"}
_NO_BLOB = "0" * 64
_BATCHES_AT_ONCE = 2  # while one batch is being written the next one is in the encoder


def require_pictures(settings: Settings) -> None:
    """Raise Misconfigured where products' pictures could not be embedded: no product would be complete."""
    if settings.encoder.towers == "text":
        raise Misconfigured(
            "CATALENS_ENCODER__TOWERS=text leaves out the tower that embeds products' pictures: "
            "set it to image or both here, and to text for query services only"
        )


class EngineAway(Transient):
    """`engine` did not answer, which says nothing about the event."""

    def __init__(self, engine: str, error: Transient) -> None:
        super().__init__(str(error), retry_after=error.retry_after)
        self.engine = engine


@dataclass(slots=True, eq=False)
class _Job:
    """One event in work."""

    record: Record
    event: ProductEvent
    pictures: dict[str, Embedding] = field(default_factory=dict)
    """By reference or URL."""
    picture_error: str | None = None
    """Why a picture failed, or all of them if `pictures` is empty."""
    text_key: str | None = None
    """Of the text's vector, once that was asked for; None in a process without the text tower."""

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
        *,
        group: str = events.EMBEDDER_GROUP,
        reports: bool = True,
    ) -> None:
        """Work in `group`; without `reports` another group tells the world what becomes of the same events."""
        self._log = log
        self._group = group
        self._reports = reports
        self._index = index
        self._encoder = CachedEncoder(encoder, cache, metrics)
        self._blobs = blobs
        self._images = MeasuredImages(images, metrics)
        self._settings = settings.embedder
        self._languages = settings.languages
        self._reads_texts = settings.encoder.towers != "image"
        self._tagger = Tagger.of(settings, self._encoder)
        self._metrics = metrics
        self._clock = clock
        self._expiry_days = settings.log.dead_letter_days
        self._policy = RetryPolicy(settings.embedder.engine_attempts)
        self._answers: Counter[str] = Counter()
        self._limit = letters.DeadLetterLimit(settings.embedder.dead_letter_limit)
        self._failing: letters.FailingWorker | None = None
        self._halt = asyncio.Event()
        self._offsets = OffsetTracker()
        self._to_commit = asyncio.Event()
        self._finished = asyncio.Event()
        self._batches = 0
        self._working: set[asyncio.Task[None]] = set()
        # Half of what may be in work: beyond, remote pictures wait in a retry topic and hold up no text.
        self._most_fetches = max(1, settings.embedder.in_flight // 2)
        self._fetches = 0
        self._held: set[TopicPartition] = set()
        self._allowed: Callable[[], Awaitable[bool]] | None = None
        self._cleared = False
        self._not_due: dict[TopicPartition, float] = {}
        metrics.in_flight.set_function(lambda: self._offsets.in_flight)
        metrics.dead_letters_left.set_function(lambda: self._limit.left)
        metrics.paused.labels("not_due").set_function(lambda: len(self._not_due))
        metrics.paused.labels("pictures").set_function(lambda: len(self._held))

    async def run(self, stop: asyncio.Event, allowed: Callable[[], Awaitable[bool]] | None = None) -> None:
        """Work until `stop` is set, then finish what is in flight, commit and leave the group.

        `allowed` is asked each time that the group has dealt partitions, before their records count; if it says no,
        the worker leaves at once.
        Raises FailingWorker when too much ends as dead letters; what is finished by then is committed.
        """
        self._allowed = allowed
        consumer = await self._log.subscribe(self._group, events.CONSUMED, on_revoke=self._revoked)
        self._consumer = consumer
        try:
            async with _task_group() as tasks:
                committer = tasks.create_task(self._commit_loop(consumer), name="embedder.commit")
                watcher = tasks.create_task(self._tell_lag(), name="embedder.lag")
                await self._poll_loop(consumer, stop, tasks)
                await self._drain(consumer.assignment())
                committer.cancel()
                watcher.cancel()
                for late in self._working:
                    late.cancel()  # it is not committed, so it is read again
            await self._commit_last(consumer)
        finally:
            await consumer.close()
        if self._failing is not None:
            raise self._failing

    async def apply(self, records: Sequence[Record]) -> None:
        """Process records that come from no group to their end, remote pictures included; raises FailingWorker."""
        async with _task_group() as tasks:
            await self._attempt(records, tasks)
        if self._failing is not None:
            raise self._failing

    # --- taking records -----------------------------------------------------------------------------------

    async def _poll_loop(self, consumer: EventConsumer, stop: asyncio.Event, tasks: asyncio.TaskGroup) -> None:
        stopping = asyncio.create_task(self._stopping(stop), name="embedder.stop")
        stopping.add_done_callback(lambda _: self._finished.set())
        try:
            while not stopping.done():
                if self._full():
                    await self._wait_for_room(consumer, stopping)
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
                    records = fetch.result()
                    if records and self._allowed is not None and not self._cleared:
                        self._cleared = True  # before the question: a rebalance meanwhile asks it again
                        if not await self._allowed():
                            return
                        records = [record for record in records if record.source in consumer.assignment()]
                    taken = self._take(consumer, records)
                except Transient as error:  # for as long as the log is away: nothing was taken
                    log.warning("embedder.fetch_failed", error=str(error))
                    await self._clock.sleep(error.retry_after)
                    continue
                if taken:
                    self._batches += 1
                    self._spawn(tasks, self._work(taken, tasks), "embedder.batch")
        finally:
            stopping.cancel()

    async def _stopping(self, stop: asyncio.Event) -> None:
        """Return when `stop` is set or too much has failed."""
        waits = [asyncio.create_task(event.wait(), name="embedder.stop") for event in (stop, self._halt)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def _spawn(self, tasks: asyncio.TaskGroup, work: Coroutine[Any, Any, None], name: str) -> None:
        task = tasks.create_task(work, name=name)
        self._working.add(task)
        task.add_done_callback(self._working.discard)

    def _full(self) -> bool:
        return self._batches >= _BATCHES_AT_ONCE or self._offsets.in_flight >= self._settings.in_flight

    async def _wait_for_room(self, consumer: EventConsumer, stopping: asyncio.Task[None]) -> None:
        """Wait with every partition paused; the empty fetch is the poll that keeps a Kafka group membership."""
        consumer.pause(consumer.assignment())
        self._metrics.paused.labels("full").set(len(consumer.assignment()))
        try:
            async with asyncio.timeout(_POLL_SECONDS * 5):
                while self._full() and not stopping.done():
                    await self._next_finished()
        except TimeoutError:
            await self._keep_membership(consumer)
        consumer.resume(consumer.assignment() - self._not_due.keys() - self._held)
        self._metrics.paused.labels("full").set(0)

    async def _keep_membership(self, consumer: EventConsumer) -> None:
        try:
            for early in await consumer.fetch(1, 0.0):  # of a partition that was assigned after the pause
                consumer.rewind(early)
        except Transient as error:
            log.warning("embedder.fetch_failed", error=str(error))

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
            with self._metrics.stages.labels("commit").time():
                # What is committed is not read again, so the index must not lose it even to a power cut.
                await with_retries(self._index.flush, self._policy, self._clock, what="flush")
                await with_retries(lambda: consumer.commit(offsets), self._policy, self._clock, what="commit")
            self._offsets.committed(offsets)

    async def _tell_lag(self) -> None:
        """Set the gauge of the group's lag every few seconds; while the log is away the last one stands."""
        while True:
            try:
                lag = await self._log.lag(self._group, events.CONSUMED)
                for place, records in lag.items():
                    self._metrics.lag.labels(place.topic, str(place.partition)).set(records)
            except Exception as error:  # noqa: BLE001  # a gauge must not stop the worker; asked again in a moment
                log.warning("embedder.lag_unknown", error=f"{type(error).__name__}: {error}")
            await asyncio.sleep(_LAG_SECONDS)  # not the worker's clock: nothing that it does waits for this

    async def _commit_last(self, consumer: EventConsumer) -> None:
        """Commit before partitions go; what cannot be committed is read again, which does no harm."""
        try:
            await self._commit(consumer)
        except Transient as error:
            log.warning("embedder.commit_failed", error=str(error))

    async def _drain(self, partitions: Collection[TopicPartition]) -> None:
        """Wait until nothing of `partitions` is in work, at most the drain deadline."""
        try:
            async with asyncio.timeout(self._settings.drain_deadline):
                while not self._offsets.idle(partitions):
                    await self._next_finished()
        except TimeoutError:
            log.warning("drain.incomplete", in_flight=self._offsets.in_flight)

    async def _revoked(self, partitions: Collection[TopicPartition]) -> None:
        self._metrics.rebalances.inc()
        self._cleared = False
        await self._drain(partitions)
        await self._commit_last(self._consumer)
        self._offsets.drop(partitions)
        for partition in partitions:
            self._not_due.pop(partition, None)
            self._held.discard(partition)

    # --- the work on a batch ------------------------------------------------------------------------------

    async def _work(self, records: Sequence[Record], tasks: asyncio.TaskGroup) -> None:
        self._metrics.batch_size.observe(len(records))
        try:
            with _followed("process", records), self._metrics.stages.labels("batch").time():
                await self._attempt(records, tasks)
        finally:
            self._batches -= 1
            self._finished.set()

    async def _attempt(self, records: Sequence[Record], tasks: asyncio.TaskGroup) -> None:
        """Process a batch to its end, however long an engine is away. All writes are repeatable."""
        left = await self._round(records, tasks, self._answers.copy())
        while left:
            # Other batches may go on meanwhile, up to what may be in flight: if one of them gets an answer, the fault
            # is not the engine's.
            self._batches -= 1
            self._finished.set()
            try:
                await self._clock.sleep(self._policy.longest)
            finally:
                self._batches += 1
            left = await self._round(left, tasks, self._answers.copy())

    async def _round(self, records: Sequence[Record], tasks: asyncio.TaskGroup, before: Counter[str]) -> list[Record]:
        """Process a batch; one that fails is halved until the culprit stands alone.

        An engine that has answered nobody since `before` is away: what is left then is returned, for another round,
        with the record that was tried last at its end, so that the others get their turn.
        """
        try:
            remote = await with_retries(lambda: self._process(records), self._policy, self._clock, what="batch")
        except StorageFull:
            return list(records)
        except Exception as error:  # noqa: BLE001  # the boundary: what nobody foresaw becomes a dead letter
            if len(records) > 1:
                middle = len(records) // 2
                left = await self._round(records[:middle], tasks, before)
                return [*records[middle:], *left] if left else await self._round(records[middle:], tasks, before)
            if isinstance(error, EngineAway) and await self._away(error, before):
                return [records[0]]
            await self._give_up(records[0], error)
            return []
        room = max(0, self._most_fetches - self._fetches)
        for job in remote[:room]:
            self._fetches += 1
            self._spawn(tasks, self._fetch(job), "embedder.pictures")
        if later := remote[room:]:
            await self._append(*(letters.postponed(job.event, job.record, self._clock.now()) for job in later))
            self._metrics.retries.labels("no_room").inc(len(later))
            for job in later:
                self._finish(job.record)
        return []

    async def _give_up(self, record: Record, error: Exception) -> None:
        """Send a record that is itself at fault where it belongs."""
        if isinstance(error, Transient):
            await self._retry_later(record, "engine_refuses", str(error))
        elif isinstance(error, InvalidEvent):
            await self._bury(record, "invalid_event", str(error))
        else:
            log.error("event.failed", topic=record.topic, offset=record.offset, exc_info=error, **_ids(record))
            await self._bury(record, "internal_error", f"{type(error).__name__}: {error}")

    async def _away(self, error: EngineAway, before: Counter[str]) -> bool:
        """Return whether the engine answers nobody, so that no event is to blame."""
        if self._answers[error.engine] > before[error.engine]:
            return False
        if error.engine == "blob reads" and await self._blobs_answer():
            return False
        log.warning("engine.away", engine=error.engine, in_flight=self._offsets.in_flight, error=str(error))
        return True

    async def _blobs_answer(self) -> bool:
        """Ask for a blob that cannot be: a catalogue without other pictures gives no other sign."""
        try:
            await self._blobs.get(_NO_BLOB)
        except NotFound:
            return True
        except Transient:
            return False
        return True

    async def _ask(self, engine: str, answer: Awaitable[R]) -> R:
        """Return the engine's answer and remember that it gives some; raises EngineAway if it does not answer."""
        timed = stage(self._metrics.stages, _STAGES[engine]) if engine in _STAGES else nullcontext()
        try:
            with timed:
                found = await answer
        except StorageFull:
            raise
        except Transient as error:
            raise EngineAway(engine, error) from error
        self._answers[engine] += 1
        return found

    async def _persist(self, call: Callable[[], Awaitable[R]], what: str) -> R:
        """Return what `call` returns for one event, waiting while an engine is away or a disk full.

        Raises EngineAway after a round of tries if that engine answers others: the fault is this event's.
        """
        while True:
            before = self._answers.copy()
            try:
                return await with_retries(call, self._policy, self._clock, what=what)
            except StorageFull as error:
                log.warning("engine.away", engine=what, in_flight=self._offsets.in_flight, error=str(error))
            except EngineAway as error:
                if not await self._away(error, before):
                    raise
            await self._clock.sleep(self._policy.longest)

    async def _process(self, records: Sequence[Record]) -> list[_Job]:
        """Write what can be written now and finish it; return the products whose remote pictures are still to come."""
        upserts: list[_Job] = []
        offers: list[_Job] = []
        deletions: list[_Job] = []
        buried: list[tuple[Record, str, str]] = []
        now = self._clock.now()  # of this very try: the one before may have been long ago
        for record in records:
            try:
                # Without reports, what the main topics hold was taken when it came, however late it is read here.
                read = now if self._reports or record.topic in events.RETRIES else record.timestamp
                letters.refuse_if_expired(record, read, self._expiry_days)
                job = _Job(record, events.decode(record))
            except letters.Expired as error:
                buried.append((record, "expired", str(error)))
                continue
            except InvalidEvent as error:
                buried.append((record, "invalid_event", str(error)))
                continue
            data = job.event.data
            group = upserts if isinstance(data, Product) else offers if isinstance(data, OfferChange) else deletions
            group.append(job)
        remote = await self._upsert(upserts)
        if offers:
            changes = [OfferUpdate(j.event.tenant, _as(OfferChange, j.event)) for j in offers]
            await self._applied(offers, await self._ask("index writes", self._index.update_offers(changes)))
        if deletions:
            gone = [TombstoneWrite(j.event.tenant, _as(Deletion, j.event)) for j in deletions]
            await self._applied(deletions, await self._ask("index writes", self._index.delete(gone)))
        for record, reason, told in buried:
            if self._reports:
                await self._bury(record, reason, told)
            else:  # it reads the same for the other group, which buries it
                self._finish(record)
        return remote

    async def _upsert(self, jobs: Sequence[_Job]) -> list[_Job]:
        """Embed texts and stored pictures, write, and return the jobs that wait for a remote picture."""
        needed = await self._without_known(jobs)
        if not needed:
            return []
        for job in needed:
            job.event = await self._with_stored_pictures(job.event)
        with stage(self._metrics.stages, "embed"):
            vectors = await self._encoder.many(self._computations(needed))
            if self._tagger is not None:
                await self._ask("encoder", self._tagger.read())
        documents = [self._document(job, vectors) for job in needed]
        written = await self._ask("index writes", self._index.upsert(documents))
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
            ids = [job.product.product_id for job in group]
            stored = await self._ask("index reads", self._index.get(tenant, ids))
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
            await self._ask("index writes", self._index.update_offers([OfferUpdate(job.event.tenant, offer)]))

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
            stored.append(ImageRef(blob=await self._ask("blob writes", self._blobs.put(picture))))
        return replace(event, data=product.model_copy(update={"images": tuple(stored)}))

    def _computations(self, jobs: Sequence[_Job]) -> dict[str, Compute]:
        wanted: dict[str, Compute] = {}
        for job in jobs:
            if self._reads_texts:
                text = lexical.text_for_embedding(job.product)
                job.text_key = self._encoder.text_key(text)
                wanted[job.text_key] = self._text_job(text)
            for image in job.product.images:
                if image.blob is not None:
                    wanted[self._encoder.picture_key(image.blob)] = self._picture_job(image.blob)
        return wanted

    def _text_job(self, text: str) -> Compute:
        return lambda: self._ask("encoder", self._encoder.compute_text(text, bulk=True))

    def _picture_job(self, reference: str) -> Compute:
        async def compute() -> Embedding:
            picture = await self._ask("blob reads", self._blobs.get(reference))
            return await self._ask("encoder", self._encoder.compute_picture(picture, bulk=True))

        return compute

    def _document(self, job: _Job, vectors: _Vectors) -> IndexDocument:
        product = job.product
        for image in product.images:
            if image.blob is not None:
                self._note_picture(job, image.blob, vectors[self._encoder.picture_key(image.blob)])
        text = None if job.text_key is None else vectors[job.text_key]
        picture, text = _mean(job.pictures), None if isinstance(text, Exception) else text
        return IndexDocument(
            tenant=job.event.tenant,
            product=product,
            image_status=_status(job, pending=any(image.url is not None for image in product.images)),
            image_error=job.picture_error,
            image=picture,
            text=text,
            lexical=lexical.document_vector(product, self._languages),
            tags={} if self._tagger is None else self._tagger.tags(text if picture is None else picture),
        )

    def _note_picture(self, job: _Job, name: str, result: Embedding | CatalensError) -> None:
        if isinstance(result, CatalensError):
            job.picture_error = str(result)
        else:
            job.pictures[name] = result

    # --- remote pictures ----------------------------------------------------------------------------------

    async def _fetch(self, job: _Job) -> None:
        structlog.contextvars.bind_contextvars(**_ids(job.record))  # of this task only
        try:
            with _followed("pictures", [job.record]), self._metrics.stages.labels("pictures").time():
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
                    self._metrics.retries.labels("picture_unreachable").inc()
                    self._count(job.event.type, "retried")
                    self._finish(job.record)
                    return
                job.picture_error = transient
            status = _status(job, pending=False)
            image, tagged = _mean(job.pictures), None
            if self._tagger is not None and image is not None:
                tagged = job.product, self._tagger.tags(image)
            update = ImageUpdate(
                tenant=job.event.tenant,
                product_id=job.product.product_id,
                version=job.product.version or 0,
                image_status=status,
                image_error=job.picture_error,
                image=image,
                tagged=tagged,
            )
            written = await self._persist(
                lambda: self._ask("index writes", self._index.update_images([update])), "update_images"
            )
            self._metrics.pictures.labels("failed" if status == "failed" else "ok").inc()
            await self._applied([job], written)
        except Transient as error:
            await self._retry_later(job.record, "engine_refuses", str(error))
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
                self._note_picture(job, image.url, await self._remote_vector(image.url))
            except Transient as error:
                transient = str(error)
            except (InvalidPicture, NotFound, ForbiddenUrl) as error:
                job.picture_error = f"{image.url}: {error}"
            except Exception as error:  # nobody foresaw it: the product stays, as with any picture that fails
                log.exception("picture.failed", product_id=job.product.product_id)
                job.picture_error = f"{image.url}: {type(error).__name__}: {error}"
        return transient

    async def _remote_vector(self, url: str) -> Embedding:
        """Return the vector of the picture at `url`, which is not sent again if it is the one it was last time."""
        known = await self._encoder.recall(url)
        fetched = await self._images.fetch_changed(url, known[0] if known else None)
        if fetched is None:
            if known is None:
                raise TypeError("a picture that nobody has seen cannot be unchanged")
            return known[1]
        vector = await self._embedded(fetched.data)
        if fetched.seen is not None:
            await self._encoder.remember(url, fetched.seen)
        return vector

    async def _embedded(self, picture: bytes) -> Embedding:
        return await self._persist(
            lambda: self._ask("encoder", self._encoder.picture(picture, bulk=True)), "embed_image"
        )

    # --- ends ---------------------------------------------------------------------------------------------

    async def _applied(self, jobs: Sequence[_Job], outcomes: Sequence[WriteOutcome]) -> None:
        """Count, report to whoever waits, and finish."""
        reports = []
        for job, outcome in zip(jobs, outcomes, strict=True):
            self._count(job.event.type, outcome)
            self._limit.note(dead=False)
            if outcome == "applied" and self._reports:
                self._metrics.freshness.observe(max(0.0, self._clock.now() - events.first_arrival(job.record)))
            if job.event.awaited and self._reports:
                reports.append(_outcome(job, outcome))
        if reports:
            await self._append(*(events.encode_outcome(report) for report in reports))
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
        try:
            with tracing.follow("retry", {event.traceparent: {"catalens.reason": reason}}):
                await self._append(again)
        except InvalidEvent:  # it came compressed and is too large to be sent on
            await self._bury(record, reason, error)
            return
        self._metrics.retries.labels(reason).inc()
        self._count(event.type, "retried")
        self._finish(record)

    async def _bury(self, record: Record, reason: str, error: str) -> None:
        log.warning("event.dead", topic=record.topic, offset=record.offset, reason=reason, error=error, **_ids(record))
        with tracing.follow("dead_letter", {record.headers.get("ce_traceparent"): {"catalens.reason": reason}}):
            letter = letters.dead_letter(record, reason, error)
            try:
                await self._append(letter)
            except InvalidEvent:  # as above; it must not stop every worker that reads it
                await self._append(letters.without_data(letter))
        self._metrics.dead_letters.labels(reason).inc()
        if self._reports and record.headers.get("ce_awaited") == "true" and record.headers.get("ce_id"):
            failed = Outcome(event_id=record.headers["ce_id"], status="failed", error=error)
            await self._append(events.encode_outcome(failed))
        known = record.headers.get("ce_type", "")
        self._count(known if known in (events.UPSERTED, events.DELETED, events.OFFER_CHANGED) else "unknown", "dead")
        self._finish(record)
        if record.topic not in events.RETRIES:  # what came back, and fails again, says nothing about this worker
            self._note_dead()

    def _note_dead(self) -> None:
        """Count a dead letter; beyond the limit nothing more is taken, and `run` ends when the rest is finished."""
        try:
            self._limit.note(dead=True)
        except letters.FailingWorker as error:
            self._failing = self._failing or error
            self._halt.set()

    async def _append(self, *messages: Message) -> None:
        """Append to the log, waiting as long as it is away: without this the record may not be finished."""
        endless = RetryPolicy(attempts=1_000_000)
        await with_retries(lambda: self._log.append(messages), endless, self._clock, what="append")

    def _count(self, kind: str, outcome: str) -> None:
        self._metrics.processed.labels(kind, outcome).inc()


@asynccontextmanager
async def _task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """Yield a TaskGroup whose error, if there is but one, is raised as what it is: the caller tells it in one line."""
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
    except ExceptionGroup as failures:
        if len(failures.exceptions) == 1:
            raise failures.exceptions[0] from failures
        raise


def _followed(name: str, records: Sequence[Record]) -> tracing.Span:
    """Return a span in each trace that the records are part of; records of one trace share it."""
    if not tracing.on():
        return tracing.NOTHING
    traces: defaultdict[str | None, list[Record]] = defaultdict(list)
    for record in records:
        traces[tracing.valid(record.headers.get("ce_traceparent"))].append(record)
    parents: dict[str | None, tracing.Attributes] = {
        parent: {
            "messaging.batch.message_count": len(group),
            "catalens.event_ids": [record.headers.get("ce_id", "") for record in group],
            "catalens.products": [record.key or "" for record in group],
        }
        for parent, group in traces.items()
    }
    return tracing.follow(name, parents, "consumer")


def _ids(record: Record) -> dict[str, str]:
    """Return what a log line about the record carries, the same as the door's lines about the request."""
    tenant, _, product_id = (record.key or "").partition("|")
    ids = {
        "event_id": record.headers.get("ce_id", "")[:128],
        "trace_id": tracing.trace_id(record.headers.get("ce_traceparent")) or "",
        "tenant": tenant[:63],
        "product_id": product_id[:128],
    }
    return {name: value for name, value in ids.items() if value}


def _as(kind: type[T], event: ProductEvent) -> T:
    """Return the event's data, which `_process` sorted by its kind."""
    if not isinstance(event.data, kind):
        raise TypeError(f"{event.type} carries {type(event.data).__name__}, not {kind.__name__}")
    return event.data


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
