"""How a stored product reads in an answer and in an export."""

from __future__ import annotations

import base64
from collections.abc import Collection, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Final

from pydantic_core import to_json

from catalens.domain import FacetCount, ImageRef, Product, StoredProduct
from catalens.errors import NotFound
from catalens.ports import BlobStore
from catalens_query import fusion, searching
from catalens_query.models import (
    Facet,
    FacetRange,
    FacetValue,
    Hit,
    NumberFacet,
    Part,
    ProductAnswer,
    ProductFields,
    TagAnswer,
)
from catalens_query.searching import Numbers

_COPIED: Final = frozenset(ProductFields.model_fields) - {"in_stock", "image", "image_status", "image_error", "tags"}
_WEB: Final = ("http://", "https://")


def hit(found: searching.Hit, include: Collection[str] | None) -> Hit:
    """Return a result: the fields in `include`, all if None; product_id, score and what was asked for always."""
    fields = _fields(found.stored)
    if include is not None:
        fields = {name: value for name, value in fields.items() if name in include}
    if found.relevance is not None:
        fields["relevance"] = found.relevance
    if found.variants is not None:
        fields["variants"] = found.variants
    if found.parts is not None:
        fields["explain"] = [_part(part) for part in found.parts]
    return Hit(**{**fields, "product_id": found.stored.product.product_id, "score": found.score})


def facet(counted: Sequence[FacetCount] | Numbers) -> Facet:
    """Return what was counted of one field."""
    if not isinstance(counted, Numbers):
        return [FacetValue(value=value, count=count) for value, count in counted]
    ranges = [
        FacetRange(count=count, **{name: end for name, end in asdict(bounds).items() if end is not None})
        for bounds, count in counted.ranges
    ]
    return NumberFacet(min=counted.smallest, max=counted.largest, ranges=ranges)


def _part(part: fusion.Part) -> Part:
    told = {name: value for name, value in asdict(part).items() if value is not None}
    if part.part in ("image", "text", "lexical"):
        told["score"] = part.score  # null is an answer too
    return Part(**told)


def product_answer(stored: StoredProduct) -> ProductAnswer:
    """Return the product with everything that is known of it."""
    addresses = (_address(stored.product, index) for index in range(len(stored.product.images)))
    return ProductAnswer(
        **_fields(stored),
        images=[address for address in addresses if address is not None],
        indexed_at=datetime.fromtimestamp(stored.indexed_at, UTC).isoformat(),
    )


async def export_line(stored: StoredProduct, blobs: BlobStore) -> bytes:
    """Return the product in contract form, uploaded pictures inline, so that any Catalens can import it again."""
    product = stored.product.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    if stored.product.images:
        product["images"] = [await _portable(image, blobs) for image in stored.product.images]
    return to_json(product) + b"\n"


async def _portable(image: ImageRef, blobs: BlobStore) -> dict[str, str]:
    if image.blob is not None:
        try:
            return {"data": base64.b64encode(await blobs.get(image.blob)).decode()}
        except NotFound:
            return {"blob": image.blob}  # lost: the reference still says which picture it was
    return image.model_dump(exclude_none=True)


def _fields(stored: StoredProduct) -> dict[str, Any]:
    product = stored.product
    fields: dict[str, Any] = {name: getattr(product, name) for name in _COPIED}
    fields["in_stock"] = None if product.stock is None else product.stock > 0
    fields["image"] = _address(product, 0)
    fields["image_status"] = stored.image_status
    if stored.image_error is not None:
        fields["image_error"] = stored.image_error
    if stored.tags:
        fields["tags"] = {name: TagAnswer(value=tag.value, score=tag.score) for name, tag in stored.tags.items()}
    return fields


def _address(product: Product, index: int) -> str | None:
    """Return where a browser finds a picture: only the web and our own uploads, whatever a foreign event says."""
    if index >= len(product.images):
        return None
    image = product.images[index]
    if image.blob is not None:
        return f"/api/v1/products/{product.product_id}/image" + (f"?index={index}" if index else "")
    return image.url if image.url is not None and image.url.lower().startswith(_WEB) else None
