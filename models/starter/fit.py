"""Fit both sides: the axes of the word vectors that are kept, and a ridge regression beside ConSE."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from colour import Array
from features import Seen, Thing
from words import Words

SYMBOLS = 8


@dataclass(frozen=True)
class Settings:
    """Compared on the `valid` split of the drawings, with the demo photographs' figures in sight (see README.md).

    The hold-out was not looked at for them.
    """

    dimension: int = 256
    ridge: float = 0.2
    gloss: float = 0.6  # share of a class's gloss beside its names


@dataclass
class Fitted:
    """Rows of the word table, and the picture side as two affine maps (see `vision.Head`)."""

    rows: Array  # [words, D]
    classes: Array  # [1000, D]
    features: Array  # [F, D]
    bias: Array  # [D]


def fit(
    things: list[Thing], seen: Seen, words: Words, classes: list[tuple[str, str]],
    settings: Settings, splits: tuple[str, ...],
) -> Fitted:  # fmt: skip
    """The word table, the ConSE vectors in its space, and the ridge on the things of these splits."""
    axes = np.linalg.svd(words.vectors[::5], full_matrices=False)[2][: settings.dimension]
    rows = _unit(words.vectors @ axes.T) * words.weights[:, None]
    names = embed([name for name, _ in classes], words, rows)
    glosses = embed([gloss for _, gloss in classes], words, rows)
    vectors = _unit(names + settings.gloss * glosses)
    fitted = [index for index, thing in enumerate(things) if thing.split in splits and _useful(index, thing)]
    weights, bias = _ridge(seen, _targets(things, fitted, words, rows), settings.ridge)
    return Fitted(rows, vectors - vectors.mean(axis=0), weights, bias)


def embed(texts: list[str], words: Words, rows: Array) -> Array:
    """What the text graph does, without the pieces of unknown words."""
    sums = [rows[words.ids(text)].sum(axis=0) for text in texts]
    return _unit(np.stack(sums))


def _useful(index: int, thing: Thing) -> bool:
    """Half of the abstract symbols are enough."""
    return thing.group != SYMBOLS or index % 2 == 1


def _targets(things: list[Thing], fitted: list[int], words: Words, rows: Array) -> dict[int, Array]:
    """The mean vector of a thing's captions (label, and tags together, in each language), centred."""
    targets = {index: embed(_captions(things[index]), words, rows).mean(axis=0) for index in fitted}
    mean = np.mean(list(targets.values()), axis=0)
    return {index: target - mean for index, target in targets.items()}


def _captions(thing: Thing) -> list[str]:
    return [part for lang, label in thing.labels.items() for part in (label, " ".join(thing.tags.get(lang, [])))]


def _ridge(seen: Seen, targets: dict[int, Array], strength: float) -> tuple[Array, Array]:
    """Standardised picture features → targets; the standardisation is folded into the weights."""
    chosen = np.isin(seen.thing, list(targets))
    pictures = seen.features[chosen]
    mean, spread = pictures.mean(axis=0), pictures.std(axis=0) + 1e-3
    standard = (pictures - mean) / spread
    wanted = np.stack([targets[index] for index in seen.thing[chosen]])
    gram = standard.T @ standard / len(standard) + strength * np.eye(standard.shape[1], dtype=np.float32)
    weights = np.linalg.solve(gram, standard.T @ wanted / len(standard)) / spread[:, None]
    return weights.astype(np.float32), (-(mean @ weights)).astype(np.float32)


def _unit(vectors: Array) -> Array:
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-9), np.float32)
