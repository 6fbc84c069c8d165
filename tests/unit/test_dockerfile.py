"""The Dockerfile keeps its promises: pinned, without a compiler, not as root; what it copies exists."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from scripts.image_check import PRESENT, ROOT, SYSTEM, Stage, chain, last, needed, stages
from scripts.image_digests import FILES, foreign, pinned
from tests.missing import missing

from catalens_standalone.doctor import variables

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
STAGES = stages(TEXT)
IMAGES = ("ingest", "embedder", "query", "standalone", "torch", "cuda")
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]


def steps(name: str, instruction: str) -> list[str]:
    """Return what all those instructions of one stage say."""
    return [value for op, value in STAGES[name].steps if op == instruction]


def test_it_has_the_images_that_are_documented() -> None:
    assert set(IMAGES) <= set(STAGES)
    made = list(STAGES.values())[-1]
    assert (made.base, made.steps) == ("standalone", []), "what a plain docker build makes"
    assert set(PRESENT) <= set(IMAGES)


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if hadolint is None:
        missing("there is no hadolint: make dev installs it")
    done = subprocess.run([hadolint, "--no-color", "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_base_is_pinned_by_a_version() -> None:
    for stage in STAGES.values():
        if stage.base not in STAGES and stage.base != "scratch":
            assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+(@sha256:[0-9a-f]{64})?", stage.base), stage.base


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_runs_as_a_number_and_can_be_asked_how_it_is(image: str) -> None:
    all_steps = chain(image, STAGES)
    assert last(all_steps, "USER") == "10001:10001"
    assert last(all_steps, "HEALTHCHECK").endswith('CMD ["python", "/opt/probe.py", "/livez"]')
    assert last(all_steps, "VOLUME") == "/data"
    assert "org.opencontainers.image.version" in last(all_steps, "LABEL")
    assert any("PYTHONDONTWRITEBYTECODE=1" in value for op, value in all_steps if op == "ENV")
    assert json.loads(last(all_steps, "ENTRYPOINT"))[0] in SCRIPTS


@pytest.mark.parametrize("image", IMAGES)
def test_nothing_is_installed_in_an_image_itself(image: str) -> None:
    """Packages, pip's caches and whatever builds them stay in stages of which only the environment is copied."""
    for op, value in chain(image, STAGES):
        if op == "RUN":
            assert not re.search(r"\b(pip|apt-get|apk|curl|wget)\b", value), value
        if op == "COPY" and (copied := re.match(r"--from=(\S+) (\S+)", value)):
            assert copied[1] in ("model", SYSTEM) or copied[2] == "/opt/catalens", value


def test_the_system_is_made_lean_in_a_stage_that_is_never_carried_out_here() -> None:
    assert steps(SYSTEM, "RUN") == ["sh /opt/lean.sh"]
    for image in IMAGES:
        order = needed(image, STAGES)
        assert order
        assert not [stage.name for stage in order if any("lean.sh" in value for _, value in stage.steps)]
        assert STAGES["runtime"].base == "scratch"


def test_what_makes_the_system_lean_does_nothing_elsewhere(tmp_path: Path) -> None:
    """Run where it finds no command: it ends before the first."""
    done = subprocess.run(
        ["/bin/sh", str(ROOT / "deploy" / "images" / "lean.sh")],
        cwd=tmp_path,
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "lean.sh is for an image of Python that is being built\n")


def test_what_the_images_need_of_the_system_is_not_removed() -> None:
    script = (ROOT / "deploy" / "images" / "lean.sh").read_text(encoding="utf-8")
    removed = set(
        re.sub(
            r"\\\n|dpkg --purge --force-all", " ", "\n".join(re.findall(r"dpkg --purge (?:.*\\\n)*.*", script))
        ).split()
    )
    assert {"apt", "coreutils", "dpkg", "perl-base"} <= removed
    assert not removed & {
        "ca-certificates",
        "dash",
        "libc6",
        "libffi8",
        "libgcc-s1",
        "libsqlite3-0",
        "libssl3t64",
        "libstdc++6",
        "netbase",
        "openssl",  # the links by which libssl finds the certificates are in this package
        "tzdata",
        "zlib1g",
    }


def test_everything_installed_is_locked_and_nothing_is_compiled() -> None:
    installs = [
        line
        for stage in STAGES.values()
        for op, value in stage.steps
        if op == "RUN"
        for line in value.split("&&")
        if " install " in line
    ]
    assert installs
    for line in installs:
        if "/wheels/" in line:
            assert "--no-deps" in line
        else:
            assert "--only-binary :all: --require-hashes -r /src/requirements/" in line, line


def test_the_lock_files_hold_no_runtime_that_an_image_must_not_have() -> None:
    def locked(name: str) -> set[str]:
        text = (ROOT / "requirements" / f"image-{name}.txt").read_text(encoding="utf-8")
        assert "--hash=sha256:" in text
        return set(re.findall(r"^([a-z0-9][a-z0-9._-]*)==", text, re.MULTILINE))

    runtimes = {"numpy", "openvino", "onnxruntime", "tokenizers", "torch", "transformers", "qdrant-client"}
    assert not locked("ingest") & runtimes
    assert not locked("encoder") & {"onnxruntime", "torch", "transformers", "qdrant-edge-py", "pytest"}
    assert {"openvino", "tokenizers", "aiokafka", "qdrant-client", "redis", "obstore"} <= locked("encoder")
    assert {"typer", "qdrant-edge-py", "aiokafka"} <= locked("standalone")
    assert {"torch", "transformers", "typer"} <= locked("torch")


def test_the_images_have_the_versions_that_are_tested() -> None:
    def pins(path: Path) -> dict[str, str]:
        return dict(re.findall(r"^([a-z0-9][a-z0-9._-]*)==(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE))

    tested = pins(ROOT / "requirements" / "torch.txt")
    for name in ("ingest", "encoder", "standalone", "torch"):
        for package, version in pins(ROOT / "requirements" / f"image-{name}.txt").items():
            assert tested.get(package) == version, f"image-{name}.txt has {package} {version}: run make lock"


def test_every_file_that_is_copied_exists_and_passes_the_dockerignore() -> None:
    allowed = [
        line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")
    ]
    for stage in STAGES.values():
        for value in [value for op, value in stage.steps if op == "COPY" and not value.startswith("--from=")]:
            for source in value.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert any(fnmatch.fnmatch(source, f"{entry}*") for entry in allowed), f".dockerignore hides {source}"


def test_every_variable_is_a_setting() -> None:
    names = set(re.findall(r"\b(CATALENS_\w+)=", "\n".join(value for s in STAGES.values() for _, value in s.steps)))
    assert names
    assert names <= {variable.name for variable in variables()}


def test_stages_are_ordered_by_who_needs_whom() -> None:
    order = [stage.name for stage in needed("query", STAGES)]
    assert order[-1] == "query"
    assert order.index("wheel") < order.index("env-encoder") < order.index("query")
    assert "env-ingest" not in order


def test_a_builder_that_skips_no_stage_carries_out_nothing_for_an_image_that_another_one_needs() -> None:
    """`az acr build` carries out all that stands above its target: of torch nothing may stand above a service."""
    order = list(STAGES)
    torch = {stage.name for image in ("torch", "cuda") for stage in needed(image, STAGES)}
    for image in ("ingest", "embedder", "query", "standalone"):
        above = set(order[: order.index(image)])
        assert not above & (torch - {stage.name for stage in needed(image, STAGES)}), image
    assert "env-encoder" not in order[: order.index("ingest")]
    assert "env-standalone" not in order[: order.index("query")]


def test_what_renews_the_base_finds_it() -> None:
    """Dependabot reads FROM lines that name a version, and no variables."""
    bases = re.findall(r"^FROM (\S+)", TEXT, re.MULTILINE)
    assert foreign(TEXT) == [base for base in bases if ":" in base]
    assert len(foreign(TEXT)) == 1
    assert not [base for base in bases if "$" in base]


def test_a_dockerfile_is_read_with_its_continued_lines_and_comments() -> None:
    text = "FROM python:3.13.1 AS a\n# no\nRUN one \\\n    # nor this\n    && two\nFROM a\nCOPY --from=a /x /x"
    assert stages(text) == {
        "a": Stage("a", "python:3.13.1", [("RUN", "one && two")]),
        "stage-1": Stage("stage-1", "a", [("COPY", "--from=a /x /x")]),
    }


def test_digests_are_written_behind_versions_and_replaced() -> None:
    old, new = f"sha256:{'0' * 64}", f"sha256:{'a' * 64}"
    text = (
        f"FROM python:3.13.14-slim AS python\nFROM python AS base\n    image: redis:8.8.3-alpine@{old}\n"
        "    image: catalens-ingest:0.1.0\n"
    )
    assert foreign(text) == ["python:3.13.14-slim", "redis:8.8.3-alpine"]
    once = pinned(text, {"python:3.13.14-slim": new, "redis:8.8.3-alpine": new})
    assert once == (
        f"FROM python:3.13.14-slim@{new} AS python\nFROM python AS base\n    image: redis:8.8.3-alpine@{new}\n"
        "    image: catalens-ingest:0.1.0\n"
    )
    assert pinned(once, {"redis:8.8.3-alpine": old}).count(old) == 1


def test_every_foreign_image_has_a_version() -> None:
    images = [image for path in FILES for image in foreign(path.read_text(encoding="utf-8"))]
    assert len(images) >= 8
    assert all(re.search(r":v?\d+\.\d+\.\d+", image) for image in images), images
