"""How near two sets of vectors are: what is told apart, and what counts as the same."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from catalens.encoders.fidelity import closeness, overlap


def cone(count: int = 60, width: int = 32, seed: int = 0) -> NDArray[np.float32]:
    """Vectors as models make them: all of them near one direction."""
    drawn = np.random.default_rng(seed).normal(size=(count, width)) + 8 * np.eye(width)[0]
    return np.asarray(drawn, np.float32)


def test_the_same_vectors_are_all_the_way_close_whatever_their_length() -> None:
    rows = cone()
    close = closeness(rows, 3 * rows)
    assert (close.cosine_mean, close.cosine_min, close.centred_mean, close.centred_min) == (1, 1, 1, 1)
    assert overlap(rows, 3 * rows) == 1


def test_centred_cosines_show_what_plain_ones_hide() -> None:
    close = closeness(cone(seed=0), cone(seed=1))  # the same cone, nothing else in common
    assert close.cosine_mean > 0.6
    assert abs(close.centred_mean) < 0.1


def test_one_bad_row_is_in_the_least_not_in_the_mean() -> None:
    rows = cone()
    spoilt = rows.copy()
    spoilt[7] = -spoilt[7]
    close = closeness(rows, spoilt)
    assert close.cosine_min == -1
    assert close.cosine_mean == pytest.approx((59 - 1) / 60, abs=1e-4)


def test_rows_that_are_all_equal_have_no_spread_to_compare() -> None:
    rows = np.ones((5, 4), np.float32)
    assert closeness(rows, rows).centred_min == 1
    assert closeness(rows, -rows).centred_min == -1


def test_rows_of_zeros_are_near_to_zeros_alone() -> None:
    zeros = np.zeros((3, 4), np.float32)
    assert closeness(zeros, zeros).cosine_min == 1
    assert closeness(zeros, np.ones((3, 4), np.float32)).cosine_min == 0


def test_overlap_counts_the_neighbours_that_stay() -> None:
    angles = np.linspace(0, 3, 60)
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    mixed = rows[np.random.default_rng(0).permutation(60)]
    assert overlap(rows, rows) == 1
    assert overlap(rows, mixed) == pytest.approx(10 / 59, abs=0.1)  # what chance gives


def test_overlap_of_few_items_does_not_count_all_of_them_as_near() -> None:
    line = np.array([[1, 0], [1, 0.1], [1, 1], [1, 1.2]], np.float32)
    turned = line[[2, 1, 0, 3]]
    assert overlap(line, turned) < 1
    with pytest.raises(ValueError, match="three items"):
        overlap(line[:2], line[:2])
