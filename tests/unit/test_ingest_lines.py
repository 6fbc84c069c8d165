"""Lines come out of a stream whole and numbered, however its chunks are cut."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalens_ingest.lines import Line, Splitter, batches

LIMIT = 8
streams = st.lists(st.sampled_from([b"a", b"bb", b" ", b"\n", b"\r", b"x" * 9]), max_size=30).map(b"".join)


def expected(stream: bytes) -> list[Line]:
    found = []
    for number, text in enumerate(stream.split(b"\n"), start=1):
        if len(text) > LIMIT:
            found.append(Line(number, None))
        elif text.strip():
            found.append(Line(number, text))
    return found


@given(streams, st.lists(st.integers(1, 7), min_size=1))
def test_lines_do_not_depend_on_the_chunks(stream: bytes, sizes: list[int]) -> None:
    splitter = Splitter(LIMIT)
    found: list[Line] = []
    rest = stream
    turn = 0
    while rest:
        size = sizes[turn % len(sizes)]
        found += splitter.feed(rest[:size])
        rest, turn = rest[size:], turn + 1
    found += splitter.finish()
    assert found == expected(stream)


class Body:
    """A body that comes in these chunks and then breaks, or stalls for ever."""

    def __init__(self, *chunks: bytes | Exception) -> None:
        self._chunks = list(chunks)

    async def readany(self) -> bytes:
        if not self._chunks:
            await asyncio.Event().wait()
        chunk = self._chunks.pop(0)
        if isinstance(chunk, Exception):
            raise chunk
        return chunk


async def collect(body: Body, found: list[list[int]]) -> None:
    async for batch in batches(body, max_line=LIMIT, timeout=0.01):
        found += [[line.number for line in batch]]


async def test_complete_lines_come_out_before_the_break() -> None:
    found: list[list[int]] = []
    with pytest.raises(ConnectionResetError):
        await collect(Body(b"a\nb\nc", ConnectionResetError()), found)
    assert found == [[1, 2]]


async def test_slow_lines_are_not_held_back() -> None:
    found: list[list[int]] = []
    with pytest.raises(TimeoutError):
        await collect(Body(b"a\nb"), found)
    assert found == [[1]]


async def test_the_last_line_needs_no_end() -> None:
    found: list[list[int]] = []
    await collect(Body(b"a\n", b"b", b""), found)
    assert found == [[1, 2]]


async def test_batches_are_bounded() -> None:
    found: list[list[int]] = []
    await collect(Body(*[b"a\n" * 200] * 3, b""), found)
    assert [len(batch) for batch in found] == [400, 200]
