"""What the command line says to a running Catalens, over HTTP and nothing else."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypeVar
from urllib.parse import quote

import aiohttp
from pydantic import Field, ValidationError

from catalens.domain import Value
from catalens.errors import CatalensError
from catalens.settings import Settings

# Typical of a search or an upload on a slow machine; a server that is silent for longer is stuck.
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=120)
_MAX_PICTURE = 20 * 1024 * 1024
Answer = TypeVar("Answer", bound=Value)


class Unreachable(CatalensError):
    """Nobody answers at the URL, or the connection broke; the text says how to start a server."""


class Refused(CatalensError):
    """The service answered with a problem (RFC 9457)."""

    def __init__(self, status: int, title: str, detail: str, retry_after: float | None = None) -> None:
        super().__init__(f"{title}: {detail}" if detail else title)
        self.status = status
        self.retry_after = retry_after

    @property
    def passing(self) -> bool:
        """The same request may succeed later."""
        return self.status in (429, 502, 503, 504)


class LineError(Value):
    """A line that the service rejected; `line` counts from 1 within the request."""

    line: int
    product_id: str | None = None
    error: str


class BulkAnswer(Value):
    """What became of one NDJSON request."""

    accepted: int
    rejected: int
    errors: Annotated[tuple[LineError, ...], Field(strict=False)] = ()


class Stats(Value):
    """How much is searchable and how much is still on its way."""

    products: int
    images_pending: int
    lag: int
    """Events that the embedder has not finished."""

    @property
    def settled(self) -> bool:
        """Everything that was accepted is searchable with its picture, or has failed for good."""
        return self.lag == 0 and self.images_pending == 0


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


class Client:
    """One session with a service. Raises Unreachable and Refused, never aiohttp's own errors."""

    def __init__(self, url: str, api_key: str | None, session: aiohttp.ClientSession) -> None:
        self.url = url
        self._api_key = api_key
        self._session = session

    async def search(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the service's answer to one search."""
        answer = await self._json("POST", "/api/v1/search", json=body)
        if not isinstance(answer.get("results"), list):
            raise self._foreign()
        return answer

    async def send_lines(self, payload: bytes) -> BulkAnswer:
        """Post NDJSON lines; when this returns, the accepted ones survive any crash."""
        answer = await self._json(
            "POST", "/api/v1/products", data=io.BytesIO(payload), headers={"Content-Type": "application/x-ndjson"}
        )
        return self._parse(BulkAnswer, answer)

    async def stats(self) -> Stats:
        """Return what is searchable and what is on its way."""
        return self._parse(Stats, await self._json("GET", "/api/v1/stats"))

    async def product(self, product_id: str) -> dict[str, Any] | None:
        """Return a searchable product, or None."""
        try:
            return await self._json("GET", f"/api/v1/products/{quote(product_id, safe='')}")
        except Refused as refused:
            if refused.status == 404:
                return None
            raise

    async def delete(self, product_id: str, version: int) -> None:
        """Delete a product as of `version`; when this returns, the deletion survives any crash."""
        await self._json("DELETE", f"/api/v1/products/{quote(product_id, safe='')}", params={"version": str(version)})

    async def export(self) -> AsyncIterator[bytes]:
        """Yield the indexed products, one line each in the form in which they are put in, in the order of their ids."""
        async with self._open("GET", "/api/v1/products", headers={"Accept": "application/x-ndjson"}) as response:
            if response.status >= 400:
                raise await self._problem(response)
            rest = b""
            async for block in response.content.iter_any():
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    yield line
            if rest:
                raise Unreachable(f"the connection to {self.url} broke in the middle of a product")

    async def start_reindex(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Ask the process to change its model or rebuild its index; returns how far it is."""
        return await self._json("POST", "/api/v1/reindex", json=request)

    async def reindex_state(self) -> dict[str, Any]:
        """Return how far the reindex is."""
        return await self._json("GET", "/api/v1/reindex")

    async def indexes(self) -> list[dict[str, Any]]:
        """Return the indexes that there are."""
        return list((await self._json("GET", "/api/v1/indexes")).get("indexes", ()))

    async def drop_index(self, name: str) -> None:
        """Delete an index that is not current."""
        await self._json("DELETE", f"/api/v1/indexes/{quote(name, safe='')}")

    async def dead_letters(self, asked: Mapping[str, str]) -> tuple[list[dict[str, Any]], str | None]:
        """Return a page of dead letters and where the next one begins, None after the last."""
        answer = await self._json("GET", "/api/v1/dead-letters", params=asked)
        letters, following = answer.get("dead_letters"), answer.get("next")
        if not isinstance(letters, list) or not isinstance(following, str | None):
            raise self._foreign()
        return letters, following

    async def dead_letter(self, letter_id: str) -> dict[str, Any]:
        """Return a dead letter with its headers and data."""
        return await self._json("GET", f"/api/v1/dead-letters/{quote(letter_id, safe='')}")

    async def replay_letter(self, letter_id: str, *, force: bool = False) -> bool:
        """Send the event of a dead letter through the embedder again; return False if it was resolved before."""
        path = f"/api/v1/dead-letters/{quote(letter_id, safe='')}/replay"
        answer = await self._json("POST", path, params={"force": "true"} if force else {})
        return answer.get("changed") is True

    async def purge_letter(self, letter_id: str) -> bool:
        """Drop a dead letter for good; return False if it was resolved before."""
        answer = await self._json("DELETE", f"/api/v1/dead-letters/{quote(letter_id, safe='')}")
        return answer.get("changed") is True

    async def ready(self) -> tuple[bool, dict[str, Any]]:
        """Return what /readyz says: whether it is, and the checks."""
        async with self._open("GET", "/readyz") as response:
            return response.status == 200, await self._object(response)

    async def picture(self, address: str) -> bytes:
        """Return a result's picture, from the service or from where the catalogue keeps it; at most 20 MiB."""
        async with self._open("GET", address) as response:
            if response.status != 200:
                raise await self._problem(response)
            data = bytearray()
            async for block in response.content.iter_chunked(65_536):
                data += block
                if len(data) > _MAX_PICTURE:
                    raise Refused(413, "Picture too large", address)
            return bytes(data)

    async def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        async with self._open(method, path, **options) as response:
            if response.status >= 400:
                raise await self._problem(response)
            return await self._object(response)

    @asynccontextmanager
    async def _open(self, method: str, path: str, **options: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        url = path if "://" in path else f"{self.url}{path}"
        headers = dict(options.pop("headers", {}))
        # The key is for the service only: a result's picture may live on any host.
        if self._api_key and url.startswith(f"{self.url}/"):
            headers["Authorization"] = f"Bearer {self._api_key}"
        try:
            async with self._session.request(method, url, headers=headers, **options) as response:
                yield response
        except aiohttp.ClientConnectorError as error:
            raise Unreachable(
                f"no Catalens answers at {self.url}. Start it with `catalens serve` or `make demo`, "
                "or set CATALENS_URL to where it runs."
            ) from error
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError) as error:
            raise CatalensError(f"CATALENS_URL is no http(s) address: {self.url}") from error
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Unreachable(f"the connection to {self.url} broke: {str(error) or type(error).__name__}") from error

    async def _object(self, response: aiohttp.ClientResponse) -> dict[str, Any]:
        try:
            answer = await response.json(content_type=None)
        except ValueError as error:
            raise self._foreign() from error
        if not isinstance(answer, dict):
            raise self._foreign()
        return answer

    async def _problem(self, response: aiohttp.ClientResponse) -> Refused:
        try:
            problem = await self._object(response)
        except CatalensError:
            problem = {}
        fields = "; ".join(
            f"{entry.get('field')}: {entry.get('message')}"
            for entry in problem.get("errors") or ()
            if isinstance(entry, dict)
        )
        detail = str(problem.get("detail") or "")
        if fields:
            detail = f"{detail} ({fields})" if detail else fields
        wait = response.headers.get("Retry-After", "")
        return Refused(
            response.status,
            str(problem.get("title") or f"HTTP {response.status} {response.reason}"),
            detail,
            float(wait) if wait.isdigit() else None,
        )

    def _parse(self, model: type[Answer], answer: dict[str, Any]) -> Answer:
        try:
            return model.model_validate(answer)
        except ValidationError as error:
            raise self._foreign() from error

    def _foreign(self) -> CatalensError:
        return CatalensError(f"what answers at {self.url} is not Catalens, or another version of it")


@asynccontextmanager
async def connect(url: str, api_key: str | None) -> AsyncIterator[Client]:
    """Open a session with the service at `url`; nothing is sent yet."""
    async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
        yield Client(url.rstrip("/"), api_key, session)
