"""Memory of every process at full load for SOAK_MINUTES (30), over a fixed set of SOAK_PRODUCTS (20,000).

The set is sent again and again with new versions, so that the index stops growing after the first pass; every eighth
product has another text each time, so that the encoder has work that no cache saves. What is sent is bounded by what
waits. The index is tests/qdrant_server.py, Qdrant's engine behind its API: no real Qdrant server is at hand.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import aiohttp
from benchmarks.products import product
from benchmarks.report import Row, publish, trend
from benchmarks.stage import Stage

from catalens import events
from catalens.domain import assigned_version
from catalens.ports import EventLog

MINUTES: Final = float(os.environ.get("SOAK_MINUTES", "30"))
PRODUCTS: Final = int(os.environ.get("SOAK_PRODUCTS", "20000"))
WARM_UP: Final = 60 * min(5.0, MINUTES / 3)
"""Seconds that do not count: caches fill, the index is written for the first time."""
WAITING: Final = 4000
"""Events that may wait; beyond, nothing is sent."""
_POST: Final = 1000
_LOOK: Final = 10.0
_SEARCH: Final = 0.5


@dataclass
class Counts:
    """What was done to the processes."""

    sent: int = 0
    searches: int = 0
    waiting: int = 0
    most_waiting: int = 0
    memory: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Per process: seconds since the start, resident MiB."""


def main() -> None:
    """Load the processes for as long as asked and publish a row for each."""
    with Stage() as stage:
        stage.service("embedder", "catalens_embedder.main", qdrant=True)
        ingest = stage.service("ingest", "catalens_ingest.main", qdrant=True)
        query = stage.service("query", "catalens_query.main", qdrant=True)
        counts = asyncio.run(_soak(stage, ingest.url, query.url))
        rows: list[Row] = [_row(name, seen) for name, seen in counts.memory.items()]
        processed = counts.sent - counts.waiting
        rows.append({
            "what": f"events processed in {MINUTES:g} min", "events": processed, "per s": processed / MINUTES / 60,
            "searches": counts.searches, "most waiting": counts.most_waiting,
        })  # fmt: skip
        rows.append(asyncio.run(_index_row(query.url)))
    publish("soak", rows)


async def _soak(stage: Stage, ingest: str, query: str) -> Counts:
    counts = Counts()
    async with stage.log() as log, aiohttp.ClientSession() as session, asyncio.TaskGroup() as tasks:
        steps = (_send(log, session, ingest, counts), _search(session, query, counts), _look(stage.pids(), counts))
        running = [tasks.create_task(step) for step in steps]
        await asyncio.sleep(MINUTES * 60)
        for task in running:
            task.cancel()
        counts.waiting = await _waiting(log)
    return counts


async def _send(log: EventLog, session: aiohttp.ClientSession, url: str, counts: Counts) -> None:
    """Send the set again and again as NDJSON, never ahead of the workers by more than WAITING."""
    number = 0
    while True:
        counts.waiting = await _waiting(log)
        counts.most_waiting = max(counts.most_waiting, counts.waiting)
        if counts.waiting > WAITING - _POST:
            await asyncio.sleep(0.1)
            continue
        lines = [_line(number + step) for step in range(_POST)]
        headers = {"Content-Type": "application/x-ndjson"}
        async with session.post(f"{url}/api/v1/products", data=b"".join(lines), headers=headers) as answer:
            document = await answer.json()
            if answer.status != 200 or document["rejected"]:
                raise RuntimeError(f"{answer.status}: {document}")
        counts.sent += document["accepted"]
        number += _POST


def _line(number: int) -> bytes:
    content = product(number % PRODUCTS, assigned_version())
    if number % 8 == 0:
        content["description"] = f"{number} {content['description']}"
    return json.dumps(content).encode() + b"\n"


async def _waiting(log: EventLog) -> int:
    return sum((await log.lag(events.EMBEDDER_GROUP, events.CONSUMED)).values())


async def _search(session: aiohttp.ClientSession, url: str, counts: Counts) -> None:
    while True:
        body = {"query": product(counts.searches % PRODUCTS)["name"], "limit": 10}
        async with session.post(f"{url}/api/v1/search", json=body) as answer:
            if answer.status != 200:
                raise RuntimeError(f"{answer.status}: {await answer.text()}")
            await answer.read()
        counts.searches += 1
        await asyncio.sleep(_SEARCH)


async def _look(pids: Mapping[str, int], counts: Counts) -> None:
    begin = time.monotonic()
    while True:
        for name, pid in pids.items():
            counts.memory.setdefault(name, []).append((time.monotonic() - begin, _resident(pid)))
        await asyncio.sleep(_LOOK)


def _resident(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"process {pid} has ended")


async def _index_row(url: str) -> Row:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/api/v1/stats") as answer:
        return {"what": "products in the index at the end", "events": (await answer.json())["products"]}


def _row(name: str, seen: Sequence[tuple[float, float]]) -> Row:
    counted = [(seconds / 3600, memory) for seconds, memory in seen if seconds >= WARM_UP]
    slope, interval = trend(counted)
    memory = [value for _, value in counted]
    return {
        "what": f"{name}: resident MiB",
        "after warm-up": memory[0], "end": memory[-1], "min": min(memory), "max": max(memory),
        "MiB/h": slope, "± (95 %)": interval,
    }  # fmt: skip


if __name__ == "__main__":
    main()
