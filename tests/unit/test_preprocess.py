"""Pictures: what is accepted, what is refused and why, and that pixels are those of the model's own processor."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tests import pictures
from tests.fixtures.preprocess.make_golden import CASES, MEAN, SIZE, STD

from catalens.encoders.bundle import ImageInput
from catalens.encoders.preprocess import Pixels, Preprocessor
from catalens.errors import InvalidPicture
from catalens.pictures import Picture, check_picture
from catalens.settings import PictureSettings

LIMITS = PictureSettings()
GOLDEN = Path(__file__).parents[1] / "fixtures" / "preprocess" / "golden.npz"


def decoded(data: bytes) -> Image.Image:
    return Picture(data, LIMITS).decode()


def levels(image: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.int16]]:
    return np.asarray(image, np.int16)


def unpacked() -> int:
    """Return for how many pictures Pillow has made room so far."""
    return int(vars(Image)["core"].get_stats()["new_count"])


def reason(data: bytes, limits: PictureSettings = LIMITS) -> str:
    """Return why `data` is refused at the door; the encoder must refuse it for the same reason."""
    with pytest.raises(InvalidPicture) as at_the_door:
        check_picture(data, limits)
    with pytest.raises(InvalidPicture) as when_decoded:
        Picture(data, limits).decode()
    with pytest.raises(InvalidPicture) as when_decoded_small:
        Picture(data, limits).decode_small(8)
    assert when_decoded.value.reason == when_decoded_small.value.reason == at_the_door.value.reason
    return at_the_door.value.reason


# --- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [("PNG", {}, 0), ("WEBP", {"lossless": True}, 0), ("JPEG", {"quality": 95}, 24), ("AVIF", {"quality": 95}, 24)],
)
def test_a_format_is_recognised_by_content_and_decoded(kind: str, options: dict[str, int], tolerance: int) -> None:
    data = pictures.encode(pictures.scene(), kind, **options)
    info = check_picture(data, LIMITS)
    assert (info.width, info.height, info.format) == (96, 64, kind.lower())
    assert info.sha256 == hashlib.sha256(data).hexdigest()
    assert np.abs(levels(decoded(data)) - levels(pictures.scene())).mean() <= tolerance / 8
    assert np.abs(levels(decoded(data)) - levels(pictures.scene())).max() <= tolerance * 4


def test_of_an_animation_the_first_frame_counts() -> None:
    data = pictures.animated_gif((200, 0, 0), (0, 0, 200))
    assert check_picture(data, LIMITS).format == "gif"
    assert decoded(data).getpixel((5, 5)) == (200, 0, 0)


def test_a_multi_picture_jpeg_is_a_jpeg() -> None:
    data = pictures.encode(pictures.scene(), "MPO", save_all=True, append_images=[pictures.plain((0, 0, 0), 96, 64)])
    assert check_picture(data, LIMITS).format == "jpeg"
    assert decoded(data).getpixel((2, 2))[0] > 180  # type: ignore[index]  # an RGB picture's pixel is a tuple


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "PPM", "ICO", "TGA", "PCX", "EPS"])
def test_other_formats_that_pillow_knows_are_no_pictures_here(kind: str) -> None:
    assert reason(pictures.encode(pictures.scene(), kind)) == "not_a_picture"


# --- modes -----------------------------------------------------------------------------------------------------------


def test_transparency_is_laid_on_white() -> None:
    image = pictures.scene().convert("RGBA")
    image.putalpha(0)
    assert decoded(pictures.encode(image, "PNG")).getpixel((0, 0)) == (255, 255, 255)
    image.putalpha(128)
    red, green, blue = pictures.RED
    half = decoded(pictures.encode(image, "PNG")).getpixel((2, 2))
    assert half == tuple(round((level * 128 + 255 * 127) / 255) for level in (red, green, blue))


def test_grey_with_alpha_and_a_transparent_palette_are_laid_on_white_too() -> None:
    grey = Image.new("LA", (8, 8), (0, 0))
    assert decoded(pictures.encode(grey, "PNG")).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (8, 8), 3)
    palette.putpalette([0] * 768)
    assert decoded(pictures.encode(palette, "PNG", transparency=3)).getpixel((0, 0)) == (255, 255, 255)
    assert decoded(pictures.encode(palette, "GIF", transparency=3)).getpixel((0, 0)) == (255, 255, 255)


def test_a_palette_and_black_and_white_keep_their_colours() -> None:
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 12, 200, 7] + [0] * 762)
    assert decoded(pictures.encode(palette, "PNG")).getpixel((0, 0)) == (12, 200, 7)
    assert decoded(pictures.encode(Image.new("1", (8, 8), 1), "PNG")).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_are_cut_to_their_upper_eight_not_clipped() -> None:
    ramp = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    data = pictures.encode(Image.fromarray(ramp), "PNG")
    np.testing.assert_array_equal(levels(decoded(data))[..., 0], ramp >> 8)


def test_cmyk_comes_out_in_its_colours() -> None:
    data = pictures.encode(pictures.plain(pictures.RED).convert("CMYK"), "JPEG", quality=95)
    assert np.abs(levels(decoded(data)) - np.asarray(pictures.RED)).max() <= 6


@pytest.mark.parametrize(
    ("orientation", "corner"),
    [
        (1, (5, 5)),
        (2, (-5, 5)),
        (3, (-5, -5)),
        (4, (5, -5)),
        (5, (5, 5)),
        (6, (-5, 5)),
        (7, (-5, -5)),
        (8, (5, -5)),
    ],
)
def test_a_picture_stands_upright_as_its_exif_says(orientation: int, corner: tuple[int, int]) -> None:
    image = pictures.plain((255, 255, 255), 96, 64)
    image.paste((0, 0, 0), (0, 0, 24, 16))  # the stored pixels' top left
    data = pictures.rotated_jpeg(image, orientation)
    size = (64, 96) if orientation >= 5 else (96, 64)
    info = check_picture(data, LIMITS)
    assert (info.width, info.height) == size
    upright = decoded(data)
    assert upright.size == size
    dark = upright.getpixel((corner[0] % size[0], corner[1] % size[1]))
    assert isinstance(dark, tuple)
    assert max(dark) < 60
    assert sum(levels(upright).mean(axis=2).ravel() < 60) < 96 * 64 / 8


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's own remark
def test_broken_exif_says_nothing_about_the_pixels() -> None:
    data = pictures.encode(pictures.scene(), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert check_picture(data, LIMITS).width == 96


# --- what is refused -------------------------------------------------------------------------------------------------


def test_nothing_is_empty_and_a_text_is_not_a_picture() -> None:
    assert reason(b"") == "empty"
    assert reason(b"this is a text in photo.jpg\n" * 99) == "not_a_picture"
    assert reason(b"\xff\xd8\xff") == "not_a_picture"


@pytest.mark.parametrize(
    "data",
    [
        pictures.jpeg(),
        pictures.jpeg(progressive=True),
        pictures.encode(pictures.scene(), "PNG"),
        pictures.encode(pictures.scene(), "WEBP"),
        pictures.encode(pictures.scene(), "GIF"),
        pictures.encode(pictures.scene(), "AVIF"),
    ],
    ids=["jpeg", "progressive", "png", "webp", "gif", "avif"],
)
@pytest.mark.parametrize("kept", [0.5, 0.8])
def test_half_a_picture_is_truncated(data: bytes, kept: float) -> None:
    assert reason(data[: int(len(data) * kept)]) in ("truncated", "not_a_picture")


def test_a_jpeg_that_breaks_off_within_its_pixels_is_truncated() -> None:
    data = pictures.jpeg(pictures.scene(400, 300))
    assert reason(data[: len(data) // 2]) == "truncated"
    png = pictures.encode(pictures.scene(400, 300), "PNG")
    assert reason(png[: len(png) // 2]) == "truncated"


def test_too_many_bytes_are_refused_before_anything_is_parsed() -> None:
    assert reason(b"x" * 101, PictureSettings(max_bytes=100)) == "too_many_bytes"


def test_a_bomb_is_refused_without_being_unpacked() -> None:
    bomb = pictures.png_bomb(20_000, 20_000)
    assert len(bomb) < 100_000
    before = unpacked()
    assert reason(bomb) == "too_many_pixels"
    assert unpacked() == before


def test_a_png_is_checked_at_the_door_without_being_unpacked() -> None:
    data = pictures.png_bomb(4_000, 4_000)
    before = unpacked()
    assert check_picture(data, LIMITS).width == 4_000
    assert unpacked() == before


def test_a_picture_of_exactly_the_allowed_pixels_passes() -> None:
    data = pictures.encode(pictures.scene(), "PNG")
    assert check_picture(data, PictureSettings(max_pixels=96 * 64)).width == 96
    assert reason(data, PictureSettings(max_pixels=96 * 64 - 1)) == "too_many_pixels"


# --- pixels ----------------------------------------------------------------------------------------------------------


def spec(
    resize: str = "shortest_edge",
    resize_to: int = SIZE,
    interpolation: str = "bicubic",
    decode: str = "fine",
    size: int = SIZE,
) -> ImageInput:
    return ImageInput.model_validate(
        {
            "size": size,
            "resize_to": resize_to,
            "resize": resize,
            "crop": "center",
            "interpolation": interpolation,
            "rescale": 1 / 255,
            "mean": MEAN,
            "std": STD,
            "decode": decode,
        }
    )


def off(ours: Pixels, theirs: Pixels) -> NDArray[np.float64]:
    """Return by how many of 255 levels two pictures' pixels differ."""
    levels: NDArray[np.float64] = np.abs(ours.astype(np.float64) - theirs) * np.asarray(STD).reshape(3, 1, 1) * 255
    return levels


@pytest.mark.parametrize("case", CASES)
def test_pixels_are_those_of_the_models_own_processor(case: str) -> None:
    width, height, resize_to, interpolation = CASES[case]
    with np.load(GOLDEN) as golden:
        expected = golden[case].astype(np.float64)
    pixels = Preprocessor(spec(resize_to=resize_to, interpolation=interpolation))(pictures.scene(width, height))
    assert pixels.shape == (3, SIZE, SIZE)
    assert pixels.dtype == np.float32
    as_levels = (pixels * np.asarray(STD).reshape(3, 1, 1) + np.asarray(MEAN).reshape(3, 1, 1)) * 255
    allowed = 1.001 if case in ("strip", "thread") else 0.001  # these two are cropped while they are resized
    assert np.abs(as_levels - expected).max() <= allowed


def test_squash_keeps_all_of_the_picture_and_pad_its_proportions() -> None:
    image = pictures.plain((255, 255, 255), 64, 32)
    assert Preprocessor(spec("squash"))(image).min() > 1.5
    padded = Preprocessor(spec("pad"))(image)
    assert padded[:, 12:20, :].min() > 1.5
    assert padded[:, :8, :].max() < -1
    assert padded[:, -8:, :].max() < -1


def test_a_strip_of_sixty_million_pixels_costs_no_more_memory_than_it_has() -> None:
    strip = Image.new("RGB", (1_000_000, 1), (200, 0, 0))
    assert Preprocessor(spec())(strip).shape == (3, SIZE, SIZE)


@pytest.mark.parametrize("size", [(1200, 800), (1001, 1501), (4000, 3008)])
def test_a_jpeg_that_is_shrunk_while_decoding_gives_almost_the_same_pixels(size: tuple[int, int]) -> None:
    photo = pictures.scene(150, 100).resize(size, Image.Resampling.LANCZOS)
    data = pictures.encode(photo, "JPEG", quality=90)
    whole, shrunk = Picture(data, LIMITS).decode(), Picture(data, LIMITS).decode(SIZE)
    assert min(shrunk.size) >= 4 * SIZE
    assert (shrunk.size == whole.size) == any(side % 2 for side in size)
    preprocess = Preprocessor(spec())
    assert off(preprocess(whole), preprocess(shrunk)).max() <= 3
    assert off(preprocess(whole), preprocess(shrunk)).mean() <= 0.5
    assert np.array_equal(preprocess.read(Picture(data, LIMITS)), preprocess(shrunk))


def test_pixels_are_written_where_they_are_wanted() -> None:
    batch = np.full((3, 3, SIZE, SIZE), 7, np.float32)
    data = pictures.jpeg()
    pixels = Preprocessor(spec()).read(Picture(data, LIMITS), batch[1])
    assert np.array_equal(batch[1], Preprocessor(spec())(decoded(data)))
    assert pixels.base is batch
    assert (batch[[0, 2]] == 7).all()


# --- fast ------------------------------------------------------------------------------------------------------------

PHOTO = Path("demo/images/hanging-plant.jpg")  # leaves: what shrinking spoils is their edges


def photo(width: int, height: int) -> Image.Image:
    with Image.open(PHOTO) as image:
        return image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)


FAST: dict[str, tuple[str, dict[str, Any], str]] = {
    "jpeg-420": ("JPEG", {"quality": 90, "subsampling": "4:2:0"}, "RGB"),
    "jpeg-444": ("JPEG", {"quality": 90, "subsampling": "4:4:4"}, "RGB"),
    "jpeg-progressive": ("JPEG", {"quality": 90, "progressive": True}, "RGB"),
    "jpeg-grey": ("JPEG", {"quality": 90}, "L"),
    "jpeg-cmyk": ("JPEG", {"quality": 90}, "CMYK"),
    "mpo": ("MPO", {"quality": 90}, "RGB"),
    "png": ("PNG", {"compress_level": 1}, "RGB"),
    "png-alpha": ("PNG", {"compress_level": 1}, "RGBA"),
    "png-16": ("PNG", {"compress_level": 1}, "I;16"),
    "webp": ("WEBP", {"quality": 90, "method": 0}, "RGB"),
    "gif": ("GIF", {}, "P"),
    "avif": ("AVIF", {"quality": 90, "speed": 10}, "RGB"),
}


@pytest.mark.parametrize("resize", ["shortest_edge", "squash", "pad"])
@pytest.mark.parametrize("name", FAST)
def test_fast_is_close_to_the_whole_decode(name: str, resize: str) -> None:
    kind, options, mode = FAST[name]
    image = photo(1001, 667)
    if mode == "RGBA":
        image.putalpha(image.convert("L"))
    elif mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257)
    else:
        image = image.convert(mode)
    data = pictures.encode(image, kind, **options)
    whole = Preprocessor(spec(resize, 224, size=224))(decoded(data))
    fast = Preprocessor(spec(resize, 224, size=224, decode="fast")).read(Picture(data, LIMITS))
    assert fast.shape == whole.shape
    difference = off(fast, whole)
    assert difference.mean() <= 1.0
    assert np.quantile(difference, 0.999) <= 16
    image, sides = Picture(data, LIMITS).decode_small(224)
    shrunk = kind in ("JPEG", "MPO")
    assert image.size == ((501, 334) if shrunk else (1001, 667))
    assert sides == ((500.5, 333.5) if shrunk else (1001, 667))


@pytest.mark.parametrize("wanted", [96, 97])
def test_fast_decodes_as_small_as_is_wanted_and_no_smaller(wanted: int) -> None:
    data = pictures.jpeg(photo(1024, 768))
    image, sides = Picture(data, LIMITS).decode_small(wanted)
    assert image.size == sides == ((128, 96) if wanted == 96 else (256, 192))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(800, 528), (801, 531)])
def test_fast_turns_what_its_exif_says(size: tuple[int, int], orientation: int) -> None:
    data = pictures.rotated_jpeg(photo(*size), orientation)
    whole = Preprocessor(spec(resize_to=100, size=100))(decoded(data))
    fast = Preprocessor(spec(resize_to=100, size=100, decode="fast")).read(Picture(data, LIMITS))
    assert off(fast, whole).mean() <= 1.6  # 20 and more when it is turned in another way
    image, _ = Picture(data, LIMITS).decode_small(100)
    # Odd sides of a picture that is turned are decoded whole.
    assert max(image.size) == (801 if size == (801, 531) and orientation > 1 else 201 if size == (801, 531) else 200)


@pytest.mark.parametrize("resize", ["shortest_edge", "squash", "pad"])
@pytest.mark.parametrize("size", [(1, 1), (9, 7), (300, 2), (3, 400), (32, 32)])
def test_fast_enlarges_what_is_small_as_before(size: tuple[int, int], resize: str) -> None:
    data = pictures.encode(pictures.scene(*size), "PNG")
    whole = Preprocessor(spec(resize))(decoded(data))
    fast = Preprocessor(spec(resize, decode="fast")).read(Picture(data, LIMITS))
    assert off(fast, whole).max() <= 16
    assert off(fast, whole).mean() <= 0.5


def test_fast_costs_a_strip_no_more_memory_than_it_has() -> None:
    data = pictures.encode(Image.new("RGB", (1_000_000, 1), (200, 0, 0)), "PNG")
    fast = Preprocessor(spec(decode="fast")).read(Picture(data, LIMITS))
    assert np.ptp(fast, axis=(1, 2)).max() == 0
