"""Writes docs/reference/metrics.md from the class that holds every metric, so that it cannot lie."""

from __future__ import annotations

from pathlib import Path

from prometheus_client.metrics import MetricWrapperBase

from catalens.telemetry import Metrics

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference" / "metrics.md"

_HEAD = """# Metrics

What `/metrics` of each service tells, for Prometheus. A histogram has `_bucket`, `_sum` and `_count` series; labels
without a value yet are not shown. With these come Prometheus's usual `process_…` metrics (memory, CPU, files).
What to watch and which alerts to set: [Observe](../how-to/observe.md). This page is written by
`scripts/metrics_reference.py` from `catalens.telemetry.Metrics`.

| metric | type | labels | meaning |
|---|---|---|---|
"""


def reference() -> str:
    """Return docs/reference/metrics.md."""
    metrics = [metric for metric in vars(Metrics()).values() if isinstance(metric, MetricWrapperBase)]
    return _HEAD + "".join(_row(metric) for metric in metrics)


def _row(metric: MetricWrapperBase) -> str:
    (described,) = metric.describe()
    name = f"{described.name}_total" if described.type == "counter" else described.name
    labels = ", ".join(f"`{label}`" for label in metric._labelnames) or "–"  # noqa: SLF001  # told nowhere else
    return f"| `{name}` | {described.type} | {labels} | {described.documentation} |\n"


def main() -> None:
    """Write the file."""
    REFERENCE.write_text(reference(), encoding="utf-8")
    print(f"wrote {REFERENCE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
