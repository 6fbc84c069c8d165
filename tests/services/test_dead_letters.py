"""Dead letters over HTTP, on the real embedded engines: seen, brought back once the cause is mended, dropped."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from pydantic import SecretStr
from tests.kafka import Kafka, create_topics, kafka_settings, need_kafka

from catalens import events
from catalens.domain import IndexDocument, Message, Record, WriteOutcome
from catalens.encoders import open_encoder
from catalens.engines import Engines, open_engines
from catalens.ports import Encoder
from catalens.retry import SystemClock
from catalens.settings import ApiKey, EmbedderSettings, EncoderSettings, HttpSettings, Settings
from catalens.telemetry import Metrics
from catalens.web import build_app, serving
from catalens_embedder import letters
from catalens_embedder.worker import Embedder
from catalens_ingest import dead_letters
from catalens_ingest.service import BundleInfo, IngestService

TINY = Path(__file__).parent.parent / "fixtures" / "bundles" / "tiny"
LETTERS = "/api/v1/dead-letters"
DAY = 86_400.0


class Office:
    """A running ingest service with engines of its own, a client of it, and a worker when there is need of one."""

    def __init__(
        self, url: str, session: aiohttp.ClientSession, engines: Engines, settings: Settings, encoder: Encoder
    ) -> None:
        self.url = url
        self.session = session
        self.engines = engines
        self.settings = settings
        self.encoder = encoder

    async def call(self, method: str, path: str = "", key: str = "", **options: Any) -> tuple[int, Any]:
        headers = {"X-API-Key": key} if key else {}
        async with self.session.request(method, f"{self.url}{LETTERS}{path}", headers=headers, **options) as answer:
            return answer.status, await answer.json(content_type=None)

    async def listed(self, query: str = "", key: str = "") -> list[dict[str, Any]]:
        status, answer = await self.call("GET", f"?{query}", key)
        assert status == 200, answer
        found: list[dict[str, Any]] = answer["dead_letters"]
        return found

    async def bury(self, *records: Record, reason: str = "invalid_event", error: str = "broken") -> None:
        await self.engines.log.append([letters.dead_letter(record, reason, error) for record in records])

    async def topic(self, name: str) -> list[Record]:
        return [record async for record in self.engines.log.scan([name])]


@asynccontextmanager
async def opened(folder: Path, **given: Any) -> AsyncIterator[Office]:
    settings = Settings(
        _env_file=None,
        data_dir=folder,
        model=str(TINY),
        encoder=EncoderSettings(lanes=1),
        embedder=EmbedderSettings(batch=16, in_flight=32, engine_attempts=2),
        http=HttpSettings(port=0),
        **given,
    )
    async with AsyncExitStack() as stack:
        encoder = await stack.enter_async_context(open_encoder(settings, Metrics()))
        engines = await stack.enter_async_context(open_engines(settings, encoder.spec))
        url = await stack.enter_async_context(served(engines, settings))
        session = await stack.enter_async_context(aiohttp.ClientSession())
        yield Office(url, session, engines, settings, encoder)


@asynccontextmanager
async def served(engines: Engines, settings: Settings) -> AsyncIterator[str]:
    """Run one ingest service more on the same engines."""
    metrics = Metrics()
    service = IngestService(
        log=engines.log,
        blobs=engines.blobs,
        images=engines.images,
        memory=engines.memory,
        bundle=lambda: BundleInfo("starter", 64),
        settings=settings,
        metrics=metrics,
    )

    async def ready() -> Mapping[str, str]:
        return {}

    app = build_app(service.operations(), settings, metrics, ready=ready, title="Ingest")
    async with serving(app, settings) as url:
        yield url


@asynccontextmanager
async def working(office: Office) -> AsyncIterator[Callable[[], Any]]:
    """Run the worker; yields what returns when it has finished everything."""
    engines = office.engines
    embedder = Embedder(
        log=engines.log,
        index=engines.index,
        encoder=office.encoder,
        cache=engines.cache,
        blobs=engines.blobs,
        images=engines.images,
        settings=office.settings,
        metrics=Metrics(),
        clock=SystemClock(),
    )

    async def idle() -> None:
        while any((await engines.log.lag(events.EMBEDDER_GROUP, events.CONSUMED)).values()):
            await asyncio.sleep(0.005)

    stop = asyncio.Event()
    task = asyncio.create_task(embedder.run(stop), name="embedder")
    try:
        yield idle
    finally:
        stop.set()
        await task


@pytest.fixture
async def office(tmp_path: Path) -> AsyncIterator[Office]:
    async with opened(tmp_path) as found:
        yield found


def record(
    product_id: str = "a", value: bytes = b"{}", *, topic: str = events.PRODUCTS, offset: int = 0, **headers: str
) -> Record:
    """Return an event as a worker has read it, header names with _ in place of -."""
    tenant = headers.get("ce_tenant", "default")
    described = {"ce_type": events.UPSERTED, **headers}
    return Record(topic, 0, offset, f"{tenant}|{product_id}", value, described, time.time() - 60)


# --- seeing them --------------------------------------------------------------------------------------------


async def test_a_letter_is_listed_with_all_that_is_known_of_it(office: Office) -> None:
    poison = record("shoe", b'{"name": 5}', offset=41)
    await office.bury(poison, error="name: " + "x" * 1000)
    (letter,) = await office.listed()
    assert datetime.fromisoformat(letter.pop("failed_at")).timestamp() == pytest.approx(time.time(), abs=60)
    first_seen = datetime.fromisoformat(letter.pop("first_seen"))
    assert first_seen == datetime.fromtimestamp(poison.timestamp, UTC)
    assert letter == {
        "id": "0-0",
        "reason": "invalid_event",
        "error": "name: " + "x" * 294,
        "type": events.UPSERTED,
        "product_id": "shoe",
        "tenant": "default",
        "topic": events.PRODUCTS,
        "partition": 0,
        "offset": 41,
        "attempts": 1,
        "bytes": 11,
        "state": "open",
    }


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (b'{"name": [1.5, null, "\xc3\xa9"]}', {"data": {"name": [1.5, None, "é"]}}),
        (b"null", {"data": None}),
        (b"\xff\x00", {"base64": base64.b64encode(b"\xff\x00").decode()}),
        (b"", {"base64": ""}),
        (b"[" * 5000, {"base64": base64.b64encode(b"[" * 5000).decode()}),
        (b'{"a": NaN}', {"base64": base64.b64encode(b'{"a": NaN}').decode()}),
        (b'{"a": 1e999}', {"base64": base64.b64encode(b'{"a": 1e999}').decode()}),
        (b'"' + b"x" * 7_000_000 + b'"', {"data": "x" * 7_000_000}),
    ],
    ids=["object", "null", "bytes", "nothing", "deep", "nan", "huge", "large"],
)
async def test_a_letter_is_shown_with_its_headers_and_data(office: Office, value: bytes, shown: dict[str, Any]) -> None:
    await office.bury(record(value=value, ce_source="/läden"), error="e" * 1000)
    status, letter = await office.call("GET", "/0-0")
    assert status == 200
    assert letter["error"] == "e" * 1000
    assert letter["headers"]["ce_source"] == "/läden"
    assert letter["headers"]["dlq_topic"] == events.PRODUCTS
    assert {name: letter[name] for name in ("data", "base64") if name in letter} == shown


async def test_filters_narrow_the_list(office: Office) -> None:
    await office.bury(record("a"), record("b", topic=events.OFFERS, ce_type=events.OFFER_CHANGED))
    await office.bury(record("c"), reason="internal_error")
    for query, ids in (
        ("", "abc"),
        ("reason=internal_error", "c"),
        ("topic=catalog.offers", "b"),
        (f"type={events.UPSERTED}", "ac"),
        ("product_id=b", "b"),
        ("product_id=b&reason=internal_error", ""),
        ("since=2001-01-01", "abc"),
        ("since=2999-01-01T00:00:00Z", ""),
        ("until=2001-01-01T12:00:00%2B02:00", ""),
        ("state=purged", ""),
        ("state=all", "abc"),
    ):
        assert "".join(letter["product_id"] for letter in await office.listed(query)) == ids, query


async def test_the_list_comes_in_pages(office: Office) -> None:
    for first in (0, 5):  # the second half comes while somebody is turning the pages
        await office.bury(*(record(f"p{number}", offset=number) for number in range(first, first + 5)))
        status, answer = await office.call("GET", "?limit=3")
        assert status == 200
    seen = []
    while True:
        seen += [letter["product_id"] for letter in answer["dead_letters"]]
        if answer["next"] is None:
            break
        _, answer = await office.call("GET", "", params={"limit": "3", "after": answer["next"]})
    assert seen == [f"p{number}" for number in range(10)]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("?state=lost", 422),
        ("?limit=0", 422),
        ("?limit=1001", 422),
        ("?after=yesterday", 422),
        ("?since=yesterday", 422),
        ("?colour=red", 422),
        ("/0-99", 404),
        ("/7-0", 404),
        ("/first", 422),
        ("/0-", 422),
        ("/-1-0", 422),
        ("/0-" + "9" * 30, 422),
    ],
)
async def test_what_is_not_there_or_makes_no_sense_is_refused(office: Office, path: str, status: int) -> None:
    await office.bury(record())
    answered, problem = await office.call("GET", path)
    assert answered == status
    assert problem["status"] == status


async def test_a_foreign_record_in_the_topic_is_a_letter_too(office: Office) -> None:
    await office.engines.log.append([Message(events.DEAD_LETTERS, "what?", b"\x00", {"dlq_offset": "x"})])
    await office.engines.log.append([Message(events.DEAD_LETTERS, "k", b"", {"dlq_resolves": "9-9"})])
    (letter,) = await office.listed()
    assert (letter["product_id"], letter["reason"], letter["type"], letter["offset"]) == ("what?", "unknown", "", 0)
    assert (await office.call("DELETE", "/0-0"))[0] == 200


async def test_an_events_own_headers_neither_hide_its_letter_nor_resolve_another(office: Office) -> None:
    await office.bury(record("a"), record("b", dlq_resolves="0-0", dlq_resolution="purged"))
    assert [letter["product_id"] for letter in await office.listed("state=open")] == ["a", "b"]


async def test_the_list_has_but_the_beginning_of_what_an_event_states(office: Office) -> None:
    long = "x" * 100_000
    await office.engines.log.append(
        [Message(events.DEAD_LETTERS, long, b"1", dict.fromkeys(("dlq_reason", "dlq_topic", "ce_type"), long))]
    )
    (letter,) = await office.listed()
    assert [len(letter[name]) for name in ("product_id", "reason", "topic", "type")] == [512] * 4
    status, shown = await office.call("GET", "/0-0")
    assert (status, shown["headers"]["ce_type"]) == (200, long)


async def test_each_key_sees_and_moves_its_own_tenants_letters_only(tmp_path: Path) -> None:
    keys = {"default": "d" * 16, "other": "o" * 16}
    api_keys = tuple(ApiKey(name=name, secret=SecretStr(key), tenant=name) for name, key in keys.items())
    async with opened(tmp_path, api_keys=api_keys) as office:
        await office.bury(record("a"), record("b", ce_tenant="other"), record("c", ce_tenant="NOBODY'S"))
        assert (await office.call("GET"))[0] == 401
        assert [letter["id"] for letter in await office.listed(key=keys["default"])] == ["0-0", "0-2"]
        assert [letter["id"] for letter in await office.listed(key=keys["other"])] == ["0-1"]
        for method, path in (("GET", "/0-0"), ("POST", "/0-0/replay"), ("DELETE", "/0-0")):
            assert (await office.call(method, path, keys["other"]))[0] == 404
        assert (await office.call("DELETE", "/0-1", keys["other"]))[0] == 200
        assert [letter["state"] for letter in await office.listed("state=all", keys["default"])] == ["open", "open"]


# --- bringing them back -------------------------------------------------------------------------------------


async def test_what_failed_is_applied_when_its_cause_is_mended(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    upsert = office.engines.index.upsert

    async def broken(documents: Sequence[IndexDocument]) -> Sequence[WriteOutcome]:
        raise RuntimeError("a bug of ours")

    # As a foreign producer writes it: without a version, which is then the time of its first arrival.
    old = Message(events.PRODUCTS, "default|a", b'{"product_id": "a", "name": "Old"}', {"ce_type": events.UPSERTED})
    lone = Message(events.PRODUCTS, "default|b", b'{"product_id": "b", "name": "B"}', {"ce_type": events.UPSERTED})
    async with working(office) as idle:
        with monkeypatch.context() as fault:
            fault.setattr(office.engines.index, "upsert", broken)
            await office.engines.log.append([old, lone])
            await idle()
        monkeypatch.setattr(office.engines.index, "upsert", upsert)
        listed = await office.listed("reason=internal_error")
        assert [letter["product_id"] for letter in listed] == ["a", "b"]
        await office.engines.log.append([Message(old.topic, old.key, old.value.replace(b"Old", b"New"), old.headers)])
        await idle()
        for letter in listed:
            assert (await office.call("POST", f"/{letter['id']}/replay"))[1]["changed"]
        await idle()
        stored = await office.engines.index.get("default", ["a", "b"])
    assert {name: found.product.name for name, found in stored.items()} == {"a": "New", "b": "B"}
    assert await office.listed() == []
    assert [letter["state"] for letter in await office.listed("state=all")] == ["replayed", "replayed"]


async def test_a_replay_carries_the_first_bytes_and_headers_and_spares_the_compacted_topics(office: Office) -> None:
    came = record("a", b"\xff", offset=41, ce_source="/shop", retry_attempt="2", retry_first="1000.5")
    await office.bury(came)
    await office.call("POST", "/0-0/replay?force=true")  # too old to be applied
    assert await office.topic(events.RETRIES[0]) == []
    came = record("b", b"\xff", offset=42, ce_source="/shop", retry_attempt="2")
    await office.bury(came)
    assert (await office.call("POST", "/0-1/replay"))[0] == 200
    (back,) = await office.topic(events.RETRIES[0])
    assert (back.key, back.value) == (came.key, came.value)
    assert back.headers == {
        "ce_type": events.UPSERTED,
        "ce_source": "/shop",
        "retry_first": str(came.timestamp),
        "retry_topic": events.PRODUCTS,
        "retry_partition": "0",
        "retry_offset": "42",
    }
    assert letters.due(back) == 0
    assert letters.origin(back) == letters.Origin(events.PRODUCTS, "0", "42", 0)
    assert await office.topic(events.PRODUCTS) == []


async def test_a_replay_that_fails_again_is_a_new_letter_of_the_same_origin(office: Office) -> None:
    bad = Message(events.PRODUCTS, "default|x", b"?", {"ce_type": events.UPSERTED})
    async with working(office) as idle:
        await office.engines.log.append([bad])
        await idle()
        (letter,) = await office.listed()
        await office.call("POST", f"/{letter['id']}/replay")
        await idle()
        (again,) = await office.listed()
    assert again["id"] != letter["id"]
    assert [again[name] for name in ("topic", "offset", "first_seen")] == [
        letter[name] for name in ("topic", "offset", "first_seen")
    ]


async def test_replays_are_safe_to_repeat(office: Office) -> None:
    await office.bury(record("a"))
    done = await asyncio.gather(*(office.call("POST", "/0-0/replay") for _ in range(5)))
    assert sorted(answer["changed"] for _, answer in done) == [False] * 4 + [True]
    assert await office.call("POST", "/0-0/replay") == (200, {"id": "0-0", "state": "replayed", "changed": False})
    assert await office.call("DELETE", "/0-0") == (200, {"id": "0-0", "state": "replayed", "changed": False})
    assert len(await office.topic(events.RETRIES[0])) == 1
    assert await office.call("POST", "/0-0/replay?force=true") == (
        200,
        {"id": "0-0", "state": "replayed", "changed": True},
    )
    assert len(await office.topic(events.RETRIES[0])) == 2


async def test_every_process_knows_what_another_one_resolved(office: Office) -> None:
    await office.bury(record("a"), record("b"), record("c"))
    await office.listed()
    async with served(office.engines, office.settings) as url:
        other = Office(url, office.session, office.engines, office.settings, office.encoder)
        await other.call("POST", "/0-0/replay")
        await other.call("DELETE", "/0-1")
    assert [letter["state"] for letter in await office.listed("state=all")] == ["replayed", "purged", "open"]


async def test_what_is_too_old_to_be_applied_is_not_replayed(office: Office) -> None:
    await office.bury(record("a", retry_first=str(time.time() - 22 * DAY)))
    status, problem = await office.call("POST", "/0-0/replay")
    assert status == 409
    assert "21 days" in problem["detail"]
    assert [letter["state"] for letter in await office.listed()] == ["open"]


async def test_many_letters_are_listed_and_replayed_in_any_order(office: Office) -> None:
    for part in range(6):
        await office.bury(*(record(f"p{part * 500 + number}") for number in range(500)))
    ids = [letter["id"] for letter in await office.listed("limit=1000")]
    assert len(ids) == 1000
    for name in (ids[900], ids[3], ids[700], ids[4]):
        assert (await office.call("POST", f"/{name}/replay"))[0] == 200
    assert [found.key for found in await office.topic(events.RETRIES[0])] == [
        f"default|p{number}" for number in (900, 3, 700, 4)
    ]
    assert len(await office.listed("state=replayed")) == 4


# --- dropping them ------------------------------------------------------------------------------------------


async def test_a_purge_marks_and_drops_what_is_resolved_from_the_beginning_on(office: Office) -> None:
    await office.bury(record("a"), record("b"), record("c"))
    await office.call("POST", "/0-0/replay")
    assert await office.call("DELETE", "/0-1") == (200, {"id": "0-1", "state": "purged", "changed": True})
    assert len(await office.topic(events.DEAD_LETTERS)) == 5  # too little to be worth a call
    assert [letter["id"] for letter in await office.listed()] == ["0-2"]
    await office.call("DELETE", "/0-2")
    await office.listed()
    await office.bury(record("d"))
    assert [letter["product_id"] for letter in await office.listed("state=all")][-1] == "d"
    await office.call("DELETE", f"/{(await office.listed())[0]['id']}")
    assert [found.headers.get("dlq_reason") for found in await office.topic(events.DEAD_LETTERS)] in ([], [None])


async def test_what_the_list_has_no_room_for_is_not_dropped(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dead_letters, "_MOST", 2)
    await office.bury(*(record(name) for name in "abcd"))
    assert [letter["id"] for letter in await office.listed()] == ["0-2", "0-3"]
    for name in ("0-2", "0-3"):
        assert (await office.call("DELETE", f"/{name}"))[0] == 200
    kept = [found.key for found in await office.topic(events.DEAD_LETTERS) if "dlq_reason" in found.headers]
    assert kept[:2] == ["default|a", "default|b"]


async def test_reading_a_long_topic_takes_the_memory_of_the_list(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_letters, "_MOST", 2)
    held = []
    fold = dead_letters.DeadLetters._fold

    def counted(self: dead_letters.DeadLetters, found: Record) -> None:
        fold(self, found)
        held.append(len(self._letters))

    monkeypatch.setattr(dead_letters.DeadLetters, "_fold", counted)
    await office.bury(*(record(str(number)) for number in range(20)))
    assert [letter["id"] for letter in await office.listed()] == ["0-18", "0-19"]
    assert (len(held), max(held)) == (20, 4)


async def test_a_letter_that_another_process_dropped_is_gone(office: Office) -> None:
    await office.bury(record("a"))
    (letter,) = await office.listed()
    await office.engines.log.discard({(await office.topic(events.DEAD_LETTERS))[0].source: 1})
    for method, path in (("GET", ""), ("POST", "/replay"), ("DELETE", "")):
        assert (await office.call(method, f"/{letter['id']}{path}"))[0] == 404


async def test_letters_past_their_days_are_listed_no_more(tmp_path: Path) -> None:
    async with opened(tmp_path) as office:
        await office.bury(record("a"))
        assert len(await office.listed()) == 1
        assert await office.engines.log.expire(time.time() + 22 * DAY) == 1
    async with opened(tmp_path) as office:
        assert await office.listed("state=all") == []


# --- on Kafka -----------------------------------------------------------------------------------------------


async def test_the_same_on_kafka_with_several_partitions(tmp_path: Path) -> None:
    need_kafka()
    with Kafka(tmp_path / "kafka") as broker:
        kafka = kafka_settings(broker.bootstrap).kafka
        await create_topics(broker.bootstrap, dict.fromkeys(events.TOPICS, 3))
        async with opened(tmp_path / "data", kafka=kafka) as office:
            poison = [Message(events.PRODUCTS, f"default|p{n}", b"?", {"ce_type": events.UPSERTED}) for n in range(20)]
            async with working(office) as idle:
                await office.engines.log.append(poison)
                await idle()
                seen: list[dict[str, Any]] = []
                after: str | None = None
                while after is not None or not seen:
                    _, answer = await office.call("GET", "?limit=7" + (f"&after={after}" if after else ""))
                    seen += answer["dead_letters"]
                    after = answer["next"]
                assert {letter["product_id"] for letter in seen} == {f"p{number}" for number in range(20)}
                assert len({letter["id"].partition("-")[0] for letter in seen}) > 1
                assert (await office.call("GET", f"/{seen[5]['id']}"))[1]["base64"] == base64.b64encode(b"?").decode()
                assert (await office.call("POST", f"/{seen[5]['id']}/replay"))[1]["changed"]
                await idle()
            again = [letter for letter in await office.listed() if letter["product_id"] == seen[5]["product_id"]]
            assert [letter["offset"] for letter in again] == [seen[5]["offset"]]
            for letter in await office.listed():
                assert (await office.call("DELETE", f"/{letter['id']}"))[0] == 200
            assert await office.listed() == []
            left = await office.topic(events.DEAD_LETTERS)
            assert all("dlq_resolves" in found.headers for found in left)
