"""The workflows under .github call the Makefile, pin what they use and may do little."""

from __future__ import annotations

import fnmatch
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml
from scripts.image_check import stages

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
READ_ONLY = {"contents": "read"}
AS_RUNNER = "make ${{ matrix.target }}"
AS_ROOT = f"sudo {AS_RUNNER} CI=true PYTHON=${{{{ steps.python.outputs.python-path }}}}"  # sudo hands on no variables


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml is read without types here
    """YAML 1.2 as GitHub reads it: `on` is no boolean."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool" or first in "tTfF"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load(path: Path) -> Any:
    """Return the document in `path`."""
    return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506  # it is a SafeLoader


def steps(workflow: Any) -> list[dict[str, Any]]:
    """Return every step of every job."""
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def workflow(request: pytest.FixtureRequest) -> Any:
    """One workflow after the other."""
    return load(request.param)


def test_there_are_three() -> None:
    assert [path.stem for path in WORKFLOWS] == ["ci", "images", "release"]


@pytest.mark.parametrize(
    ("path", "schema"),
    [*((path, "github-workflows") for path in WORKFLOWS), (ROOT / ".github" / "dependabot.yml", "dependabot")],
    ids=lambda value: value.stem if isinstance(value, Path) else "",
)
def test_it_follows_its_schema(path: Path, schema: str) -> None:
    vendored = files("check_jsonschema") / "builtin_schemas" / "vendor" / f"{schema}.json"
    jsonschema_rs.validate(json.loads(vendored.read_text(encoding="utf-8")), load(path))


def test_actions_are_pinned_by_commit_with_their_version_beside() -> None:
    for path in WORKFLOWS:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if "uses:" in line]
        assert lines
        for line in lines:
            assert re.fullmatch(r"\s+- uses: [\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line


def test_one_action_has_one_version() -> None:
    used = {step["uses"] for path in WORKFLOWS for step in steps(load(path)) if "uses" in step}
    assert len(used) == len({action.partition("@")[0] for action in used})


def test_it_calls_the_makefile_and_nothing_else(workflow: Any) -> None:
    matrices = [job.get("strategy", {}).get("matrix", {}) for job in workflow["jobs"].values()]
    commands = [step["run"] for step in steps(workflow) if "run" in step]
    listed = [f"make {target}" for matrix in matrices for target in matrix.get("target", [])]
    assert commands
    for command in [*listed, *(command for command in commands if command not in (AS_RUNNER, AS_ROOT))]:
        program, *words = command.split()
        assert program == "make", command
        targets = [word for word in words if "=" not in word and not word.startswith(("$", "matrix", "}"))]
        assert targets
        assert set(targets) <= TARGETS, command


def test_what_installs_by_apt_may() -> None:
    """A runner has neither redis-server nor promtool, and apt is used by root only: `engines` fails with CI=true."""
    rules = dict(re.findall(r"^([a-z0-9-]+): (.*?)(?: ##.*)?$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    seen = set()
    for job in load(ROOT / ".github" / "workflows" / "ci.yml")["jobs"].values():
        (command,) = [step["run"] for step in job["steps"] if "run" in step]
        for target in job["strategy"]["matrix"]["target"]:
            needs = "engines" in rules[target.split()[0]].split()
            assert command == (AS_ROOT if needs else AS_RUNNER), target
            seen.add(needs)
    assert seen == {True, False}


def test_images_are_made_when_anything_changes_that_they_are_made_from() -> None:
    paths = load(ROOT / ".github" / "workflows" / "images.yml")["on"]["pull_request"]["paths"]
    copied = {
        source
        for stage in stages((ROOT / "Dockerfile").read_text(encoding="utf-8")).values()
        for op, value in stage.steps
        if op == "COPY" and not value.startswith("--from=")
        for source in value.split()[:-1]
    }
    assert len(copied) > 8
    for source in [*copied, "Dockerfile", ".dockerignore"]:
        assert any(fnmatch.fnmatch(f"{source}/" if (ROOT / source).is_dir() else source, path) for path in paths), (
            source
        )
    for path in paths:
        assert (ROOT / path.removesuffix("**")).exists(), path


def test_nobody_else_s_words_are_run(workflow: Any) -> None:
    """What an author of a pull request may choose is never part of a command."""
    for step in steps(workflow):
        for expression in re.findall(r"\$\{\{\s*(.*?)\s*\}\}", step.get("run", "")):
            assert expression.startswith("matrix.") or expression == "steps.python.outputs.python-path", expression


def test_it_may_do_little(workflow: Any) -> None:
    assert workflow["permissions"] == READ_ONLY
    for job in workflow["jobs"].values():
        more = {name: right for name, right in job.get("permissions", READ_ONLY).items() if right != "read"}
        assert more.keys() <= {"id-token", "contents"}
        assert not more or job["environment"] == "release"
        assert job["timeout-minutes"] <= 60
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] == "false" or step["with"]["persist-credentials"] is False


def test_pull_requests_get_no_secrets(workflow: Any) -> None:
    assert "pull_request_target" not in workflow["on"]
    if "pull_request" in workflow["on"]:
        assert "secrets." not in json.dumps(workflow)
