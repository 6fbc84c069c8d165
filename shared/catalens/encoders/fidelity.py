"""How near one model's vectors are to another's: cosines, and whether neighbours stay neighbours."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from catalens.encoders.bundle import Closeness

Rows = NDArray[np.float32]

NEIGHBOURS: Final = 10


def closeness(reference: Rows, rows: Rows) -> Closeness:
    """Return how near `rows` [N, D] are to `reference` [N, D], N ≥ 1, row by row; neither need be normalised.

    Centred: with the reference's mean unit vector taken off both first. A model's vectors all lie in one narrow cone,
    so that plain cosines look good whatever is lost of what tells items apart. Of a single row, or of rows that are
    all equal, nothing is left after that: its centred cosine is then 1 where the two are equal, else the plain one.
    """
    ours, theirs = _units(rows), _units(reference)
    plain = _cosines(theirs, ours)
    mean = theirs.mean(axis=0)
    centred_ours, centred_theirs = ours - mean, theirs - mean
    spread = np.linalg.norm(centred_theirs, axis=1)
    centred = np.where(spread > _NOTHING, _cosines(centred_theirs, centred_ours), plain)
    return Closeness(
        cosine_mean=_share(plain.mean()),
        cosine_min=_share(plain.min()),
        centred_mean=_share(centred.mean()),
        centred_min=_share(centred.min()),
    )


def overlap(reference: Rows, rows: Rows, neighbours: int = NEIGHBOURS) -> float:
    """Return the mean share of each item's nearest other items, by `reference`, that are nearest by `rows` too.

    With fewer than `neighbours` + 1 other items it looks at half of them: the share of all of them would always be 1.
    Raises ValueError for fewer than three items.
    """
    if len(reference) < 3:
        raise ValueError("neighbours can be compared among three items or more")
    count = min(neighbours, (len(reference) - 1) // 2)
    ours, theirs = _nearest(rows, count), _nearest(reference, count)
    kept = [len(np.intersect1d(a, b)) for a, b in zip(theirs, ours, strict=True)]
    return float(np.mean(kept)) / count


# The length below which a centred vector is rounding, not content.
_NOTHING: Final = 1e-5


def _units(rows: Rows) -> NDArray[np.float64]:
    wide = rows.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.asarray(wide / np.where(norms > 0, norms, 1.0))


def _cosines(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return each row's cosine; of two rows of zeros 1, of one that is zero 0."""
    lengths = np.linalg.norm(left, axis=1), np.linalg.norm(right, axis=1)
    product = lengths[0] * lengths[1]
    both_zero = (lengths[0] == 0) & (lengths[1] == 0)
    dots = np.einsum("nd,nd->n", left, right)
    return np.asarray(np.where(both_zero, 1.0, dots / np.where(product > 0, product, 1.0)))


def _nearest(rows: Rows, count: int) -> NDArray[np.intp]:
    units = _units(rows)
    scores = units @ units.T
    np.fill_diagonal(scores, -np.inf)
    # Sorted by score, then by place: equal pictures must not count as a loss.
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


def _share(value: float) -> float:
    """Return `value` within −1…1, where rounding may have carried it out, with the digits that mean something."""
    return round(float(np.clip(value, -1.0, 1.0)), 5)
