"""Search: the embedded index by itself, without and with its graph, beside its peers; then whole HTTP requests.

The catalogue is synthetic: products of a usual size (`products.py`) and clustered vectors (`peers/clustered.py`).
Recall is how many of the ten products of the exact answer, taken before there was a graph, the graph's answer has; and,
because BM25 gives many products one score, how many of its ten are as good as the tenth of the exact answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import aiohttp
import structlog
from benchmarks.peers import clustered
from benchmarks.peers.environments import make_environments, python
from benchmarks.products import product
from benchmarks.report import ROOT, Row, percentile, publish
from benchmarks.standalone import CLIENTS, load, memory, resident
from tests.standalone import Standalone

from catalens.domain import DEFAULT_TENANT, Condition, Filter, IndexDocument, Leg, ModelSpec, Product, Range
from catalens.embedding import CachedEncoder
from catalens.engines.edge import GRAPH_FROM, EdgeIndex
from catalens.engines.memory import MemoryCache
from catalens.lexical import document_vector, query_vector
from catalens.telemetry import Metrics
from catalens_query.planner import TIERS
from catalens_query.searching import Order, Search, Searcher, Term

if TYPE_CHECKING:
    from catalens.domain import Embedding
    from catalens.ports import EncodedImage

SPEC: Final = ModelSpec("clustered", "1", "clustered", clustered.DIMENSION, "c" * 64)
USUAL: Final = 100_000
ALL: Final = Filter()
PLAIN: Final = Order()
FILTERS: Final[Mapping[str, Filter]] = {
    "": ALL,
    ", 5 % by price": Filter((Condition("price", within=Range(lte=24.75)),)),
    ", 5 % by brand": Filter((Condition("brand", tuple(f"Brand {number}" for number in range(20))),)),
    ", 8 % by colour": Filter((Condition("attributes.color", ("navy",)),)),
}
Answer = list[tuple[str, float]]
Answers = dict[str, list[Answer]]
"""The products of every query and their scores, by what was asked."""


class Known:
    """An Encoder whose texts are known beforehand, so that a search costs no inference."""

    def __init__(self, texts: Mapping[str, Embedding]) -> None:
        self.spec = SPEC
        self._texts = texts

    async def embed_text(self, text: str, *, bulk: bool = False) -> Embedding:
        """Return the vector of a known text."""
        del bulk
        return self._texts[text]

    async def embed_image(self, picture: bytes, *, bulk: bool = False) -> EncodedImage:
        """No picture is searched with."""
        raise NotImplementedError

    async def close(self) -> None:
        """Nothing to let go of."""


def main() -> None:
    """Run the parts that are asked for and publish the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--products", type=int, default=USUAL)
    parser.add_argument("--queries", type=int, default=500, help="of each kind (500)")
    parser.add_argument("--http-products", type=int, help="imported for the HTTP part (a fifth of them)")
    parser.add_argument("--only", default="index,peers,http", help="parts: index, peers, http")
    parser.add_argument("--quick", action="store_true", help="few queries: to see whether it works")
    arguments = parser.parse_args()
    queries = 30 if arguments.quick else arguments.queries
    parts = arguments.only.split(",")
    rows: list[Row] = []
    if "index" in parts:
        rows += asyncio.run(_index(arguments.products, queries))
    if "peers" in parts:
        rows += _peers(arguments.products, queries)
    if "http" in parts:
        rows += _http(arguments.http_products or max(1, arguments.products // 5), queries)
    publish("search" if arguments.products == USUAL else f"search-{arguments.products}", rows)


# --- the embedded index -------------------------------------------------------------------------------------------


async def _index(products: int, queries: int) -> list[Row]:
    vectors = clustered.queries(products, queries)
    texts = {f"{product(n * 7919 % products)['name']} {n}": vector for n, vector in enumerate(vectors)}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name, structlog.testing.capture_logs() as logs:
        folder = Path(name) / "index"
        # So that it is exact however many there are.
        index = await EdgeIndex.open(folder, SPEC, graph_from=2**62, answers=0)
        begin = time.perf_counter()
        for batch in _batches(products):
            await index.upsert(batch)
        await index.flush()
        seconds = time.perf_counter() - begin
        rows.append({"what": f"load {products}", "seconds": seconds, "per s": products / seconds})
        print(rows[-1], file=sys.stderr, flush=True)
        # The truth costs much at a million.
        exact, truth = await _questions(index, dict(list(texts.items())[: max(10, 20_000_000 // products)]), None)
        rows += [{**row, "what": f"exact: {row['what']}"} for row in exact]
        await index.close()

        index = await EdgeIndex.open(folder, SPEC, answers=0)
        if products >= GRAPH_FROM:
            peak = 0.0
            while not any(entry["event"] == "index.optimised" for entry in logs):
                failed = [
                    entry for entry in logs if entry["event"] in ("index.optimise_failed", "index.optimise_skipped")
                ]
                if failed:
                    raise RuntimeError(f"no graph: {failed}")
                peak = max(peak, sum(resident(pid) for pid in _family(index)))
                await asyncio.sleep(0.5)
            (said,) = [entry for entry in logs if entry["event"] == "index.optimised"]
            rows.append({"what": "build the graph beside it", "seconds": said["seconds"], "MiB": peak})
            begin = time.perf_counter()
            await index.close()
            index = await EdgeIndex.open(folder, SPEC, answers=0)
            rows.append({"what": "close and open again", "seconds": time.perf_counter() - begin})
        answered, _ = await _questions(index, texts, truth)
        rows += [{**row, "what": f"embedded index: {row['what']}"} for row in answered]
        rows.append({"what": "memory of its process", "MiB": resident(_family(index)[0])})
        rows.append({"what": "on disk", "MiB": sum(path.stat().st_blocks for path in folder.rglob("*")) / 2048})
        await index.close()
    return rows


def _family(index: EdgeIndex) -> list[int]:
    """Return the process ids of the index's process and of its children."""
    pid = index._engine._process.pid  # noqa: SLF001  # it tells nobody
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
    return [pid, *map(int, children)]


def _batches(products: int, size: int = 256) -> Iterator[list[IndexDocument]]:
    first = 0
    for image, text in clustered.chunks(products):
        for at in range(0, len(image), size):
            batch = []
            for row in range(at, min(at + size, len(image))):
                data = Product.model_validate(product(first + row, version=1))
                lexical = document_vector(data)
                batch.append(
                    IndexDocument(DEFAULT_TENANT, data, "ok", image=image[row], text=text[row], lexical=lexical)
                )
            yield batch
        first += len(image)


async def _questions(
    index: EdgeIndex, texts: Mapping[str, Embedding], truth: Answers | None
) -> tuple[list[Row], Answers]:
    """Ask everything; rows with times, and with recall where the truth is known."""
    metrics = Metrics()
    # The exact answers of a million, and what is made at first use, take longer than a search may.
    encoder = CachedEncoder(Known(texts), MemoryCache(len(texts)), metrics)
    searcher = Searcher(index, encoder, metrics, patience=600.0)
    rows: list[Row] = []
    answers = Answers()

    async def ask(what: str, one: Callable[[str], Awaitable[Answer]]) -> None:
        await one(next(iter(texts)))  # a filter's payload index may have to be made first
        took, found = [], []
        for text in texts:
            begin = time.perf_counter()
            found.append(await one(text))
            took.append((time.perf_counter() - begin) * 1000)
        answers[what] = found
        row: dict[str, Any] = {"what": what, "p50 ms": percentile(took, 0.5), "p99 ms": percentile(took, 0.99)}
        if truth is not None:
            row["recall@10"] = f"{_recall(truth[what], found):.4f}"
            row["with ties"] = f"{_recall_with_ties(truth[what], found):.4f}"
        rows.append(row)
        print(row, file=sys.stderr, flush=True)

    async def whole(where: Filter, text: str, order: Order = PLAIN, facets: tuple[str, ...] = ()) -> Answer:
        asked = Search((Term(text),), None, where, 10, 0, order=order, facets=facets)
        found = await searcher.search(DEFAULT_TENANT, asked)
        return [(hit.stored.product.product_id, hit.score) for hit in found.hits]

    async def leg(limit: int, where: Filter, text: str) -> Answer:
        (hits,) = await index.search(DEFAULT_TENANT, [Leg("image", texts[text], limit)], where)
        return [(hit.product_id, hit.score) for hit in hits[:10]]

    async def words(text: str) -> Answer:
        (hits,) = await index.search(DEFAULT_TENANT, [Leg("lexical", query_vector(text), TIERS[0])], ALL)
        return [(hit.product_id, hit.score) for hit in hits[:10]]

    await searcher.embed_text(next(iter(texts)))
    for name, where in FILTERS.items():
        await ask(f"picture, text and words{name}", partial(whole, where))
    counted = ("brand", "category", "attributes.color", "price")
    await ask("picture, text and words, four facets", partial(whole, ALL, facets=counted))
    await ask("picture, text and words, grouped", partial(whole, ALL, order=Order(group_by="group_id")))
    for limit in (10, *TIERS[:2]):
        await ask(f"picture alone, best {limit}", partial(leg, limit, ALL))
    for name, where in list(FILTERS.items())[1:]:
        await ask(f"picture alone, best {TIERS[0]}{name}", partial(leg, TIERS[0], where))
    await ask("words alone", words)
    return rows, answers


def _recall(truth: Sequence[Answer], found: Sequence[Answer]) -> float:
    pairs = [({name for name, _ in known}, {name for name, _ in got}) for known, got in _pairs(truth, found)]
    return statistics.fmean(len(known & got) / len(known) for known, got in pairs)


def _recall_with_ties(truth: Sequence[Answer], found: Sequence[Answer]) -> float:
    """As `_recall`, but what has the score of the last of the exact answer, or more, is as good as what is in it."""
    shares = []
    for known, got in _pairs(truth, found):
        least = known[-1][1] - 1e-4 * max(1.0, abs(known[-1][1]))
        shares.append(min(1.0, sum(score >= least for _, score in got) / len(known)))
    return statistics.fmean(shares)


def _pairs(truth: Sequence[Answer], found: Sequence[Answer]) -> list[tuple[Answer, Answer]]:
    return [(known, got) for known, got in zip(truth, found, strict=False) if known]


# --- its peers ----------------------------------------------------------------------------------------------------


def _peers(products: int, queries: int) -> list[Row]:
    rows: list[Row] = []
    missing = make_environments(["faiss"])
    if missing:
        print(f"faiss cannot be installed here, its rows are left out: {missing['faiss']}")
    else:
        said = _peer("faiss", "faiss_hnsw", products, queries)
        rows.append({"what": "faiss HNSW: build", "seconds": said["seconds"], "per s": products / said["seconds"]})
        rows += [
            {
                "what": f"faiss HNSW, vectors only: picture alone, best {limit}",
                "p50 ms": percentile(answer["took"], 0.5),
                "p99 ms": percentile(answer["took"], 0.99),
                "recall@10": f"{answer['recall']:.4f}",
            }
            for limit, answer in said["answers"].items()
        ]
    if products > 200_000:
        print("qdrant-client's local mode is left out: it keeps all in Python objects and takes seconds a query")
        return rows
    said = _peer("project", "qdrant_local", products, min(queries, 20))
    rows.append({"what": "Qdrant local mode: load", "seconds": said["seconds"], "per s": products / said["seconds"]})
    rows += [
        {
            "what": f"Qdrant local mode: picture alone, best {TIERS[0]}{suffix}",
            "p50 ms": percentile(said["took"][name], 0.5),
            "p99 ms": percentile(said["took"][name], 0.99),
        }
        for name, suffix in (("all", ""), ("filtered", ", 5 % by price"))
    ]
    return rows


def _peer(environment: str, module: str, products: int, queries: int) -> Any:
    asked = subprocess.run(
        [str(python(environment)), "-m", f"benchmarks.peers.{module}", str(products), str(queries)],
        cwd=ROOT, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    return json.loads(asked.stdout)


# --- whole requests -----------------------------------------------------------------------------------------------


def _http(products: int, queries: int) -> list[Row]:
    """Return the rows of the standalone process: the starter model, products without pictures."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "catalogue.jsonl"
        with file.open("w", encoding="utf-8") as lines:
            for number in range(products):
                lines.write(json.dumps(product(number)) + "\n")
        with Standalone(Path(name) / "data") as server:
            begin = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "catalens_standalone.cli", "import", str(file), "--wait", "--restart"],
                check=True,
                env={"CATALENS_URL": server.url, "PATH": os.environ["PATH"], "HOME": name},
            )
            seconds = time.perf_counter() - begin
            rows: list[Row] = [{"what": f"HTTP: import {products}", "seconds": seconds, "per s": products / seconds}]
            if products >= GRAPH_FROM:
                _await_graph(Path(name) / "data.log", products)
            rows += asyncio.run(_requests(server.url, products, queries))
            rows.append({"what": "HTTP: memory", "MiB": memory(server)})
    return rows


def _await_graph(log: Path, products: int) -> None:
    """Wait until a graph has all but the few products that never get one of their own."""
    while True:
        entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("{")]
        told = [entry for entry in entries if str(entry.get("event")).startswith("index.optimise")]
        if len(told) > 1 and told[-1]["event"] == "index.optimised":
            covered = told[-2]["points"]
            if products - covered < max(GRAPH_FROM // 4, products // 20):
                return
        time.sleep(1)


async def _requests(url: str, products: int, queries: int) -> list[Row]:
    rows = []
    fresh = iter(range(10**9))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=max(CLIENTS))) as session:
        for clients in CLIENTS:
            # New words each time: the encoder works for every request.
            texts = [
                {"query": f"{product(n * 7919 % products)['name']} {n}", "limit": 10}
                for n in [next(fresh) for _ in range(queries)]
            ]
            rows.append(await load(session, url, texts, clients, f"HTTP, {products}: text, encoder included"))
        again = [{"query": "navy wool jacket", "limit": 10}] * queries
        await load(session, url, again[:1], 1, "")
        rows += [await load(session, url, again, clients, f"HTTP, {products}: same text again") for clients in CLIENTS]
        cheap = [
            {"query": f"olive boots {next(fresh)}", "limit": 10, "filters": {"price": {"lte": 24.75}}}
            for _ in range(queries)
        ]
        rows.append(await load(session, url, cheap, 1, f"HTTP, {products}: text, 5 % by price"))
    return rows


if __name__ == "__main__":
    main()
