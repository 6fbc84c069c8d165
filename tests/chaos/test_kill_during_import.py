"""kill -9 of the standalone process at any moment of an import: what was acknowledged is kept, once and newest."""

from __future__ import annotations

import asyncio
import io
import os
import random
from base64 import b64encode
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from PIL import Image
from tests.standalone import Standalone

PRODUCTS = int(os.environ.get("CHAOS_PRODUCTS", "2000"))
KILLS = int(os.environ.get("CHAOS_KILLS", "20"))
CLIENTS = 16


def picture(number: int) -> str:
    """Return a small inline picture, another one for each number."""
    image = Image.new("RGB", (48, 48), ((number * 37) % 256, (number * 91) % 256, (number * 53) % 256))
    out = io.BytesIO()
    image.save(out, "JPEG")
    return b64encode(out.getvalue()).decode()


def product(number: int, version: int) -> dict[str, Any]:
    """Return product `number` as of `version`; its name says which version it is; one in ten has a picture."""
    document: dict[str, Any] = {"name": f"Article {number} as of {version}", "version": version, "price": number}
    if number % 10 == 0:
        document["images"] = [{"data": picture(number)}]
    return document


class Import:
    """One import of every product at one version, by several clients; remembers what was acknowledged."""

    def __init__(self, url: str, version: int, acknowledged: dict[str, int]) -> None:
        self._url = url
        self._version = version
        self._acknowledged = acknowledged
        self._left = list(range(PRODUCTS))
        self._count = 0
        self.kill_after: int | None = None
        self.reached = asyncio.Event()

    async def run(self) -> None:
        """Send until everything is sent or the server is gone."""
        async with aiohttp.ClientSession() as session:
            await asyncio.gather(*(self._client(session) for _ in range(CLIENTS)))

    async def _client(self, session: aiohttp.ClientSession) -> None:
        while self._left:
            number = self._left.pop()
            name = f"article-{number}"
            try:
                async with session.put(
                    f"{self._url}/api/v1/products/{name}", json=product(number, self._version)
                ) as answer:
                    if answer.status == 429:
                        self._left.append(number)
                        continue
                    assert answer.status == 202, await answer.text()
            except aiohttp.ClientError:
                return  # killed
            self._acknowledged[name] = self._version
            self._count += 1
            if self._count == self.kill_after:
                self.reached.set()


async def catalogue(url: str) -> list[dict[str, Any]]:
    """Return every product that the listing shows."""
    products: list[dict[str, Any]] = []
    async with aiohttp.ClientSession() as session:
        after = ""
        while True:
            parameters = {"limit": "100"} | ({"after": after} if after else {})
            async with session.get(f"{url}/api/v1/products", params=parameters) as answer:
                page = await answer.json()
            products += page["products"]
            after = page["next"]
            if not after:
                return products


async def settled(url: str) -> None:
    """Return when the worker has nothing left to do."""
    async with aiohttp.ClientSession() as session:
        while True:
            async with session.get(f"{url}/api/v1/stats") as answer:
                stats = await answer.json()
            if stats["lag"] == 0 and stats["images_pending"] == 0:
                return
            await asyncio.sleep(0.1)  # polls a real process; nothing is asserted about the time it takes


@pytest.mark.timeout(2700)
async def test_acknowledged_products_survive_kills(tmp_path: Path) -> None:
    dice = random.Random(20)
    acknowledged: dict[str, int] = {}
    server = Standalone(tmp_path / "data")
    for version in range(1, KILLS + 1):
        await asyncio.to_thread(server.start)
        work = Import(server.url, version, acknowledged)
        work.kill_after = dice.randint(1, PRODUCTS - CLIENTS)
        sending = asyncio.create_task(work.run())
        await work.reached.wait()
        await asyncio.to_thread(server.kill, children=version % 2 == 0)
        await sending
    with server:
        await settled(server.url)
        products = await catalogue(server.url)
        found = {entry["product_id"]: entry for entry in products}
        assert len(found) == len(products), "a product is listed twice"
        assert acknowledged.keys() <= found.keys(), "an acknowledged product is not there"
        for name, version in acknowledged.items():
            assert found[name]["version"] >= version, f"{name} went back to an older version"
            assert found[name]["name"].endswith(f"as of {found[name]['version']}"), "name and version differ"
        async with aiohttp.ClientSession() as session:
            for name in dice.sample(sorted(acknowledged), min(50, len(acknowledged))):
                query = {"query": name, "mode": "lexical", "limit": 5}
                async with session.post(f"{server.url}/api/v1/search", json=query) as answer:
                    results = (await answer.json())["results"]
                assert name in [hit["product_id"] for hit in results], f"{name} is not searchable"
