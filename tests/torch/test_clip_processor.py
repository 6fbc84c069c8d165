"""Our preprocessing against transformers' own processors, format by format; and the golden file against CLIP's."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps
from tests import pictures
from tests.fixtures.preprocess.make_golden import CASES, FOLDER, MEAN, SIZE, STD, golden, processed

from catalens.encoders.bundle import ImageInput
from catalens.encoders.preprocess import Preprocessor
from catalens.pictures import Picture
from catalens.settings import PictureSettings

LIMITS: Final = PictureSettings()
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
    ours = Preprocessor(SPEC)(Picture(data, LIMITS).decode())
    theirs = processed(Image.open(io.BytesIO(data)), SIZE, "bicubic")
    levels = np.abs(ours - theirs) * np.asarray(STD).reshape(3, 1, 1) * 255
    assert levels.max() <= (1.001 if name == "strip" else 0.001)


# --- photographs, as CLIP and SigLIP see them ------------------------------------------------------------------------

PHOTOS: Final = ["hanging-plant", "leather-sofa", "gaming-pc"]
SQUARE: Final = 224
HALF: Final = (0.5, 0.5, 0.5)


def photo(name: str) -> Image.Image:
    """Return a photograph of 1067 pixels, which no power of two divides."""
    with Image.open(Path("demo/images") / f"{name}.jpg") as image:
        side = max(image.size)
        size = (round(image.width * 1067 / side), round(image.height * 1067 / side))
        return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def rotated(image: Image.Image) -> bytes:
    return pictures.rotated_jpeg(image, 6)


def sixteen(image: Image.Image) -> bytes:
    return pictures.encode(Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257), "PNG")


def cut_out(image: Image.Image) -> bytes:
    image = image.copy()
    image.putalpha(image.convert("L"))
    return pictures.encode(image, "PNG")


KINDS: Final[dict[str, Any]] = {
    "jpeg-420": lambda image: pictures.jpeg(image, subsampling="4:2:0"),
    "jpeg-422": lambda image: pictures.jpeg(image, subsampling="4:2:2"),
    "jpeg-444": lambda image: pictures.jpeg(image, subsampling="4:4:4"),
    "jpeg-progressive": lambda image: pictures.jpeg(image, progressive=True),
    "jpeg-grey": lambda image: pictures.jpeg(image.convert("L")),
    "jpeg-cmyk": lambda image: pictures.jpeg(image.convert("CMYK")),
    "jpeg-rotated": rotated,
    "png": lambda image: pictures.encode(image, "PNG"),
    "png-16": sixteen,
    "png-alpha": cut_out,
    "webp": lambda image: pictures.encode(image, "WEBP", quality=85),
    "gif": lambda image: pictures.encode(image, "GIF"),
    "avif": lambda image: pictures.encode(image, "AVIF", quality=80),
}


def as_they_would_see_it(data: bytes) -> Image.Image:
    """Return the picture with what the processors leave out: upright, on white, 16 bits cut instead of clipped."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode == "RGBA":
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image, np.uint16) >> 8).astype(np.uint8))
    return image


def of_clip(image: Image.Image) -> NDArray[np.float32]:
    from transformers import CLIPImageProcessorPil

    values: Any = CLIPImageProcessorPil()(image, return_tensors="np")["pixel_values"][0]
    return np.asarray(values, np.float32)


def of_siglip(image: Image.Image) -> NDArray[np.float32]:
    from transformers import SiglipImageProcessorPil

    values: Any = SiglipImageProcessorPil()(image, return_tensors="np")["pixel_values"][0]
    return np.asarray(values, np.float32)


FAMILIES: Final[dict[str, Any]] = {
    "clip": (SPEC.model_copy(update={"size": SQUARE, "resize_to": SQUARE}), of_clip),
    "siglip": (
        SPEC.model_copy(update={"size": SQUARE, "resize_to": SQUARE, "resize": "squash", "mean": HALF, "std": HALF}),
        of_siglip,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_photographs_pixels_are_those_of_the_processor(kind: str, family: str) -> None:
    spec, theirs = FAMILIES[family]
    std = np.asarray(spec.std).reshape(3, 1, 1) * 255
    for name in PHOTOS:
        data = KINDS[kind](photo(name))
        expected = theirs(as_they_would_see_it(data))
        fine = np.abs(Preprocessor(spec).read(Picture(data, LIMITS)) - expected) * std
        assert fine.max() <= 0.001
        fast_spec = spec.model_copy(update={"decode": "fast"})
        fast = np.abs(Preprocessor(fast_spec).read(Picture(data, LIMITS)) - expected) * std
        assert fast.mean() <= 1.0
        assert np.quantile(fast, 0.999) <= 16


def test_the_golden_file_is_what_the_processor_says_today() -> None:
    with np.load(FOLDER / "golden.npz") as stored:
        assert set(stored) == set(CASES)
        for name, levels in golden().items():
            np.testing.assert_array_equal(stored[name], levels, name)
