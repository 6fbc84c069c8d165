"""Builds the index of another model beside the current one and switches to it, while everything else goes on.

How and why: docs/adr/0011-changing-the-model.md.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Final, TypeVar
from uuid import UUID

import structlog

from catalens import events
from catalens.domain import Deletion, IndexInfo, Offsets, PointState, Record, TopicPartition
from catalens.encoders import open_encoder
from catalens.engines import EngineRoom
from catalens.errors import CatalensError, Conflict, NotFound
from catalens.ports import (
    BlobStore,
    Clock,
    EmbeddingCache,
    Encoder,
    EventLog,
    ImageSource,
    Indexes,
    VectorIndex,
)
from catalens.retry import RetryPolicy, SystemClock, with_retries
from catalens.settings import Settings
from catalens.telemetry import Metrics
from catalens_embedder.worker import Embedder, require_pictures

T = TypeVar("T")
log = structlog.get_logger(__name__)

_POLL_SECONDS: Final = 0.5
_NOTE_SECONDS: Final = 2.0
"""How often progress is noted: what was done since is known to the new index, and costs little to do again."""
_LEAVE_SECONDS: Final = 120.0
"""Longer than workers need to drain, and than the log needs to notice that one was killed."""
_CATCH_UP_SECONDS: Final = 600.0
_TELL_SECONDS: Final = 60.0
_UNUSED: Final = "catalens-nobody"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a reindex has come: copy or scan, then follow, then switch, done of about total."""

    phase: str
    done: int = 0
    total: int = 0


Report = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Notes:
    """What is noted with an index that is being built, or that was current."""

    phase: str
    """copy, scan, follow; complete: it is, or was, the current one."""
    as_of: float
    """Unix seconds of a moment as of which it knows all offers; what came later is in the log."""
    origin: str
    """copy or scan: what it was made from."""
    cursor: str = ""
    offsets: str = ""
    """Where its group goes on from, once it is complete."""

    @classmethod
    def read(cls, noted: Mapping[str, str]) -> Notes | None:
        """Return what was written; None if nothing was."""
        if "phase" not in noted:
            return None
        return cls(
            noted["phase"],
            float(noted["as_of"]),
            noted.get("origin", ""),
            noted.get("cursor", ""),
            noted.get("offsets", ""),
        )

    def written(self) -> dict[str, str]:
        """Return these as an index keeps them."""
        return {name: str(value) for name, value in asdict(self).items()}


class Reindexer:
    """Makes the index of `encoder`'s model the current one; killed at any moment, the next run goes on from there.

    Until the switch the current index is only read, and workers and queries go on with it. What can not be processed
    ends as the worker has it end: in a retry topic, then as a dead letter.
    """

    def __init__(
        self,
        *,
        log: EventLog,
        indexes: Indexes,
        encoder: Encoder,
        cache: EmbeddingCache,
        blobs: BlobStore,
        images: ImageSource,
        settings: Settings,
        clock: Clock,
        report: Report,
    ) -> None:
        self._log = log
        self._indexes = indexes
        self._encoder = encoder
        self._cache = cache
        self._blobs = blobs
        self._images = images
        self._settings = settings
        self._clock = clock
        self._report = report
        self._policy = RetryPolicy(settings.embedder.engine_attempts)
        work = settings.embedder
        # No more than may be in work at once: the remote pictures of a page are fetched side by side.
        self._page = max(1, min(2 * work.batch, work.in_flight // 2))
        # Half of the time that the log keeps every record; the other half is for reading them.
        self._fresh = min(settings.kafka.compaction_lag_hours, 24.0) * 1800
        self._noted_at = 0.0

    async def run(self, model: str, *, rebuild: bool = False) -> IndexInfo:
        """Return the index that is current in the end: one of `model`, whose encoder this was made with.

        With `rebuild` a new one is made from the log alone, even if the current one is of that model. Raises Conflict
        (another run is at it), FailingWorker, Transient and CatalensError (workers that do not leave).
        """
        if not await self._wait(self._alone, _LEAVE_SECONDS):
            raise Conflict("another reindex is under way: wait until it has ended")
        await self._indexes.hold(False)  # a run that was killed may have left it
        current = await self._indexes.current()
        target = await self._target(model, current, rebuild=rebuild)
        if target == current and not rebuild:
            return target
        async with AsyncExitStack() as stack:
            source = None if rebuild or current is None else await self._open(stack, current)
            index = await self._open(stack, target)
            if current is None and not rebuild:
                return target  # there is nothing to copy, and the first index is the current one
            group = events.REINDEX_GROUPS + target.name
            notes = await self._begin(target, group, source)
            embedder = Embedder(
                log=self._log,
                index=index,
                encoder=self._encoder,
                cache=self._cache,
                blobs=self._blobs,
                images=self._images,
                settings=self._settings,
                metrics=Metrics(),  # its own: the same events are counted by those who work for the current index
                clock=self._clock,
                group=group,
                reports=False,
            )
            log.info("reindex.started", model=model, index=target.name, phase=notes.phase)
            if notes.phase == "scan":
                notes = await self._scan(target, index, embedder, notes)
            while source is not None and notes.phase == "copy":
                notes = await self._copy(target, source, index, embedder, notes)
                if self._stale(notes):  # it took so long that the log forgets: once more, which costs no inference
                    notes = self._again(notes)
            await self._follow_and_switch(current, target, embedder, group)
        log.info("reindex.done", model=model, index=target.name)
        return target

    # --- where to begin -----------------------------------------------------------------------------------

    async def _target(self, model: str, current: IndexInfo | None, *, rebuild: bool) -> IndexInfo:
        spec = self._encoder.spec
        if current is not None and current.spec.fingerprint == spec.fingerprint and not rebuild:
            return current
        alike = [info for info in await self._indexes.all() if info.spec.fingerprint == spec.fingerprint]
        alike.sort(key=lambda info: info.generation, reverse=True)
        for info in alike:
            notes = Notes.read(await self._indexes.notes(info))
            unfinished = notes is not None and notes.phase in ("scan", "follow") and notes.origin == "scan"
            if unfinished if rebuild else info != current:
                return info
        generation = alike[0].generation + 1 if alike else 0
        return IndexInfo(model, spec, max(generation, 1) if rebuild else generation)

    async def _open(self, stack: AsyncExitStack, info: IndexInfo) -> VectorIndex:
        index = await self._indexes.open(info)
        stack.push_async_callback(index.close)
        return index

    async def _begin(self, target: IndexInfo, group: str, source: VectorIndex | None) -> Notes:
        """Return where the work goes on, with the group's offsets set to where the log must be read from."""
        notes = Notes.read(await self._indexes.notes(target))
        if notes is None:
            # All that was committed by now is in the current index, or further on in a retry topic.
            await self._log.set_committed(group, await self._committed(events.EMBEDDER_GROUP))
            origin = "scan" if source is None else "copy"
            notes = Notes(origin, self._clock.now(), origin)
        elif notes.phase == "complete":
            await self._log.set_committed(group, _offsets(notes.offsets))
            notes = replace(notes, phase="follow")
        if source is not None and notes.phase in ("scan", "follow") and self._stale(notes):
            notes = self._again(notes)
        await self._note(target, notes)
        return notes

    def _stale(self, notes: Notes) -> bool:
        """Return whether the log, which keeps but the last offer of each product, may lack some that are not known."""
        return notes.phase != "copy" and self._clock.now() - notes.as_of > self._fresh

    def _again(self, notes: Notes) -> Notes:
        return replace(notes, phase="copy", cursor="", as_of=self._clock.now())

    async def _note(self, target: IndexInfo, notes: Notes) -> None:
        await with_retries(
            lambda: self._indexes.set_notes(target, notes.written()), self._policy, self._clock, what="notes"
        )
        self._noted_at = self._clock.now()

    # --- what is there ------------------------------------------------------------------------------------

    async def _copy(
        self, target: IndexInfo, source: VectorIndex, index: VectorIndex, embedder: Embedder, notes: Notes
    ) -> Notes:
        """Bring every point of `source`, embedded anew; what the new index already knows costs no inference."""
        after = UUID(notes.cursor) if notes.cursor else None
        begun, done = _share(after), 0
        while states := await self._retried(partial(source.export, after=after, limit=self._page), "export"):
            await embedder.apply([record for state in states for record in _as_records(state)])
            after = states[-1].point
            notes = replace(notes, cursor=str(after))
            await self._checkpoint(target, index, notes)
            done += len(states)
            total = done / (_share(after) - begun)
            self._report(Progress("copy", round(total * _share(after)), round(total)))
        return await self._finished(target, index, notes)

    async def _scan(self, target: IndexInfo, index: VectorIndex, embedder: Embedder, notes: Notes) -> Notes:
        """Bring what the log still has: of each product the last content, and the last offer."""
        position = dict(_offsets(notes.cursor)) if notes.cursor else {}
        starts = await self._committed(_UNUSED)
        total = sum((await self._log.lag(_UNUSED, events.COMPACTED)).values())
        page: list[Record] = []
        async for record in self._log.scan(events.COMPACTED, start=dict(position)):
            page.append(record)
            if len(page) == self._page:
                notes = await self._scanned(target, index, embedder, notes, page, position)
                done = sum(offset - starts[place] for place, offset in position.items())
                self._report(Progress("scan", done, total))
                page = []
        if page:
            notes = await self._scanned(target, index, embedder, notes, page, position)
        return await self._finished(target, index, notes)

    async def _scanned(
        self,
        target: IndexInfo,
        index: VectorIndex,
        embedder: Embedder,
        notes: Notes,
        page: Sequence[Record],
        position: dict[TopicPartition, int],
    ) -> Notes:
        await embedder.apply(page)
        position.update({record.source: record.offset + 1 for record in page})
        notes = replace(notes, cursor=_text(position))
        await self._checkpoint(target, index, notes)
        return notes

    async def _checkpoint(self, target: IndexInfo, index: VectorIndex, notes: Notes) -> None:
        if self._clock.now() - self._noted_at >= _NOTE_SECONDS:
            await self._retried(index.flush, "flush")
            await self._note(target, notes)

    async def _finished(self, target: IndexInfo, index: VectorIndex, notes: Notes) -> Notes:
        await self._retried(index.flush, "flush")
        notes = replace(notes, phase="follow", cursor="")
        await self._note(target, notes)
        return notes

    # --- what comes, and the switch -----------------------------------------------------------------------

    async def _follow_and_switch(
        self, current: IndexInfo | None, target: IndexInfo, embedder: Embedder, group: str
    ) -> None:
        stop = asyncio.Event()
        worker = asyncio.create_task(embedder.run(stop), name="reindex.follow")
        try:
            await self._caught_up(group, worker)
            try:
                await self._switch(current, target, group, worker, stop)
            except BaseException:  # whatever it is: the workers go on, with the index that is current
                await asyncio.shield(self._indexes.hold(False))
                raise
        finally:
            stop.set()
            await asyncio.wait([worker], timeout=self._settings.embedder.drain_deadline)
            worker.cancel()
            await asyncio.gather(worker, return_exceptions=True)  # what it failed with was raised where it mattered

    async def _caught_up(self, group: str, worker: asyncio.Task[None]) -> None:
        """Return when so little is left to read that the workers need to stand aside for a moment only.

        However long that takes: under more events than this process can follow it never comes, and the log says so.
        """
        most, before, told = 0, 0, self._clock.now()
        while True:
            left = sum((await self._log.lag(group, events.COMPACTED)).values())
            most = max(most, left)
            self._report(Progress("follow", most - left, most))
            if left <= self._settings.embedder.in_flight:
                return
            if self._clock.now() - told >= _TELL_SECONDS:
                if before and left >= before:
                    log.warning(
                        "reindex.falls_behind",
                        left=left,
                        advice="events come faster than this one process follows: run it where it has more cores, "
                        "or send less until it has switched",
                    )
                before, told = left, self._clock.now()
            await self._pause(worker)

    async def _switch(
        self, current: IndexInfo | None, target: IndexInfo, group: str, worker: asyncio.Task[None], stop: asyncio.Event
    ) -> None:
        self._report(Progress("switch"))
        await self._indexes.hold(True)
        if not await self._wait(lambda: self._nobody_in(events.EMBEDDER_GROUP), _LEAVE_SECONDS, worker):
            raise CatalensError(
                f"workers did not stand aside within {_LEAVE_SECONDS:g} s, nothing was switched: see that each reaches "
                "the index, then run the same command again"
            )
        reached = await self._committed(events.EMBEDDER_GROUP)

        async def level() -> bool:
            own = await self._committed(group)
            return all(own[place] >= offset for place, offset in reached.items())

        if not await self._wait(level, _CATCH_UP_SECONDS, worker):
            raise CatalensError("the new index does not catch up, nothing was switched: run the same command again")
        stop.set()
        await worker
        # Another run, or a worker that was thought dead, may have come between: what was committed since would be lost.
        reached = await self._committed(events.EMBEDDER_GROUP)
        if not (await self._indexes.held() and await self._indexes.current() == (current or target) and await level()):
            raise CatalensError("the workers went on meanwhile, nothing was switched: run the same command again")
        for info in (target, *([] if current is None else [current])):
            await self._note(info, Notes("complete", self._clock.now(), "", offsets=_text(reached)))
        await self._indexes.switch(target)
        log.info("reindex.switched", index=target.name, before=None if current is None else current.name)

    async def _committed(self, group: str) -> Mapping[TopicPartition, int]:
        return await self._retried(lambda: self._log.committed(group, events.CONSUMED), "committed")

    async def _alone(self) -> bool:
        """Return whether no other run is at work, on whatever index: it may be about to switch."""
        groups = [events.REINDEX_GROUPS + info.name for info in await self._retried(self._indexes.all, "indexes")]
        return all([await self._nobody_in(group) for group in groups])

    async def _nobody_in(self, group: str) -> bool:
        return await self._retried(lambda: self._log.members(group), "members") == 0

    async def _wait(
        self, condition: Callable[[], Awaitable[bool]], seconds: float, worker: asyncio.Task[None] | None = None
    ) -> bool:
        """Return whether `condition` came true in time; raises what `worker` failed with."""
        deadline = self._clock.now() + seconds
        while not await condition():
            if self._clock.now() >= deadline:
                return False
            await self._pause(worker)
        return True

    async def _pause(self, worker: asyncio.Task[None] | None) -> None:
        if worker is not None and worker.done():
            await worker
            raise CatalensError("the reindex stopped reading before the switch: run the same command again")
        await self._clock.sleep(_POLL_SECONDS)

    async def _retried(self, call: Callable[[], Awaitable[T]], what: str) -> T:
        return await with_retries(call, self._policy, self._clock, what=what)


def _as_records(state: PointState) -> Iterator[Record]:
    """Yield the events that make a point like this one, content before offer."""
    data: list[events.EventData] = []
    if state.state == "live" and state.product is not None:
        data.append(state.product)
    elif state.state == "deleted":
        data.append(Deletion(product_id=state.product_id, version=state.version))
    data += state.offers
    for entry in data:
        message = events.encode(events.new_event(entry, state.tenant))
        # Of no partition: it comes from an index.
        yield Record(message.topic, -1, -1, message.key, message.value, message.headers, SystemClock().now())


def _share(point: UUID | None) -> float:
    """Return how much lies up to `point`: point ids are hashes, spread evenly."""
    return 0.0 if point is None else (point.int + 1) / 2**128


def _text(offsets: Offsets) -> str:
    return json.dumps([[place.topic, place.partition, offset] for place, offset in offsets.items()])


def _offsets(text: str) -> dict[TopicPartition, int]:
    return {TopicPartition(topic, partition): offset for topic, partition, offset in json.loads(text)}


async def drop(indexes: Indexes, name: str) -> None:
    """Delete the index of that name for good; raises NotFound, Conflict if it is current or in use."""
    for info in await indexes.all():
        if info.name == name:
            await indexes.drop(info)
            return
    known = ", ".join(info.name for info in await indexes.all())
    raise NotFound(f"there is no index {name}; those that are: {known}")


async def reindex(settings: Settings, model: str | None, *, rebuild: bool = False, report: Report) -> IndexInfo:
    """Run a Reindexer in a process of its own, on the engines that the settings name; None is the current model.

    Raises as Reindexer.run, EngineRoom and open_encoder, and Misconfigured without a picture tower.
    """
    require_pictures(settings)
    async with EngineRoom(settings) as room:
        indexes = await room.indexes()
        current = await indexes.current()
        chosen = model or (settings.model if current is None else current.model)
        async with open_encoder(settings.model_copy(update={"model": chosen}), Metrics()) as encoder:
            reindexer = Reindexer(
                log=await room.log(),
                indexes=indexes,
                encoder=encoder,
                cache=await room.cache(),
                blobs=await room.blobs(),
                images=await room.images(),
                settings=settings,
                clock=SystemClock(),
                report=report,
            )
            return await reindexer.run(chosen, rebuild=rebuild)
