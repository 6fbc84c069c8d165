"""Where the command line finds its service, and with which key."""

from __future__ import annotations

from catalens.client import ONCE, CatalensClient
from catalens.settings import Settings


def service_url(settings: Settings) -> str:
    """Return CATALENS_URL or, when that is not set, the address that these settings make a server bind."""
    if "url" in settings.model_fields_set or settings.http.port == 0:
        return settings.url.rstrip("/")
    return local_url(settings.http.host, settings.http.port)


def local_url(host: str, port: int) -> str:
    """Return the URL under which a server bound to `host` is reached from the same machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104  # read, not bound
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def service_key(settings: Settings) -> str | None:
    """Return the key to send: CATALENS_API_KEY, or the first that these settings make a server accept."""
    if settings.api_key is not None:
        return settings.api_key.get_secret_value()
    accepted = (key.secret.get_secret_value() for key in settings.api_keys if key.secret is not None)
    return next(accepted, None)


def connect(settings: Settings, url: str | None = None) -> CatalensClient:
    """Return a client of the service, which tries nothing but an import again: somebody waits for the answer."""
    return CatalensClient(url or service_url(settings), service_key(settings), retry=ONCE)
