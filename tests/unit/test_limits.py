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


@pytest.mark.parametrize(
    ("allowance", "headers"),
    [
        (Allowance(True, 49.0, 10.0), {"RateLimit-Policy": '"key";q=50;w=5', "RateLimit": '"key";r=49;t=1'}),
        (Allowance(False, 0.25, 0.1), {"RateLimit-Policy": '"key";q=1;w=10', "RateLimit": '"key";r=0;t=8'}),
    ],
)
def test_what_a_client_is_told(allowance: Allowance, headers: dict[str, str]) -> None:
    assert allowance.headers() == headers
