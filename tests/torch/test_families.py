"""Every kind of checkpoint, from its folder to a bundle to each runtime, against its maker's own library.

Needs the torch extra and no model hub: the checkpoints are small and random (families.py).
"""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from tests import pictures
from tests.torch.families import FAMILIES, Reference

from catalens.encoders import open_encoder
from catalens.encoders.bundle import MANIFEST
from catalens.encoders.checkpoints import load_checkpoint
from catalens.encoders.export import export_bundle
from catalens.settings import EncoderSettings, Settings
from catalens.telemetry import Metrics

if TYPE_CHECKING:
    from catalens.domain import Embedding

# torch's exporter, transformers and timm warn about themselves with every release.
pytestmark = pytest.mark.filterwarnings("ignore")

RUNTIMES = ("openvino", "onnx", "torch")
TEXTS = [
    "red dress",
    "  A blue SHOE, with\nstripes!  (for_running)  ",
    "une chaise en bois d'été",
    "a wooden chair " * 9,
    "x",
    "red <|endoftext|> dress",  # which CLIP takes for the end
]
LOOKS = {
    "jpeg": pictures.jpeg(pictures.scene(90, 61)),
    "png": pictures.encode(pictures.scene(97, 90), "PNG"),
    "wide": pictures.encode(pictures.scene(300, 61), "PNG"),
    "tall": pictures.encode(pictures.scene(60, 151), "PNG"),
    "small": pictures.encode(pictures.scene(30, 20), "PNG"),
    "grey": pictures.encode(pictures.scene(100, 80).convert("L"), "PNG"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def checkpoint(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(family) / "checkpoint"
    FAMILIES[family].write(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(family: str, checkpoint: Path) -> Path:
    folder = checkpoint.with_name("bundle")
    beside = FAMILIES[family].image_from
    export_bundle(load_checkpoint(checkpoint, checkpoint.with_name(beside) if beside else None), folder)
    # As its makers decode: what "fast", which every pulled bundle says, is away from that is in test_clip_processor.
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["image"].pop("decode") == "fast"
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def expected(family: str, checkpoint: Path) -> tuple[dict[str, Embedding], dict[str, Embedding]]:
    reference: Reference = FAMILIES[family].reference(checkpoint)
    with torch.no_grad():
        images = {
            look: unit(reference.image(Image.open(io.BytesIO(data)).convert("RGB"))) for look, data in LOOKS.items()
        }
        return images, {text: unit(reference.text(text)) for text in TEXTS}


def unit(row: torch.Tensor) -> Embedding:
    vector: Embedding = torch.nn.functional.normalize(row, dim=0).numpy()
    return vector


@pytest.mark.parametrize("runtime", RUNTIMES)
async def test_vectors_are_the_makers_alone_and_in_company(
    bundle: Path,
    runtime: str,
    expected: tuple[dict[str, Embedding], dict[str, Embedding]],
    tmp_path: Path,
) -> None:
    images, texts = expected
    settings = Settings(data_dir=tmp_path, model=str(bundle), encoder=EncoderSettings(lanes=1, runtime=runtime))
    async with open_encoder(settings, Metrics()) as encoder:
        for look, data in LOOKS.items():
            alone = (await encoder.embed_image(data)).embedding
            np.testing.assert_allclose(alone, images[look], atol=1e-4, err_msg=look)
        for text in TEXTS:
            np.testing.assert_allclose(await encoder.embed_text(text), texts[text], atol=1e-4, err_msg=text)
        together = await asyncio.gather(*(encoder.embed_image(data, bulk=True) for data in LOOKS.values()))
        np.testing.assert_allclose([one.embedding for one in together], list(images.values()), atol=1e-4)
        vectors = await asyncio.gather(*(encoder.embed_text(text, bulk=True) for text in TEXTS))
        np.testing.assert_allclose(vectors, list(texts.values()), atol=1e-4)


def test_the_random_model_tells_inputs_apart(expected: tuple[dict[str, Embedding], dict[str, Embedding]]) -> None:
    # Otherwise what is above would hold whatever we did.
    for vectors in (np.stack(list(known.values())) for known in expected):
        differences = np.abs(vectors[:, None] - vectors[None]).max(axis=2)
        assert differences[~np.eye(len(vectors), dtype=bool)].min() > 2e-3
