"""One real embedder process that notes when it had come how far; started by `benchmarks.coldstart`.

It is `catalens_embedder.main` with a clock around its ports. Notes go as JSON to the file that BENCH_COLDSTART names,
after which the process ends itself as Kubernetes would.
"""

import time

_FIRST_LINE = time.time()

import json  # noqa: E402  # the clock comes first
import os  # noqa: E402
import signal  # noqa: E402
from collections.abc import AsyncIterator, Sequence  # noqa: E402
from contextlib import asynccontextmanager  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import catalens_embedder.main as embedder  # noqa: E402
from catalens import generations  # noqa: E402
from catalens.domain import IndexDocument, Record, WriteOutcome  # noqa: E402
from catalens.encoders import open_encoder  # noqa: E402
from catalens.engines.kafka import KafkaConsumer  # noqa: E402
from catalens.engines.qdrant import QdrantIndex  # noqa: E402
from catalens.lifecycle import run_service  # noqa: E402
from catalens.ports import Encoder  # noqa: E402
from catalens.settings import Settings  # noqa: E402
from catalens.telemetry import Metrics  # noqa: E402

_notes = {"first line": _FIRST_LINE, "imports": time.time()}

_open_encoder, _fetch, _upsert = open_encoder, KafkaConsumer.fetch, QdrantIndex.upsert


def _note(what: str) -> None:
    _notes.setdefault(what, time.time())


@asynccontextmanager
async def _timed_encoder(settings: Settings, metrics: Metrics) -> AsyncIterator[Encoder]:
    _note("engines")
    async with _open_encoder(settings, metrics) as encoder:
        _note("model load")
        yield encoder


async def _timed_fetch(self: KafkaConsumer, max_records: int, timeout: float) -> Sequence[Record]:
    records = await _fetch(self, max_records, timeout)
    if records:
        _note("group join")
    return records


async def _timed_upsert(self: QdrantIndex, documents: Sequence[IndexDocument]) -> Sequence[WriteOutcome]:
    _note("first batch")
    outcomes = await _upsert(self, documents)
    _note("index write")
    _done()
    return outcomes


def _done() -> None:
    result = Path(os.environ["BENCH_COLDSTART"])
    partial = result.with_suffix(".tmp")
    partial.write_text(json.dumps(_notes), encoding="utf-8")
    partial.replace(result)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Run the service with the clocks in place."""
    _replace(generations, "open_encoder", _timed_encoder)
    _replace(KafkaConsumer, "fetch", _timed_fetch)
    _replace(QdrantIndex, "upsert", _timed_upsert)
    run_service("catalens-embedder", embedder.serve)


def _replace(place: Any, name: str, timed: Any) -> None:
    setattr(place, name, timed)


if __name__ == "__main__":
    main()
