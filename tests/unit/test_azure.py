"""The template of Azure Container Apps says what the code, the settings and Kubernetes say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Final

import pytest
import yaml
from tests.unit.test_cli_arguments import understood
from tests.unit.test_k8s import KEDA_METADATA

from catalens import events, topics
from catalens.kafka_client import largest
from catalens.settings import HttpSettings, Settings
from catalens.topics import RETENTION

ROOT: Final = Path(__file__).parents[2]
TEMPLATE: Final = (ROOT / "deploy" / "azure" / "main.bicep").read_text(encoding="utf-8")
GUIDE: Final = ROOT / "docs" / "how-to" / "azure.md"
SCALED_OBJECT: Final = ROOT / "k8s" / "components" / "keda" / "scaledobject.yaml"
LOGIN: Final = ROOT / "k8s" / "components" / "keda-sasl" / "triggerauthentication.yaml"
DOORS: Final = ("ingest", "query")
STANDARD_TIER_HOURS: Final = 168
"""The longest that Event Hubs' Standard tier keeps what is not compacted."""
EVENT_HUBS_REQUEST: Final = 1_046_528
"""learn.microsoft.com/azure/event-hubs/apache-kafka-configurations, max.request.size."""
PROBE_LIMITS: Final = {"failureThreshold": 10, "initialDelaySeconds": 60, "periodSeconds": 240, "timeoutSeconds": 240}
"""What Container Apps' API takes at most (ContainerAppProbe)."""


def known_variables() -> set[str]:
    """Return every variable that is a setting."""
    names = set()
    for name, field in Settings.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        if inner is None:
            names.add(f"CATALENS_{name}".upper())
        else:
            names |= {f"CATALENS_{name}__{part}".upper() for part in inner}
    return names


def resource(name: str) -> str:
    """Return the text of a resource."""
    begin = TEMPLATE.index(f"resource {name} ")
    return TEMPLATE[begin : TEMPLATE.index("\n}\n", begin)]


def listed(variable: str) -> list[dict[str, str]]:
    """Return a variable that is a list of flat objects, one a line."""
    begin = TEMPLATE.index(f"var {variable} = [")
    lines = TEMPLATE[begin : TEMPLATE.index("\n]", begin)].splitlines()[1:]
    return [
        {key: text or number for key, text, number in re.findall(r"(\w+): (?:'([^']*)'|(\w+))", line)} for line in lines
    ]


def test_every_variable_is_a_setting() -> None:
    named = set(re.findall(r"CATALENS_\w+", TEMPLATE))
    assert named
    assert named <= known_variables()
    doors = [entry for entry in listed("shared") if "PASSWORD" in entry["name"] or "API_KEY" in entry["name"]]
    assert doors
    assert all("secretRef" in entry for entry in doors), "a secret stands in the open"


def test_every_setting_that_is_named_takes_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    for entry in listed("shared"):
        if entry["name"].startswith("CATALENS_") and "value" in entry and not entry["value"].startswith("string"):
            monkeypatch.setenv(entry["name"], "http://qdrant:6333" if "QDRANT" in entry["name"] else entry["value"])
    settings = Settings(_env_file=None)
    assert settings.kafka.username == "$ConnectionString"
    assert settings.blobs.url == "az://pictures"


def test_event_hubs_takes_whatever_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """It closes the connection of a larger request, and a retry is its event with more headers."""
    for entry in listed("shared"):
        if entry["name"].startswith("CATALENS_KAFKA__M"):
            monkeypatch.setenv(entry["name"], entry["value"])
    kafka = Settings(_env_file=None).kafka
    assert max(kafka.max_request, *(largest(topic, kafka) for topic in events.TOPICS)) < EVENT_HUBS_REQUEST
    assert "{ name: 'CATALENS_KAFKA__COMPRESSION', value: 'none' }" in TEMPLATE


def test_every_topic_is_made_and_kept_as_the_contract_says() -> None:
    made = {entry["name"]: entry for entry in listed("topics")}
    assert made.keys() == set(events.TOPICS)
    assert {name for name, entry in made.items() if entry["policy"] == "Compact"} == set(events.COMPACTED)


def test_nothing_is_promised_longer_than_its_hub_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    (days,) = [entry["value"] for entry in listed("shared") if entry["name"] == "CATALENS_LOG__DEAD_LETTER_DAYS"]
    monkeypatch.setenv("CATALENS_LOG__DEAD_LETTER_DAYS", days)
    wanted = {topic.name: int(topic.config.get(RETENTION, 0)) / 3_600_000 for topic in topics.wanted(Settings())}
    for entry in listed("topics"):
        if entry["policy"] == "Delete":
            assert float(entry["hours"]) == min(wanted[entry["name"]], STANDARD_TIER_HOURS), entry["name"]
    assert wanted[events.DEAD_LETTERS] <= STANDARD_TIER_HOURS


def test_the_embedder_scales_on_all_that_it_reads() -> None:
    assert {entry["topic"] for entry in listed("consumed")} == set(events.CONSUMED)
    assert f"var group = '{events.EMBEDDER_GROUP}'" in TEMPLATE
    assert "maxReplicas: min(partitions, 10)" in resource("embedder")
    assert "minReplicas: 0" in resource("embedder")


def test_the_scale_rules_equal_kubernetes() -> None:
    spec = yaml.safe_load(SCALED_OBJECT.read_text(encoding="utf-8"))["spec"]
    assert f"pollingInterval: {spec['pollingInterval']}\n" in resource("embedder")
    assert f"cooldownPeriod: {spec['cooldownPeriod']}\n" in resource("embedder")
    text = resource("embedder")
    metadata = dict(re.findall(r"(\w+): '([^']*)'", text[text.index("metadata: {") : text.index("auth: [")]))
    metadata |= {"consumerGroup": events.EMBEDDER_GROUP}
    here = {
        entry["name"]: {**metadata, "topic": entry["topic"], "lagThreshold": entry["lag"]}
        for entry in listed("consumed")
    }
    login = {"sasl": "plaintext", "tls": "enable"}
    there = {trigger["name"]: trigger["metadata"] for trigger in spec["triggers"]}
    assert here == {name: {**rule, **login} for name, rule in there.items()}


def test_keda_reads_what_a_scale_rule_says() -> None:
    """What is secret to KEDA it takes from `auth` only: a user's name among the metadata is none."""
    text = resource("embedder")
    metadata = re.findall(r"^ +(\w+): ", text[text.index("metadata: {") + 11 : text.index("auth: [")], re.MULTILINE)
    assert len(metadata) == len(set(metadata)) >= 9
    assert set(metadata) <= KEDA_METADATA
    authentication = yaml.safe_load(LOGIN.read_text(encoding="utf-8"))["spec"]["secretTargetRef"]
    given = dict(re.findall(r"\{ secretRef: '([\w-]+)', triggerParameter: '(\w+)' \}", text))
    assert {"sasl", "tls", *given.values()} == {entry["parameter"] for entry in authentication}
    secrets = {entry["name"]: entry for entry in listed("secrets")}
    user = {entry["name"]: entry for entry in listed("shared")}["CATALENS_KAFKA__USERNAME"]["value"]
    assert {parameter: secrets[name].get("value") for name, parameter in given.items()} == {
        "username": user,
        "password": None,  # the vault's
    }


def test_ports_probes_and_deadlines_are_those_of_the_services() -> None:
    assert f"var port = {HttpSettings().port}\n" in TEMPLATE
    assert set(re.findall(r"path: '(/\w+)'", TEMPLATE)) == {"/livez", "/readyz"}
    assert "{ name: 'CATALENS_HTTP__PORT', value: string(port) }" in TEMPLATE
    for name in ("ingest", "query", "embedder"):
        text = resource(name)
        assert "probes: probes" in text
        (seconds,) = re.findall(r"terminationGracePeriodSeconds: (\d+)", text)
        assert int(seconds) > Settings(_env_file=None).embedder.drain_deadline + 5
        assert f"/catalens-{name}:${{release}}" in text
        for part in ("keysFile", "volumeMounts: concat(mounts, [keysMount])", "volumes: concat(volumes, [keysVolume])"):
            assert (part in text) == (name in DOORS), name
        assert ("CATALENS_ALLOW_ANONYMOUS" in text) == (name not in DOORS)
        assert ("external: true" in text) == (name in DOORS)


def test_container_apps_takes_the_probes() -> None:
    probes = TEMPLATE[TEMPLATE.index("var probes = [") :].partition("\n]")[0]
    found = [(name, int(value)) for name, value in re.findall(r"(\w+): (\d+)", probes)]
    assert {name for name, _ in found} == PROBE_LIMITS.keys()
    assert all(1 <= value <= PROBE_LIMITS[name] for name, value in found)


def test_the_keys_file_is_a_secret_in_a_folder() -> None:
    (folder,) = re.findall(r"var keysMount = \{ volumeName: 'keys', mountPath: '(.+)' \}", TEMPLATE)
    (secret, file) = re.findall(r"var keysVolume = \{.*secretRef: '(.+)', path: '(.+)' \}\] \}", TEMPLATE)[0]
    assert f"var keysFile = {{ name: 'CATALENS_API_KEYS_FILE', value: '{folder}/{file}' }}" in TEMPLATE
    assert secret in {entry["name"] for entry in listed("secrets")}


def test_no_image_is_latest_and_no_secret_is_written() -> None:
    images = re.findall(r"image: '([^']+)'", TEMPLATE)
    assert len(images) == 6
    assert all(":" in image and not image.endswith(":latest") for image in images)
    # what is secret comes from a parameter, from Azure, or out of the vault
    assert set(re.findall(r"value: ([^'}\s].*?) }", resource("vault"))) == {
        "access.listKeys().primaryConnectionString",
        "apiKeys",
        "empty(qdrantApiKey) ? 'none' : qdrantApiKey",
    }
    for parameter in ("apiKeys", "qdrantApiKey"):
        assert re.search(rf"@secure\(\)\n@description\(.*\)\nparam {parameter} string", TEMPLATE)


def test_the_job_is_the_command_line_with_what_a_worker_has() -> None:
    job, worker = resource("tool"), resource("embedder")
    for part in ("dependsOn", "identity", "registries", "secrets", "volumes"):
        (line,) = re.findall(rf"^ +({part}: .+|{part}: \w+)$|^  ({part}: .+)$", job, re.MULTILINE)
        assert "".join(line) in worker, part
    assert "volumeMounts: mounts\n" in job
    assert "env: concat(shared, [{ name: 'CATALENS_ENCODER__LANES', value: '2' }])" in job
    assert "/catalens-standalone:${release}" in job
    assert "args: command\n" in job


def told(pattern: str) -> set[str]:
    """Return what the guide says by that pattern."""
    found = re.findall(pattern, GUIDE.read_text(encoding="utf-8"))
    assert found
    return set(found)


def test_the_job_is_told_to_do_what_the_command_line_can() -> None:
    (default,) = re.findall(r"^param command array = (\[.+\])$", TEMPLATE, re.MULTILINE)
    for words in [default.replace("'", '"'), *told(r"(?:command=|`)(\[\"reindex.*?\])")]:
        understood(json.loads(words))


def test_the_guide_builds_every_image_and_gives_each_parameter_that_has_no_default() -> None:
    (built,) = told(r"for image in (.+); do")
    assert set(built.split()) == set(re.findall(r"/catalens-(\w+):", TEMPLATE))
    given = told(r"--parameters [\"']?(\w+)=")
    assert given <= set(re.findall(r"^param (\w+) ", TEMPLATE, re.MULTILINE))
    assert given >= set(re.findall(r"^param (\w+) \w+$", TEMPLATE, re.MULTILINE))
