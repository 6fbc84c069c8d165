"""Embeddings through the cache: each content is computed once, and one look-up serves a whole batch."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

from catalens.domain import ModelSpec, SeenPicture, sha256_hex
from catalens.errors import InvalidPicture, NotFound, NotLoaded
from catalens.ports import EmbeddingCache, Encoder
from catalens.telemetry import Metrics

if TYPE_CHECKING:
    from catalens.domain import Embedding

Tower = Literal["image", "text"]
Compute = Callable[[], Awaitable["Embedding"]]

_DOT: Final = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mNgAAAAAgAB5Sfe/AAAAABJRU5ErkJggg=="
)
"""The smallest picture: one black pixel, as PNG."""


def cache_key(spec: ModelSpec, tower: Tower, content_sha256: str) -> str:
    """Return the cache key of a content: no two models, towers or contents share one."""
    return f"{spec.fingerprint}:{tower}:{content_sha256}"


async def probe(encoder: Encoder) -> tuple[Tower, Embedding]:
    """Return a vector that a tower of `encoder` computed just now, and which tower; raises as Encoder.embed_text."""
    try:
        return "text", await encoder.embed_text("ready")
    except NotLoaded:
        return "image", (await encoder.embed_image(_DOT)).embedding


class RefusedPicture(InvalidPicture):
    """One of several is no picture; `number` counts from 0."""

    def __init__(self, number: int, error: InvalidPicture) -> None:
        super().__init__(error.reason, str(error))
        self.number = number


class CachedEncoder:
    """An Encoder behind an EmbeddingCache.

    What several callers of this object need at the same time is computed once. Two processes that meet at the same
    new content both compute it, with the same result: the cache is not asked to arbitrate (docs/adr/0013).
    """

    def __init__(self, encoder: Encoder, cache: EmbeddingCache, metrics: Metrics) -> None:
        self._encoder = encoder
        self._cache = cache
        self._metrics = metrics
        self._under_way: dict[str, _Shared] = {}
        metrics.cache_available.set_function(lambda: cache.stats().get("available", 1))

    @property
    def spec(self) -> ModelSpec:
        """What model this is."""
        return self._encoder.spec

    async def text(self, text: str, *, bulk: bool = False) -> Embedding:
        """Return the text's vector; errors as Encoder.embed_text."""
        (vector,), _ = await self.vectors(texts=[text], bulk=bulk)
        return vector

    async def picture(self, data: bytes, *, bulk: bool = False) -> Embedding:
        """Return the picture's vector; errors as Encoder.embed_image."""
        _, (vector,) = await self.vectors(pictures=[data], bulk=bulk)
        return vector

    async def vectors(
        self, *, texts: Sequence[str] = (), pictures: Sequence[bytes] = (), bulk: bool = False
    ) -> tuple[Sequence[Embedding], Sequence[Embedding]]:
        """Return the vectors of texts and of pictures, computed side by side; raises as Encoder, and RefusedPicture."""
        of_texts = [self.text_key(text) for text in texts]
        of_pictures = [self.picture_key(await asyncio.to_thread(sha256_hex, data)) for data in pictures]
        jobs: dict[str, Compute] = {}
        for key, text in zip(of_texts, texts, strict=True):
            jobs[key] = partial(self._encoder.embed_text, text, bulk=bulk)
        for key, data in zip(of_pictures, pictures, strict=True):
            jobs[key] = partial(self.compute_picture, data, bulk=bulk)
        found = await self.many(jobs) if jobs else {}
        pictured = []
        for number, key in enumerate(of_pictures):
            try:
                pictured.append(_raised(found[key]))
            except InvalidPicture as error:
                raise RefusedPicture(number, error) from error
        return [_raised(found[key]) for key in of_texts], pictured

    async def recall(self, url: str) -> tuple[SeenPicture, Embedding] | None:
        """Return what the picture at `url` was when it was last fetched, if its vector is still at hand.

        Without the vector it would be no help to hear that the picture has not changed.
        """
        seen = await self._cache.recall(url)
        if seen is None:
            return None
        (vector,) = await self._look_up([self.picture_key(seen.sha256)])
        if vector is None:
            return None
        self._metrics.cache.labels("hit").inc()
        return seen, vector

    async def remember(self, url: str, seen: SeenPicture) -> None:
        """Remember what the picture at `url` was."""
        await self._cache.remember(url, seen)

    def text_key(self, text: str) -> str:
        """Return the cache key of a text."""
        return cache_key(self.spec, "text", sha256_hex(text.encode()))

    def picture_key(self, content_sha256: str) -> str:
        """Return the cache key of a picture by the SHA-256 of its bytes."""
        return cache_key(self.spec, "image", content_sha256)

    async def probe(self) -> tuple[Tower, Embedding]:
        """Return a vector that was computed just now, past the cache; see `probe`."""
        return await probe(self._encoder)

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
        found = zip(keys, await self._look_up(keys), strict=True)
        results: dict[str, Embedding | InvalidPicture | NotFound] = {
            k: known for k, known in found if known is not None
        }
        missing = {key: jobs[key] for key in keys if key not in results}
        self._metrics.cache.labels("hit").inc(len(results))
        self._metrics.cache.labels("miss").inc(len(missing))
        if missing:
            results.update(await self._compute(missing))
        return results

    async def _look_up(self, keys: Sequence[str]) -> Sequence[Embedding | None]:
        """Return what the cache knows; what is no vector of this model is unknown."""
        shape = (self.spec.dimension,)
        return [None if v is None or v.shape != shape else v for v in await self._cache.get(keys)]

    async def _compute(self, jobs: Mapping[str, Compute]) -> Mapping[str, Embedding | InvalidPicture | NotFound]:
        """Compute side by side what nobody is computing yet, wait for the rest, and put all of it into the cache."""
        joined = {key: self._join(key, compute) for key, compute in jobs.items()}
        try:
            # Not a TaskGroup: its ExceptionGroup would hide Transient and Overloaded from the caller.
            tasks = [shared.task for shared in joined.values()]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()  # raises what went wrong
            results = {key: shared.task.result() for key, shared in joined.items()}
            for key, result in results.items():
                # Somebody else's way to this content leads nowhere, such as a blob that is gone: try our own.
                if isinstance(result, NotFound) and joined[key].compute is not jobs[key]:
                    results[key] = await _settled(jobs[key])
            await self._cache.put({key: value for key, value in results.items() if not isinstance(value, Exception)})
            return results
        finally:
            await self._leave(joined)

    def _join(self, key: str, compute: Compute) -> _Shared:
        shared = self._under_way.get(key)
        if shared is None:
            shared = self._under_way[key] = _Shared(compute)
        shared.callers += 1
        return shared

    async def _leave(self, joined: Mapping[str, _Shared]) -> None:
        """Give up on the computations; those that nobody else waits for are ended."""
        ended: list[asyncio.Task[Any]] = []
        for key, shared in joined.items():
            shared.callers -= 1
            if shared.callers:
                continue
            if self._under_way.get(key) is shared:
                del self._under_way[key]
            if not shared.task.done():
                shared.task.cancel()
                ended.append(shared.task)
        if ended:
            await asyncio.wait(ended)


class _Shared:
    """A computation and how many callers wait for it: it ends with the last of them, not with the first."""

    def __init__(self, compute: Compute) -> None:
        self.compute = compute
        self.callers = 0
        self.task = asyncio.create_task(_settled(compute), name="embedding.compute")
        # Its error may come when the last caller has just left: nobody asks for it then.
        self.task.add_done_callback(lambda task: task.cancelled() or task.exception())


async def _settled(compute: Compute) -> Embedding | InvalidPicture | NotFound:
    try:
        return await compute()
    except (InvalidPicture, NotFound) as error:
        return error


def _raised(result: Embedding | InvalidPicture | NotFound) -> Embedding:
    if isinstance(result, InvalidPicture | NotFound):
        raise result
    return result
