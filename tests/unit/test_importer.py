"""Catalogue files as rows, rows as chunks, chunks to a service that stumbles."""

from __future__ import annotations

import base64
import gzip
import io
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given
from hypothesis import strategies as st

from catalens.client import CHUNK_LINES, CatalensClient
from catalens.domain import Product
from catalens.errors import CatalensError
from catalens_standalone.catalogue_file import (
    BadCatalogue,
    Row,
    choose_columns,
    csv_rows,
    json_rows,
    parse_mapping,
    parse_number,
    sniff_delimiter,
)
from catalens_standalone.importer import (
    CatalogueReader,
    Chunk,
    Importer,
    ImportStopped,
    Journal,
    Progress,
    Source,
    Summary,
    until_settled,
)


def of_csv(text: str, *pairs: str, only_mapped: bool = False) -> list[Row]:
    return list(csv_rows(io.StringIO(text, newline=""), parse_mapping(pairs), only_mapped=only_mapped))


def of_json(*lines: bytes | None, mapping: tuple[str, ...] = ()) -> list[Row]:
    return list(json_rows(lines, parse_mapping(mapping)))


# --- CSV --------------------------------------------------------------------------------------------------


def test_csv_with_usual_headers_needs_no_mapping() -> None:
    text = "SKU;Title;Preis;Qty;Image URL;Farbe\r\na-1;Rote Schuhe;1.299,50;7;https://x.example/a.jpg;rot\r\n"
    assert of_csv(text) == [
        Row(
            2,
            {
                "product_id": "a-1",
                "name": "Rote Schuhe",
                "price": 1299.5,
                "stock": 7,
                "image": "https://x.example/a.jpg",
                "attributes": {"Farbe": "rot"},
            },
        )
    ]


def test_csv_products_pass_the_contract() -> None:
    text = "id,name,price,currency,stock,size,attributes.color\n1,Tent,9.5,eur,3,S|M|L,green\n"
    (row,) = of_csv(text)
    product = Product.model_validate(row.product, extra="forbid")
    assert product.currency == "EUR"
    assert product.attributes == {"size": ["S", "M", "L"], "color": "green"}


def test_csv_mapping_wins_over_guesses() -> None:
    (row,) = of_csv("id,name,Modell,Price\n1,internal,Tent X,5\n", "name=Modell", "attributes.intern=name")
    assert row.product == {"product_id": "1", "name": "Tent X", "price": 5.0, "attributes": {"intern": "internal"}}


def test_csv_only_mapped_leaves_the_rest_out() -> None:
    (row,) = of_csv("id,name,margin\n1,Tent,0.4\n", only_mapped=True)
    assert row.product == {"product_id": "1", "name": "Tent"}


def test_csv_quotes_newlines_bom_unicode_and_empty_lines() -> None:
    text = '\ufeffid,name,description\n\n1,"Ball, ""rouge"" ⚽","zwei\nZeilen"\n,,\n2,Tente d\'été,\n'
    assert of_csv(text) == [
        Row(3, {"product_id": "1", "name": 'Ball, "rouge" ⚽', "description": "zwei\nZeilen"}),
        Row(6, {"product_id": "2", "name": "Tente d'été"}),
    ]


def test_csv_bad_cells_are_the_rows_problem_only() -> None:
    text = "id,name,price,stock\n1,A,cheap,1\n2,B,5,1.5\n3,C,5,1,too,many\n4,D,5,2\n"
    problems = [row.problem for row in of_csv(text)]
    assert problems[0] == "price: 'cheap' is no number"
    assert problems[1] == "stock: '1.5' is no whole number"
    assert problems[2] is not None
    assert "6 cells under 4 columns" in problems[2]
    assert problems[3] is None


def test_csv_wrong_encoding_is_the_rows_problem() -> None:
    raw = io.TextIOWrapper(
        io.BytesIO(b"id,name\n1,caf\n" + "2,café\n".encode("latin-1")), "utf-8", "surrogateescape", newline=""
    )
    rows = list(csv_rows(raw, {}))
    assert rows[0].problem is None
    assert rows[1].problem == "name: not UTF-8; save the file as CSV UTF-8"


@pytest.mark.parametrize(
    ("text", "pairs", "said"),
    [
        ("", (), "first line is empty"),
        ("\n1,2\n", (), "first line is empty"),
        ("reference number,label\n1,A\n", (), "no column for product_id and name: say which with --map product_id=COL"),
        ("id,name\n1,A\n", ("price=Price",), "no such column"),
        ("id,name,Pric\n1,A,2\n", ("price=Price",), "did you mean 'Pric'?"),
        ("id,name\n1,A\n", ("nam=name",), "did you mean 'name'?"),
        ("id,name\n1,A\n", ("name",), "field=column"),
        ("id,name\n1,A\n", ("name=id", "name=name"), "already taken"),
        ("id,name," + ",".join(f"c{n}" for n in range(65)), (), "at most 64 attributes"),
        ("\0i\0d\0,", (), "UTF-8"),
    ],
)
def test_csv_that_makes_no_sense_is_refused_with_advice(text: str, pairs: tuple[str, ...], said: str) -> None:
    with pytest.raises(BadCatalogue) as refused:
        of_csv(text, *pairs)
    assert said in str(refused.value)


def test_columns_are_used_once_and_the_better_name_first() -> None:
    assert choose_columns(["sku", "id", "title", "name"], {}) == {
        1: "product_id",
        3: "name",
        0: "attributes.sku",
        2: "attributes.title",
    }


def test_a_column_that_is_mapped_is_not_guessed_again() -> None:
    assert choose_columns(["id", "name", "title"], {"description": "name"}) == {
        0: "product_id",
        1: "description",
        2: "name",
    }


@pytest.mark.parametrize(
    ("header", "delimiter"), [("a,b;c,d", ","), ('"a,b,c";d;e', ";"), ("a\tb", "\t"), ("a|b", "|"), ("id", ",")]
)
def test_delimiter(header: str, delimiter: str) -> None:
    assert sniff_delimiter(header) == delimiter


@pytest.mark.parametrize(
    ("text", "comma_first", "number"),
    [
        ("65", False, 65.0),
        ("65.00", False, 65.0),
        ("12,5", False, 12.5),
        ("1,299", False, 1299.0),
        ("1,299", True, 1.299),
        ("1.299", True, 1299.0),
        ("1.299", False, 1.299),
        ("1.299.000", False, 1_299_000.0),
        ("1.299,00 €", False, 1299.0),
        ("$1,299.00", True, 1299.0),
        ("1 299,90", False, 1299.9),
        ("1\u202f299,90", False, 1299.9),
        ("1'299.90", False, 1299.9),
        ("-3", False, -3.0),
        (".5", False, 0.5),
    ],
)
def test_numbers(text: str, comma_first: bool, number: float) -> None:
    assert parse_number(text, comma_first=comma_first) == number


@pytest.mark.parametrize("text", ["", "cheap", "1.2.3", "1,2,3", "1e308", "NaN", "--1", "9" * 400, "5 apples"])
def test_what_is_no_number(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no number|too large"):
        parse_number(text)


@given(st.floats(0, 1e9, allow_nan=False).map(lambda value: round(value, 2)))
def test_numbers_with_two_decimals_read_as_written(value: float) -> None:
    assert parse_number(f"{value:,.2f}") == value
    assert parse_number(f"{value:.2f}".replace(".", ","), comma_first=True) == value


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("65.00 EUR", {"price": 65.0, "currency": "EUR"}),
        ("USD 1,299.00", {"price": 1299.0, "currency": "USD"}),
        ("65", {"price": 65.0}),
    ],
)
def test_price_cell_may_name_its_currency(cell: str, expected: dict[str, Any]) -> None:
    (row,) = of_csv(f'id,name,price\n1,A,"{cell}"\n')
    assert row.product == {"product_id": "1", "name": "A"} | expected


def test_picture_cells_hold_one_or_several() -> None:
    one, several, urls = of_csv(
        'id,name,images\n1,A,a.jpg\n2,B,a.jpg | b.jpg\n3,C,"https://x.example/a,b.jpg, https://x.example/c.jpg"\n'
    )
    assert one.product["image"] == "a.jpg"
    assert several.product["image"] == ["a.jpg", "b.jpg"]
    assert urls.product["image"] == ["https://x.example/a,b.jpg", "https://x.example/c.jpg"]


@given(st.text(max_size=300))
def test_any_csv_gives_rows_or_advice(text: str) -> None:
    try:
        rows = of_csv(text)
    except BadCatalogue:
        return
    assert all(row.line >= 1 for row in rows)


# --- JSON lines -------------------------------------------------------------------------------------------


def test_json_lines_keep_their_numbers_whatever_lies_between() -> None:
    rows = of_json(
        b'\xef\xbb\xbf{"product_id": "a", "name": "\xc3\xa9t\xc3\xa9"}\r\n',
        b"\n",
        b'{"product_id": "b"',
        b'["no object"]',
        b'{"product_id": "c", "price": NaN}',
        b"\xff\xfe",
        None,
        b'{"product_id": 7, "name": "number"}',
    )
    assert [(row.line, row.product_id) for row in rows] == [
        (1, "a"),
        (3, None),
        (4, None),
        (5, None),
        (6, None),
        (7, None),
        (8, "7"),
    ]
    assert rows[0].product["name"] == "été"
    assert [row.problem is None for row in rows] == [True, False, False, False, False, False, True]


def test_deeply_nested_json_is_one_bad_line() -> None:
    bad, good = of_json(b'{"a":' * 50_000, b'{"product_id": "a", "name": "A"}')
    assert bad.problem is not None
    assert good.problem is None


def test_json_mapping_renames() -> None:
    (row,) = of_json(
        b'{"id": "a", "title": "A", "colour": ["red"]}',
        mapping=("product_id=id", "name=title", "attributes.color=colour"),
    )
    assert row.product == {"product_id": "a", "name": "A", "attributes": {"color": ["red"]}}


def test_a_json_array_is_refused_with_the_way_out() -> None:
    with pytest.raises(BadCatalogue, match="jq -c"):
        of_json(b'[{"product_id": "a"}]')


# --- chunks -----------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(*products: dict[str, Any] | str, name: str = "catalogue.jsonl") -> Path:
        path = tmp_path / name
        lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in products]
        path.write_text("".join(f"{line}\n" for line in lines))
        return path

    return write


def chunks_of(source: Source, skip: int = 0) -> list[Chunk]:
    reader = CatalogueReader(source)
    try:
        return list(reader.chunks(skip))
    finally:
        reader.close()


def lines_of(chunks: list[Chunk]) -> list[dict[str, Any]]:
    return [json.loads(line) for chunk in chunks for line in chunk.payload.splitlines()]


def products(count: int, start: int = 0) -> Iterator[dict[str, Any]]:
    return ({"product_id": f"p-{n}", "name": f"Product {n}"} for n in range(start, start + count))


def test_chunks_hold_all_rows_in_order_and_end_at_the_file(write: Callable[..., Path]) -> None:
    path = write(*products(CHUNK_LINES * 2 + 1))
    chunks = chunks_of(Source(path))
    assert [chunk.rows for chunk in chunks] == [CHUNK_LINES, CHUNK_LINES, 1]
    assert [line["product_id"] for line in lines_of(chunks)] == [f"p-{n}" for n in range(CHUNK_LINES * 2 + 1)]
    assert chunks[-1].position == path.stat().st_size
    assert chunks[0].position <= chunks[1].position


def test_a_chunk_names_no_product_twice(write: Callable[..., Path]) -> None:
    chunks = chunks_of(Source(write(*products(3), *products(2, start=1), *products(1, start=9))))
    assert [sorted(chunk.ids) for chunk in chunks] == [["p-0", "p-1", "p-2"], ["p-1", "p-2", "p-9"]]


def test_chunks_are_bounded_in_bytes(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "big.jpg").write_bytes(b"\xff\xd8" + b"x" * 3_000_000)
    chunks = chunks_of(Source(write(*({**product, "image": "big.jpg"} for product in products(5)))))
    assert [chunk.rows for chunk in chunks] == [2, 2, 1]


def test_rows_to_skip_are_skipped_and_nothing_else(write: Callable[..., Path]) -> None:
    path = write(*products(3), "broken", *products(3, start=3))
    (chunk,) = chunks_of(Source(path), skip=4)
    assert [line["product_id"] for line in lines_of([chunk])] == ["p-3", "p-4", "p-5"]
    assert chunk.sent[0] == (5, "p-3")
    assert chunks_of(Source(path), skip=99) == []


def test_pictures_by_path_url_data_and_folder(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"beside the file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "p-4.PNG").write_bytes(b"named by id")
    path = write(
        {"product_id": "p-1", "name": "A", "image": "images/a.jpg"},
        {"product_id": "p-2", "name": "B", "image_url": "https://x.example/b.jpg"},
        {
            "product_id": "p-3",
            "name": "C",
            "images": [{"blob": "0" * 64}, "images/a.jpg"],
            "image": "data:x;base64,QQ==",
        },
        {"product_id": "p-4", "name": "D"},
        {"product_id": "../images/a", "name": "E"},
    )
    lines = lines_of(chunks_of(Source(path, images=tmp_path / "folder")))
    beside = {"data": base64.b64encode(b"beside the file").decode()}
    assert lines[0]["images"] == [beside]
    assert lines[1]["images"] == [{"url": "https://x.example/b.jpg"}]
    assert lines[2]["images"] == [{"blob": "0" * 64}, beside, {"data": "QQ=="}]
    assert lines[3]["images"] == [{"data": base64.b64encode(b"named by id").decode()}]
    assert "images" not in lines[4]
    assert not any(key.startswith("image_") or key == "image" for line in lines for key in line)


def test_a_product_without_its_picture_still_goes_and_is_reported(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "big.jpg").write_bytes(b"x" * 11)
    path = write(
        {"product_id": "a", "name": "A", "image": "gone.jpg"}, {"product_id": "b", "name": "B", "image": "big.jpg"}
    )
    (chunk,) = chunks_of(Source(path, max_picture=10))
    assert [line["product_id"] for line in lines_of([chunk])] == ["a", "b"]
    assert [(entry.line, entry.error) for entry in chunk.without_picture] == [
        (1, "picture not found: gone.jpg (imported without it)"),
        (2, "picture too large: big.jpg (imported without it)"),
    ]


def test_gzip_is_read_whatever_it_is_called(tmp_path: Path) -> None:
    path = tmp_path / "catalogue.csv.gz"
    path.write_bytes(gzip.compress(b"id,name\n1,A\n2,B\n"))
    assert [line["name"] for line in lines_of(chunks_of(Source(path)))] == ["A", "B"]


def test_a_truncated_gzip_says_so(tmp_path: Path) -> None:
    path = tmp_path / "catalogue.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(json.dumps(entry).encode() + b"\n" for entry in products(500)))[:-20])
    with pytest.raises(BadCatalogue, match="cannot be read to its end"):
        chunks_of(Source(path))


def test_format_is_seen_from_the_content_where_the_name_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text('{"product_id": "a", "name": "A"}\n')
    (tmp_path / "b").write_text("id,name\nb,B\n")
    assert [line["product_id"] for line in lines_of(chunks_of(Source(tmp_path / "a.txt")))] == ["a"]
    assert [line["product_id"] for line in lines_of(chunks_of(Source(tmp_path / "b")))] == ["b"]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "empty.jsonl").write_bytes(content)
    with pytest.raises(BadCatalogue, match="is empty"):
        CatalogueReader(Source(tmp_path / "empty.jsonl"))


def test_the_demo_catalogue_is_in_contract_form() -> None:
    demo = Path("demo/catalog.jsonl")
    lines = lines_of(chunks_of(Source(demo)))
    assert len(lines) == 54
    for line in lines:
        product = Product.model_validate(line, extra="forbid")
        assert len(product.images) == 1
        assert product.version is None
        assert product.category is not None
        assert " > " in product.category
    queries = [json.loads(line) for line in Path("demo/queries.jsonl").read_text().splitlines()]
    assert {query["product_id"] for query in queries} == {line["product_id"] for line in lines}
    assert "query_fr" not in demo.read_text()


# --- sending ----------------------------------------------------------------------------------------------


class StumblingService:
    """The NDJSON call as contracts.md has it, with answers to give before it behaves: a status, or None to hang up."""

    def __init__(self) -> None:
        self.before: list[int | None] = []
        self.takes_only: str | None = None
        """Requests that begin with another product are answered 503, whichever comes first."""
        self.kept: list[dict[str, Any]] = []
        self.chunks: list[list[str]] = []
        """The ids that each answered request held, in its order; two requests may arrive in either order."""
        self.requests = 0
        self.lags: list[int] = []

    async def bulk(self, request: web.Request) -> web.Response:
        self.requests += 1
        body = await request.read()
        if self.before and (status := self.before.pop(0)) != 200:
            if status is None:
                assert request.transport is not None
                request.transport.close()
                return web.Response()
            problem = {"title": "Not now", "status": status, "detail": "try later"}
            return web.json_response(problem, status=status, headers={"Retry-After": "7"})
        if self.takes_only not in (None, json.loads(body.splitlines()[0])["product_id"]):
            return web.json_response({"title": "Not now", "status": 503, "detail": "try later"}, status=503)
        errors = []
        for number, line in enumerate(body.splitlines(), start=1):
            product = json.loads(line)
            if "name" in product:
                self.kept.append(product)
            else:
                errors.append({"line": number, "product_id": product.get("product_id"), "error": "name: required"})
        accepted = len(body.splitlines()) - len(errors)
        self.chunks.append([product["product_id"] for product in self.kept[len(self.kept) - accepted :]])
        return web.json_response({"accepted": accepted, "rejected": len(errors), "errors": errors})

    def in_file_order(self) -> list[str]:
        """The ids of all requests, each in its own order, the requests by what they begin with."""
        by_start = sorted(filter(None, self.chunks), key=lambda chunk: int(chunk[0].removeprefix("p-")))
        return [product_id for chunk in by_start for product_id in chunk]

    async def stats(self, _: web.Request) -> web.Response:
        lag = self.lags.pop(0) if self.lags else 0
        return web.json_response({"products": 0, "images_pending": 0, "deleted": 0, "lag": lag, "model": "m"})

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        app = web.Application(client_max_size=2**30)
        app.router.add_post("/api/v1/products", self.bulk)
        app.router.add_get("/api/v1/stats", self.stats)
        async with TestServer(app) as server:
            yield str(server.make_url("")).rstrip("/")


class InstantClock:
    """Time that passes as soon as somebody sleeps."""

    def __init__(self) -> None:
        self.time = 0.0
        self.slept: list[float] = []

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.time += seconds
        self.slept.append(seconds)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


async def import_into(
    service: StumblingService, path: Path, clock: InstantClock | None = None, *, restart: bool = False
) -> tuple[Summary, list[Progress]]:
    reported: list[Progress] = []
    source = Source(path)
    async with service.running() as url, CatalensClient(url, clock=clock or InstantClock()) as client:
        # The journal knows a service by its URL, and each test server has a port of its own.
        journal = Journal(source, "http://service")
        summary = await Importer(client).run(source, journal, restart=restart, report=reported.append)
    return summary, reported


async def test_everything_is_accounted_for(write: Callable[..., Path]) -> None:
    path = write(*products(150), {"product_id": "nameless"}, "broken", *products(50, start=150))
    service = StumblingService()
    summary, reported = await import_into(service, path)
    assert service.in_file_order() == [f"p-{n}" for n in range(200)]
    assert (summary.progress.accepted, summary.progress.rejected, summary.progress.rows) == (200, 2, 202)
    assert [progress.rows for progress in reported] == [0, 100, 200, 202]
    assert summary.errors == path.with_name("catalogue.jsonl.errors.jsonl")
    entries = [json.loads(line) for line in summary.errors.read_text().splitlines()]
    assert [(entry["line"], entry["product_id"]) for entry in entries] == [(151, "nameless"), (152, None)]
    assert entries[0]["error"] == "name: required"


async def test_a_clean_import_leaves_no_error_file_of_an_earlier_one(write: Callable[..., Path]) -> None:
    path = write(*products(3))
    stale = path.with_name("catalogue.jsonl.errors.jsonl")
    stale.write_text("old\n")
    summary, _ = await import_into(StumblingService(), path)
    assert summary.errors is None
    assert not stale.exists()


async def test_later_statements_about_a_product_arrive_later(write: Callable[..., Path]) -> None:
    path = write(
        *({"product_id": f"p-{n}", "name": f"round {round_}"} for round_ in range(4) for n in range(CHUNK_LINES))
    )
    service = StumblingService()
    service.before = [503, 200, None, 503]
    await import_into(service, path)
    final = {product["product_id"]: product["name"] for product in service.kept}
    assert set(final.values()) == {"round 3"}


async def test_overload_is_waited_out_as_asked(write: Callable[..., Path]) -> None:
    service, clock = StumblingService(), InstantClock()
    service.before = [429, 503]
    summary, _ = await import_into(service, write(*products(5)), clock)
    assert summary.progress.accepted == 5
    assert clock.slept == [7.0, 7.0]


async def test_patience_ends_with_a_clear_word_and_the_next_run_goes_on(write: Callable[..., Path]) -> None:
    path = write(*products(250))
    service, clock = StumblingService(), InstantClock()
    service.takes_only = "p-0"
    with pytest.raises(ImportStopped, match=r"Not now: try later \(8 tries\)"):
        await import_into(service, path, clock)
    healed = StumblingService()
    summary, reported = await import_into(healed, path)
    assert summary.resumed_from == 100
    assert reported[0].rows == 100
    assert healed.in_file_order() == [f"p-{n}" for n in range(100, 250)]
    assert summary.progress.accepted == 250


async def test_a_finished_import_starts_over_the_next_time(write: Callable[..., Path]) -> None:
    path = write(*products(5))
    await import_into(StumblingService(), path)
    again = StumblingService()
    summary, _ = await import_into(again, path)
    assert summary.resumed_from == 0
    assert len(again.kept) == 5


async def test_restart_and_a_changed_file_start_over(write: Callable[..., Path]) -> None:
    path = write(*products(150))
    broken = StumblingService()
    broken.before = [200, *[400] * 3]
    with pytest.raises(ImportStopped):
        await import_into(broken, path)
    restarted = StumblingService()
    summary, _ = await import_into(restarted, path, restart=True)
    assert (summary.resumed_from, len(restarted.kept)) == (0, 150)

    broken.before = [200, *[400] * 3]
    with pytest.raises(ImportStopped):
        await import_into(broken, path)
    write(*products(151))
    changed = StumblingService()
    summary, _ = await import_into(changed, path)
    assert (summary.resumed_from, len(changed.kept)) == (0, 151)


async def test_a_refusal_that_stays_is_not_tried_again(write: Callable[..., Path]) -> None:
    service, clock = StumblingService(), InstantClock()
    service.before = [403]
    with pytest.raises(ImportStopped, match=r"Not now: try later$"):
        await import_into(service, write(*products(5)), clock)
    assert service.requests == 1
    assert clock.slept == []


async def test_a_broken_connection_is_tried_again(write: Callable[..., Path]) -> None:
    service, clock = StumblingService(), InstantClock()
    service.before = [None, None]
    summary, _ = await import_into(service, write(*products(5)), clock)
    assert summary.progress.accepted == 5
    assert clock.slept == [0.5, 1.0]


async def test_waiting_ends_when_all_is_searchable() -> None:
    service, clock = StumblingService(), InstantClock()
    service.lags = [9, 4, 4, 0]
    left: list[int] = []
    async with service.running() as url, CatalensClient(url) as client:
        await until_settled(client, clock, report=left.append)
    assert left == [9, 4]
    assert service.lags == []


async def test_waiting_gives_up_when_nothing_moves() -> None:
    service, clock = StumblingService(), InstantClock()
    service.lags = [3] * 200
    async with service.running() as url, CatalensClient(url) as client:
        with pytest.raises(CatalensError, match="3 events and 0 pictures are waiting and nothing moves"):
            await until_settled(client, clock, stalled_after=60.0, report=lambda _: None)
    assert clock.time > 60.0
