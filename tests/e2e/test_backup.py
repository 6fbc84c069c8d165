"""The drill: a data folder is backed up under load and restored elsewhere, and every product is compared."""

from __future__ import annotations

import asyncio
import json
import shutil
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import aiohttp
import pytest
from tests.pictures import encode, plain
from tests.standalone import Standalone

from catalens.engines.backup import MANIFEST, Backup, back_up, restore
from catalens.errors import Misconfigured
from catalens.settings import KafkaSettings, Settings

PRODUCTS = 100


def product(number: int, version: int) -> dict[str, Any]:
    """Return product `number` as of `version`; one in ten has an uploaded picture."""
    stated: dict[str, Any] = {"name": f"Article {number} as of {version}", "version": version, "price": number}
    if number % 10 == 0:
        picture = encode(plain((number % 256, version % 256, 7), 32, 32), "PNG")
        stated["images"] = [{"data": b64encode(picture).decode()}]
    return stated


async def put(session: aiohttp.ClientSession, url: str, number: int, version: int) -> None:
    async with session.put(f"{url}/api/v1/products/article-{number}", json=product(number, version)) as answer:
        assert answer.status == 202, await answer.text()


async def settled(session: aiohttp.ClientSession, url: str) -> None:
    """Return when nothing is on its way."""
    while True:
        async with session.get(f"{url}/api/v1/stats") as answer:
            stats = await answer.json()
        if not stats["lag"] and not stats["images_pending"]:
            return
        await asyncio.sleep(0.05)


async def catalogue(session: aiohttp.ClientSession, url: str) -> dict[str, dict[str, Any]]:
    """Return every product that is searchable, without when it was indexed."""
    async with session.get(f"{url}/api/v1/products", headers={"Accept": "application/x-ndjson"}) as answer:
        assert answer.status == 200
        lines = [json.loads(line) for line in (await answer.text()).splitlines()]
    return {line.pop("product_id"): {key: line[key] for key in line.keys() - {"indexed_at"}} for line in lines}


async def found(session: aiohttp.ClientSession, url: str, name: str) -> list[tuple[str, float]]:
    async with session.post(f"{url}/api/v1/search", json={"query": name, "mode": "semantic", "limit": 5}) as answer:
        return [(hit["product_id"], round(hit["score"], 4)) for hit in (await answer.json())["results"]]


Seen: TypeAlias = tuple[dict[str, dict[str, Any]], list[tuple[str, float]]]
"""A catalogue, and what a search of it finds."""


async def seen(session: aiohttp.ClientSession, url: str) -> Seen:
    return await catalogue(session, url), await found(session, url, "Article 7")


@dataclass
class Stopped:
    """A small data folder that no process has open, a backup of it, and what the process showed."""

    folder: Path
    backup: Backup
    seen: Seen


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    """Fill a folder, stop the process and back it up."""
    folder = tmp_path_factory.mktemp("stopped")

    async def fill(url: str) -> Seen:
        async with aiohttp.ClientSession() as session:
            for number in range(20):
                await put(session, url, number, 1)
            await settled(session, url)
            return await seen(session, url)

    with Standalone(folder / "data") as server:
        shown = asyncio.run(fill(server.url))
    backup = back_up(Settings(_env_file=None, data_dir=folder / "data"), folder / "backup")
    return Stopped(folder, backup, shown)


async def test_the_drill_under_load(tmp_path: Path) -> None:
    source = Settings(_env_file=None, data_dir=tmp_path / "data")
    acknowledged: dict[str, int] = {}
    async with aiohttp.ClientSession() as session:
        with Standalone(tmp_path / "data") as server:

            async def load(version: int) -> None:
                for number in range(PRODUCTS):
                    await put(session, server.url, number, version)
                    acknowledged[f"article-{number}"] = version

            await load(1)
            loading = asyncio.create_task(load(2))
            while acknowledged["article-40"] < 2:
                await asyncio.sleep(0.005)
            before = dict(acknowledged)
            backup = await asyncio.to_thread(back_up, source, tmp_path / "backup")
            assert not loading.done(), "the backup was not taken under load"
            await loading
            async with session.delete(f"{server.url}/api/v1/products/article-3") as answer:
                assert answer.status == 202
        assert backup.index is False
        restore(tmp_path / "backup", tmp_path / "elsewhere")
        with Standalone(tmp_path / "elsewhere") as other:
            await settled(session, other.url)
            restored = await catalogue(session, other.url)
            assert restored.keys() == before.keys()
            for name, kept in restored.items():
                number = int(name.partition("-")[2])
                assert before[name] <= kept["version"] <= acknowledged[name], name
                assert kept["name"] == product(number, kept["version"])["name"]
                assert ("images" in kept) == (number % 10 == 0)
            async with session.get(f"{other.url}/api/v1/products/article-40") as answer:
                shown = await answer.json()
            assert shown["image_status"] == "ok"
            async with session.get(f"{other.url}{shown['image']}") as answer:
                assert answer.status == 200
            # what comes afterwards comes on top
            await put(session, other.url, 3, 3)
            await settled(session, other.url)
            assert (await catalogue(session, other.url))["article-3"]["version"] == 3


async def test_a_stopped_folder_comes_back_with_its_index(stopped: Stopped) -> None:
    assert stopped.backup.index is True
    assert stopped.backup.pictures == 2
    elsewhere = stopped.folder / "elsewhere"
    elsewhere.mkdir()  # as a volume that is mounted there
    restore(stopped.folder / "backup", elsewhere)
    async with aiohttp.ClientSession() as session:
        with Standalone(elsewhere) as server:
            async with session.get(f"{server.url}/api/v1/stats") as answer:
                assert (await answer.json())["lag"] == 0  # nothing is read again, so nothing is computed again
            assert await seen(session, server.url) == stopped.seen
    assert len(stopped.seen[0]) == 20


def files(folder: Path) -> Mapping[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_that_has_something_is_left_alone(stopped: Stopped, tmp_path: Path) -> None:
    folder = stopped.folder
    before = files(folder / "data")
    with pytest.raises(Misconfigured, match="is not empty"):
        restore(folder / "backup", folder / "data")
    assert files(folder / "data") == before
    (tmp_path / "backup").mkdir()
    with pytest.raises(Misconfigured, match="exists: name another folder"):
        back_up(Settings(_env_file=None, data_dir=folder / "data"), tmp_path / "backup")
    assert not list(tmp_path.rglob("*.unfinished"))


@pytest.mark.parametrize("what", ["a picture", "the log", "the manifest", "the manifest is missing", "a newer release"])
def test_a_damaged_backup_is_refused_and_leaves_nothing(stopped: Stopped, tmp_path: Path, what: str) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(stopped.folder / "backup", damaged)
    manifest = damaged / MANIFEST
    if what == "a picture":
        path = next((damaged / "blobs").glob("*/*"))
        path.write_bytes(path.read_bytes()[:-1])
    elif what == "the log":
        log = damaged / "events.sqlite"
        log.write_bytes(log.read_bytes()[:-5000])
    elif what == "the manifest":
        manifest.write_text("{", encoding="utf-8")
    elif what == "the manifest is missing":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text("utf-8").replace('"format": 1', '"format": 2'), encoding="utf-8")
    with pytest.raises(Misconfigured, match=r"damaged|is no backup|does not know"):
        restore(damaged, tmp_path / "data")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"]


def test_what_is_elsewhere_is_not_backed_up_in_silence(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="has no event log"):
        back_up(Settings(_env_file=None, data_dir=tmp_path / "none"), tmp_path / "backup")
    kafka = KafkaSettings(bootstrap_servers="127.0.0.1:9092")
    with pytest.raises(Misconfigured, match="the event log is Kafka"):
        back_up(Settings(_env_file=None, data_dir=tmp_path, kafka=kafka), tmp_path / "backup")
    assert not list(tmp_path.iterdir())
