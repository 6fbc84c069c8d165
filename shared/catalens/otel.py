"""Spans by the OpenTelemetry SDK, sent by a thread of its own; imported only where an endpoint is set."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar, Token
from importlib.metadata import version
from types import TracebackType
from typing import Final, Self
from urllib.parse import urlsplit

import structlog
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

from catalens import tracing
from catalens.settings import TracingSettings

log = structlog.get_logger(__name__)

_SEND_SECONDS: Final = 3.0
"""Longest time for one batch of spans, the exporter's own retries included."""
_AWAY_SECONDS: Final = 30.0
"""An endpoint that failed is left alone for this long; spans are dropped meanwhile."""
_QUEUE: Final = 8192
"""Spans that may wait for the thread; beyond, the oldest are dropped."""
_KINDS: Final = {
    "internal": trace.SpanKind.INTERNAL,
    "server": trace.SpanKind.SERVER,
    "consumer": trace.SpanKind.CONSUMER,
}
_ROOT: Final = Context()

_current: Final[ContextVar[tuple[trace.Span, ...]]] = ContextVar("catalens_spans", default=())


class OpenTelemetry:
    """Recorder: what is current is a tuple of spans, because a batch of events belongs to several traces at once."""

    def __init__(self, settings: TracingSettings, service: str) -> None:
        logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL + 1)  # _Sender says it, and once
        self._sender = _Sender(settings.endpoint)
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(settings.sample)),
            resource=Resource.create({"service.name": service, "service.version": version("catalens")}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(self._sender, max_queue_size=_QUEUE, schedule_delay_millis=1000)
        )
        self._tracer = self._provider.get_tracer("catalens")

    def span(self, name: str, attributes: tracing.Attributes | None) -> tracing.Span:
        """Begin a child of every current span that is recorded."""
        children = tuple(
            self._tracer.start_span(name, trace.set_span_in_context(parent, _ROOT), attributes=attributes)
            for parent in _current.get()
            if parent.is_recording()
        )
        return _Current(children) if children else tracing.NOTHING

    def follow(self, name: str, parents: Mapping[str | None, tracing.Attributes], kind: tracing.Kind) -> tracing.Span:
        """Begin a span under each of `parents`; one that is not sampled goes on as it came, for those it is told to."""
        begun: list[trace.Span] = []
        for parent, attributes in parents.items():
            context = _ROOT
            if (header := tracing.valid(parent)) is not None:
                remote = _remote(header)
                if not remote.get_span_context().trace_flags.sampled:
                    begun.append(remote)
                    continue
                context = trace.set_span_in_context(remote, _ROOT)
            begun.append(self._tracer.start_span(name, context, kind=_KINDS[kind], attributes=attributes))
        return _Current(tuple(begun))

    def traceparent(self) -> str | None:
        """Return the current span, the first if it is in several traces."""
        spans = _current.get()
        if not spans:
            return None
        own = spans[0].get_span_context()
        return f"00-{own.trace_id:032x}-{own.span_id:016x}-{own.trace_flags:02x}"

    def close(self) -> None:
        """Send what is left, in a few seconds or not at all."""
        self._sender.hurry()
        self._provider.shutdown()


class _Current(tracing.Span):
    """Spans that are current within the block."""

    __slots__ = ("_spans", "_token")

    def __init__(self, spans: tuple[trace.Span, ...]) -> None:
        self._spans = spans

    def __enter__(self) -> Self:
        self._token: Token[tuple[trace.Span, ...]] = _current.set(self._spans)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _current.reset(self._token)
        if isinstance(error, asyncio.CancelledError):
            self.set({"catalens.cancelled": True})
        elif error is not None:
            self.fail(f"{type(error).__name__}: {error}"[:300])
        for span in self._spans:
            span.end()

    def set(self, attributes: tracing.Attributes) -> None:
        for span in self._spans:
            span.set_attributes(attributes)

    def fail(self, reason: str) -> None:
        for span in self._spans:
            span.set_status(trace.StatusCode.ERROR, reason)


class _Sender(SpanExporter):
    """Sends batches by OTLP over HTTP; while the endpoint is away it drops them, and says so once."""

    def __init__(self, endpoint: str) -> None:
        self._exporter = OTLPSpanExporter(endpoint=endpoint, timeout=_SEND_SECONDS)
        self._host = urlsplit(endpoint).hostname  # not the URL, which may hold a password
        self._away = False
        self._not_before = 0.0
        self._not_after = float("inf")

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send, on the processor's own thread."""
        if not self._not_before <= time.monotonic() < self._not_after:
            return SpanExportResult.FAILURE
        result = self._exporter.export(spans)
        if result is SpanExportResult.SUCCESS:
            if self._away:
                log.info("tracing.back", host=self._host)
            self._away = False
            return result
        if not self._away:
            log.warning("tracing.away", host=self._host, detail="spans are dropped until it takes them again")
        self._away = True
        self._not_before = time.monotonic() + _AWAY_SECONDS
        return result

    def hurry(self) -> None:
        """Begin no batch later than the time that one may take."""
        self._not_after = time.monotonic() + _SEND_SECONDS

    def shutdown(self) -> None:
        """Let the connections go."""
        self._exporter.shutdown()  # type: ignore[no-untyped-call]  # the SDK forgot it


def _remote(header: str) -> trace.NonRecordingSpan:
    trace_id, span_id, flags = tracing.split(header)
    return trace.NonRecordingSpan(
        trace.SpanContext(trace_id, span_id, is_remote=True, trace_flags=trace.TraceFlags(flags & 3))
    )
