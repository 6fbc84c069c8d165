"""fastembed: its ViT-B/32 for pictures, and as a custom model the text tower, from the same export as Catalens' own.

Settings: model (folder with vision/ and text/), batch, threads, parallel (its data-parallel processes).
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from benchmarks.peers.protocol import Vectors, serve
from fastembed import ImageEmbedding, TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType
from PIL import Image

PICTURES = "Qdrant/clip-ViT-B-32-vision"


class FastEmbed:
    """Two ONNX Runtime sessions."""

    def __init__(self, setting: dict[str, Any]) -> None:
        self.setting = setting
        folder = Path(setting["model"])
        threads = setting.get("threads", 2)
        self.vision = ImageEmbedding(PICTURES, threads=threads, specific_model_path=str(folder / "vision"))
        TextEmbedding.add_custom_model(
            model="random/clip-text",
            pooling=PoolingType.DISABLED,
            normalization=True,
            sources=ModelSource(hf="random/clip-text"),
            dim=512,
            model_file="model.onnx",
        )
        self.words = TextEmbedding("random/clip-text", threads=threads, specific_model_path=str(folder / "text"))

    def images(self, pictures: list[bytes]) -> Vectors:
        batch, parallel = self.setting.get("batch", 16), self.setting.get("parallel")
        files: list[Any] = [io.BytesIO(picture) for picture in pictures]
        found: Vectors = self.vision.embed(files, batch_size=batch, parallel=parallel)
        return found

    def texts(self, texts: list[str]) -> Vectors:
        found: Vectors = self.words.embed(texts, batch_size=32)
        return found

    def image(self, picture: bytes) -> Vectors:
        found: Vectors = self.vision.embed([Image.open(io.BytesIO(picture))])
        return found

    def text(self, text: str) -> Vectors:
        found: Vectors = self.words.embed([text])
        return found


if __name__ == "__main__":
    serve(FastEmbed)
