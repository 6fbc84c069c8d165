"""`catalens model quantize` refuses what would not be found again."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.models import TINY
from typer.testing import CliRunner

from catalens.errors import Misconfigured
from catalens_standalone.cli import app

DEMO = Path(__file__).resolve().parents[2] / "demo" / "images"


def test_a_name_that_is_no_name_is_refused() -> None:
    with pytest.raises(Misconfigured, match="cannot be a model's name"):
        CliRunner().invoke(
            app,
            ["model", "quantize", str(TINY), "--images", str(DEMO), "--name", "../x"],
            catch_exceptions=False,
        )
