"""Pictures in the terminal take their cells and nothing else."""

from __future__ import annotations

import io
import re

import pytest
from PIL import Image
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from catalens_standalone.thumbnails import COLUMNS, ROWS, Protocol, Thumbnail, protocol_for

SEQUENCES = re.compile(r"\x1b_G.*?\x1b\\|\x1b\]1337;.*?\x07|\x1b\[[0-9;]*[A-Za-z]|\x1b[78]", re.DOTALL)


@pytest.mark.parametrize(
    ("environ", "protocol"),
    [
        ({}, "blocks"),
        ({"NO_COLOR": "1", "TERM": "xterm-kitty"}, "none"),
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"LC_TERMINAL": "iTerm2"}, "iterm2"),
        ({"TERM_PROGRAM": "iTerm.app", "TMUX": "/tmp/tmux"}, "blocks"),
        ({"TERM": "screen-256color", "LC_TERMINAL": "iTerm2"}, "blocks"),
    ],
)
def test_protocol(environ: dict[str, str], protocol: Protocol) -> None:
    assert protocol_for(environ, terminal=True, true_color=True) == protocol
    assert protocol_for(environ, terminal=False, true_color=True) == "none"


def test_no_blocks_without_true_colour() -> None:
    assert protocol_for({}, terminal=True, true_color=False) == "none"


def picture(width: int = 300, height: int = 100, mode: str = "RGB", kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height), "red" if mode == "RGB" else 0).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("protocol", ["blocks", "kitty", "iterm2"])
def test_a_table_with_pictures_stays_a_table(protocol: Protocol) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system="truecolor", width=60)
    table = Table("#", "", "name")
    table.add_row("1", Thumbnail(picture(), protocol), "Boxing gloves")
    table.add_row("2", "", "Tent")
    console.print(table)
    output = file.getvalue()
    lines = SEQUENCES.sub("", output).rstrip("\n").split("\n")
    assert len({cell_len(line) for line in lines}) == 1
    assert len(lines) == 3 + ROWS + 1 + 1
    if protocol == "blocks":
        assert output.count("▀") == COLUMNS * ROWS
        assert "255;0;0" in output
    else:
        assert output.count("\x1b7") == output.count("\x1b8") == 1


@pytest.mark.parametrize(("mode", "kind"), [("L", "PNG"), ("1", "PNG"), ("CMYK", "JPEG"), ("P", "GIF")])
def test_any_mode_of_picture(mode: str, kind: str) -> None:
    Thumbnail(picture(mode=mode, kind=kind), "kitty")


@pytest.mark.parametrize("data", [b"", b"<svg/>", picture()[:60]])
def test_what_is_no_picture_is_an_error_that_the_caller_knows(data: bytes) -> None:
    with pytest.raises((OSError, ValueError)):
        Thumbnail(data, "blocks")
