"""CircuitBreaker: when a call is worth its time."""

from __future__ import annotations

from catalens.engines.redis import CircuitBreaker


def opened() -> CircuitBreaker:
    breaker = CircuitBreaker(threshold=3, first=1.0, longest=4.0)
    assert [breaker.failed(0.0) for _ in range(3)] == [False, False, True]
    return breaker


def test_only_failures_in_a_row_open_it() -> None:
    breaker = CircuitBreaker(threshold=2)
    for _ in range(5):
        assert not breaker.failed(0.0)
        assert not breaker.succeeded()
        assert breaker.allows(0.0)
    assert not breaker.failed(0.0)
    assert breaker.failed(0.0)
    assert not breaker.allows(0.5)


def test_after_the_pause_one_caller_may_try() -> None:
    breaker = opened()
    assert [breaker.allows(now) for now in (0.0, 0.9, 1.0, 1.0, 99.0)] == [False, False, True, False, False]
    assert breaker.succeeded()
    assert not breaker.is_open
    assert all(breaker.allows(99.0) for _ in range(3))


def test_each_failed_probe_doubles_the_pause_up_to_the_longest() -> None:
    breaker = opened()
    now = 1.0
    for pause in (2.0, 4.0, 4.0):
        assert breaker.allows(now)
        assert not breaker.failed(now), "it was open already"
        assert not breaker.allows(now + pause - 0.01)
        now += pause
    assert breaker.allows(now)


def test_calls_that_began_before_it_opened_lengthen_nothing() -> None:
    breaker = opened()
    assert not breaker.failed(0.5)
    assert breaker.allows(1.0)


def test_a_late_answer_closes_it() -> None:
    breaker = opened()
    assert breaker.succeeded()
    assert breaker.allows(0.0)


def test_a_probe_that_was_cancelled_lets_the_next_one_try() -> None:
    breaker = opened()
    assert breaker.allows(1.0)
    breaker.left()
    assert breaker.allows(1.0)


def test_closed_again_the_pause_begins_small() -> None:
    breaker = opened()
    assert breaker.allows(1.0)
    breaker.failed(1.0)
    breaker.succeeded()
    for _ in range(3):
        breaker.failed(10.0)
    assert breaker.allows(11.0)
