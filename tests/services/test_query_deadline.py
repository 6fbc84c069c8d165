"""A search is answered in its time, also while the index says nothing."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.shop import open_shop

from catalens.domain import Product
from catalens.engines.edge import EdgeIndex
from catalens.settings import HttpSettings

LIMIT = 0.5


async def test_an_index_that_is_late_is_503_and_then_goes_on(tmp_path: Path) -> None:
    async with open_shop(tmp_path, http=HttpSettings(search_timeout=LIMIT)) as shop:
        await shop.put(Product(product_id="a", name="red shoe"))
        index = shop.engines.index
        assert isinstance(index, EdgeIndex)
        pid = index._engine._process.pid
        os.kill(pid, signal.SIGSTOP)
        try:
            for method, path, body in (
                ("POST", "/api/v1/search", {"query": "red shoe"}),
                ("POST", "/api/v1/search", {"query": "red shoe", "mode": "lexical"}),
                ("GET", "/api/v1/products/a/similar", None),
            ):
                answer = await shop.call(method, path, json=body)
                assert answer.status == 503
                assert answer.headers["Retry-After"] == "1"
                assert f"longer than {LIMIT:g} s" in answer.json["detail"]
        finally:
            os.kill(pid, signal.SIGCONT)
        while (answer := await shop.call("POST", "/api/v1/search", json={"query": "red shoe"})).status == 503:
            pass  # it works off what was asked meanwhile
        assert answer.json["results"][0]["product_id"] == "a"


async def test_facets_that_are_late_are_left_out_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The hits must be in time, on a busy machine too.
    async with open_shop(tmp_path, http=HttpSettings(search_timeout=3)) as shop:
        await shop.put(Product(product_id="a", name="red shoe", brand="Velo", group_id="g"))
        index = shop.engines.index
        assert isinstance(index, EdgeIndex)
        pid, facet = index._engine._process.pid, index.facet

        async def stopped(*asked: Any) -> Any:  # the port's own
            os.kill(pid, signal.SIGSTOP)
            return await facet(*asked)

        monkeypatch.setattr(index, "facet", stopped)
        try:
            found = await shop.search(query="red shoe", facets=["brand"], group_by="group_id", mode="lexical")
        finally:
            os.kill(pid, signal.SIGCONT)
        assert [(hit["product_id"], hit["variants"]) for hit in found["results"]] == [("a", 1)]
        assert found["degraded"] == "without facets: the search took longer than 3 s"
        assert "facets" not in found
