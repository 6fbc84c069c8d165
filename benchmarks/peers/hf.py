"""transformers: CLIPModel with torch's fused attention.

Settings: dtype, batch, threads, workers (of torch's DataLoader, 0 = none), decode ("pil" or "torchvision"),
processor ("pil" or "torchvision"), lanes (so many threads that each decode and infer: nothing that transformers offers,
what a patient user would write), compile.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from benchmarks.peers.protocol import Vectors, serve
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_jpeg
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPImageProcessorPil, CLIPModel


class Pictures(torch.utils.data.Dataset[Any]):
    """What a DataLoader reads."""

    def __init__(self, pictures: list[bytes], setting: dict[str, Any], processor: Any) -> None:
        self.pictures, self.setting, self.processor = pictures, setting, processor

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, place: int) -> Any:
        return pixels(self.processor, [self.pictures[place]], self.setting)[0]


def pixels(processor: Any, pictures: list[bytes], setting: dict[str, Any]) -> Any:
    """Decode and preprocess."""
    if setting["decode"] == "torchvision":
        raw = [torch.frombuffer(bytearray(picture), dtype=torch.uint8) for picture in pictures]
        opened: list[Any] = [decode_jpeg(one, ImageReadMode.RGB) for one in raw]
    else:
        opened = [Image.open(io.BytesIO(picture)) for picture in pictures]
    return processor(opened, return_tensors="pt")["pixel_values"]


class Transformers:
    """One process, two threads unless said otherwise."""

    def __init__(self, setting: dict[str, Any]) -> None:
        self.setting = setting = {
            "dtype": "float32", "batch": 16, "threads": 2, "workers": 0, "decode": "torchvision",
            "processor": "torchvision", "lanes": 1, "compile": False, **setting,
        }  # fmt: skip
        torch.set_num_threads(setting["threads"])
        self.dtype = getattr(torch, setting["dtype"])
        folder = setting["model"]
        self.clip = CLIPModel.from_pretrained(folder, dtype=self.dtype, attn_implementation="sdpa").eval()
        made = CLIPImageProcessor if setting["processor"] == "torchvision" else CLIPImageProcessorPil
        self.processor = made.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.see = self.clip.get_image_features
        self.read = self.clip.get_text_features
        if setting["compile"]:
            self.clip.vision_model = torch.compile(self.clip.vision_model)
        self.threads = ThreadPoolExecutor(setting["lanes"])

    def images(self, pictures: list[bytes]) -> Vectors:
        batch = self.setting["batch"]
        if self.setting["workers"]:
            loader = DataLoader(
                Pictures(pictures, self.setting, self.processor),
                batch_size=batch,
                num_workers=self.setting["workers"],
                multiprocessing_context="fork",
                prefetch_factor=4,
            )
            for prepared in loader:
                yield from self._see(prepared)
            return
        parts = [pictures[n : n + batch] for n in range(0, len(pictures), batch)]
        for rows in self.threads.map(self._part, parts) if self.setting["lanes"] > 1 else map(self._part, parts):
            yield from rows

    def _part(self, pictures: list[bytes]) -> Any:
        torch.set_num_threads(self.setting["threads"])  # a thread's own setting
        return self._see(pixels(self.processor, pictures, self.setting))

    def _see(self, prepared: Any) -> Any:
        with torch.inference_mode():
            rows = self.see(pixel_values=prepared.to(self.dtype))
            return _unit(rows)

    def texts(self, texts: list[str]) -> Iterator[Any]:
        for n in range(0, len(texts), 32):
            yield from self._read(texts[n : n + 32])

    def _read(self, texts: list[str]) -> Any:
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            return _unit(self.read(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]))

    def image(self, picture: bytes) -> Vectors:
        rows: Vectors = self._part([picture])
        return rows

    def text(self, text: str) -> Vectors:
        rows: Vectors = self._read([text])
        return rows


def _unit(rows: Any) -> Any:
    found = getattr(rows, "pooler_output", rows)  # transformers 5 wraps it
    return torch.nn.functional.normalize(found.float(), dim=-1).numpy()


if __name__ == "__main__":
    serve(Transformers)
