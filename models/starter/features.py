"""What the classifier and the colour statistics see in every training picture, computed once and kept."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import clipart
import drawings
import numpy as np
import onnxruntime
import resvg_py
import torch
import vision
from colour import Array
from PIL import Image

BATCH, SIDE = 32, 320
View = tuple[int, str, int, np.ndarray]  # thing, style, view, pixels


@dataclass
class Thing:
    """A drawn thing with captions: (label, tags) by language."""

    key: str
    kind: str
    group: int
    split: str
    labels: dict[str, str]
    tags: dict[str, list[str]]


@dataclass
class Seen:
    """One row a picture."""

    thing: np.ndarray
    style: np.ndarray
    view: np.ndarray
    features: Array
    scores: Array
    small: np.ndarray


def emoji_things(cache: Path) -> tuple[list[Thing], Iterator[View]]:
    loaded = drawings.load_drawings(cache)
    things = [Thing(d.code, "emoji", d.group, d.split, d.labels, d.tags) for d in loaded]
    return things, _emoji_views(loaded)


def _emoji_views(loaded: list[drawings.Drawing]) -> Iterator[View]:
    rng = np.random.default_rng(0)
    for index, drawing in enumerate(loaded):
        for style in sorted(drawing.pictures):
            picture = drawings.render(drawing.pictures[style])
            yield index, style, 0, drawings.compose(picture, SIDE, (255, 255, 255), 0.85, 0.0, False)
            grey = int(rng.integers(60, 256))
            yield index, style, 1, _varied(picture, rng, (grey, grey, grey), 0.5)
            red, green, blue = (int(value) for value in rng.integers(0, 256, 3))
            yield index, style, 2, _varied(picture, rng, (red, green, blue), 0.5)


def clip_things(cache: Path) -> tuple[list[Thing], Iterator[View]]:
    loaded = clipart.load_clips(cache)
    things = [Thing(c.key, "clip", -1, c.split, {"en": c.title}, {"en": c.tags}) for c in loaded]
    return things, _clip_views(loaded)


def _clip_views(loaded: list[clipart.Clip]) -> Iterator[View]:
    rng = np.random.default_rng(1)
    for index, clip in enumerate(loaded):
        picture = _square(clipart.standard_svg(clip.path))
        if picture is None:
            continue
        yield index, "clip", 0, drawings.compose(picture, SIDE, (255, 255, 255), 0.9, 0.0, False)
        red, green, blue = (int(value) for value in rng.integers(60, 256, 3))
        yield index, "clip", 1, _varied(picture, rng, (red, green, blue), 0.55)


def _varied(
    picture: Image.Image, rng: np.random.Generator, background: tuple[int, int, int], least: float
) -> np.ndarray:
    scale, turn, flip = float(rng.uniform(least, 1)), float(rng.uniform(-15, 15)), bool(rng.integers(2))
    return drawings.compose(picture, SIDE, background, scale, turn, flip)


def _square(svg: bytes) -> Image.Image | None:
    """The drawing cut to its ink and centred on a transparent square; None if it cannot be drawn."""
    try:
        png = resvg_py.svg_to_bytes(svg_string=svg.decode(errors="replace"), width=SIDE)
    except ValueError:
        return None
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    ink = picture.getchannel("A").getbbox()
    if ink is None:
        return None
    picture = picture.crop(ink)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (SIDE, SIDE))
    square.paste(picture, ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2))
    return square


class Extractor:
    """The backbone as an ONNX graph on one thread."""

    def __init__(self, cache: Path) -> None:
        path = cache / "backbone.onnx"
        if not path.exists():
            example = torch.zeros(1, 3, vision.SIZE, vision.SIZE)
            vision.export(vision.Backbone(), path, (example,), ["pixels"], ["features", "scores"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(str(path), options)

    def __call__(self, pictures: list[np.ndarray]) -> tuple[Array, Array]:
        size = (vision.SIZE, vision.SIZE)
        rgb = [np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BICUBIC)) for p in pictures]
        pixels = (np.stack(rgb).astype(np.float32) - vision.MEAN) / vision.STD
        features, scores = self._session.run(None, {"pixels": pixels.transpose(0, 3, 1, 2)})
        return features, scores


def see(views: Iterable[View], extractor: Extractor, path: Path) -> Seen:
    """Run every view through the backbone; kept in `path`, as it takes many minutes."""
    if not path.exists():
        _save(views, extractor, path)
    stored = np.load(path)
    return Seen(**{name: stored[name] for name in ("thing", "style", "view", "features", "scores", "small")})


def _save(views: Iterable[View], extractor: Extractor, path: Path) -> None:
    rows: list[tuple[int, str, int]] = []
    features: list[Array] = []
    scores: list[Array] = []
    small: list[np.ndarray] = []
    for batch in _batches(views):
        rows.extend((thing, style, view) for thing, style, view, _ in batch)
        pictures = [pixels for *_, pixels in batch]
        seen = extractor(pictures)
        features.append(seen[0])
        scores.append(seen[1])
        small.extend(np.asarray(Image.fromarray(p).resize((32, 32), Image.Resampling.BOX)) for p in pictures)
    thing, style, view = (np.array(column) for column in zip(*rows, strict=True))
    np.savez(
        path, thing=thing, style=style, view=view, small=np.stack(small),
        features=np.concatenate(features), scores=np.concatenate(scores),
    )  # fmt: skip


def _batches(views: Iterable[View]) -> Iterator[list[View]]:
    batch: list[View] = []
    for view in views:
        batch.append(view)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
