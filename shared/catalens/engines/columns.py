"""What live products are counted and filtered by, in memory and by column, so that counting reads no payload.

numpy and the standard library only: `edge_worker.py`, which imports nothing of Catalens, loads this file by its path.

A product has a slot from each of its writes to the next; columns are only appended to, and what belongs to a slot that
was given up counts no more and is cleared away when it has become the larger part.
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

LEAST: Final = 1024
"""Slots given up of which nothing is cleared away yet."""
NAMES: Final = "names"
"""The column that knows which attributes, tags and numbers there are."""
Mask: TypeAlias = npt.NDArray[np.bool_]
"""Slots, true for those that are meant."""
Value: TypeAlias = str | int


class Values:
    """Which slots have which values: a pair for each value of each."""

    def __init__(self) -> None:
        self._slots = array("i")
        self._codes = array("i")
        self._values: list[Value] = []
        self._code_of: dict[Value, int] = {}

    def add(self, slot: int, stated: Sequence[Value]) -> None:
        """Note what `slot` has."""
        for value in stated:
            code = self._code_of.get(value)
            if code is None:
                code = self._code_of[value] = len(self._values)
                self._values.append(value)
            self._slots.append(slot)
            self._codes.append(code)

    def having(self, wanted: Iterable[Value], size: int) -> Mask:
        """Return which of `size` slots have one of these values."""
        some = np.zeros(size, dtype=np.bool_)
        codes = [code for value in wanted if (code := self._code_of.get(value)) is not None]
        if codes:
            chosen = np.zeros(len(self._values), dtype=np.bool_)
            chosen[codes] = True
            some[np.asarray(self._slots)[chosen[np.asarray(self._codes)]]] = True
        return some

    def most_frequent(self, mask: Mask, limit: int) -> list[tuple[Value, int]]:
        """Return the values that most slots of `mask` have, and how many have each; ties in the order of values."""
        counts = np.bincount(np.asarray(self._codes)[mask[np.asarray(self._slots)]], minlength=len(self._values))
        least = 1
        if limit < len(counts):
            least = max(1, int(np.partition(counts, len(counts) - limit)[len(counts) - limit]))
        more = np.flatnonzero(counts > least).tolist()
        found = sorted(((self._values[code], int(counts[code])) for code in more), key=lambda one: (-one[1], one[0]))
        ties = (self._values[code] for code in np.flatnonzero(counts == least).tolist())
        return found + [(value, least) for value in heapq.nsmallest(limit - len(found), ties)]

    def compact(self, alive: Mask, renumbered: npt.NDArray[np.int32]) -> None:
        """Forget what is not alive; what is left gets its new slots."""
        slots, codes = np.asarray(self._slots), np.asarray(self._codes)
        kept = alive[slots]
        used, new_codes = np.unique(codes[kept], return_inverse=True)
        self._values = [self._values[code] for code in used.tolist()]
        self._code_of = {value: code for code, value in enumerate(self._values)}
        self._slots = array("i", renumbered[slots[kept]].tobytes())
        self._codes = array("i", new_codes.astype(np.int32).tobytes())


class Numbers:
    """Which number each slot has, if any."""

    def __init__(self) -> None:
        self._numbers = array("d")

    def add(self, slot: int, stated: Sequence[float]) -> None:
        """Note what `slot` has."""
        if stated:
            self._reach(slot + 1)
            self._numbers[slot] = stated[0]

    def within(self, bounds: Sequence[float | None], size: int) -> Mask:
        """Return which of `size` slots have a number of at least, more than, at most and less than these."""
        numbers = self._first(size)
        gte, gt, lte, lt = bounds
        some = ~np.isnan(numbers)
        for bound, compare in ((gte, np.greater_equal), (gt, np.greater), (lte, np.less_equal), (lt, np.less)):
            if bound is not None:
                some &= compare(numbers, bound)
        return some

    def extremes(self, mask: Mask) -> list[float]:
        """Return the smallest and the largest number of the slots of `mask`; nothing if none has one."""
        numbers = self._first(len(mask))[mask]
        numbers = numbers[~np.isnan(numbers)]
        return [float(numbers.min()), float(numbers.max())] if len(numbers) else []

    def compact(self, alive: Mask) -> None:
        """Forget what is not alive; what is left has its new slots by its order."""
        self._numbers = array("d", self._first(len(alive))[alive].tobytes())

    def _first(self, size: int) -> npt.NDArray[np.float64]:
        self._reach(size)
        return np.asarray(self._numbers)[:size]

    def _reach(self, size: int) -> None:
        if size > len(self._numbers):
            self._numbers.extend([math.nan] * (size - len(self._numbers)))


class Names:
    """Which names of attributes, tags and numbers some product had, in 8 KiB however many they are.

    One that is there is always found. Of those that are not, one in 80,000 is found where there are a thousand, one in
    twenty where there are ten thousand: a Bloom filter of four bits, taken from the hash that a name is.
    """

    def __init__(self) -> None:
        self._bits = bytearray(1 << 13)

    def add(self, payload: Mapping[str, Any]) -> None:
        """Note what a product has."""
        for kind in ("facets", "numbers"):
            for name in payload.get(kind, ()):
                for at in _places(name):
                    self._bits[at >> 3] |= 1 << (at & 7)

    def __contains__(self, name: str) -> bool:
        """Return whether some product had `name`."""
        return all(self._bits[at >> 3] >> (at & 7) & 1 for at in _places(name))


def _places(name: str) -> tuple[int, int, int, int]:
    number = int(name[1:], 16)  # see `rules.short_key`
    return number & 0xFFFF, number >> 16 & 0xFFFF, number >> 32 & 0xFFFF, number >> 48


def stated_in(payload: Mapping[str, Any], key: str) -> Sequence[Any]:
    """Return what `payload` has at `key`, which is at most two names deep."""
    head, _, name = key.partition(".")
    value = payload.get(head)
    if name and value is not None:
        value = value.get(name)
    if value is None:
        return ()
    return value if isinstance(value, list) else (value,)


class Table:
    """The slots and columns of one tenant's live products."""

    def __init__(self) -> None:
        self._alive = bytearray()
        self._live = 0
        self._values: dict[str, Values] = {}
        self._numbers: dict[str, Numbers] = {}
        self._names: Names | None = None

    @property
    def wasteful(self) -> bool:
        """Whether `compact` is due."""
        return len(self._alive) - self._live > max(LEAST, self._live)

    def new(self) -> int:
        """Return a slot for a product that is live now."""
        self._alive.append(1)
        self._live += 1
        return len(self._alive) - 1

    def drop(self, slot: int) -> None:
        """Give a slot up."""
        self._alive[slot] = 0
        self._live -= 1

    def add(self, slot: int, payload: Mapping[str, Any], keys: Iterable[str]) -> None:
        """Note what a product has in the columns `keys`."""
        for key in keys:
            if key == NAMES:
                self._names = self._names or Names()
                self._names.add(payload)
                continue
            stated = stated_in(payload, key)
            if stated and is_number(key):
                self._numbers.setdefault(key, Numbers()).add(slot, stated)
            elif stated:
                self._values.setdefault(key, Values()).add(slot, stated)

    def forget(self, key: str) -> None:
        """Give the column `key` up."""
        self._values.pop(key, None)
        self._numbers.pop(key, None)
        if key == NAMES:
            self._names = None

    def named(self, key: str) -> bool:
        """Return whether some product had what the column `key` is about, as the column NAMES knows."""
        return self._names is not None and key.partition(".")[2] in self._names

    def compact(self) -> list[int]:
        """Clear away what was given up; return the new slot of each old one."""
        alive = self.everybody()
        renumbered = (np.cumsum(alive) - 1).astype(np.int32)
        for values in self._values.values():
            values.compact(alive, renumbered)
        for numbers in self._numbers.values():
            numbers.compact(alive)
        self._alive = bytearray(b"\1" * self._live)
        slots: list[int] = renumbered.tolist()
        return slots

    def everybody(self) -> Mask:
        """Return a mask of all that is live."""
        return np.frombuffer(self._alive, dtype=np.bool_).copy()  # a view of it would keep it from growing

    def these(self, slots: Sequence[int]) -> Mask:
        """Return a mask of these slots."""
        some = np.zeros(len(self._alive), dtype=np.bool_)
        some[list(slots)] = True
        return some

    def having(self, key: str, wanted: Iterable[Value]) -> Mask:
        """Return which slots have one of the values in the column `key`; one that is not there has nothing."""
        return self._values.get(key, _NO_VALUES).having(wanted, len(self._alive))

    def within(self, key: str, bounds: Sequence[float | None]) -> Mask:
        """Return which slots have a number within bounds in the column `key`."""
        return self._numbers.get(key, Numbers()).within(bounds, len(self._alive))

    def most_frequent(self, key: str, mask: Mask, limit: int) -> list[tuple[Value, int]]:
        """See `Values.most_frequent`."""
        return self._values.get(key, _NO_VALUES).most_frequent(mask, limit)

    def extremes(self, key: str, mask: Mask) -> list[float]:
        """See `Numbers.extremes`."""
        return self._numbers.get(key, Numbers()).extremes(mask)


_NO_VALUES: Final = Values()


def is_number(key: str) -> bool:
    """Return whether the column `key` holds numbers."""
    return key.startswith("numbers.") or key in ("offer.price", "offer.stock")


class Kept:
    """Which columns of which tenant are kept, and when each was last asked for: the longest ago goes first."""

    def __init__(self, limits: Sequence[tuple[Callable[[str], bool], int]], most: int) -> None:
        """Keep of each tenant no more than so many columns of a kind, and of all tenants together no more than `most`.

        A single request may need more than that: what it needs is kept until another one needs something.
        """
        self._limits = limits
        self._most = most
        self._of: dict[str, dict[str, float]] = {}

    def of(self, tenant: str) -> Mapping[str, float]:
        """Return the columns of `tenant`, and when each was last asked for: READING if it is not whole yet."""
        return self._of.get(tenant, _NOTHING)

    def all(self) -> list[tuple[str, str]]:
        """Return the tenants and their columns that are whole, in the order in which they were last asked for."""
        every = [(asked, tenant, key) for tenant, mine in self._of.items() for key, asked in mine.items()]
        return [(tenant, key) for asked, tenant, key in sorted(every) if asked < READING]

    def add(self, tenant: str, keys: Iterable[str], asked: float) -> None:
        """Keep these too, be it beyond the limits until `settle`."""
        self._of.setdefault(tenant, {}).update(dict.fromkeys(keys, asked))

    def ask(self, tenant: str, keys: Iterable[str], now: float) -> bool:
        """Note that these are asked for; return whether all are there and whole."""
        mine = self._of.get(tenant, {})
        whole = True
        for key in keys:
            if mine.get(key, READING) < READING:
                mine[key] = now
            else:
                whole = False
        return whole

    def drop(self, tenant: str, key: str) -> None:
        """Keep a column no more."""
        del self._of[tenant][key]
        if not self._of[tenant]:
            del self._of[tenant]

    def settle(self, tenant: str, needed: Iterable[str], now: float) -> list[tuple[str, str]]:
        """Note that what is `needed` by `tenant` is whole now, and keep the limits; return what is kept no more."""
        mine = self._of.get(tenant, {})
        mine.update({key: now for key in needed if key in mine})
        gone: list[tuple[str, str]] = []
        for counts, most in self._limits:
            ages = sorted((asked, tenant, key) for key, asked in mine.items() if counts(key))
            gone += self._give_up(ages, len(ages) - most, now)
        over = sum(map(len, self._of.values())) - self._most
        if over > 0:
            every = ((asked, owner, key) for owner, theirs in self._of.items() for key, asked in theirs.items())
            gone += self._give_up(heapq.nsmallest(over, every), over, now)
        return gone

    def _give_up(self, ages: Sequence[tuple[float, str, str]], count: int, now: float) -> list[tuple[str, str]]:
        gone = [(tenant, key) for asked, tenant, key in ages[: max(0, count)] if asked < now]
        for tenant, key in gone:
            self.drop(tenant, key)
        return gone


READING: Final = math.inf
"""When a column that is being read was last asked for."""
_NOTHING: Final[Mapping[str, float]] = {}
