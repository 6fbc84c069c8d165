"""The stages around a runtime, where a model misbehaves: nothing that is not finite leaves the encoder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tests import pictures

from catalens.encoders.bundle import TOKENIZER, read_manifest
from catalens.encoders.preprocess import Preprocessor
from catalens.encoders.towers import TextTower, VisionTower, unit_vectors
from catalens.errors import InvalidEvent, InvalidPicture
from catalens.settings import PictureSettings

TINY = Path(__file__).parents[1] / "fixtures" / "bundles" / "tiny"
MANIFEST = read_manifest(TINY)


class SickRuntime:
    """A runtime that gives no number for the second item of every batch, and remembers what it was asked."""

    def __init__(self) -> None:
        self.ids: list[list[list[int]]] = []
        self.masks: list[list[list[int]]] = []

    def run_vision(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
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


def test_the_prefix_stands_before_the_text() -> None:
    tower = TextTower(SickRuntime(), TINY / TOKENIZER, MANIFEST.text.model_copy(update={"prefix": "blue "}))
    vocabulary = json.loads((TINY / TOKENIZER).read_text())["model"]["vocab"]
    assert tower.prepare(["RED"]) == [[vocabulary["blue"], vocabulary["red"]]]
