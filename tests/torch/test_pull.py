"""`catalens model pull` and `verify` with torch at hand, from a folder: no hub is asked."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import onnx
import pytest
import structlog
import torch
from tests.torch.families import FAMILIES, clip_writer, write_multilingual
from typer.testing import CliRunner, Result

from catalens.encoders.bundle import load_bundle
from catalens.encoders.checkpoints import load_checkpoint
from catalens.errors import Misconfigured
from catalens_standalone.cli import app

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's exporter and transformers warn about themselves


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pull") / "small-clip"
    FAMILIES["clip-b32"].write(folder)
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\nlanguage: [en, fr]\n---\n# A model\n")
    return folder


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    handlers = list(logging.getLogger().handlers)
    for name in [name for name in os.environ if name.startswith("CATALENS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CATALENS_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "data" / "models"
    # The commands send the log to a stderr that ends with each of them.
    structlog.reset_defaults()
    logging.getLogger().handlers[:] = handlers


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["model", *arguments], catch_exceptions=False)


def test_a_folder_becomes_a_bundle_that_is_listed_and_verified(checkpoint: Path, models: Path) -> None:
    said = run("pull", str(checkpoint)).output
    assert "does not allow commercial use" in said
    assert "catalens reindex --model small-clip" in said
    manifest = load_bundle(models / "small-clip").manifest
    assert (manifest.id, manifest.family, manifest.dimension) == ("small-clip", "clip", 48)
    assert (manifest.licence, manifest.languages) == ("cc-by-nc-4.0", ("en", "fr"))
    assert sorted(path.name for path in models.iterdir()) == ["small-clip"]
    assert "cc-by-nc-4.0" in run("list").output
    verified = run("verify", "small-clip", "-n", "5")
    assert verified.exit_code == 0, verified.output
    assert verified.output.count("good") == 4  # two towers in OpenVINO and in ONNX Runtime


def test_the_weights_are_there_once(checkpoint: Path, models: Path) -> None:
    run("pull", str(checkpoint))
    bundle = models / "small-clip"
    whole = (checkpoint / "model.safetensors").stat().st_size
    assert whole * 0.9 < (bundle / "weights.safetensors").stat().st_size < whole * 1.1
    for graph in ("vision.onnx", "text.onnx"):
        model = onnx.load(bundle / graph, load_external_data=False)
        outside = [one for one in model.graph.initializer if one.data_location == onnx.TensorProto.EXTERNAL]
        assert sum(one.data_location != onnx.TensorProto.EXTERNAL for one in model.graph.initializer) < 40
        assert len(outside) > 30
        assert {entry.value for one in outside for entry in one.external_data if entry.key == "location"} == {
            "weights.safetensors"
        }
        assert all(
            int(entry.value) % 64 == 0 for one in outside for entry in one.external_data if entry.key == "offset"
        )
        assert str(checkpoint.parent).encode() not in (bundle / graph).read_bytes()
        assert b"site-packages" not in (bundle / graph).read_bytes()


def test_the_same_checkpoint_makes_the_same_bytes(checkpoint: Path, models: Path) -> None:
    run("pull", str(checkpoint), "--name", "one")
    run("pull", str(checkpoint), "--name", "two")
    one, two = (load_bundle(models / name).manifest for name in ("one", "two"))
    assert one.files == two.files
    assert one.revision == two.revision


def test_a_pull_that_fails_leaves_nothing_and_takes_nothing(checkpoint: Path, models: Path, tmp_path: Path) -> None:
    run("pull", str(checkpoint))
    before = (models / "small-clip" / "bundle.json").read_bytes()
    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(Misconfigured, match="cannot be loaded"):
        run("pull", str(broken), "--name", "small-clip", "--force")
    with pytest.raises(Misconfigured, match="cannot be loaded"):
        run("pull", str(broken))
    assert sorted(path.name for path in models.iterdir()) == ["small-clip"]
    assert (models / "small-clip" / "bundle.json").read_bytes() == before


def test_a_bundle_that_cannot_be_run_never_gets_its_name(checkpoint: Path, models: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(checkpoint, tmp_path / "nan"))
    from safetensors.torch import load_file, save_file

    weights = load_file(broken / "model.safetensors")
    weights["visual_projection.weight"].fill_(float("nan"))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Misconfigured):
        run("pull", str(broken))
    assert list(models.iterdir()) == []


def test_force_replaces_and_what_a_killed_pull_left_is_swept(checkpoint: Path, models: Path) -> None:
    left = models / ".small-clip.x1y2.partial" / "bundle"
    left.mkdir(parents=True)
    (left / "bundle.json").write_text("{}")
    other = models / ".small-clip.v2.x1y2.partial"  # which another process may be writing
    other.mkdir()
    run("pull", str(checkpoint), "--revision", "first")
    run("pull", str(checkpoint), "--revision", "second", "--force")
    manifest = load_bundle(models / "small-clip").manifest
    assert (manifest.id, manifest.revision, manifest.source) == ("small-clip", "second", "small-clip")
    assert sorted(path.name for path in models.iterdir()) == [other.name, "small-clip"]


def test_a_graph_that_computes_something_else_fails_the_verification(checkpoint: Path, models: Path) -> None:
    run("pull", str(checkpoint))
    bundle = models / "small-clip"
    model = onnx.load(bundle / "vision.onnx", load_external_data=False)
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    softmax.attribute[0].i = 1
    onnx.save(model, bundle / "vision.onnx")
    manifest = json.loads((bundle / "bundle.json").read_text())
    del manifest["check"]
    data = (bundle / "vision.onnx").read_bytes()
    manifest["files"]["vision.onnx"] = {"sha256": sha256(data).hexdigest(), "bytes": len(data)}
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    verified = run("verify", "small-clip", "-n", "5")
    assert verified.exit_code == 1
    assert verified.output.count("below 0.9999") == 2
    assert verified.output.count("good") == 2  # the text tower


# --- what is refused --------------------------------------------------------------------------------------


def changed(folder: Path, name: str, **changes: object) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("config.json", {"model_type": "siglip2"}, "NaFlex"),
        ("config.json", {"model_type": "blip"}, "known are clip, siglip"),
        ("preprocessor_config.json", {"image_processor_type": "ViTImageProcessor"}, "ViTImageProcessor; known are"),
        ("preprocessor_config.json", {"do_center_crop": False}, "leaves out do_center_crop"),
        ("preprocessor_config.json", {"image_mean": None}, "does not say how pictures are prepared"),
        ("preprocessor_config.json", {"resample": 7}, "does not say how pictures are prepared"),
        ("preprocessor_config.json", {"crop_size": {"height": 64, "width": 32}}, "is no square"),
        ("preprocessor_config.json", {"crop_size": 40}, "pictures of 40 px, its model takes 56"),
    ],
)
def test_what_is_not_known_is_refused_by_name(
    checkpoint: Path, tmp_path: Path, name: str, changes: dict[str, object], said: str
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    changed(folder, name, **changes)
    with pytest.raises(Misconfigured, match=said):
        load_checkpoint(folder)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="no checkpoint is there"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("family", "name", "content"),
    [
        ("clip-b32", "README.md", "---\nlicense: [\n---\n"),
        ("open-clip-pickled", "open_clip_config.json", '{"model_cfg": {}}'),
    ],
)
def test_a_broken_file_is_said_in_words(tmp_path: Path, family: str, name: str, content: str) -> None:
    FAMILIES[family].write(tmp_path / "broken")
    (tmp_path / "broken" / name).write_text(content)
    with pytest.raises(Misconfigured, match="broken"):
        load_checkpoint(tmp_path / "broken")


def test_weights_that_are_missing_are_not_made_up(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    weights = load_file(folder / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Misconfigured, match=r"lacks weights: text_projection\.weight"):
        load_checkpoint(folder)


class _Shout:
    """What a pickle that means harm looks like."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("family", ["clip-b32", "open-clip-pickled"])
def test_pickled_code_is_not_run(family: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    FAMILIES[family].write(folder)
    (folder / "model.safetensors").unlink(missing_ok=True)
    name = "pytorch_model.bin" if family == "clip-b32" else "open_clip_pytorch_model.bin"
    torch.save({"weight": _Shout()}, folder / name)
    with pytest.raises(Misconfigured, match="cannot be loaded"):
        load_checkpoint(folder)
    assert not (tmp_path / "harmed").exists()


def test_code_beside_the_weights_is_not_run(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    (folder / "theirs.py").write_text("from pathlib import Path\nPath('harmed').touch()\n")
    changed(folder, "config.json", model_type="theirs", auto_map={"AutoConfig": "theirs.C", "AutoModel": "theirs.M"})
    changed(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["theirs.T", "theirs.T"]})
    with pytest.raises(Misconfigured):
        load_checkpoint(folder)
    changed(folder, "config.json", model_type="clip")  # a kind that is known needs none
    load_checkpoint(folder)
    assert not (tmp_path / "harmed").exists()


def test_a_text_tower_alone_asks_for_its_pictures(tmp_path: Path) -> None:
    write_multilingual(tmp_path / "texts")
    with pytest.raises(Misconfigured, match="--image-from"):
        load_checkpoint(tmp_path / "texts")
    clip_writer(14)(tmp_path / "whole")
    with pytest.raises(Misconfigured, match="leave --image-from out"):
        load_checkpoint(tmp_path / "whole", tmp_path / "clip-for-pictures")
