"""The ingest side over HTTP: a valid request becomes an event, and is answered once the log has it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from aiohttp import hdrs, web

from catalens import events, tracing
from catalens.domain import Deletion, OfferChange, Product, assigned_version
from catalens.errors import CatalensError, Overloaded, Transient
from catalens.events import EventData, Outcome, ProductEvent
from catalens.openapi import PICTURE, Operation
from catalens.ports import BlobStore, EventLog, ImageSource, RequestMemory
from catalens.reading import BROKEN_BODY
from catalens.settings import Settings
from catalens.telemetry import Metrics
from catalens.web import (
    Form,
    Problem,
    as_problem,
    invalid,
    parse_json,
    read_form,
    read_idempotency_key,
    read_json,
    read_params,
    read_product_id,
    reply,
    tenant_of,
    traceparent_of,
    validated,
)
from catalens_ingest.dead_letters import DeadLetters
from catalens_ingest.door import Door
from catalens_ingest.idempotency import Repeats, versions_of
from catalens_ingest.lines import Line, batches
from catalens_ingest.models import (
    MAX_ERRORS,
    BulkReceipt,
    DeleteParams,
    FormReceipt,
    LineProblem,
    OfferBody,
    PictureReceipt,
    ProductBody,
    ProductForm,
    Receipt,
    WaitParams,
    limited,
)
from catalens_ingest.outcomes import Outcomes

_NDJSON: Final = frozenset({"application/x-ndjson", "application/ndjson", "application/jsonl"})
_WAIT: Final = (
    "With `?wait=true` the answer comes when the product is searchable with its picture, or as 202 when time is up."
)


@dataclass(frozen=True, slots=True)
class BundleInfo:
    """What ingest tells of the model that will embed the pictures; it needs no model runtime for that."""

    family: str
    dimension: int


@dataclass(slots=True)
class _Tally:
    """What became of the lines of one NDJSON request."""

    accepted: int = 0
    rejected: int = 0
    errors: list[LineProblem] = field(default_factory=list)

    @property
    def kept(self) -> str:
        """What a client whose request ends early should know."""
        return f"accepted until then: {self.accepted}, rejected: {self.rejected}"

    def reject(self, problem: LineProblem) -> None:
        """Count a bad line."""
        self.rejected += 1
        if len(self.errors) < MAX_ERRORS:
            self.errors.append(problem)


class IngestService:
    """Accepts products, offers and deletions. An answer of 202 means that the event survives kill -9."""

    def __init__(
        self,
        *,
        log: EventLog,
        blobs: BlobStore,
        images: ImageSource,
        memory: RequestMemory,
        bundle: Callable[[], BundleInfo],
        settings: Settings,
        metrics: Metrics,
    ) -> None:
        self._log = log
        self._bundle = bundle
        self._http = settings.http
        self._metrics = metrics
        self._door = Door(blobs, images, settings.pictures)
        self._repeats = Repeats(memory)
        self._outcomes = Outcomes(log)
        self._dead_letters = DeadLetters(log, settings, time.time)
        self._wait_params = limited(WaitParams, settings.http.max_wait)
        self._delete_params = limited(DeleteParams, settings.http.max_wait)
        self._last_version = 0

    async def run(self, stop: asyncio.Event) -> None:
        """Listen for the outcomes that requests wait for, until `stop` is set."""
        await self._outcomes.run(stop)

    async def ready(self) -> Mapping[str, str]:
        """Return "ok" or what is wrong, for the log: a real question to it."""
        try:
            await self._log.committed(events.EMBEDDER_GROUP, [events.PRODUCTS])
        except CatalensError as error:
            return {"log": str(error)}
        return {"log": "ok"}

    def operations(self) -> list[Operation]:
        """Return the ingest side of the HTTP contract."""
        receipts = {202: Receipt, 200: Receipt}
        return [
            Operation(
                "PUT",
                "/api/v1/products/{product_id}",
                self._put_product,
                "Create or replace a product",
                "ingest",
                "ingest",
                description=f"The newest version wins, whatever the order. {_WAIT}",
                params=self._wait_params,
                body=ProductBody,
                idempotency_key=True,
                responses=receipts,
                problems=(409,),
            ),
            Operation(
                "PATCH",
                "/api/v1/products/{product_id}/offer",
                self._patch_offer,
                "Change price, currency or stock",
                "ingest",
                "ingest",
                description=f"Costs no inference. An offer that comes before its product waits for it. {_WAIT}",
                params=self._wait_params,
                body=OfferBody,
                idempotency_key=True,
                responses=receipts,
                problems=(409,),
            ),
            Operation(
                "DELETE",
                "/api/v1/products/{product_id}",
                self._delete_product,
                "Delete a product",
                "ingest",
                "ingest",
                description=f"Older versions that come later stay without effect. {_WAIT}",
                params=self._delete_params,
                idempotency_key=True,
                responses=receipts,
                problems=(409,),
            ),
            Operation(
                "POST",
                "/api/v1/products",
                self._bulk,
                "Create or replace many products",
                "ingest",
                "ingest",
                description="NDJSON of any length; the limits hold per line. A bad line never stops the rest; overload "
                "slows the reading. After a broken connection what was accepted stays.",
                body=Product,
                ndjson=True,
                responses={200: BulkReceipt},
            ),
            Operation(
                "POST",
                "/api/v1/index-product",
                self._index_product,
                "Create or replace a product by a form",
                "ingest",
                "ingest",
                description=_WAIT,
                params=self._wait_params,
                form=ProductForm,
                idempotency_key=True,
                responses={202: FormReceipt, 200: FormReceipt},
                problems=(409,),
            ),
            Operation(
                "POST",
                "/api/v1/index-product-with-image",
                self._index_product_with_image,
                "Create or replace a product and its picture by a form",
                "ingest",
                "ingest",
                description=_WAIT,
                params=self._wait_params,
                form=ProductForm,
                pictures=(PICTURE,),
                idempotency_key=True,
                responses={202: PictureReceipt, 200: PictureReceipt},
                problems=(409,),
            ),
            *self._dead_letters.operations(),
        ]

    # --- one product ------------------------------------------------------------------------------------------

    async def _put_product(self, request: web.Request) -> web.StreamResponse:
        product_id, params = read_product_id(request), read_params(request, self._wait_params)
        key = read_idempotency_key(request)
        body = await read_json(request, ProductBody)
        if body.product_id not in (None, product_id):
            raise invalid(("product_id", f"is not {product_id}, the id in the path"))
        product = Product.model_validate({**body.model_dump(exclude_unset=True), "product_id": product_id})
        return await self._receipt(request, await self._door.admit(product), params, key)

    async def _patch_offer(self, request: web.Request) -> web.StreamResponse:
        product_id, params = read_product_id(request), read_params(request, self._wait_params)
        key = read_idempotency_key(request)
        body = await read_json(request, OfferBody)
        change = OfferChange.model_validate({**body.model_dump(exclude_unset=True), "product_id": product_id})
        return await self._receipt(request, change, params, key)

    async def _delete_product(self, request: web.Request) -> web.StreamResponse:
        product_id, params = read_product_id(request), read_params(request, self._delete_params)
        stated = params.model_dump(include={"version"}, exclude_unset=True)
        deletion = Deletion.model_validate({**stated, "product_id": product_id})
        return await self._receipt(request, deletion, params, read_idempotency_key(request))

    async def _receipt(
        self, request: web.Request, data: EventData, params: WaitParams, key: str | None
    ) -> web.StreamResponse:
        event, outcome = await self._accept(request, data, params, key)
        version, offer_version = versions_of(event.data)
        receipt = {
            "product_id": event.data.product_id,
            "version": version,
            "offer_version": offer_version,
            "event_id": event.id,
            "status": outcome.status if outcome else "accepted",
        }
        if outcome is not None and outcome.error is not None:
            receipt["error"] = outcome.error
        return reply(Receipt.model_validate(receipt), 200 if outcome else 202)

    async def _accept(
        self, request: web.Request, data: EventData, params: WaitParams, key: str | None
    ) -> tuple[ProductEvent, Outcome | None]:
        """Append the event; with `wait`, return what became of it unless the time was up before."""
        event = self._event(request, data, awaited=params.wait)
        if key is not None:
            event = await self._repeats.settle(key, data, event)
        if not params.wait:
            await self._append([event])
            return event, None
        loop = asyncio.get_running_loop()
        deadline = loop.time() + params.timeout
        with self._outcomes.expect(event.id) as outcome:
            with suppress(TimeoutError):  # then nobody tells the outcome in time: the answer is 202
                async with asyncio.timeout_at(deadline):
                    await self._outcomes.listening()
            await self._append([event])
            await asyncio.wait([outcome], timeout=max(0.0, deadline - loop.time()))
            return event, outcome.result() if outcome.done() else None

    def _event(self, request: web.Request, data: EventData, *, awaited: bool = False) -> ProductEvent:
        # Assigned versions grow within the process even where the clock stands still or is set back.
        self._last_version = max(self._last_version + 1, assigned_version())
        return events.new_event(
            events.with_versions(data, self._last_version),
            tenant_of(request),
            awaited=awaited,
            traceparent=traceparent_of(request),
        )

    async def _append(self, batch: Sequence[ProductEvent]) -> None:
        span = tracing.span("append", {"messaging.batch.message_count": len(batch)})
        with span, self._metrics.append_seconds.time():
            await self._log.append([events.encode(event) for event in batch])
        for kind, count in Counter(event.type for event in batch).items():
            self._metrics.accepted.labels(kind).inc(count)

    # --- forms ------------------------------------------------------------------------------------------------

    async def _index_product(self, request: web.Request) -> web.StreamResponse:
        params, key = read_params(request, self._wait_params), read_idempotency_key(request)
        product = _form_product(await read_form(request), pictures=())
        return await self._form_receipt(request, product, params, key)

    async def _index_product_with_image(self, request: web.Request) -> web.StreamResponse:
        params, key = read_params(request, self._wait_params), read_idempotency_key(request)
        form = await read_form(request)
        product = _form_product(form, pictures=PICTURE)
        picture = form.picture()
        (name,) = form.pictures
        product = product.model_copy(update={"images": (await self._door.upload(picture, name),)})
        more: dict[str, str | int] = {
            "embedding_type": self._bundle().family,
            "embedding_dimension": self._bundle().dimension,
        }
        return await self._form_receipt(request, product, params, key, more)

    async def _form_receipt(
        self,
        request: web.Request,
        product: Product,
        params: WaitParams,
        key: str | None,
        more: Mapping[str, object] = MappingProxyType({}),
    ) -> web.StreamResponse:
        event, outcome = await self._accept(request, product, params, key)
        message = f"Product {product.product_id} {outcome.status if outcome else 'accepted'}"
        if outcome is not None and outcome.error is not None:
            message = f"{message}: {outcome.error}"
        receipt = {
            "status": outcome.status if outcome else "success",
            "message": message,
            "product_id": product.product_id,
            "version": versions_of(event.data)[0],
            **more,
        }
        return reply(receipt, 200 if outcome else 202)

    # --- many products ----------------------------------------------------------------------------------------

    async def _bulk(self, request: web.Request) -> web.StreamResponse:
        if hdrs.CONTENT_TYPE in request.headers and request.content_type not in _NDJSON:
            raise Problem(415, f"send the lines as application/x-ndjson, not {request.content_type}")
        tally = _Tally()
        try:
            await self._take(request, tally)
        except TimeoutError as error:
            slow = f"no line came for {self._http.body_timeout:g} s"
            raise Problem(408, f"{slow}; {tally.kept}", headers={"Connection": "close"}) from error
        except BROKEN_BODY as error:
            raise Problem(400, f"the body broke; {tally.kept}", headers={"Connection": "close"}) from error
        except Transient as error:
            problem = as_problem(error)
            problem.detail = f"{problem.detail}; {tally.kept}"
            raise problem from error
        return reply(BulkReceipt(accepted=tally.accepted, rejected=tally.rejected, errors=tally.errors))

    async def _take(self, request: web.Request, tally: _Tally) -> None:
        """Append the lines batch by batch, in order; while the log takes one, the next one is read and parsed."""
        keeping: asyncio.Task[None] | None = None
        try:
            async for batch in batches(request.content, max_line=self._http.max_line, timeout=self._http.body_timeout):
                admitted = await self._admitted(batch)
                if keeping is not None:
                    await keeping
                keeping = asyncio.create_task(self._keep(request, admitted, tally), name="ingest.keep")
        finally:
            if keeping is not None:
                await keeping

    async def _admitted(self, batch: Sequence[Line]) -> list[Product | LineProblem]:
        """Return, per line, the product with its pictures stored, or what is wrong."""
        admitted = await asyncio.to_thread(lambda: [_parse_line(line, self._http.max_line) for line in batch])
        # Only what brings pictures has anything to wait for: a task a line would cost more than to parse it.
        waits = [number for number, found in enumerate(admitted) if isinstance(found, Product) and found.images]
        settled = await asyncio.gather(*(self._admit_line(batch[number], admitted[number]) for number in waits))
        for number, found in zip(waits, settled, strict=True):
            admitted[number] = found
        return admitted

    async def _keep(self, request: web.Request, admitted: Sequence[Product | LineProblem], tally: _Tally) -> None:
        """Append what is good, in order, and count the rest."""
        good = [self._event(request, found) for found in admitted if isinstance(found, Product)]
        while good:
            try:
                await self._append(good)
                break
            except Overloaded as error:  # for as long as it lasts: nothing more is read meanwhile, nothing is refused
                await asyncio.sleep(error.retry_after)
        tally.accepted += len(good)
        for found in admitted:
            if isinstance(found, LineProblem):
                tally.reject(found)

    async def _admit_line(self, line: Line, parsed: Product | LineProblem) -> Product | LineProblem:
        if isinstance(parsed, LineProblem):
            return parsed
        try:
            return await self._door.admit(parsed)
        except Problem as problem:
            return _line_problem(line, parsed.product_id, problem)


def _parse_line(line: Line, max_line: int) -> Product | LineProblem:
    if line.text is None:
        return LineProblem(line=line.number, product_id=None, error=f"the line is longer than {max_line:,} bytes")
    value: object = None
    try:
        value = parse_json(line.text)
        return validated(Product, value)
    except Problem as problem:
        named = value.get("product_id") if isinstance(value, dict) else None
        return _line_problem(line, named if isinstance(named, str) else None, problem)


def _line_problem(line: Line, product_id: str | None, problem: Problem) -> LineProblem:
    told = "; ".join(f"{name}: {message}" if name else message for name, message in problem.errors)
    return LineProblem(line=line.number, product_id=product_id, error=told or problem.detail)


def _form_product(form: Form, *, pictures: Sequence[str]) -> Product:
    values = form.values(ProductForm, pictures=pictures)
    product = values.model_dump(exclude={"metadata"}, exclude_unset=True)
    return Product.model_validate({**product, "attributes": values.metadata})
