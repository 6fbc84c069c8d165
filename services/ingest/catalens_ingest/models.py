"""What the ingest side takes and answers over HTTP, beyond the product itself."""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self

from pydantic import ConfigDict, Field, JsonValue, StringConstraints, create_model, model_validator
from pydantic.config import JsonDict

from catalens.domain import AttributeKey, AttributeValue, Integral, Label, Offer, Product, ProductId, Value, Version

DEFAULT_WAIT: Final = 10.0
MAX_ERRORS: Final = 100

ProductBody = create_model(
    "ProductBody",
    __base__=Product,
    __doc__="A whole product; its id is that of the path, and may be left out here.",
    product_id=(ProductId | None, None),
)


class OfferBody(Offer):
    """What changes of the offer; a field that is left out stays as it is, null forgets it."""

    model_config = ConfigDict(
        json_schema_extra={"anyOf": [{"required": [name]} for name in ("price", "currency", "stock")]}
    )

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.model_fields_set.isdisjoint(("price", "currency", "stock")):
            raise ValueError("give price, currency or stock")
        return self


class WaitParams(Value):
    """Whether to wait until the product is searchable."""

    wait: bool = Field(default=False, description="answer when the product is searchable with its picture, or failed")
    timeout: float = DEFAULT_WAIT


class DeleteParams(WaitParams):
    """As of which version the product is gone."""

    version: Version | None = Field(default=None, description="left out: now")


def limited(params: type[WaitParams], max_wait: float) -> type[WaitParams]:
    """Return `params` with the longest wait that this service allows."""
    seconds = Annotated[float, Field(gt=0, le=max_wait, description="seconds to wait; then the answer is 202")]
    return create_model(params.__name__, __base__=params, timeout=(seconds, min(DEFAULT_WAIT, max_wait)))


class ProductForm(Value):
    """A product as a form."""

    product_id: ProductId
    name: Label
    description: Annotated[str, StringConstraints(max_length=20_000)] = ""
    metadata: Annotated[dict[AttributeKey, AttributeValue], Field(max_length=64)] = Field(
        default_factory=dict,
        description="JSON object; becomes the product's attributes",
        examples=[{"color": "red"}],
    )


Status = Literal["accepted", "indexed", "superseded", "failed"]


class Receipt(Value):
    """Accepted: the event survives any crash. With `wait`, what became of it."""

    product_id: ProductId
    version: Version | None = Field(description="content version; null when the call is about the offer only")
    offer_version: Version | None = Field(description="offer version; null when the call says nothing of the offer")
    event_id: str
    status: Status = Field(
        description="indexed: searchable with its picture; superseded: a newer version was there; failed: see error"
    )
    error: str | None = Field(default=None, description="why it failed; absent otherwise")


class FormReceipt(Value):
    """Accepted: the event survives any crash. With `wait`, what became of it."""

    status: Literal["success", "indexed", "superseded", "failed"]
    message: str
    product_id: ProductId
    version: Version


class PictureReceipt(FormReceipt):
    """Accepted, picture included. With `wait`, what became of it."""

    embedding_type: str = Field(description="family of the model that will embed it: clip, siglip, starter")
    embedding_dimension: int


class LineProblem(Value):
    """A line that was not accepted; `line` counts from 1, blank lines included."""

    line: int
    product_id: str | None = Field(description="null where the line names none")
    error: str


class BulkReceipt(Value):
    """Every line was read; what was accepted survives any crash."""

    accepted: int
    rejected: int
    errors: Annotated[list[LineProblem], Field(max_length=MAX_ERRORS)] = Field(description="the first 100")


# --- dead letters -----------------------------------------------------------------------------------------

DeadLetterState = Literal["open", "replayed", "purged"]
Word = Annotated[str, StringConstraints(max_length=512)]
_MOMENT: Final[JsonDict] = {"format": "date-time"}


class DeadLetterParams(Value):
    """Which dead letters to list; what is left out is not asked for."""

    reason: Word | None = Field(default=None, description="such as invalid_event")
    topic: Word | None = Field(default=None, description="where the event first stood, such as catalog.products")
    type: Word | None = Field(default=None, description="the event's, such as catalens.product.upserted.v1")
    product_id: Word | None = None
    since: Word | None = Field(default=None, description="failed at this moment or later", json_schema_extra=_MOMENT)
    until: Word | None = Field(default=None, description="failed before this moment", json_schema_extra=_MOMENT)
    state: Literal["open", "replayed", "purged", "all"] = "open"
    after: Annotated[str, StringConstraints(pattern=r"^[0-9]{1,12}(\.[0-9]{1,9})?:[0-9]{1,19}:[0-9]{1,19}$")] | None = (
        Field(default=None, description="`next` of the page before")
    )
    limit: Annotated[int, Field(ge=1, le=1000), Integral] = 100


class ReplayParams(Value):
    """How to replay."""

    force: bool = Field(default=False, description="even if the letter was replayed or purged before")


class DeadLetter(Value):
    """An event that could not be processed."""

    id: str
    reason: str = Field(
        description="invalid_event, expired (it came back too late), engine_refuses, internal_error; see error"
    )
    error: str = Field(description="in the list its first 300 characters")
    type: str = Field(description="the event's; empty if it states none")
    product_id: str = Field(description="or the record's key, if that is no product's: its first 512 characters")
    tenant: str
    topic: str = Field(description="where the event first stood")
    partition: int
    offset: int
    attempts: int = Field(description="how often it was tried")
    failed_at: str = Field(json_schema_extra=_MOMENT)
    first_seen: str = Field(description="when the event first arrived", json_schema_extra=_MOMENT)
    bytes: int = Field(description="size of its data")
    state: DeadLetterState


class DeadLetterList(Value):
    """Dead letters, in the order in which they failed."""

    dead_letters: list[DeadLetter]
    next: str | None = Field(description="`after` of the next page; null on the last")


class DeadLetterContent(DeadLetter):
    """A dead letter with all that came with it."""

    headers: dict[str, str]
    data: JsonValue = Field(default=None, description="absent if the data is no JSON")
    base64: str | None = Field(default=None, description="the data if it is no JSON; absent otherwise")


class DeadLetterReceipt(Value):
    """What the dead letter's state is now; it survives any crash."""

    id: str
    state: DeadLetterState
    changed: bool = Field(description="false: it was so already")
