"""Words of strangers on a terminal: what a catalogue or a foreign producer wrote must not steer it."""

from __future__ import annotations

import re
from typing import Final

# C0 and C1 controls but tab and line feed, and what turns the direction of writing round.
_STEERING: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""Return `text` with every character that steers a terminal written as \u001b, which in JSON means the same."""
    return _STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
