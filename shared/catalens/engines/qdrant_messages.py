"""The messages and services of Qdrant's gRPC API, without the rest of `qdrant-client`.

Importing that package makes hundreds of pydantic models for REST, which nothing here uses: half of the time that a
worker needs from its start to its first vector.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Final

__all__ = ["pb"]

_PACKAGE: Final = "qdrant_client"


def _alone(part: str) -> ModuleType:
    """Import a subpackage without running its parent; whoever imports the parent later gets all of it."""
    name = f"{_PACKAGE}.{part}"
    if name in sys.modules or _PACKAGE in sys.modules:
        return importlib.import_module(name)
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {_PACKAGE!r}", name=_PACKAGE)
    sys.modules[_PACKAGE] = importlib.util.module_from_spec(spec)  # knows where its parts are, and was not run
    try:
        return importlib.import_module(name)
    finally:
        del sys.modules[_PACKAGE]


if TYPE_CHECKING:
    from qdrant_client import grpc as pb
else:
    pb = _alone("grpc")
