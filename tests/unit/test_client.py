"""What the client tells a service, what it makes of the answers, and what it tries again."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from catalens.client import IN_FLIGHT, ONCE, CatalensClient, Embedding, NumberFacet, Refused, Unreachable
from catalens.errors import CatalensError


class Anything:
    """Answers every request with `answer` and keeps the headers it got."""

    def __init__(self) -> None:
        self.answer: Callable[[], web.Response] = lambda: web.json_response({})
        self.before: list[int | None] = []
        """Statuses to answer first; None hangs up."""
        self.seen: list[web.Request] = []
        self.bodies: list[bytes] = []
        self.url = ""

    async def handle(self, request: web.Request) -> web.Response:
        self.seen.append(request)
        self.bodies.append(await request.read())
        if not self.before:
            return self.answer()
        status = self.before.pop(0)
        if status is None:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        return web.json_response({"title": "Not now", "status": status}, status=status, headers={"Retry-After": "3"})


async def serving(anything: Anything) -> AsyncIterator[Anything]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", anything.handle)
    async with TestServer(app) as server:
        anything.url = str(server.make_url("")).rstrip("/")
        yield anything


@pytest.fixture
async def service() -> AsyncIterator[Anything]:
    async for anything in serving(Anything()):
        yield anything


@pytest.fixture
async def elsewhere() -> AsyncIterator[Anything]:
    async for anything in serving(Anything()):
        yield anything


async def test_the_key_goes_to_the_service_only(service: Anything, elsewhere: Anything) -> None:
    service.answer = elsewhere.answer = lambda: web.Response(body=b"picture")
    async with CatalensClient(service.url, "the-secret") as client:
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
    async with CatalensClient(service.url, retry=ONCE) as client:
        with pytest.raises(Refused) as refused:
            await client.search()
    assert str(refused.value) == "Unprocessable: two fields are wrong (limit: at most 100; mode: unknown)"
    assert (refused.value.status, refused.value.retry_after, refused.value.passing) == (422, 3.0, False)


@pytest.mark.parametrize(
    ("detail", "fields", "told"),
    [
        ("limit: too large", ["limit: too large"], "limit: too large"),
        ("limit: too large (and 1 more)", ["limit: too large", "mode: unknown"], "limit: too large; mode: unknown"),
        ("no picture", ["like.1: no picture"], "like.1: no picture"),
        ("not now", [], "not now"),
        ("", ["limit: too large"], "limit: too large"),
    ],
)
def test_a_problem_says_nothing_twice(detail: str, fields: list[str], told: str) -> None:
    errors = [(field, message) for field, _, message in (one.partition(": ") for one in fields)]
    assert str(Refused(422, "Invalid value", detail, errors=errors)) == f"Invalid value: {told}"


async def test_an_error_of_somebody_in_between_is_readable_too(service: Anything) -> None:
    service.answer = lambda: web.Response(status=502, text="<html>bad gateway</html>", content_type="text/html")
    async with CatalensClient(service.url, retry=ONCE) as client:
        with pytest.raises(Refused, match="HTTP 502 Bad Gateway") as refused:
            await client.stats()
    assert refused.value.passing


@pytest.mark.parametrize("text", ["<html>", "[]", "{}", '{"products": "many", "images_pending": 0, "lag": 0}'])
async def test_what_is_not_catalens_is_said_so(service: Anything, text: str) -> None:
    service.answer = lambda: web.Response(text=text)
    async with CatalensClient(service.url, retry=ONCE) as client:
        with pytest.raises(CatalensError, match="is not Catalens"):
            await client.stats()


async def test_a_product_that_is_not_there_is_none(service: Anything) -> None:
    service.answer = lambda: web.json_response({"title": "Not found", "status": 404}, status=404)
    async with CatalensClient(service.url, retry=ONCE) as client:
        assert await client.get("a/b") is None
    assert service.seen[0].raw_path == "/api/v1/products/a%2Fb"


@pytest.mark.parametrize("url", ["ftp://x.example", "nonsense", "http://"])
async def test_an_address_that_is_none(url: str) -> None:
    async with CatalensClient(url) as client:
        with pytest.raises(CatalensError, match=r"CATALENS_URL is no http\(s\) address"):
            await client.stats()


async def test_nobody_there() -> None:
    async with CatalensClient("http://127.0.0.1:1", retry=ONCE) as client:
        with pytest.raises(Unreachable, match="catalens serve"):
            await client.stats()


# --- trying again -------------------------------------------------------------------------------------------


class InstantClock:
    """Time that passes as soon as somebody sleeps."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    def now(self) -> float:
        return sum(self.slept)

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


RECEIPT = {"product_id": "a", "version": 7, "offer_version": None, "event_id": "e", "status": "accepted"}


async def test_what_passes_is_tried_again_as_the_service_asks(service: Anything) -> None:
    clock = InstantClock()
    service.before = [429, None, 503]
    service.answer = lambda: web.json_response(
        {"results": [], "count": 0, "mode": "hybrid", "model": "m", "took_ms": 1}
    )
    async with CatalensClient(service.url, clock=clock) as client:
        assert (await client.search("shoe")).results == []
    assert clock.slept == [3.0, 0.5, 3.0]
    assert len(set(service.bodies)) == 1


async def test_trying_ends(service: Anything) -> None:
    service.before = [503] * 9
    async with CatalensClient(service.url, clock=InstantClock()) as client:
        with pytest.raises(Refused) as refused:
            await client.stats()
    assert (refused.value.tries, len(service.seen)) == (4, 4)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 422, 500, 501])
async def test_what_stays_is_not_tried_again(service: Anything, status: int) -> None:
    service.before = [status]
    async with CatalensClient(service.url, clock=InstantClock()) as client:
        with pytest.raises(Refused):
            await client.stats()
    assert len(service.seen) == 1


async def test_a_retried_change_is_the_same_change(service: Anything) -> None:
    service.answer = lambda: web.json_response(RECEIPT, status=202)
    async with CatalensClient(service.url, clock=InstantClock()) as client:
        service.before = [None]
        receipt = await client.put_product({"product_id": "a", "name": "A"}, wait=True, timeout=5)
        assert (receipt.version, receipt.status) == (7, "accepted")
        await client.patch_offer("a", price=1.5, idempotency_key="mine")
        await client.delete("a", 9)
    sent = [(request.method, request.path_qs, request.headers["Idempotency-Key"]) for request in service.seen]
    assert sent[0] == sent[1]
    assert [one[:2] for one in sent[1:]] == [
        ("PUT", "/api/v1/products/a?wait=true&timeout=5.0"),
        ("PATCH", "/api/v1/products/a/offer"),
        ("DELETE", "/api/v1/products/a?version=9"),
    ]
    assert sent[2][2] == "mine"
    assert len({key for _, _, key in sent}) == 3
    assert [json.loads(body or b"null") for body in service.bodies[1:]] == [
        {"product_id": "a", "name": "A"}, {"price": 1.5}, None
    ]  # fmt: skip


async def test_a_problem_comes_with_all_that_it_says(service: Anything) -> None:
    problem = {"type": "urn:catalens:problem:invalid", "title": "Invalid value", "status": 422, "detail": "limit: no",
               "request_id": "r-1", "errors": [{"field": "limit", "message": "no"}]}  # fmt: skip
    service.answer = lambda: web.json_response(problem, status=422)
    async with CatalensClient(service.url) as client:
        with pytest.raises(Refused) as refused:
            await client.embed("x")
    found = refused.value
    assert (found.type, found.errors, found.request_id) == (problem["type"], (("limit", "no"),), "r-1")


async def test_a_search_says_what_was_given_and_keeps_what_is_new(service: Anything) -> None:
    hit = {"product_id": "a", "score": 1, "name": "A", "margin": 0.3}
    answer = {"results": [hit], "count": 1, "mode": "hybrid", "model": None, "took_ms": 2.5, "expanded": ["x"]}
    prices = {"min": 9.9, "max": 20, "ranges": [{"gte": 5.0, "lt": 20.0, "count": 1}, {"gte": 20.0, "count": 1}]}
    answer["facets"] = {"brand": [{"value": "Velo", "count": 2}], "price": prices}
    service.answer = lambda: web.json_response(answer)
    async with CatalensClient(service.url) as client:
        found = await client.search(
            "shoe", image=b"\xff", like=["b", b"\x00"], unlike=[b"\x01", "c"], filters={"brand": "x"}, mode="semantic"
        )
    assert json.loads(service.bodies[0]) == {
        "query": "shoe", "image": {"data": "/w=="}, "like": ["b", {"data": "AA=="}], "unlike": [{"data": "AQ=="}, "c"],
        "filters": {"brand": "x"}, "mode": "semantic", "limit": 10, "offset": 0,
    }  # fmt: skip
    assert found.results[0].model_dump(exclude_unset=True) == hit
    assert found.model_dump(exclude_unset=True) == answer
    assert found.facets is not None
    brands, prices_found = found.facets["brand"], found.facets["price"]
    assert isinstance(brands, list)
    assert (brands[0].value, brands[0].count) == ("Velo", 2)
    assert isinstance(prices_found, NumberFacet)
    assert [one.lt for one in prices_found.ranges] == [20.0, None]
    assert getattr(found.results[0], "margin") == 0.3  # noqa: B009  # mypy knows no such field


async def test_what_is_typed_is_completed(service: Anything) -> None:
    known = [{"text": "Nike", "kind": "brand", "count": 3}, {"text": "Runner", "kind": "product", "product_id": "a"}]
    service.answer = lambda: web.json_response({"suggestions": known, "count": 2, "ready": True})
    async with CatalensClient(service.url) as client:
        found = await client.suggest("ni & co", limit=5)
    assert dict(service.seen[0].query) == {"q": "ni & co", "limit": "5"}
    assert (service.seen[0].method, service.seen[0].path) == ("GET", "/api/v1/suggest")
    assert [one.model_dump(exclude_unset=True) for one in found.suggestions] == known
    assert found.ready


async def test_each_of_a_batch_is_an_answer_or_a_refusal(service: Anything) -> None:
    vector = {"embedding": [1.0], "dimension": 1, "model": "m"}
    problem = {"title": "Invalid", "status": 422, "detail": "", "errors": [{"field": "text", "message": "is empty"}]}
    service.answer = lambda: web.json_response({"responses": [vector, problem]})
    async with CatalensClient(service.url) as client:
        good, bad = await client.embed_batch(["a", ""])
    assert json.loads(service.bodies[0]) == {"requests": [{"text": "a"}, {"text": ""}]}
    assert isinstance(good, Embedding)
    assert good.embedding == [1.0]
    assert isinstance(bad, Refused)
    assert (bad.status, str(bad)) == (422, "Invalid: text: is empty")


async def test_a_batch_that_is_answered_short_is_not_catalens(service: Anything) -> None:
    service.answer = lambda: web.json_response({"responses": []})
    async with CatalensClient(service.url) as client:
        with pytest.raises(CatalensError, match="is not Catalens"):
            await client.search_batch([{"query": "a"}])


async def test_two_things_are_compared(service: Anything) -> None:
    service.answer = lambda: web.json_response({"similarity": 0.25})
    async with CatalensClient(service.url) as client:
        assert await client.similarity({"text": "shoe"}, {"image": b"\xff"}) == 0.25
    assert json.loads(service.bodies[0]) == {"a": {"text": "shoe"}, "b": {"image": {"data": "/w=="}}}


async def test_the_catalogue_is_listed_page_by_page(service: Anything) -> None:
    product = {"product_id": "b", "images": [], "indexed_at": "2026-01-01T00:00:00+00:00"}
    service.answer = lambda: web.json_response({"products": [product], "count": 1, "next": "b"})
    async with CatalensClient(service.url) as client:
        page = await client.listing(after="a", limit=1)
    assert dict(service.seen[0].query) == {"after": "a", "limit": "1"}
    assert ([one.product_id for one in page.products], page.next) == (["b"], "b")


async def test_without_a_session_nothing_is_sent() -> None:
    with pytest.raises(CatalensError, match="async with"):
        await CatalensClient().stats()


# --- imports ------------------------------------------------------------------------------------------------


def products(count: int) -> Iterator[dict[str, Any]]:
    return ({"product_id": f"p-{number}", "name": f"Product {number}"} for number in range(count))


class Catalogue(Anything):
    """Takes NDJSON, but no product without a name."""

    async def handle(self, request: web.Request) -> web.Response:
        answer = await super().handle(request)
        if answer.status != 200 or not self.bodies[-1]:
            return answer
        lines = [json.loads(line) for line in self.bodies[-1].splitlines()]
        errors = [
            {"line": number, "product_id": product["product_id"], "error": "name: is required"}
            for number, product in enumerate(lines, start=1)
            if "name" not in product
        ]
        return web.json_response({"accepted": len(lines) - len(errors), "rejected": len(errors), "errors": errors})


@pytest.fixture
async def catalogue() -> AsyncIterator[Catalogue]:
    found = Catalogue()
    async for _ in serving(found):
        yield found


async def test_an_import_accounts_for_every_product(catalogue: Catalogue) -> None:
    given = [*products(150), {"product_id": "nameless"}, {"product_id": "odd", "name": float("nan")}, *products(1)]
    async with CatalensClient(catalogue.url, clock=InstantClock()) as client:
        steps = [step async for step in client.import_products(given)]
    assert [(step.done, step.accepted, step.rejected) for step in steps] == [(100, 100, 0), (153, 151, 2)]
    assert [(error.line, error.product_id) for step in steps for error in step.errors] == [
        (151, "nameless"),
        (152, "odd"),
    ]


async def test_an_import_goes_on_where_it_broke(catalogue: Catalogue) -> None:
    async with CatalensClient(catalogue.url, clock=InstantClock()) as client:
        catalogue.before = [200, 200, 403]
        done = 0

        async def go_on() -> None:
            nonlocal done
            async for step in client.import_products(products(500), skip=done):
                done = step.done

        with pytest.raises(Refused):
            await go_on()
        assert done in (0, 100, 200)  # requests overtake one another
        catalogue.bodies.clear()
        await go_on()
    assert done == 500
    sent = [json.loads(line)["product_id"] for body in catalogue.bodies for line in body.splitlines()]
    assert {f"p-{number}" for number in range(200, 500)} <= set(sent)


async def test_a_chunk_that_is_refused_for_now_is_sent_again_whole(catalogue: Catalogue) -> None:
    clock = InstantClock()
    catalogue.before = [503, None]
    async with CatalensClient(catalogue.url, clock=clock) as client:
        steps = [step async for step in client.import_products(products(5))]
    assert [(step.done, step.accepted) for step in steps] == [(5, 5)]
    assert clock.slept == [3.0, 1.0]
    assert len(catalogue.bodies) == 3
    assert len(set(catalogue.bodies)) == 1


async def test_products_are_taken_no_faster_than_the_service_reads(catalogue: Catalogue) -> None:
    taken = 0

    async def source() -> AsyncIterator[dict[str, Any]]:
        nonlocal taken
        for product in products(5_000):
            taken += 1
            yield product

    async with CatalensClient(catalogue.url) as client:
        steps = client.import_products(source())
        await anext(steps)
        assert taken <= 100 * (IN_FLIGHT + 2)
        await steps.aclose()


async def test_of_two_statements_about_a_product_the_later_arrives_later(catalogue: Catalogue) -> None:
    given = [{"product_id": "a", "name": str(number)} for number in range(20)]
    catalogue.before = [503, 200, None]
    async with CatalensClient(catalogue.url, clock=InstantClock()) as client:
        steps = [step async for step in client.import_products(given)]
    assert [step.done for step in steps] == list(range(1, 21))
    names = [json.loads(body)["name"] for body in catalogue.bodies]
    assert list(dict.fromkeys(names)) == [str(number) for number in range(20)]
