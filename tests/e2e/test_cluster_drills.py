"""What an operator relies on with a cluster: two releases at work at once, and a snapshot of the index put back."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from scripts.qdrant_drill import NOTES, Nodes, reached, restore, take
from tests.cluster import ROOT, Cluster, Service, settled
from tests.kafka import need_kafka
from tests.ledger import Load, differences, everything
from tests.next_worker import UPSERTED_V2
from tests.redis_server import need_server

from catalens import events
from catalens.client import CatalensClient
from catalens.domain import Message, TopicPartition
from catalens.engines.qdrant_messages import pb
from catalens.engines.qdrant_wire import Connection
from catalens.errors import Conflict, Misconfigured, Transient
from catalens.ports import EventLog
from catalens.settings import Settings

pytestmark = pytest.mark.timeout(240)
GOLDEN = ROOT / "tests" / "fixtures" / "events"
PICTURES = {"CATALENS_PICTURES__ALLOWED_HOSTS": '["127.0.0.1"]'}  # those of the golden examples are nowhere


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    need_kafka()
    need_server()
    with Cluster(tmp_path_factory.mktemp("cluster"), partitions=3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def ingest(cluster: Cluster) -> Service:
    return cluster.service("ingest")


@pytest.fixture
async def log(cluster: Cluster) -> AsyncIterator[EventLog]:
    async with cluster.log() as log:
        yield log


@asynccontextmanager
async def worker(cluster: Cluster, module: str | None = None) -> AsyncIterator[Service]:
    """An embedder process, ended gracefully."""
    service = await asyncio.to_thread(cluster.service, "embedder", module, **PICTURES)
    try:
        yield service
    finally:  # or what comes next would have two
        status = await asyncio.to_thread(service.stop)
    assert status == 0


async def equal(cluster: Cluster, load: Load, prefix: str) -> None:
    """Fail unless the index is what the ledger says."""
    async with cluster.index() as (index, encoder):
        assert await differences(load.ledger, index, encoder, prefix) == []
    assert load.ledger.contents


# --- events of two releases -----------------------------------------------------------------------------------


def of_the_next_release(load: Load, number: int, product_id: str) -> list[Message]:
    """Return statements as a later release may write them, noted in the ledger as far as today's knows them."""
    version = load.next_version(product_id)
    headers = {"ce_specversion": "2.0", "ce_tenant": "default", "ce_dataschema": "https://example.com/v", "later": "x"}
    key = f"default|{product_id}"
    if number % 3 == 0:
        offer = {"price": float(number), "currency": "EUR", "stock": number, "offer_version": version}
        load.ledger.offered(product_id, offer)
        offer |= {"product_id": product_id, "price_per_unit": {"value": 3, "unit": "kg"}, "member_price": 2.5}
        return [Message(events.OFFERS, key, json.dumps(offer).encode(), {"ce_type": events.OFFER_CHANGED, **headers})]
    if number % 3 == 1:
        load.ledger.deleted(product_id, version)
        gone = {"product_id": product_id, "version": version, "because": {"code": 7}}
        return [Message(events.PRODUCTS, key, json.dumps(gone).encode(), {"ce_type": events.DELETED, **headers})]
    body: dict[str, Any] = {"name": f"later {number}", "version": version, "attributes": {"size": number}}
    load.ledger.upserted(product_id, body)
    body |= {"product_id": product_id, "warranty": {"years": 2}, "ratings": [5, 4]}
    return [Message(events.PRODUCTS, key, json.dumps(body).encode(), {"ce_type": events.UPSERTED, **headers})]


def of_an_unknown_type(load: Load, number: int) -> Message:
    """Return an event that only a later release knows."""
    product_id, body = f"v2-{number}", {"name": f"second {number}", "version": 1}
    load.ledger.upserted(product_id, body)
    value = json.dumps({"product_id": product_id, **body}).encode()
    return Message(events.PRODUCTS, f"default|{product_id}", value, {"ce_type": UPSERTED_V2, "ce_tenant": "default"})


def of_the_first_release() -> tuple[list[Message], dict[tuple[str, str], tuple[str, int | None]]]:
    """Return the golden examples, and of each product what is newest: its state and version, None where unstated."""
    messages, newest = [], dict[tuple[str, str], tuple[str, int | None]]()
    for path in sorted(GOLDEN.glob("*/*.json")):
        example = json.loads(path.read_text(encoding="utf-8"))
        messages.append(Message(example["topic"], example["key"], example["value"].encode(), example["headers"]))
        if path.parent.name == events.OFFER_CHANGED:
            continue
        data, tenant = example["expected"]["data"], example["expected"]["tenant"]
        product, version = (tenant, data["product_id"]), json.loads(example["value"]).get("version")
        if version is None or version > (newest.get(product, ("", 0))[1] or 0):
            newest[product] = ("deleted" if path.parent.name == events.DELETED else "live", version)
    return messages, newest


async def test_events_of_three_releases_with_one_worker_of_today(
    cluster: Cluster, log: EventLog, ingest: Service
) -> None:
    load, later = Load("mixed", products=60, seed=11), Load("v2", products=1)
    load.urls = [ingest.url]
    golden, newest = of_the_first_release()
    async with worker(cluster):
        sending = asyncio.create_task(load.run(asyncio.Event(), at_most=240), name="today's release")
        await log.append(golden)
        for number in range(90):
            await log.append(of_the_next_release(load, number, f"mixed-{number * 7 % 60}"))
            if number % 6 == 0:
                await log.append([of_an_unknown_type(later, number)])
        await sending
        await settled(log)
    await equal(cluster, load, "mixed")
    async with cluster.index() as (index, _):
        points = {(point.tenant, point.product_id): point for point in await index.export(limit=4096)}
        assert not await everything(index, "v2")
    for product, (state, version) in newest.items():
        point = points[product]
        assert (point.state, version or point.version) == (state, point.version), product
    async with CatalensClient(ingest.url) as client:
        letters, _ = await client.dead_letters({"limit": "1000"})
        assert {letter["product_id"] for letter in letters} == later.ledger.contents.keys()
        assert {(letter["reason"], letter["type"]) for letter in letters} == {("invalid_event", UPSERTED_V2)}
        assert all("unknown event type" in letter["error"] for letter in letters)
        async with worker(cluster, "tests.next_worker"):
            for letter in letters:
                await client.replay_letter(letter["id"])
            await settled(log)
        assert (await client.dead_letters({}))[0] == []
    await equal(cluster, later, "v2")
    await equal(cluster, load, "mixed")


# --- a snapshot of the index ----------------------------------------------------------------------------------


async def drill(cluster: Cluster, *arguments: str) -> tuple[int, str]:
    """Run scripts/qdrant_drill.py and return its status and what it said."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(ROOT / "scripts" / "qdrant_drill.py"), *arguments),
        cwd=cluster.folder,
        env=cluster.environment(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode()


async def collections_of(settings: Settings) -> list[str]:
    """Return the names of what the server has."""
    connection = Connection(settings.qdrant)
    collections = await connection.call(connection.collections.List, pb.ListCollectionsRequest())
    await connection.close()
    return [each.name for each in collections.collections]


async def test_the_index_is_restored_from_a_snapshot_taken_under_load(
    cluster: Cluster, log: EventLog, ingest: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load, folder, settings = Load("snap", products=80, seed=12), tmp_path / "snapshot", cluster.settings()
    load.urls = [ingest.url]
    stop = asyncio.Event()
    async with worker(cluster), reached(settings, [settings.qdrant.url]) as server:
        await load.run(stop, at_most=100)
        await settled(log)
        sending = asyncio.create_task(load.gently(stop), name="load")
        status, said = await drill(cluster, "take", str(folder))
        assert status == 0, said
        goal = load.accepted + 60
        while load.accepted < goal:
            await asyncio.sleep(0.01)
        # Beside the services it proves the snapshot, and changes nothing.
        assert await restore(settings, server, folder, replace=False)
        said = capsys.readouterr().out
        assert "nothing was changed\n" in said
        assert int(re.findall(r"(\d+) changed since", said)[0]) > 0, said
        with pytest.raises(Conflict, match=r"workers are running \(1\): stop them first"):
            await restore(settings, server, folder, replace=True)
        stop.set()
        await sending
        await settled(log)
    await equal(cluster, load, "snap")

    (name,) = await collections_of(settings)  # and the scratch collection is gone
    connection = Connection(settings.qdrant)
    await connection.call(connection.collections.Delete, pb.DeleteCollection(collection_name=name))
    await connection.close()

    status, said = await drill(cluster, "restore", str(folder), "--replace")
    assert status == 0, said
    async with worker(cluster):
        await settled(log)
    await equal(cluster, load, "snap")


async def test_a_worker_that_runs_while_the_index_is_put_back_is_noticed(
    cluster: Cluster, log: EventLog, tmp_path: Path
) -> None:
    folder, settings = tmp_path / "snapshot", cluster.settings()
    first = TopicPartition(events.PRODUCTS, 0)

    class Raced(Nodes):
        async def recover(self, url: str, collection: str, path: Path, checksum: str) -> None:
            await super().recover(url, collection, path, checksum)
            committed = await log.committed(events.EMBEDDER_GROUP, [events.PRODUCTS])
            await log.set_committed(events.EMBEDDER_GROUP, {first: committed[first] + 1})  # as a worker would

    async with reached(settings, [settings.qdrant.url]) as server:
        await take(settings, server, folder)
        with pytest.raises(Conflict, match="a worker ran while the index was put back"):
            await restore(settings, Raced(server._session, server.urls), folder, replace=True)
        assert await restore(settings, server, folder, replace=True)


async def test_a_snapshot_that_lacks_what_the_log_does_not_bring_back_is_not_put_in_service(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, settings = tmp_path / "snapshot", cluster.settings()

    class Short(Nodes):
        async def recover(self, url: str, collection: str, path: Path, checksum: str) -> None:
            await super().recover(url, collection, path, checksum)
            connection = Connection(settings.qdrant)
            every = pb.PointsSelector(filter=pb.Filter())
            request = pb.DeletePoints(collection_name=collection, wait=True, points=every)
            await connection.call(connection.points.Delete, request)
            await connection.close()

    async with reached(settings, [settings.qdrant.url]) as server:
        await take(settings, server, folder)
        assert not await restore(settings, Short(server._session, server.urls), folder, replace=True)
        said = capsys.readouterr().out
        assert "the snapshot lacks points" in said
        assert "nothing was changed: this snapshot does not hold what it should" in said
        assert await restore(settings, server, folder, replace=False)


async def test_a_snapshot_that_comes_damaged_is_not_left_on_the_server(cluster: Cluster, tmp_path: Path) -> None:
    settings, made = cluster.settings(), list[str]()

    class Cut(Nodes):
        async def ask(self, method: str, url: str, path: str, **more: Any) -> Any:
            result = await super().ask(method, url, path, **more)
            if method != "POST":
                return result
            made.append(f"{path}/{result['name']}")
            return {**result, "checksum": "0" * 64}

    async with reached(settings, [settings.qdrant.url]) as server:
        with pytest.raises(Transient, match="came damaged"):
            await take(settings, Cut(server._session, server.urls), tmp_path / "snapshot")
        (there,) = made
        with pytest.raises(Misconfigured, match="Not found: Snapshot"):
            await server.ask("GET", server.urls[0], there)
    assert await asyncio.to_thread(os.listdir, tmp_path) == []


async def test_a_damaged_snapshot_is_not_restored(cluster: Cluster, tmp_path: Path) -> None:
    folder, settings = tmp_path / "snapshot", cluster.settings()
    async with reached(settings, [settings.qdrant.url]) as server:
        taken = await take(settings, server, folder)
        notes = folder / NOTES
        written = notes.read_bytes()
        notes.write_text(json.dumps({**json.loads(written), "offsets": [[events.PRODUCTS, 0, 10**9]]}))
        with pytest.raises(Misconfigured, match=r"the log ends before the noted offsets in catalog\.products/0"):
            await restore(settings, server, folder, replace=True)
        notes.write_bytes(written)
        snapshot = folder / taken.files[0].name
        snapshot.write_bytes(snapshot.read_bytes()[:-1] + b"x")
        with pytest.raises(Misconfigured, match="the snapshot is damaged"):
            await restore(settings, server, folder, replace=True)
