"""Answers each request by the generation that was current when it came: one answer never mixes two models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from weakref import WeakKeyDictionary

from aiohttp import web

from catalens.generations import Generation, Generations
from catalens.openapi import Handler, Operation
from catalens_query.service import QueryService


class CurrentQuery:
    """The operations of a QueryService, whichever is current; a request keeps its own to its end."""

    def __init__(self, generations: Generations, build: Callable[[Generation], QueryService]) -> None:
        self._generations = generations
        self._build = build
        self._built: WeakKeyDictionary[Generation, tuple[QueryService, list[Operation]]] = WeakKeyDictionary()

    def operations(self) -> list[Operation]:
        """Return the rows of the query table."""
        _, rows = self._of(self._generations.current)
        return [replace(row, handler=self._handler(number)) for number, row in enumerate(rows)]

    async def ready(self) -> Mapping[str, str]:
        """See QueryService.ready."""
        with self._generations.use() as generation:
            return await self._of(generation)[0].ready()

    def _handler(self, number: int) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            with self._generations.use() as generation:
                return await self._of(generation)[1][number].handler(request)

        return handle

    def _of(self, generation: Generation) -> tuple[QueryService, list[Operation]]:
        if generation not in self._built:
            service = self._build(generation)
            self._built[generation] = service, service.operations()
        return self._built[generation]
