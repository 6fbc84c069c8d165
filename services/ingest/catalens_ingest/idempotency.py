"""Makes a retry under one Idempotency-Key the same event again, which the index then knows already."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from catalens.domain import Deletion, OfferChange, Product, Value, sha256_hex
from catalens.errors import Conflict
from catalens.events import EventData, ProductEvent
from catalens.ports import RequestMemory

DAY: Final = 24 * 3600.0


class _Held(Value):
    """What is remembered of the first request."""

    digest: str
    event_id: str
    version: int | None
    offer_version: int | None


class Repeats:
    """Recognises repeated requests for 24 hours."""

    def __init__(self, memory: RequestMemory) -> None:
        self._memory = memory

    async def settle(self, key: str, stated: EventData, event: ProductEvent) -> ProductEvent:
        """Return `event` with the id and versions of the first request under `key`, be it this one.

        `stated` is what the client said, before versions were assigned. Raises Conflict if the first request
        said something else.
        """
        version, offer_version = versions_of(event.data)
        mine = _Held(
            digest=sha256_hex(f"{event.type}\n{stated.model_dump_json(exclude_unset=True)}".encode()),
            event_id=event.id,
            version=version,
            offer_version=offer_version,
        )
        value = await self._memory.remember(f"{event.tenant}|{key}", mine.model_dump_json().encode(), ttl=DAY)
        held = _Held.model_validate_json(value)
        if held.digest != mine.digest:
            raise Conflict("this Idempotency-Key was used with another request")
        versions = {"version": held.version, "offer_version": held.offer_version}
        known = {name: number for name, number in versions.items() if number is not None}
        return replace(event, id=held.event_id, data=event.data.model_copy(update=known))


def versions_of(data: EventData) -> tuple[int | None, int | None]:
    """Return the content version and the offer version that `data` states."""
    version = data.version if isinstance(data, Product | Deletion) else None
    return version, data.offer_version if isinstance(data, Product | OfferChange) else None
