"""Sends a catalogue file to a running Catalens: in bounded chunks, resumable, every rejected line accounted for."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import time
import zlib
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, cast

from catalens.client import CHUNK_BYTES, CHUNK_LINES, BulkAnswer, CatalensClient, Refused, Unreachable
from catalens.errors import CatalensError
from catalens.ports import Clock
from catalens.retry import SystemClock
from catalens_standalone.catalogue_file import IMAGE_FIELDS, BadCatalogue, Row, csv_rows, json_rows

MAX_LINE: Final = 32 * 1024 * 1024
PICTURE_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".avif", ".heic")


class ImportStopped(CatalensError):
    """The import broke off; the same command goes on where it stopped."""


@dataclass(frozen=True, slots=True)
class Source:
    """What to import, and how to read it."""

    path: Path
    images: Path | None = None
    """Folder of pictures, named in the file or by product_id."""
    mapping: Mapping[str, str] = field(default_factory=dict)
    """field → column or key of the file"""
    only_mapped: bool = False
    max_picture: int = 20 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an import is, counted over all its runs."""

    rows: int = 0
    accepted: int = 0
    rejected: int = 0
    without_picture: int = 0
    position: int = 0
    """Bytes of the file whose rows are done."""


@dataclass(frozen=True, slots=True)
class Summary:
    """How an import ended."""

    progress: Progress
    resumed_from: int
    seconds: float
    errors: Path | None
    """Where the errors are, if there are any."""

    @property
    def rate(self) -> float:
        """Rows a second in this run."""
        return (self.progress.rows - self.resumed_from) / max(self.seconds, 1e-9)


@dataclass(frozen=True, slots=True)
class Complaint:
    """Something in the file that did not make it."""

    line: int
    product_id: str | None
    error: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows that travel in one request."""

    rows: int
    """All of them, those that failed before sending included."""
    payload: bytes
    sent: tuple[tuple[int, str | None], ...]
    """Line in the file and product_id of each line of the payload."""
    rejected: tuple[Complaint, ...]
    without_picture: tuple[Complaint, ...]
    position: int

    @property
    def ids(self) -> frozenset[str]:
        """The products that it changes."""
        return frozenset(product_id for _, product_id in self.sent if product_id is not None)


class _Picture(Exception):
    """A picture that the file names cannot be sent; the text says why."""


# --- file → chunks ----------------------------------------------------------------------------------------


class CatalogueReader:
    """An open catalogue file; blocking, for use in a thread. Raises BadCatalogue if nothing can be read of it."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._raw = source.path.open("rb")
        self._stream: io.BufferedReader | io.TextIOWrapper = self._raw
        try:
            self._rows = self._open_rows()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the file."""
        self._stream.close()
        self._raw.close()

    def chunks(self, skip: int = 0) -> Iterator[Chunk]:
        """Yield all rows but the first `skip`, in order.

        No chunk names a product twice: the service assigns versions by arrival, and two statements about one product
        must arrive in the file's order.
        """
        try:
            yield from self._chunks(skip)
        except (OSError, EOFError, zlib.error) as error:
            raise BadCatalogue(f"{self._source.path} cannot be read to its end: {error}") from error

    def _chunks(self, skip: int) -> Iterator[Chunk]:
        pending: Iterator[tuple[Row, bytes | None, list[Complaint]]] = map(
            self._prepare, itertools.islice(self._rows, skip, None)
        )
        held: tuple[Row, bytes | None, list[Complaint]] | None = next(pending, None)
        while held is not None:
            rows = size = 0
            lines: list[bytes] = []
            sent: list[tuple[int, str | None]] = []
            rejected: list[Complaint] = []
            without: list[Complaint] = []
            ids: set[str] = set()
            while held is not None and rows < CHUNK_LINES:
                row, line, complaints = held
                if row.product_id in ids or (lines and line is not None and size + len(line) > CHUNK_BYTES):
                    break
                rows += 1
                if line is None:
                    rejected += complaints
                else:
                    without += complaints
                    lines.append(line)
                    size += len(line)
                    sent.append((row.line, row.product_id))
                    ids |= {row.product_id} if row.product_id is not None else set()
                held = next(pending, None)
            yield Chunk(rows, b"".join(lines), tuple(sent), tuple(rejected), tuple(without), self._raw.tell())

    def _open_rows(self) -> Iterator[Row]:
        buffered = self._raw
        if self._raw.peek(2)[:2] == b"\x1f\x8b":
            buffered = self._stream = io.BufferedReader(cast("io.RawIOBase", gzip.GzipFile(fileobj=self._raw)))
        start = buffered.peek(4096)[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()
        if not start:
            raise BadCatalogue(f"{self._source.path} is empty")
        suffix = Path(self._source.path.name.removesuffix(".gz")).suffix.lower()
        is_json = suffix in (".jsonl", ".ndjson", ".json") or (
            suffix not in (".csv", ".tsv") and start[:1] in (b"{", b"[")
        )
        if is_json:
            return json_rows(_bounded_lines(buffered), self._source.mapping)
        self._stream = io.TextIOWrapper(buffered, encoding="utf-8-sig", errors="surrogateescape", newline="")
        return csv_rows(self._stream, self._source.mapping, only_mapped=self._source.only_mapped)

    def _prepare(self, row: Row) -> tuple[Row, bytes | None, list[Complaint]]:
        """Return the row, its line to send (None if it cannot be) and what is wrong with it."""
        if row.problem is not None:
            return row, None, [Complaint(row.line, row.product_id, row.problem)]
        product = dict(row.product)
        complaints: list[Complaint] = []
        images: list[Any] = []
        for named in _named_pictures(product):
            try:
                images.append(self._picture(named) if isinstance(named, str) else named)
            except _Picture as problem:
                complaints.append(Complaint(row.line, row.product_id, f"{problem} (imported without it)"))
        if not images and not complaints and self._source.images is not None and row.product_id is not None:
            found = _picture_of(self._source.images, row.product_id)
            try:
                images += [self._inline(found)] if found is not None else []
            except _Picture as problem:
                complaints.append(Complaint(row.line, row.product_id, f"{problem} (imported without it)"))
        if images:
            product["images"] = images
        try:
            line = json.dumps(product, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        except ValueError as error:  # half a surrogate pair, a number of thousands of digits
            return row, None, [Complaint(row.line, row.product_id, str(error))]
        if len(line) > MAX_LINE:
            return row, None, [Complaint(row.line, row.product_id, "the product with its pictures is over 32 MiB")]
        return row, line, complaints

    def _picture(self, named: str) -> dict[str, str]:
        if named.startswith("data:"):
            head, _, data = named.partition(",")
            if not head.endswith(";base64"):
                raise _Picture("picture: a data: URL must be base64")
            return {"data": data}
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", named):
            return {"url": named}  # whether it may be fetched is the service's to say
        folders = [folder for folder in (self._source.images, self._source.path.parent) if folder is not None]
        for folder in folders:
            path = folder / named
            if path.is_file():
                return self._inline(path)
        raise _Picture(f"picture not found: {named}")

    def _inline(self, path: Path) -> dict[str, str]:
        try:
            if path.stat().st_size > self._source.max_picture:
                raise _Picture(f"picture too large: {path.name}")
            return {"data": base64.b64encode(path.read_bytes()).decode()}
        except OSError as error:
            raise _Picture(f"picture not readable: {path.name}: {error.strerror}") from error


def _named_pictures(product: dict[str, Any]) -> list[Any]:
    """Take the pictures out of the product: strings to be resolved, and what is in contract form already."""
    named: list[Any] = []
    images = product.get("images")
    if isinstance(images, list | str):
        named += [images] if isinstance(images, str) else images
        del product["images"]
    for key in IMAGE_FIELDS:
        value = product.pop(key, None)
        named += value if isinstance(value, list) else [value] if value else []
    return named


def _picture_of(folder: Path, product_id: str) -> Path | None:
    """Return the picture that is named by the product, or None."""
    if not re.fullmatch(r"[A-Za-z0-9._:\-]+", product_id):
        return None  # an id that the service refuses must not become a path
    candidates = (folder / f"{product_id}{suffix}" for base in PICTURE_SUFFIXES for suffix in (base, base.upper()))
    return next((path for path in candidates if path.is_file()), None)


def _bounded_lines(stream: io.BufferedReader) -> Iterator[bytes | None]:
    """Yield the lines, None for each that is longer than MAX_LINE."""
    while line := stream.readline(MAX_LINE):
        if len(line) < MAX_LINE or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(MAX_LINE)
        yield None


# --- what was done, kept across runs ----------------------------------------------------------------------


class Journal:
    """Where an import stands and what it complained about, on disk; blocking, for use in a thread."""

    def __init__(self, source: Source, url: str, errors: Path | None = None) -> None:
        status = source.path.stat()
        resolved = source.path.resolve()
        what = [str(resolved), status.st_size, status.st_mtime_ns, url, sorted(source.mapping.items())]
        what += [str(source.images), source.only_mapped]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "catalens" / "imports"
        self._state = cache / f"{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:24]}.json"
        self.errors = errors or source.path.with_name(f"{source.path.name}.errors.jsonl")

    def resume(self) -> Progress:
        """Return where the last run on this very file stopped, if it did not end."""
        try:
            return Progress(**json.loads(self._state.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return Progress()
        except (ValueError, TypeError):
            return Progress()  # written by another version: importing again is harmless

    def begin(self, progress: Progress) -> None:
        """Start over, if `progress` is at zero: forget earlier errors."""
        if progress == Progress():
            self.errors.unlink(missing_ok=True)

    def record(self, progress: Progress, complaints: list[Complaint]) -> None:
        """Keep what a chunk came to; errors first, so that a crash repeats rather than loses one."""
        if complaints:
            with self.errors.open("a", encoding="utf-8") as file:
                for complaint in complaints:
                    entry = {"line": complaint.line, "product_id": complaint.product_id, "error": complaint.error}
                    file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self._state.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._state.with_suffix(".new")
        fresh.write_text(
            json.dumps({name: getattr(progress, name) for name in Progress.__dataclass_fields__}), encoding="utf-8"
        )
        fresh.replace(self._state)

    def end(self) -> None:
        """Forget the state: the next import of the file starts at its beginning."""
        self._state.unlink(missing_ok=True)


# --- sending ----------------------------------------------------------------------------------------------


class Importer:
    """Imports one file after another into one service."""

    def __init__(self, client: CatalensClient) -> None:
        self._client = client

    async def run(
        self,
        source: Source,
        journal: Journal,
        *,
        restart: bool = False,
        report: Callable[[Progress], None],
    ) -> Summary:
        """Send the file; each reported progress is on disk and survives any crash of either side.

        Raises BadCatalogue when the file makes no sense, ImportStopped when the service refuses everything or is away
        for longer than PATIENCE; a cancelled or stopped import goes on from the last report.
        """
        began = time.monotonic()
        await self._client.stats()  # nobody there, wrong key: say so at once
        progress = Progress() if restart else await asyncio.to_thread(journal.resume)
        resumed_from = progress.rows
        await asyncio.to_thread(journal.begin, progress)
        reader = await asyncio.to_thread(CatalogueReader, source)
        try:
            report(progress)
            async with (
                aclosing(_read(reader, progress.rows)) as chunks,
                aclosing(self._client.send_all(chunks)) as sent,
            ):
                async for chunk, answer in sent:
                    progress = await self._keep(chunk, answer, progress, journal)
                    report(progress)
        except (Refused, Unreachable) as error:
            tried = f" ({error.tries} tries)" if error.passing else ""
            raise ImportStopped(f"{error}{tried}") from error
        finally:
            await asyncio.to_thread(reader.close)
        await asyncio.to_thread(journal.end)
        complained = progress.rejected or progress.without_picture
        return Summary(progress, resumed_from, time.monotonic() - began, journal.errors if complained else None)

    async def _keep(self, chunk: Chunk, answer: BulkAnswer, progress: Progress, journal: Journal) -> Progress:
        """Keep what a chunk came to."""
        rejected = list(chunk.rejected)
        for error in answer.errors:
            line, product_id = chunk.sent[error.line - 1]
            rejected.append(Complaint(line, product_id, error.error))
        progress = replace(
            progress,
            rows=progress.rows + chunk.rows,
            accepted=progress.accepted + answer.accepted,
            rejected=progress.rejected + answer.rejected + len(chunk.rejected),
            without_picture=progress.without_picture + len(chunk.without_picture),
            position=chunk.position,
        )
        complaints = sorted([*rejected, *chunk.without_picture], key=lambda complaint: complaint.line)
        await asyncio.to_thread(journal.record, progress, complaints)
        return progress


async def _read(reader: CatalogueReader, skip: int) -> AsyncGenerator[Chunk, None]:
    """Yield the chunks, read in a thread."""
    chunks = reader.chunks(skip)
    while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
        yield chunk


async def until_settled(
    client: CatalensClient, clock: Clock | None = None, *, stalled_after: float = 900.0, report: Callable[[int], None]
) -> None:
    """Return when all that was accepted is searchable with its picture, or has failed for good.

    `report` is told how many are on their way. Raises CatalensError when nothing moves for `stalled_after` seconds,
    which is longer than the longest pause between two tries of a remote picture.
    """
    clock = clock or SystemClock()
    wait, last, since = 0.1, -1, clock.now()
    while not (stats := await client.stats()).settled:
        left = max(stats.lag, stats.images_pending)
        if left != last:
            last, since = left, clock.now()
            report(left)
        elif clock.now() - since > stalled_after:
            raise CatalensError(
                f"{stats.lag} events and {stats.images_pending} pictures are waiting and nothing moves: "
                "look at the service's log and at `catalens doctor`"
            )
        await clock.sleep(wait)
        wait = min(wait * 1.3, 1.0)
