"""The embedded index's process with one thing in it changed."""

from __future__ import annotations

import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from catalens.engines.edge import EdgeIndex


@asynccontextmanager
async def broken_worker(tmp_path: Path, old: str, new: str) -> AsyncIterator[None]:
    """The processes that start here run a worker in which `old` is `new`; one within another changes more."""
    module = sys.modules[EdgeIndex.__module__]
    script = Path(module.__file__ or "").with_name("edge_worker.py")
    text = module._WORKER.read_text(encoding="utf-8")
    assert text.count(old) == 1
    patched = tmp_path / "worker" / "edge_worker.py"
    patched.parent.mkdir(exist_ok=True)
    patched.write_text(text.replace(old, new), encoding="utf-8")
    for beside in ("rules.py", "columns.py"):
        shutil.copy(script.with_name(beside), patched.parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_WORKER", patched)
        yield
