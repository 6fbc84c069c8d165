"""The data folder of one process: its version, and the lock that keeps a second process out."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Final, Self

from catalens.errors import Misconfigured, StorageFull, Transient

VERSION: Final = 1
"""Of the folder's layout; each engine's files carry their own version besides."""

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})


def storage_error(error: OSError, what: str) -> Transient:
    """Return `error` as the port's error: StorageFull when there is no room, else Transient."""
    if error.errno in _FULL:
        return StorageFull(f"{what}: the disk is full or read-only", retry_after=10.0)
    return Transient(f"{what}: {error.strerror}")


def sync_folder(folder: Path) -> None:
    """Make entries just created in `folder` survive power loss."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class FileLock:
    """Holds `path` locked until `release`, or until the process is gone, however it ends."""

    def __init__(self, path: Path) -> None:
        """Take the lock; raises Misconfigured naming the folder and the process that has it, StorageFull."""
        folder = path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise _unusable(folder, error) from error
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError:
            holder = os.pread(self._handle, 32, 0).decode(errors="replace").strip() or "unknown"
            self.release()
            raise Misconfigured(
                f"{folder} is in use by process {holder}: stop it, or set CATALENS_DATA_DIR to another folder"
            ) from None
        except OSError as error:
            self.release()
            raise _unusable(folder, error) from error

    def release(self) -> None:
        """Let the next one in; may be called twice."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def _unusable(folder: Path, error: OSError) -> Misconfigured | Transient:
    if error.errno == errno.ENOSPC:
        return storage_error(error, f"{folder} cannot be opened")
    return Misconfigured(
        f"{folder} cannot be used as data folder: {error.strerror}; set CATALENS_DATA_DIR to a writable folder"
    )


class DataFolder:
    """A data folder that this process alone has open, of a version that it understands."""

    def __init__(self, path: Path) -> None:
        """Create or open `path`; raises Misconfigured if it is in use, unusable or a newer release's, StorageFull."""
        self.path = path
        self._lock = FileLock(path / "lock")
        try:
            self._check_version()
        except BaseException:
            self._lock.release()
            raise

    def _check_version(self) -> None:
        marker = self.path / "version"
        try:
            found = marker.read_text(encoding="utf-8", errors="replace").strip() if marker.exists() else ""
            if not found:  # a new folder, or killed between creating the marker and filling it
                marker.write_text(f"{VERSION}\n", encoding="ascii")
                return
        except OSError as error:
            raise _unusable(self.path, error) from error
        if not found.isdecimal() or int(found) > VERSION:
            raise Misconfigured(
                f"{self.path} is a data folder of version {found[:32]}, this release knows {VERSION}: "
                "start the newer release, or set CATALENS_DATA_DIR to another folder"
            )

    def close(self) -> None:
        """Let the next process in; may be called twice."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
