"""`catalens model` where neither torch nor a hub is at hand: what it lists, and what it says."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from tests.models import TINY
from typer.testing import CliRunner, Result

from catalens.encoders.bundle import resolve
from catalens.encoders.known import KNOWN, caution
from catalens.errors import Misconfigured
from catalens_standalone import pulling
from catalens_standalone.cli import app

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "models.md"


@pytest.fixture(autouse=True)
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    handlers = list(logging.getLogger().handlers)
    for name in [name for name in os.environ if name.startswith("CATALENS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CATALENS_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.chdir(tmp_path)  # no .env of the developer's
    yield tmp_path / "data" / "models"
    # The commands send the log to a stderr that ends with each of them.
    structlog.reset_defaults()
    logging.getLogger().handlers[:] = handlers


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["model", *arguments], catch_exceptions=False)


def row(output: str, name: str) -> list[str]:
    """Return the one line whose name this is, without the mark when there is none."""
    [found] = [words for line in output.splitlines() if name in (words := line.split())[:2]]
    return found


def test_the_list_marks_the_model_in_use_and_names_what_can_be_pulled() -> None:
    said = run("list").output
    assert row(said, "starter")[:6] == ["*", "starter", "starter", "269", "fp32", "25"]
    for name in KNOWN:
        assert row(said, name)[1] == str(KNOWN[name].dimension)


def test_a_pulled_model_is_listed_as_what_it_is(installation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(TINY, installation / "siglip2-base")
    monkeypatch.setenv("CATALENS_MODEL", "siglip2-base")
    said = run("list").output
    assert row(said, "siglip2-base")[:4] == ["*", "siglip2-base", "tiny", "16"]  # once: no longer to be pulled
    assert row(said, "starter")[0] == "starter"


def test_a_model_in_a_folder_elsewhere_is_listed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATALENS_MODEL", str(TINY))
    assert row(run("list").output, str(TINY.resolve()))[0] == "*"


def test_a_broken_bundle_and_a_half_made_one_take_nothing_from_the_list(installation: Path) -> None:
    shutil.copytree(TINY, installation / "mine")
    (installation / "mine" / "bundle.json").write_text("{}")
    shutil.copytree(TINY, installation / ".other.x.partial" / "bundle")
    said = run("list").output
    assert "format" in " ".join(row(said, "mine"))
    assert "other" not in said
    assert row(said, "starter")[0] == "*"


def test_a_known_model_that_is_not_here_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="`catalens model pull siglip2-base` fetches google/siglip2-base"):
        resolve("siglip2-base", tmp_path)


@pytest.mark.parametrize("name", ["clip-b99", "./clip", "../clip", ".clip/b32"])
def test_a_name_that_nobody_knows_is_answered_with_those_that_are(name: str) -> None:
    with pytest.raises(Misconfigured, match=r"is no folder, .* none of the names known here: clip-b32, "):
        run("pull", name)


def test_a_name_that_no_hub_could_have_is_answered_in_words() -> None:
    with pytest.raises(Misconfigured, match=r"the hub has no some--body/model"):
        pulling._fetch("some--body/model", None, None, lambda _: None)


def test_a_name_under_which_another_model_would_be_found_is_refused() -> None:
    with pytest.raises(Misconfigured, match="starter is the name of a model that comes with Catalens"):
        run("pull", "clip-b32", "--name", "starter")


def test_a_model_that_is_here_is_not_pulled_again_unasked(installation: Path) -> None:
    shutil.copytree(TINY, installation / "clip-b32")
    with pytest.raises(Misconfigured, match=r"is there already \(revision 1\): --force"):
        run("pull", "clip-b32")


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", ".hidden", ""])
def test_a_name_cannot_lead_out_of_the_folder_of_models(tmp_path: Path, name: str) -> None:
    with pytest.raises(Misconfigured, match="cannot be a model's name"):
        pulling.pull("clip-b32", tmp_path, name=name or ".")


def test_without_the_extra_it_says_what_to_install_and_the_way_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(Misconfigured, match=r"needs \w+: install catalens\[torch\], or .* copy the folder .*/clip-b32"):
        run("pull", "clip-b32")


def test_without_a_hub_it_says_how_to_bring_the_model_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(Misconfigured, match=r"no model hub answers .* `hf download openai/.*--name clip-b32`"):
        pulling._fetch("clip-b32", KNOWN["clip-b32"], None, lambda _: None)


def test_only_what_was_pulled_can_be_verified() -> None:
    with pytest.raises(Misconfigured, match="starter was not made by `catalens model pull`"):
        run("verify")


def test_an_int8_bundle_is_verified_where_it_is_made(installation: Path) -> None:
    bundle = Path(shutil.copytree(TINY, installation / "small"))
    manifest = json.loads((bundle / "bundle.json").read_text())
    made = {"method": "x", "source": "y", "calibration": 1, "loss": None}
    (bundle / "bundle.json").write_text(json.dumps(manifest | {"precision": "int8", "quantization": made}))
    with pytest.raises(Misconfigured, match="its loss was measured when it was made"):
        run("verify", "small")


@pytest.mark.parametrize(
    ("licence", "said"),
    [
        ("MIT", None),
        ("Apache-2.0 AND MIT", None),
        ("apache-2.0", None),
        ("cc-by-nc-4.0", "does not allow commercial use"),
        ("apple-amlr", "does not allow commercial use"),
        ("MIT AND cc-by-nc-4.0", "does not allow commercial use"),
        ("openrail", "read it first"),
        ("", "its files name none"),
    ],
)
def test_a_licence_that_is_not_open_is_said(licence: str, said: str | None) -> None:
    found = caution(licence)
    assert (found is None) if said is None else (found is not None and said in found)


def test_every_known_model_is_open_and_on_the_page() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name, model in KNOWN.items():
        assert caution(model.licence) is None, name
        assert f"| `{name}` |" in page, name
        assert model.hub in page, name


def test_help_and_list_import_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from catalens_standalone.cli import app\n"
        "assert CliRunner().invoke(app, ['model', '--help']).exit_code == 0\n"
        "assert CliRunner().invoke(app, ['model', 'list'], catch_exceptions=False).exit_code == 0\n"
        "print(sorted({'numpy', 'openvino', 'onnxruntime', 'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]"
