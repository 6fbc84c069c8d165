"""One standalone process for all end-to-end tests, started as a user would start it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.standalone import Standalone


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standalone]:
    """A fresh process with an empty data folder."""
    folder: Path = tmp_path_factory.mktemp("standalone")
    with Standalone(folder / "data") as running:
        yield running
