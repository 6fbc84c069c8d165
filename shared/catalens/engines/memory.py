"""MemoryCache: the embedding cache of a single process."""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from catalens.domain import SeenPicture

if TYPE_CHECKING:
    from catalens.domain import Embedding


_TOGETHER: Final = 256
"""Vectors in one piece of memory."""


class _Vectors:
    """Vectors, each in a place that is used again: allocated one by one, what takes turns for days would leave ever
    more holes among what stays. A place is a mere number, which costs no garbage collection anything."""

    def __init__(self) -> None:
        self._pieces: dict[int, Embedding] = {}
        self._free: dict[int, list[int]] = {}
        self._used: Counter[int] = Counter()
        """Both by the vectors' length."""
        self._numbers = itertools.count()

    def keep(self, vector: Embedding) -> int:
        """Copy a vector and return its place."""
        free = self._free.setdefault(len(vector), [])
        if not free:
            number = next(self._numbers)
            self._pieces[number] = np.empty((_TOGETHER, len(vector)), dtype=np.float32)
            free.extend(range(number * _TOGETHER, (number + 1) * _TOGETHER))
        place = free.pop()
        self._used[len(vector)] += 1
        self._pieces[place // _TOGETHER][place % _TOGETHER] = vector
        return place

    def read(self, place: int) -> Embedding:
        """Return a copy that cannot be written."""
        vector: Embedding = self._pieces[place // _TOGETHER][place % _TOGETHER].copy()
        vector.setflags(write=False)
        return vector

    def free(self, place: int) -> None:
        """Let another vector have the place; a model that no vector is of any more takes no memory."""
        length = self._pieces[place // _TOGETHER].shape[1]
        self._free[length].append(place)
        self._used[length] -= 1
        if not self._used[length]:
            del self._free[length], self._used[length]
            self._pieces = {number: piece for number, piece in self._pieces.items() if piece.shape[1] != length}


class MemoryCache:
    """An EmbeddingCache that keeps the `max_entries` vectors and pictures' addresses used last; for one event loop.

    What `get` returns is read-only and nobody else can change it.
    """

    def __init__(self, max_entries: int) -> None:
        """Keep at most `max_entries` of each; 0 keeps none."""
        self._max_entries = max_entries
        self._places: OrderedDict[str, int] = OrderedDict()
        self._vectors = _Vectors()
        self._seen: OrderedDict[str, SeenPicture] = OrderedDict()
        self._hits = 0
        self._misses = 0

    async def get(self, keys: Sequence[str]) -> Sequence[Embedding | None]:
        """Return what is known, in order; a look-up counts as use."""
        found: list[Embedding | None] = []
        for key in keys:
            place = self._places.get(key)
            if place is None:
                self._misses += 1
                found.append(None)
            else:
                self._hits += 1
                self._places.move_to_end(key)
                found.append(self._vectors.read(place))
        return found

    async def put(self, items: Mapping[str, Embedding]) -> None:
        """Remember copies, float32; forgets what was not used for longest."""
        for key, vector in items.items():
            self._forget(key)
            if len(self._places) >= self._max_entries > 0:
                self._forget(next(iter(self._places)))
            if self._max_entries:
                self._places[key] = self._vectors.keep(vector)

    def _forget(self, key: str) -> None:
        place = self._places.pop(key, None)
        if place is not None:
            self._vectors.free(place)

    async def recall(self, url: str) -> SeenPicture | None:
        """Return what was last remembered of the picture at `url`; a look-up counts as use."""
        if url in self._seen:
            self._seen.move_to_end(url)
        return self._seen.get(url)

    async def remember(self, url: str, seen: SeenPicture) -> None:
        """Remember what the picture at `url` was; forgets what was not used for longest."""
        self._seen[url] = seen
        self._seen.move_to_end(url)
        while len(self._seen) > self._max_entries:
            self._seen.popitem(last=False)

    def stats(self) -> Mapping[str, int]:
        """Return hits, misses, entries."""
        return {"hits": self._hits, "misses": self._misses, "entries": len(self._places)}

    async def close(self) -> None:
        """Forget everything."""
        self._places.clear()
        self._vectors = _Vectors()
        self._seen.clear()
