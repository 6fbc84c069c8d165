"""Carries out the Dockerfile without a container engine, starts what comes out, and says how large it is.

    python -m scripts.image_check [--python python3.13] [TARGET…]      # make image-check

Each target's stages are carried out in an empty folder that stands for the container's root: COPY copies, RUN runs in
the shell with /opt and the other folders moved below that root. So the lock files, the install lines and what is
removed afterwards are real. What it is not: the base image and what is taken from it, a read-only root file system,
and another user.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
DOCKERFILE: Final = ROOT / "Dockerfile"
TARGETS: Final = ("ingest", "embedder", "query", "standalone")
"""Those that are checked unless others are named: torch and cuda are gigabytes."""
ABSENT: Final = {
    "ingest": (
        "numpy", "openvino", "onnxruntime", "tokenizers", "torch", "qdrant_client", "qdrant_edge", "typer",
        "catalens_embedder", "catalens_query", "catalens_standalone",
    ),
    "embedder": ("torch", "transformers", "onnxruntime", "qdrant_edge", "typer"),
    "query": ("torch", "transformers", "onnxruntime", "qdrant_edge", "typer"),
    "standalone": ("torch", "transformers", "onnxruntime"),
}  # fmt: skip
"""What an image must not contain."""
PRESENT: Final = {
    "ingest": ("aiokafka", "cramjam", "redis", "obstore", "opentelemetry.sdk"),
    "embedder": ("aiokafka", "cramjam", "redis", "obstore", "opentelemetry.sdk", "qdrant_client", "openvino"),
    "query": ("aiokafka", "cramjam", "redis", "obstore", "opentelemetry.sdk", "qdrant_client", "openvino"),
    "standalone": ("aiokafka", "cramjam", "redis", "obstore", "opentelemetry.sdk", "qdrant_client", "qdrant_edge"),
}
SYSTEM: Final = "base"
"""The stage that deletes most of the system it runs in: never carried out here."""
_MOVED: Final = re.compile(r"(?<![\w./*-])/(?=(?:opt|src|wheels|data|pictures)\b)")


@dataclass
class Stage:
    """One FROM and what follows it."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)
    """Instruction and what stands behind it."""


def stages(text: str) -> dict[str, Stage]:
    """Return the stages of a Dockerfile by name, in their order."""
    found: dict[str, Stage] = {}
    stage: Stage | None = None
    for instruction, value in _instructions(text):
        if instruction == "FROM":
            words = value.split()
            name = words[2] if len(words) == 3 else f"stage-{len(found)}"
            stage = found[name] = Stage(name, words[0])
        elif stage is None:
            sys.exit(f"{instruction} before FROM")
        else:
            stage.steps.append((instruction, value))
    return found


def _instructions(text: str) -> Iterator[tuple[str, str]]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if line.strip():
            instruction, _, value = line.strip().partition(" ")
            yield instruction.upper(), value.strip()


def needed(target: str, all_stages: dict[str, Stage]) -> list[Stage]:
    """Return the stages that `target` is made from, those first that others need; without SYSTEM."""
    order: list[Stage] = []

    def visit(stage: Stage) -> None:
        if stage in order or stage.name == SYSTEM:
            return
        sources = [stage.base, *(match[1] for op, value in stage.steps if (match := re.match(r"--from=(\S+)", value)))]
        for name in sources:
            if name in all_stages:
                visit(all_stages[name])
        order.append(stage)

    visit(all_stages[target])
    return order


def chain(target: str, all_stages: dict[str, Stage]) -> list[tuple[str, str]]:
    """Return the steps of `target` and of the stages that it stands on, which together are the image."""
    stage = all_stages[target]
    below = chain(stage.base, all_stages) if stage.base in all_stages else []
    return [*below, *stage.steps]


def last(steps: list[tuple[str, str]], instruction: str) -> str:
    """Return what the last of those instructions says; empty if there is none."""
    return next((value for op, value in reversed(steps) if op == instruction), "")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        sys.exit(otherwise)


# --- carrying it out ----------------------------------------------------------------------------------------


def build(target: str, root: Path, python: Path) -> None:
    """Carry out COPY and RUN of everything that `target` needs below `root`; raises CalledProcessError."""
    everything = stages(DOCKERFILE.read_text(encoding="utf-8"))
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("CATALENS_", "VIRTUAL_ENV"))},
        "PATH": f"{python.parent}:{os.environ['PATH']}",
    }
    for stage in needed(target, everything):
        for instruction, value in stage.steps:
            if instruction == "COPY":
                _copy(value, root)
            elif instruction == "RUN":
                _require("lean.sh" not in value, f"{stage.name} would delete parts of this machine")
                command = _below(value, root)
                if os.geteuid() != 0:
                    command = f"chown() {{ :; }}; {command}"
                done = subprocess.run(
                    ["sh", "-ec", command], cwd=root, env=environment, capture_output=True, text=True, check=False
                )
                if done.returncode:
                    sys.exit(f"{stage.name}: RUN {value}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")


def _copy(value: str, root: Path) -> None:
    words = [word for word in shlex.split(value) if not word.startswith("--chown")]
    if words[0].startswith("--from="):
        _, source, target = words
        if words[0] == "--from=model":
            (root / target.lstrip("/")).mkdir(parents=True, exist_ok=True)
        else:  # all stages share one root here
            _require(source == target, f"COPY {value}: between stages a path stays what it is")
        return
    *sources, target = words
    for source in sources:
        found = ROOT / source
        goal = root / target.lstrip("/")
        if found.is_dir():
            shutil.copytree(found, goal, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        else:
            goal = goal / found.name if target.endswith("/") else goal
            goal.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(found, goal)


def _below(command: str, root: Path) -> str:
    return _MOVED.sub(f"{root}/", command)


# --- looking at it ------------------------------------------------------------------------------------------


def megabytes(folder: Path) -> float:
    """Return how much the files below `folder` hold, in MB of a million bytes."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink()) / 1e6


@contextmanager
def running(command: list[str], folder: Path, **settings: str) -> Iterator[str]:
    """Start a service as its image would and yield its address once it is ready; SIGTERM must end it well."""
    folder.mkdir()
    environment = {
        "PATH": f"{Path(command[0]).parent}:/usr/bin:/bin",
        "HOME": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
        "CATALENS_DATA_DIR": str(folder / "data"),
        "CATALENS_LOG_FORMAT": "json",
        "CATALENS_HTTP__PORT": "0",
        "CATALENS_ENCODER__LANES": "1",
        **settings,
    }
    output = folder / "log"
    with output.open("wb") as out:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out)
    try:
        yield _address(process, output)
        process.send_signal(signal.SIGTERM)
        if process.wait(60) != 0:
            sys.exit(f"{command[0]} did not end well:\n{output.read_text()[-4000:]}")
    finally:
        process.kill()
        process.wait()


def _address(process: subprocess.Popen[bytes], output: Path) -> str:
    give_up = time.monotonic() + 120
    while time.monotonic() < give_up and process.poll() is None:
        for line in output.read_bytes().splitlines():
            if b'"process.ready"' in line:
                return str(json.loads(line)["url"])
        time.sleep(0.1)
    sys.exit(f"it did not start:\n{output.read_text()[-4000:]}")


def check(target: str, root: Path, folder: Path) -> dict[str, float]:
    """Prove that what was built holds what it must and nothing that it must not, and works; return its sizes."""
    steps = chain(target, stages(DOCKERFILE.read_text(encoding="utf-8")))
    prefix = root / "opt" / "catalens"
    python = str(prefix / "bin" / "python")
    script = (
        "import importlib, importlib.util, sys\n"
        f"for name in {PRESENT[target]!r}: importlib.import_module(name)\n"
        f"found = [name for name in {ABSENT[target]!r} if importlib.util.find_spec(name)]\n"
        "sys.exit(f'it contains {found}' if found else 0)\n"
    )
    subprocess.run([python, "-c", script], check=True, cwd=folder)
    components = json.loads((prefix / "sbom.cdx.json").read_text(encoding="utf-8"))["components"]
    _require("catalens" in {component["name"] for component in components}, "the SBOM leaves Catalens out")
    before = set(prefix.rglob("*"))
    command = [str(prefix / "bin" / json.loads(last(steps, "ENTRYPOINT"))[0]), *json.loads(last(steps, "CMD") or "[]")]
    _use(target, command, python, root, folder)
    _require(set(prefix.rglob("*")) == before, "it writes into the image")
    whole = megabytes(prefix)
    model = megabytes(next(prefix.glob("lib/python*/site-packages/catalens/bundles")))
    return {"packages": whole - model, "starter model": model, "components": len(components)}


def _use(target: str, command: list[str], python: str, root: Path, folder: Path) -> None:
    probe = str(root / "opt" / "probe.py")
    with _index(target, folder) as settings, running(command, folder / target, **settings) as url:
        port = url.rpartition(":")[2]
        for path in ("/livez", "/readyz"):
            subprocess.run([python, probe, path], check=True, env={"CATALENS_HTTP__PORT": port})
        gone = subprocess.run(
            [python, probe, "/nowhere"], check=False, capture_output=True, env={"CATALENS_HTTP__PORT": port}
        )
        _require(gone.returncode == 1, "the probe does not see an error")
        if target in ("query", "standalone"):
            picture = ROOT / "demo" / "images" / "leather-sofa.jpg"
            for body, kind in (
                (b'{"text": "a leather sofa"}', "application/json"),
                (picture.read_bytes(), "image/jpeg"),
            ):
                _embeds(url, body, kind)
        if target == "standalone":  # what docker compose's profile `demo` does
            _imports(url, root / "opt" / "catalens", folder)


def _imports(url: str, prefix: Path, folder: Path) -> None:
    """Have the command line import the demo catalogue that the image carries, and wait until it is searchable."""
    environment = {"HOME": str(folder), "CATALENS_URL": url, "PYTHONDONTWRITEBYTECODE": "1"}
    command = ["bin/catalens", "import", "--wait", "--errors", str(folder / "errors.jsonl"), "demo/catalog.jsonl"]
    done = subprocess.run(command, cwd=prefix, env=environment, capture_output=True, text=True, check=False)
    _require(done.returncode == 0, f"the demo catalogue is not imported: {done.stdout}{done.stderr}")


def _embeds(url: str, body: bytes, kind: str) -> None:
    """Have a text or a picture embedded by the service, so that both towers run."""
    path = "/api/v1/embed"
    if kind == "image/jpeg":
        path, edge = "/api/v1/embed-image", b"edge-of-a-part"
        head = b'Content-Disposition: form-data; name="file"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
        body = b"--" + edge + b"\r\n" + head + body + b"\r\n--" + edge + b"--\r\n"
        kind = f"multipart/form-data; boundary={edge.decode()}"
    request = urllib.request.Request(url + path, body, {"Content-Type": kind})  # noqa: S310  # the address is ours
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310  # as above
        _require(len(json.load(answer)["embedding"]) > 1, "there is no vector")


@contextmanager
def _index(target: str, folder: Path) -> Iterator[dict[str, str]]:
    """Yield the settings of a vector index: the images of the services contain none."""
    if target not in ("embedder", "query"):
        yield {}
        return
    from tests.qdrant_server import QdrantServer  # noqa: PLC0415  # of the development environment

    server = QdrantServer(folder / f"{target}-qdrant")
    server.start()
    try:
        yield {"CATALENS_QDRANT__URL": server.url, "CATALENS_QDRANT__GRPC_PORT": str(server.grpc_port)}
    finally:
        server.kill()


def main() -> None:
    """Check the targets that are named, and print a table of sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    version = re.search(r"python:(\d+\.\d+)", DOCKERFILE.read_text(encoding="utf-8"))
    if version is None:
        sys.exit("the base image of the Dockerfile is no python:X.Y…")
    parser.add_argument("targets", nargs="*", default=TARGETS, metavar="TARGET", help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--python", default=f"python{version[1]}", help="of the base image's version")
    arguments = parser.parse_args()
    asked = "import sys; print(sys.executable, '%d.%d' % sys.version_info[:2])"
    told = {**os.environ, "PYENV_VERSION": version[1]}  # whose shims answer for one version only
    try:
        said = subprocess.run(
            [arguments.python, "-c", asked], env=told, capture_output=True, text=True, check=True
        ).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(
            f"image-check needs Python {version[1]}, the one of the images: install it or name it by --python ({error})"
        )
    if said[1] != version[1]:
        sys.exit(f"{arguments.python} is Python {said[1]}, the images have {version[1]}")
    print(f"{'image':12} {'packages':>10} {'starter model':>14}   (MB, without the base image)")
    for target in arguments.targets:
        with tempfile.TemporaryDirectory(prefix="image-") as name:
            root = Path(name) / "root"
            root.mkdir()
            build(target, root, Path(said[0]))
            sizes = check(target, root, Path(name))
        figures = f"{sizes['packages']:10.0f} {sizes['starter model']:14.0f}"
        print(f"{target:12} {figures}   {sizes['components']:.0f} packages", flush=True)


if __name__ == "__main__":
    main()
