"""Whether one cut-off (`min_score`) does for every query: the relevance that it is compared with, beside a flat cosine.

`python -m benchmarks.cutoffs`: some minutes. The cut-off of either is chosen on a fifth of the drawings, in English and
Spanish, that the starter model was fitted to (vectors look better there than they are), and judged on the fifth that is
held out, in four languages, and on the demo's photographs: by words, in `semantic` and in `auto`, and by the middle of
each product's own picture, mirrored. Right is the one product that was meant; what is of its kind (the subgroup of a
drawing, the category of a photograph) may be right too and is left out of the count. The cut-off is one for all kinds
and modes, the one with the highest mean F1 of the kinds; what `CUT`, the recommended start, keeps is beside it.
"""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from random import Random
from typing import Final, Literal

from benchmarks import clipart
from benchmarks.relevance import FOUR, HELD_OUT, STRANGE, Trial, demo, drawings, opened
from benchmarks.report import Row, publish
from PIL import Image, ImageOps

from catalens.domain import DEFAULT_TENANT, Filter, Language
from catalens.encoders import open_encoder
from catalens.settings import EncoderSettings, Settings
from catalens.telemetry import Metrics
from catalens_query.planner import RequestMode
from catalens_query.searching import Hit, Order, Search, Searcher, Term

TO_CHOOSE_ON: Final = range(20, 40)
ASKED: Final = 40
"""Queries of a kind."""
CUT: Final = 0.55
"""What docs/reference/search.md calls a start for a small catalogue of different things."""
DEEP: Final = 100
MODES: Final[tuple[RequestMode, ...]] = ("semantic", "auto")
SCALES: Final = ("relevance", "cosine")


@dataclass(frozen=True)
class Told:
    """A product that was found."""

    relevance: float
    cosine: float
    right: bool

    def on(self, scale: str) -> float:
        """Return what it has on that scale."""
        return self.relevance if scale == "relevance" else self.cosine


@dataclass(frozen=True)
class Judged:
    """What the queries of one kind found in one mode."""

    kind: str
    mode: RequestMode | Literal["picture"]
    found: Sequence[Sequence[Told]]

    def at(self, scale: str, cut: float) -> tuple[float, float, float]:
        """Return which share of the kept is right, which share of the right is kept, and their harmonic mean."""
        kept = [one.right for found in self.found for one in found if one.on(scale) >= cut]
        precision, recall = sum(kept) / max(1, len(kept)), sum(kept) / len(self.found)
        return precision, recall, 2 * precision * recall / max(1e-9, precision + recall)


async def judge(trial: Trial, searcher: Searcher, *, pictured: bool) -> list[Judged]:
    """Return what some of the trial's queries find, and what some of its pictures find."""
    alike = _kinds(trial)

    async def found(wanted: str, words: tuple[Term, ...], picture: bytes | None, mode: RequestMode) -> list[Told]:
        order = Order(min_score=0)
        search = Search(words, picture, Filter(), DEEP, 0, mode=mode, order=order, explain=True)
        told = []
        for hit in (await searcher.search(DEFAULT_TENANT, search)).hits:
            name = hit.stored.product.product_id
            if name == wanted or alike[name] != alike[wanted]:
                told.append(Told(hit.relevance or 0.0, _cosine(hit), name == wanted))
        return told

    judged = []
    for kind, queries in trial.queries.items():
        if STRANGE in kind:
            continue
        asked = Random(kind).sample(list(queries), min(ASKED, len(queries)))
        for mode in MODES:
            told = [await found(one.wanted, (Term(one.text),), None, mode) for one in asked]
            judged.append(Judged(f"{trial.name}, {kind}", mode, told))
    if pictured:
        shown = Random(trial.name).sample(list(trial.products), min(ASKED, len(trial.products)))
        told = [await found(product.product_id, (), _seen_again(picture), "auto") for product, picture in shown]
        judged.append(Judged(f"{trial.name}, pictures", "picture", told))
    return judged


def best(judged: Sequence[Judged], scale: str) -> float:
    """Return the cut-off, in hundredths, of the highest mean F1; each kind counts the same."""
    return max((step / 100 for step in range(1, 100)), key=lambda cut: sum(one.at(scale, cut)[2] for one in judged))


def rows(chosen_on: Sequence[Judged], judged: Sequence[Judged]) -> list[Row]:
    """Return a row for each kind, mode and scale: what one cut-off, chosen elsewhere, keeps of it."""
    found: list[Row] = []
    for scale, cut in [*((scale, best(chosen_on, scale)) for scale in SCALES), ("relevance", CUT)]:
        for one in judged:
            right, kept, both = one.at(scale, cut)
            found.append(
                {
                    "queries": one.kind, "n": len(one.found), "mode": one.mode, "scale": scale, "cut-off": f"{cut:.2f}",
                    "right of the kept": f"{right:.2f}", "kept of the right": f"{kept:.2f}", "F1": f"{both:.2f}",
                    "its own best F1": f"{one.at(scale, best([one], scale))[2]:.2f}",
                }
            )  # fmt: skip
    return found


def run(language: Language | None, part: range) -> list[Judged]:
    """Judge the drawings in a language, or the demo, with the starter model."""

    async def work() -> list[Judged]:
        async with open_encoder(Settings(encoder=EncoderSettings(lanes=1)), Metrics()) as encoder:
            trial = demo() if language is None else drawings(language, part)
            async with opened(trial, encoder) as searcher:
                return await judge(trial, searcher, pictured=language in (None, "en"))

    return asyncio.run(work())


def _kinds(trial: Trial) -> dict[str, str]:
    """Return of what kind each product is, for none that has none."""
    subgroups = clipart.subgroups()
    return {
        product.product_id: product.category or subgroups.get(product.product_id, product.product_id)
        for product, _ in trial.products
    }


def _cosine(hit: Hit) -> float:
    parts = [part for part in hit.parts or () if part.part in ("image", "text") and part.score is not None]
    weight = sum(part.weight or 0.0 for part in parts)
    return sum((part.weight or 0.0) * (part.score or 0.0) for part in parts) / weight if weight else 0.0


def _seen_again(picture: bytes) -> bytes:
    """Return the middle of a picture, mirrored."""
    with Image.open(io.BytesIO(picture)) as whole:
        width, height = whole.size
        box = (width // 10, height // 10, width - width // 10, height - height // 10)
        middle = ImageOps.mirror(whole.convert("RGB").crop(box))
    out = io.BytesIO()
    middle.save(out, "JPEG", quality=90)
    return out.getvalue()


if __name__ == "__main__":
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        asked = [pool.submit(run, language, HELD_OUT) for language in (None, *FOUR)]
        before = [pool.submit(run, language, TO_CHOOSE_ON) for language in ("en", "es")]
        publish(
            "cutoffs",
            rows([kind for one in before for kind in one.result()], [k for one in asked for k in one.result()]),
        )
