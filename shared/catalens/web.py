"""What both HTTP services share: the app with its keys, limits, probes, request ids and problem details."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any, Final

import structlog
from aiohttp import hdrs, web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from pydantic_core import to_json

from catalens import tracing
from catalens.domain import DEFAULT_TENANT
from catalens.errors import CatalensError, Misconfigured, Overloaded
from catalens.openapi import PICTURE, Content, Handler, Operation, ProblemDetails, document
from catalens.problems import PROBLEM_JSON, Problem, as_problem, invalid
from catalens.reading import (
    SETTINGS,
    Form,
    parse_json,
    read_body,
    read_form,
    read_idempotency_key,
    read_json,
    read_params,
    read_product_id,
    validated,
)
from catalens.settings import ApiKey, Settings
from catalens.telemetry import Metrics

__all__ = [
    "PICTURE",
    "Content",
    "Form",
    "Operation",
    "Problem",
    "ProblemDetails",
    "as_problem",
    "build_app",
    "invalid",
    "parse_json",
    "read_body",
    "read_form",
    "read_idempotency_key",
    "read_json",
    "read_params",
    "read_product_id",
    "reply",
    "request_id_of",
    "serving",
    "tenant_of",
    "traceparent_of",
    "validated",
]

log = structlog.get_logger(__name__)

Ready = Callable[[], Awaitable[Mapping[str, str]]]

_SANE_ID: Final = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_PROBES: Final = frozenset({"/livez", "/readyz", "/metrics"})
"""Asked every few seconds by machines: they have no traces."""
_SECURITY_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob: http: https:; style-src 'self'; "
    "script-src 'self'; frame-ancestors 'none'",
    "Referrer-Policy": "same-origin",
}

_METRICS: Final = web.AppKey("metrics", Metrics)
_REQUEST_ID: Final = web.RequestKey("request_id", str)
_TENANT: Final = web.RequestKey("tenant", str)
_TRACEPARENT: Final = web.RequestKey("traceparent", str)


def _http_problem(error: web.HTTPException, request: web.Request) -> Problem:
    headers: dict[str, str] = {}
    detail = f"{request.method} {request.path} is not part of this service"
    if isinstance(error, web.HTTPMethodNotAllowed):
        headers[hdrs.ALLOW] = ", ".join(sorted(error.allowed_methods))
        detail = f"{request.path} takes {headers[hdrs.ALLOW]}, not {request.method}"
    elif error.status != HTTPStatus.NOT_FOUND:
        detail = error.reason
    return Problem(error.status, detail, headers=headers)


# --- answering ----------------------------------------------------------------------------------------------


def reply(
    body: BaseModel | Mapping[str, Any], status: int = 200, *, headers: Mapping[str, str] | None = None
) -> web.Response:
    """Return a JSON answer; of a model, the fields that were set."""
    text = body.model_dump_json(exclude_unset=True).encode() if isinstance(body, BaseModel) else to_json(body)
    return web.Response(body=text, status=status, headers=headers, content_type="application/json")


def tenant_of(request: web.Request) -> str:
    """Return the tenant that the request acts for."""
    tenant: str = request.get(_TENANT, DEFAULT_TENANT)
    return tenant


def request_id_of(request: web.Request) -> str:
    """Return the request's id, as its answer and the log lines carry it."""
    return request[_REQUEST_ID]


def traceparent_of(request: web.Request) -> str | None:
    """Return the trace that the request is part of: its own span, or what it came with where traces are off."""
    own: str | None = request.get(_TRACEPARENT)
    return own


def _problem_response(problem: Problem, request_id: str) -> web.Response:
    response = web.Response(
        body=to_json(problem.body(request_id)),
        status=problem.status,
        headers=problem.headers,
        content_type=PROBLEM_JSON,
    )
    if problem.headers.get(hdrs.CONNECTION) == "close":
        response.force_close()
    return response


# --- who may call -------------------------------------------------------------------------------------------


class _Door:
    """Decides who comes in: keys if there are any, else this machine's own programs and pages only."""

    def __init__(self, settings: Settings) -> None:
        self._keys = settings.api_keys
        self._local_only = not settings.api_keys and not settings.allow_anonymous
        self._limit = settings.http.max_concurrent
        self._active = 0
        if self._local_only and not _is_loopback(settings.http.host):
            raise Misconfigured(
                f"binding to {settings.http.host} without an API key would let everybody in: set CATALENS_API_KEYS, "
                "or CATALENS_ALLOW_ANONYMOUS=true, or CATALENS_HTTP__HOST=127.0.0.1"
            )

    def check_origin(self, request: web.Request) -> None:
        """Keep other sites' pages out where no key does it (cross-site requests, DNS rebinding)."""
        if self._keys:
            return
        if request.method not in ("GET", "HEAD") and request.headers.get("Sec-Fetch-Site") == "cross-site":
            raise Problem(403, "another site's page may not change anything here without an API key")
        host = request.headers.get(hdrs.HOST)
        if self._local_only and host is not None and not _is_loopback(_host_name(host)):
            raise Problem(
                403, "without API keys only the Host localhost is served: set CATALENS_API_KEYS, or "
                "CATALENS_ALLOW_ANONYMOUS=true to let everybody in"
            )  # fmt: skip

    def tenant(self, request: web.Request) -> str:
        """Return the tenant of the request's key; Problem 401 if it has none that is known."""
        if not self._keys:
            return DEFAULT_TENANT
        sent = _sent_key(request)
        known = [key for key in self._keys if _same(key, sent)]  # every key is compared: no timing tells which
        if sent and known:
            structlog.contextvars.bind_contextvars(client=known[0].name)
            return known[0].tenant
        detail = "the API key is unknown" if sent else "send an API key as Authorization: Bearer … or X-API-Key"
        raise Problem(401, detail, headers={hdrs.WWW_AUTHENTICATE: 'Bearer realm="catalens"'})

    def guard(self, operation: Operation) -> Handler:
        """Return the operation's handler behind the key check and the limit of concurrent requests."""

        async def guarded(request: web.Request) -> web.StreamResponse:
            if operation.access != "public":
                request[_TENANT] = self.tenant(request)
                structlog.contextvars.bind_contextvars(tenant=request[_TENANT])
            if self._active >= self._limit:
                raise Overloaded(f"{self._limit} requests are in work, which is the limit")
            self._active += 1
            try:
                return await operation.handler(request)
            finally:
                self._active -= 1

        return guarded


def _sent_key(request: web.Request) -> str:
    scheme, _, token = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else request.headers.get("X-API-Key", "")


def _same(key: ApiKey, sent: str) -> bool:
    return hmac.compare_digest(key.secret.get_secret_value().encode(), sent.encode("utf-8", "surrogateescape"))


def _host_name(host: str) -> str:
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# --- the app ------------------------------------------------------------------------------------------------


def build_app(
    operations: Iterable[Operation], settings: Settings, metrics: Metrics, *, ready: Ready, title: str
) -> web.Application:
    """Return the app that serves `operations`, the probes, /metrics and /openapi.json.

    `ready` really uses what the service needs and returns, by component, "ok" or what is wrong with it.
    Every answer that is no success is problem details. Raises Misconfigured when the bind address would let
    everybody in.
    """
    table = list(operations)
    door = _Door(settings)
    app = web.Application(middlewares=[_serve(door)], client_max_size=settings.http.max_body)
    app[SETTINGS] = settings
    app[_METRICS] = metrics
    app.on_response_prepare.append(_finish_headers)
    for operation in table:
        _route(app, operation.method, operation.path, door.guard(operation))
    openapi = to_json(document(table, settings, title=title))
    for path, handler in _probes(ready, metrics, openapi).items():
        _route(app, "GET", path, handler)
    return app


def _route(app: web.Application, method: str, path: str, handler: Handler) -> None:
    pattern = re.sub(r"{(\w+)}", r"{\1:[^/]+}", path)  # an encoded slash is a wrong id, not another path
    if method == "GET":
        app.router.add_get(pattern, handler)
    else:
        app.router.add_route(method, pattern, handler)


def _probes(ready: Ready, metrics: Metrics, openapi: bytes) -> dict[str, Handler]:
    async def livez(_request: web.Request) -> web.StreamResponse:
        return reply({"status": "ok"})

    async def readyz(_request: web.Request) -> web.StreamResponse:
        checks = await ready()
        failed = [(name, state) for name, state in checks.items() if state != "ok"]
        if failed:
            detail = "not ready: " + ", ".join(name for name, _ in failed)
            raise Problem(503, detail, errors=failed, headers={hdrs.RETRY_AFTER: "1"})
        return reply({"status": "ok", "checks": dict(checks)})

    async def prometheus(_request: web.Request) -> web.StreamResponse:
        return web.Response(body=generate_latest(metrics.registry), headers={hdrs.CONTENT_TYPE: CONTENT_TYPE_LATEST})

    async def contract(_request: web.Request) -> web.StreamResponse:
        return web.Response(body=openapi, content_type="application/json")

    return {"/livez": livez, "/readyz": readyz, "/metrics": prometheus, "/openapi.json": contract}


def _serve(door: _Door) -> Callable[..., Awaitable[web.StreamResponse]]:
    @web.middleware
    async def serve(request: web.Request, handler: Handler) -> web.StreamResponse:
        sent = request.headers.get("X-Request-Id", "")
        request[_REQUEST_ID] = sent if _SANE_ID.fullmatch(sent) else uuid.uuid4().hex
        started = time.perf_counter()
        structlog.contextvars.clear_contextvars()  # of the connection's last request
        with _traced(request) as span:
            _bind_ids(request)
            response = await _answer(request, handler, door)
            seconds = time.perf_counter() - started
            _measure(request, response, seconds)
            span.set({"http.response.status_code": response.status})
            if response.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                span.fail(HTTPStatus(response.status).phrase)
        return response

    return serve


def _traced(request: web.Request) -> tracing.Span:
    """Return the request's span, which goes on a trace that the request came with; probes have none."""
    route = _route_of(request)
    if not tracing.on() or route in _PROBES:
        return tracing.NOTHING
    method = _method_of(request)
    attributes = {"http.request.method": method, "http.route": route, "catalens.request_id": request[_REQUEST_ID]}
    return tracing.follow(f"{method} {route}", {request.headers.get("traceparent"): attributes}, "server")


def _bind_ids(request: web.Request) -> None:
    """Let every log line of the request carry its ids."""
    ids = {"request_id": request[_REQUEST_ID]}
    trace = tracing.traceparent() or tracing.valid(request.headers.get("traceparent"))
    if trace is not None:
        request[_TRACEPARENT] = trace
        ids["trace_id"] = tracing.trace_id(trace) or ""
    if "product_id" in request.match_info:
        ids["product_id"] = request.match_info["product_id"][:128]
    structlog.contextvars.bind_contextvars(**ids)


async def _answer(request: web.Request, handler: Handler, door: _Door) -> web.StreamResponse:
    try:
        door.check_origin(request)
        return await handler(request)
    except Problem as error:
        problem = error
    except CatalensError as error:
        problem = as_problem(error)
    except web.HTTPException as error:
        if error.status < HTTPStatus.BAD_REQUEST:
            raise
        problem = _http_problem(error, request)
    except ConnectionError:
        problem = Problem(400, "the connection broke", headers={hdrs.CONNECTION: "close"})  # nobody reads it
    except Exception:  # the boundary: the client gets a 500 without details, the log has them
        log.exception("http.failed", method=request.method, path=request.path)
        problem = Problem(500, "Something failed in the service; its log has the request id.")
    if request.writer.output_size > 0 and request.transport is not None:
        request.transport.abort()  # an answer was under way: only a cut connection can tell that it is not whole
    return _problem_response(problem, request[_REQUEST_ID])


def _measure(request: web.Request, response: web.StreamResponse, seconds: float) -> None:
    route, method = _route_of(request), _method_of(request)
    metrics = request.app[_METRICS]
    metrics.http_requests.labels(method, route, str(response.status)).inc()
    metrics.http_seconds.labels(method, route).observe(seconds)
    level = log.error if response.status >= HTTPStatus.INTERNAL_SERVER_ERROR else log.debug
    level("http.answered", method=method, route=route, status=response.status, seconds=round(seconds, 4))


def _route_of(request: web.Request) -> str:
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "unmatched"


def _method_of(request: web.Request) -> str:
    return request.method if request.method in _METHODS else "other"


async def _finish_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["X-Request-Id"] = request.get(_REQUEST_ID, "")
    response.headers[hdrs.SERVER] = "catalens"
    for name, text in _SECURITY_HEADERS.items():
        response.headers.setdefault(name, text)


class _OneLine(logging.Handler):
    """What aiohttp says about broken HTTP, as one event: a stranger must not fill the log with tracebacks."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        log.info("http.broken", message=record.getMessage(), error=repr(error)[:500])


def _protocol_log() -> logging.Logger:
    logger = logging.Logger("catalens.http", logging.INFO)  # noqa: LOG001  # for one server, not for the tree
    logger.addHandler(_OneLine())
    return logger


@asynccontextmanager
async def serving(app: web.Application, settings: Settings) -> AsyncIterator[str]:
    """Serve `app` on the configured address and yield its base URL; on leaving, requests in work are finished.

    Raises Misconfigured when the address can't be bound.
    """
    host, port = settings.http.host, settings.http.port
    runner = web.AppRunner(
        app, access_log=None, logger=_protocol_log(), shutdown_timeout=settings.embedder.drain_deadline
    )
    try:
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise Misconfigured(
                f"can't listen on {host}:{port} ({error.strerror}): free it, or set CATALENS_HTTP__PORT to another"
            ) from error
        bound = runner.addresses[0][1]
        yield f"http://{f'[{host}]' if ':' in host else host}:{bound}"
    finally:
        await runner.cleanup()
