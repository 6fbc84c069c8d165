"""Reads a shop's catalogue file, JSON lines or CSV, as rows in contract form; pure, it opens nothing itself."""

from __future__ import annotations

import csv
import difflib
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TextIO

from pydantic_core import from_json

from catalens.domain import Product
from catalens.errors import CatalensError

IMAGE_FIELDS: Final = ("image", "image_url", "image_path")
"""What a file may say in place of `images`: a URL, a `data:` URL or a path, or several."""

FIELDS: Final = (*Product.model_fields, *IMAGE_FIELDS)

# What shops call their columns, compared without case, accents of writing (_, -, space) and order of listing.
_GUESSES: Final[Mapping[str, tuple[str, ...]]] = {
    "product_id": ("product_id", "id", "sku", "handle", "item_id", "uniq_id", "article_number", "artikelnummer", "ref"),
    "name": ("name", "title", "product_name", "product_title", "product_display_name", "nom", "titre", "titel"),
    "description": ("description", "desc", "body_html", "body", "long_description", "beschreibung", "descriptif"),
    "brand": ("brand", "vendor", "manufacturer", "marque", "marke"),
    "category": ("category", "categories", "product_category", "product_type", "categorie", "kategorie"),
    "price": ("price", "variant_price", "regular_price", "unit_price", "prix", "preis"),
    "currency": ("currency", "currency_code", "devise", "währung"),
    "stock": ("stock", "stock_quantity", "quantity", "qty", "variant_inventory_qty", "inventory", "bestand"),
    "image": ("image", "images", "image_url", "image_link", "image_src", "image_path", "picture", "photo", "bild"),
    "group_id": ("group_id", "item_group_id", "parent_id", "parent_sku"),
    "url": ("url", "link", "product_url", "permalink"),
    "locale": ("locale", "language", "lang"),
    "version": ("version",),
    "offer_version": ("offer_version",),
}
_DELIMITERS: Final = (",", ";", "\t", "|")
_CURRENCY: Final = re.compile(r"^([A-Z]{3})(?=[\s\d])|(?<=[\s\d])([A-Z]{3})$")
# A list in one cell: a|b, or URLs with commas between them as WooCommerce writes them.
_LIST: Final = re.compile(r"\s*\|\s*|\s*,\s*(?=https?://)")


class BadCatalogue(CatalensError):
    """Nothing of the file can be imported as it is asked for; the text says what to change."""


@dataclass(frozen=True, slots=True)
class Row:
    """One record of the file: a product as the contract has it, or why it is none.

    `product` may still carry the fields of IMAGE_FIELDS; the service judges everything else.
    """

    line: int
    """Where the record begins, from 1."""
    product: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None

    @property
    def product_id(self) -> str | None:
        """The id, if the record has one."""
        value = self.product.get("product_id")
        return value if isinstance(value, str) else None


def parse_mapping(pairs: Sequence[str]) -> dict[str, str]:
    """Return field → column from `field=column` arguments; raises BadCatalogue naming the one that is wrong."""
    mapping: dict[str, str] = {}
    for pair in pairs:
        target, equals, column = (part.strip() for part in pair.partition("="))
        if not (target and equals and column):
            raise BadCatalogue(f"--map {pair}: write it as field=column, such as name=title")
        if target not in FIELDS and not target.startswith("attributes."):
            raise BadCatalogue(f"--map {pair}: there is no field {target!r}{_did_you_mean(target, FIELDS)}")
        if target in mapping:
            raise BadCatalogue(f"--map {pair}: {target} is already taken from {mapping[target]!r}")
        mapping[target] = column
    return mapping


# --- JSON lines -------------------------------------------------------------------------------------------


def json_rows(lines: Iterable[bytes | None], mapping: Mapping[str, str]) -> Iterator[Row]:
    """Yield a row per line that is not blank; None stands for a line that was too long to be read."""
    for number, line in enumerate(lines, start=1):
        if line is None:
            yield Row(number, problem="the line is too long")
            continue
        text = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip()
        if number == 1 and text.startswith(b"["):
            raise BadCatalogue(
                "this is one JSON array; Catalens reads one product a line: jq -c '.[]' products.json > products.jsonl"
            )
        if text:
            yield _json_row(number, text, mapping)


def _json_row(number: int, text: bytes, mapping: Mapping[str, str]) -> Row:
    try:
        product = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        return Row(number, problem=f"not JSON: {error}")
    if not isinstance(product, dict):
        return Row(number, problem="not a JSON object")
    for target, source in mapping.items():
        if source not in product:
            continue
        value = product.pop(source)
        if target.startswith("attributes."):
            attributes = product.setdefault("attributes", {})
            if not isinstance(attributes, dict):
                return Row(number, product, "attributes: not an object")
            attributes[target.removeprefix("attributes.")] = value
        else:
            product[target] = value
    if isinstance(product.get("product_id"), int):
        product["product_id"] = str(product["product_id"])  # many a catalogue numbers its products
    return Row(number, product)


# --- CSV --------------------------------------------------------------------------------------------------


def csv_rows(file: TextIO, mapping: Mapping[str, str], *, only_mapped: bool = False) -> Iterator[Row]:
    """Yield a row per record of a file with a header line, opened with newline="" and errors="surrogateescape".

    Columns that no field takes become text attributes, unless `only_mapped`.
    """
    first = file.readline().removeprefix("\ufeff")
    if not first.strip():
        raise BadCatalogue("the first line is empty; it must name the columns")
    if "\0" in first or _undecoded(first):
        raise BadCatalogue("this is no text in UTF-8; save the file as CSV UTF-8")
    delimiter = sniff_delimiter(first)
    csv.field_size_limit(32 * 1024 * 1024)
    reader = csv.reader(itertools.chain([first], file), delimiter=delimiter)
    header = [name.strip() for name in next(reader)]
    columns = choose_columns(header, mapping, only_mapped=only_mapped)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Row(line, problem=f"not CSV: {error}")
            continue
        if any(cell.strip() for cell in cells):
            yield _csv_row(line, header, cells, columns, comma_first=delimiter == ";")


def sniff_delimiter(header: str) -> str:
    """Return the delimiter that the header line uses most outside of quotes."""
    bare = re.sub(r'"[^"]*"', "", header)
    return max(_DELIMITERS, key=bare.count)


def choose_columns(header: Sequence[str], mapping: Mapping[str, str], *, only_mapped: bool = False) -> dict[int, str]:
    """Return column → field: what `mapping` says first, then names that are well known, then attributes."""
    chosen: dict[int, str] = {}
    for target, name in mapping.items():
        if name not in header:
            raise BadCatalogue(f"--map {target}={name}: there is no such column{_did_you_mean(name, header)}")
        chosen[header.index(name)] = target
    plain = [_plain(name) for name in header]
    for target, names in _GUESSES.items():
        if target in mapping or (target == "image" and any(name in mapping for name in IMAGE_FIELDS)):
            continue
        free = (plain.index(_plain(name)) for name in names if _plain(name) in plain)
        column = next((index for index in free if index not in chosen), None)
        if column is not None:
            chosen[column] = target
    missing = [target for target in ("product_id", "name") if target not in chosen.values()]
    if missing:
        hints = " ".join(f"--map {target}=COLUMN" for target in missing)
        raise BadCatalogue(f"no column for {' and '.join(missing)}: say which with {hints}. Columns: {_listed(header)}")
    rest = {
        index: name if name.startswith("attributes.") else f"attributes.{name}"
        for index, name in enumerate(header)
        if name and index not in chosen
    }
    if not only_mapped:
        if len(set(rest.values())) > 64:
            raise BadCatalogue(
                f"{len(rest)} columns are no field of a product and a product has at most 64 attributes: "
                "name the useful ones with --map attributes.NAME=COLUMN and add --only-mapped"
            )
        chosen |= rest
    return chosen


def _csv_row(line: int, header: list[str], cells: list[str], columns: Mapping[int, str], *, comma_first: bool) -> Row:
    product: dict[str, Any] = {}
    attributes: dict[str, Any] = {}
    problem: str | None = None
    if any(cell.strip() for cell in cells[len(header) :]):
        problem = f"{len(cells)} cells under {len(header)} columns: is a quote or a delimiter missing?"
    for index, target in columns.items():
        text = cells[index].strip() if index < len(cells) else ""
        if not text:
            continue
        if _undecoded(text):
            problem = problem or f"{header[index]}: not UTF-8; save the file as CSV UTF-8"
            continue
        try:
            if target.startswith("attributes."):
                attributes[target.removeprefix("attributes.")] = _listed_or_single(text)
            else:
                product |= _cell(target, text, comma_first=comma_first)
        except ValueError as error:
            problem = problem or f"{header[index]}: {error}"
    if attributes:
        product["attributes"] = attributes
    return Row(line, product, problem)


def _cell(target: str, text: str, *, comma_first: bool) -> dict[str, Any]:
    match target:
        case "price":
            found = _CURRENCY.search(text)
            price = parse_number(_CURRENCY.sub("", text), comma_first=comma_first)
            return {"price": price} | ({"currency": found[1] or found[2]} if found else {})
        case "currency":
            return {"currency": text.upper()}
        case "stock" | "version" | "offer_version":
            number = parse_number(text, comma_first=comma_first)
            if number != int(number):
                raise ValueError(f"{text!r} is no whole number")
            return {target: int(text) if text.isdigit() else int(number)}
        case "image" | "image_url" | "image_path" | "images":
            return {"image" if target == "images" else target: _listed_or_single(text)}
        case _:
            return {target: text}


def parse_number(text: str, *, comma_first: bool = False) -> float:
    """Return the number in a price cell such as `1 299,00 €`; raises ValueError.

    Where both `.` and `,` occur, the last is the decimal mark. One mark alone before exactly three digits is a
    thousands mark if it is `,` — or if it is `.` and `comma_first`, as in a file with semicolons.
    """
    digits = re.sub(r"[\s\u00a0\u202f'’€$£¥]", "", text)
    mark = max(digits.rfind(","), digits.rfind("."))
    if mark >= 0:
        lone = not ("," in digits and "." in digits)
        several = digits.count(digits[mark]) > 1
        thousands = lone and (several or digits[mark] == ("." if comma_first else ","))
        if thousands and re.fullmatch(r"-?\d{1,3}([.,]\d{3})+", digits):
            digits = re.sub("[.,]", "", digits)
        elif not several:
            digits = re.sub("[.,]", "", digits[:mark]) + "." + digits[mark + 1 :]
    if not re.fullmatch(r"-?(\d+\.?\d*|\.\d+)", digits):
        raise ValueError(f"{text.strip()!r} is no number")
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{text.strip()[:20]!r}… is too large")
    return number


def _listed_or_single(text: str) -> str | list[str]:
    parts = [part for part in _LIST.split(text) if part]
    return parts if len(parts) > 1 else text


def _undecoded(text: str) -> bool:
    return not text.isascii() and any("\udc80" <= letter <= "\udcff" for letter in text)


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).casefold()


def _listed(names: Iterable[str]) -> str:
    return ", ".join(name for name in names if name)


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f". There are: {_listed(known)}"
