"""How well the starter model and the words find: recall@10 by mode and language, as written and with a slip of the pen.

`python -m benchmarks.relevance`: some minutes. Two sets, neither of which the starter model was fitted to:

- The demo catalogue: 54 products in English; the names and the French queries of demo/queries.jsonl.
- Drawings: the fifth of the clip-art that is held out, once in each of four languages. A product is a picture and its
  label; it is searched by its label, by its first three tags, and by the first three that have no word of its label:
  then the words can only mislead.

Each query has one right product. A slip is one random edit (a letter left out, put in, exchanged, or swapped with the
next) in one random word of letters; each query is tried with several. The vocabulary is read from the catalogue as the
service reads it. Intervals are 95 %, by bootstrap over the queries.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

import numpy as np
from benchmarks import clipart
from benchmarks.report import ROOT, Row, publish
from numpy.typing import NDArray

from catalens import lexical
from catalens.domain import DEFAULT_LANGUAGES, DEFAULT_TENANT, Filter, IndexDocument, Language, Product
from catalens.embedding import CachedEncoder
from catalens.encoders import open_encoder
from catalens.engines import open_engines
from catalens.engines.memory import MemoryCache
from catalens.ports import Encoder
from catalens.settings import EncoderSettings, Settings
from catalens.telemetry import Metrics
from catalens_query.planner import RequestMode
from catalens_query.searching import Search, Searcher, Term
from catalens_query.vocabularies import Vocabularies

FOUR: Final[tuple[Language, ...]] = ("en", "fr", "de", "es")
MODES: Final[tuple[RequestMode, ...]] = ("lexical", "semantic", "hybrid")
SLIPS: Final = 3
"""Misspellings of each query."""
DEPTH: Final = 10
TAGS: Final = 3
_DRAWS: Final = 2000
_WORD: Final = re.compile(r"[^\W\d_]{4,}")
_KINDS: Final = 4
STRANGE: Final = "tags without a word of the label"
HELD_OUT: Final = range(20)
"""Hundredths of the drawings that the starter model never saw, as models/starter/drawings.py splits them."""
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Query:
    """A query and the product that it means."""

    text: str
    wanted: str


@dataclass(frozen=True)
class Trial:
    """A catalogue with the pictures of its products, and queries by their kind."""

    name: str
    languages: tuple[Language, ...]
    products: Sequence[tuple[Product, bytes]]
    queries: Mapping[str, Sequence[Query]]


def misspelt(text: str, draw: Random) -> str:
    """Return `text` with one random edit in one of its words of at least four letters; as it is if there is none."""
    words = list(_WORD.finditer(text))
    if not words:
        return text
    word = draw.choice(words)
    while True:
        at, kind = draw.randrange(len(word[0])), draw.randrange(_KINDS)
        letter = draw.choice("abcdefghijklmnopqrstuvwxyz")
        before, here, after = word[0][:at], word[0][at], word[0][at + 1 :]
        edited = (
            before + after,
            before + letter + here + after,
            before + letter + after,
            before + after[:1] + here + after[1:],
        )[kind]
        if edited.casefold() != word[0].casefold():
            return text[: word.start()] + edited + text[word.end() :]


def demo(languages: tuple[Language, ...] = DEFAULT_LANGUAGES) -> Trial:
    """Return the demo catalogue with its queries."""
    folder = ROOT / "demo"
    products = []
    for line in _lines(folder / "catalog.jsonl"):
        picture = (folder / line.pop("image")).read_bytes()
        products.append((Product.model_validate({**line, "version": 1, "offer_version": 1}), picture))
    asked = _lines(folder / "queries.jsonl")
    queries = {
        f"{language}, {kind}": [Query(line[f"query_{language}"], line["product_id"]) for line in asked]
        for language, kind in (("en", "names"), ("fr", "on English products"))
    }
    return Trial("demo photographs", languages, products, queries)


def drawings(language: Language, part: range = HELD_OUT) -> Trial:
    """Return that part of the drawings as a catalogue in that language."""
    captions = clipart.captions(language)
    products, labels, tags, strange = [], [], [], []
    for drawing in clipart.drawings():
        if hundredth(drawing.code) not in part or drawing.code not in captions:
            continue
        label, words = captions[drawing.code]
        product = Product(product_id=drawing.code, name=label, version=1)
        products.append((product, clipart.on_background(drawing.path, "#ffffff", 300)))
        labels.append(Query(label, drawing.code))
        own = lexical.words_of(label, FOUR)
        apart = [tag for tag in words if own.isdisjoint(lexical.words_of(tag, FOUR))]
        tags.append(Query(" ".join(words[:TAGS]), drawing.code))
        strange.append(Query(" ".join(apart[:TAGS]), drawing.code))
    kinds = {"labels": labels, "tags": tags, STRANGE: strange}
    asked = {f"{language}, {kind}": [one for one in queries if one.text] for kind, queries in kinds.items()}
    return Trial("drawings", FOUR, products, asked)


@asynccontextmanager
async def opened(trial: Trial, encoder: Encoder) -> AsyncIterator[Searcher]:
    """Yield what searches the trial's catalogue."""
    metrics, cached = Metrics(), CachedEncoder(encoder, MemoryCache(20_000), Metrics())
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(data_dir=Path(folder), languages=trial.languages)
        async with open_engines(settings, encoder.spec) as engines:
            for product, picture in trial.products:
                document = IndexDocument(
                    tenant=DEFAULT_TENANT,
                    product=product,
                    image_status="ok",
                    image=await cached.picture(picture, bulk=True),
                    text=await cached.text(lexical.text_for_embedding(product), bulk=True),
                    lexical=lexical.document_vector(product, trial.languages),
                )
                await engines.index.upsert([document])
            vocabularies = Vocabularies(trial.languages)
            await vocabularies.read(DEFAULT_TENANT, engines.index)
            yield Searcher(engines.index, cached, metrics, vocabularies=vocabularies, languages=trial.languages)


async def measure(trial: Trial, searcher: Searcher) -> list[Row]:
    """Return a row for each kind of query and each mode."""
    rows: list[Row] = []
    for kind, queries in trial.queries.items():
        rows += await _rows(f"{trial.name}, {kind}", queries, searcher)
    return rows


async def _rows(name: str, queries: Sequence[Query], searcher: Searcher) -> Sequence[Row]:
    draw = Random(name)
    slips = [[Query(misspelt(one.text, draw), one.wanted) for _ in range(SLIPS)] for one in queries]
    clean: dict[str, Array] = {}
    rows: list[dict[str, Any]] = []
    for mode in MODES:
        clean[mode] = np.array([await _found(one, mode, searcher) for one in queries])
        slipped = np.array([[await _found(one, mode, searcher) for one in tries] for tries in slips]).mean(axis=1)
        kept = slipped.mean() / clean[mode].mean() if clean[mode].any() else None
        rows.append(
            {
                "queries": name,
                "n": len(queries),
                "mode": mode,
                "recall@10": round(float(clean[mode].mean()), 3),
                "interval": _interval(clean[mode]),
                "with a slip": round(float(slipped.mean()), 3),
                "slip interval": _interval(slipped),
                "kept": None if kept is None else f"{kept:.0%}",
            }
        )
    better = max(("lexical", "semantic"), key=lambda mode: float(clean[mode].mean()))
    rows[-1]["less its better half"] = _interval(clean["hybrid"] - clean[better])
    return rows


async def _found(query: Query, mode: RequestMode, searcher: Searcher) -> float:
    search = Search((Term(query.text),), None, Filter(), DEPTH, 0, mode=mode)
    found = await searcher.search(DEFAULT_TENANT, search)
    return float(query.wanted in {hit.stored.product.product_id for hit in found.hits})


def _interval(values: Array) -> str:
    """Return the 95 % interval of the mean, by bootstrap."""
    draws = np.random.default_rng(0).integers(0, len(values), (_DRAWS, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), (2.5, 97.5))
    return f"{low:.2f}…{high:.2f}"


def hundredth(code: str) -> int:
    """Return which hundredth of the drawings this one is in, as models/starter/drawings.py splits them."""
    return int(hashlib.sha256(code.encode()).hexdigest(), 16) % 100


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(language: Language | None) -> list[Row]:
    """Measure the held-out drawings in a language, or the demo, with the starter model."""

    async def work() -> list[Row]:
        async with open_encoder(Settings(encoder=EncoderSettings(lanes=1)), Metrics()) as encoder:
            trial = demo() if language is None else drawings(language)
            async with opened(trial, encoder) as searcher:
                return await measure(trial, searcher)

    return asyncio.run(work())


if __name__ == "__main__":
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        publish("relevance", [row for rows in pool.map(run, (None, *FOUR)) for row in rows])
