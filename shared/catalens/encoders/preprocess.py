"""Turns pictures into a model's `pixels`, as the model's own processor does."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from catalens.encoders.bundle import ImageInput

Pixels = NDArray[np.float32]

_RESAMPLING: Final = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# A picture longer than this many times its width is cropped while it is resized, not after: a 1 × 60,000,000 pixel
# strip would become 224 × 13 billion first.
_LONG: Final = 8


class Preprocessor:
    """Resizes, crops and normalises a decoded picture.

    From the same RGB picture, every value is within 1/255 level (before normalisation) of transformers'
    CLIPImageProcessor (PIL backend), and equal unless the picture is more than eight times as long as wide.
    """

    def __init__(self, spec: ImageInput) -> None:
        self._spec = spec
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

    def __call__(self, image: Image.Image) -> Pixels:
        """Return the pixels of an RGB picture: float32, `shape`."""
        levels = np.asarray(self._fit(image), np.float32)
        return np.ascontiguousarray((levels * self._scale - self._shift).transpose(2, 0, 1))

    def _fit(self, image: Image.Image) -> Image.Image:
        size = self._spec.size
        match self._spec.resize:
            case "squash":
                return image.resize((size, size), self._resampling)
            case "pad":
                return self._pad(image)
            case "shortest_edge":
                return self._crop(image)

    def _pad(self, image: Image.Image) -> Image.Image:
        """Fit the whole picture into the square, on black, as open_clip's "longest" mode does."""
        size = self._spec.size
        longest = max(image.size)
        width, height = (max(1, round(side * size / longest)) for side in image.size)
        square = Image.new("RGB", (size, size))
        square.paste(image.resize((width, height), self._resampling), ((size - width) // 2, (size - height) // 2))
        return square

    def _crop(self, image: Image.Image) -> Image.Image:
        """Resize the shorter side to `resize_to` and take the middle."""
        size, shortest = self._spec.size, self._spec.resize_to
        short, long = min(image.size), max(image.size)
        longest = int(shortest * long / short)
        width, height = (shortest, longest) if image.width <= image.height else (longest, shortest)
        left, top = (width - size) // 2, (height - size) // 2
        if longest <= _LONG * shortest:
            return image.resize((width, height), self._resampling).crop((left, top, left + size, top + size))
        across, down = image.width / width, image.height / height
        right, bottom = min((left + size) * across, image.width), min((top + size) * down, image.height)
        box = (left * across, top * down, right, bottom)
        return image.resize((size, size), self._resampling, box)
