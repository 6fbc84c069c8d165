"""`catalens model quantize` refuses what would not be found again."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from tests.models import TINY
from typer.testing import CliRunner

from catalens.errors import Misconfigured
from catalens_standalone.cli import app

DEMO = Path(__file__).resolve().parents[2] / "demo" / "images"


@pytest.fixture
def logging_as_before() -> Iterator[None]:
    """The command sends logs to a stderr that ends with it."""
    handlers = list(logging.getLogger().handlers)
    yield
    logging.getLogger().handlers = handlers
    structlog.reset_defaults()


@pytest.mark.usefixtures("logging_as_before")
@pytest.mark.parametrize(("name", "why"), [("../x", "cannot be a model's name"), ("starter", "comes with Catalens")])
def test_a_name_that_would_not_be_found_again_is_refused(name: str, why: str) -> None:
    with pytest.raises(Misconfigured, match=why):
        CliRunner().invoke(
            app,
            ["model", "quantize", str(TINY), "--images", str(DEMO), "--name", name],
            catch_exceptions=False,
        )
