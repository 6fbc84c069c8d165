"""The Kubernetes manifests, as kustomize builds them: valid, safe, and in step with the code.

Each overlay is built alone, with each component and with all; CATALENS_TEST_ALL_COMBINATIONS=true (`make check-k8s`)
builds all combinations. CATALENS_TEST_CRDS names a folder with KEDA's custom resource definitions.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeAlias

import jsonschema_rs
import kubernetes_validate
import pytest
import yaml
from scripts.image_check import stages
from tests.missing import missing
from tests.unit.test_cli_arguments import understood

from catalens import events
from catalens.settings import Settings
from catalens.telemetry import Metrics
from catalens.web import build_app
from catalens_standalone.doctor import variables

Resource: TypeAlias = dict[str, Any]

ROOT: Final = Path(__file__).parents[2]
K8S: Final = ROOT / "k8s"
OVERLAYS: Final = ("dev", "prod")
COMPONENTS: Final = tuple(sorted(path.name for path in (K8S / "components").iterdir()))
NEEDS: Final = {"gpu": "model-cache", "keda-sasl": "keda"}
"""Components that are nothing without another one."""
GUIDE: Final = ROOT / "docs" / "how-to" / "kubernetes.md"
VERSION: Final = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
CUSTOM: Final = {"keda.sh/v1alpha1", "monitoring.coreos.com/v1"}
CLUSTER_WIDE: Final = {"Namespace"}
SERVICES: Final = ("embedder", "ingest", "query")


def included(overlay: str) -> frozenset[str]:
    """Return the components that an overlay has by itself."""
    kustomization = yaml.safe_load((K8S / "overlays" / overlay / "kustomization.yaml").read_text(encoding="utf-8"))
    return frozenset(Path(path).name for path in kustomization.get("components", []))


def combinations() -> Iterator[tuple[str, frozenset[str]]]:
    """Yield an overlay and the components added to it."""
    for overlay in OVERLAYS:
        free = [name for name in COMPONENTS if name not in included(overlay)]
        every = os.environ.get("CATALENS_TEST_ALL_COMBINATIONS") == "true"
        counts = range(len(free) + 1) if every else (0, 1, len(free))
        for chosen in itertools.chain.from_iterable(itertools.combinations(free, count) for count in counts):
            have = {*chosen, *included(overlay)}
            if all(NEEDS.get(name, name) in have for name in chosen):
                yield overlay, frozenset(chosen)


BUILDS: Final = list(combinations())


def kustomize() -> list[str]:
    """Return the command that builds a kustomization; without one the test is skipped, and fails in CI."""
    if kubectl := shutil.which("kubectl"):
        return [kubectl, "kustomize"]
    found = shutil.which("kustomize") or shutil.which("kustomize", path=str(ROOT / ".cache" / "bin"))
    if found is None:
        missing("there is neither kubectl nor kustomize: run scripts/ensure-kustomize")
    return [found, "build"]


@pytest.fixture(scope="module")
def command() -> list[str]:
    """The command that builds a kustomization."""
    return kustomize()


@pytest.fixture(scope="module")
def built(
    command: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, frozenset[str]], list[Resource]]:
    """All resources of each build."""
    folder = tmp_path_factory.mktemp("k8s")

    def build(number: int, overlay: str, more: frozenset[str]) -> list[Resource]:
        return build_copy(command, folder / str(number), overlay, more)

    with ThreadPoolExecutor(2) as pool:
        done = pool.map(build, itertools.count(), *zip(*BUILDS, strict=True))
        return dict(zip(BUILDS, done, strict=True))


def build_copy(
    command: list[str], copy: Path, overlay: str, more: frozenset[str], block: Resource | None = None
) -> list[Resource]:
    """Return what is built of an overlay with more components, and with a block of the guide in its kustomization."""
    shutil.copytree(K8S, copy)
    path = copy / "overlays" / overlay / "kustomization.yaml"
    kustomization = yaml.safe_load(path.read_text(encoding="utf-8"))
    kustomization.setdefault("components", []).extend(f"../../components/{name}" for name in sorted(more))
    path.write_text(yaml.safe_dump(kustomization | (block or {})), encoding="utf-8")
    done = subprocess.run([*command, str(path.parent)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{overlay} with {sorted(more)}: {done.stderr}"
    shutil.rmtree(copy)
    return list(yaml.load_all(done.stdout, Loader=_LOADER))


_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@pytest.fixture(params=BUILDS, ids=lambda build: f"{build[0]}+{'+'.join(sorted(build[1]))}")
def resources(request: pytest.FixtureRequest, built: dict[Any, list[Resource]]) -> list[Resource]:
    """All resources of one build."""
    return built[request.param]


@pytest.fixture(scope="module")
def prod(built: dict[Any, list[Resource]]) -> list[Resource]:
    """The overlay prod as it is."""
    return built["prod", frozenset()]


def of(resources: list[Resource], *kinds: str) -> list[Resource]:
    """Return the resources of those kinds."""
    return [resource for resource in resources if resource["kind"] in kinds]


def named(resources: list[Resource], kind: str, name: str) -> Resource:
    """Return the one resource of that kind and name."""
    (found,) = [resource for resource in of(resources, kind) if resource["metadata"]["name"] == name]
    return found


def pods(resources: list[Resource]) -> list[tuple[str, Resource]]:
    """Return name and pod template of everything that makes pods."""
    return [
        (
            resource["metadata"]["name"],
            resource["spec"].get("jobTemplate", resource)["spec"]["template"],
        )
        for resource in of(resources, "CronJob", "Deployment", "Job")
    ]


def environment(resources: list[Resource], container: Resource) -> dict[str, str]:
    """Return what a container is told by values and ConfigMaps; what a Secret holds is nowhere here."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        if "configMapRef" in source:
            found |= named(resources, "ConfigMap", source["configMapRef"]["name"])["data"]
    return found | {entry["name"]: entry.get("value", "") for entry in container.get("env", [])}


# --- schemas ------------------------------------------------------------------------------------------------


def minor_versions() -> list[str]:
    """Return the last three minor versions of Kubernetes that there are schemas for."""
    latest = str(kubernetes_validate.latest_version())
    major, minor = latest.split(".")[:2]
    return [f"{major}.{int(minor) - back}" for back in range(3)]


def test_kubernetes_takes_it(resources: list[Resource]) -> None:
    for version in minor_versions():
        for resource in resources:
            if resource["apiVersion"] not in CUSTOM:
                same = {**resource, "metadata": {**resource["metadata"], "namespace": "any"}}  # most are, but for that
                _valid(json.dumps(same, sort_keys=True), version)


@cache
def _valid(resource: str, version: str) -> None:
    try:
        kubernetes_validate.validate(json.loads(resource), version, strict=True)
    except kubernetes_validate.ValidationError as error:
        where = "/".join(map(str, error.path))
        pytest.fail(f"Kubernetes {version}: {resource[:200]}… {where}: {error.message}", pytrace=False)


def test_keda_takes_it(built: dict[Any, list[Resource]]) -> None:
    folder = os.environ.get("CATALENS_TEST_CRDS", "")
    if not folder:
        pytest.skip("CATALENS_TEST_CRDS names no folder with KEDA's custom resource definitions")
    schemas = {}
    for path in Path(folder).glob("keda.sh_*.yaml"):
        crd = yaml.safe_load(path.read_text(encoding="utf-8"))
        for version in crd["spec"]["versions"]:
            schemas[crd["spec"]["names"]["kind"]] = strict(version["schema"]["openAPIV3Schema"])
    checked = set()
    for resources in built.values():
        for resource in of(resources, "ScaledObject", "TriggerAuthentication"):
            jsonschema_rs.Draft4Validator(schemas[resource["kind"]]).validate(resource)
            checked.add(resource["kind"])
    assert checked == {"ScaledObject", "TriggerAuthentication"}


def strict(schema: Any) -> Any:
    """Return the schema with unknown fields refused: Kubernetes would drop them silently."""
    if isinstance(schema, list):
        return [strict(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    stricter = {name: strict(entry) for name, entry in schema.items()}
    if isinstance(schema.get("properties"), dict) and "type" in schema and "additionalProperties" not in schema:
        stricter["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    return stricter


# --- policy -------------------------------------------------------------------------------------------------


def test_everything_has_a_namespace_of_its_own(resources: list[Resource]) -> None:
    (namespace,) = of(resources, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for resource in resources:
        if resource["kind"] not in CLUSTER_WIDE:
            assert resource["metadata"].get("namespace") == namespace["metadata"]["name"] != "default", resource


def test_pods_are_restricted_and_bounded(resources: list[Resource]) -> None:
    for name, template in pods(resources):
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["enableServiceLinks"] is False, name
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["runAsUser"] > 0, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not any(key in spec for key in ("hostNetwork", "hostPID", "hostIPC")), name
        assert not any("hostPath" in volume for volume in spec["volumes"]), name
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            context = container["securityContext"]
            assert context == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
            for bound in ("requests", "limits"):
                assert {"cpu", "memory"} <= container["resources"][bound].keys(), name


def test_images_are_ours_with_a_version(resources: list[Resource]) -> None:
    targets = stages((ROOT / "Dockerfile").read_text(encoding="utf-8"))
    for name, template in pods(resources):
        for container in template["spec"]["containers"]:
            found = re.fullmatch(rf"catalens-(\w+):{re.escape(VERSION)}", container["image"])
            assert found is not None, f"{name}: {container['image']}"
            assert found[1] in targets


def test_there_is_no_secret_in_the_tree(resources: list[Resource]) -> None:
    assert not of(resources, "Secret")
    for config in of(resources, "ConfigMap"):
        for variable, value in config["data"].items():
            assert not re.search(r"PASSWORD|SECRET|API_KEY", variable), variable
            assert not re.search(r"://[^/@]+:[^/@]+@", value), variable


def test_deployments_have_probes_a_budget_and_are_spread(resources: list[Resource]) -> None:
    assert {deployment["metadata"]["name"] for deployment in of(resources, "Deployment")} == {
        f"catalens-{service}" for service in SERVICES
    }
    for deployment in of(resources, "Deployment"):
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        assert {"startupProbe", "livenessProbe", "readinessProbe", "lifecycle"} <= container.keys()
        for kind in ("PodDisruptionBudget", "Service"):
            other = named(resources, kind, deployment["metadata"]["name"])
            selector = other["spec"]["selector"]
            assert selector.get("matchLabels", selector).items() <= labels.items()
        for constraint in deployment["spec"]["template"]["spec"]["topologySpreadConstraints"]:
            assert constraint["labelSelector"]["matchLabels"].items() <= labels.items()


# --- in step with each other --------------------------------------------------------------------------------


def test_every_reference_resolves(resources: list[Resource]) -> None:
    there = {(resource["kind"], resource["metadata"]["name"]) for resource in resources}
    for name, template in pods(resources):
        spec = template["spec"]
        assert ("ServiceAccount", spec["serviceAccountName"]) in there
        volumes = {volume["name"] for volume in spec["volumes"]}
        for volume in spec["volumes"]:
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in there, name
        for container in spec["containers"]:
            mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert {"/data", "/tmp"} <= set(mounts), "the root file system is read-only"
            assert len(mounts) == len(set(mounts))
            for source in container.get("envFrom", []):
                assert "secretRef" in source or ("ConfigMap", source["configMapRef"]["name"]) in there
    for ingress in of(resources, "Ingress"):
        for rule in ingress["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                assert ("Service", path["backend"]["service"]["name"]) in there
    for scaler in of(resources, "HorizontalPodAutoscaler", "ScaledObject"):
        assert ("Deployment", scaler["spec"]["scaleTargetRef"]["name"]) in there


def test_autoscalers_alone_say_how_many(resources: list[Resource]) -> None:
    for scaler in of(resources, "HorizontalPodAutoscaler", "ScaledObject"):
        target = named(resources, "Deployment", scaler["spec"]["scaleTargetRef"]["name"])
        assert "replicas" not in target["spec"], "each apply would undo what the autoscaler decided"


def test_network_policies_select_pods_that_there_are(resources: list[Resource]) -> None:
    policies = of(resources, "NetworkPolicy")
    every = [template["metadata"]["labels"] for _, template in pods(resources)]
    for policy in policies:
        assert any(selects(policy["spec"]["podSelector"], labels) for labels in every), policy["metadata"]["name"]
    deny = named(resources, "NetworkPolicy", "catalens-default-deny")
    assert deny["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert not deny["spec"].keys() & {"ingress", "egress"}
    assert all(selects(deny["spec"]["podSelector"], labels) for labels in every)


def selects(selector: Resource, labels: dict[str, str]) -> bool:
    """Tell whether a pod with those labels is selected."""
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(expression["key"]) in expression["values"] for expression in selector.get("matchExpressions", [])
    )


PATHS: Final = {
    "command": {
        ("kafka", 9092), ("redis", 6379), ("qdrant", 6334), ("snapshots", 6333), ("pictures", 443), ("pictures", 80),
        ("dns", 53),
    },
    "embedder": {("kafka", 9092), ("redis", 6379), ("qdrant", 6334), ("pictures", 443), ("pictures", 80), ("dns", 53)},
    "ingest": {("kafka", 9092), ("redis", 6379), ("pictures", 443), ("pictures", 80), ("dns", 53)},
    "query": {("kafka", 9092), ("redis", 6379), ("qdrant", 6334), ("pictures", 443), ("pictures", 80), ("dns", 53)},
    "topics": {("kafka", 9092), ("dns", 53)},
}  # fmt: skip


def test_pods_reach_what_they_use_and_nothing_else(prod: list[Resource]) -> None:
    for service, wanted in PATHS.items():
        labels = dict(pods(prod))[f"catalens-{service}"]["metadata"]["labels"]
        reached = {
            (policy["metadata"]["name"].removeprefix("catalens-"), port["port"])
            for policy in of(prod, "NetworkPolicy")
            if selects(policy["spec"]["podSelector"], labels)
            for rule in policy["spec"].get("egress", [])
            for port in rule["ports"]
        }
        assert reached == wanted, service
    defaults = Settings.model_construct()
    assert ("qdrant", defaults.qdrant.grpc_port) in PATHS["query"]


# --- in step with the code ----------------------------------------------------------------------------------


def test_every_variable_is_a_setting(resources: list[Resource]) -> None:
    known = {variable.name for variable in variables()}
    for config in of(resources, "ConfigMap"):
        assert config["data"].keys() <= known
    for name, template in pods(resources):
        for container in template["spec"]["containers"]:
            assert {entry["name"] for entry in container.get("env", [])} <= known, name
    for authentication in of(resources, "TriggerAuthentication"):
        keys = {entry["key"] for entry in authentication["spec"]["secretTargetRef"]}
        assert all(f"`{key}`" in GUIDE.read_text(encoding="utf-8") for key in keys), (
            "the Secret's keys are written down"
        )
        assert {key for key in keys if key.startswith("CATALENS_")} <= known


def keys_file(template: Resource) -> str:
    """Return what file of API keys the one container of a pod is told to read, and prove that a Secret brings it."""
    (container,) = template["spec"]["containers"]
    told = {entry["name"]: entry.get("value", "") for entry in container["env"]}.get("CATALENS_API_KEYS_FILE", "")
    if told:
        (mount,) = [entry for entry in container["volumeMounts"] if entry["mountPath"] == str(Path(told).parent)]
        assert "subPath" not in mount, "the kubelet never changes a single file that is mounted"
        (volume,) = [entry for entry in template["spec"]["volumes"] if entry["name"] == mount["name"]]
        assert volume["secret"] == {"secretName": "catalens-api-keys-file", "defaultMode": 0o440}
        assert template["spec"]["securityContext"]["fsGroup"], "or it could not be read"
    return str(told)


def test_the_keys_file_reaches_those_that_ask_for_keys(built: dict[tuple[str, frozenset[str]], list[Resource]]) -> None:
    for (_, components), resources in built.items():
        told = {name for name, template in pods(resources) if name in DEPLOYED and keys_file(template)}
        assert told == ({"catalens-ingest", "catalens-query"} if "keys-file" in components else set())
    assert {"catalens-api-keys-file", "catalens-api-keys", "catalens-engines"} <= set(
        re.findall(r"`(catalens-[a-z-]+)`", GUIDE.read_text(encoding="utf-8"))
    )


DEPLOYED: Final = {f"catalens-{service}" for service in SERVICES}


def test_the_settings_are_good(resources: list[Resource], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each service takes its settings, and would start with what they say about access, or with keys."""
    held = tmp_path / "keys.jsonl"
    held.write_text(json.dumps({"name": "shop", "sha256": "0" * 64}), encoding="utf-8")
    for deployment in of(resources, "Deployment"):
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        for name in [name for name in os.environ if name.startswith("CATALENS_")]:
            monkeypatch.delenv(name)
        for name, value in environment(resources, container).items():
            monkeypatch.setenv(name, value)
        if {"secretRef": {"name": "catalens-api-keys", "optional": True}} in container["envFrom"]:
            monkeypatch.setenv("CATALENS_API_KEYS", '[{"name": "shop", "secret": "0123456789abcdef"}]')
        if keys_file(deployment["spec"]["template"]):
            monkeypatch.delenv("CATALENS_API_KEYS")  # the file is enough
            monkeypatch.setenv("CATALENS_API_KEYS_FILE", str(held))
        settings = Settings(_env_file=None)
        build_app([], settings, Metrics(), ready=_never, title="")
        assert settings.kafka.bootstrap_servers
        assert settings.qdrant.url
        assert settings.redis.url
        assert settings.blobs.url


async def _never() -> dict[str, str]:
    raise NotImplementedError


def test_ports_and_paths_are_served(resources: list[Resource], monkeypatch: pytest.MonkeyPatch) -> None:
    served = {
        route.resource.canonical
        for route in build_app([], Settings(_env_file=None), Metrics(), ready=_never, title="").router.routes()
        if route.resource is not None
    }
    for deployment in of(resources, "Deployment"):
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        (port,) = container["ports"]
        assert str(port["containerPort"]) == environment(resources, container)["CATALENS_HTTP__PORT"]
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            asked = container[probe]["httpGet"]
            assert asked["path"] in served
            assert asked["port"] == port["name"]
        service = named(resources, "Service", deployment["metadata"]["name"])
        assert [entry["targetPort"] for entry in service["spec"]["ports"]] == [port["name"]]
    for monitor in of(resources, "ServiceMonitor"):
        for endpoint in monitor["spec"]["endpoints"]:
            assert endpoint["path"] in served
            assert endpoint["port"] == "http"


def test_alerts_are_about_metrics_that_there_are(resources: list[Resource]) -> None:
    known = {
        f"{metric.name}{suffix}"
        for metric in Metrics().registry.collect()
        for suffix in ("", "_total", "_bucket", "_sum", "_count")
    }
    for rule in of(resources, "PrometheusRule"):
        used = set(re.findall(r"\bcatalens_\w+", json.dumps([group["rules"] for group in rule["spec"]["groups"]])))
        assert used
        assert used <= known


def test_a_worker_that_runs_torch_has_models_that_torch_runs(resources: list[Resource]) -> None:
    """The starter of the images is none of them."""
    for name, template in pods(resources):
        (container,) = template["spec"]["containers"]
        if environment(resources, container).get("CATALENS_ENCODER__RUNTIME") == "torch":
            assert "/data/models" in {mount["mountPath"] for mount in container["volumeMounts"]}, name


def test_kedas_operator_is_asked_for_its_metrics(built: dict[tuple[str, frozenset[str]], list[Resource]]) -> None:
    """As KEDA's own manifests and its chart have it: the label of the pods, and the name of the port at 8080."""
    asked = [resource for resources in built.values() for resource in of(resources, "PodMonitor")]
    assert asked
    for monitor in asked:
        assert monitor["spec"] == {
            "namespaceSelector": {"matchNames": ["keda"]},
            "selector": {"matchLabels": {"app": "keda-operator"}},
            "podMetricsEndpoints": [{"port": "http", "path": "/metrics"}],
        }
    assert any(of(resources, "ScaledObject") and of(resources, "PodMonitor") for resources in built.values())


def test_there_is_time_to_drain(resources: list[Resource]) -> None:
    """The worker drains, up to five seconds beyond its deadline; then open requests end, within the same deadline."""
    for deployment in of(resources, "Deployment"):
        spec = deployment["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        drain = float(environment(resources, container)["CATALENS_EMBEDDER__DRAIN_DEADLINE"])
        waits = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert spec["terminationGracePeriodSeconds"] >= waits + (drain + 5) + drain


def test_lanes_are_the_processors_that_a_pod_has(resources: list[Resource]) -> None:
    for service in ("embedder", "query"):
        template = named(resources, "Deployment", f"catalens-{service}")["spec"]["template"]
        (container,) = template["spec"]["containers"]
        assert environment(resources, container)["CATALENS_ENCODER__LANES"] == str(
            container["resources"]["limits"]["cpu"]
        )


def test_keda_scales_by_the_group_and_topics_that_the_workers_read(resources: list[Resource]) -> None:
    for scaled in of(resources, "ScaledObject"):
        spec = scaled["spec"]
        template = named(resources, "Deployment", spec["scaleTargetRef"]["name"])["spec"]["template"]
        (container,) = template["spec"]["containers"]
        told = environment(resources, container)
        assert container["name"] == spec["scaleTargetRef"]["envSourceContainerName"]
        assert [trigger["metadata"]["topic"] for trigger in spec["triggers"]] == list(events.CONSUMED)
        for trigger in spec["triggers"]:
            metadata = trigger["metadata"]
            assert trigger["type"] == "kafka"
            assert metadata["consumerGroup"] == events.EMBEDDER_GROUP
            assert metadata["bootstrapServersFromEnv"] in told
            assert metadata["offsetResetPolicy"] == "earliest"
            assert metadata["activationLagThreshold"] == "0"
            assert metadata["excludePersistentLag"] == metadata["ensureEvenDistributionOfPartitions"] == "true"
            # or the autoscaler's question would be another look, and take from the next one what has moved by then
            assert trigger["useCachedMetrics"] is True
            assert int(metadata["lagThreshold"]) > 0
            assert metadata.keys() <= KEDA_METADATA
        assert spec["minReplicaCount"] == 0
        assert spec["fallback"]["replicas"] <= spec["maxReplicaCount"] <= int(told["CATALENS_KAFKA__PARTITIONS"])


KEDA_METADATA: Final = {
    "activationLagThreshold", "allowIdleConsumers", "bootstrapServers", "bootstrapServersFromEnv", "consumerGroup",
    "ensureEvenDistributionOfPartitions", "excludePersistentLag", "lagThreshold", "limitToPartitionsWithLag",
    "offsetResetPolicy", "partitionLimitation", "sasl", "scaleToZeroOnInvalidOffset", "tls", "topic", "version",
}  # fmt: skip
"""What KEDA's Kafka scaler reads (pkg/scalers/kafka_scaler.go); anything else it ignores."""


# --- what the guide says to add -----------------------------------------------------------------------------


def blocks(heading: str) -> list[Resource]:
    """Return the blocks of a chapter of the guide, each as it goes into a kustomization."""
    _, _, chapter = GUIDE.read_text(encoding="utf-8").partition(f"\n## {heading}\n")
    indented = re.findall(r"(?:^(?:    .*)?\n)+", chapter.partition("\n## ")[0], re.MULTILINE)
    return [yaml.safe_load(block) for block in indented if block.strip()]


def reached(resources: list[Resource], service: str) -> set[tuple[str, int]]:
    """Return the addresses that a service's pods may ask for pictures, those of all the Internet left out."""
    labels = dict(pods(resources))[f"catalens-{service}"]["metadata"]["labels"]
    return {
        (peer["ipBlock"]["cidr"], port["port"])
        for policy in of(resources, "NetworkPolicy")
        if selects(policy["spec"]["podSelector"], labels)
        for rule in policy["spec"].get("egress", [])
        for peer in rule["to"]
        if peer.get("ipBlock", {}).get("cidr", "/0").partition("/")[2] != "0"
        for port in rule["ports"]
    }


def test_workload_identity_reaches_what_it_asks_and_nothing_else(command: list[str], tmp_path: Path) -> None:
    found = []
    for block in blocks("An object store without keys"):
        resources = build_copy(command, tmp_path / "k8s", "prod", frozenset(), block)
        test_kubernetes_takes_it(resources)
        accounts, ways, labels = set(), set(), set()
        for service in SERVICES:
            account = named(resources, "ServiceAccount", f"catalens-{service}")
            accounts.update(account["metadata"].get("annotations", {}))
            ways |= reached(resources, service)
            labels.update(dict(pods(resources))[f"catalens-{service}"]["metadata"]["labels"].items())
        assert not named(resources, "ServiceAccount", "catalens-topics")["metadata"].get("annotations")
        found.append((accounts, ways, ("azure.workload.identity/use", "true") in labels))
    assert found == [
        ({"azure.workload.identity/client-id"}, set(), True),
        (set(), {("169.254.170.23/32", 80)}, False),
        ({"eks.amazonaws.com/role-arn"}, set(), False),
        ({"iam.gke.io/gcp-service-account"}, {("169.254.169.254/32", 80), ("169.254.169.252/32", 988)}, False),
    ]


def test_prometheus_operators_find_what_carries_their_label(command: list[str], tmp_path: Path) -> None:
    (block,) = blocks("Prometheus")
    resources = build_copy(command, tmp_path / "k8s", "prod", frozenset({"monitoring"}), block)
    (pairs,) = [entry["pairs"] for entry in block["labels"]]
    for kind in ("ServiceMonitor", "PodMonitor", "PrometheusRule"):
        (one,) = of(resources, kind)
        assert pairs.items() <= one["metadata"]["labels"].items()
    for _, template in pods(resources):
        assert not pairs.keys() & template["metadata"]["labels"].keys()


def test_the_list_of_tags_reaches_who_reads_it(command: list[str], tmp_path: Path) -> None:
    """As the guide has it, with a list beside the kustomization."""
    text = (GUIDE.parent / "tags.md").read_text(encoding="utf-8")
    (block,) = [found for found in re.findall(r"(?:^    .*\n)+", text, re.MULTILINE) if "configMapGenerator" in found]
    overlay = tmp_path / "k8s" / "overlays" / "mine"
    shutil.copytree(K8S, tmp_path / "k8s")
    overlay.mkdir()
    (overlay / "tags.json").write_text('{"color": {"labels": ["red", "blue"]}}', encoding="utf-8")
    kustomization = {"resources": ["../prod"], "namespace": "catalens", **yaml.safe_load(block)}
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(kustomization), encoding="utf-8")
    done = subprocess.run([*command, str(overlay)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    resources = list(yaml.load_all(done.stdout, Loader=_LOADER))
    test_kubernetes_takes_it(resources)
    test_every_variable_is_a_setting([one for one in resources if "color" not in json.dumps(one.get("data", ""))])
    for name, template in pods(resources):
        (container,) = template["spec"]["containers"]
        told = {entry["name"]: entry["value"] for entry in container.get("env", [])}.get("CATALENS_TAGS_FILE")
        assert (told is not None) == (name in ("catalens-embedder", "catalens-command"))
        if told:
            (volume,) = [one["configMap"]["name"] for one in template["spec"]["volumes"] if one["name"] == "tags"]
            assert Path(told).name in named(resources, "ConfigMap", volume)["data"]
            assert str(Path(told).parent) in {mount["mountPath"] for mount in container["volumeMounts"]}


def patched(resource: Resource, patch: list[Resource]) -> Resource:
    """Return a copy with a JSON patch of `add` at the end of a list or beside a name, and `replace`, carried out."""
    copy: Resource = json.loads(json.dumps(resource))
    for step in patch:
        at: Any = copy
        *way, last = step["path"].strip("/").split("/")
        for part in way:
            at = at[int(part) if isinstance(at, list) else part]
        if last == "-":
            at.append(step["value"])
        else:
            assert step["op"] == "add" or last in at, step
            at[last] = step["value"]
    return copy


def test_a_job_of_the_command_line_does_what_the_guides_say(built: dict[Any, list[Resource]]) -> None:
    """What stands behind `value` is a command, and with it the Job is still one that Kubernetes takes."""
    said = GUIDE.read_text(encoding="utf-8") + (GUIDE.parent / "backup.md").read_text(encoding="utf-8")
    patches = [json.loads(found) for found in re.findall(r"\[\s+\{\"op\".*?\}\s+\](?=\'|\n)", said, re.DOTALL)]
    told: list[tuple[str, ...]] = []
    for resources in built.values():
        command = named(resources, "CronJob", "catalens-command")
        assert command["spec"]["suspend"] is True
        assert f"--from=cronjob/{command['metadata']['name']} " in said
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, **command["spec"]["jobTemplate"]}
        told = []
        for patch in [[], *patches]:
            done = patched(job, patch)
            test_kubernetes_takes_it([done])
            (container,) = done["spec"]["template"]["spec"]["containers"]
            assert {mount["name"] for mount in container["volumeMounts"]} == {
                volume["name"] for volume in done["spec"]["template"]["spec"]["volumes"]
            }
            told.append((*container.get("command", []), *container["args"]))
            if "command" not in container:
                understood(container["args"])
        reads, runs = _container(resources, "catalens-embedder"), _container(resources, "catalens-command")
        assert [mount["mountPath"] for mount in runs["volumeMounts"]] == [
            mount["mountPath"] for mount in reads["volumeMounts"]
        ]
    assert told == [
        ("reindex", "--list"),
        ("reindex", "--model", "siglip2-base"),
        ("python", "/opt/qdrant_drill.py", "take", "/snapshots/first"),
    ]


def _container(resources: list[Resource], name: str) -> Resource:
    """Return the one container of the pods of that name."""
    (container,) = dict(pods(resources))[name]["spec"]["containers"]
    found: Resource = container
    return found
