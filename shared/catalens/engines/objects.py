"""ObjectBlobStore: uploaded pictures on S3, Azure Blob Storage or Google Cloud Storage."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Final

from obstore.exceptions import BaseError
from obstore.store import from_url

from catalens.domain import sha256_hex
from catalens.errors import Misconfigured, NotFound, Transient
from catalens.settings import BlobSettings

if TYPE_CHECKING:
    from obstore.store import ObjectStore, RetryConfig

_SCHEMES: Final = ("s3", "az", "gs")
_REFERENCE: Final = re.compile(r"[a-f0-9]{64}")
_QUERY: Final = re.compile(r"\?\S*")  # of a URL in an error's text: it may hold a signature
_PAGE: Final = 1000
_ERRORS: Final = (BaseError, OSError, ValueError)  # what obstore raises; FileNotFoundError is an OSError
_REFUSED: Final = re.compile(r"status code: 40[0134]\b")  # of a listing it tells by its text only
# Few and short: whoever calls us tries again by itself, and waits better.
_RETRIES: Final[RetryConfig] = {"max_retries": 2}


class ObjectBlobStore:
    """A BlobStore in a bucket: `<prefix>/ab/<sha256>`, each object whole or absent.

    An object's Last-Modified, by the provider's clock, is when it was last stored.
    """

    def __init__(self, store: ObjectStore) -> None:
        """Take over what `open` opened."""
        self._store = store

    @classmethod
    async def open(cls, settings: BlobSettings) -> ObjectBlobStore:
        """Open the bucket of `settings.url` and look into it once.

        Raises Misconfigured (no such scheme or bucket, credentials that are missing or refused), Transient (away).
        """
        scheme = settings.url.partition("://")[0]
        if scheme not in _SCHEMES:
            raise Misconfigured("CATALENS_BLOBS__URL is one of s3://…, az://…, gs://… or file:///…")
        try:
            # No client options: they would take the place of those in the environment, such as AWS_ALLOW_HTTP.
            store = from_url(settings.url, retry_config=_RETRIES)
        except _ERRORS as error:
            raise Misconfigured(f"CATALENS_BLOBS__URL cannot be used: {_said(error)}") from error
        try:
            async for _ in store.list(chunk_size=1):
                break
        except _ERRORS as error:
            if _REFUSED.search(str(error)):
                raise Misconfigured(
                    f"the bucket of CATALENS_BLOBS__URL cannot be listed: {_said(error)}. It takes the right to list, "
                    "read, write and delete, and credentials in the provider's own environment variables"
                ) from error
            raise _away(error) from error
        return cls(store)

    async def put(self, data: bytes) -> str:
        """Store durably and return the reference; a known blob becomes young again. Raises Transient.

        A known one is written again, all of it: no provider has another way to move its Last-Modified.
        """
        reference = await asyncio.to_thread(sha256_hex, data)
        try:
            await self._store.put_async(_path(reference), data, mode="overwrite", use_multipart=False)
        except _ERRORS as error:
            raise _away(error) from error
        return reference

    async def get(self, reference: str) -> bytes:
        """Return the bytes; raises NotFound, also where they are no longer what was stored, and Transient.

        Damaged is gone, not away: trying again brings the same bytes, and storing the picture again mends it.
        """
        if not _REFERENCE.fullmatch(reference):
            raise NotFound(f"there is no picture {reference[:64]!r}")
        try:
            data = bytes(await (await self._store.get_async(_path(reference))).bytes_async())
        except FileNotFoundError:
            raise NotFound(f"there is no picture {reference}") from None
        except _ERRORS as error:
            raise _away(error) from error
        if await asyncio.to_thread(sha256_hex, data) != reference:
            raise NotFound(f"picture {reference} is damaged in the store: upload it again")
        return data

    async def references(self, *, older_than: float) -> AsyncIterator[str]:
        """Iterate the references last stored before `older_than` (Unix seconds), a page at a time; raises Transient."""
        try:
            async for page in self._store.list(chunk_size=_PAGE):
                for found in page:
                    reference = found["path"].rpartition("/")[2]
                    if found["path"] == _path(reference) and found["last_modified"].timestamp() < older_than:
                        yield reference
        except _ERRORS as error:
            raise _away(error) from error

    async def delete(self, reference: str, *, older_than: float | None = None) -> None:
        """Forget; with `older_than` only if it was not stored again since. Raises Transient.

        No provider deletes by age: what is stored again between the look and the deletion is lost (docs/adr/0010).
        """
        if not _REFERENCE.fullmatch(reference):
            return
        path = _path(reference)
        try:
            if older_than is not None:
                found = await self._store.head_async(path)
                if found["last_modified"].timestamp() >= older_than:
                    return
            await self._store.delete_async(path)
        except FileNotFoundError:
            pass
        except _ERRORS as error:
            raise _away(error) from error

    async def close(self) -> None:
        """Nothing is held open."""


def _path(reference: str) -> str:
    return f"{reference[:2]}/{reference}"


def _away(error: Exception) -> Transient:
    return Transient(f"the object store failed: {_said(error)}")


def _said(error: Exception) -> str:
    """Return the first line of an error, without what it tells of the store's inside and of signed URLs."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return _QUERY.sub("", lines[0])[:300]
