"""SqliteMemory: what was answered under an Idempotency-Key, in one SQLite file."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from pathlib import Path
from time import time
from typing import Final

from catalens.engines.sqlite import GroupWriter, open_database

SCHEMA_VERSION: Final = 1
_SCHEMA: Final = """
CREATE TABLE requests (
    key TEXT PRIMARY KEY, value BLOB NOT NULL, stored REAL NOT NULL, expires REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX requests_expire ON requests (expires)
"""


class SqliteMemory:
    """A RequestMemory that survives kill -9 and power loss; what has expired is forgotten by the next call."""

    def __init__(self, writer: GroupWriter, now: Callable[[], float]) -> None:
        """Take over what `open` opened."""
        self._writer = writer
        self._now = now

    @classmethod
    async def open(cls, path: Path, *, now: Callable[[], float] = time) -> SqliteMemory:
        """Open or create the file at `path`; `now` returns Unix seconds.

        Raises Misconfigured if a newer release wrote it, StorageFull, Transient.
        """
        database = await asyncio.to_thread(open_database, path, _SCHEMA, SCHEMA_VERSION)
        return cls(GroupWriter(database, name="request memory"), now)

    async def remember(self, key: str, value: bytes, *, ttl: float) -> bytes:
        """Store `value` unless the key holds one that is at most `ttl` seconds old; return what it then holds."""
        now = self._now()

        def settle(database: sqlite3.Connection) -> bytes:
            database.execute("DELETE FROM requests WHERE expires < ?", (now,))
            row = database.execute(
                "SELECT value FROM requests WHERE key = ? AND stored >= ?", (key, now - ttl)
            ).fetchone()
            if row is not None:
                return bytes(row[0])
            database.execute("INSERT OR REPLACE INTO requests VALUES (?, ?, ?, ?)", (key, value, now, now + ttl))
            return value

        return await self._writer.write(settle)

    async def close(self) -> None:
        """Finish what is under way and release the file; may be called twice."""
        await self._writer.close()
