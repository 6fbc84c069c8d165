"""faiss: HNSW over the bare picture vectors, no payload and no filter, one query at a time; prints one JSON line.

Arguments: products, queries.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import faiss  # type: ignore[import-not-found]  # in its own environment only
import numpy as np
from benchmarks.peers import clustered

M, EF_CONSTRUCTION = 16, 100  # as the embedded index builds its graph


def main() -> None:
    """Build, search, and compare with the exact answer."""
    products, count = int(sys.argv[1]), int(sys.argv[2])
    queries = clustered.queries(products, count)
    graph = faiss.IndexHNSWFlat(clustered.DIMENSION, M, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = EF_CONSTRUCTION
    best: list[Any] = [np.zeros((count, 0), np.float32), np.zeros((count, 0), np.int64)]
    seconds, first = 0.0, 0
    for image, _ in clustered.chunks(products):
        begin = time.perf_counter()
        graph.add(image)
        seconds += time.perf_counter() - begin
        scores = np.hstack([best[0], queries @ image.T])
        names = np.broadcast_to(np.arange(first, first + len(image)), (count, len(image)))
        ids = np.hstack([best[1], names])
        order = np.argsort(-scores, axis=1)[:, :10]
        best = [np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)]
        first += len(image)
    answers: dict[int, dict[str, Any]] = {}
    for limit in (10, 200):
        graph.hnsw.efSearch = max(128, limit)
        took: list[float] = []
        found: list[float] = []
        for query in queries:
            begin = time.perf_counter()
            _, ids = graph.search(query[None], limit)
            took.append((time.perf_counter() - begin) * 1000)
            found.append(len(set(ids[0, :10].tolist()) & set(best[1][len(found)].tolist())) / min(10, products))
        answers[limit] = {"took": took, "recall": sum(found) / count}
    print(json.dumps({"seconds": seconds, "answers": answers}))


if __name__ == "__main__":
    main()
