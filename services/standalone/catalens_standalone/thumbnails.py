"""Small pictures in the terminal: kitty's and iTerm2's own protocols, else half blocks in true colour."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Literal

from PIL import Image
from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.segment import ControlType, Segment
from rich.style import Style

Protocol = Literal["kitty", "iterm2", "blocks", "none"]

COLUMNS = 10
ROWS = 5
_ESC = "\x1b"
# A thumbnail never needs more; a result's picture may come from any host.
_MAX_PIXELS = 64_000_000


def protocol_for(environ: Mapping[str, str], *, terminal: bool, true_color: bool) -> Protocol:
    """Return how this terminal shows pictures, judged by what it says about itself."""
    if not terminal or environ.get("NO_COLOR"):
        return "none"
    if "TMUX" not in environ and not environ.get("TERM", "").startswith("screen"):
        program = environ.get("TERM_PROGRAM", "")
        if "KITTY_WINDOW_ID" in environ or environ.get("TERM") in ("xterm-kitty", "xterm-ghostty"):
            return "kitty"
        if program in ("iTerm.app", "WezTerm") or environ.get("LC_TERMINAL") == "iTerm2":
            return "iterm2"
    return "blocks" if true_color else "none"


class Thumbnail:
    """A picture as a cell of COLUMNS × ROWS characters; decodes at once, so build it in a thread.

    Raises OSError or ValueError when the bytes are no picture.
    """

    def __init__(self, picture: bytes, protocol: Protocol) -> None:
        with Image.open(io.BytesIO(picture)) as opened:
            if opened.width * opened.height > _MAX_PIXELS:
                raise ValueError("too many pixels for a thumbnail")
            opened.draft("RGB", (COLUMNS * 40, ROWS * 80))
            image = opened.convert("RGB")
        pixels = (COLUMNS, ROWS * 2) if protocol == "blocks" else (COLUMNS * 12, ROWS * 24)
        image.thumbnail(pixels)
        # A cell is about twice as high as wide, so both grids have square pixels; centred on black.
        self._canvas = Image.new("RGB", pixels)
        self._canvas.paste(image, ((pixels[0] - image.width) // 2, (pixels[1] - image.height) // 2))
        self._protocol = protocol

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Tell rich that the width is fixed."""
        return Measurement(COLUMNS, COLUMNS)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw, for rich."""
        if self._protocol == "blocks":
            yield from self._blocks()
            return
        for row in range(ROWS):
            yield Segment(" " * COLUMNS)
            if row == ROWS - 1:
                # Drawn last, over the blanks, and the cursor goes back to where the table goes on.
                back = f"{_ESC}7{_ESC}[{ROWS - 1}A{_ESC}[{COLUMNS}D"
                yield Segment(f"{back}{self._escape()}{_ESC}8", None, [(ControlType.CURSOR_UP, 0)])
            yield Segment.line()

    def _blocks(self) -> RenderResult:
        for row in range(ROWS):
            for column in range(COLUMNS):
                upper, lower = (
                    Color.from_rgb(*self._canvas.getpixel((column, row * 2 + half)))  # type: ignore[misc]  # RGB: 3 ints
                    for half in (0, 1)
                )
                yield Segment("▀", Style(color=upper, bgcolor=lower))
            yield Segment.line()

    def _escape(self) -> str:
        buffer = io.BytesIO()
        self._canvas.save(buffer, "PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        if self._protocol == "iterm2":
            size = f"size={buffer.tell()};width={COLUMNS};height={ROWS};inline=1"
            return f"{_ESC}]1337;File={size}:{data}\a"
        blocks = [data[start : start + 4096] for start in range(0, len(data), 4096)]
        return "".join(
            f"{_ESC}_G{f'a=T,f=100,q=2,C=1,c={COLUMNS},r={ROWS},' if number == 0 else ''}"
            f"m={int(number < len(blocks) - 1)};{block}{_ESC}\\"
            for number, block in enumerate(blocks)
        )
