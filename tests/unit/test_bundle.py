"""The bundle format: what is accepted, where a model is found, and what changes its fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from catalens.encoders.bundle import TEXT, Bundle, load_bundle, read_manifest, resolve
from catalens.errors import Misconfigured

TINY = Path(__file__).parents[1] / "fixtures" / "bundles" / "tiny"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy of the tiny bundle that a test may spoil."""
    return Path(shutil.copytree(TINY, tmp_path / "bundle"))


def change(bundle: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """Edit the manifest in place."""
    path = bundle / "bundle.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))
    return bundle


def test_a_whole_bundle_loads_and_says_what_it_is() -> None:
    spec = load_bundle(TINY).spec("f32")
    assert (spec.id, spec.revision, spec.family, spec.dimension) == ("tiny", "1", "tiny", 16)
    assert spec.fingerprint == load_bundle(TINY).spec("f32").fingerprint


@pytest.mark.parametrize("name", ["vision.onnx", "text.onnx", "tokenizer.json"])
def test_a_file_that_differs_by_one_bit_is_named(bundle: Path, name: str) -> None:
    path = bundle / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(Misconfigured, match=f"{name} has SHA-256"):
        load_bundle(bundle)


def test_a_file_that_is_too_short_is_named(bundle: Path) -> None:
    (bundle / "text.onnx").write_bytes(b"short")
    with pytest.raises(Misconfigured, match=r"text\.onnx has 5 bytes"):
        load_bundle(bundle)


def test_a_file_that_is_missing_is_named(bundle: Path) -> None:
    (bundle / "vision.onnx").unlink()
    with pytest.raises(Misconfigured, match=r"vision\.onnx cannot be read"):
        load_bundle(bundle)


def _drop(*keys: str) -> Callable[[dict[str, Any]], object]:
    def edit(manifest: dict[str, Any]) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        del manifest[keys[-1]]

    return edit


def _put(value: object, *keys: str) -> Callable[[dict[str, Any]], object]:
    def edit(manifest: dict[str, Any]) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (_put(2, "format"), "format"),
        (_drop("dimension"), "dimension"),
        (_drop("image", "interpolation"), r"image\.interpolation"),
        (_put("bicubical", "image", "interpolation"), r"image\.interpolation"),
        (_put([0.5, 0.5], "image", "mean"), r"image\.mean"),
        (_put([0.5, 0.0, 0.5], "image", "std"), "std must be positive"),
        (_put(16, "image", "resize_to"), "resize_to is smaller"),
        (_put(64, "image", "resize_to"), "nothing to crop"),
        (_drop("text", "max_tokens"), r"text\.max_tokens"),
        (_drop("files", "tokenizer.json"), r"files lacks tokenizer\.json"),
        (_put({"sha256": "0" * 64, "bytes": 1}, "files", "../evil"), r"files\.\.\./evil"),
    ],
)
def test_a_manifest_that_says_too_little_or_nonsense_is_refused_by_field(
    bundle: Path, edit: Callable[[dict[str, Any]], object], named: str
) -> None:
    with pytest.raises(Misconfigured, match=named):
        read_manifest(change(bundle, edit))


def test_a_manifest_that_is_no_json_is_refused(bundle: Path) -> None:
    (bundle / "bundle.json").write_bytes(b"\xff{")
    with pytest.raises(Misconfigured, match=r"bundle\.json"):
        read_manifest(bundle)


def test_fields_of_a_later_release_are_ignored(bundle: Path) -> None:
    manifest = read_manifest(change(bundle, _put("somebody", "trained_by")))
    assert manifest.id == "tiny"


@pytest.mark.parametrize(
    "edit",
    [
        _put("2", "revision"),
        _put("other", "id"),
        _put("bicubic", "image", "interpolation"),
        _put([0.5, 0.5, 0.4], "image", "std"),
        _put("query: ", "text", "prefix"),
        _put(7, "text", "max_tokens"),
        _put({"sha256": "0" * 64, "bytes": 1}, "files", "text.onnx"),
    ],
)
def test_whatever_changes_vectors_changes_the_fingerprint(
    bundle: Path, edit: Callable[[dict[str, Any]], object]
) -> None:
    before = Bundle(bundle, read_manifest(bundle)).spec("f32").fingerprint
    change(bundle, edit)
    assert Bundle(bundle, read_manifest(bundle)).spec("f32").fingerprint != before


def test_precision_is_part_of_the_fingerprint_and_the_evaluation_is_not(bundle: Path) -> None:
    before = load_bundle(bundle).spec("f32").fingerprint
    assert load_bundle(bundle).spec("bf16").fingerprint != before
    change(bundle, _put({"en": {"r@5": 0.7}}, "evaluation"))
    assert load_bundle(bundle).spec("f32").fingerprint == before


def test_a_model_is_found_by_name_in_the_data_folder_and_by_path(tmp_path: Path) -> None:
    named = Path(shutil.copytree(TINY, tmp_path / "models" / "mine"))
    assert resolve("mine", tmp_path) == named
    assert resolve(str(TINY), tmp_path) == TINY


def test_a_model_that_is_nowhere_is_an_error_that_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="nosuch") as caught:
        resolve("nosuch", tmp_path)
    assert str(tmp_path / "models" / "nosuch") in str(caught.value)


def test_the_starter_model_is_bundled_and_its_fingerprint_is_what_installations_have(tmp_path: Path) -> None:
    starter = resolve("starter", tmp_path)
    assert read_manifest(starter).family == "starter"
    # Another one makes every index of the starter model one that has to be built anew.
    assert load_bundle(starter).spec("f32").fingerprint == "36dc33526bc7229e7734f09d3e525232"


def test_a_manifest_is_read_without_any_model_runtime() -> None:
    code = f"""
import sys
from pathlib import Path
from catalens.encoders.bundle import read_manifest
print(read_manifest(Path({str(TINY)!r})).dimension)
print(sorted({{"numpy", "openvino", "tokenizers", "PIL"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["16", "[]"]


def test_what_was_verified_is_read_again_once_it_is_touched(bundle: Path, tmp_path: Path) -> None:
    known = tmp_path / "verified.json"
    load_bundle(bundle, verified=known)
    load_bundle(bundle, verified=known)
    graph = bundle / TEXT
    before = graph.stat()
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    os.utime(graph, ns=(before.st_atime_ns, before.st_mtime_ns))  # whoever restores the time changes the entry's
    with pytest.raises(Misconfigured, match="SHA-256"):
        load_bundle(bundle, verified=known)


def test_what_was_verified_is_not_read_again(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = tmp_path / "cache" / "verified.json"
    load_bundle(bundle, verified=known)

    def read(*_: object) -> None:
        raise AssertionError("it was read")

    monkeypatch.setattr(hashlib, "file_digest", read)
    load_bundle(bundle, verified=known)
    for spoilt in ("", "[]", "null", '{"a": 1'):
        known.write_text(spoilt)
        with pytest.raises(AssertionError, match="it was read"):
            load_bundle(bundle, verified=known)
