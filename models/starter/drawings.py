"""The clip-art: emoji drawings in several styles, joined with captions in four languages."""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from PIL import Image

LANGUAGES = ("en", "fr", "de", "es")
EMOJIBASE = "emojibase-data@17.0.0"
FLUENT_3D = "@lobehub/fluent-emoji-3d@1.1.0"
VECTOR_STYLES = {
    "fluent-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "noto": "@iconify-json/noto@1.2.9",
    "noto-v1": "@iconify-json/noto-v1@1.2.5",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "emojione": "@iconify-json/emojione@1.2.3",
    "fxemoji": "@iconify-json/fxemoji@1.2.2",
}
ANNOTATIONS = "cldr-annotations-full@48.2.0"
COMPONENTS, SYMBOLS, FLAGS = 2, 8, 9
RENDER = 320


@dataclass
class Drawing:
    """One thing that is drawn: its captions by language and its pictures by style."""

    code: str
    group: int
    labels: dict[str, str]
    tags: dict[str, list[str]]
    pictures: dict[str, bytes] = field(default_factory=dict)

    @property
    def split(self) -> str:
        """`holdout` (a fifth, never fitted), `valid` (choosing settings) or `train`."""
        bucket = int(hashlib.sha256(self.code.encode()).hexdigest(), 16) % 100
        return "holdout" if bucket < 20 else "valid" if bucket < 30 else "train"


def unpack(package: str, cache: Path) -> Path:
    """Fetch an npm package with the ordinary client and return its unpacked folder."""
    name = re.sub(r"[^a-z0-9]+", "-", package.lower()).strip("-")
    folder = cache / name
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(
            ["npm", "pack", "--silent", package], cwd=cache, check=True, capture_output=True, text=True
        )
        with tarfile.open(cache / packed.stdout.split()[-1]) as archive:
            archive.extractall(folder, filter="data")
    return folder / "package"


def load_drawings(cache: Path) -> list[Drawing]:
    """Every drawing with at least one picture; no flags, no skin tones, no bare components."""
    drawings = _captions(cache)
    _add_fluent_3d(drawings, unpack(FLUENT_3D, cache))
    names = _noto_names(cache)
    for style, package in VECTOR_STYLES.items():
        _add_vectors(drawings, style, unpack(package, cache), names)
    return [drawing for drawing in drawings.values() if drawing.pictures]


def render(picture: bytes) -> Image.Image:
    """A picture as RGBA, at most `RENDER` pixels wide."""
    if picture.lstrip().startswith(b"<svg"):
        png = resvg_py.svg_to_bytes(svg_string=picture.decode(), width=RENDER, height=RENDER)
        return Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    return Image.open(io.BytesIO(picture)).convert("RGBA")


def _captions(cache: Path) -> dict[str, Drawing]:
    base, annotations = unpack(EMOJIBASE, cache), unpack(ANNOTATIONS, cache)
    drawings: dict[str, Drawing] = {}
    for language in LANGUAGES:
        entries = json.loads((base / language / "data.json").read_text())
        extra = json.loads((annotations / "annotations" / language / "annotations.json").read_text())
        keywords = extra["annotations"]["annotations"]
        for entry in entries:
            _add_caption(drawings, language, entry, keywords)
    return drawings


def _add_caption(drawings: dict[str, Drawing], language: str, entry: dict[str, Any], keywords: dict[str, Any]) -> None:
    group = entry.get("group", COMPONENTS)
    if group in (COMPONENTS, FLAGS):
        return
    code = _code(entry["hexcode"])
    drawing = drawings.setdefault(code, Drawing(code, group, {}, {}))
    more = keywords.get(entry["emoji"].replace("\ufe0f", ""), {}).get("default", [])
    label = entry["label"]
    tags = dict.fromkeys([*entry.get("tags", []), *more])
    drawing.labels[language] = label
    drawing.tags[language] = [tag for tag in tags if tag != label and not re.search(r"[^\w\s'’-]", tag)]


def _code(hexcode: str) -> str:
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def _add_fluent_3d(drawings: dict[str, Drawing], package: Path) -> None:
    for path in sorted((package / "assets").glob("*.webp")):
        drawing = drawings.get(_code(path.stem))
        if drawing is not None:
            drawing.pictures["fluent-3d"] = path.read_bytes()


def _noto_names(cache: Path) -> dict[str, str]:
    """Icon name → code: sets without a table of characters use the same names."""
    names: dict[str, str] = {}
    for style in ("twemoji", "noto"):
        package = unpack(VECTOR_STYLES[style], cache)
        chars = json.loads((package / "chars.json").read_text())
        names.update({name: _code(code) for code, name in chars.items()})
    return names


def _add_vectors(drawings: dict[str, Drawing], style: str, package: Path, names: dict[str, str]) -> None:
    icons = json.loads((package / "icons.json").read_text())
    chars = json.loads((package / "chars.json").read_text())
    codes = {name: _code(code) for code, name in chars.items()} or {**names, **_glued(names)}
    for name, icon in icons["icons"].items():
        drawing = drawings.get(codes.get(name, ""))
        if drawing is None:
            continue
        width = icon.get("width", icons.get("width", 16))
        height = icon.get("height", icons.get("height", 16))
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}">'
        drawing.pictures[style] = f"{svg}{icon['body']}</svg>".encode()


def _glued(names: dict[str, str]) -> dict[str, str]:
    return {name.replace("-", ""): code for name, code in names.items()}


def compose(
    picture: Image.Image, size: int, background: tuple[int, int, int], scale: float, turn: float, flip: bool
) -> np.ndarray:
    """The drawing on a plain square background, as uint8 [size, size, 3]."""
    if flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if turn:
        picture = picture.rotate(turn, resample=Image.Resampling.BICUBIC)
    side = round(size * scale)
    drawn = picture.resize((side, side), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (size, size), background)
    canvas.paste(drawn, ((size - side) // 2,) * 2, drawn)
    return np.asarray(canvas)
