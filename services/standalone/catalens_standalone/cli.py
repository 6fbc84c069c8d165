"""The command `catalens`: starts the standalone process, and speaks HTTP to one that runs."""

from __future__ import annotations

import asyncio
import codecs
import io
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console

from catalens.errors import CatalensError
from catalens_standalone import cli_backup, cli_dlq, cli_eval, cli_keys, cli_model, cli_reindex, cli_topics
from catalens_standalone.terminal import printable

# Everything heavy is imported inside the commands, so that --help and search answer at once.
# ruff: noqa: PLC0415
if TYPE_CHECKING:
    from rich.progress import Progress as ProgressBar
    from rich.table import Table

    from catalens.client import CatalensClient
    from catalens.settings import Settings
    from catalens_standalone.importer import Progress, Source, Summary

T = TypeVar("T")

app = typer.Typer(
    name="catalens",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Find products by picture, by words and by both. Settings: CATALENS_… variables, docs/reference/settings.md",
)


class Mode(StrEnum):
    """How to rank."""

    AUTO = "auto"
    SEMANTIC = "semantic"
    LEXICAL = "lexical"
    HYBRID = "hybrid"


class Using(StrEnum):
    """Which of the products' vectors to compare with."""

    BOTH = "both"
    IMAGE = "image"
    TEXT = "text"


def main() -> None:
    """Run the command line; expected errors are one line on stderr and a non-zero exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A locale that is missing or says ASCII, as in many a container: product names are UTF-8 all the same.
        if isinstance(stream, io.TextIOWrapper) and codecs.lookup(stream.encoding).name == "ascii":
            stream.reconfigure(encoding="utf-8")
    try:
        app()
    except CatalensError as error:
        _errors().print(f"[red]error:[/red] {_plain(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except BrokenPipeError:
        # The reader of a pipe went away, as `head` does; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"catalens {version('catalens')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Take the options that go before a command."""


# --- serve, demo ------------------------------------------------------------------------------------------


@app.command()
def serve() -> None:
    """Run ingest, embedder and query in this process, until Ctrl-C."""
    from catalens.settings import load_settings

    settings = load_settings()
    _start(settings)
    asyncio.run(_served(settings, lambda url: typer.echo(f"Catalens answers at {url}")))


@app.command()
def demo() -> None:
    """Run as `serve` does, with the demo catalogue in it."""
    from catalens.settings import load_settings

    settings = load_settings()
    if "log_level" not in settings.model_fields_set:
        settings = settings.model_copy(update={"log_level": "warning"})
    _start(settings)
    asyncio.run(_demo(settings))


def _start(settings: Settings) -> None:
    """Say early what would otherwise fail late."""
    from catalens import tracing
    from catalens.errors import Misconfigured
    from catalens.lifecycle import one_heap
    from catalens.telemetry import configure_logging
    from catalens_standalone.doctor import port

    one_heap()
    configure_logging(settings)
    tracing.configure(settings)
    free = port(settings.http.host, settings.http.port)
    if free.status == "fail":
        raise Misconfigured(f"cannot listen on {free.finding}; {free.advice}")


async def _served(settings: Settings, ready: Callable[[str], None]) -> None:
    from catalens_standalone.process import serve as run

    await run(settings, ready=ready)


async def _demo(settings: Settings) -> None:
    """Serve; beside it fill in the demo catalogue. Whichever fails ends both."""
    address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    server = asyncio.create_task(_served(settings, address.set_result), name="server")
    guide = asyncio.create_task(_fill_demo(settings, address), name="guide")
    try:
        await asyncio.wait((server, guide), return_when=asyncio.FIRST_COMPLETED)
        if guide.done():
            await guide
        await server
    finally:
        for task in (guide, server):
            task.cancel()
        await asyncio.gather(guide, server, return_exceptions=True)


async def _fill_demo(settings: Settings, address: asyncio.Future[str]) -> None:
    from catalens_standalone.client import connect
    from catalens_standalone.importer import Importer, Journal, Source

    console = _errors()
    catalogue = demo_folder() / "catalog.jsonl"
    url = await address
    async with connect(settings, url) as client:
        lines = (await asyncio.to_thread(catalogue.read_bytes)).splitlines()
        ids = [json.loads(line)["product_id"] for line in lines]
        found = await asyncio.gather(*(client.get(product_id) for product_id in ids))
        if all(product is not None and product.image_status == "ok" for product in found):
            console.print(f"The {len(ids)} demo products are there and searchable.")
        else:
            source = Source(catalogue)
            journal = await asyncio.to_thread(Journal, source, url, settings.data_dir / "demo.errors.jsonl")
            with _progress_bar(console) as bar:
                summary = await Importer(client).run(source, journal, restart=True, report=_shown(bar, source))
            if summary.errors is not None:
                raise CatalensError(f"{summary.progress.rejected} demo products were rejected: see {summary.errors}")
            await _settled(client, console)
            console.print(f"{summary.progress.accepted} demo products are searchable, with their pictures.")
    console.print(_signpost(url, catalogue.parent / "images" / "leather-sofa.jpg"), highlight=False, soft_wrap=True)


def _signpost(url: str, picture: Path) -> str:
    """Return where to go from here, with commands that work as they stand."""
    command = Path(sys.argv[0]).absolute()
    shown = _near(command) if command.name == "catalens" else "catalens"
    base = "" if url == "http://127.0.0.1:8080" else f"CATALENS_URL={url} "
    return (
        f"\n  The page   [bold]{url}[/bold]\n"
        f'  By words   {base}{shown} search "red boxing gloves"\n'
        f"  By picture {base}{shown} search --image {_near(picture)}\n\n"
        "Ctrl-C stops it; what was imported stays."
    )


def demo_folder() -> Path:
    """Return where the demo catalogue lies: in the wheel, or at the top of the repository."""
    here = Path(__file__).parent
    return next(folder for folder in (here / "demo", here.parents[2] / "demo") if (folder / "catalog.jsonl").exists())


# --- import -----------------------------------------------------------------------------------------------


@app.command("import")
def import_files(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE…", exists=True, dir_okay=False, help="JSON lines or CSV, also .gz")
    ],
    mapping: Annotated[
        list[str] | None,
        typer.Option("--map", metavar="FIELD=COLUMN", help="Where a field comes from, such as name=title. Repeatable."),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Folder of pictures, named in the file or by product_id."),
    ] = None,
    only_mapped: Annotated[
        bool, typer.Option("--only-mapped", help="Leave CSV columns out that no field takes.")
    ] = False,
    errors: Annotated[Path | None, typer.Option(help="Where errors go. Default: FILE.errors.jsonl")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Start over after an import that broke off.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Return when all is searchable with its picture.")] = False,
) -> None:
    """Send catalogue files to a running Catalens; after a break the same command goes on where it stopped.

    Exit code 1 if anything was rejected or came without its picture.
    """
    from catalens.settings import load_settings
    from catalens_standalone.catalogue_file import parse_mapping
    from catalens_standalone.importer import Source

    settings = load_settings()
    if errors is not None and len(files) > 1:
        raise typer.BadParameter("--errors names one file: import one file with it")
    chosen = parse_mapping(mapping or [])
    sources = [Source(path, images, chosen, only_mapped, settings.pictures.max_bytes) for path in files]
    try:
        summaries = asyncio.run(_import(settings, sources, errors, restart=restart, wait=wait))
    except KeyboardInterrupt:
        _errors().print("Stopped. The same command goes on from here; --restart starts over.")
        raise typer.Exit(130) from None
    if any(summary.errors is not None for summary in summaries):
        raise typer.Exit(1)


async def _import(
    settings: Settings, sources: list[Source], errors: Path | None, *, restart: bool, wait: bool
) -> list[Summary]:
    from catalens_standalone.importer import Importer, ImportStopped, Journal

    console = _errors()
    summaries = []
    async with _client(settings) as client:
        for source in sources:
            journal = await asyncio.to_thread(Journal, source, client.url, errors)
            try:
                with _progress_bar(console) as bar:
                    summary = await Importer(client).run(source, journal, restart=restart, report=_shown(bar, source))
            except ImportStopped as stopped:
                raise CatalensError(f"{stopped}. The import stopped; the same command goes on from there.") from stopped
            summaries.append(summary)
            Console().print(_summary(source, summary))
        if wait:
            await _settled(client, console)
            console.print("All of it is searchable.")
    return summaries


def _progress_bar(console: Console) -> ProgressBar:
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as ProgressBar

    return ProgressBar(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rows]:,} products"),
        TextColumn("{task.fields[rate]:,.0f}/s"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _shown(bar: ProgressBar, source: Source) -> Callable[[Progress], None]:
    """Return what an importer reports to, so that the bar shows it."""
    task = bar.add_task(source.path.name, total=max(source.path.stat().st_size, 1), rows=0, rate=0.0)
    first: list[int] = []

    def report(progress: Progress) -> None:
        if not first:
            first.append(progress.rows)
            if progress.rows:
                bar.console.print(f"Going on after the first {progress.rows:,} products (--restart starts over).")
            bar.reset(task, completed=progress.position, rows=progress.rows, rate=0.0)
            return
        elapsed = bar.tasks[task].elapsed or 1e-9
        bar.update(
            task, completed=progress.position, rows=progress.rows, rate=(progress.rows - first[0]) / max(elapsed, 1e-9)
        )

    return report


async def _settled(client: CatalensClient, console: Console) -> None:
    from catalens_standalone.importer import until_settled

    with console.status("embedding …") as status:
        await until_settled(client, report=lambda left: status.update(f"embedding … {left:,} to go"))


def _summary(source: Source, summary: Summary) -> Table:
    from rich.table import Table

    done = summary.progress
    table = Table(box=None, show_header=False, title=str(source.path), title_justify="left", title_style="bold")
    table.add_column()
    table.add_column(justify="right")
    if summary.resumed_from:
        table.add_row("taken in an earlier run", f"{summary.resumed_from:,}")
    table.add_row("accepted", f"{done.accepted:,}")
    table.add_row("rejected", f"{done.rejected:,}")
    if done.without_picture:
        table.add_row("without a picture", f"{done.without_picture:,}")
    table.add_row("time", f"{summary.seconds:.1f} s ({summary.rate:,.0f} products/s)")
    if summary.errors is not None:
        table.add_row("errors", str(summary.errors))
    return table


# --- search -----------------------------------------------------------------------------------------------


@app.command()
def search(
    query: Annotated[str | None, typer.Argument(help="Words, in any language of the model.")] = None,
    image: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="A picture to search with.")] = None,
    image_weight: Annotated[
        float | None, typer.Option(min=0, max=1, help="With words and picture: 0 = words only, 1 = picture only.")
    ] = None,
    mode: Annotated[Mode, typer.Option(help="How to rank.")] = Mode.AUTO,
    using: Annotated[Using, typer.Option(help="Which of the products' vectors to compare with.")] = Using.BOTH,
    filters: Annotated[
        list[str] | None,
        typer.Option(
            "--filter", metavar="KEY=VALUE", help="brand=Nike, price<=80, attributes.color=red. Repeat a key: any of."
        ),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", help="How many results, 1 to 100.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print the service's answer as it is.")] = False,
) -> None:
    """Search a running Catalens by words, by picture or by both."""
    from catalens.settings import load_settings

    if query is None and image is None:
        raise typer.BadParameter("give words, --image or both")
    body: dict[str, Any] = {"mode": mode.value, "using": using.value, "limit": limit}
    if query is not None:
        body["query"] = query
    if image is not None:
        import base64

        body["image"] = {"data": base64.b64encode(image.read_bytes()).decode()}
    if image_weight is not None:
        body["image_weight"] = image_weight
    if filters:
        body["filters"] = parse_filters(filters)
    asyncio.run(_search(load_settings(), body, as_json=as_json))


def parse_filters(arguments: list[str]) -> dict[str, Any]:
    """Return the filters of a search from key=value, key>=value and so on; the values of one key are alternatives."""
    import re

    bounds = {">=": "gte", "<=": "lte", ">": "gt", "<": "lt"}
    filters: dict[str, Any] = {}
    for argument in arguments:
        found = re.fullmatch(r"\s*([\w.:\- ]+?)\s*(>=|<=|=|>|<)\s*(.+?)\s*", argument)
        if found is None:
            raise typer.BadParameter(f"--filter {argument}: write it as key=value, key>=value or key<=value")
        key, operator, text = found.groups()
        readings = _readings(key, text)
        if operator == "=":
            values = filters.setdefault(key, [])
            if not isinstance(values, list):
                raise typer.BadParameter(f"--filter {argument}: {key} already has a range")
            values += readings
        else:
            if not isinstance(readings[0], int | float):
                raise typer.BadParameter(f"--filter {argument}: {text} is no number")
            limits = filters.setdefault(key, {})
            if not isinstance(limits, dict):
                raise typer.BadParameter(f"--filter {argument}: {key} already has a value")
            limits[bounds[operator]] = readings[0]
    return filters


def _readings(key: str, text: str) -> list[str | int | float | bool]:
    """Return what `text` may mean: an attribute that reads as a number or true may be that or a text."""
    attribute = key.startswith("attributes.")
    if not attribute and key not in ("price", "stock", "in_stock"):
        return [text]
    try:
        value = json.loads(text)
    except ValueError:
        return [text]
    if not isinstance(value, int | float):
        return [text]
    return [value, text] if attribute else [value]


async def _search(settings: Settings, body: dict[str, Any], *, as_json: bool) -> None:
    async with _client(settings) as client:
        answer = (await client.search(**body)).model_dump(mode="json", exclude_unset=True)
        if as_json:
            typer.echo(printable(json.dumps(answer, ensure_ascii=False, indent=2)))
            return
        console = Console()
        results = answer["results"]
        pictures = await _thumbnails(client, console, results)
    if answer.get("degraded"):
        _errors().print(f"[yellow]{_plain(str(answer['degraded']))}[/yellow]")
    if not console.is_terminal:
        for rank, hit in enumerate(results, start=1):
            cells = (
                str(rank),
                f"{hit['score']:.3f}",
                hit["product_id"],
                hit.get("name"),
                _price(hit),
                hit.get("category"),
            )
            typer.echo("\t".join(printable(" ".join((cell or "").split())) for cell in cells))
        return
    if not results:
        console.print("Nothing found.")
        return
    console.print(_results(results, pictures))
    console.print(f"[dim]{answer.get('mode')} · {answer.get('model')} · {answer.get('took_ms', 0):.0f} ms[/dim]")


def _results(results: list[dict[str, Any]], pictures: list[Any]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1))
    table.add_column("#", justify="right", style="dim")
    if pictures:
        table.add_column("", no_wrap=True)
    table.add_column("score", justify="right")
    table.add_column("product", overflow="fold")
    table.add_column("price", justify="right", no_wrap=True)
    table.add_column("category")
    for rank, hit in enumerate(results, start=1):
        name = Text(printable(hit.get("name") or ""), style="bold")
        name.append(f"\n{hit['product_id']}", style="dim not bold")
        category = Text(printable(hit.get("category") or ""))
        picture = [pictures[rank - 1]] if pictures else []
        table.add_row(str(rank), *picture, f"{hit['score']:.3f}", name, _price(hit), category)
    return table


def _price(hit: dict[str, Any]) -> str:
    price = hit.get("price")
    return "" if price is None else f"{price:,.2f} {hit.get('currency') or ''}".strip()


async def _thumbnails(client: CatalensClient, console: Console, results: list[dict[str, Any]]) -> list[Any]:
    """Return a picture or "" for each result; empty where the terminal shows none."""
    from catalens_standalone.thumbnails import Thumbnail, protocol_for

    protocol = protocol_for(os.environ, terminal=console.is_terminal, true_color=console.color_system == "truecolor")
    if protocol == "none":
        return []

    async def one(address: object) -> Thumbnail | str:
        try:
            async with asyncio.timeout(3):
                picture = await client.picture(str(address))
                return await asyncio.to_thread(Thumbnail, picture, protocol)
        except (CatalensError, OSError, ValueError, TimeoutError):
            return ""  # a picture that cannot be shown takes nothing from the result

    return list(await asyncio.gather(*(one(hit["image"]) if hit.get("image") else _nothing() for hit in results)))


async def _nothing() -> str:
    return ""


# --- doctor -----------------------------------------------------------------------------------------------


@app.command()
def doctor() -> None:
    """Check settings, data folder, model, engines and port, and say what to do; exit code 1 if something fails."""
    from rich.table import Table
    from rich.text import Text

    from catalens_standalone.doctor import examine

    checks = asyncio.run(examine(os.environ))
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    for check in checks:
        finding = Text(check.finding)
        if check.advice:
            finding.append(f"\n→ {check.advice}", style="dim")
        table.add_row(Text(check.status, style=colours[check.status]), check.name, finding)
    Console(soft_wrap=True).print(table)
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(1)


app.command()(cli_reindex.reindex)
app.command()(cli_reindex.reconcile)
app.command()(cli_backup.backup)
app.command()(cli_backup.restore)
app.add_typer(cli_topics.app, name="topics")
app.add_typer(cli_dlq.app, name="dlq")
app.add_typer(cli_model.app, name="model")
app.add_typer(cli_eval.app, name="eval")
app.add_typer(cli_keys.app, name="keys")


# --- what they share --------------------------------------------------------------------------------------


@asynccontextmanager
async def _client(settings: Settings) -> AsyncIterator[CatalensClient]:
    from catalens_standalone.client import connect

    async with connect(settings) as client:
        yield client


def _errors() -> Console:
    """Return the console on stderr: stdout carries results only."""
    return Console(stderr=True)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(printable(text))


def _near(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    main()
