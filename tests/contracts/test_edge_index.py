"""What the embedded index guarantees beyond the port: its process, its folder, kill -9 and damage."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest
import qdrant_edge as edge
import structlog
from tests.broken_worker import broken_worker

from catalens.domain import Deletion, Filter, IndexDocument, ModelSpec, Product, TombstoneWrite
from catalens.engines.edge import EdgeIndex
from catalens.errors import Misconfigured, ModelMismatch, NoFacet, StorageFull, Transient

SPEC = ModelSpec(id="test", revision="1", family="test", dimension=4, fingerprint="f" * 64)

WRITER = """
import asyncio, structlog, sys
from pathlib import Path
from catalens.domain import IndexDocument, ModelSpec, Product
from catalens.engines.edge import EdgeIndex

async def main(folder, version):
    index = await EdgeIndex.open(Path(folder), ModelSpec("test", "1", "test", 4, "f" * 64))
    print("worker", index._engine._process.pid, flush=True)
    for batch in range(10_000):
        ids = [f"r{version}-b{batch}-{n}" for n in range(16)]
        ids.append("same")
        await index.upsert([
            IndexDocument("shop", Product(product_id=i, name=f"v{version}", version=version * 10_000 + batch), "none")
            for i in ids
        ])
        print(batch, flush=True)

structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


def document(product_id: str, version: int = 1) -> IndexDocument:
    return IndexDocument("shop", Product(product_id=product_id, name="n", version=version), "none")


def worker_of(index: EdgeIndex) -> Process:
    return index._engine._process


@pytest.fixture
async def index(tmp_path: Path) -> AsyncIterator[EdgeIndex]:
    opened = await EdgeIndex.open(tmp_path / "index", SPEC)
    yield opened
    await opened.close()


async def ids(index: EdgeIndex) -> list[str]:
    return [stored.product.product_id for stored in await index.page("shop", after=None, limit=100_000, where=Filter())]


async def kill(index: EdgeIndex) -> None:
    """Kill the engine's process as kill -9 of everything would, without a word to the index."""
    worker_of(index).kill()
    await worker_of(index).wait()


async def test_a_second_opener_is_told_who_has_the_folder(index: EdgeIndex, tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="open in another process"):
        await EdgeIndex.open(tmp_path / "index", SPEC)
    assert await index.upsert([document("p")]) == ["applied"]


async def test_another_model_is_refused_and_the_way_out_named(index: EdgeIndex, tmp_path: Path) -> None:
    await index.upsert([document("p")])
    await index.close()
    with pytest.raises(ModelMismatch, match="catalens reindex"):
        await EdgeIndex.open(tmp_path / "index", replace(SPEC, fingerprint="0" * 64))
    again = await EdgeIndex.open(tmp_path / "index", SPEC)
    assert await ids(again) == ["p"]
    await again.close()


@pytest.mark.parametrize("content", [b"", b"{}", json.dumps({"format": 99, "model": {}}).encode()])
async def test_a_folder_that_this_release_cannot_read_is_refused(tmp_path: Path, content: bytes) -> None:
    await (await EdgeIndex.open(tmp_path / "index", SPEC)).close()
    (tmp_path / "index" / "meta.json").write_bytes(content)
    with pytest.raises(Misconfigured, match="catalens reindex"):
        await EdgeIndex.open(tmp_path / "index", SPEC)


async def test_a_folder_of_before_facets_goes_on_working_and_says_what_to_do(tmp_path: Path) -> None:
    first = await EdgeIndex.open(tmp_path / "index", SPEC)
    await first.upsert([document("old")])
    await first.close()
    shard = edge.EdgeShard.load(str(tmp_path / "index" / "shard"))
    marker = edge.Point(UUID(int=0), {}, {"sequence": 1})  # as the earlier release wrote it
    shard.update(edge.UpdateOperation.upsert_points([marker]))
    shard.close()
    for written in ("p", "q"):
        index = await EdgeIndex.open(tmp_path / "index", SPEC)
        try:
            assert await index.upsert([document(written)]) == ["applied"]
            with pytest.raises(NoFacet, match="catalens reindex --rebuild"):
                await index.facet("shop", [("brand", Filter())], 5)
            assert await index.facet("shop", [("image_status", Filter())], 5) == [[("none", len(await ids(index)))]]
        finally:
            await index.close()


async def test_a_creation_that_was_killed_half_way_is_begun_again(tmp_path: Path) -> None:
    partial = tmp_path / "index" / "shard.tmp" / "segments"
    partial.mkdir(parents=True)
    (partial / "rubbish").write_bytes(b"\0")
    index = await EdgeIndex.open(tmp_path / "index", SPEC)
    assert await index.upsert([document("p")]) == ["applied"]
    await index.close()


async def test_a_dead_process_is_replaced_and_no_acknowledged_write_is_lost(index: EdgeIndex) -> None:
    await index.upsert([document("p")])
    for _ in range(3):
        await kill(index)
        with contextlib.suppress(Transient):  # raised by a call that was sent before the end was seen
            await index.counts("shop")
        pages = await asyncio.gather(*(ids(index) for _ in range(5)))
        assert pages == [["p"]] * 5
    assert await index.upsert([document("p")]) == ["known"]


async def test_a_call_in_flight_raises_transient_when_its_process_dies(index: EdgeIndex) -> None:
    os.kill(worker_of(index).pid, signal.SIGSTOP)
    writing = asyncio.create_task(index.upsert([document("p")]), name="writing")
    await asyncio.sleep(0)
    assert len(index._engine._calls) == 1
    await kill(index)
    with pytest.raises(Transient):
        await writing
    assert await index.upsert([document("p")]) == ["applied"]


async def test_a_folder_that_cannot_be_opened_again_is_transient_not_a_hang(index: EdgeIndex, tmp_path: Path) -> None:
    (tmp_path / "index" / "meta.json").write_text("{")
    await kill(index)
    for _ in range(2):
        with pytest.raises(Transient):
            await index.counts("shop")


async def test_a_cancelled_caller_disturbs_nobody(index: EdgeIndex) -> None:
    os.kill(worker_of(index).pid, signal.SIGSTOP)
    impatient = asyncio.create_task(index.upsert([document("p")]), name="impatient")
    patient = asyncio.create_task(index.upsert([document("q")]), name="patient")
    await asyncio.sleep(0)
    assert len(index._engine._calls) == 2
    impatient.cancel()
    with pytest.raises(asyncio.CancelledError):
        await impatient
    os.kill(worker_of(index).pid, signal.SIGCONT)
    assert await patient == ["applied"]
    assert await ids(index) == ["p", "q"]  # what was sent is written: the caller only did not wait for it
    assert not index._engine._calls


async def test_signals_to_the_process_group_do_not_end_it(index: EdgeIndex) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker_of(index).pid, number)
    assert await index.upsert([document("p")]) == ["applied"]


async def test_after_close_nothing_answers_and_the_process_is_gone(index: EdgeIndex) -> None:
    process = worker_of(index)
    await index.close()
    assert process.returncode == 0
    with pytest.raises(Transient, match="closed"):
        await index.counts("shop")
    await index.close()


async def test_a_full_disk_refuses_the_write_and_serves_on(index: EdgeIndex, tmp_path: Path) -> None:
    await index.upsert([document("p")])
    await index.close()
    # The worker that starts next believes that no free space is enough.
    async with broken_worker(tmp_path, "128 * 1024 * 1024", "2**62"):
        full = await EdgeIndex.open(tmp_path / "index", SPEC)
    with pytest.raises(StorageFull, match="free"):
        await full.upsert([document("q")])
    assert await ids(full) == ["p"]
    await full.close()


async def test_kill_9_of_both_processes_loses_no_acknowledged_write(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    acknowledged: set[str] = set()
    newest = 0
    for version in range(1, 5):
        writer = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", WRITER, str(folder), str(version)), stdout=PIPE, stderr=asyncio.subprocess.DEVNULL
        )
        assert writer.stdout is not None
        worker = int((await writer.stdout.readline()).split()[1])
        for _ in range(random.randint(1, 40)):
            batch = int(await writer.stdout.readline())
            acknowledged.update(f"r{version}-b{batch}-{n}" for n in range(16))
            newest = version * 10_000 + batch
        if version % 2:
            os.kill(worker, signal.SIGKILL)
        writer.kill()
        rest, _ = await writer.communicate()
        for line in rest.split(b"\n")[:-1]:
            acknowledged.update(f"r{version}-b{int(line)}-{n}" for n in range(16))
            newest = version * 10_000 + int(line)

    with structlog.testing.capture_logs() as logs:
        index = await EdgeIndex.open(folder, SPEC)
    found = await ids(index)
    assert len(found) == len(set(found))
    assert acknowledged <= set(found)
    assert sum(name.startswith("r") for name in found) % 16 == 0  # a batch is whole or absent
    same = (await index.get("shop", ["same"]))["same"].product.version
    assert same is not None
    assert same >= newest
    assert "index.writes_lost" not in [entry["event"] for entry in logs]
    await index.close()


async def test_the_process_ends_with_its_parent(tmp_path: Path) -> None:
    writer = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", WRITER, str(tmp_path / "index"), "1"), stdout=PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    assert writer.stdout is not None
    await writer.stdout.readline()
    writer.kill()
    await writer.communicate()
    # The folder is free again as soon as the orphan saw its end; opening waits that long, and not longer.
    index = await EdgeIndex.open(tmp_path / "index", SPEC)
    await index.close()


async def test_a_damaged_write_ahead_log_is_said(index: EdgeIndex, tmp_path: Path) -> None:
    for number in range(20):
        await index.upsert([document(f"p{number}")])
    await kill(index)
    (segment,) = [path for path in (tmp_path / "index" / "shard" / "wal").glob("open-*") if b"p19" in path.read_bytes()]
    data = bytearray(segment.read_bytes())
    at = data.index(b"p10")
    data[at : at + 3] = b"???"
    segment.write_bytes(data)
    with structlog.testing.capture_logs() as logs:
        with contextlib.suppress(Transient):
            await index.counts("shop")
        left = await ids(index)
    assert len(left) < 20
    (said,) = [entry for entry in logs if entry["event"] == "index.writes_lost"]
    assert said["batches"] == 20 - len(left)
    assert "catalens reindex" in said["advice"]


async def test_a_write_ahead_log_that_cannot_be_read_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    index = await EdgeIndex.open(tmp_path / "index", SPEC)
    await index.upsert([document("p")])
    await kill(index)
    await index.close()
    for path in (tmp_path / "index" / "shard" / "wal").glob("open-*"):
        path.write_bytes(b"")
    with pytest.raises(Misconfigured, match="catalens reindex"):
        await EdgeIndex.open(tmp_path / "index", SPEC)


async def test_collected_tombstones_are_no_lost_writes(tmp_path: Path) -> None:
    index = await EdgeIndex.open(tmp_path / "index", SPEC)
    await index.upsert([document("p")])
    await index.delete([TombstoneWrite("shop", Deletion(product_id="p", version=2))])
    assert await index.collect_tombstones(float("inf")) == 1
    await index.close()
    with structlog.testing.capture_logs() as logs:
        again = await EdgeIndex.open(tmp_path / "index", SPEC)
    assert "index.writes_lost" not in [entry["event"] for entry in logs]
    assert (await again.counts("shop")).deleted == 0
    await again.close()
