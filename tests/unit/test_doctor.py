"""What `catalens doctor` sees, and what it advises."""

from __future__ import annotations

import json
import os
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from catalens.errors import Misconfigured
from catalens.keys import digest_of
from catalens.settings import HttpSettings, Settings, load_settings
from catalens_standalone import doctor
from catalens_standalone.client import local_url, service_key, service_url
from catalens_standalone.doctor import Check, access, data_folder, examine, port, unknown_variables


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of this machine gets in, and no .env."""
    for name in list(os.environ):
        if name.startswith("CATALENS_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def test_variables_flatten_the_sections() -> None:
    names = [variable.name for variable in doctor.variables()]
    assert "CATALENS_HTTP__PORT" in names
    assert "CATALENS_DATA_DIR" in names
    assert "CATALENS_HTTP" not in names
    assert len(names) == len(set(names))


def test_unknown_variables_are_named_with_what_was_meant() -> None:
    named = [
        "CATALENS_HTTP__PROT",
        "CATALENS_ZZZZZZZ",
        "CATALENS_HTTP__PORT",
        "catalens_model",
        "CATALENS_HTTP",
        "PATH",
    ]
    assert unknown_variables(named) == [
        Check(
            "settings",
            "warn",
            "CATALENS_HTTP__PROT is no setting and has no effect",
            "did you mean CATALENS_HTTP__PORT?",
        ),
        Check(
            "settings",
            "warn",
            "CATALENS_ZZZZZZZ is no setting and has no effect",
            "see docs/reference/settings.md for those that exist",
        ),
    ]


def test_bad_settings_are_named_by_their_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATALENS_HTTP__PORT", "eighty")
    monkeypatch.setenv("CATALENS_LOG_LEVEL", "loud")
    with pytest.raises(Misconfigured) as refused:
        load_settings()
    assert "CATALENS_HTTP__PORT: " in str(refused.value)
    assert "CATALENS_LOG_LEVEL: " in str(refused.value)


def test_a_list_that_is_no_json_is_misconfigured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATALENS_API_KEYS", "shop:secret")
    with pytest.raises(Misconfigured, match=r"api_keys.*JSON"):
        load_settings()


def test_a_secret_is_never_in_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATALENS_API_KEYS", '[{"name": "shop", "secret": "tooshort"}]')
    with pytest.raises(Misconfigured) as refused:
        load_settings()
    assert "tooshort" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, "ok"),
        ({"http": HttpSettings(host="0.0.0.0")}, "fail"),
        ({"http": HttpSettings(host="0.0.0.0"), "allow_anonymous": True}, "warn"),
        ({"http": HttpSettings(host="0.0.0.0"), "api_keys": [{"name": "shop", "secret": "0123456789abcdef"}]}, "ok"),
    ],
)
def test_access(changes: dict[str, object], status: str) -> None:
    (check,) = access(Settings.model_validate(changes))
    assert check.status == status
    assert bool(check.advice) == (status != "ok")


def test_access_by_a_file_of_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys.jsonl"
    settings = Settings.model_validate({"http": HttpSettings(host="0.0.0.0"), "api_keys_file": file})

    def states(*lines: dict[str, str]) -> list[tuple[str, str]]:
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return [(check.status, check.finding) for check in access(settings)]

    (missing,) = access(settings)
    assert (missing.status, "keys.jsonl" in missing.finding) == ("fail", True)
    assert states()[0][0] == "warn"
    shop, erp, old = ({"name": name, "sha256": digest_of(name)} for name in ("shop", "erp", "old"))
    assert states(shop, erp) == [("ok", "2 API keys")]
    soon = (datetime.now(UTC) + timedelta(days=3)).isoformat()
    assert states(shop, {**erp, "expires": soon}, {**old, "expires": "2020-01-01T00:00:00Z"}) == [
        ("ok", "3 API keys"),
        ("warn", f"the API key erp expires on {soon[:10]}"),
        ("warn", "the API key old has expired"),
    ]
    assert states({**shop, "tenant": "Not One"})[0][0] == "fail"


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        check = port("127.0.0.1", number)
    assert check.status == "fail"
    assert "CATALENS_HTTP__PORT" in check.advice
    assert port("127.0.0.1", 0).status == "ok"


@pytest.mark.parametrize("host", ["192.0.2.1", "nowhere.invalid"])
def test_an_address_of_another_machine(host: str) -> None:
    check = port(host, 0)
    assert check.status == "fail"
    assert "CATALENS_HTTP__HOST" in check.advice


def test_data_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    folder, disk = data_folder(tmp_path / "a" / "b")
    assert (folder.status, disk.name) == ("ok", "disk")
    assert "first start" in folder.finding
    assert list(tmp_path.iterdir()) == []


def test_data_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (check,) = data_folder(tmp_path / "file")
    assert check.status == "fail"
    assert "CATALENS_DATA_DIR" in check.advice


async def test_a_missing_model_is_one_failure_among_the_findings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("CATALENS_HTTP__PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("CATALENS_MODEL", "no-such-model")
    checks = await examine(os.environ)
    failed = [check for check in checks if check.status == "fail"]
    assert [check.name for check in failed] == ["model"]
    assert "CATALENS_MODEL=no-such-model" in failed[0].finding
    assert not (tmp_path / "data").exists()


async def test_unsound_settings_end_the_examination(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CATALENS_HTTP__PORT", "eighty")
    (tmp_path / ".env").write_text("CATALENS_MODLE=starter\n")
    checks = await examine(os.environ)
    assert [(check.name, check.status) for check in checks] == [
        ("python", "ok"),
        ("settings", "warn"),
        ("settings", "fail"),
    ]
    assert checks[1].advice == "did you mean CATALENS_MODEL?"


def test_where_the_command_line_looks() -> None:
    assert service_url(Settings()) == "http://127.0.0.1:8080"
    assert service_url(Settings.model_validate({"http": {"port": 9000}})) == "http://127.0.0.1:9000"
    assert (
        service_url(Settings.model_validate({"http": {"port": 9000}, "url": "https://x.example/"}))
        == "https://x.example"
    )
    assert local_url("0.0.0.0", 80) == "http://127.0.0.1:80"
    assert local_url("::", 80) == "http://[::1]:80"


def test_which_key_the_command_line_sends() -> None:
    accepted = [{"name": "shop", "secret": "0123456789abcdef"}]
    assert service_key(Settings()) is None
    assert service_key(Settings.model_validate({"api_keys": accepted})) == "0123456789abcdef"
    assert service_key(Settings.model_validate({"api_keys": accepted, "api_key": "mine"})) == "mine"
