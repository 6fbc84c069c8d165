"""SQLite as the embedded engines use it: a versioned file, and one writer thread that commits in groups."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue
from types import MappingProxyType
from typing import Any, Final, Generic, TypeVar

from catalens.engines.folder import storage_error
from catalens.errors import Misconfigured, StorageFull, Transient

T = TypeVar("T")

_GROUP: Final = 256
"""Jobs that share one transaction at most, so that the first of them does not wait for all the others."""
_FULL: Final = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY})
_NO_ROOM: Final = frozenset({sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE})


def connect(path: Path) -> sqlite3.Connection:
    """Return a connection whose commits survive power loss; transactions are begun explicitly."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA synchronous = FULL")  # docs/adr/0002
    return connection


def open_database(
    path: Path, schema: str, version: int, upgrades: Mapping[int, str] = MappingProxyType({})
) -> sqlite3.Connection:
    """Open or create the WAL database at `path` with `schema` in `version`.

    `upgrades` tells, for each older version that was ever released, what brings it to the next one.
    Raises Misconfigured if it is no such database or a newer release's, StorageFull, Transient.
    """
    with ExitStack() as undo:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            connection = connect(path)
            undo.callback(connection.close)
            found = int(connection.execute("PRAGMA user_version").fetchone()[0])
            if found <= version:
                connection.execute("PRAGMA journal_mode = WAL")
            if found == 0:
                connection.executescript(f"BEGIN IMMEDIATE; {schema}; PRAGMA user_version = {version}; COMMIT")
            for older in range(found, version) if found else ():
                script = f"BEGIN IMMEDIATE; {upgrades[older]}; PRAGMA user_version = {older + 1}; COMMIT"
                connection.executescript(script)
        except OSError as error:
            raise storage_error(error, f"{path.parent} cannot be created") from error
        except sqlite3.Error as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_NOTADB:
                raise Misconfigured(f"{path} is no database: set CATALENS_DATA_DIR to another folder") from error
            raise translate(error) from error
        if found > version:
            raise Misconfigured(
                f"{path} has schema version {found}, this release knows {version}: "
                "start the newer release, or set CATALENS_DATA_DIR to another folder"
            )
        undo.pop_all()
        return connection


def translate(error: sqlite3.Error) -> Transient:
    """Return `error` as the ports' error: StorageFull when there was no room, else Transient."""
    code = error.sqlite_errorcode if hasattr(error, "sqlite_errorcode") else sqlite3.SQLITE_ERROR
    if code & 0xFF in _FULL or code in _NO_ROOM:
        return StorageFull("the disk is full or read-only: nothing was written", retry_after=10.0)
    return Transient(f"the database does not answer: {error}")


class _Job(Generic[T]):
    """Work for the writer thread and the future of its caller, who may have given up meanwhile."""

    def __init__(
        self, work: Callable[[sqlite3.Connection], T], done: Callable[[T], None] | None, future: asyncio.Future[T]
    ) -> None:
        self.future = future
        self.error: Exception | None = None
        self._work = work
        self._done = done
        self._result: list[T] = []

    def run(self, connection: sqlite3.Connection) -> None:
        """Work; after a rollback this is called again."""
        self._result = [self._work(connection)]

    def settle(self) -> None:
        """Tell the outcome, on the event loop; `done` first, so that whoever wakes sees its effect."""
        if self.error is not None:
            if not self.future.done():
                self.future.set_exception(self.error)
            return
        (result,) = self._result
        if self._done is not None:
            self._done(result)
        if not self.future.done():
            self.future.set_result(result)


class GroupWriter:
    """Runs jobs in the order given, on one thread; those that wait together share one transaction and one fsync.

    A job that fails is rolled back alone: the others of its group are done again without it.
    """

    def __init__(self, connection: sqlite3.Connection, *, name: str, max_waiting: int = 1024) -> None:
        """Take over `connection`, which the writer's thread closes at the end."""
        self._connection = connection
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._slots = asyncio.Semaphore(max_waiting)
        self._queue: SimpleQueue[_Job[Any] | None] = SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    async def write(self, work: Callable[[sqlite3.Connection], T], done: Callable[[T], None] | None = None) -> T:
        """Return what `work` returns, once its transaction is durable; `work` may be run twice.

        Waits while too many jobs wait. `done` is called with the result on the event loop, even if the caller was
        cancelled meanwhile. Raises what `work` raises, SQLite's errors as StorageFull or Transient.
        """
        await self._slots.acquire()
        if self._closing:
            self._slots.release()
            raise Transient(f"{self._name} is closed")
        future: asyncio.Future[T] = self._loop.create_future()
        self._queue.put(_Job(work, done, future))
        return await future

    async def close(self) -> None:
        """Finish what was taken, refuse the rest, close the connection; may be called twice."""
        if not self._closing:
            self._closing = True
            self._queue.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        closing = False
        while not closing:
            taken = [self._queue.get()]
            while len(taken) < _GROUP and not self._queue.empty():  # nobody else takes from it
                taken.append(self._queue.get())
            jobs = [job for job in taken if job is not None]
            closing = len(jobs) < len(taken)
            if jobs:
                self._commit(jobs)
            if self._loop.is_closed():  # the process ended without closing the engine; nobody waits any more
                break
            self._loop.call_soon_threadsafe(self._settle, jobs)
        self._connection.close()

    def _settle(self, jobs: Sequence[_Job[Any]]) -> None:
        for job in jobs:
            self._slots.release()
            job.settle()

    def _commit(self, jobs: Sequence[_Job[Any]]) -> None:
        try:
            self._transact(jobs)
        except Exception as error:  # noqa: BLE001  # the thread's boundary: the error goes to the job's caller
            if len(jobs) > 1:
                for job in jobs:
                    self._commit([job])
            elif isinstance(error, sqlite3.Error):
                jobs[0].error = translate(error)
                jobs[0].error.__cause__ = error
            else:
                jobs[0].error = error

    def _transact(self, jobs: Sequence[_Job[Any]]) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            for job in jobs:
                job.run(self._connection)
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # SQLite has already rolled back after some errors
                self._connection.execute("ROLLBACK")
            raise
