"""Dashboards, alerts and runbook refer to what exists, and to one another."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase
from scripts import monitoring
from tests.unit.test_k8s import kustomize

from catalens.settings import HttpSettings
from catalens.telemetry import Metrics

RUNBOOK: Final = monitoring.ROOT / "docs" / "runbook.md"
PROMETHEUS: Final = monitoring.ROOT / "deploy" / "prometheus" / "prometheus.yml"
FOREIGN: Final = {
    "up": {"job", "instance"},
    "process_resident_memory_bytes": set(),
    "process_cpu_seconds_total": set(),
    "process_open_fds": set(),
    # KEDA's operator, since 2.14; the kubelet
    "keda_scaler_detail_errors_total": {"scaledObject"},
    "kubelet_volume_stats_available_bytes": {"persistentvolumeclaim"},
    "kubelet_volume_stats_capacity_bytes": {"persistentvolumeclaim"},
}
"""Metrics that others tell, with the labels that we use of them."""
SCRAPED: Final = {"job", "instance"}
KEYWORDS: Final = {
    "sum",
    "min",
    "max",
    "count",
    "and",
    "or",
    "unless",
    "by",
    "without",
    "on",
    "ignoring",
    "bool",
    "group_left",
}


def known() -> dict[str, set[str]]:
    """Return every series that a process tells, with its labels."""
    series: dict[str, set[str]] = dict(FOREIGN)
    for metric in vars(Metrics()).values():
        if not isinstance(metric, MetricWrapperBase):
            continue
        (described,) = metric.describe()
        labels = {*metric._labelnames, *SCRAPED}
        if described.type == "histogram":
            series |= {f"{described.name}_bucket": {*labels, "le"}}
            series |= {f"{described.name}_{part}": labels for part in ("sum", "count")}
        else:
            series[f"{described.name}_total" if described.type == "counter" else described.name] = labels
    return series


def selectors(query: str) -> Iterator[tuple[str, set[str]]]:
    """Yield each metric that a query names, with the labels that it is selected by."""
    bare = re.sub(r"\[[^\]]*\]|\boffset \w+", "", query)
    bare = re.sub(r"\b(by|without|on|ignoring)\s*\([^)]*\)", r"\1", bare)
    for found in re.finditer(r"([a-zA-Z_:][\w:]*)\s*(\{[^}]*\}|\()?", re.sub(r'"[^"]*"', '""', bare)):
        name, after = found[1], found[2] or ""
        if after == "(" or name in KEYWORDS:
            continue
        yield name, set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", after))


def grouped(query: str) -> set[str]:
    """Return the labels that a query groups by."""
    return {label.strip() for group in re.findall(r"\bby\s*\(([^)]*)\)", query) for label in group.split(",")}


def rules() -> list[dict[str, Any]]:
    """Return every alert."""
    document = yaml.safe_load(monitoring.RULES.read_text(encoding="utf-8"))
    assert set(document) == {"groups"}
    assert all(set(group) == {"name", "rules"} for group in document["groups"])
    return [rule for group in document["groups"] for rule in group["rules"]]


def queries() -> list[tuple[str, str]]:
    """Return (where, query) of every panel and alert."""
    found = [(str(rule["alert"]), str(rule["expr"])) for rule in rules()]
    for path in sorted(monitoring.DASHBOARDS.glob("*.json")):
        board = json.loads(path.read_text(encoding="utf-8"))
        found += [
            (f"{path.stem}: {panel['title']}", target["expr"])
            for panel in board["panels"]
            for target in panel["targets"]
        ]
    return found


def anchors() -> set[str]:
    """Return the anchors of the runbook's headings."""
    headings = re.findall(r"^## (.+)$", RUNBOOK.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_a_misspelt_metric_or_label_would_be_seen() -> None:
    asked = 'sum by (le, route) (rate(catalens_x_bucket{route=~"a|b",status!="5.."}[5m])) / on () y > 1 and z_total'
    assert dict(selectors(asked)) == {"catalens_x_bucket": {"route", "status"}, "y": set(), "z_total": set()}
    assert grouped(asked) == {"le", "route"}


@pytest.mark.parametrize(("where", "query"), queries(), ids=lambda value: None if " " in value else value)
def test_every_query_names_metrics_and_labels_that_exist(where: str, query: str) -> None:
    series = known()
    named = list(selectors(query))
    assert named, f"{where} asks for nothing"
    for metric, labels in named:
        assert metric in series, f"{where}: there is no {metric}"
        assert labels <= series[metric], f"{where}: {metric} has no {labels - series[metric]}"
    assert grouped(query) <= {label for metric, _ in named for label in series[metric]}, f"{where}: {query}"
    assert query.count("(") == query.count(")"), where


def test_the_files_are_what_the_script_writes() -> None:
    for path, text in monitoring.files().items():
        assert path.read_text(encoding="utf-8") == text, f"run scripts/monitoring.py: {path.name} is out of date"


def test_a_dashboard_takes_its_source_from_a_variable_and_its_panels_do_not_overlap() -> None:
    boards = sorted(monitoring.DASHBOARDS.glob("*.json"))
    assert [path.stem for path in boards] == sorted(monitoring.ALL)
    for path in boards:
        board = json.loads(path.read_text(encoding="utf-8"))
        (variable,) = board["templating"]["list"]
        assert (variable["name"], variable["type"], variable["query"]) == ("datasource", "datasource", "prometheus")
        taken: set[tuple[int, int]] = set()
        for panel in board["panels"]:
            assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
            at = panel["gridPos"]
            cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
            assert at["x"] + at["w"] <= 24
            assert not taken & cells, panel["title"]
            taken |= cells


def test_an_alert_says_what_it_is_how_bad_and_what_to_do() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names))
    for rule in rules():
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}, rule
        assert rule["alert"].startswith("Catalens")
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "5m"))
        assert set(rule["annotations"]) == {"summary", "runbook_url"}
        page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert monitoring.ROOT / page == RUNBOOK
        assert anchor in anchors(), f"{rule['alert']}: the runbook has no #{anchor}"


def test_every_heading_of_the_runbook_can_be_reached_and_every_link_of_it_leads_somewhere() -> None:
    text = RUNBOOK.read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(#([^)]+)\)", text))
    assert linked <= anchors()
    alerted = {rule["annotations"]["runbook_url"].partition("#")[2] for rule in rules()}
    # What an operator sets out to do, no alert asks for; the how-to leads there.
    guides = (monitoring.ROOT / "docs" / "how-to").glob("*.md")
    told = {anchor for path in guides for anchor in re.findall(r"runbook\.md#([\w-]+)", path.read_text("utf-8"))}
    assert anchors() - alerted - linked <= told
    for target in re.findall(r"\]\((?!#|https?:)([^)#]+)", text):
        assert (RUNBOOK.parent / target).exists(), f"the runbook links to {target}"


def test_an_overlay_says_where_the_runbook_is(tmp_path: Path) -> None:
    """With what the guide says every alert's link is a whole one, and nothing else is applied because of it."""
    command = kustomize()
    guide = (monitoring.ROOT / "docs" / "how-to" / "observe.md").read_text(encoding="utf-8")
    (said,) = re.findall(r"(?m)^    configMapGenerator:\n(?:    .*\n)+", guide)
    component = monitoring.PROMETHEUS_RULE.parent
    shutil.copytree(component, tmp_path / "monitoring")
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    text = f"components: [../monitoring]\n{textwrap.dedent(said)}"
    (overlay / "kustomization.yaml").write_text(text, encoding="utf-8")
    done = subprocess.run([*command, str(overlay)], capture_output=True, text=True, check=True)
    built = list(yaml.safe_load_all(done.stdout))
    assert not [resource for resource in built if resource["kind"] == "ConfigMap"]
    (rule,) = [resource for resource in built if resource["kind"] == "PrometheusRule"]
    links = [one["annotations"]["runbook_url"] for group in rule["spec"]["groups"] for one in group["rules"]]
    page, relative = "https://git.example.com/catalens/docs/runbook.md", "docs/runbook.md"
    assert links == [one["annotations"]["runbook_url"].replace(relative, page) for one in rules()]
    assert all(link.startswith(f"{page}#") for link in links)


def test_prometheus_finds_the_services_where_they_listen_and_the_rules_beside_it() -> None:
    config = yaml.safe_load(PROMETHEUS.read_text(encoding="utf-8"))
    (pattern,) = config["rule_files"]
    assert monitoring.RULES in (PROMETHEUS.parent).glob(pattern)
    asked = [entry for job in config["scrape_configs"] for entry in job["dns_sd_configs"]]
    assert {entry["port"] for entry in asked} == {HttpSettings().port}
    assert {name for entry in asked for name in entry["names"]} == {"ingest", "embedder", "query"}


def test_what_a_process_does_not_do_raises_no_alarm() -> None:
    """Every process tells every gauge without labels, whether or not it is a worker or has a cache."""
    registry = Metrics().registry
    assert registry.get_sample_value("catalens_dead_letters_left_records") == float("inf")
    assert registry.get_sample_value("catalens_cache_available") == 1
