"""Words of strangers steer no terminal."""

from __future__ import annotations

import json

import pytest

from catalens_standalone.terminal import printable


@pytest.mark.parametrize("text", ["\x1b[2J", "\x07", "\x9b31m", "a\rb", "\x7f", "\u202eexe", "\u2067"])
def test_what_steers_is_written_out_and_still_the_same_json(text: str) -> None:
    assert printable(text).isprintable()
    assert json.loads(printable(json.dumps(text, ensure_ascii=False))) == text


def test_all_other_writing_stays() -> None:
    text = "Größe 42\tشال\n椅子 \u200f👩‍🦰 \\u001b"
    assert printable(text) == text
