"""Embeddings through the cache: each content is computed once, and one look-up serves a whole batch."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Literal

from catalens.domain import ModelSpec, sha256_hex
from catalens.errors import InvalidPicture, NotFound
from catalens.ports import EmbeddingCache, Encoder
from catalens.telemetry import Metrics

if TYPE_CHECKING:
    from catalens.domain import Embedding

Tower = Literal["image", "text"]
Compute = Callable[[], Awaitable["Embedding"]]


def cache_key(spec: ModelSpec, tower: Tower, content_sha256: str) -> str:
    """Return the cache key of a content: no two models, towers or contents share one."""
    return f"{spec.fingerprint}:{tower}:{content_sha256}"


class CachedEncoder:
    """An Encoder behind an EmbeddingCache."""

    def __init__(self, encoder: Encoder, cache: EmbeddingCache, metrics: Metrics) -> None:
        self._encoder = encoder
        self._cache = cache
        self._metrics = metrics

    @property
    def spec(self) -> ModelSpec:
        """What model this is."""
        return self._encoder.spec

    async def text(self, text: str, *, bulk: bool = False) -> Embedding:
        """Return the text's vector; errors as Encoder.embed_text."""
        key = self.text_key(text)
        found = await self.many({key: lambda: self._encoder.embed_text(text, bulk=bulk)})
        return _raised(found[key])

    async def picture(self, data: bytes, *, bulk: bool = False) -> Embedding:
        """Return the picture's vector; errors as Encoder.embed_image."""
        key = self.picture_key(sha256_hex(data))
        found = await self.many({key: lambda: self.compute_picture(data, bulk=bulk)})
        return _raised(found[key])

    def text_key(self, text: str) -> str:
        """Return the cache key of a text."""
        return cache_key(self.spec, "text", sha256_hex(text.encode()))

    def picture_key(self, content_sha256: str) -> str:
        """Return the cache key of a picture by the SHA-256 of its bytes."""
        return cache_key(self.spec, "image", content_sha256)

    async def compute_text(self, text: str, *, bulk: bool) -> Embedding:
        """Return the text's vector without looking into the cache."""
        return await self._encoder.embed_text(text, bulk=bulk)

    async def compute_picture(self, data: bytes, *, bulk: bool) -> Embedding:
        """Return the picture's vector without looking into the cache."""
        return (await self._encoder.embed_image(data, bulk=bulk)).embedding

    async def many(self, jobs: Mapping[str, Compute]) -> Mapping[str, Embedding | InvalidPicture | NotFound]:
        """Return the vector of each key, from the cache or computed side by side.

        A content that can never be embedded is its own result; any other error is raised and ends the call.
        """
        keys = list(jobs)
        cached = zip(keys, await self._cache.get(keys), strict=True)
        results: dict[str, Embedding | InvalidPicture | NotFound] = {
            k: known for k, known in cached if known is not None
        }
        missing = [key for key in keys if key not in results]
        self._metrics.cache.labels("hit").inc(len(results))
        self._metrics.cache.labels("miss").inc(len(missing))
        if len(missing) == 1:  # the common case of a query: no task, and the caller's own exception
            results[missing[0]] = await _settled(jobs[missing[0]])
        elif missing:
            # Not a TaskGroup: its ExceptionGroup would hide Transient and Overloaded from the caller.
            tasks = {key: asyncio.create_task(_settled(jobs[key]), name="embedding.compute") for key in missing}
            try:
                await asyncio.gather(*tasks.values())
            finally:
                for task in tasks.values():
                    task.cancel()
                await asyncio.wait(tasks.values())
            results.update({key: task.result() for key, task in tasks.items()})
        computed = {key: results[key] for key in missing}
        await self._cache.put({key: value for key, value in computed.items() if not isinstance(value, Exception)})
        return results


async def _settled(compute: Compute) -> Embedding | InvalidPicture | NotFound:
    try:
        return await compute()
    except (InvalidPicture, NotFound) as error:
        return error


def _raised(result: Embedding | InvalidPicture | NotFound) -> Embedding:
    if isinstance(result, InvalidPicture | NotFound):
        raise result
    return result
