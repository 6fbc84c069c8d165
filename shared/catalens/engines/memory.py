"""MemoryCache: the embedding cache of a single process."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from catalens.domain import SeenPicture

if TYPE_CHECKING:
    from catalens.domain import Embedding


_TOGETHER: Final = 256
"""Vectors in one piece of memory."""


class _Vectors:
    """Vectors of one length, each in a place that is used again: allocated one by one, what takes turns for days would
    leave ever more holes among what stays."""

    def __init__(self, length: int) -> None:
        self.length = length
        self._pieces: list[Embedding] = []
        self._free: list[int] = []

    def keep(self, vector: Embedding) -> int:
        """Copy a vector to a free place and return its number."""
        if not self._free:
            self._free.extend(range(len(self._pieces) * _TOGETHER, (len(self._pieces) + 1) * _TOGETHER))
            self._pieces.append(np.empty((_TOGETHER, self.length), dtype=np.float32))
        place = self._free.pop()
        self._pieces[place // _TOGETHER][place % _TOGETHER] = vector
        return place

    def read(self, place: int) -> Embedding:
        """Return a copy that cannot be written."""
        vector: Embedding = self._pieces[place // _TOGETHER][place % _TOGETHER].copy()
        vector.setflags(write=False)
        return vector

    def free(self, place: int) -> bool:
        """Let another vector have the place; tell whether no place is taken any more."""
        self._free.append(place)
        return len(self._free) == len(self._pieces) * _TOGETHER


class MemoryCache:
    """An EmbeddingCache that keeps the `max_entries` vectors and pictures' addresses used last; for one event loop.

    What `get` returns is read-only and nobody else can change it.
    """

    def __init__(self, max_entries: int) -> None:
        """Keep at most `max_entries` of each; 0 keeps none."""
        self._max_entries = max_entries
        self._entries: OrderedDict[str, tuple[_Vectors, int]] = OrderedDict()
        self._vectors: dict[int, _Vectors] = {}
        self._seen: OrderedDict[str, SeenPicture] = OrderedDict()
        self._hits = 0
        self._misses = 0

    async def get(self, keys: Sequence[str]) -> Sequence[Embedding | None]:
        """Return what is known, in order; a look-up counts as use."""
        found: list[Embedding | None] = []
        for key in keys:
            entry = self._entries.get(key)
            if entry is None:
                self._misses += 1
                found.append(None)
            else:
                self._hits += 1
                self._entries.move_to_end(key)
                vectors, place = entry
                found.append(vectors.read(place))
        return found

    async def put(self, items: Mapping[str, Embedding]) -> None:
        """Remember copies, float32; forgets what was not used for longest."""
        for key, vector in items.items():
            self._forget(key)
            if len(self._entries) >= self._max_entries > 0:
                self._forget(next(iter(self._entries)))
            if self._max_entries:
                vectors = self._vectors.setdefault(len(vector), _Vectors(len(vector)))
                self._entries[key] = vectors, vectors.keep(vector)

    def _forget(self, key: str) -> None:
        if entry := self._entries.pop(key, None):
            vectors, place = entry
            if vectors.free(place):  # of a model that is not used any more
                del self._vectors[vectors.length]

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
        return {"hits": self._hits, "misses": self._misses, "entries": len(self._entries)}

    async def close(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._vectors.clear()
        self._seen.clear()
