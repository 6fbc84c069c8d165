"""Snapshots of the index on a Qdrant server: taken, proved and put back, each step said with what it found.

    python scripts/qdrant_drill.py take FOLDER [--node URL]…
    python scripts/qdrant_drill.py restore FOLDER [--node URL]… [--replace]

reads CATALENS_QDRANT__*, CATALENS_KAFKA__* and what else the services read. `take` may run beside them. `restore` makes
a scratch collection of the snapshot, compares it with the live index and deletes it again; with `--replace` and no
worker running it then makes the snapshot the current index and lets the workers read again what came since.

A snapshot has the shards of the node that is asked: a cluster needs one `--node` (the REST address) for each of its
nodes. Run in the tests against Qdrant's engine behind the same routes, not against a Qdrant server.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, TypeAlias
from urllib.parse import quote
from uuid import UUID

import aiohttp
import numpy as np
from pydantic import TypeAdapter, ValidationError

from catalens import events
from catalens.domain import IndexInfo, PointState, TopicPartition
from catalens.engines import EngineRoom
from catalens.engines.backup import growing_folder
from catalens.engines.qdrant import QdrantIndex
from catalens.engines.qdrant_messages import pb
from catalens.engines.qdrant_wire import Connection, to_payload
from catalens.errors import CatalensError, Conflict, Misconfigured, Transient
from catalens.ports import EventLog, Indexes, VectorIndex
from catalens.settings import Settings, load_settings
from catalens.telemetry import configure_logging

FORMAT: Final = 1
NOTES: Final = "snapshot.json"
SCRATCH: Final = "drill"
"""Behind the alias and a hyphen: no name that the services look for."""
NOBODY: Final = f"{events.REINDEX_GROUPS}drill"
"""A group that never read anything: its lag is the length of the log."""
ABOUT: Final = 0.9
"""Of the points that were noted, which Qdrant counts roughly, so many are to be found where nothing can be compared."""
PAGE: Final = 256
SLICES: Final = 16
"""Places of the index, evenly apart, from which vectors are compared; point ids are hashes."""
SLICE: Final = 64
_CHUNK: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class File:
    """The snapshot of one node."""

    name: str
    node: str
    """Its REST address when it was taken."""
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Taken:
    """What `take` wrote beside the snapshots."""

    format: int
    taken: float
    """Unix seconds, before the first snapshot."""
    collection: str
    about: str
    """What the collection says of itself: by what model it was built."""
    index: IndexInfo
    points: int
    offsets: list[tuple[str, int, int]]
    """Topic, partition and offset from which the workers had still to read before the first snapshot."""
    files: list[File]


_NOTES: Final = TypeAdapter(Taken)
_Tally: TypeAlias = Counter[str]


class Nodes:
    """The nodes of one Qdrant server or cluster, over REST; every refusal is raised with the node's words."""

    def __init__(self, session: aiohttp.ClientSession, urls: Sequence[str]) -> None:
        self.urls = urls
        self._session = session

    async def check(self) -> None:
        """Raise Misconfigured unless the nodes are all that there are of one cluster, each named once."""
        peers: set[str] = set()
        named: list[str] = []
        for url in self.urls:
            found = await self.ask("GET", url, "/cluster")
            if found["status"] == "disabled":
                if len(self.urls) > 1:
                    raise Misconfigured(f"{url} is a server by itself and not a node of a cluster: name it alone")
                named.append(url)
                peers.add(url)
            else:
                named.append(str(found["peer_id"]))
                peers.update(found["peers"])
        if sorted(named) != sorted(peers):
            raise Misconfigured(
                f"the cluster has the nodes {', '.join(sorted(peers))}; --node names {', '.join(named)}: name each "
                "once, by its own address and not by a load balancer's"
            )

    async def take(self, url: str, collection: str, folder: Path) -> File:
        """Take a snapshot at that node, copy it into `folder`, compare it with its checksum, delete it there."""
        path = f"/collections/{quote(collection)}/snapshots"
        made = await self.ask("POST", url, path)
        there = f"{path}/{quote(made['name'])}"
        try:
            fetched = await self._fetch(url, there, folder / made["name"], made.get("checksum"))
        except BaseException:  # whatever it is: copies that nobody fetches would fill the server's disk
            try:
                await self.ask("DELETE", url, there)
            except CatalensError as error:
                say(f"{made['name']} was left at {url}: {error}")
            raise
        await self.ask("DELETE", url, there)
        return fetched

    async def _fetch(self, url: str, there: str, place: Path, checksum: str | None) -> File:
        async with self._calling("GET", url, there) as answer:
            await _refused(answer, url)
            size = 0
            with place.open("wb") as out:
                async for chunk in answer.content.iter_chunked(_CHUNK):
                    size += await asyncio.to_thread(out.write, chunk)
        found = await asyncio.to_thread(_sha256, place)
        if checksum not in (None, found):
            raise Transient(f"{place} came damaged from {url}: its SHA-256 is {found}, not {checksum}")
        return File(place.name, url, size, found)

    async def recover(self, url: str, collection: str, path: Path, checksum: str) -> None:
        """Make that node's part of `collection` what the snapshot holds, whatever is there."""
        query = f"?wait=true&priority=snapshot&checksum={checksum}"
        with path.open("rb") as file:
            form = aiohttp.FormData()
            form.add_field("snapshot", file, filename=path.name, content_type="application/octet-stream")
            await self.ask("POST", url, f"/collections/{quote(collection)}/snapshots/upload{query}", data=form)

    async def ask(self, method: str, url: str, path: str, **more: Any) -> Any:
        """Return the `result` of an answer."""
        async with self._calling(method, url, path, **more) as answer:
            await _refused(answer, url)
            return (await answer.json())["result"]

    @asynccontextmanager
    async def _calling(self, method: str, url: str, path: str, **more: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        try:
            async with self._session.request(method, url.rstrip("/") + path, **more) as answer:
                yield answer
        except aiohttp.ClientError as error:
            raise Transient(f"Qdrant at {url} does not answer REST: {error}") from error


async def _refused(answer: aiohttp.ClientResponse, url: str) -> None:
    if answer.status in (401, 403):
        raise Misconfigured(f"Qdrant at {url} does not let us in: see CATALENS_QDRANT__API_KEY")
    if not answer.ok:
        raise Misconfigured(f"Qdrant at {url} refuses {answer.method} {answer.url.path}: {(await answer.text())[:500]}")


def _sha256(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


# --- take ---------------------------------------------------------------------------------------------------------


async def take(settings: Settings, nodes: Nodes, folder: Path) -> Taken:
    """Write snapshots of the current index and where to read on from into `folder`, which must not exist.

    Whole or absent: it grows beside `folder` and takes its name at the end.
    """
    with growing_folder(folder) as growing:
        async with opened(settings) as (log, indexes, connection):
            info = await indexes.current()
            if info is None:
                raise Misconfigured(f"there is no index behind the alias {settings.qdrant.collection}")
            name = f"{settings.qdrant.collection}-{info.name}"
            described = await connection.collection(name)
            if described is None:
                raise Misconfigured(f"the collection {name} went away")
            began = time.time()
            offsets = await log.committed(events.EMBEDDER_GROUP, events.CONSUMED)
            say(f"offsets: {len(offsets)} partitions, noted before the snapshot: what comes from now on is read again")
            files = []
            for url in nodes.urls:
                files.append(await nodes.take(url, name, growing))
                say(f"snapshot: {files[-1].name}, {files[-1].bytes:,} bytes from {url}, with the server's SHA-256")
        taken = Taken(
            format=FORMAT,
            taken=began,
            collection=name,
            about=described.config.metadata["catalens"].string_value,
            index=info,
            points=described.points_count,
            offsets=[(place.topic, place.partition, offset) for place, offset in sorted(offsets.items())],
            files=files,
        )
        (growing / NOTES).write_bytes(_NOTES.dump_json(taken, indent=2) + b"\n")
    say(f"{folder}: {name} of model {info.model}, about {taken.points:,} points")
    return taken


# --- restore ------------------------------------------------------------------------------------------------------


async def restore(settings: Settings, nodes: Nodes, folder: Path, *, replace: bool) -> bool:
    """Prove the snapshot in `folder` by a scratch collection; with `replace` make it the current index.

    Returns whether it held. Raises Conflict if a worker runs that would write meanwhile, Misconfigured.
    """
    taken = _read(folder, nodes)
    age = (time.time() - taken.taken) / 3600
    say(f"{folder}: {taken.collection} of model {taken.index.model}, taken {_when(taken.taken)}, {age:.1f} hours ago")
    if age > settings.log.retention_hours:
        say(
            f"warning: older than {settings.log.retention_hours} hours: an offer of before then that stated only some "
            "fields may be lost where a newer one was compacted over it; reconcile afterwards"
        )
    for file in taken.files:
        if await asyncio.to_thread(_sha256, folder / file.name) != file.sha256:
            raise Misconfigured(f"the snapshot is damaged: {folder / file.name} has another SHA-256 than noted")
    say(f"files: {len(taken.files)} with the SHA-256 that was noted")
    async with opened(settings) as (log, indexes, connection):
        behind = await _since(log, taken)
        say(f"log: {sum(behind.values()):,} records after the noted offsets, which the workers will read again")
        if replace and (members := await log.members(events.EMBEDDER_GROUP)):
            raise Conflict(f"workers are running ({members}): stop them first (scale to zero and pause the scaler)")
        scratch = f"{settings.qdrant.collection}-{SCRATCH}"
        await _delete(connection, scratch)
        try:
            index = await _recover(nodes, connection, taken, folder, scratch)
            held = await _prove(log, indexes, index, taken)
        finally:
            await _delete(connection, scratch)
        say(f"scratch: {scratch} deleted")
        if not replace or not held:
            say("nothing was changed" + ("" if held else ": this snapshot does not hold what it should"))
            return held
        # Offsets first: killed in between, events are read again for nothing; the other way round, never again.
        await log.set_committed(events.EMBEDDER_GROUP, await _offsets(log, taken))
        say(f"offsets: the group {events.EMBEDDER_GROUP} goes on from where it was when the snapshot was taken")
        back = await log.committed(events.EMBEDDER_GROUP, events.CONSUMED)
        await _recover(nodes, connection, taken, folder, taken.collection)
        ran = await log.members(events.EMBEDDER_GROUP)
        if ran or back != await log.committed(events.EMBEDDER_GROUP, events.CONSUMED):
            raise Conflict(
                "a worker ran while the index was put back, and what it wrote is gone: stop it, and repeat this"
            )
        if (current := await indexes.current()) not in (None, taken.index):
            say(f"the index of {current.model} was current until now; reindex --model {current.model} goes back to it")
        await indexes.switch(taken.index)
        say(f"alias: {settings.qdrant.collection} names {taken.collection}; start the workers")
    return True


def _read(folder: Path, nodes: Nodes) -> Taken:
    try:
        taken = _NOTES.validate_json((folder / NOTES).read_bytes())
    except FileNotFoundError:
        raise Misconfigured(f"{folder} has no {NOTES}: it was not written by `take`, or not to its end") from None
    except ValidationError as error:
        raise Misconfigured(f"{folder / NOTES} is damaged: {error.errors()[0]['msg']}") from error
    if taken.format != FORMAT:
        raise Misconfigured(f"{folder} has format {taken.format}, this release reads {FORMAT}")
    if len(nodes.urls) != len(taken.files):
        raise Misconfigured(
            f"{len(taken.files)} nodes were noted, {len(nodes.urls)} are named: each needs its own file"
        )
    return taken


async def _offsets(log: EventLog, taken: Taken) -> dict[TopicPartition, int]:
    """Return where to read on from; partitions that came since are read from their beginning."""
    noted = {TopicPartition(topic, partition): offset for topic, partition, offset in taken.offsets}
    return {place: noted.get(place, 0) for place in await log.committed(events.EMBEDDER_GROUP, events.CONSUMED)}


async def _since(log: EventLog, taken: Taken) -> dict[TopicPartition, int]:
    """Return the records after the noted offsets; raises Misconfigured if the log ends before them."""
    earliest = await log.committed(NOBODY, events.CONSUMED)
    length = await log.lag(NOBODY, events.CONSUMED)
    noted = await _offsets(log, taken)
    since = {place: earliest[place] + length[place] - max(earliest[place], noted[place]) for place in noted}
    if early := [f"{place.topic}/{place.partition}" for place, count in since.items() if count < 0]:
        raise Misconfigured(
            f"the log ends before the noted offsets in {', '.join(sorted(early))}: it is another log, or was restored "
            "from before the snapshot. Make the index of the log itself: catalens reindex --rebuild"
        )
    return since


async def _recover(nodes: Nodes, connection: Connection, taken: Taken, folder: Path, collection: str) -> VectorIndex:
    """Make `collection` of the snapshots and return it."""
    for url, file in zip(nodes.urls, taken.files, strict=True):
        await nodes.recover(url, collection, folder / file.name, file.sha256)
        say(f"restored: {file.name} into {collection} at {url}")
    described = await connection.collection(collection)
    if described is None:
        raise Misconfigured(f"Qdrant took the snapshot, and there is no collection {collection}")
    if described.config.metadata["catalens"].string_value != taken.about:
        request = pb.UpdateCollection(collection_name=collection, metadata=to_payload({"catalens": taken.about}))
        await connection.call(connection.collections.Update, request)
        say("metadata: it was not in the snapshot, or another's; written from the notes")
        described = await connection.collection(collection)
    return QdrantIndex(connection, collection, taken.index.spec, described)


async def _delete(connection: Connection, collection: str) -> None:
    await connection.call(connection.collections.Delete, pb.DeleteCollection(collection_name=collection))


async def _prove(log: EventLog, indexes: Indexes, restored: VectorIndex, taken: Taken) -> bool:
    """Compare with the live index of the same model, if there is one; False if the snapshot is wrong."""
    if taken.index not in await indexes.all():
        found = 0
        async for _ in _points(restored):
            found += 1
        say(f"points: {found:,} can be read, about {taken.points:,} were noted; there is no live index to compare with")
        return found >= ABOUT * taken.points
    live = await indexes.open(taken.index)
    try:
        tally = await _compare(_points(restored), _points(live))
        say("points: " + ", ".join(f"{count:,} {kind}" for kind, count in sorted(tally.items())))
        same, other = await _compare_vectors(restored, live)
        say(f"vectors: {same:,} of a sample are equal, {other:,} are not")
    finally:
        await live.close()
    if tally["newer than live"] or tally["only in the snapshot"]:
        say("the live index lacks what the snapshot has: it lost something, or forgot deletions that are old enough")
    # Read again, since workers may run: no more points can be new than the log brings back.
    back = sum((await _since(log, taken)).values())
    if lost := tally["written since"] > back:
        say(f"the snapshot lacks points: {tally['written since']:,} are not in it, and the log has {back:,} since")
    return not tally["different"] and not other and not lost


async def _compare(restored: AsyncIterator[PointState], live: AsyncIterator[PointState]) -> _Tally:
    """Count what became of the points, both in ascending order of their ids."""
    tally: _Tally = Counter()
    ours, theirs = await anext(restored, None), await anext(live, None)
    while ours is not None or theirs is not None:
        if theirs is None or (ours is not None and ours.point.int < theirs.point.int):
            tally["only in the snapshot"] += 1
            ours = await anext(restored, None)
        elif ours is None or theirs.point.int < ours.point.int:
            tally["written since"] += 1
            theirs = await anext(live, None)
        else:
            tally[_relation(ours, theirs)] += 1
            ours, theirs = await anext(restored, None), await anext(live, None)
    return tally


def _relation(restored: PointState, live: PointState) -> str:
    content = (live.version or 0) - (restored.version or 0)
    offer = _offer_version(live) - _offer_version(restored)
    if content < 0 or offer < 0:
        return "newer than live"
    if content == 0 and (restored.state, restored.product) != (live.state, live.product):
        return "different"
    if offer == 0 and restored.offer != live.offer:
        return "different"
    return "equal" if content == offer == 0 else "changed since"


def _offer_version(point: PointState) -> int:
    return (point.offer.offer_version if point.offer else None) or 0


async def _compare_vectors(restored: VectorIndex, live: VectorIndex) -> tuple[int, int]:
    """Return how many vectors of unchanged products are equal and how many are not, in a sample."""
    same = other = 0
    for number in range(SLICES):
        after = UUID(int=(number << 128) // SLICES)
        theirs = {point.point: point for point in await live.export(after=after, limit=SLICE, with_vectors=True)}
        for ours in await restored.export(after=after, limit=SLICE, with_vectors=True):
            point = theirs.get(ours.point)
            if point is None or (ours.version, ours.image_status) != (point.version, point.image_status):
                continue
            if ours.vectors.keys() != point.vectors.keys():
                other += 1
            for tower in ours.vectors.keys() & point.vectors.keys():
                equal = np.allclose(ours.vectors[tower], point.vectors[tower], atol=1e-6)
                same, other = (same + 1, other) if equal else (same, other + 1)
    return same, other


async def _points(index: VectorIndex) -> AsyncIterator[PointState]:
    after: UUID | None = None
    while page := await index.export(after=after, limit=PAGE):
        for point in page:
            yield point
        after = page[-1].point


# --- the process --------------------------------------------------------------------------------------------------


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[tuple[EventLog, Indexes, Connection]]:
    """Open the log, the indexes and a connection of our own."""
    connection = Connection(settings.qdrant)
    try:
        async with EngineRoom(settings) as room:
            yield await room.log(), await room.indexes(), connection
    finally:
        await connection.close()


@asynccontextmanager
async def reached(settings: Settings, urls: Sequence[str]) -> AsyncIterator[Nodes]:
    """The nodes at `urls`, which are all that there are; raises as Nodes.check."""
    key = settings.qdrant.api_key
    headers = {"api-key": key.get_secret_value()} if key else {}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=settings.qdrant.timeout)  # a large snapshot takes its time
    async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
        nodes = Nodes(session, urls)
        await nodes.check()
        yield nodes


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def _when(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds")


async def main(arguments: Iterable[str]) -> bool:
    """Do what the command line says; returns whether all held."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("step", choices=("take", "restore"))
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--node",
        action="append",
        metavar="URL",
        help="REST address of a node, each once; default: CATALENS_QDRANT__URL",
    )
    parser.add_argument("--replace", action="store_true", help="restore: make the snapshot the current index")
    options = parser.parse_args([*arguments])
    settings = load_settings()
    if not (settings.qdrant.url and settings.kafka.bootstrap_servers):
        raise Misconfigured(
            "this is for a cluster: set CATALENS_QDRANT__URL and CATALENS_KAFKA__BOOTSTRAP_SERVERS as its services do; "
            "one process is copied by catalens backup"
        )
    # What the engines log is not what this says: only their warnings.
    configure_logging(settings.model_copy(update={"log_level": "warning"}))
    async with reached(settings, options.node or [settings.qdrant.url]) as nodes:
        if options.step == "take":
            await take(settings, nodes, options.folder)
            return True
        return await restore(settings, nodes, options.folder, replace=options.replace)


if __name__ == "__main__":
    try:
        sys.exit(0 if asyncio.run(main(sys.argv[1:])) else 1)
    except CatalensError as failure:
        sys.exit(f"error: {failure}")
