"""Who may call: API keys with their scopes and rates, other sites' pages, and how many requests at once."""

from __future__ import annotations

import ipaddress
import time
from dataclasses import dataclass
from typing import Final

import structlog
from aiohttp import hdrs, web

from catalens.domain import DEFAULT_TENANT
from catalens.errors import Misconfigured, Overloaded
from catalens.keys import Keyring
from catalens.limits import Allowance
from catalens.openapi import Handler, Operation
from catalens.ports import RateLimiter
from catalens.problems import Problem
from catalens.settings import ApiKey, Settings

TENANT: Final = web.RequestKey("tenant", str)
ALLOWANCE: Final = web.RequestKey("allowance", Allowance)
_ALLOWED_HEADERS: Final = "Authorization, Content-Type, Idempotency-Key, X-API-Key, X-Request-Id"
_SHOWN_HEADERS: Final = "ETag, RateLimit, RateLimit-Policy, Retry-After, X-Request-Id"


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Where a request is counted."""

    limiter: RateLimiter
    client: str
    rate: float


_BUCKET: Final = web.RequestKey("bucket", _Bucket)


async def counts_as(request: web.Request, requests: int) -> None:
    """Count a request that was let in, and holds several, as so many: those after it wait the longer."""
    if _BUCKET in request and requests > 1:
        bucket = request[_BUCKET]
        request[ALLOWANCE] = await bucket.limiter.owe(bucket.client, bucket.rate, requests - 1)


class Door:
    """Decides who comes in: keys if there are any, else this machine's own programs and pages only."""

    def __init__(self, settings: Settings, keyring: Keyring, limiter: RateLimiter) -> None:
        """Raise Misconfigured when the bind address would let everybody in."""
        self._keyed = settings.keyed
        self._keyring = keyring
        self._limiter = limiter
        self._origins = frozenset(settings.http.cors_origins)
        self._local_only = not settings.keyed and not settings.allow_anonymous
        self._limit = settings.http.max_concurrent
        self._active = 0
        if self._local_only and not is_loopback(settings.http.host):
            raise Misconfigured(
                f"binding to {settings.http.host} without an API key would let everybody in: set CATALENS_API_KEYS or "
                "CATALENS_API_KEYS_FILE, or CATALENS_ALLOW_ANONYMOUS=true, or CATALENS_HTTP__HOST=127.0.0.1"
            )

    # --- other sites' pages -----------------------------------------------------------------------------------

    def check_origin(self, request: web.Request) -> None:
        """Keep other sites' pages out where no key does it (cross-site requests, DNS rebinding)."""
        if self._keyed:
            return
        changes = request.method not in ("GET", "HEAD")
        if changes and request.headers.get("Sec-Fetch-Site") == "cross-site" and not self._knows(request):
            raise Problem(403, "another site's page may not change anything here without an API key")
        host = request.headers.get(hdrs.HOST)
        if self._local_only and host is not None and not is_loopback(_host_name(host)):
            raise Problem(
                403, "without API keys only the Host localhost is served: set CATALENS_API_KEYS, or "
                "CATALENS_ALLOW_ANONYMOUS=true to let everybody in"
            )  # fmt: skip

    def preflight(self, request: web.Request) -> web.Response | None:
        """Return the answer to a browser that asks whether a page of a known site may call; None if it is not that."""
        if request.method != "OPTIONS" or hdrs.ACCESS_CONTROL_REQUEST_METHOD not in request.headers:
            return None
        if not self._knows(request):
            return None
        return web.Response(
            status=204,
            headers={
                hdrs.ACCESS_CONTROL_ALLOW_METHODS: "GET, POST, PUT, PATCH, DELETE",
                hdrs.ACCESS_CONTROL_ALLOW_HEADERS: _ALLOWED_HEADERS,
                hdrs.ACCESS_CONTROL_MAX_AGE: "600",
            },
        )

    def share(self, request: web.Request, response: web.StreamResponse) -> None:
        """Let pages of the known sites read the answer."""
        if not self._origins:
            return
        response.headers.add(hdrs.VARY, hdrs.ORIGIN)
        if self._knows(request):
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = request.headers[hdrs.ORIGIN]
            response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = _SHOWN_HEADERS

    def _knows(self, request: web.Request) -> bool:
        return request.headers.get(hdrs.ORIGIN) in self._origins

    # --- keys -------------------------------------------------------------------------------------------------

    def guard(self, operation: Operation) -> Handler:
        """Return the operation's handler behind the key, its scope and rate, and the limit of concurrent requests."""

        async def guarded(request: web.Request) -> web.StreamResponse:
            if operation.access != "public":
                await self._admit(request, operation)
            if self._active >= self._limit:
                raise Overloaded(f"{self._limit} requests are in work, which is the limit")
            self._active += 1
            try:
                return await operation.handler(request)
            finally:
                self._active -= 1

        return guarded

    async def _admit(self, request: web.Request, operation: Operation) -> None:
        """Let the request act for its key's tenant; Problem 401, 403 or 429 if it may not."""
        key = self._key(request) if self._keyed else None
        request[TENANT] = DEFAULT_TENANT if key is None else key.tenant
        structlog.contextvars.bind_contextvars(tenant=request[TENANT])
        if key is None:
            return
        structlog.contextvars.bind_contextvars(client=key.name)
        if operation.access != "keyed" and operation.access not in key.scopes:
            has = ", ".join(key.scopes)
            raise Problem(403, f"this takes a key with the scope {operation.access}, yours has: {has}", kind="scope")
        if key.rate is None:
            return
        bucket = request[_BUCKET] = _Bucket(self._limiter, f"{key.tenant}|{key.name}", key.rate)
        allowance = request[ALLOWANCE] = await self._limiter.take(bucket.client, bucket.rate)
        if not allowance.granted:
            raise Problem(
                429,
                f"this key may make {key.rate:g} requests a second",
                kind="rate-limited",
                headers={hdrs.RETRY_AFTER: str(allowance.retry_after)},
            )

    def _key(self, request: web.Request) -> ApiKey:
        sent = _sent_key(request)
        found = self._keyring.find(sent) if sent else None
        if found is not None and (found.expires is None or time.time() < found.expires.timestamp()):
            return found
        if found is not None:
            detail = "the API key has expired"
        else:
            detail = "the API key is unknown" if sent else "send an API key as Authorization: Bearer … or X-API-Key"
        raise Problem(401, detail, headers={hdrs.WWW_AUTHENTICATE: 'Bearer realm="catalens"'})


def _sent_key(request: web.Request) -> str:
    scheme, _, token = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else request.headers.get("X-API-Key", "")


def _host_name(host: str) -> str:
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def is_loopback(host: str) -> bool:
    """Return whether only this machine can come in there."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
