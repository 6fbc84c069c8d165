"""An embedder whose model takes the process with it, once, in the middle of a batch."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from catalens import generations
from catalens.domain import ModelSpec
from catalens.encoders import open_encoder
from catalens.ports import EncodedImage, Encoder
from catalens.settings import Settings
from catalens.telemetry import Metrics
from catalens_embedder import main

if TYPE_CHECKING:
    from catalens.domain import Embedding


class DyingEncoder:
    """The real encoder until DYING_AFTER texts were asked for; then SIGKILL, unless DYING_MARK says it did so once."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._left = int(os.environ["DYING_AFTER"])
        self._mark = Path(os.environ["DYING_MARK"])

    @property
    def spec(self) -> ModelSpec:
        return self._encoder.spec

    async def embed_text(self, text: str, *, bulk: bool = False) -> Embedding:
        self._left -= 1
        if self._left == 0 and not self._mark.exists():
            self._mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return await self._encoder.embed_text(text, bulk=bulk)

    async def embed_image(self, picture: bytes, *, bulk: bool = False) -> EncodedImage:
        return await self._encoder.embed_image(picture, bulk=bulk)

    async def close(self) -> None:
        await self._encoder.close()


@asynccontextmanager
async def dying(settings: Settings, metrics: Metrics) -> AsyncIterator[Encoder]:
    """Open the real encoder and put the death into it."""
    async with open_encoder(settings, metrics) as encoder:
        yield DyingEncoder(encoder)


if __name__ == "__main__":
    generations.open_encoder = dying  # type: ignore[attr-defined]  # the one thing that is not as in production
    main.main()
