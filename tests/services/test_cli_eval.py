"""`catalens eval` against a real standalone process: figures, comparison, report, and what goes wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.models import TINY
from tests.pictures import encode, plain
from tests.standalone import Standalone
from typer.testing import CliRunner

from catalens_standalone.cli import app

COMMAND = (sys.executable, "-m", "catalens_standalone.cli")
Run = Callable[..., subprocess.CompletedProcess[str]]
NAMES = {"lamp": "Desk <b>lamp</b>", "chair": "Garden chair", "table": "Dining table", "sofa": "Leather sofa"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standalone]:
    """One process with four products, two of them with pictures."""
    folder = tmp_path_factory.mktemp("eval")
    products = [{"product_id": key, "name": name, "locale": "en"} for key, name in NAMES.items()]
    for product, colour in zip(products, ((200, 20, 20), (20, 20, 200)), strict=False):
        image = plain(colour, 48, 48)
        image.paste((255, 255, 255), (0, 0, 16, 16))
        (folder / f"{product['product_id']}.png").write_bytes(encode(image, "PNG"))
        product["image"] = f"{product['product_id']}.png"
    (folder / "products.jsonl").write_text("\n".join(map(json.dumps, products)))
    with Standalone(folder / "data", CATALENS_MODEL=str(TINY)) as running:
        done = call(folder, running.url, "import", folder / "products.jsonl", "--wait")
        assert done.returncode == 0, done.stderr
        yield running


@pytest.fixture
def run(tmp_path: Path, server: Standalone) -> Run:
    """Run `catalens eval …` in an empty folder."""
    return lambda *arguments: call(tmp_path, server.url, "eval", *arguments)


def call(folder: Path, url: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CATALENS_")}
    more = {"XDG_CACHE_HOME": str(folder / "cache"), "NO_COLOR": "1", "COLUMNS": "200", "CATALENS_URL": url}
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=folder, env=clean | more, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def judged(folder: Path, *queries: dict[str, object]) -> Path:
    path = folder / "queries.jsonl"
    path.write_text("\n".join(map(json.dumps, queries)))
    return path


def figures(printed: str, row: str, letter: str = "A") -> list[float]:
    """Return the means of one row of the table; the row of B stands below that of A."""
    lines = printed.splitlines()
    (first,) = (number for number, line in enumerate(lines) if line.strip().startswith(row))
    line = lines[first + "AB".index(letter)]
    assert f" {letter} " in line, printed
    return [float(cell) for cell in re.findall(r"([\d.]+) [\d.]+-[\d.]+", line)]


def test_figures_by_language_and_kind(run: Run, tmp_path: Path) -> None:
    path = judged(
        tmp_path,
        {"query": "garden chair", "language": "en", "kind": "title", "relevant": ["chair"]},
        {"query": "garden chair", "language": "fr", "kind": "title", "relevant": {"chair": 1, "nowhere": 1}},
        {"query": "qqq", "language": "fr", "kind": "nonsense", "relevant": ["lamp"]},
    )
    done = run(path, "--a", '{"mode": "lexical"}')
    assert (done.returncode, done.stderr) == (0, "")
    assert figures(done.stdout, "all, 3") == [0.5, 0.5, 0.5, 0.667, pytest.approx(0.538, abs=0.001)]
    assert figures(done.stdout, "language en, 1") == [1, 1, 1, 1, 1]
    assert figures(done.stdout, "language fr, 2")[0] == 0.25
    assert figures(done.stdout, "kind nonsense, 1") == [0, 0, 0, 0, 0]


def test_two_configurations_with_a_report(run: Run, server: Standalone, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(encode(plain((200, 20, 20), 48, 48), "PNG"))
    path = judged(
        tmp_path,
        {"query": "desk lamp", "relevant": ["lamp"]},
        {"query": "<script>sofa</script>", "image": "red.png", "relevant": ["sofa"]},
    )
    report = tmp_path / "report.html"
    done = run(
        path, "--a", '{"mode": "hybrid", "image_weight": 1}', "--b", '{"mode": "hybrid", "image_weight": 0}',
        "--html", report,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert figures(done.stdout, "all, 2", "B")[0] == 1
    assert figures(done.stdout, "all, 2", "A")[0] == 0.5
    assert "+0.500 p=1.000" in done.stdout  # one query of two: any sign gives as much
    assert "red.png + <script>sofa</script>" in done.stdout
    page = report.read_text()
    assert "<script>" not in page
    assert "<b>lamp</b>" not in page
    assert "Desk &lt;b&gt;lamp&lt;/b&gt;" in page
    assert len(re.findall(r'<img src="data:image/jpeg;base64,', page)) >= 3  # the query's and two results'
    assert not re.findall(r'src="(?!data:)', page)
    assert run(path, "--a", server.url, "--b", '{"mode": "auto"}').stdout.count("No query changed.") == 1


def test_queries_of_the_catalogues_own_titles_say_that_they_are_a_proxy(run: Run) -> None:
    done = run("--from-titles", "3", "--a", '{"mode": "lexical"}')
    assert done.returncode == 0, done.stderr
    assert figures(done.stdout, "all, 3") == [1, 1, 1, 1, 1]
    assert "a proxy" in done.stdout


def test_what_is_not_answered_counts_as_nothing_found_and_is_told(run: Run, tmp_path: Path) -> None:
    path = judged(
        tmp_path,
        {"query": "garden chair", "relevant": ["chair"]},
        {"query": "garden chair", "image": "missing.png", "relevant": ["chair"]},
    )
    done = run(path)
    assert done.returncode == 1
    assert figures(done.stdout, "all, 2")[0] == 0.5
    assert "A: 1 queries were not answered" in done.stderr
    assert "missing.png" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "convert"),
        (("--a", "{}"), "--from-titles"),
        (("--from-titles", "3", "--a", "[]"), "neither a JSON object"),
        (("--from-titles", "3", "--a", '{"limit": 5}'), "limit come from"),
        (("convert", "imagenet", ".", "--products", "p", "--queries", "q"), "imagenet"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # no .env of the developer's
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(app, ["eval", *arguments])
    assert result.exit_code == 2
    assert said in result.output


def test_a_service_that_is_not_there_ends_it_and_a_field_that_is_wrong_is_told(run: Run) -> None:
    done = run("--from-titles", "3", "--a", "http://127.0.0.1:1")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no Catalens answers" in done.stderr
    done = run("--from-titles", "3", "--a", '{"mode": "clever"}')
    assert done.returncode == 1
    assert "A: 3 queries were not answered" in done.stderr
    assert "mode" in done.stderr


def test_a_converted_set_is_imported_and_evaluated(run: Run, server: Standalone, tmp_path: Path) -> None:
    for number, colour in enumerate(((10, 200, 10), (11, 199, 11), (220, 220, 10))):
        image = plain(colour, 48, 48)
        image.paste((255, 255, 255), (0, 0, 16, 16))
        path = tmp_path / f"set/Img/img/WOMEN/Dresses/id_0{number // 2}/{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(image, "PNG"))
    (tmp_path / "set/Eval").mkdir()
    (tmp_path / "set/Eval/list_eval_partition.txt").write_text(
        "3\nimage_name item_id evaluation_status\n"
        "img/WOMEN/Dresses/id_00/0.jpg id_00 gallery\n"
        "img/WOMEN/Dresses/id_00/1.jpg id_00 query\n"
        "img/WOMEN/Dresses/id_01/2.jpg id_01 gallery\n"
    )
    products, queries = tmp_path / "products.jsonl", tmp_path / "queries.jsonl"
    done = run("convert", "deepfashion-inshop", tmp_path / "set", "--products", products, "--queries", queries)
    assert (done.returncode, done.stdout) == (0, "2 products, 1 queries\n"), done.stderr
    assert call(tmp_path, server.url, "import", products, "--wait").returncode == 0
    done = run(queries)
    assert done.returncode == 0, done.stderr
    assert figures(done.stdout, "all, 1") == [1, 1, 1, 1, 1]
