"""The table of HTTP operations, and the OpenAPI 3.1 document that is generated from it and from the models."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from itertools import product
from typing import Any, Final, Literal, TypeAlias

from aiohttp import web
from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import models_json_schema

from catalens.domain import ProductId
from catalens.settings import MIB, Settings

Json: TypeAlias = dict[str, Any]
Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]

PICTURE: Final = ("file", "image", "image_file")
"""The names that a multipart part with the one picture of a call may have."""
IDEMPOTENCY_KEY: Final = r"^[\x21-\x7e]{1,255}$"
_PATH_SCHEMAS: Final[Mapping[str, Json]] = {
    "product_id": TypeAdapter(ProductId).json_schema(),
    "letter_id": {"type": "string", "pattern": "^[0-9]{1,18}-[0-9]{1,18}$", "example": "0-17"},
}
_REF: Final = "#/components/schemas/"
_BLANK: Final = r"[ \t\n\r]*"
_HEX: Final = "[0-9a-fA-F]"
_CHARACTER: Final = (
    r'(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]'
    rf"|\\u(?:[0-9a-cA-CefEF]{_HEX}{{3}}|[dD][0-7]{_HEX}{{2}}|[dD][89abAB]{_HEX}{{2}}\\u[dD][c-fC-F]{_HEX}{{2}}))"
)
_STRING: Final = f'"{_CHARACTER}*"'
_LIST: Final = rf"\[{_BLANK}(?:{_STRING}(?:{_BLANK},{_BLANK}{_STRING})*)?{_BLANK}\]"
_NUMBER: Final = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,2})?"
_PAIR: Final = f'"{_CHARACTER}+"{_BLANK}:{_BLANK}(?:{_STRING}|{_NUMBER}|true|false|{_LIST})'
_FLAT_OBJECT: Final = rf"^{_BLANK}\{{{_BLANK}(?:{_PAIR}(?:{_BLANK},{_BLANK}{_PAIR})*)?{_BLANK}\}}{_BLANK}$"
"""A JSON object of texts, numbers, booleans and lists of texts: text that `contentSchema` only annotates."""


@dataclass(frozen=True, slots=True)
class Content:
    """A body that is not one JSON object of a model, or that has a description of its own."""

    media_type: str
    description: str = ""
    model: type[BaseModel] | None = None
    """Schema of the body, or of one line of NDJSON; None is any bytes or text."""


Answer: TypeAlias = type[BaseModel] | Content


class NoParams(BaseModel):
    """A query string with nothing in it."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One row of the contract: what is called, by whom, what it takes and what it answers."""

    method: str
    path: str
    """With its parameters in braces: /api/v1/products/{product_id}"""
    handler: Handler
    summary: str
    tag: str
    access: Literal["public", "keyed", "ingest", "query", "admin"]
    """The scope that the API key must have; public needs no key, keyed any."""
    description: str = ""
    params: type[BaseModel] | None = NoParams
    """The query string, for read_params; None: a page's, which may be anything."""
    body: type[BaseModel] | None = None
    """JSON, for read_json."""
    form: type[BaseModel] | None = None
    """The text fields of a multipart or urlencoded form, for read_form."""
    pictures: tuple[tuple[str, ...], ...] = ()
    """Pictures that the form must carry, each with the part names it may have; such a form is multipart only."""
    ndjson: bool = False
    """The body is NDJSON; `body`, if given, is the model of one line."""
    idempotency_key: bool = False
    responses: Mapping[int, Answer | tuple[Answer, ...]] = field(default_factory=dict)
    """Several answers to one status have different media types; no answer at all is one without a body."""
    problems: tuple[int, ...] = ()
    """Problem statuses beyond those that follow from the rest of the row."""
    documented: bool = True

    @property
    def takes_body(self) -> bool:
        """True when the call has a request body."""
        return self.body is not None or self.form is not None or self.ndjson


class FieldProblem(BaseModel):
    """What is wrong with one field."""

    field: str
    """Path of the field, joined with dots: images.0.url"""
    message: str


class ProblemDetails(BaseModel):
    """Problem details (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str
    errors: list[FieldProblem] | None = None


_PROBLEM_TEXT: Final[Mapping[int, str]] = {
    400: "Malformed: broken or too deeply nested JSON, NaN, wrong encoding, a broken form",
    401: "An API key is needed and none, or an unknown one, was sent",
    403: "Not from here: another site's page, or a foreign Host on a service without API keys; or not with this key, "
    "whose scopes or tenant do not reach so far",
    404: "Does not exist",
    408: "The body came too slowly",
    409: "The Idempotency-Key was used with another request, or the state of things forbids this one",
    413: "Too large",
    415: "The content type is not the one of this call, or the picture is not a picture",
    422: "An invalid value; `errors` names the fields",
    429: "Too many requests at once, or more than this key may make; see Retry-After",
    501: "This process was started without the half of the model that this takes",
    503: "An engine is away or the disk is full; see Retry-After",
}


def problem_statuses(operation: Operation, *, keyed: bool) -> tuple[int, ...]:
    """Return every problem status that `operation` may answer."""
    statuses = {*operation.problems, 403, 429, 503}
    if keyed and operation.access != "public":
        statuses.add(401)
    if operation.takes_body:
        statuses |= {400, 408, 413, 415, 422}
    if operation.params is not None or "{" in operation.path or operation.idempotency_key:
        statuses.add(422)
    return tuple(sorted(statuses))


def document(operations: Iterable[Operation], settings: Settings, *, title: str) -> Json:
    """Return the OpenAPI 3.1 document of `operations`: what the service answers, and nothing that it does not."""
    shown = [operation for operation in operations if operation.documented]
    schemas = _Schemas(shown)
    paths: Json = {}
    for operation in shown:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, settings, schemas)
    components: Json = {
        "schemas": schemas.components,
        "responses": {str(status): _problem(status) for status in sorted(_PROBLEM_TEXT)},
        "headers": {
            "X-Request-Id": {
                "description": "The request's id: yours if you sent a sane one, else a new one",
                "schema": {"type": "string"},
            },
            "Retry-After": {"description": "Seconds to wait before another try", "schema": {"type": "integer"}},
        },
    }
    if settings.keyed:
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": title,
            "version": importlib.metadata.version("catalens"),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            "description": _introduction(settings),
        },
        "tags": [{"name": tag} for tag in dict.fromkeys(operation.tag for operation in shown)],
        "paths": paths,
        "components": components,
    }


def _introduction(settings: Settings) -> str:
    http, pictures = settings.http, settings.pictures
    return "\n".join(
        (
            "Product search by picture, by words and by both.",
            "",
            "Errors are problem details (RFC 9457). Unknown fields and unknown or repeated query parameters are",
            "refused (422). Query parameters that are numbers or booleans are written as in JSON.",
            "Every answer has an `X-Request-Id`; send your own to find a request again in the logs.",
            "",
            "Limits of this service:",
            f"- request body {_size(http.max_body)}, one NDJSON line {_size(http.max_line)}; "
            f"a body must arrive within {http.body_timeout:g} s",
            f"- picture {_size(pictures.max_bytes)} and {pictures.max_pixels:,} pixels",
            f"- {http.max_batch} requests in one batch call, {http.max_concurrent} requests at once, "
            f"waiting {http.max_wait:g} s at most",
        )
    )


def _size(count: int) -> str:
    return f"{count // MIB} MiB" if count % MIB == 0 else f"{count:,} bytes"


def _operation(operation: Operation, settings: Settings, schemas: _Schemas) -> Json:
    keyed = settings.keyed
    parameters = _parameters(operation)
    found: Json = {
        "operationId": _operation_id(operation),
        "summary": operation.summary,
        "tags": [operation.tag],
        "responses": {
            **{str(status): _response(status, what, schemas) for status, what in operation.responses.items()},
            **{
                str(status): {"$ref": f"#/components/responses/{status}"}
                for status in problem_statuses(operation, keyed=keyed)
            },
        },
    }
    if operation.description:
        found["description"] = operation.description
    if parameters:
        found["parameters"] = parameters
    if operation.takes_body:
        content = _request_content(operation, schemas)
        found["requestBody"] = {"required": not operation.ndjson, "content": content}
    if keyed and operation.access != "public":
        scopes = [] if operation.access == "keyed" else [operation.access]
        found["security"] = [{"bearer": scopes}, {"key": scopes}]
    return found


def _operation_id(operation: Operation) -> str:
    words = re.findall(r"[A-Za-z0-9]+", operation.path.removeprefix("/api/v1"))
    return "_".join((operation.method.lower(), *words)).replace("-", "_")


def _parameters(operation: Operation) -> list[Json]:
    found: list[Json] = []
    for name in re.findall(r"{(\w+)}", operation.path):
        schema = _PATH_SCHEMAS.get(name, {"type": "string"})
        found.append({"name": name, "in": "path", "required": True, "schema": schema})
    if operation.params is not None:
        schema = operation.params.model_json_schema(ref_template=_REF + "{model}")
        required = schema.get("required", [])
        found.extend(
            {
                "name": name,
                "in": "query",
                "required": name in required,
                **({"description": one["description"]} if "description" in one else {}),
                "schema": {key: value for key, value in _without_null(one).items() if key != "description"},
            }
            for name, one in schema.get("properties", {}).items()
        )
    if operation.idempotency_key:
        found.append(
            {
                "name": "Idempotency-Key",
                "in": "header",
                "required": False,
                "description": "Makes a retry safe for 24 h; the same key with another request is 409",
                "schema": {"type": "string", "pattern": IDEMPOTENCY_KEY},
            }
        )
    return found


def _without_null(schema: Json) -> Json:
    """A query parameter or a form's field is there or not; it has no null."""
    found = {key: value for key, value in schema.items() if key not in ("title", "anyOf")}
    if found.get("default", ...) is None:
        del found["default"]
    choices = [choice for choice in schema.get("anyOf", ()) if choice != {"type": "null"}]
    if len(choices) == 1:
        return {**choices[0], **found}
    return {**found, "anyOf": choices} if choices else found


def _request_content(operation: Operation, schemas: _Schemas) -> Json:
    if operation.ndjson:
        text = "NDJSON: one JSON object a line, in UTF-8."
        if operation.body is not None:
            text += f" Each line is a {operation.body.__name__}; a line that is none is reported and skipped."
        return {"application/x-ndjson": {"schema": {"description": text}}}
    content: Json = {}
    if operation.body is not None:
        content["application/json"] = {"schema": schemas.request(operation.body)}
    if operation.form is not None:
        form = schemas.form(operation.form)
        objects = [name for name, one in form["properties"].items() if one.get("type") == "object"]
        if not operation.pictures:
            content["application/x-www-form-urlencoded"] = {"schema": _objects_as_text(form, objects)}
        multipart: Json = {"schema": _with_pictures(form, operation.pictures)}
        if objects:
            multipart["encoding"] = {name: {"contentType": "application/json"} for name in objects}
        content["multipart/form-data"] = multipart
    return content


def _objects_as_text(form: Json, objects: Iterable[str]) -> Json:
    """Return the form as it is urlencoded, where every field is text."""
    properties = form["properties"]
    written = {
        name: {
            "type": "string",
            "description": properties[name].get("description", ""),
            "contentMediaType": "application/json",
            "contentSchema": properties[name],
            "pattern": _FLAT_OBJECT,
        }
        for name in objects
    }
    return {**form, "properties": {**properties, **written}}


def _with_pictures(form: Json, pictures: tuple[tuple[str, ...], ...]) -> Json:
    """Return the form with one part for each picture, in every way that these parts may be named."""
    if not pictures:
        return form
    binary: Json = {"type": "string", "format": "binary", "contentMediaType": "image/*"}
    variants = [
        {
            **form,
            "properties": {**form["properties"], **dict.fromkeys(names, binary)},
            "required": [*form.get("required", ()), *names],
        }
        for names in product(*pictures)
    ]
    return variants[0] if len(variants) == 1 else {"oneOf": variants}


def _answers(what: Answer | tuple[Answer, ...]) -> tuple[Answer, ...]:
    return what if isinstance(what, tuple) else (what,)


def _response(status: int, what: Answer | tuple[Answer, ...], schemas: _Schemas) -> Json:
    headers = {"X-Request-Id": {"$ref": "#/components/headers/X-Request-Id"}}
    descriptions: list[str] = []
    content: Json = {}
    for one in _answers(what):
        if isinstance(one, Content):
            schema = schemas.response(one.model) if one.model is not None else {}
            if one.media_type == "application/x-ndjson":
                schema = {"type": "string"}
            content[one.media_type] = {"schema": schema}
            descriptions.append(one.description)
        else:
            content["application/json"] = {"schema": schemas.response(one)}
            descriptions.append((one.__doc__ or "").strip().partition("\n")[0])
    description = " ".join(filter(None, descriptions)) or HTTPStatus(status).phrase
    return {"description": description, "headers": headers, **({"content": content} if content else {})}


def _problem(status: int) -> Json:
    headers = {"X-Request-Id": {"$ref": "#/components/headers/X-Request-Id"}}
    if status in (429, 503):
        headers["Retry-After"] = {"$ref": "#/components/headers/Retry-After"}
    if status == 401:
        headers["WWW-Authenticate"] = {"schema": {"type": "string"}}  # type: ignore[dict-item]  # an inline header
    return {
        "description": _PROBLEM_TEXT[status],
        "headers": headers,
        "content": {"application/problem+json": {"schema": {"$ref": _REF + "ProblemDetails"}}},
    }


class _Schemas:
    """Component schemas: requests forbid unknown fields, answers do not promise their absence.

    A model that is used on both sides and would read differently is named …Input on the request side.
    """

    def __init__(self, operations: Iterable[Operation]) -> None:
        taken: list[type[BaseModel]] = []
        given: list[type[BaseModel]] = [ProblemDetails]
        forms: dict[type[BaseModel], None] = {}  # a set in order
        for operation in operations:
            taken += [model for model in (operation.body, operation.form) if model is not None]
            if operation.form is not None:
                forms[operation.form] = None
            for what in operation.responses.values():
                models = [one.model if isinstance(one, Content) else one for one in _answers(what)]
                given += [model for model in models if model is not None]
        self._given, answers = _generate(given, "serialization")
        self._taken, requests = _generate(taken, "validation")
        requests = {name: _closed(schema) for name, schema in requests.items()}
        renamed = {name: f"{name}Input" for name in requests if name in answers and requests[name] != answers[name]}
        self._taken = {model: renamed.get(name, name) for model, name in self._taken.items()}
        self.components: Json = dict(answers)
        for name, schema in requests.items():
            self.components[renamed.get(name, name)] = _renamed(schema, renamed)
        self._forms = {model: _form(self.components.pop(self._taken[model])) for model in forms}

    def request(self, model: type[BaseModel]) -> Json:
        """Return a reference to the schema of `model` as a request."""
        return {"$ref": _REF + self._taken[model]}

    def response(self, model: type[BaseModel]) -> Json:
        """Return a reference to the schema of `model` as an answer."""
        return {"$ref": _REF + self._given[model]}

    def form(self, model: type[BaseModel]) -> Json:
        """Return the schema of `model` as a form, whose fields are there or not: they have no null."""
        return self._forms[model]


def _generate(
    models: Iterable[type[BaseModel]], mode: Literal["validation", "serialization"]
) -> tuple[dict[type[BaseModel], str], Json]:
    wanted = [(model, mode) for model in dict.fromkeys(models)]
    references, top = models_json_schema(wanted, ref_template=_REF + "{model}")
    names = {model: str(references[model, mode]["$ref"]).removeprefix(_REF) for model, _ in wanted}
    return names, dict(top.get("$defs", {}))


def _form(schema: Json) -> Json:
    fields = schema.get("properties", {})
    return {**schema, "properties": {name: _without_null(one) for name, one in fields.items()}}


def _closed(schema: Any) -> Any:
    """Say that objects with named properties take no others, as read_json does."""
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if closed.get("type") == "object" and "properties" in closed:
        closed.setdefault("additionalProperties", False)
    return closed


def _renamed(schema: Any, names: Mapping[str, str]) -> Any:
    if isinstance(schema, list):
        return [_renamed(one, names) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _renamed(value, names) for key, value in schema.items()}
    reference = found.get("$ref")
    if isinstance(reference, str):
        name = reference.removeprefix(_REF)
        found["$ref"] = _REF + names.get(name, name)
    return found
