"""`catalens dlq` against a real standalone process, as an operator uses it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.standalone import Standalone

from catalens import events
from catalens.domain import Message
from catalens.engines.sqlite_log import SqliteEventLog

COMMAND = (sys.executable, "-m", "catalens_standalone.cli", "dlq")
Run = Callable[..., subprocess.CompletedProcess[str]]
POISON = 12
STEERING = "\x1b]0;owned\x07\x9b31m"


def environment(**changes: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CATALENS_")}
    return clean | {"NO_COLOR": "1", "COLUMNS": "160"} | changes


async def _poisoned(path: Path) -> None:
    """Write a log as foreign producers may leave it behind."""
    log = await SqliteEventLog.open(path)
    upserted, deleted = {"ce_type": events.UPSERTED}, {"ce_type": events.DELETED}
    good = [
        Message(events.PRODUCTS, f"default|g{n}", b'{"product_id": "g%d", "name": "G"}' % n, upserted)
        for n in range(POISON)
    ]
    bad = [Message(events.PRODUCTS, f"default|x{n}", b'{"name": %d}' % n, upserted) for n in range(POISON - 1)]
    worst = Message(events.PRODUCTS, f"default|y{STEERING}", b"\xff", {**deleted, "x": STEERING})
    await log.append([*good, *bad, worst])
    await log.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Standalone]:
    """A process that has met poison: x0 … x10 are no products, y is no JSON."""
    folder = tmp_path / "data"
    folder.mkdir()
    asyncio.run(_poisoned(folder / "events.sqlite"))
    with Standalone(folder, CATALENS_MODEL=str(Path(__file__).parent.parent / "fixtures" / "bundles" / "tiny")) as up:
        yield up


@pytest.fixture
def run(tmp_path: Path, server: Standalone) -> Run:
    def run(*arguments: str, text: str | None = None, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *arguments],
            cwd=tmp_path,
            env=environment(**{"CATALENS_URL": server.url, **changes}),
            input=text,
            stdin=None if text is not None else subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    return run


def ids(run: Run, *filters: str, count: int) -> list[str]:
    """Return the ids that are listed, once the worker has come to `count` of them."""
    deadline = time.monotonic() + 60
    while True:
        done = run("list", "--json", *filters)
        assert done.returncode == 0, done.stderr
        found = [letter["id"] for letter in json.loads(done.stdout)["dead_letters"]]
        if len(found) == count or time.monotonic() > deadline:
            assert len(found) == count
            return found
        time.sleep(0.1)  # a real process is at work


def test_letters_are_listed_shown_replayed_and_purged(run: Run) -> None:
    letters = ids(run, count=POISON)
    (y,) = ids(run, "--type", events.DELETED, count=1)

    done = run("list", "--limit", "5", "--reason", "invalid_event", "--topic", "catalog.products")
    assert done.returncode == 0
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [(row[0], row[2], row[6]) for row in rows] == [(name, "invalid_event", "open") for name in letters[:5]]
    assert "more than these 5" in done.stderr

    done = run("show", y)
    assert "base64: /w==" in done.stdout
    assert "dlq_offset" in done.stdout
    assert "y\\u001b]0;owned" in done.stdout
    assert json.loads(run("show", letters[3], "--json").stdout)["data"] == {"name": 3}

    for shown in (run("list"), run("list", "--json"), run("show", y), run("show", y, "--json")):
        assert not any(sign in shown.stdout for sign in "\x1b\x07\x9b")
    assert json.loads(run("show", y, "--json").stdout)["headers"]["x"] == STEERING

    done = run("replay", letters[0], letters[0], letters[1])
    assert (done.returncode, done.stdout) == (0, "replayed: 2\nresolved before: 1\n")
    ids(run, count=POISON)  # the cause is as it was, so they are back, as new letters

    done = run("purge", "--all", "--product-id", "x5", "--yes", "--json")
    assert json.loads(done.stdout) == {"purged": 1, "unchanged": 0, "failed": []}
    done = run("purge", "--all", "--since", "2001-01-01", text="n\n")
    assert done.returncode == 1
    assert f"Purge {POISON - 1} dead letters?" in done.stderr
    assert "--yes" in run("purge", "--all").stderr  # nobody is there to ask
    assert len(ids(run, count=POISON - 1)) == POISON - 1
    done = run("purge", "--all", text="y\n")
    assert (done.returncode, done.stdout) == (0, f"purged: {POISON - 1}\n")
    done = run("list")
    assert (done.returncode, done.stdout) == (0, "")


def test_what_cannot_be_done_is_said(run: Run) -> None:
    (letter, *_) = ids(run, count=POISON)
    for arguments, said in (
        (("replay",), "--all"),
        (("purge", letter, "--all"), "--all"),
        (("purge", letter, "--reason", "x"), "filters go with --all"),
        (("replay", "--all", "--force"), "--force takes IDs"),
        (("list", "--state", "lost"), "lost"),
    ):
        done = run(*arguments)
        assert done.returncode == 2, arguments
        assert said in done.stderr
    done = run("replay", letter, "0-999", "nonsense")
    assert done.returncode == 1
    assert done.stdout == "replayed: 1\n"
    assert "0-999" in done.stderr
    assert "could not replay: 2" in done.stderr
    for wrong in (("list", "--since", "yesterday"), ("show", "0-999")):
        done = run(*wrong)
        assert done.returncode == 1
        assert done.stderr.startswith("error:")
        assert done.stderr.count("\n") == 1
    done = run("list", CATALENS_URL="http://127.0.0.1:9")
    assert (done.returncode, done.stderr.startswith("error: no Catalens answers")) == (1, True)


def test_on_a_terminal_it_is_a_table(run: Run, server: Standalone, tmp_path: Path) -> None:
    ids(run, count=POISON)
    ours, theirs = pty.openpty()
    shown = environment(CATALENS_URL=server.url, TERM="xterm-256color")
    process = subprocess.Popen([*COMMAND, "list"], cwd=tmp_path, env=shown, stdout=theirs, stderr=theirs)
    os.close(theirs)
    drawn = bytearray()
    with os.fdopen(ours, "rb", buffering=0) as screen, contextlib.suppress(OSError):  # EIO: the other side is gone
        while block := screen.read(65_536):
            drawn += block
    assert process.wait(timeout=60) == 0
    assert "failed at" in drawn.decode()
    assert "invalid_event" in drawn.decode()
    assert "y\\u001b]0;owned" in drawn.decode()
    assert "\x1b]0;" not in drawn.decode()
