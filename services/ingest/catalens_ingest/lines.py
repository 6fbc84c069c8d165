"""Cuts a streamed body into lines, whatever its length, without holding more than one batch of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from catalens.reading import BROKEN_BODY

_LINGER = 0.05
"""A batch goes on its way when nothing more has come for this many seconds."""
_BATCH_BYTES = 1024 * 1024
_BATCH_LINES = 256


@dataclass(frozen=True, slots=True)
class Line:
    """One line that is not blank; `text` is None where it was longer than allowed."""

    number: int
    text: bytes | None


class Stream(Protocol):
    """What a body is read from: aiohttp's StreamReader."""

    async def readany(self) -> bytes:
        """Return what is there, at least one byte, or nothing at the end."""
        ...


class Splitter:
    """Turns chunks into lines; an overlong line is dropped as it comes, and reported once it ends."""

    def __init__(self, max_line: int) -> None:
        self._max_line = max_line
        self._rest = bytearray()
        self._overlong = False
        self._number = 0

    def feed(self, chunk: bytes) -> list[Line]:
        """Return the lines that `chunk` completes."""
        *ends, rest = chunk.split(b"\n")
        found: list[Line] = []
        for end in ends:
            self._take(end)
            found += self.finish()
        self._take(rest)
        return found

    def finish(self) -> list[Line]:
        """End the current line and return it, or nothing if it is blank."""
        self._number += 1
        text = None if self._overlong else bytes(self._rest)
        self._rest.clear()
        self._overlong = False
        return [] if text is not None and not text.strip() else [Line(self._number, text)]

    def _take(self, piece: bytes) -> None:
        if self._overlong or len(self._rest) + len(piece) > self._max_line:
            self._overlong = True
            self._rest.clear()
        else:
            self._rest += piece


async def batches(content: Stream, *, max_line: int, timeout: float) -> AsyncIterator[list[Line]]:
    """Yield the lines of `content` in batches, promptly where they come slowly.

    Raises TimeoutError when nothing comes for `timeout` seconds, and what `content` raises when it breaks; every
    line that was complete by then has been yielded.
    """
    splitter = Splitter(max_line)
    batch: list[Line] = []
    size = 0
    while True:
        chunk: bytes | None = None
        try:
            chunk = await _read(content, _LINGER if batch else timeout)
        except TimeoutError:
            if not batch:
                raise
        except BROKEN_BODY:
            if batch:
                yield batch
            raise
        if chunk == b"":
            break
        if chunk:
            batch += splitter.feed(chunk)
            size += len(chunk)
        if batch and (chunk is None or size >= _BATCH_BYTES or len(batch) >= _BATCH_LINES):
            yield batch
            batch, size = [], 0
    batch += splitter.finish()
    if batch:
        yield batch


async def _read(content: Stream, timeout: float) -> bytes:
    async with asyncio.timeout(timeout):
        return await content.readany()
