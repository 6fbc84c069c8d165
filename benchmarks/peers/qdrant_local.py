"""qdrant-client's local mode over the same picture vectors and payload, one query at a time; prints one JSON line.

Arguments: products, queries.
"""

from __future__ import annotations

import json
import sys
import time
import warnings

from benchmarks.peers import clustered
from benchmarks.products import product
from qdrant_client import QdrantClient
from qdrant_client.models import Distance, FieldCondition, Filter, PointStruct, Range, VectorParams


def main() -> None:
    """Load and search, without and with the filter that one in twenty products passes."""
    products, count = int(sys.argv[1]), int(sys.argv[2])
    warnings.simplefilter("ignore")  # it warns of so many points: that is what is shown here
    client = QdrantClient(":memory:")
    client.create_collection("products", VectorParams(size=clustered.DIMENSION, distance=Distance.COSINE))
    begin = time.perf_counter()
    first = 0
    for image, _ in clustered.chunks(products):
        rows = image.tolist()
        points = [PointStruct(id=first + n, vector=row, payload=product(first + n)) for n, row in enumerate(rows)]
        client.upsert("products", points)
        first += len(image)
    seconds = time.perf_counter() - begin
    cheap = Filter(must=[FieldCondition(key="price", range=Range(lte=24.75))])
    took: dict[str, list[float]] = {"all": [], "filtered": []}
    for query in clustered.queries(products, count).tolist():
        for name, where in (("all", None), ("filtered", cheap)):
            begin = time.perf_counter()
            client.query_points("products", query=query, query_filter=where, limit=200, with_payload=False)
            took[name].append((time.perf_counter() - begin) * 1000)
    print(json.dumps({"seconds": seconds, "took": took}))


if __name__ == "__main__":
    main()
