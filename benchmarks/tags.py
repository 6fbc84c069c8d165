"""How often zero-shot tags are right on the demo's photographs, by scale and threshold, against the demo's own labels.

And whether another way to compare would help: colours of drawings whose English label names one ("green apple"), by the
best label of all, as the tagger takes it; by labels less their mean, normalised again; and by cosines less their mean
over these drawings, so that no label is near to everything. No timing. The encoder is the bundled starter model, which
is not CLIP and was trained to no scale.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from benchmarks import clipart
from benchmarks.composed import KINDS
from benchmarks.relevance import HELD_OUT, hundredth
from benchmarks.report import ROOT, show, write

from catalens import lexical
from catalens.embedding import CachedEncoder
from catalens.encoders import open_encoder
from catalens.engines.memory import MemoryCache
from catalens.settings import EncoderSettings, Settings
from catalens.telemetry import Metrics
from catalens_embedder.tagging import LabelList, Tagger

SCALES: Final = (10.0, 20.0, 50.0, 100.0)
THRESHOLDS: Final = (0.0, 0.3, 0.5, 0.7, 0.9)
TEMPLATES: Final = ("{}", "a photo of a {} product")
WAYS: Final = ("as it is", "labels centred", "less the mean picture")
COLOURS: Final = ("red", "blue", "green", "yellow", "black", "white", "gray", "brown", "pink", "orange", "purple")


async def main() -> None:
    """Tag, count, print and write benchmarks/results/tags.json."""
    products = [json.loads(line) for line in (ROOT / "demo" / "catalog.jsonl").read_text("utf-8").splitlines()]
    truth: dict[str, list[set[str]]] = {
        "color": [
            {"brown" if one == "wood" else one for one in product["attributes"].get("color", ())}
            for product in products
        ],
        "category": [{KINDS[product["category"]]} for product in products],
    }
    labels = {"color": list(COLOURS), "category": list(KINDS.values())}
    settings = Settings(encoder=EncoderSettings(lanes=1))
    rows: list[Mapping[str, Any]] = []
    async with open_encoder(settings, Metrics()) as encoder:
        cached = CachedEncoder(encoder, MemoryCache(1_000), Metrics())
        vectors = [await cached.picture((ROOT / "demo" / product["image"]).read_bytes()) for product in products]
        for template in TEMPLATES:
            for scale in SCALES:
                lists = {
                    name: LabelList(labels=one, template=template, threshold=0, scale=scale)
                    for name, one in labels.items()
                }
                tagger = Tagger(lists, cached)
                await tagger.read()
                found = [tagger.tags(vector) for vector in vectors]
                for name, right in truth.items():
                    judged = [(tags[name], wanted) for tags, wanted in zip(found, right, strict=True) if wanted]
                    for threshold in THRESHOLDS:
                        kept = [tag.value in wanted for tag, wanted in judged if tag.score >= threshold]
                        rows.append(
                            {
                                "list": name, "template": template, "scale": scale, "threshold": f"{threshold:.1f}",
                                "judged": len(judged), "tagged": len(kept),
                                "right": f"{sum(kept) / len(kept):.2f}" if kept else "",
                            }
                        )  # fmt: skip
        rows_of_ways = [row for template in TEMPLATES for row in await ways(cached, template)]
    show("zero-shot tags", rows)
    show("ways to compare", rows_of_ways)
    write("tags", rows, ways=rows_of_ways, model=encoder.spec.id)


async def ways(encoder: CachedEncoder, template: str) -> list[Mapping[str, Any]]:
    """Return how often each way to compare names the colour of a drawing, by whether the model was fitted to it."""
    pictures, colours, fitted = [], [], []
    for drawing in clipart.drawings():
        words = {word.replace("grey", "gray") for word in lexical.words_of(drawing.label, ("en",))}
        named = [number for number, colour in enumerate(COLOURS) if colour in words]
        if len(named) == 1:
            pictures.append(await encoder.picture(clipart.on_background(drawing.path, "#ffffff", 300)))
            colours.append(named[0])
            fitted.append(hundredth(drawing.code) not in HELD_OUT)
    seen = np.array(pictures)
    labels = np.array([await encoder.text(template.replace("{}", colour)) for colour in COLOURS])
    centred = labels - labels.mean(axis=0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    cosines = (seen @ labels.T, seen @ centred.T, seen @ labels.T - (seen @ labels.T).mean(axis=0))
    rows: list[Mapping[str, Any]] = []
    for way, compared in zip(WAYS, cosines, strict=True):
        right = compared.argmax(axis=1) == np.array(colours)
        for who, which in (("fitted to", np.array(fitted)), ("held out", ~np.array(fitted))):
            rows.append(
                {
                    "drawings": who, "template": template, "way": way, "judged": int(which.sum()),
                    "right": int(right[which].sum()),
                }
            )  # fmt: skip
    return rows


if __name__ == "__main__":
    asyncio.run(main())
