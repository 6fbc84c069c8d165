"""Filters as a storefront writes them: checked key by key, and translated for the index."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final, get_args

from catalens.domain import MAX_VERSION, Condition, Filter, ImageStatus, Range, Scalar, category_prefixes
from catalens.problems import invalid

ATTRIBUTE: Final = "attributes."
TAG: Final = "tags."
_LONGEST: Final = 4096
_MOST_VALUES: Final = 1000
"""Values of one key; keeps the index's request small."""
_MOST_KEYS: Final = 64
_BOUNDS: Final = ("gte", "lte", "gt", "lt")


class _Wrong(ValueError):
    """What is wrong with one key's value."""


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise _Wrong("must be a string or a list of strings")
    if len(value) > _LONGEST:
        raise _Wrong(f"must have at most {_LONGEST} characters")
    return value


def _category(value: object) -> str:
    path = _text(value)
    return next(reversed(category_prefixes(path)), path)


def _status(value: object) -> str:
    if value not in get_args(ImageStatus):
        raise _Wrong(f"must be one of {', '.join(get_args(ImageStatus))}, or a list of them")
    return _text(value)


def _number(value: object) -> float:
    # bool is an int to Python, not to JSON
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Wrong("must be a number, a list of numbers or an object with gte, lte, gt or lt")
    if isinstance(value, int) and abs(value) <= MAX_VERSION:
        return value
    try:
        value = float(value)  # an integer beyond 64 bits too: the index knows none
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise _Wrong("must be a finite number")
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise _Wrong("must be true or false, or a list of them")
    return value


def _scalar(value: object) -> Scalar:
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int | float):
        return _number(value)
    raise _Wrong("must be a string, a number, true or false, a list of these, or an object with gte, lte, gt or lt")


_CHECKS: Final[Mapping[str, Callable[[object], Scalar]]] = {
    "product_id": _text,
    "brand": _text,
    "category": _category,
    "price": _number,
    "currency": _text,
    "stock": _number,
    "in_stock": _flag,
    "group_id": _text,
    "locale": _text,
    "image_status": _status,
}
_RANGED: Final = ("price", "stock")


def translate(raw: Mapping[str, object]) -> Filter:
    """Return the index's filter: keys are AND, the values of one key OR.

    Raises Problem (422) that names every key that is unknown or whose value has the wrong type.
    """
    if len(raw) > _MOST_KEYS:
        raise invalid(("filters", f"must have at most {_MOST_KEYS} keys"))
    conditions, errors = [], []
    for key, value in raw.items():
        try:
            conditions.append(_condition(key, value))
        except _Wrong as wrong:
            errors.append((f"filters.{key[:200]}", str(wrong)))
    if errors:
        raise invalid(*errors)
    return Filter(conditions=tuple(conditions))


def _condition(key: str, value: object) -> Condition:
    check = _CHECKS.get(key)
    if check is None:
        if key in (ATTRIBUTE, TAG) or not key.startswith((ATTRIBUTE, TAG)):
            raise _Wrong(f"unknown filter; known are {', '.join(_CHECKS)}, {ATTRIBUTE}NAME and {TAG}NAME")
        check = _scalar if key.startswith(ATTRIBUTE) else _text
    if isinstance(value, dict) and (key in _RANGED or check is _scalar):
        return Condition(key, within=_range(value))
    values = value if isinstance(value, list) else [value]
    if not 0 < len(values) <= _MOST_VALUES:
        raise _Wrong(f"must have 1 to {_MOST_VALUES} values")
    return Condition(key, any_of=tuple(check(one) for one in values))


def _range(bounds: Mapping[str, object]) -> Range:
    unknown = [name for name in bounds if name not in _BOUNDS]
    if unknown or not bounds:
        raise _Wrong("a range has one or more of gte, lte, gt, lt and nothing else")
    return Range(**{name: _number(bound) for name, bound in bounds.items()})


def _schema(one: dict[str, Any], *, ranged: bool = False) -> dict[str, Any]:
    choices = [one, {"type": "array", "items": one, "minItems": 1, "maxItems": _MOST_VALUES}]
    number = {"type": "number"}
    if ranged:
        choices.append(
            {
                "type": "object",
                "properties": dict.fromkeys(_BOUNDS, number),
                "additionalProperties": False,
                "minProperties": 1,
            }
        )
    return {"anyOf": choices}


_TEXT_SCHEMA: Final = {"type": "string", "maxLength": _LONGEST}
_NUMBER_SCHEMA: Final = {"type": "number"}
SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "description": "Keys are AND, the values of one key are OR; `category` matches the path and everything below it.",
    "properties": {
        **{key: _schema(_TEXT_SCHEMA) for key, check in _CHECKS.items() if check in (_text, _category)},
        "price": _schema(_NUMBER_SCHEMA, ranged=True),
        "stock": _schema(_NUMBER_SCHEMA, ranged=True),
        "in_stock": _schema({"type": "boolean"}),
        "image_status": _schema({"type": "string", "enum": list(get_args(ImageStatus))}),
    },
    "patternProperties": {
        r"^attributes\..+": _schema({"type": ["string", "number", "boolean"], "maxLength": _LONGEST}, ranged=True),
        r"^tags\..+": _schema(_TEXT_SCHEMA),
    },
    "additionalProperties": False,
    "maxProperties": _MOST_KEYS,
    "examples": [{"brand": ["Nike"], "price": {"gte": 20, "lte": 80}, "attributes.color": "red"}],
}
"""The JSON schema of what `translate` takes."""
