"""The embedded index counts by columns: read once, kept by every write, and between other calls."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import pickle
import random
import socket
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import structlog
from tests import naive
from tests.broken_worker import broken_worker

from catalens.domain import (
    POINT_NAMESPACE,
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
from catalens.engines import edge_worker
from catalens.engines.edge import EdgeIndex
from catalens.engines.points import facet_field
from catalens.engines.rules import short_key

Call: TypeAlias = tuple[str, tuple[object, ...]]
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
    # Two points before each call, and none else.
    async with (
        broken_worker(tmp_path, "READ: Final = 100", "READ: Final = 2"),
        broken_worker(tmp_path, "STEP: Final = 0.01", "STEP: Final = 0.0"),
        broken_worker(tmp_path, "if not called or now >= self._read_again:", "if called:"),
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
    wanted = asyncio.gather(shelf.check(), *reading)
    while not wanted.done():
        await index.blobs_in_use(None, [])  # a call that the process gets each time
    await wanted
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
    async with broken_worker(tmp_path, "self._readings[tenant] = Reading(", "raise RuntimeError("):
        shelf.index = await EdgeIndex.open(folder, SPEC)
    await shelf.check()
    await shelf.index.close()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("{", id="broken"),
        pytest.param('[1, null, ["shop"], ["shop", 1], ["nobody", "in_stock"]]', id="odd"),
        pytest.param(json.dumps(["in_stock", facet_field("attributes.color")]), id="of the release before"),
        pytest.param('[["shop", "]["], ["shop", ""], ["shop", "offer"], ["shop", "tenant.x"]]', id="no columns"),
        pytest.param('[["shop", "names"]]', id="a column that needs more than itself"),
    ],
)
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
    async with broken_worker(tmp_path, "MAX_FILTERED: Final = 64", "MAX_FILTERED: Final = 0"):
        shelf = Shelf(await EdgeIndex.open(tmp_path / "index", SPEC))
    for _ in range(12):
        await shelf.write(8)
    await shelf.check()
    await shelf.index.close()


def noted(index_folder: Path) -> dict[str, list[str]]:
    """Return what columns.json says of each tenant, the column that was asked for longest ago first."""
    said: dict[str, list[str]] = {}
    for tenant, key in json.loads((index_folder / "columns.json").read_bytes()):
        said.setdefault(tenant, []).append(key)
    return said


def attributes(*names: str) -> list[tuple[FacetKey, Filter]]:
    return [(f"attributes.{name}", Filter()) for name in names]


def columns_of(*names: str) -> list[str]:
    return [facet_field(f"attributes.{name}") for name in names]


async def put(index: EdgeIndex, tenant: str, **values: str) -> None:
    product = Product(product_id="p", name="n", version=1, brand="B", attributes=dict(values))
    await index.upsert([IndexDocument(tenant, product, "none")])


async def test_the_column_that_was_asked_for_longest_ago_makes_room(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    async with broken_worker(tmp_path, "MAX_COLUMNS: Final = 100", "MAX_COLUMNS: Final = 2"):
        index = await EdgeIndex.open(folder, SPEC, answers=0)
    await put(index, "shop", a="1", b="2", c="3")
    assert await index.facet("shop", [*attributes("a", "b"), ("brand", Filter())], 5) == [
        [("1", 1)],
        [("2", 1)],
        [("B", 1)],
    ]
    assert await index.facet("shop", attributes("a"), 5) == [[("1", 1)]]
    assert await index.facet("shop", attributes("c"), 5) == [[("3", 1)]]
    assert noted(folder) == {"shop": [facet_field("brand"), *columns_of("a", "c")]}
    # What makes room is not written to any more, and read anew when it is asked for again.
    update = Product(product_id="p", name="n", version=2, attributes={"a": "4", "b": "5", "c": "6"})
    await index.upsert([IndexDocument("shop", update, "none")])
    assert await index.facet("shop", attributes("b", "c"), 5) == [[("5", 1)], [("6", 1)]]
    for _ in range(2):  # more than the limit at once
        assert await index.facet("shop", attributes("a", "b", "c"), 5) == [[("4", 1)], [("5", 1)], [("6", 1)]]
    await index.close()


async def test_what_one_tenant_counts_takes_nothing_from_another(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    index = await EdgeIndex.open(folder, SPEC)
    names = [f"a{number}" for number in range(edge_worker.MAX_COLUMNS + 20)]
    products = [
        Product(product_id=names[at], name="n", version=1, attributes=dict.fromkeys(names[at : at + 40], "x"))
        for at in range(0, len(names), 40)
    ]
    await index.upsert([IndexDocument("many", product, "none") for product in products])
    await put(index, "shop", sku="1")
    await put(index, "empty")
    await index.delete([TombstoneWrite("empty", Deletion(product_id="p", version=2))])
    assert await index.facet("shop", attributes("sku"), 5) == [[("1", 1)]]
    for at in range(0, len(names), 10):
        assert await index.facet("many", attributes(*names[at : at + 10]), 5) == [[("x", 1)]] * 10
    assert {tenant: set(keys) for tenant, keys in noted(folder).items()} == {
        "shop": set(columns_of("sku")),
        "many": set(columns_of(*names[20:])),
    }
    # Nobody else's names are told, or read, or take room: neither of who has products nor of who has none.
    invented = [f"invented{number}" for number in range(200)]
    for tenant in ("shop", "empty", "nobody"):
        for at in range(0, len(invented), 10):
            asked = attributes(*invented[at : at + 10], names[-1])
            assert await index.facet(tenant, asked, 5) == [[]] * 11
            condition = Condition(f"attributes.{names[at // 10]}", ("x",), within=Range(gte=1))
            assert await index.facet(tenant, [("in_stock", Filter((condition,)))], 5) == [[]]
    assert set(noted(folder)) == {"shop", "many"}
    assert noted(folder)["shop"] == [*columns_of("sku"), "in_stock"]
    assert set(noted(folder)["many"]) == set(columns_of(*names[20:]))
    await index.close()
    index = await EdgeIndex.open(folder, SPEC)
    assert await index.facet("shop", attributes("sku", names[0]), 5) == [[("1", 1)], []]
    assert await index.facet("shop", [("image_status", Filter())], 5) == [[("none", 1)]]
    assert set(noted(folder)["shop"]) == {*columns_of("sku"), "in_stock", "image_status"}
    await index.close()


@pytest.mark.parametrize("most", ["0", "3", "8"])
async def test_all_tenants_together_have_no_more_columns_than_the_limit(tmp_path: Path, most: str) -> None:
    folder = tmp_path / "index"
    async with (
        broken_worker(tmp_path, "MAX_COLUMNS: Final = 100", "MAX_COLUMNS: Final = 2"),
        broken_worker(tmp_path, "MAX_ALL_COLUMNS: Final = 4096", f"MAX_ALL_COLUMNS: Final = {most}"),
        broken_worker(tmp_path, "READ: Final = 100", "READ: Final = 2"),
        broken_worker(tmp_path, "STEP: Final = 0.01", "STEP: Final = 0.0"),
    ):
        shelf = Shelf(await EdgeIndex.open(folder, SPEC, answers=0))
    for _ in range(8):
        await shelf.write(8)
    # More than there is room for, asked by both at once, while either is written to.
    async with asyncio.TaskGroup() as group:
        for number in range(3):
            group.create_task(shelf.check(), name=f"check {number}")
    for _ in range(3):
        await shelf.write(4)
        await shelf.check(WHERES[:2])
    await shelf.index.facet("shop", [("image_status", Filter())], 5)  # which nobody asked for before
    assert sum(map(len, noted(folder).values())) in range(1, max(int(most), 1) + 1)
    await shelf.index.close()


async def test_who_had_columns_read_is_answered_before_others_take_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = await EdgeIndex.open(tmp_path / "index", SPEC)
    names = "abcdefgh"
    await put(index, "shop", **dict.fromkeys(names, "x"))
    await index.close()
    for limit, value in (("MAX_COLUMNS", 1), ("READ_REST", 0.0)):
        monkeypatch.setattr(edge_worker, limit, value)
    asked = [
        opening(tmp_path / "index"),
        *(("facet", ("shop", [([], [])], [(column, 0)], 5)) for column in columns_of(*names)),
        ("close", ()),
    ]
    answers = await asyncio.to_thread(conversation, asked)
    # Each of them, without being asked again, although there is room for one column.
    assert [answer for answer in answers if 1 <= answer[0] <= len(names)] == [
        (number, "ok", [[('"x"', 1)]]) for number in range(1, len(names) + 1)
    ]


@pytest.mark.parametrize(("idle", "kept"), [("600.0", "a"), ("-1.0", "b")])
async def test_a_filter_takes_the_place_of_what_nobody_asks_for(tmp_path: Path, idle: str, kept: str) -> None:
    folder = tmp_path / "index"
    async with (
        broken_worker(tmp_path, "MAX_COLUMNS: Final = 100", "MAX_COLUMNS: Final = 1"),
        broken_worker(tmp_path, "MAX_FILTERED: Final = 64", "MAX_FILTERED: Final = 1"),
        broken_worker(tmp_path, "IDLE: Final = 600.0", f"IDLE: Final = {idle}"),
    ):
        index = await EdgeIndex.open(folder, SPEC)
    await put(index, "shop", a="1", b="2")
    for name, value in (("a", "1"), ("b", "2"), ("b", "1")):
        where = Filter((Condition(f"attributes.{name}", (value,)),))
        assert await index.facet("shop", [("brand", where)], 5) == [[("B", 1)] if (name, value) != ("b", "1") else []]
    assert set(noted(folder)["shop"]) == {facet_field("brand"), *columns_of(kept)}
    await index.close()


@pytest.mark.parametrize(("numbers", "kept"), [("64", True), ("0", False)])
async def test_what_every_product_may_have_is_always_worth_a_column(tmp_path: Path, numbers: str, kept: bool) -> None:
    folder = tmp_path / "index"
    async with (
        broken_worker(tmp_path, "MAX_FILTERED: Final = 64", "MAX_FILTERED: Final = 0"),
        broken_worker(tmp_path, "MAX_NUMBER_INDEXES: Final = 64", f"MAX_NUMBER_INDEXES: Final = {numbers}"),
    ):
        shelf = Shelf(await EdgeIndex.open(folder, SPEC))
    for _ in range(12):
        await shelf.write(8)
    await shelf.index.facet("shop", [("in_stock", where) for where in WHERES], 5)
    always = {"in_stock", "offer.price", facet_field("brand"), facet_field("group_id")}
    size = {f"numbers.{short_key('size')}"} if kept else set()
    assert {tenant: set(keys) for tenant, keys in noted(folder).items()} == {"shop": always | size}
    await shelf.index.close()


async def test_columns_are_read_on_when_nobody_waits_for_them(tmp_path: Path) -> None:
    async with broken_worker(tmp_path, "READ: Final = 100", "READ: Final = 2"):
        shelf = Shelf(await EdgeIndex.open(tmp_path / "index", SPEC))
    for _ in range(12):
        await shelf.write(8)
    gone = asyncio.create_task(shelf.index.facet("shop", [("in_stock", Filter())], 5), name="facet")
    await shelf.index.counts("shop")  # which is asked after it
    gone.cancel()
    while not (tmp_path / "index" / "columns.json").exists():
        await asyncio.sleep(0.001)
    assert await shelf.index._call("facet", "shop", [([], [])], [("in_stock", 0)], 5) is not None
    await shelf.index.close()


@pytest.mark.parametrize("name", ["columns.tmp", "columns.json"])
async def test_what_cannot_be_noted_is_counted_all_the_same(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "index"
    (folder / name).mkdir(parents=True)
    with structlog.testing.capture_logs() as logs:
        shelf = Shelf(await EdgeIndex.open(folder, SPEC))
        for _ in range(3):
            await shelf.write(8)
        await shelf.check()
        await shelf.index.close()
    warnings = [entry for entry in logs if entry["log_level"] != "info"]
    assert warnings
    assert {entry["event"] for entry in warnings} == {"index.columns_not_noted"}


async def test_true_and_one_are_two_conditions(tmp_path: Path) -> None:
    index = await EdgeIndex.open(tmp_path / "index", SPEC)
    made = [
        Product(product_id=f"p{number}", name="n", version=1, brand=f"B{number}", attributes={"flag": flag})
        for number, flag in enumerate([True, 1, 1.0])
    ]
    await index.upsert([IndexDocument("shop", product, "none") for product in made])
    wheres = [Filter((Condition("attributes.flag", (flag,)),)) for flag in (True, 1)]
    assert await index.count("shop", wheres) == [1, 2]
    counted = await index.facet("shop", [("brand", where) for where in wheres], 5)
    assert counted == [[("B0", 1)], [("B1", 1), ("B2", 1)]]
    assert await index.count("shop", wheres) == [1, 2], "by columns"
    await index.close()


@pytest.mark.parametrize(
    ("step", "rest", "counts"),
    [
        pytest.param(0.0, 1e12, None, id="calls that wait go first"),
        pytest.param(0.0, 0.0, 29, id="a column is read however many calls wait"),
        pytest.param(1e12, 0.0, 0, id="a step ends by its time"),
    ],
)
async def test_calls_that_wait_are_answered_between_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: float, rest: float, counts: int | None
) -> None:
    index = await EdgeIndex.open(tmp_path / "index", SPEC)
    made = [Product(product_id=f"p{number}", name="n", version=1, brand="B") for number in range(60)]
    await index.upsert([IndexDocument("shop", product, "none") for product in made])
    await index.close()
    for name, value in (("READ", 2), ("STEP", step), ("READ_REST", rest)):
        monkeypatch.setattr(edge_worker, name, value)
    facet, calls = 1, range(2, 50)
    asked = [
        opening(tmp_path / "index"),
        ("facet", ("shop", [([], [])], [(facet_field("brand"), 0)], 5)),
        *(("counts", ("shop",)) for _ in calls),
        ("close", ()),
    ]
    answered = [number for number, _, _ in await asyncio.to_thread(conversation, asked)]
    assert [number for number in answered if number != facet] == [0, *calls, len(asked) - 1]
    # Before the second call the first step is done, before each other one the next.
    assert (answered.index(facet) - 1 if facet in answered else None) == counts


def opening(index_folder: Path) -> Call:
    return "open", (str(index_folder), asdict(SPEC), POINT_NAMESPACE.bytes, 1_000_000)


def conversation(asked: Sequence[Call]) -> list[tuple[int, str, Any]]:
    """Return which are answered, in that order, and what, of calls that wait all at once: so no step is between two of
    them that finds nobody waiting."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for number, (method, arguments) in enumerate(asked):
            body = pickle.dumps((method, arguments))
            ours.sendall(edge_worker.CALL.pack(len(body), number) + body)
        edge_worker.serve(theirs)
        gc.unfreeze()
        theirs.close()
        answers = []
        with contextlib.suppress(EOFError):
            while True:
                length, number, kind = edge_worker.ANSWER.unpack(edge_worker._read(ours, edge_worker.ANSWER.size))
                value = pickle.loads(edge_worker._read(ours, length))  # noqa: S301  # of a worker that runs here
                answers.append((number, kind.decode(), value))
        return answers


async def test_tenants_columns_are_read_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = await EdgeIndex.open(tmp_path / "index", SPEC)
    for tenant, count in (("large", 60), ("small", 4)):
        made = [Product(product_id=f"p{number}", name="n", version=1, brand="B") for number in range(count)]
        await index.upsert([IndexDocument(tenant, product, "none") for product in made])
    await index.close()
    for name, value in (("READ", 2), ("STEP", 0.0), ("READ_REST", 0.0)):
        monkeypatch.setattr(edge_worker, name, value)
    large, small = 1, 2
    facet: tuple[object, ...] = ([([], [])], [(facet_field("brand"), 0)], 5)
    asked = [
        opening(tmp_path / "index"),
        ("facet", ("large", *facet)),
        ("facet", ("small", *facet)),
        *(("counts", ("small",)) for _ in range(50)),
        ("close", ()),
    ]
    answered = [number for number, _, _ in await asyncio.to_thread(conversation, asked)]
    # One step before each call: two of the small one's products in each other step, so in the fourth it has all.
    assert answered.index(small) < 6
    assert answered.index(large) > 30


async def test_what_a_call_waits_with_is_not_taken_by_another_tenant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = await EdgeIndex.open(tmp_path / "index", SPEC)
    for tenant, count in (("large", 60), ("small", 2)):
        made = [
            Product(product_id=f"p{number}", name="n", version=1, offer_version=1, brand="B", stock=1)
            for number in range(count)
        ]
        await index.upsert([IndexDocument(tenant, product, "none") for product in made])
    await index.close()
    for name, value in (("READ", 2), ("STEP", 0.0), ("READ_REST", 0.0), ("MAX_ALL_COLUMNS", 1)):
        monkeypatch.setattr(edge_worker, name, value)
    brand, stock = (facet_field("brand"), 0), ("in_stock", 0)
    step: Call = ("counts", ("large",))  # before each call there is one
    asked: list[Call] = [
        opening(tmp_path / "index"),
        ("facet", ("large", [([], [])], [brand], 5)),
        *[step] * 40,
        ("facet", ("large", [([], [])], [brand, stock], 5)),
        ("facet", ("small", [([], [])], [brand], 5)),
        *[step] * 40,  # too few to read the large one's twice
        ("close", ()),
    ]
    answers = {number: value for number, _, value in await asyncio.to_thread(conversation, asked)}
    assert [answers.get(number) for number, (method, _) in enumerate(asked) if method == "facet"] == [
        [[('"B"', 60)]],
        [[('"B"', 60)], [(1, 60)]],
        [[('"B"', 2)]],
    ]
