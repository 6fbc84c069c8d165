"""Turns pictures into a model's `pixels`, as the model's own processor does."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from catalens.encoders.bundle import ImageInput
from catalens.pictures import Picture

Pixels = NDArray[np.float32]
Sides = tuple[float, float]

_RESAMPLING: Final = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# A picture longer than this many times its width is cropped while it is resized, not after: a 1 × 60,000,000 pixel
# strip would become 224 × 13 billion first.
_LONG: Final = 8
# "fast" first averages whole blocks of pixels, as long as this many times the wanted pixels are left: a quarter of the
# time of resizing 2000 pixels, for 0.3 of 255 levels on average.
_GAP: Final = 2.0


class Preprocessor:
    """Decodes, resizes, crops and normalises a picture.

    From the same RGB picture, and unless the bundle says "fast", every value is within 1/255 level (before
    normalisation) of transformers' CLIPImageProcessor and SiglipImageProcessor (PIL backend), and equal unless the
    picture is more than eight times as long as wide. What "fast" costs is in docs/adr/0018.
    """

    def __init__(self, spec: ImageInput) -> None:
        self._spec = spec
        self._fast = spec.decode == "fast"
        self._resampling = _RESAMPLING[spec.interpolation]
        mean = np.asarray(spec.mean, np.float32)
        std = np.asarray(spec.std, np.float32)
        self._scale = np.float32(spec.rescale) / std
        self._shift = mean / std

    @property
    def wanted(self) -> int:
        """The shorter side, in pixels, that the picture is resized to."""
        return self._spec.resize_to

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one picture's pixels: channels, height, width."""
        return (3, self._spec.size, self._spec.size)

    def read(self, picture: Picture, into: Pixels | None = None) -> Pixels:
        """Return the pixels of `picture`, decoded as closely as the bundle asks; see __call__.

        Raises InvalidPicture: truncated.
        """
        if self._fast:
            image, sides = picture.decode_small(self.wanted)
            return self._normalised(self._fit(image, sides), into)
        return self(picture.decode(self.wanted), into)

    def __call__(self, image: Image.Image, into: Pixels | None = None) -> Pixels:
        """Return the pixels of an RGB picture: float32, `shape`; written to `into` if there is one."""
        return self._normalised(self._fit(image, image.size), into)

    def _normalised(self, image: Image.Image, into: Pixels | None) -> Pixels:
        pixels = np.empty(self.shape, np.float32) if into is None else into
        # A band at a time: from interleaved levels the same sums take eight times as long.
        for band, channel, scale, shift in zip(image.split(), pixels, self._scale, self._shift, strict=True):
            np.multiply(np.asarray(band), scale, out=channel)
            np.subtract(channel, shift, out=channel)
        return pixels

    def _fit(self, image: Image.Image, sides: Sides) -> Image.Image:
        size = self._spec.size
        match self._spec.resize:
            case "squash":
                return self._resized(image, (size, size), (0, 0, *sides))
            case "pad":
                return self._pad(image, sides)
            case "shortest_edge":
                return self._crop(image, sides)

    def _resized(
        self, image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float]
    ) -> Image.Image:
        return image.resize(size, self._resampling, box, reducing_gap=_GAP if self._fast else None)

    def _pad(self, image: Image.Image, sides: Sides) -> Image.Image:
        """Fit the whole picture into the square, on black, as open_clip's "longest" mode does."""
        size = self._spec.size
        longest = max(sides)
        width, height = (max(1, round(side * size / longest)) for side in sides)
        square = Image.new("RGB", (size, size))
        resized = self._resized(image, (width, height), (0, 0, *sides))
        square.paste(resized, ((size - width) // 2, (size - height) // 2))
        return square

    def _crop(self, image: Image.Image, sides: Sides) -> Image.Image:
        """Resize the shorter side to `resize_to` and take the middle."""
        size, shortest = self._spec.size, self._spec.resize_to
        short, long = min(sides), max(sides)
        longest = int(shortest * long / short)
        width, height = (shortest, longest) if sides[0] <= sides[1] else (longest, shortest)
        left, top = self._half(width - size), self._half(height - size)
        if not self._fast and longest <= _LONG * shortest:
            resized = self._resized(image, (width, height), (0, 0, *sides))
            return resized.crop((left, top, left + size, top + size))
        # Only what the crop keeps is computed: the same pixels, but for the rounding of the box.
        across, down = sides[0] / width, sides[1] / height
        right, bottom = min((left + size) * across, sides[0]), min((top + size) * down, sides[1])
        return self._resized(image, (size, size), (left * across, top * down, right, bottom))

    def _half(self, rest: int) -> int:
        """Return what is cut off before the middle, of all that is cut off."""
        return round(rest / 2) if self._spec.crop == "center_rounded" else rest // 2
