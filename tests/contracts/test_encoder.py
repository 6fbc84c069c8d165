"""What every Encoder promises, on each runtime with the tiny bundle; and what only some must be held to."""

from __future__ import annotations

import asyncio
import json
import locale
import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tests import pictures

from catalens.embedding import probe
from catalens.encoders import open_encoder
from catalens.encoders.choice import RuntimeName
from catalens.encoders.openvino import release
from catalens.errors import InvalidPicture, Misconfigured, NotLoaded, Transient
from catalens.ports import Encoder
from catalens.settings import EncoderSettings, PictureSettings, Settings
from catalens.telemetry import Metrics

if TYPE_CHECKING:
    from catalens.domain import Embedding

CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
LOCALE = locale.setlocale(locale.LC_CTYPE)
ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "fixtures" / "bundles" / "tiny"
STARTER = ROOT / "models" / "starter" / "bundle"


RUNTIMES: tuple[RuntimeName, ...] = ("openvino", "onnx")


def settings(tmp_path: Path, *, model: Path = TINY, **encoder: Any) -> Settings:
    return Settings(
        data_dir=tmp_path / "data",
        model=str(model),
        encoder=EncoderSettings(**{"lanes": 1, "runtime": "openvino", **encoder}),
        pictures=PictureSettings(max_pixels=1_000_000),
    )


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> RuntimeName:
    found: RuntimeName = request.param
    return found


@pytest.fixture
async def encoder(tmp_path: Path, metrics: Metrics, runtime: RuntimeName) -> AsyncIterator[Encoder]:
    async with open_encoder(settings(tmp_path, runtime=runtime), metrics) as opened:
        yield opened


def cosine(one: Embedding, other: Embedding) -> float:
    return float(one @ other)


def sample(metrics: Metrics, name: str, **labels: str) -> float:
    value = metrics.registry.get_sample_value(name, labels)
    assert value is not None, f"{name}{labels} was never recorded"
    return value


# --- every encoder ---------------------------------------------------------------------------------------------------


async def test_it_says_what_it_is(encoder: Encoder) -> None:
    assert (encoder.spec.id, encoder.spec.family, encoder.spec.dimension) == ("tiny", "tiny", 16)
    assert len(encoder.spec.fingerprint) == 32


async def test_opening_leaves_the_process_locale_alone(encoder: Encoder) -> None:
    assert encoder.spec.id == "tiny"
    assert locale.setlocale(locale.LC_CTYPE) == LOCALE, "text files would be read as ASCII from here on"


async def test_vectors_are_float32_of_the_models_dimension_and_of_length_one(encoder: Encoder) -> None:
    picture = await encoder.embed_image(pictures.jpeg())
    for vector in (await encoder.embed_text("red"), picture.embedding):
        assert vector.shape == (16,)
        assert vector.dtype == np.float32
        assert float(np.linalg.norm(vector)) == pytest.approx(1, abs=1e-6)


async def test_text_and_picture_meet_in_one_space(encoder: Encoder) -> None:
    red, blue = [await encoder.embed_text(word) for word in ("red", "bleu")]
    picture = (await encoder.embed_image(pictures.encode(pictures.plain(pictures.RED), "PNG"))).embedding
    assert cosine(red, picture) > 0.99
    assert cosine(red, picture) > cosine(blue, picture) + 0.5


async def test_a_pictures_info_is_what_was_sent(encoder: Encoder) -> None:
    data = pictures.rotated_jpeg(pictures.scene(96, 64), 6)
    info = (await encoder.embed_image(data)).info
    assert (info.width, info.height, info.format, info.sha256) == (64, 96, "jpeg", sha256(data).hexdigest())


@pytest.mark.parametrize("bulk", [False, True])
async def test_a_bad_picture_costs_nobody_else_anything(encoder: Encoder, bulk: bool) -> None:
    good = [pictures.encode(pictures.plain((n * 20, 10, 10)), "PNG") for n in range(12)]
    bad = {b"": "empty", b"no picture": "not_a_picture", pictures.png_bomb(2000, 2000): "too_many_pixels"}
    mixed = [*good[:5], *bad, *good[5:], pictures.jpeg(pictures.scene(300, 200))[:-900]]
    results = await asyncio.gather(*(encoder.embed_image(p, bulk=bulk) for p in mixed), return_exceptions=True)
    reasons = [result.reason for result in results if isinstance(result, InvalidPicture)]
    assert reasons == [*bad.values(), "truncated"]
    assert sum(isinstance(result, BaseException) for result in results) == 4


async def test_a_dot_is_a_picture(encoder: Encoder) -> None:
    dot = await encoder.embed_image(pictures.encode(pictures.plain(pictures.BLUE, 1, 1), "PNG"))
    assert (dot.info.width, dot.info.height) == (1, 1)
    assert cosine(dot.embedding, await encoder.embed_text("blue")) > 0.99


async def test_a_vector_does_not_depend_on_its_neighbours(encoder: Encoder) -> None:
    texts = ["red", "blue shoe and a green hat", "noir", "white white white"]
    alone = [await encoder.embed_text(text) for text in texts]
    together = await asyncio.gather(*(encoder.embed_text(text, bulk=True) for text in texts * 20))
    for number, vector in enumerate(together):
        np.testing.assert_allclose(vector, alone[number % 4], atol=1e-6)
    scenes = [pictures.encode(pictures.scene(40 + n, 50), "PNG") for n in range(6)]
    one_by_one = [(await encoder.embed_image(data)).embedding for data in scenes]
    at_once = await asyncio.gather(*(encoder.embed_image(data, bulk=True) for data in scenes))
    np.testing.assert_allclose([image.embedding for image in at_once], one_by_one, atol=1e-6)


@pytest.mark.parametrize(
    "text", ["", " ", "\x00\x1f", "👗" * 50, "half a pair \ud83d", "red " * 100_000, "שמלה אדומה", "qwxyz"]
)
async def test_any_text_has_a_finite_vector(encoder: Encoder, text: str) -> None:
    vector = await encoder.embed_text(text)
    assert np.isfinite(vector).all()
    assert float(np.linalg.norm(vector)) in (pytest.approx(1, abs=1e-6), 0.0)


async def test_a_text_is_cut_at_the_models_length(encoder: Encoder) -> None:
    long = await encoder.embed_text("red " * 8 + "blue " * 50)
    np.testing.assert_array_equal(long, await encoder.embed_text("RED " * 8))


async def test_a_caller_that_leaves_disturbs_nobody(encoder: Encoder) -> None:
    data = pictures.jpeg()
    tasks = [asyncio.create_task(encoder.embed_image(data, bulk=True), name=f"caller-{n}") for n in range(6)]
    await asyncio.sleep(0)
    tasks[2].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(result, asyncio.CancelledError) for result in results] == [n == 2 for n in range(6)]


async def test_closed_means_refused_and_what_was_under_way_is_finished(
    tmp_path: Path, metrics: Metrics, runtime: RuntimeName
) -> None:
    async with open_encoder(settings(tmp_path, runtime=runtime), metrics) as encoder:
        tasks = [asyncio.create_task(encoder.embed_text("red", bulk=True), name=f"caller-{n}") for n in range(40)]
        await asyncio.sleep(0)
    assert len(await asyncio.gather(*tasks)) == 40
    with pytest.raises(Transient):
        await encoder.embed_text("red")
    with pytest.raises(Transient):
        await encoder.embed_image(pictures.jpeg())


async def test_what_it_does_is_measured(encoder: Encoder, metrics: Metrics) -> None:
    await asyncio.gather(*(encoder.embed_text(f"red {n}", bulk=True) for n in range(5)))
    await encoder.embed_image(pictures.jpeg())
    assert sample(metrics, "catalens_encoder_items_total", tower="text") == 5
    assert sample(metrics, "catalens_encoder_items_total", tower="image") == 1
    assert sample(metrics, "catalens_encoder_batch_size_sum", tower="text") == 5
    for stage in ("prepare", "run", "finish"):
        assert sample(metrics, "catalens_encoder_seconds_count", tower="image", stage=stage) == 1
    assert sample(metrics, "catalens_encoder_waiting", tower="text") == 0


async def test_the_same_picture_twice_in_a_batch_is_computed_once(encoder: Encoder, metrics: Metrics) -> None:
    data = pictures.jpeg()
    images = await asyncio.gather(*(encoder.embed_image(bytes(bytearray(data)), bulk=True) for _ in range(16)))
    assert sample(metrics, "catalens_encoder_items_total", tower="image") == 16
    assert sample(metrics, "catalens_encoder_batch_size_sum", tower="image") < 16
    for image in images:
        np.testing.assert_array_equal(image.embedding, images[0].embedding)


def respoken(bundle: Path, **changes: object) -> Path:
    """Change the manifest so that its checksums hold again."""
    path = bundle / "bundle.json"
    manifest = json.loads(path.read_text()) | changes
    for name in manifest["files"]:
        data = (bundle / name).read_bytes()
        manifest["files"][name] = {"sha256": sha256(data).hexdigest(), "bytes": len(data)}
    path.write_text(json.dumps(manifest))
    return bundle


@pytest.mark.parametrize(
    ("spoil", "named"),
    [({"vision.onnx": b"no graph"}, r"vision\.onnx"), ({"tokenizer.json": b"{}"}, r"tokenizer\.json"), ({}, "17")],
)
async def test_a_bundle_that_cannot_run_is_refused_by_name(
    tmp_path: Path, spoil: dict[str, bytes], named: str, runtime: RuntimeName
) -> None:
    bundle = Path(shutil.copytree(TINY, tmp_path / "bundle"))
    for name, data in spoil.items():
        (bundle / name).write_bytes(data)
    respoken(bundle, **({} if spoil else {"dimension": 17}))
    with pytest.raises(Misconfigured, match=named):
        async with open_encoder(settings(tmp_path, model=bundle, runtime=runtime), Metrics()):
            pass


async def test_a_runtime_that_computes_nonsense_is_refused(tmp_path: Path, runtime: RuntimeName) -> None:
    check = json.loads((TINY / "bundle.json").read_text())["check"]
    bundle = respoken(
        Path(shutil.copytree(TINY, tmp_path / "bundle")), check=check | {"pixels": [*check["pixels"][1:], 0.0]}
    )
    with pytest.raises(Misconfigured, match=r"vision\.onnx gives wrong vectors"):
        async with open_encoder(settings(tmp_path, model=bundle, runtime=runtime), Metrics()):
            pass


async def test_the_number_of_lanes_changes_no_vector(tmp_path: Path, runtime: RuntimeName) -> None:
    demo = [path.read_bytes() for path in sorted((ROOT / "demo" / "images").glob("*.jpg"))[:6]]
    seen = []
    for lanes in (1, 3):
        chosen = settings(tmp_path, model=STARTER, runtime=runtime, lanes=lanes)
        chosen = chosen.model_copy(update={"pictures": PictureSettings()})
        async with open_encoder(chosen, Metrics()) as encoder:
            encoded = await asyncio.gather(*(encoder.embed_image(picture, bulk=True) for picture in demo))
            seen.append(np.stack([one.embedding for one in encoded]))
    np.testing.assert_allclose(seen[0], seen[1], atol=1e-4)


async def test_a_file_with_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(TINY, tmp_path / "bundle"))
    (bundle / "text.onnx").write_bytes((TINY / "vision.onnx").read_bytes())
    with pytest.raises(Misconfigured, match=r"text\.onnx"):
        async with open_encoder(settings(tmp_path, model=bundle), Metrics()):
            pass


@pytest.mark.parametrize("towers", ["image", "text"])
async def test_one_tower_alone_is_loaded_and_the_other_is_refused(
    tmp_path: Path, metrics: Metrics, runtime: RuntimeName, towers: str
) -> None:
    bundle = respoken(Path(shutil.copytree(TINY, tmp_path / "bundle")))
    other = {"image": "text.onnx", "text": "vision.onnx"}[towers]
    (bundle / other).write_bytes(b"no graph: whoever reads it fails")
    async with open_encoder(settings(tmp_path, model=TINY, runtime=runtime), Metrics()) as whole:
        expected = await whole.embed_text("red"), (await whole.embed_image(pictures.jpeg())).embedding
    alone = settings(tmp_path, model=respoken(bundle), runtime=runtime, towers=towers)
    async with open_encoder(alone, metrics) as encoder:
        if towers == "text":
            np.testing.assert_array_equal(await encoder.embed_text("red"), expected[0])
            with pytest.raises(NotLoaded, match="CATALENS_ENCODER__TOWERS=text"):
                await encoder.embed_image(pictures.jpeg())
        else:
            np.testing.assert_array_equal((await encoder.embed_image(pictures.jpeg())).embedding, expected[1])
            with pytest.raises(NotLoaded, match="CATALENS_ENCODER__TOWERS=image"):
                await encoder.embed_text("red")
        tower, vector = await probe(encoder)
        assert (tower, vector.shape) == (towers, (16,))
        assert sample(metrics, "catalens_encoder_lanes", tower=towers) == 1
        assert metrics.registry.get_sample_value("catalens_encoder_lanes", {"tower": other.split(".")[0]}) is None


def many_pictures() -> list[bytes]:
    """200 pictures, no two alike, of all shapes."""
    return [pictures.encode(pictures.scene(20 + n, 220 - n).rotate(n * 3), "PNG") for n in range(200)]


def many_texts() -> list[str]:
    words = ["red", "blue", "noir", "dress", "shoe", "and", "a", "green", "wooden", "unheard-of"]
    return [" ".join(words[(n * k + k) % 10] for k in range(1, 2 + n % 12)) + f" {n}" for n in range(200)]


@pytest.mark.parametrize("model", [TINY, STARTER], ids=["tiny", "starter"])
async def test_runtimes_agree_and_share_a_fingerprint(tmp_path: Path, model: Path) -> None:
    seen, fingerprints = [], set()
    for runtime in RUNTIMES:
        async with open_encoder(settings(tmp_path, model=model, runtime=runtime), Metrics()) as encoder:
            images = await asyncio.gather(*(encoder.embed_image(data, bulk=True) for data in many_pictures()))
            texts = await asyncio.gather(*(encoder.embed_text(text, bulk=True) for text in many_texts()))
            seen.append(np.stack([*(image.embedding for image in images), *texts]))
            fingerprints.add(encoder.spec.fingerprint)
    np.testing.assert_allclose(seen[0], seen[1], atol=1e-4)
    assert len(fingerprints) == 1


# --- one runtime ----------------------------------------------------------------------------------------------------


async def test_a_spoilt_cache_costs_time_and_nothing_else(tmp_path: Path) -> None:
    async with open_encoder(settings(tmp_path), Metrics()) as encoder:
        expected = await encoder.embed_text("red")
    blobs = [path for path in (tmp_path / "data" / "cache" / "openvino").rglob("*") if path.is_file()]
    assert len(blobs) == 2
    for number, blob in enumerate(blobs):
        blob.chmod(0o600)
        data = blob.read_bytes()
        blob.write_bytes(data[: len(data) // 2] if number else b"")
    async with open_encoder(settings(tmp_path), Metrics()) as encoder:
        np.testing.assert_array_equal(await encoder.embed_text("red"), expected)


async def test_what_is_kept_but_gives_wrong_vectors_is_made_again(tmp_path: Path) -> None:
    async with open_encoder(settings(tmp_path), Metrics()) as encoder:
        expected = await encoder.embed_text("red")
    (kept,) = (tmp_path / "data" / "cache" / "openvino").iterdir()
    one, other = sorted(path for path in kept.rglob("*") if path.is_file())
    swapped = one.read_bytes(), other.read_bytes()  # whole, and another tower's
    for blob, data in zip((other, one), swapped, strict=True):
        blob.chmod(0o600)
        blob.write_bytes(data)
    async with open_encoder(settings(tmp_path), Metrics()) as encoder:
        np.testing.assert_array_equal(await encoder.embed_text("red"), expected)


async def test_what_was_kept_for_a_model_that_is_gone_is_deleted(tmp_path: Path) -> None:
    kept = tmp_path / "data" / "cache" / "openvino"
    for name, days in (("gone", 31), ("rested", 29)):
        (kept / name).mkdir(parents=True)
        os.utime(kept / name, (0, time.time() - days * 86400))
    for _ in range(2):
        async with open_encoder(settings(tmp_path), Metrics()) as encoder:
            fingerprint = encoder.spec.fingerprint
    assert {path.name for path in kept.iterdir()} == {"rested", fingerprint}


async def test_memory_that_was_given_back_is_read_again(tmp_path: Path) -> None:
    async with open_encoder(settings(tmp_path, model=STARTER), Metrics()) as encoder:
        before = await encoder.embed_text("red shoe")
    async with open_encoder(settings(tmp_path, model=STARTER), Metrics()) as encoder:  # from what is kept
        release(tmp_path)
        np.testing.assert_array_equal(await encoder.embed_text("red shoe"), before)


async def test_without_a_place_for_its_cache_it_runs_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cache").write_text("a file where a folder should be")
    async with open_encoder(settings(tmp_path), Metrics()) as encoder:
        assert (await encoder.embed_text("red")).shape == (16,)


async def test_precisions_do_not_share_a_fingerprint_or_a_cache(tmp_path: Path) -> None:
    half = settings(tmp_path, precision="bf16")
    async with open_encoder(settings(tmp_path), Metrics()) as full:
        fingerprint = full.spec.fingerprint
    if "amx_bf16" in CPU or "avx512_bf16" in CPU:
        async with open_encoder(half, Metrics()) as encoder:
            assert encoder.spec.fingerprint != fingerprint
            assert cosine(await encoder.embed_text("red"), await encoder.embed_text("rouge")) > 0.99
    else:
        with pytest.raises(Misconfigured, match="CATALENS_ENCODER__PRECISION"):
            async with open_encoder(half, Metrics()):
                pass


async def test_onnx_runtime_refuses_what_it_does_not_compute(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match=r"f32 alone.*CATALENS_ENCODER__PRECISION=f32"):
        async with open_encoder(settings(tmp_path, runtime="onnx", precision="bf16"), Metrics()):
            pass


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_process_imports_the_runtime_that_it_runs_and_no_other(tmp_path: Path, runtime: str) -> None:
    code = f"""
import asyncio, sys
from catalens.encoders import open_encoder
from catalens.settings import EncoderSettings, Settings
from catalens.telemetry import Metrics

async def main():
    encoder = EncoderSettings(lanes=1, runtime={runtime!r})
    settings = Settings(data_dir={str(tmp_path)!r}, model={str(TINY)!r}, encoder=encoder)
    async with open_encoder(settings, Metrics()) as opened:
        await opened.embed_text("red")

asyncio.run(main())
print(*sorted({{"onnx", "onnxruntime", "openvino", "torch", "transformers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1:] == [{"openvino": "openvino", "onnx": "onnxruntime"}[runtime]]


def test_the_runtimes_telemetry_is_neither_asked_nor_fed(tmp_path: Path) -> None:
    code = "import sys, catalens.encoders.openvino; print(sys.modules['openvino_telemetry'])"
    environment = {**os.environ, "HOME": str(tmp_path)}
    environment.pop("CI", None)  # where it is set, the telemetry keeps quiet by itself
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "None"
    assert list(tmp_path.iterdir()) == [], "the telemetry package leaves an identity in the home directory"
