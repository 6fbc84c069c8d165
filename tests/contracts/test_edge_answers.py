"""What the embedded index answers again without asking its process, and that no write is ever missed by it."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from catalens.domain import (
    Deletion,
    Filter,
    ImageUpdate,
    IndexDocument,
    Leg,
    ModelSpec,
    OfferChange,
    OfferUpdate,
    Product,
    StoredProduct,
    TombstoneWrite,
)
from catalens.engines.edge import EdgeIndex
from catalens.errors import Transient

SPEC = ModelSpec(id="test", revision="1", family="test", dimension=4, fingerprint="f" * 64)
ALL = Filter()
NEAR = np.array([1, 0, 0, 0], np.float32)


@pytest.fixture
async def index(tmp_path: Path) -> AsyncIterator[EdgeIndex]:
    opened = await EdgeIndex.open(tmp_path / "index", SPEC)
    await opened.upsert([document("p"), document("q")])
    yield opened
    await opened.close()


def document(product_id: str, version: int = 1, name: str = "n") -> IndexDocument:
    product = Product(product_id=product_id, name=name, brand="b", price=9, version=version, offer_version=1)
    return IndexDocument("shop", product, "pending", text=NEAR)


@contextmanager
def halted(index: EdgeIndex) -> Iterator[None]:
    """The process stands still: nothing that it is asked is answered before the end."""
    pid = index._engine._process.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):  # killed meanwhile
            os.kill(pid, signal.SIGCONT)


async def names(index: EdgeIndex) -> list[tuple[str, str]]:
    page = await index.page("shop", after=None, limit=100, where=ALL)
    return [(stored.product.product_id, stored.product.name) for stored in page]


async def everything(index: EdgeIndex) -> list[Any]:
    def said(stored: StoredProduct) -> StoredProduct:
        return replace(stored, vectors=dict(sorted(stored.vectors.items())))  # which come in no order

    found = [
        await index.search("shop", [Leg("text", NEAR, 10)], ALL),
        {name: said(one) for name, one in (await index.get("shop", ["p", "q", "new"], with_vectors=True)).items()},
        await index.facts("shop", ["p", "q", "new"]),
        await index.count("shop", [ALL]),
        await index.facet("shop", [("brand", ALL), ("image_status", ALL)], 5),
        await index.extremes("shop", "price", ALL),
        await index.page("shop", after=None, limit=100, where=ALL),
        [said(one) for one in await index.sample("shop", 10)],
        await index.counts("shop"),
    ]
    # As text, since vectors cannot be compared; mappings have no order.
    return [repr(sorted(one.items()) if isinstance(one, dict) else one) for one in found]


async def test_what_was_asked_before_is_answered_without_the_process(index: EdgeIndex) -> None:
    first = await everything(index)
    with halted(index):
        assert await everything(index) == first


WRITES: list[Callable[[EdgeIndex], Awaitable[Any]]] = [
    lambda index: index.upsert([document("new")]),
    lambda index: index.upsert([document("p", 2, "renamed")]),
    lambda index: index.update_images([ImageUpdate("shop", "p", 1, "ok", image=NEAR)]),
    lambda index: index.update_offers([OfferUpdate("shop", OfferChange(product_id="p", price=3, offer_version=2))]),
    lambda index: index.delete([TombstoneWrite("shop", Deletion(product_id="p", version=2))]),
]


@pytest.mark.parametrize("write", WRITES)
async def test_a_write_is_seen_by_whatever_is_asked_after_it(
    index: EdgeIndex, tmp_path: Path, write: Callable[[EdgeIndex], Awaitable[Any]]
) -> None:
    before = await everything(index)
    assert await write(index) == ["applied"]
    after = await everything(index)
    assert after != before
    await index.close()
    again = await EdgeIndex.open(tmp_path / "index", SPEC)
    assert await everything(again) == after
    await again.close()


async def test_forgotten_tombstones_are_counted_no_more(index: EdgeIndex) -> None:
    await index.delete([TombstoneWrite("shop", Deletion(product_id="p", version=2))])
    assert (await index.counts("shop")).deleted == 1
    assert await index.collect_tombstones(older_than=time.time() + 1) == 1
    assert (await index.counts("shop")).deleted == 0


async def test_what_many_ask_at_once_is_asked_once(index: EdgeIndex) -> None:
    with halted(index):
        asking = [asyncio.create_task(names(index), name=f"asking {n}") for n in range(5)]
        await asyncio.sleep(0)
        assert len(index._engine._calls) == 1
    assert await asyncio.gather(*asking) == [[("p", "n"), ("q", "n")]] * 5


async def test_who_goes_away_takes_the_answer_from_nobody(index: EdgeIndex) -> None:
    with halted(index):
        first, *others = [asyncio.create_task(names(index), name=f"asking {n}") for n in range(3)]
        await asyncio.sleep(0)
        others.pop().cancel()
        first.cancel()
        await asyncio.wait([first])
    assert [await one for one in others] == [[("p", "n"), ("q", "n")]]
    assert first.cancelled()


async def test_what_all_wait_for_fails_for_all_and_is_asked_anew(index: EdgeIndex) -> None:
    with halted(index):
        asking = [asyncio.create_task(names(index), name=f"asking {n}") for n in range(3)]
        await asyncio.sleep(0)
        index._engine._process.kill()
    failed = await asyncio.gather(*asking, return_exceptions=True)
    assert [type(error) for error in failed] == [Transient] * 3
    assert await names(index) == [("p", "n"), ("q", "n")]


@pytest.mark.parametrize("patient", [True, False])
async def test_an_answer_of_before_a_write_is_not_given_after_it(index: EdgeIndex, patient: bool) -> None:
    with halted(index):
        before = asyncio.create_task(names(index), name="before")
        await asyncio.sleep(0)
        writing = asyncio.create_task(index.upsert([document("p", 2, "renamed")]), name="writing")
        await asyncio.sleep(0)
        if not patient:  # it is stored all the same
            writing.cancel()
        after = asyncio.create_task(names(index), name="after")
        await asyncio.sleep(0)
    await asyncio.wait([writing])
    assert await before == [("p", "n"), ("q", "n")]
    assert await after == await names(index) == [("p", "renamed"), ("q", "n")]


async def test_the_answers_that_are_kept_have_their_room(tmp_path: Path) -> None:
    index = await EdgeIndex.open(tmp_path / "index", SPEC, answers=4000)
    await index.upsert([document(f"{number}") for number in range(20)])
    for number in range(20):
        await index.get("shop", [f"{number}"])
        await names(index)  # too large to be kept
    assert 3000 < sum(len(asked) + len(told) for asked, told in index._answers._kept.items()) <= 4000
    await index.get("shop", ["0"])  # long forgotten
    with halted(index):
        for kept in ("0", "19"):
            assert list(await index.get("shop", [kept])) == [kept]
    await index.close()


async def test_who_is_closed_remembers_nothing(index: EdgeIndex) -> None:
    await names(index)
    await index.close()
    with pytest.raises(Transient, match="closed"):
        await names(index)
