"""A rolling upgrade and the way back, under load, with two releases of this repository on real engines.

    python -m scripts.upgrade_drill OLD [NEW]        # git refs or checkouts; NEW: this one

starts Kafka, Redis and Qdrant's engine, two workers, an ingest and a query service of OLD, sends products, offers and
deletions and searches all the while, replaces one process at a time as docs/how-to/upgrade.md says, and goes back. Then
the index must be what was accepted, newest version wins, in what this checkout reads and in what each release's query
service shows. Exit status 1 and the differences if anything was lost, buried, refused to a search or ended in an error.

Both run with the installed packages, so that their locked dependencies must not differ in what they need.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import aiohttp
from tests.cluster import Cluster, Service, settled
from tests.kafka import kafka_missing
from tests.ledger import Load, differences
from tests.models import install_models

from catalens import events
from catalens.ports import EventLog
from catalens.settings import Settings
from catalens.telemetry import configure_logging

ROOT: Final = Path(__file__).resolve().parent.parent
SOURCES: Final = ("shared", "services/ingest", "services/embedder", "services/query", "services/standalone")
EVENTS: Final = 60
"""Accepted between any two steps at least."""
PREFIX: Final = "drill"


@dataclass(frozen=True, slots=True)
class Release:
    """The sources of one release."""

    name: str
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """What lets a process run these sources."""
        return {"PYTHONPATH": os.pathsep.join(str(self.folder / source) for source in SOURCES)}


def release(given: str, label: str, scratch: Path) -> Release:
    """Return the release in a folder or at a git ref, which is unpacked into `scratch`."""
    if Path(given).is_dir():
        return Release(f"{label} ({given})", Path(given).resolve())
    folder = scratch / label
    done = subprocess.run(["git", "archive", given], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        sys.exit(f"error: {given} is neither a folder nor a git ref: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return Release(f"{label} ({given})", folder)


class Searches:
    """Asks the query service that is in charge, again and again, and keeps what failed."""

    def __init__(self) -> None:
        self.url = ""
        self.answered = 0
        self.failed: list[str] = []

    async def run(self, stop: asyncio.Event) -> None:
        """Search until `stop` is set."""
        async with aiohttp.ClientSession() as session:
            while not stop.is_set():
                asked = {"query": ("red shoe", "wool", "garden lamp")[self.answered % 3], "filters": {"brand": "Ada"}}
                try:
                    async with session.post(f"{self.url}/api/v1/search", json=asked) as answer:
                        if answer.status != 200:
                            self.failed.append(f"{answer.status}: {(await answer.text())[:300]}")
                except aiohttp.ClientError as error:
                    self.failed.append(repr(error))
                self.answered += 1
                await asyncio.sleep(0.05)


class Drill:
    """The processes of the two releases, one replaced by the other."""

    def __init__(self, cluster: Cluster, log: EventLog) -> None:
        self.wrong: list[str] = []
        self._cluster = cluster
        self._log = log
        self._load = Load(PREFIX, products=150, seed=1)
        self._searches = Searches()
        self._running: dict[str, Service] = {}

    async def go(self, old: Release, new: Release) -> None:
        """Up and back again, under load."""
        for place in ("worker 1", "worker 2", "query", "ingest"):
            await self._replace(place, old)
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as busy:
            busy.create_task(self._load.gently(stop), name="load")
            busy.create_task(self._searches.run(stop), name="searches")
            await self._more()
            for more in (["--dry-run"], []):
                self._check(await asyncio.to_thread(command, self._cluster, new, "topics", "apply", *more), new)
            for place in ("worker 1", "worker 2", "query", "ingest"):
                await self._replace(place, new)
                await self._more()
            await self._compare(f"upgraded to {new.name}")
            await self._more()
            for place in ("ingest", "query", "worker 1", "worker 2"):
                await self._replace(place, old)
                await self._more()
            stop.set()
        await self._compare(f"back at {old.name}")
        await self._end()

    async def _replace(self, place: str, wanted: Release) -> None:
        """Start a process of `wanted`, let it take over, then end the one that had its place."""
        role = "embedder" if place.startswith("worker") else place
        began = time.monotonic()
        before = self._running.get(place)
        after = await asyncio.to_thread(self._cluster.service, role, None, CATALENS_MODEL="first", **wanted.environment)
        self._running[place] = after
        if place == "query":
            self._searches.url = after.url
        elif place == "ingest":
            self._load.urls = [after.url]
        if before is not None and (status := await asyncio.to_thread(before.stop)):
            self.wrong.append(f"the {place} that was replaced ended with status {status}")
        say(f"{place} is {wanted.name} now: {time.monotonic() - began:.1f} s")

    async def _more(self) -> None:
        """Return when some more events were accepted."""
        goal = self._load.accepted + EVENTS
        while self._load.accepted < goal:
            for place, service in self._running.items():
                if not service.running:
                    raise RuntimeError(f"{place} ended by itself:\n{service.log()[-3000:]}")
            await asyncio.sleep(0.05)

    async def _compare(self, when: str) -> None:
        """Hold the load and compare what is indexed with what was accepted."""
        self._load.may_send.clear()
        await self._log_is_still()
        async with self._cluster.index() as (index, encoder):
            wrong = await differences(self._load.ledger, index, encoder, PREFIX)
        shown = await self._shown()
        live = {name: version for name, (version, body) in self._load.ledger.contents.items() if body is not None}
        wrong += [
            f"{name}: {shown.get(name)} is shown, not {version}"
            for name, version in live.items()
            if shown.get(name) != version
        ]
        wrong += [f"{name} is shown" for name in sorted(shown.keys() - live.keys())]
        said = f"{len(live)} products live, {len(self._load.ledger.contents) - len(live)} deleted"
        say(f"{when}: {self._load.accepted:,} events accepted, {said}; {len(wrong)} differences")
        self.wrong += [f"{when}: {each}" for each in wrong]
        self._load.may_send.set()

    async def _log_is_still(self) -> None:
        """Return when nothing is on its way: what was sent was accepted, and what was accepted is worked off."""
        accepted = -1
        while accepted != self._load.accepted:
            accepted = self._load.accepted
            await asyncio.sleep(1.0)  # a request that was on its way is accepted by then, or seen in the next round
            await settled(self._log)

    async def _shown(self) -> dict[str, int]:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{self._searches.url}/api/v1/products", headers={"Accept": "application/x-ndjson"}) as answer,
        ):
            lines = [json.loads(line) for line in (await answer.text()).splitlines()]
        return {line["product_id"]: line["version"] for line in lines}

    def _check(self, done: subprocess.CompletedProcess[str], wanted: Release) -> None:
        say(f"catalens {' '.join(done.args[3:])} by {wanted.name}: status {done.returncode}")
        if done.returncode:
            self.wrong.append(done.stdout + done.stderr)

    async def _end(self) -> None:
        """End everything and look at what is left: dead letters, failed searches, errors in the logs."""
        for place, service in self._running.items():
            if status := await asyncio.to_thread(service.stop):
                self.wrong.append(f"{place} ended with status {status}")
        buried = [record async for record in self._log.scan([events.DEAD_LETTERS])]
        self.wrong += [f"dead letter of {each.key}: {each.headers.get('dlq_error')}" for each in buried]
        self.wrong += [f"search: {each}" for each in self._searches.failed]
        levels: Counter[str] = Counter()
        for service in self._cluster.services:
            for line in service.log().splitlines():
                if not line.startswith("{"):
                    self.wrong.append(f"{service.name}: {line}")
                    continue
                entry = json.loads(line)
                if entry["level"] != "info":
                    levels[f"{entry['level']} {entry['event']} {entry.get('message', '')}".strip()] += 1
                # What a library says, such as of a broker that is new and has no coordinator yet, is only counted.
                if entry["level"] in ("error", "critical") and entry["event"] != "library.warned":
                    self.wrong.append(f"{service.name}: {line[:500]}")
        say(f"{self._searches.answered:,} searches, {len(self._searches.failed)} failed; {len(buried)} dead letters")
        say(f"{self._load.repeated} requests to ingest were sent again")
        say("logged beyond info: " + (", ".join(f"{n} {what}" for what, n in sorted(levels.items())) or "nothing"))


def command(cluster: Cluster, wanted: Release, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a `catalens` command of that release."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CATALENS_")}
    return subprocess.run(
        [sys.executable, "-m", "catalens_standalone.cli", *arguments],
        env=kept | cluster.environment(**wanted.environment),
        cwd=cluster.folder,
        capture_output=True,
        text=True,
        check=False,
    )


def check_sources(wanted: Release) -> None:
    """Raise unless the processes of that release run its own sources."""
    done = subprocess.run(
        [sys.executable, "-c", "import catalens_embedder; print(catalens_embedder.__file__)"],
        env=os.environ | wanted.environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    if not Path(done.stdout.strip()).is_relative_to(wanted.folder):
        raise RuntimeError(f"{wanted.name} would run {done.stdout.strip()}")


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


async def run(cluster: Cluster, old: Release, new: Release) -> list[str]:
    """Carry it out and return what was wrong."""
    async with cluster.log() as log:
        drill = Drill(cluster, log)
        await drill.go(old, new)
    return drill.wrong


def main() -> int:
    """Carry out what the command line says and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("old", metavar="OLD", help="git ref or checkout of the release that runs")
    parser.add_argument("new", metavar="NEW", nargs="?", default=str(ROOT), help="of the one that replaces it")
    options = parser.parse_args()
    if missing := kafka_missing():
        sys.exit(f"error: {missing}")
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="upgrade-drill-")))
        old, new = release(options.old, "old", scratch), release(options.new, "new", scratch)
        for each in (old, new):
            check_sources(each)
        configure_logging(Settings(_env_file=None, log_level="warning"))  # of this process; each service has its file
        cluster = Cluster(scratch)
        stack.callback(cluster.end)
        for engine in (cluster.kafka, cluster.redis, cluster.qdrant):
            engine.start()
        install_models(scratch / "data", old.folder / "tests" / "fixtures" / "bundles" / "tiny")
        if (done := command(cluster, old, "topics", "apply")).returncode:
            sys.exit(done.stdout + done.stderr)
        wrong = asyncio.run(run(cluster, old, new))
    for line in wrong[:50]:
        say(line)
    say(f"{len(wrong)} things are wrong" if wrong else "all held")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
