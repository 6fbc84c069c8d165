"""What a product's pictures must pass before its event is written: addresses, bytes and references."""

from __future__ import annotations

import asyncio
import base64
import binascii

from catalens.domain import ImageRef, Product
from catalens.errors import ForbiddenUrl, InvalidPicture, NotFound
from catalens.pictures import check_picture
from catalens.ports import BlobStore, ImageSource
from catalens.problems import as_problem, invalid
from catalens.settings import PictureSettings

_CHECKS_AT_ONCE = 2
"""A check may unpack a whole picture: at the default limit some 250 MB."""


class Door:
    """Turns the pictures that a product brings into references that the embedder can rely on."""

    def __init__(self, blobs: BlobStore, images: ImageSource, limits: PictureSettings) -> None:
        self._blobs = blobs
        self._images = images
        self._limits = limits
        self._checks = asyncio.Semaphore(_CHECKS_AT_ONCE)

    async def admit(self, product: Product) -> Product:
        """Return `product` with its inline pictures stored as blobs; nothing is stored unless all of it is good.

        Raises Problem: 422 a URL or reference, 413 or 415 a picture; and what the blob store raises.
        """
        if not product.images:
            return product
        found = [await self._open(image, f"images.{number}") for number, image in enumerate(product.images)]
        stored = [
            image if isinstance(image, ImageRef) else ImageRef(blob=await self._blobs.put(image)) for image in found
        ]
        return product.model_copy(update={"images": tuple(stored)})

    async def upload(self, picture: bytes, field: str) -> ImageRef:
        """Store `picture` and return its reference; raises as `admit`."""
        await self._check(picture, field)
        return await self._store(picture)

    async def _store(self, picture: bytes) -> ImageRef:
        return ImageRef(blob=await self._blobs.put(picture))

    async def _open(self, image: ImageRef, field: str) -> ImageRef | bytes:
        if image.url is not None:
            try:
                self._images.check(image.url)
            except ForbiddenUrl as error:
                raise as_problem(error, field=f"{field}.url") from error
            return image
        if image.blob is not None:
            try:
                await self._blobs.get(image.blob)
            except NotFound as error:
                raise invalid((f"{field}.blob", "no such picture was uploaded")) from error
            return image
        return await self._inline(image.data or "", f"{field}.data")

    async def _inline(self, data: str, field: str) -> bytes:
        if len(data) * 3 // 4 > self._limits.max_bytes + 2:
            error = InvalidPicture("too_many_bytes", f"the picture is larger than {self._limits.max_bytes:,} bytes")
            raise as_problem(error, field=field)
        try:
            picture = await asyncio.to_thread(base64.b64decode, data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise invalid((field, f"not base64: {error}")) from error
        await self._check(picture, field)
        return picture

    async def _check(self, picture: bytes, field: str) -> None:
        async with self._checks:
            try:
                await asyncio.to_thread(check_picture, picture, self._limits)
            except InvalidPicture as error:
                raise as_problem(error, field=field) from error
