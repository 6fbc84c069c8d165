"""An OpenTelemetry collector for tests: takes OTLP over HTTP and keeps the spans."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True, slots=True)
class Seen:
    """A span as it came over the wire."""

    service: str
    name: str
    trace: str
    span: str
    parent: str
    failed: bool
    attributes: dict[str, Any]


@dataclass
class Collector:
    """What came so far."""

    url: str = ""
    status: int = 200
    requests: int = 0
    spans: list[Seen] = field(default_factory=list)

    def named(self, name: str) -> list[Seen]:
        """Return the spans of that name."""
        return [span for span in self.spans if span.name == name]

    async def until(self, *names: str) -> None:
        """Return when a span of each name has come; the suite's timeout is the limit."""
        while not all(self.named(name) for name in names):
            await asyncio.sleep(0.01)

    async def take(self, request: web.Request) -> web.Response:
        """Answer one export."""
        self.requests += 1
        if self.status != 200:
            return web.Response(status=self.status)
        for group in ExportTraceServiceRequest.FromString(await request.read()).resource_spans:
            service = {entry.key: entry.value.string_value for entry in group.resource.attributes}["service.name"]
            for scope in group.scope_spans:
                self.spans += [
                    Seen(
                        service=service,
                        name=span.name,
                        trace=span.trace_id.hex(),
                        span=span.span_id.hex(),
                        parent=span.parent_span_id.hex(),
                        failed=span.status.code == 2,
                        attributes={entry.key: _value(entry.value) for entry in span.attributes},
                    )
                    for span in scope.spans
                ]
        return web.Response()


@asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    """Run a collector on a free port."""
    collector = Collector()
    app = web.Application()
    app.router.add_post("/v1/traces", collector.take)
    async with TestServer(app) as server:
        collector.url = str(server.make_url("/v1/traces"))
        yield collector


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(entry) for entry in value.array_value.values]
    return getattr(value, kind)
