"""What RedisCache and RedisMemory promise beyond their ports: a Redis that is away or slow costs time, nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs
from tests.redis_server import RedisServer, need_server

from catalens.domain import SeenPicture
from catalens.engines.redis import RedisCache, RedisMemory
from catalens.errors import Misconfigured, Transient
from catalens.settings import RedisSettings

if TYPE_CHECKING:
    from catalens.domain import Embedding

PATIENT = 30.0
"""A time limit that only a Redis that is away exceeds, on a machine that is busy with other things."""
DAY = 86_400.0


class Seconds:
    """The monotonic clock of a test."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def seconds() -> Seconds:
    return Seconds()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    need_server()
    with RedisServer(tmp_path / "redis") as server:
        yield server


def settings(
    server: RedisServer, *, precision: Literal["float16", "float32"] = "float32", timeout: float = PATIENT
) -> RedisSettings:
    return RedisSettings(url=SecretStr(server.url), precision=precision, timeout=timeout, ttl_days=2)


@asynccontextmanager
async def opened(settings: RedisSettings, now: Seconds | None = None) -> AsyncIterator[RedisCache]:
    cache = await RedisCache.open(settings, now=now or Seconds())
    try:
        yield cache
    finally:
        await cache.close()


def vector(seed: int, dimension: int = 64) -> Embedding:
    raw = np.random.default_rng(seed).standard_normal(dimension).astype(np.float32)
    return raw / np.float32(np.linalg.norm(raw))


async def known(cache: RedisCache, *keys: str) -> list[bool]:
    return [found is not None for found in await cache.get(keys)]


# --- what is stored --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimension", [3, 512, 4096])
async def test_half_precision_keeps_the_direction_and_the_length(server: RedisServer, dimension: int) -> None:
    async with opened(settings(server, precision="float16")) as cache:
        vectors = {f"key-{seed}": vector(seed, dimension) for seed in range(20)}
        await cache.put(vectors)
        for original, found in zip(vectors.values(), await cache.get(list(vectors)), strict=True):
            assert found is not None
            assert found.dtype == np.float32
            assert not found.flags.writeable
            assert float(original @ found) > 0.9999
            assert float(np.linalg.norm(found)) == pytest.approx(1, abs=1e-6)
    with server.client() as client:
        assert len(_bytes(client.get("catalens:v1:key-0"))) == 1 + 2 * dimension


async def test_each_precision_reads_what_the_other_wrote(server: RedisServer) -> None:
    async with (
        opened(settings(server, precision="float16")) as half,
        opened(settings(server, precision="float32")) as single,
    ):
        await half.put({"half": vector(1)})
        await single.put({"single": vector(2)})
        for cache in (half, single):
            of_half, of_single = await cache.get(["half", "single"])
            assert of_half is not None
            assert float(of_half @ vector(1)) > 0.9999
            assert of_single is not None
            np.testing.assert_array_equal(of_single, vector(2))


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"f",
        b"h",
        b"garbage",
        b"x" + vector(1).tobytes(),
        b"f" + vector(1).tobytes()[:-1],
        b"h" + vector(1).astype("<f2").tobytes()[:-1],
        b"f" + np.zeros(8, np.float32).tobytes(),
        b"f" + np.full(8, np.nan, np.float32).tobytes(),
        b"h" + np.full(8, np.inf, np.float16).tobytes(),
        b"f" + vector(1).tobytes()[: 64 * 2],
    ],
)
async def test_what_is_damaged_is_unknown(server: RedisServer, value: bytes) -> None:
    with server.client() as client:
        client.set("catalens:v1:damaged", value)
        client.set("catalens:v1:seen:" + "0" * 64, value)
    async with opened(settings(server)) as cache:
        await cache.put({"whole": vector(2)})
        assert await known(cache, "damaged", "whole") == [False, True]
        assert cache.stats()["errors"] == 0


async def test_what_was_seen_and_is_damaged_is_unknown(server: RedisServer) -> None:
    async with opened(settings(server)) as cache:
        await cache.remember("https://shop.example/a", SeenPicture(url="u", sha256="0" * 64, etag="1"))
        with server.client() as client:
            (key,) = _list(client.keys("catalens:v1:seen:*"))
            for damaged in (b"", b"[]", b'{"url": "u"}', b'{"url": "u", "sha256": "0", "etag": "a\\r\\nHost: evil"}'):
                client.set(key, damaged)
                assert await cache.recall("https://shop.example/a") is None


async def test_a_key_of_another_type_is_unknown_and_harms_no_other(server: RedisServer) -> None:
    with server.client() as client:
        client.rpush("catalens:v1:list", "x")
    async with opened(settings(server)) as cache:
        await cache.put({"whole": vector(2)})
        assert await known(cache, "list", "whole") == [False, True]


async def test_everything_expires(server: RedisServer) -> None:
    async with opened(settings(server)) as cache:
        await cache.put({"key": vector(1)})
        await cache.remember("https://shop.example/a", SeenPicture(url="u", sha256="0" * 64, etag="1"))
    memory = await RedisMemory.open(settings(server))
    await memory.remember("shop|1", b"value", ttl=DAY)
    await memory.close()
    with server.client() as client:
        left = {bytes(key): _int(client.ttl(key)) for key in _list(client.keys("*"))}
    assert len(left) == 3
    assert all(DAY - 60 < seconds <= 2 * DAY for seconds in left.values())


async def test_a_batch_is_one_round_trip(server: RedisServer) -> None:
    batch = {f"key-{seed}": vector(seed) for seed in range(20)}
    async with opened(settings(server)) as cache, opened(settings(server)) as reader:
        await cache.put({"connected": vector(0)})
        await reader.get(["connected"])
        with server.client() as client:
            client.config_resetstat()
            await cache.put(batch)
            stored = _info(client)
            assert stored["total_reads_processed"] == 2  # the batch, and this INFO
            client.config_resetstat()
            assert all(await known(reader, *batch))
            found = _info(client)
            assert found["total_reads_processed"] == 2
            assert found["cmdstat_mget"]["calls"] == 1


# --- a Redis that is away --------------------------------------------------------------------------------------------


async def test_a_killed_redis_costs_misses_and_comes_back(server: RedisServer, seconds: Seconds) -> None:
    async with opened(settings(server), seconds) as cache:
        await cache.put({"key": vector(1)})
        assert await known(cache, "key") == [True]
        server.kill()
        with capture_logs() as logs:
            for _ in range(10):
                assert await known(cache, "key") == [False]
                await cache.put({"other": vector(2)})
                assert await cache.recall("https://shop.example/a") is None
        assert cache.stats() == {"hits": 1, "misses": 10, "errors": 3, "available": 0}  # three calls, then no more
        assert [(entry["event"], entry["log_level"]) for entry in logs] == [("cache.away", "warning")]
        server.start()
        assert await known(cache, "key") == [False], "the pause is not over"
        seconds.now += 1
        with capture_logs() as logs:
            assert await known(cache, "key") == [True]
            assert await known(cache, "key") == [True]
        assert cache.stats()["available"] == 1
        assert [entry["event"] for entry in logs] == ["cache.back"]


async def test_a_restart_between_two_calls_goes_unnoticed(server: RedisServer) -> None:
    async with opened(settings(server)) as cache:
        await cache.put({"key": vector(1)})
        server.restart()
        assert await known(cache, "key") == [True]


async def test_a_frozen_redis_is_left_after_the_time_limit(server: RedisServer, seconds: Seconds) -> None:
    async with opened(settings(server), seconds) as patient:
        await patient.put({"a": vector(1), "b": vector(2)})
    async with opened(settings(server, timeout=0.1), seconds) as cache:
        server.freeze()
        for _ in range(5):
            assert await known(cache, "a") == [False]
        assert cache.stats()["errors"] == 3
        seconds.now += 1
        assert await known(cache, "a") == [False]
        assert cache.stats()["errors"] == 4, "one probe after the pause"
        seconds.now += 1
        assert await known(cache, "a") == [False]
        assert cache.stats()["errors"] == 4, "the next pause is longer"
        server.thaw()

        async def answers() -> bool:
            seconds.now += 60
            return await known(cache, "a") == [True]

        while not await answers():  # a busy machine may miss the short time limit a few times
            pass
        found = None
        while found is None:
            seconds.now += 60
            (found,) = await cache.get(["b"])
        np.testing.assert_array_equal(found, vector(2))  # not a late answer to an earlier question


async def test_a_cancelled_call_harms_no_other(server: RedisServer, seconds: Seconds) -> None:
    async with opened(settings(server), seconds) as cache:
        await cache.put({"a": vector(1), "b": vector(2)})
        server.freeze()
        calls: list[asyncio.Task[Any]] = [asyncio.create_task(cache.get(["a"]), name="get") for _ in range(40)]
        calls += [asyncio.create_task(cache.put({"a": vector(3)}), name="put") for _ in range(5)]
        await asyncio.sleep(0.05)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        server.thaw()
        (found,) = await cache.get(["b"])
        assert found is not None
        np.testing.assert_array_equal(found, vector(2))
        assert cache.stats()["errors"] == 0


async def test_a_cancelled_probe_lets_the_next_call_probe(server: RedisServer, seconds: Seconds) -> None:
    async with opened(settings(server), seconds) as cache:
        await cache.put({"a": vector(1)})
        server.kill()
        while cache.stats()["available"]:
            await cache.get(["a"])
        server.start()
        server.freeze()
        seconds.now += 1
        probe = asyncio.create_task(cache.get(["a"]), name="probe")
        await asyncio.sleep(0.05)
        probe.cancel()
        await asyncio.gather(probe, return_exceptions=True)
        server.thaw()
        assert await known(cache, "a") == [True]


async def test_a_redis_that_is_full_still_answers(server: RedisServer) -> None:
    async with opened(settings(server)) as cache:
        await cache.put({"key": vector(1)})
        with server.client() as client:
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", 1)
        with capture_logs() as logs:
            for seed in range(9):
                await cache.put({f"more-{seed}": vector(seed)})
        assert await known(cache, "key", "more-0") == [True, False]
        assert cache.stats()["available"] == 1
        assert cache.stats()["errors"] == 9
        assert [entry["event"] for entry in logs] == ["cache.refused"]
        assert "more-0" not in str(logs)
        with server.client() as client:
            client.config_set("maxmemory", 0)
        await cache.put({"more-0": vector(0)})
        assert await known(cache, "more-0") == [True]


async def test_a_wrong_password_costs_misses_and_is_never_logged(tmp_path: Path) -> None:
    need_server()
    with RedisServer(tmp_path / "redis") as server:
        with server.client() as client:
            client.config_set("requirepass", "the right one")
        wrong = f"redis://:very-secret-word@127.0.0.1:{server.port}/0"
        with capture_logs() as logs:
            async with opened(RedisSettings(url=SecretStr(wrong), timeout=PATIENT)) as cache:
                for _ in range(5):
                    assert await known(cache, "key") == [False]
            memory = await RedisMemory.open(RedisSettings(url=SecretStr(wrong), timeout=PATIENT))
            with pytest.raises(Transient) as caught:
                await memory.remember("shop|1", b"first", ttl=DAY)
            await memory.close()
    assert [entry["event"] for entry in logs] == ["cache.away"]
    assert "very-secret-word" not in f"{logs} {caught.value}"


@pytest.mark.parametrize("url", [None, "", "redis.example:6379", "http://:very-secret-word@x/", "redis://:s@h:word/0"])
async def test_what_is_no_url_of_a_redis_is_said_at_the_start(url: str | None) -> None:
    wrong = RedisSettings(url=None if url is None else SecretStr(url))
    for adapter in (RedisCache, RedisMemory):
        with pytest.raises(Misconfigured, match="CATALENS_REDIS__URL") as caught:
            await adapter.open(wrong)
        assert "word" not in str(caught.value).replace("user:password@", "")


# --- the memory of Idempotency-Keys ----------------------------------------------------------------------------------


async def test_the_memory_says_so_when_redis_is_away(server: RedisServer) -> None:
    memory = await RedisMemory.open(settings(server, timeout=0.1))
    patient = await RedisMemory.open(settings(server))
    assert await patient.remember("shop|1", b"first", ttl=DAY) == b"first"
    server.freeze()
    with pytest.raises(Transient, match="Idempotency-Keys"):
        await memory.remember("shop|2", b"second", ttl=DAY)
    server.kill()
    for _ in range(5):
        with pytest.raises(Transient, match="Idempotency-Keys"):
            await patient.remember("shop|1", b"second", ttl=DAY)
    server.start()
    assert await patient.remember("shop|1", b"third", ttl=DAY) == b"first"
    await memory.close()
    await patient.close()


def _bytes(value: Any) -> bytes:
    assert isinstance(value, bytes)
    return value


def _int(value: Any) -> int:
    assert isinstance(value, int)
    return value


def _list(value: Any) -> list[Any]:
    assert isinstance(value, list)
    return value


def _info(client: Any) -> dict[str, Any]:
    """Return the counts of commands and of reads; this call is one of each."""
    return {**client.info("all")}
