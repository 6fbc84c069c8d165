"""Product events of a usual size (some 600 bytes of JSON, no picture), as many as asked, each unlike the others."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any, Final

from catalens import events
from catalens.domain import DEFAULT_TENANT, Message, Product, assigned_version

_COLOURS: Final = ("black", "white", "navy", "red", "olive", "sand", "grey", "brown", "green", "pink", "blue", "teal")
_MATERIALS: Final = ("cotton", "leather", "linen", "wool", "suede", "denim", "canvas", "silk", "steel", "oak", "nylon")
_THINGS: Final = (
    "trainers",
    "boots",
    "shirt",
    "dress",
    "jacket",
    "trousers",
    "backpack",
    "lamp",
    "chair",
    "mug",
    "belt",
)
_PROSE: Final = """
made for everyday wear with a soft lining and reinforced seams this piece keeps its shape after many washes
breathable lightweight durable design inspired by classic workshops adjustable fit hidden pocket contrast
stitching responsibly sourced material easy to clean comfortable from morning until evening goes well with
almost anything in the collection available in several sizes delivered in recycled packaging two year warranty
"""
_BRANDS: Final = 400
_SHELVES: Final = 60


def product(number: int, version: int | None = None) -> dict[str, Any]:
    """Return product `number` as a catalogue states it; the same number is the same product."""
    draw = Random(number)
    colour, material, thing = draw.choice(_COLOURS), draw.choice(_MATERIALS), draw.choice(_THINGS)
    model = f"{draw.choice('ABCDEFGH')}{number:06d}"
    words = " ".join(draw.choices(_PROSE.split(), k=38))
    stated = {
        "product_id": f"sku-{number}",
        "name": f"{colour.capitalize()} {material} {thing} {model}",
        "description": f"{words.capitalize()}.",
        "brand": f"Brand {number % _BRANDS}",
        "category": f"Catalogue > Group {number % 12} > Shelf {number % _SHELVES}",
        "price": round(draw.uniform(5, 400), 2),
        "currency": "EUR",
        "stock": number % 40,
        "attributes": {"color": colour, "material": material, "size": 36 + number % 12, "sale": number % 5 == 0},
        "group_id": f"model-{number // 4}",
    }
    return stated if version is None else {**stated, "version": version, "offer_version": version}


def messages(numbers: range) -> Iterator[Message]:
    """Return the log's records of these products, as the door would write them."""
    for number in numbers:
        data = Product.model_validate(product(number))
        yield events.encode(events.new_event(events.with_versions(data, assigned_version()), DEFAULT_TENANT))
