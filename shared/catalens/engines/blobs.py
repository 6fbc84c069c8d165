"""FileBlobStore: uploaded pictures as files, named by the SHA-256 of their bytes, for the processes of one machine."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import re
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from catalens.domain import sha256_hex
from catalens.engines.folder import storage_error, sync_folder
from catalens.errors import Misconfigured, NotFound

_REFERENCE: Final = re.compile(r"[a-f0-9]{64}")
_UNUSABLE: Final = frozenset({errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST})
"""What stays so until somebody changes it: waiting would not help."""
_UNFINISHED_SECONDS: Final = 86_400.0  # nobody writes a picture for that long


def folder_of(url: str) -> Path:
    """Return the folder that a file:///… URL names; raises Misconfigured."""
    parts = urlsplit(url)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost") or not parts.path.strip("/"):
        raise Misconfigured("CATALENS_BLOBS__URL names a folder by its full path: file:///srv/catalens/pictures")
    return Path(unquote(parts.path))


class FileBlobStore:
    """A BlobStore in a folder: ab/abcd…, each file whole or absent, whatever happens.

    A file's modification time is when it was last stored. Processes of one machine may share the folder.
    """

    def __init__(self, root: Path, *, read_only: bool = False) -> None:
        """Open or create the store in `root`, at start-up: it reads and writes there.

        Raises Misconfigured (`root` is no folder, or one that may not be written), StorageFull, Transient.

        With `read_only` nothing is written, whatever `root` would let us: what is there can be read, also what comes
        later, and put and delete raise StorageFull.
        """
        self._unfinished = root / "unfinished"
        self._folders = {f"{number:02x}": root / f"{number:02x}" for number in range(256)}
        self._lock = threading.Lock()
        self._turns = -1
        self._read_only = read_only
        if read_only:
            return
        try:
            self._unfinished.mkdir(parents=True, exist_ok=True)
            _sweep(self._unfinished)
            for folder in self._folders.values():
                folder.mkdir(exist_ok=True)
            self._turns = os.open(root / "turns", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            sync_folder(root)
        except OSError as error:
            if error.errno in _UNUSABLE:
                raise Misconfigured(
                    f"{root} cannot hold pictures: {error.strerror}; "
                    "make it a folder that this process may write, or set CATALENS_BLOBS__URL to another place"
                ) from error
            raise storage_error(error, f"{root} cannot be prepared") from error

    async def put(self, data: bytes) -> str:
        """Store durably and return the reference; a known blob becomes young again. Raises StorageFull, Transient."""
        return await asyncio.to_thread(self._put, data)

    async def get(self, reference: str) -> bytes:
        """Return the bytes; raises NotFound, Transient."""
        path = self._path(reference)
        if path is None:
            raise NotFound(f"there is no picture {reference[:64]!r}")
        try:
            return await asyncio.to_thread(path.read_bytes)
        except FileNotFoundError:
            raise NotFound(f"there is no picture {reference}") from None
        except OSError as error:
            raise storage_error(error, f"picture {reference} cannot be read") from error

    async def references(self, *, older_than: float) -> AsyncIterator[str]:
        """Iterate the references last stored before `older_than` (Unix seconds); raises Transient."""
        for folder in self._folders.values():
            try:
                found = await asyncio.to_thread(_stored_before, folder, older_than)
            except OSError as error:
                if self._read_only and isinstance(error, FileNotFoundError):  # no writer has come yet
                    continue
                raise storage_error(error, f"{folder} cannot be read") from error
            for reference in found:
                yield reference

    async def delete(self, reference: str, *, older_than: float | None = None) -> None:
        """Forget; with `older_than` only if it was not stored again since."""
        path = self._path(reference)
        if path is not None:
            await asyncio.to_thread(self._delete, path, older_than)

    async def close(self) -> None:
        """Release the folder; may be called twice."""
        if self._turns >= 0:
            os.close(self._turns)
            self._turns = -1

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """A conditional delete and a put of the same blob take turns, in this process and among processes."""
        if self._read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        with self._lock:
            fcntl.flock(self._turns, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._turns, fcntl.LOCK_UN)

    def _path(self, reference: str) -> Path | None:
        return self._folders[reference[:2]] / reference if _REFERENCE.fullmatch(reference) else None

    def _put(self, data: bytes) -> str:
        reference = sha256_hex(data)
        path = self._folders[reference[:2]] / reference
        try:
            with self._turn():
                known = path.exists()
                if known:
                    os.utime(path)
            if not known:
                self._write(path, data)
            sync_folder(path.parent)  # of a known one too: its writer may not have come that far
        except OSError as error:
            raise storage_error(error, "the picture cannot be stored") from error
        return reference

    def _write(self, path: Path, data: bytes) -> None:
        unfinished = self._unfinished / uuid.uuid4().hex
        try:
            with unfinished.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            unfinished.rename(path)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise

    def _delete(self, path: Path, older_than: float | None) -> None:
        try:
            with self._turn():
                if older_than is None or path.stat().st_mtime < older_than:
                    path.unlink()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise storage_error(error, f"picture {path.name} cannot be deleted") from error


def _sweep(unfinished: Path) -> None:
    """Remove what processes that were killed left behind."""
    with os.scandir(unfinished) as entries:
        for entry in entries:
            try:
                if entry.stat().st_mtime < time.time() - _UNFINISHED_SECONDS:
                    Path(entry).unlink()
            except FileNotFoundError:  # another process was quicker
                continue


def _stored_before(folder: Path, older_than: float) -> list[str]:
    found: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                if entry.stat().st_mtime < older_than:
                    found.append(entry.name)
            except FileNotFoundError:  # deleted meanwhile
                continue
    return found
