"""`catalens keys create`: the secret is told once, and what is kept opens the door for it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from catalens.errors import Misconfigured
from catalens.keys import Keyring, digest_of
from catalens.settings import Settings
from catalens_standalone.cli import app


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CATALENS_API_KEYS_FILE", str(tmp_path / "keys.jsonl"))
    return tmp_path / "keys.jsonl"


def create(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["keys", "create", *arguments])


def test_a_key_goes_into_the_file_as_its_hash(file: Path) -> None:
    file.write_text("# ours, without a line's end")
    result = create(
        "shop", "--scope", "query", "--scope", "ingest", "--tenant", "b", "--rate", "5", "--expires", "2999-01-31"
    )
    assert result.exit_code == 0
    (secret,) = result.stdout.split()
    assert len(secret) > 40
    assert secret not in file.read_text()
    key = Keyring(Settings(_env_file=None)).find(secret)
    assert key is not None
    assert (key.name, key.tenant, key.scopes, key.rate) == ("shop", "b", ("query", "ingest"), 5)
    assert key.expires == datetime(2999, 1, 31, tzinfo=UTC)
    (other,) = create("shop", "--scope", "query").stdout.split()
    assert other != secret
    assert len(Keyring(Settings(_env_file=None)).keys) == 2


def test_the_file_is_made_for_its_owner_only(file: Path) -> None:
    assert create("shop", "--scope", "query").exit_code == 0
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_folder_that_is_swapped_as_the_kubelet_does_is_read_again(file: Path) -> None:
    """A mounted Secret is a link to a folder; a new version is another folder, and the link is replaced in one step."""
    folder = file.parent
    for version, name in (("..1", "old"), ("..2", "new")):
        (folder / version).mkdir()
        entry = {"name": name, "sha256": digest_of(f"the secret of {name}")}
        (folder / version / "keys.jsonl").write_text(json.dumps(entry), encoding="utf-8")
    (folder / "..data").symlink_to("..1")
    file.symlink_to("..data/keys.jsonl")
    keyring = Keyring(Settings(_env_file=None))
    assert [key.name for key in keyring.keys] == ["old"]
    (folder / "..next").symlink_to("..2")
    (folder / "..next").replace(folder / "..data")
    assert keyring.refresh()
    assert keyring.find("the secret of old") is None
    assert keyring.find("the secret of new") is not None


def test_without_a_file_the_entry_is_printed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CATALENS_API_KEYS_FILE")
    secret, entry = create("shop", "--scope", "admin").stdout.splitlines()
    assert json.loads(entry)["scopes"] == ["admin"]
    assert secret not in entry
    assert not file.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["shop"],
        ["shop", "--scope", "root"],
        ["shop", "--scope", "query", "--tenant", "Not A Tenant"],
        ["shop", "--scope", "query", "--rate", "0"],
        ["shop", "--scope", "query", "--rate", "1e308"],  # what is told of it would be no number
        ["shop", "--scope", "query", "--rate", "nan"],
        ["", "--scope", "query"],
    ],
)
def test_what_makes_no_key(file: Path, arguments: list[str]) -> None:
    assert create(*arguments).exit_code == 2
    assert not file.exists()


def test_a_broken_file_is_left_alone(file: Path) -> None:
    file.write_text("nonsense\n")
    result = create("shop", "--scope", "query")
    assert isinstance(result.exception, Misconfigured)
    assert file.read_text() == "nonsense\n"
