"""Measure a bundle: `python evaluate.py [--bundle DIR] [--demo DIR] [--drawings CACHE]`."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

Array = NDArray[np.float32]
HERE = Path(__file__).resolve().parent
Figures = dict[str, Any]


class Bundle:
    """The bundle as the product runs it: OpenVINO, fp32, one thread."""

    def __init__(self, folder: Path) -> None:
        self.settings = json.loads((folder / "bundle.json").read_text())
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
        core = ov.Core()
        self.vision = core.compile_model(folder / "vision.onnx", "CPU", options)
        self._text = core.compile_model(folder / "text.onnx", "CPU", options)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_padding(pad_id=self.settings["text"]["pad_id"])
        self._tokenizer.enable_truncation(self.settings["text"]["max_tokens"])

    def pixels(self, picture: Image.Image) -> Array:
        image = self.settings["image"]
        size, to = image["size"], image["resize_to"]
        picture = picture.convert("RGB")
        factor = to / min(picture.size)
        width, height = (max(to, round(side * factor)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        rgb = np.asarray(picture.crop((left, top, left + size, top + size)), np.float32)
        values = (rgb * image["rescale"] - np.float32(image["mean"])) / np.float32(image["std"])
        return np.ascontiguousarray(values.transpose(2, 0, 1), np.float32)

    def pictures(self, pictures: Sequence[Image.Image]) -> Array:
        rows = [self.vision(self.pixels(picture)[None])[0][0] for picture in pictures]
        return np.stack(rows)

    def texts(self, texts: Sequence[str]) -> Array:
        encoded = self._tokenizer.encode_batch(list(texts))
        ids = np.array([item.ids for item in encoded], np.int64)
        mask = np.array([item.attention_mask for item in encoded], np.int64)
        return np.asarray(self._text([ids, mask])[0], np.float32)


def figures(queries: Array, pictures: Array, wanted: Sequence[set[int]] | None = None) -> Figures:
    """R@1, R@5, R@10 and the mean reciprocal rank of the first wanted picture."""
    scores = queries @ pictures.T
    ranks = []
    for row, score in enumerate(scores):
        targets = wanted[row] if wanted else {row}
        best = max(score[target] for target in targets)
        others = [i for i in range(len(score)) if i not in targets]
        ranks.append(1 + int((score[others] >= best).sum()))
    rank = np.array(ranks)
    recall = {f"R@{k}": round(float((rank <= k).mean()), 3) for k in (1, 5, 10)}
    return {**recall, "MRR": round(float((1 / rank).mean()), 3), "queries": len(rank), "pictures": len(pictures)}


def unaccented(text: str) -> str:
    return text.translate(str.maketrans("àâäçéèêëîïôöùûü", "aaaceeeeiioouuu"))


def evaluate_demo(bundle: Bundle, demo: Path) -> Figures:
    """The demo photographs; French queries from queries.jsonl, else from the catalogue itself."""
    products = [json.loads(line) for line in (demo / "catalog.jsonl").read_text().splitlines() if line.strip()]
    french = {product["product_id"]: product.get("query_fr") for product in products}
    if (demo / "queries.jsonl").exists():
        rows = [json.loads(line) for line in (demo / "queries.jsonl").read_text().splitlines() if line.strip()]
        french.update({row["product_id"]: row["query_fr"] for row in rows})
    paths = [_picture_path(demo, product) for product in products]
    pictures = bundle.pictures([Image.open(path) for path in paths])
    queries = {
        "en": [product["name"] for product in products],
        "fr": [french[product["product_id"]] for product in products],
    }
    queries["fr, no accents"] = [unaccented(query) for query in queries["fr"]]
    return {language: figures(bundle.texts(texts), pictures) for language, texts in queries.items()}


def _picture_path(demo: Path, product: dict[str, Any]) -> Path:
    named = product.get("image")
    if isinstance(named, str) and (demo / named).exists():
        return demo / named
    return next(iter(sorted((demo / "images").glob(f"{product['product_id']}.*"))))


def evaluate_drawings(bundle: Bundle, cache: Path) -> Figures:
    """The hold-out fifth of the clip-art on white, each style searched apart, then averaged."""
    from drawings import compose, load_drawings, render  # noqa: PLC0415 - the photographs need none of it

    held = [drawing for drawing in load_drawings(cache) if drawing.split == "holdout"]
    results: Figures = {}
    for language in ("en", "fr"):
        for style in ("fluent-3d", "noto", "twemoji"):
            shown = [drawing for drawing in held if style in drawing.pictures and language in drawing.labels]
            white = (255, 255, 255)
            drawn = [compose(render(d.pictures[style]), 260, white, 0.85, 0, False) for d in shown]
            pictures = bundle.pictures([Image.fromarray(pixels) for pixels in drawn])
            results[f"{style} {language}"] = figures(bundle.texts([d.labels[language] for d in shown]), pictures)
    return results


def evaluate_clips(bundle: Bundle, cache: Path) -> Figures:
    """The hold-out fifth of the Open Clip Art drawings by title, any drawing of that title being right."""
    from features import clip_things  # noqa: PLC0415 - needs torch, which the photographs do not

    things, views = clip_things(cache)
    shown = [(index, pixels) for index, _, view, pixels in views if view == 0 and things[index].split == "holdout"]
    pictures = bundle.pictures([Image.fromarray(pixels) for _, pixels in shown])
    titles = sorted({things[index].labels["en"] for index, _ in shown})
    wanted = [{i for i, (index, _) in enumerate(shown) if things[index].labels["en"] == title} for title in titles]
    return {"en": figures(bundle.texts(titles), pictures, wanted)}


# Hold-out drawings for the colour checks, in en, fr, de, es; and the tints they are given.
OBJECTS: dict[str, tuple[str, str, str, str]] = {
    "1f45e": ("shoe", "chaussure", "Schuh", "zapato"),
    "1f462": ("boot", "botte", "Stiefel", "bota"),
    "1f9e6": ("socks", "chaussettes", "Socken", "calcetines"),
    "1f9e4": ("gloves", "gants", "Handschuhe", "guantes"),
    "1f458": ("dress", "robe", "Kleid", "vestido"),
    "1f45b": ("purse", "porte-monnaie", "Geldbeutel", "monedero"),
    "1faa3": ("bucket", "seau", "Eimer", "cubo"),
    "1f4bc": ("briefcase", "mallette", "Aktentasche", "maletín"),
    "1f6f5": ("scooter", "scooter", "Motorroller", "motocicleta"),
    "1f56f": ("candle", "bougie", "Kerze", "vela"),
}
TINTS: dict[tuple[int, int, int], tuple[str, str, str, str]] = {
    (205, 30, 40): ("red", "rouge", "rot", "rojo"),
    (35, 90, 200): ("blue", "bleu", "blau", "azul"),
    (45, 150, 60): ("green", "vert", "grün", "verde"),
    (245, 205, 40): ("yellow", "jaune", "gelb", "amarillo"),
    (30, 30, 32): ("black", "noir", "schwarz", "negro"),
    (245, 130, 185): ("pink", "rose", "rosa", "rosado"),
}


def evaluate_colours(bundle: Bundle, cache: Path) -> Figures:
    """Tinted hold-out drawings: is "red shoe" nearer to the red shoe than to the others, and than to red others?"""
    from drawings import compose, load_drawings, render  # noqa: PLC0415 - the photographs need none of it

    by_code = {drawing.code: drawing for drawing in load_drawings(cache)}
    codes, tints = list(OBJECTS), list(TINTS)
    shown = [(code, tint) for code in codes for tint in tints]
    drawn = [
        compose(_tinted(render(by_code[c].pictures["noto"]), t), 260, (236, 236, 236), 0.85, 0, False) for c, t in shown
    ]
    pictures = bundle.pictures([Image.fromarray(pixels) for pixels in drawn])
    results: Figures = {}
    for index, language in enumerate(("en", "fr", "de", "es")):
        words = [(OBJECTS[code][index], TINTS[tint][index]) for code, tint in shown]
        noun_first = language in ("fr", "es")
        texts = [f"{thing} {tint}" if noun_first else f"{tint} {thing}" for thing, tint in words]
        scores = bundle.texts(texts) @ pictures.T
        same = scores.reshape(len(shown), len(codes), len(tints))[
            np.arange(len(shown)), np.arange(len(shown)) // len(tints)
        ]
        colour_right = same.argmax(axis=1) == np.arange(len(shown)) % len(tints)
        results[language] = {
            "colour@1 of 6": round(float(colour_right.mean()), 3),
            **figures(bundle.texts(texts), pictures),
        }
    return results


def _tinted(picture: Image.Image, tint: tuple[int, int, int]) -> Image.Image:
    """The drawing in shades of one colour: its light parts in the colour, its dark parts darker."""
    light = np.asarray(picture.convert("L"), np.float32)[..., None] / 255
    shaded = np.asarray(tint, np.float32) * (0.45 + 0.75 * light)
    alpha = np.asarray(picture.getchannel("A"))[..., None]
    return Image.fromarray(np.concatenate([shaded.clip(0, 255).astype(np.uint8), alpha], axis=2), "RGBA")


def evaluate_speed(bundle: Bundle) -> Figures:
    """Milliseconds of one core, the median of repeated single items; pictures are 800 px already decoded."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (800, 800, 3), np.uint8).astype(np.uint8))
    pixels = bundle.pixels(picture)[None]
    jobs: dict[str, Callable[[], Any]] = {
        "image graph ms": lambda: bundle.vision(pixels),
        "image ms, with preprocessing": lambda: bundle.pictures([picture]),
        "text ms": lambda: bundle.texts(["une paire de chaussures rouges"]),
    }
    results: Figures = {}
    for name, job in jobs.items():
        times = []
        for _ in range(30):
            start = time.perf_counter()
            job()
            times.append((time.perf_counter() - start) * 1000)
        results[name] = round(float(np.median(times)), 2)
    return results


def evaluate_all(bundle: Bundle, demo: Path, cache: Path | None) -> Figures:
    results: Figures = {"demo photographs": evaluate_demo(bundle, demo), "one core": evaluate_speed(bundle)}
    if cache:
        results["emoji drawings, hold-out fifth"] = evaluate_drawings(bundle, cache)
        results["clip-art, hold-out fifth"] = evaluate_clips(bundle, cache)
        results["colours: hold-out drawings tinted"] = evaluate_colours(bundle, cache)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=HERE / "bundle")
    parser.add_argument("--demo", type=Path, default=HERE.parents[1] / "demo")
    parser.add_argument("--drawings", type=Path, help="folder of unpacked npm packages; without it no hold-out")
    options = parser.parse_args()
    bundle = Bundle(options.bundle)
    print(json.dumps(evaluate_all(bundle, options.demo, options.drawings), indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
