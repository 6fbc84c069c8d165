"""MemoryCache: the embedding cache of a single process."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from catalens.domain import SeenPicture

if TYPE_CHECKING:
    from catalens.domain import Embedding


class MemoryCache:
    """An EmbeddingCache that keeps the `max_entries` vectors and pictures' addresses used last; for one event loop.

    What `get` returns is read-only and nobody else can change it.
    """

    def __init__(self, max_entries: int) -> None:
        """Keep at most `max_entries` of each; 0 keeps none."""
        self._max_entries = max_entries
        self._entries: OrderedDict[str, Embedding] = OrderedDict()
        self._seen: OrderedDict[str, SeenPicture] = OrderedDict()
        self._hits = 0
        self._misses = 0

    async def get(self, keys: Sequence[str]) -> Sequence[Embedding | None]:
        """Return what is known, in order; a look-up counts as use."""
        found: list[Embedding | None] = []
        for key in keys:
            vector = self._entries.get(key)
            if vector is None:
                self._misses += 1
            else:
                self._hits += 1
                self._entries.move_to_end(key)
            found.append(vector)
        return found

    async def put(self, items: Mapping[str, Embedding]) -> None:
        """Remember copies, float32; forgets what was not used for longest."""
        for key, vector in items.items():
            copy = np.array(vector, dtype=np.float32)
            copy.setflags(write=False)
            self._entries[key] = copy
            self._entries.move_to_end(key)
        while len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)

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
        self._seen.clear()
