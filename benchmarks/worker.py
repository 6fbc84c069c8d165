"""One embedder process for the benchmarks: the real Embedder, with stand-ins where asked and clocks around its ports.

Started by `benchmarks.pipeline` through tests.cluster.Service: settings from the environment, options as JSON in
BENCH_WORKER, results as JSON in the file that the options name.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import structlog

from catalens.domain import (
    IndexDocument,
    IndexInfo,
    ModelSpec,
    Offsets,
    PictureInfo,
    Record,
    StoredProduct,
    TopicPartition,
    WriteOutcome,
)
from catalens.encoders import open_encoder
from catalens.engines import EngineRoom
from catalens.lifecycle import run_service, stop_on_signals, supervise
from catalens.ports import EncodedImage, Encoder, EventConsumer, EventLog, RevokeCallback, VectorIndex
from catalens.retry import SystemClock
from catalens.settings import Settings
from catalens.telemetry import Metrics
from catalens_embedder.worker import Embedder

if TYPE_CHECKING:
    from catalens.domain import Embedding

log = structlog.get_logger(__name__)

_DIMENSION = 512
_SAMPLE_SECONDS = 0.002
_AREAS = (
    ("selectors.py", "waiting (for the broker, the index, the encoder)"),
    ("benchmarks/worker.py", "the benchmark's own"),
    ("aiokafka/producer", "Kafka: produce and commit"),
    ("aiokafka/", "Kafka: fetch and parse"),
    ("catalens/engines/kafka.py", "Kafka: fetch and parse"),
    ("catalens/events.py", "decode and validate"),
    ("catalens/embedding.py", "embedding and its cache"),
    ("catalens/encoders/", "embedding and its cache"),
    ("catalens/batching.py", "embedding and its cache"),
    ("catalens/engines/memory.py", "embedding and its cache"),
    ("catalens/engines/redis.py", "embedding and its cache"),
    ("catalens/lexical.py", "words of the product"),
    ("snowballstemmer", "words of the product"),
    ("catalens/engines/", "index call"),
    ("catalens_embedder/", "the worker itself"),
    ("prometheus_client/", "metrics"),
    ("opentelemetry/", "traces"),
    ("asyncio/", "event loop"),
)


@dataclass(frozen=True, slots=True)
class Options:
    """What the benchmark asks of the process."""

    result: str
    """File for the results."""
    encoder: str = "free"
    """free: costs nothing; model: the one that the settings name."""
    index: str = "edge"
    """none: takes everything and keeps nothing; edge; qdrant."""
    until: int = 0
    """Stop once so many events are committed; 0: at SIGTERM."""
    sample: bool = False
    """Look every 2 ms where the process is."""
    stamps: bool = False
    """Note when each product's write came back."""
    bare: str = ""
    """File of [text, blob] pairs that the encoder alone gets first and last."""


@dataclass
class Findings:
    """What the process reports."""

    first_records: float = 0.0
    """When the first fetch came back with something: joining the group is over."""
    last_commit: float = 0.0
    committed: int = 0
    stamps: list[tuple[str, float]] = field(default_factory=list)
    samples: Counter[str] = field(default_factory=Counter)
    bare: list[float] = field(default_factory=list)
    """Seconds of each pass of the encoder alone."""


class FreeEncoder:
    """An Encoder that costs nothing: vectors of the right size, distinct, without looking at the content."""

    spec = ModelSpec("free", "1", "free", _DIMENSION, "f" * 64)

    def __init__(self) -> None:
        numbers = np.random.default_rng(1).standard_normal((4096, _DIMENSION)).astype(np.float32)
        self._vectors = numbers / np.linalg.norm(numbers, axis=1, keepdims=True)
        self._next = 0

    async def embed_text(self, text: str, *, bulk: bool = False) -> Embedding:  # noqa: ARG002  # the port's
        """Return the next vector."""
        self._next += 1
        return cast("Embedding", self._vectors[self._next % len(self._vectors)])

    async def embed_image(self, picture: bytes, *, bulk: bool = False) -> EncodedImage:
        """Return the next vector."""
        return EncodedImage(await self.embed_text("", bulk=bulk), PictureInfo(1, 1, "none", str(len(picture))))

    async def close(self) -> None:
        """Nothing is open."""


class NoIndex:
    """Takes every write, says "applied" and keeps nothing: what is left is the pipeline alone."""

    async def upsert(self, documents: Sequence[IndexDocument]) -> Sequence[WriteOutcome]:
        """Keep nothing."""
        return ["applied"] * len(documents)

    async def get(self, tenant: str, product_ids: Sequence[str]) -> Mapping[str, StoredProduct]:  # noqa: ARG002  # the port's
        """Know nothing."""
        return {}

    async def flush(self) -> None:
        """Nothing is open."""


class StampedIndex:
    """A VectorIndex that notes when each upsert came back; the rest goes straight through."""

    def __init__(self, index: VectorIndex, findings: Findings) -> None:
        self._index = index
        self._findings = findings

    def __getattr__(self, name: str) -> Any:
        return getattr(self._index, name)

    async def upsert(self, documents: Sequence[IndexDocument]) -> Sequence[WriteOutcome]:
        """Write and note."""
        outcomes = await self._index.upsert(documents)
        now = time.time()
        self._findings.stamps += [(document.product.product_id, now) for document in documents]
        return outcomes


class TappedLog:
    """An EventLog that notes the first fetch and the last commit, and sets `stop` once `until` are committed."""

    def __init__(self, inner: EventLog, findings: Findings, until: int, stop: asyncio.Event) -> None:
        self._inner = inner
        self._findings = findings
        self._until = until
        self._stop = stop

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def subscribe(
        self, group: str | None, topics: Sequence[str], *, on_revoke: RevokeCallback | None = None
    ) -> EventConsumer:
        """Join with a clock around the consumer."""
        consumer = await self._inner.subscribe(group, topics, on_revoke=on_revoke)
        return cast("EventConsumer", _TappedConsumer(consumer, self._findings, self._until, self._stop))


class _TappedConsumer:
    def __init__(self, inner: EventConsumer, findings: Findings, until: int, stop: asyncio.Event) -> None:
        self._inner = inner
        self._findings = findings
        self._until = until
        self._stop = stop
        self._begin: dict[TopicPartition, int] = {}
        self._end: dict[TopicPartition, int] = {}
        self.pause, self.resume, self.rewind = inner.pause, inner.resume, inner.rewind
        self.assignment, self.close = inner.assignment, inner.close

    async def fetch(self, max_records: int, timeout: float) -> Sequence[Record]:
        records = await self._inner.fetch(max_records, timeout)
        if records and not self._findings.first_records:
            self._findings.first_records = time.time()
        for record in records:
            self._begin.setdefault(record.source, record.offset)
        return records

    async def commit(self, offsets: Offsets) -> None:
        await self._inner.commit(offsets)
        self._end.update(offsets)
        self._findings.last_commit = time.time()
        self._findings.committed = sum(end - self._begin.get(place, end) for place, end in self._end.items())
        if self._until and self._findings.committed >= self._until:
            self._stop.set()


async def serve(settings: Settings) -> None:
    """Work until enough is committed or SIGTERM comes, then write the results."""
    options = Options(**json.loads(os.environ["BENCH_WORKER"]))
    findings, metrics = Findings(), Metrics()
    async with AsyncExitStack() as stack:
        stop = await stack.enter_async_context(stop_on_signals())
        encoder: Encoder = FreeEncoder()
        if options.encoder == "model":
            encoder = await stack.enter_async_context(open_encoder(settings, metrics))
        room = await stack.enter_async_context(EngineRoom(settings))
        index = cast("VectorIndex", NoIndex())
        if options.index != "none":
            index = await room.index(IndexInfo(settings.model, encoder.spec))
        if options.stamps:
            index = cast("VectorIndex", StampedIndex(index, findings))
        blobs = await room.blobs()
        embedder = Embedder(
            log=cast("EventLog", TappedLog(await room.log(), findings, options.until, stop)),
            index=index,
            encoder=encoder,
            cache=await room.cache(),
            blobs=blobs,
            images=await room.images(),
            settings=settings,
            metrics=metrics,
            clock=SystemClock(),
        )
        pairs: list[tuple[str, bytes]] = []
        if options.bare:
            named = json.loads(Path(options.bare).read_text(encoding="utf-8"))  # noqa: ASYNC240  # nothing else runs
            pairs = [(text, await blobs.get(blob)) for text, blob in named]
            await _bare(encoder, pairs[:64])  # the first inferences are slower
            findings.bare.append(await _bare(encoder, pairs))
        log.info("process.ready", service="benchmark", url="")
        with _sampled(findings.samples) if options.sample else nullcontext():
            await supervise({"embedder": embedder.run(stop)}, stop, drain_deadline=settings.embedder.drain_deadline + 5)
        if pairs:
            findings.bare.append(await _bare(encoder, pairs))
    Path(options.result).write_text(json.dumps(vars(findings)), encoding="utf-8")  # noqa: ASYNC240  # nothing else runs


async def _bare(encoder: Encoder, pairs: Sequence[tuple[str, bytes]]) -> float:
    """Return the seconds that the encoder takes for every picture and text, all of them waiting at once."""
    begin = time.perf_counter()
    await asyncio.gather(
        *(encoder.embed_image(picture, bulk=True) for _, picture in pairs),
        *(encoder.embed_text(text, bulk=True) for text, _ in pairs),
    )
    return time.perf_counter() - begin


@contextmanager
def _sampled(found: Counter[str]) -> Iterator[None]:
    """Count, every 2 ms of real time, the area that the main thread is in: its innermost frame that has one."""

    def look(_number: int, frame: FrameType | None) -> None:
        while frame is not None:
            name = frame.f_code.co_filename
            for part, area in _AREAS:
                if part in name:
                    found[area] += 1
                    return
            frame = frame.f_back
        found["other"] += 1

    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, _SAMPLE_SECONDS, _SAMPLE_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    run_service("benchmark", serve)
