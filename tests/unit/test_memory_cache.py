"""MemoryCache keeps what was used last, whatever the order of calls."""

from __future__ import annotations

import tracemalloc
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from catalens.domain import SeenPicture
from catalens.engines.memory import MemoryCache

if TYPE_CHECKING:
    from catalens.domain import Embedding

KEY = st.sampled_from("abcdef")
LENGTH = st.sampled_from([3, 5])
"""Of the vectors of two models."""
CALLS = st.lists(st.tuples(st.sampled_from(["get", "put"]), st.lists(KEY, max_size=4), LENGTH), max_size=40)


@given(room=st.integers(0, 5), calls=CALLS)
async def test_it_holds_the_last_used_and_nothing_else(room: int, calls: list[tuple[str, list[str], int]]) -> None:
    cache = MemoryCache(room)
    last_used: dict[str, list[int]] = {}  # the model: most recently used at the end
    given_out: list[tuple[Embedding, list[int]]] = []
    for turn, (call, keys, length) in enumerate(calls):
        if call == "put":
            put = {key: [turn] * (length - 1) + [ord(key)] for key in keys}
            await cache.put({key: np.array(vector, np.float32) for key, vector in put.items()})
        else:
            put = {key: last_used[key] for key in keys if key in last_used}
            found = await cache.get(keys)
            assert [None if vector is None else vector.tolist() for vector in found] == [*map(last_used.get, keys)]
            given_out += [(one, last_used[key]) for key, one in zip(keys, found, strict=True) if one is not None]
        order = dict.fromkeys(keys) if call == "put" else dict.fromkeys(reversed(list(dict.fromkeys(reversed(keys)))))
        for key in order:
            if key in put:
                last_used.pop(key, None)
                last_used[key] = put[key]
        last_used = dict(list(last_used.items())[-room:]) if room else {}
        assert cache.stats()["entries"] == len(last_used)
    assert all(vector.tolist() == as_it_was for vector, as_it_was in given_out)  # whatever was put later


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


async def test_vectors_of_a_model_that_is_not_used_any_more_take_no_memory() -> None:
    cache = MemoryCache(600)
    tracemalloc.start()
    try:
        await cache.put({f"old {number}": np.ones(4096, np.float32) for number in range(600)})
        full, _ = tracemalloc.get_traced_memory()
        await cache.put({f"new {number}": np.ones(8, np.float32) for number in range(600)})
        left, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert full > 600 * 4096 * 4 > 10 * left
