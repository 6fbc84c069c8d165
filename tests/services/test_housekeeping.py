"""Pictures are collected when nothing can need them any more, and not a moment before."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from catalens import events
from catalens.domain import ImageRef, IndexDocument, Message, ModelSpec, Product, TopicPartition
from catalens.engines import Engines, open_engines
from catalens.errors import NotFound
from catalens.settings import Settings
from catalens_embedder.housekeeping import collect_garbage


class LaterClock:
    """Shows a time two days from now, when what was stored today is old."""

    def now(self) -> float:
        return time.time() + 2 * 86_400

    async def sleep(self, seconds: float) -> None:
        raise AssertionError(f"nothing waits {seconds} s here")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(_env_file=None, data_dir=tmp_path)


@pytest.fixture
async def engines(settings: Settings) -> AsyncIterator[Engines]:
    spec = ModelSpec("test", "1", "clip", 4, "fingerprint-of-the-test")
    async with open_engines(settings, spec) as engines:
        yield engines


async def kept(engines: Engines, settings: Settings, reference: str) -> bool:
    """Collect, and return whether the picture is still there."""
    await collect_garbage(engines.log, engines.index, engines.blobs, settings, LaterClock())
    try:
        await engines.blobs.get(reference)
    except NotFound:
        return False
    return True


def message(reference: str, topic: str) -> Message:
    product = Product(product_id="p", name="p", version=1, images=(ImageRef(blob=reference),))
    encoded = events.encode(events.new_event(product, "default"))
    return Message(topic, encoded.key, encoded.value, encoded.headers)


async def test_a_picture_that_nothing_names_is_collected(engines: Engines, settings: Settings) -> None:
    assert not await kept(engines, settings, await engines.blobs.put(b"nobody's"))


async def test_a_picture_of_a_product_stays(engines: Engines, settings: Settings) -> None:
    reference = await engines.blobs.put(b"a product's")
    product = Product(product_id="p", name="p", version=1, images=(ImageRef(blob=reference),))
    await engines.index.upsert([IndexDocument("default", product, "ok", image=np.ones(4, np.float32))])
    assert await kept(engines, settings, reference)


async def test_a_picture_of_an_event_that_waits_stays_until_it_was_handled(
    engines: Engines, settings: Settings
) -> None:
    reference = await engines.blobs.put(b"an event's")
    ((place, offset),) = await engines.log.append([message(reference, events.PRODUCTS)])
    assert await kept(engines, settings, reference)
    await engines.log.set_committed(events.EMBEDDER_GROUP, {TopicPartition(place.topic, place.partition): offset + 1})
    assert not await kept(engines, settings, reference)


async def test_a_picture_of_a_dead_letter_stays_for_its_replay(engines: Engines, settings: Settings) -> None:
    reference = await engines.blobs.put(b"a letter's")
    await engines.log.append([message(reference, events.DEAD_LETTERS)])
    assert await kept(engines, settings, reference)
