"""How long an embedder process needs from nothing to its first vector in the index, by phase: median of many starts.

On a real Kafka and Redis and Qdrant's engine behind its API (no Qdrant server), with the starter model; the files are
in the page cache, as on a node that ran one before. A broker's `group.initial.rebalance.delay.ms` (3 s by default, 0
here) comes on top of the group join when the group was empty.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Final

from benchmarks.products import messages
from benchmarks.report import Row
from benchmarks.stage import Stage

STARTS: Final = int(os.environ.get("COLD_STARTS", "10"))
PHASES: Final = ("first line", "imports", "engines", "model load", "group join", "first batch", "index write")
"""In the order in which they end; the first begins when the process is asked for."""
WORDS: Final = {
    "first line": "process start",
    "imports": "imports",
    "engines": "settings, connecting",
    "model load": "model load",
    "group join": "group join",
    "first batch": "first batch",
    "index write": "index write",
}
_DEADLINE: Final = 120.0


def measure(starts: int = STARTS) -> list[Row]:
    """Start that many processes one after the other, each with one event waiting; return a row a phase."""
    with Stage() as stage:
        runs = [asyncio.run(_one(stage, number)) for number in range(starts + 1)][1:]  # the first fills caches
    rows: list[Row] = [_told(WORDS[phase], [run[phase] for run in runs]) for phase in PHASES]
    return [*rows, _told("to the first vector", [sum(run.values()) for run in runs])]


def _told(what: str, seconds: list[float]) -> Row:
    return {
        "what": what, "median s": median(seconds), "least s": min(seconds), "most s": max(seconds),
        "starts": len(seconds),
    }  # fmt: skip


async def _one(stage: Stage, number: int) -> dict[str, float]:
    """Return the seconds of each phase of one start."""
    async with stage.log() as log:
        await log.append(list(messages(range(number, number + 1))))
    result = stage.folder / f"coldstart-{number}.json"
    begin = time.time()
    worker = await asyncio.to_thread(
        lambda: stage.service(
            f"coldstart-{number}", "benchmarks.coldstart_child", qdrant=True,
            CATALENS_DATA_DIR=str(stage.folder / "coldstart"), BENCH_COLDSTART=str(result),
        )
    )  # fmt: skip
    if status := await asyncio.to_thread(worker.wait, _DEADLINE):
        raise RuntimeError(f"the embedder ended with {status}:\n{worker.log()[-4000:]}")
    return phases(begin, result)


def phases(begin: float, result: Path) -> dict[str, float]:
    """Return what the process noted, as the seconds of each phase."""
    notes: dict[str, float] = json.loads(result.read_text(encoding="utf-8"))
    times = [begin, *(notes[phase] for phase in PHASES)]
    return {phase: after - before for phase, (before, after) in zip(PHASES, pairwise(times), strict=True)}
