"""Every metric is documented, and every metric is fed."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from prometheus_client import generate_latest
from scripts.metrics_reference import REFERENCE, reference

from catalens.telemetry import Metrics

ROOT = Path(__file__).parents[2]


def used(source: str) -> set[str]:
    """Return the attributes that are read of anything called `metrics` or `_metrics`."""
    return {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and (
            (isinstance(node.value, ast.Name) and node.value.id == "metrics")
            or (isinstance(node.value, ast.Attribute) and node.value.attr in ("metrics", "_metrics"))
        )
    }


def test_the_file_is_in_step() -> None:
    assert REFERENCE.read_text(encoding="utf-8") == reference(), "run `make reference`"


def test_every_metric_is_fed_and_every_one_that_is_fed_exists() -> None:
    fed: set[str] = set()
    for folder in ("shared", "services"):
        for path in (ROOT / folder).rglob("*.py"):
            fed |= used(path.read_text(encoding="utf-8"))
    known = set(vars(Metrics()))
    assert known - fed == {"build"}, "build_info is set where it is made, every other metric where something happens"
    assert fed - known == set()


def test_what_counts_as_use() -> None:
    assert used("self._metrics.lag.labels('a').set(1)\nmetrics.cache.inc()\nself.metrics = metrics\nlog.info()") == {
        "lag",
        "cache",
    }


def test_the_release_and_the_process_are_told() -> None:
    text = generate_latest(Metrics().registry).decode()
    assert 'catalens_build_info{version="' in text
    if sys.platform == "linux":
        assert "process_resident_memory_bytes" in text


def test_every_name_says_whose_it_is() -> None:
    names = {family.name for family in Metrics().registry.collect()}
    assert all(name.startswith(("catalens_", "process_")) for name in names)
