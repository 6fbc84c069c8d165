"""Redis as what processes share: the embedding cache, the rates of API keys, the memory of Idempotency-Keys."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

import structlog
from pydantic import ValidationError
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError, RedisError, ResponseError  # noqa: A004  # redis has one of its own
from redis.maint_notifications import MaintNotificationsConfig

from catalens.domain import SeenPicture, sha256_hex
from catalens.errors import Misconfigured, Transient
from catalens.limits import WHOLE, Allowance, TokenBuckets, capacity
from catalens.settings import RedisSettings

if TYPE_CHECKING:
    from catalens.domain import Embedding

T = TypeVar("T")
log = structlog.get_logger(__name__)

# The prefix is part of every stored key: what another release of Catalens writes differently gets another one.
_PREFIX: Final = "catalens:v1:"
_WHATEVER: Final = -1e300
"""What every bucket holds at least."""
_CONNECTIONS: Final = 16  # calls at once; further ones wait for a free connection, within their time
# One byte before the numbers says how they are written, so that the setting may change over a full cache.
_TAGS: Final = {"float16": b"h", "float32": b"f"}
_SIZES: Final = {b"h": 2, b"f": 4}
# In one step: return what the key holds if it is young enough, else store. A held value begins with its Unix time.
_REMEMBER: Final = """
local held = redis.call('GET', KEYS[1])
if held then
  local stored = tonumber(string.match(held, '^([%d.]+):'))
  if stored and tonumber(ARGV[1]) - stored <= tonumber(ARGV[2]) then return held end
end
local value = ARGV[1] .. ':' .. ARGV[3]
redis.call('SET', KEYS[1], value, 'PX', ARGV[4])
return value
"""


# In one step: fill the bucket up to now, by the clock of Redis, and take some tokens if it has as many as it must have.
_TAKE: Final = """
local rate, most = tonumber(ARGV[1]), tonumber(ARGV[2])
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
local held = redis.call('HMGET', KEYS[1], 'left', 'since')
local left, since = tonumber(held[1] or most), tonumber(held[2] or now)
left = math.min(most, left + math.max(0, now - since) * rate)
local granted = 0
if left >= tonumber(ARGV[3]) then left, granted = left - tonumber(ARGV[4]), 1 end
if left > -0.000001 then left = math.max(0, left) end
redis.call('HSET', KEYS[1], 'left', string.format('%.17g', left), 'since', string.format('%.6f', now))
redis.call('PEXPIRE', KEYS[1], math.ceil((most - math.min(0, left)) / rate * 1000) + 1000)
return {granted, string.format('%.6f', left)}
"""


class CircuitBreaker:
    """Decides whether a call is worth its time: after `threshold` failures in a row nobody calls for a while.

    The pause begins at `first` seconds and doubles up to `longest` with each probe that fails. A pure decision:
    `now` is whatever seconds the caller counts.
    """

    def __init__(self, *, threshold: int = 3, first: float = 1.0, longest: float = 30.0) -> None:
        self._threshold = threshold
        self._first = first
        self._longest = longest
        self._failures = 0
        self._pause = 0.0
        self._until = 0.0
        self._probing = False

    @property
    def is_open(self) -> bool:
        """True while calls are not worth their time."""
        return self._pause > 0

    def allows(self, now: float) -> bool:
        """Return whether to call; after the pause one caller may, and must tell `succeeded`, `failed` or `left`."""
        if not self.is_open:
            return True
        if self._probing or now < self._until:
            return False
        self._probing = True
        return True

    def succeeded(self) -> bool:
        """Note an answer; returns True if that closed it."""
        was_open = self.is_open
        self._failures, self._pause, self._probing = 0, 0.0, False
        return was_open

    def failed(self, now: float) -> bool:
        """Note a failure; returns True if that opened it."""
        if self.is_open:
            if self._probing:  # any other call began before it opened
                self._open(now, min(self._longest, self._pause * 2))
            return False
        self._failures += 1
        if self._failures < self._threshold:
            return False
        self._open(now, self._first)
        return True

    def left(self) -> None:
        """Note that a call ended without telling anything: the next one may be the probe."""
        self._probing = False

    def _open(self, now: float, pause: float) -> None:
        self._failures, self._pause, self._until, self._probing = 0, pause, now + pause, False


class _Optional:
    """Calls to a Redis that nobody depends on: each has a time limit, and while it is away it is not asked at all."""

    def __init__(self, settings: RedisSettings, now: Callable[[], float], what: str) -> None:
        self._timeout = settings.timeout
        self._now = now
        self._away, self._back, self._refused = (f"{what}.{event}" for event in ("away", "back", "refused"))
        self._breaker = CircuitBreaker()
        self._refusal = ""
        self.errors = 0

    @property
    def available(self) -> bool:
        """False while Redis is not asked."""
        return not self._breaker.is_open

    def taken(self) -> None:
        """Note that a write was not refused."""
        self._refusal = ""

    async def call(self, call: Callable[[], Awaitable[T]]) -> T | None:
        """Return what `call` returns; None if it fails, takes too long or is not worth trying now."""
        if not self._breaker.allows(self._now()):
            return None
        try:
            async with asyncio.timeout(self._timeout):
                result = await call()
        except ResponseError as error:  # it answers, and refuses: full under noeviction, a read-only replica
            self.errors += 1
            self._answered()
            if str(error) != self._refusal:
                self._refusal = str(error)
                log.warning(self._refused, error=self._refusal)
            return None
        except Exception as error:  # noqa: BLE001  # the boundary: whatever goes wrong with it, it stops nobody
            self.errors += 1
            if self._breaker.failed(self._now()):
                log.warning(self._away, error=f"{type(error).__name__}: {error}")
            return None
        except BaseException:  # cancelled
            self._breaker.left()
            raise
        self._answered()
        return result

    def _answered(self) -> None:
        if self._breaker.succeeded():
            log.info(self._back)


class RedisCache:
    """An EmbeddingCache in Redis, shared by every process that has the same one.

    Each call is one round trip. It never raises and never stops anybody: a call that fails or takes longer than the
    time limit counts as a miss.
    """

    def __init__(self, client: Redis, settings: RedisSettings, now: Callable[[], float]) -> None:
        """Take over what `open` opened."""
        self._client = client
        self._tag = _TAGS[settings.precision]
        self._ttl_ms = int(settings.ttl_days * 86_400_000)
        self._redis = _Optional(settings, now, "cache")
        self._hits = 0
        self._misses = 0

    @classmethod
    async def open(cls, settings: RedisSettings, *, now: Callable[[], float] = time.monotonic) -> RedisCache:
        """Prepare to talk to the server of `settings.url`, which may come later; raises Misconfigured (no URL)."""
        return cls(_client(settings), settings, now)

    async def get(self, keys: Sequence[str]) -> Sequence[Embedding | None]:
        """Return what is known, in order; a value that is damaged or cannot be had in time counts as unknown."""
        values: Sequence[bytes | str | None] | None = None
        if keys:
            values = await self._redis.call(lambda: self._client.mget([_PREFIX + key for key in keys]))
        found = [_decoded(value) if isinstance(value, bytes) else None for value in values or [None] * len(keys)]
        hits = sum(vector is not None for vector in found)
        self._hits += hits
        self._misses += len(found) - hits
        return found

    async def put(self, items: Mapping[str, Embedding]) -> None:
        """Remember in the precision of the settings, for their time to live."""
        if not items:
            return

        async def store() -> bool:
            async with self._client.pipeline(transaction=False) as pipeline:
                for key, vector in items.items():
                    pipeline.set(_PREFIX + key, _encoded(vector, self._tag), px=self._ttl_ms)
                for reply in await pipeline.execute(raise_on_error=False):  # which would quote the vector
                    if isinstance(reply, ResponseError):
                        raise reply
            return True

        if await self._redis.call(store):
            self._redis.taken()

    async def recall(self, url: str) -> SeenPicture | None:
        """Return what was last remembered of the picture at `url`."""
        value = await self._redis.call(lambda: self._client.get(_seen_key(url)))
        try:
            return None if value is None else SeenPicture.model_validate_json(value)
        except ValidationError:  # damaged
            return None

    async def remember(self, url: str, seen: SeenPicture) -> None:
        """Remember what the picture at `url` was, as long as a vector."""
        value = seen.model_dump_json()
        await self._redis.call(lambda: self._client.set(_seen_key(url), value, px=self._ttl_ms))

    def stats(self) -> Mapping[str, int]:
        """Return hits, misses, errors (calls that failed) and available (0 while Redis is not asked)."""
        return {
            "hits": self._hits,
            "misses": self._misses,
            "errors": self._redis.errors,
            "available": int(self._redis.available),
        }

    async def close(self) -> None:
        """Release the connections."""
        await self._client.aclose()


class RedisLimiter:
    """A RateLimiter in Redis: processes that have the same one count together; while it is away each counts alone."""

    def __init__(self, client: Redis, settings: RedisSettings, now: Callable[[], float]) -> None:
        """Take over what `open` opened."""
        self._client = client
        self._redis = _Optional(settings, now, "limits")
        self._alone = TokenBuckets(now)

    @classmethod
    async def open(cls, settings: RedisSettings, *, now: Callable[[], float] = time.monotonic) -> RedisLimiter:
        """Prepare to talk to the server of `settings.url`, which may come later; raises Misconfigured (no URL)."""
        return cls(_client(settings), settings, now)

    async def take(self, client: str, rate: float) -> Allowance:
        """See RateLimiter; one round trip."""
        return await self._take(client, rate, WHOLE, 1) or await self._alone.take(client, rate)

    async def owe(self, client: str, rate: float, requests: int) -> Allowance:
        """See RateLimiter; one round trip."""
        return await self._take(client, rate, _WHATEVER, requests) or await self._alone.owe(client, rate, requests)

    async def _take(self, client: str, rate: float, least: float, requests: int) -> Allowance | None:
        """Take so many tokens if the bucket holds `least`; None while Redis is away."""
        key = f"{_PREFIX}rate:{sha256_hex(client.encode())}"

        async def ask() -> Any:  # as the script answers: granted, left
            return await self._client.eval(_TAKE, 1, key, repr(rate), repr(capacity(rate)), repr(least), str(requests))

        answer = await self._redis.call(ask)
        if answer is None:
            return None
        self._redis.taken()
        return Allowance(bool(answer[0]), float(answer[1]), rate)

    async def close(self) -> None:
        """Release the connections."""
        await self._client.aclose()


class RedisMemory:
    """A RequestMemory in Redis: as durable as that Redis is set up to be (docs/how-to/redis.md)."""

    def __init__(self, client: Redis, settings: RedisSettings, now: Callable[[], float]) -> None:
        """Take over what `open` opened."""
        self._client = client
        self._timeout = settings.timeout
        self._now = now

    @classmethod
    async def open(cls, settings: RedisSettings, *, now: Callable[[], float] = time.time) -> RedisMemory:
        """Prepare to talk to the server of `settings.url`, which may come later; raises Misconfigured (no URL)."""
        return cls(_client(settings), settings, now)

    async def remember(self, key: str, value: bytes, *, ttl: float) -> bytes:
        """Store `value` unless the key holds one that is at most `ttl` seconds old; return what it then holds.

        Raises Transient while Redis is away; the value may be stored all the same.
        """
        arguments = (f"{self._now():.6f}", repr(float(ttl)), value, max(1, int(ttl * 1000)))
        try:
            async with asyncio.timeout(self._timeout):
                held = await self._client.eval(_REMEMBER, 1, _PREFIX + "request:" + key, *arguments)
        except (RedisError, OSError) as error:  # TimeoutError is an OSError
            raise Transient(f"the memory of Idempotency-Keys is away: {type(error).__name__}: {error}") from error
        return bytes(held).partition(b":")[2]

    async def close(self) -> None:
        """Release the connections."""
        await self._client.aclose()


def _client(settings: RedisSettings) -> Redis:
    """Return a client for at most `_CONNECTIONS` calls at a time."""
    if settings.url is None:
        raise Misconfigured("set CATALENS_REDIS__URL to redis://host:port/db")
    try:
        pool = BlockingConnectionPool.from_url(
            settings.url.get_secret_value(),
            max_connections=_CONNECTIONS,
            # Whoever calls has one time limit over all of it: waiting for a connection, connecting, asking.
            timeout=None,
            socket_timeout=None,
            socket_connect_timeout=None,
            # Once more where a connection broke: the server may have been restarted since it was last used.
            retry=Retry(NoBackoff(), 1, (ConnectionError,)),
            maint_notifications_config=MaintNotificationsConfig(enabled=False),  # one answer less to wait for
            driver_info=None,  # and two more
        )
    except (ValueError, TypeError):  # without its text, which may quote the password
        raise Misconfigured(
            "CATALENS_REDIS__URL is no URL of a Redis: redis://[user:password@]host:port/db or rediss://…"
        ) from None
    return Redis.from_pool(pool)


def _seen_key(url: str) -> str:
    return f"{_PREFIX}seen:{sha256_hex(url.encode())}"


# numpy is imported where vectors are: the ingest service has the memory of Idempotency-Keys, and no numpy.


def _encoded(vector: Embedding, tag: bytes) -> bytes:
    import numpy as np  # noqa: PLC0415  # see above

    return tag + np.asarray(vector, dtype=f"<f{_SIZES[tag]}").tobytes()


def _decoded(value: bytes) -> Embedding | None:
    """Return the read-only unit vector that `value` holds, None if it is damaged."""
    import numpy as np  # noqa: PLC0415  # see above

    size = _SIZES.get(value[:1])
    if size is None or len(value) == 1 or (len(value) - 1) % size:
        return None
    vector: Embedding = np.frombuffer(value, f"<f{size}", offset=1).astype(np.float32)
    length = float(np.linalg.norm(vector))
    if not 0.9 < length < 1.1:  # also where a number is not finite
        return None
    if size == 2:
        vector /= np.float32(length)  # rounding to half precision has moved it off the unit sphere
    vector.setflags(write=False)
    return vector
