"""The template of Azure Container Apps says what the code, the settings and Kubernetes say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest
import yaml

from catalens import events
from catalens.settings import HttpSettings, Settings

ROOT: Final = Path(__file__).parents[2]
TEMPLATE: Final = (ROOT / "deploy" / "azure" / "main.bicep").read_text(encoding="utf-8")
SCALED_OBJECT: Final = ROOT / "k8s" / "components" / "keda" / "scaledobject.yaml"
DOORS: Final = ("ingest", "query")


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
    assert settings.kafka.max_message == 1_000_000
    assert settings.blobs.url == "az://pictures"


def test_every_topic_is_made_and_kept_as_the_contract_says() -> None:
    made = {entry["name"]: entry for entry in listed("topics")}
    assert made.keys() == set(events.TOPICS)
    assert {name for name, entry in made.items() if entry["policy"] == "Compact"} == set(events.COMPACTED)


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
    login = {"sasl", "tls", "username"}
    there = {trigger["name"]: trigger["metadata"] for trigger in spec["triggers"]}
    assert {name: {key: rule[key] for key in rule.keys() - login} for name, rule in here.items()} == there


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


def test_the_keys_file_is_a_secret_in_a_folder() -> None:
    (folder,) = re.findall(r"var keysMount = \{ volumeName: 'keys', mountPath: '(.+)' \}", TEMPLATE)
    (secret, file) = re.findall(r"var keysVolume = \{.*secretRef: '(.+)', path: '(.+)' \}\] \}", TEMPLATE)[0]
    assert f"var keysFile = {{ name: 'CATALENS_API_KEYS_FILE', value: '{folder}/{file}' }}" in TEMPLATE
    assert secret in {entry["name"] for entry in listed("secrets")}


def test_no_image_is_latest_and_no_secret_is_written() -> None:
    images = re.findall(r"image: '([^']+)'", TEMPLATE)
    assert len(images) == 5
    assert all(":" in image and not image.endswith(":latest") for image in images)
    # what is secret comes from a parameter, from Azure, or out of the vault
    assert set(re.findall(r"value: ([^'}\s].*?) }", resource("vault"))) == {
        "access.listKeys().primaryConnectionString",
        "apiKeys",
        "empty(qdrantApiKey) ? 'none' : qdrantApiKey",
    }
    for parameter in ("apiKeys", "qdrantApiKey"):
        assert re.search(rf"@secure\(\)\n@description\(.*\)\nparam {parameter} string", TEMPLATE)
