"""The standalone process at twice what it can do: what it answers, whether that is right, and whether memory grows.

First its caches of vectors and of words are filled, which would grow for hours else. As many clients as keep it busy
find out what it can answer of this mix; then requests come at twice that rate, whether or not it keeps up. Every answer
is checked. Client and server share the machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp
from benchmarks.products import product
from benchmarks.report import Row, percentile, publish, trend
from tests.standalone import Standalone

from catalens.client import CatalensClient
from catalens.settings import EncoderSettings, HttpSettings
from catalens_standalone.importer import until_settled

CALIBRATION: Final = 30.0
"""Seconds in which the capacity is found."""
CLIENTS: Final = HttpSettings().max_concurrent
"""As many requests as the process takes in at once."""
BATCH: Final = 64
WORDS: Final = 25_000
"""More than the words of which it is remembered how they are looked up."""
MOST_OUTSTANDING: Final = 1_000
"""Requests that wait for an answer at most, several times what the process takes in; beyond, none is sent."""
LOOK: Final = 2.0


@dataclass
class Seen:
    """What came back."""

    statuses: Counter[str] = field(default_factory=Counter)
    took: list[float] = field(default_factory=list)
    """Milliseconds of those that were answered in full."""
    wrong: list[str] = field(default_factory=list)
    degraded: int = 0
    unsent: int = 0
    memory: list[tuple[float, Memory]] = field(default_factory=list)
    """Hours since the start, and what was in use then."""


@dataclass(frozen=True, slots=True)
class Memory:
    """MiB of the process and its children."""

    own: float
    """What no file stands behind, so that only the processes can give it back."""
    files: float
    """Mapped files, libraries included: the kernel drops them when it needs the room."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request, and what is wrong with an answer of status 200 or 202 to it ("" if nothing)."""

    method: str
    path: str
    body: Any
    check: Callable[[Any], str]


def main() -> None:
    """Find the capacity, exceed it and publish the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--products", type=int, default=2_000)
    parser.add_argument("--times", type=float, default=2.0, help="of the capacity")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Standalone(Path(folder) / "data") as server:
        rows = asyncio.run(_run(server, arguments.minutes, arguments.products, arguments.times))
    publish("overload", rows)


async def _run(server: Standalone, minutes: float, products: int, times: float) -> list[Row]:
    async with CatalensClient(server.url) as client:
        async for _ in client.import_products(product(number) for number in range(products)):
            pass
        await until_settled(client, report=lambda _: None)
    draw = random.Random(5)
    connector = aiohttp.TCPConnector(limit=MOST_OUTSTANDING, keepalive_timeout=3600)
    async with aiohttp.ClientSession(connector=connector) as session:
        filled = await _fill(session, server.url)
        await asyncio.gather(*(_connected(session, server.url) for _ in range(MOST_OUTSTANDING)))
        calm = Seen()
        capacity = await _capacity(session, server.url, calm, lambda: _call(draw, products))
        loud = Seen()
        watching = asyncio.create_task(_watch(server, loud), name="memory")
        seconds = minutes * 60
        rate = capacity * times
        await _offer(session, server.url, loud, lambda: _call(draw, products), rate, seconds)
        watching.cancel()
        after = Seen()
        await _one(session, server.url, _search(3), after)
        kept = await _cached(session, server.url)
    return [
        {"what": f"capacity, {CLIENTS} clients", **_row(calm, CALIBRATION)},
        {"what": f"{rate:.0f}/s offered for {minutes:g} min", **_row(loud, seconds)},
        {"what": "one search after it", **_row(after, None)},
        {"what": "vectors in the embedding cache", "before": filled, "after": kept},
        _memory_row("own memory", [(hours, memory.own) for hours, memory in loud.memory]),
        _memory_row("mapped files", [(hours, memory.files) for hours, memory in loud.memory]),
    ]


async def _fill(session: aiohttp.ClientSession, url: str) -> int:
    """Fill what is kept of texts and of words, as weeks would; return how many vectors are kept then."""
    batches = iter(range(0, EncoderSettings().cache_entries, BATCH))

    async def client() -> None:
        for first in batches:
            body = {"requests": [{"text": f"words of another day {number}"} for number in range(first, first + BATCH)]}
            async with session.post(f"{url}/api/v1/embed/batch", json=body) as answer:
                responses = (await answer.json())["responses"]
            if answer.status != 200 or any("embedding" not in one for one in responses):
                raise RuntimeError(f"{answer.status}: {responses}")

    await asyncio.gather(client(), client())
    for first in range(0, WORDS, BATCH):
        words = " ".join(f"{7_000_000 + number}" for number in range(first, first + BATCH))
        async with session.post(f"{url}/api/v1/search", json={"query": words, "mode": "lexical"}) as answer:
            if answer.status != 200:
                raise RuntimeError(f"{answer.status}: {await answer.text()}")
    return await _cached(session, url)


async def _connected(session: aiohttp.ClientSession, url: str) -> None:
    """Open a connection: the server keeps some 10 KiB of each, and more would be opened with every peak."""
    async with session.get(f"{url}/livez") as answer:
        await answer.read()


async def _cached(session: aiohttp.ClientSession, url: str) -> int:
    async with session.get(f"{url}/api/v1/stats") as answer:
        entries: int = (await answer.json())["cache"]["entries"]
    return entries


# --- the mix ------------------------------------------------------------------------------------------------


def _call(draw: random.Random, products: int) -> Call:
    """Seven searches of ten by words, the rest of everything else; the words are new to the cache half of the time."""
    number, kind = draw.randrange(products), draw.randrange(10)
    if kind < 4:
        return _search(number, f"{draw.randrange(10**6)}" if draw.random() < 0.5 else "")
    if kind < 7:
        return _filtered(number)
    if kind == 7:
        return Call("GET", f"/api/v1/products/sku-{number}", None, _is_product(number))
    if kind == 8:
        return Call("GET", f"/api/v1/products/sku-{number}/similar", None, _without(number))
    body = product(number)
    return Call("PUT", f"/api/v1/products/sku-{number}", body, lambda found: "" if found["version"] else "no version")


def _search(number: int, more: str = "") -> Call:
    """A search for a product's own model number, which must come first: its name has it and no other."""
    name = product(number)["name"]
    body = {"query": f"{name} {more}".strip(), "limit": 10, "include": ["name"]}

    def check(found: Any) -> str:
        first = found["results"][0]["product_id"] if found["results"] else "nothing"
        return "" if first == f"sku-{number}" else f"{body['query']!r} found {first}"

    return Call("POST", "/api/v1/search", body, check)


def _filtered(number: int) -> Call:
    brand, words = product(number)["brand"], product(number)["attributes"]["material"]
    body = {"query": words, "limit": 20, "filters": {"brand": brand}, "mode": "hybrid" if number % 2 else "lexical"}

    def check(found: Any) -> str:
        others = [hit["product_id"] for hit in found["results"] if hit["brand"] != brand]
        return f"{brand}: {others}" if others else ""

    return Call("POST", "/api/v1/search", body, check)


def _is_product(number: int) -> Callable[[Any], str]:
    name = product(number)["name"]
    return lambda found: "" if found["name"] == name else f"sku-{number} is {found['name']}"


def _without(number: int) -> Callable[[Any], str]:
    def check(found: Any) -> str:
        ids = [hit["product_id"] for hit in found["results"]]
        return f"sku-{number} is like {ids}" if f"sku-{number}" in ids or not ids else ""

    return check


# --- the load -----------------------------------------------------------------------------------------------


async def _capacity(session: aiohttp.ClientSession, url: str, seen: Seen, make: Callable[[], Call]) -> float:
    """Return how many requests a second are answered when there is always one more."""
    begin = time.monotonic()

    async def client() -> None:
        while time.monotonic() - begin < CALIBRATION:
            await _one(session, url, make(), seen)

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return len(seen.took) / (time.monotonic() - begin)


async def _offer(
    session: aiohttp.ClientSession, url: str, seen: Seen, make: Callable[[], Call], rate: float, seconds: float
) -> None:
    """Send `rate` requests a second for that long, whatever comes back."""
    begin, due = time.monotonic(), 0
    async with asyncio.TaskGroup() as group:
        outstanding: set[asyncio.Task[None]] = set()
        while (passed := time.monotonic() - begin) < seconds:
            for _ in range(int(passed * rate) - due):
                due += 1
                if len(outstanding) >= MOST_OUTSTANDING:
                    seen.unsent += 1
                    continue
                task = group.create_task(_one(session, url, make(), seen), name="request")
                outstanding.add(task)
                task.add_done_callback(outstanding.discard)
            await asyncio.sleep(0.005)


async def _one(session: aiohttp.ClientSession, url: str, call: Call, seen: Seen) -> None:
    begin = time.perf_counter()
    try:
        async with session.request(call.method, url + call.path, json=call.body) as answer:
            document = json.loads(await answer.read())
    except aiohttp.ClientError as error:
        seen.statuses[f"no answer: {type(error).__name__}"] += 1
        return
    seen.statuses[str(answer.status)] += 1
    if answer.status in (200, 202):
        seen.took.append((time.perf_counter() - begin) * 1000)
        seen.degraded += "degraded" in document
        wrong = call.check(document)
    elif answer.status in (429, 503):
        wrong = "" if answer.headers.get("Retry-After", "").isdigit() else f"{answer.status} without Retry-After"
    else:
        wrong = f"{answer.status}: {document}"
    if wrong:
        seen.wrong.append(wrong)


async def _watch(server: Standalone, seen: Seen) -> None:
    begin = time.monotonic()
    while True:
        seen.memory.append(((time.monotonic() - begin) / 3600, _in_use(server)))
        await asyncio.sleep(LOOK)


def _in_use(server: Standalone) -> Memory:
    """Return the memory of the process and its children; shared pages are counted once each."""
    own = files = 0
    for pid in [server.pid, *server.children()]:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
        sizes = {
            name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in rollup.splitlines()[1:])
        }
        own += sizes["Pss_Anon"] + sizes["SwapPss"]
        files += sizes["Pss_File"] + sizes["Pss_Shmem"]
    return Memory(own / 1024, files / 1024)


def _row(seen: Seen, seconds: float | None) -> Row:
    for wrong in seen.wrong[:10]:
        print("wrong:", wrong[:500])
    return {
        "statuses": ", ".join(f"{status}: {count}" for status, count in sorted(seen.statuses.items())),
        "answered per s": None if seconds is None else len(seen.took) / seconds,
        "p50 ms": percentile(seen.took, 0.5) if seen.took else None,
        "p99 ms": percentile(seen.took, 0.99) if seen.took else None,
        "degraded": seen.degraded,
        "wrong": len(seen.wrong),
        "unsent": seen.unsent,
    }


def _memory_row(what: str, seen: list[tuple[float, float]]) -> Row:
    """Return how `what` changed after the first third, in which the connections are opened."""
    counted = [(hours, size) for hours, size in seen if hours > seen[-1][0] / 3]
    slope, interval = trend(counted)
    values = [size for _, size in counted]
    return {
        "what": what, "MiB after a third": values[0], "at the end": values[-1], "most": max(values),
        "MiB/h": slope, "± (95 %)": interval,
    }  # fmt: skip


if __name__ == "__main__":
    main()
