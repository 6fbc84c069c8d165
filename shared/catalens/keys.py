"""The API keys that a service accepts: of the settings, and of a file that is read again when it changes."""

from __future__ import annotations

import asyncio
import hmac
from hashlib import sha256
from pathlib import Path
from typing import Final

import structlog
from pydantic import ValidationError

from catalens.errors import Misconfigured
from catalens.settings import ApiKey, Settings
from catalens.telemetry import Metrics

log = structlog.get_logger(__name__)

_EVERY: Final = 2.0  # seconds between two looks at the file
_SAY_AGAIN: Final = 60.0  # seconds until a file that is still broken is complained of again
_MOST_BYTES: Final = 4 * 1024 * 1024


def digest_of(secret: str) -> str:
    """Return what is kept of a secret: its SHA-256, in hex.

    A plain hash will do, because `catalens keys create` draws 256 random bits: there is no dictionary to try, and a
    slow hash would only make each request slow (docs/adr/0022).
    """
    return sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def parse_keys(data: bytes, where: object) -> tuple[ApiKey, ...]:
    """Return the keys of a file: one JSON object a line, `#` begins a comment; Misconfigured names a wrong line."""
    found = []
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith(b"#"):
            continue
        try:
            key = ApiKey.model_validate_json(line)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            field = ".".join(str(part) for part in first["loc"])
            raise Misconfigured(f"{where}, line {number}: {f'{field}: ' if field else ''}{first['msg']}") from None
        if key.secret is not None:
            raise Misconfigured(f"{where}, line {number}: keep the sha256 here, never the secret")
        found.append(key)
    return tuple(found)


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """Return the keys of the file (blocking); Misconfigured if it is not there or broken."""
    return parse_keys(_content(path), path)


class Keyring:
    """The keys that are accepted now; a file that breaks while the process runs leaves the keys as they were."""

    def __init__(self, settings: Settings) -> None:
        """Read the file, if there is one (blocking, and small); raises Misconfigured."""
        self._own = settings.api_keys
        self._path = settings.api_keys_file
        self._data = b"" if self._path is None else _content(self._path)
        self._keys = self._checked(self._data)

    @property
    def keys(self) -> tuple[ApiKey, ...]:
        """All of them, those that have expired included."""
        return tuple(key for _, key in self._keys)

    def find(self, secret: str) -> ApiKey | None:
        """Return the key of that secret; every key is compared in full, so that no time tells which."""
        sent = digest_of(secret).encode()
        found = [key for digest, key in self._keys if hmac.compare_digest(digest, sent)]
        return found[0] if found else None

    def refresh(self) -> bool:
        """Read the file again (blocking); returns whether it has changed. Misconfigured changes nothing."""
        if self._path is None:
            return False
        data = _content(self._path)
        if data == self._data:
            return False
        self._keys = self._checked(data)
        self._data = data
        return True

    async def follow(self, metrics: Metrics) -> None:
        """Keep to the file, until cancelled."""
        broken, told = "", 0.0
        while self._path is not None:
            await asyncio.sleep(_EVERY)
            now, failure, changed = asyncio.get_running_loop().time(), "", False
            try:
                changed = await asyncio.to_thread(self.refresh)
            except Misconfigured as error:
                failure = str(error)
            metrics.keys_readable.set(not failure)
            if failure and (failure != broken or now - told > _SAY_AGAIN):
                log.error("keys.broken", error=failure, advice="mend it: until then the earlier keys count")
                told = now
            elif changed or (broken and not failure):
                log.info("keys.read", file=str(self._path), keys=len(self._keys))
            broken = failure

    def _checked(self, data: bytes) -> tuple[tuple[bytes, ApiKey], ...]:
        keys: dict[str, ApiKey] = {}
        for key in (*self._own, *parse_keys(data, self._path)):
            digest = key.sha256 or (digest_of(key.secret.get_secret_value()) if key.secret else "")
            if digest in keys:
                raise Misconfigured(f"the API keys {keys[digest].name!r} and {key.name!r} have the same secret")
            keys[digest] = key
        return tuple((digest.encode(), key) for digest, key in keys.items())


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise Misconfigured(f"the API keys cannot be read from {path}: {error.strerror}") from error
    if len(data) > _MOST_BYTES:
        raise Misconfigured(f"{path} is too large for a file of API keys")
    return data
