"""What SqliteMemory promises beyond its port: a file that does not grow for ever, and a version."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from catalens.engines.sqlite_memory import SqliteMemory
from catalens.errors import Misconfigured

DAY = 86_400.0


async def test_what_has_expired_leaves_the_file(tmp_path: Path) -> None:
    seconds = 1_800_000_000.0
    memory = await SqliteMemory.open(tmp_path / "requests.sqlite3", now=lambda: seconds)
    for number in range(20):
        await memory.remember(f"shop|{number}", b"value", ttl=DAY)
    seconds += DAY + 1
    await memory.remember("shop|new", b"value", ttl=DAY)
    await memory.close()
    with closing(sqlite3.connect(tmp_path / "requests.sqlite3")) as database:
        assert database.execute("SELECT key FROM requests").fetchall() == [("shop|new",)]


async def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "requests.sqlite3"
    await (await SqliteMemory.open(path)).close()
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 2")
    with pytest.raises(Misconfigured, match="schema version 2, this release knows 1"):
        await SqliteMemory.open(path)
