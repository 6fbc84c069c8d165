"""What the ingest side answers, and what the log holds afterwards: every row of its contract, good and bad."""

from __future__ import annotations

import asyncio
import io
import json
from base64 import b64encode
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import FormData
from PIL import Image
from pydantic import SecretStr

from catalens import events
from catalens.domain import Deletion, Message, OfferChange, Product, TopicPartition, sha256_hex
from catalens.engines.blobs import FileBlobStore
from catalens.engines.images import HttpImages
from catalens.engines.sqlite_log import SqliteEventLog
from catalens.engines.sqlite_memory import SqliteMemory
from catalens.errors import Overloaded, StorageFull, Transient
from catalens.events import Outcome, ProductEvent
from catalens.ports import EventLog
from catalens.settings import ApiKey, HttpSettings, PictureSettings, Settings
from catalens.telemetry import Metrics
from catalens.web import build_app, serving
from catalens_ingest.service import BundleInfo, IngestService

MAX_BODY = 2_000_000
MAX_LINE = 300_000
PRODUCTS = "/api/v1/products"


def picture(form: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (40, 30), **options: Any) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size).save(out, form, **options)
    return out.getvalue()


class FailingLog:
    """A log in front of the real one, which refuses the next appends as a full disk or a lost broker makes it do."""

    def __init__(self, real: EventLog) -> None:
        self.errors: list[Exception] = []
        self.append_now = real.append
        self.subscribe = real.subscribe
        self.expire = real.expire
        self.scan = real.scan
        self.discard = real.discard
        self.committed = real.committed
        self.set_committed = real.set_committed
        self.members = real.members
        self.lag = real.lag
        self.close = real.close

    async def append(self, messages: Sequence[Message]) -> Sequence[tuple[TopicPartition, int]]:
        if self.errors:
            raise self.errors.pop(0)
        return await self.append_now(messages)


class Shop:
    """A running ingest service, a client of it, and its log."""

    def __init__(self, url: str, session: aiohttp.ClientSession, log: FailingLog, blobs: FileBlobStore) -> None:
        self.url = url
        self.session = session
        self.log = log
        self.blobs = blobs
        self.metrics = Metrics()

    async def call(self, method: str, path: str, **options: Any) -> tuple[int, Any]:
        async with self.session.request(method, self.url + path, **options) as answer:
            return answer.status, await answer.json(content_type=None)

    async def put(self, body: Mapping[str, Any], product_id: str = "shoe", **options: Any) -> tuple[int, Any]:
        return await self.call("PUT", f"{PRODUCTS}/{product_id}", json=body, **options)

    async def post_lines(self, lines: Any, **options: Any) -> tuple[int, Any]:
        headers = {"Content-Type": "application/x-ndjson"}
        return await self.call("POST", PRODUCTS, data=lines, headers=headers, **options)

    async def form(self, path: str, parts: Mapping[str, str | bytes], query: str = "") -> tuple[int, Any]:
        form = FormData(quote_fields=False)
        for name, value in parts.items():
            if isinstance(value, bytes):
                form.add_field(name, io.BytesIO(value), filename="photo.jpg", content_type="image/jpeg")
            else:
                form.add_field(name, value)
        return await self.call("POST", f"/api/v1/{path}{query}", data=form)

    async def events(self) -> list[ProductEvent]:
        """Return every event that the log holds, products first."""
        found: list[ProductEvent] = []
        for topic in (events.PRODUCTS, events.OFFERS):
            consumer = await self.log.subscribe("test", [topic])
            wanted = sum((await self.log.lag("test", [topic])).values())
            while wanted:
                records = await consumer.fetch(1000, 5)
                wanted -= len(records)
                found += [events.decode(record) for record in records]
            await consumer.close()
        return found


@asynccontextmanager
async def opened(folder: Path, **given: Any) -> AsyncIterator[Shop]:
    http = HttpSettings(**{"port": 0, "max_body": MAX_BODY, "max_line": MAX_LINE, **given.pop("http", {})})
    settings = Settings(_env_file=None, http=http, **given)
    log = FailingLog(await SqliteEventLog.open(folder / "log.sqlite3"))
    blobs = FileBlobStore(folder / "blobs")
    memory = await SqliteMemory.open(folder / "memory.sqlite3")
    images = HttpImages(settings.pictures)
    metrics = Metrics()
    service = IngestService(
        log=log,
        blobs=blobs,
        images=images,
        memory=memory,
        bundle=lambda: BundleInfo("starter", 64),
        settings=settings,
        metrics=metrics,
    )

    async def ready() -> Mapping[str, str]:
        return {}

    app = build_app(service.operations(), settings, metrics, ready=ready, title="Ingest")
    stop = asyncio.Event()
    try:
        async with (
            asyncio.TaskGroup() as tasks,
            serving(app, settings) as url,
            aiohttp.ClientSession() as session,
        ):
            tasks.create_task(service.run(stop), name="ingest")
            shop = Shop(url, session, log, blobs)
            shop.metrics = metrics
            try:
                yield shop
            finally:
                stop.set()
    finally:
        await images.close()
        await memory.close()
        await blobs.close()
        await log.close()


@pytest.fixture
async def shop(tmp_path: Path) -> AsyncIterator[Shop]:
    async with opened(tmp_path) as found:
        yield found


@asynccontextmanager
async def embedder(log: EventLog, status: str = "indexed", error: str | None = None) -> AsyncIterator[None]:
    """Report `status` for every awaited event, as the embedder does once it is done with it."""
    consumer = await log.subscribe(events.EMBEDDER_GROUP, [events.PRODUCTS, events.OFFERS])

    async def work() -> None:
        while True:
            for record in await consumer.fetch(100, 1.0):
                event = events.decode(record)
                if event.awaited:
                    found = Outcome.model_validate({"event_id": event.id, "status": status, "error": error})
                    await log.append([events.encode_outcome(found)])

    task = asyncio.create_task(work(), name="embedder")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        await consumer.close()


# --- PUT ----------------------------------------------------------------------------------------------------


async def test_a_product_is_accepted_and_on_the_log(shop: Shop) -> None:
    body = {
        "name": "Ta\u0007ble\u0000 👟",
        "price": 1e308,
        "currency": "EUR",
        "version": 7,
        "offer_version": 9,
        "category": "Sport > Shoes",
        "attributes": {"color": ["red"], "wide": True, "size": 42, "weight": 0.5, "sole": "é"},
    }
    status, answer = await shop.put(body)
    assert status == 202
    (event,) = await shop.events()
    assert answer == {
        "product_id": "shoe",
        "version": 7,
        "offer_version": 9,
        "event_id": event.id,
        "status": "accepted",
    }
    assert isinstance(event.data, Product)
    assert event.data.model_dump(mode="json", exclude_unset=True) == {"product_id": "shoe", **body}
    assert (event.tenant, event.awaited) == ("default", False)


async def test_missing_versions_are_assigned_and_grow(shop: Shop) -> None:
    answers = [(await shop.put({"name": "x", "stock": 3}))[1] for _ in range(5)]
    versions = [answer["version"] for answer in answers]
    assert versions == sorted(set(versions))
    assert [answer["offer_version"] for answer in answers] == versions
    assert [event.data.version for event in await shop.events() if isinstance(event.data, Product)] == versions


async def test_a_product_without_offer_says_nothing_of_it(shop: Shop) -> None:
    _, answer = await shop.put({"name": "x", "version": 1})
    assert answer["offer_version"] is None
    (event,) = await shop.events()
    assert isinstance(event.data, Product)
    assert not event.data.carries_offer


async def test_duplicate_and_older_versions_are_accepted(shop: Shop) -> None:
    for version in (5, 5, 3):
        status, answer = await shop.put({"name": "x", "version": version})
        assert (status, answer["version"]) == (202, version)
    assert len(await shop.events()) == 3


async def test_the_id_in_the_body_must_be_that_of_the_path(shop: Shop) -> None:
    assert (await shop.put({"product_id": "shoe", "name": "x"}))[0] == 202
    status, problem = await shop.put({"product_id": "boot", "name": "x"})
    assert (status, problem["errors"][0]["field"]) == (422, "product_id")
    assert len(await shop.events()) == 1


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"name": "x", "price": NaN}', 400),
        (b"[" * 50_000, 400),
        (b'{"name": ', 400),
        (b'{"name": "x", "colour": "red"}', 422),
        (b'{"name": "x", "price": 1e999}', 422),
        (b'{"name": "x", "version": 0}', 422),
        (b'{"name": "' + b"x" * MAX_BODY + b'"}', 413),
    ],
)
async def test_bad_products_are_refused_and_the_service_lives(shop: Shop, body: bytes, status: int) -> None:
    headers = {"Content-Type": "application/json"}
    found, problem = await shop.call("PUT", f"{PRODUCTS}/shoe", data=io.BytesIO(body), headers=headers)
    assert (found, problem["status"]) == (status, status)
    assert await shop.events() == []
    assert (await shop.put({"name": "x"}))[0] == 202


async def test_an_id_with_a_slash_is_refused(shop: Shop) -> None:
    async with shop.session.put(f"{shop.url}{PRODUCTS}/a%252Fb", json={"name": "x"}) as answer:
        assert answer.status == 422
    status, _ = await shop.post_lines(b'{"product_id": "a/b", "name": "x"}')
    assert status == 200
    assert await shop.events() == []


async def test_a_key_decides_the_tenant(tmp_path: Path) -> None:
    key = ApiKey(name="b", secret=SecretStr("s" * 16), tenant="brand-b")
    async with opened(tmp_path, api_keys=(key,)) as shop:
        assert (await shop.put({"name": "x"}))[0] == 401
        assert (await shop.put({"name": "x"}, headers={"X-API-Key": "s" * 16}))[0] == 202
        (event,) = await shop.events()
        assert event.key == "brand-b|shoe"


async def test_a_trace_goes_along_with_the_event(shop: Shop) -> None:
    trace = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    await shop.put({"name": "x"}, headers={"traceparent": trace})
    await shop.put({"name": "x"}, headers={"traceparent": "nonsense"})
    assert [event.traceparent for event in await shop.events()] == [trace, None]


# --- pictures -----------------------------------------------------------------------------------------------


def exif_rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(exif=exif)


def bomb() -> bytes:
    out = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(out, "PNG", compress_level=9)
    return out.getvalue()


def animated() -> bytes:
    out = io.BytesIO()
    frames = [Image.new("P", (20, 20), color) for color in (1, 2, 3)]
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    return out.getvalue()


GOOD_PICTURES = {
    "jpeg": picture(),
    "png": picture("PNG"),
    "webp": picture("WEBP"),
    "one pixel": picture("PNG", size=(1, 1)),
    "animated gif": animated(),
    "cmyk jpeg": picture(mode="CMYK"),
    "16-bit png": picture("PNG", mode="I;16"),
    "exif-rotated": exif_rotated(),
    "transparent png": picture("PNG", mode="RGBA"),
}
BAD_PICTURES = {
    "empty": (b"", 415),
    "text named .jpg": (b"this is no picture", 415),
    "truncated jpeg": (picture(size=(400, 300))[:-200], 415),
    "truncated png": (picture("PNG", size=(400, 300))[:-20], 415),
    "html": (b"<html><body>not found</body></html>", 415),
    "bomb": (bomb(), 413),
    "too many bytes": (picture() + b"\0" * 300_000, 413),
}


@pytest.fixture
async def small(tmp_path: Path) -> AsyncIterator[Shop]:
    """A shop that takes pictures of 200 kB."""
    async with opened(tmp_path, pictures=PictureSettings(max_bytes=200_000)) as found:
        yield found


@pytest.mark.parametrize("data", GOOD_PICTURES.values(), ids=GOOD_PICTURES.keys())
async def test_good_pictures_become_blobs(small: Shop, data: bytes) -> None:
    inline = {"name": "x", "images": [{"data": b64encode(data).decode()}]}
    assert (await small.put(inline))[0] == 202
    parts: dict[str, str | bytes] = {"product_id": "shoe", "name": "x", "image_file": data}
    assert (await small.form("index-product-with-image", parts))[0] == 202
    assert await small.blobs.get(sha256_hex(data)) == data
    for event in await small.events():
        assert isinstance(event.data, Product)
        assert event.data.model_dump(exclude_unset=True)["images"] == ({"blob": sha256_hex(data)},)


@pytest.mark.parametrize(("data", "status"), BAD_PICTURES.values(), ids=BAD_PICTURES.keys())
async def test_bad_pictures_are_refused_everywhere(small: Shop, data: bytes, status: int) -> None:
    parts: dict[str, str | bytes] = {"product_id": "shoe", "name": "x", "image_file": data}
    found, problem = await small.form("index-product-with-image", parts)
    assert (found, problem["errors"][0]["field"]) == (status, "image_file")
    if data:
        good, bad = b64encode(picture()).decode(), b64encode(data).decode()
        found, problem = await small.put({"name": "x", "images": [{"data": good}, {"data": bad}]})
        assert (found, problem["errors"][0]["field"]) == (status, "images.1.data")
    assert await small.events() == []
    assert [reference async for reference in small.blobs.references(older_than=2**40)] == []
    assert (await small.put({"name": "x"}))[0] == 202


@pytest.mark.parametrize(
    ("image", "field"),
    [
        ({"data": "no base64!"}, "images.0.data"),
        ({"data": "QUJD\n"}, "images.0.data"),
        ({"data": "é"}, "images.0.data"),
        ({"blob": "0" * 64}, "images.0.blob"),
        ({"blob": "../../etc/passwd"}, "images.0.blob"),
        ({"url": "file:///etc/passwd"}, "images.0.url"),
        ({"url": "http://127.0.0.1/x.jpg"}, "images.0.url"),
        ({"url": "http://user:secret@shop.example/x.jpg"}, "images.0.url"),
        ({"url": "no url"}, "images.0.url"),
        ({"url": "http://shop.example/x.jpg", "data": "QUJD"}, "images.0"),
    ],
)
async def test_bad_references_are_422(shop: Shop, image: dict[str, str], field: str) -> None:
    status, problem = await shop.put({"name": "x", "images": [image]})
    assert (status, problem["errors"][0]["field"]) == (422, field)
    assert await shop.events() == []


async def test_urls_and_known_blobs_are_kept(shop: Shop) -> None:
    reference = await shop.blobs.put(picture())
    images = [{"url": "https://shop.example/x.jpg"}, {"blob": reference}]
    assert (await shop.put({"name": "x", "images": images}))[0] == 202
    (event,) = await shop.events()
    assert event.data.model_dump(exclude_unset=True)["images"] == tuple(images)


async def test_forty_megabytes_are_413(tmp_path: Path) -> None:
    async with opened(tmp_path, http={"max_body": HttpSettings().max_body}) as shop:
        parts: dict[str, str | bytes] = {
            "product_id": "shoe",
            "name": "x",
            "image_file": picture() + b"\0" * 40_000_000,
        }
        status, problem = await shop.form("index-product-with-image", parts)
        assert (status, problem["status"]) == (413, 413)
        assert (await shop.put({"name": "x"}))[0] == 202


# --- offers and deletions -----------------------------------------------------------------------------------


async def test_an_offer_carries_only_what_was_said(shop: Shop) -> None:
    status, answer = await shop.call("PATCH", f"{PRODUCTS}/shoe/offer", json={"price": 5, "offer_version": 3})
    assert (status, answer["version"], answer["offer_version"]) == (202, None, 3)
    await shop.call("PATCH", f"{PRODUCTS}/shoe/offer", json={"stock": None})
    first, second = await shop.events()
    assert isinstance(first.data, OfferChange)
    assert first.data.model_dump(exclude_unset=True) == {"product_id": "shoe", "price": 5.0, "offer_version": 3}
    assert second.data.model_dump(exclude_unset=True).keys() == {"product_id", "stock", "offer_version"}


@pytest.mark.parametrize(
    "body",
    [{}, {"offer_version": 1}, {"price": -1}, {"price": "5"}, {"stock": 1.5}, {"name": "x"}, {"currency": "eur"}],
)
async def test_bad_offers_are_422(shop: Shop, body: dict[str, Any]) -> None:
    assert (await shop.call("PATCH", f"{PRODUCTS}/shoe/offer", json=body))[0] == 422
    assert await shop.events() == []


async def test_a_deletion_carries_its_version(shop: Shop) -> None:
    status, answer = await shop.call("DELETE", f"{PRODUCTS}/shoe?version=12")
    assert (status, answer["version"], answer["offer_version"]) == (202, 12, None)
    assert (await shop.call("DELETE", f"{PRODUCTS}/shoe"))[1]["version"] > 12
    first, second = await shop.events()
    assert first.data == Deletion(product_id="shoe", version=12)
    assert second.type == events.DELETED


@pytest.mark.parametrize("query", ["version=0", "version=x", "version=1&version=2", "soft=true"])
async def test_bad_deletions_are_422(shop: Shop, query: str) -> None:
    assert (await shop.call("DELETE", f"{PRODUCTS}/shoe?{query}"))[0] == 422
    assert await shop.events() == []


# --- forms --------------------------------------------------------------------------------------------------

FORM = {"product_id": "shoe", "name": "Red shoe", "description": "d", "metadata": '{"color": "red", "size": 42}'}


async def test_a_form_is_a_product(shop: Shop) -> None:
    status, answer = await shop.form("index-product", FORM)
    assert (status, answer["status"], answer["product_id"]) == (202, "success", "shoe")
    assert set(answer) == {"status", "message", "product_id", "version"}
    status, again = await shop.call("POST", "/api/v1/index-product", data=FORM)
    assert (status, again["status"]) == (202, "success")
    for event in await shop.events():
        assert isinstance(event.data, Product)
        assert (event.data.name, event.data.description) == ("Red shoe", "d")
        assert event.data.attributes == {"color": "red", "size": 42}


async def test_a_form_with_a_picture_tells_the_model(shop: Shop) -> None:
    status, answer = await shop.form("index-product-with-image", {**FORM, "image_file": picture()})
    assert status == 202
    assert (answer["status"], answer["embedding_type"], answer["embedding_dimension"]) == ("success", "starter", 64)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"product_id": "a/b"}, "product_id"),
        ({"name": ""}, "name"),
        ({"metadata": "red"}, "metadata"),
        ({"metadata": '{"a": NaN}'}, "metadata"),
        ({"metadata": "[]"}, "metadata"),
        ({"metadata": "[" * 50_000}, "metadata"),
        ({"metadata": '{"a": {"b": 1}}'}, "metadata.a"),
        ({"colour": "red"}, "colour"),
        ({"image_file": b"x"}, "image_file"),
    ],
)
async def test_bad_forms_are_422(shop: Shop, change: dict[str, str | bytes], field: str) -> None:
    status, problem = await shop.form("index-product", {**FORM, **change})
    assert (status, problem["errors"][0]["field"]) == (422, field)
    assert await shop.events() == []


async def test_a_form_without_its_picture_is_422(shop: Shop) -> None:
    assert (await shop.form("index-product-with-image", FORM))[0] == 422


# --- many products ------------------------------------------------------------------------------------------


def line(number: int, **more: Any) -> bytes:
    return json.dumps({"product_id": f"p{number}", "name": f"Product {number}", **more}).encode()


async def test_one_bad_line_of_a_thousand_costs_that_line_only(shop: Shop) -> None:
    lines = [line(number) for number in range(1000)]
    lines[499] = b'{"product_id": "p499", "name": '
    status, answer = await shop.post_lines(b"\n".join(lines) + b"\n")
    assert (status, answer["accepted"], answer["rejected"]) == (200, 999, 1)
    assert [(error["line"], error["product_id"]) for error in answer["errors"]] == [(500, None)]
    found = [event.data.product_id for event in await shop.events()]
    assert found == [f"p{number}" for number in range(1000) if number != 499]


async def test_every_kind_of_bad_line_is_named(shop: Shop) -> None:
    lines = [
        line(1),
        b"",
        b"   \r",
        line(2, price=-1),
        b"nonsense",
        b"\xff\xfe",
        line(3, colour="red"),
        b'{"product_id": "p4", "name": "x", "price": NaN}',
        line(5, price=1e308),
        b"[" * 50_000,
        line(6, images=[{"data": b64encode(b"no picture").decode()}]),
        line(7, images=[{"url": "ftp://shop.example/x"}]),
        b"{" + b" " * MAX_LINE + b"}",
        line(8, images=[{"data": b64encode(picture()).decode()}]),
        line(9),
    ]
    status, answer = await shop.post_lines(b"\n".join(lines))
    assert (status, answer["accepted"], answer["rejected"]) == (200, 4, 9)
    named = [(error["line"], error["product_id"]) for error in answer["errors"]]
    assert named == [
        (4, "p2"),
        (5, None),
        (6, None),
        (7, "p3"),
        (8, None),
        (10, None),
        (11, "p6"),
        (12, "p7"),
        (13, None),
    ]
    assert answer["errors"][3]["error"] == "colour: is unknown here"
    assert [event.data.product_id for event in await shop.events()] == ["p1", "p5", "p8", "p9"]


async def test_only_the_first_hundred_errors_are_told(shop: Shop) -> None:
    _, answer = await shop.post_lines(b"x\n" * 250)
    assert (answer["accepted"], answer["rejected"], len(answer["errors"])) == (0, 250, 100)


async def test_lines_of_one_product_keep_their_order(shop: Shop) -> None:
    inline = [{"data": b64encode(picture()).decode()}]
    await shop.post_lines(
        b"\n".join(line(1, description=str(n), images=inline if n % 3 == 0 else []) for n in range(99))
    )
    found = [event.data for event in await shop.events()]
    assert [data.description for data in found if isinstance(data, Product)] == [str(n) for n in range(99)]
    versions = [data.version or 0 for data in found if isinstance(data, Product)]
    assert versions == sorted(set(versions))


async def test_a_stream_may_be_longer_than_any_body(shop: Shop) -> None:
    filler = "x" * 10_000

    async def lines() -> AsyncIterator[bytes]:
        for number in range(400):
            yield line(number, description=filler) + b"\n"

    assert 400 * len(filler) > MAX_BODY
    status, answer = await shop.post_lines(lines())
    assert (status, answer["accepted"]) == (200, 400)


async def test_what_was_accepted_stays_when_the_connection_breaks(shop: Shop) -> None:
    broken = asyncio.Event()

    async def lines() -> AsyncIterator[bytes]:
        yield b"\n".join(line(number) for number in range(100)) + b"\n" + line(100)[:-1]
        consumer = await shop.log.subscribe("watch", [events.PRODUCTS])
        seen = 0
        while seen < 100:
            seen += len(await consumer.fetch(1000, 5))
        await consumer.close()
        broken.set()
        raise ConnectionResetError

    with pytest.raises(aiohttp.ClientError):
        await shop.post_lines(lines())
    assert broken.is_set()
    assert (await shop.post_lines(line(200)))[0] == 200
    found = [event.data.product_id for event in await shop.events()]
    assert found == [*(f"p{number}" for number in range(100)), "p200"]


async def test_a_stream_that_stalls_is_408_and_says_what_was_kept(tmp_path: Path) -> None:
    async with opened(tmp_path, http={"body_timeout": 0.2}) as shop:
        answered = asyncio.Event()

        async def lines() -> AsyncIterator[bytes]:
            yield line(1) + b"\n"
            await answered.wait()

        async with shop.session.post(
            f"{shop.url}{PRODUCTS}", data=lines(), headers={"Content-Type": "application/x-ndjson"}
        ) as answer:
            problem = await answer.json(content_type=None)
            answered.set()
        assert answer.status == 408
        assert "accepted until then: 1" in problem["detail"]
        assert len(await shop.events()) == 1


@pytest.mark.parametrize("content_type", ["application/json", "text/csv"])
async def test_lines_of_another_type_are_415(shop: Shop, content_type: str) -> None:
    status, _ = await shop.call("POST", PRODUCTS, data=line(1), headers={"Content-Type": content_type})
    assert status == 415


async def test_an_overloaded_log_slows_the_reading_and_refuses_nothing(shop: Shop) -> None:
    shop.log.errors = [Overloaded("full", retry_after=0.01)] * 3
    status, answer = await shop.post_lines(b"\n".join(line(number) for number in range(10)))
    assert (status, answer["accepted"], answer["rejected"]) == (200, 10, 0)
    assert len(await shop.events()) == 10


# --- waiting ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "error"), [("indexed", None), ("superseded", None), ("failed", "no such host")])
async def test_waiting_tells_what_became_of_it(shop: Shop, status: str, error: str | None) -> None:
    async with embedder(shop.log, status, error):
        found, answer = await shop.call("PUT", f"{PRODUCTS}/shoe?wait=true&timeout=30", json={"name": "x"})
        assert (found, answer["status"], answer.get("error")) == (200, status, error)
        found, answer = await shop.call("DELETE", f"{PRODUCTS}/shoe?wait=true&timeout=30")
        assert (found, answer["status"]) == (200, status)
        found, answer = await shop.call("PATCH", f"{PRODUCTS}/shoe/offer?wait=true", json={"price": 1})
        assert (found, answer["status"]) == (200, status)
        parts: dict[str, str | bytes] = {**FORM, "file": picture()}
        found, answer = await shop.form("index-product-with-image", parts, "?wait=true&timeout=30")
        assert (found, answer["status"]) == (200, status)
        assert (error or status) in answer["message"]


async def test_waiting_ends_with_202_when_the_time_is_up(shop: Shop) -> None:
    status, answer = await shop.call("PUT", f"{PRODUCTS}/shoe?wait=true&timeout=0.05", json={"name": "x"})
    assert (status, answer["status"]) == (202, "accepted")
    (event,) = await shop.events()
    assert event.awaited is True


async def test_each_waiting_request_gets_its_own_outcome(shop: Shop) -> None:
    async with embedder(shop.log):
        answers = await asyncio.gather(
            *(shop.call("PUT", f"{PRODUCTS}/p{n}?wait=true&timeout=30", json={"name": "x"}) for n in range(30))
        )
    assert [(status, answer["product_id"]) for status, answer in answers] == [(200, f"p{n}") for n in range(30)]


@pytest.mark.parametrize("query", ["wait=true&timeout=61", "wait=true&timeout=0", "wait=1", "timeout=NaN"])
async def test_a_wait_that_is_not_allowed_is_422(shop: Shop, query: str) -> None:
    assert (await shop.call("PUT", f"{PRODUCTS}/shoe?{query}", json={"name": "x"}))[0] == 422
    assert await shop.events() == []


# --- retries ------------------------------------------------------------------------------------------------


async def test_a_retry_under_one_key_is_the_same_event(shop: Shop) -> None:
    headers = {"Idempotency-Key": "order-42"}
    body = {"name": "x", "price": 1, "images": [{"data": b64encode(picture()).decode()}]}
    first, second = [await shop.put(body, headers=headers) for _ in range(2)]
    assert first == second
    one, two = await shop.events()
    assert (one.id, one.data) == (two.id, two.data)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/shoe", {"name": "y"}),
        ("PUT", "/boot", {"name": "x"}),
        ("PATCH", "/shoe/offer", {"price": 1}),
        ("DELETE", "/shoe", None),
    ],
)
async def test_a_key_with_another_request_is_409(shop: Shop, method: str, path: str, body: Any) -> None:
    headers = {"Idempotency-Key": "order-42"}
    assert (await shop.put({"name": "x"}, headers=headers))[0] == 202
    status, problem = await shop.call(method, PRODUCTS + path, json=body, headers=headers)
    assert (status, problem["status"]) == (409, 409)
    assert len(await shop.events()) == 1


async def test_a_key_is_its_tenants_own(tmp_path: Path) -> None:
    keys = tuple(ApiKey(name=name, secret=SecretStr(name * 16), tenant=name) for name in "ab")
    async with opened(tmp_path, api_keys=keys) as shop:
        for name in "ab":
            headers = {"X-API-Key": name * 16, "Idempotency-Key": "order-42"}
            assert (await shop.put({"name": name}, headers=headers))[0] == 202


@pytest.mark.parametrize("key", ["", "a b", "é", "x" * 256])
async def test_a_key_that_is_none_is_422(shop: Shop, key: str) -> None:
    assert (await shop.put({"name": "x"}, headers={"Idempotency-Key": key}))[0] == 422


# --- an engine that is away ---------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [StorageFull("the disk is full"), Transient("the log is away", retry_after=3)])
async def test_nothing_is_accepted_when_the_log_cannot_take_it(shop: Shop, error: Transient) -> None:
    shop.log.errors = [error] * 3
    status, problem = await shop.put({"name": "x"})
    assert (status, problem["detail"]) == (503, str(error))
    assert (await shop.form("index-product", FORM))[0] == 503
    status, problem = await shop.post_lines(line(1))
    assert (status, problem["detail"]) == (503, f"{error}; accepted until then: 0, rejected: 0")
    assert await shop.events() == []
    assert (await shop.put({"name": "x"}))[0] == 202


async def test_accepted_events_are_counted(shop: Shop) -> None:
    await shop.put({"name": "x"})
    await shop.post_lines(line(1) + b"\n" + line(2))
    assert shop.metrics.registry.get_sample_value("catalens_events_accepted_total", {"type": events.UPSERTED}) == 3
