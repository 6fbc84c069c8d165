"""Logging set-up and every metric's name in one place."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Final

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from catalens import events, tracing
from catalens.settings import Settings

log = structlog.get_logger(__name__)

# Without local variables: those hold pictures, keys and whole events.
_TRACEBACKS: Final = structlog.processors.ExceptionRenderer(
    structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
)
_FAST: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_STAGES: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
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
    root = logging.getLogger()
    for handler in [known for known in root.handlers if isinstance(known, _Libraries)]:
        root.removeHandler(handler)
    root.addHandler(_Libraries())


class _Libraries(logging.Handler):
    """What libraries warn of, as one event each; the same again within a minute is only counted.

    A broker that is away makes its client warn ten times a second.
    """

    _SECONDS: Final = 60.0
    _MOST: Final = 256

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said: dict[tuple[str, str], tuple[float, int]] = {}
        """By logger and unformatted message: when it was last told, and how often it came since."""

    def emit(self, record: logging.LogRecord) -> None:
        """Tell it, on whatever thread; the caller holds this handler's lock."""
        now, kind = time.monotonic(), (record.name, str(record.msg)[:200])
        told, since = self._said.get(kind, (float("-inf"), 0))
        if now - told < self._SECONDS:
            self._said[kind] = (told, since + 1)
            return
        if len(self._said) >= self._MOST:
            self._said.clear()
        self._said[kind] = (now, 0)
        failed = record.levelno >= logging.ERROR
        say = log.error if failed else log.warning
        more = {"unsaid": since} if since else {}
        say(
            "library.warned",
            library=record.name,
            message=record.getMessage()[:1000],
            exc_info=record.exc_info if failed else None,
            **more,
        )


@contextmanager
def stage(durations: Histogram, name: str) -> Iterator[None]:
    """Time the block as the stage `name` of `durations`, and as a span of the traces that it belongs to."""
    with tracing.span(name), durations.labels(name).time():
        yield


class Metrics:
    """Every metric of Catalens, on a registry of its own so that two processes in one test never meet."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        add = self.registry
        ProcessCollector(registry=add)
        self.build = Gauge("catalens_build_info", "Always 1: the release that runs.", ["version"], registry=add)
        self.build.labels(version("catalens")).set(1)
        self.model = Gauge(
            "catalens_model_info",
            "Always 1: the model that this process runs. Vectors of different fingerprints are never compared.",
            ["model", "fingerprint"],
            registry=add,
        )

        # --- HTTP
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

        self.keys_readable = Gauge(
            "catalens_api_keys_readable",
            "0 while the file of API keys can't be read or is broken, and the earlier keys count. 1 otherwise.",
            registry=add,
        )
        self.keys_readable.set(1)

        # --- ingest
        self.accepted = Counter("catalens_events_accepted", "Events the log acknowledged.", ["type"], registry=add)
        self.append_seconds = Histogram(
            "catalens_append_seconds",
            "Until the log acknowledged what one request, or one batch of its lines, appended.",
            buckets=_FAST,
            registry=add,
        )

        # --- the worker
        self.processed = Counter(
            "catalens_events_processed",
            "Events the embedder finished, by outcome: applied, known, superseded, retried, dead.",
            ["type", "outcome"],
            registry=add,
        )
        self.freshness = Histogram(
            "catalens_freshness_seconds",
            "From the event's first arrival in the log until the index has all of it, picture included: waiting and "
            "retries count in full. Of events that were applied.",
            buckets=_SLOW,
            registry=add,
        )
        self.lag = Gauge(
            "catalens_lag_records",
            "Records not yet committed, for the whole group: every worker tells the same.",
            ["topic", "partition"],
            registry=add,
        )
        self.batch_size = Histogram(
            "catalens_batch_records",
            "Records that the worker took at once.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
            registry=add,
        )
        self.stages = Histogram(
            "catalens_stage_seconds",
            "Stages of the worker: batch (from taken to written), index_read (what is known already), embed, "
            "index_write, pictures (the remote ones of one product, from fetched to written), commit.",
            ["stage"],
            buckets=_STAGES,
            registry=add,
        )
        self.in_flight = Gauge("catalens_in_flight_records", "Records taken and not finished.", registry=add)
        self.paused = Gauge(
            "catalens_paused_partitions",
            "Partitions not read now, by reason: full (enough is in work), not_due (a retry waits for its time), "
            "pictures (too many remote pictures in work).",
            ["reason"],
            registry=add,
        )
        self.rebalances = Counter(
            "catalens_rebalances", "Times that partitions were taken from this worker.", registry=add
        )
        self.retries = Counter(
            "catalens_retries",
            "Events sent to a retry topic, by reason: picture_unreachable, engine_refuses, no_room (it was not tried: "
            "too many remote pictures in work).",
            ["reason"],
            registry=add,
        )
        self.dead_letters = Counter(
            "catalens_dead_letters",
            "Events that became dead letters, by reason: invalid_event, engine_refuses, internal_error, expired.",
            ["reason"],
            registry=add,
        )
        self.dead_letters_left = Gauge(
            "catalens_dead_letters_left_records",
            "How many of the next events may become dead letters; one more stops the worker. Infinite without one.",
            registry=add,
        )
        self.dead_letters_left.set(math.inf)
        self.pictures = Counter(
            "catalens_pictures",
            "Products whose remote pictures were done with, by outcome: ok, retried, failed.",
            ["outcome"],
            registry=add,
        )
        self.fetch_seconds = Histogram(
            "catalens_picture_fetch_seconds",
            "Fetches of remote pictures, waiting for their turn included, by outcome: ok, unchanged (its host says "
            "so), unreachable, gone, forbidden, invalid, cancelled.",
            ["outcome"],
            buckets=_STAGES,
            registry=add,
        )
        self.fetched_bytes = Counter("catalens_picture_fetched_bytes", "Bytes of fetched pictures.", registry=add)

        # --- the encoder
        self.encoder_items = Counter("catalens_encoder_items", "Items encoded.", ["tower"], registry=add)
        self.encoder_batch = Histogram(
            "catalens_encoder_batch_size",
            "Items per inference.",
            ["tower"],
            buckets=(1, 2, 4, 8, 16, 32),
            registry=add,
        )
        self.encoder_seconds = Histogram(
            "catalens_encoder_seconds",
            "Stages of one inference: prepare, run, finish.",
            ["tower", "stage"],
            buckets=_FAST,
            registry=add,
        )
        self.encoder_waiting = Gauge("catalens_encoder_waiting", "Items that wait.", ["tower"], registry=add)
        self.encoder_restarts = Counter(
            "catalens_encoder_restarts", "Times that a model that kept failing was loaded again.", registry=add
        )
        self.encoder_busy = Counter(
            "catalens_encoder_busy_seconds",
            "Seconds that lanes were at work, summed over the lanes; its rate divided by the lanes is the utilisation.",
            ["tower"],
            registry=add,
        )
        self.encoder_lanes = Gauge(
            "catalens_encoder_lanes",
            "Lanes that take any work; one more takes queries only, so utilisation can pass 1.",
            ["tower"],
            registry=add,
        )
        self.cache = Counter("catalens_embedding_cache", "Look-ups by result: hit, miss.", ["result"], registry=add)
        self.cache_available = Gauge(
            "catalens_cache_available",
            "0 while the cache is away and not asked: everything is computed again. 1 otherwise.",
            registry=add,
        )
        self.cache_available.set(1)

        # --- query
        self.searches = Counter(
            "catalens_searches",
            "Searches by the mode that answered; degraded: by words only, for want of the encoder.",
            ["mode", "degraded"],
            registry=add,
        )
        self.search_incomplete = Counter(
            "catalens_search_incomplete",
            "Answers that had to do without their facets, or without how many variants each result has.",
            ["part"],
            registry=add,
        )
        self.search_stages = Histogram(
            "catalens_search_stage_seconds",
            "Stages of one search: encode, search (the index), fuse, load (the products found), facets.",
            ["stage"],
            buckets=_FAST,
            registry=add,
        )
        self._begin_at_nothing()

    def _begin_at_nothing(self) -> None:
        """Tell from the start what alerts watch: to Prometheus a series that begins with an event has not grown."""
        for part in ("facets", "variants"):
            self.search_incomplete.labels(part)
        for kind in (events.UPSERTED, events.DELETED, events.OFFER_CHANGED):
            self.accepted.labels(kind)
            self.processed.labels(kind, "applied")
        for reason in ("invalid_event", "engine_refuses", "internal_error", "expired"):
            self.dead_letters.labels(reason)
        for reason in ("picture_unreachable", "engine_refuses", "no_room"):
            self.retries.labels(reason)
        for outcome in ("ok", "retried", "failed"):
            self.pictures.labels(outcome)
