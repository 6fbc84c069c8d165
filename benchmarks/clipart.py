"""A synthetic catalogue of any size, made from clip-art that is fetched from the npm registry, never committed."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import ROOT
from PIL import Image

PICTURES = "@lobehub/fluent-emoji-3d@1.1.0"
LABELS = "emojibase-data@17.0.0"
CACHE = ROOT / ".cache" / "clipart"
COLOURS = {
    "white": "#ffffff",
    "sand": "#e8dcc0",
    "sky": "#bfe0f5",
    "rose": "#f5c9d0",
    "mint": "#c6ecd2",
    "grey": "#a9adb3",
}


@dataclass(frozen=True)
class Drawing:
    """One drawing and its captions."""

    code: str
    label: str
    label_fr: str
    tags: tuple[str, ...]
    group: int
    path: Path


def drawings() -> list[Drawing]:
    """Return every captioned drawing, in a stable order."""
    pictures, labels = _unpacked(PICTURES), _unpacked(LABELS)
    french = {entry["hexcode"]: entry["label"] for entry in _json(labels / "fr" / "data.json")}
    found = {_code(path.stem): path for path in sorted((pictures / "assets").glob("*.webp"))}
    return [
        Drawing(
            _code(entry["hexcode"]),
            entry["label"],
            french.get(entry["hexcode"], entry["label"]),
            tuple(entry.get("tags", ())),
            entry.get("group", 0),
            found[_code(entry["hexcode"])],
        )
        for entry in _json(labels / "en" / "data.json")
        if _code(entry["hexcode"]) in found
    ]


def captions(language: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return the label and the tags of each captioned drawing in that language, by its code."""
    entries = _json(_unpacked(LABELS) / language / "data.json")
    return {_code(entry["hexcode"]): (entry["label"], tuple(entry.get("tags", ()))) for entry in entries}


def subgroups() -> dict[str, str]:
    """Return which small group of its like each captioned drawing is of, by its code ("0/8")."""
    entries = _json(_unpacked(LABELS) / "en" / "data.json")
    return {_code(entry["hexcode"]): f"{entry.get('group')}/{entry.get('subgroup')}" for entry in entries}


def catalogue(size: int, folder: Path) -> Path:
    """Write `size` products with a picture each and return the JSONL file; made once, used again."""
    target = folder / f"catalogue-{size}.jsonl"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for product, picture in _products(size, drawings()):
        (folder / product["image"]).write_bytes(picture)
        lines.append(json.dumps(product, ensure_ascii=False))
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def on_background(path: Path, colour: str, side: int) -> bytes:
    """Return the drawing on a plain background as JPEG bytes."""
    with Image.open(path) as drawing:
        layer = drawing.convert("RGBA").resize((side, side))
    canvas = Image.new("RGBA", (side, side), colour)
    canvas.alpha_composite(layer)
    out = io.BytesIO()
    canvas.convert("RGB").save(out, "JPEG", quality=88)
    return out.getvalue()


def _products(size: int, known: list[Drawing]) -> Iterator[tuple[dict[str, Any], bytes]]:
    colours = list(COLOURS.items())
    for number in range(size):
        drawing = known[number % len(known)]
        variant = number // len(known)
        name, colour = colours[variant % len(colours)]
        side = 400 + 8 * (variant // len(colours))
        product_id = f"{drawing.code}-{variant}"
        yield (
            {
                "product_id": product_id,
                "name": f"{drawing.label} on {name}",
                "description": f"{drawing.label}, {', '.join(drawing.tags)}",
                "brand": f"brand-{number % 50}",
                "category": f"Group {drawing.group} > Shelf {number % 12}",
                "price": round(1 + (number * 7919 % 20_000) / 100, 2),
                "currency": "EUR",
                "stock": number % 7,
                "attributes": {"background": name},
                "image": f"{product_id}.jpg",
            },
            on_background(drawing.path, colour, side),
        )


def _unpacked(package: str) -> Path:
    folder = CACHE / package.replace("/", "_").lstrip("@")
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        try:
            packed = subprocess.run(
                ["npm", "pack", "--silent", package], cwd=CACHE, check=True, capture_output=True, text=True
            )
        except FileNotFoundError as error:
            raise SystemExit("the benchmark's clip-art comes from the npm registry: install npm") from error
        with tarfile.open(CACHE / packed.stdout.split()[-1]) as archive:
            archive.extractall(folder, filter="data")
    return folder / "package"


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _code(hexcode: str) -> str:
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")
