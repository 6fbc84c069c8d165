"""`catalens eval`: judged queries against a running service, measured, and two configurations compared."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console

from catalens.errors import CatalensError

# Everything heavy is imported inside the commands, so that --help answers at once.
# ruff: noqa: PLC0415
if TYPE_CHECKING:
    from rich.table import Table

    from catalens.client import CatalensClient
    from catalens.settings import Settings
    from catalens_standalone.evaluating import Change, Figures, Interval, Query

_AT_ONCE: Final = 4
_ATTEMPTS: Final = 6
_PIPED: Final = 160
"""Columns of the tables where no terminal says how many it has."""
_CHANGED: Final = 10
"""Queries printed; the HTML report has more."""
_SHOWN: Final = 5
"""Results of a query that the report shows."""


class Layout(StrEnum):
    """Public sets that `convert` reads."""

    MARQO_GS = "marqo-gs"
    FASHION200K = "fashion200k"
    DEEPFASHION_INSHOP = "deepfashion-inshop"
    FASHION_IQ = "fashion-iq"
    ESCI = "esci"


class _RunByDefault(typer.core.TyperGroup):
    """Lets `catalens eval FILE` stand for `catalens eval run FILE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `run` in front of what names no command."""
        if args and args[0] not in (*self.commands, "-h", "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_RunByDefault,
    no_args_is_help=True,
    help="Measure how good the answers are: `catalens eval FILE` stands for `catalens eval run FILE`.",
)


@dataclass(frozen=True, slots=True)
class Configuration:
    """Where a search is sent, and what is added to each query."""

    name: str
    url: str
    body: Mapping[str, Any]


@dataclass(slots=True)
class Answers:
    """What one configuration answered, query by query."""

    rankings: list[list[str]]
    shown: list[list[dict[str, Any]]]
    """The best results with their fields, for a person to look at."""
    refused: dict[int, str] = field(default_factory=dict)
    """By query, why it was not answered; it counts as if nothing was found."""
    degraded: dict[int, str] = field(default_factory=dict)
    """By query, why the answer is less than was asked for."""


@dataclass(frozen=True, slots=True)
class Group:
    """The figures of some of the queries: one row of intervals a configuration, and how the second differs."""

    name: str
    count: int
    intervals: Sequence[Sequence[Interval]]
    changes: Sequence[Change] = ()


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All that was found out."""

    queries: Sequence[Query]
    configurations: Sequence[Configuration]
    answers: Sequence[Answers]
    figures: Sequence[Figures]
    groups: Sequence[Group]
    folder: Path
    """What the queries' picture paths count from."""
    proxy: bool
    """The queries were made of the catalogue's own titles."""


@app.command()
def run(
    queries: Annotated[
        Path | None, typer.Argument(metavar="FILE", exists=True, dir_okay=False, help="Judged queries, JSON lines.")
    ] = None,
    from_titles: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="In place of FILE: N names of the catalogue's own products."),
    ] = None,
    a: Annotated[
        str,
        typer.Option("--a", metavar="JSON|URL", help='Fields of the search, such as {"mode":"semantic"}, or a URL.'),
    ] = "{}",
    b: Annotated[str | None, typer.Option("--b", metavar="JSON|URL", help="What to compare it with.")] = None,
    html: Annotated[Path | None, typer.Option(dir_okay=False, help="Write a report with pictures there.")] = None,
) -> None:
    """Search a running Catalens for each query and print recall, MRR and nDCG with their 95 % intervals."""
    from catalens.settings import load_settings
    from catalens_standalone import evaluating

    if (queries is None) == (from_titles is None):
        raise typer.BadParameter("give a file of queries or --from-titles N")
    settings = load_settings()
    configurations = [_configuration(one, settings) for one in (a, b) if one is not None]
    judged = [] if queries is None else evaluating.queries(queries.read_bytes().splitlines())
    folder = Path() if queries is None else queries.parent
    try:
        found = asyncio.run(_run(settings, judged, from_titles, configurations, folder, html))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    _print(found)
    if any(answers.refused for answers in found.answers):
        raise typer.Exit(1)


@app.command()
def convert(
    layout: Annotated[Layout, typer.Argument(help="Which set it is.")],
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Where it was unpacked.")],
    products: Annotated[Path, typer.Option(dir_okay=False, help="Write products there, for `catalens import`.")],
    queries: Annotated[Path, typer.Option(dir_okay=False, help="Write queries there, for `catalens eval`.")],
) -> None:
    """Turn a public evaluation set on disk into products and judged queries."""
    from catalens_standalone import eval_layouts

    found = eval_layouts.convert(layout.value, folder)
    for path, rows in ((products, found.products.values()), (queries, found.queries)):
        with path.open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    Console(soft_wrap=True).print(f"{len(found.products):,} products, {len(found.queries):,} queries")


# --- asking -----------------------------------------------------------------------------------------------


def _configuration(text: str, settings: Settings) -> Configuration:
    from catalens_standalone.client import service_url

    if text.startswith(("http://", "https://")):
        return Configuration(text, text.rstrip("/"), {})
    try:
        body = json.loads(text)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise typer.BadParameter(f"{text}: neither a JSON object nor an http(s) address")
    taken = {"query", "image", "limit", "offset", "include"} & body.keys()
    if taken:
        raise typer.BadParameter(f"{text}: {', '.join(sorted(taken))} come from the queries or are fixed")
    return Configuration(text, service_url(settings), body)


async def _run(
    settings: Settings,
    queries: list[Query],
    from_titles: int | None,
    configurations: Sequence[Configuration],
    folder: Path,
    html: Path | None,
) -> Evaluation:
    from catalens_standalone.client import connect

    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connect(settings, one.url)) for one in configurations]
        if from_titles is not None:
            queries = await _from_titles(clients[0], from_titles)
        answers = [
            await _ask(client, queries, one.body, folder) for client, one in zip(clients, configurations, strict=True)
        ]
        found = await asyncio.to_thread(_measured, queries, configurations, answers, folder, from_titles is not None)
        if html is not None:
            from catalens_standalone import eval_report

            page = await eval_report.page(found, clients)
            await asyncio.to_thread(html.write_text, page, encoding="utf-8")
    return found


async def _from_titles(client: CatalensClient, count: int) -> list[Query]:
    from catalens_standalone import evaluating

    products = []
    async for line in client.export():
        product = await asyncio.to_thread(json.loads, line)  # with its pictures in it, a line may be long
        products.append({key: product.get(key) for key in ("product_id", "name", "locale")})
    found = evaluating.from_titles(products, count)
    if not found:
        raise CatalensError("the catalogue is empty")
    return found


async def _ask(client: CatalensClient, queries: Sequence[Query], body: Mapping[str, Any], folder: Path) -> Answers:
    """Return what the service answers, a few queries at a time."""
    answers = Answers([[] for _ in queries], [[] for _ in queries])
    waiting = iter(enumerate(queries))
    console = Console(stderr=True)

    async def work() -> None:
        for row, query in waiting:
            await _ask_one(client, query, body, folder, answers, row)
            status.update(f"searching … {row + 1:,} of {len(queries):,}")

    with console.status("searching …") as status:
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(_AT_ONCE):
                    group.create_task(work(), name=f"eval-{number}")
        except* CatalensError as errors:
            raise errors.exceptions[0] from None
    return answers


async def _ask_one(
    client: CatalensClient, query: Query, body: Mapping[str, Any], folder: Path, answers: Answers, row: int
) -> None:
    from catalens.client import Refused
    from catalens_standalone.evaluating import DEPTH

    asked = {**body, "limit": DEPTH, "include": ["name", "image"]}
    if query.query is not None:
        asked["query"] = query.query
    try:
        if query.image is not None:
            asked["image"] = await _picture(query.image, folder)
        answer = await _patiently(client, asked)
    except (Refused, OSError) as error:
        answers.refused[row] = str(error)
        return
    answers.rankings[row] = [hit["product_id"] for hit in answer["results"]]
    answers.shown[row] = answer["results"][:_SHOWN]
    if answer.get("degraded"):
        answers.degraded[row] = str(answer["degraded"])


async def _picture(image: str, folder: Path) -> dict[str, str]:
    if "://" in image:
        return {"url": image}
    return {"data": base64.b64encode(await asyncio.to_thread((folder / image).read_bytes)).decode()}


async def _patiently(client: CatalensClient, body: Mapping[str, Any]) -> dict[str, Any]:
    """Search; what is refused for the moment is tried again, for about a minute."""
    from catalens.client import Refused

    for attempt in range(1, _ATTEMPTS):
        try:
            return await _searched(client, body)
        except Refused as refused:
            if not refused.passing:
                raise
            await asyncio.sleep(refused.retry_after or min(2**attempt, 15))
    return await _searched(client, body)


async def _searched(client: CatalensClient, body: Mapping[str, Any]) -> dict[str, Any]:
    return (await client.search(**body)).model_dump(mode="json", exclude_unset=True)


# --- figures ----------------------------------------------------------------------------------------------


def _measured(
    queries: Sequence[Query],
    configurations: Sequence[Configuration],
    answers: Sequence[Answers],
    folder: Path,
    proxy: bool,
) -> Evaluation:
    import numpy as np

    from catalens_standalone import evaluating

    figures = [
        np.array(
            [evaluating.measure(ranking, query.relevant) for ranking, query in zip(one.rankings, queries, strict=True)]
        )
        for one in answers
    ]
    groups = [
        Group(
            name,
            len(rows),
            [evaluating.intervals(one[rows]) for one in figures],
            evaluating.changes(figures[0][rows], figures[1][rows]) if len(figures) == 2 else (),
        )
        for name, rows in evaluating.groups(queries)
    ]
    return Evaluation(queries, configurations, answers, figures, groups, folder, proxy)


PROXY: Final = (
    "These queries are the catalogue's own titles: a proxy, easier than what people type, and one that favours lexical "
    "search. Judged queries say more."
)


def _print(found: Evaluation) -> None:
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, _PIPED)  # a cell broken over lines is no use to a file
    for letter, one in zip("AB", found.configurations, strict=False):
        console.print(f"{letter}: {_plain(one.name)}", soft_wrap=True)
    console.print(_table(found))
    if len(found.figures) == 2:
        console.print(_changed(found))
    if found.proxy:
        console.print(f"[yellow]{PROXY}[/yellow]", soft_wrap=True)
    for letter, answers in zip("AB", found.answers, strict=False):
        for rows, what in (
            (answers.refused, "were not answered and count as nothing found"),
            (answers.degraded, "were degraded"),
        ):
            if rows:
                first = next(iter(rows.values()))
                errors.print(f"[red]{letter}: {len(rows)} queries {what}: {_plain(first)}[/red]", soft_wrap=True)


def _table(found: Evaluation) -> Table:
    from rich import box
    from rich.table import Table

    from catalens_standalone.evaluating import MEASURES

    table = Table("queries", "", *MEASURES, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for group in found.groups:
        for letter, intervals in zip("AB", group.intervals, strict=False):
            name = f"{_plain(group.name)}, {group.count}" if letter == "A" else ""
            table.add_row(
                name, letter, *(f"{one.mean:.3f} [dim]{one.low:.3f}-{one.high:.3f}[/dim]" for one in intervals)
            )
        if group.changes:
            table.add_row("", "B-A", *(f"{one.difference:+.3f} {significance(one)}" for one in group.changes))
    return table


def significance(change: Change) -> str:
    """Return p as it is written."""
    return f"p={change.p:.3f}" if change.p >= 0.001 else "p<0.001"


def _changed(found: Evaluation) -> Table | str:
    from rich import box
    from rich.table import Table

    from catalens_standalone.evaluating import MEASURES, most_changed

    rows = most_changed(found.figures[0], found.figures[1], _CHANGED)
    if not rows:
        return "No query changed."
    ndcg = MEASURES.index("nDCG@10")
    table = Table("changed most", "rank A", "rank B", "nDCG@10 A", "B", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in rows:
        ranks = (first_right(answers.rankings[row], found.queries[row]) for answers in found.answers)
        values = (f"{figures[row, ndcg]:.3f}" for figures in found.figures)
        table.add_row(_plain(found.queries[row].shown), *ranks, *values)
    return table


def first_right(ranking: Sequence[str], query: Query) -> str:
    """Return the rank of the first right product, or a dash."""
    ranks = (str(rank) for rank, product in enumerate(ranking, start=1) if query.relevant.get(product))
    return next(ranks, "-")


def _plain(text: str) -> str:
    from rich.markup import escape

    from catalens_standalone.terminal import printable

    return escape(printable(text))
