"""Turns public evaluation sets, in the folders that they are published as, into products and judged queries."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from catalens.errors import CatalensError

_MAX_PICTURES: Final = 16
_GAINS: Final[Mapping[str, float]] = {
    "E": 1.0, "S": 0.1, "C": 0.01, "I": 0.0,
    "Exact": 1.0, "Substitute": 0.1, "Complement": 0.01, "Irrelevant": 0.0,
}  # fmt: skip
"""What the makers of ESCI give to their labels."""
_LANGUAGES: Final[Mapping[str, str]] = {"us": "en", "es": "es", "jp": "ja"}
_SPLITS: Final[Mapping[str, str]] = {
    "query_0_product_id_0": "in domain",
    "query_1_product_id_0": "novel query",
    "query_0_product_id_1": "novel document",
    "query_1_product_id_1": "zero shot",
}
_PICTURE_KINDS: Final = (".jpg", ".jpeg", ".png", ".webp")


@dataclass
class Converted:
    """Products in the form that `catalens import` takes, and queries in the form that `catalens eval` takes."""

    products: dict[str, dict[str, Any]] = field(default_factory=dict)
    queries: list[dict[str, Any]] = field(default_factory=list)


def convert(layout: str, folder: Path) -> Converted:
    """Return what is in `folder`, which has that layout; raises CatalensError saying what is not as it should be."""
    found = LAYOUTS[layout](folder)
    if not found.products or not found.queries:
        raise CatalensError(f"{folder}: {len(found.products)} products and {len(found.queries)} queries in it")
    return found


def marqo_gs(folder: Path) -> Converted:
    """Marqo-GS-10M: `query_Q_product_id_P.csv` with query, product_id, position, title, image_local, score_linear."""
    files = sorted(folder.glob("query_*_product_id_*.csv"))
    if not files:
        raise CatalensError(f"{folder}: no query_*_product_id_*.csv in it")
    found = Converted()
    for file in files:
        judged: defaultdict[str, dict[str, float]] = defaultdict(dict)
        for row in _csv(file, ("query", "product_id", "position", "title")):
            product_id = _id(row["product_id"])
            # The place in the shop's own list, 1 to 100; score_linear says the same the other way round.
            score, position = row.get("score_linear"), row["position"]
            try:
                gain = float(score) if score else max(0.0, 101 - float(position))
            except ValueError as error:
                raise CatalensError(
                    f"{file}: no number in score_linear or position: {score!r}, {position!r}"
                ) from error
            judged[row["query"]][product_id] = gain
            picture = row.get("image_local") or row.get("image") or row.get("image_url")
            found.products[product_id] = _product(product_id, row["title"], _placed(folder, picture))
        kind = _SPLITS.get(file.stem, file.stem)
        found.queries += [
            {"query": query, "language": "en", "kind": kind, "relevant": gains} for query, gains in judged.items()
        ]
    return found


def fashion200k(folder: Path) -> Converted:
    """Fashion200k, the test split: `labels/*_test_detect_all.txt`, and `test_queries.txt` where it is there.

    The pictures of one item are one product. A description is a query for all that are described so; a pair of
    pictures of `test_queries.txt` (by the authors of TIRG) is a query by picture and words, right for all that have
    the second one's description.
    """
    files = sorted((folder / "labels").glob("*_test_detect_all.txt"))
    if not files:
        raise CatalensError(f"{folder}: no labels/*_test_detect_all.txt in it")
    found = Converted()
    described: defaultdict[str, dict[str, float]] = defaultdict(dict)
    captions: dict[str, str] = {}
    for file in files:
        for number, line in _lines(file):
            parts = line.split("\t")
            if len(parts) != 3:
                raise CatalensError(f"{file}: line {number}: not picture, score and description with tabs between")
            path, caption = parts[0], " ".join(parts[2].split())
            captions[path] = caption
            item = _id(Path(path).parent.name)
            product = found.products.setdefault(item, _product(item, caption, category=file.name.split("_")[0]))
            if len(product["images"]) < _MAX_PICTURES:
                product["images"].append(str((folder / path).absolute()))
            described[caption][item] = 1.0
    for caption, items in described.items():
        found.queries.append({"query": caption, "language": "en", "kind": "description", "relevant": items})
    pairs = folder / "test_queries.txt"
    for number, line in _lines(pairs) if pairs.exists() else ():
        paths = line.split()
        if len(paths) != 2 or not captions.keys() >= set(paths):
            raise CatalensError(f"{pairs}: line {number}: not two pictures of labels/")
        before, after = (captions[path].split() for path in paths)
        old = next((word for word in before if word not in after), "")
        new = next((word for word in after if word not in before), "")
        found.queries.append(
            {
                "query": f"replace {old} with {new}",
                "image": str((folder / paths[0]).absolute()),
                "language": "en",
                "kind": "picture and words",
                "relevant": described[captions[paths[1]]],
            }
        )
    return found


def deepfashion_inshop(folder: Path) -> Converted:
    """DeepFashion in-shop: `Eval/list_eval_partition.txt` and, for words, `Anno/list_description_inshop.json`.

    The gallery's pictures of one item are one product; each query picture is a query.
    """
    file = folder / "Eval" / "list_eval_partition.txt"
    told = _descriptions(folder / "Anno" / "list_description_inshop.json")
    lines = list(_lines(file))
    if len(lines) < 2 or lines[1][1].split() != ["image_name", "item_id", "evaluation_status"]:
        raise CatalensError(f"{file}: its second line is not: image_name item_id evaluation_status")
    found = Converted()
    for number, line in lines[2:]:
        parts = line.split()
        if len(parts) != 3:
            raise CatalensError(f"{file}: line {number}: not picture, item and status")
        name, item, status = parts
        path = str((folder / "Img" / name).absolute())
        if status == "query":
            found.queries.append({"image": path, "kind": "picture", "relevant": [item]})
        elif status == "gallery":
            kind = Path(name).parent.parent.name.replace("_", " ")
            color, text = told.get(item, ("", ""))
            if item not in found.products:
                product = _product(item, f"{color} {kind}".strip(), category=kind)
                found.products[item] = product | ({"description": text} if text else {})
            if len(found.products[item]["images"]) < _MAX_PICTURES:
                found.products[item]["images"].append(path)
    return found


def fashion_iq(folder: Path) -> Converted:
    """FashionIQ, the validation split: `captions/cap.KIND.val.json`, `image_splits/split.KIND.val.json`, `images/`."""
    found = Converted()
    for file in sorted((folder / "captions").glob("cap.*.val.json")):
        kind = file.name.split(".")[1]
        split = folder / "image_splits" / f"split.{kind}.val.json"
        for asin in _json(split):
            found.products[str(asin)] = _product(str(asin), kind, _picture(folder, str(asin)))
        for number, entry in enumerate(_json(file), start=1):
            try:
                candidate, target, captions = str(entry["candidate"]), str(entry["target"]), entry["captions"]
            except (TypeError, KeyError) as error:
                raise CatalensError(f"{file}: entry {number}: not candidate, target and captions") from error
            found.queries.append(
                {
                    "query": " and ".join(str(caption).strip(" .?,") for caption in captions),
                    "image": _picture(folder, candidate),
                    "language": "en",
                    "kind": kind,
                    "relevant": [target],
                }
            )
    return found


def esci(folder: Path) -> Converted:
    """ESCI, the test split of the smaller version, with SQID's pictures where `sqid/product_image_urls.csv` is there.

    `shopping_queries_dataset/shopping_queries_dataset_{examples,products}` as .csv or .jsonl; its Parquet is
    turned into one of them first (docs/how-to/evaluate.md).
    """
    base = folder / "shopping_queries_dataset"
    base = base if base.is_dir() else folder
    found = Converted()
    judged: dict[str, dict[str, Any]] = {}
    judgements = ("query_id", "query", "product_id", "product_locale", "esci_label", "small_version", "split")
    for row in _table(base, "shopping_queries_dataset_examples", judgements):
        if row["split"] != "test" or str(row["small_version"]) != "1":
            continue
        locale = str(row["product_locale"])
        query = judged.setdefault(
            str(row["query_id"]),
            {"query": str(row["query"]), "language": _LANGUAGES.get(locale, locale), "relevant": {}},
        )
        query["relevant"][_id(f"{locale}:{row['product_id']}")] = _gain(str(row["esci_label"]))
    wanted = {product for query in judged.values() for product in query["relevant"]}
    pictures = {}
    for name in ("supp_product_image_urls.csv", "product_image_urls.csv"):
        if (folder / "sqid" / name).exists():
            rows = _csv(folder / "sqid" / name, ("product_id", "image_url"))
            pictures.update({_id(f"us:{row['product_id']}"): row["image_url"] for row in rows if row["image_url"]})
    for row in _table(base, "shopping_queries_dataset_products", ("product_id", "product_locale", "product_title")):
        product_id = _id(f"{row['product_locale']}:{row['product_id']}")
        if product_id not in wanted:
            continue
        locale = str(row["product_locale"])
        product = _product(product_id, str(row["product_title"] or product_id), pictures.get(product_id))
        text = "\n".join(str(row[key]) for key in ("product_description", "product_bullet_point") if row.get(key))
        given = {"description": text[:20_000], "brand": str(row.get("product_brand") or "")[:512]}
        color = str(row.get("product_color") or "")
        product |= {key: value for key, value in given.items() if value}
        product |= {"locale": _LANGUAGES.get(locale, locale)} | ({"attributes": {"color": color}} if color else {})
        found.products[product_id] = product
    found.queries = [query for query in judged.values() if any(query["relevant"].values())]
    return found


LAYOUTS: Final[Mapping[str, Callable[[Path], Converted]]] = {
    "marqo-gs": marqo_gs,
    "fashion200k": fashion200k,
    "deepfashion-inshop": deepfashion_inshop,
    "fashion-iq": fashion_iq,
    "esci": esci,
}


def _product(product_id: str, name: str, picture: str | None = None, category: str | None = None) -> dict[str, Any]:
    product: dict[str, Any] = {"product_id": product_id, "name": name.strip()[:512] or product_id, "images": []}
    if picture:
        product["images"].append(picture)
    return product | ({"category": category} if category else {})


def _id(text: str) -> str:
    """Return it as a product id may be written."""
    return re.sub(r"[^A-Za-z0-9._:\-]", "-", text)[:128]


def _placed(folder: Path, picture: str | None) -> str | None:
    """Return an address as it is, and a path from the folder, where the sets' own scripts expect it."""
    if not picture or "://" in picture:
        return picture or None
    return str((folder / picture).absolute())


def _picture(folder: Path, asin: str) -> str:
    """Return the path of an id's picture, whatever its ending; .jpg where there is none."""
    paths = (folder / "images" / f"{asin}{ending}" for ending in _PICTURE_KINDS)
    return str(next((path for path in paths if path.exists()), folder / "images" / f"{asin}.jpg").absolute())


def _gain(label: str) -> float:
    if label not in _GAINS:
        raise CatalensError(f"esci_label {label!r} is none of E, S, C and I")
    return _GAINS[label]


def _descriptions(file: Path) -> dict[str, tuple[str, str]]:
    """Return colour and text by item; none where the file is not there."""
    if not file.exists():
        return {}
    told = {}
    for entry in _json(file):
        if not isinstance(entry, dict):
            raise CatalensError(f"{file}: an entry is no object")
        text = entry.get("description", "")
        text = "\n".join(map(str, text)) if isinstance(text, list) else str(text)
        told[str(entry.get("item"))] = (str(entry.get("color", "")), text[:20_000])
    return told


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    try:
        with file.open(encoding="utf-8", errors="strict") as text:
            for number, line in enumerate(text, start=1):
                if line.strip():
                    yield number, line.rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CatalensError(f"{file}: {error}") from error


def _json(file: Path) -> list[Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CatalensError(f"{file}: {error}") from error
    if not isinstance(value, list):
        raise CatalensError(f"{file}: not a JSON list")
    return value


def _csv(file: Path, columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    csv.field_size_limit(sys.maxsize)  # a description may be longer than the 128 KiB that csv allows
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            rows = csv.DictReader(text)
            missing = [column for column in columns if column not in (rows.fieldnames or ())]
            if missing:
                raise CatalensError(f"{file}: no column {', '.join(missing)}")
            yield from rows
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CatalensError(f"{file}: {error}") from error


def _table(folder: Path, name: str, columns: tuple[str, ...]) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of `name`, from .csv or .jsonl, whichever is there first."""
    if (path := folder / f"{name}.csv").exists():
        rows: Iterator[Mapping[str, Any]] = _csv(path, columns)
    elif (path := folder / f"{name}.jsonl").exists():
        rows = _json_lines(path)
    elif (path := folder / f"{name}.parquet").exists():
        raise CatalensError(f"{path}: turn it into .csv or .jsonl first: docs/how-to/evaluate.md says how")
    else:
        raise CatalensError(f"{folder}: no {name}.csv or .jsonl in it")
    for row in rows:
        missing = [column for column in columns if column not in row]
        if missing:
            raise CatalensError(f"{path}: no column {', '.join(missing)}")
        yield row


def _json_lines(file: Path) -> Iterator[Mapping[str, Any]]:
    for number, line in _lines(file):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CatalensError(f"{file}: line {number}: {error}") from error
        if not isinstance(row, dict):
            raise CatalensError(f"{file}: line {number}: not a JSON object")
        yield row
