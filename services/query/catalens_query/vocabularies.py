"""Reads each tenant's words out of the index, in the background: a search never waits for them."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final

import structlog

from catalens.domain import DEFAULT_LANGUAGES, Filter, Language
from catalens.errors import CatalensError
from catalens.ports import Clock, VectorIndex
from catalens.retry import SystemClock
from catalens_query.vocabulary import Tally, Vocabulary

log = structlog.get_logger(__name__)

MOST_WORDS: Final = 1_000_000
"""Words of all tenants together; beyond, those asked for longest ago are forgotten and read again when asked for."""
_PAGE: Final = 100
"""Products read at once: a few milliseconds of the loop."""
_REST: Final = 3.0
"""Pauses are so many times as long as the reading: it takes a quarter of one core at most."""
_LOOK_SECONDS: Final = 2.0
"""How often it is looked whether a tenant's words are to be read."""
_FRESH_SECONDS: Final = 10.0
"""How long words are good enough whatever is written."""
_STALE_SECONDS: Final = 900.0
"""After this long they are read again; later if the reading takes long."""
_REST_BETWEEN: Final = 20.0
"""Readings of one tenant are so many times their length apart."""
_GROWN: Final = 0.1
"""Sooner, if the number of products has changed by this share."""
_AGAIN_SECONDS: Final = 30.0
"""After a reading that failed."""


@dataclass(slots=True)
class _Held:
    vocabulary: Vocabulary | None = None
    products: int = 0
    read_at: float = 0.0
    took: float = 0.0
    not_before: float = 0.0
    asked: bool = True


class Vocabularies:
    """The vocabulary of each tenant that has been asked for, as old as the last reading."""

    def __init__(
        self,
        languages: tuple[Language, ...] = DEFAULT_LANGUAGES,
        *,
        clock: Clock | None = None,
        most_words: int = MOST_WORDS,
    ) -> None:
        self._languages = languages
        self._clock = clock or SystemClock()
        self._most = most_words
        self._held: OrderedDict[str, _Held] = OrderedDict()

    def of(self, tenant: str) -> Vocabulary | None:
        """Return the tenant's vocabulary, or None while it has not been read; `run` reads it soon."""
        held = self._held.setdefault(tenant, _Held())
        self._held.move_to_end(tenant)
        held.asked = True
        return held.vocabulary

    async def run(self, use: Callable[[], AbstractContextManager[VectorIndex]], stop: asyncio.Event) -> None:
        """Do `catch_up` every few seconds, until `stop`."""
        while not stop.is_set():
            await self.catch_up(use, stop)
            try:
                async with asyncio.timeout(_LOOK_SECONDS):
                    await stop.wait()
            except TimeoutError:
                continue

    async def catch_up(self, use: Callable[[], AbstractContextManager[VectorIndex]], stop: asyncio.Event) -> None:
        """Read what was asked for: what never was read, is old, or whose catalogue has grown or shrunk by a tenth.

        `use` yields the index that is current, open until the end of the block. An index that is away is asked again
        later. Ends soon after `stop`.
        """
        for tenant, held in list(self._held.items()):
            if stop.is_set() or not held.asked or self._clock.now() < held.not_before:
                continue
            try:
                with use() as index:
                    if await self._due(tenant, held, index):
                        await self.read(tenant, index, stop)
            except CatalensError as error:
                log.warning("vocabulary.unread", tenant=tenant, error=str(error))
                held.not_before = self._clock.now() + _AGAIN_SECONDS

    async def read(self, tenant: str, index: VectorIndex, stop: asyncio.Event | None = None) -> None:
        """Read the tenant's words from the index and put them in the place of the former ones; at ease.

        Nothing changes if it fails, or if `stop` is set meanwhile. Raises what VectorIndex.page raises.
        """
        started = self._clock.now()
        tally = Tally(self._languages)
        after: str | None = None
        while stop is None or not stop.is_set():
            began = self._clock.now()
            page = await index.page(tenant, after=after, limit=_PAGE, where=Filter())
            await asyncio.to_thread(tally.add, [stored.product for stored in page])
            if len(page) < _PAGE:
                break
            after = page[-1].product.product_id
            await self._clock.sleep(_REST * (self._clock.now() - began))
        else:
            return
        vocabulary = await asyncio.to_thread(tally.vocabulary)
        now = self._clock.now()
        took = now - started
        not_before = now + max(_FRESH_SECONDS, took)
        self._held[tenant] = _Held(vocabulary, tally.products, now, took, not_before, asked=False)
        self._forget(tenant)
        log.info(
            "vocabulary.read", tenant=tenant, products=tally.products, words=len(vocabulary), seconds=round(took, 1)
        )

    async def _due(self, tenant: str, held: _Held, index: VectorIndex) -> bool:
        if held.vocabulary is None:
            return True
        if self._clock.now() - held.read_at >= max(_STALE_SECONDS, _REST_BETWEEN * held.took):
            return True
        held.asked, held.not_before = False, self._clock.now() + _FRESH_SECONDS
        products = (await index.counts(tenant)).products
        return abs(products - held.products) > _GROWN * held.products

    def _forget(self, newest: str) -> None:
        """Forget the tenants asked for longest ago while all together have too many words."""
        sizes = {tenant: len(held.vocabulary or ()) for tenant, held in self._held.items()}
        for tenant in [tenant for tenant in self._held if tenant != newest]:
            if sum(sizes.values()) <= self._most:
                return
            del self._held[tenant], sizes[tenant]
