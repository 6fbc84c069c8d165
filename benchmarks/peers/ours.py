"""Catalens: its own `open_encoder`, as its services use it.

Settings: model (a bundle), data (its data folder), and any field of EncoderSettings.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.peers.protocol import Vectors, serve

from catalens.encoders import open_encoder
from catalens.settings import EncoderSettings, Settings
from catalens.telemetry import Metrics


class Catalens:
    """An encoder on a loop of its own."""

    def __init__(self, setting: dict[str, Any]) -> None:
        model, data = setting.pop("model"), Path(setting.pop("data"))
        self.loop = asyncio.new_event_loop()
        settings = Settings(_env_file=None, model=model, data_dir=data, encoder=EncoderSettings(**setting))
        self.opened = open_encoder(settings, Metrics())
        self.encoder = self.loop.run_until_complete(self.opened.__aenter__())

    def images(self, pictures: list[bytes]) -> Iterator[Any]:
        """Submit all of them as bulk work; the encoder's own back-pressure decides how many wait."""
        for encoded in self.loop.run_until_complete(self._images(pictures)):
            yield encoded.embedding

    async def _images(self, pictures: list[bytes]) -> list[Any]:
        return await asyncio.gather(*(self.encoder.embed_image(picture, bulk=True) for picture in pictures))

    def texts(self, texts: list[str]) -> Vectors:
        return self.loop.run_until_complete(self._texts(texts))

    async def _texts(self, texts: list[str]) -> list[Any]:
        return await asyncio.gather(*(self.encoder.embed_text(text, bulk=True) for text in texts))

    def image(self, picture: bytes) -> Vectors:
        return [self.loop.run_until_complete(self.encoder.embed_image(picture)).embedding]

    def text(self, text: str) -> Vectors:
        return [self.loop.run_until_complete(self.encoder.embed_text(text))]


if __name__ == "__main__":
    serve(Catalens)
