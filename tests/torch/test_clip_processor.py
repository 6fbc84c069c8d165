"""Our preprocessing against transformers' CLIPImageProcessor, format by format; and the golden file against it."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from tests import pictures
from tests.fixtures.preprocess.make_golden import CASES, FOLDER, MEAN, SIZE, STD, golden, processed

from catalens.encoders.bundle import ImageInput
from catalens.encoders.preprocess import Preprocessor
from catalens.pictures import Picture
from catalens.settings import PictureSettings

SPEC = ImageInput(
    size=SIZE,
    resize_to=SIZE,
    resize="shortest_edge",
    crop="center",
    interpolation="bicubic",
    rescale=1 / 255,
    mean=MEAN,
    std=STD,
)
FILES = {
    "jpeg": pictures.jpeg(pictures.scene(300, 200)),
    "jpeg-progressive": pictures.jpeg(pictures.scene(111, 222), progressive=True),
    "jpeg-grey": pictures.jpeg(pictures.scene(90, 60).convert("L")),
    "jpeg-cmyk": pictures.jpeg(pictures.scene(90, 60).convert("CMYK")),
    "png": pictures.encode(pictures.scene(97, 61), "PNG"),
    "png-palette": pictures.encode(pictures.scene(64, 64).convert("P"), "PNG"),
    "png-grey": pictures.encode(pictures.scene(64, 80).convert("L"), "PNG"),
    "webp": pictures.encode(pictures.scene(128, 96), "WEBP", quality=85),
    "gif": pictures.encode(pictures.scene(70, 50), "GIF"),
    "avif": pictures.encode(pictures.scene(160, 100), "AVIF", quality=80),
    "strip": pictures.encode(pictures.scene(700, 30), "PNG"),
}


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_those_of_the_processor_within_one_level(name: str) -> None:
    data = FILES[name]
    ours = Preprocessor(SPEC)(Picture(data, PictureSettings()).decode())
    theirs = processed(Image.open(io.BytesIO(data)), SIZE, "bicubic")
    levels = np.abs(ours - theirs) * np.asarray(STD).reshape(3, 1, 1) * 255
    assert levels.max() <= (1.001 if name == "strip" else 0.001)


def test_the_golden_file_is_what_the_processor_says_today() -> None:
    with np.load(FOLDER / "golden.npz") as stored:
        assert set(stored) == set(CASES)
        for name, levels in golden().items():
            np.testing.assert_array_equal(stored[name], levels, name)
