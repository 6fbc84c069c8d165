"""What RedisLimiter promises: processes count together, and a Redis that is away is never an outage."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs
from tests.redis_server import RedisServer, need_server

from catalens.engines.redis import RedisLimiter
from catalens.settings import RedisSettings


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    need_server()
    with RedisServer(tmp_path / "redis") as server:
        yield server


@asynccontextmanager
async def opened(server: RedisServer, timeout: float = 30.0) -> AsyncIterator[RedisLimiter]:
    limiter = await RedisLimiter.open(RedisSettings(url=SecretStr(server.url), timeout=timeout), now=lambda: 0.0)
    try:
        yield limiter
    finally:
        await limiter.close()


async def test_two_processes_share_one_bucket(server: RedisServer) -> None:
    slow = 0.002  # next to nothing flows in while the test runs; the bucket holds one
    async with opened(server) as first, opened(server) as second:
        tries = [limiter.take("shop", slow) for limiter in (first, second) for _ in range(10)]
        assert sum(one.granted for one in await asyncio.gather(*tries)) == 1
        assert (await second.take("other", slow)).granted
        refused = await first.take("shop", slow)
        assert not refused.granted
        assert refused.retry_after > 400


async def test_what_flows_in_is_granted(server: RedisServer) -> None:
    async with opened(server) as limiter:
        assert sum([(await limiter.take("shop", 20.0)).granted for _ in range(100)]) >= 100
        with server.client() as client:
            (key,) = client.keys("catalens:v1:rate:*")
            since = float(client.hget(key, "since"))
            client.hset(key, mapping={"left": "0.0", "since": f"{since - 2.5:.6f}"})
        granted = sum([(await limiter.take("shop", 2.0)).granted for _ in range(10)])
        assert 5 <= granted <= 6


async def test_what_one_process_owes_the_others_wait_for(server: RedisServer) -> None:
    async with opened(server) as first, opened(server) as second:
        assert (await first.take("shop", 2.0)).granted
        owed = await first.owe("shop", 2.0, 63)
        assert owed.granted
        assert -54 <= owed.left < -40  # less what flows in meanwhile
        refused = await second.take("shop", 2.0)
        assert not refused.granted
        assert 20 < refused.retry_after <= 28
        assert (await second.owe("shop", 2.0, 60)).left < -80  # let in before the first was counted
        with server.client() as client:
            (key,) = client.keys("catalens:v1:rate:*")
            assert client.pttl(key) > 25_000  # forgotten it would be full
        assert (await second.take("other", 2.0)).granted


async def test_while_redis_is_away_it_is_owed_here(server: RedisServer) -> None:
    async with opened(server) as limiter:
        server.kill()
        assert (await limiter.take("shop", 2.0)).granted
        assert (await limiter.owe("shop", 2.0, 63)).left == -54
        assert not (await limiter.take("shop", 2.0)).granted


async def test_a_bucket_that_is_full_again_is_forgotten(server: RedisServer) -> None:
    async with opened(server) as limiter:
        await limiter.take("shop", 10.0)
        with server.client() as client:
            (key,) = client.keys("*")
            assert 5_000 < client.pttl(key) <= 6_000


async def test_while_redis_is_away_each_process_counts_alone(server: RedisServer) -> None:
    slow = 0.002
    async with opened(server, timeout=30.0) as limiter:
        assert (await limiter.take("shop", slow)).granted
        server.kill()
        with capture_logs() as logs:
            answers = [await limiter.take("shop", slow) for _ in range(5)]
        assert [one.granted for one in answers] == [True, False, False, False, False]
        assert [line["event"] for line in logs if line["event"].startswith("limits.")] == ["limits.away"]


async def test_a_frozen_redis_costs_its_time_limit_only(server: RedisServer) -> None:
    async with opened(server, timeout=0.05) as limiter:
        server.freeze()
        async with asyncio.timeout(30):
            assert [(await limiter.take("shop", 1.0)).granted for _ in range(6)] == [True] * 5 + [False]
        server.thaw()
