"""Who is compared in the encoder benchmark, at which settings, each in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TextIO

from benchmarks import encoder_data as data
from benchmarks.peers.environments import python
from benchmarks.report import ROOT

DATA: Final = data.CACHE / "data"  # the data folder of every Catalens process: its cache of compiled models is warm
LOGS: Final = data.CACHE / "logs"


@dataclass(frozen=True, slots=True)
class Contender:
    """A library at one setting; `module` is what runs it, under benchmarks/peers."""

    name: str
    module: str
    precision: str
    environment: str
    setting: Mapping[str, Any]
    kind: str = "peer"
    """peer, catalens, or hand: lanes written by hand over a peer's model, for information."""
    env: Mapping[str, str] = field(default_factory=dict)


def catalens(runtime: str, precision: str, **more: object) -> Contender:
    """Return Catalens in one runtime, from the fp32 bundle or, for int8, from the quantised one."""
    int8 = precision == "int8"
    computed = "bf16" if int8 else precision
    folder = data.INT8 if int8 else data.BUNDLE
    setting = {"model": str(folder), "data": str(DATA), "runtime": runtime, "precision": computed, **more}
    if int8:
        setting["allow_unmeasured"] = True
    names = {"openvino": "OpenVINO", "onnx": "ONNX Runtime", "torch": "torch"}
    return Contender(f"Catalens {names[runtime]} {precision}", "ours", precision, "project", setting, kind="catalens")


def _peer(name: str, module: str, precision: str, environment: str, **setting: object) -> Contender:
    return Contender(name, module, precision, environment, {"model": str(data.CHECKPOINT), **setting})


_HAND: Final = {"model": str(data.CHECKPOINT), "lanes": 2, "threads": 1}

OURS: Final = (
    catalens("openvino", "bf16"),
    catalens("openvino", "int8"),
    catalens("openvino", "f32"),
    catalens("onnx", "f32"),
    catalens("torch", "f32"),
    catalens("torch", "bf16"),
)
# The settings are the best that `--only tune` found here.
PEERS: Final = (
    _peer("transformers fp32", "hf", "f32", "project", workers=1),
    _peer("transformers bf16", "hf", "bf16", "project", dtype="bfloat16"),
    _peer("sentence-transformers fp32", "sentence", "f32", "sentence"),
    _peer("sentence-transformers bf16", "sentence", "bf16", "sentence", dtype="bfloat16", decode="torchvision"),
    _peer("infinity-emb fp32", "infinity", "f32", "infinity"),
    Contender("fastembed fp32", "fast_embed", "f32", "fastembed", {"model": str(data.FASTEMBED)}),
    Contender("faster-clip int8 weights", "faster", "f32", "sentence", {"model": str(data.FASTER)}),
)
BY_HAND: Final = (
    Contender("lanes by hand over transformers fp32", "hf", "f32", "project", _HAND, kind="hand"),
    Contender(
        "lanes by hand over transformers bf16", "hf", "bf16", "project", {**_HAND, "dtype": "bfloat16"}, kind="hand"
    ),
)

# What `--only tune` tries for each peer, beyond what it has above.
TUNE: Final[Mapping[str, tuple[Mapping[str, Any], ...]]] = {
    "hf": (
        {"batch": 8}, {"batch": 32}, {"workers": 0}, {"workers": 1}, {"workers": 2, "threads": 1},
        {"decode": "pil", "processor": "pil"}, {"decode": "pil", "processor": "pil", "workers": 1}, {"threads": 1},
    ),
    "sentence": (
        {"batch": 8}, {"batch": 32}, {"decode": "pil"}, {"decode": "torchvision"}, {"threads": 1},
        {"processes": 2, "threads": 1}, {"processes": 2, "threads": 1, "decode": "torchvision"},
    ),
    "infinity": ({"batch": 8}, {"batch": 32}, {"dtype": "bfloat16"}, {"dtype": "int8"}),
    "fast_embed": ({"batch": 1}, {"batch": 8}, {"batch": 32}, {"batch": 8, "parallel": 2}, {"threads": 1}),
    "faster": ({"batch": 1}, {"lanes": 2, "batch": 8}),
}  # fmt: skip


class Failed(Exception):
    """A contender that cannot do what is asked, with its own words."""


class Running:
    """A contender's process; it waits between commands."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        LOGS.mkdir(parents=True, exist_ok=True)
        log = (LOGS / f"{contender.name.replace(' ', '-')}.log").open("w", encoding="utf-8")
        command = [str(python(contender.environment)), "-m", f"benchmarks.peers.{contender.module}"]
        quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        with log:
            self._process = subprocess.Popen(
                [*command, json.dumps(dict(contender.setting))],
                cwd=ROOT,
                env={**os.environ, **quiet, **contender.env},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # a group of its own, with the processes that it may start
            )
        try:
            self.load_seconds: float = self._answer()["seconds"]
        except Failed:
            self.end()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def ask(self, do: str, **what: object) -> dict[str, Any]:
        """Send a command and return the answer. Raises Failed."""
        asked = _pipe(self._process.stdin)
        try:
            asked.write(json.dumps({"do": do, **what}) + "\n")
            asked.flush()
        except BrokenPipeError as error:
            raise Failed(f"{self.contender.name} has ended") from error
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = _pipe(self._process.stdout).readline()
        if not line:
            name = self.contender.name.replace(" ", "-")
            lines = (LOGS / f"{name}.log").read_text(encoding="utf-8").strip().splitlines()
            raise Failed(lines[-1][-300:] if lines else "ended without a word")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def images(self, side: int, start: int, count: int) -> float:
        """Return images/s of a bulk of so many."""
        answer = self.ask("images", folder=_folder(side), **{"from": start}, count=count)
        return _rate(answer, count)

    def texts(self, texts: list[str], start: int, count: int) -> float:
        """Return texts/s of a bulk of so many."""
        return _rate(self.ask("texts", texts=texts, **{"from": start}, count=count), count)

    def queries(self, kind: str, texts: list[str], start: int, count: int, side: int = 800) -> list[float]:
        """Return how long each of so many queries took, one after the other, in milliseconds."""
        given = {"texts": texts} if kind == "text" else {"folder": _folder(side)}
        return [took * 1000 for took in self.ask(kind, **given, **{"from": start}, count=count)["took"]]

    def vectors(self, texts: list[str], count: int) -> dict[str, list[str]]:
        """Return the vectors of the first pictures and texts, each as base64 of its float32."""
        return self.ask("vectors", folder=_folder(800), texts=texts, count=count)

    def spent(self) -> float:
        """Return the seconds of all cores that its processes have taken so far."""
        return sum(took for group, took in _processes() if group == self._process.pid)

    def end(self) -> None:
        """End the process, which holds nothing worth waiting for."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def start_all(contenders: tuple[Contender, ...], said: Callable[[str], None]) -> list[Running]:
    """Start them one after the other; what cannot start is told and left out."""
    running: list[Running] = []
    for contender in contenders:
        try:
            running.append(Running(contender))
        except Failed as error:
            said(f"{contender.name} does not start: {error}")
    return running


def machine_spent() -> float:
    """Return the seconds of all cores that were not idle since the machine started, those a host took included."""
    user, nice, system, _, _, *rest = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    return sum(int(ticks) for ticks in (user, nice, system, *rest[:3])) / os.sysconf("SC_CLK_TCK")


def _processes() -> Iterator[tuple[int, float]]:
    """Yield each process' group and the seconds that it and its ended children took."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            yield int(fields[2]), sum(int(ticks) for ticks in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def _folder(side: int) -> str:
    return str(Path(data.CACHE) / "pictures" / str(side))


def _rate(answer: Mapping[str, Any], count: int) -> float:
    if answer["done"] != count:
        raise Failed(f"gave {answer['done']} vectors for {count}")
    return count / float(answer["seconds"])


def _pipe(pipe: Any) -> TextIO:
    assert pipe is not None
    found: TextIO = pipe
    return found
