"""The standalone process: import rate, search latency, memory and start-up, on a synthetic catalogue.

Client and server share the machine's cores, as on a laptop.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
from benchmarks import clipart
from benchmarks.report import Row, percentile, publish
from tests.standalone import Standalone

CLIENTS = (1, 8, 32)


def main() -> None:
    """Run every part and publish the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--products", type=int, default=10_000)
    parser.add_argument("--requests", type=int, default=400, help="per kind of search and number of clients")
    arguments = parser.parse_args()
    file = clipart.catalogue(arguments.products, clipart.CACHE / f"catalogue-{arguments.products}")
    with tempfile.TemporaryDirectory() as folder:
        server = Standalone(Path(folder) / "data")
        rows: list[Row] = [{"what": "first start, empty", "seconds": _started(server)}]
        rows.append({"what": "memory, empty", "MiB": memory(server)})
        rows.append(_import(server, file, arguments.products))
        rows.append({"what": "memory after the import", "MiB": memory(server)})
        rows += asyncio.run(_searches(server.url, arguments.requests))
        rows.append({"what": "memory after the searches", "MiB": memory(server)})
        server.stop()
        rows.append({"what": f"start with {arguments.products} products", "seconds": _started(server)})
        server.stop()
    publish("standalone", rows)


def _started(server: Standalone) -> float:
    begin = time.perf_counter()
    server.start()
    return time.perf_counter() - begin


def _import(server: Standalone, file: Path, products: int) -> Row:
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "catalens_standalone.cli", "import", str(file), "--wait", "--restart"],
        check=True,
        env={"CATALENS_URL": server.url, "PATH": "/usr/bin:/bin", "HOME": str(file.parent)},
    )
    seconds = time.perf_counter() - begin
    return {
        "what": f"import of {products} with pictures, until searchable",
        "seconds": seconds,
        "per s": products / seconds,
    }


async def _searches(url: str, requests: int) -> list[Row]:
    rows = []
    known = clipart.drawings()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=max(CLIENTS))) as session:
        fresh = iter(range(10**9))
        for clients in CLIENTS:
            texts = [{"query": f"{known[n % len(known)].label} {n}", "limit": 10} for n in _take(fresh, requests)]
            rows.append(await load(session, url, texts, clients, "text search, cold cache"))
        for clients in CLIENTS:
            pictures = [{"image": {"data": _picture(known, n)}, "limit": 10} for n in _take(fresh, min(requests, 300))]
            rows.append(await load(session, url, pictures, clients, "picture search, 800 px, cold cache"))
        filtered = [
            {"query": f"{known[n % len(known)].label_fr} {n}", "filters": {"price": {"lte": 10.0}}, "limit": 10}
            for n in _take(fresh, requests)
        ]
        rows.append(await load(session, url, filtered, 1, "text search with a 5 % filter"))
    return rows


def _take(numbers: Iterator[int], count: int) -> list[int]:
    return [next(numbers) for _ in range(count)]


def _picture(known: list[clipart.Drawing], number: int) -> str:
    drawing = known[number % len(known)]
    shade = f"#{(number * 40503) % 0xFFFFFF:06x}"
    return b64encode(clipart.on_background(drawing.path, shade, 800)).decode()


async def load(session: aiohttp.ClientSession, url: str, bodies: list[dict[str, Any]], clients: int, what: str) -> Row:
    """Send the searches from so many clients at once and return the row of `what`."""
    waiting = list(bodies)
    took: list[float] = []

    async def client() -> None:
        while waiting:
            body = waiting.pop()
            begin = time.perf_counter()
            async with session.post(f"{url}/api/v1/search", json=body) as answer:
                document = await answer.json()
            if answer.status != 200 or not document["results"]:
                raise RuntimeError(f"{answer.status}: {document}")
            took.append((time.perf_counter() - begin) * 1000)

    begin = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - begin
    return {
        "what": what,
        "clients": clients,
        "p50 ms": percentile(took, 0.5),
        "p99 ms": percentile(took, 0.99),
        "per s": len(took) / seconds,
    }


def memory(server: Standalone) -> float:
    """Return the resident memory of the process and its children, shared pages counted once each, MiB."""
    return sum(resident(pid) for pid in [server.pid, *server.children()])


def resident(pid: int) -> float:
    """Return the resident memory of one process, its share of what it shares, MiB."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
    return sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) / 1024


if __name__ == "__main__":
    main()
