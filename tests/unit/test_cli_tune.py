"""`catalens model quantize` and `bench` of a tiny model: the choice, .env, the gate, and trials in processes."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog
from rich.console import Console
from tests import pictures
from tests.models import TINY
from typer.testing import CliRunner, Result

from catalens.encoders import open_encoder
from catalens.encoders.bundle import load_bundle
from catalens.encoders.choice import Machine, RuntimeName
from catalens.errors import CatalensError, Misconfigured
from catalens.settings import EncoderSettings, PictureSettings, Settings
from catalens.telemetry import Metrics
from catalens_standalone import cli_tune, tuning
from catalens_standalone.cli import app
from catalens_standalone.env_file import set_variables
from catalens_standalone.tuning import Bench, Figures, Run, Trial, Way, best, int8_of, put_pictures, search, ways


@pytest.fixture(autouse=True)
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    handlers = list(logging.getLogger().handlers)
    for name in [name for name in os.environ if name.startswith("CATALENS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CATALENS_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.chdir(tmp_path)  # no .env of the developer's
    yield tmp_path / "data" / "models"
    # The commands send the log to a stderr that ends with each of them.
    structlog.reset_defaults()
    logging.getLogger().handlers[:] = handlers


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["model", *arguments], catch_exceptions=False)


def way(runtime: RuntimeName = "openvino", lanes: int = 2, **others: int) -> Way:
    return Way(runtime, "cpu", "f32", lanes, **others)


def trial(rate: float | None, memory: float = 500, text: float | None = 5) -> Trial:
    return Trial(way(), Figures(rate, 30, text, memory, 1))


def as_if(rate: Callable[[Way], float]) -> Run:
    """Return trials that give what `rate` says, below nothing: a way that does not run."""

    def run_one(tried: Way) -> Trial:
        figure = rate(tried)
        return Trial(tried, Figures(figure, 30, 5, 500, 1)) if figure > 0 else Trial(tried, None, "it does not run")

    return run_one


# --- .env -------------------------------------------------------------------------------------------------


def test_the_rest_of_the_file_stays_to_the_byte(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    kept = '# a note\nCATALENS_API_KEY=secret\n\n#CATALENS_ENCODER__LANES=0\nMULTI="one\nCATALENS_ENCODER__LANES=3"\n'
    path.write_bytes((kept + "export catalens_encoder__lanes=7 # old\r\nLAST=1").encode())
    path.chmod(0o640)
    set_variables(path, {"CATALENS_ENCODER__LANES": "2", "CATALENS_ENCODER__RUNTIME": "onnx"})
    changed = "CATALENS_ENCODER__LANES=2\nLAST=1\nCATALENS_ENCODER__RUNTIME=onnx\n"
    assert path.read_bytes().decode() == kept + changed
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [one.name for one in tmp_path.iterdir()] == [".env"]


def test_a_variable_that_stands_twice_is_left_once(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text("A=1\nB=2\n\nA=3\n")
    set_variables(path, {"A": "9"})
    assert path.read_text() == "A=9\nB=2\n"


def test_a_missing_file_is_made_and_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    set_variables(tmp_path / "link", {"A": "1"})
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "A=1\n"


def test_what_cannot_be_written_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_bytes(b"A=\xff\n")
    with pytest.raises(CatalensError, match="cannot be changed"):
        set_variables(path, {"A": "1"})
    assert path.read_bytes() == b"A=\xff\n"
    with pytest.raises(CatalensError, match="cannot be changed"):
        set_variables(tmp_path / "nowhere" / ".env", {"A": "1"})


# --- the choice -------------------------------------------------------------------------------------------


def test_the_most_pictures_win_and_of_equals_the_smallest() -> None:
    assert best([trial(30), trial(40), trial(35)]) == trial(40)
    small = trial(39.5, memory=300)
    assert best([trial(40), small]) == small  # closer than two runs of the same thing are
    assert best([trial(40), trial(30, memory=100)]) == trial(40)


def test_without_an_image_tower_the_quickest_text_wins() -> None:
    assert best([trial(None, text=9), trial(None, text=4)]) == trial(None, text=4)


def test_what_did_not_run_is_never_best() -> None:
    assert best([Trial(way(), None, "no"), trial(1)]) == trial(1)
    assert best([Trial(way(), None, "no")]) is None


def test_the_search_changes_one_thing_at_a_time_and_finds_the_best_batches() -> None:
    def rate(tried: Way) -> float:
        return 20 + tried.lanes + (tried.inference_batch == 8) * 5 + (tried.max_batch == 32) * 3

    trials = search([way()], as_if(rate))
    found = best(trials)
    assert found is not None
    assert found.way == way(inference_batch=8, max_batch=32)
    assert len({one.way for one in trials}) == len(trials) < 10


def test_a_runtime_that_leads_only_with_other_batches_is_found() -> None:
    def rate(tried: Way) -> float:
        return {"onnx": 30.0, "openvino": 25.0, "torch": 5.0}[tried.runtime] * (1 + (tried.inference_batch == 16))

    trials = search([way("onnx"), way("openvino"), way("torch")], as_if(rate))
    assert {one.way.runtime for one in trials if one.way.inference_batch} == {"onnx", "openvino"}
    assert sum(one.way.runtime == "torch" for one in trials) == 1  # so far behind that it is left there


def test_a_search_in_which_nothing_runs_ends() -> None:
    trials = search([way("onnx"), way("torch")], as_if(lambda _: 0))
    assert [one.error for one in trials] == ["it does not run"] * 2


def test_only_what_can_run_the_bundle_is_tried() -> None:
    machine = Machine(False, frozenset({"openvino", "onnx", "torch"}), frozenset())
    found = ways(load_bundle(TINY), EncoderSettings(), machine, 4)  # tiny holds no weights for torch
    assert found == [Way("onnx", "cpu", "f32", 4), Way("openvino", "cpu", "f32", 4)]
    bf16 = ways(load_bundle(TINY), EncoderSettings(precision="bf16"), machine, 4)
    assert bf16 == [Way("openvino", "cpu", "bf16", 4)]
    with pytest.raises(Misconfigured, match="torch"):
        ways(load_bundle(TINY), EncoderSettings(runtime="torch"), Machine(False, frozenset({"torch"}), frozenset()), 4)


# --- trials -----------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of five pictures, and a file that is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.jpg").write_bytes(pictures.jpeg(pictures.scene(40 + number, 30)))
    (folder / "0.txt").write_bytes(b"no picture")
    return folder


def test_pictures_that_cannot_be_read_are_left_out(tmp_path: Path, photos: Path) -> None:
    folder = tmp_path / "chosen"
    folder.mkdir()
    assert put_pictures(sorted(photos.iterdir()), PictureSettings(), folder) == 5
    with pytest.raises(Misconfigured, match="none of the files"):
        put_pictures([photos / "0.txt"], PictureSettings(), folder)


def test_a_trial_is_timed_in_a_process_of_its_own(tmp_path: Path, photos: Path) -> None:
    (photos / "0.txt").unlink()
    done = Bench(TINY, photos, 0.05)(way(lanes=1, max_batch=2))
    assert done.error == ""
    assert done.figures is not None
    assert done.figures.memory_mib > 10
    assert min(done.figures.pictures_per_second or 0, done.figures.picture_ms or 0, done.figures.text_ms or 0) > 0
    assert not (tmp_path / "data").exists()  # nothing of it stays in the installation


def test_a_trial_that_fails_or_does_not_end_says_so(tmp_path: Path, photos: Path) -> None:
    broken = Path(shutil.copytree(TINY, tmp_path / "broken"))
    (broken / "text.onnx").unlink()
    assert "text.onnx cannot be read" in Bench(broken, photos, 0.05)(way()).error
    assert "not done after" in Bench(TINY, photos, 0.05, limit=0.01)(way()).error


def test_the_bench_writes_the_best_into_env(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "SECONDS", 0.02)
    monkeypatch.setattr(tuning, "_INFERENCE_BATCHES", ())
    monkeypatch.setattr(tuning, "_MAX_BATCHES", (8,))
    env = tmp_path / ".env"
    env.write_text(f"# mine\nCATALENS_MODEL={TINY}\nCATALENS_ENCODER__RUNTIME=torch\n")  # from a machine that had it
    monkeypatch.setenv("CATALENS_ENCODER__QUEUE", "64")
    said = run("bench", "--images", str(photos)).output
    written = env.read_text().splitlines()
    assert written[:2] == ["# mine", f"CATALENS_MODEL={TINY}"]
    assert re.fullmatch("CATALENS_ENCODER__RUNTIME=(openvino|onnx)", written[2])
    assert [line.split("=")[0] for line in written[3:]] == [
        "CATALENS_ENCODER__DEVICE", "CATALENS_ENCODER__LANES", "CATALENS_ENCODER__MAX_BATCH",
        "CATALENS_ENCODER__INFERENCE_BATCH",
    ]  # fmt: skip
    assert all(line in said for line in written[2:])
    assert len(re.findall("^ *best ", said, re.MULTILINE)) == 1
    assert "bf16: " in said
    assert "int8: `catalens model quantize" in said


@pytest.mark.parametrize(("model", "dry_run"), [(str(TINY), True), ("starter", False)])
def test_nothing_is_written_in_a_dry_run_or_for_a_model_that_is_not_served(
    tmp_path: Path, model: str, dry_run: bool
) -> None:
    console = Console(file=io.StringIO(), width=200)
    settings = Settings(data_dir=tmp_path, model=model)
    cli_tune._write(console, settings, load_bundle(TINY), way(), dry_run=dry_run)
    assert not (tmp_path / ".env").exists()


def test_what_a_changed_precision_costs_and_what_the_environment_hides_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CATALENS_ENCODER__LANES", "1")
    file = io.StringIO()
    bf16 = Way("openvino", "cpu", "bf16", 2)
    settings = Settings(data_dir=tmp_path, model=str(TINY))
    cli_tune._write(Console(file=file, width=200), settings, load_bundle(TINY), bf16, dry_run=False)
    assert "CATALENS_ENCODER__PRECISION=bf16" in (tmp_path / ".env").read_text()
    assert "`catalens reindex`" in file.getvalue()
    assert "CATALENS_ENCODER__LANES is set in the environment" in file.getvalue()


# --- the gate ---------------------------------------------------------------------------------------------


def unmeasured(folder: Path, **quantization: object) -> Path:
    bundle = Path(shutil.copytree(TINY, folder))
    manifest = json.loads((bundle / "bundle.json").read_text())
    made = {"method": "x", "source": load_bundle(TINY).spec("f32").fingerprint, "calibration": 1, "loss": None}
    manifest |= {"precision": "int8", "quantization": made | quantization}
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    return bundle


async def test_a_model_whose_loss_nobody_measured_is_not_served(installation: Path, tmp_path: Path) -> None:
    bundle = unmeasured(installation / "small")
    settings = Settings(data_dir=tmp_path / "data", model=str(bundle), encoder=EncoderSettings(lanes=1))
    with pytest.raises(Misconfigured, match="`catalens model quantize"):
        async with open_encoder(settings, Metrics()):
            pass
    told = settings.model_copy(update={"encoder": EncoderSettings(lanes=1, allow_unmeasured=True)})
    async with open_encoder(told, Metrics()) as encoder:
        await encoder.embed_text("red")


async def test_a_model_whose_loss_was_measured_is_served(installation: Path, tmp_path: Path) -> None:
    close = {"cosine_mean": 1, "cosine_min": 1, "centred_mean": 1, "centred_min": 1}
    loss = {"pictures": 30, "texts": 0, "precision": "f32", "image": close, "text": None, "overlap_at_10": 1}
    bundle = unmeasured(installation / "small", loss=loss)
    settings = Settings(data_dir=tmp_path / "data", model=str(bundle), encoder=EncoderSettings(lanes=1))
    async with open_encoder(settings, Metrics()) as encoder:
        await encoder.embed_text("red")


def test_the_int8_model_of_a_model_is_found(installation: Path) -> None:
    assert int8_of(load_bundle(TINY), installation) is None
    unmeasured(installation / "other", source="another model")
    small = unmeasured(installation / "small")
    (installation / "broken").mkdir()
    (installation / "broken" / "bundle.json").write_text("no manifest")
    assert int8_of(load_bundle(TINY), installation) == small
