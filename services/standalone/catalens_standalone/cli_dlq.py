"""`catalens dlq`: what could not be processed, seen, brought back and dropped, over HTTP."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer
from rich.console import Console

from catalens_standalone.terminal import printable

# Everything heavy is imported inside the commands, so that --help answers at once.
# ruff: noqa: PLC0415
if TYPE_CHECKING:
    from catalens.client import CatalensClient

T = TypeVar("T")

app = typer.Typer(no_args_is_help=True, help="Dead letters: events that could not be processed.")

_AT_ONCE: Final = 8
_PAGE: Final = 1000
_FAILURES_SHOWN: Final = 20


class State(StrEnum):
    """What became of a dead letter."""

    OPEN = "open"
    REPLAYED = "replayed"
    PURGED = "purged"
    ALL = "all"


Ids = Annotated[list[str] | None, typer.Argument(metavar="[ID]…", help="As `catalens dlq list` shows them.")]
All = Annotated[bool, typer.Option("--all", help="Every open letter that the filters leave, in place of IDs.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Reason = Annotated[str | None, typer.Option(help="Only these, such as invalid_event.")]
Topic = Annotated[str | None, typer.Option(help="Only from there, such as catalog.products.")]
Type = Annotated[str | None, typer.Option("--type", help="Only such events: catalens.product.upserted.v1 …")]
ProductId = Annotated[str | None, typer.Option(help="Only this product's.")]
Since = Annotated[str | None, typer.Option(help="Only failed then or later: 2026-11-22, 2026-11-22T18:30:00Z")]
Until = Annotated[str | None, typer.Option(help="Only failed before.")]


@app.command("list")
def list_letters(
    reason: Reason = None,
    topic: Topic = None,
    type_: Type = None,
    product_id: ProductId = None,
    since: Since = None,
    until: Until = None,
    state: Annotated[State, typer.Option(help="What became of them.")] = State.OPEN,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many, the oldest first.")] = 100,
    as_json: Json = False,
) -> None:
    """List dead letters."""
    asked = _filters(reason, topic, type_, product_id, since, until) | {"state": state.value}
    found, more = _run(_listed(asked, limit))
    if as_json:
        typer.echo(printable(json.dumps({"dead_letters": found}, ensure_ascii=False, indent=2)))
        return
    _show_list(found, state=state)
    if more:
        _errors().print(f"There are more than these {limit:,}: --limit shows more of them.")


@app.command()
def show(
    letter_id: Annotated[str, typer.Argument(metavar="ID", help="As `catalens dlq list` shows it.")],
    as_json: Json = False,
) -> None:
    """Show a dead letter with its headers and data."""
    letter = _run(_one(letter_id))
    if as_json:
        typer.echo(printable(json.dumps(letter, ensure_ascii=False, indent=2)))
        return
    from rich.table import Table
    from rich.text import Text

    headers = letter.pop("headers", {})
    data = letter.pop("base64", None)
    body = json.dumps(letter.pop("data"), ensure_ascii=False, indent=2) if "data" in letter else f"base64: {data}"
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in (*letter.items(), *((f"  {name}", value) for name, value in sorted(headers.items()))):
        table.add_row(Text(printable(str(name)), style="dim"), Text(printable(str(value))))
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(Text(printable(body)))


@app.command()
def replay(
    ids: Ids = None,
    every: All = False,
    reason: Reason = None,
    topic: Topic = None,
    type_: Type = None,
    product_id: ProductId = None,
    since: Since = None,
    until: Until = None,
    force: Annotated[bool, typer.Option("--force", help="Also what was replayed or purged before.")] = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Send their events through the embedder again, once the cause is mended; safe to repeat.

    Exit code 1 if one could not be replayed.
    """
    filters = _filters(reason, topic, type_, product_id, since, until)
    if force and every:
        raise typer.BadParameter("--force takes IDs: --all means open letters")

    async def one(client: CatalensClient, letter_id: str) -> bool:
        return await client.replay_letter(letter_id, force=force)

    _each("replay", "replayed", one, ids, filters, every=every, yes=yes, as_json=as_json)


@app.command()
def purge(
    ids: Ids = None,
    every: All = False,
    reason: Reason = None,
    topic: Topic = None,
    type_: Type = None,
    product_id: ProductId = None,
    since: Since = None,
    until: Until = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Drop dead letters for good; safe to repeat. Exit code 1 if one could not be dropped."""

    async def one(client: CatalensClient, letter_id: str) -> bool:
        return await client.purge_letter(letter_id)

    filters = _filters(reason, topic, type_, product_id, since, until)
    _each("purge", "purged", one, ids, filters, every=every, yes=yes, as_json=as_json)


# --- what they share --------------------------------------------------------------------------------------


def _filters(*given: str | None) -> dict[str, str]:
    names = ("reason", "topic", "type", "product_id", "since", "until")
    return {name: value for name, value in zip(names, given, strict=True) if value is not None}


def _each(
    verb: str,
    done: str,
    one: Callable[[CatalensClient, str], Awaitable[bool]],
    ids: list[str] | None,
    filters: Mapping[str, str],
    *,
    every: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Do `one` to each letter that is named or filtered, and say how it went."""
    if bool(ids) == every:
        raise typer.BadParameter(f"say which: IDs, or --all to {verb} every open letter that the filters leave")
    if ids and filters:
        raise typer.BadParameter("filters go with --all, not with IDs")
    tally = _Tally()
    try:
        chosen = ids or _run(_ids(filters))
        if every and chosen and not yes and not _confirmed(f"{verb.title()} {_count(len(chosen))}?"):
            _errors().print("Nothing was done. --yes does not ask.")
            raise typer.Exit(1)
        _run(_all_of(chosen, one, verb, tally))
    except KeyboardInterrupt:
        _errors().print(f"Stopped; {done}: {tally.done:,}. The same command goes on from here.")
        raise typer.Exit(130) from None
    if as_json:
        failed = [{"id": name, "error": error} for name, error in tally.failed.items()]
        typer.echo(json.dumps({done: tally.done, "unchanged": tally.unchanged, "failed": failed}, indent=2))
    else:
        typer.echo(f"{done}: {tally.done:,}")
        if tally.unchanged:
            typer.echo(f"resolved before: {tally.unchanged:,}")
        tally.explain(verb)
    if tally.failed:
        raise typer.Exit(1)


class _Tally:
    """How it went with each letter."""

    def __init__(self) -> None:
        self.done = 0
        self.unchanged = 0
        self.failed: dict[str, str] = {}

    def explain(self, verb: str) -> None:
        """Print what failed: the first by name, all of them by reason."""
        console = _errors()
        for name, error in list(self.failed.items())[:_FAILURES_SHOWN]:
            console.print(f"{name}: {printable(error)}", style="red", markup=False, soft_wrap=True)
        if len(self.failed) > _FAILURES_SHOWN:
            for error, count in Counter(self.failed.values()).most_common():
                console.print(f"{count:,} letters: {printable(error)}", style="red", markup=False, soft_wrap=True)
        if self.failed:
            console.print(f"could not {verb}: {len(self.failed):,}")


async def _all_of(
    ids: list[str], one: Callable[[CatalensClient, str], Awaitable[bool]], verb: str, tally: _Tally
) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = _errors()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    todo = iter(ids)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(verb, total=len(ids))

        async def work(client: CatalensClient) -> None:
            for letter_id in todo:  # shared: each takes the next
                await _counted(client, letter_id, one, tally)
                bar.advance(task)

        async with _client() as client, asyncio.TaskGroup() as tasks:
            for number in range(min(_AT_ONCE, len(ids))):
                tasks.create_task(work(client), name=f"{verb} {number}")


async def _counted(
    client: CatalensClient, letter_id: str, one: Callable[[CatalensClient, str], Awaitable[bool]], tally: _Tally
) -> None:
    """Do it and count it; while the service is overloaded or away it is tried again, which repeats no effect."""
    from catalens.client import PATIENCE, Refused, Unreachable

    failures = 0
    while True:
        try:
            changed = await one(client, letter_id)
        except (Refused, Unreachable) as error:
            failures += 1
            passing = isinstance(error, Unreachable) or error.passing
            if passing and failures < PATIENCE.attempts:
                await asyncio.sleep(PATIENCE.delay(failures))
                continue
            if passing or (isinstance(error, Refused) and error.status in (401, 403)):
                raise  # it would be the same with every other letter
            tally.failed[letter_id] = str(error)
            return
        if changed:
            tally.done += 1
        else:
            tally.unchanged += 1
        return


async def _ids(filters: Mapping[str, str]) -> list[str]:
    return [str(letter["id"]) async for letter in _letters({**filters, "state": "open"})]


async def _listed(asked: Mapping[str, str], limit: int) -> tuple[list[dict[str, Any]], bool]:
    found: list[dict[str, Any]] = []
    async for letter in _letters(asked, page=min(limit + 1, _PAGE)):
        if len(found) == limit:
            return found, True
        found.append(letter)
    return found, False


async def _letters(asked: Mapping[str, str], page: int = _PAGE) -> AsyncIterator[dict[str, Any]]:
    async with _client() as client:
        after: str | None = None
        while True:
            place = {"after": after} if after is not None else {}
            letters, after = await client.dead_letters({**asked, **place, "limit": str(page)})
            for letter in letters:
                yield letter
            if after is None:
                return


async def _one(letter_id: str) -> dict[str, Any]:
    async with _client() as client:
        return await client.dead_letter(letter_id)


def _show_list(found: list[dict[str, Any]], *, state: State) -> None:
    console = Console()
    names = ("id", "failed_at", "reason", "product_id", "type", "attempts", "state", "error")
    if not console.is_terminal:
        for letter in found:
            typer.echo("\t".join(printable(" ".join(str(letter.get(name, "")).split())) for name in names))
        return
    if not found:
        console.print("No dead letters." if state in (State.OPEN, State.ALL) else f"None was {state.value}.")
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1))
    for name in ("id", "failed at", "reason", "product"):
        table.add_column(name, overflow="fold")
    table.add_column("error", overflow="fold", ratio=1)
    for letter in found:
        failed_at = str(letter.get("failed_at", ""))[:19].replace("T", " ")
        told = Text(printable(str(letter.get("error", ""))))
        if letter.get("state") != "open":
            told = Text(f"{letter.get('state')} ", style="dim").append_text(told)
        cells = (printable(str(letter.get(name, ""))) for name in ("reason", "product_id"))
        table.add_row(Text(str(letter.get("id", ""))), failed_at, *(Text(cell) for cell in cells), told)
    console.print(table)


def _confirmed(question: str) -> bool:
    """Ask on stderr; an answer that is missing is no."""
    _errors().print(f"{question} [y/N] ", end="", markup=False)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _count(letters: int) -> str:
    return "1 dead letter" if letters == 1 else f"{letters:,} dead letters"


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run `work`; of what several tasks raise together the first is told."""
    try:
        return asyncio.run(work)
    except BaseExceptionGroup as failures:
        error: BaseException = failures
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None


@asynccontextmanager
async def _client() -> AsyncIterator[CatalensClient]:
    from catalens.settings import load_settings
    from catalens_standalone.client import connect

    settings = load_settings()
    async with connect(settings) as client:
        yield client


def _errors() -> Console:
    """Return the console on stderr: stdout carries results only."""
    return Console(stderr=True)
