"""How to search with a picture and words at once: combiners and their weight, judged by the demo's own labels.

No timing; the same figures on every machine up to rounding. The encoder is the bundled starter model: it is not CLIP.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from benchmarks.report import ROOT, show, write
from PIL import Image, ImageOps

from catalens import lexical
from catalens.domain import LegHit, Product, SparseVector
from catalens.encoders import open_encoder
from catalens.settings import EncoderSettings, Settings
from catalens.telemetry import Metrics
from catalens_query import fusion
from catalens_query.planner import TIERS, blend, plan
from catalens_standalone.evaluating import MEASURES, changes, intervals, measure

if TYPE_CHECKING:
    from catalens.domain import Embedding
    from catalens.ports import Encoder
    from catalens_query.planner import RequestMode

DEPTH: Final = TIERS[0]
WEIGHTS: Final = tuple(round(0.1 * step, 1) for step in range(11))
DEFAULT: Final = 0.5
RANK_CONSTANT: Final = 60
"""Of reciprocal rank fusion (Cormack, Clarke and Buettcher, 2009)."""
COLOURS: Final = {
    "red": (205, 30, 40),
    "blue": (35, 90, 200),
    "green": (45, 150, 60),
    "yellow": (245, 205, 40),
    "black": (30, 30, 32),
    "pink": (245, 130, 185),
}
KINDS: Final = {
    "Electronics > Computers": "computer",
    "Electronics > Photo": "camera",
    "Home & Garden > Furniture": "furniture",
    "Home & Garden > Plants": "plant",
    "Sports & Outdoor > Equipment": "sports equipment",
    "Sports & Outdoor > Footwear": "shoe",
}


@dataclass(frozen=True, slots=True)
class Item:
    """A product of a catalogue under test, embedded as the product would be."""

    product: Product
    colour: str
    image: Embedding
    text: Embedding
    words: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Question:
    """A picture, words, and what is right; `without` is left out of the answer."""

    task: str
    source: str
    """The product in the picture: halves are split by it."""
    picture: Embedding
    words: Embedding
    lexical: SparseVector
    relevant: Mapping[str, float]
    catalogue: str
    without: str | None = None


class Catalogue:
    """Exact ranked lists over some items, cut where the product cuts them."""

    def __init__(self, items: Sequence[Item]) -> None:
        items = sorted(items, key=lambda item: item.product.product_id)
        self.ids = [item.product.product_id for item in items]
        self.image = np.stack([item.image for item in items])
        self.text = np.stack([item.text for item in items])
        self._words = [item.words for item in items]
        known: defaultdict[int, int] = defaultdict(int)
        for item in items:
            for term in item.words:
                known[term] += 1
        count = len(items)
        self._found: dict[SparseVector, list[LegHit]] = {}
        self._idf = {term: float(np.log(1 + (count - held + 0.5) / (held + 0.5))) for term, held in known.items()}

    def dense(self, name: str, query: Embedding) -> list[LegHit]:
        """Return the nearest by cosine."""
        return self.best((self.image if name == "image" else self.text) @ query)

    def lexical(self, query: SparseVector) -> list[LegHit]:
        """Return the best by BM25 with idf."""
        if query in self._found:
            return self._found[query]
        wanted = {
            index: value * self._idf.get(index, 0.0) for index, value in zip(query.indices, query.values, strict=True)
        }
        scores = [sum(weight * words.get(term, 0.0) for term, weight in wanted.items()) for words in self._words]
        found = self._found[query] = [hit for hit in self.best(np.array(scores)) if hit.score > 0]
        return found

    def best(self, scores: Any) -> list[LegHit]:
        """Return the first of them by score."""
        order = np.argsort(-scores, kind="stable")[:DEPTH]  # ties by id, as the ids are in order
        return [LegHit(self.ids[row], float(scores[row])) for row in order]


# --- combiners --------------------------------------------------------------------------------------------

Combiner = Callable[[Catalogue, Question, float, "RequestMode"], list[LegHit]]


def plain_sum(catalogue: Catalogue, asked: Question, weight: float, mode: RequestMode) -> list[LegHit]:
    """Rank as the product does: one summed vector asks both lists, and the lists are fused."""
    return _planned(catalogue, blend(asked.words, asked.picture, weight), asked.lexical, weight, mode)


def normalised_sum(catalogue: Catalogue, asked: Question, weight: float, mode: RequestMode) -> list[LegHit]:
    """Rank as WeiMoCIR does (arXiv 2409.04918): the same sum, normalised, and its two cosines added as they are.

    Its β, the share of the candidates' texts, is the plan's, so that only the way of adding differs.
    """
    shares = plan(mode, "both", weight).shares
    query = blend(asked.words, asked.picture, weight)
    dense = shares["image"] + shares["text"]
    scores = (shares["image"] * catalogue.image @ query + shares["text"] * catalogue.text @ query) / dense
    if "lexical" not in shares:
        return catalogue.best(scores)
    lists = [
        fusion.RankedList("image", dense, catalogue.best(scores)),
        fusion.RankedList("lexical", shares["lexical"], catalogue.lexical(asked.lexical)),
    ]
    return fusion.fuse(lists)


def rank_fusion(catalogue: Catalogue, asked: Question, weight: float, mode: RequestMode) -> list[LegHit]:
    """Search by the words and by the picture apart, and add reciprocal ranks."""
    scores: defaultdict[str, float] = defaultdict(float)
    for share, hits in _apart(catalogue, asked, weight, mode):
        for rank, hit in enumerate(hits, start=1):
            scores[hit.product_id] += share / (RANK_CONSTANT + rank)
    return sorted((LegHit(key, value) for key, value in scores.items()), key=lambda hit: (-hit.score, hit.product_id))


def score_fusion(catalogue: Catalogue, asked: Question, weight: float, mode: RequestMode) -> list[LegHit]:
    """Search by the words and by the picture apart, and fuse the two as lists are fused."""
    found = _apart(catalogue, asked, weight, mode)
    return fusion.fuse([fusion.RankedList("image", share, hits) for share, hits in found if share])


COMBINERS: Final[Mapping[str, Combiner]] = {
    "plain sum": plain_sum,
    "normalised sum (WeiMoCIR)": normalised_sum,
    "rank fusion": rank_fusion,
    "score fusion": score_fusion,
}


def _planned(
    catalogue: Catalogue, query: Embedding, words: SparseVector, weight: float, mode: RequestMode
) -> list[LegHit]:
    legs = plan(mode, "both", weight).legs({"image": query, "text": query}, words)
    lists = []
    for leg in legs:
        found = (
            catalogue.lexical(leg.vector)
            if isinstance(leg.vector, SparseVector)
            else catalogue.dense(leg.using, leg.vector)
        )
        lists.append(fusion.RankedList(leg.using, leg.weight, found, complete=len(found) < DEPTH))
    return fusion.fuse(lists)


def _apart(catalogue: Catalogue, asked: Question, weight: float, mode: RequestMode) -> list[tuple[float, list[LegHit]]]:
    return [
        (1 - weight, _planned(catalogue, asked.words, asked.lexical, 0, mode)),
        (weight, _planned(catalogue, asked.picture, asked.lexical, 1, mode)),
    ]


# --- catalogues and questions -----------------------------------------------------------------------------


def tinted(picture: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Return the photograph in shades of one colour; what is nearly white, as many a backdrop is, stays."""
    rgb = np.asarray(picture.convert("RGB"), np.float32)
    light = rgb.mean(axis=2, keepdims=True) / 255
    shaded = np.asarray(colour, np.float32) * (0.35 + 0.85 * light)
    kept = np.clip((rgb.min(axis=2, keepdims=True) - 200) / 40, 0, 1)
    return Image.fromarray((kept * rgb + (1 - kept) * shaded).clip(0, 255).astype(np.uint8))


def mirrored_crop(picture: Image.Image) -> Image.Image:
    """Return what another photograph of the same thing might show: the middle 70 %, mirrored."""
    width, height = picture.size
    box = (round(0.15 * width), round(0.15 * height), round(0.85 * width), round(0.85 * height))
    return ImageOps.mirror(picture.crop(box))


async def prepare(encoder: Encoder, demo: Path) -> tuple[dict[str, Catalogue], list[Question]]:
    """Return the catalogues and all questions, embedded."""

    async def seen(picture: Image.Image) -> Embedding:
        file = io.BytesIO()
        picture.convert("RGB").save(file, "JPEG", quality=90)
        return (await encoder.embed_image(file.getvalue())).embedding

    lines = [json.loads(line) for line in (demo / "catalog.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = {
        row["product_id"]: row
        for row in map(json.loads, (demo / "queries.jsonl").read_text(encoding="utf-8").splitlines())
    }
    words = {text: await encoder.embed_text(text) for text in (*COLOURS, *KINDS.values())}
    originals, variants = [], []
    crops = {}
    for line in lines:
        with Image.open(demo / line.pop("image")) as opened:
            photo = opened.convert("RGB")
        crops[line["product_id"]] = await seen(mirrored_crop(photo))
        line["attributes"] = {
            key: value for key, value in line["attributes"].items() if key not in ("color", "variants")
        }
        product = Product.model_validate(line)
        text = await encoder.embed_text(lexical.text_for_embedding(product))
        originals.append(_item(product, "", await seen(photo), text))
        for colour, tint in COLOURS.items():
            variant = product.model_copy(
                update={
                    "product_id": f"{product.product_id}:{colour}",
                    "attributes": {**product.attributes, "color": colour},
                }
            )
            variants.append(_item(variant, colour, await seen(tinted(photo, tint)), text))
    catalogues = {"originals": Catalogue(originals), "variants": Catalogue(variants)}
    questions = [*_colours(variants, words), *_kinds(variants, words), *_own_kinds(originals, words)]
    for item in originals:
        for language in ("en", "fr"):
            name = asked[item.product.product_id][f"query_{language}"]
            questions.append(
                Question(
                    "itself, named", item.product.product_id, crops[item.product.product_id],
                    await encoder.embed_text(name), lexical.query_vector(name), {item.product.product_id: 1.0},
                    "originals",
                )
            )  # fmt: skip
    return catalogues, questions


def _item(product: Product, colour: str, image: Embedding, text: Embedding) -> Item:
    vector = lexical.document_vector(product)
    return Item(product, colour, image, text, dict(zip(vector.indices, vector.values, strict=True)))


def _colours(items: Sequence[Item], words: Mapping[str, Embedding]) -> Iterator[Question]:
    """Yield the picture in one colour with the name of another: right is the same thing in that colour."""
    for item in items:
        source = item.product.product_id.partition(":")[0]
        others = [colour for colour in COLOURS if colour != item.colour]
        word = others[_number(item.product.product_id) % len(others)]
        yield Question(
            "another colour", source, item.image, words[word], lexical.query_vector(word), {f"{source}:{word}": 1.0},
            "variants",
        )  # fmt: skip


def _kinds(items: Sequence[Item], words: Mapping[str, Embedding]) -> Iterator[Question]:
    """Yield the picture in one colour with the name of another kind: right is what is of that kind in that colour."""
    for item in items:
        others = [category for category in KINDS if category != item.product.category]
        category = others[_number(f"kind {item.product.product_id}") % len(others)]
        right = {
            one.product.product_id: 1.0
            for one in items
            if one.product.category == category and one.colour == item.colour
        }
        word = KINDS[category]
        source = item.product.product_id.partition(":")[0]
        yield Question(
            "another kind", source, item.image, words[word], lexical.query_vector(word), right, "variants"
        )  # fmt: skip


def _own_kinds(items: Sequence[Item], words: Mapping[str, Embedding]) -> Iterator[Question]:
    """Yield the picture with the name of its own kind: right is the rest of that kind."""
    for item in items:
        own = item.product.product_id
        right = {
            one.product.product_id: 1.0
            for one in items
            if one.product.category == item.product.category and one.product.product_id != own
        }
        word = KINDS[item.product.category or ""]
        yield Question(
            "its own kind", own, item.image, words[word], lexical.query_vector(word), right, "originals", without=own
        )


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])


# --- the study --------------------------------------------------------------------------------------------


def figures(
    catalogues: Mapping[str, Catalogue], questions: Sequence[Question], rank: Callable[..., list[LegHit]]
) -> Any:
    """Return one row of measures a question."""
    rows = []
    for asked in questions:
        ranking = [
            hit.product_id for hit in rank(catalogues[asked.catalogue], asked) if hit.product_id != asked.without
        ]
        rows.append(measure(ranking, asked.relevant))
    return np.array(rows)


def study(
    catalogues: Mapping[str, Catalogue], questions: Sequence[Question]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the sweep, and the choice: weights taken from one half of the products and judged on the other."""
    tasks = list(dict.fromkeys(asked.task for asked in questions))
    chosen_on = np.array([_number(asked.source) % 2 == 0 for asked in questions])
    of_task = {task: np.array([asked.task == task for asked in questions]) for task in tasks}
    ndcg = MEASURES.index("nDCG@10")
    sweep, choice = [], []
    mode: RequestMode
    for mode in ("semantic", "auto"):
        found: dict[tuple[str, float], Any] = {}
        for name, combiner in COMBINERS.items():
            for weight in WEIGHTS:
                each = figures(catalogues, questions, lambda held, asked: combiner(held, asked, weight, mode))  # noqa: B023
                found[name, weight] = each[:, ndcg]
                means = {task: float(each[rows, ndcg].mean()) for task, rows in of_task.items()}
                sweep.append(
                    {
                        "combiner": name,
                        "mode": mode,
                        "image_weight": weight,
                        **_rounded(means),
                        **_rounded({"mean": float(np.mean(list(means.values())))}),
                    }
                )
        base = found["plain sum", DEFAULT]
        for name in COMBINERS:
            best = max(WEIGHTS, key=lambda weight: _mean(found[name, weight], of_task, chosen_on))
            for weight in sorted({best, DEFAULT}):
                values = _balanced(found[name, weight], of_task, ~chosen_on)
                reference = _balanced(base, of_task, ~chosen_on)
                (interval,) = intervals(values[:, None])
                (change,) = changes(reference[:, None], values[:, None])
                choice.append(
                    {
                        "combiner": name, "mode": mode, "image_weight": weight,
                        "chosen": "yes" if weight == best else "",
                        **_rounded({"nDCG@10 held out": interval.mean, "low": interval.low, "high": interval.high}),
                        **_rounded({"less plain sum at 0.5": change.difference, "p": change.p}),
                    }
                )  # fmt: skip
    return sweep, choice


def _mean(values: Any, of_task: Mapping[str, Any], rows: Any) -> float:
    return float(np.mean([values[task & rows].mean() for task in of_task.values()]))


def _balanced(values: Any, of_task: Mapping[str, Any], rows: Any) -> Any:
    """Return the values weighted so that their mean is the mean over tasks, however many questions each has."""
    weighted = np.zeros(len(values))
    count = int(rows.sum())
    for task in of_task.values():
        held = task & rows
        weighted[held] = values[held] * count / (len(of_task) * int(held.sum()))
    return weighted[rows]


def _printed(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    return [{key: f"{one:.3f}" if isinstance(one, float) else str(one) for key, one in row.items()} for row in rows]


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {key: round(value, 3) for key, value in values.items()}


async def main() -> None:
    """Embed, sweep, print and write benchmarks/results/composed.json."""
    settings = Settings(encoder=EncoderSettings(lanes=1))
    async with open_encoder(settings, Metrics()) as encoder:
        catalogues, questions = await prepare(encoder, ROOT / "demo")
        model = encoder.spec.id
    sweep, choice = study(catalogues, questions)
    show("composed queries, nDCG@10", _printed(sweep))
    show("composed queries, the choice", _printed(choice))
    counts = {task: sum(asked.task == task for asked in questions) for task in dict.fromkeys(q.task for q in questions)}
    write("composed", sweep, model=model, questions=counts, choice=choice)


if __name__ == "__main__":
    asyncio.run(main())
