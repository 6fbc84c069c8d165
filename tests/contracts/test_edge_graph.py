"""The embedded index's graph: built in a copy while the index serves, and never at the price of a write."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from structlog.testing import capture_logs
from tests.broken_worker import broken_worker

from catalens.domain import (
    Condition,
    Deletion,
    Filter,
    ImageUpdate,
    IndexDocument,
    Leg,
    ModelSpec,
    OfferChange,
    OfferUpdate,
    PointState,
    Product,
    Range,
    SparseVector,
    TombstoneWrite,
)
from catalens.engines.edge import EdgeIndex
from catalens.errors import Misconfigured, Transient

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from catalens.domain import Embedding

DIMENSION = 16
SPEC = ModelSpec("test", "1", "test", DIMENSION, "f" * 64)
NEVER = 2**62
EARLY = 200
EXACT = Filter()
RARE = Filter((Condition("brand", ("rare",)),))  # one in twenty
SINGLE = Filter((Condition("brand", ("single",)),))
LATE = Filter((Condition("attributes.size", within=Range(lte=11)),))  # 240 of 600, and the graph has no links for it


def vector(draw: random.Random) -> Embedding:
    values = np.array([draw.gauss(0, 1) for _ in range(DIMENSION)], dtype=np.float32)
    return (values / np.linalg.norm(values)).astype(np.float32)


def document(number: int, version: int, draw: random.Random) -> IndexDocument:
    brand = "single" if number == 7 else "rare" if number % 20 == 0 else "common"
    name = f"p{number}"
    product = Product(product_id=name, name="n", brand=brand, attributes={"size": number % 30}, version=version)
    words = SparseVector((1, 2 + number % 7), (1.0, 1 + number / 1000))  # no ties
    return IndexDocument("shop", product, "ok", image=vector(draw), text=vector(draw), lexical=words)


async def fill(index: EdgeIndex, count: int) -> None:
    draw = random.Random(1)
    await index.upsert([document(number, 1, draw) for number in range(count)])


async def told(logs: Sequence[MutableMapping[str, Any]], event: str, times: int = 1) -> MutableMapping[str, Any]:
    """Wait until the log has the event, so many times, and return the last."""
    while len(found := [entry for entry in logs if entry["event"] == event]) < times:
        assert not [entry for entry in logs if entry["event"] == "index.optimise_failed" != event], logs
        await asyncio.sleep(0.01)
    return found[-1]


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("shard*"))


def graphs(folder: Path) -> int:
    segments = [json.loads(path.read_bytes()) for path in folder.glob("shard*/segments/*/segment.json")]
    return sum(one["config"]["vector_data"]["image"]["index"]["type"] == "hnsw" for one in segments)


async def everything(index: EdgeIndex) -> list[PointState]:
    return list(await index.export(limit=100_000, with_vectors=True))


def same(one: Iterable[PointState], other: Iterable[PointState]) -> None:
    """The same points with the same vectors, whenever they were written."""
    for ours, theirs in zip(one, other, strict=True):
        assert replace(ours, vectors={}, indexed_at=0) == replace(theirs, vectors={}, indexed_at=0)
        assert ours.vectors.keys() == theirs.vectors.keys()
        for name, values in ours.vectors.items():
            np.testing.assert_allclose(values, theirs.vectors[name], atol=1e-6)


async def test_an_index_of_the_first_format_gets_a_graph_that_finds_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    index = await EdgeIndex.open(folder, SPEC, graph_from=NEVER)
    await fill(index, 600)
    draw = random.Random(2)
    words = Leg("lexical", SparseVector((3,), (1.0,)), 40)
    asked = [
        ([Leg("image", vector(draw), 40), Leg("text", vector(draw), 40), words], where)
        for where in (EXACT, LATE, RARE, SINGLE)
        for _ in range(20)
    ]
    exact = [await index.search("shop", legs, where) for legs, where in asked]
    before = await everything(index)
    await index.close()
    assert graphs(folder) == 0
    meta = json.loads((folder / "meta.json").read_bytes())
    assert meta.keys() == {"format", "model"}
    assert meta["format"] == 1, "as the release before made it, and can still read it"
    with capture_logs() as logs:
        index = await EdgeIndex.open(folder, SPEC, graph_from=EARLY)
        await told(logs, "index.optimised")
    assert graphs(folder) == 1
    found = [await index.search("shop", legs, where) for legs, where in asked]
    for where in (EXACT, LATE, RARE, SINGLE):
        pairs = [
            ({hit.product_id for hit in one}, {hit.product_id for hit in other})
            for (_, asked_where), ours, theirs in zip(asked, exact, found, strict=True)
            if asked_where == where
            for one, other in zip(ours, theirs, strict=True)
        ]
        assert sum(len(one & other) for one, other in pairs) >= 0.99 * sum(len(one) for one, _ in pairs)
    # A list that is shorter than its limit is complete, whatever the graph can reach.
    for where, count in ((EXACT, 600), (LATE, 240), (RARE, 30), (SINGLE, 1)):
        (hits,) = await index.search("shop", [Leg("image", asked[0][0][0].vector, 1000)], where)
        assert len(hits) == count
    same(await everything(index), before)
    await index.close()
    meta = json.loads((folder / "meta.json").read_bytes())
    assert meta["format"] == 2, "the release before must not take it for an empty one"
    assert [meta["shard"]] == shards(folder)
    # What is not where meta.json says is never begun anew beside it, nor cleared away.
    (folder / "meta.json").unlink()
    with pytest.raises(Misconfigured, match="catalens reindex"):
        await EdgeIndex.open(folder, SPEC)
    assert [meta["shard"]] == shards(folder)


async def test_fewer_points_than_the_threshold_stay_exact(tmp_path: Path) -> None:
    index = await EdgeIndex.open(tmp_path / "index", SPEC, graph_from=EARLY)
    with capture_logs() as logs:
        await fill(index, EARLY - 1)
        await index.flush()
        assert not logs
        await index.upsert([document(EARLY, 1, random.Random())])
        await told(logs, "index.optimise_started")
    await index.close()
    assert shards(tmp_path / "index") == ["shard"], "what a close interrupts leaves nothing behind"


async def test_whatever_is_written_meanwhile_is_kept(tmp_path: Path) -> None:
    index = await EdgeIndex.open(tmp_path / "index", SPEC, graph_from=EARLY)
    plain = await EdgeIndex.open(tmp_path / "plain", SPEC, graph_from=NEVER)
    draw = random.Random(3)

    async def write(version: int) -> None:
        numbers = [draw.randrange(300) for _ in range(draw.randrange(1, 5))]
        kind = draw.randrange(5)
        calls: list[tuple[str, list[Any]]] = [
            ("upsert", [document(number, version, draw) for number in numbers]),
            ("delete", [TombstoneWrite("shop", Deletion(product_id=f"p{n}", version=version)) for n in numbers]),
            (
                "update_offers",
                [
                    OfferUpdate("shop", OfferChange(product_id=f"p{number}", price=1.0, offer_version=version))
                    for number in numbers
                ],
            ),
            ("update_images", [ImageUpdate("shop", f"p{number}", 1, "ok", image=vector(draw)) for number in numbers]),
        ]
        if kind == 4:
            await asyncio.gather(*(one.collect_tombstones(float("inf")) for one in (index, plain)))
            return
        method, items = calls[kind]
        ours, theirs = await asyncio.gather(*(getattr(one, method)(items) for one in (index, plain)))
        assert ours == theirs

    with capture_logs() as logs:
        await asyncio.gather(fill(index, 250), fill(plain, 250))
        version = 2
        while "index.optimised" not in [entry["event"] for entry in logs]:
            await write(version)
            version += 1
        swapped = version
        while version < swapped + 20:
            await write(version)
            version += 1
    same(await everything(index), await everything(plain))
    assert await index.counts("shop") == await plain.counts("shop")
    await index.close()
    with capture_logs() as logs:
        index = await EdgeIndex.open(tmp_path / "index", SPEC, graph_from=EARLY)
    assert "index.writes_lost" not in [entry["event"] for entry in logs]
    same(await everything(index), await everything(plain))
    await asyncio.gather(index.close(), plain.close())


async def test_kill_9_while_the_copy_is_optimised(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    index = await EdgeIndex.open(folder, SPEC, graph_from=EARLY)
    with capture_logs() as logs:
        await fill(index, 250)
        helper = (await told(logs, "index.optimise_started"))["process"]
        while len(shards(folder)) < 2:
            await asyncio.sleep(0.001)
        os.kill(helper, signal.SIGSTOP)  # within the copy or after it: it does not get further, and no search waits
        before = await everything(index)
        index._engine._process.kill()
        await index.close()
        index = await EdgeIndex.open(folder, SPEC, graph_from=NEVER)
        same(await everything(index), before)
    assert "index.writes_lost" not in [entry["event"] for entry in logs]
    assert shards(folder) == ["shard"]
    await index.close()
    while _runs(helper):  # it does not outlive the process that it works for
        await asyncio.sleep(0.01)


KILL = "os.kill(os.getpid(), signal.SIGKILL)"
REPLACED = "    partial.replace(path)\n"
CLOSED = "        old.close()\n"


@pytest.mark.parametrize(
    ("old", "new", "optimised"),
    [
        (REPLACED, f"    if meta['format'] == OPTIMISED:\n        {KILL}\n{REPLACED}", False),
        (CLOSED, f"{CLOSED}        shutil.rmtree(old_folder / 'wal')\n        {KILL}\n", True),
    ],
    ids=["before the new shard counts", "while the old one is removed"],
)
async def test_kill_9_within_the_swap(tmp_path: Path, old: str, new: str, *, optimised: bool) -> None:
    folder = tmp_path / "index"
    index = await EdgeIndex.open(folder, SPEC, graph_from=NEVER)
    await fill(index, 250)
    before = await everything(index)
    await index.close()
    async with broken_worker(tmp_path, old, new):
        index = await EdgeIndex.open(folder, SPEC, graph_from=EARLY)
    await index._engine._process.wait()
    await index.close()
    assert len(shards(folder)) == 2
    with capture_logs() as logs:
        index = await EdgeIndex.open(folder, SPEC, graph_from=NEVER)
        same(await everything(index), before)
    assert "index.writes_lost" not in [entry["event"] for entry in logs]
    (left,) = shards(folder)
    assert (left != "shard") is optimised
    assert await index.upsert([document(3, 2, random.Random())]) == ["applied"]
    await index.close()


async def test_an_optimisation_that_fails_is_said_and_costs_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    index = await EdgeIndex.open(folder, SPEC, graph_from=EARLY)
    with capture_logs() as logs:
        await fill(index, 250)
        os.kill((await told(logs, "index.optimise_started"))["process"], signal.SIGKILL)
        assert "-9" in (await told(logs, "index.optimise_failed"))["error"]
    assert shards(folder) == ["shard"]
    assert await index.upsert([document(3, 2, random.Random())]) == ["applied"]
    await index.close()


async def test_without_room_for_a_copy_none_is_made(tmp_path: Path) -> None:
    index = await EdgeIndex.open(tmp_path / "index", SPEC, graph_from=NEVER)
    await fill(index, 250)
    await index.close()
    with capture_logs() as logs:
        async with broken_worker(tmp_path, "128 * 1024 * 1024", "2**62"):
            index = await EdgeIndex.open(tmp_path / "index", SPEC, graph_from=EARLY)
        assert (await told(logs, "index.optimise_skipped"))["needed_mib"] >= 2**42
    assert len(await everything(index)) == 250
    assert shards(tmp_path / "index") == ["shard"]
    await index.close()


async def test_it_is_optimised_again_when_much_was_written_since(tmp_path: Path) -> None:
    index = await EdgeIndex.open(tmp_path / "index", SPEC, graph_from=EARLY)
    with capture_logs() as logs:
        await fill(index, 250)
        first = await told(logs, "index.optimised")
        draw = random.Random(4)
        await index.upsert([document(number, 2, draw) for number in range(40)])
        # A restart does not forget how many there were.
        index._engine._process.kill()
        await index._engine._process.wait()
        with contextlib.suppress(Transient):  # raised by a call that was sent before the end was seen
            await index.counts("shop")
        await index.upsert([document(number, 2, draw) for number in range(40, 50)])
        second = await told(logs, "index.optimised", 2)
    assert first["loose"] == 0
    assert [entry["loose"] for entry in logs if entry["event"] == "index.optimise_started"] == [250, 50]
    assert second["loose"] == 0
    await index.close()


def _runs(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


async def test_a_number_that_got_its_index_after_the_graph_is_found_through_others(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)

    def near(centres: Embedding, noise: float) -> Embedding:
        found = centres + draw.normal(size=centres.shape, scale=noise / DIMENSION**0.5)
        units: Embedding = (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)
        return units

    centres = near(np.zeros((20, DIMENSION), dtype=np.float32), 1)
    vectors = near(centres[draw.integers(20, size=2000)], 0.9)
    documents = [
        IndexDocument(
            "shop", Product(product_id=f"p{n}", name="n", version=1, attributes={"size": n % 100}), "ok", image=image
        )
        for n, image in enumerate(vectors)
    ]
    index = await EdgeIndex.open(tmp_path / "index", SPEC, graph_from=NEVER)
    await index.upsert(documents)
    await index.close()
    with capture_logs() as logs:
        index = await EdgeIndex.open(tmp_path / "index", SPEC, graph_from=EARLY)
        await told(logs, "index.optimised")
    small = Filter((Condition("attributes.size", within=Range(lt=12)),))
    under = np.array([n for n in range(2000) if n % 100 < 12])
    shares = []
    for query in near(centres, 0.45):
        (hits,) = await index.search("shop", [Leg("image", query, 20)], small)
        best = {f"p{n}" for n in under[np.argsort(vectors[under] @ query)[-20:]]}
        shares.append(len(best.intersection(hit.product_id for hit in hits)) / 20)
    assert sum(shares) >= 0.95 * len(shares)  # without ACORN far fewer: its links end at what the filter excludes
    await index.close()
