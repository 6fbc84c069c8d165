"""MemoryCache keeps what was used last, whatever the order of calls."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from catalens.domain import SeenPicture
from catalens.engines.memory import MemoryCache

KEY = st.sampled_from("abcdef")
CALLS = st.lists(st.tuples(st.sampled_from(["get", "put"]), st.lists(KEY, max_size=4)), max_size=40)


@given(room=st.integers(0, 5), calls=CALLS)
async def test_it_holds_the_last_used_and_nothing_else(room: int, calls: list[tuple[str, list[str]]]) -> None:
    cache = MemoryCache(room)
    last_used: list[str] = []  # the model: most recently used at the end
    for turn, (call, keys) in enumerate(calls):
        if call == "put":
            await cache.put({key: np.full(3, turn, np.float32) for key in keys})
            used = list(dict.fromkeys(keys))
        else:
            found = await cache.get(keys)
            assert [vector is not None for vector in found] == [key in last_used for key in keys]
            used = [key for key in keys if key in last_used]
        for key in used:
            last_used = [other for other in last_used if other != key] + [key]
        last_used = last_used[-room:] if room else []
        assert cache.stats()["entries"] == len(last_used)


async def test_pictures_seen_are_bounded_too() -> None:
    cache = MemoryCache(2)
    for name in ("a", "b", "a", "c"):
        await cache.remember(name, SeenPicture(url=name, sha256="0" * 64, etag="1"))
    assert [await cache.recall(name) is not None for name in ("a", "b", "c")] == [True, False, True]


async def test_vectors_are_kept_as_float32() -> None:
    cache = MemoryCache(1)
    await cache.put({"key": np.array([0.5, 0.25], np.float64)})
    (found,) = await cache.get(["key"])
    assert found is not None
    assert found.dtype == np.float32
