"""Waits between tries: they grow, and never fail themselves."""

from __future__ import annotations

from catalens.retry import RetryPolicy


def test_waits_double_up_to_the_longest() -> None:
    policy = RetryPolicy(attempts=10, first=0.5, longest=3.0)
    assert [policy.delay(failures) for failures in (1, 2, 3, 4, 5)] == [0.5, 1.0, 2.0, 3.0, 3.0]


def test_an_outage_of_hours_is_waited_for_like_one_of_minutes() -> None:
    assert RetryPolicy(attempts=1_000_000).delay(999_999) == 5.0
