"""What every EmbeddingCache promises."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from catalens.domain import SeenPicture
from catalens.ports import EmbeddingCache

if TYPE_CHECKING:
    from catalens.domain import Embedding

KEYS = 8
"""Entries that every cache under test has room for."""


def vector(seed: int, dimension: int = 16) -> Embedding:
    raw = np.random.default_rng(seed).standard_normal(dimension).astype(np.float32)
    return raw / np.float32(np.linalg.norm(raw))


async def test_vectors_come_back_bit_for_bit_and_in_order(embedding_cache: EmbeddingCache) -> None:
    vectors = {f"key-{seed}": vector(seed) for seed in range(KEYS)}
    await embedding_cache.put(vectors)
    keys = [*reversed(vectors), "unknown", "key-0"]
    found = await embedding_cache.get(keys)
    assert len(found) == len(keys)
    for key, got in zip(keys, found, strict=True):
        if key == "unknown":
            assert got is None
        else:
            assert got is not None
            assert got.dtype == np.float32
            np.testing.assert_array_equal(got, vectors[key])


async def test_a_newer_vector_replaces(embedding_cache: EmbeddingCache) -> None:
    await embedding_cache.put({"key": vector(1)})
    await embedding_cache.put({"key": vector(2)})
    (found,) = await embedding_cache.get(["key"])
    assert found is not None
    np.testing.assert_array_equal(found, vector(2))


async def test_what_is_kept_cannot_be_changed_from_outside(embedding_cache: EmbeddingCache) -> None:
    given = vector(1)
    await embedding_cache.put({"key": given})
    given[:] = 0
    (found,) = await embedding_cache.get(["key"])
    assert found is not None
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 7
    np.testing.assert_array_equal(found, vector(1))


async def test_hits_and_misses_are_counted(embedding_cache: EmbeddingCache) -> None:
    await embedding_cache.put({"a": vector(1), "b": vector(2)})
    await embedding_cache.get(["a", "b", "a", "c"])
    stats = embedding_cache.stats()
    assert (stats["hits"], stats["misses"], stats.get("entries", 2)) == (3, 1, 2)


async def test_what_was_seen_at_a_url_is_remembered(embedding_cache: EmbeddingCache) -> None:
    first = SeenPicture(url="https://cdn.example/a", sha256="0" * 64, etag='W/"1"')
    second = SeenPicture(url="https://cdn.example/b", sha256="1" * 64, last_modified="Sun, 22 Nov 2026 10:00:00 GMT")
    assert await embedding_cache.recall("https://shop.example/ü 🗝") is None
    await embedding_cache.remember("https://shop.example/ü 🗝", first)
    await embedding_cache.remember("https://shop.example/other", second)
    assert await embedding_cache.recall("https://shop.example/ü 🗝") == first
    await embedding_cache.remember("https://shop.example/ü 🗝", second)
    assert await embedding_cache.recall("https://shop.example/ü 🗝") == second
    assert (await embedding_cache.get(["https://shop.example/other"])) == [None]
    assert embedding_cache.stats()["hits"] == 0


async def test_nothing_is_no_work(embedding_cache: EmbeddingCache) -> None:
    await embedding_cache.put({})
    assert list(await embedding_cache.get([])) == []
