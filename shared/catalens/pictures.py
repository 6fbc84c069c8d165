"""Opens pictures from a hostile world: recognised by content, limited before decoding, upright and RGB after.

Needs Pillow only, so that the door can check an upload without a model's dependencies.
"""

from __future__ import annotations

import io
from typing import Final

from PIL import Image, UnidentifiedImageError

from catalens.domain import PictureInfo, sha256_hex
from catalens.errors import InvalidPicture
from catalens.settings import PictureSettings

# A parser that is not needed is a parser that cannot be attacked: Pillow knows thirty more.
FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "AVIF")
_NAMES: Final = {"mpo": "jpeg"}  # several JPEGs in one file, as some phones write them; the first one counts
_EXIF_ORIENTATION: Final = 0x0112
_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNED: Final = frozenset((5, 6, 7, 8))
# A JPEG may be shrunk while it is decoded as long as this many times the wanted size is left: at 4 no channel
# differs by more than 3 of 255 levels from the full decode, at 2 by 9.
_DRAFT_MARGIN: Final = 4

# Pillow's own limit warns, and differs from ours: `max_pixels` is checked before anything is decoded.
Image.MAX_IMAGE_PIXELS = None


class Picture:
    """A recognised picture within the limits, not yet decoded.

    `info` holds its size as displayed; nothing larger than a header has been allocated.
    Raises InvalidPicture: empty, too_many_bytes, not_a_picture, too_many_pixels.
    """

    def __init__(self, data: bytes, limits: PictureSettings) -> None:
        if not data:
            raise InvalidPicture("empty", "the picture is empty (0 bytes)")
        if len(data) > limits.max_bytes:
            raise InvalidPicture(
                "too_many_bytes", f"the picture has {len(data)} bytes, more than the {limits.max_bytes} allowed"
            )
        try:
            self._image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError as error:
            raise InvalidPicture(
                "not_a_picture", "not a picture: JPEG, PNG, WebP, GIF and AVIF are recognised, by content"
            ) from error
        except Exception as error:  # the boundary: hostile headers make Pillow raise many kinds of error
            raise InvalidPicture("not_a_picture", f"the picture's header is broken: {error}") from error
        self._size = width, height = self._image.size
        if width * height > limits.max_pixels:
            raise InvalidPicture(
                "too_many_pixels",
                f"the picture has {width}×{height} pixels, more than the {limits.max_pixels} allowed",
            )
        self._orientation = _orientation(self._image)
        if self._orientation in _TURNED:
            width, height = height, width
        name = (self._image.format or "unknown").lower()
        self.info = PictureInfo(width=width, height=height, format=_NAMES.get(name, name), sha256=sha256_hex(data))

    def decode(self, wanted: int | None = None) -> Image.Image:
        """Return the first frame: RGB, upright, alpha on white. Raises InvalidPicture: truncated.

        A JPEG may come back shrunk by 2, 4 or 8, without a remainder and never below four times `wanted` pixels:
        it decodes in a fraction of the time and memory.
        """
        if wanted is not None:
            self._shrink(wanted * _DRAFT_MARGIN, evenly=True)
        return self._decode()

    def decode_small(self, wanted: int) -> tuple[Image.Image, tuple[float, float]]:
        """Return the first frame as `decode` does, but a JPEG as small as `wanted` allows; and the picture's sides.

        Where a side divides with a remainder, the image's last row or column is covered in part, and the side is a
        fraction shorter than the image's. Raises InvalidPicture: truncated.
        """
        # What is turned has its last row elsewhere afterwards; phones, which turn, take pictures that divide.
        factor = self._shrink(wanted, evenly=self._orientation in _UPRIGHT)
        image = self._decode()
        return image, (self.info.width / factor, self.info.height / factor)

    def _decode(self) -> Image.Image:
        try:
            self._image.load()
            image = _rgb(self._image)
        except Exception as error:  # the boundary: broken data makes Pillow's codecs raise OSError, SyntaxError, …
            raise _damaged(error) from error
        turn = _UPRIGHT.get(self._orientation)
        return image if turn is None else image.transpose(turn)

    def check(self) -> None:
        """Raise InvalidPicture (truncated) unless all of its data is there; cheaper than `decode`."""
        try:
            if self._image.format == "PNG":
                self._image.verify()  # the checksums of its chunks: no pixel is unpacked
            else:
                self._image.draft(None, (1, 1))  # a JPEG is read whole but shrunk by 8; the others know no draft
                self._image.load()
        except Exception as error:  # the boundary: as in decode
            raise _damaged(error) from error

    def _shrink(self, least: int, *, evenly: bool) -> int:
        """Have a JPEG decoded at its size divided by what is returned, at least `least` pixels on the shorter side."""
        width, height = self._size
        if self._image.format not in ("JPEG", "MPO"):
            return 1
        for factor in (8, 4, 2):
            even = width % factor == 0 and height % factor == 0
            if min(width, height) >= least * factor and (even or not evenly):
                self._image.draft(None, (width // factor, height // factor))
                return factor
        return 1


def check_picture(data: bytes, limits: PictureSettings) -> PictureInfo:
    """Return what `data` shows, once it is known to be a whole picture within the limits (blocking).

    Raises InvalidPicture with its reason.
    """
    picture = Picture(data, limits)
    picture.check()
    return picture.info


def _damaged(error: Exception) -> InvalidPicture:
    return InvalidPicture("truncated", f"the picture is truncated or damaged: {error}")


def _orientation(image: Image.Image) -> int:
    try:
        # The base class's method, because PNG's own unpacks all pixels to find an EXIF block behind them.
        value = Image.Image.getexif(image).get(_EXIF_ORIENTATION, 1)
    except Exception:  # noqa: BLE001  # broken EXIF raises a dozen kinds of error, and says nothing about the pixels
        return 1
    return value if isinstance(value, int) else 1


def _rgb(image: Image.Image) -> Image.Image:
    """Return `image` as RGB: alpha on white, 16 bits cut to their upper 8."""
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.mode == "RGB":
        return image
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")
