"""The pipeline on a real Kafka: what one worker can take, what the door takes, how fresh the index is.

Everything runs on this machine: broker, services, index and the clients that load them share its cores. Where
something is replaced the row says so: "free encoder" gives vectors without computing any, "no index" takes every
write and keeps nothing. The embedding cache is a Redis, and knows nothing of what comes. Sizes are set for a quick try
by BENCH_EVENTS, BENCH_PICTURES and BENCH_SECONDS.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Final

import aiohttp
from aiokafka import AIOKafkaProducer  # type: ignore[import-untyped]  # it has no py.typed
from benchmarks import clipart
from benchmarks.products import messages, product
from benchmarks.report import Row, percentile, publish
from benchmarks.stage import Stage, skip
from tests.cluster import Service, settled

from catalens import events
from catalens.domain import DEFAULT_TENANT, ImageRef, Message, Product, assigned_version
from catalens.engines import EngineRoom
from catalens.lexical import text_for_embedding
from catalens.ports import EventLog

EVENTS: Final = int(os.environ.get("BENCH_EVENTS", "100000"))
PICTURES: Final = int(os.environ.get("BENCH_PICTURES", "1000"))
SECONDS: Final = float(os.environ.get("BENCH_SECONDS", "30"))
CLIENTS: Final = (1, 32)
STREAMS: Final = (1, 4)
BURST_SECONDS: Final = 5.0
_CHUNK: Final = 64 * 1024
_TICK: Final = 0.02


def main() -> None:
    """Run every part and publish the rows."""
    with Stage() as stage:
        rows = [row for part in (ceiling, real_model, door, freshness, rebalance) for row in asyncio.run(part(stage))]
    publish("pipeline", rows)


# --- one worker -------------------------------------------------------------------------------------------------


async def ceiling(stage: Stage) -> list[Row]:
    """What the worker takes when encoding is free: with no index, and with the embedded one; where the time goes."""
    rows: list[Row] = []
    async with stage.log() as log:
        begin = await log.committed(events.EMBEDDER_GROUP, events.CONSUMED)
        await _append(log, messages_of(range(EVENTS)))
        for index, what in (("none", "no index"), ("edge", "embedded index")):
            found = await _drained(stage, f"ceiling-{index}", encoder="free", index=index, until=EVENTS)
            rows.append({"what": f"one worker, free encoder, {what}", **_rate(found, EVENTS)})
            await log.set_committed(events.EMBEDDER_GROUP, begin)
        few = max(1, EVENTS // 5)
        for index, what in (("none", "no index"), ("edge", "embedded index")):
            found = await _drained(stage, f"profile-{index}", encoder="free", index=index, until=few, sample=True)
            seconds, samples = _seconds(found), found["samples"]
            for area, count in sorted(samples.items(), key=lambda item: -item[1]):
                share = count / sum(samples.values())
                part = {"share %": 100 * share, "us an event": seconds * share / found["committed"] * 1e6}
                rows.append({"what": f"… with {what}: {area}", **part})
            await log.set_committed(events.EMBEDDER_GROUP, begin)
        await skip(log)
    return rows


async def real_model(stage: Stage) -> list[Row]:
    """The starter model on pictures of 800 px and texts: the encoder alone, the whole pipeline, the encoder again."""
    name = "real-model"
    stated: list[tuple[Product, str]] = []
    async with EngineRoom(stage.settings(name)) as room:
        blobs = await room.blobs()
        with ProcessPoolExecutor() as pool:
            for number, picture in enumerate(pool.map(_picture, range(PICTURES), chunksize=16)):
                reference = await blobs.put(picture)
                content = Product.model_validate(product(number, assigned_version()))
                content = content.model_copy(update={"images": (ImageRef(blob=reference),)})
                stated.append((content, reference))
    pairs = stage.folder / "pairs.json"
    pairs.write_text(json.dumps([(text_for_embedding(content), blob) for content, blob in stated]), encoding="utf-8")
    async with stage.log() as log:
        await _append(log, [events.encode(events.new_event(content, DEFAULT_TENANT)) for content, _ in stated])
    found = await _drained(stage, name, encoder="model", index="edge", until=PICTURES, bare=str(pairs), stamps=True)
    alone = sum(found["bare"]) / len(found["bare"])
    return [
        *(
            {"what": f"starter model alone, picture and text, {which}", "seconds": took, "per s": PICTURES / took}
            for which, took in zip(("before", "after"), found["bare"], strict=True)
        ),
        {
            "what": "one worker, starter model, embedded index: the same pictures and texts",
            "seconds": _written(found),
            "per s": PICTURES / _written(found),
            "share %": 100 * alone / _written(found),
        },
    ]


# --- the door ---------------------------------------------------------------------------------------------------


async def door(stage: Stage) -> list[Row]:
    """What a bare producer appends, and what comes through HTTP."""
    count = max(1, EVENTS // 2)
    rows: list[Row] = []
    records = messages_of(range(count))
    best = 0.0
    for way, what in ((_send_each, "send()"), (_send_batches, "send_batch()")):
        took = await _bare_producer(stage, records, way)
        best = max(best, count / took)
        rows.append({"what": f"bare producer, {what}", "events": count, "seconds": took, "per s": count / took})
    lines = [json.dumps(product(number)).encode() + b"\n" for number in range(count)]
    ingest = stage.service("ingest", "catalens_ingest.main")
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
    ) as session:
        for streams in STREAMS:
            begin = time.perf_counter()
            shares = [lines[number::streams] for number in range(streams)]
            accepted = sum(await asyncio.gather(*(_stream(session, ingest.url, share) for share in shares)))
            took = time.perf_counter() - begin
            if accepted != count:
                raise RuntimeError(f"{accepted} of {count} lines were accepted")
            rows.append({
                "what": "ingest, NDJSON", "clients": streams, "events": count, "seconds": took,
                "per s": count / took, "share %": 100 * count / took / best,
            })  # fmt: skip
        rows += [await _puts(session, ingest.url, clients, min(5.0, SECONDS)) for clients in CLIENTS]
    ingest.stop()
    async with stage.log() as log:
        await skip(log)
    return rows


async def _bare_producer(
    stage: Stage, records: Sequence[Message], way: Callable[[Any, Sequence[Message]], Awaitable[None]]
) -> float:
    kafka = stage.settings("producer").kafka
    producer = AIOKafkaProducer(
        bootstrap_servers=kafka.bootstrap_servers, acks="all", enable_idempotence=True,
        compression_type=kafka.compression, linger_ms=round(kafka.linger * 1000), max_batch_size=256 * 1024,
    )  # fmt: skip
    async with producer:
        await producer.partitions_for(events.PRODUCTS)
        begin = time.perf_counter()
        await way(producer, records)
        return time.perf_counter() - begin


async def _send_each(producer: Any, records: Sequence[Message]) -> None:
    sent = []
    for record in records:
        headers = [(name, text.encode()) for name, text in record.headers.items()]
        sent.append(await producer.send(record.topic, record.value, record.key.encode(), headers=headers))
    await asyncio.gather(*sent)


async def _send_batches(producer: Any, records: Sequence[Message]) -> None:
    """Fill a batch a partition by hand, by the partitioner that send() uses, so that nothing is kept per record."""
    sent: list[Any] = []
    open_batches: dict[int, Any] = {}
    for record in records:
        key = record.key.encode()
        place = producer._partition(record.topic, None, key, record.value, key, record.value)  # noqa: SLF001
        headers = [(name, text.encode()) for name, text in record.headers.items()]
        while True:
            batch = open_batches.get(place) or producer.create_batch()
            open_batches[place] = batch
            if batch.append(key=key, value=record.value, timestamp=None, headers=headers) is not None:
                break
            sent.append(await producer.send_batch(batch, record.topic, partition=place))
            del open_batches[place]
    for place, batch in open_batches.items():
        sent.append(await producer.send_batch(batch, events.PRODUCTS, partition=place))
    await asyncio.gather(*sent)


async def _stream(session: aiohttp.ClientSession, url: str, lines: Sequence[bytes]) -> int:
    async def body() -> AsyncIterator[bytes]:
        step = max(1, _CHUNK // len(lines[0]))
        for start in range(0, len(lines), step):
            yield b"".join(lines[start : start + step])

    headers = {"Content-Type": "application/x-ndjson"}
    async with session.post(f"{url}/api/v1/products", data=body(), headers=headers) as answer:
        document = await answer.json()
        if answer.status != 200 or document["rejected"]:
            raise RuntimeError(f"{answer.status}: {document}")
        return int(document["accepted"])


async def _puts(session: aiohttp.ClientSession, url: str, clients: int, seconds: float) -> Row:
    took: list[float] = []
    numbers = iter(range(10**9))
    begin = time.perf_counter()

    async def client() -> None:
        while time.perf_counter() - begin < seconds:
            content = product(next(numbers))
            started = time.perf_counter()
            async with session.put(f"{url}/api/v1/products/{content['product_id']}", json=content) as answer:
                if answer.status != 202:
                    raise RuntimeError(f"{answer.status}: {await answer.text()}")
                await answer.read()
            took.append((time.perf_counter() - started) * 1000)

    await asyncio.gather(*(client() for _ in range(clients)))
    return {
        "what": "ingest, single PUT",
        "clients": clients,
        "events": len(took),
        "per s": len(took) / (time.perf_counter() - begin),
        "p50 ms": percentile(took, 0.5),
        "p99 ms": percentile(took, 0.99),
    }


# --- freshness --------------------------------------------------------------------------------------------------


async def freshness(stage: Stage) -> list[Row]:
    """Accepted → searchable: at half of what one worker takes, and at a burst of ten times that."""
    name, result = "freshness", stage.folder / "freshness.json"
    async with stage.log() as log:
        capacity = await _capacity(stage, log, name, "edge", round(SECONDS * 200))
        worker = _worker(stage, name, result, encoder="model", index="edge", stamps=True)
        load = _Load(log)
        half = await load.at(capacity / 2, SECONDS)
        burst = await load.at(capacity * 10, min(BURST_SECONDS, SECONDS))
        await settled(log)
        worker.stop()
    seen = _first_seen(result)
    what = "freshness, starter model without pictures, embedded index"
    return [
        {"what": f"{what}: capacity", "per s": capacity},
        load.row(f"{what}: half of it for {SECONDS:g} s", half, seen),
        load.row(f"{what}: ten times it for {min(BURST_SECONDS, SECONDS):g} s", burst, seen),
    ]


async def rebalance(stage: Stage) -> list[Row]:
    """Accepted → searchable while a second worker joins and leaves; several workers need a Qdrant, here a stand-in."""
    results = [stage.folder / f"rebalance-{number}.json" for number in (0, 1)]
    options: dict[str, Any] = {"encoder": "model", "index": "qdrant", "stamps": True}
    async with stage.log() as log:
        capacity = await _capacity(stage, log, "rebalance-0", "qdrant", round(SECONDS * 50))
        first = _worker(stage, "rebalance-0", results[0], **options)
        load = _Load(log)

        async def join_and_leave() -> None:
            await asyncio.sleep(SECONDS / 3)
            second = await asyncio.to_thread(_worker, stage, "rebalance-1", results[1], **options)
            await asyncio.sleep(SECONDS / 3)
            await asyncio.to_thread(second.stop)

        sent, _ = await asyncio.gather(load.at(capacity / 2, SECONDS), join_and_leave())
        await settled(log)
        first.stop()
    seen = _first_seen(*results)
    what = "freshness, starter model without pictures, tests/qdrant_server.py (no real Qdrant server)"
    return [
        {"what": f"{what}: capacity of one worker", "per s": capacity},
        load.row(f"{what}: half of it for {SECONDS:g} s while a second worker joins and leaves", sent, seen),
    ]


async def _capacity(stage: Stage, log: EventLog, name: str, index: str, count: int) -> float:
    """Return the events a second at which one worker gets through a backlog of `count`."""
    await _append(log, messages_of(range(count)))
    found = await _drained(stage, name, encoder="model", index=index, until=count, stamps=True)
    return count / _written(found)


class _Load:
    """Sends products that nobody has sent before, and knows when each was accepted."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._next = 10**6  # beyond what was sent to measure the capacity
        self.accepted: dict[str, float] = {}

    async def at(self, rate: float, seconds: float) -> range:
        """Send `rate` a second and return the numbers; what the log cannot take in time comes late."""
        first, begin = self._next, time.perf_counter()
        while (passed := time.perf_counter() - begin) < seconds:
            if owed := round(passed * rate) - (self._next - first):
                await self._send(min(owed, 1000))
            await asyncio.sleep(_TICK)
        return range(first, self._next)

    async def _send(self, count: int) -> None:
        numbers = range(self._next, self._next + count)
        self._next += count
        batch = messages_of(numbers)
        await self._log.append(batch)
        now = time.time()
        self.accepted.update((f"sku-{number}", now) for number in numbers)

    def row(self, what: str, numbers: range, seen: dict[str, float]) -> Row:
        """Return how long these took from the log's acknowledgement to the index's."""
        names = [f"sku-{number}" for number in numbers]
        took = [max(0.0, seen[name] - self.accepted[name]) * 1000 for name in names]
        sent = self.accepted[names[-1]] - self.accepted[names[0]]
        return {
            "what": what,
            "events": len(took),
            "per s": len(took) / sent if sent else None,
            "p50 ms": percentile(took, 0.5),
            "p99 ms": percentile(took, 0.99),
        }


# --- what they share --------------------------------------------------------------------------------------------


def messages_of(numbers: range) -> list[Message]:
    """Return the log's records of these products."""
    return list(messages(numbers))


async def _append(log: EventLog, records: Sequence[Message]) -> None:
    for start in range(0, len(records), 5000):
        await log.append(records[start : start + 5000])


def _worker(stage: Stage, name: str, result: Path, **options: Any) -> Service:
    """Start benchmarks.worker and return when it is ready."""
    asked = json.dumps({"result": str(result), **options})
    return stage.service(name, "benchmarks.worker", qdrant=options["index"] == "qdrant", BENCH_WORKER=asked)


async def _drained(stage: Stage, name: str, **options: Any) -> dict[str, Any]:
    """Return what a worker found that ran until it had committed `until` events."""
    result = stage.folder / f"{name}.json"
    worker = _worker(stage, name, result, **options)
    if status := await asyncio.to_thread(worker.wait, 600.0):
        raise RuntimeError(f"{name} ended with {status}:\n{worker.log()[-4000:]}")
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


def _seconds(found: dict[str, Any]) -> float:
    return float(found["last_commit"] - found["first_records"])


def _written(found: dict[str, Any]) -> float:
    """Return the seconds until the last write came back: a run of seconds must not count the wait for its commit."""
    return float(max(when for _, when in found["stamps"]) - found["first_records"])


def _rate(found: dict[str, Any], count: int) -> Row:
    return {"events": count, "seconds": _seconds(found), "per s": found["committed"] / _seconds(found)}


def _first_seen(*results: Path) -> dict[str, float]:
    """Return when the first write of each product came back, whichever worker made it."""
    seen: dict[str, float] = {}
    for result in results:
        for name, when in json.loads(result.read_text(encoding="utf-8"))["stamps"]:
            seen[name] = min(when, seen.get(name, when))
    return seen


def _picture(number: int) -> bytes:
    known = clipart.drawings()
    shade = f"#{(number * 40503) % 0xFFFFFF:06x}"
    return clipart.on_background(known[number % len(known)].path, shade, 800)


if __name__ == "__main__":
    main()
