"""Changing the model on the real embedded engines, under load: nothing lost, no two models mixed, whatever dies."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
import numpy as np
import pytest
from aiohttp.test_utils import TestServer
from tests.models import install_models
from tests.pictures import encode, plain
from tests.qdrant_server import QdrantServer

from catalens import events, lexical
from catalens.domain import Deletion, ImageRef, IndexInfo, OfferChange, PointState, Product, TopicPartition
from catalens.engines import EngineRoom, Engines
from catalens.engines.edge import EdgeIndex
from catalens.errors import CatalensError, Conflict, ModelMismatch, NotFound, Transient
from catalens.generations import Encoders, Generation, Generations
from catalens.ports import EventConsumer, Indexes, VectorIndex
from catalens.retry import SystemClock
from catalens.settings import EmbedderSettings, EncoderSettings, QdrantSettings, Settings
from catalens.telemetry import Metrics
from catalens.web import build_app
from catalens_embedder import reindex
from catalens_embedder.reindex import Progress, Reindexer, drop
from catalens_embedder.shifts import work
from catalens_embedder.worker import Embedder
from catalens_query.current import CurrentQuery
from catalens_query.service import QueryService

SENTINEL = Product(product_id="sentinel", name="red green", brand="sentinel", version=1)


@dataclass
class Installation:
    """Workers and queries at work on one data folder, and hands to reach into it."""

    engines: Engines
    generations: Generations
    encoders: Encoders
    indexes: Indexes
    settings: Settings
    server: TestServer
    session: aiohttp.ClientSession
    progress: list[Progress] = field(default_factory=list)

    async def send(self, *data: events.EventData) -> None:
        """Append events."""
        made = [events.new_event(entry, "default") for entry in data]
        await self.engines.log.append([events.encode(event) for event in made])

    async def idle(self) -> None:
        """Return when the workers have finished every record."""
        while any((await self.engines.log.lag(events.EMBEDDER_GROUP, events.CONSUMED)).values()):
            await asyncio.sleep(0.02)

    async def reindex(self, model: str, *, rebuild: bool = False, life: list[int] | None = None) -> IndexInfo:
        """Run the reindex to its end, as the process does, or until it has done as many things as `life` says."""

        def report(progress: Progress) -> None:
            self.progress.append(progress)
            if life is not None:
                _live(life)

        def mortal(engine: Any) -> Any:
            return engine if life is None else Mortal(engine, life)

        async with self.encoders.open(model) as encoder:
            reindexer = Reindexer(
                log=mortal(self.engines.log),
                indexes=mortal(self.indexes),
                encoder=encoder,
                cache=self.engines.cache,
                blobs=self.engines.blobs,
                images=self.engines.images,
                settings=self.settings,
                clock=SystemClock(),
                report=report,
            )
            info = await reindexer.run(model, rebuild=rebuild)
            await self.generations.catch_up()
            return info

    async def search(self) -> dict[str, Any]:
        """Return the answer that finds the sentinel by its text vector."""
        body = {"query": "red", "mode": "semantic", "using": "text", "filters": {"brand": ["sentinel"]}}
        async with self.session.post(self.server.make_url("/api/v1/search"), json=body) as response:
            assert response.status == 200, await response.text()
            answer: dict[str, Any] = await response.json()
            return answer

    async def expected(self) -> dict[str, float]:
        """Return the sentinel's score by model."""
        scores = {}
        text = lexical.text_for_embedding(SENTINEL)
        async with self.encoders.open("first") as first, self.encoders.open("second") as second:
            for name, encoder in (("first", first), ("second", second)):
                scores[name] = float(np.dot(await encoder.embed_text("red"), await encoder.embed_text(text)))
            mixed = float(np.dot(await first.embed_text("red"), await second.embed_text(text)))
        assert len({round(score, 3) for score in (*scores.values(), mixed)}) == 3, "the models would not show"
        return scores

    async def fresh(self, model: str, folder: Path) -> dict[str, Any]:
        """Return what an index made of the whole log by that model alone holds."""
        async with self.encoders.open(model) as encoder:
            index = await EdgeIndex.open(folder, encoder.spec)
            try:
                embedder = Embedder(
                    self.engines.log,
                    index,
                    encoder,
                    self.engines.cache,
                    self.engines.blobs,
                    self.engines.images,
                    self.settings,
                    Metrics(),
                    SystemClock(),
                )
                for topic in (events.PRODUCTS, events.OFFERS):
                    await embedder.apply([record async for record in self.engines.log.scan([topic])])
                return await content(index)
            finally:
                await index.close()


async def content(index: VectorIndex) -> dict[str, Any]:
    """Return every point of the index, without the time of its writing, in comparable form."""
    found: dict[str, Any] = {}
    after = None
    while states := await index.export(after=after, limit=7, with_vectors=True):
        found.update({str(state.point): _plain(state) for state in states})
        after = states[-1].point
    return found


def _plain(state: PointState) -> Any:
    vectors = {name: np.round(vector, 5).tolist() for name, vector in state.vectors.items()}
    return replace(state, indexed_at=0.0, vectors=vectors)


@asynccontextmanager
async def installation(settings: Settings) -> AsyncIterator[Installation]:
    """Start workers and queries as a process does; leaving stops them gracefully."""
    metrics, clock, stop = Metrics(), SystemClock(), asyncio.Event()
    async with AsyncExitStack() as stack:
        room = await stack.enter_async_context(EngineRoom(settings))
        indexes = await room.indexes()
        encoders = Encoders(settings, metrics)
        generations = await stack.enter_async_context(Generations.open(settings, encoders, indexes))
        engines = Engines(
            await room.log(),
            generations.current.index,
            await room.cache(),
            await room.blobs(),
            await room.images(),
            await room.memory(),
        )

        def build(generation: Generation) -> QueryService:
            return QueryService(
                index=generation.index,
                encoder=generation.encoder,
                cache=engines.cache,
                blobs=engines.blobs,
                images=engines.images,
                log=engines.log,
                settings=settings,
                metrics=metrics,
            )

        def employ(generation: Generation) -> Embedder:
            return Embedder(
                engines.log,
                generation.index,
                generation.encoder,
                engines.cache,
                engines.blobs,
                engines.images,
                settings,
                metrics,
                clock,
            )

        query = CurrentQuery(generations, build)
        server = TestServer(build_app(query.operations(), settings, metrics, ready=query.ready, title="test"))
        await server.start_server()
        stack.push_async_callback(server.close)
        session = await stack.enter_async_context(aiohttp.ClientSession())
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(work(generations, indexes, employ, stop), name="embedder")
            tasks.create_task(generations.follow(stop), name="generations")
            try:
                yield Installation(engines, generations, encoders, indexes, settings, server, session)
            finally:
                stop.set()


@pytest.fixture(scope="module")
def qdrant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QdrantServer]:
    """Qdrant's engine behind its gRPC API, for what is kept with a server's collections."""
    with QdrantServer(tmp_path_factory.mktemp("qdrant") / "data", strict=True) as server:
        yield server


@pytest.fixture(params=["embedded", "qdrant"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """A process for the model `first`, on the embedded index or on Qdrant's."""
    data_dir = tmp_path / "data"
    install_models(data_dir)
    if request.param == "embedded":
        return settings_for(data_dir, model="first")
    server = request.getfixturevalue("qdrant")
    place = QdrantSettings(url=server.url, grpc_port=server.grpc_port, collection=f"test-{uuid4().hex}", timeout=60)
    return settings_for(data_dir, model="first", qdrant=place)


def settings_for(data_dir: Path, **more: Any) -> Settings:
    return Settings(
        _env_file=None,
        data_dir=data_dir,
        encoder=EncoderSettings(lanes=1),
        embedder=EmbedderSettings(batch=8, in_flight=32, engine_attempts=2),
        **more,
    )


class Load:
    """A catalogue that never stops changing: products with and without pictures, deletions and offers."""

    def __init__(self, place: Installation) -> None:
        self._place = place
        self._dice = random.Random(5)
        self._version = 1

    async def step(self) -> None:
        """Send one change."""
        self._version += 1
        product_id = f"p{self._dice.randrange(60)}"
        colour = self._dice.choice(["red", "green", "blue", "yellow"])
        offer: dict[str, Any] = {"price": float(self._version), "currency": "EUR", "stock": self._version % 5}
        match self._dice.randrange(6):
            case 0:
                await self._place.send(Deletion(product_id=product_id, version=self._version))
            case 1:
                stated = dict(self._dice.sample(sorted(offer.items()), 1))
                await self._place.send(OfferChange(product_id=product_id, offer_version=self._version, **stated))
            case 2:
                shade = self._dice.randrange(256)
                blob = await self._place.engines.blobs.put(encode(plain((shade, 40, 90), 32, 32), "PNG"))
                await self._place.send(
                    Product(product_id=product_id, name=colour, images=(ImageRef(blob=blob),), version=self._version)
                )
            case _:
                await self._place.send(
                    Product(
                        product_id=product_id, name=colour, version=self._version, offer_version=self._version, **offer
                    )
                )

    async def run(self, until: asyncio.Event) -> None:
        """Send changes until told to stop."""
        while not until.is_set():
            await self.step()
            await asyncio.sleep(0.005)


async def filled(place: Installation, changes: int = 150) -> Load:
    """Give the installation a catalogue to begin with."""
    load = Load(place)
    await place.send(SENTINEL, OfferChange(product_id="early", price=3.0, offer_version=1))
    for _ in range(changes):
        await load.step()
    await place.idle()
    return load


async def test_under_load_the_new_index_is_that_of_a_fresh_start_and_no_answer_mixes_models(
    settings: Settings, tmp_path: Path
) -> None:
    async with installation(settings) as place:
        load = await filled(place)
        scores = await place.expected()
        over = asyncio.Event()
        seen: list[str] = []

        async def ask() -> None:
            while not over.is_set():
                answer = await place.search()
                seen.append(answer["model"])
                assert answer["results"][0]["score"] == pytest.approx(scores[answer["model"]], abs=1e-4)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(load.run(over), name="load")
            tasks.create_task(ask(), name="ask")
            tasks.create_task(ask(), name="ask")
            info = await place.reindex("second")
            await place.search()
            over.set()
        await place.idle()
        assert info.model == "second"
        assert await place.indexes.current() == info
        assert not await place.indexes.held()
        assert {"first", "second"} == set(seen)
        assert seen[-1] == "second"
        assert [progress.phase for progress in place.progress][-1] == "switch"
        assert await content(place.generations.current.index) == await place.fresh("second", tmp_path / "fresh")


class Killed(BaseException):
    """The process is gone: nothing of it reaches an engine any more."""


def _live(life: list[int]) -> None:
    life[0] -= 1
    if life[0] < 0:
        raise Killed


class Mortal:
    """Lets a reindex make so many changes to indexes and log, then none."""

    def __init__(self, target: Any, life: list[int]) -> None:
        self._target = target
        self._life = life

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._target, name)
        if name not in ("set_notes", "hold", "switch", "set_committed", "committed"):
            return call

        async def counted(*arguments: Any) -> Any:
            _live(self._life)
            return await call(*arguments)

        return counted


async def test_a_reindex_killed_at_each_of_its_steps_goes_on_from_there(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reindex, "_NOTE_SECONDS", 0.0)  # so that it can die between any two pages
    async with installation(settings) as place:
        load = await filled(place)
        deaths = 0
        while True:
            try:
                await place.reindex("second", life=[deaths])
            except Killed:
                deaths += 1
                for _ in range(5):
                    await load.step()
                continue
            break
        phases = {progress.phase for progress in place.progress}
        assert phases == {"copy", "follow", "switch"}
        assert deaths > 10, "it died too seldom to have died everywhere"
        await place.idle()
        assert place.generations.current.info.model == "second"
        assert await content(place.generations.current.index) == await place.fresh("second", tmp_path / "fresh")


async def test_going_back_catches_up_with_what_came_meanwhile(settings: Settings, tmp_path: Path) -> None:
    async with installation(settings) as place:
        load = await filled(place)
        await place.reindex("second")
        for _ in range(80):
            await load.step()
        await place.idle()
        place.progress.clear()
        info = await place.reindex("first")
        assert "copy" not in {progress.phase for progress in place.progress}, "it was all there already"
        await place.idle()
        assert info.model == place.generations.current.info.model == "first"
        assert await content(place.generations.current.index) == await place.fresh("first", tmp_path / "fresh")


async def test_going_back_after_the_log_forgot_offers_copies_them(settings: Settings) -> None:
    async with installation(settings) as place:
        await place.send(Product(product_id="p", name="red", version=1, offer_version=1, price=1.0, stock=1))
        await place.idle()
        old = place.generations.current.info
        await place.reindex("second")
        await place.send(OfferChange(product_id="p", price=2.0, offer_version=2))
        await place.idle()
        await place.send(OfferChange(product_id="p", stock=2, offer_version=3))
        await place.idle()
        # As if it had been long ago: the log has kept the last offer of the product only.
        notes = dict(await place.indexes.notes(old))
        await place.indexes.set_notes(old, {**notes, "as_of": "1.0"})
        (place_of_offers,) = await place.engines.log.committed("nobody", [events.OFFERS])
        await place.engines.log.discard({place_of_offers: 1})
        await place.reindex("first")
        product = (await place.generations.current.index.get("default", ["p"]))["p"].product
        assert (product.price, product.stock, product.offer_version) == (2.0, 2, 3)


async def test_a_lost_index_is_rebuilt_from_the_log(settings: Settings, tmp_path: Path) -> None:
    async with installation(settings) as place:
        await filled(place)
        before = await content(place.generations.current.index)
        lost = place.generations.current.info
        info = await place.reindex("first", rebuild=True)
        assert info.generation == 1
        assert info.spec == lost.spec
        assert await content(place.generations.current.index) == before
        await drop(place.indexes, lost.name)
        assert [one.name for one in await place.indexes.all()] == [info.name]
    async with installation(settings) as place:
        assert place.generations.current.info.name == info.name
        assert await content(place.generations.current.index) == before


@pytest.mark.parametrize("settings", ["embedded"], indirect=True)
async def test_a_rebuild_of_a_folder_without_index_is_complete(settings: Settings) -> None:
    async with installation(settings) as place:
        await filled(place)
        before = await content(place.generations.current.index)
    for path in settings.data_dir.glob("index*"):
        path.rename(settings.data_dir.parent / path.name)
    async with installation(settings) as place:
        assert await content(place.generations.current.index) == {}
        await place.reindex("first", rebuild=True)
        assert await content(place.generations.current.index) == before


async def test_the_current_index_is_not_dropped_and_unknown_ones_are_named(settings: Settings) -> None:
    async with installation(settings) as place:
        await filled(place, 5)
        current = place.generations.current.info
        with pytest.raises(Conflict, match="current"):
            await drop(place.indexes, current.name)
        with pytest.raises(NotFound, match=current.name):
            await drop(place.indexes, "nonsense")
        assert await place.reindex("first") == current, "there is nothing to do"


async def test_while_a_switch_is_under_way_workers_read_nothing_then_everything(settings: Settings) -> None:
    async with installation(settings) as place:
        await filled(place, 5)
        await place.indexes.hold(True)
        while await place.engines.log.members(events.EMBEDDER_GROUP):
            await asyncio.sleep(0.05)
        await place.send(Product(product_id="late", name="red", version=1))
        # One that had not heard of it when it joined: what it is dealt, it does not take.
        generation = place.generations.current
        late = Embedder(
            place.engines.log,
            generation.index,
            generation.encoder,
            place.engines.cache,
            place.engines.blobs,
            place.engines.images,
            settings,
            Metrics(),
            SystemClock(),
        )

        async def allowed() -> bool:
            return not await place.indexes.held()

        await late.run(asyncio.Event(), allowed)
        assert sum((await place.engines.log.lag(events.EMBEDDER_GROUP, events.CONSUMED)).values()) == 1
        assert not await generation.index.get("default", ["late"])
        await place.indexes.hold(False)
        await place.idle()
        assert await generation.index.get("default", ["late"])


async def test_workers_that_do_not_stand_aside_stop_the_switch_not_the_shop(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reindex, "_LEAVE_SECONDS", 1.0)
    async with installation(settings) as place:
        await filled(place, 5)
        deaf = await place.engines.log.subscribe(events.EMBEDDER_GROUP, events.CONSUMED)
        with pytest.raises(CatalensError, match="nothing was switched"):
            await place.reindex("second")
        assert place.generations.current.info.model == "first"
        assert not await place.indexes.held()
        await deaf.close()
        assert (await place.reindex("second")).model == "second"


@pytest.mark.parametrize("settings", ["embedded"], indirect=True)
async def test_a_log_that_is_away_after_a_switch_is_waited_for(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with installation(settings) as place:
        await filled(place, 5)
        await place.indexes.hold(True)
        while await place.engines.log.members(events.EMBEDDER_GROUP):
            await asyncio.sleep(0.05)
        subscribe, tries = place.engines.log.subscribe, iter([Transient("away")])

        async def away(*arguments: Any, **options: Any) -> EventConsumer:
            for error in tries:
                raise error
            return await subscribe(*arguments, **options)

        monkeypatch.setattr(place.engines.log, "subscribe", away)
        await place.send(Product(product_id="late", name="red", version=1))
        await place.indexes.hold(False)
        await place.idle()
        assert await place.generations.current.index.get("default", ["late"])


@pytest.mark.parametrize("settings", ["embedded"], indirect=True)
async def test_a_worker_that_nobody_can_call_off_any_more_ends(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken() -> bool:
        raise RuntimeError("nobody foresaw it")

    async def run() -> None:
        async with installation(settings) as place:
            await filled(place, 5)
            monkeypatch.setattr(place.indexes, "held", broken)
            await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup) as raised:
        await run()
    assert isinstance(raised.value.exceptions[0], RuntimeError)


async def test_a_second_run_waits_and_does_not_let_the_workers_go_on(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with installation(settings) as place:
        await filled(place, 5)
        async with between(place, monkeypatch) as met:
            monkeypatch.setattr(reindex, "_LEAVE_SECONDS", 1.0)  # of the second run: the first has seen them leave
            with pytest.raises(Conflict, match="another reindex"):
                await place.reindex("second", rebuild=True)
            assert await place.indexes.held()
            met.set()
        assert place.generations.current.info.model == "second"


async def test_workers_that_went_on_before_the_switch_prevent_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with installation(settings) as place:
        await filled(place, 5)

        async def overtaken() -> None:
            async with between(place, monkeypatch) as met:
                await place.indexes.hold(False)
                met.set()

        with pytest.raises(CatalensError, match="nothing was switched"):
            await overtaken()
        assert place.generations.current.info.model == "first"
        assert (await place.reindex("second")).model == "second"


@asynccontextmanager
async def between(place: Installation, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[asyncio.Event]:
    """Change to `second`; the block runs when no worker works any more, and the switch goes on when it sets the event.

    Raises what the change raises.
    """
    committed, reached, met = place.engines.log.committed, asyncio.Event(), asyncio.Event()

    async def stopped(group: str, topics: Sequence[str]) -> Mapping[TopicPartition, int]:
        found = await committed(group, topics)
        if group == events.EMBEDDER_GROUP and await place.indexes.held():
            reached.set()
            await met.wait()
        return found

    monkeypatch.setattr(place.engines.log, "committed", stopped)
    change = asyncio.create_task(place.reindex("second"), name="reindex")
    there = asyncio.create_task(reached.wait(), name="reached")
    try:
        await asyncio.wait([there, change], return_when=asyncio.FIRST_COMPLETED)
        if not reached.is_set():
            await change  # with what it failed
        yield met
    finally:
        met.set()
        there.cancel()
    await change


async def test_a_process_loads_the_current_model_unless_another_is_set(settings: Settings) -> None:
    async with installation(settings) as place:
        await filled(place, 5)
        await place.reindex("second")
    async with installation(settings_for(settings.data_dir, qdrant=settings.qdrant)) as place:
        assert place.generations.current.info.model == "second"
    with pytest.raises(ModelMismatch, match="CATALENS_MODEL=second"):
        async with installation(settings):
            pass
