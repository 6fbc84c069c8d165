"""What careless and hostile clients send to the real process: the documented problem or the right result, each time."""

from __future__ import annotations

import asyncio
import io
import json
import re
import socket
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
from PIL import Image
from tests.pictures import animated_gif, encode, jpeg, plain, png_bomb, rotated_jpeg, scene
from tests.standalone import Standalone
from yarl import URL

MIB = 1024 * 1024
PRODUCTS = "/api/v1/products"
DEEP = b"[" * 50_000
JSON = (("Content-Type", "application/json"),)
NDJSON = (("Content-Type", "application/x-ndjson"),)


@dataclass
class Client:
    """Talks to the server, and remembers what it accepted: product id → name."""

    session: aiohttp.ClientSession
    url: str
    accepted: dict[str, str]

    async def call(self, method: str, path: str, **options: Any) -> tuple[int, Any]:
        """Send one request; return the status and the JSON of the answer, a problem where it is no success."""
        if isinstance(options.get("data"), bytes):
            options["data"] = io.BytesIO(options["data"])  # aiohttp's advice for large bodies
        async with self.session.request(method, URL(self.url + path, encoded=True), **options) as response:
            kind = "application/json" if response.status < 400 else "application/problem+json"
            assert response.content_type == kind, await response.read()
            return response.status, await response.json(content_type=kind)

    async def put(self, product_id: str, **body: Any) -> Any:
        """Put a product that must be accepted, and wait until it is searchable."""
        status, receipt = await self.call("PUT", f"{PRODUCTS}/{product_id}?wait=true&timeout=60", json=body)
        assert status == 200, receipt
        if receipt["status"] == "indexed":
            self.accepted[product_id] = body["name"]
        return receipt

    async def get(self, product_id: str) -> Any:
        """Return a product that must be there."""
        status, product = await self.call("GET", f"{PRODUCTS}/{product_id}")
        assert status == 200, product
        return product

    async def settle(self) -> None:
        """Wait until as many products are searchable as were accepted; each turn waits for an event of its own.

        Gives up after many turns: then some were lost, and the caller will see which.
        """
        for _ in range(1000):
            await self.put("marker", name="Marker")
            if (await self.call("GET", "/api/v1/stats"))[1]["products"] >= len(self.accepted):
                return


@pytest.fixture(scope="module")
def accepted() -> dict[str, str]:
    """What the process accepted in this module."""
    return {}


@pytest.fixture
async def client(server: Standalone, accepted: dict[str, str]) -> AsyncIterator[Client]:
    """A client of the running process."""
    sockets: list[socket.socket] = []

    def connect(address: aiohttp.AddrInfoType) -> socket.socket:
        sockets.append(socket.socket(*address[:3]))
        return sockets[-1]

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(socket_factory=connect)) as session:
        yield Client(session, server.url, accepted)
    while any(one.fileno() >= 0 for one in sockets):  # a refused body may still be on its way to nobody
        await asyncio.sleep(0.01)


# --- requests that are refused ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refused:
    """A request and the problem that it must get; `field` is the first that `errors` names."""

    name: str
    method: str
    path: str
    status: int
    kind: str
    field: str | None = None
    body: Callable[[], bytes] = bytes
    headers: tuple[tuple[str, str], ...] = JSON


def _json(value: object) -> Callable[[], bytes]:
    return lambda: json.dumps(value).encode()


def _put(name: str, status: int, kind: str, field: str | None, body: Callable[[], bytes]) -> Refused:
    return Refused(name, "PUT", f"{PRODUCTS}/shoe", status, kind, field, body)


def _search(name: str, field: str, query: str = "", **body: Any) -> Refused:
    return Refused(name, "POST", f"/api/v1/search{query}", 422, "invalid", field, _json({"query": "shoe", **body}))


REFUSED = [
    _put("40 MB body", 413, "too-large", None, lambda: b'{"name": "' + b"x" * 40 * MIB + b'"}'),
    _put("broken JSON", 400, "malformed", None, lambda: b'{"name": "x"'),
    _put("empty body", 400, "malformed", None, bytes),
    _put("not UTF-8", 400, "malformed", None, lambda: b'{"name": "\xff"}'),
    _put("raw control character", 400, "malformed", None, lambda: b'{"name": "a\x00b"}'),
    _put("lone surrogate", 400, "malformed", None, lambda: rb'{"name": "\ud800"}'),
    _put("nested 50,000 deep", 400, "malformed", None, lambda: DEEP + b"]" * 50_000),
    _put("nested 50,000 deep in a field", 400, "malformed", None, lambda: b'{"name":' * 50_000 + b"1" + b"}" * 50_000),
    _put("NaN price", 400, "malformed", None, lambda: b'{"name": "x", "price": NaN}'),
    _put("infinite price", 400, "malformed", None, lambda: b'{"name": "x", "price": Infinity}'),
    _put("price beyond floats", 422, "invalid", "price", lambda: b'{"name": "x", "price": 1e309}'),
    _put("negative price", 422, "invalid", "price", _json({"name": "x", "price": -0.01})),
    _put("price as text", 422, "invalid", "price", _json({"name": "x", "price": "12"})),
    _put("unknown field", 422, "invalid", "colour", _json({"name": "x", "colour": "red"})),
    _put("unknown field of a picture", 422, "invalid", "images.0.alt",
         _json({"name": "x", "images": [{"url": "https://shop.example/a.jpg", "alt": "a"}]})),
    _put("another id", 422, "invalid", "product_id", _json({"name": "x", "product_id": "other"})),
    _put("list instead of object", 422, "invalid", "", _json([])),
    _put("version 0", 422, "invalid", "version", _json({"name": "x", "version": 0})),
    _put("not base64", 422, "invalid", "images.0.data", _json({"name": "x", "images": [{"data": "!"}]})),
    _put("unknown blob", 422, "invalid", "images.0.blob", _json({"name": "x", "images": [{"blob": "0" * 64}]})),
    _put("private address", 422, "forbidden-url", "images.0.url",
         _json({"name": "x", "images": [{"url": "http://169.254.169.254/latest"}]})),
    Refused("id with a slash", "PUT", f"{PRODUCTS}/a%2Fb", 422, "invalid", "product_id", _json({"name": "x"})),
    Refused("id with a control character", "GET", f"{PRODUCTS}/a%00b", 422, "invalid", "product_id"),
    Refused("id of 129 characters", "DELETE", f"{PRODUCTS}/{'a' * 129}", 422, "invalid", "product_id"),
    Refused("unknown parameter", "PUT", f"{PRODUCTS}/shoe?soft=1", 422, "invalid", "soft", _json({"name": "x"})),
    Refused("repeated parameter", "GET", f"{PRODUCTS}?limit=1&limit=2", 422, "invalid", "limit"),
    Refused("wrong content type", "PUT", f"{PRODUCTS}/shoe", 415, "media-type", None, _json({"name": "x"}),
            (("Content-Type", "text/csv"),)),
    Refused("lines as JSON", "POST", PRODUCTS, 415, "media-type", None, _json({"name": "x"})),
    Refused("metadata nested 50,000 deep", "POST", "/api/v1/index-product", 422, "invalid", "metadata",
            lambda: b"product_id=a&name=b&metadata=" + b"%5B" * 50_000,
            (("Content-Type", "application/x-www-form-urlencoded"),)),
    Refused("broken multipart", "POST", "/api/v1/search-image", 400, "malformed", None, lambda: b"--x\r\n",
            (("Content-Type", "multipart/form-data; boundary=x"),)),
    Refused("unknown path", "GET", "/api/v1/nothing", 404, "not-found"),
    Refused("wrong method", "PATCH", "/api/v1/search", 405, "method"),
    Refused("limit -1 in the listing", "GET", f"{PRODUCTS}?limit=-1", 422, "invalid", "limit"),
    Refused("limit 10^9 in the listing", "GET", f"{PRODUCTS}?limit=1000000000", 422, "invalid", "limit"),
    _search("limit -1", "limit", limit=-1),
    _search("limit 10^9", "limit", limit=10**9),
    _search("limit true", "limit", limit=True),
    _search("limit -1 in the URL", "limit", "?limit=-1"),
    _search("limit 10^9 in the URL", "limit", "?limit=1000000000"),
    _search("offset -1", "offset", offset=-1),
    _search("unknown field of a search", "colour", colour="red"),
    _search("unknown filter", "filters.colour", filters={"colour": "red"}),
    _search("like what is not there", "like.0", like=["shoe"]),
    _search("unknown facet", "facets.0", facets=["colour"]),
    _search("eleven facets", "facets", facets=["brand"] * 11),
    _search("unknown order", "sort", sort="cheapest"),
    _search("unknown group", "group_by", group_by="brand"),
    _search("unknown boost", "boosts.0.field", boosts=[{"field": "colour", "factor": 1}]),
    _search("diversity 2", "diversity", diversity=2),
    _search("min_score NaN", "min_score", min_score="NaN"),
    Refused("suggest nothing", "GET", "/api/v1/suggest?q=", 422, "invalid", "q"),
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
async def test_bad_requests_get_their_problem(client: Client, case: Refused) -> None:
    status, problem = await client.call(case.method, case.path, data=case.body(), headers=case.headers)
    assert (status, problem["type"]) == (case.status, f"urn:catalens:problem:{case.kind}"), problem
    assert problem["status"] == status
    assert problem["request_id"]
    if case.field is not None:
        assert problem["errors"][0]["field"] == case.field


async def test_every_call_refuses_a_parameter_that_it_does_not_know(client: Client) -> None:
    status, document = await client.call("GET", "/openapi.json")
    calls = [(path, method) for path, row in document["paths"].items() for method in row if path.startswith("/api/")]
    assert status == 200
    assert len(calls) > 25
    for path, method in calls:
        given = re.sub("{.*}", "0-17", path)
        status, problem = await client.call(method, f"{given}?limit=1&colour=red")
        assert (status, problem["type"]) == (422, "urn:catalens:problem:invalid"), (method, path, problem)
        assert "colour" in [error["field"] for error in problem["errors"]], (method, path, problem)
        assert "422" in document["paths"][path][method]["responses"]


async def test_a_body_of_unknown_length_is_cut_at_the_limit(client: Client) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b'{"name": "'
        for _ in range(40):
            yield b"x" * MIB

    status, problem = await client.call("PUT", f"{PRODUCTS}/shoe", data=chunks(), headers=JSON)
    assert (status, problem["type"]) == (413, "urn:catalens:problem:too-large")


# --- pictures -----------------------------------------------------------------------------------------------

BAD_PICTURES = [
    ("empty file", lambda: b"", 415, "empty"),
    ("text named .jpg", lambda: b"This is no picture.\n", 415, "not-a-picture"),
    ("HTML", lambda: b"<!doctype html><script>alert(1)</script>", 415, "not-a-picture"),
    ("truncated JPEG", lambda: jpeg()[:-200], 415, "truncated"),
    ("truncated PNG", lambda: encode(scene(), "PNG")[:-200], 415, "truncated"),
    ("JPEG header only", lambda: b"\xff\xd8\xff", 415, "not-a-picture"),
    ("PNG bomb", lambda: png_bomb(20_000, 20_000), 413, "too-many-pixels"),
    ("21 MB", lambda: jpeg() + bytes(21 * MIB), 413, "too-many-bytes"),
]
BAD_NAMES = [row[0] for row in BAD_PICTURES]


def upload(picture: bytes, part: str = "image_file", **fields: str) -> aiohttp.FormData:
    """Return a form with a picture that is named .jpg, whatever it is."""
    form = aiohttp.FormData(fields)
    form.add_field(part, io.BytesIO(picture), filename="photo.jpg", content_type="image/jpeg")
    return form


@pytest.mark.parametrize("door", ["index-product-with-image", "search-image", "embed-image", "similarity", "search"])
@pytest.mark.parametrize(
    ("make", "status", "kind"), [row[1:] for row in BAD_PICTURES], ids=[r[0] for r in BAD_PICTURES]
)
async def test_bad_pictures_get_their_problem(
    client: Client, door: str, make: Callable[[], bytes], status: int, kind: str
) -> None:
    picture = make()
    if door == "search":
        if not picture or len(picture) > 18 * MIB:
            kind, status = ("invalid", 422) if not picture else ("too-large", 413)  # no text, and a body over its limit
        body = json.dumps({"image": {"data": b64encode(picture).decode()}}).encode()
        options: dict[str, Any] = {"data": body, "headers": JSON}
    elif door == "similarity":
        form = upload(jpeg(), "image1")
        form.add_field("image2", io.BytesIO(picture), filename="photo.jpg")
        options = {"data": form}
    elif door == "index-product-with-image":
        options = {"data": upload(picture, product_id="refused", name="Refused")}
    else:
        options = {"data": upload(picture)}
    found, problem = await client.call("POST", f"/api/v1/{door}", **options)
    assert (found, problem["type"]) == (status, f"urn:catalens:problem:{kind}"), problem


UPRIGHT = scene(64, 96)
GOOD_PICTURES = {
    "one-pixel": encode(plain((200, 10, 10), 1, 1), "PNG"),
    "animated-gif": animated_gif((0, 160, 0), (255, 255, 255)),
    "cmyk-jpeg": encode(scene(80, 80).convert("CMYK"), "JPEG"),
    "sixteen-bit-png": encode(Image.linear_gradient("L").convert("I;16"), "PNG"),
    "transparent-png": encode(Image.new("RGBA", (40, 40), (0, 0, 200, 90)), "PNG"),
    "rotated-photo": rotated_jpeg(UPRIGHT.transpose(Image.Transpose.ROTATE_90), 6),
}


@pytest.mark.parametrize("name", GOOD_PICTURES)
async def test_odd_pictures_are_indexed_and_find_themselves(client: Client, name: str) -> None:
    form = upload(GOOD_PICTURES[name], product_id=name, name=f"Picture {name}")
    status, receipt = await client.call("POST", "/api/v1/index-product-with-image?wait=true&timeout=60", data=form)
    assert (status, receipt["status"]) == (200, "indexed"), receipt
    client.accepted[name] = f"Picture {name}"
    assert (await client.get(name))["image_status"] == "ok"
    status, found = await client.call("POST", "/api/v1/search-image", data=upload(GOOD_PICTURES[name]))
    assert (status, found["results"][0]["product_id"]) == (200, name)
    if name == "rotated-photo":
        assert (found["query_image"]["width"], found["query_image"]["height"]) == UPRIGHT.size
        _, found = await client.call("POST", "/api/v1/search-image", data=upload(encode(UPRIGHT, "PNG")))
        assert found["results"][0]["product_id"] == name


# --- products that are odd but right ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("product_id", "name"),
    [
        ("emoji", "Robe d'été 👗🏽 \u200d rouge"),
        ("controls", "a\x00b\x1b[31m\r\n\x7f"),
        ("bidi", "\u202egnp.exe"),
        ("a.b_c-d:e", "Odd id"),
        ("long", "é" * 512),
    ],
)
async def test_odd_names_are_kept_as_they_are(client: Client, product_id: str, name: str) -> None:
    await client.put(product_id, name=name)
    assert (await client.get(product_id))["name"] == name


async def test_a_huge_price_is_a_price(client: Client) -> None:
    await client.put("dear", name="Dear", price=1e308, stock=2**63 - 1)
    product = await client.get("dear")
    assert (product["price"], product["stock"]) == (1e308, 2**63 - 1)


async def test_an_integer_may_be_written_with_a_point(client: Client) -> None:
    await client.put("pointed", name="Pointed")
    assert (await client.call("POST", "/api/v1/search", json={"query": "Pointed", "limit": 1.0}))[1]["count"] == 1
    assert (await client.call("GET", f"{PRODUCTS}?limit=1.0"))[1]["count"] == 1


async def test_equal_and_older_versions_have_no_effect(client: Client) -> None:
    assert (await client.put("versions", name="Five", version=5))["status"] == "indexed"
    await client.call("PUT", f"{PRODUCTS}/versions?wait=true", json={"name": "Another five", "version": 5})
    _, older = await client.call("PUT", f"{PRODUCTS}/versions?wait=true", json={"name": "Three", "version": 3})
    assert older["status"] == "superseded"
    _, late = await client.call("DELETE", f"{PRODUCTS}/versions?wait=true&version=4")
    assert late["status"] == "superseded"
    product = await client.get("versions")
    assert (product["name"], product["version"]) == ("Five", 5)


async def test_a_late_product_does_not_undo_its_deletion(client: Client) -> None:
    await client.put("deleted", name="Deleted", version=5)
    _, receipt = await client.call("DELETE", f"{PRODUCTS}/deleted?wait=true&version=7")
    assert receipt["status"] == "indexed"
    _, receipt = await client.call("PUT", f"{PRODUCTS}/deleted?wait=true", json={"name": "Six", "version": 6})
    assert receipt["status"] == "superseded"
    assert (await client.call("GET", f"{PRODUCTS}/deleted"))[0] == 404
    del client.accepted["deleted"]


# --- many products ------------------------------------------------------------------------------------------


async def test_one_bad_line_of_a_thousand_costs_that_line_only(client: Client) -> None:
    names = {f"line-{number}": f"Line {number}" for number in range(1, 1001)}
    lines = [json.dumps({"product_id": product_id, "name": name}).encode() for product_id, name in names.items()]
    lines[499] = lines[499][:-1]
    del names["line-500"]
    status, tally = await client.call("POST", PRODUCTS, data=b"\n".join(lines), headers=NDJSON)
    assert (status, tally["accepted"], tally["rejected"]) == (200, 999, 1)
    assert [error["line"] for error in tally["errors"]] == [500]
    client.accepted.update(names)


async def test_every_kind_of_bad_line_costs_that_line_only(client: Client) -> None:
    lines = [
        b'{"product_id": "first", "name": "First"}',
        DEEP,
        b"\xff\xfe",
        b'{"product_id": "x", "name": "x", "price": NaN}',
        b'{"product_id": "a/b", "name": "x"}',
        b'{"product_id": "x", "name": "x", "colour": "red"}',
        b'{"product_id": "x", "name": "' + b"x" * 33 * MIB + b'"}',
        json.dumps(
            {"product_id": "x", "name": "x", "images": [{"data": b64encode(png_bomb(20_000, 20_000)).decode()}]}
        ).encode(),
        b'{"product_id": "last", "name": "Last"}',
    ]
    status, tally = await client.call("POST", PRODUCTS, data=b"\n".join(lines), headers=NDJSON)
    assert (status, tally["accepted"], tally["rejected"]) == (200, 2, 7)
    assert [error["line"] for error in tally["errors"]] == [2, 3, 4, 5, 6, 7, 8]
    client.accepted.update(first="First", last="Last")


# --- after all that -----------------------------------------------------------------------------------------


async def test_the_process_still_serves_and_lost_nothing(client: Client, accepted: dict[str, str]) -> None:
    await client.put("after", name="After all that")
    await client.settle()
    found: dict[str, str] = {}
    after: str | None = ""
    while after is not None:
        _, page = await client.call("GET", f"{PRODUCTS}?limit=100&after={after}" if after else f"{PRODUCTS}?limit=100")
        found |= {product["product_id"]: product["name"] for product in page["products"]}
        after = page["next"]
    assert found == accepted
    _, answer = await client.call("POST", "/api/v1/search", json={"query": "After all that", "mode": "lexical"})
    assert answer["results"][0]["product_id"] == "after"
    assert (await client.call("GET", "/readyz"))[0] == 200
