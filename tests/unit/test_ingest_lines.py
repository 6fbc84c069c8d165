"""Lines come out of a stream whole and numbered, however its chunks are cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from catalens_ingest.lines import Line, Splitter

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
