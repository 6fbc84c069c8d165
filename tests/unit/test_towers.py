"""The stages around a runtime, where a model misbehaves: nothing that is not finite leaves the encoder."""

from __future__ import annotations

import json
import random
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tests import pictures

from catalens.encoders.bundle import TOKENIZER, read_manifest
from catalens.encoders.preprocess import Preprocessor
from catalens.encoders.towers import TextTower, VisionTower, alike, unit_vectors
from catalens.errors import InvalidEvent, InvalidPicture
from catalens.pictures import Picture
from catalens.settings import PictureSettings

TINY = Path(__file__).parents[1] / "fixtures" / "bundles" / "tiny"
MANIFEST = read_manifest(TINY)


class SickRuntime:
    """A runtime that gives no number for the second item of every batch, and remembers what it was asked."""

    def __init__(self) -> None:
        self.pixels: list[NDArray[np.float32]] = []
        self.ids: list[list[list[int]]] = []
        self.masks: list[list[list[int]]] = []

    def run_vision(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        self.pixels.append(pixels)
        return self._rows(len(pixels))

    def run_text(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> NDArray[np.float32]:
        self.ids.append(input_ids.tolist())
        self.masks.append(attention_mask.tolist())
        return self._rows(len(input_ids))

    def _rows(self, count: int) -> NDArray[np.float32]:
        rows = np.full((count, 16), 0.5, np.float32)
        rows[1:2, 3] = np.nan
        return rows


def test_rows_become_unit_vectors_and_what_is_not_finite_becomes_none() -> None:
    rows = np.asarray([[3, 4], [0, 0], [np.nan, 1], [np.inf, 1], [-np.inf, np.nan], [3e38, 3e38]], np.float32)
    unit, zero, *sick, large = unit_vectors(rows)
    assert sick == [None, None, None]
    assert unit is not None
    assert zero is not None
    assert large is not None
    assert large.dtype == np.float32
    assert unit.tolist() == pytest.approx([0.6, 0.8], abs=1e-7)
    assert zero.tolist() == [0, 0]
    assert large.tolist() == pytest.approx([0.5**0.5] * 2, abs=1e-7)


def test_a_picture_without_a_finite_vector_is_refused_alone() -> None:
    tower = VisionTower(SickRuntime(), Preprocessor(MANIFEST.image), PictureSettings())
    prepared = [item for item in tower.prepare([pictures.jpeg()] * 3) if not isinstance(item, Exception)]
    first, second, third = tower.finish(prepared, tower.run(prepared))
    assert isinstance(second, InvalidPicture)
    assert second.reason == "not_encodable"
    assert not isinstance(first, Exception)
    assert not isinstance(third, Exception)
    assert float(np.linalg.norm(first.embedding)) == pytest.approx(1, abs=1e-6)


def test_a_batch_holds_each_pictures_pixels_and_is_not_copied() -> None:
    files = [pictures.jpeg(), b"no picture", pictures.jpeg(pictures.plain(pictures.BLUE)), pictures.jpeg()[:300]]
    runtime, preprocess = SickRuntime(), Preprocessor(MANIFEST.image)
    tower = VisionTower(runtime, preprocess, PictureSettings())
    prepared = tower.prepare(files)
    assert [isinstance(item, InvalidPicture) for item in prepared] == [False, True, False, True]
    first, third = (item for item in prepared if not isinstance(item, Exception))
    tower.run([first, third])
    tower.run([third, first])
    tower.run([third])
    one, other = (preprocess(Picture(data, PictureSettings()).decode()) for data in (files[0], files[2]))
    for seen, expected in zip(runtime.pixels, ([one, other], [other, one], [other]), strict=True):
        assert np.array_equal(seen, np.stack(expected))
    assert runtime.pixels[0].base is first.batch


def test_a_text_without_a_finite_vector_is_refused_alone() -> None:
    tower = TextTower(SickRuntime(), TINY / TOKENIZER, MANIFEST.text)
    prepared = [item for item in tower.prepare(["red", "blue", "green"]) if not isinstance(item, Exception)]
    results = tower.finish(prepared, tower.run(prepared))
    assert [isinstance(result, InvalidEvent) for result in results] == [False, True, False]


def test_texts_are_padded_to_the_longest_of_their_batch_and_cut_at_the_models_length() -> None:
    runtime = SickRuntime()
    tower = TextTower(runtime, TINY / TOKENIZER, MANIFEST.text.model_copy(update={"max_tokens": 3, "pad_id": 9}))
    prepared = [
        item for item in tower.prepare(["red", "red rouge", "red " * 50, ""]) if not isinstance(item, Exception)
    ]
    tower.run(prepared)
    assert runtime.ids == [[[2, 9, 9], [2, 3, 9], [2, 2, 2], [9, 9, 9]]]
    assert runtime.masks == [[[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 0]]]


class LengthRuntime(SickRuntime):
    """A runtime whose every row says how many ids the text has and how long it was padded."""

    def run_text(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> NDArray[np.float32]:
        super().run_text(input_ids, attention_mask)
        rows = [[input_ids.shape[1], own, *range(2, 16)] for own in attention_mask.sum(axis=1)]
        return np.asarray(rows, np.float32)


@pytest.mark.parametrize("fixed", [False, True])
def test_texts_of_very_different_lengths_are_not_padded_to_the_longest(fixed: bool) -> None:
    spec = MANIFEST.text.model_copy(update={"max_tokens": 77, "fixed": fixed})
    lengths = [4, 60, 5, 3, 61, *[4] * 11]
    tower = TextTower(LengthRuntime(), TINY / TOKENIZER, spec)
    prepared = [item for item in tower.prepare(["red " * own for own in lengths]) if not isinstance(item, Exception)]
    rows = tower.run(prepared)
    assert rows[:, 1].tolist() == lengths
    assert rows[:, 0].tolist() == [61 if fixed or own > 5 else 5 for own in lengths]


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [
        ([7], [[0]]),
        ([7, 3, 5], [[0, 1, 2]]),
        ([8] * 15 + [40], [[*range(15)], [15]]),
        ([77, 3, 77, 3, 77, 3, 77, 3], [[1, 3, 5, 7], [0, 2, 4, 6]]),
        ([30, 2], [[0, 1]]),  # 28 tokens of padding cost less than an inference of its own
    ],
)
def test_texts_are_grouped_by_what_padding_costs(lengths: list[int], groups: list[list[int]]) -> None:
    assert sorted(sorted(group) for group in alike(lengths)) == sorted(groups)


def test_no_grouping_of_neighbours_in_length_costs_less() -> None:
    chance = random.Random(4)
    for _ in range(60):
        lengths = [chance.randint(1, 77) for _ in range(chance.randint(1, 9))]
        ordered = sorted(lengths)

        def cost(groups: list[list[int]]) -> int:
            return sum(64 + len(group) * max(group) for group in groups)

        every = [
            [ordered[start:end] for start, end in pairwise([0, *cuts, len(ordered)])]
            for count in range(len(ordered))
            for cuts in combinations(range(1, len(ordered)), count)
        ]
        chosen = alike(lengths)
        assert sorted(place for group in chosen for place in group) == list(range(len(lengths)))
        assert cost([[lengths[place] for place in group] for group in chosen]) == min(map(cost, every))


def test_the_prefix_stands_before_the_text() -> None:
    tower = TextTower(SickRuntime(), TINY / TOKENIZER, MANIFEST.text.model_copy(update={"prefix": "blue "}))
    vocabulary = json.loads((TINY / TOKENIZER).read_text())["model"]["vocab"]
    assert tower.prepare(["RED"]) == [[vocabulary["blue"], vocabulary["red"]]]
