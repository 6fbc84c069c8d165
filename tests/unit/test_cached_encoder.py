"""CachedEncoder computes a content once, whoever asks at the same time and whoever stops waiting."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np
import pytest

from catalens.domain import ModelSpec, PictureInfo, SeenPicture, sha256_hex
from catalens.embedding import CachedEncoder
from catalens.engines.memory import MemoryCache
from catalens.errors import InvalidPicture, NotFound, Transient
from catalens.ports import EncodedImage
from catalens.telemetry import Metrics

if TYPE_CHECKING:
    from catalens.domain import Embedding

EAST: Embedding = np.array([1, 0], np.float32)


class HeldEncoder:
    """An encoder that answers when it is let, each call by itself, and counts how often it was asked."""

    spec = ModelSpec(id="held", revision="1", family="test", dimension=2, fingerprint="f")

    def __init__(self) -> None:
        self.asked: list[str | bytes] = []
        self.cancelled: list[str | bytes] = []
        self.answers: asyncio.Queue[Exception | None] = asyncio.Queue()

    async def embed_text(self, text: str, *, bulk: bool = False) -> Embedding:
        del bulk  # one queue for all
        return await self._embed(text)

    async def embed_image(self, picture: bytes, *, bulk: bool = False) -> EncodedImage:
        del bulk
        return EncodedImage(await self._embed(picture), PictureInfo(1, 1, "png", sha256_hex(picture)))

    async def _embed(self, content: str | bytes) -> Embedding:
        self.asked.append(content)
        try:
            error = await self.answers.get()
        except asyncio.CancelledError:
            self.cancelled.append(content)
            raise
        if error is not None:
            raise error
        return EAST

    def answer(self, *errors: Exception | None) -> None:
        for error in errors:
            self.answers.put_nowait(error)

    async def close(self) -> None:
        """Nothing to release."""


@pytest.fixture
def encoder() -> HeldEncoder:
    return HeldEncoder()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def cached(encoder: HeldEncoder, metrics: Metrics) -> CachedEncoder:
    return CachedEncoder(encoder, MemoryCache(10), metrics)


async def asked(encoder: HeldEncoder, times: int) -> None:
    """Let everybody go as far as they can; then the encoder was asked so often."""
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(encoder.asked) == times


def tasks(cached: CachedEncoder, count: int) -> list[asyncio.Task[Embedding]]:
    return [asyncio.create_task(cached.text("red"), name=f"caller {number}") for number in range(count)]


async def test_what_many_need_at_once_is_computed_once(encoder: HeldEncoder, cached: CachedEncoder) -> None:
    callers = tasks(cached, 5)
    await asked(encoder, 1)
    encoder.answer(None)
    for vector in await asyncio.gather(*callers):
        np.testing.assert_array_equal(vector, EAST)
    await cached.text("red")
    assert encoder.asked == ["red"]


async def test_two_batches_share_what_they_have_in_common(encoder: HeldEncoder, cached: CachedEncoder) -> None:
    def jobs(*texts: str) -> asyncio.Task[object]:
        wanted = {cached.text_key(text): lambda text=text: cached.compute_text(text, bulk=True) for text in texts}
        return asyncio.create_task(cached.many(wanted), name="batch")

    first, second = jobs("a", "b", "c"), jobs("b", "c", "d")
    await asked(encoder, 4)
    encoder.answer(None, None, None, None)
    await asyncio.gather(first, second)
    assert sorted(map(str, encoder.asked)) == ["a", "b", "c", "d"]


async def test_texts_and_pictures_are_not_mixed_up(encoder: HeldEncoder, cached: CachedEncoder) -> None:
    both = [asyncio.create_task(cached.text("red")), asyncio.create_task(cached.picture(b"red"))]
    await asked(encoder, 2)
    encoder.answer(None, None)
    await asyncio.gather(*both)


@pytest.mark.parametrize("leaver", [0, 1, 2])
async def test_a_caller_that_leaves_takes_nothing_from_the_others(
    encoder: HeldEncoder, cached: CachedEncoder, leaver: int
) -> None:
    callers = tasks(cached, 3)
    await asked(encoder, 1)
    callers.pop(leaver).cancel()
    await asked(encoder, 1)
    encoder.answer(None)
    for vector in await asyncio.gather(*callers):
        np.testing.assert_array_equal(vector, EAST)
    assert not encoder.cancelled


async def test_with_the_last_caller_the_computation_ends(encoder: HeldEncoder, cached: CachedEncoder) -> None:
    callers = tasks(cached, 3)
    await asked(encoder, 1)
    for caller in callers:
        caller.cancel()
    await asyncio.gather(*callers, return_exceptions=True)
    assert encoder.cancelled == ["red"]
    (again,) = tasks(cached, 1)
    await asked(encoder, 2)
    encoder.answer(None)
    np.testing.assert_array_equal(await again, EAST)


async def test_one_who_comes_while_it_is_being_ended_begins_anew(encoder: HeldEncoder, cached: CachedEncoder) -> None:
    (leaver,) = tasks(cached, 1)
    await asked(encoder, 1)
    leaver.cancel()
    (comer,) = tasks(cached, 1)
    await asked(encoder, 2)
    encoder.answer(None)
    np.testing.assert_array_equal(await comer, EAST)
    assert leaver.cancelled()


async def test_all_are_told_that_the_encoder_is_away_and_the_next_one_tries_again(
    encoder: HeldEncoder, cached: CachedEncoder
) -> None:
    callers = tasks(cached, 3)
    await asked(encoder, 1)
    encoder.answer(Transient("away"))
    for result in await asyncio.gather(*callers, return_exceptions=True):
        assert isinstance(result, Transient)
    encoder.answer(None)
    np.testing.assert_array_equal(await cached.text("red"), EAST)
    assert len(encoder.asked) == 2


async def test_an_error_ends_the_batch_and_what_only_it_was_waiting_for(
    encoder: HeldEncoder, cached: CachedEncoder
) -> None:
    wanted = {cached.text_key(text): lambda text=text: cached.compute_text(text, bulk=True) for text in ("red", "blue")}
    batch = asyncio.create_task(cached.many(wanted), name="batch")
    (other,) = tasks(cached, 1)  # of "red"
    await asked(encoder, 2)
    batch.cancel()
    await asyncio.gather(batch, return_exceptions=True)
    assert encoder.cancelled == ["blue"]
    encoder.answer(None)
    np.testing.assert_array_equal(await other, EAST)


async def test_a_picture_that_is_none_is_none_for_all(encoder: HeldEncoder, cached: CachedEncoder) -> None:
    callers = [asyncio.create_task(cached.picture(b"x"), name="caller") for _ in range(3)]
    await asked(encoder, 1)
    encoder.answer(InvalidPicture("not_a_picture", "no"))
    for result in await asyncio.gather(*callers, return_exceptions=True):
        assert isinstance(result, InvalidPicture)


async def test_who_has_the_bytes_computes_them_where_another_lost_the_blob(
    encoder: HeldEncoder, cached: CachedEncoder
) -> None:
    looked = asyncio.Event()

    async def lost() -> Embedding:
        await looked.wait()
        raise NotFound("the blob is gone")

    key = cached.picture_key(sha256_hex(b"picture"))
    by_reference = asyncio.create_task(cached.many({key: lost}), name="by reference")
    await asyncio.sleep(0)
    by_bytes = asyncio.create_task(cached.picture(b"picture"), name="by bytes")
    await asked(encoder, 0)
    encoder.answer(None)
    looked.set()
    assert isinstance((await by_reference)[key], NotFound)
    np.testing.assert_array_equal(await by_bytes, EAST)
    assert encoder.asked == [b"picture"]


async def test_a_cached_vector_of_another_length_is_computed_again(encoder: HeldEncoder, metrics: Metrics) -> None:
    cache = MemoryCache(10)
    cached = CachedEncoder(encoder, cache, metrics)
    await cache.put({cached.text_key("red"): np.array([1, 0, 0], np.float32)})
    encoder.answer(None)
    np.testing.assert_array_equal(await cached.text("red"), EAST)
    assert encoder.asked == ["red"]
    await cached.text("red")
    assert encoder.asked == ["red"]


async def test_a_picture_seen_before_is_recalled_with_its_vector_only(
    encoder: HeldEncoder, cached: CachedEncoder
) -> None:
    seen = SeenPicture(url="https://cdn.example/a", sha256=sha256_hex(b"picture"), etag="1")
    assert await cached.recall("https://shop.example/a") is None
    await cached.remember("https://shop.example/a", seen)
    assert await cached.recall("https://shop.example/a") is None, "its vector is not at hand"
    encoder.answer(None)
    await cached.picture(b"picture")
    recalled = await cached.recall("https://shop.example/a")
    assert recalled is not None
    assert recalled[0] == seen
    np.testing.assert_array_equal(recalled[1], EAST)


class AwayCache(MemoryCache):
    """A cache that says whether it is asked."""

    available = 1

    def stats(self) -> dict[str, int]:
        return {**super().stats(), "available": self.available}


async def test_the_metric_says_whether_the_cache_is_asked(encoder: HeldEncoder, metrics: Metrics) -> None:
    cache = AwayCache(1)
    CachedEncoder(encoder, cache, metrics)
    assert metrics.registry.get_sample_value("catalens_cache_available") == 1
    cache.available = 0
    assert metrics.registry.get_sample_value("catalens_cache_available") == 0
