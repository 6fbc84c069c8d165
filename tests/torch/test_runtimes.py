"""Every runtime on one bundle made by `catalens model pull`: the same vectors, in any batch, on any lane.

The model is a small CLIP with random weights; needs the torch extra and no model hub.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests import pictures
from tests.fixtures.preprocess.make_golden import MEAN, STD
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel

from catalens.encoders import load_runtime, open_encoder
from catalens.encoders.bundle import load_bundle
from catalens.encoders.checkpoints import load_checkpoint
from catalens.encoders.choice import RuntimeName
from catalens.encoders.export import export_bundle
from catalens.encoders.preprocess import Preprocessor
from catalens.errors import Misconfigured
from catalens.pictures import Picture
from catalens.settings import EncoderSettings, PictureSettings, Settings
from catalens.telemetry import Metrics

# torch's exporter and transformers warn about themselves on every release.
pytestmark = pytest.mark.filterwarnings("ignore")

Vectors = NDArray[np.float32]
RUNTIMES: tuple[RuntimeName, ...] = ("openvino", "onnx", "torch")
SIZE, MAX_TOKENS = 48, 20
WORDS = ["red", "blue", "noir", "dress", "shoe", "and", "a", "green", "wooden", "chair"]
TEXTS = [" ".join(WORDS[(n * k + k) % 10] for k in range(1, 2 + n % 12)) + f" {WORDS[n % 7]}" for n in range(200)]
PICTURES = [pictures.encode(pictures.scene(20 + n, 220 - n).rotate(n * 3), "PNG") for n in range(200)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random CLIP as transformers saves it."""
    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    torch.manual_seed(3)
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = {"vocab_size": 14, "max_position_embeddings": MAX_TOKENS, "bos_token_id": 1, "eos_token_id": 13}
    config = CLIPConfig(
        projection_dim=32,
        vision_config={**tower, "image_size": SIZE, "patch_size": 16},
        text_config={**tower, **text, "pad_token_id": 0},
    )
    clip: Any = CLIPModel(config)
    clip.eval().save_pretrained(folder)
    known = {word: n for n, word in enumerate(["[PAD]", "[BOS]", "[UNK]", *WORDS, "[EOS]"])}
    made = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", 13)]
    )
    made.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": MAX_TOKENS}
    special = {"bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described | special))
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": SIZE, "width": SIZE},
        "size": {"shortest_edge": SIZE},
        "image_mean": MEAN,
        "image_std": STD,
        "resample": 3,
        "rescale_factor": 1 / 255,
        **dict.fromkeys(("do_center_crop", "do_convert_rgb", "do_normalize", "do_rescale", "do_resize"), True),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "tiny-clip"
    export_bundle(load_checkpoint(checkpoint), folder)
    return folder


async def encode(bundle: Path, tmp_path: Path, *, most: int = 40, **encoder: Any) -> tuple[str, Vectors, Vectors]:
    """Return the fingerprint, and the vectors of the first `most` pictures and texts."""
    settings = Settings(
        data_dir=tmp_path, model=str(bundle), encoder=EncoderSettings(**{"lanes": 1, "device": "cpu", **encoder})
    )
    async with open_encoder(settings, Metrics()) as opened:
        images = await asyncio.gather(*(opened.embed_image(picture, bulk=True) for picture in PICTURES[:most]))
        texts = await asyncio.gather(*(opened.embed_text(text, bulk=True) for text in TEXTS[:most]))
        return opened.spec.fingerprint, np.stack([image.embedding for image in images]), np.stack(texts)


def reference(checkpoint: Path) -> tuple[Vectors, Vectors]:
    """Return the vectors of all pictures and texts as transformers gives them, one by one."""
    clip: Any = CLIPModel.from_pretrained(checkpoint, attn_implementation="eager")
    clip.eval()
    loaded = load_checkpoint(checkpoint)
    pixels = [Preprocessor(loaded.image)(Picture(data, PictureSettings()).decode(SIZE)) for data in PICTURES]
    loaded.tokenizer.enable_truncation(MAX_TOKENS)
    with torch.no_grad():
        seen = [clip.vision_model(pixel_values=torch.from_numpy(one[None])).pooler_output for one in pixels]
        read = [
            clip.text_model(input_ids=torch.tensor([loaded.tokenizer.encode(text).ids])).pooler_output for text in TEXTS
        ]
        images, texts = clip.visual_projection(torch.cat(seen)), clip.text_projection(torch.cat(read))
    unit = torch.nn.functional.normalize
    return np.asarray(unit(images, dim=1)), np.asarray(unit(texts, dim=1))


@pytest.mark.parametrize("runtime", RUNTIMES)
async def test_f32_is_torch_within_a_ten_thousandth(
    bundle: Path, checkpoint: Path, tmp_path: Path, runtime: RuntimeName
) -> None:
    _, images, texts = await encode(bundle, tmp_path, most=200, runtime=runtime)
    expected_images, expected_texts = reference(checkpoint)
    np.testing.assert_allclose(images, expected_images, atol=1e-4)
    np.testing.assert_allclose(texts, expected_texts, atol=1e-4)
    for vectors in (expected_images, expected_texts):  # else they would be equal whatever was computed
        assert (vectors @ vectors.T).min() < 0.99


@pytest.mark.parametrize("precision", ["f32", "bf16"])
async def test_one_precision_is_one_fingerprint_and_one_space(bundle: Path, tmp_path: Path, precision: str) -> None:
    runtimes = [name for name in RUNTIMES if precision == "f32" or name != "onnx"]
    found = [await encode(bundle, tmp_path, runtime=name, precision=precision) for name in runtimes]
    assert len({fingerprint for fingerprint, _, _ in found}) == 1
    for _, images, texts in found[1:]:
        for ours, theirs in ((images, found[0][1]), (texts, found[0][2])):
            assert float(np.sum(ours * theirs, axis=1).min()) > (0.99999 if precision == "f32" else 0.999)


@pytest.mark.parametrize(
    ("runtime", "precision"),
    [*((runtime, "f32") for runtime in RUNTIMES), ("openvino", "bf16"), ("torch", "bf16")],
)
async def test_neither_neighbours_nor_lanes_matter(
    bundle: Path, tmp_path: Path, runtime: RuntimeName, precision: str
) -> None:
    _, *alone = await encode(bundle, tmp_path, runtime=runtime, precision=precision, max_batch=1)
    _, *together = await encode(bundle, tmp_path, runtime=runtime, precision=precision, max_batch=32, lanes=3)
    for ours, theirs in zip(together, alone, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


async def test_torch_refuses_a_bundle_that_it_cannot_rebuild(tmp_path: Path) -> None:
    tiny = Path(__file__).parent.parent / "fixtures" / "bundles" / "tiny"
    with pytest.raises(Misconfigured, match="catalens model pull"):
        await encode(tiny, tmp_path, runtime="torch")


async def test_what_a_graph_may_not_see_is_not_seen(bundle: Path) -> None:
    """Padding beside a text changes nothing, in the batches that the torch runtime makes for a GPU too."""
    runtime = load_runtime(load_bundle(bundle), EncoderSettings(runtime="torch", device="cpu"), 1, bundle)
    ids = np.array([[1, 3, 4, 13], [1, 5, 13, 0]], np.int64)
    padded = np.pad(ids, ((0, 0), (0, MAX_TOKENS - 4)))
    np.testing.assert_allclose(
        runtime.run_text(padded, (padded > 0).astype(np.int64)),
        runtime.run_text(ids, (ids > 0).astype(np.int64)),
        atol=1e-5,
    )


def test_the_torch_runtime_is_all_that_imports_torch(bundle: Path, tmp_path: Path) -> None:
    """`auto` does not import it to see whether it might be better."""
    code = f"""
import asyncio, sys
from catalens.encoders import open_encoder
from catalens.settings import Settings
from catalens.telemetry import Metrics

async def main():
    async with open_encoder(Settings(data_dir={str(tmp_path)!r}, model={str(bundle)!r}), Metrics()) as opened:
        await opened.embed_text("red")

asyncio.run(main())
print(*sorted({{"onnx", "onnxruntime", "openvino", "torch", "transformers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1:] == ["torch" if torch.cuda.is_available() else "openvino"]
