"""The settings' page and .env.example say what the settings model says."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from scripts.settings_reference import EXAMPLE, REFERENCE, example, reference

from catalens.settings import Settings
from catalens_standalone.doctor import variables

REWRITE = "run .venv/bin/python scripts/settings_reference.py"


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of this machine gets in, and no .env."""
    for name in list(os.environ):
        if name.startswith("CATALENS_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def test_env_example_is_in_step() -> None:
    assert EXAMPLE.read_text(encoding="utf-8") == example(), REWRITE


def test_settings_page_is_in_step() -> None:
    assert REFERENCE.read_text(encoding="utf-8") == reference(), REWRITE


def test_every_setting_says_what_it_is_for() -> None:
    assert [variable.name for variable in variables() if not variable.field.description] == []


def test_the_example_uncommented_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line.removeprefix("#") for line in example().splitlines() if line.startswith("#CATALENS_")]
    assert len(lines) == len(list(variables()))
    for line in lines:
        name, _, value = line.partition("=")
        monkeypatch.setenv(name, value)
    assert Settings() == Settings.model_construct()


def test_each_listed_variable_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in variables():
        monkeypatch.setenv(variable.name, "no possible value \N{BELL}")
        settings = None
        with contextlib.suppress(ValueError):
            settings = Settings()
        assert settings != Settings.model_construct(), f"{variable.name} has no effect"
        monkeypatch.delenv(variable.name)
