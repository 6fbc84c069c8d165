"""`catalens reindex` and `catalens reconcile` against a real standalone process, which dies in between."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.models import install_models
from tests.services.test_cli import COMMAND, environment
from tests.standalone import Standalone

Run = Callable[..., subprocess.CompletedProcess[str]]
PRODUCTS = 40


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A data folder with two models."""
    install_models(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run the command in an empty folder."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()

    def run(*arguments: str | Path, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *map(str, arguments)],
            cwd=folder,
            env=environment(tmp_path / "cache", **changes),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    return run


def catalogue(path: Path, products: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(product) + "\n" for product in products), encoding="utf-8")
    return path


def shop(version: int = 1) -> list[dict[str, Any]]:
    colours = ("red", "green", "blue")
    return [
        {"product_id": f"p{number:02}", "name": colours[number % 3], "version": version, "price": number}
        for number in range(PRODUCTS)
    ]


def test_the_model_changes_while_the_process_runs_and_back_offline(data_dir: Path, run: Run, tmp_path: Path) -> None:
    with Standalone(data_dir, CATALENS_MODEL="first") as server:
        here = {"CATALENS_URL": server.url}
        assert run("import", "--wait", catalogue(tmp_path / "shop.jsonl", shop()), **here).returncode == 0
        changed = run("reindex", "--model", "second", **here)
        assert changed.returncode == 0, changed.stderr
        assert "second" in changed.stdout
        found = json.loads(run("search", "red", "--json", **here).stdout)
        assert (found["model"], found["count"]) == ("second", 10)
        (old, new) = (line.split("\t") for line in run("reindex", "--list", **here).stdout.splitlines())
        assert (old[1], new[1], new[3]) == ("first", "second", "current")
        refused = run("reindex", "--model", "third", **here)
        assert refused.returncode == 1
        assert "third" in refused.stderr
        assert run("reindex", "--drop", new[0], **here).returncode == 1, "it is the current one"
    # The process is gone and CATALENS_MODEL still says the old one: it says what to do, and that works.
    pinned = Standalone(data_dir, CATALENS_MODEL="first")
    with pytest.raises(RuntimeError, match="catalens reindex --model first"):
        pinned.start()
    pinned.kill()
    back = run("reindex", "--model", "first", CATALENS_DATA_DIR=str(data_dir), CATALENS_HTTP__PORT="1")
    assert back.returncode == 0, back.stderr
    with Standalone(data_dir, CATALENS_MODEL="first") as server:
        here = {"CATALENS_URL": server.url}
        assert json.loads(run("search", "red", "--json", **here).stdout)["model"] == "first"
        dropped = run("reindex", "--drop", new[0], **here)
        assert dropped.returncode == 0, dropped.stderr
        assert [line.split("\t")[1] for line in dropped.stdout.splitlines()] == ["first"]


def test_a_tenant_changes_nothing_that_belongs_to_all(data_dir: Path, run: Run) -> None:
    keys = {tenant: tenant * 16 for tenant in ("default", "shop", "rival")}
    told = json.dumps([{"name": tenant, "secret": key, "tenant": tenant} for tenant, key in keys.items()])
    with Standalone(data_dir, CATALENS_MODEL="first", CATALENS_API_KEYS=told) as server:
        for asked in (("--rebuild",), ("--drop", "x"), ("--model", "second")):
            refused = run("reindex", *asked, CATALENS_URL=server.url, CATALENS_API_KEY=keys["rival"])
            assert (refused.returncode, "belong to all tenants" in refused.stderr) == (1, True)
        done = run("reindex", "--rebuild", CATALENS_URL=server.url, CATALENS_API_KEY=keys["default"])
        assert done.returncode == 0, done.stderr


def test_a_reindex_goes_on_by_itself_after_a_kill(data_dir: Path, run: Run, tmp_path: Path) -> None:
    server = Standalone(data_dir)
    server.start()
    here = {"CATALENS_URL": server.url}
    assert run("import", "--wait", catalogue(tmp_path / "shop.jsonl", shop()), **here).returncode == 0
    asking = subprocess.Popen(
        [*COMMAND, "reindex", "--model", "second"],
        cwd=tmp_path,
        env=environment(tmp_path / "cache", **here),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not (data_dir / "reindex.json").exists():
        time.sleep(0.01)  # polls a real process
    server.kill(children=True)
    said, _ = asking.communicate(timeout=60)
    assert asking.returncode == 1, said
    with Standalone(data_dir) as again:
        while (data_dir / "reindex.json").exists():
            time.sleep(0.05)  # polls a real process
        found = json.loads(run("search", "red", "--json", CATALENS_URL=again.url).stdout)
        assert (found["model"], found["count"]) == ("second", 10)


def test_a_damaged_index_is_rebuilt_offline(data_dir: Path, run: Run, tmp_path: Path) -> None:
    with Standalone(data_dir) as server:
        here = {"CATALENS_URL": server.url}
        assert run("import", "--wait", catalogue(tmp_path / "shop.jsonl", shop()), **here).returncode == 0
    (data_dir / "index" / "meta.json").write_text("{", encoding="utf-8")
    broken = Standalone(data_dir)
    with pytest.raises(RuntimeError, match="catalens reindex --rebuild"):
        broken.start()
    broken.kill()
    rebuilt = run("reindex", "--rebuild", CATALENS_DATA_DIR=str(data_dir), CATALENS_HTTP__PORT="1")
    assert rebuilt.returncode == 0, rebuilt.stderr
    with Standalone(data_dir) as server:
        here = {"CATALENS_URL": server.url}
        assert run("reconcile", tmp_path / "shop.jsonl", **here).stdout == f"{PRODUCTS:,} equal\n"


def test_reconcile_finds_and_mends_what_differs(data_dir: Path, run: Run, tmp_path: Path) -> None:
    with Standalone(data_dir, CATALENS_MODEL="first") as server:
        here = {"CATALENS_URL": server.url}
        assert run("import", "--wait", catalogue(tmp_path / "shop.jsonl", shop(version=5)), **here).returncode == 0
        assert run("reconcile", tmp_path / "shop.jsonl", **here).stdout == f"{PRODUCTS:,} equal\n"
        now = shop(version=5)
        now[0] = {**now[0], "name": "yellow", "version": 6}
        now[1] = {**now[1], "version": 4}
        now[2] = {**now[2], "price": 99, "offer_version": 2**60}
        del now[3]
        export = catalogue(tmp_path / "now.jsonl", [*now, {"product_id": "new", "name": "blue", "version": 1}])
        compared = run("reconcile", export, **here)
        assert compared.returncode == 1
        found = {tuple(line.split("\t")[:2]) for line in compared.stdout.splitlines() if "\t" in line}
        assert found == {
            ("older", "p00"), ("newer", "p01"), ("differs", "p02"), ("extra", "p03"), ("missing", "new")
        }  # fmt: skip
        repaired = run("reconcile", "--repair", export, **here)
        assert repaired.returncode == 1
        assert repaired.stderr.splitlines() == ["p01: is newer than the export: version 5, the export has 4"]
        settled(run, here)
        assert run("reconcile", export, **here).stdout.splitlines()[1:] == ["39 equal", "1 newer"]
        empty = run("reconcile", "--repair", catalogue(tmp_path / "part.jsonl", now[:5]), **here)
        assert empty.returncode == 1
        assert "is it whole?" in empty.stderr
        broken = catalogue(tmp_path / "broken.jsonl", [*now[:10], {"product_id": "p10"}, *now[11:]])
        told = run("reconcile", broken, **here).stdout
        assert "broken\tp10" in told
        assert "missing\tp10" not in told


def settled(run: Run, here: dict[str, str]) -> None:
    """Return when the process has worked off what it was sent."""
    code = (
        "import asyncio; from catalens.settings import load_settings\n"
        "from catalens_standalone.client import connect\n"
        "async def main():\n"
        "    async with connect(load_settings()) as client:\n"
        "        while not (await client.stats()).settled: await asyncio.sleep(0.05)\n"
        "asyncio.run(main())"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(Path(), **here), check=True, timeout=60)


def test_what_cannot_be_deleted_keeps_nothing_else_from_repair(data_dir: Path, run: Run, tmp_path: Path) -> None:
    with Standalone(data_dir, CATALENS_MODEL="first") as server:
        here = {"CATALENS_URL": server.url}
        extra = [{"product_id": name, "name": "green", "version": 2**63 - 1 if name == "a-last" else 1}
                 for name in ("a-last", "b-extra")]  # fmt: skip
        everything = catalogue(tmp_path / "all.jsonl", [*shop(version=5), *extra])
        assert run("import", "--wait", everything, **here).returncode == 0
        export = catalogue(tmp_path / "shop.jsonl", shop(version=5))
        repaired = run("reconcile", "--repair", export, **here)
        assert repaired.returncode == 1
        assert "a-last: is extra" in repaired.stderr
        while "b-extra" in (again := run("reconcile", export, **here)).stdout:
            time.sleep(0.05)  # polls a real process
        assert again.stdout == f"extra\ta-last\n{PRODUCTS:,} equal\n1 extra\n"
