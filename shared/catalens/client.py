"""A typed client of the HTTP API, for catalogue systems and storefronts in Python; the command line is built on it."""

from __future__ import annotations

import base64
import io
import json
import uuid
from asyncio import Task, create_task, gather
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Annotated, Any, Final, Literal, Protocol, Self, TypeAlias, TypeVar
from urllib.parse import quote

import aiohttp
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from catalens.errors import CatalensError
from catalens.ports import Clock
from catalens.retry import RetryPolicy, SystemClock

CHUNK_LINES: Final = 100
"""Products of one import request: the service lists the first 100 errors of a request, so none goes unseen."""
CHUNK_BYTES: Final = 8 * 1024 * 1024
IN_FLIGHT: Final = 3
"""Import requests at once."""
USUAL: Final = RetryPolicy(attempts=4, first=0.25, longest=10.0)
ONCE: Final = RetryPolicy(attempts=1)
PATIENCE: Final = RetryPolicy(attempts=8, first=0.5, longest=30.0)
"""Of an import: a service that restarts is back by then; one that is not must be looked at."""
# Typical of a search or an upload on a slow machine; a server that is silent for longer is stuck.
_TIMEOUT: Final = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=120)
_MAX_PICTURE: Final = 20 * 1024 * 1024
_NDJSON: Final = "application/x-ndjson"

Picture: TypeAlias = bytes | str | Mapping[str, str]
"""The bytes of a picture, or the URL of one, or what the API takes: {"url": …} or {"data": base64}."""
Example: TypeAlias = str | bytes | Mapping[str, str]
"""What to be like, or unlike: the id of a product, the bytes of a picture, or what the API takes."""


# --- what can go wrong ------------------------------------------------------------------------------------


class Failed(CatalensError):
    """A call that failed; `tries` says how often it was tried."""

    passing: bool
    """The same request may succeed later."""
    retry_after: float | None = None
    tries = 1


class Unreachable(Failed):
    """Nobody answers at the URL, or the connection broke; the text says how to start a server."""

    passing = True


class Refused(Failed):
    """The service answered with a problem (RFC 9457, docs/reference/errors.md)."""

    def __init__(
        self,
        status: int,
        title: str,
        detail: str = "",
        *,
        kind: str = "",
        errors: Sequence[tuple[str, str]] = (),
        request_id: str = "",
        retry_after: float | None = None,
    ) -> None:
        said = [f"{field}: {message}" for field, message in errors]
        fields = "; ".join(said)
        # A detail that begins as the first of the fields says no more than they do.
        more = detail and not detail.startswith((*said[:1], *(message for _, message in errors[:1])))
        told = (f"{detail} ({fields})" if more else fields) if fields else detail
        super().__init__(f"{title}: {told}" if told else title)
        self.status = status
        self.title = title
        self.detail = detail
        self.type = kind
        """Stable: urn:catalens:problem:…"""
        self.errors = tuple(errors)
        """(field, message) of each field that is wrong."""
        self.request_id = request_id
        """What the service's log has under this."""
        self.retry_after = retry_after
        self.passing = status in (429, 502, 503, 504)


# --- what is answered -------------------------------------------------------------------------------------


class Answer(BaseModel):
    """An answer, with everything in it: what a newer service says beyond these fields is kept as attributes."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)


A = TypeVar("A", bound=Answer)


class Tag(Answer):
    """The best label of a list, and its share among them."""

    value: str
    score: float


class ProductFields(Answer):
    """What is known of a product; None where it is not."""

    product_id: str
    name: str | None = None
    description: str | None = None
    brand: str | None = None
    category: str | None = None
    price: float | None = None
    currency: str | None = None
    stock: int | None = None
    in_stock: bool | None = None
    image: str | None = None
    """Where a browser finds the first picture; below the service's URL if it begins with a slash."""
    image_status: str | None = None
    image_error: str | None = None
    url: str | None = None
    locale: str | None = None
    group_id: str | None = None
    attributes: dict[str, Any] | None = None
    tags: dict[str, Tag] | None = None
    """What the model sees, by list; None where it sees none of it."""
    version: int | None = None
    offer_version: int | None = None


class Part(Answer):
    """What one list, one boost, or being exactly what was asked for, adds to a score."""

    part: str
    contribution: float
    field: str | None = None
    score: float | None = None
    calibrated: float | None = None
    weight: float | None = None


class Hit(ProductFields):
    """One result of a search."""

    score: float
    relevance: float | None = None
    """With `min_score`: how sure it is that this was asked for, 0 to 1."""
    variants: int | None = None
    """With `group_by="group_id"`: how many products under the filters are of its group."""
    explain: list[Part] | None = None
    """With `explain=True`: what the score is made of."""


class FacetValue(Answer):
    """A value and how many products have it."""

    value: str | int | float | bool
    count: int


class FacetRange(Answer):
    """Numbers from `gte` to below `lt`, as a filter takes them, and how many products are there."""

    gte: float
    lt: float | None = None
    count: int


class NumberFacet(Answer):
    """From where to where the numbers go, None where there is none, and how they are spread."""

    min: float | None
    max: float | None
    ranges: list[FacetRange]


class Found(Answer):
    """The results of a search, best first."""

    results: list[Hit]
    count: int
    mode: str
    """Which mode answered."""
    model: str | None = None
    took_ms: float
    total: int | None = None
    facets: dict[str, list[FacetValue] | NumberFacet] | None = None
    """What was counted; None where it was not asked for, or is late."""
    degraded: str | None = None
    """Why this is less than was asked for, as while no encoder answers."""
    corrected: str | None = None
    """The words as they were read, where some seemed misspelt."""


class Suggestion(Answer):
    """A text that goes on as what was typed."""

    text: str
    kind: str
    """words, brand, category or product."""
    count: int | None = None
    product_id: str | None = None


class Suggestions(Answer):
    """Completions, best first."""

    suggestions: list[Suggestion]
    ready: bool
    """False until the catalogue's words have been read: there are no suggestions then."""


class Similarity(Answer):
    """How alike two things are."""

    similarity: float


class IndexedProduct(ProductFields):
    """A product as it is indexed."""

    images: list[str]
    indexed_at: str


class Listing(Answer):
    """Products in the order of their ids."""

    products: list[IndexedProduct]
    next: str | None
    """`after` of the next page; None on the last."""


class Receipt(Answer):
    """The change survives any crash; with `wait` what became of it."""

    product_id: str
    version: int | None = None
    offer_version: int | None = None
    event_id: str
    status: str
    """accepted; with `wait` indexed, superseded or failed."""
    error: str | None = None


class Embedding(Answer):
    """A vector of length 1."""

    embedding: list[float]
    dimension: int
    model: str


class Health(Answer):
    """Whether searches are answered, and how well."""

    status: Literal["ok", "degraded"]
    model: str | None
    encoder: str
    version: str


class Stats(Answer):
    """How much is searchable and how much is still on its way."""

    products: int
    images_pending: int
    lag: int
    """Events that the embedder has not finished."""

    @property
    def settled(self) -> bool:
        """Everything that was accepted is searchable with its picture, or has failed for good."""
        return self.lag == 0 and self.images_pending == 0


class LineError(Answer):
    """A product that was rejected; `line` counts from 1 within what was sent."""

    line: int
    product_id: str | None = None
    error: str


class BulkAnswer(Answer):
    """What became of one NDJSON request."""

    accepted: int
    rejected: int
    errors: Annotated[tuple[LineError, ...], Field(strict=False)] = ()


@dataclass(frozen=True, slots=True)
class ImportProgress:
    """How far an import is."""

    done: int
    """Products that are settled, from the first on: `skip` of an import that goes on from here."""
    accepted: int
    rejected: int
    errors: tuple[LineError, ...]
    """Of the products since the progress before this one; `line` counts from 1 over the whole import."""


class Lines(Protocol):
    """Products that travel in one request."""

    @property
    def payload(self) -> bytes:
        """NDJSON."""
        ...

    @property
    def ids(self) -> frozenset[str]:
        """The products that it changes."""
        ...


L = TypeVar("L", bound=Lines)


# --- the client -------------------------------------------------------------------------------------------


class CatalensClient:
    """One session with a service, to be used as `async with CatalensClient(url, key) as client`.

    What passes (429, 503, a broken connection) is tried again as `retry` says, and not before the service asks for it.
    That is safe with every call: each reads, or is safe to repeat by itself, or carries an Idempotency-Key; an import
    is where its products have a `version`, or nobody else changes them meanwhile.
    Raises Unreachable and Refused, and CatalensError where something else than Catalens answers; never aiohttp's own.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8080",
        api_key: str | None = None,
        *,
        retry: RetryPolicy = USUAL,
        clock: Clock | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self._api_key = api_key
        self._retry = retry
        self._clock = clock or SystemClock()
        self._opened: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        """Open a session; nothing is sent yet."""
        self._opened = aiohttp.ClientSession(timeout=_TIMEOUT)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connections."""
        if self._opened is not None:
            await self._opened.close()

    # --- searching ------------------------------------------------------------------------------------------

    async def search(
        self,
        query: str | Sequence[Mapping[str, Any]] | None = None,
        *,
        image: Picture | None = None,
        like: Sequence[Example] = (),
        unlike: Sequence[Example] = (),
        filters: Mapping[str, Any] | None = None,
        limit: int = 10,
        offset: int = 0,
        **more: Any,
    ) -> Found:
        """Search by words, by a picture, by examples (ids of products, or pictures), or by several of them.

        `more` are the other fields of POST /api/v1/search, such as mode, using, image_weight, facets and include.
        """
        body: dict[str, Any] = {"limit": limit, "offset": offset, **more}
        if query is not None:
            body["query"] = query
        if image is not None:
            body["image"] = _picture(image)
        for name, examples in (("like", like), ("unlike", unlike)):
            if examples:
                body[name] = [one if isinstance(one, str) else _picture(one) for one in examples]
        if filters:
            body["filters"] = filters
        return self._parse(Found, await self._json("POST", "/api/v1/search", json=body))

    async def search_batch(self, requests: Sequence[Mapping[str, Any]]) -> list[Found | Refused]:
        """Search several times in one call, each request a body of POST /api/v1/search; a problem stops no other."""
        return await self._batch(Found, "/api/v1/search/batch", requests)

    async def suggest(self, text: str, *, limit: int = 8) -> Suggestions:
        """Return how what is being typed may go on."""
        asked = {"q": text, "limit": str(limit)}
        return self._parse(Suggestions, await self._json("GET", "/api/v1/suggest", params=asked))

    async def similar(
        self, product_id: str, *, limit: int = 10, offset: int = 0, variants: bool = False, using: str = "both"
    ) -> Found:
        """Return products like that one; Refused 404 if there is none of this id."""
        asked = {"limit": str(limit), "offset": str(offset), "variants": str(variants).lower(), "using": using}
        return self._parse(Found, await self._json("GET", f"{_path(product_id)}/similar", params=asked))

    async def get(self, product_id: str) -> IndexedProduct | None:
        """Return a searchable product, or None."""
        try:
            return self._parse(IndexedProduct, await self._json("GET", _path(product_id)))
        except Refused as refused:
            if refused.status == 404:
                return None
            raise

    async def listing(self, *, after: str | None = None, limit: int = 50) -> Listing:
        """Return a page of the catalogue in the order of the ids, from the product behind `after` on."""
        asked = {"limit": str(limit)} | ({} if after is None else {"after": after})
        return self._parse(Listing, await self._json("GET", "/api/v1/products", params=asked))

    async def embed(self, text: str) -> Embedding:
        """Return the vector of a text."""
        return self._parse(Embedding, await self._json("POST", "/api/v1/embed", json={"text": text}))

    async def embed_image(self, picture: bytes) -> Embedding:
        """Return the vector of a picture."""
        answer = await self._json("POST", "/api/v1/embed-image", data=lambda: {"file": io.BytesIO(picture)})
        return self._parse(Embedding, answer)

    async def embed_batch(self, texts: Sequence[str]) -> list[Embedding | Refused]:
        """Return the vector of each text; a problem with one stops no other."""
        return await self._batch(Embedding, "/api/v1/embed/batch", [{"text": text} for text in texts])

    async def similarity(self, a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
        """Return the cosine of two things, each {"text": …} or {"image": …}, a picture as in a search."""
        one, other = ({**each, "image": _picture(each["image"])} if "image" in each else dict(each) for each in (a, b))
        answer = await self._json("POST", "/api/v1/similarity", json={"a": one, "b": other})
        return self._parse(Similarity, answer).similarity

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

    async def export(self) -> AsyncIterator[bytes]:
        """Yield the indexed products, one line each in the form in which they are put in, in the order of their ids."""
        async with self._open("GET", "/api/v1/products", headers={"Accept": _NDJSON}) as response:
            if response.status >= 400:
                raise await self._problem(response)
            rest = b""
            async for block in response.content.iter_any():
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    yield line
            if rest:
                raise Unreachable(f"the connection to {self.url} broke in the middle of a product")

    # --- changing -------------------------------------------------------------------------------------------

    async def put_product(
        self,
        product: Mapping[str, Any],
        *,
        wait: bool = False,
        timeout: float | None = None,
        idempotency_key: str | None = None,
    ) -> Receipt:
        """Create or replace a product; when this returns, the change survives any crash.

        With `wait` it returns when the product is searchable with its picture, or after `timeout` seconds. A try again
        within the call has the same Idempotency-Key; give one to make a whole second call safe too.
        """
        path = _path(str(product["product_id"]))
        return await self._write("PUT", path, wait, timeout, idempotency_key, json=dict(product))

    async def patch_offer(
        self,
        product_id: str,
        *,
        wait: bool = False,
        timeout: float | None = None,
        idempotency_key: str | None = None,
        **offer: Any,
    ) -> Receipt:
        """Change price, currency or stock (and offer_version); as put_product."""
        return await self._write("PATCH", f"{_path(product_id)}/offer", wait, timeout, idempotency_key, json=offer)

    async def delete(
        self,
        product_id: str,
        version: int | None = None,
        *,
        wait: bool = False,
        timeout: float | None = None,
        idempotency_key: str | None = None,
    ) -> Receipt:
        """Delete a product, as of `version`; as put_product."""
        params = {} if version is None else {"version": str(version)}
        return await self._write("DELETE", _path(product_id), wait, timeout, idempotency_key, params=params)

    async def import_products(
        self, products: Iterable[Mapping[str, Any]] | AsyncIterable[Mapping[str, Any]], *, skip: int = 0
    ) -> AsyncGenerator[ImportProgress, None]:
        """Send products, as many as there are, and yield after each request how far the import is.

        They are taken as fast as the service reads them. A product that is rejected never stops the rest. What was
        yielded survives any crash of either side: after a break go on with the same products and `skip=progress.done`.
        Who leaves before the end closes it (`contextlib.aclosing`), or requests go on for a while.
        """
        accepted = rejected = 0
        async with aclosing(_chunks(products, skip)) as chunks, aclosing(self.send_all(chunks)) as answers:
            async for chunk, answer in answers:
                found = [
                    error.model_copy(update={"line": chunk.places[error.line - 1]})
                    for error in answer.errors
                    if 0 < error.line <= len(chunk.places)
                ]
                accepted += answer.accepted
                rejected += answer.rejected + len(chunk.rejected)
                errors = sorted([*found, *chunk.rejected], key=lambda error: error.line)
                yield ImportProgress(chunk.upto, accepted, rejected, tuple(errors))

    async def send_all(self, chunks: AsyncIterator[L]) -> AsyncGenerator[tuple[L, BulkAnswer], None]:
        """Send chunks of NDJSON and yield what became of each, in their order; close it to leave early (`aclosing`).

        At most IN_FLIGHT are on their way, and none beside another that changes the same product: the service assigns
        versions by arrival. One that is empty is sent nowhere.
        """
        flying: deque[tuple[L, Task[BulkAnswer]]] = deque()
        try:
            async for chunk in chunks:
                while len(flying) >= IN_FLIGHT or any(chunk.ids & other.ids for other, _ in flying):
                    yield flying[0][0], await flying[0][1]
                    flying.popleft()
                flying.append((chunk, create_task(self.send_lines(chunk.payload), name="import")))
            while flying:
                yield flying[0][0], await flying[0][1]
                flying.popleft()
        finally:
            for _, task in flying:
                task.cancel()
            await gather(*(task for _, task in flying), return_exceptions=True)

    async def send_lines(self, payload: bytes) -> BulkAnswer:
        """Post NDJSON lines, with PATIENCE; when this returns, the accepted ones survive any crash."""
        if not payload:
            return BulkAnswer(accepted=0, rejected=0)
        answer = await self._json(
            "POST",
            "/api/v1/products",
            policy=PATIENCE,
            data=lambda: io.BytesIO(payload),
            headers={"Content-Type": _NDJSON},
        )
        return self._parse(BulkAnswer, answer)

    # --- state ----------------------------------------------------------------------------------------------

    async def stats(self) -> Stats:
        """Return what is searchable and what is on its way."""
        return self._parse(Stats, await self._json("GET", "/api/v1/stats"))

    async def health(self) -> Health:
        """Return whether searches are answered, and how well; Refused 503 if they are not."""
        return self._parse(Health, await self._json("GET", "/api/v1/health"))

    async def ready(self) -> tuple[bool, dict[str, Any]]:
        """Return what /readyz says: whether it is, and the checks."""
        async with self._open("GET", "/readyz") as response:
            return response.status == 200, await self._object(response)

    # --- operating ------------------------------------------------------------------------------------------

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

    # --- HTTP -----------------------------------------------------------------------------------------------

    async def _write(
        self, method: str, path: str, wait: bool, timeout: float | None, key: str | None, **options: Any
    ) -> Receipt:
        """Send a change; its Idempotency-Key makes a second try the same change and not a newer one."""
        params = dict(options.pop("params", {}))
        if wait:
            params["wait"] = "true"
        if timeout is not None:
            params["timeout"] = repr(float(timeout))
        headers = {"Idempotency-Key": key or uuid.uuid4().hex}
        return self._parse(Receipt, await self._json(method, path, params=params, headers=headers, **options))

    async def _json(
        self,
        method: str,
        path: str,
        *,
        policy: RetryPolicy | None = None,
        data: Callable[[], Any] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Return the JSON object that is answered, trying again what passes; `data` makes a body for each try."""
        policy, failures = policy or self._retry, 0
        while True:
            body = {} if data is None else {"data": data()}
            try:
                async with self._open(method, path, **body, **options) as response:
                    if response.status >= 400:
                        raise await self._problem(response)
                    return await self._object(response)
            except Failed as error:
                failures += 1
                error.tries = failures
                if not error.passing or failures >= policy.attempts:
                    raise
                await self._clock.sleep(max(policy.delay(failures), min(error.retry_after or 0.0, policy.longest)))

    @asynccontextmanager
    async def _open(self, method: str, path: str, **options: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        if self._opened is None:
            raise CatalensError("open the client first: async with CatalensClient(…) as client")
        url = path if "://" in path else f"{self.url}{path}"
        headers = dict(options.pop("headers", {}))
        # The key is for the service only: a result's picture may live on any host.
        if self._api_key and url.startswith(f"{self.url}/"):
            headers["Authorization"] = f"Bearer {self._api_key}"
        try:
            async with self._opened.request(method, url, headers=headers, **options) as response:
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
        wait = response.headers.get("Retry-After", "")
        return _refused(
            response.status,
            {
                "title": f"HTTP {response.status} {response.reason}",
                "request_id": response.headers.get("X-Request-Id", ""),
                **{name: value for name, value in problem.items() if value},
            },
            retry_after=float(wait) if wait.isdigit() else None,
        )

    async def _batch(self, model: type[A], path: str, requests: Sequence[Mapping[str, Any]]) -> list[A | Refused]:
        answer = await self._json("POST", path, json={"requests": list(requests)})
        responses = answer.get("responses")
        if not isinstance(responses, list) or len(responses) != len(requests):
            raise self._foreign()
        statuses = [one.get("status") if isinstance(one, dict) else None for one in responses]
        return [
            _refused(status, one) if isinstance(status, int) else self._parse(model, one)
            for status, one in zip(statuses, responses, strict=True)
        ]

    def _parse(self, model: type[A], answer: dict[str, Any]) -> A:
        try:
            return model.model_validate(answer)
        except ValidationError as error:
            raise self._foreign() from error

    def _foreign(self) -> CatalensError:
        return CatalensError(f"what answers at {self.url} is not Catalens, or another version of it")


def _refused(status: int, problem: Mapping[str, Any], retry_after: float | None = None) -> Refused:
    return Refused(
        status,
        str(problem.get("title") or f"HTTP {status}"),
        str(problem.get("detail") or ""),
        kind=str(problem.get("type") or ""),
        errors=[
            (str(entry.get("field")), str(entry.get("message")))
            for entry in problem.get("errors") or ()
            if isinstance(entry, dict)
        ],
        request_id=str(problem.get("request_id") or ""),
        retry_after=retry_after,
    )


def _path(product_id: str) -> str:
    return f"/api/v1/products/{quote(product_id, safe='')}"


def _picture(picture: Picture) -> Mapping[str, str]:
    if isinstance(picture, str):
        return {"url": picture}
    return {"data": base64.b64encode(picture).decode()} if isinstance(picture, bytes) else picture


# --- products as chunks -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Chunk:
    payload: bytes
    ids: frozenset[str]
    places: tuple[int, ...]
    """Of each line, which product of the import it is, from 1."""
    rejected: tuple[LineError, ...]
    upto: int


async def _chunks(
    products: Iterable[Mapping[str, Any]] | AsyncIterable[Mapping[str, Any]], skip: int
) -> AsyncGenerator[_Chunk, None]:
    """Yield the products but the first `skip`, none twice in a chunk: the later of two must arrive later."""
    lines: list[bytes] = []
    places: list[int] = []
    rejected: list[LineError] = []
    ids: set[str] = set()
    size = number = 0

    def chunk(upto: int) -> _Chunk:
        made = _Chunk(b"".join(lines), frozenset(ids), tuple(places), tuple(rejected), upto)
        for held in (lines, places, rejected, ids):
            held.clear()
        return made

    async for product in _each(products):
        number += 1
        if number <= skip:
            continue
        named = product.get("product_id")
        product_id = named if isinstance(named, str) else None
        line, problem = b"", ""
        try:
            line = json.dumps(product, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        except (TypeError, ValueError) as error:  # NaN, half a surrogate pair, what JSON does not have
            problem = str(error)
        full = len(lines) + len(rejected) == CHUNK_LINES or (lines and size + len(line) > CHUNK_BYTES)
        if full or product_id in ids:
            yield chunk(number - 1)
            size = 0
        if problem:
            rejected.append(LineError(line=number, product_id=product_id, error=problem))
            continue
        lines.append(line)
        places.append(number)
        size += len(line)
        ids |= {product_id} if product_id is not None else set()
    if number > skip:
        yield chunk(number)


async def _each(
    products: Iterable[Mapping[str, Any]] | AsyncIterable[Mapping[str, Any]],
) -> AsyncIterator[Mapping[str, Any]]:
    if isinstance(products, AsyncIterable):
        async for product in products:
            yield product
    else:
        for product in products:
            yield product
