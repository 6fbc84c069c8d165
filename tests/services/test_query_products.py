"""Products, their pictures, the listing, the export, the pages and the state of the query service over HTTP."""

from __future__ import annotations

import asyncio
import json
import signal
from base64 import b64decode
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path

import pytest
import pytest_asyncio
from tests.shop import Answer, Shop, open_shop, picture

from catalens.domain import ImageRef, Product, sha256_hex
from catalens.engines.edge import EdgeIndex
from catalens_query import service

pytestmark = pytest.mark.asyncio(loop_scope="module")

FRONT, BACK = picture(200, 30, 30), picture(30, 30, 200, "JPEG")
REMOTE = "https://pictures.example/a.jpg"
NDJSON = {"Accept": "application/x-ndjson"}
CATALOGUE = [
    Product(product_id="B", name="Upper case comes first", version=1),
    Product(
        product_id="a.1",
        name="Sac à dos 🎒",
        description="line\nbreak",
        brand="Acme",
        category="Bags > Backpacks",
        price=12.5,
        currency="EUR",
        stock=0,
        attributes={"litres": 20, "straps": True, "colors": ["red", "blue"]},
        group_id="g",
        url="https://shop.example/a.1",
        locale="fr",
        version=5,
        offer_version=6,
        images=(ImageRef(url=REMOTE),),
    ),
    Product(product_id="b:2", name="Only a remote picture", images=(ImageRef(url=REMOTE),), version=2),
    Product(product_id="c", name="A foreign address", images=(ImageRef(url="javascript:alert(1)"),), version=3),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shop]:
    """A shop with four products, one of them with two uploads and a remote picture."""
    async with open_shop(tmp_path_factory.mktemp("shop") / "data") as opened:
        for product in CATALOGUE:
            await opened.put(product, *((FRONT, BACK) if product.product_id == "a.1" else ()))
        yield opened


async def test_a_product_is_shown_as_it_is_indexed(shop: Shop) -> None:
    answer = await shop.call("GET", "/api/v1/products/a.1")
    assert answer.status == 200
    indexed_at = datetime.fromisoformat(answer.json.pop("indexed_at"))
    assert indexed_at.utcoffset() is not None
    assert answer.json == {
        **CATALOGUE[1].model_dump(exclude={"images"}),
        "in_stock": False,
        "image": "/api/v1/products/a.1/image",
        "image_status": "ok",
        "images": ["/api/v1/products/a.1/image", "/api/v1/products/a.1/image?index=1", REMOTE],
    }


async def test_an_address_is_only_shown_if_a_browser_may_load_it(shop: Shop) -> None:
    remote = (await shop.call("GET", "/api/v1/products/b:2")).json
    assert (remote["image"], remote["images"], remote["image_status"]) == (REMOTE, [REMOTE], "pending")
    foreign = (await shop.call("GET", "/api/v1/products/c")).json
    assert (foreign["image"], foreign["images"]) == (None, [])


@pytest.mark.parametrize(
    ("path", "status"),
    [("nothing", 404), ("nothing/image", 404), ("a%2Fb", 422), ("a%20b", 422), ("x" * 129, 422), ("B?x=1", 422)],
)
async def test_a_product_that_is_not_there(shop: Shop, path: str, status: int) -> None:
    assert (await shop.call("GET", f"/api/v1/products/{path}")).status == status


# --- pictures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "content", "kind"),
    [("", FRONT, "image/png"), ("?index=0", FRONT, "image/png"), ("?index=1", BACK, "image/jpeg")],
)
async def test_an_upload_is_served_byte_for_byte(shop: Shop, query: str, content: bytes, kind: str) -> None:
    answer = await shop.call("GET", f"/api/v1/products/a.1/image{query}")
    assert answer.status == 200
    assert answer.body == content
    assert answer.headers["Content-Type"] == kind
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["ETag"] == f'"{sha256_hex(content)}"'
    again = await shop.call(
        "GET", f"/api/v1/products/a.1/image{query}", headers={"If-None-Match": answer.headers["ETag"]}
    )
    assert (again.status, again.body) == (304, b"")
    changed = await shop.call("GET", f"/api/v1/products/a.1/image{query}", headers={"If-None-Match": '"other"'})
    assert changed.status == 200


@pytest.mark.parametrize("path", ["a.1/image?index=2", "a.1/image?index=9", "b:2/image", "B/image"])
async def test_what_was_not_uploaded_is_not_served(shop: Shop, path: str) -> None:
    assert (await shop.call("GET", f"/api/v1/products/{path}")).status == 404


@pytest.mark.parametrize("query", ["index=-1", "index=16", "index=a", "width=9"])
async def test_a_wrong_position_is_refused(shop: Shop, query: str) -> None:
    assert (await shop.call("GET", f"/api/v1/products/a.1/image?{query}")).status == 422


async def test_an_upload_that_is_no_picture_is_never_shown_as_a_page(shop: Shop) -> None:
    script = b"<html><script>alert(1)</script>"
    reference = await shop.engines.blobs.put(script)
    await shop.put(Product(product_id="x", name="Not a picture", images=(ImageRef(blob=reference),)))
    answer = await shop.call("GET", "/api/v1/products/x/image")
    assert (answer.status, answer.body) == (200, script)
    assert answer.headers["Content-Type"] == "application/octet-stream"
    await shop.delete("x", 2)


# --- listing and export -------------------------------------------------------------------------------------


async def test_the_listing_goes_through_the_catalogue_in_id_order(shop: Shop) -> None:
    seen: list[str] = []
    after = ""
    for _ in range(4):
        page = (await shop.call("GET", f"/api/v1/products?limit=2{after}")).json
        assert page["count"] == len(page["products"]) <= 2
        seen += [product["product_id"] for product in page["products"]]
        if page["next"] is None:
            break
        assert page["next"] == seen[-1]
        after = f"&after={page['next']}"
    assert seen == ["B", "a.1", "b:2", "c"]
    whole = (await shop.call("GET", "/api/v1/products")).json
    assert [product["product_id"] for product in whole["products"]] == seen
    assert whole["next"] is None
    assert whole["products"][1] == (await shop.call("GET", "/api/v1/products/a.1")).json
    assert (await shop.call("GET", "/api/v1/products?after=zzz")).json == {"products": [], "count": 0, "next": None}


@pytest.mark.parametrize(
    "query", ["limit=-1", "limit=0", "limit=101", "limit=1000000000", "offset=1", f"after={'x' * 200}"]
)
async def test_a_wrong_listing_is_refused(shop: Shop, query: str) -> None:
    assert (await shop.call("GET", f"/api/v1/products?{query}")).status == 422


async def test_an_export_can_be_imported_into_an_empty_catalogue(shop: Shop, tmp_path: Path) -> None:
    export = await shop.call("GET", "/api/v1/products", headers=NDJSON)
    assert export.status == 200
    assert export.headers["Content-Type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in export.body.splitlines()]
    assert [line["product_id"] for line in lines] == ["B", "a.1", "b:2", "c"]
    uploads = [b64decode(image["data"]) for image in lines[1]["images"][:2]]
    assert uploads == [FRONT, BACK]
    assert "price" not in lines[0]  # an offer that is not known is not cleared by the import
    async with open_shop(tmp_path / "data") as other:
        for line in lines:
            product = Product.model_validate(line, extra="forbid")
            inline = [b64decode(image.data) for image in product.images if image.data]
            remote = tuple(image for image in product.images if not image.data)
            await other.put(product.model_copy(update={"images": remote}), *inline)
        again = await other.call("GET", "/api/v1/products", headers=NDJSON)
    assert again.body == export.body


async def test_an_export_can_go_on_where_it_broke(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = await shop.call("GET", "/api/v1/products", headers=NDJSON)
    monkeypatch.setattr(service, "_EXPORT_PAGE", 2)
    assert (await shop.call("GET", "/api/v1/products", headers=NDJSON)).body == whole.body
    rest = await shop.call("GET", "/api/v1/products?after=a.1", headers=NDJSON)
    assert rest.body.splitlines() == whole.body.splitlines()[2:]
    some = await shop.call("GET", "/api/v1/products?limit=3", headers=NDJSON)
    assert some.body.splitlines() == whole.body.splitlines()[:3]


async def test_a_picture_that_was_lost_stays_a_reference_in_the_export(shop: Shop) -> None:
    lost = "ab" * 32
    await shop.put(Product(product_id="y", name="Its picture is lost", images=(ImageRef(blob=lost),)))
    export = await shop.call("GET", "/api/v1/products?after=c", headers=NDJSON)
    assert json.loads(export.body)["images"] == [{"blob": lost}]
    await shop.delete("y", 2)


# --- state --------------------------------------------------------------------------------------------------


async def test_health_and_readiness_tell_a_missing_encoder(shop: Shop) -> None:
    health = await shop.call("GET", "/api/v1/health")
    assert health.json["status"] == health.json["encoder"] == "ok"
    assert health.json["model"] == shop.encoder.spec.id
    assert (await shop.call("GET", "/readyz")).json == {"status": "ok", "checks": {"encoder": "ok", "index": "ok"}}
    degraded = await shop.call("GET", "/api/v1/health", wordless=True)
    assert (degraded.status, degraded.json["status"], degraded.json["model"]) == (200, "degraded", None)
    not_ready = await shop.call("GET", "/readyz", wordless=True)
    assert not_ready.status == 503
    assert [error["field"] for error in not_ready.json["errors"]] == ["encoder"]


async def test_ready_is_who_is_answered_by_the_index_just_now(shop: Shop) -> None:
    assert (await shop.call("GET", "/readyz")).status == 200
    index = shop.engines.index
    assert isinstance(index, EdgeIndex)
    process = index._engine._process
    process.send_signal(signal.SIGSTOP)
    asking = asyncio.create_task(shop.call("GET", "/readyz"), name="readyz")
    while not asking.done() and not index._engine._calls:
        await asyncio.sleep(0)
    assert index._engine._calls
    process.send_signal(signal.SIGCONT)
    assert (await asking).status == 200


async def test_stats_count_what_is_searchable(shop: Shop) -> None:
    await shop.call("POST", "/api/v1/embed", json={"text": "counted"})
    await shop.call("POST", "/api/v1/embed", json={"text": "counted"})
    stats = (await shop.call("GET", "/api/v1/stats")).json
    assert stats["products"] == 4
    assert stats["images_pending"] == 2
    assert stats["lag"] == 0
    assert (stats["model"], stats["dimension"]) == (shop.encoder.spec.id, shop.encoder.spec.dimension)
    assert stats["cache"]["hits"] >= 1
    assert stats["cache"]["entries"] >= 1
    await shop.put(Product(product_id="z", name="Soon gone"))
    await shop.delete("z", 2)
    after = (await shop.call("GET", "/api/v1/stats")).json
    assert (after["products"], after["deleted"]) == (4, stats["deleted"] + 1)


# --- pages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/docs", "text/html; charset=utf-8"),
        ("/static/app.js", "text/javascript; charset=utf-8"),
        ("/static/app.css", "text/css; charset=utf-8"),
        ("/static/favicon.svg", "image/svg+xml"),
    ],
)
async def test_the_pages_are_served_from_the_package(shop: Shop, path: str, kind: str) -> None:
    answer = await shop.call("GET", path)
    assert answer.status == 200
    assert answer.headers["Content-Type"] == kind
    assert len(answer.body) > 100
    again = await shop.call("GET", path, headers={"If-None-Match": answer.headers["ETag"]})
    assert (again.status, again.body) == (304, b"")
    assert (await shop.call("HEAD", path)).status == 200


@pytest.mark.parametrize(
    "path",
    ["/static/", "/static/nothing.js", "/static/../service.py", "/static/%2e%2e/service.py", "/static//etc/passwd"],
)
async def test_nothing_else_is_served(shop: Shop, path: str) -> None:
    answer = await shop.call("GET", path)
    assert answer.status == 404
    assert problem(answer)


def problem(answer: Answer) -> bool:
    return answer.headers["Content-Type"].startswith("application/problem+json")
