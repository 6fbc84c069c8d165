"""Which nodes the snapshots of a Qdrant cluster are taken of, against nodes that say what a cluster's nodes say."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from pydantic import SecretStr
from scripts.qdrant_drill import reached

from catalens.errors import Misconfigured
from catalens.settings import QdrantSettings, Settings

PEERS = {str(number): {"uri": f"http://qdrant-{number}:6335/"} for number in (1, 2)}
KEY = "only-for-tests"


async def node(number: int) -> TestServer:
    """A node of a cluster of two that knows one key."""

    async def cluster(request: web.Request) -> web.Response:
        if request.headers.get("api-key") != KEY:
            return web.Response(status=401)
        return web.json_response({"result": {"status": "enabled", "peer_id": number, "peers": PEERS}, "status": "ok"})

    app = web.Application()
    app.router.add_get("/cluster", cluster)
    server = TestServer(app)
    await server.start_server()
    return server


@pytest.fixture
async def urls() -> AsyncIterator[list[str]]:
    async with AsyncExitStack() as stack:
        servers = [await node(number) for number in (1, 2)]
        for server in servers:
            stack.push_async_callback(server.close)
        yield [str(server.make_url("/")) for server in servers]


def settings(key: str = KEY) -> Settings:
    return Settings(_env_file=None, qdrant=QdrantSettings(api_key=SecretStr(key)))


async def test_each_node_of_a_cluster_is_named(urls: list[str]) -> None:
    async with reached(settings(), urls) as nodes:
        assert nodes.urls == urls


@pytest.mark.parametrize("chosen", [[0], [0, 0], [0, 1, 1]])
async def test_nodes_that_are_missing_or_named_twice_are_refused(urls: list[str], chosen: list[int]) -> None:
    with pytest.raises(Misconfigured, match="the cluster has the nodes 1, 2; --node names"):
        async with reached(settings(), [urls[number] for number in chosen]):
            pass


async def test_a_key_that_is_not_known_is_said(urls: list[str]) -> None:
    with pytest.raises(Misconfigured, match="CATALENS_QDRANT__API_KEY"):
        async with reached(settings("another"), urls):
            pass
