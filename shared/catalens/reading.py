"""Reading requests: every body, form and query string becomes a valid model, or a Problem that says why not."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar, get_args, get_origin
from urllib.parse import parse_qsl

import aiohttp
from aiohttp import hdrs, web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.multipart import parse_content_disposition
from multidict import CIMultiDict
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, from_json

from catalens.domain import ProductId
from catalens.openapi import IDEMPOTENCY_KEY, PICTURE
from catalens.problems import Problem, invalid
from catalens.settings import Settings

M = TypeVar("M", bound=BaseModel)

SETTINGS: Final = web.AppKey("settings", Settings)
_IN_THREAD: Final = 256 * 1024
"""Bodies from this many bytes on are parsed in a thread."""
_MAX_ERRORS: Final = 50
_MAX_PARTS: Final = 128
_MESSAGES: Final = {
    "extra_forbidden": "is unknown here",
    "missing": "is required",
    "model_type": "should be a JSON object",
    "dict_type": "should be a JSON object",
    "list_type": "should be a JSON array",
    "tuple_type": "should be a JSON array",
}
_SANE_KEY: Final = re.compile(IDEMPOTENCY_KEY)
_PRODUCT_ID: Final[TypeAdapter[str]] = TypeAdapter(ProductId)


async def read_json(request: web.Request, model: type[M]) -> M:
    """Return the JSON body as `model`, strictly and with nothing unknown in it; raises Problem."""
    if hdrs.CONTENT_TYPE in request.headers and not _is_json(request.content_type):
        raise Problem(415, f"send the body as application/json, not {request.content_type}")
    body = await read_body(request)
    if len(body) < _IN_THREAD:
        return validated(model, parse_json(body))
    return await asyncio.to_thread(lambda: validated(model, parse_json(body)))


def _is_json(content_type: str) -> bool:
    return content_type == "application/json" or content_type.endswith("+json")


def parse_json(body: bytes) -> Any:
    """Return the JSON value in `body`; Problem 400 if it is broken, not UTF-8, too deep or has NaN in it."""
    if not body.strip():
        raise Problem(400, "the body is empty, JSON is expected")
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise Problem(400, f"not JSON: {error}") from error


def validated(model: type[M], value: object, *, prefix: str = "") -> M:
    """Return `value` as `model`; Problem 422 that names each wrong, missing or unknown field."""
    try:
        return model.model_validate(value, extra="forbid")
    except ValidationError as error:
        errors = _fields(error.errors(include_url=False, include_input=False, include_context=False), value, prefix)
        raise invalid(*errors) from error


def _fields(errors: Iterable[ErrorDetails], value: object, prefix: str) -> list[tuple[str, str]]:
    """Fold pydantic's errors to one a field: the branches of a union are one field's alternatives."""
    found: dict[str, list[str]] = {}
    for error in errors:
        name = _path(error, value, prefix)
        message = _MESSAGES.get(error["type"]) or error["msg"].removeprefix("Value error, ")
        found.setdefault(name, []).append(message)
    return [(name, "; ".join(dict.fromkeys(messages))) for name, messages in list(found.items())[:_MAX_ERRORS]]


def _path(error: ErrorDetails, value: Any, prefix: str) -> str:
    """Join the location's parts that lead into `value`: what does not is a branch of a union."""
    parts = [prefix] if prefix else []
    for part in error["loc"]:
        if _holds(value, part):
            value = value[part]
        elif not (isinstance(value, dict) and error["type"] == "missing"):
            break
        parts.append(str(part)[:200])
    return ".".join(parts)


def _holds(value: object, part: int | str) -> bool:
    if isinstance(value, dict):
        return part in value
    return isinstance(value, list) and isinstance(part, int) and part < len(value)


def read_params(request: web.Request, model: type[M]) -> M:
    """Return the query string as `model`; unknown and repeated parameters are a Problem 422.

    Numbers and booleans are written as in JSON.
    """
    return validated(model, _literals(request.query.items(), model, "parameter"))


def _literals(items: Iterable[tuple[str, str]], model: type[BaseModel], what: str) -> dict[str, object]:
    """Return text pairs as the JSON values that `model` expects."""
    found: dict[str, object] = {}
    for name, text in items:
        if name in found:
            raise invalid((name, f"the {what} is given more than once"))
        info = model.model_fields.get(name)
        if info is None:
            found[name] = text
        elif _takes_object(info.annotation):
            found[name] = _object(name, text)
        else:
            found[name] = text if _takes_text(info.annotation) else _literal(text)
    return found


def _takes_object(annotation: object) -> bool:
    return get_origin(annotation) is dict


def _object(name: str, text: str) -> object:
    try:
        return parse_json(text.encode())
    except Problem as problem:
        raise invalid((name, problem.detail)) from problem


def _takes_text(annotation: object) -> bool:
    return annotation is str or any(_takes_text(one) or isinstance(one, str) for one in get_args(annotation))


def _literal(text: str) -> object:
    try:
        value = from_json(text.encode(), allow_inf_nan=False)
    except ValueError:
        return text
    return value if isinstance(value, bool | int | float) else text


def read_product_id(request: web.Request) -> str:
    """Return the product id of the path; Problem 422 if it is none."""
    try:
        return _PRODUCT_ID.validate_python(request.match_info["product_id"], strict=True)
    except ValidationError as error:
        raise invalid(("product_id", error.errors()[0]["msg"])) from error


def read_idempotency_key(request: web.Request) -> str | None:
    """Return the Idempotency-Key, if one is sent; Problem 422 if it is not 1–255 visible ASCII characters."""
    key = request.headers.get("Idempotency-Key")
    if key is not None and not _SANE_KEY.fullmatch(key):
        raise invalid(("Idempotency-Key", "1 to 255 visible ASCII characters"))
    return key


async def read_body(request: web.Request) -> bytes:
    """Return the whole body; Problem 413 when it is too large, 408 when it is too slow, 400 when it is broken."""
    limits = request.app[SETTINGS].http
    too_large = Problem(413, f"the body is larger than {limits.max_body:,} bytes")
    if (request.content_length or 0) > limits.max_body:
        raise too_large
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limits.body_timeout):
            async for chunk in request.content.iter_any():
                size += len(chunk)
                if size > limits.max_body:
                    raise too_large
                chunks.append(chunk)
    except TimeoutError as error:
        raise Problem(408, f"the body took longer than {limits.body_timeout:g} s", headers=_CLOSE) from error
    except BROKEN_BODY as error:
        raise Problem(400, "the body is broken: wrong length, chunks or compression", headers=_CLOSE) from error
    return b"".join(chunks)


_CLOSE: Final[Mapping[str, str]] = {hdrs.CONNECTION: "close"}
BROKEN_BODY: Final = (aiohttp.ClientError, HttpProcessingError, web.RequestPayloadError, ConnectionError)
"""What reading a body raises when the client or the connection broke it."""


@dataclass(frozen=True, slots=True)
class Form:
    """What a form carried: text fields, and the bytes of each part that is a file."""

    fields: Mapping[str, str] = field(default_factory=dict)
    pictures: Mapping[str, bytes] = field(default_factory=dict)

    def values(self, model: type[M], *, pictures: Iterable[str] = ()) -> M:
        """Return the text fields as `model`: numbers, booleans and objects written as in JSON; Problem 422.

        A file in a part that is not one of `pictures` is refused as well.
        """
        for name in self.pictures:
            if name not in pictures:
                raise invalid((name, "no file is expected in this part"))
        return validated(model, _literals(self.fields.items(), model, "field"))

    def picture(self, names: Sequence[str] = PICTURE) -> bytes:
        """Return the one picture among the parts `names`; Problem 422 if there is none or more than one."""
        found = [name for name in names if name in self.pictures]
        if len(found) != 1:
            given = "more than one is given" if found else "it is missing"
            raise invalid((names[0], f"one picture is expected in a part named {' or '.join(names)}; {given}"))
        return self.pictures[found[0]]


async def read_form(request: web.Request) -> Form:
    """Return the urlencoded or multipart form in the body; Problem 400, 413, 415 or 422 (a name given twice).

    A multipart part with a file name, a binary content type or the name of a picture is a picture.
    """
    content_type = request.content_type
    if content_type == "application/x-www-form-urlencoded":
        return Form(fields=_unique(_urlencoded(await read_body(request))))
    if content_type != "multipart/form-data":
        raise Problem(415, "send the form as multipart/form-data or application/x-www-form-urlencoded")
    boundary = _boundary(request.headers[hdrs.CONTENT_TYPE])
    body = await read_body(request)
    if len(body) < _IN_THREAD:
        return _multipart(body, boundary)
    return await asyncio.to_thread(_multipart, body, boundary)


def _urlencoded(body: bytes) -> list[tuple[str, str]]:
    try:
        return parse_qsl(body.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=_MAX_PARTS)
    except ValueError as error:
        raise Problem(400, "the form is not urlencoded UTF-8, or has too many fields") from error


def _unique(items: Iterable[tuple[str, str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, text in items:
        if name in found:
            raise invalid((name, "the field is given more than once"))
        found[name] = text
    return found


def _boundary(content_type: str) -> bytes:
    kind = aiohttp.helpers.parse_mimetype(content_type)
    boundary = kind.parameters.get("boundary", "")
    if not 1 <= len(boundary) <= 70 or not boundary.isascii():
        raise Problem(400, "the multipart content type has no valid boundary")
    return b"--" + boundary.encode()


def _multipart(body: bytes, boundary: bytes) -> Form:
    """Split a form-data body (RFC 7578) that is held in memory: parts carry no transfer encoding there."""
    sections = (b"\r\n" + body).split(b"\r\n" + boundary)
    if len(sections) < 2 or not sections[-1].startswith(b"--"):
        raise Problem(400, "the multipart body is cut or does not use its boundary")
    if len(sections) - 2 > _MAX_PARTS:
        raise Problem(400, f"the form has more than {_MAX_PARTS} parts")
    fields: list[tuple[str, str]] = []
    pictures: dict[str, bytes] = {}
    for section in sections[1:-1]:
        name, is_picture, content = _part(section)
        if is_picture and name in pictures:
            raise invalid((name, "the part is given more than once"))
        if is_picture:
            pictures[name] = content
            continue
        try:
            fields.append((name, content.decode()))
        except UnicodeDecodeError as error:
            raise Problem(400, f"the field {name} is not UTF-8") from error
    return Form(fields=_unique(fields), pictures=pictures)


def _part(section: bytes) -> tuple[str, bool, bytes]:
    head, blank, content = section.partition(b"\r\n\r\n")
    headers: CIMultiDict[str] = CIMultiDict()
    for line in head.split(b"\r\n")[1:]:
        key, _, text = line.partition(b":")
        headers[key.decode("utf-8", "replace").strip()] = text.decode("utf-8", "replace").strip()
    kind, parameters = parse_content_disposition(headers.get(hdrs.CONTENT_DISPOSITION))
    name = parameters.get("name")
    if not blank or kind != "form-data" or not name:
        raise Problem(400, "a part of the form has no name")
    content_type = headers.get(hdrs.CONTENT_TYPE, "text/plain").lower()
    is_text = content_type.startswith("text/plain") or _is_json(content_type.partition(";")[0].strip())
    has_file_name = "filename" in parameters or "filename*" in parameters
    return name, has_file_name or not is_text or name in PICTURE, content
