"""How well the starter model and the words find: recall@10 by mode and language, as written and with a slip of the pen.

`python -m benchmarks.relevance`: some minutes. Two sets, neither of which the starter model was fitted to:

- The demo catalogue: 54 products in English; the names and the French queries of demo/queries.jsonl.
- Drawings: the fifth of the clip-art that is held out, once in each of four languages. A product is a picture and its
  label; it is searched by its label, by its first three tags, and by the first three that have no word of its label:
  then the words can only mislead.

Each query has one right product. A slip is one random edit (a letter left out, put in, exchanged, or swapped with the
next) in one random word of letters; each query is tried with several. The vocabulary is read from the catalogue as the
service reads it. Intervals are 95 %, by bootstrap over the queries.

Then one cut-off for all queries (`min_score`): for the relevance that it is compared with, and for a flat cosine beside
it, the cut-off is chosen on another fifth of the drawings, which the starter model was fitted to (vectors look better
there than they are), and judged on the held-out fifth and on the demo: by words, and by the middle of each product's
own picture, mirrored.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
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
from typing import Any, Final, TypeAlias

import numpy as np
from benchmarks import clipart
from benchmarks.report import ROOT, Row, show, write
from numpy.typing import NDArray
from PIL import Image, ImageOps

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
from catalens_query.searching import Hit, Order, Search, Searcher, Term
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
TO_CHOOSE_ON: Final = range(20, 40)
ASKED: Final = 100
"""Queries of a kind by which cut-offs are chosen and judged."""
DEEP: Final = 100
_Told: TypeAlias = list[tuple[float, float, bool]]
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
    pictured: bool
    """Whether it is also searched by pictures: they are the same in every language."""


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
    return Trial("demo photographs", languages, products, queries, pictured=True)


def drawings(language: Language, part: range = HELD_OUT) -> Trial:
    """Return that part of the drawings as a catalogue in that language."""
    captions = clipart.captions(language)
    products, labels, tags, strange = [], [], [], []
    for drawing in clipart.drawings():
        if _hundredth(drawing.code) not in part or drawing.code not in captions:
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
    return Trial("drawings", FOUR, products, asked, pictured=language == "en")


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


@dataclass(frozen=True)
class Judged:
    """What queries of one kind found in one mode: of each product its relevance, its cosine and whether it is right."""

    kind: str
    mode: RequestMode
    found: Sequence[Sequence[tuple[float, float, bool]]]

    def at(self, scale: int, cut: float) -> tuple[float, float, float]:
        """Return which share of the kept is right, which share of the right is kept, and their harmonic mean."""
        kept = [one[2] for found in self.found for one in found if one[scale] >= cut]
        precision, recall = sum(kept) / max(1, len(kept)), sum(kept) / len(self.found)
        return precision, recall, 2 * precision * recall / max(1e-9, precision + recall)


async def judge(trial: Trial, searcher: Searcher) -> list[Judged]:
    """Return what some of the trial's queries find, by words and, once, by pictures."""

    async def found(wanted: str, words: tuple[Term, ...], picture: bytes | None, mode: RequestMode) -> _Told:
        order = Order(min_score=0)
        search = Search(words, picture, Filter(), DEEP, 0, mode=mode, order=order, explain=True)
        hits = (await searcher.search(DEFAULT_TENANT, search)).hits
        return [(hit.relevance or 0.0, _cosine(hit), hit.stored.product.product_id == wanted) for hit in hits]

    judged = []
    for kind, queries in trial.queries.items():
        asked = Random(kind).sample(queries, min(ASKED, len(queries)))
        for mode in ("semantic", "auto") if STRANGE not in kind else ():
            told = [await found(one.wanted, (Term(one.text),), None, mode) for one in asked]
            judged.append(Judged(f"{trial.name}, {kind}", mode, told))
    if trial.pictured:
        shown = Random(trial.name).sample(trial.products, min(ASKED, len(trial.products)))
        told = [await found(product.product_id, (), _seen_again(picture), "auto") for product, picture in shown]
        judged.append(Judged(f"{trial.name}, pictures", "semantic", told))
    return judged


def cut_offs(chosen_on: Sequence[Judged], judged: Sequence[Judged]) -> list[Row]:
    """Return a row for each kind, mode and scale: what one cut-off, chosen elsewhere, keeps of it."""
    rows: list[Row] = []
    for mode in ("semantic", "auto"):
        for scale, name in enumerate(("relevance", "cosine")):
            # A search by picture has no words: the cut-off of either mode must do for it.
            ours = [one for one in chosen_on if one.mode == mode or one.kind.endswith("pictures")]
            cut = _best(ours, scale)
            for one in judged:
                if one.mode != mode and not one.kind.endswith("pictures"):
                    continue
                right, kept, both = one.at(scale, cut)
                rows.append(
                    {
                        "queries": one.kind, "n": len(one.found), "mode": mode, "scale": name, "cut-off": f"{cut:.2f}",
                        "right of the kept": f"{right:.2f}", "kept of the right": f"{kept:.2f}", "F1": f"{both:.2f}",
                        "F1 by its own cut-off": f"{one.at(scale, _best([one], scale))[2]:.2f}",
                    }
                )  # fmt: skip
    return rows


def _best(judged: Sequence[Judged], scale: int) -> float:
    """Return the cut-off, in hundredths, of the highest mean F1; each kind counts the same."""
    return max((step / 100 for step in range(1, 100)), key=lambda cut: sum(one.at(scale, cut)[2] for one in judged))


def _cosine(hit: Hit) -> float:
    parts = [part for part in hit.parts or () if part.part in ("image", "text") and part.score is not None]
    weight = sum(part.weight or 0.0 for part in parts)
    return sum((part.weight or 0.0) * (part.score or 0.0) for part in parts) / weight if weight else 0.0


def _seen_again(picture: bytes) -> bytes:
    """Return the middle of a picture, mirrored."""
    with Image.open(io.BytesIO(picture)) as opened:
        width, height = opened.size
        box = (width // 10, height // 10, width - width // 10, height - height // 10)
        middle = ImageOps.mirror(opened.convert("RGB").crop(box))
    out = io.BytesIO()
    middle.save(out, "JPEG", quality=90)
    return out.getvalue()


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


def _hundredth(code: str) -> int:
    return int(hashlib.sha256(code.encode()).hexdigest(), 16) % 100


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(language: Language | None, part: range) -> tuple[list[Row], list[Judged]]:
    """Measure the drawings in a language, or the demo, with the starter model; a process of its own may do it."""

    async def work() -> tuple[list[Row], list[Judged]]:
        async with open_encoder(Settings(encoder=EncoderSettings(lanes=1)), Metrics()) as encoder:
            trial = demo() if language is None else drawings(language, part)
            async with opened(trial, encoder) as searcher:
                rows = await measure(trial, searcher) if part == HELD_OUT else []
                return rows, await judge(trial, searcher)

    return asyncio.run(work())


def main() -> None:
    """Measure all trials, as many at once as there are cores; print, and write benchmarks/results/relevance.json."""
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        wanted = [pool.submit(run, language, HELD_OUT) for language in (None, *FOUR)]
        chosen_on = [pool.submit(run, language, TO_CHOOSE_ON) for language in FOUR]
        rows = [row for one in wanted for row in one.result()[0]]
        judged = [kind for one in wanted for kind in one.result()[1]]
        cuts = cut_offs([kind for one in chosen_on for kind in one.result()[1]], judged)
    show("relevance", rows)
    show("one cut-off for all", cuts)
    write("relevance", rows, cut_offs=cuts)


if __name__ == "__main__":
    main()
