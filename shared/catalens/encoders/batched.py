"""The Encoder port on top of any runtime: a micro-batcher a tower, and its metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from catalens.batching import BatchPolicy, MicroBatcher
from catalens.domain import ModelSpec
from catalens.encoders.towers import TextTower, Tower, VisionTower
from catalens.errors import NotLoaded
from catalens.ports import EncodedImage
from catalens.settings import EncoderSettings
from catalens.telemetry import Metrics

if TYPE_CHECKING:
    from catalens.domain import Embedding

Item = TypeVar("Item", bytes, str)
Result = TypeVar("Result")


class BatchedEncoder:
    """Encoder: pictures and texts have lanes of their own, so that neither waits for the other.

    A tower that is None has none, and asking for it raises NotLoaded.
    """

    def __init__(
        self,
        spec: ModelSpec,
        vision: VisionTower | None,
        text: TextTower | None,
        settings: EncoderSettings,
        lanes: int,
        metrics: Metrics,
    ) -> None:
        self._spec = spec

        def batcher(name: str, tower: Tower[Item, Any, Result] | None) -> MicroBatcher[Item, Result] | None:
            if tower is None:
                return None
            policy = BatchPolicy(settings.max_batch, settings.linger)
            made = MicroBatcher(
                name, _stages(name, tower, metrics), lanes=lanes, policy=policy, capacity=settings.queue
            )
            metrics.encoder_lanes.labels(name).set(lanes)
            metrics.encoder_waiting.labels(name).set_function(made.waiting)
            return made

        self._pictures: MicroBatcher[bytes, EncodedImage] | None = batcher("image", vision)
        self._texts: MicroBatcher[str, Embedding] | None = batcher("text", text)
        self._named = (spec.id, spec.fingerprint)
        self._model = metrics.model
        self._model.labels(*self._named).set(1)

    @property
    def spec(self) -> ModelSpec:
        """What model this is."""
        return self._spec

    async def embed_text(self, text: str, *, bulk: bool = False) -> Embedding:
        """Return the text's vector; the port says what it raises."""
        if self._texts is None:
            raise NotLoaded("this process reads no texts: CATALENS_ENCODER__TOWERS=image loads the picture tower alone")
        return await self._texts.submit(text, bulk=bulk)

    async def embed_image(self, picture: bytes, *, bulk: bool = False) -> EncodedImage:
        """Return the picture's vector; the port says what it raises."""
        if self._pictures is None:
            raise NotLoaded("this process takes no pictures: CATALENS_ENCODER__TOWERS=text loads the text tower alone")
        return await self._pictures.submit(picture, bulk=bulk)

    async def close(self) -> None:
        """Finish what is in flight, refuse the rest."""
        for lanes in (self._pictures, self._texts):
            if lanes is not None:
                await lanes.close()
        self._model.remove(*self._named)


def _stages(
    name: str, tower: Tower[Item, Any, Result], metrics: Metrics
) -> Callable[[Sequence[Item]], Sequence[Result | Exception]]:
    """Return the work of one batch: equal items are encoded once, an item that is bad costs only itself."""
    items_done = metrics.encoder_items.labels(name)
    batch_size = metrics.encoder_batch.labels(name)
    busy_seconds = metrics.encoder_busy.labels(name)
    prepare_seconds, run_seconds, finish_seconds = (
        metrics.encoder_seconds.labels(name, stage) for stage in ("prepare", "run", "finish")
    )

    def encode(items: Sequence[Item]) -> list[Result | Exception]:
        started = time.perf_counter()
        prepared = tower.prepare(items)
        prepare_seconds.observe(time.perf_counter() - started)
        good = [item for item in prepared if not isinstance(item, Exception)]
        if not good:
            return [item for item in prepared if isinstance(item, Exception)]
        started = time.perf_counter()
        rows = tower.run(good)
        run_seconds.observe(time.perf_counter() - started)
        started = time.perf_counter()
        results = iter(tower.finish(good, rows))
        finish_seconds.observe(time.perf_counter() - started)
        batch_size.observe(len(good))
        return [item if isinstance(item, Exception) else next(results) for item in prepared]

    def work(items: Sequence[Item]) -> list[Result | Exception]:
        started = time.perf_counter()
        try:
            once = list(dict.fromkeys(items))
            known = dict(zip(once, encode(once), strict=True))
        finally:
            busy_seconds.inc(time.perf_counter() - started)
        items_done.inc(len(items))
        return [known[item] for item in items]

    return work
