"""What the command line tells a service, and what it makes of the answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from catalens.errors import CatalensError
from catalens_standalone.client import Refused, Unreachable, connect


class Anything:
    """Answers every request with `answer` and keeps the headers it got."""

    def __init__(self) -> None:
        self.answer: Callable[[], web.Response] = lambda: web.json_response({})
        self.seen: list[web.Request] = []
        self.url = ""

    async def handle(self, request: web.Request) -> web.Response:
        self.seen.append(request)
        return self.answer()


async def serving() -> AsyncIterator[Anything]:
    anything = Anything()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", anything.handle)
    async with TestServer(app) as server:
        anything.url = str(server.make_url("")).rstrip("/")
        yield anything


@pytest.fixture
async def service() -> AsyncIterator[Anything]:
    async for anything in serving():
        yield anything


@pytest.fixture
async def elsewhere() -> AsyncIterator[Anything]:
    async for anything in serving():
        yield anything


async def test_the_key_goes_to_the_service_only(service: Anything, elsewhere: Anything) -> None:
    service.answer = elsewhere.answer = lambda: web.Response(body=b"picture")
    async with connect(service.url, "the-secret") as client:
        assert await client.picture("/api/v1/products/a/image") == b"picture"
        assert await client.picture(f"{elsewhere.url}/a.jpg") == b"picture"
    assert service.seen[0].headers["Authorization"] == "Bearer the-secret"
    assert service.seen[0].path == "/api/v1/products/a/image"
    assert "Authorization" not in elsewhere.seen[0].headers


async def test_a_problem_reads_as_one_sentence(service: Anything) -> None:
    problem = {
        "title": "Unprocessable",
        "status": 422,
        "detail": "two fields are wrong",
        "errors": [{"field": "limit", "message": "at most 100"}, {"field": "mode", "message": "unknown"}],
    }
    service.answer = lambda: web.json_response(problem, status=422, headers={"Retry-After": "3"})
    async with connect(service.url, None) as client:
        with pytest.raises(Refused) as refused:
            await client.search({})
    assert str(refused.value) == "Unprocessable: two fields are wrong (limit: at most 100; mode: unknown)"
    assert (refused.value.status, refused.value.retry_after, refused.value.passing) == (422, 3.0, False)


async def test_an_error_of_somebody_in_between_is_readable_too(service: Anything) -> None:
    service.answer = lambda: web.Response(status=502, text="<html>bad gateway</html>", content_type="text/html")
    async with connect(service.url, None) as client:
        with pytest.raises(Refused, match="HTTP 502 Bad Gateway") as refused:
            await client.stats()
    assert refused.value.passing


@pytest.mark.parametrize("text", ["<html>", "[]", "{}", '{"products": "many", "images_pending": 0, "lag": 0}'])
async def test_what_is_not_catalens_is_said_so(service: Anything, text: str) -> None:
    service.answer = lambda: web.Response(text=text)
    async with connect(service.url, None) as client:
        with pytest.raises(CatalensError, match="is not Catalens"):
            await client.stats()


async def test_a_product_that_is_not_there_is_none(service: Anything) -> None:
    service.answer = lambda: web.json_response({"title": "Not found", "status": 404}, status=404)
    async with connect(service.url, None) as client:
        assert await client.product("a/b") is None
    assert service.seen[0].raw_path == "/api/v1/products/a%2Fb"


@pytest.mark.parametrize("url", ["ftp://x.example", "nonsense", "http://"])
async def test_an_address_that_is_none(url: str) -> None:
    async with connect(url, None) as client:
        with pytest.raises(CatalensError, match=r"CATALENS_URL is no http\(s\) address"):
            await client.stats()


async def test_nobody_there() -> None:
    async with connect("http://127.0.0.1:1", None) as client:
        with pytest.raises(Unreachable, match="catalens serve"):
            await client.stats()
