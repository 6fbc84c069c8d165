"""The OpenAPI document is valid OpenAPI 3.1 and says what the models and the settings say."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

import pytest
from aiohttp import web
from pydantic import BaseModel, Field, SecretStr
from pydantic_core import to_json
from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR

from catalens.domain import Product, Value
from catalens.openapi import PICTURE, Content, Operation, document
from catalens.settings import ApiKey, HttpSettings, Settings


class Params(Value):
    limit: Annotated[int, Field(ge=1, le=100, description="how many")] = 10
    after: str | None = None


class Form(Value):
    product_id: str
    note: str | None = None
    more: dict[str, str | float | bool | list[str]] = Field(default_factory=dict)


class Answer(BaseModel):
    """What is answered."""

    products: list[Product]


async def handler(request: web.Request) -> web.StreamResponse:
    raise NotImplementedError


def table() -> list[Operation]:
    return [
        Operation(
            "PUT",
            "/api/v1/products/{product_id}",
            handler,
            "put",
            "ingest",
            "ingest",
            params=Params,
            body=Product,
            idempotency_key=True,
            responses={202: Answer},
            problems=(409,),
        ),
        Operation(
            "POST",
            "/api/v1/pictures",
            handler,
            "post",
            "ingest",
            "ingest",
            form=Form,
            pictures=(PICTURE,),
            responses={200: Answer},
        ),
        Operation(
            "POST",
            "/api/v1/pair",
            handler,
            "pair",
            "query",
            "query",
            form=Form,
            pictures=(("image1",), ("image2",)),
            responses={200: Answer},
        ),
        Operation("POST", "/api/v1/form", handler, "form", "ingest", "ingest", form=Form, responses={200: Answer}),
        Operation(
            "POST",
            "/api/v1/lines",
            handler,
            "bulk",
            "ingest",
            "ingest",
            body=Product,
            ndjson=True,
            responses={200: Content("application/x-ndjson", "one a line", Product)},
        ),
        Operation(
            "GET", "/picture", handler, "picture", "query", "query", responses={200: Content("image/*", "its bytes")}
        ),
        Operation(
            "GET", "/page", handler, "page", "page", "public", params=None, responses={200: Content("text/html")}
        ),
        Operation("GET", "/", handler, "page", "page", "public", documented=False),
    ]


def made(**given: Any) -> Any:
    settings = Settings(_env_file=None, **given)
    return json.loads(to_json(document(table(), settings, title="Test")))


def test_document_is_valid_openapi() -> None:
    OPENAPI_31_VALIDATOR.validate(made())
    OPENAPI_31_VALIDATOR.validate(made(api_keys=(ApiKey(name="shop", secret=SecretStr("s" * 16)),)))


def test_validator_can_fail() -> None:
    broken = made()
    broken["paths"]["/api/v1/lines"]["post"]["responses"] = {"nonsense": {}}
    with pytest.raises(ValueError, match="nonsense"):
        OPENAPI_31_VALIDATOR.validate(broken)


def test_every_reference_leads_somewhere() -> None:
    found = made()

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                target: Any = found
                for part in node["$ref"].removeprefix("#/").split("/"):
                    target = target[part]
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(found)


def test_requests_forbid_unknown_fields_and_answers_do_not_promise() -> None:
    schemas = made()["components"]["schemas"]
    assert schemas["ProductInput"]["additionalProperties"] is False
    assert schemas["ImageRefInput"]["additionalProperties"] is False
    assert schemas["ProductInput"]["properties"]["images"]["items"]["$ref"].endswith("/ImageRefInput")
    assert "additionalProperties" not in schemas["Product"]
    assert schemas["ProductInput"]["properties"]["attributes"]["additionalProperties"] is not False


def test_parameters_come_from_path_model_and_key() -> None:
    put = made()["paths"]["/api/v1/products/{product_id}"]["put"]
    found = {one["name"]: one for one in put["parameters"]}
    assert found["product_id"]["in"] == "path"
    assert found["product_id"]["schema"]["maxLength"] == 128
    assert found["limit"]["schema"] == {"type": "integer", "minimum": 1, "maximum": 100, "default": 10}
    assert found["limit"]["description"] == "how many"
    assert found["after"]["schema"] == {"type": "string"}
    assert found["Idempotency-Key"]["in"] == "header"
    assert not any(one["required"] for name, one in found.items() if name != "product_id")


def test_problems_follow_from_the_operation() -> None:
    paths = made()["paths"]
    put, get = paths["/api/v1/products/{product_id}"]["put"], paths["/picture"]["get"]
    assert {"400", "403", "408", "409", "413", "415", "422", "429", "503"} <= put["responses"].keys()
    assert not put["responses"].keys() & {"401", "404"}
    assert get["responses"].keys() == {"200", "403", "422", "429", "503"}  # no parameter is known to it
    assert paths["/page"]["get"]["responses"].keys() == {"200", "403", "429", "503"}


def test_keys_appear_only_where_they_are_needed() -> None:
    open_, keyed = made(), made(api_keys=(ApiKey(name="shop", secret=SecretStr("s" * 16)),))
    assert "securitySchemes" not in open_["components"]
    assert "security" not in open_["paths"]["/picture"]["get"]
    assert set(keyed["components"]["securitySchemes"]) == {"bearer", "key"}
    assert keyed["paths"]["/picture"]["get"]["security"] == [{"bearer": ["query"]}, {"key": ["query"]}]
    assert "401" in keyed["paths"]["/picture"]["get"]["responses"]


def test_forms_name_their_pictures() -> None:
    paths = made()["paths"]
    one = paths["/api/v1/pictures"]["post"]["requestBody"]["content"]
    assert set(one) == {"multipart/form-data"}
    variants = one["multipart/form-data"]["schema"]["oneOf"]
    assert [variant["required"] for variant in variants] == [["product_id", name] for name in PICTURE]
    assert variants[2]["properties"]["image_file"]["format"] == "binary"
    assert variants[2]["properties"].keys() == {"product_id", "note", "more", "image_file"}
    assert variants[2]["additionalProperties"] is False
    pair = paths["/api/v1/pair"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert pair["required"] == ["product_id", "image1", "image2"]
    plain = paths["/api/v1/form"]["post"]["requestBody"]["content"]
    assert set(plain) == {"multipart/form-data", "application/x-www-form-urlencoded"}


def test_objects_in_forms_are_json() -> None:
    plain = made()["paths"]["/api/v1/form"]["post"]["requestBody"]["content"]
    multipart, urlencoded = plain["multipart/form-data"], plain["application/x-www-form-urlencoded"]
    assert multipart["schema"]["properties"]["more"]["type"] == "object"
    assert multipart["encoding"] == {"more": {"contentType": "application/json"}}
    text = urlencoded["schema"]["properties"]["more"]
    assert (text["type"], text["contentMediaType"]) == ("string", "application/json")
    assert text["contentSchema"] == multipart["schema"]["properties"]["more"]
    for value in ({}, {"a": 1}, {"a": -1.5e-3, "b": [], "c": ["x", "y"], "d": True}, {"é😀": 'é😀"\\\n/'}):
        for written in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1)):
            assert re.search(text["pattern"], written), written
    for wrong in ("", "[]", "1", '{"": 1}', '{"a": {}}', '{"a": 01}', '{"a": "\\ud800"}', '{"a": 1,}', '{"a": 1}}'):
        assert not re.search(text["pattern"], wrong), wrong


def test_limits_come_from_the_settings() -> None:
    text = made(http=HttpSettings(max_body=3 * 1024 * 1024, max_wait=7))["info"]["description"]
    assert "request body 3 MiB" in text
    assert "7 s" in text


def test_undocumented_operations_stay_out() -> None:
    assert "/" not in made()["paths"]
