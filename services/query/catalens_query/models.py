"""What the query side takes and answers over HTTP: the models that validate it and that the document shows."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import ConfigDict, Field, JsonValue, StringConstraints, WithJsonSchema, model_validator
from pydantic.config import JsonDict

from catalens.domain import AttributeValue, ImageStatus, Integral, PictureText, PictureUrl, ProductId, Value
from catalens.openapi import ProblemDetails
from catalens_query import filters
from catalens_query.planner import Mode, RequestMode, Using

MAX_LIMIT = 100
MAX_OFFSET = 10_000

Words: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=10_000, pattern=r"\S")]
Limit: TypeAlias = Annotated[int, Field(ge=1, le=MAX_LIMIT), Integral]
Offset: TypeAlias = Annotated[int, Field(ge=0, le=MAX_OFFSET), Integral]
Weight: TypeAlias = Annotated[
    float,
    Field(ge=0, le=1, description="with words and a picture: 0 searches by the words only, 1 by the picture only"),
]
Filters: TypeAlias = Annotated[dict[str, Any], WithJsonSchema(filters.SCHEMA)]
"""Checked by filters.translate, which names each wrong key."""
ResultField: TypeAlias = Literal[
    "product_id",
    "score",
    "name",
    "description",
    "brand",
    "category",
    "price",
    "currency",
    "stock",
    "in_stock",
    "image",
    "image_status",
    "image_error",
    "url",
    "locale",
    "group_id",
    "attributes",
    "version",
    "offer_version",
]


def _given(name: str, kind: str) -> JsonDict:
    """Say in JSON schema that a field is there and not null."""
    return {"required": [name], "properties": {name: {"type": kind}}}


class PictureInput(Value):
    """A picture to search with: exactly one of an address or the bytes."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [_given("url", "string"), _given("data", "string")]})

    url: PictureUrl | None = Field(default=None, description="fetched by the service")
    data: PictureText | None = Field(default=None, description="the picture itself")

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.url is None) == (self.data is None):
            raise ValueError("give exactly one of url and data")
        return self


Examples: TypeAlias = Annotated[list[ProductId | PictureInput], Field(max_length=16)]


class QueryTerm(Value):
    """Words and how much they count."""

    text: Words
    weight: Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)] = Field(
        default=1.0, description="negative: what is not wanted"
    )


_WANTED: JsonDict = {
    "contains": {"properties": {"weight": {"exclusiveMinimum": 0}}},
    "minItems": 1,
    "type": "array",
}
"""Of several terms at least one is wanted."""


class SearchRequest(Value):
    """A search by words, by picture, by examples, or by several of them."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["query"], "properties": {"query": {"anyOf": [{"type": "string"}, _WANTED]}}},
                _given("image", "object"),
                {"required": ["like"], "properties": {"like": {"minItems": 1}}},
            ],
            "not": {
                "properties": {"mode": {"const": "lexical"}},
                "required": ["mode"],
                "anyOf": [
                    _given("image", "object"),
                    {"required": ["like"], "properties": {"like": {"minItems": 1}}},
                    {"required": ["unlike"], "properties": {"unlike": {"minItems": 1}}},
                ],
            },
        }
    )

    query: Words | Annotated[list[QueryTerm], Field(min_length=1, max_length=16)] | None = Field(
        default=None,
        description="words, in any language of the model; or several, each with its weight",
        examples=["red shoe", [{"text": "red dress"}, {"text": "stripes", "weight": -0.5}]],
    )
    image: PictureInput | None = None
    image_weight: Weight = 0.5
    like: Examples = Field(default_factory=list, description="products, by id, or pictures to be like")
    unlike: Examples = Field(default_factory=list, description="products, by id, or pictures to be unlike")
    mode: RequestMode = Field(
        default="auto",
        description="semantic: the products' vectors; lexical: BM25 over their words; hybrid: both fused; "
        "auto: hybrid, or lexical when no encoder answers, and then `degraded` says why",
    )
    using: Using = Field(default="both", description="which of the products' vectors to compare with")
    filters: Filters = Field(default_factory=dict)
    limit: Limit = 10
    offset: Offset = 0
    include: Annotated[list[ResultField], Field(max_length=32)] | None = Field(
        default=None, description="fields of a result; product_id and score always stay. Default: all"
    )

    @model_validator(mode="after")
    def _something(self) -> Self:
        wanted = self.query if not isinstance(self.query, list) else [one for one in self.query if one.weight > 0]
        if not wanted and self.image is None and not self.like:
            raise ValueError("give query (with a weight above 0), image or like")
        if self.mode == "lexical" and (self.image is not None or self.like or self.unlike):
            raise ValueError("mode lexical searches by words only: leave image, like and unlike out")
        return self


class Paging(Value):
    """Paging in the URL, which wins over the body."""

    limit: Limit | None = None
    offset: Offset | None = None


class SimilarParams(Value):
    """How to look for more like this."""

    limit: Limit = 10
    offset: Offset = 0
    variants: bool = Field(default=False, description="true: products of the same group_id may be among the results")
    using: Using = "both"


class ListingParams(Value):
    """Where to go on in the listing."""

    after: Annotated[str, StringConstraints(max_length=128)] | None = Field(
        default=None, description="`next` of the page before"
    )
    limit: Limit | None = Field(default=None, description="default 50; of an NDJSON export: everything")


class PictureParams(Value):
    """Which picture of the product."""

    index: Annotated[int, Field(ge=0, le=15), Integral] = Field(
        default=0, description="position in the product's images"
    )


class PictureSearchForm(Value):
    """The text fields beside the picture."""

    text: Words | None = Field(default=None, description="words to search with, beside the picture")
    image_weight: Weight = 0.5
    filters: Filters = Field(default_factory=dict, description="the filters of POST /api/v1/search as a JSON object")


class EmbedRequest(Value):
    """A text to embed."""

    text: Words


class SimilarityInput(Value):
    """A text or a picture."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [_given("text", "string"), _given("image", "object")]})

    text: Words | None = None
    image: PictureInput | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.text is None) == (self.image is None):
            raise ValueError("give exactly one of text and image")
        return self


class SimilarityRequest(Value):
    """Two things to compare."""

    a: SimilarityInput
    b: SimilarityInput


class NoFields(Value):
    """A form with nothing beside its pictures."""


Requests: TypeAlias = Annotated[list[dict[str, JsonValue]], Field(min_length=1)]


class SearchBatch(Value):
    """Several searches in one call."""

    requests: Requests = Field(description="each as the body of POST /api/v1/search, and checked on its own")


class EmbedBatch(Value):
    """Several texts in one call."""

    requests: Requests = Field(description="each as the body of POST /api/v1/embed, and checked on its own")


# --- answers ----------------------------------------------------------------------------------------------


class ProductFields(Value):
    """What is known of a product."""

    product_id: str
    name: str | None = None
    description: str | None = None
    brand: str | None = None
    category: str | None = None
    price: float | None = None
    currency: str | None = None
    stock: int | None = None
    in_stock: bool | None = Field(default=None, description="stock > 0; null while the stock is unknown")
    image: str | None = Field(default=None, description="address of the first picture, for a browser to load")
    image_status: ImageStatus | None = None
    image_error: str | None = Field(default=None, description="why the picture failed; absent otherwise")
    url: str | None = None
    locale: str | None = None
    group_id: str | None = None
    attributes: dict[str, AttributeValue] | None = None
    version: int | None = None
    offer_version: int | None = None


class Hit(ProductFields):
    """One result; `include` decides which fields are there beside product_id and score."""

    score: float = Field(description="higher is better; its meaning per mode is in docs/reference/search.md")


class SearchAnswer(Value):
    """Results, best first."""

    results: list[Hit]
    count: int = Field(description="length of results")
    model: str | None = Field(description="the model bundle's id; null without a model")
    mode: Mode = Field(description="the mode that answered")
    took_ms: float
    degraded: str | None = Field(default=None, description="why this answer is less than was asked for; else absent")


class QueryImage(Value):
    """What was seen of the picture that was sent."""

    width: int
    height: int
    format: str
    sha256: str


class PictureSearchAnswer(SearchAnswer):
    """Results of a search by picture, best first."""

    query_image: QueryImage
    embedding_dimension: int


class ProductAnswer(ProductFields):
    """A product as it is indexed."""

    images: list[str] = Field(description="addresses of its pictures, for a browser to load")
    indexed_at: str = Field(description="when it was last written, RFC 3339", json_schema_extra={"format": "date-time"})


class Listing(Value):
    """Products in the order of their ids."""

    products: list[ProductAnswer]
    count: int = Field(description="length of products")
    next: str | None = Field(description="`after` of the next page; null on the last")


class EmbedAnswer(Value):
    """An embedding, L2-normalised."""

    embedding: list[float] = Field(description="all zeros if the model knows nothing of the text")
    dimension: int
    model: str


class SimilarityAnswer(Value):
    """How alike two things are."""

    similarity: float = Field(description="cosine of the two embeddings, −1 to 1")


class SearchBatchAnswer(Value):
    """One answer a request, in order: a result, or problem details (they have a `status`)."""

    responses: list[SearchAnswer | ProblemDetails]


class EmbedBatchAnswer(Value):
    """One answer a request, in order: a result, or problem details (they have a `status`)."""

    responses: list[EmbedAnswer | ProblemDetails]


class Health(Value):
    """Whether searches are answered, and how well."""

    status: Literal["ok", "degraded"] = Field(description="degraded: only searches by words are answered")
    model: str | None
    encoder: str = Field(description='"ok", or what is wrong')
    version: str


class CacheStats(Value):
    """The embedding cache, as this process knows it."""

    hits: int
    misses: int
    entries: int | None = Field(description="null where processes share the cache")
    available: bool = Field(description="false while the cache is away: everything is computed")


class Stats(Value):
    """How much is searchable and how much is on its way."""

    products: int = Field(description="searchable")
    images_pending: int = Field(description="of these, still waiting for their picture")
    deleted: int = Field(description="deletions remembered")
    lag: int = Field(description="events that the embedder has not finished")
    model: str | None
    dimension: int | None
    cache: CacheStats
