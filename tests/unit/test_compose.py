"""docker-compose.yml: valid, and every name, file, port and command in it is one that there is."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import typer
import yaml
from scripts.image_check import chain, last, stages

from catalens.keys import parse_keys
from catalens.settings import Settings
from catalens_standalone.cli import app
from catalens_standalone.doctor import variables

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
STAGES = stages((ROOT / "Dockerfile").read_text(encoding="utf-8"))
SETTINGS = {variable.name for variable in variables()}
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
MEMORY = {"M": 1, "G": 1024}


def leaves(value: Any) -> list[str]:
    """Return every text and number below `value`, as text."""
    if isinstance(value, dict):
        return [leaf for entry in value.values() for leaf in leaves(entry)]
    if isinstance(value, list):
        return [leaf for entry in value for leaf in leaves(entry)]
    return [str(value)]


def test_it_follows_the_compose_specification() -> None:
    schema = files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    jsonschema_rs.validate(json.loads(schema.read_text(encoding="utf-8")), COMPOSE)


def test_every_service_is_bounded_and_has_no_rights() -> None:
    for name, service in SERVICES.items():
        limits = service["deploy"]["resources"]["limits"]
        assert float(limits["cpus"]) > 0, name
        assert re.fullmatch(r"\d+[MG]", limits["memory"]), name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged"), name
    assert all(service["read_only"] for service in OURS.values())


def test_nothing_is_reached_from_another_machine() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(ports) == len(set(ports)) >= 3
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in ports), ports


def test_every_variable_of_ours_is_a_setting() -> None:
    for name, service in SERVICES.items():
        for variable in service.get("environment", {}):
            assert name not in OURS or variable in SETTINGS or (name, variable) == ("model", "HOME"), variable
    taken = re.findall(r"\$\{(\w+)", TEXT)
    assert taken
    assert set(taken) <= SETTINGS


def test_what_env_may_say_wrongly_is_set_here() -> None:
    """A file .env of the standalone process does not send the services elsewhere."""
    must = {name for name in SETTINGS if name in {"CATALENS_DATA_DIR", "CATALENS_HTTP__HOST", "CATALENS_HTTP__PORT"}}
    for name in ("ingest", "embedder", "query"):
        assert must <= OURS[name]["environment"].keys()
    assert {"path": ".env", "required": False} in OURS["ingest"]["env_file"]


def test_the_keys_file_is_a_secret_of_those_that_ask_for_keys_and_nobody_else_is_told_its_path() -> None:
    """`.env` names a file of this machine, and reaches every service: in a container that path is nowhere."""
    told = {name: service["environment"].get("CATALENS_API_KEYS_FILE") for name, service in OURS.items()}
    doors = {name for name, variable in told.items() if variable}
    assert doors == {"ingest", "query"} == {name for name, service in OURS.items() if "secrets" in service}
    assert {told[name] for name in doors} == {"${CATALENS_API_KEYS_FILE:+/run/secrets/api-keys}"}
    assert all(OURS[name]["secrets"] == ["api-keys"] for name in doors)
    assert told["embedder"] == told["topics"] == ""
    named = re.fullmatch(r"\$\{CATALENS_API_KEYS_FILE:-(\./.+)\}", COMPOSE["secrets"]["api-keys"]["file"])
    assert named is not None, "without .env it starts all the same"
    assert parse_keys((ROOT / named[1]).read_bytes(), None) == ()


def test_there_are_no_secrets() -> None:
    for service in SERVICES.values():
        for variable, value in service.get("environment", {}).items():
            assert not re.search(r"PASSWORD|SECRET|TOKEN|API_KEY\b", variable), variable
            assert not re.search(r"://[^/@]+:[^/@]+@", str(value)), variable


@pytest.mark.parametrize("name", OURS)
def test_our_images_are_those_of_the_dockerfile(name: str) -> None:
    target = OURS[name]["build"]["target"]
    assert target in STAGES
    assert OURS[name]["image"] == f"catalens-{target}:{VERSION}"
    assert OURS[name]["build"]["context"] == "."


def check_command(name: str, words: list[str]) -> None:
    """Prove that a service of compose can be run with those words."""
    service = OURS[name]
    steps = chain(service["build"]["target"], STAGES)
    program, *first = service.get("entrypoint") or json.loads(last(steps, "ENTRYPOINT"))
    assert program == "catalens"
    words = [*first, *words]
    command: Any = typer.main.get_command(app)
    while words and (commands := getattr(command, "commands", None)):
        assert words[0] in commands, f"catalens has no command {words[0]}"
        command, words = commands[words[0]], words[1:]
    options = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options


@pytest.mark.parametrize("name", ["topics", "demo", "catalens", "model"])
def test_commands_are_commands(name: str) -> None:
    check_command(name, OURS[name]["command"])


def test_what_the_documents_have_compose_run_is_a_service_and_a_command() -> None:
    found = set()
    for path in [ROOT / "docker-compose.yml", *(ROOT / "docs").rglob("*.md")]:
        for line in re.findall(r"docker compose (?:--profile \w+ )?run --rm ([^`#…\n]+)", path.read_text("utf-8")):
            words = shlex.split(line)
            options = {}
            while words[0].startswith("--"):
                options[words[0]], words = words[1], words[2:]
            service, *words = words
            found.add((service, *words[:1]))
            if options.get("--entrypoint") == "python":
                assert any(
                    op == "COPY" and value.split()[1] == words[0]
                    for op, value in chain(OURS[service]["build"]["target"], STAGES)
                ), f"the image has no {words[0]}"
            else:
                check_command(service, words or OURS[service]["command"])
    assert {("catalens", "reindex"), ("catalens", "/opt/qdrant_drill.py"), ("demo",), ("model", "pull")} <= found


def test_there_is_a_container_that_can_change_the_model() -> None:
    """`catalens reindex` embeds as a worker does, from the same models and pictures, and asks the same engines."""
    tool, worker = OURS["catalens"], OURS["embedder"]
    assert tool["volumes"] == worker["volumes"]
    assert tool["deploy"] == worker["deploy"]
    assert tool["depends_on"] == worker["depends_on"]
    assert tool["environment"].items() >= COMPOSE["x-environment"].items()


def test_a_picture_store_is_opened_for_what_its_mount_allows() -> None:
    for name in ("ingest", "embedder", "query"):
        (mount,) = [volume for volume in OURS[name]["volumes"] if volume.startswith("pictures:")]
        main = (ROOT / "services" / name / f"catalens_{name}" / "main.py").read_text(encoding="utf-8")
        (opened,) = re.findall(r"room\.blobs\b(?:\((.*?)\))?", main)
        assert opened == ("read_only=True" if mount.endswith(":ro") else ""), name


def test_the_demo_catalogue_is_where_the_image_has_it() -> None:
    path = SERVICES["demo"]["command"][-1]
    assert path.endswith("catalog.jsonl")
    assert (ROOT / "demo" / "catalog.jsonl").exists()
    assert any(
        shlex.join(["demo"]) in value and path.removesuffix("/catalog.jsonl") in value
        for op, value in STAGES["env-standalone"].steps
        if op == "RUN"
    )


def test_every_file_and_volume_exists() -> None:
    used = set()
    for name, service in SERVICES.items():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (ROOT / source).exists(), f"{name}: {source}"
            else:
                used.add(source)
    assert used == set(COMPOSE["volumes"])


def test_every_address_is_a_service() -> None:
    for name, service in SERVICES.items():
        for text in leaves([service.get("environment", {}), service.get("command", [])]):
            for host in re.findall(r"(?:^|//|,)([a-z]+):\d{2,5}\b", text):
                assert host in SERVICES or host == "localhost", f"{name}: {text}"
    gateway = (ROOT / "deploy" / "nginx" / "catalens.conf").read_text(encoding="utf-8")
    assert set(re.findall(r"\s(\w+);$", gateway.partition("}")[0], re.MULTILINE)) == {"ingest", "query"}


def test_who_is_waited_for_can_be_waited_for() -> None:
    for name, service in SERVICES.items():
        for other, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert "test" in SERVICES[other]["healthcheck"], f"{name} waits for {other}, which never says so"
            else:
                assert how["condition"] == "service_completed_successfully"
                assert SERVICES[other]["restart"] in ("on-failure", "no"), other
            profiles = set(SERVICES[other].get("profiles", []))
            assert profiles <= set(service.get("profiles", [])), f"{name} needs {other} of another profile"


def test_there_is_time_to_drain() -> None:
    drain = Settings.model_construct().embedder.drain_deadline
    for name in ("ingest", "embedder", "query"):
        assert int(OURS[name]["stop_grace_period"].removesuffix("s")) > 2 * drain + 5


def test_profiles_are_the_documented_ones() -> None:
    guide = (ROOT / "docs" / "how-to" / "docker.md").read_text(encoding="utf-8")
    profiles = {profile for service in SERVICES.values() for profile in service.get("profiles", [])}
    assert profiles == {"demo", "models", "observability", "tools"}
    # One whose service is named on the command line needs no flag.
    assert all(f"--profile {profile}" in guide for profile in profiles - {"tools"})


def operations(service: str) -> list[tuple[str, str]]:
    """Return method and path of everything that a service answers, as its source has them."""
    source = (ROOT / "services" / service / f"catalens_{service}" / "service.py").read_text(encoding="utf-8")
    found = re.findall(r'Operation\(\s*"(\w+)",\s*"(/[^"]*)"', source)
    assert found
    return found


@pytest.mark.parametrize("service", ["ingest", "query"])
def test_the_gateway_sends_each_call_to_who_answers_it(service: str) -> None:
    config = (ROOT / "deploy" / "nginx" / "catalens.conf").read_text(encoding="utf-8")
    rules = re.findall(r'"~(.+)"\s+(\w+);', config)
    for method, path in operations(service):
        asked = f"{method} {path.replace('{product_id}', 'a:1')}"
        goes_to = next((goal for pattern, goal in rules if re.search(pattern, asked)), "query")
        assert goes_to == service, asked
