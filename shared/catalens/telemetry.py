"""Logging set-up and every metric's name in one place."""

from __future__ import annotations

import logging
import sys
from typing import Final

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from catalens.settings import Settings

# Without local variables: those hold pictures, keys and whole events.
_TRACEBACKS: Final = structlog.processors.ExceptionRenderer(
    structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
)
_FAST: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SLOW: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)


def configure_logging(settings: Settings) -> None:
    """Send structured logs to stderr: one JSON object a line, or readable lines on a terminal."""
    readable = settings.log_format == "console" or (settings.log_format == "auto" and sys.stderr.isatty())
    renderer: structlog.types.Processor = (
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        if readable
        else structlog.processors.JSONRenderer()
    )
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            *([] if readable else [_TRACEBACKS]),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


class Metrics:
    """Every metric of Catalens, on a registry of its own so that two processes in one test never meet."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        add = self.registry
        self.http_requests = Counter(
            "catalens_http_requests", "HTTP requests answered.", ["method", "route", "status"], registry=add
        )
        self.http_seconds = Histogram(
            "catalens_http_request_seconds",
            "Time to answer.",
            ["method", "route"],
            buckets=_FAST,
            registry=add,
        )
        self.accepted = Counter("catalens_events_accepted", "Events the log acknowledged.", ["type"], registry=add)
        self.processed = Counter(
            "catalens_events_processed",
            "Events the embedder finished, by outcome: applied, known, superseded, retried, dead.",
            ["type", "outcome"],
            registry=add,
        )
        self.freshness = Histogram(
            "catalens_freshness_seconds",
            "From accepted by the log to searchable.",
            buckets=_SLOW,
            registry=add,
        )
        self.lag = Gauge("catalens_lag_records", "Records not yet processed.", ["topic", "partition"], registry=add)
        self.pictures = Counter(
            "catalens_pictures", "Remote pictures by outcome: ok, retried, failed.", ["outcome"], registry=add
        )
        self.encoder_items = Counter("catalens_encoder_items", "Items encoded.", ["tower"], registry=add)
        self.encoder_batch = Histogram(
            "catalens_encoder_batch_size",
            "Items per inference.",
            ["tower"],
            buckets=(1, 2, 4, 8, 16, 32),
            registry=add,
        )
        self.encoder_seconds = Histogram(
            "catalens_encoder_seconds", "Stage durations.", ["tower", "stage"], buckets=_FAST, registry=add
        )
        self.encoder_waiting = Gauge("catalens_encoder_waiting", "Items that wait.", ["tower"], registry=add)
        self.cache = Counter("catalens_embedding_cache", "Look-ups by result: hit, miss.", ["result"], registry=add)
        self.searches = Counter(
            "catalens_searches", "Searches by the mode that answered.", ["mode", "degraded"], registry=add
        )
        self.index_seconds = Histogram(
            "catalens_index_seconds", "Calls of the vector index.", ["call"], buckets=_FAST, registry=add
        )
