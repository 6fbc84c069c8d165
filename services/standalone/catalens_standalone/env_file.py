"""Sets variables in a `.env` file and leaves everything else in it as it is."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from dotenv.parser import parse_stream

from catalens.errors import CatalensError


def set_variables(path: Path, values: Mapping[str, str]) -> None:
    """Give the variables in `path` these values, whole or not at all; a file that is missing is made.

    A variable keeps its place, a new one is appended; comments and all else stay, to the byte. Blocking. Raises
    CatalensError where the file cannot be read or written.
    """
    path = path.resolve()  # a link stays one
    try:
        text = _changed(path, values)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=f".{path.name}.", encoding="utf-8", newline="", delete=False
        ) as scratch:
            try:
                scratch.write(text)
                scratch.flush()
                os.fsync(scratch.fileno())
                if path.exists():
                    shutil.copymode(path, scratch.name)  # there may be keys in it
                Path(scratch.name).replace(path)
            except BaseException:
                Path(scratch.name).unlink(missing_ok=True)
                raise
    except (OSError, UnicodeDecodeError) as error:
        raise CatalensError(f"{path} cannot be changed: {error}") from error


def _changed(path: Path, values: Mapping[str, str]) -> str:
    lines: list[str] = []
    written: set[str] = set()
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            for binding in parse_stream(file):
                name = (binding.key or "").upper()  # names are read whatever their case
                if name not in values:
                    lines.append(binding.original.string)
                elif name not in written:
                    written.add(name)
                    lines.append(_leading(binding.original.string) + f"{name}={values[name]}\n")
    if lines and not lines[-1].endswith("\n"):
        lines.append("\n")
    return "".join(lines) + "".join(f"{name}={value}\n" for name, value in values.items() if name not in written)


def _leading(original: str) -> str:
    """Return the empty lines that the parser counts to what follows them."""
    return original[: len(original) - len(original.lstrip())]
