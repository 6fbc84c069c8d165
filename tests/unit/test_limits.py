"""The token bucket, as arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalens.limits import Allowance, TokenBuckets, capacity


class Seconds:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def grants(buckets: TokenBuckets, rate: float, tries: int, client: str = "shop") -> int:
    return sum([(await buckets.take(client, rate)).granted for _ in range(tries)])


async def test_a_bucket_holds_five_seconds_and_fills_with_time() -> None:
    now = Seconds()
    buckets = TokenBuckets(now)
    assert await grants(buckets, 2.0, 20) == 10
    now.now += 1.6
    assert await grants(buckets, 2.0, 20) == 3
    now.now += 1_000
    assert await grants(buckets, 2.0, 20) == 10
    assert await grants(buckets, 2.0, 20, client="other") == 10


@given(
    rate=st.floats(0.01, 1000),
    gaps=st.lists(st.floats(0, 20), min_size=1, max_size=60),
)
async def test_never_more_than_the_rate_allows(rate: float, gaps: list[float]) -> None:
    now = Seconds()
    buckets = TokenBuckets(now)
    granted = 0
    for gap in gaps:
        now.now += gap
        allowance = await buckets.take("shop", rate)
        granted += allowance.granted
        assert granted <= capacity(rate) + now.now * rate + 1e-6
        assert 0 <= allowance.left <= capacity(rate)
        if not allowance.granted:
            later = TokenBuckets(now)
            later._held = dict(buckets._held)
            now.now += allowance.retry_after
            assert (await later.take("shop", rate)).granted
            now.now -= allowance.retry_after


async def test_what_is_owed_is_paid_before_anything_is_granted() -> None:
    now = Seconds()
    buckets = TokenBuckets(now)
    assert (await buckets.take("shop", 2.0)).left == 9
    owed = await buckets.owe("shop", 2.0, 15)
    assert (owed.granted, owed.left) == (True, -6)
    refused = await buckets.take("shop", 2.0)
    assert (refused.granted, refused.left, refused.retry_after) == (False, -6, 4)
    assert (await buckets.take("other", 2.0)).granted
    now.now += 3.4
    assert await grants(buckets, 2.0, 5) == 0
    now.now += 0.1
    assert await grants(buckets, 2.0, 5) == 1
    assert [(await buckets.owe("shop", 2.0, 3)).left for _ in range(2)] == [-3, -6]


@given(rate=st.floats(0.01, 1000), asked=st.lists(st.tuples(st.floats(0, 20), st.integers(1, 64)), max_size=40))
async def test_batches_too_get_no_more_than_the_rate_and_the_last_of_them(
    rate: float, asked: list[tuple[float, int]]
) -> None:
    now = Seconds()
    buckets = TokenBuckets(now)
    done, last = 0, 0
    for gap, requests in asked:
        now.now += gap
        if (await buckets.take("shop", rate)).granted:
            await buckets.owe("shop", rate, requests - 1)
            done, last = done + requests, requests
        assert done - last <= capacity(rate) + now.now * rate + 1e-6


@pytest.mark.parametrize(
    ("allowance", "headers"),
    [
        (Allowance(True, 49.0, 10.0), {"RateLimit-Policy": '"key";q=50;w=5', "RateLimit": '"key";r=49;t=1'}),
        (Allowance(False, 0.25, 0.1), {"RateLimit-Policy": '"key";q=1;w=10', "RateLimit": '"key";r=0;t=8'}),
        (Allowance(True, -6.0, 2.0), {"RateLimit-Policy": '"key";q=10;w=5', "RateLimit": '"key";r=0;t=8'}),
    ],
)
def test_what_a_client_is_told(allowance: Allowance, headers: dict[str, str]) -> None:
    assert allowance.headers() == headers
