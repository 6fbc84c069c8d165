"""Traces of one request's way from HTTP through the event log to the index; off, they cost a function call."""

from __future__ import annotations

import atexit
import re
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Final, Literal, Protocol, Self, TypeAlias

from catalens.errors import Misconfigured
from catalens.settings import Settings

Attributes: TypeAlias = Mapping[str, str | int | float | bool | Sequence[str]]
Kind: TypeAlias = Literal["internal", "server", "consumer"]

_TRACEPARENT: Final = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?P<trace>(?!0{32})[0-9a-f]{32})-(?P<span>(?!0{16})[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})"
)
"""https://www.w3.org/TR/trace-context/: version, trace, parent, flags."""


class Span:
    """One piece of work in each trace that it belongs to, for a `with`; this base is the one that belongs to none."""

    __slots__ = ()

    def __enter__(self) -> Self:
        """Begin: spans made inside are its children."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End; an exception marks it as failed."""

    def set(self, attributes: Attributes) -> None:
        """Say more about it."""

    def fail(self, reason: str) -> None:
        """Mark it as failed."""


class Recorder(Protocol):
    """What records spans: catalens.otel, imported only where traces are on."""

    def span(self, name: str, attributes: Attributes | None) -> Span:
        """Begin a child of the current spans."""
        ...

    def follow(self, name: str, parents: Mapping[str | None, Attributes], kind: Kind) -> Span:
        """Begin a span under each of `parents`."""
        ...

    def traceparent(self) -> str | None:
        """Return the current span."""
        ...

    def close(self) -> None:
        """Send what is left."""
        ...


class _Process:
    """What this process does about traces, as `configure` last said."""

    recorder: Recorder | None = None


NOTHING: Final = Span()


def configure(settings: Settings, service: str = "catalens") -> None:
    """Record spans under the name `service` from now on and send them to the endpoint that is set; none: no traces.

    Nothing ever waits for the endpoint but the end of the process, which takes a few seconds at most to send the rest.
    Raises Misconfigured.
    """
    shutdown()
    endpoint = settings.tracing.endpoint
    if not endpoint:
        return
    if not endpoint.startswith(("http://", "https://")):
        raise Misconfigured("CATALENS_TRACING__ENDPOINT is an http(s) URL such as http://127.0.0.1:4318/v1/traces")
    try:
        from catalens.otel import OpenTelemetry  # noqa: PLC0415  # only here: most processes have no traces
    except ModuleNotFoundError as error:
        raise Misconfigured(f"traces need {error.name}, which is not installed: install catalens[tracing]") from error
    _Process.recorder = OpenTelemetry(settings.tracing, service)
    atexit.register(shutdown)


def shutdown() -> None:
    """Send what is left, which takes a few seconds at most, and record nothing more."""
    recorder, _Process.recorder = _Process.recorder, None
    atexit.unregister(shutdown)
    if recorder is not None:
        recorder.close()


def on() -> bool:
    """Return whether spans are recorded."""
    return _Process.recorder is not None


def span(name: str, attributes: Attributes | None = None) -> Span:
    """Begin a child of the current spans; where there is none, it is none either: only `follow` begins a trace."""
    recorder = _Process.recorder
    return NOTHING if recorder is None else recorder.span(name, attributes)


def follow(name: str, parents: Mapping[str | None, Attributes], kind: Kind = "internal") -> Span:
    """Begin the same span under each of `parents`, W3C traceparents, with the attributes that it has there.

    None, or what is no traceparent, begins a trace of its own. Where a parent is not sampled nothing is recorded.
    """
    recorder = _Process.recorder
    return NOTHING if recorder is None else recorder.follow(name, parents, kind)


def traceparent() -> str | None:
    """Return the current span as a W3C traceparent; None where there is none or traces are off."""
    recorder = _Process.recorder
    return None if recorder is None else recorder.traceparent()


def valid(header: str | None) -> str | None:
    """Return `header` if it is a W3C traceparent."""
    return header if header is not None and _TRACEPARENT.fullmatch(header) else None


def split(header: str) -> tuple[int, int, int]:
    """Return trace id, span id and flags of a W3C traceparent; raises ValueError."""
    found = _TRACEPARENT.fullmatch(header)
    if found is None:
        raise ValueError("not a traceparent")
    return int(found["trace"], 16), int(found["span"], 16), int(found["flags"], 16)


def trace_id(header: str | None) -> str | None:
    """Return the trace's id as a log line carries it; None if `header` is no W3C traceparent."""
    found = _TRACEPARENT.fullmatch(header) if header is not None else None
    return None if found is None else found["trace"]
