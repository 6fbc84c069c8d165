"""Processes with half of the model: what they do without the other half, and what they refuse."""

from __future__ import annotations

import asyncio
import signal
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from structlog.testing import capture_logs
from tests import pictures

from catalens.errors import Misconfigured
from catalens.settings import EncoderSettings, HttpSettings, Settings
from catalens_embedder import main as embedder
from catalens_embedder.reindex import reindex
from catalens_query import main as query
from catalens_standalone import process as standalone

TINY = Path(__file__).parent.parent / "fixtures" / "bundles" / "tiny"
RED = pictures.encode(pictures.plain(pictures.RED), "PNG")
BLUE = pictures.encode(pictures.plain(pictures.BLUE), "PNG")


def settings(data_dir: Path, towers: str) -> Settings:
    return Settings(
        _env_file=None,
        data_dir=data_dir,
        model=str(TINY),
        http=HttpSettings(port=0),
        encoder=EncoderSettings(lanes=1, towers=towers),
    )


class Service:
    """A service that runs, over HTTP."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url = url
        self._session = session

    async def call(self, method: str, path: str, **options: Any) -> tuple[int, Any]:
        async with self._session.request(method, f"{self._url}{path}", **options) as answer:
            return answer.status, await answer.json(content_type=None)

    async def search(self, **body: Any) -> tuple[int, Any]:
        return await self.call("POST", "/api/v1/search", json=body)


@asynccontextmanager
async def running(serve: Callable[[Settings], Coroutine[Any, Any, None]], chosen: Settings) -> AsyncIterator[Service]:
    """Run a service as its process does, ended by the signal that ends it."""
    with capture_logs() as lines:
        task = asyncio.create_task(serve(chosen), name="service")
        while not (ready := [line["url"] for line in lines if line["event"] == "process.ready"]):
            if task.done():
                task.result()
            await asyncio.sleep(0.01)
    async with aiohttp.ClientSession() as session:
        yield Service(ready[0], session)
    signal.raise_signal(signal.SIGTERM)
    await task


def form(picture: bytes) -> aiohttp.FormData:
    made = aiohttp.FormData()
    made.add_field("image", picture, filename="picture.png", content_type="image/png")
    return made


def product(name: str, picture: bytes) -> dict[str, Any]:
    return {"name": name, "images": [{"data": b64encode(picture).decode()}]}


async def fill(service: Service) -> None:
    """Put two products, and wait until they are found."""
    for name, picture in (("noir shoe", RED), ("vert chair", BLUE)):
        path = f"/api/v1/products/{name.split()[1]}?wait=true&timeout=30"
        status, answer = await service.call("PUT", path, json=product(name, picture))
        assert (status, answer["status"]) == (200, "indexed"), answer


async def test_without_the_text_tower_pictures_are_found_by_pictures_and_words_by_words(tmp_path: Path) -> None:
    async with running(standalone.serve, settings(tmp_path / "data", "image")) as service:
        assert await service.call("GET", "/readyz") == (
            200,
            {"status": "ok", "checks": {"encoder": "ok", "index": "ok"}},
        )
        await fill(service)
        status, found = await service.call("POST", "/api/v1/search-image", data=form(RED))
        assert (status, found["results"][0]["product_id"], "degraded" in found) == (200, "shoe", False)
        status, found = await service.search(query="chair")
        assert (status, found["mode"], [hit["product_id"] for hit in found["results"]]) == (200, "lexical", ["chair"])
        assert "CATALENS_ENCODER__TOWERS=image" in found["degraded"]
        status, similar = await service.call("GET", "/api/v1/products/shoe/similar")
        assert (status, [hit["product_id"] for hit in similar["results"]]) == (200, ["chair"])
        for refused in (service.search(query="chair", mode="semantic"), service.search(query="chair", mode="hybrid")):
            status, problem = await refused
            assert (status, problem["type"]) == (501, "urn:catalens:problem:not-loaded")
        assert (await service.call("POST", "/api/v1/embed", json={"text": "red"}))[0] == 501


async def test_without_the_picture_tower_words_are_understood_and_pictures_refused(tmp_path: Path) -> None:
    async with running(standalone.serve, settings(tmp_path / "data", "image")) as service:
        await fill(service)
    async with running(query.serve, settings(tmp_path / "data", "text")) as service:
        assert (await service.call("GET", "/readyz"))[0] == 200
        # The model's "red" is the picture's red; no word of the product is.
        status, found = await service.search(query="red")
        assert (status, found["mode"], found["results"][0]["product_id"]) == (200, "hybrid", "shoe")
        assert "degraded" not in found
        for path in ("search-image", "embed-image"):
            status, problem = await service.call("POST", f"/api/v1/{path}", data=form(RED))
            assert (status, problem["type"]) == (501, "urn:catalens:problem:not-loaded")
            assert "CATALENS_ENCODER__TOWERS=text" in problem["detail"]
        red = {"data": b64encode(RED).decode()}
        sides = {"a": {"text": "red"}, "b": {"image": red}}
        assert (await service.call("POST", "/api/v1/similarity", json=sides))[0] == 501
        for examples in ({"like": [red]}, {"like": ["shoe"], "unlike": [red]}, {"image": red}):
            assert (await service.search(**examples))[0] == 501
        status, found = await service.search(query="chair", like=[red])
        assert (status, found["mode"], found["results"][0]["product_id"]) == (200, "lexical", "chair")
        assert "CATALENS_ENCODER__TOWERS=text" in found["degraded"]
        batch = {"requests": [{"image": red}, {"query": "red"}]}
        status, answer = await service.call("POST", "/api/v1/search/batch", json=batch)
        assert (status, answer["responses"][0]["status"], answer["responses"][1]["mode"]) == (200, 501, "hybrid")
        health = await service.call("GET", "/api/v1/health")
        assert (health[0], health[1]["status"]) == (200, "ok")


async def test_a_worker_without_the_text_tower_is_ready(tmp_path: Path) -> None:
    async with running(embedder.serve, settings(tmp_path / "data", "image")) as service:
        assert await service.call("GET", "/readyz") == (200, {"status": "ok", "checks": {"embedder": "ok"}})


@pytest.mark.parametrize("serve", [embedder.serve, standalone.serve])
async def test_nothing_that_embeds_products_starts_without_the_picture_tower(
    tmp_path: Path, serve: Callable[[Settings], Coroutine[Any, Any, None]]
) -> None:
    with pytest.raises(Misconfigured, match="set it to image or both"):
        await serve(settings(tmp_path / "data", "text"))
    assert not (tmp_path / "data").exists()


async def test_neither_does_a_reindex(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="set it to image or both"):
        await reindex(settings(tmp_path / "data", "text"), None, report=lambda _: None)
