"""How the domain becomes what an index stores, and back: the pure part that the index adapters share."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
from pydantic_core import from_json

from catalens.domain import (
    Condition,
    FacetKey,
    Facts,
    Filter,
    ImageUpdate,
    IndexDocument,
    Offer,
    OfferChange,
    OfferUpdate,
    PointState,
    Product,
    Range,
    Scalar,
    SparseVector,
    StoredProduct,
    Tag,
    Tags,
    TombstoneWrite,
    category_prefixes,
    point_id,
)
from catalens.engines.rules import short_key
from catalens.errors import InvalidEvent

if TYPE_CHECKING:
    from catalens.domain import Embedding

_OFFER_FIELDS: Final = frozenset(Offer.model_fields)
_TERMS: Final = frozenset({"brand", "group_id", "locale"})
"""Fields that are stored as terms, as attributes are: one payload index serves them all."""
_KEYWORDS: Final = {"currency": "offer.currency", "image_status": "image_status"}
"""Fields that change without the content, each with an index of its own."""
NUMBERS: Final = {"price": "offer.price", "stock": "offer.stock"}
"""The numbers of an offer and where a payload has them."""

Primitive: TypeAlias = tuple[str, str, Any]
"""("any", payload key, values) · ("range", payload key, (gte, gt, lte, lt)) · ("points", "", point ids)."""
PlainFilter: TypeAlias = tuple[list[list[Primitive]], list[Primitive]]
"""AND of ORs of primitives, and primitives of which none may match: what each engine is told in its own words."""
Clauses: TypeAlias = dict[tuple[Condition, tuple[type, ...]], list[Primitive]]
"""What conditions are in the engine's words, by the condition and the types of its values, as in `distinct`."""
Item: TypeAlias = dict[str, Any]
"""A write as the rules (`rules.py`) take it."""


# --- writes -------------------------------------------------------------------------------------------------------


def content_item(document: IndexDocument, dimension: int) -> Item:
    """Return the write of a content; raises InvalidEvent for a vector that is none."""
    product = document.product
    return {
        **_identity(document.tenant, product.product_id),
        "version": _known(product.version, "version"),
        "offer": _stated_offer(product) if product.carries_offer else None,
        "image": _dense("image", document.image, dimension),
        "text": _dense("text", document.text, dimension),
        "lexical": packed_sparse(document.lexical) if document.lexical and document.lexical.indices else None,
        "fields": _present(
            doc=product.model_dump_json(exclude_unset=True, exclude={*_OFFER_FIELDS, "version"}),
            terms=terms_of(product, document.tags),
            facets=facets_of(product, document.tags),
            tags=_packed(document.tags),
            numbers={
                short_key(key): float(value)
                for key, value in product.attributes.items()
                if isinstance(value, int | float) and not isinstance(value, bool)
            },
            blobs=[image.blob for image in product.images if image.blob],
            image_status=document.image_status,
            image_error=document.image_error,
        ),
    }


def image_item(update: ImageUpdate, dimension: int) -> Item:
    """Return the write of a picture that arrived or failed; without a vector, only the status is set."""
    retagged: dict[str, object] = {}
    if update.tagged is not None:
        product, tags = update.tagged
        retagged = {  # whole, be it empty: what the text gave must go
            "terms": terms_of(product, tags),
            "facets": facets_of(product, tags),
            "tags": _packed(tags),
        }
    return {
        **_identity(update.tenant, update.product_id),
        "version": update.version,
        "fields": {**_present(image_status=update.image_status, image_error=update.image_error), **retagged},
        "image": _dense("image", update.image, dimension),
    }


def offer_item(update: OfferUpdate) -> Item:
    """Return the write of an offer."""
    return {**_identity(update.tenant, update.offer.product_id), "offer": _stated_offer(update.offer)}


def tombstone_item(write: TombstoneWrite) -> Item:
    """Return the write of a deletion."""
    deletion = write.deletion
    return {**_identity(write.tenant, deletion.product_id), "version": _known(deletion.version, "version")}


def packed_dense(name: str, vector: Embedding, dimension: int) -> bytes:
    """Return the vector as float32 bytes; the engine would take NaN silently, so it never sees one (InvalidEvent)."""
    if vector.shape != (dimension,) or not np.isfinite(vector).all():
        raise InvalidEvent(f"the {name} vector is not {dimension} finite numbers")
    return np.ascontiguousarray(vector, dtype=np.float32).tobytes()


def packed_sparse(vector: SparseVector) -> tuple[bytes, bytes]:
    """Return uint32 indices and float32 values as bytes; raises InvalidEvent for a weight that is no number."""
    values = np.asarray(vector.values, dtype=np.float32)
    if not np.isfinite(values).all():
        raise InvalidEvent("the lexical vector's weights are not finite")
    return np.asarray(vector.indices, dtype=np.uint32).tobytes(), values.tobytes()


def terms_of(product: Product, tags: Tags) -> list[str]:
    """Return everything that the product can be filtered by for equality, one keyword each."""
    return [_term(key, value) for key, value in _values(product, tags)]


def _values(product: Product, tags: Tags) -> Iterator[tuple[str, Scalar]]:
    for key in sorted(_TERMS):
        if (value := getattr(product, key)) is not None:
            yield key, value
    for path in category_prefixes(product.category):
        yield "category", path
    for name, stated in product.attributes.items():
        members: Sequence[Scalar] = stated if isinstance(stated, list) else [stated]
        for member in members:
            yield f"attributes.{name}", member
    for name, tag in tags.items():
        yield f"tags.{name}", tag.value


def facet_field(key: FacetKey) -> str:
    """Return the payload key whose index counts the facet `key`."""
    if key in _KEYWORDS:
        return _KEYWORDS[key]
    return key if key == "in_stock" else f"facets.{short_key(key)}"


def facet_value(key: FacetKey, stored: str | int) -> Scalar:
    """Return a value as the index counted it, as the product has it."""
    if isinstance(stored, int):  # of in_stock, the one flag that is counted
        return bool(stored)
    value: Scalar = stored if key in _KEYWORDS else json.loads(stored)
    return value


def facets_of(product: Product, tags: Tags) -> dict[str, list[str]]:
    """Return the values of each field apart, as JSON: an engine counts what is in a field, not what begins alike."""
    found: dict[str, dict[str, None]] = {}
    for key, value in _values(product, tags):
        found.setdefault(short_key(key), {})[_json(value)] = None
    return {key: list(values) for key, values in found.items()}


def _packed(tags: Tags) -> dict[str, list[str | float]]:
    return {name: [tag.value, tag.score] for name, tag in tags.items()}


FACETS: Final = frozenset(facet_field(key) for key in (*_TERMS, "category"))
"""The payload keys of the facets that every product may have."""


def _term(key: str, value: Scalar) -> str:
    """Return a filter key and value as one keyword. 12 and 12.0 are one value; 12, "12" and true are three."""
    return f"[{_json(key)},{_json(value)}]"


def _json(value: Scalar) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _identity(tenant: str, product_id: str) -> Item:
    return {"point": point_id(tenant, product_id).bytes, "tenant": tenant, "product_id": product_id}


def _stated_offer(offer: Offer) -> dict[str, Any]:
    _known(offer.offer_version, "offer_version")
    return offer.model_dump(include=set(_OFFER_FIELDS), exclude_unset=True)


def _known(version: int | None, name: str) -> int:
    if version is None:
        raise ValueError(f"{name} must be set before a write")
    return version


def _dense(name: str, vector: Embedding | None, dimension: int) -> bytes | None:
    return None if vector is None else packed_dense(name, vector, dimension)


def _present(**fields: object) -> dict[str, object]:
    return {name: value for name, value in fields.items() if value is not None and value not in ([], {})}


# --- reads --------------------------------------------------------------------------------------------------------


def stored_product(payload: Mapping[str, Any]) -> StoredProduct:
    """Return a live point as the domain has it; `payload["vectors"]`, if there, are float32 bytes by name."""
    return StoredProduct(
        tenant=payload["tenant"],
        product=Product.model_validate(
            {**from_json(payload["doc"]), **payload["offer"], "version": payload["version"]}
        ),
        image_status=payload["image_status"],
        image_error=payload.get("image_error"),
        indexed_at=payload["indexed_at"],
        tags={name: Tag(value, score) for name, (value, score) in payload.get("tags", {}).items()},
        vectors=_vectors(payload),
    )


def product_facts(payload: Mapping[str, Any]) -> Facts:
    """Return what a ranking needs of a live point, of its `version`, `offer` and `doc`."""
    doc, offer = from_json(payload["doc"]), payload["offer"]
    return Facts(
        version=payload["version"],
        price=offer.get("price"),
        stock=offer.get("stock"),
        group_id=doc.get("group_id"),
        numbers={
            name: value
            for name, value in doc.get("attributes", {}).items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        },
    )


def point_state(payload: Mapping[str, Any]) -> PointState:
    """Return a point of any kind as the domain has it; vectors as in `stored_product`."""
    product_id, offer, version = payload["product_id"], payload["offer"], payload.get("version")
    live = payload["state"] == "live"
    return PointState(
        point=point_id(payload["tenant"], product_id),
        tenant=payload["tenant"],
        product_id=product_id,
        state=payload["state"],
        version=version,
        product=Product.model_validate({**from_json(payload["doc"]), "version": version}) if live else None,
        offer=OfferChange.model_validate({**offer, "product_id": product_id}) if offer else None,
        offers=tuple(_offers(product_id, offer, payload.get("offer_at", {}))) if offer else (),
        image_status=payload.get("image_status"),
        image_error=payload.get("image_error"),
        indexed_at=payload["indexed_at"],
        vectors=_vectors(payload),
    )


def _offers(product_id: str, offer: Mapping[str, Any], at: Mapping[str, int]) -> Iterator[OfferChange]:
    newest = offer["offer_version"]
    for version in sorted({newest, *at.values()}):
        fields = {name: value for name, value in offer.items() if at.get(name, newest) == version}
        yield OfferChange.model_validate({**fields, "product_id": product_id, "offer_version": version})


def _vectors(payload: Mapping[str, Any]) -> dict[str, Embedding]:
    return {name: np.frombuffer(data, dtype=np.float32) for name, data in payload.get("vectors", {}).items()}


# --- filters ------------------------------------------------------------------------------------------------------


def plain_filter(tenant: str, where: Filter, clauses: Clauses | None = None) -> PlainFilter:
    """Return `where` in the few words that every engine has; `clauses` are shared by filters of equal conditions.

    A value of the wrong type for its key (a number for a brand) matches nothing; a key that no product can have is a
    ValueError.
    """
    none_of: list[Primitive] = []
    if where.exclude:
        none_of.append(_points(tenant, where.exclude))
    if where.without_groups:
        none_of.append(("any", "terms", [_term("group_id", group) for group in where.without_groups]))
    known: Clauses = {} if clauses is None else clauses
    keys = [(condition, _types(condition)) for condition in where.conditions]
    for key in keys:
        if key not in known:
            known[key] = _clause(tenant, key[0])
    return [known[key] for key in keys], none_of


def distinct(where: Filter) -> Hashable:
    """Return what filters that mean the same have in common: to Python alone, True and 1 are equal."""
    return where, tuple(map(_types, where.conditions))


def _types(condition: Condition) -> tuple[type, ...]:
    return tuple(map(type, condition.any_of))


def _clause(tenant: str, condition: Condition) -> list[Primitive]:
    key, values, within = condition.key, condition.any_of, condition.within
    if key == "product_id":
        return [_points(tenant, _texts(values))]
    if key in _TERMS:
        return [("any", "terms", [_term(key, value) for value in _texts(values)])]
    if key in _KEYWORDS:
        return [("any", _KEYWORDS[key], _texts(values))]
    if key == "category":
        paths = [path for value in _texts(values) for path in category_prefixes(value)[-1:]]
        return [("any", "terms", [_term("category", path) for path in paths])]
    if key == "in_stock":
        # Flags are stored as 0 and 1: the embedded engine matches no boolean, and says nothing.
        return [("any", "in_stock", [int(value) for value in values if isinstance(value, bool)])]
    if key in NUMBERS:
        equal = [
            Range(gte=value, lte=value)
            for value in values
            if isinstance(value, int | float) and not isinstance(value, bool)
        ]
        ranges = [*equal, *([within] if within else [])]
        return [_range(NUMBERS[key], bounds) for bounds in ranges] or [_points(tenant, ())]
    if key.startswith("tags.") and key != "tags.":
        return [("any", "terms", [_term(key, value) for value in _texts(values)])]
    name = key.removeprefix("attributes.")
    if name == key or not name:
        raise ValueError(f"no filter is known for {key!r}")
    equal_terms: list[Primitive] = [("any", "terms", [_term(key, value) for value in values])]
    return [*equal_terms, *([_range(f"numbers.{short_key(name)}", within)] if within else [])]


def _points(tenant: str, product_ids: Iterable[str]) -> Primitive:
    return ("points", "", [point_id(tenant, product_id).bytes for product_id in product_ids])


def _range(key: str, bounds: Range) -> Primitive:
    return ("range", key, (bounds.gte, bounds.gt, bounds.lte, bounds.lt))


def _texts(values: Iterable[Scalar]) -> list[str]:
    return [value for value in values if isinstance(value, str)]
