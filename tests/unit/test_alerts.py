"""The alerts by Prometheus's own engine: what the cases of tests/fixtures/alerts.yaml raise, and that queries parse.

promtool is of the package `prometheus`; scripts/ensure-promtool fetches it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from scripts import monitoring
from tests.missing import missing
from tests.unit.test_monitoring import queries, rules

from catalens.telemetry import Metrics

CASES = monitoring.ROOT / "tests" / "fixtures" / "alerts.yaml"


@pytest.fixture(scope="module")
def promtool() -> str:
    """Prometheus's tool for rules."""
    found = shutil.which("promtool") or shutil.which("promtool", path=str(monitoring.ROOT / ".cache" / "bin"))
    if found is None:
        missing("there is no promtool: run scripts/ensure-promtool")
    return found


def passes(*command: str) -> None:
    """Run a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_in_each_case_those_alerts_fire_and_no_others(promtool: str, tmp_path: Path) -> None:
    cases = tmp_path / "cases.yaml"
    cases.write_text(CASES.read_text(encoding="utf-8").replace("RULES", str(monitoring.RULES)), encoding="utf-8")
    passes(promtool, "test", "rules", str(cases))


def test_every_query_is_one_for_prometheus(promtool: str, tmp_path: Path) -> None:
    passes(promtool, "check", "rules", "--lint-fatal", str(monitoring.RULES))
    recorded = [
        {"record": f"query:{number}", "expr": query.replace("$__rate_interval", "5m")}
        for number, (_, query) in enumerate(queries())
    ]
    assert recorded
    file = tmp_path / "dashboards.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": recorded}]}), encoding="utf-8")
    passes(promtool, "check", "rules", str(file))


def test_every_alert_is_raised_by_a_case() -> None:
    raised = set(re.findall(r"alertname=\"(\w+)\"", CASES.read_text(encoding="utf-8")))
    assert raised == {rule["alert"] for rule in rules()}


def test_what_alerts_watch_is_told_before_anything_has_happened() -> None:
    """Prometheus sees no growth in a series that begins with its first event."""
    begun = {sample.name for metric in Metrics().registry.collect() for sample in metric.samples}
    watched = {
        name
        for rule in rules()
        for name in re.findall(r"(?:increase|rate)\((catalens_\w+_total)", str(rule["expr"]))
        if not name.startswith(("catalens_searches", "catalens_http", "catalens_encoder_busy"))  # a rate that goes on
    }
    assert len(watched) >= 6
    assert watched <= begun
