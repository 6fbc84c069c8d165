"""How often zero-shot tags are right on the demo's photographs, by scale and threshold, against the demo's own labels.

No timing. The encoder is the bundled starter model, which is not CLIP and was trained to no scale.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, Final

from benchmarks.composed import KINDS
from benchmarks.report import ROOT, show, write

from catalens.embedding import CachedEncoder
from catalens.encoders import open_encoder
from catalens.engines.memory import MemoryCache
from catalens.settings import EncoderSettings, Settings
from catalens.telemetry import Metrics
from catalens_embedder.tagging import LabelList, Tagger

SCALES: Final = (10.0, 20.0, 50.0, 100.0)
THRESHOLDS: Final = (0.0, 0.3, 0.5, 0.7, 0.9)
TEMPLATES: Final = ("{}", "a photo of a {} product")
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
    show("zero-shot tags", rows)
    write("tags", rows, model=encoder.spec.id)


if __name__ == "__main__":
    asyncio.run(main())
