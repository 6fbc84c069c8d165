"""Times ways of running the model on this machine, each in a process of its own, and finds the best."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from catalens.encoders import cores
from catalens.encoders.bundle import MANIFEST, Bundle, read_manifest
from catalens.encoders.choice import Choice, Machine, RuntimeName, choose
from catalens.errors import InvalidPicture, Misconfigured
from catalens.pictures import check_picture
from catalens.settings import EncoderSettings, PictureSettings

PICTURES: Final = 64  # that go round and round
SECONDS: Final = 3.0  # of bulk work in each trial
LIMIT: Final = 300.0  # seconds for one trial, compiling included
_AS_GOOD: Final = 0.97  # of the best rate: closer than two runs of the same thing are
_IN_THE_RUNNING: Final = 0.75  # of the best rate: what a runtime must reach for its batches to be tried as well
_LANES_OF_A_GPU: Final = (1, 2, 4)
_INFERENCE_BATCHES: Final = (4, 8, 16)
_MAX_BATCHES: Final = (8, 32)
_MAX_BATCHES_OF_A_GPU: Final = (32, 64, 128)


@dataclass(frozen=True, slots=True)
class Way:
    """One way of running a model."""

    runtime: RuntimeName
    device: str
    precision: str
    lanes: int
    max_batch: int = 16
    inference_batch: int = 0

    def variables(self) -> dict[str, str]:
        """Return the settings that make it so, but for the precision, which changes the vectors."""
        return {
            "CATALENS_ENCODER__RUNTIME": self.runtime,
            "CATALENS_ENCODER__DEVICE": self.device,
            "CATALENS_ENCODER__LANES": str(self.lanes),
            "CATALENS_ENCODER__MAX_BATCH": str(self.max_batch),
            "CATALENS_ENCODER__INFERENCE_BATCH": str(self.inference_batch),
        }


@dataclass(frozen=True, slots=True)
class Figures:
    """What one trial measured; None where there is no such tower."""

    pictures_per_second: float | None
    picture_ms: float | None
    text_ms: float | None
    memory_mib: float
    start_seconds: float


@dataclass(frozen=True, slots=True)
class Trial:
    """A way and its figures, or why it has none."""

    way: Way
    figures: Figures | None
    error: str = ""


Run = Callable[[Way], Trial]


def search(ways: Iterable[Way], run: Run) -> list[Trial]:
    """Try `ways`, then the best of each runtime with other lanes and batches; return all trials in their order.

    One thing is changed at a time, and a runtime that is far behind is left there: runtimes differ more than batches.
    """
    trials = [run(way) for way in ways]
    for variants in (_lanes, _inference_batches, _max_batches):
        for leader in _leaders(trials):
            trials += [run(way) for way in variants(leader.way) if all(trial.way != way for trial in trials)]
    return trials


def _leaders(trials: Sequence[Trial]) -> list[Trial]:
    """Return the best trial of each runtime that is not far behind the best of all."""
    places = dict.fromkeys((trial.way.runtime, trial.way.device) for trial in trials)
    firsts = [best([trial for trial in trials if (trial.way.runtime, trial.way.device) == place]) for place in places]
    ran = [(first, _rate(first.figures)) for first in firsts if first is not None and first.figures is not None]
    most = max((rate for _, rate in ran), default=0.0)
    return [first for first, rate in ran if rate >= _IN_THE_RUNNING * most]


def _rate(figures: Figures) -> float:
    """Return what counts most of a trial, more being better."""
    return figures.pictures_per_second or 1000 / (figures.text_ms or float("inf"))


def _lanes(way: Way) -> list[Way]:
    values = _LANES_OF_A_GPU if way.device == "cuda" else [(way.lanes + 1) // 2]
    return [replace(way, lanes=value) for value in values]


def _inference_batches(way: Way) -> list[Way]:
    if way.device == "cuda":
        return []  # whatever comes at once goes in at once
    return [replace(way, inference_batch=value) for value in _INFERENCE_BATCHES]


def _max_batches(way: Way) -> list[Way]:
    values = _MAX_BATCHES_OF_A_GPU if way.device == "cuda" else _MAX_BATCHES
    return [replace(way, max_batch=value) for value in values if value >= way.inference_batch]


def best(trials: Sequence[Trial]) -> Trial | None:
    """Return the trial with the most pictures a second; of those that are about as good, the one of least memory.

    Without an image tower: the one with the quickest text. None if nothing ran.
    """
    ran = [(trial, trial.figures) for trial in trials if trial.figures is not None]
    if not ran:
        return None
    most = max(_rate(figures) for _, figures in ran)
    close = [(trial, figures) for trial, figures in ran if _rate(figures) >= _AS_GOOD * most]
    return min(close, key=lambda pair: pair[1].memory_mib)[0]


def ways(bundle: Bundle, settings: EncoderSettings, machine: Machine, processors: int | None = None) -> list[Way]:
    """Return what to begin with: every runtime that can run the bundle here, whichever is set.

    Raises Misconfigured with what hinders each if none can.
    """
    count = processors or cores()
    found = []
    hindered = []
    for runtime in sorted(machine.installed):
        for device in ("cuda", "cpu"):
            wanted = settings.model_copy(update={"runtime": runtime, "device": device})
            if settings.device not in ("auto", device) or (device == "cuda" and not machine.gpu):
                continue
            try:
                choice: Choice = choose(wanted, bundle, machine)
            except Misconfigured as error:
                hindered.append(str(error))
                continue
            lanes = _LANES_OF_A_GPU[0] if choice.device == "cuda" else count
            found.append(Way(choice.runtime, choice.device, settings.precision, lanes))
    if not found:
        raise Misconfigured("; ".join(hindered) or "no runtime is installed: install catalens[encoder]")
    return found


def int8_of(bundle: Bundle, models: Path) -> Path | None:
    """Return the folder of an int8 bundle that was made from `bundle`, if there is one under `models`."""
    fingerprint = bundle.spec("f32").fingerprint
    for manifest in sorted(models.glob(f"[!.]*/{MANIFEST}")):
        try:
            made = read_manifest(manifest.parent).quantization
        except Misconfigured:
            continue  # it is `model list` that says so
        if made is not None and made.source == fingerprint:
            return manifest.parent
    return None


class Bench:
    """Runs trials of the bundle in `model` with the pictures in `pictures`; raises nothing for one that fails."""

    def __init__(self, model: Path, pictures: Path, seconds: float, *, limit: float = LIMIT) -> None:
        self._model = model
        self._pictures = pictures
        self._seconds = seconds
        self._limit = limit

    def __call__(self, way: Way, *, warm: bool = False) -> Trial:
        """Return what `way` gives, in a fresh process; warm: with what an earlier start has compiled. Blocking."""
        # Beside the installation's own cache, which must not fill with what is tried once.
        with tempfile.TemporaryDirectory(prefix="catalens-bench-") as scratch:
            trial = self._run(way, Path(scratch))
            return self._run(way, Path(scratch)) if warm and trial.figures is not None else trial

    def _run(self, way: Way, scratch: Path) -> Trial:
        environment = (
            os.environ
            | way.variables()
            | {
                "CATALENS_ENCODER__PRECISION": way.precision,
                "CATALENS_MODEL": str(self._model.resolve()),
                "CATALENS_DATA_DIR": str(scratch),
            }
        )
        command = [sys.executable, "-m", "catalens_standalone.trial", str(self._pictures), str(self._seconds)]
        try:
            done = subprocess.run(  # noqa: S603  # this very program
                command, env=environment, capture_output=True, text=True, timeout=self._limit, check=False
            )
        except subprocess.TimeoutExpired:
            return Trial(way, None, f"not done after {self._limit:g} seconds")
        return Trial(way, *_read(done.stdout, done.stderr, done.returncode))


def _read(output: str, errors: str, code: int) -> tuple[Figures | None, str]:
    """Return the figures in a trial's output, or what went wrong."""
    try:
        answer = json.loads(output.splitlines()[-1])
        return (None, str(answer["error"])) if "error" in answer else (Figures(**answer), "")
    except (IndexError, ValueError, TypeError):
        said = errors.strip().splitlines()
        return None, said[-1] if said else f"the process ended with {code}"


def put_pictures(files: Sequence[Path], limits: PictureSettings, folder: Path) -> int:
    """Copy the first pictures among `files` that can be read into `folder`; return how many. Raises Misconfigured."""
    count = 0
    for data in _good(files, limits):
        (folder / f"{count:03}").write_bytes(data)
        count += 1
        if count == PICTURES:
            break
    if not count:
        raise Misconfigured("none of the files given is a picture that can be read")
    return count


def _good(files: Sequence[Path], limits: PictureSettings) -> Iterator[bytes]:
    for path in files:
        data = path.read_bytes()
        try:
            check_picture(data, limits)
        except InvalidPicture:
            continue
        yield data


def shadowed(values: Mapping[str, str], environ: Mapping[str, str]) -> list[str]:
    """Return the variables among `values` that the environment sets, so that `.env` says nothing."""
    return [name for name in values if environ.get(name)]
