"""What the query side takes and answers over HTTP: the models that validate it and that the document shows."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import ConfigDict, Field, JsonValue, StringConstraints, WithJsonSchema, model_validator
from pydantic.config import JsonDict

from catalens.domain import (
    AttributeValue,
    ImageStatus,
    Integral,
    PictureText,
    PictureUrl,
    ProductId,
    Value,
)
from catalens.openapi import ProblemDetails
from catalens_query import facets, filters
from catalens_query.ordering import GroupBy, Sort
from catalens_query.planner import Mode, RequestMode, Using
from catalens_query.suggesting import Kind as SuggestionKind

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
FacetName: TypeAlias = Annotated[str, StringConstraints(pattern=facets.PATTERN)]
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
    "tags",
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


class BoostInput(Value):
    """A field that raises the score, or lowers it."""

    field: Annotated[str, StringConstraints(pattern=r"^(?:stock|in_stock|price|newest|attributes\.[\s\S]{1,128})$")] = (
        Field(description="an attribute counts where it is a number", examples=["stock", "attributes.margin"])
    )
    factor: Annotated[float, Field(ge=-1, le=10, allow_inf_nan=False)] = Field(
        description="how much of the score the best in that field gains; negative: loses"
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
        description="words, in any language of the model; or several, each with its weight. Of all together 2,000 "
        "characters are looked up as words, the first of each; the model gets the whole text",
        examples=["red shoe", [{"text": "red dress"}, {"text": "stripes", "weight": -0.5}]],
    )
    image: PictureInput | None = None
    image_weight: Weight = 0.5
    like: Examples = Field(default_factory=list, description="products, by id, or pictures to be like")
    unlike: Examples = Field(default_factory=list, description="products, by id, or pictures to be unlike")
    correct: bool = Field(
        default=True, description="false: take the words as they are written; else `corrected` says how they were read"
    )
    mode: RequestMode = Field(
        default="auto",
        description="semantic: the products' vectors; lexical: BM25 over their words; hybrid: both fused; "
        "auto: hybrid, or lexical when no encoder answers, and then `degraded` says why",
    )
    using: Using = Field(default="both", description="which of the products' vectors to compare with")
    filters: Filters = Field(default_factory=dict)
    facets: Annotated[list[FacetName], Field(max_length=10)] = Field(
        default_factory=list,
        description="fields whose values are counted under the filters, each without its own filter: brand, category, "
        "group_id, locale, currency, image_status, in_stock, price, stock, attributes.NAME and tags.NAME",
        examples=[["brand", "category", "price"]],
    )
    group_by: GroupBy | None = Field(
        default=None,
        description="one result a group: of each group_id, or of the products with the very same picture, the first",
    )
    sort: Sort = Field(
        default="relevance",
        description="by price or by version, the best 200 of each list, or all that has the words in mode lexical (the "
        "best 2,000)",
    )
    boosts: Annotated[list[BoostInput], Field(max_length=8)] = Field(
        default_factory=list, description="what raises the score besides relevance"
    )
    diversity: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = Field(
        default=0.0, description="how much the best 200 are to differ from one another; 0: not at all"
    )
    min_score: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = Field(
        default=None,
        description="leave out what is less relevant: 0 to 1, one scale for every query; choose it on your catalogue",
    )
    explain: bool = Field(default=False, description="say of each result what its score is made of")
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


class SuggestParams(Value):
    """What is being typed."""

    q: Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"\S")] = Field(
        description="the text so far; its last word may be unfinished", examples=["runn"]
    )
    limit: Annotated[int, Field(ge=1, le=20), Integral] = 8


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


class TagAnswer(Value):
    """What the model sees in a product."""

    value: str = Field(description="the best label of the catalogue's list")
    score: float = Field(description="its share among the labels of the list, 0 to 1")


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
    tags: dict[str, TagAnswer] | None = Field(
        default=None, description="what the model sees, by list (CATALENS_TAGS_FILE); absent where it sees none of it"
    )
    version: int | None = None
    offer_version: int | None = None


class Part(Value):
    """What one list, one boost, or being exactly what was asked for, adds to a score."""

    part: Literal["image", "text", "lexical", "boost", "exact"]
    field: str | None = Field(default=None, description="what a boost is by; else absent")
    score: float | None = Field(
        default=None, description="the list's own: cosine or BM25; null if it lacks the product"
    )
    calibrated: float | None = Field(default=None, description="the same from 0 to 1; of a boost, its value")
    weight: float | None = Field(default=None, description="what calibrated is multiplied by; of a boost, its factor")
    contribution: float = Field(description="the contributions sum to the score")


class Hit(ProductFields):
    """One result; `include` decides which fields are there beside product_id and score."""

    score: float = Field(description="higher is better; its meaning per mode is in docs/reference/search.md")
    relevance: float | None = Field(
        default=None, description="with min_score: how sure it is that this was asked for, 0 to 1"
    )
    variants: int | None = Field(
        default=None,
        description="with group_by group_id: how many products under the filters are of its group; 1 without one; "
        "absent where that is late, and then `degraded` says so",
    )
    explain: list[Part] | None = Field(default=None, description="if asked for: what the score is made of")


class FacetValue(Value):
    """A value and how many products have it."""

    value: str | int | float | bool
    count: int


class FacetRange(Value):
    """Numbers from `gte` to below `lt`, as a filter takes them, and how many products are there."""

    gte: float
    lt: float | None = Field(default=None, description="absent: open")
    count: int


class NumberFacet(Value):
    """From where to where the numbers go, and how they are spread."""

    min: float | None = Field(description="null: no product has one")
    max: float | None
    ranges: list[FacetRange] = Field(description="ascending, at most 6, none empty")


Facet: TypeAlias = list[FacetValue] | NumberFacet


class SearchAnswer(Value):
    """Results, best first."""

    results: list[Hit]
    count: int = Field(description="length of results")
    total: int | None = Field(
        default=None, description="results on all pages; absent where the index was not asked that deep"
    )
    facets: dict[str, Facet] | None = Field(
        default=None,
        description="if asked for: of each field its most frequent values (at most 100), or the range of its numbers; "
        "absent where they are late, and then `degraded` says so",
    )
    model: str | None = Field(description="the model bundle's id; null without a model")
    mode: Mode = Field(description="the mode that answered")
    took_ms: float
    degraded: str | None = Field(default=None, description="what this answer lacks and why; else absent")
    corrected: str | None = Field(
        default=None, description="the words as they were read, where the catalogue knows some of them only nearly so"
    )


class Suggestion(Value):
    """A text that goes on as what was typed."""

    text: str
    kind: SuggestionKind = Field(description="words to search with, or the name of a brand, a category or a product")
    count: int | None = Field(default=None, description="how many products have it, about; absent for a product")
    product_id: str | None = Field(default=None, description="of a product")


class SuggestAnswer(Value):
    """Completions, best first."""

    suggestions: list[Suggestion]
    count: int = Field(description="length of suggestions")
    ready: bool = Field(description="false until the catalogue's words have been read: there are no suggestions then")


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
