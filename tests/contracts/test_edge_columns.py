"""The embedded index counts by columns: read once, kept by every write, and never at the price of another call."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests import naive
from tests.broken_worker import broken_worker

from catalens.domain import (
    Condition,
    Deletion,
    FacetKey,
    Filter,
    IndexDocument,
    ModelSpec,
    OfferChange,
    OfferUpdate,
    Product,
    Range,
    TombstoneWrite,
)
from catalens.engines.edge import EdgeIndex
from catalens.errors import NoFacet

SPEC = ModelSpec(id="test", revision="1", family="test", dimension=4, fingerprint="f" * 64)
TENANTS = ("shop", "other")
KEYS: Sequence[FacetKey] = ("brand", "category", "attributes.color", "in_stock", "group_id")
WHERES = (
    Filter(),
    Filter((Condition("brand", ("B1", "B2")), Condition("price", within=Range(gte=3, lt=8)))),
    Filter((Condition("attributes.size", within=Range(gt=10)), Condition("in_stock", (True,))), without_groups=("g1",)),
    Filter((Condition("attributes.color", ("red",)), Condition("product_id", ("p1", "p2", "p30"))), exclude=("p2",)),
)


class Shelf:
    """An index, and what it should have."""

    def __init__(self, index: EdgeIndex) -> None:
        self.index = index
        self.products: dict[tuple[str, str], Product] = {}
        self._draw = random.Random(1)
        self._version = 0

    async def write(self, count: int) -> None:
        """Write, change or delete so many products of either tenant."""
        draw = self._draw
        tenant = draw.choice(TENANTS)
        names = [f"p{number}" for number in draw.sample(range(40), count)]
        self._version += 1
        version = self._version
        kind = draw.choice(["upsert", "upsert", "offer", "delete"])
        if kind == "delete":
            deletions = [Deletion(product_id=name, version=version) for name in names]
            await self.index.delete([TombstoneWrite(tenant, deletion) for deletion in deletions])
            for name in names:
                self.products.pop((tenant, name), None)
        elif kind == "offer":
            names = [name for name in names if (tenant, name) in self.products]
            stock = draw.randrange(3)
            offers = [OfferChange(product_id=name, offer_version=version, stock=stock) for name in names]
            await self.index.update_offers([OfferUpdate(tenant, offer) for offer in offers])
            for name in names:
                known = self.products[tenant, name]
                self.products[tenant, name] = known.model_copy(update={"stock": stock})
        else:
            made = [self._product(name, version) for name in names]
            await self.index.upsert([IndexDocument(tenant, product, "none") for product in made])
            self.products.update({(tenant, product.product_id): product for product in made})

    def _product(self, name: str, version: int) -> Product:
        draw = self._draw
        stated: dict[str, Any] = {
            "brand": f"B{draw.randrange(5)}",
            "category": draw.choice(["Home", "Home > Bath", "Sport > Shoes"]),
            "group_id": f"g{draw.randrange(4)}",
            "attributes": {"color": draw.choice(["red", "blue", ["red", "blue"]]), "size": draw.randrange(20)},
        }
        kept = {key: value for key, value in stated.items() if draw.random() < 0.8}
        price, stock = float(draw.randrange(10)), draw.randrange(3)
        return Product(
            product_id=name, name="n", version=version, offer_version=version, price=price, stock=stock, **kept
        )

    async def check(self, wheres: Sequence[Filter] = WHERES) -> None:
        """Assert that whatever is counted is what a naive reader counts."""
        for tenant in TENANTS:
            ours = [product for (owner, _), product in self.products.items() if owner == tenant]
            under = {where: [product for product in ours if naive.matches(product, where)] for where in wheres}
            asked = [(key, where) for key in KEYS for where in wheres]
            counts = await self.index.facet(tenant, asked, 100)
            for (key, where), found in zip(asked, counts, strict=True):
                said = {(isinstance(value, bool), value): count for value, count in found}
                assert said == naive.counted(under[where], key), (key, where)
            assert list(await self.index.count(tenant, wheres)) == [len(under[where]) for where in wheres]
            for where, products in under.items():
                prices = [product.price for product in products if product.price is not None]
                extremes = await self.index.extremes(tenant, "price", where)
                assert extremes == ((min(prices), max(prices)) if prices else None)


async def test_counts_are_right_while_columns_are_read_and_products_written(tmp_path: Path) -> None:
    # Two points at a time, and only when asked.
    idle = "self._read_on(self._reading)\n            due"
    async with (
        broken_worker(tmp_path, "READ: Final = 2000", "READ: Final = 2"),
        broken_worker(tmp_path, idle, "pass\n            due"),
    ):
        index = await EdgeIndex.open(tmp_path / "index", SPEC)
    shelf = Shelf(index)
    for _ in range(12):
        await shelf.write(8)
    # Counts that are asked while others write: each reads its columns between those writes.
    reading = [
        asyncio.create_task(index.facet("shop", [(key, where)], 5), name=f"facet {key}")
        for key, where in zip(KEYS, WHERES, strict=False)
    ]
    for _ in range(20):
        await shelf.write(3)
    assert not reading[-1].done(), "no write waits until the columns are read"
    await asyncio.gather(*reading)
    await shelf.check()
    for _ in range(30):
        await shelf.write(5)
        await shelf.check(WHERES[1:2])
    await shelf.check()
    await index.close()


async def test_columns_are_there_again_after_a_restart(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    shelf = Shelf(await EdgeIndex.open(folder, SPEC))
    for _ in range(12):
        await shelf.write(8)
    await shelf.check()
    await shelf.index.close()
    async with broken_worker(tmp_path, "            self._reading = Reading(", "            raise RuntimeError("):
        shelf.index = await EdgeIndex.open(folder, SPEC)
    await shelf.check()
    await shelf.index.close()


@pytest.mark.parametrize("content", ["{", "[1, null]"])
async def test_a_damaged_memory_of_columns_costs_only_time(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "index"
    shelf = Shelf(await EdgeIndex.open(folder, SPEC))
    for _ in range(3):
        await shelf.write(8)
    await shelf.index.close()
    (folder / "columns.json").write_text(content)
    shelf.index = await EdgeIndex.open(folder, SPEC)
    await shelf.check()
    await shelf.index.close()


async def test_a_filter_beyond_the_columns_is_left_to_the_engine(tmp_path: Path) -> None:
    async with broken_worker(tmp_path, "MAX_FILTERED: Final = 32", "MAX_FILTERED: Final = 0"):
        shelf = Shelf(await EdgeIndex.open(tmp_path / "index", SPEC))
    for _ in range(12):
        await shelf.write(8)
    await shelf.check()
    await shelf.index.close()


async def test_no_more_fields_than_the_limit_are_counted(tmp_path: Path) -> None:
    async with broken_worker(tmp_path, "MAX_COLUMNS: Final = 100", "MAX_COLUMNS: Final = 2"):
        index = await EdgeIndex.open(tmp_path / "index", SPEC)
    product = Product(product_id="p", name="n", version=1, brand="B", locale="en", group_id="g")
    await index.upsert([IndexDocument("shop", product, "none")])
    two: list[tuple[FacetKey, Filter]] = [("brand", Filter()), ("locale", Filter())]
    assert await index.facet("shop", two, 5) == [[("B", 1)], [("en", 1)]]
    with pytest.raises(NoFacet, match="2 other fields"):
        await index.facet("shop", [("group_id", Filter())], 5)
    assert await index.facet("shop", two, 5) == [[("B", 1)], [("en", 1)]]
    await index.close()


async def test_columns_are_read_on_when_nobody_waits_for_them(tmp_path: Path) -> None:
    async with broken_worker(tmp_path, "READ: Final = 2000", "READ: Final = 2"):
        shelf = Shelf(await EdgeIndex.open(tmp_path / "index", SPEC))
    for _ in range(12):
        await shelf.write(8)
    assert await shelf.index._call("facet", "shop", [([], [])], [("in_stock", 0)], 5) is None
    while not (tmp_path / "index" / "columns.json").exists():
        await asyncio.sleep(0.001)
    assert await shelf.index._call("facet", "shop", [([], [])], [("in_stock", 0)], 5) is not None
    await shelf.index.close()
