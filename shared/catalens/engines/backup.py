"""Backups of a data folder: what the command `catalens backup` writes and `catalens restore` brings back.

The log is the truth, and a backup always has it and the pictures that it names. The index is made from them, so a copy
of it only saves time: it is taken when no process runs, because the engine's files are whole only then. Without it the
log's copy says that nothing was read yet, and the restored process makes the index anew (docs/adr/0026).
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter, ValidationError

from catalens import events
from catalens.domain import sha256_hex
from catalens.engines.folder import FileLock, storage_error
from catalens.errors import Misconfigured
from catalens.settings import Settings

FORMAT: Final = 1
MANIFEST: Final = "backup.json"
_LOG: Final = "events.sqlite"
_DATABASES: Final = (_LOG, "requests.sqlite")
_INDEXES: Final = "indexes.json"
_BLOBS: Final = "blobs"


@dataclass(frozen=True, slots=True)
class Backup:
    """What a backup holds."""

    format: int
    release: str
    taken: str
    """RFC 3339, UTC."""
    index: bool
    """The index is in it; else it is made anew of the log, which needs the model and the remote pictures again."""
    records: int
    """Of the log."""
    pictures: int


_FILE: Final = TypeAdapter(Backup)


def back_up(settings: Settings, target: Path) -> Backup:
    """Copy the data folder to `target`, which must not exist, and return what was copied; blocking.

    Whole or absent: it grows beside `target` and takes its name at the end. Everything that was acknowledged before the
    call is in it, whether or not a process runs. Raises Misconfigured, StorageFull, Transient.
    """
    folder = settings.data_dir
    if settings.kafka.bootstrap_servers:
        raise Misconfigured("the event log is Kafka, not this folder: see docs/how-to/backup.md for a cluster's backup")
    if not (folder / _LOG).exists():
        raise Misconfigured(f"{folder} has no event log: set CATALENS_DATA_DIR to the folder to back up")
    with growing_folder(target) as growing, _lock_if_free(folder) as stopped:
        pictures = _copy_pictures(folder / _BLOBS, growing / _BLOBS)
        for name in _DATABASES:
            if (folder / name).exists():
                _copy_database(folder / name, growing / name)
        # Once more: what came meanwhile may be in the log already.
        pictures += _copy_pictures(folder / _BLOBS, growing / _BLOBS)
        for name in ("version", _INDEXES, "models"):
            _copy(folder / name, growing / name)
        if stopped:
            for path in sorted(folder.glob("index*/")):
                _copy(path, growing / path.name)
        else:
            _read_nothing_yet(growing / _LOG)
            _keep_current_alone(growing / _INDEXES)
        found = Backup(
            format=FORMAT,
            release=version("catalens"),
            taken=datetime.now(UTC).isoformat(timespec="seconds"),
            index=stopped,
            records=_count(growing / _LOG),
            pictures=pictures,
        )
        (growing / MANIFEST).write_text(json.dumps(asdict(found), indent=2) + "\n", encoding="utf-8")
    return found


def restore(source: Path, target: Path) -> Backup:
    """Make the data folder `target` of the backup `source`, and return what it holds; blocking.

    The databases are checked first and every picture is compared with its name; nothing comes into place before all of
    it was copied. Raises Misconfigured if `target` has anything in it or `source` is no backup, damaged, or a newer
    release's, StorageFull, Transient.
    """
    found = _manifest(source)
    if target.exists() and any(target.iterdir()):
        raise Misconfigured(f"{target} is not empty: move it away, or set CATALENS_DATA_DIR to another folder")
    for name in _DATABASES:
        if (source / name).exists():
            _check(source / name)
    # A folder that is there may be a mount: it is filled in place, once everything has been copied into it.
    place = target / "restored" if target.exists() else target
    with growing_folder(place) as growing:
        for path in sorted(source.iterdir()):
            if path.name not in (MANIFEST, _BLOBS):
                _copy(path, growing / path.name)
        _copy_pictures(source / _BLOBS, growing / _BLOBS, compare=True)
    if place != target:
        for path in sorted(place.iterdir()):
            path.rename(target / path.name)
        place.rmdir()
    return found


# --- the parts -------------------------------------------------------------------------------------------------


@contextmanager
def growing_folder(target: Path) -> Iterator[Path]:
    """Yield a folder that becomes `target`, durably, if the block ends well, and is removed if it does not."""
    if target.exists():
        raise Misconfigured(f"{target} exists: name another folder")
    growing = target.with_name(f"{target.name}.unfinished")
    try:
        shutil.rmtree(growing, ignore_errors=True)  # of one that was killed
        growing.mkdir(parents=True)
        yield growing
        os.sync()
        growing.rename(target)
        os.sync()
    except (OSError, shutil.Error) as error:
        shutil.rmtree(growing, ignore_errors=True)
        raise storage_error(_first(error), f"{target} cannot be written") from error
    except BaseException:
        shutil.rmtree(growing, ignore_errors=True)
        raise


def _first(error: OSError | shutil.Error) -> OSError:
    """Return what a copy of a tree met first; shutil tells the text only."""
    return OSError(None, str(error.args[0][0][2])) if isinstance(error, shutil.Error) else error


@contextmanager
def _lock_if_free(folder: Path) -> Iterator[bool]:
    """Yield True with the folder locked, or False if a process has it."""
    try:
        lock = FileLock(folder / "lock")
    except Misconfigured:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    elif source.exists():
        shutil.copy2(source, target)


def _copy_pictures(source: Path, target: Path, *, compare: bool = False) -> int:
    """Copy what `target` does not have yet and return how many; one that is collected meanwhile is not needed."""
    copied = 0
    for path in sorted(source.glob("[0-9a-f][0-9a-f]/*")):
        place = target / path.parent.name / path.name
        if place.exists():
            continue
        if compare and sha256_hex(path.read_bytes()) != path.name:
            raise Misconfigured(f"the backup is damaged: {path} is not the picture that its name says")
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copy2(path, place)
        except FileNotFoundError:
            continue
        copied += 1
    return copied


def _copy_database(source: Path, target: Path) -> None:
    """Copy by SQLite's own backup: one moment of it, whoever writes meanwhile."""
    with closing(sqlite3.connect(source)) as live, closing(sqlite3.connect(target)) as copy:
        live.backup(copy)
    _check(target)


def _check(database: Path) -> None:
    try:
        with closing(sqlite3.connect(f"{database.absolute().as_uri()}?immutable=1", uri=True)) as opened:
            (found,) = opened.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.Error as error:
        found = str(error)
    if found != "ok":
        raise Misconfigured(f"the backup is damaged: {database}: {found}")


def _read_nothing_yet(log: Path) -> None:
    """Let the workers begin with the first product again; what a retry did, the product's own event does again."""
    marks = ", ".join("?" for _ in events.COMPACTED)
    with closing(sqlite3.connect(log)) as opened, opened:
        opened.execute(
            f"DELETE FROM commits WHERE partition IN (SELECT id FROM partitions WHERE topic IN ({marks}))",  # noqa: S608
            events.COMPACTED,
        )


def _keep_current_alone(indexes: Path) -> None:
    """Keep which model is current, so that the new index is of that one too; other indexes are not made again."""
    if not indexes.exists():
        return
    state = json.loads(indexes.read_bytes())
    kept = {name: entry for name, entry in state["indexes"].items() if name == state["current"]}
    indexes.write_text(json.dumps({**state, "held": False, "indexes": kept}, indent=2) + "\n", encoding="utf-8")


def _count(log: Path) -> int:
    with closing(sqlite3.connect(log)) as opened:
        return int(opened.execute("SELECT count(*) FROM records").fetchone()[0])


def _manifest(source: Path) -> Backup:
    try:
        found = _FILE.validate_json((source / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise Misconfigured(f"{source} is no backup: it has no {MANIFEST}") from None
    except ValidationError as error:
        raise Misconfigured(f"{source / MANIFEST} is damaged: {error.errors()[0]['msg']}") from error
    if found.format > FORMAT:
        raise Misconfigured(
            f"{source} was written by release {found.release}, in a format that this one does not know: restore it by "
            "that release"
        )
    return found
