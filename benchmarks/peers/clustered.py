"""Clustered unit vectors of any number, the same in every process; numpy only, for the peers' own environments too.

A product's picture and text lie near the same centre, about as far apart as a model's two towers put them, and a query
lies nearer to its product's centre than to any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

DIMENSION = 512
CHUNK = 10_000
PER_CLUSTER = 100
_NOISE = 0.9
"""How long the noise is that is added to a centre of length 1."""


def chunks(products: int) -> Iterator[tuple[Any, Any]]:
    """Yield (image, text): float32 rows of at most CHUNK products at a time."""
    centres = _centres(products)
    for number, first in enumerate(range(0, products, CHUNK)):
        draw = np.random.default_rng([1, number])
        at = centres[draw.integers(len(centres), size=min(CHUNK, products - first))]
        yield _near(at, _NOISE, draw), _near(at, _NOISE, draw)


def queries(products: int, count: int) -> Any:
    """Return `count` query vectors."""
    centres = _centres(products)
    draw = np.random.default_rng(2)
    return _near(centres[draw.integers(len(centres), size=count)], _NOISE / 2, draw)


def _centres(products: int) -> Any:
    draw = np.random.default_rng(0)
    return _unit(draw.standard_normal((max(1, products // PER_CLUSTER), DIMENSION), dtype=np.float32))


def _near(points: Any, noise: float, draw: np.random.Generator) -> Any:
    return _unit(points + draw.standard_normal(points.shape, dtype=np.float32) * (noise / DIMENSION**0.5))


def _unit(rows: Any) -> Any:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
