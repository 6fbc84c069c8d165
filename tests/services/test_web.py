"""What every HTTP service does with what clients send: problems for the bad, answers for the good, and it lives on."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import pytest
import structlog
from aiohttp import FormData, web
from jsonschema_rs import validator_for
from pydantic import Field, SecretStr
from structlog.testing import capture_logs

from catalens import keys
from catalens.domain import Product, Value
from catalens.errors import (
    Conflict,
    ForbiddenUrl,
    InvalidPicture,
    Misconfigured,
    NotFound,
    Overloaded,
    StorageFull,
    Transient,
)
from catalens.keys import Keyring, digest_of
from catalens.settings import ApiKey, HttpSettings, Scope, Settings
from catalens.telemetry import Metrics
from catalens.web import (
    PICTURE,
    Operation,
    ProblemDetails,
    build_app,
    read_form,
    read_json,
    read_params,
    read_product_id,
    reply,
    serving,
    tenant_of,
)

MAX_BODY = 1_000_000
SECRET, OTHER = "a-secret-of-the-shop", "another-secret-key!"


class Params(Value):
    limit: Annotated[int, Field(ge=1, le=100)] = 10
    price: Annotated[float, Field(ge=0)] | None = None
    variants: bool = False
    after: str | None = None


class Fields(Value):
    product_id: str
    weight: Annotated[float, Field(ge=0, le=1)] = 0.5


class Service:
    """Operations that use every reader once."""

    def __init__(self) -> None:
        self.state: dict[str, str] = {"encoder": "ok"}
        self.entered = asyncio.Event()
        self.leave = asyncio.Event()
        self.error: Exception | None = None

    def operations(self) -> list[Operation]:
        return [
            Operation("PUT", "/products/{product_id}", self.put, "put", "t", "ingest", body=Product, params=Params),
            Operation("POST", "/form", self.form, "form", "t", "ingest", form=Fields, pictures=(PICTURE,)),
            Operation("GET", "/tenant", self.tenant, "tenant", "t", "query"),
            Operation("GET", "/page", self.tenant, "page", "t", "public", params=None),
            Operation("GET", "/admin", self.tenant, "admin", "t", "admin"),
            Operation("GET", "/state", self.tenant, "state", "t", "keyed"),
            Operation("POST", "/slow", self.slow, "slow", "t", "query"),
            Operation("GET", "/error", self.fail, "error", "t", "query"),
            Operation("GET", "/stream", self.stream, "stream", "t", "query"),
        ]

    async def ready(self) -> Mapping[str, str]:
        return self.state

    async def put(self, request: web.Request) -> web.StreamResponse:
        product_id, params = read_product_id(request), read_params(request, Params)
        product = await read_json(request, Product)
        return reply({"id": product_id, "params": params.model_dump(), "product": product.model_dump(mode="json")})

    async def form(self, request: web.Request) -> web.StreamResponse:
        form = await read_form(request)
        fields = form.values(Fields, pictures=PICTURE)
        return reply({**fields.model_dump(), "picture": form.picture().hex()})

    async def tenant(self, request: web.Request) -> web.StreamResponse:
        return reply({"tenant": tenant_of(request), "request": structlog.contextvars.get_contextvars()})

    async def slow(self, _request: web.Request) -> web.StreamResponse:
        self.entered.set()
        await self.leave.wait()
        return reply({})

    async def fail(self, _request: web.Request) -> web.StreamResponse:
        assert self.error is not None
        raise self.error

    async def stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"half of it")
        raise RuntimeError("in the middle")


class Site:
    """A running service and a client of it."""

    def __init__(self, service: Service, url: str, session: aiohttp.ClientSession) -> None:
        self.service = service
        self.url = url
        self.session = session

    async def call(self, method: str, path: str, **options: Any) -> tuple[int, Any, Mapping[str, str]]:
        async with self.session.request(method, self.url + path, **options) as answer:
            return answer.status, await answer.json(content_type=None), answer.headers

    async def put(self, body: bytes, path: str = "/products/a", content_type: str = "application/json") -> Any:
        status, answer, _ = await self.call("PUT", path, data=body, headers={"Content-Type": content_type})
        return status, answer

    async def raw(self, data: bytes) -> bytes:
        """Send `data` as it is and return all that comes back until the service closes."""
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(data)
            await writer.drain()
            return await reader.read()
        finally:
            writer.close()
            await writer.wait_closed()


def made(**given: Any) -> Settings:
    return Settings(_env_file=None, **given)


@asynccontextmanager
async def running(**given: Any) -> AsyncIterator[Site]:
    http = HttpSettings(port=0, max_body=MAX_BODY, **given.pop("http", {}))
    settings = made(http=http, **given)
    service = Service()
    app = build_app(service.operations(), settings, Metrics(), ready=service.ready, title="Test")
    async with serving(app, settings) as url, aiohttp.ClientSession() as session:
        yield Site(service, url, session)


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with running() as found:
        yield found


GOOD: dict[str, Any] = {"product_id": "a", "name": "Shoe"}
good = json.dumps(GOOD).encode()


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        (b"", 400, None),
        (b"  \n", 400, None),
        (b'{"product_id": "a", "name": ', 400, None),
        (good + b"x", 400, None),
        (b"[" * 50_000, 400, None),
        (b'{"a":' * 50_000, 400, None),
        (good[:-1] + b', "price": NaN}', 400, None),
        (good[:-1] + b', "price": -Infinity}', 400, None),
        (json.dumps(GOOD).encode("utf-16"), 400, None),
        (b'{"product_id": "a", "name": "\xe9t\xe9"}', 400, None),
        (b'{"product_id": "a", "name": "\\ud800"}', 400, None),
        (b"[]", 422, ""),
        (b"null", 422, ""),
        (b"{}", 422, "product_id"),
        (good[:-1] + b', "price": 1e400}', 422, "price"),
        (good[:-1] + b', "price": -1}', 422, "price"),
        (good[:-1] + b', "price": "12"}', 422, "price"),
        (good[:-1] + b', "price": 1' + b"0" * 400 + b"}", 422, "price"),
        (good[:-1] + b', "stock": 1' + b"0" * 400 + b"}", 422, "stock"),
        (good[:-1] + b', "stock": 1.5}', 422, "stock"),
        (good[:-1] + b', "colour": "red"}', 422, "colour"),
        (good[:-1] + b', "images": [{"url": "http://x/", "alt": "y"}]}', 422, "images.0.alt"),
        (good[:-1] + b', "images": [{}]}', 422, "images.0"),
        (good[:-1] + b', "images": {}}', 422, "images"),
        (good[:-1] + b', "attributes": {"c": null}}', 422, "attributes.c"),
        (good[:-1] + b', "attributes": {"c": [1]}}', 422, "attributes.c"),
        (b'{"product_id": "a/b", "name": "x"}', 422, "product_id"),
        (b'{"product_id": "a", "name": ""}', 422, "name"),
    ],
)
async def test_bad_bodies_are_problems(site: Site, body: bytes, status: int, field: str | None) -> None:
    found, problem = await site.put(body)
    assert found == status
    assert problem["status"] == status
    assert validator_for(ProblemDetails.model_json_schema()).is_valid({**problem, "errors": problem.get("errors")})
    if field is not None:
        assert field in [error["field"] for error in problem["errors"]]
    assert (await site.put(good))[0] == 200


async def test_large_prices_and_odd_names_are_kept(site: Site) -> None:
    name = "Ta\u0007b\tle\u0000 👟 \u202e"
    body = json.dumps({**GOOD, "name": name, "price": 1e308})
    status, answer = await site.put(body.encode())
    assert status == 200
    assert (answer["product"]["name"], answer["product"]["price"]) == (name, 1e308)


async def test_a_missing_content_type_is_json(site: Site) -> None:
    skip = {"skip_auto_headers": ("Content-Type",)}
    status, answer, _ = await site.call("PUT", "/products/a", data=good, **skip)
    assert (status, answer["id"]) == (200, "a")


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "image/png", "x", ";;"])
async def test_another_content_type_is_415(site: Site, content_type: str) -> None:
    assert (await site.put(good, content_type=content_type))[0] == 415


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "application/ld+json", "APPLICATION/JSON"])
async def test_json_by_other_names_is_read(site: Site, content_type: str) -> None:
    assert (await site.put(good, content_type=content_type))[0] == 200


@pytest.mark.parametrize("path", ["a%2Fb", "a%20b", "%ff", "%zz", "%C3%A9", "a" * 129, "%00", "a%0A"])
async def test_an_id_that_is_none_is_422(site: Site, path: str) -> None:
    request = (
        f"PUT /products/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(good)}\r\nConnection: close\r\n"
    )
    answer = await site.raw(request.encode() + b"\r\n" + good)
    assert answer.startswith(b"HTTP/1.1 422 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["errors"][0]["field"] == "product_id"


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=-1", "limit"),
        ("limit=1000000000", "limit"),
        ("limit=ten", "limit"),
        ("limit=", "limit"),
        ("limit=1.5", "limit"),
        ("limit=010", "limit"),
        ("limit=null", "limit"),
        ("limit=true", "limit"),
        ("price=NaN", "price"),
        ("price=1e999", "price"),
        ("variants=yes", "variants"),
        ("variants=1", "variants"),
        ("limit=5&limit=5", "limit"),
        ("colour=red", "colour"),
    ],
)
async def test_bad_parameters_are_422(site: Site, query: str, field: str) -> None:
    status, problem = await site.put(good, f"/products/a?{query}")
    assert status == 422
    assert [error["field"] for error in problem["errors"]] == [field]


async def test_what_takes_no_parameters_refuses_them_and_a_page_takes_any(site: Site) -> None:
    status, problem, _ = await site.call("GET", "/tenant?colour=red")
    assert (status, [error["field"] for error in problem["errors"]]) == (422, ["colour"])
    assert (await site.call("GET", "/tenant?"))[0] == 200
    assert (await site.call("GET", "/page?colour=red&colour=blue"))[0] == 200


async def test_parameters_are_read_as_json(site: Site) -> None:
    _, answer = await site.put(good, "/products/a?limit=5&price=1&variants=true&after=12")
    assert answer["params"] == {"limit": 5, "price": 1.0, "variants": True, "after": "12"}


async def test_unknown_paths_and_methods_are_problems(site: Site) -> None:
    status, problem, headers = await site.call("GET", "/nothing")
    assert (status, problem["status"], headers["Content-Type"]) == (404, 404, "application/problem+json")
    status, problem, headers = await site.call("DELETE", "/products/a")
    assert (status, problem["status"], headers["Allow"]) == (405, 405, "PUT")


# --- size and speed -----------------------------------------------------------------------------------------


async def test_a_body_over_the_limit_is_413_with_and_without_its_length(site: Site) -> None:
    large = b'{"name": "' + b"x" * MAX_BODY + b'"}'

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(large), 50_000):
            yield large[start : start + 50_000]

    for body in (large, chunks()):
        headers = {"Content-Type": "application/json"}
        status, problem, _ = await site.call("PUT", "/products/a", data=body, headers=headers)
        assert (status, problem["status"]) == (413, 413)
    assert (await site.put(good))[0] == 200


async def test_a_length_over_the_limit_is_413_before_anything_is_sent(site: Site) -> None:
    head = f"PUT /products/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: {MAX_BODY + 1}\r\n\r\n"
    assert (await _first_line(site, head.encode())).startswith(b"HTTP/1.1 413 ")


async def test_a_compressed_body_counts_unpacked(site: Site) -> None:
    async def compressed(body: bytes) -> int:
        headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
        data = gzip.compress(body)
        assert len(data) < 10_000
        async with site.session.put(f"{site.url}/products/a", data=data, headers=headers, compress=None) as answer:
            return answer.status

    assert await compressed(good) == 200
    assert await compressed(b'{"name": "' + b"x" * MAX_BODY + b'"}') == 413


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_broken_compression_is_400(site: Site, encoding: str) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
    status, _, _ = await site.call("PUT", "/products/a", data=b"\xff" * 50, headers=headers)
    assert status == 400
    assert (await site.put(good))[0] == 200


async def test_a_slow_body_is_408() -> None:
    async with running(http={"body_timeout": 0.05}) as site:
        head = f"PUT /products/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(good)}\r\n\r\n".encode()
        answer = await asyncio.wait_for(_first_line(site, head + good[:-1]), 10)
        assert answer == b"HTTP/1.1 408 Request Timeout\r\n"
        assert (await site.put(good))[0] == 200


async def _first_line(site: Site, data: bytes) -> bytes:
    host, _, port = site.url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(data)
    line = await reader.readline()
    writer.close()
    await writer.wait_closed()
    return line


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"nonsense\r\n\r\n",
        b"GET /%s HTTP/1.1\r\nHost: localhost\r\n\r\n" % (b"a" * 10_000),
        b"PUT /products/a HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"PUT /products/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    ],
)
async def test_what_is_no_http_is_answered_400_and_harms_nobody(site: Site, data: bytes) -> None:
    assert (await site.raw(data)).split(b" ")[1] == b"400"
    assert (await site.put(good))[0] == 200


async def test_a_connection_that_breaks_in_a_body_harms_nobody(site: Site) -> None:
    host, _, port = site.url.removeprefix("http://").rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"PUT /products/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    await writer.drain()
    writer.transport.abort()
    assert (await site.put(good))[0] == 200


async def test_too_many_requests_at_once_are_429_but_probes_answer() -> None:
    async with running(http={"max_concurrent": 1}) as site:
        first = asyncio.create_task(site.call("POST", "/slow"))
        await site.service.entered.wait()
        status, problem, headers = await site.call("GET", "/tenant")
        assert (status, problem["status"], headers["Retry-After"]) == (429, 429, "1")
        for probe in ("/livez", "/readyz", "/openapi.json"):
            assert (await site.call("GET", probe))[0] == 200
        site.service.leave.set()
        assert (await first)[0] == 200
        assert (await site.call("GET", "/tenant"))[0] == 200


# --- forms --------------------------------------------------------------------------------------------------


def multipart(parts: bytes, boundary: str = "xyz") -> dict[str, Any]:
    return {"data": parts, "headers": {"Content-Type": f"multipart/form-data; boundary={boundary}"}}


def part(name: str, content: bytes, more: str = "") -> bytes:
    return f'--xyz\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + content + b"\r\n"


@pytest.mark.parametrize("name", PICTURE)
async def test_a_form_is_read_with_its_picture(site: Site, name: str) -> None:
    form = FormData()
    form.add_field("product_id", "été 1")
    form.add_field("weight", "1")
    form.add_field(name, b"\x00\r\n--not the boundary\r\n\xff", filename="été.jpg", content_type="image/jpeg")
    status, answer, _ = await site.call("POST", "/form", data=form)
    assert status == 200
    picture = b"\x00\r\n--not the boundary\r\n\xff".hex()
    assert answer == {"product_id": "été 1", "weight": 1.0, "picture": picture}


@pytest.mark.parametrize(
    ("parts", "status", "field"),
    [
        (b"", 400, None),
        (b"--xyz", 400, None),
        (b"--xyz--\r\n", 422, "product_id"),
        (part("product_id", b"a"), 400, None),
        (part("product_id", b"\xff") + b"--xyz--", 400, None),
        (b"--xyz\r\nContent-Type: text/plain\r\n\r\na\r\n--xyz--", 400, None),
        (b"--xyz\r\n\x00\xff:\r\n--xyz--", 400, None),
        (part("product_id", b"a") + b"--xyz--", 422, "file"),
        (part("product_id", b"a") * 2 + b"--xyz--", 422, "product_id"),
        (part("product_id", b"a") + part("file", b"1") * 2 + b"--xyz--", 422, "file"),
        (part("product_id", b"a") + part("file", b"1") + part("image", b"2") + b"--xyz--", 422, "file"),
        (part("product_id", b"a") + part("other", b"1", '; filename="x"') + b"--xyz--", 422, "other"),
        (part("product_id", b"a") + part("colour", b"red") + part("file", b"1") + b"--xyz--", 422, "colour"),
        (part("product_id", b"a") + part("weight", b"heavy") + part("file", b"1") + b"--xyz--", 422, "weight"),
        (part("x", b"") * 200 + b"--xyz--", 400, None),
    ],
)
async def test_bad_forms_are_problems(site: Site, parts: bytes, status: int, field: str | None) -> None:
    found, problem, _ = await site.call("POST", "/form", **multipart(parts))
    assert (found, problem["status"]) == (status, status)
    if field is not None:
        assert field in [error["field"] for error in problem["errors"]]


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("multipart/form-data", 400),
        ("multipart/form-data; boundary=", 400),
        (f"multipart/form-data; boundary={'x' * 71}", 400),
        ("multipart/mixed; boundary=xyz", 415),
        ("application/json", 415),
    ],
)
async def test_a_form_of_another_type_is_refused(site: Site, content_type: str, status: int) -> None:
    found, _, _ = await site.call("POST", "/form", data=b"--xyz--", headers={"Content-Type": content_type})
    assert found == status


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        (b"product_id=a&weight=2", 422, "weight"),
        (b"product_id=a&product_id=b", 422, "product_id"),
        (b"product_id=%ff", 400, None),
        (b"product_id=\xff", 400, None),
        (b"&".join([b"a=1"] * 200), 400, None),
        (b"product_id=a", 422, "file"),
    ],
)
async def test_bad_urlencoded_forms_are_problems(site: Site, body: bytes, status: int, field: str | None) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    found, problem, _ = await site.call("POST", "/form", data=body, headers=headers)
    assert found == status
    if field is not None:
        assert field in [error["field"] for error in problem["errors"]]


# --- who may call -------------------------------------------------------------------------------------------

KEYS = (
    ApiKey(name="shop", secret=SecretStr(SECRET)),
    ApiKey(name="other", secret=SecretStr(OTHER), tenant="other"),
)


@pytest.mark.parametrize(
    ("headers", "tenant"),
    [
        ({"Authorization": f"Bearer {SECRET}"}, "default"),
        ({"Authorization": f"bearer {OTHER}"}, "other"),
        ({"X-API-Key": OTHER}, "other"),
    ],
)
async def test_a_key_opens_its_tenant(headers: dict[str, str], tenant: str) -> None:
    async with running(api_keys=KEYS) as site:
        status, answer, _ = await site.call("GET", "/tenant", headers=headers)
        assert (status, answer["tenant"]) == (200, tenant)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": f"Bearer {SECRET[:-1]}"},
        {"Authorization": f"Basic {SECRET}"},
        {"Authorization": "Bearer clé"},
        {"X-API-Key": ""},
        {"X-API-Key": f"{SECRET}x"},
    ],
)
async def test_no_key_or_an_unknown_one_is_401(headers: dict[str, str]) -> None:
    async with running(api_keys=KEYS) as site:
        status, problem, answered = await site.call("GET", "/tenant", headers=headers)
        assert (status, problem["status"]) == (401, 401)
        assert answered["WWW-Authenticate"].startswith("Bearer")
        assert (await site.call("GET", "/page", headers=headers))[0] == 200
        assert (await site.call("GET", "/livez", headers=headers))[0] == 200


def hashed(name: str, secret: str, **more: Any) -> str:
    return json.dumps({"name": name, "sha256": digest_of(secret), **more}) + "\n"


def bearer(secret: str) -> dict[str, Any]:
    return {"headers": {"Authorization": f"Bearer {secret}"}}


@pytest.mark.parametrize(
    ("scopes", "open_to"),
    [
        (("query",), {"/tenant", "/state", "/page"}),
        (("ingest",), {"/products/a", "/state", "/page"}),
        (("admin",), {"/admin", "/state", "/page"}),
        (("ingest", "query", "admin"), {"/products/a", "/tenant", "/admin", "/state", "/page"}),
    ],
)
async def test_a_key_does_what_its_scopes_say(scopes: tuple[Scope, ...], open_to: set[str]) -> None:
    needed = {"/products/a": "ingest", "/tenant": "query", "/admin": "admin"}
    async with running(api_keys=(ApiKey(name="shop", secret=SecretStr(SECRET), scopes=scopes),)) as site:
        for path in ("/products/a", "/tenant", "/admin", "/state", "/page"):
            method, data = ("PUT", good) if path == "/products/a" else ("GET", None)
            headers = bearer(SECRET)["headers"] | {"Content-Type": "application/json"}
            status, problem, _ = await site.call(method, path, data=data, headers=headers)
            assert status == (200 if path in open_to else 403)
            if status == 403:
                assert problem["type"] == "urn:catalens:problem:scope"
                assert f"the scope {needed[path]}," in problem["detail"]


def replace(file: Path, text: str) -> None:
    fresh = file.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(file)


async def test_keys_of_the_file_come_and_go_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_EVERY", 0.01)
    file = tmp_path / "keys.jsonl"
    file.write_text(hashed("shop", SECRET, tenant="brand-a", scopes=["query"]))

    async def until(site: Site, secret: str, wanted: int) -> None:
        async with asyncio.timeout(30):
            while (await site.call("GET", "/tenant", **bearer(secret)))[0] != wanted:
                await asyncio.sleep(0.01)

    with capture_logs() as logs:
        async with running(api_keys_file=file) as site:
            status, answer, _ = await site.call("GET", "/tenant", **bearer(SECRET))
            assert (status, answer["tenant"]) == (200, "brand-a")
            assert (await site.call("GET", "/tenant", **bearer(OTHER)))[0] == 401
            with file.open("a") as more:
                more.write(hashed("successor", OTHER))
            await until(site, OTHER, 200)
            replace(file, hashed("successor", OTHER))
            await until(site, SECRET, 401)
            replace(file, "nonsense")
            async with asyncio.timeout(30):
                while "catalens_api_keys_readable 0.0" not in await _metrics(site):
                    await asyncio.sleep(0.01)
            assert (await site.call("GET", "/tenant", **bearer(OTHER)))[0] == 200
            file.unlink()
            assert (await site.call("GET", "/tenant", **bearer(OTHER)))[0] == 200
            replace(file, hashed("shop", SECRET))
            await until(site, SECRET, 200)
            assert "catalens_api_keys_readable 1.0" in await _metrics(site)
    broken = [line for line in logs if line["event"] == "keys.broken"]
    assert "keys.jsonl, line 1" in broken[0]["error"]
    assert len(broken) <= 2  # nonsense, and perhaps gone: not once a look
    assert SECRET not in str(logs)
    assert OTHER not in str(logs)


async def _metrics(site: Site) -> str:
    async with site.session.get(f"{site.url}/metrics") as answer:
        return await answer.text()


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"name": "shop"}',
        json.dumps({"name": "shop", "secret": SECRET}),
        hashed("shop", SECRET, scopes=[]),
        hashed("shop", SECRET, scopes=["root"]),
        hashed("shop", SECRET, tenant="Not A Tenant"),
        hashed("shop", SECRET, expires="2030-01-01T00:00:00"),
        hashed("shop", SECRET, rate=0),
        hashed("shop", SECRET, colour="red"),
        hashed("shop", SECRET).replace(digest_of(SECRET), SECRET),
        hashed("a", SECRET) + hashed("b", SECRET),
    ],
)
def test_a_broken_file_of_keys_stops_the_start(tmp_path: Path, content: str) -> None:
    (tmp_path / "keys").write_text(content)
    with pytest.raises(Misconfigured) as refused:
        Keyring(made(api_keys_file=tmp_path / "keys"))
    assert SECRET not in str(refused.value)
    with pytest.raises(Misconfigured, match="cannot be read"):
        Keyring(made(api_keys_file=tmp_path / "none"))


async def test_a_key_ends_on_its_day() -> None:
    past, future = (datetime.now(UTC) + timedelta(days=days) for days in (-1, 1))
    given = (
        ApiKey(name="old", secret=SecretStr(SECRET), expires=past),
        ApiKey(name="new", secret=SecretStr(OTHER), expires=future),
    )
    async with running(api_keys=given) as site:
        status, problem, _ = await site.call("GET", "/tenant", **bearer(SECRET))
        assert (status, problem["detail"]) == (401, "the API key has expired")
        assert (await site.call("GET", "/tenant", **bearer(OTHER)))[0] == 200


async def test_a_key_over_its_rate_is_429_and_no_other_key_feels_it() -> None:
    given = (
        ApiKey(name="shop", secret=SecretStr(SECRET), rate=0.4),
        ApiKey(name="other", secret=SecretStr(OTHER), tenant="other"),
    )
    async with running(api_keys=given) as site:
        statuses, headers = [], []
        for _ in range(3):
            status, _, answered = await site.call("GET", "/tenant", **bearer(SECRET))
            statuses.append(status)
            headers.append(answered)
        assert statuses == [200, 200, 429]
        assert headers[0]["RateLimit-Policy"] == '"key";q=2;w=5'
        assert [one["RateLimit"] for one in headers] == ['"key";r=1;t=3', '"key";r=0;t=5', '"key";r=0;t=5']
        assert headers[2]["Retry-After"] in ("2", "3")
        assert headers[2]["Content-Type"].startswith("application/problem+json")
        status, _, answered = await site.call("GET", "/tenant", **bearer(OTHER))
        assert status == 200
        assert "RateLimit" not in answered
        assert (await site.call("GET", "/page", **bearer(SECRET)))[0] == 200


async def test_no_key_gets_into_a_log() -> None:
    """Not by broken HTTP either, whose errors quote what was sent."""
    marks = ("a-very-secret-key", "another-very-secret")
    with capture_logs() as logs:
        async with running(api_keys=KEYS) as site:
            for mark in marks:
                for name in ("Authorization: Bearer ", "X-API-Key: "):
                    await site.raw(f"GET /tenant HTTP/1.1\r\nHost: localhost\r\n{name}{mark}\x01\r\n\r\n".encode())
                    await site.raw(f"GET /tenant HTTP/1.1\r\nHo st: x\r\n{name}{mark}\r\n\r\n".encode())
                    await site.raw(f"GET /tenant HTTP/1.1\r\n{name.replace(':', ' :')}{mark}\r\n\r\n".encode())
                await site.call("GET", "/tenant", **bearer(mark))
            await site.call("GET", "/error", **bearer(SECRET))  # a fault of our own, told with its traceback
    assert {"http.broken", "http.failed"} <= {line["event"] for line in logs}
    assert not [mark for mark in (*marks, SECRET) if mark in str(logs)]


SHOP = "https://shop.example"


async def test_pages_of_a_known_site_may_call() -> None:
    preflight = {"Origin": SHOP, "Access-Control-Request-Method": "PUT"}
    async with running(api_keys=KEYS, http={"cors_origins": (SHOP,)}) as site:
        async with site.session.options(f"{site.url}/products/a", headers=preflight) as answer:
            assert answer.status == 204
            assert answer.headers["Access-Control-Allow-Origin"] == SHOP
            assert "PUT" in answer.headers["Access-Control-Allow-Methods"]
            assert "Authorization" in answer.headers["Access-Control-Allow-Headers"]
        for path, status in (("/tenant", 200), ("/nothing", 404), ("/tenant?x=%00", 422)):
            found, _, headers = await site.call("GET", path, headers=bearer(SECRET)["headers"] | {"Origin": SHOP})
            assert (found, headers["Access-Control-Allow-Origin"]) == (status, SHOP)
            assert "Retry-After" in headers["Access-Control-Expose-Headers"]
            assert headers["Vary"] == "Origin"
            assert "Access-Control-Allow-Credentials" not in headers
        found, _, headers = await site.call("GET", "/tenant", headers={"Origin": SHOP})
        assert (found, headers["Access-Control-Allow-Origin"]) == (401, SHOP)


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "https://shop.example.evil.example", "null", f"{SHOP}/", ""]
)
async def test_pages_of_other_sites_may_not(origin: str) -> None:
    preflight = {"Origin": origin, "Access-Control-Request-Method": "PUT"}
    async with running(api_keys=KEYS, http={"cors_origins": (SHOP,)}) as site:
        for method, headers in (("OPTIONS", preflight), ("GET", {"Origin": origin, "X-API-Key": SECRET})):
            status, _, answered = await site.call(method, "/tenant", headers=headers)
            assert status == (200 if method == "GET" else 405)
            assert not [name for name in answered if name.lower().startswith("access-control")]
            assert answered["Vary"] == "Origin"


async def test_without_keys_a_known_site_may_change_things() -> None:
    headers = {"Sec-Fetch-Site": "cross-site", "Content-Type": "application/json"}
    async with running(http={"cors_origins": (SHOP,)}) as site:
        for origin, status in ((SHOP, 200), ("https://evil.example", 403)):
            found, _, _ = await site.call("PUT", "/products/a", data=good, headers=headers | {"Origin": origin})
            assert found == status


@pytest.mark.parametrize("origin", ["*", "shop.example", "https://shop.example/", "https://Shop.example", "null"])
def test_an_origin_is_exact(origin: str) -> None:
    with pytest.raises(ValueError, match="cors_origins"):
        HttpSettings(cors_origins=(origin,))


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::", "192.0.2.1", "shop.example"])
def test_binding_beyond_loopback_needs_a_key_or_permission(host: str, tmp_path: Path) -> None:
    async def ready() -> Mapping[str, str]:
        return {}

    def build(**given: Any) -> web.Application:
        settings = made(http=HttpSettings(host=host), **given)
        return build_app([], settings, Metrics(), ready=ready, title="Test")

    with pytest.raises(Misconfigured, match="CATALENS_API_KEYS"):
        build()
    build(api_keys=KEYS)
    (tmp_path / "keys").write_text("# none yet\n")
    build(api_keys_file=tmp_path / "keys")
    build(allow_anonymous=True)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:1234", 200),
        ("shop.localhost", 200),
        ("127.0.0.1:8080", 200),
        ("127.8.9.10", 200),
        ("[::1]:8080", 200),
        ("evil.example", 403),
        (":8080", 403),
        ("127.0.0.1.evil.example", 403),
        ("192.168.0.1", 403),
    ],
)
async def test_without_keys_only_this_machine_names_the_service(host: str, status: int) -> None:
    async with running() as site:
        assert (await site.call("GET", "/tenant", headers={"Host": host}))[0] == status
    async with running(allow_anonymous=True) as site:
        assert (await site.call("GET", "/tenant", headers={"Host": host}))[0] == 200
    async with running(api_keys=KEYS) as site:
        headers = {"Host": host, "X-API-Key": SECRET}
        assert (await site.call("GET", "/tenant", headers=headers))[0] == 200


async def test_another_sites_page_may_not_change_anything_without_a_key(site: Site) -> None:
    def headers(value: str) -> dict[str, str]:
        return {"Sec-Fetch-Site": value, "Content-Type": "application/json"}

    for value, status in (("cross-site", 403), ("same-origin", 200), ("none", 200)):
        found, _, _ = await site.call("PUT", "/products/a", data=good, headers=headers(value))
        assert found == status
    assert (await site.call("GET", "/tenant", headers=headers("cross-site")))[0] == 200


# --- answers ------------------------------------------------------------------------------------------------


async def test_request_ids_are_kept_or_made(site: Site) -> None:
    status, answer, headers = await site.call("GET", "/tenant", headers={"X-Request-Id": "order-42"})
    assert status == 200
    assert headers["X-Request-Id"] == answer["request"]["request_id"] == "order-42"
    made = set()
    for sent in ({}, {"X-Request-Id": "a b"}, {"X-Request-Id": "x" * 129}):
        _, problem, headers = await site.call("GET", "/nothing", headers=sent)
        assert headers["X-Request-Id"] == problem["request_id"]
        assert headers["X-Request-Id"] not in sent.values()
        made.add(headers["X-Request-Id"])
    assert len(made) == 3


@pytest.mark.parametrize("path", ["/tenant", "/nothing", "/livez", "/metrics"])
async def test_every_answer_has_the_security_headers(site: Site, path: str) -> None:
    async with site.session.get(site.url + path) as answer:
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
        assert "Referrer-Policy" in answer.headers
        assert "Access-Control-Allow-Origin" not in answer.headers
        assert "aiohttp" not in answer.headers["Server"]


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (Overloaded("full", retry_after=2.4), 429, "2"),
        (Transient("away"), 503, "1"),
        (StorageFull("disk"), 503, "1"),
        (NotFound("gone"), 404, None),
        (Conflict("twice"), 409, None),
        (InvalidPicture("not_a_picture", "text"), 415, None),
        (InvalidPicture("truncated", "cut"), 415, None),
        (InvalidPicture("too_many_bytes", "long"), 413, None),
        (InvalidPicture("too_many_pixels", "wide"), 413, None),
        (ForbiddenUrl("inside"), 422, None),
    ],
)
async def test_errors_become_their_problem(site: Site, error: Exception, status: int, retry_after: str | None) -> None:
    site.service.error = error
    found, problem, headers = await site.call("GET", "/error")
    assert (found, problem["detail"]) == (status, str(error))
    assert headers.get("Retry-After") == retry_after


async def test_an_own_fault_is_a_500_that_tells_nothing(site: Site) -> None:
    site.service.error = RuntimeError("the password is swordfish")
    status, problem, _ = await site.call("GET", "/error")
    assert status == 500
    assert "swordfish" not in json.dumps(problem)


async def test_an_answer_that_breaks_off_is_seen_to_be_cut(site: Site) -> None:
    async with site.session.get(f"{site.url}/stream") as answer:
        with pytest.raises(aiohttp.ClientError):
            await answer.read()
    assert (await site.call("GET", "/tenant"))[0] == 200


async def test_readyz_names_what_fails(site: Site) -> None:
    assert (await site.call("GET", "/readyz"))[:2] == (200, {"status": "ok", "checks": {"encoder": "ok"}})
    site.service.state["index"] = "the disk is full"
    status, problem, headers = await site.call("GET", "/readyz")
    assert (status, problem["errors"]) == (503, [{"field": "index", "message": "the disk is full"}])
    assert headers["Retry-After"] == "1"
    assert (await site.call("GET", "/livez"))[0] == 200


async def test_metrics_count_by_route_and_never_by_path(site: Site) -> None:
    await site.put(good)
    await site.call("GET", "/nothing/at/all")
    async with site.session.get(f"{site.url}/metrics") as answer:
        text = await answer.text()
    line = 'catalens_http_requests_total{method="PUT",route="/products/{product_id}",status="200"} 1.0'
    assert line in text
    assert 'route="unmatched",status="404"' in text
    assert "/nothing" not in text


async def test_a_taken_port_says_what_to_do(site: Site) -> None:
    port = int(site.url.rpartition(":")[2])
    settings = made(http=HttpSettings(port=port))
    app = build_app([], settings, Metrics(), ready=site.service.ready, title="Test")
    with pytest.raises(Misconfigured, match="CATALENS_HTTP__PORT"):
        async with serving(app, settings):
            pass
