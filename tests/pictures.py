"""Pictures of every kind for tests, made on the spot: formats, modes, orientations, and broken ones."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

from PIL import Image

RED, BLUE = (220, 30, 30), (30, 60, 220)


def scene(width: int = 96, height: int = 64) -> Image.Image:
    """Return an RGB picture in which every region differs: smooth gradients, a red corner at the top left."""
    image = Image.new("RGB", (width, height))
    image.putdata(
        [
            (x * 255 // width, y * 255 // height, (x * 7 + y * 3) % 256 // 4 + 96)
            for y in range(height)
            for x in range(width)
        ]
    )
    image.paste(RED, (0, 0, width // 4, height // 4))
    return image


def plain(colour: tuple[int, int, int], width: int = 64, height: int = 64) -> Image.Image:
    """Return a picture of one colour."""
    return Image.new("RGB", (width, height), colour)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return `image` as a file of Pillow's format `kind`."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(image: Image.Image | None = None, **options: Any) -> bytes:
    """Return a JPEG, of `scene` by default."""
    return encode(image or scene(), "JPEG", quality=92, **options)


def rotated_jpeg(image: Image.Image, orientation: int) -> bytes:
    """Return a JPEG whose EXIF orientation says how its stored pixels, those of `image`, are to be turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, "JPEG", quality=95, exif=exif)


def animated_gif(first: tuple[int, int, int], second: tuple[int, int, int]) -> bytes:
    """Return a GIF of two frames of one colour each."""
    return encode(plain(first), "GIF", save_all=True, append_images=[plain(second)], duration=50)


def png_bomb(width: int, height: int) -> bytes:
    """Return a small, whole PNG of one bit a pixel that unpacks to width × height pixels."""
    data = zlib.compress((b"\x00" * ((width + 7) // 8 + 1)) * height, 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
