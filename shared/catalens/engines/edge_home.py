"""The embedded indexes of one data folder side by side: which there are, which is current, and what is noted of each.

The first one lives in `index`, any other in `index-NAME`; `indexes.json` knows them all and is replaced as a whole.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter, ValidationError

from catalens.domain import IndexInfo, ModelSpec
from catalens.engines.edge import EdgeIndex
from catalens.engines.folder import storage_error, sync_folder
from catalens.errors import Conflict, Misconfigured, NotFound

FORMAT: Final = 1
"""Of indexes.json."""
_FIRST: Final = "index"


@dataclass(frozen=True, slots=True)
class _Entry:
    info: IndexInfo
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _State:
    """What indexes.json says; indexes by the name of their folder."""

    format: int = FORMAT
    current: str | None = None
    held: bool = False
    indexes: dict[str, _Entry] = field(default_factory=dict)

    def folder_of(self, info: IndexInfo) -> str | None:
        return next((folder for folder, entry in self.indexes.items() if entry.info.name == info.name), None)

    def noted(self, folder: str, entry: _Entry) -> _State:
        return replace(self, indexes={**self.indexes, folder: entry})


_FILE: Final = TypeAdapter(_State)


class _SharedIndex(EdgeIndex):
    """One open index, however many in the process use it: its folder can be open but once."""

    users = 0

    async def close(self) -> None:
        """Let go of it; the last user closes it."""
        self.users -= 1
        if self.users <= 0:
            await super().close()


class EdgeIndexes:
    """See Indexes; for one process, which has the data folder locked."""

    def __init__(self, folder: Path, model: str) -> None:
        """Look after the indexes in `folder`; one of a release that noted no model is said to be of `model`."""
        self._folder = folder
        self._model = model
        self._file = folder / "indexes.json"
        self._read: _State | None = None
        self._open: dict[str, _SharedIndex] = {}
        self._changing = asyncio.Lock()

    async def current(self) -> IndexInfo | None:
        """See the port."""
        state = await self._state()
        return None if state.current is None else state.indexes[state.current].info

    async def all(self) -> Sequence[IndexInfo]:
        """See the port."""
        return [entry.info for entry in (await self._state()).indexes.values()]

    async def open(self, info: IndexInfo) -> EdgeIndex:
        """See the port. Whoever opened it closes it; it is one and the same for all in this process."""
        await self._state()
        async with self._changing:
            state = await self._state()
            folder = state.folder_of(info)
            if folder is None:
                # Known before it exists: a folder that nobody knows is the rest of one that was dropped.
                folder = _FIRST if not state.indexes and info.generation == 0 else f"{_FIRST}-{info.name}"
                if folder != _FIRST:
                    await asyncio.to_thread(shutil.rmtree, self._folder / folder, ignore_errors=True)
                state = state.noted(folder, _Entry(info))
                await self._write(replace(state, current=state.current or folder))
            shared = self._open.get(folder)
            if shared is None or shared.users <= 0:
                shared = self._open[folder] = await _SharedIndex.open(self._folder / folder, info.spec)
            shared.users += 1
            return shared

    async def switch(self, info: IndexInfo) -> None:
        """See the port."""
        await self._change(lambda state: replace(state, current=_known(state, info), held=False))

    async def drop(self, info: IndexInfo) -> None:
        """See the port. Raises Conflict too while it is open."""

        def forget(state: _State) -> _State:
            folder = _known(state, info)
            if folder == state.current:
                raise Conflict(f"the index {info.name} is the current one: switch to another first")
            if folder in self._open and self._open[folder].users > 0:
                raise Conflict(f"the index {info.name} is in use: try again when that has ended")
            return replace(state, indexes={name: entry for name, entry in state.indexes.items() if name != folder})

        folder = _known(await self._state(), info)
        await self._change(forget)
        await asyncio.to_thread(shutil.rmtree, self._folder / folder, ignore_errors=True)

    async def notes(self, info: IndexInfo) -> Mapping[str, str]:
        """See the port."""
        state = await self._state()
        folder = state.folder_of(info)
        return {} if folder is None else dict(state.indexes[folder].notes)

    async def set_notes(self, info: IndexInfo, notes: Mapping[str, str]) -> None:
        """See the port."""

        def note(state: _State) -> _State:
            folder = _known(state, info)
            return state.noted(folder, replace(state.indexes[folder], notes=dict(notes)))

        await self._change(note)

    async def held(self) -> bool:
        """See the port."""
        return (await self._state()).held

    async def hold(self, on: bool) -> None:
        """See the port."""
        await self._change(lambda state: replace(state, held=on))

    async def close(self) -> None:
        """See the port."""
        for index in self._open.values():
            if index.users > 0:
                index.users = 1
                await index.close()

    # --- the file -------------------------------------------------------------------------------------------

    async def _state(self) -> _State:
        if self._read is None:
            self._read = await asyncio.to_thread(self._load)
        return self._read

    async def _change(self, change: Callable[[_State], _State]) -> None:
        await self._state()
        async with self._changing:
            await self._write(change(await self._state()))

    async def _write(self, state: _State) -> None:
        await asyncio.to_thread(self._store, state)
        self._read = state

    def _load(self) -> _State:
        try:
            state = _FILE.validate_json(self._file.read_bytes())
        except FileNotFoundError:
            return self._adopted()
        except OSError as error:
            raise storage_error(error, f"{self._file} cannot be read") from error
        except ValidationError as error:
            raise Misconfigured(f"{self._file} is damaged: {error.errors()[0]['msg']}; restore it") from error
        if state.format != FORMAT:
            raise Misconfigured(
                f"{self._file} has format {state.format}, this release reads {FORMAT}: start the newer release"
            )
        return state

    def _adopted(self) -> _State:
        """Return the state of a folder without the file: a new one, or one of a release that had one index only."""
        others = sorted(path.name for path in self._folder.glob(f"{_FIRST}-*"))
        if others:
            raise Misconfigured(
                f"{self._file} is missing, which says which of {_FIRST}, {', '.join(others)} is current: restore it"
            )
        try:
            spec = ModelSpec(**json.loads((self._folder / _FIRST / "meta.json").read_bytes())["model"])
        except (OSError, ValueError, KeyError, TypeError):
            return _State()  # there is none; one that is damaged says so when it is opened
        return _State(current=_FIRST, indexes={_FIRST: _Entry(IndexInfo(self._model, spec))})

    def _store(self, state: _State) -> None:
        partial = self._file.with_suffix(".tmp")
        try:
            with partial.open("wb") as file:
                file.write(_FILE.dump_json(state, indent=2) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self._file)
            sync_folder(self._folder)
        except OSError as error:
            raise storage_error(error, f"{self._file} cannot be written") from error


def _known(state: _State, info: IndexInfo) -> str:
    folder = state.folder_of(info)
    if folder is None:
        raise NotFound(f"there is no index {info.name}")
    return folder
