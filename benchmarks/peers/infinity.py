"""infinity-emb: its engine in the process, without the HTTP server, which would only cost more.

Settings: batch, threads, dtype, compile.
"""

from __future__ import annotations

import asyncio
from typing import Any

import torch
from benchmarks.peers.protocol import Vectors, serve
from infinity_emb import AsyncEmbeddingEngine, EngineArgs


class Infinity:
    """An engine on a loop of its own."""

    def __init__(self, setting: dict[str, Any]) -> None:
        torch.set_num_threads(setting.get("threads", 2))
        arguments = EngineArgs(
            model_name_or_path=setting["model"],
            engine="torch",  # the only one that it runs CLIP with
            device="cpu",
            dtype=setting.get("dtype", "auto"),
            batch_size=setting.get("batch", 16),
            compile=setting.get("compile", False),
            bettertransformer=setting.get("bettertransformer", True),
            model_warmup=False,  # it warms up with texts for a model of sentences
        )
        self.loop = asyncio.new_event_loop()
        self.engine = AsyncEmbeddingEngine.from_args(arguments)
        self.loop.run_until_complete(self.engine.astart())

    def images(self, pictures: list[bytes]) -> Vectors:
        found: Vectors = self.loop.run_until_complete(self.engine.image_embed(images=pictures))[0]
        return found

    def texts(self, texts: list[str]) -> Vectors:
        found: Vectors = self.loop.run_until_complete(self.engine.embed(sentences=texts))[0]
        return found

    def image(self, picture: bytes) -> Vectors:
        return self.images([picture])

    def text(self, text: str) -> Vectors:
        return self.texts([text])


if __name__ == "__main__":
    serve(Infinity)
