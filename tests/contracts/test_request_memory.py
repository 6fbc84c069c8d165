"""What every RequestMemory promises."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.contracts.conftest import MemoryUnderTest

DAY = 86_400.0


async def test_the_first_value_stays(request_memory: MemoryUnderTest) -> None:
    assert await request_memory.memory.remember("shop|1", b"first", ttl=DAY) == b"first"
    assert await request_memory.memory.remember("shop|1", b"second", ttl=DAY) == b"first"
    assert await request_memory.memory.remember("shop|2", b"other", ttl=DAY) == b"other"


async def test_values_are_bytes_and_keys_any_text(request_memory: MemoryUnderTest) -> None:
    for key, value in {"": b"", "shop|ключ 🗝": bytes(range(256)), "shop|' OR 1=1 --": b"\x00"}.items():
        assert await request_memory.memory.remember(key, value, ttl=DAY) == value
        assert await request_memory.memory.remember(key, b"later", ttl=DAY) == value


async def test_of_many_at_once_one_wins_and_all_are_told(request_memory: MemoryUnderTest) -> None:
    answers = await asyncio.gather(
        *(request_memory.memory.remember("shop|1", f"caller {number}".encode(), ttl=DAY) for number in range(50))
    )
    assert len(set(answers)) == 1


async def test_it_survives_a_restart(request_memory: MemoryUnderTest) -> None:
    await request_memory.memory.remember("shop|1", b"first", ttl=DAY)
    memory = await request_memory.restart()
    assert await memory.remember("shop|1", b"second", ttl=DAY) == b"first"


async def test_it_forgets_after_the_ttl_and_not_before(request_memory: MemoryUnderTest) -> None:
    await request_memory.memory.remember("shop|1", b"first", ttl=DAY)
    request_memory.clock.seconds += DAY
    assert await request_memory.memory.remember("shop|1", b"second", ttl=DAY) == b"first"
    request_memory.clock.seconds += 1
    assert await request_memory.memory.remember("shop|1", b"third", ttl=DAY) == b"third"
    assert await request_memory.memory.remember("shop|1", b"fourth", ttl=DAY) == b"third"


async def test_the_caller_says_how_old_is_too_old(request_memory: MemoryUnderTest) -> None:
    await request_memory.memory.remember("shop|1", b"first", ttl=DAY)
    request_memory.clock.seconds += 3600
    assert await request_memory.memory.remember("shop|1", b"second", ttl=60) == b"second"
    assert await request_memory.memory.remember("shop|1", b"third", ttl=DAY) == b"second"


async def test_a_cancelled_caller_harms_no_other(request_memory: MemoryUnderTest) -> None:
    doomed = asyncio.create_task(request_memory.memory.remember("shop|1", b"doomed", ttl=DAY))
    await asyncio.sleep(0)
    doomed.cancel()
    await asyncio.gather(doomed, return_exceptions=True)
    held = await request_memory.memory.remember("shop|1", b"second", ttl=DAY)
    assert held in (b"doomed", b"second")
    assert await request_memory.memory.remember("shop|1", b"third", ttl=DAY) == held
