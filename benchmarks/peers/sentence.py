"""sentence-transformers, which loads a CLIP checkpoint by itself.

Settings: dtype, batch, threads, decode ("pil" or "torchvision", which hands it tensors), processes (of its
multi-process pool).
"""

from __future__ import annotations

import io
import os
from typing import Any

import torch
from benchmarks.peers.protocol import Vectors, serve
from PIL import Image
from sentence_transformers import SentenceTransformer
from torchvision.io import ImageReadMode, decode_jpeg


class SentenceTransformers:
    """One process or its own pool of them."""

    def __init__(self, setting: dict[str, Any]) -> None:
        self.setting = setting = {
            "dtype": "float32",
            "batch": 16,
            "threads": 2,
            "decode": "pil",
            "processes": 1,
            **setting,
        }
        torch.set_num_threads(setting["threads"])
        arguments = {"dtype": getattr(torch, setting["dtype"]), "attn_implementation": "sdpa"}
        self.model = SentenceTransformer(setting["model"], device="cpu", model_kwargs=arguments)
        self.pool: Any = None
        if setting["processes"] > 1:
            os.environ["OMP_NUM_THREADS"] = str(setting["threads"])  # what its processes start with
            self.pool = self.model.start_multi_process_pool(["cpu"] * setting["processes"])

    def _opened(self, picture: bytes) -> Any:
        if self.setting["decode"] == "torchvision":
            return decode_jpeg(torch.frombuffer(bytearray(picture), dtype=torch.uint8), ImageReadMode.RGB)
        return Image.open(io.BytesIO(picture))

    def images(self, pictures: list[bytes]) -> Vectors:
        batch = self.setting["batch"]
        if self.pool is not None:
            yield from self._encode([self._opened(picture) for picture in pictures], pool=self.pool, chunk_size=batch)
            return
        for n in range(0, len(pictures), batch):
            yield from self._encode([self._opened(picture) for picture in pictures[n : n + batch]])

    def texts(self, texts: list[str]) -> Vectors:
        return self._encode(texts, batch=32)

    def _encode(self, items: list[Any], batch: int | None = None, **more: Any) -> Any:
        size = batch or self.setting["batch"]
        return self.model.encode(items, batch_size=size, show_progress_bar=False, normalize_embeddings=True, **more)

    def image(self, picture: bytes) -> Vectors:
        rows: Vectors = self._encode([self._opened(picture)])
        return rows

    def text(self, text: str) -> Vectors:
        rows: Vectors = self._encode([text])
        return rows


if __name__ == "__main__":
    serve(SentenceTransformers)
