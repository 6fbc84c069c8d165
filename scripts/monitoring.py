"""Writes Grafana's dashboards, and the alert rules once more as the operator's PrometheusRule, so that neither drifts.

The rules themselves are written by hand, in deploy/prometheus/rules/catalens.yaml.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

ROOT = Path(__file__).parents[1]
DASHBOARDS = ROOT / "deploy" / "grafana" / "dashboards"
RULES = ROOT / "deploy" / "prometheus" / "rules" / "catalens.yaml"
PROMETHEUS_RULE = ROOT / "k8s" / "components" / "monitoring" / "rules.yaml"

_SOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
_COLUMNS: Final = 24
_RATE: Final = "$__rate_interval"
LAG: Final = "sum(max by (topic, partition) (catalens_lag_records))"


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel: what it asks, each query with its legend, and what an operator should see in it."""

    title: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    told: str = ""
    kind: str = "timeseries"
    width: int = 12
    stacked: bool = False


def _quantiles(histogram: str, *shares: float, by: str = "", where: str = "") -> tuple[tuple[str, str], ...]:
    grouped = f"le, {by}" if by else "le"
    legend = f" {{{{{by}}}}}" if by else ""
    return tuple(
        (
            f"histogram_quantile({share}, sum by ({grouped}) (rate({histogram}_bucket{where}[{_RATE}])))",
            f"p{share * 100:g}{legend}",
        )
        for share in shares
    )


def _rates(counter: str, by: str, where: str = "") -> tuple[tuple[str, str], ...]:
    return ((f"sum by ({by}) (rate({counter}{where}[{_RATE}]))", f"{{{{{by}}}}}"),)


_BUSY: Final = (
    f"sum by (job, tower) (rate(catalens_encoder_busy_seconds_total[{_RATE}])) "
    "/ sum by (job, tower) (catalens_encoder_lanes)"
)
_OURS: Final = "and on (job, instance) catalens_build_info"
"""Of what every process has by these names, in a Prometheus that asks others too."""
_WORKERS: Final = "count(count by (instance) (catalens_lag_records))"
_HITS: Final = (
    f'sum(rate(catalens_embedding_cache_total{{result="hit"}}[{_RATE}])) '
    f"/ sum(rate(catalens_embedding_cache_total[{_RATE}]))"
)
_FINISHED: Final = f"sum(rate(catalens_events_processed_total[{_RATE}]))"

PIPELINE: Final = (
    Panel("Events waiting", ((LAG, ""),), kind="stat", width=4, told="The whole group's, the retry topics included."),
    Panel("Searchable after, p99", _quantiles("catalens_freshness_seconds", 0.99), "s", kind="stat", width=4),
    Panel("Finished", ((_FINISHED, ""),), "ops", kind="stat", width=4),
    Panel("Workers", ((_WORKERS, ""),), kind="stat", width=4, told="Empty when scaled to zero: so is every lag here."),
    Panel("Dead letters in 24 h", (("sum(increase(catalens_dead_letters_total[24h]))", ""),), kind="stat", width=4),
    Panel(
        "May still be buried", (("min(catalens_dead_letters_left_records)", ""),), kind="stat", width=4,
        told="At the next dead letter beyond it, the worker stops itself.",
    ),
    Panel(
        "Waiting by topic", (("sum by (topic) (max by (topic, partition) (catalens_lag_records))", "{{topic}}"),),
        stacked=True, told="Retry topics wait for their time: that is no backlog.",
    ),
    Panel(
        "Accepted and finished",
        ((f"sum(rate(catalens_events_accepted_total[{_RATE}]))", "accepted"),
         (f"sum by (outcome) (rate(catalens_events_processed_total[{_RATE}]))", "{{outcome}}")),
        "ops", told="A catalogue that writes to Kafka itself is not in `accepted`.",
    ),
    Panel("Searchable after", _quantiles("catalens_freshness_seconds", 0.5, 0.95, 0.99), "s"),
    Panel(
        "Where a worker's time goes", ((f"sum by (stage) (rate(catalens_stage_seconds_sum[{_RATE}]))", "{{stage}}"),),
        "s", told="Seconds a second, all workers together; `batch` holds the index and embedding stages.",
    ),
    Panel(
        "In work, and paused",
        (("sum(catalens_in_flight_records)", "in work"),
         ("sum by (reason) (catalens_paused_partitions)", "paused: {{reason}}")),
    ),
    Panel(
        "Records a batch",
        ((f"sum(rate(catalens_batch_records_sum[{_RATE}])) "
          f"/ sum(rate(catalens_batch_records_count[{_RATE}]))", "mean"),),
    ),
    Panel("Retried, by reason", _rates("catalens_retries_total", "reason"), "ops"),
    Panel("Buried, by reason", _rates("catalens_dead_letters_total", "reason"), "ops"),
    Panel("Remote pictures", _rates("catalens_pictures_total", "outcome"), "ops"),
    Panel("Fetching a picture, p95", _quantiles("catalens_picture_fetch_seconds", 0.95, by="outcome"), "s"),
    Panel("Fetched", ((f"sum(rate(catalens_picture_fetched_bytes_total[{_RATE}]))", "bytes"),), "Bps"),
    Panel(
        "Rebalances in 10 min", (("sum(increase(catalens_rebalances_total[10m]))", "rebalances"),),
        told="Each stops every worker for a moment.",
    ),
    Panel("Embedding cache: hits", ((_HITS, "share"), ("min(catalens_cache_available)", "reachable")), "percentunit"),
    Panel("Appending to the log", _quantiles("catalens_append_seconds", 0.5, 0.99), "s"),
)  # fmt: skip

_SEARCH_ROUTES: Final = '{route=~"/api/v1/(search.*|products/.*/similar|suggest)"}'
SEARCH: Final = (
    Panel("Searches", ((f"sum(rate(catalens_searches_total[{_RATE}]))", ""),), "ops", kind="stat", width=6),
    Panel(
        "Answer within, p95", _quantiles("catalens_http_request_seconds", 0.95, where=_SEARCH_ROUTES), "s",
        kind="stat", width=6,
    ),
    Panel(
        "Answered by words only",
        ((f'sum(rate(catalens_searches_total{{degraded="true"}}[{_RATE}])) '
          f"/ sum(rate(catalens_searches_total[{_RATE}]))", ""),),
        "percentunit", kind="stat", width=6,
    ),
    Panel(
        "Failed",
        ((f'sum(rate(catalens_http_requests_total{{status=~"5.."}}[{_RATE}])) '
          f"/ sum(rate(catalens_http_requests_total[{_RATE}]))", ""),),
        "percentunit", kind="stat", width=6,
    ),
    Panel("Searches by mode", _rates("catalens_searches_total", "mode"), "ops", stacked=True),
    Panel("Answer within", _quantiles("catalens_http_request_seconds", 0.5, 0.95, 0.99, where=_SEARCH_ROUTES), "s"),
    Panel(
        "Stages of a search, p95", _quantiles("catalens_search_stage_seconds", 0.95, by="stage"), "s",
        told="`encode` is the query's own inference; a cached query has none.",
    ),
    Panel("Requests by status", _rates("catalens_http_requests_total", "status"), "ops", stacked=True),
    Panel("Slowest routes, p95", _quantiles("catalens_http_request_seconds", 0.95, by="route"), "s"),
    Panel("Requests by route", _rates("catalens_http_requests_total", "route"), "ops"),
    Panel(
        "Waiting for the encoder", (("sum by (tower) (catalens_encoder_waiting)", "{{tower}}"),),
        told="Beyond CATALENS_ENCODER__QUEUE queries are answered 429.",
    ),
    Panel("One inference, p95", _quantiles("catalens_encoder_seconds", 0.95, by="stage"), "s"),
    Panel(
        "Models that run", (("count by (model, fingerprint) (catalens_model_info)", "{{model}} {{fingerprint}}"),),
        told="More than one line for longer than a change of the model takes is a fault.",
    ),
    Panel("Releases that run", (("count by (version) (catalens_build_info)", "{{version}}"),)),
)  # fmt: skip

CAPACITY: Final = (
    Panel(
        "Encoder in use", ((_BUSY, "{{job}} {{tower}}"),), "percentunit", kind="stat", width=6,
        told="Near 1, more workers help; far below it with events waiting, look at the index and the fetches.",
    ),
    Panel(
        "Backlog gone in", ((f"{LAG} / {_FINISHED}", ""),), "s", kind="stat", width=6,
        told="At the present rate, if nothing more came.",
    ),
    Panel("Workers", ((_WORKERS, ""),), kind="stat", width=6),
    Panel(
        "Workers at most", (('count(max by (partition) (catalens_lag_records{topic="catalog.products"}))', ""),),
        kind="stat", width=6, told="The partitions of catalog.products: one more worker has nothing to do.",
    ),
    Panel("Encoder in use, by tower", ((_BUSY, "{{job}} {{tower}}"),), "percentunit"),
    Panel("Encoded", _rates("catalens_encoder_items_total", "tower"), "ops", stacked=True),
    Panel(
        "Finished by each worker",
        ((f"sum by (instance) (rate(catalens_events_processed_total[{_RATE}]))", "{{instance}}"),), "ops",
    ),
    Panel(
        "Items an inference",
        ((f"sum by (tower) (rate(catalens_encoder_batch_size_sum[{_RATE}])) "
          f"/ sum by (tower) (rate(catalens_encoder_batch_size_count[{_RATE}]))", "{{tower}}"),),
    ),
    Panel("Memory", ((f"process_resident_memory_bytes {_OURS}", "{{job}} {{instance}}"),), "bytes"),
    Panel("Cores in use", ((f"rate(process_cpu_seconds_total[{_RATE}]) {_OURS}", "{{job}} {{instance}}"),)),
    Panel("Open files", ((f"process_open_fds {_OURS}", "{{job}} {{instance}}"),)),
    Panel(
        "Models loaded again", (("sum(increase(catalens_encoder_restarts_total[1h]))", "in 1 h"),),
        told="A model that kept failing: see the runbook.",
    ),
    Panel(
        "Waiting, and workers", ((LAG, "events waiting"), (_WORKERS, "workers")),
        told="What the autoscaler answers to, and its answer.",
    ),
    Panel("Writing to the index, p95", _quantiles("catalens_stage_seconds", 0.95, where='{stage="index_write"}'), "s"),
)  # fmt: skip

ALL: Final = {"pipeline": PIPELINE, "search": SEARCH, "capacity": CAPACITY}


def dashboard(name: str, panels: Sequence[Panel]) -> dict[str, Any]:
    """Return the dashboard as Grafana reads it; its data source is a variable."""
    shown, x, y, tallest = [], 0, 0, 0
    for number, panel in enumerate(panels, start=1):
        height = 4 if panel.kind == "stat" else 8
        if x + panel.width > _COLUMNS:
            x, y, tallest = 0, y + tallest, 0
        shown.append(_panel(number, panel, {"h": height, "w": panel.width, "x": x, "y": y}))
        x, tallest = x + panel.width, max(tallest, height)
    source = {
        "name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "current": {},
        "hide": 0, "includeAll": False, "multi": False, "options": [], "refresh": 1, "regex": "",
    }  # fmt: skip
    return {
        "uid": f"catalens-{name}",
        "title": f"Catalens: {name}",
        "tags": ["catalens"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": []},
        "templating": {"list": [source]},
        "links": [
            {"title": "Catalens", "type": "dashboards", "tags": ["catalens"], "asDropdown": True, "keepTime": True}
        ],
        "panels": shown,
    }


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    custom = {"stacking": {"mode": "normal"}, "fillOpacity": 20} if panel.stacked else {}
    targets = [
        {"refId": chr(ord("A") + index), "datasource": _SOURCE, "expr": query, "legendFormat": legend or "__auto"}
        for index, (query, legend) in enumerate(panel.queries)
    ]
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.told,
        "gridPos": place,
        "datasource": _SOURCE,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": custom}, "overrides": []},
        "options": {"reduceOptions": {"calcs": ["lastNotNull"]}} if panel.kind == "stat" else {},
        "targets": targets,
    }


def prometheus_rule(rules: dict[str, Any]) -> dict[str, Any]:
    """Return the rules as the Prometheus operator reads them."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "catalens"},
        "spec": {"groups": rules["groups"]},
    }


def files() -> dict[Path, str]:
    """Return what each file should hold."""
    rules = yaml.safe_load(RULES.read_text(encoding="utf-8"))
    head = "# Written by scripts/monitoring.py from deploy/prometheus/rules/catalens.yaml.\n"
    wanted = {
        DASHBOARDS / f"{name}.json": json.dumps(dashboard(name, panels), indent=1) + "\n"
        for name, panels in ALL.items()
    }
    wanted[PROMETHEUS_RULE] = head + yaml.safe_dump(prometheus_rule(rules), sort_keys=False, width=100_000)
    return wanted


def main() -> None:
    """Write the files."""
    for path, text in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
