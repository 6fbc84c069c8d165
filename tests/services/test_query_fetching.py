"""Pictures that a search names by URL: fetched side by side, within the time of the search."""

from __future__ import annotations

import asyncio
import re
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer
from tests.shop import Answer, Shop, open_shop, picture

from catalens.domain import Filter, Leg, LegHit, Product
from catalens.settings import HttpSettings

pytestmark = pytest.mark.asyncio(loop_scope="module")

BLUE = picture(10, 10, 220)
AT_ONCE = 4
"""Of one host: CATALENS_PICTURES__FETCH_PER_HOST."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shop]:
    """A shop with one product."""
    patient = HttpSettings(search_timeout=600)  # so that what is too late was not broken off
    async with open_shop(tmp_path_factory.mktemp("shop") / "data", http=patient) as opened:
        await opened.put(Product(product_id="blue", name="Water"), BLUE)
        yield opened


@asynccontextmanager
async def hosting(answer: Callable[[str], Awaitable[None]]) -> AsyncIterator[Callable[[str], dict[str, str]]]:
    """Yield what names a picture of a host that gives each after `answer`; of "lost…" there is none."""

    async def serve(request: web.Request) -> web.Response:
        name = request.match_info["name"]
        await answer(name)
        if name.startswith("lost"):
            raise web.HTTPNotFound
        return web.Response(body=BLUE, content_type="image/png")

    app = web.Application()
    app.router.add_get("/{name}", serve)
    async with TestServer(app) as host:
        yield lambda name: {"url": str(host.make_url(f"/{name}"))}


async def named(answer: Answer, field: str) -> str:
    """Return what is said of the one field that is named."""
    assert answer.status == 422, answer.body
    (error,) = answer.json["errors"]
    assert error["field"] == field
    said: str = error["message"]
    return said


async def cancelled(shop: Shop) -> float:
    """Return how many fetches were broken off."""
    text = (await shop.call("GET", "/metrics")).body.decode()
    found = re.search(r'^catalens_picture_fetch_seconds_count\{outcome="cancelled"\} (\S+)$', text, re.MULTILINE)
    return float(found[1]) if found else 0.0


async def test_pictures_are_fetched_side_by_side_and_no_more_than_a_host_is_asked_for(shop: Shop) -> None:
    full = asyncio.Barrier(AT_ONCE)
    now, most = 0, 0

    async def together(_name: str) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await full.wait()  # for ever, if they came one after the other
        now -= 1

    async with hosting(together) as at:
        body: dict[str, Any] = {
            "image": at("a"),
            "like": [at("b"), "blue", at("c"), at("d")],
            "unlike": [at(name) for name in "efgh"],
        }
        answer = await shop.call("POST", "/api/v1/search", json=body)
        assert (answer.status, answer.json["results"]) == (200, []), answer.body  # what is named is not found
        assert most == AT_ONCE
        batch = {"requests": [{"image": at(name)} for name in "abcd"]}
        answers = (await shop.call("POST", "/api/v1/search/batch", json=batch)).json["responses"]
        assert [[hit["product_id"] for hit in one["results"]] for one in answers] == [["blue"]] * 4


async def test_two_pictures_to_compare_are_fetched_side_by_side(shop: Shop) -> None:
    full = asyncio.Barrier(2)

    async def together(_name: str) -> None:
        await full.wait()

    async with hosting(together) as at:
        body = {"a": {"image": at("a")}, "b": {"image": at("b")}}
        answer = await shop.call("POST", "/api/v1/similarity", json=body)
        assert answer.json["similarity"] == pytest.approx(1)


async def test_the_first_that_cannot_be_had_is_named_whichever_failed_first(shop: Shop) -> None:
    last = asyncio.Event()

    async def backwards(name: str) -> None:
        if name == "lost-last":
            last.set()
        await last.wait()

    async with hosting(backwards) as at:
        like = ["blue", at("found"), at("lost-first")]
        answer = await shop.call("POST", "/api/v1/search", json={"like": like, "unlike": [at("lost-last")]})
        assert "answered 404" in await named(answer, "like.2.url")
        answer = await shop.call("POST", "/api/v1/search", json={"unlike": [{"data": "?"}], "like": like})
        assert "answered 404" in await named(answer, "like.2.url")
        answer = await shop.call("POST", "/api/v1/search", json={"unlike": [*like[:2], {"data": "?"}], "query": "x"})
        assert "is not base64" in await named(answer, "unlike.2.data")


async def test_what_comes_after_a_failure_is_not_waited_for(shop: Shop) -> None:
    never, asked = asyncio.Event(), asyncio.Event()

    async def answer(name: str) -> None:
        if name == "never":
            asked.set()
            await never.wait()
        await asked.wait()

    async with hosting(answer) as at:
        before = await cancelled(shop)
        found = await shop.call("POST", "/api/v1/search", json={"image": at("lost"), "like": [at("never")]})
        await named(found, "image.url")
        assert await cancelled(shop) == before + 1
        never.set()


@pytest.mark.parametrize("path", ["search", "similarity"])
async def test_a_picture_that_is_late_is_named(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    now, passed = loop.time, 0.0
    monkeypatch.setattr(loop, "time", lambda: now() + passed)
    never = asyncio.Event()

    async def late(_name: str) -> None:
        nonlocal passed
        passed = 6  # a fetch itself has fifteen
        await never.wait()

    here = {"data": b64encode(BLUE).decode()}
    async with open_shop(tmp_path, http=HttpSettings(search_timeout=5)) as shop, hosting(late) as at:
        body: dict[str, Any] = {"a": {"image": here}, "b": {"image": at("late")}}
        if path == "search":
            body = {"query": "water", "like": [here, at("late")], "unlike": [at("late")]}
        found = await shop.call("POST", f"/api/v1/{path}", json=body)
        said = await named(found, "like.1.url" if path == "search" else "b.image.url")
        assert "CATALENS_HTTP__SEARCH_TIMEOUT" in said
        never.set()


async def test_a_search_and_its_pictures_have_one_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    now, passed = loop.time, 0.0
    monkeypatch.setattr(loop, "time", lambda: now() + passed)

    async def pass_ten_seconds(_name: str = "") -> None:
        nonlocal passed
        passed += 10

    async with open_shop(tmp_path, http=HttpSettings(search_timeout=15)) as shop, hosting(pass_ten_seconds) as at:
        await shop.put(Product(product_id="blue", name="Water"), BLUE)
        search = shop.engines.index.search

        async def slow(tenant: str, legs: Sequence[Leg], where: Filter) -> Sequence[Sequence[LegHit]]:
            await pass_ten_seconds()
            return await search(tenant, legs, where)

        body = {"image": at("blue")}
        assert (await shop.call("POST", "/api/v1/search", json=body)).status == 200
        monkeypatch.setattr(shop.engines.index, "search", slow)
        assert (await shop.call("POST", "/api/v1/search", json={"query": "water"})).status == 200
        # Of another list than before: what the index is asked again it answers at once.
        answer = await shop.call("POST", "/api/v1/search", json={**body, "using": "image"})
        assert (answer.status, answer.json.get("detail")) == (503, "the search took longer than 15 s")
