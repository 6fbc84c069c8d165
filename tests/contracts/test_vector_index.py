"""What every VectorIndex adapter must do; another adapter joins by another case of the `adapter` fixture."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests import naive

from catalens.domain import (
    MAX_VERSION,
    Condition,
    Deletion,
    Facts,
    Filter,
    ImageRef,
    ImageStatus,
    ImageUpdate,
    IndexCounts,
    IndexDocument,
    Leg,
    ModelSpec,
    OfferChange,
    OfferUpdate,
    Product,
    Range,
    SparseVector,
    StoredProduct,
    Tag,
    TombstoneWrite,
    VectorName,
    WriteOutcome,
    point_id,
)
from catalens.engines.edge import EdgeIndex
from catalens.engines.qdrant import QdrantIndex
from catalens.errors import InvalidEvent
from catalens.ports import VectorIndex

if TYPE_CHECKING:
    from catalens.domain import Embedding

DIMENSION = 8
SPEC = ModelSpec(id="test", revision="1", family="test", dimension=DIMENSION, fingerprint="f" * 64)
ALL = Filter()
SHOP = "shop"
BLOB = "0123456789abcdef" * 4

Open = Callable[[], Awaitable[VectorIndex]]
_tenants = (f"example-{number}" for number in itertools.count())


@pytest.fixture(params=["edge", "qdrant"])
def adapter(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Opens the index under test; a second call, after close, opens the same data."""
    if request.param == "qdrant":
        qdrant = request.getfixturevalue("qdrant_settings")

    async def open_index() -> VectorIndex:
        if request.param == "qdrant":
            return await QdrantIndex.open(qdrant, SPEC)
        return await EdgeIndex.open(tmp_path / "index", SPEC)

    return open_index


@pytest.fixture
async def index(adapter: Open) -> AsyncIterator[VectorIndex]:
    opened = await adapter()
    yield opened
    await opened.close()


def vector(*values: float) -> Embedding:
    """Return a unit vector that starts with `values`."""
    padded = np.zeros(DIMENSION, dtype=np.float32)
    padded[: len(values)] = values
    return (padded / np.linalg.norm(padded)).astype(np.float32)


def terms(**weights: float) -> SparseVector:
    """Return a lexical vector whose terms are named by one letter each."""
    return SparseVector(tuple(ord(name) for name in weights), tuple(weights.values()))


def document(
    product_id: str = "p",
    version: int = 1,
    *,
    tenant: str = SHOP,
    image: Embedding | None = None,
    text: Embedding | None = None,
    lexical: SparseVector | None = None,
    image_status: ImageStatus = "none",
    **fields: Any,  # of Product
) -> IndexDocument:
    product = Product(**{"product_id": product_id, "name": f"{product_id} v{version}", "version": version, **fields})
    return IndexDocument(
        tenant=tenant, product=product, image_status=image_status, image=image, text=text, lexical=lexical
    )


def offer(product_id: str, offer_version: int, *, tenant: str = SHOP, **fields: Any) -> OfferUpdate:
    return OfferUpdate(tenant, OfferChange(product_id=product_id, offer_version=offer_version, **fields))


def tombstone(product_id: str, version: int, *, tenant: str = SHOP) -> TombstoneWrite:
    return TombstoneWrite(tenant, Deletion(product_id=product_id, version=version))


async def one(index: VectorIndex, product_id: str = "p", *, tenant: str = SHOP) -> StoredProduct | None:
    return (await index.get(tenant, [product_id], with_vectors=True)).get(product_id)


async def live(index: VectorIndex, product_id: str = "p") -> StoredProduct:
    found = await one(index, product_id)
    assert found is not None
    return found


async def nearest(
    index: VectorIndex,
    using: VectorName,
    query: Embedding | SparseVector,
    where: Filter = ALL,
    *,
    tenant: str = SHOP,
    limit: int = 100,
) -> dict[str, float]:
    (hits,) = await index.search(tenant, [Leg(using, query, limit)], where)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    return {hit.product_id: hit.score for hit in hits}


# --- contents and their versions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("second", "outcome", "kept"),
    [(6, "applied", 6), (5, "known", 5), (4, "superseded", 5), (MAX_VERSION, "applied", MAX_VERSION)],
)
async def test_newest_content_wins(index: VectorIndex, second: int, outcome: WriteOutcome, kept: int) -> None:
    assert await index.upsert([document(version=5, name="first")]) == ["applied"]
    assert await index.upsert([document(version=second, name="second")]) == [outcome]
    stored = await live(index)
    assert stored.product.version == kept
    assert stored.product.name == ("second" if outcome == "applied" else "first")


async def test_a_batch_that_names_a_product_twice_is_as_if_written_one_by_one(index: VectorIndex) -> None:
    batch = [document(version=3), document("other"), document(version=2), document(version=3), document(version=4)]
    assert await index.upsert(batch) == ["applied", "applied", "superseded", "known", "applied"]
    assert (await live(index)).product.version == 4
    assert await index.counts(SHOP) == IndexCounts(products=2, images_pending=0, deleted=0, offers_only=0)


async def test_an_empty_batch_is_no_error(index: VectorIndex) -> None:
    assert list(await index.upsert([])) == []
    assert list(await index.update_offers([])) == []
    assert list(await index.update_images([])) == []
    assert list(await index.delete([])) == []
    assert list(await index.search(SHOP, [], ALL)) == []
    assert dict(await index.get(SHOP, [])) == {}


async def test_a_new_content_replaces_all_of_the_old_one(index: VectorIndex) -> None:
    old = document(
        version=1,
        image=vector(1),
        text=vector(1),
        lexical=terms(a=1),
        image_status="ok",
        brand="Old",
        attributes={"x": 1},
    )
    await index.upsert([old])
    await index.upsert(
        [document(version=2, text=vector(0, 1), image_status="pending", images=[{"url": "https://e.org/1"}])]
    )
    stored = await live(index)
    assert stored.product == document(version=2, images=[{"url": "https://e.org/1"}]).product
    assert (stored.image_status, set(stored.vectors)) == ("pending", {"text"})
    assert await nearest(index, "image", vector(1)) == {}
    assert await nearest(index, "lexical", terms(a=1)) == {}
    assert await nearest(index, "text", vector(0, 1), Filter((Condition("brand", ("Old",)),))) == {}


async def test_what_is_stored_comes_back_as_it_was(index: VectorIndex) -> None:
    before = time.time()
    product = Product(
        product_id="a.b:c_d-1",
        name="Tab\there, nul\x00, bell\x07, newline\n, 👟🏽, عربى, e\u0301",
        description="long " * 4000,
        brand='quote " and \\ backslash',
        category="Sport > Shoes",
        price=1e308,
        currency="EUR",
        stock=MAX_VERSION,
        offer_version=MAX_VERSION,
        version=MAX_VERSION - 1,
        images=(ImageRef(url="https://example.org/1.jpg"), ImageRef(blob=BLOB)),
        attributes={
            "color": "red",
            'dots.and[0]."quotes"\x01': "yes",
            "whole": 12,
            "real": 12.5,
            "tiny": 5e-324,
            "flag": True,
            "many": ["a", "b", ""],
            "none": [],
            "big": MAX_VERSION,
        },
        group_id="g",
        url="https://example.org/p",
        locale="fr-FR",
    )
    await index.upsert(
        [IndexDocument(SHOP, product, "ok", image=vector(1, 2), text=vector(2, 1), lexical=terms(a=1.5))]
    )
    stored = await live(index, product.product_id)
    assert stored.product == product
    assert stored.product.model_dump(exclude_unset=True) == product.model_dump(exclude_unset=True)
    assert (stored.tenant, stored.image_status, stored.image_error) == (SHOP, "ok", None)
    assert before <= stored.indexed_at <= time.time()
    np.testing.assert_allclose(stored.vectors["image"], vector(1, 2), atol=1e-6)
    np.testing.assert_allclose(stored.vectors["text"], vector(2, 1), atol=1e-6)
    assert not (await index.get(SHOP, [product.product_id]))[product.product_id].vectors


async def test_a_vector_that_is_none_is_refused_and_nothing_of_its_batch_is_written(index: VectorIndex) -> None:
    broken = vector(1)
    broken[3] = np.nan
    for bad in (broken, np.ones(DIMENSION + 1, dtype=np.float32)):
        with pytest.raises(InvalidEvent):
            await index.upsert([document("good"), document("bad", image=bad)])
        with pytest.raises(InvalidEvent):
            await index.search(SHOP, [Leg("image", bad, 10)], ALL)
    with pytest.raises(InvalidEvent):
        await index.upsert([document("bad", lexical=terms(a=float("inf")))])
    assert (await index.counts(SHOP)).products == 0


# --- tombstones ---------------------------------------------------------------------------------------------------


async def test_deleted_stays_deleted_until_a_newer_content(index: VectorIndex) -> None:
    full = document(version=5, image=vector(1), text=vector(1), lexical=terms(a=1), image_status="ok", brand="B")
    await index.upsert([full])
    assert await index.delete([tombstone("p", 4)]) == ["superseded"]
    assert await index.delete([tombstone("p", 5)]) == ["known"]
    assert await one(index) is not None
    assert await index.delete([tombstone("p", 6), tombstone("p", 6)]) == ["applied", "known"]
    assert await index.upsert([replace(full, product=full.product.model_copy(update={"version": 5}))]) == ["superseded"]
    assert await index.upsert([document(version=6)]) == ["known"]
    assert await one(index) is None
    assert list(await index.page(SHOP, after=None, limit=10, where=ALL)) == []
    for using, query in (("image", vector(1)), ("text", vector(1)), ("lexical", terms(a=1))):
        assert await nearest(index, using, query) == {}  # type: ignore[arg-type]  # the literals above
    assert await index.counts(SHOP) == IndexCounts(products=0, images_pending=0, deleted=1, offers_only=0)
    assert await index.upsert([document(version=7, name="again", text=vector(1))]) == ["applied"]
    assert (await live(index)).product.name == "again"
    assert (await nearest(index, "text", vector(1))).keys() == {"p"}
    assert await index.counts(SHOP) == IndexCounts(products=1, images_pending=0, deleted=0, offers_only=0)


async def test_deleting_what_never_came_refuses_what_is_older(index: VectorIndex) -> None:
    assert await index.delete([tombstone("p", 6)]) == ["applied"]
    assert await index.upsert([document(version=5)]) == ["superseded"]
    assert await one(index) is None


async def test_tombstones_are_collected_by_age_and_alone(index: VectorIndex) -> None:
    await index.upsert([document("kept"), document("gone")])
    await index.update_offers([offer("lone", 1, price=1.0)])
    before = time.time()
    await index.delete([tombstone("gone", 2), tombstone("never", 2)])
    after = time.time()
    await index.update_offers([offer("gone", 9, price=3.0)])  # makes the tombstone no younger
    assert await index.collect_tombstones(before) == 0
    assert await index.upsert([document("gone", 1)]) == ["superseded"]
    assert await index.collect_tombstones(after) == 2
    assert await index.counts(SHOP) == IndexCounts(products=1, images_pending=0, deleted=0, offers_only=1)
    assert await index.upsert([document("gone", 1)]) == ["applied"]
    assert await index.collect_tombstones(time.time() + 1) == 0


# --- offers -------------------------------------------------------------------------------------------------------


def offer_of(stored: StoredProduct) -> tuple[float | None, str | None, int | None, int | None]:
    product = stored.product
    return product.price, product.currency, product.stock, product.offer_version


async def test_an_offer_merges_the_fields_it_sets_if_it_is_newer(index: VectorIndex) -> None:
    await index.upsert(
        [document(image=vector(1), text=vector(0, 1), lexical=terms(a=1), image_status="ok", stock=0, offer_version=1)]
    )
    assert await index.update_offers([offer("p", 2, price=10.0, currency="EUR")]) == ["applied"]
    assert offer_of(await live(index)) == (10.0, "EUR", 0, 2)
    assert await index.update_offers([offer("p", 2, price=11.0), offer("p", 1, price=12.0)]) == ["known", "superseded"]
    assert offer_of(await live(index)) == (10.0, "EUR", 0, 2)
    assert await index.update_offers([offer("p", 4, price=None), offer("p", 3, stock=7)]) == ["applied", "applied"]
    assert await index.update_offers([offer("p", 3, stock=7), offer("p", 2, stock=8)]) == ["superseded", "superseded"]
    stored = await live(index)
    assert offer_of(stored) == (None, "EUR", 7, 4)
    assert stored.image_status == "ok"
    np.testing.assert_allclose(stored.vectors["image"], vector(1), atol=1e-6)
    np.testing.assert_allclose(stored.vectors["text"], vector(0, 1), atol=1e-6)
    assert (await nearest(index, "lexical", terms(a=1), Filter((Condition("in_stock", (True,)),)))).keys() == {"p"}


async def test_an_offer_before_its_product_waits_hidden_and_joins_it(index: VectorIndex) -> None:
    assert await index.update_offers([offer("p", 5, price=9.5, stock=1)]) == ["applied"]
    assert await one(index) is None
    assert list(await index.page(SHOP, after=None, limit=10, where=ALL)) == []
    assert list(await index.page(SHOP, after=None, limit=10, where=Filter((Condition("price", (9.5,)),)))) == []
    assert await index.counts(SHOP) == IndexCounts(products=0, images_pending=0, deleted=0, offers_only=1)
    assert await index.upsert([document()]) == ["applied"]
    assert offer_of(await live(index)) == (9.5, None, 1, 5)
    assert await index.counts(SHOP) == IndexCounts(products=1, images_pending=0, deleted=0, offers_only=0)


async def test_a_product_carries_its_offer_by_the_offers_own_version(index: VectorIndex) -> None:
    await index.upsert([document(version=1, price=1.0, offer_version=5)])
    await index.upsert([document(version=2, price=2.0, offer_version=4)])
    assert offer_of(await live(index)) == (1.0, None, None, 5)
    await index.upsert([document(version=3)])
    assert offer_of(await live(index)) == (1.0, None, None, 5)
    assert await index.upsert([document(version=2, stock=3, offer_version=6)]) == ["superseded"]
    stored = await live(index)
    assert (stored.product.version, offer_of(stored)) == (3, (1.0, None, 3, 6))


async def test_a_deleted_products_offer_is_kept_and_joins_its_return(index: VectorIndex) -> None:
    await index.upsert([document(version=1, price=1.0, currency="EUR", offer_version=1)])
    await index.delete([tombstone("p", 2)])
    assert await index.update_offers([offer("p", 2, stock=4)]) == ["applied"]
    assert await one(index) is None
    assert (await index.counts(SHOP)).deleted == 1
    await index.upsert([document(version=3)])
    assert offer_of(await live(index)) == (1.0, "EUR", 4, 2)


# --- pictures -----------------------------------------------------------------------------------------------------


async def test_a_picture_joins_the_very_version_it_was_fetched_for(index: VectorIndex) -> None:
    pending = document(
        version=2, text=vector(1), lexical=terms(a=1), image_status="pending", price=3.0, offer_version=1
    )
    await index.upsert([pending, document("gone", 2, image_status="pending")])
    await index.delete([tombstone("gone", 3)])
    assert (await index.counts(SHOP)).images_pending == 1
    late = [
        ImageUpdate(SHOP, product_id, version, "ok", image=vector(0, 1))
        for product_id, version in (("p", 1), ("p", 3), ("gone", 2), ("gone", 3), ("unknown", 1))
    ]
    assert await index.update_images(late) == ["superseded"] * 5
    assert await nearest(index, "image", vector(0, 1)) == {}
    assert await index.update_images([ImageUpdate(SHOP, "p", 2, "ok", image=vector(0, 1))]) == ["applied"]
    stored = await live(index)
    assert (stored.image_status, stored.image_error, offer_of(stored)[0]) == ("ok", None, 3.0)
    assert (await nearest(index, "image", vector(0, 1))).keys() == {"p"}
    assert (await nearest(index, "text", vector(1))).keys() == {"p"}
    assert (await nearest(index, "lexical", terms(a=1))).keys() == {"p"}
    assert await index.counts(SHOP) == IndexCounts(products=1, images_pending=0, deleted=1, offers_only=0)


async def test_a_picture_that_failed_says_why(index: VectorIndex) -> None:
    await index.upsert([document(version=2, text=vector(1), image_status="pending")])
    assert await index.update_images([ImageUpdate(SHOP, "p", 2, "failed", "404")]) == ["applied"]
    stored = await live(index)
    assert (stored.image_status, stored.image_error, set(stored.vectors)) == ("failed", "404", {"text"})
    await index.update_images([ImageUpdate(SHOP, "p", 2, "ok", image=vector(1))])
    stored = await live(index)
    assert (stored.image_status, stored.image_error, set(stored.vectors)) == ("ok", None, {"text", "image"})


async def test_tags_are_found_shown_and_replaced_with_the_picture(index: VectorIndex) -> None:
    made = document(version=2, text=vector(1), image_status="pending", brand="Acme", attributes={"color": "red"})
    await index.upsert([replace(made, tags={"color": Tag("blue", 0.5), "kind": Tag("shoe", 1.0)}), document("q")])
    stored = await live(index)
    assert stored.tags == {"color": Tag("blue", 0.5), "kind": Tag("shoe", 1.0)}

    async def under(key: str, *values: str | int) -> list[str]:
        where = Filter(conditions=(Condition(key, values),))
        return [one.product.product_id for one in await index.page(SHOP, after=None, limit=9, where=where)]

    assert await under("tags.color", "blue", "green") == await under("tags.kind", "shoe") == ["p"]
    assert (
        await under("tags.color", "red")
        == await under("attributes.color", "blue")
        == await under("tags.color", 5)
        == []
    )
    assert await under("attributes.color", "red") == ["p"]
    ok = ImageUpdate(SHOP, "p", 2, "ok", image=vector(0, 1))
    await index.update_images([replace(ok, tagged=(made.product, {"color": Tag("green", 0.9)}))])
    assert (await live(index)).tags == {"color": Tag("green", 0.9)}
    assert (await under("tags.color", "green"), await under("tags.color", "blue")) == (["p"], [])
    assert await under("brand", "Acme") == await under("attributes.color", "red") == ["p"]
    await index.update_images([ok])
    assert (await live(index)).tags == {"color": Tag("green", 0.9)}
    await index.update_images([replace(ok, tagged=(made.product, {}))])
    assert (await live(index)).tags == {}
    assert await under("tags.color", "green") == []
    bare = document("bare", image_status="pending")
    await index.upsert([replace(bare, tags={"color": Tag("green", 0.9)})])
    assert await under("tags.color", "green") == ["bare"]
    await index.update_images([ImageUpdate(SHOP, "bare", 1, "ok", image=vector(0, 1), tagged=(bare.product, {}))])
    assert (await live(index, "bare")).tags == {}
    assert await under("tags.color", "green") == []
    await index.upsert([document(version=3)])
    assert (await live(index)).tags == {}


async def test_blobs_in_use_are_those_that_live_products_name(index: VectorIndex) -> None:
    references = [f"{number:064x}" for number in range(5)]
    await index.upsert(
        [
            document("a", images=[{"blob": references[0]}, {"url": "https://e.org/x"}, {"blob": references[1]}]),
            document("b", tenant="elsewhere", images=[{"blob": references[2]}]),
            document("c", images=[{"blob": references[3]}]),
        ]
    )
    await index.delete([tombstone("c", 2)])
    assert await index.blobs_in_use(None, references) == set(references[:3])
    assert await index.blobs_in_use(SHOP, references) == set(references[:2])
    assert await index.blobs_in_use(SHOP, []) == set()


# --- search -------------------------------------------------------------------------------------------------------


async def test_a_dense_leg_ranks_by_cosine(index: VectorIndex) -> None:
    await index.upsert(
        [
            document("near", image=vector(1, 0.1), text=vector(0, 0, 1)),
            document("far", image=vector(0, 1)),
            document("opposite", image=vector(-1)),
            document("blind", text=vector(1)),
        ]
    )
    scores = await nearest(index, "image", vector(1))
    assert list(scores) == ["near", "far", "opposite"]
    expected = [float(vector(1) @ vector(1, 0.1)), 0.0, -1.0]
    assert list(scores.values()) == pytest.approx(expected, abs=1e-4)
    assert list(await nearest(index, "image", vector(1), limit=2)) == ["near", "far"]


async def test_each_leg_has_its_own_list_and_limit(index: VectorIndex) -> None:
    await index.upsert(
        [
            document("a", image=vector(1), text=vector(0, 1), lexical=terms(x=1)),
            document("b", image=vector(0, 1), text=vector(1), lexical=terms(y=1)),
        ]
    )
    legs = [Leg("image", vector(1), 1), Leg("text", vector(1), 2), Leg("lexical", terms(y=1), 5)]
    lists = await index.search(SHOP, legs, ALL)
    assert [[hit.product_id for hit in hits] for hits in lists] == [["a"], ["b", "a"], ["b"]]


async def test_an_empty_index_and_an_empty_query_find_nothing(index: VectorIndex) -> None:
    legs = [Leg("image", vector(1), 5), Leg("lexical", terms(a=1), 5), Leg("lexical", terms(), 5)]
    assert [list(hits) for hits in await index.search(SHOP, legs, ALL)] == [[], [], []]
    await index.upsert([document(lexical=terms(a=1)), document("q", lexical=terms())])
    assert await nearest(index, "lexical", terms()) == {}
    assert (await nearest(index, "lexical", terms(a=1))).keys() == {"p"}


async def test_rare_terms_weigh_more_and_term_frequency_counts(index: VectorIndex) -> None:
    await index.upsert([document(f"common{n}", lexical=terms(c=1.0)) for n in range(20)])
    await index.upsert([document("rare", lexical=terms(r=1.0, c=1.0)), document("twice", lexical=terms(c=1.6))])
    scores = await nearest(index, "lexical", terms(c=1, r=1))
    assert list(scores)[:2] == ["rare", "twice"]
    bm25_idf = np.log(1 + (22 - 1 + 0.5) / (1 + 0.5)) + np.log(1 + (22 - 22 + 0.5) / (22 + 0.5))
    assert scores["rare"] == pytest.approx(bm25_idf, abs=1e-4)


async def test_what_is_deleted_or_waits_or_is_anothers_does_not_weigh_on_idf(index: VectorIndex) -> None:
    shelf = [document(f"p{n}", lexical=terms(c=1.0) if n else terms(r=1.0)) for n in range(6)]
    await index.upsert(shelf)
    expected = await nearest(index, "lexical", terms(r=1, c=1))
    await index.upsert([document(f"deleted{n}", lexical=terms(r=1.0)) for n in range(5)])
    await index.upsert([document(f"other{n}", tenant="other", lexical=terms(r=1.0)) for n in range(5)])
    assert await nearest(index, "lexical", terms(r=1, c=1)) != pytest.approx(expected, abs=1e-4)
    await index.delete([tombstone(f"deleted{n}", 2) for n in range(5)])
    await index.update_offers([offer(f"lone{n}", 1, price=1.0) for n in range(5)])
    assert await nearest(index, "lexical", terms(r=1, c=1)) == pytest.approx(expected, abs=1e-4)


async def test_tenants_never_meet(index: VectorIndex) -> None:
    for tenant in ("one", "two"):
        await index.upsert(
            [document("same", tenant=tenant, name=tenant, image=vector(1), lexical=terms(a=1), brand="B")]
        )
    await index.upsert([document("only", tenant="two", image=vector(1), lexical=terms(a=1), brand="B")])
    await index.delete([tombstone("same", 2, tenant="three")])
    where = Filter((Condition("brand", ("B",)),))
    assert (await nearest(index, "image", vector(1), tenant="one")).keys() == {"same"}
    assert (await nearest(index, "image", vector(1), where, tenant="two")).keys() == {"same", "only"}
    assert (await nearest(index, "lexical", terms(a=1), tenant="one")).keys() == {"same"}
    assert await nearest(index, "lexical", terms(a=1), tenant="three") == {}
    page = await index.page("one", after=None, limit=10, where=where)
    assert [(stored.tenant, stored.product.name) for stored in page] == [("one", "one")]
    assert dict(await index.get("one", ["only"])) == {}
    assert (await index.counts("two")).products == 2
    assert (await index.counts("nobody")) == IndexCounts(0, 0, 0, 0)
    assert list(await index.page("nobody", after=None, limit=10, where=ALL)) == []


# --- filters ------------------------------------------------------------------------------------------------------

SHELF: Sequence[dict[str, Any]] = (
    {
        "product_id": "boot",
        "brand": "Nike",
        "category": "Sport > Shoes > Boots",
        "price": 120.0,
        "currency": "EUR",
        "stock": 3,
        "offer_version": 1,
        "group_id": "g1",
        "locale": "fr-FR",
        "attributes": {"color": "red", "size": 42, "waterproof": True, "sports": ["hiking", "trail"], "a.b[0]": "x"},
    },
    {
        "product_id": "shoe",
        "brand": "Nike",
        "category": "Sport>Shoes",
        "price": 80,
        "currency": "USD",
        "stock": 0,
        "offer_version": 1,
        "group_id": "g1",
        "attributes": {"color": "blue", "size": 42.0, "waterproof": False, "sports": ["trail"]},
    },
    {
        "product_id": "ball",
        "brand": "Adidas",
        "category": "Sport",
        "price": 19.99,
        "currency": "EUR",
        "offer_version": 1,
        "group_id": "g2",
        "locale": "en",
        "attributes": {"color": "red", "size": "42", "waterproof": "true", "weight": -0.5},
    },
    {"product_id": "yacht", "category": "Sports", "price": 1e308, "stock": MAX_VERSION, "offer_version": 1},
    {"product_id": "bare"},
)

FILTERS: Sequence[tuple[str, Condition, set[str]]] = (
    ("brand", Condition("brand", ("Nike",)), {"boot", "shoe"}),
    ("brands", Condition("brand", ("Nike", "Adidas", "Nobody")), {"boot", "shoe", "ball"}),
    ("unknown brand", Condition("brand", ("nike",)), set()),
    ("no value", Condition("brand", ()), set()),
    ("wrong type", Condition("brand", (5,)), set()),
    ("product ids", Condition("product_id", ("bare", "ball", "nobody")), {"bare", "ball"}),
    ("category top", Condition("category", ("Sport",)), {"boot", "shoe", "ball"}),
    ("category middle", Condition("category", ("Sport > Shoes",)), {"boot", "shoe"}),
    ("category spacing", Condition("category", ("Sport>Shoes>Boots",)), {"boot"}),
    ("category is no prefix of a word", Condition("category", ("Spor",)), set()),
    ("category empty", Condition("category", ("",)), set()),
    ("price between", Condition("price", within=Range(gte=19.99, lte=80)), {"shoe", "ball"}),
    ("price exclusive", Condition("price", within=Range(gt=19.99, lt=120)), {"shoe"}),
    ("price open", Condition("price", within=Range(gte=120)), {"boot", "yacht"}),
    ("price huge", Condition("price", within=Range(gte=1e308)), {"yacht"}),
    ("price equal", Condition("price", (19.99, 80)), {"shoe", "ball"}),
    ("price equal or within", Condition("price", (19.99,), Range(gte=100, lt=1e300)), {"boot", "ball"}),
    ("price neither", Condition("price", (True,)), set()),
    ("currency", Condition("currency", ("EUR",)), {"boot", "ball"}),
    ("stock", Condition("stock", (3, 0)), {"boot", "shoe"}),
    ("stock range", Condition("stock", within=Range(gte=1)), {"boot", "yacht"}),
    ("in stock", Condition("in_stock", (True,)), {"boot", "yacht"}),
    ("out of stock", Condition("in_stock", (False,)), {"shoe"}),
    ("stock known", Condition("in_stock", (True, False)), {"boot", "shoe", "yacht"}),
    ("group", Condition("group_id", ("g1",)), {"boot", "shoe"}),
    ("locale", Condition("locale", ("fr-FR",)), {"boot"}),
    ("image status", Condition("image_status", ("ok",)), {"boot", "shoe", "ball", "yacht", "bare"}),
    ("image status other", Condition("image_status", ("pending",)), set()),
    ("text attribute", Condition("attributes.color", ("red", "green")), {"boot", "ball"}),
    ("number attribute", Condition("attributes.size", (42,)), {"boot", "shoe"}),
    ("real number attribute", Condition("attributes.size", (42.0,)), {"boot", "shoe"}),
    ("text that looks like a number", Condition("attributes.size", ("42",)), {"ball"}),
    ("number attribute range", Condition("attributes.size", within=Range(gte=42, lt=43)), {"boot", "shoe"}),
    ("negative range", Condition("attributes.weight", within=Range(lt=0)), {"ball"}),
    ("range on an attribute nobody has", Condition("attributes.height", within=Range(gte=0)), set()),
    ("range on a text attribute", Condition("attributes.color", within=Range(gte=0)), set()),
    ("true attribute", Condition("attributes.waterproof", (True,)), {"boot"}),
    ("false attribute", Condition("attributes.waterproof", (False,)), {"shoe"}),
    ("text true", Condition("attributes.waterproof", ("true",)), {"ball"}),
    ("list attribute", Condition("attributes.sports", ("trail",)), {"boot", "shoe"}),
    ("list attribute, one member", Condition("attributes.sports", ("hiking",)), {"boot"}),
    ("awkward attribute", Condition("attributes.a.b[0]", ("x",)), {"boot"}),
)


@pytest.fixture
async def shelf(index: VectorIndex) -> VectorIndex:
    """An index with SHELF, and the same under another tenant."""
    documents = [
        document(**fields, tenant=tenant, image=vector(1, n), lexical=terms(a=1), image_status="ok")
        for tenant in (SHOP, "other")
        for n, fields in enumerate(SHELF)
    ]
    await index.upsert(documents)
    return index


async def found_by_every_read(index: VectorIndex, where: Filter) -> set[str]:
    by_image = (await nearest(index, "image", vector(1), where)).keys()
    by_words = (await nearest(index, "lexical", terms(a=1), where)).keys()
    by_page = [stored.product.product_id for stored in await index.page(SHOP, after=None, limit=100, where=where)]
    assert by_image == by_words == set(by_page)
    assert by_page == sorted(by_page)
    return set(by_page)


async def test_every_filter_key(shelf: VectorIndex) -> None:
    # One test for all: the index is only read.
    wrong = {
        name: found
        for name, condition, expected in FILTERS
        if (found := await found_by_every_read(shelf, Filter((condition,)))) != expected
    }
    assert wrong == {}


async def test_keys_are_and_and_exclusions_leave_out(shelf: VectorIndex) -> None:
    sport = Condition("category", ("Sport",))
    red = Condition("attributes.color", ("red",))
    assert await found_by_every_read(shelf, Filter((sport, red))) == {"boot", "ball"}
    assert await found_by_every_read(shelf, Filter((sport, red), exclude=("ball", "nobody"))) == {"boot"}
    assert await found_by_every_read(shelf, Filter(exclude=("ball",))) == {"boot", "shoe", "yacht", "bare"}
    assert await found_by_every_read(shelf, Filter(without_groups=("g1",))) == {"ball", "yacht", "bare"}
    assert await found_by_every_read(shelf, Filter((sport,), without_groups=("g1", "g2"))) == set()


async def test_an_unknown_filter_key_is_an_error(index: VectorIndex) -> None:
    for key in ("colour", "attributes.", "tenant"):
        with pytest.raises(ValueError, match="no filter"):
            await index.page(SHOP, after=None, limit=1, where=Filter((Condition(key, ("x",)),)))


async def test_filters_follow_every_write(index: VectorIndex) -> None:
    await index.upsert([document(text=vector(1), attributes={"size": 1}, price=5.0, offer_version=1)])

    async def matches(condition: Condition) -> bool:
        return bool(await nearest(index, "text", vector(1), Filter((condition,))))

    assert await matches(Condition("attributes.size", within=Range(gte=1)))
    await index.upsert([document(version=2, text=vector(1), attributes={"size": 0, "depth": 3})])
    assert not await matches(Condition("attributes.size", within=Range(gte=1)))
    assert await matches(Condition("attributes.depth", within=Range(gte=1)))
    assert await matches(Condition("price", (5.0,)))
    await index.update_offers([offer("p", 2, price=6.0, stock=0)])
    assert await matches(Condition("price", (6.0,)))
    assert not await matches(Condition("price", (5.0,)))
    assert await matches(Condition("in_stock", (False,)))
    await index.update_offers([offer("p", 3, stock=None)])
    assert not await matches(Condition("in_stock", (True, False)))


# --- counting -----------------------------------------------------------------------------------------------------


async def test_facets_count_each_value_once_most_frequent_first(shelf: VectorIndex) -> None:
    keys = ("brand", "category", "attributes.size", "attributes.sports", "in_stock", "currency", "group_id", "locale")
    counts = await shelf.facet(SHOP, [(key, ALL) for key in (*keys, "attributes.nobody", "image_status")], 10)
    assert {key: list(found) for key, found in zip(keys, counts, strict=False)} == {
        "brand": [("Nike", 2), ("Adidas", 1)],
        "category": [("Sport", 3), ("Sport > Shoes", 2), ("Sport > Shoes > Boots", 1), ("Sports", 1)],
        "attributes.size": [(42, 2), ("42", 1)],
        "attributes.sports": [("trail", 2), ("hiking", 1)],
        "in_stock": [(True, 2), (False, 1)],
        "currency": [("EUR", 2), ("USD", 1)],
        "group_id": [("g1", 2), ("g2", 1)],
        "locale": [("en", 1), ("fr-FR", 1)],
    }
    assert [list(found) for found in counts[len(keys) :]] == [[], [("ok", 5)]]
    red = Filter((Condition("attributes.color", ("red",)),), exclude=("boot",))
    (found, fewer) = await shelf.facet(SHOP, [("brand", red), ("category", ALL)], 1)
    assert (list(found), list(fewer)) == ([("Adidas", 1)], [("Sport", 3)])
    assert list(await shelf.facet(SHOP, [], 10)) == []


async def test_counts_and_extremes_are_of_live_products_alone(shelf: VectorIndex) -> None:
    await shelf.update_offers([offer("lone", 1, price=0.5, stock=2, currency="CHF")])
    await shelf.upsert([document("gone", price=0.1, stock=1, offer_version=1, brand="Nike")])
    await shelf.delete([tombstone("gone", 2)])
    sport, nothing = Filter((Condition("category", ("Sport",)),)), Filter((Condition("brand", ("Nobody",)),))
    assert list(await shelf.count(SHOP, [ALL, sport, nothing])) == [5, 3, 0]
    cheap = Condition("price", within=Range(lte=19.99))  # so are the lone offer and the deleted product
    franc = Condition("currency", ("CHF", "EUR"))
    assert list(await shelf.count(SHOP, [Filter((cheap,)), Filter((franc,)), Filter((cheap, franc))])) == [1, 2, 1]
    assert await shelf.extremes(SHOP, "price", ALL) == (19.99, 1e308)
    assert await shelf.extremes(SHOP, "price", sport) == (19.99, 120.0)
    assert await shelf.extremes(SHOP, "stock", sport) == (0, 3)
    assert await shelf.extremes(SHOP, "price", nothing) is None
    brand, stocked, currency = await shelf.facet(SHOP, [(key, ALL) for key in ("brand", "in_stock", "currency")], 10)
    assert list(brand) == [("Nike", 2), ("Adidas", 1)]
    assert list(stocked) == [(True, 2), (False, 1)]
    assert list(currency) == [("EUR", 2), ("USD", 1)]
    assert list(await shelf.count("nobody", [ALL])) == [0]


async def test_facts_are_what_a_ranking_needs(shelf: VectorIndex) -> None:
    await shelf.delete([tombstone("yacht", 2)])
    found = await shelf.facts(SHOP, ["boot", "bare", "yacht", "nobody", "boot"])
    assert dict(found) == {
        "boot": Facts(version=1, price=120.0, stock=3, group_id="g1", numbers={"size": 42}),
        "bare": Facts(version=1),
    }
    assert dict(await shelf.facts(SHOP, [])) == {}


async def test_tags_that_come_with_the_picture_are_counted(index: VectorIndex) -> None:
    made = document(image_status="pending", brand="B")
    await index.upsert([made])
    picture = ImageUpdate(SHOP, "p", 1, "ok", image=vector(1), tagged=(made.product, {"kind": Tag("shoe", 0.9)}))
    assert await index.update_images([picture]) == ["applied"]
    kind, brand = await index.facet(SHOP, [("tags.kind", ALL), ("brand", ALL)], 5)
    assert (list(kind), list(brand)) == ([("shoe", 1)], [("B", 1)])


async def test_a_sample_is_of_live_products_with_their_vectors_and_stays_the_same(index: VectorIndex) -> None:
    await index.upsert([document(f"p{number}", text=vector(1, number)) for number in range(60)])
    await index.upsert([document("other", tenant="other"), document("gone")])
    await index.delete([tombstone("gone", 2)])
    await index.update_offers([offer("lone", 1, price=1.0)])
    everything = [stored.product.product_id for stored in await index.sample(SHOP, 100)]
    assert sorted(everything) == sorted(f"p{number}" for number in range(60))
    some = await index.sample(SHOP, 7)
    assert [stored.product.product_id for stored in some] == everything[:7]
    assert all(stored.vectors.keys() == {"text"} for stored in some)


async def test_what_can_be_counted_is_known_after_a_restart(adapter: Open) -> None:
    first = await adapter()
    await first.upsert([document("p", brand="B", attributes={"color": "red"})])
    await first.close()
    second = await adapter()
    try:
        await second.upsert([document("q", brand="B")])
        brand, color = await second.facet(SHOP, [("brand", ALL), ("attributes.color", ALL)], 5)
        assert (list(brand), list(color)) == ([("B", 2)], [("red", 1)])
    finally:
        await second.close()


VALUES: dict[str, list[Any]] = {
    "brand": ["Nike", "nike", 'quote " \\'],
    "category": ["Sport", "Sport > Shoes", "Sports", "Home > Bath"],
    "group_id": ["g1", "g2"],
    "price": [0, 10, 10.5, 300],
    "stock": [0, 3],
    "currency": ["EUR", "USD"],
}
ATTRIBUTES: dict[str, list[Any]] = {
    "color": ["red", "blue", ["red", "blue", "red"], []],
    "size": [42, 42.0, "42", True, 1, -7.5],
}
FACETS_ASKED = (*(key for key in VALUES if key not in ("price", "stock")), "in_stock", "locale", "attributes.color")


@st.composite
def shelves(draw: st.DrawFn) -> list[Product]:
    """Return products with few and telling values."""

    def some(values: dict[str, list[Any]]) -> dict[str, Any]:
        return {key: draw(st.sampled_from(these)) for key, these in values.items() if draw(st.booleans())}

    return [
        Product(
            product_id=f"p{number}", name="x", version=1, offer_version=1, attributes=some(ATTRIBUTES), **some(VALUES)
        )
        for number in range(draw(st.integers(0, 8)))
    ]


@st.composite
def conditions(draw: st.DrawFn) -> Condition:
    """Return a condition on one of the fields, mostly one that some product meets."""
    numbers = st.sampled_from([0.0, 10.0, 42.0, 100.0])
    key = draw(st.sampled_from([*VALUES, "in_stock", "product_id", *(f"attributes.{name}" for name in ATTRIBUTES)]))
    if key in ("price", "stock", "attributes.size") and draw(st.booleans()):
        low, high = draw(st.none() | numbers), draw(numbers)
        return Condition(key, within=Range(gte=low, lte=high) if draw(st.booleans()) else Range(gt=low, lt=high))
    known: dict[str, list[Any]] = {
        **VALUES,
        "in_stock": [True, False],
        "product_id": ["p0", "p3", "p6"],
        "attributes.color": ["red", "blue"],
        "attributes.size": [42, "42", True, 1],
    }
    return Condition(key, tuple(draw(st.lists(st.sampled_from(known[key]), min_size=1, max_size=2))))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    products=shelves(),
    asked=st.lists(conditions(), max_size=3, unique_by=lambda condition: condition.key),
    gone=st.sets(st.sampled_from(["p1", "p2"])),
    exclude=st.sampled_from([(), ("p4",)]),
)
async def test_reads_under_a_filter_and_facets_are_what_a_naive_reader_finds(
    index: VectorIndex, products: list[Product], asked: list[Condition], gone: set[str], exclude: tuple[str, ...]
) -> None:
    tenant, where = next(_tenants), Filter(tuple(asked), exclude)
    await index.upsert([IndexDocument(tenant, one, "none", text=vector(1), lexical=terms(a=1)) for one in products])
    await index.delete([tombstone(product_id, 2, tenant=tenant) for product_id in sorted(gone)])
    await index.update_offers([offer("lone", 1, tenant=tenant, price=10.0, stock=3, currency="EUR")])
    expected = [one for one in products if one.product_id not in gone and naive.matches(one, where)]
    names = [one.product_id for one in expected]
    assert [stored.product.product_id for stored in await index.page(tenant, after=None, limit=9, where=where)] == names
    assert sorted(await nearest(index, "text", vector(1), where, tenant=tenant)) == names
    assert sorted(await nearest(index, "lexical", terms(a=1), where, tenant=tenant)) == names
    assert list(await index.count(tenant, [where])) == [len(names)]
    for key in ("price", "stock"):
        numbers = [value for one in expected if (value := getattr(one, key)) is not None]
        extremes = await index.extremes(tenant, key, where)
        assert extremes == ((min(numbers), max(numbers)) if numbers else None)
    counts = await index.facet(tenant, [(key, where) for key in (*FACETS_ASKED, "attributes.size")], 100)
    for key, found in zip((*FACETS_ASKED, "attributes.size"), counts, strict=True):
        assert {(isinstance(value, bool), value): count for value, count in found} == naive.counted(expected, key), key
        assert [count for _, count in found] == sorted((count for _, count in found), reverse=True)


# --- reading in order ---------------------------------------------------------------------------------------------


async def test_pages_run_through_the_ids_in_code_point_order(index: VectorIndex) -> None:
    ids = ["a", "B", "a.b", "a-b", "a:b", "10", "9", "Z_", "é".encode().hex()]
    await index.upsert([document(product_id, lexical=terms(a=1)) for product_id in ids])
    await index.upsert([document("deleted")])
    await index.delete([tombstone("deleted", 2)])
    await index.update_offers([offer("lone", 1, price=1.0)])
    read: list[str] = []
    after = None
    for _ in range(10):
        page = await index.page(SHOP, after=after, limit=2, where=ALL)
        assert len(page) <= 2
        read += [stored.product.product_id for stored in page]
        after = read[-1]
    assert read == sorted(ids)
    beyond = await index.page(SHOP, after="a-a", limit=2, where=ALL)  # an id that nobody has
    assert [stored.product.product_id for stored in beyond] == sorted(i for i in ids if i > "a-a")[:2]


async def test_filtered_pages_miss_nothing_and_repeat_nothing(index: VectorIndex) -> None:
    count = 700
    documents = [document(f"p{n:04}", brand="few" if n % 97 == 0 else "many") for n in range(count)]
    await index.upsert(documents)
    where = Filter((Condition("brand", ("few",)),))
    read: list[str] = []
    while page := await index.page(SHOP, after=read[-1] if read else None, limit=3, where=where):
        read += [stored.product.product_id for stored in page]
    assert read == [f"p{n:04}" for n in range(0, count, 97)]


async def test_get_returns_the_live_ones_of_many(index: VectorIndex) -> None:
    await index.upsert([document(f"p{n}") for n in range(64)])
    await index.delete([tombstone("p7", 2)])
    asked = [f"p{n}" for n in range(70)] + ["p1", "p1"]
    found = await index.get(SHOP, asked)
    assert found.keys() == {f"p{n}" for n in range(64) if n != 7}
    assert all(stored.product.product_id == product_id for product_id, stored in found.items())


async def test_ids_with_a_long_common_beginning_are_paged_in_order(index: VectorIndex) -> None:
    common = "catalogue-2026:winter."  # longer than any key that an index may sort by at once
    ids = [f"{common}{number:05}" for number in range(30)]
    ids += [common[:length] for length in (7, 8, 9, 15, 16, 17, len(common))]
    ids += ["a" * 128, "a" * 127 + "b", "a" * 127]
    await index.upsert([document(product_id, brand="even" if n % 2 else "odd") for n, product_id in enumerate(ids)])
    for where, expected in ((ALL, ids), (Filter((Condition("brand", ("even",)),)), ids[1::2])):
        for limit in (1, 7, 100):
            read: list[str] = []
            while page := await index.page(SHOP, after=read[-1] if read else None, limit=limit, where=where):
                assert len(page) <= limit
                read += [stored.product.product_id for stored in page]
            assert read == sorted(expected)
    nobody = await index.page(SHOP, after=common + "00012x", limit=2, where=ALL)
    assert [stored.product.product_id for stored in nobody] == [common + "00013", common + "00014"]


async def test_an_export_holds_every_kind_of_point_of_every_tenant_in_id_order(index: VectorIndex) -> None:
    product = document("live", 3, image=vector(1), text=vector(0, 1), image_status="ok", attributes={"size": 4}).product
    await index.upsert(
        [
            IndexDocument(SHOP, product, "ok", image=vector(1), text=vector(0, 1), lexical=terms(a=1)),
            document("priced", 5, price=4.0, currency="EUR", offer_version=7),
            document("elsewhere", tenant="other", image_status="pending"),
            document("gone", price=1.0, offer_version=2),
        ]
    )
    await index.delete([tombstone("gone", 6)])
    await index.update_offers([offer("lone", 9, stock=3)])
    await index.update_images([ImageUpdate("other", "elsewhere", 1, "failed", "404")])
    before = time.time()
    states = {state.product_id: state for state in await index.export()}
    assert list(states) == [
        state.product_id
        for state in sorted(states.values(), key=lambda state: point_id(state.tenant, state.product_id))
    ]
    assert all(state.point == point_id(state.tenant, state.product_id) for state in states.values())
    assert all(before - 60 < state.indexed_at <= before for state in states.values())
    assert {name: (state.tenant, state.state, state.version, state.image_status) for name, state in states.items()} == {
        "live": (SHOP, "live", 3, "ok"),
        "priced": (SHOP, "live", 5, "none"),
        "elsewhere": ("other", "live", 1, "failed"),
        "gone": (SHOP, "deleted", 6, None),
        "lone": (SHOP, "offer", None, None),
    }
    assert states["live"].product == product
    assert not states["live"].product.carries_offer
    assert states["priced"].product is not None
    assert not states["priced"].product.carries_offer
    assert (states["gone"].product, states["lone"].product) == (None, None)
    assert {name: state.offer and state.offer.model_dump(exclude_unset=True) for name, state in states.items()} == {
        "live": None,
        "priced": {"product_id": "priced", "price": 4.0, "currency": "EUR", "offer_version": 7},
        "elsewhere": None,
        "gone": {"product_id": "gone", "price": 1.0, "offer_version": 2},
        "lone": {"product_id": "lone", "stock": 3, "offer_version": 9},
    }
    assert states["elsewhere"].image_error == "404"
    assert not any(state.vectors for state in states.values())
    (vectors,) = [s.vectors for s in await index.export(with_vectors=True) if s.product_id == "live"]
    assert vectors.keys() == {"image", "text"}
    np.testing.assert_allclose(vectors["image"], vector(1), atol=1e-6)


async def test_an_export_goes_on_after_a_point_and_ends(index: VectorIndex) -> None:
    await index.upsert([document(f"p{number}", tenant=f"t{number % 3}") for number in range(300)])
    read: list[UUID] = []
    while states := await index.export(after=read[-1] if read else None, limit=7):
        assert len(states) <= 7
        read += [state.point for state in states]
    assert read == sorted(point_id(f"t{number % 3}", f"p{number}") for number in range(300))
    assert [state.point for state in await index.export(limit=1000)] == read
    assert len(await index.export()) == 256
    assert list(await index.export(after=UUID(int=2**128 - 1))) == []


# --- across restarts, and in any order ----------------------------------------------------------------------------


async def test_a_restart_loses_nothing(adapter: Open) -> None:
    first = await adapter()
    await first.upsert([document(version=MAX_VERSION, image=vector(1), lexical=terms(a=1), attributes={"n": 1.5})])
    await first.upsert([document("pending", image_status="pending"), document("gone")])
    await first.delete([tombstone("gone", 7)])
    await first.update_offers([offer("lone", 3, price=2.0), offer("p", 9, price=4.0)])
    before = (await one(first), await first.counts(SHOP), await nearest(first, "lexical", terms(a=1)))
    await first.flush()
    await first.close()
    second = await adapter()
    try:
        after = (await one(second), await second.counts(SHOP), await nearest(second, "lexical", terms(a=1)))
        assert comparable(after[0]) == comparable(before[0])
        assert after[1:] == before[1:]
        assert (
            await nearest(second, "image", vector(1), Filter((Condition("attributes.n", within=Range(gt=1)),)))
        ).keys() == {"p"}
        assert await second.upsert([document("gone", 6), document(version=1)]) == ["superseded", "superseded"]
        assert await second.update_offers([offer("lone", 3, price=9.0)]) == ["known"]
        page = await second.page(SHOP, after=None, limit=10, where=ALL)
        assert [stored.product.product_id for stored in page] == ["p", "pending"]
    finally:
        await second.close()


@dataclass(frozen=True)
class Event:
    """A versioned statement about the one product of an example."""

    kind: Literal["content", "delete", "offer"]
    version: int = 0
    offer_version: int = 0
    """0 on a content: it carries no offer."""


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Event], list[Event]]:
    """Return the same events in two orders, each with repetitions."""
    versions = draw(st.lists(st.integers(1, 50), unique=True, max_size=5))
    offers = draw(st.lists(st.integers(1, 50), unique=True, max_size=5))
    events: list[Event] = []
    for version in versions:
        kind = draw(st.sampled_from(["content", "content", "delete"]))
        carried = offers.pop() if kind == "content" and offers and draw(st.booleans()) else 0
        events.append(Event("delete" if kind == "delete" else "content", version, carried))
    events += [Event("offer", offer_version=version) for version in offers]
    repeated = draw(st.lists(st.sampled_from(events), max_size=4)) if events else []
    return draw(st.permutations(events + repeated)), draw(st.permutations(events + repeated))


def some_offer(version: int) -> dict[str, Any]:
    """Return an offer that states some of the fields, other ones at each version; a few clear what they state."""
    whole: dict[str, Any] = {"price": float(version), "currency": f"EU{'RSTX'[version % 4]}", "stock": version % 3}
    stated = {name: whole[name] for bit, name in enumerate(whole) if version >> bit & 1}
    return {**(dict.fromkeys(stated) if version % 7 == 0 else stated), "offer_version": version}


async def play(index: VectorIndex, tenant: str, events: Sequence[Event], batch: int) -> None:
    """Write `events` in order, runs of one kind in batches of up to `batch`."""
    for kind, run in itertools.groupby(events, key=lambda event: event.kind):
        waiting = list(run)
        while waiting:
            now, waiting = waiting[:batch], waiting[batch:]
            if kind == "content":
                await index.upsert(
                    [
                        document(
                            version=event.version,
                            tenant=tenant,
                            image=vector(1, event.version),
                            **(some_offer(event.offer_version) if event.offer_version else {}),
                        )
                        for event in now
                    ]
                )
            elif kind == "delete":
                await index.delete([tombstone("p", event.version, tenant=tenant) for event in now])
            else:
                changes = [OfferChange(product_id="p", **some_offer(event.offer_version)) for event in now]
                await index.update_offers([OfferUpdate(tenant, change) for change in changes])


def comparable(stored: StoredProduct | None) -> object:
    if stored is None:
        return None
    vectors = {name: [round(float(x), 5) for x in values] for name, values in stored.vectors.items()}
    return stored.product.model_dump(exclude_unset=True), stored.image_status, stored.image_error, vectors


async def state(index: VectorIndex, tenant: str) -> object:
    """Return everything that can be told about the product, the hidden offer of a tombstone included."""
    seen = comparable(await one(index, tenant=tenant))
    counts = await index.counts(tenant)
    refused = await index.upsert([document(version=MAX_VERSION, tenant=tenant)])
    return seen, counts, refused, comparable(await one(index, tenant=tenant))


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=histories(), batches=st.tuples(st.integers(1, 4), st.integers(1, 4)))
async def test_any_order_and_any_repetition_end_in_one_state(
    index: VectorIndex, history: tuple[list[Event], list[Event]], batches: tuple[int, int]
) -> None:
    ends = []
    for events, batch in zip(history, batches, strict=True):
        tenant = next(_tenants)
        await play(index, tenant, events, batch)
        ends.append(await state(index, tenant))
    assert ends[0] == ends[1]
