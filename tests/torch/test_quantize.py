"""Small random checkpoints, pulled and quantised: they run in OpenVINO and ONNX Runtime, and their loss is the truth.

Needs the torch and quantize extras.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession
from PIL import Image
from tests import pictures
from tests.torch.families import CORPUS, FAMILIES

from catalens.encoders import open_encoder
from catalens.encoders.bundle import MANIFEST, Loss, load_bundle, read_manifest
from catalens.encoders.checkpoints import load_checkpoint
from catalens.encoders.export import export_bundle
from catalens.encoders.fidelity import closeness, overlap
from catalens.encoders.openvino import OpenVinoRuntime
from catalens.encoders.qdq import Int8Graph
from catalens.encoders.quantize import ENOUGH, Samples, _halves, quantize
from catalens.errors import Misconfigured
from catalens.settings import EncoderSettings, PictureSettings, Settings
from catalens.telemetry import Metrics

# torch's exporter, transformers and timm warn about themselves with every release.
pytestmark = pytest.mark.filterwarnings("ignore")

Vectors = NDArray[np.float32]
PHOTOS = 60
TEXTS = [f"{colour} {text}" for colour in ("red", "blue", "green", "old") for text in dict.fromkeys(CORPUS)]
# One of each way of writing a transformer: norm first or last, its own attention or torch's, pooled by attention.
KINDS = ["clip-b32", "siglip2", "open-clip", "multilingual"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Pictures that differ in large and in small, as a shop's do."""
    folder = tmp_path_factory.mktemp("photos")
    drawn = np.random.default_rng(0)
    files = []
    for number in range(PHOTOS):
        coarse = Image.fromarray(drawn.integers(0, 256, (4, 4, 3), np.uint8)).resize((90, 70), Image.Resampling.BICUBIC)
        noise = drawn.integers(-40, 41, (70, 90, 3))
        levels = np.clip(np.asarray(coarse, np.int64) + noise, 0, 255).astype(np.uint8)
        path = folder / f"{number:02}.png"
        path.write_bytes(pictures.encode(Image.fromarray(levels), "PNG"))
        files.append(path)
    return files


@pytest.fixture(scope="module", params=KINDS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pulled(str(request.param), tmp_path_factory)


def pulled(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = FAMILIES[kind]
    checkpoint = tmp_path_factory.mktemp(kind) / "checkpoint"
    family.write(checkpoint)
    beside = checkpoint.with_name(family.image_from) if family.image_from else None
    folder = checkpoint.with_name("bundle")
    export_bundle(load_checkpoint(checkpoint, beside), folder)
    return folder


@pytest.fixture(scope="module")
def made(source: Path, photos: list[Path]) -> Path:
    folder = source.with_name("small")
    quantize(load_bundle(source), folder, Samples(photos, TEXTS), PictureSettings(), "f32")
    return folder


async def encode(
    bundle: Path, data_dir: Path, images: Sequence[bytes], texts: Sequence[str], **encoder: Any
) -> tuple[Vectors, Vectors]:
    """Return the vectors of all, asked for at once, so that they meet in batches."""
    settings = Settings(data_dir=data_dir, model=str(bundle), encoder=EncoderSettings(**encoder))
    async with open_encoder(settings, Metrics()) as opened:
        seen = await asyncio.gather(*(opened.embed_image(image, bulk=True) for image in images))
        read = await asyncio.gather(*(opened.embed_text(text, bulk=True) for text in texts))
    return np.stack([one.embedding for one in seen]), np.stack(read)


async def test_the_measured_loss_is_what_a_user_gets(
    source: Path, made: Path, photos: list[Path], tmp_path: Path
) -> None:
    loss = stated(made)
    (seen, held_out), (read, unread) = _halves(Samples(photos, TEXTS))
    assert not {*seen, *read} & {*held_out, *unread}
    images = [path.read_bytes() for path in held_out]
    before = await encode(source, tmp_path, images, unread, lanes=1, runtime="openvino")
    after = await encode(made, tmp_path, images, unread, lanes=1, runtime="openvino")
    assert (loss.pictures, loss.texts) == (len(held_out), len(unread))
    for said, expected, given in zip((loss.image, loss.text), before, after, strict=True):
        found = closeness(expected, given)
        assert said is not None
        assert said.centred_mean == pytest.approx(found.centred_mean, abs=0.002)
        assert said.cosine_min == pytest.approx(found.cosine_min, abs=0.002)
        assert found.centred_mean < 1 - 1e-5  # something was rounded, or nothing was measured
        assert found.centred_mean > 0.97
    assert loss.overlap_at_10 == pytest.approx(overlap(before[0], after[0]), abs=0.02)


async def test_onnx_runtime_and_openvino_agree(made: Path, photos: list[Path], tmp_path: Path) -> None:
    images = [path.read_bytes() for path in photos]
    ours = await encode(made, tmp_path, images, TEXTS, lanes=1, runtime="openvino")
    theirs = await encode(made, tmp_path, images, TEXTS, lanes=1, runtime="onnx")
    for one, other in zip(ours, theirs, strict=True):
        assert closeness(one, other).centred_mean > 0.99


def test_openvino_computes_in_int8(made: Path, tmp_path: Path) -> None:
    """Folded into floats, which OpenVINO is glad to do, the graphs would give about the same vectors, and no speed."""
    runtime = OpenVinoRuntime(load_bundle(made), EncoderSettings(), 1, tmp_path)
    for graph in runtime._graphs.values():
        layers = [node.get_rt_info() for node in graph._compiled.get_runtime_model().get_ordered_ops()]
        kinds = [str(layer["layerType"].astype(str)) for layer in layers]
        used = [
            str(layer["runtimePrecision"].astype(str))
            for layer, kind in zip(layers, kinds, strict=True)
            if kind == "FullyConnected"
        ]
        assert used.count("i8") + used.count("u8") >= 0.8 * len(used) > 0


@pytest.mark.parametrize("runtime", ["openvino", "onnx"])
async def test_neither_neighbours_nor_lanes_matter(
    made: Path, photos: list[Path], tmp_path: Path, runtime: str
) -> None:
    images = [path.read_bytes() for path in photos[:24]]
    alone = await encode(made, tmp_path, images, TEXTS[:24], lanes=1, max_batch=1, runtime=runtime)
    crowd = await encode(
        made, tmp_path, images[::-1], TEXTS[:24][::-1], lanes=3, max_batch=7, inference_batch=5, runtime=runtime
    )
    for one, other in zip(alone, crowd, strict=True):
        np.testing.assert_allclose(one, other[::-1], atol=1e-5)


def test_the_bundle_is_small_whole_and_says_how_it_was_made(source: Path, made: Path) -> None:
    before, after = read_manifest(source), read_manifest(made)
    assert after.quantization is not None
    assert (after.precision, after.id, after.quantization.calibration) == ("int8", "small", PHOTOS // 2)
    assert after.quantization.source == load_bundle(source).spec("f32").fingerprint
    assert (after.image, after.text, after.revision) == (before.image, before.text, before.revision)
    assert load_bundle(made).spec("f32").fingerprint != load_bundle(source).spec("f32").fingerprint
    assert not list(made.parent.glob(".small.*"))
    for name in ("vision.onnx", "text.onnx"):
        model = onnx.load(made / name)
        onnx.checker.check_model(model, full_check=True)
        stored = {tensor.name for tensor in model.graph.initializer}
        makers = {output: node for node in model.graph.node for output in node.output}
        operands = [list(node.input[:2]) for node in model.graph.node if node.op_type in ("MatMul", "Gemm", "Conv")]
        kinds = Counter(tuple(makers[name].op_type for name in pair if name in makers) for pair in operands)
        assert kinds["DequantizeLinear", "DequantizeLinear"] >= 8
        for pair in operands:  # no weights in floats are left, turned or not
            assert not stored.intersection(pair)
            assert not any(
                stored.intersection(makers[name].input) for name in pair if makers[name].op_type == "Transpose"
            )


def test_a_large_embedding_table_is_kept_in_int8(tmp_path: Path) -> None:
    table = (
        np.random.default_rng(0).normal(size=(20_000, 64)).astype(np.float32) * np.linspace(0.01, 9, 20_000)[:, None]
    )
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", "t"])
    rows = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", "t", 64])
    node = helper.make_node("Gather", ["table", "ids"], ["embedding"])
    weights = [numpy_helper.from_array(table.astype(np.float32), "table")]
    model = helper.make_model(helper.make_graph([node], "g", [ids], [rows], weights), ir_version=10)
    model.opset_import[0].version = 20
    onnx.save(model, tmp_path / "table.onnx")
    graph = Int8Graph(tmp_path / "table.onnx")
    assert not graph.sites
    graph.quantize({})
    graph.save(tmp_path / "small.onnx")
    wanted = np.array([[0, 7, 19_999]])
    [found] = InferenceSession(tmp_path / "small.onnx").run(None, {"ids": wanted})
    steps = np.abs(table[wanted]).max(axis=-1, keepdims=True) / 127
    assert np.all(np.abs(found - table[wanted]) <= 0.51 * steps)
    assert (tmp_path / "small.onnx").stat().st_size < 0.3 * table.size * 4


def test_channels_that_stand_out_cost_little(
    photos: list[Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As trained transformers have them: without smoothing, one scale for all leaves nothing of the others."""
    source = pulled("clip-b32", tmp_path_factory)
    folder = Path(shutil.copytree(source, tmp_path / "outliers"))
    graph = onnx.load(folder / "vision.onnx")
    stored = {tensor.name: tensor for tensor in graph.graph.initializer}
    raised = 0
    for node in list(graph.graph.node):
        if node.op_type != "LayerNormalization":
            continue
        # What the norm is multiplied by, its own readers divide by again: the model computes what it did before.
        readers = [other for other in graph.graph.node if node.output[0] in other.input]
        if not all(other.op_type == "MatMul" for other in readers):
            continue
        factors = np.ones(numpy_helper.to_array(stored[node.input[1]]).size, np.float32)
        factors[::17] = 60
        for place in (1, 2):
            name = f"{node.input[place]}.{node.output[0]}"
            value = numpy_helper.to_array(stored[node.input[place]]) * factors
            graph.graph.initializer.append(numpy_helper.from_array(value, name))
            node.input[place] = name
        for number, other in enumerate(readers):
            [turned] = [maker for maker in graph.graph.node if other.input[1] in maker.output]
            value = numpy_helper.to_array(stored[turned.input[0]]).T / factors[:, None]
            name = f"{node.output[0]}.divided{number}"
            graph.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
            other.input[1] = name
        raised += 1
    assert raised >= 6
    onnx.save(graph, folder / "vision.onnx")
    relist(folder)
    kept = quantize(load_bundle(folder), tmp_path / "small", Samples(photos, TEXTS), PictureSettings(), "f32").loss
    assert kept is not None
    assert kept.image.centred_mean > 0.97


def test_too_few_pictures_or_texts_are_refused_before_anything_is_done(
    source: Path, photos: list[Path], tmp_path: Path
) -> None:
    target = tmp_path / "small"
    bundle = load_bundle(source)
    with pytest.raises(Misconfigured, match=f"{ENOUGH - 1} pictures are too few.*takes {ENOUGH}"):
        quantize(bundle, target, Samples(photos[: ENOUGH - 1], TEXTS), PictureSettings(), "f32")
    with pytest.raises(Misconfigured, match="1 different texts are too few"):
        quantize(bundle, target, Samples(photos, ["red", " red ", ""]), PictureSettings(), "f32")
    assert not list(tmp_path.iterdir())


def test_a_folder_of_other_things_is_refused_and_leaves_nothing(
    source: Path, photos: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, photo in enumerate(photos):
        (folder / photo.name).write_bytes(photo.read_bytes() if number < 30 else photo.read_bytes()[:200])
    broken = Samples(sorted(folder.iterdir()), TEXTS)
    with pytest.raises(Misconfigured, match=r"only \d+ of 30 files are pictures that can be read"):
        quantize(load_bundle(source), tmp_path / "small", broken, PictureSettings(), "f32")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_int8_is_not_quantised_again_and_nothing_is_overwritten_unasked(
    source: Path, made: Path, photos: list[Path], tmp_path: Path
) -> None:
    samples = Samples(photos, TEXTS)
    with pytest.raises(Misconfigured, match="is int8 already"):
        quantize(load_bundle(made), tmp_path / "again", samples, PictureSettings(), "f32")
    with pytest.raises(Misconfigured, match="--force"):
        quantize(load_bundle(source), made, samples, PictureSettings(), "f32")


def test_a_model_whose_values_are_not_finite_is_refused(source: Path, photos: list[Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "infinite"))
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["image"]["std"] = [1e-40] * 3
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(Misconfigured, match="not finite"):
        quantize(load_bundle(folder), tmp_path / "small", Samples(photos, TEXTS), PictureSettings(), "f32")
    assert not (tmp_path / "small").exists()


def stated(folder: Path) -> Loss:
    made = read_manifest(folder).quantization
    assert made is not None
    assert made.loss is not None
    return made.loss


def relist(folder: Path) -> None:
    """Write the new checksums of a bundle's files."""
    from hashlib import sha256

    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"] = {
        name: {"sha256": sha256(data).hexdigest(), "bytes": len(data)}
        for name in manifest["files"]
        for data in [(folder / name).read_bytes()]
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
