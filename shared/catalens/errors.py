"""What can go wrong, by what the caller should do about it."""

from __future__ import annotations


class CatalensError(Exception):
    """Base of every error that Catalens raises on purpose; its text is fit for the client or operator."""


class InvalidEvent(CatalensError):
    """The event can never be processed as it is: it belongs in the dead-letter topic, not in a retry."""


class InvalidPicture(CatalensError):
    """The bytes are no picture that can be embedded; `reason` is a stable word for metrics and tests.

    Reasons: `empty`, `not_a_picture`, `truncated`, `too_many_bytes`, `too_many_pixels`,
    `not_encodable` (the model gives no finite vector for it).
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class ForbiddenUrl(CatalensError):
    """The URL is malformed or points where it must not (SSRF defence); retrying cannot help."""


class Transient(CatalensError):
    """The same call may succeed later: an engine is away, a host is slow, a disk is full."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Overloaded(Transient):
    """A bounded queue is full: pause and try after `retry_after` seconds (HTTP 429)."""


class StorageFull(Transient):
    """The disk is full: nothing was written (HTTP 503)."""


class NotFound(CatalensError):
    """The thing that was named does not exist."""


class Conflict(CatalensError):
    """The request contradicts an earlier one (HTTP 409), as an Idempotency-Key with another body does."""


class NotLoaded(CatalensError):
    """This process was told not to load what this needs: another one may have it, this one never will (HTTP 501)."""


class NoFacet(CatalensError):
    """The index cannot count this field; the text says why and what would help (HTTP 422)."""


class ModelMismatch(CatalensError):
    """The index was built by another model. Vectors of two models are never mixed, always refused."""


class Misconfigured(CatalensError):
    """The process cannot start as configured; the text says which setting to change and to what."""


class NoTopic(Misconfigured):
    """A topic does not exist, or not yet: `catalens topics apply` makes it."""
