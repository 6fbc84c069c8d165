"""What both HTTP services share: the app with its keys, limits, probes, request ids and problem details."""

from __future__ import annotations

import asyncio
import functools
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from http import HTTPStatus
from typing import Any, Final

import structlog
from aiohttp import hdrs, web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from pydantic_core import to_json

from catalens import tracing
from catalens.access import ALLOWANCE, TENANT, Door
from catalens.domain import DEFAULT_TENANT
from catalens.errors import CatalensError, Misconfigured
from catalens.keys import Keyring
from catalens.limits import TokenBuckets
from catalens.openapi import PICTURE, Content, Handler, NoParams, Operation, ProblemDetails, document
from catalens.ports import RateLimiter
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
from catalens.settings import Settings
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
    "is_shared",
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
_QUOTED: Final = re.compile("b?['\"\n]")
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_PROBES: Final = frozenset({"/livez", "/readyz", "/metrics"})
"""Asked every few seconds by machines: they have no traces."""
_SECURITY_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob: http: https:; style-src 'self'; "
    "script-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "Referrer-Policy": "same-origin",
}

_METRICS: Final = web.AppKey("metrics", Metrics)
_KEYRING: Final = web.AppKey("keyring", Keyring)
_REQUEST_ID: Final = web.RequestKey("request_id", str)
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
    tenant: str = request.get(TENANT, DEFAULT_TENANT)
    return tenant


def is_shared(app: web.Application) -> bool:
    """Return whether keys of several tenants are accepted now."""
    return len({key.tenant for key in app[_KEYRING].keys}) > 1


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


# --- the app ------------------------------------------------------------------------------------------------


def build_app(
    operations: Iterable[Operation],
    settings: Settings,
    metrics: Metrics,
    *,
    ready: Ready,
    title: str,
    limiter: RateLimiter | None = None,
) -> web.Application:
    """Return the app that serves `operations`, the probes, /metrics and /openapi.json.

    `ready` really uses what the service needs and returns, by component, "ok" or what is wrong with it.
    `limiter` counts the requests of keys that have a rate; without one this process counts its own. Every answer that
    is no success is problem details. Raises Misconfigured when the bind address would let everybody in, and when the
    file of API keys is not there or broken.
    """
    table = list(operations)
    keyring = Keyring(settings)
    door = Door(settings, keyring, limiter or TokenBuckets())
    app = web.Application(middlewares=[_serve(door)], client_max_size=settings.http.max_body)
    app[SETTINGS] = settings
    app[_METRICS] = metrics
    app[_KEYRING] = keyring
    app.on_response_prepare.append(_finish_headers(door))
    app.cleanup_ctx.append(_follow_keys)
    for operation in table:
        _route(app, operation.method, operation.path, door.guard(_without_params(operation)))

    @functools.cache
    def openapi() -> bytes:  # takes as long as a tenth of the start, and most processes are never asked
        return to_json(document(table, settings, title=title))

    for path, handler in _probes(ready, metrics, openapi).items():
        _route(app, "GET", path, handler)
    return app


def _without_params(operation: Operation) -> Operation:
    """Return an operation that takes no parameters as one that refuses them; the others read theirs themselves."""
    if operation.params is not NoParams:
        return operation

    async def handler(request: web.Request) -> web.StreamResponse:
        read_params(request, NoParams)
        return await operation.handler(request)

    return replace(operation, handler=handler)


async def _follow_keys(app: web.Application) -> AsyncIterator[None]:
    task = asyncio.create_task(app[_KEYRING].follow(app[_METRICS]), name="keys.follow")
    yield
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def _route(app: web.Application, method: str, path: str, handler: Handler) -> None:
    pattern = re.sub(r"{(\w+)}", r"{\1:[^/]+}", path)  # an encoded slash is a wrong id, not another path
    if method == "GET":
        app.router.add_get(pattern, handler)
    else:
        app.router.add_route(method, pattern, handler)


def _probes(ready: Ready, metrics: Metrics, openapi: Callable[[], bytes]) -> dict[str, Handler]:
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
        return web.Response(body=await asyncio.to_thread(openapi), content_type="application/json")

    return {"/livez": livez, "/readyz": readyz, "/metrics": prometheus, "/openapi.json": contract}


def _serve(door: Door) -> Callable[..., Awaitable[web.StreamResponse]]:
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


async def _answer(request: web.Request, handler: Handler, door: Door) -> web.StreamResponse:
    try:
        door.check_origin(request)
        return door.preflight(request) or await handler(request)
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


def _finish_headers(door: Door) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    async def finish(request: web.Request, response: web.StreamResponse) -> None:
        response.headers["X-Request-Id"] = request.get(_REQUEST_ID, "")
        response.headers[hdrs.SERVER] = "catalens"
        for name, text in _SECURITY_HEADERS.items():
            response.headers.setdefault(name, text)
        if ALLOWANCE in request:
            response.headers.update(request[ALLOWANCE].headers())
        door.share(request, response)

    return finish


class _OneLine(logging.Handler):
    """What aiohttp says about broken HTTP, as one event: a stranger must not fill the log with tracebacks.

    Its errors quote what was sent, which may be a header with a key in it: what is quoted is left out.
    """

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        why = _QUOTED.split(str(getattr(error, "message", "")), maxsplit=1)[0].strip(" :")
        log.info("http.broken", message=record.getMessage(), error=type(error).__name__, why=why[:200])


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
