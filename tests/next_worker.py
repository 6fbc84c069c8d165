"""An embedder as a later release may be: one that knows an event type more than today's."""

from __future__ import annotations

from typing import Final

from catalens import events
from catalens.domain import Product
from catalens_embedder import main

UPSERTED_V2: Final = "catalens.product.upserted.v2"

if __name__ == "__main__":
    events._MODELS = {**events._MODELS, UPSERTED_V2: Product}  # type: ignore[misc]  # what a later release adds to events.py
    events._TOPIC_OF = {**events._TOPIC_OF, UPSERTED_V2: events.PRODUCTS}  # type: ignore[misc]  # as above
    main.main()
