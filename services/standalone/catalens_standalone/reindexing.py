"""Changing the model of the standalone process while it answers: HTTP operations, and the work in the background."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Annotated, Final, Literal

import structlog
from aiohttp import web
from pydantic import Field, StringConstraints, ValidationError

from catalens.domain import DEFAULT_TENANT, Value
from catalens.encoders.bundle import read_manifest, resolve
from catalens.engines import Engines
from catalens.errors import CatalensError, Conflict, Misconfigured, Transient
from catalens.generations import Encoders, Generations
from catalens.openapi import Operation
from catalens.ports import Clock, Indexes
from catalens.settings import Settings
from catalens.web import Problem, invalid, is_shared, read_json, reply, tenant_of
from catalens_embedder.reindex import Progress, Reindexer, drop

log = structlog.get_logger(__name__)

_NOTE: Final = "reindex.json"
# Over HTTP a model is named, never a path: who may write products may not choose what files this process loads.
ModelName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$")]


class ReindexRequest(Value):
    """What the index should be made with."""

    model: ModelName | None = Field(
        default=None, description="a bundled model's name or one under DATA_DIR/models; the current one if none"
    )
    rebuild: bool = Field(default=False, description="make a new index from the event log, not from the current index")


class ReindexState(Value):
    """How far the last reindex has come."""

    state: Literal["idle", "running", "done", "failed"]
    model: str | None = None
    phase: str | None = Field(default=None, description="copy or scan, follow, switch")
    done: int = 0
    total: int = Field(default=0, description="an estimate")
    error: str | None = None


class IndexAnswer(Value):
    """One index of the installation."""

    name: str
    model: str
    revision: str
    current: bool = Field(description="it is the one that queries read")


class IndexList(Value):
    """The indexes that there are."""

    indexes: list[IndexAnswer]


class Reindexing:
    """Runs one reindex at a time; one that the process did not end, the next process goes on with by itself."""

    def __init__(
        self,
        engines: Engines,
        generations: Generations,
        encoders: Encoders,
        indexes: Indexes,
        settings: Settings,
        clock: Clock,
    ) -> None:
        self._engines = engines
        self._generations = generations
        self._encoders = encoders
        self._indexes = indexes
        self._settings = settings
        self._clock = clock
        self._note = settings.data_dir / _NOTE
        self._asked = asyncio.Event()
        self._wanted: ReindexRequest | None = None
        self._state = ReindexState(state="idle")

    def operations(self) -> list[Operation]:
        """Return the rows of the HTTP table that only the standalone process has."""
        return [
            Operation("POST", "/api/v1/reindex", self._start, "Change the model, or rebuild the index", "indexes",
                      "admin", description="Queries are answered by the old index until the new one is complete. "
                      "Where keys are of several tenants, it takes one of the tenant `default`.",
                      body=ReindexRequest, responses={202: ReindexState}, problems=(409,)),
            Operation("GET", "/api/v1/reindex", self._show, "How far the reindex is", "indexes", "admin",
                      responses={200: ReindexState}),
            Operation("GET", "/api/v1/indexes", self._list, "The indexes that there are", "indexes", "admin",
                      responses={200: IndexList}),
            Operation("DELETE", "/api/v1/indexes/{name}", self._drop, "Delete an index that is not current", "indexes",
                      "admin", responses={200: IndexList}, problems=(404, 409)),
        ]  # fmt: skip

    async def run(self, stop: asyncio.Event) -> None:
        """Do what is asked for, until `stop`; what is under way then goes on at the next start."""
        self._wanted = await asyncio.to_thread(self._read_note)
        if self._wanted is not None:
            self._asked.set()
        stopping = asyncio.create_task(stop.wait(), name="reindex.stop")
        try:
            while not stop.is_set():
                asked = asyncio.create_task(self._next(), name="reindex")
                await asyncio.wait([asked, stopping], return_when=asyncio.FIRST_COMPLETED)
                asked.cancel()
                await asyncio.gather(asked, return_exceptions=True)  # `_next` raises nothing but its cancellation
        finally:
            stopping.cancel()

    async def _next(self) -> None:
        await self._asked.wait()
        request = self._wanted or ReindexRequest()
        try:
            model = request.model or self._generations.current.info.model
            self._state = ReindexState(state="running", model=model)
            async with self._encoders.open(model) as encoder:
                reindexer = Reindexer(
                    log=self._engines.log,
                    indexes=self._indexes,
                    encoder=encoder,
                    cache=self._engines.cache,
                    blobs=self._engines.blobs,
                    images=self._engines.images,
                    settings=self._settings,
                    clock=self._clock,
                    report=self._report,
                )
                await reindexer.run(model, rebuild=request.rebuild)
                await self._generations.catch_up()
        except Transient as error:
            log.warning("reindex.failed", error=str(error), advice="ask again, or restart: it goes on where it was")
            self._failed(error)
        except Exception as error:  # the boundary: whatever it is, the process goes on with the index that it has
            log.exception("reindex.failed")
            self._failed(error)
            await asyncio.to_thread(self._note.unlink, missing_ok=True)
        else:
            self._state = ReindexState(state="done", model=model)
            await asyncio.to_thread(self._note.unlink, missing_ok=True)
        self._asked.clear()

    def _failed(self, error: Exception) -> None:
        told = str(error) if isinstance(error, CatalensError) else f"{type(error).__name__}: {error}"
        self._state = self._state.model_copy(update={"state": "failed", "error": told})

    def _report(self, progress: Progress) -> None:
        self._state = self._state.model_copy(
            update={"phase": progress.phase, "done": progress.done, "total": progress.total}
        )

    # --- the operations -----------------------------------------------------------------------------------

    async def _start(self, request: web.Request) -> web.Response:
        self._let_in(request)
        wanted = await read_json(request, ReindexRequest)
        if self._asked.is_set():
            if wanted != self._wanted:
                raise Conflict(f"a reindex to {self._state.model} is under way: wait until it has ended")
            return reply(self._state.model_dump(), 202)
        if wanted.model is not None:
            try:
                await asyncio.to_thread(lambda: read_manifest(resolve(wanted.model or "", self._settings.data_dir)))
            except Misconfigured as error:
                raise invalid(("model", str(error))) from error
        await asyncio.to_thread(self._write_note, wanted)
        self._wanted = wanted
        self._state = ReindexState(state="running", model=wanted.model)
        self._asked.set()
        return reply(self._state.model_dump(), 202)

    async def _show(self, request: web.Request) -> web.Response:  # noqa: ARG002  # every handler takes one
        return reply(self._state.model_dump())

    async def _list(self, request: web.Request) -> web.Response:  # noqa: ARG002  # every handler takes one
        current = await self._indexes.current()
        found = [
            IndexAnswer(name=info.name, model=info.model, revision=info.spec.revision, current=info == current)
            for info in await self._indexes.all()
        ]
        return reply(IndexList(indexes=found))

    async def _drop(self, request: web.Request) -> web.Response:
        self._let_in(request)
        if self._asked.is_set():
            raise Conflict("a reindex is under way: wait until it has ended")
        await drop(self._indexes, request.match_info["name"])
        return await self._list(request)

    def _let_in(self, request: web.Request) -> None:
        """Where there are several tenants, keep each from what concerns them all."""
        own = tenant_of(request)
        if own != DEFAULT_TENANT and is_shared(request.app):
            raise Problem(403, f"indexes belong to all tenants: send a key of the tenant {DEFAULT_TENANT}")

    # --- the note that outlives the process ---------------------------------------------------------------

    def _read_note(self) -> ReindexRequest | None:
        try:
            return ReindexRequest.model_validate_json(self._note.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            log.warning("reindex.note_unreadable", path=str(self._note), error=str(error))
            return None

    def _write_note(self, wanted: ReindexRequest) -> None:
        partial = self._note.with_suffix(".tmp")
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(wanted.model_dump_json(exclude_unset=True))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self._note)
        except OSError as error:
            raise Transient(f"{Path(_NOTE)} cannot be written: {error.strerror}") from error
