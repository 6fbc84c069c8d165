"""A key sees the products of its tenant and of nobody else, whichever way it asks and whoever asks beside it."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Mapping
from io import BytesIO
from typing import Any

import pytest
import pytest_asyncio
from pydantic import SecretStr
from tests.pictures import encode, plain
from tests.shop import Answer, Shop, open_shop

from catalens.domain import Product
from catalens.settings import ApiKey

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEYS = {"red": "the-secret-of-the-red", "blue": "the-secret-of-the-blue"}
COLOURS = {"red": (220, 20, 20), "blue": (20, 20, 220)}
COMMON = 6  # ids that both have
SEARCHES: tuple[dict[str, Any], ...] = (
    {"query": "canvas shoe"},
    {"query": "canvas shoe", "mode": "lexical"},
    {"query": "red blue", "mode": "hybrid"},
    {"query": "only-red"},
    {"query": "only-blue"},
    {"query": [{"text": "shoe"}, {"text": "red", "weight": -1.0}]},
    {"query": "shoe", "filters": {"brand": ["red", "blue"]}},
    {"query": "shoe", "sort": "newest"},
    {"query": "shoe", "diversity": 0.5, "boosts": [{"field": "newest", "factor": 1}]},
    {"like": ["p-1"]},
    {"like": ["p-1"], "unlike": ["p-2"], "query": "shoe"},
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shop]:
    """Two tenants with the same ids, the same words and pictures of their own, and one product that only one has."""
    keys = tuple(ApiKey(name=name, secret=SecretStr(secret), tenant=name) for name, secret in KEYS.items())
    async with open_shop(tmp_path_factory.mktemp("tenants"), api_keys=keys) as shop:
        for tenant in KEYS:
            for product_id in (*(f"p-{number}" for number in range(COMMON)), f"only-{tenant}"):
                name = f"canvas shoe {tenant} {product_id}"
                product = Product(product_id=product_id, name=name, brand=tenant, attributes={"of": tenant})
                await shop.put(product, picture(tenant), tenant=tenant)
        yield shop


def picture(tenant: str) -> bytes:
    return encode(plain(COLOURS[tenant], 48, 48), "PNG")


async def ask(shop: Shop, tenant: str, method: str, path: str, **options: Any) -> Answer:
    headers = {"X-API-Key": KEYS[tenant], **options.pop("headers", {})}
    return await shop.call(method, path, headers=headers, **options)


def owners(found: Any) -> set[str]:
    """Return whose products are in an answer, by what each says of itself."""
    if isinstance(found, list):
        return set().union(*map(owners, found))
    if not isinstance(found, Mapping):
        return set()
    own = {found["brand"]} if "product_id" in found and "brand" in found else set()
    return own | set().union(*map(owners, found.values()))


@pytest.mark.parametrize("tenant", KEYS)
@pytest.mark.parametrize("body", SEARCHES, ids=str)
async def test_a_search_finds_its_own(shop: Shop, tenant: str, body: dict[str, Any]) -> None:
    answer = await ask(shop, tenant, "POST", "/api/v1/search", json={**body, "limit": 100})
    assert answer.status == 200
    assert owners(answer.json) == {tenant}
    # The others take no places: a ranking of everybody's products, filtered later, would lack this one.
    assert f"only-{tenant}" in [hit["product_id"] for hit in answer.json["results"]]
    batch = await ask(shop, tenant, "POST", "/api/v1/search/batch", json={"requests": [body, body]})
    assert owners(batch.json) == {tenant}


@pytest.mark.parametrize("tenant", KEYS)
async def test_a_picture_finds_its_own(shop: Shop, tenant: str) -> None:
    for colour in COLOURS:
        form = {"file": BytesIO(picture(colour))}
        answer = await ask(shop, tenant, "POST", "/api/v1/search-image?limit=100", data=form)
        assert owners(answer.json) == {tenant}


@pytest.mark.parametrize(("tenant", "other"), [("red", "blue"), ("blue", "red")])
async def test_what_another_has_is_not_there(shop: Shop, tenant: str, other: str) -> None:
    for path in ("", "/similar", "/image"):
        assert (await ask(shop, tenant, "GET", f"/api/v1/products/only-{tenant}{path}")).status == 200
        assert (await ask(shop, tenant, "GET", f"/api/v1/products/only-{other}{path}")).status == 404
    for field in ("like", "unlike"):
        body = {"query": "shoe", field: [f"only-{other}"]}
        assert (await ask(shop, tenant, "POST", "/api/v1/search", json=body)).status == 422
    filtered = {"query": "shoe", "filters": {"brand": other}}
    assert (await ask(shop, tenant, "POST", "/api/v1/search", json=filtered)).json["results"] == []


@pytest.mark.parametrize("tenant", KEYS)
async def test_pictures_listings_and_counts_are_its_own(shop: Shop, tenant: str) -> None:
    assert (await ask(shop, tenant, "GET", "/api/v1/products/p-1/image")).body == picture(tenant)
    listing = await ask(shop, tenant, "GET", "/api/v1/products?limit=100")
    assert owners(listing.json) == {tenant}
    assert listing.json["count"] == COMMON + 1
    faceted = {"query": "canvas shoe", "facets": ["brand", "attributes.of"]}
    counted = (await ask(shop, tenant, "POST", "/api/v1/search", json=faceted)).json["facets"]
    assert counted == {key: [{"value": tenant, "count": COMMON + 1}] for key in faceted["facets"]}
    export = await ask(shop, tenant, "GET", "/api/v1/products", headers={"Accept": "application/x-ndjson"})
    assert owners([json.loads(line) for line in export.body.splitlines()]) == {tenant}
    assert (await ask(shop, tenant, "GET", "/api/v1/stats")).json["products"] == COMMON + 1


async def test_nobody_sees_anothers_under_load(shop: Shop) -> None:
    """Both at once, the same questions, many at a time: what is shared in memory must not mix them."""
    draw = random.Random(7)
    lanes = asyncio.Semaphore(16)

    async def one(tenant: str) -> None:
        async with lanes:
            kind = draw.randrange(5)
            if kind == 0:
                answer = await ask(shop, tenant, "GET", f"/api/v1/products/p-{draw.randrange(COMMON)}")
            elif kind == 1:
                answer = await ask(shop, tenant, "GET", f"/api/v1/products/p-{draw.randrange(COMMON)}/similar")
            elif kind == 2:
                answer = await ask(shop, tenant, "GET", "/api/v1/products?limit=3&after=p-1")
            else:
                body = {**draw.choice(SEARCHES), "limit": 20}
                answer = await ask(shop, tenant, "POST", "/api/v1/search", json=body)
            assert answer.status == 200
            assert owners(answer.json) == {tenant}

    async with asyncio.TaskGroup() as group:
        for number in range(240):
            group.create_task(one(("red", "blue")[number % 2]), name=f"load.{number}")


async def test_what_another_counts_leaves_room_and_tells_nothing(shop: Shop) -> None:
    """The last one here: it leaves products."""
    names = [f"count-{number}" for number in range(110)]
    for at in range(0, len(names), 55):
        attributes: dict[str, Any] = dict.fromkeys(names[at : at + 55], "x")
        product = Product(product_id=f"counted-{at}", name="canvas shoe", brand="blue", attributes=attributes)
        await shop.put(product, tenant="blue")

    async def counted(tenant: str, facets: list[str]) -> Any:
        body = {"query": "canvas shoe", "facets": facets, "limit": 1}
        answer = await ask(shop, tenant, "POST", "/api/v1/search", json=body)
        assert answer.status == 200
        return answer.json["facets"]

    for at in range(0, len(names), 10):
        facets = [f"attributes.{name}" for name in names[at : at + 10]]
        invented = [f"attributes.invented-{number}" for number in range(at, at + 10)]
        assert await counted("blue", facets) == {name: [{"value": "x", "count": 1}] for name in facets}
        for nobodys in (facets, invented):
            assert await counted("red", nobodys) == {key: [] for key in nobodys}
    assert await counted("red", ["attributes.of"]) == {"attributes.of": [{"value": "red", "count": COMMON + 1}]}
