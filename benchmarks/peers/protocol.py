"""What every contender of the encoder benchmark speaks: commands as JSON lines in, answers as JSON lines out.

Runs in the contenders' own environments, so it needs the standard library only.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

Vectors = Iterable[Any]  # of rows of floats: lists, arrays or tensors


class Contender(Protocol):
    """An embedding library at one setting."""

    def images(self, pictures: list[bytes]) -> Vectors:
        """Embed many pictures at the setting that suits them."""
        ...

    def texts(self, texts: list[str]) -> Vectors:
        """Embed many texts."""
        ...

    def image(self, picture: bytes) -> Vectors:
        """Embed one picture, as a query."""
        ...

    def text(self, text: str) -> Vectors:
        """Embed one text, as a query."""
        ...


def serve(make: Callable[[dict[str, Any]], Contender]) -> None:
    """Make the contender with the setting given as JSON on the command line, then do what stdin asks for."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print
    begin = time.perf_counter()
    setting: dict[str, Any] = json.loads(sys.argv[1])
    contender = make(setting)
    seconds = time.perf_counter() - begin

    def answer(**document: Any) -> None:
        answers.write(json.dumps(document) + "\n")
        answers.flush()

    answer(seconds=seconds, pid=os.getpid())
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer(**_do(contender, command))
        except Exception as error:  # noqa: BLE001  # the boundary: what a library cannot do is a result too
            answer(error=f"{type(error).__name__}: {error}"[:500])
    os._exit(0)  # not one of the threads and pools that libraries leave is waited for


def _do(contender: Contender, command: dict[str, Any]) -> dict[str, Any]:
    match command["do"]:
        case "images":
            pictures = _taken(_pictures(command["folder"]), command["from"], command["count"])
            begin = time.perf_counter()
            done = sum(1 for _ in contender.images(pictures))
            return {"seconds": time.perf_counter() - begin, "done": done}
        case "texts":
            texts = _taken(command["texts"], command["from"], command["count"])
            begin = time.perf_counter()
            done = sum(1 for _ in contender.texts(texts))
            return {"seconds": time.perf_counter() - begin, "done": done}
        case "image":
            queries = _taken(_pictures(command["folder"]), command["from"], command["count"])
            return {"took": [_took(contender.image, query) for query in queries]}
        case "text":
            words = _taken(command["texts"], command["from"], command["count"])
            return {"took": [_took(contender.text, query) for query in words]}
        case "vectors":
            pictures = _taken(_pictures(command["folder"]), 0, command["count"])
            words = _taken(command["texts"], 0, command["count"])
            return {"images": _packed(contender.images(pictures)), "texts": _packed(contender.texts(words))}
        case "memory":
            return memory()
        case other:
            raise ValueError(other)


def memory() -> dict[str, Any]:
    """Return this process' resident memory in MiB: all of it, what no file backs, and the most there ever was."""
    found = {}
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "RssAnon", "RssFile", "VmHWM"):
            found[name] = int(value.split()[0]) / 1024
    return found


def _took(encode: Callable[[Any], Vectors], query: object) -> float:
    begin = time.perf_counter()
    for _ in encode(query):
        pass
    return time.perf_counter() - begin


_READ: dict[str, list[bytes]] = {}


def _pictures(folder: str) -> list[bytes]:
    """Return the files of a folder, read once: no disk in the measurement."""
    if folder not in _READ:
        _READ[folder] = [path.read_bytes() for path in sorted(Path(folder).iterdir())]
    return _READ[folder]


def _taken(items: list[Any], begin: int, count: int) -> list[Any]:
    return [items[(begin + n) % len(items)] for n in range(count)]


def _packed(vectors: Vectors) -> list[str]:
    return [base64.b64encode(array("f", [float(x) for x in vector]).tobytes()).decode() for vector in vectors]
