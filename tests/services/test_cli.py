"""The command line against a real standalone process, as a user meets both."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.standalone import ROOT, Standalone

DEMO = ROOT / "demo"
COMMAND = (sys.executable, "-m", "catalens_standalone.cli")
Run = Callable[..., subprocess.CompletedProcess[str]]


def environment(cache: Path, **changes: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CATALENS_")}
    return clean | {"XDG_CACHE_HOME": str(cache), "NO_COLOR": "1", "COLUMNS": "200"} | changes


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standalone]:
    """One process for the module, with the demo catalogue in it."""
    folder = tmp_path_factory.mktemp("cli")
    with Standalone(folder / "data") as running:
        done = subprocess.run(
            [*COMMAND, "import", str(DEMO / "catalog.jsonl"), "--wait", "--errors", str(folder / "errors.jsonl")],
            cwd=folder,
            env=environment(folder / "cache", CATALENS_URL=running.url),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        yield running


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run the command in an empty folder, with a cache of its own."""

    def run(*arguments: str | Path, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *map(str, arguments)],
            cwd=tmp_path,
            env=environment(tmp_path / "cache", **changes),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    return run


def on_a_terminal(folder: Path, *arguments: str | Path, **changes: str) -> tuple[int, str]:
    """Run the command on a terminal of its own; return its exit status and all that it drew."""
    this_one = ("NO_COLOR", "TMUX", "KITTY_WINDOW_ID", "TERM_PROGRAM", "LC_TERMINAL")
    inside = {name: value for name, value in environment(folder / "cache").items() if name not in this_one}
    inside |= {"TERM": "xterm-256color", "COLORTERM": "truecolor"} | changes
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)], cwd=folder, env=inside, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    drawn = bytearray()
    with os.fdopen(ours, "rb", buffering=0) as screen, contextlib.suppress(OSError):  # EIO: the other side is gone
        while block := screen.read(65_536):
            drawn += block
    return process.wait(timeout=60), drawn.decode()


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


# --- search -----------------------------------------------------------------------------------------------


def test_search_by_words_prints_lines_into_a_pipe(run: Run, server: Standalone) -> None:
    done = run("search", "boxing gloves", CATALENS_URL=server.url)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(rows) == 10
    assert [row[0] for row in rows] == [str(rank) for rank in range(1, 11)]
    assert rows[0][2:] == ["boxing-gloves", "Boxing Gloves", "33.04 USD", "Sports & Outdoor > Equipment"]


def test_search_by_picture_finds_the_product_of_that_picture(run: Run, server: Standalone) -> None:
    done = run("search", "--image", DEMO / "images" / "leather-sofa.jpg", "--using", "image", CATALENS_URL=server.url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].split("\t")[2] == "leather-sofa"


def test_search_by_both_as_json_with_filters(run: Run, server: Standalone) -> None:
    done = run(
        *("search", "chair", "--image", DEMO / "images" / "balloon-chair.jpg", "--image-weight", "0.3", "--json"),
        *("--filter", "category=Home & Garden", "--filter", "price<=100", "--limit", "3", "--mode", "semantic"),
        CATALENS_URL=server.url,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["count"] == len(answer["results"]) == 3
    assert answer["mode"] == "semantic"
    assert all(hit["price"] <= 100 for hit in answer["results"])
    assert all(hit["category"].startswith("Home & Garden") for hit in answer["results"])


def test_search_by_an_attribute_of_the_demo(run: Run, server: Standalone) -> None:
    done = run(
        *("search", "shoe", "--filter", "attributes.variants=Size 42", "--filter", "attributes.color=white"),
        CATALENS_URL=server.url,
    )
    assert {line.split("\t")[2] for line in done.stdout.splitlines()} == {
        "hi-top-basketball-shoe",
        "pureboost-running-shoe",
    }


def test_an_attribute_that_reads_as_a_number_is_found_as_text(run: Run, server: Standalone) -> None:
    done = run("search", "mouse", "--filter", "attributes.sku=834444", CATALENS_URL=server.url)
    assert [line.split("\t")[2] for line in done.stdout.splitlines()] == ["cordless-mouse"]


def test_search_on_a_terminal_shows_pictures(server: Standalone, tmp_path: Path) -> None:
    for protocol, mark in (
        (dict[str, str](), "▀"),
        ({"KITTY_WINDOW_ID": "1"}, "\x1b_G"),
        ({"TERM_PROGRAM": "iTerm.app"}, "1337;"),
    ):
        status, drawn = on_a_terminal(tmp_path, "search", "sofa", "--limit", "2", CATALENS_URL=server.url, **protocol)
        assert status == 0
        assert mark in drawn
        assert "Leather Sofa" in drawn


def test_import_on_a_terminal_shows_how_far_it_is(server: Standalone, tmp_path: Path) -> None:
    lines = [json.dumps({"product_id": f"bar-{n}", "name": f"Crowbar {n}"}) for n in range(250)]
    (tmp_path / "bars.jsonl").write_text("\n".join(lines))
    status, drawn = on_a_terminal(tmp_path, "import", "bars.jsonl", "--wait", CATALENS_URL=server.url)
    assert status == 0, drawn
    assert "100%" in drawn
    assert "250 products" in drawn
    assert "/s" in drawn


def test_a_problem_is_one_readable_line(run: Run, server: Standalone, tmp_path: Path) -> None:
    (tmp_path / "note.jpg").write_text("no picture at all")
    for arguments, said in (
        (("search", "--image", "note.jpg"), "picture"),
        (("search", "shoe", "--limit", "1000"), "limit"),
        (("search", "shoe", "--filter", "colour=red"), "filters.colour"),
    ):
        done = run(*arguments, CATALENS_URL=server.url)
        assert done.returncode == 1, arguments
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith("error: ")
        assert said in done.stderr


def test_nobody_there(run: Run) -> None:
    for arguments in (("search", "shoe"), ("import", DEMO / "catalog.jsonl", "--errors", "errors.jsonl")):
        done = run(*arguments, CATALENS_URL=f"http://127.0.0.1:{free_port()}")
        assert done.returncode == 1
        assert "no Catalens answers" in done.stderr
        assert "catalens serve" in done.stderr
        assert "Traceback" not in done.stderr


def test_something_else_there(run: Run, server: Standalone) -> None:
    done = run("search", "shoe", CATALENS_URL=f"{server.url}/docs")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_wrong_settings_and_usage(run: Run) -> None:
    done = run("search", "shoe", CATALENS_HTTP__PORT="eighty")
    assert done.returncode == 1
    assert done.stderr.startswith("error: CATALENS_HTTP__PORT: ")
    assert run("search").returncode == 2
    assert run("search", "shoe", "--filter", "brand").returncode == 2
    assert run("no-such-command").returncode == 2


def test_version_and_help(run: Run) -> None:
    assert run("--version").stdout.startswith("catalens 0.")
    shown = run("--help").stdout
    assert all(command in shown for command in ("serve", "demo", "import", "search", "doctor"))


# --- import -----------------------------------------------------------------------------------------------


def test_import_accounts_for_every_line(run: Run, server: Standalone, tmp_path: Path) -> None:
    lines = [json.dumps({"product_id": f"acc-{n}", "name": f"Anvil {n}"}) for n in range(300)]
    lines[41] = '{"product_id": "acc-41", "name": "Anvil 41"'
    lines[142] = json.dumps({"product_id": "acc/142", "name": "Anvil"})
    lines[243] = json.dumps({"product_id": "acc-243", "name": "Anvil", "price": -1})
    lines[244] = json.dumps({"product_id": "acc-244", "name": "Anvil", "colour": "red"})
    (tmp_path / "anvils.jsonl").write_text("\n".join(lines))
    done = run("import", "anvils.jsonl", "--wait", CATALENS_URL=server.url)
    assert done.returncode == 1
    assert "296" in done.stdout
    entries = [json.loads(line) for line in (tmp_path / "anvils.jsonl.errors.jsonl").read_text().splitlines()]
    assert [(entry["line"], entry["product_id"]) for entry in entries] == [
        (42, None),
        (143, "acc/142"),
        (244, "acc-243"),
        (245, "acc-244"),
    ]
    assert "price" in entries[2]["error"]
    assert "colour" in entries[3]["error"]
    found = run("search", "anvil", "--mode", "lexical", "--limit", "100", CATALENS_URL=server.url)
    assert len(found.stdout.splitlines()) == 100


def test_import_csv_with_a_folder_of_pictures(run: Run, server: Standalone, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    shutil.copy(DEMO / "images" / "tent.jpg", tmp_path / "photos" / "csv-1.jpg")
    (tmp_path / "shop.csv").write_text(
        "Nr;Bezeichnung;Preis;Farbe\ncsv-1;Zelt für zwei;1.299,50;grün\ncsv-2;Zeltplane;19;blau|grün\n",
        encoding="utf-8",
    )
    done = run(
        *("import", "shop.csv", "--images", "photos", "--map", "product_id=Nr", "--map", "name=Bezeichnung"),
        *("--map", "attributes.color=Farbe", "--wait"),
        CATALENS_URL=server.url,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "shop.csv.errors.jsonl").exists()
    found = run("search", "zelt", "--filter", "attributes.color=grün", "--json", CATALENS_URL=server.url)
    hits = {hit["product_id"]: hit for hit in json.loads(found.stdout)["results"]}
    assert set(hits) == {"csv-1", "csv-2"}
    assert (hits["csv-1"]["price"], hits["csv-1"]["image_status"]) == (1299.5, "ok")
    assert hits["csv-2"]["image_status"] == "none"


def test_import_refuses_what_it_cannot_read(run: Run, server: Standalone, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text('[{"product_id": "a", "name": "A"}]')
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "strange.csv").write_text("foo,bar\n1,2\n")
    for name, said in (("list.json", "jq -c"), ("empty.csv", "is empty"), ("strange.csv", "--map product_id=COLUMN")):
        done = run("import", name, CATALENS_URL=server.url)
        assert done.returncode == 1
        assert said in done.stderr
        assert "Traceback" not in done.stderr
    assert run("import", "no-such-file.csv", CATALENS_URL=server.url).returncode == 2


# --- doctor -----------------------------------------------------------------------------------------------


def test_doctor_asks_the_process_that_runs(run: Run, server: Standalone) -> None:
    done = run("doctor", CATALENS_URL=server.url, CATALENS_MODLE="starter")
    assert done.returncode == 0, done.stdout
    assert "is ready" in done.stdout
    assert "did you mean CATALENS_MODEL?" in done.stdout


def test_doctor_opens_the_engines_of_a_stopped_process(run: Run, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    done = run("doctor", CATALENS_HTTP__PORT=free_port())
    assert done.returncode == 0, done.stdout
    assert "log and index in data open" in done.stdout
    (tmp_path / "data" / "version").write_text("99\n")
    done = run("doctor", CATALENS_HTTP__PORT=free_port())
    assert done.returncode == 1
    assert "version 99" in done.stdout


# --- serve, demo ------------------------------------------------------------------------------------------


def test_a_taken_port_is_named(run: Run, server: Standalone) -> None:
    for command in ("serve", "demo"):
        done = run(command, CATALENS_HTTP__PORT=server.url.rpartition(":")[2])
        assert done.returncode == 1
        assert "CATALENS_HTTP__PORT" in done.stderr
        assert "Traceback" not in done.stderr


def test_demo_fills_itself_once_and_stops_on_ctrl_c(tmp_path: Path) -> None:
    for expected in ("54 demo products are searchable", "The 54 demo products are there"):
        process = subprocess.Popen(
            [*COMMAND, "demo"],
            cwd=tmp_path,
            env=environment(tmp_path / "cache", CATALENS_HTTP__PORT="0"),
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        with process.stderr:
            lines = []
            for line in process.stderr:
                lines.append(line)
                if "Ctrl-C" in line:
                    break
            process.send_signal(signal.SIGINT)
            rest = process.stderr.read()
        assert process.wait(timeout=60) == 0, rest
        said = "".join(lines)
        assert expected in said
        assert "http://127.0.0.1:" in said
        assert "search" in said
        assert "Traceback" not in said + rest


def test_the_example_of_the_clients_page_does_what_it_says(server: Standalone, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "how-to" / "client.md").read_text(encoding="utf-8")
    code = page.partition("```python\n")[2].partition("```")[0]
    assert code.count("http://127.0.0.1:8080") == 1
    done = subprocess.run(
        [sys.executable, "-c", code.replace("http://127.0.0.1:8080", server.url)],
        cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "lamp-1 Desk lamp, brass" in lines[0]
    assert lines[-4:-1] == ["100 done, 0 rejected", "200 done, 0 rejected", "250 done, 0 rejected"]
    assert lines[-1].startswith("422 urn:catalens:problem:invalid (('limit', ")
