"""Compares what is indexed with an export of the catalogue, in memory that does not grow with either."""

from __future__ import annotations

import asyncio
import base64
import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final

from catalens.client import CatalensClient, Refused
from catalens.domain import Product, sha256_hex
from catalens.errors import CatalensError
from catalens_standalone.importer import CatalogueReader, Source

_OFFER: Final = ("price", "currency", "stock")
_CHUNK: Final = 100
Show = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Finding:
    """One product that is not the same on both sides: missing, extra, older, newer or differs; or broken in the export,
    which is left as it is."""

    kind: str
    product_id: str
    told: str = ""


@dataclass(frozen=True, slots=True)
class State:
    """What one side says of a product, as digests."""

    version: int | None
    offer_version: int | None
    content: bytes
    offer: bytes | None
    """None where the export states no offer, which leaves the stored one alone."""


def state_of(line: bytes, *, indexed: bool) -> tuple[str, State]:
    """Return the product id and the state that a line in contract form says; raises ValueError if it is no product."""
    product = Product.model_validate_json(line)
    plain = product.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    offer = {name: plain.pop(name) for name in _OFFER if name in plain}
    for name in ("version", "offer_version"):
        plain.pop(name, None)
    plain["images"] = [_picture(image) for image in plain.pop("images", ())]
    states_offer = indexed or product.carries_offer
    return product.product_id, State(
        product.version, product.offer_version, _digest(plain), _digest(offer) if states_offer else None
    )


def _picture(image: Mapping[str, str]) -> str:
    """Return what the picture is known by: uploaded ones by their content, wherever they stand."""
    if "data" in image:
        return sha256_hex(base64.b64decode(image["data"]))
    return image.get("blob") or image["url"]


def _digest(value: object) -> bytes:
    return blake2b(json.dumps(value, sort_keys=True, ensure_ascii=False).encode(), digest_size=16).digest()


def difference(product_id: str, wanted: State, indexed: State) -> Finding | None:
    """Return how the indexed state is not the one that is wanted. A newer one is not the index's fault."""
    if wanted.version is not None and indexed.version != wanted.version:
        kind = "newer" if (indexed.version or 0) > wanted.version else "older"
        return Finding(kind, product_id, f"version {indexed.version}, the export has {wanted.version}")
    if wanted.content != indexed.content:
        same = "" if wanted.version is None else f"other content under the same version {wanted.version}"
        return Finding("differs", product_id, same)
    if wanted.offer is None or wanted.offer == indexed.offer:
        return None
    if wanted.offer_version is not None and (indexed.offer_version or 0) > wanted.offer_version:
        return Finding("newer", product_id, f"offer {indexed.offer_version}, the export has {wanted.offer_version}")
    return Finding("differs", product_id, "offer")


class Reconciler:
    """One comparison, and the repair of what it found."""

    def __init__(self, client: CatalensClient, source: Source) -> None:
        self._client = client
        self._source = source
        # Empty name: SQLite's own temporary file, which is gone with the connection, and in memory while it is small.
        self._table = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        self._table.execute(
            "CREATE TABLE wanted (id TEXT PRIMARY KEY, version, offer_version, content BLOB, offer BLOB) WITHOUT ROWID"
        )
        self._broken: set[str] = set()
        self._indexed = 0
        self._table.execute("CREATE TABLE found (id TEXT PRIMARY KEY, kind TEXT, version, told TEXT) WITHOUT ROWID")

    async def compare(self, found: Callable[[Finding], None], show: Show) -> Mapping[str, int]:
        """Tell `found` every difference and return how many of each kind, `equal` included."""
        tally: Counter[str] = Counter()
        for broken in await asyncio.to_thread(self._read_export):
            tally[broken.kind] += 1
            found(broken)
            self._broken.add(broken.product_id)
        (total,) = self._table.execute("SELECT count(*) FROM wanted").fetchone()
        async for line in self._client.export():
            product_id, indexed = await asyncio.to_thread(state_of, line, indexed=True)
            row = self._table.execute(
                "DELETE FROM wanted WHERE id = ? RETURNING version, offer_version, content, offer", (product_id,)
            ).fetchall()
            if product_id in self._broken:
                continue
            finding = difference(product_id, State(*row[0]), indexed) if row else Finding("extra", product_id)
            tally[finding.kind if finding else "equal"] += 1
            if finding is not None:
                found(finding)
                self._keep(finding, indexed.version)
            show("comparing", sum(tally.values()), max(total, sum(tally.values())))
        for (product_id,) in self._table.execute("SELECT id FROM wanted ORDER BY id").fetchall():
            if product_id not in self._broken:
                tally["missing"] += 1
                missing = Finding("missing", product_id)
                found(missing)
                self._keep(missing, None)
        self._indexed = sum(tally[kind] for kind in ("equal", "extra", "older", "newer", "differs"))
        return tally

    async def repair(self, show: Show) -> Sequence[str]:
        """Send the export's lines of what is missing, older or differs, delete what is extra; return what is left."""
        left = [
            f"{product_id}: {told}: give it a higher version in the catalogue"
            if kind == "differs"
            else f"{product_id}: is newer than the export: {told}"
            for product_id, kind, told in self._table.execute(
                "SELECT id, kind, told FROM found WHERE kind = 'newer' OR told LIKE 'other content%' ORDER BY id"
            )
        ]
        extra = self._table.execute("SELECT id, version FROM found WHERE kind = 'extra'").fetchall()
        if 2 * len(extra) > self._indexed:
            raise CatalensError(
                f"{len(extra):,} of {self._indexed:,} indexed products are not in the export: is it whole? "
                "Nothing was changed; what is really gone can be deleted one by one"
            )
        if extra and self._broken:
            left += [f"{product_id}: is extra, but lines of the export are broken" for product_id, _ in extra]
            extra = []
        (total,) = self._table.execute("SELECT count(*) FROM found").fetchone()
        done = 0
        for product_id, version in extra:
            # One above what is there: right for a catalogue's own numbers and for those that the door assigns.
            try:
                await self._client.delete(product_id, (version or 0) + 1)
            except Refused as refused:
                if refused.status != 422:
                    raise
                left.append(f"{product_id}: is extra and has the last version that there is")
            done += 1
            show("repairing", done, total)
        lines = self._lines_to_send()
        while batch := await asyncio.to_thread(_take, lines):
            answer = await self._client.send_lines(b"".join(batch))
            left += [f"{error.product_id}: {error.error}" for error in answer.errors]
            done += len(batch)
            show("repairing", done, total)
        return left

    def _keep(self, finding: Finding, version: int | None) -> None:
        row = (finding.product_id, finding.kind, version, finding.told)
        self._table.execute("INSERT OR REPLACE INTO found VALUES (?, ?, ?, ?)", row)

    def _read_export(self) -> list[Finding]:
        """Put the export's states into the table; the last line of a product counts. Returns its broken lines."""
        broken: list[Finding] = []
        self._table.execute("BEGIN")
        for line in self._lines(broken):
            try:
                product_id, state = state_of(line, indexed=False)
            except ValueError as error:
                broken.append(Finding("broken", _id_of(line), " ".join(str(error).split())[:200]))
                continue
            row = (product_id, state.version, state.offer_version, state.content, state.offer)
            self._table.execute("INSERT OR REPLACE INTO wanted VALUES (?, ?, ?, ?, ?)", row)
        self._table.execute("COMMIT")
        return broken

    def _lines(self, broken: list[Finding] | None = None) -> Iterator[bytes]:
        with closing(CatalogueReader(self._source)) as reader:
            for chunk in reader.chunks():
                if broken is not None:
                    complaints = (*chunk.rejected, *chunk.without_picture)
                    broken += [Finding("broken", one.product_id or f"line {one.line}", one.error) for one in complaints]
                yield from chunk.payload.splitlines(keepends=True)

    def _lines_to_send(self) -> Iterator[bytes]:
        asked = (
            "SELECT 1 FROM found WHERE id = ? AND kind IN ('missing', 'older', 'differs')"
            " AND told NOT LIKE 'other content%'"
        )
        return (line for line in self._lines() if self._table.execute(asked, (_id_of(line),)).fetchone())


def _id_of(line: bytes) -> str:
    found: Any = json.loads(line)
    return str(found.get("product_id", "")) if isinstance(found, dict) else ""


def _take(lines: Iterator[bytes]) -> list[bytes]:
    """Return the next lines of one request."""
    return [line for _, line in zip(range(_CHUNK), lines, strict=False)]
