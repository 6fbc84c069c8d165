"""What schemathesis can't know from the document: real pictures, NDJSON, and refusals that no schema can foretell."""

from __future__ import annotations

import json
import re
from typing import Any, Final
from urllib.parse import unquote

import schemathesis
from hypothesis import strategies as st
from schemathesis import Case, CheckContext, HookContext, Response
from schemathesis.core.failures import Failure
from schemathesis.openapi.checks import RejectedPositiveData
from tests.pictures import animated_gif, encode, jpeg, plain, rotated_jpeg, scene

BULK: Final = "POST /api/v1/products"
PUT: Final = "PUT /api/v1/products/{product_id}"
NOT_A_PICTURE: Final = frozenset(
    f"urn:catalens:problem:{kind}" for kind in ("empty", "not-a-picture", "truncated", "too-many-pixels")
)

schemathesis.openapi.format(
    "binary",
    st.one_of(
        st.sampled_from(
            [
                jpeg(),
                rotated_jpeg(scene(), 6),
                encode(scene(), "PNG"),
                encode(scene(), "WEBP"),
                animated_gif((0, 0, 0), (255, 255, 255)),
                encode(plain((1, 2, 3), 1, 1), "PNG"),
            ]
        ),
        st.binary(),
    ),
)

_VALUES: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
_PRODUCTS: Final = st.fixed_dictionaries(
    {"product_id": st.from_regex(r"[A-Za-z0-9._:\-]{1,128}", fullmatch=True), "name": st.text(min_size=1)},
    optional=dict.fromkeys(("description", "price", "stock", "images", "attributes", "version", "surprise"), _VALUES),
)
_LINES: Final = st.lists((_PRODUCTS | _VALUES).map(lambda value: json.dumps(value).encode()) | st.binary(), max_size=20)
schemathesis.openapi.media_type("application/x-ndjson", _LINES.map(b"\n".join))


@schemathesis.check
def every_line_is_accounted_for(ctx: CheckContext, response: Response, case: Case[Any]) -> None:
    """A bulk answer counts each line that is not blank, and names the rejected ones."""
    if case.operation.label != BULK or response.status_code != 200 or not isinstance(case.body, bytes):
        return
    tally = response.json()
    sent = [number for number, line in enumerate(case.body.split(b"\n"), start=1) if line.strip()]
    assert tally["accepted"] + tally["rejected"] == len(sent), tally
    assert {error["line"] for error in tally["errors"]} <= set(sent), tally
    assert len(tally["errors"]) == min(tally["rejected"], 100), tally


_EXAMPLE: Final = re.compile(r"(?:like|unlike)\.\d+")
_KEYS: Final[set[str]] = set()


@schemathesis.hook
def before_call(ctx: HookContext, case: Case[Any], kwargs: dict[str, Any]) -> None:
    """Let a valid request be one that is accepted where no schema can ask for it, so that it is exercised.

    Its body names the id of its path, and its Idempotency-Key was not used before.
    """
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return
    if case.operation.label == PUT and isinstance(case.body, dict) and case.body.get("product_id") is not None:
        case.body = {**case.body, "product_id": unquote(case.path_parameters["product_id"])}
    key = case.headers.get("Idempotency-Key")
    if key in _KEYS:
        case.headers["Idempotency-Key"] = f"{len(_KEYS)}-{key}"[:255]
    if key is not None:
        _KEYS.add(case.headers["Idempotency-Key"])


@schemathesis.hook
def filter_failure(ctx: HookContext, failure: Failure, case: Case[Any], response: Response) -> bool:
    """Drop "valid data was rejected" where the answer names a reason that lies outside any schema."""
    return not (isinstance(failure, RejectedPositiveData) and _is_beyond_schemas(response.json()))


def _is_beyond_schemas(problem: dict[str, Any]) -> bool:
    if problem["type"] in NOT_A_PICTURE:  # a schema knows bytes and base64, not what they show
        return True
    if problem["type"] == "urn:catalens:problem:forbidden-url":  # a host that is none, or is not on the public Internet
        return True
    fields = [error["field"] for error in problem.get("errors", ())]
    # a picture to search with that can't be fetched; a reference to a picture that was never uploaded; no such model;
    # a product to be like that does not exist
    return bool(fields) and all(
        field.endswith((".url", ".blob")) or field == "model" or _EXAMPLE.fullmatch(field) for field in fields
    )
