"""Frozen values that every service shares: products, offers, pictures, embeddings, stored documents, hits."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, Self, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Embedding: TypeAlias = NDArray[np.float32]
    """A 1-D float32 vector of the model's dimension, L2-normalised."""

MAX_VERSION = 2**63 - 1
DEFAULT_TENANT = "default"
Language = Literal["en", "fr", "de", "es"]
DEFAULT_LANGUAGES: tuple[Language, ...] = ("en", "fr")
"""Part of what is stored in every index: lexical.document_vector."""
# The namespace is part of every stored point id: it never changes.
POINT_NAMESPACE = uuid.UUID("6d9b3a52-7d4e-5a0b-9a53-0c1f7e2b4c11")

Integral = BeforeValidator(lambda value: int(value) if isinstance(value, float) and value.is_integer() else value)
"""As the last annotation, it lets an integer be written 5.0: JSON has one type of number, and JSON Schema agrees."""

ProductId = Annotated[
    str,
    StringConstraints(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._:\-]+$"),
    Field(description="The catalogue's own id.", examples=["allstar-sneakers"]),
]
Tenant = Annotated[str, StringConstraints(min_length=1, max_length=63, pattern=r"^[a-z0-9\-]+$")]
Version = Annotated[int, Field(ge=1, le=MAX_VERSION, description="Only grows for one product; newest wins."), Integral]
Price = Annotated[float, Field(ge=0, allow_inf_nan=False, examples=[65.0])]
Currency = Annotated[str, StringConstraints(pattern=r"^[A-Z]{3}$"), Field(description="ISO 4217", examples=["EUR"])]
Stock = Annotated[int, Field(ge=0, le=MAX_VERSION), Integral]
Label = Annotated[str, StringConstraints(min_length=1, max_length=512)]
AttributeKey = Annotated[str, StringConstraints(min_length=1, max_length=128)]
AttributeText = Annotated[str, StringConstraints(max_length=4096)]
Number = Annotated[float, Field(allow_inf_nan=False)]
AttributeValue = (
    bool
    | Annotated[int, Field(ge=-MAX_VERSION, le=MAX_VERSION)]
    | Number
    | AttributeText
    | Annotated[list[AttributeText], Field(max_length=256)]
)
# Their patterns are shown, not checked here: the door and the query service say better what is wrong.
PictureUrl = Annotated[
    str,
    StringConstraints(min_length=1, max_length=2048),
    Field(json_schema_extra={"pattern": r"^[hH][tT][tT][pP][sS]?://[^\x00-\x1f\x7f]+$"}),
]
PictureText = Annotated[
    str,
    StringConstraints(min_length=1),
    Field(
        examples=["iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="],
        json_schema_extra={
            "contentEncoding": "base64",
            "pattern": "^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$",
        },
    ),
]

ImageStatus = Literal["none", "pending", "ok", "failed"]


class Value(BaseModel):
    """A frozen pydantic value; JSON types are taken as they are, "12" is no number.

    Unknown fields are ignored, because an old or a newer event must decode for ever; HTTP validates the
    same models with `extra="forbid"`.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)


class ImageRef(Value):
    """One picture of a product: exactly one of a URL, inline bytes or an uploaded blob."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": [name], "properties": {name: {"type": "string"}}} for name in ("url", "data", "blob")
            ]
        }
    )

    url: PictureUrl | None = Field(default=None, description="fetched by the embedder")
    data: PictureText | None = Field(default=None, description="the picture itself")
    blob: Annotated[str, StringConstraints(pattern=r"^[a-f0-9]{64}$")] | None = Field(
        default=None, description="reference of an uploaded picture: its SHA-256"
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if sum(value is not None for value in (self.url, self.data, self.blob)) != 1:
            raise ValueError("give exactly one of url, data, blob")
        return self


class Offer(Value):
    """What changes often and costs no inference; `offer_version` is compared on its own."""

    price: Price | None = None
    currency: Currency | None = None
    stock: Stock | None = None
    offer_version: Version | None = None


class Product(Offer):
    """A whole product, as the catalogue states it (contracts.md, "Product").

    `price`, `currency`, `stock` and `offer_version` are its offer. A product that sets none of the four
    leaves the stored offer as it is (docs/adr/0004).
    """

    product_id: ProductId
    name: Label
    description: Annotated[str, StringConstraints(max_length=20_000)] = ""
    brand: Label | None = None
    category: Annotated[Label, Field(description='may be a path: "Sport > Shoes"')] | None = None
    images: Annotated[tuple[ImageRef, ...], Field(max_length=16, strict=False)] = ()
    attributes: Annotated[dict[AttributeKey, AttributeValue], Field(max_length=64)] = Field(default_factory=dict)
    group_id: Label | None = None
    url: Annotated[str, StringConstraints(max_length=2048)] | None = None
    locale: Annotated[str, StringConstraints(max_length=35)] | None = None
    version: Version | None = None

    @property
    def carries_offer(self) -> bool:
        """True when the product states an offer, be it to clear it."""
        return not self.model_fields_set.isdisjoint(("price", "currency", "stock", "offer_version"))


class OfferChange(Offer):
    """New price, currency or stock of a product; a field that is not set stays as it is."""

    product_id: ProductId


class Deletion(Value):
    """The product is gone as of `version`; leaves a tombstone."""

    product_id: ProductId
    version: Version | None = None


def assigned_version() -> int:
    """Return the version that the door assigns: Unix microseconds."""
    return time.time_ns() // 1_000


def point_id(tenant: str, product_id: str) -> uuid.UUID:
    """Return the point id of a product: UUIDv5 of `tenant|product_id`."""
    return uuid.uuid5(POINT_NAMESPACE, f"{tenant}|{product_id}")


def category_prefixes(category: str | None) -> tuple[str, ...]:
    """Return the path and everything above it: "Sport > Shoes" → ("Sport", "Sport > Shoes")."""
    parts = [part.strip() for part in (category or "").split(">")]
    parts = [part for part in parts if part]
    return tuple(" > ".join(parts[: depth + 1]) for depth in range(len(parts)))


def sha256_hex(data: bytes) -> str:
    """Return the lower-case hex SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What identifies a model: vectors of two specs may be compared only if `fingerprint` is equal."""

    id: str
    revision: str
    family: str
    dimension: int
    fingerprint: str
    """Hash over id, revision, preprocessing, precision and the files' checksums."""


@dataclass(frozen=True, slots=True)
class PictureInfo:
    """What was seen when a picture was decoded."""

    width: int
    height: int
    format: str
    """Pillow's name of the format, lower case: jpeg, png, webp, gif, …"""
    sha256: str


_Validator = Annotated[str, StringConstraints(min_length=1, max_length=512, pattern=r"^[\x20-\x7e]+$")]


class SeenPicture(Value):
    """What a host said of a picture when it was last fetched: enough to ask whether it has changed since."""

    url: str
    """Where it came from in the end: what a host says of one address means nothing at another."""
    sha256: str
    etag: _Validator | None = None
    last_modified: _Validator | None = None


# --- the index's side -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SparseVector:
    """A sparse lexical vector: term ids (unsigned 32 bit, unique) and their weights."""

    indices: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Tag:
    """What the model sees in a product: the best label of a list, and its share among the list's labels, 0 to 1."""

    value: str
    score: float


Tags: TypeAlias = Mapping[str, Tag]
"""By the name of the list, such as color."""


@dataclass(frozen=True, slots=True)
class IndexDocument:
    """What the embedder writes for a product event: the content, its version and the vectors at hand.

    `product.version` is set. `image` or `text` is None where that vector does not exist (yet).
    """

    tenant: str
    product: Product
    """Never with inline `data`: pictures were turned into blobs at the door or by the embedder."""
    image_status: ImageStatus
    image_error: str | None = None
    image: Embedding | None = None
    text: Embedding | None = None
    lexical: SparseVector | None = None
    tags: Tags = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ImageUpdate:
    """The picture of a product version arrived or failed for good; applies only to that very version."""

    tenant: str
    product_id: str
    version: int
    image_status: ImageStatus
    image_error: str | None = None
    image: Embedding | None = None
    tagged: tuple[Product, Tags] | None = None
    """The product of that version and its tags, which replace those that it has; None leaves them as they are."""


@dataclass(frozen=True, slots=True)
class OfferUpdate:
    """An offer event on its way into the index; `offer.offer_version` is set."""

    tenant: str
    offer: OfferChange


@dataclass(frozen=True, slots=True)
class TombstoneWrite:
    """A deletion on its way into the index; `deletion.version` is set."""

    tenant: str
    deletion: Deletion


WriteOutcome = Literal["applied", "known", "superseded"]
"""applied: newer than what was stored; known: equal version, no effect; superseded: older, no effect."""


@dataclass(frozen=True, slots=True)
class StoredProduct:
    """A live product as the index holds it."""

    tenant: str
    product: Product
    """With `version` and the stored offer's price, currency, stock and `offer_version` filled in."""
    image_status: ImageStatus
    image_error: str | None
    indexed_at: float
    """Unix seconds of the last applied write."""
    tags: Tags = field(default_factory=dict)
    vectors: Mapping[str, Embedding] = field(default_factory=dict)
    """Only when asked for: "image", "text"."""


@dataclass(frozen=True, slots=True)
class PointState:
    """Everything the index knows of one product, hidden or not: what a copy or a comparison is made from."""

    point: uuid.UUID
    tenant: str
    product_id: str
    state: Literal["live", "deleted", "offer"]
    """deleted: a tombstone; offer: an offer that waits for its product."""
    version: int | None
    """Of the content or the deletion; None for a lone offer."""
    product: Product | None
    """Of a live one: the content with its version, and no offer field set."""
    offer: OfferChange | None
    """The stored offer with its version; None if no offer was ever stated."""
    offers: tuple[OfferChange, ...] = ()
    """By ascending version, the offers that `offer` comes from, each with the fields that it still decides."""
    image_status: ImageStatus | None = None
    image_error: str | None = None
    indexed_at: float = 0.0
    vectors: Mapping[str, Embedding] = field(default_factory=dict)
    """Only when asked for: "image", "text"."""


@dataclass(frozen=True, slots=True)
class IndexInfo:
    """What an index was built by."""

    model: str
    """As CATALENS_MODEL names it."""
    spec: ModelSpec
    generation: int = 0
    """Tells indexes of one spec apart: a rebuild makes a further one."""

    @property
    def name(self) -> str:
        """What the index is called, in folder and collection names and on the command line."""
        suffix = f"-{self.generation}" if self.generation else ""
        return f"{self.spec.fingerprint[:12]}{suffix}"


VectorName = Literal["image", "text", "lexical"]


@dataclass(frozen=True, slots=True)
class Range:
    """Bounds of a number; a missing bound is open."""

    gte: float | None = None
    lte: float | None = None
    gt: float | None = None
    lt: float | None = None


Scalar: TypeAlias = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Condition:
    """One filter key: the product's `key` is any of `any_of`, or lies in `within`.

    Keys: product_id, brand, category (path and everything below), price, currency, stock, in_stock, group_id,
    locale, image_status, attributes.NAME and tags.NAME. A list-valued attribute matches if one of its members does.
    """

    key: str
    any_of: tuple[Scalar, ...] = ()
    within: Range | None = None


@dataclass(frozen=True, slots=True)
class Filter:
    """Keys are AND, the values of one key are OR; `exclude` leaves out products by id, `without_groups` by group."""

    conditions: tuple[Condition, ...] = ()
    exclude: tuple[str, ...] = ()
    without_groups: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Leg:
    """One ranked list to take from the index: nearest by cosine (dense) or by BM25 with idf (lexical)."""

    using: VectorName
    vector: Embedding | SparseVector
    limit: int


class LegHit(NamedTuple):
    """A product found by one leg; `score` is the cosine or the BM25 score, higher is better.

    A tuple, because a search makes hundreds and a dataclass takes three times as long to make.
    """

    product_id: str
    score: float


FacetKey: TypeAlias = str
"""brand, category, locale, group_id, currency, image_status, in_stock or attributes.NAME."""
NumberKey = Literal["price", "stock"]
FacetCount: TypeAlias = tuple[Scalar, int]
"""A value and how many products have it."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a ranking is sorted, grouped and boosted by; a number that is unknown is None."""

    version: int
    price: float | None = None
    stock: int | None = None
    group_id: str | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)
    """The numeric attributes, by name."""


@dataclass(frozen=True, slots=True)
class IndexCounts:
    """products: live ones; images_pending: of these; deleted: tombstones kept; offers_only: offers that wait."""

    products: int
    images_pending: int
    deleted: int
    offers_only: int


# --- the log's side ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Message:
    """A record to append. Header values are text, as CloudEvents' binary mode on Kafka has them (UTF-8)."""

    topic: str
    key: str
    value: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, order=True)
class TopicPartition:
    """Where an offset counts."""

    topic: str
    partition: int


@dataclass(frozen=True, slots=True)
class Record:
    """A record as read from the log."""

    topic: str
    partition: int
    offset: int
    key: str
    value: bytes
    headers: Mapping[str, str]
    timestamp: float
    """Unix seconds at which the log took it."""

    @property
    def source(self) -> TopicPartition:
        """Where it came from."""
        return TopicPartition(self.topic, self.partition)


Offsets: TypeAlias = Mapping[TopicPartition, int]
Records: TypeAlias = Sequence[Record]
