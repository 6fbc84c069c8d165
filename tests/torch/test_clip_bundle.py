"""A CLIP made here (small, random weights), exported to a bundle: our encoder against torch and transformers.

Needs torch, transformers and onnx (`make test-torch`), and no model hub.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests import pictures
from tests.fixtures.preprocess.make_golden import MEAN, STD
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from catalens.encoders import open_encoder
from catalens.ports import Encoder
from catalens.settings import EncoderSettings, Settings
from catalens.telemetry import Metrics

if TYPE_CHECKING:
    from catalens.domain import Embedding

# torch's exporter and transformers warn about themselves on every release.
pytestmark = pytest.mark.filterwarnings("ignore")

SIZE, DIMENSION, MAX_TOKENS = 64, 48, 16
WORDS = ["red", "blue", "dress", "shoe", "with", "stripes", "a", "wooden", "chair"]
TEXTS = ["red dress", "A blue SHOE with stripes", "a wooden chair " * 9, "unknown words only", "a"]
LOOKS = ["jpeg", "png", "webp", "wide", "tall", "grey", "dot"]


def picture(look: str) -> bytes:
    match look:
        case "jpeg":
            return pictures.jpeg(pictures.scene(200, 150))
        case "png":
            return pictures.encode(pictures.scene(90, 90), "PNG")
        case "webp":
            return pictures.encode(pictures.scene(120, 77), "WEBP", quality=80)
        case "wide":
            return pictures.encode(pictures.scene(300, 60), "PNG")
        case "tall":
            return pictures.jpeg(pictures.scene(60, 300))
        case "grey":
            return pictures.encode(pictures.scene(100, 80).convert("L"), "PNG")
        case _:
            return pictures.encode(pictures.plain(pictures.BLUE, 1, 1), "PNG")


class Vision(torch.nn.Module):
    """pixels → embedding."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, pixels: Any) -> Any:
        seen = self.clip.vision_model(pixel_values=pixels)
        return self.clip.visual_projection(seen.pooler_output)


class Text(torch.nn.Module):
    """input_ids, attention_mask → embedding."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        read = self.clip.text_model(input_ids=input_ids, attention_mask=attention_mask)
        return self.clip.text_projection(read.pooler_output)


@pytest.fixture(scope="module")
def clip() -> Any:
    torch.manual_seed(7)
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = CLIPConfig(
        projection_dim=DIMENSION,
        vision_config={**tower, "image_size": SIZE, "patch_size": 16},
        text_config={
            **tower,
            "vocab_size": len(WORDS) + 4,
            "max_position_embeddings": MAX_TOKENS,
            "bos_token_id": 1,
            "eos_token_id": 3,
            "pad_token_id": 0,
        },
    )
    return CLIPModel(config).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[BOS]", "[UNK]", "[EOS]", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", 3)]
    )
    return made


@pytest.fixture(scope="module")
def bundle(clip: Any, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    many = torch.export.Dim("n", min=1, max=64)
    long = torch.export.Dim("t", min=1, max=MAX_TOKENS)
    torch.onnx.export(
        Vision(clip), (torch.zeros(2, 3, SIZE, SIZE),), folder / "vision.onnx", input_names=["pixels"],
        output_names=["embedding"], dynamic_shapes={"pixels": {0: many}}, external_data=False, verbose=False,
    )  # fmt: skip
    ids = torch.tensor([[1, 4, 3, 0, 0], [1, 5, 6, 7, 3]])
    torch.onnx.export(
        Text(clip), (ids, (ids > 0).long()), folder / "text.onnx", input_names=["input_ids", "attention_mask"],
        output_names=["embedding"], external_data=False, verbose=False,
        dynamic_shapes={"input_ids": {0: many, 1: long}, "attention_mask": {0: many, 1: long}},
    )  # fmt: skip
    tokenizer.save(str(folder / "tokenizer.json"))
    files = {
        path.name: {"sha256": sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
        for path in folder.iterdir()
    }
    manifest = {
        "format": 1,
        "id": "clip-random",
        "revision": "1",
        "family": "clip",
        "dimension": DIMENSION,
        "precision": "fp32",
        "image": {
            "size": SIZE,
            "resize_to": SIZE,
            "resize": "shortest_edge",
            "crop": "center",
            "interpolation": "bicubic",
            "rescale": 1 / 255,
            "mean": MEAN,
            "std": STD,
        },
        "text": {"max_tokens": MAX_TOKENS, "prefix": "", "pad_id": 0, "lowercase": True},
        "licence": "Apache-2.0",
        "source": "random",
        "languages": [],
        "files": files,
    }
    (folder / "bundle.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
async def encoder(bundle: Path, tmp_path: Path) -> AsyncIterator[Encoder]:
    settings = Settings(data_dir=tmp_path, model=str(bundle), encoder=EncoderSettings(lanes=1))
    async with open_encoder(settings, Metrics()) as opened:
        yield opened


def unit(rows: Any) -> Embedding:
    vector: Embedding = torch.nn.functional.normalize(rows[0], dim=0).numpy()
    return vector


def reference_image(clip: Any, data: bytes) -> Embedding:
    import io

    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    pixels = processor(Image.open(io.BytesIO(data)), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return unit(Vision(clip)(pixels))


def reference_text(clip: Any, tokenizer: Tokenizer, text: str) -> Embedding:
    tokenizer.enable_truncation(MAX_TOKENS)
    ids = torch.tensor([tokenizer.encode(text).ids])
    with torch.no_grad():
        return unit(Text(clip)(ids, torch.ones_like(ids)))


@pytest.mark.parametrize("look", LOOKS)
async def test_a_pictures_vector_is_that_of_transformers(encoder: Encoder, clip: Any, look: str) -> None:
    data = picture(look)
    assert float((await encoder.embed_image(data)).embedding @ reference_image(clip, data)) > 0.9999


@pytest.mark.parametrize("text", TEXTS)
async def test_a_texts_vector_is_that_of_transformers(
    encoder: Encoder, clip: Any, tokenizer: Tokenizer, text: str
) -> None:
    assert float(await encoder.embed_text(text) @ reference_text(clip, tokenizer, text)) > 0.9999


async def test_in_a_batch_too(encoder: Encoder, clip: Any, tokenizer: Tokenizer) -> None:
    images = await asyncio.gather(*(encoder.embed_image(picture(look), bulk=True) for look in LOOKS * 3))
    for image, look in zip(images, LOOKS * 3, strict=True):
        assert float(image.embedding @ reference_image(clip, picture(look))) > 0.9999
    vectors = await asyncio.gather(*(encoder.embed_text(text, bulk=True) for text in TEXTS * 3))
    for vector, text in zip(vectors, TEXTS * 3, strict=True):
        assert float(vector @ reference_text(clip, tokenizer, text)) > 0.9999


def test_the_random_model_tells_pictures_and_texts_apart(clip: Any, tokenizer: Tokenizer) -> None:
    # Otherwise the cosines above would be near one whatever we did.
    images = np.stack([reference_image(clip, picture(look)) for look in LOOKS])
    texts = np.stack([reference_text(clip, tokenizer, text) for text in TEXTS])
    for vectors in (images, texts):
        others = (vectors @ vectors.T)[~np.eye(len(vectors), dtype=bool)]
        assert others.max() < 0.9995
