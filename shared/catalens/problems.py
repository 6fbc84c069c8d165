"""What a client is told when something is wrong: problem details (RFC 9457), and which error becomes which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final

import structlog

from catalens.errors import (
    CatalensError,
    Conflict,
    ForbiddenUrl,
    InvalidEvent,
    InvalidPicture,
    NotFound,
    NotLoaded,
    Overloaded,
    Transient,
)

log = structlog.get_logger(__name__)

PROBLEM_JSON: Final = "application/problem+json"
_KINDS: Final = {
    400: ("malformed", "Malformed request"),
    401: ("key", "API key needed"),
    403: ("forbidden", "Forbidden"),
    404: ("not-found", "Not found"),
    405: ("method", "Method not allowed"),
    408: ("timeout", "Request too slow"),
    409: ("conflict", "Conflict"),
    413: ("too-large", "Too large"),
    415: ("media-type", "Unsupported media type"),
    422: ("invalid", "Invalid value"),
    429: ("overloaded", "Too many requests"),
    500: ("internal", "Internal error"),
    501: ("not-loaded", "Not loaded here"),
    503: ("unavailable", "Temporarily unavailable"),
}


class Problem(Exception):
    """An answer that is a problem (RFC 9457); `errors` are (field, message) pairs."""

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        title: str | None = None,
        kind: str | None = None,
        errors: Sequence[tuple[str, str]] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        default_kind, default_title = _KINDS.get(status) or ("error", HTTPStatus(status).phrase)
        self.status = status
        self.detail = detail
        self.kind = kind or default_kind
        self.title = title or default_title
        self.errors = tuple(errors)
        self.headers = dict(headers or {})

    def body(self, request_id: str) -> dict[str, Any]:
        """Return the problem as the JSON object of docs/reference/errors.md."""
        found: dict[str, Any] = {
            "type": f"urn:catalens:problem:{self.kind}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "request_id": request_id,
        }
        if self.errors:
            found["errors"] = [{"field": name, "message": message} for name, message in self.errors]
        return found


def as_problem(error: CatalensError, *, field: str = "") -> Problem:
    """Return what the client is told about `error`, which is about `field` if that is given."""
    problem = _problem(error)
    if field:
        problem.errors = ((field, problem.detail),)
    return problem


def _problem(error: CatalensError) -> Problem:
    detail = str(error)
    if isinstance(error, InvalidPicture):
        too_large = error.reason.startswith("too_many_")
        kind = error.reason.replace("_", "-")
        return Problem(413 if too_large else 415, detail, kind=kind, title="Picture refused")
    if isinstance(error, Transient):
        status = 429 if isinstance(error, Overloaded) else 503
        return Problem(status, detail, headers={"Retry-After": str(max(1, round(error.retry_after)))})
    if isinstance(error, NotLoaded):
        return Problem(501, detail)
    if isinstance(error, NotFound):
        return Problem(404, detail)
    if isinstance(error, Conflict):
        return Problem(409, detail)
    if isinstance(error, ForbiddenUrl):
        return Problem(422, detail, kind="forbidden-url")
    if isinstance(error, InvalidEvent):
        return Problem(422, detail)
    log.error("http.unexpected", error=detail, kind=type(error).__name__)
    return Problem(500, "Something failed in the service; its log has the request id.")


def invalid(*errors: tuple[str, str]) -> Problem:
    """Return the 422 problem of these (field, message) pairs."""
    name, message = errors[0]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return Problem(422, f"{name}: {message}{more}" if name else f"{message}{more}", errors=errors)
