"""faster-clip: pictures only, because its text tower is another model. It downloads by name, so the weights are laid
where it keeps them.

Settings: batch, lanes (threads that call it).
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.peers.protocol import Vectors, serve
from faster_clip import ClipModel


class FasterClip:
    """Its model."""

    def __init__(self, setting: dict[str, Any]) -> None:
        os.environ["FASTER_CLIP_CACHE"] = setting["model"]
        self.batch = setting.get("batch", 16)
        self.model = ClipModel()
        self.threads = ThreadPoolExecutor(setting.get("lanes", 1))

    def images(self, pictures: list[bytes]) -> Vectors:
        parts = [pictures[n : n + self.batch] for n in range(0, len(pictures), self.batch)]
        for rows in self.threads.map(self.model.encode_image, parts):
            yield from rows

    def texts(self, texts: list[str]) -> Vectors:
        raise NotImplementedError("its text tower is a multilingual one, another model")

    def image(self, picture: bytes) -> Vectors:
        found: Vectors = self.model.encode_image([picture])
        return found

    def text(self, text: str) -> Vectors:
        return self.texts([text])


if __name__ == "__main__":
    serve(FasterClip)
