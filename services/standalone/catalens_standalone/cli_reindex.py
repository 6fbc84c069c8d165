"""The commands that change the model of an installation and that compare it with its catalogue."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from catalens.errors import CatalensError
from catalens_standalone.terminal import printable

# Everything heavy is imported inside the commands, so that --help answers at once.
# ruff: noqa: PLC0415
if TYPE_CHECKING:
    from catalens.client import CatalensClient
    from catalens.settings import Settings
    from catalens_embedder.reindex import Progress
    from catalens_standalone.reconciling import Finding

_POLL_SECONDS = 0.5
_SHOWN = 50


def reindex(
    model: Annotated[
        str | None, typer.Option(help="The model to change to: its name or, on a cluster, folder.")
    ] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Make a new index from the event log alone.")] = False,
    drop: Annotated[str | None, typer.Option(metavar="NAME", help="Delete an index that is not current.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Show the indexes that there are.")] = False,
) -> None:
    """Change the model, or rebuild the index, while searches go on; after a break the same command goes on from there.

    The old index stays: naming its model again goes back to it. Speaks to the process at CATALENS_URL; where none
    runs, works on the data folder itself; on Kafka and Qdrant, does the work in this process.
    """
    from catalens.settings import load_settings

    if sum((bool(model) or rebuild, bool(drop), listed)) != 1:
        raise typer.BadParameter("say --model or --rebuild, or --drop, or --list")
    settings = load_settings()
    try:
        asyncio.run(_reindex(settings, model, rebuild=rebuild, name=drop))
    except KeyboardInterrupt:
        typer.echo("Stopped. The same command goes on from here.", err=True)
        raise typer.Exit(130) from None


async def _reindex(settings: Settings, model: str | None, *, rebuild: bool, name: str | None) -> None:
    from catalens.client import Unreachable
    from catalens_standalone.client import connect

    if not (settings.kafka.bootstrap_servers and settings.qdrant.url):
        try:
            async with connect(settings) as client:
                await _asked(client, model, rebuild=rebuild, name=name)
                return
        except Unreachable:
            if "url" in settings.model_fields_set:
                raise  # that process was meant, and no folder of this machine
    await _done_here(settings, model, rebuild=rebuild, name=name)


async def _asked(client: CatalensClient, model: str | None, *, rebuild: bool, name: str | None) -> None:
    """Let the process that runs do it."""
    if name is not None:
        await client.drop_index(name)
    if model is None and not rebuild:
        for index in await client.indexes():
            _print_index(index["name"], index["model"], index["revision"], current=index["current"])
        return
    body = {"rebuild": rebuild} if model is None else {"model": model, "rebuild": rebuild}
    state = await client.start_reindex(body)
    with _Bar() as bar:
        while state["state"] == "running":
            bar.show(state.get("phase") or "loading", state["done"], state["total"])
            await asyncio.sleep(_POLL_SECONDS)
            state = await client.reindex_state()
    if state["state"] != "done":
        raise CatalensError(state.get("error") or "the process stopped the reindex; it goes on at its next start")
    typer.echo(f"Searches are answered by {state['model']} now.")


async def _done_here(settings: Settings, model: str | None, *, rebuild: bool, name: str | None) -> None:
    from catalens.engines import EngineRoom
    from catalens.telemetry import configure_logging
    from catalens_embedder.reindex import drop, reindex

    level = settings.log_level if "log_level" in settings.model_fields_set else "warning"
    configure_logging(settings.model_copy(update={"log_level": level}))
    if model is None and not rebuild:
        async with EngineRoom(settings) as room:
            indexes = await room.indexes()
            if name is not None:
                await drop(indexes, name)
            current = await indexes.current()
            for info in await indexes.all():
                _print_index(info.name, info.model, info.spec.revision, current=info == current)
        return
    with _Bar() as bar:

        def report(progress: Progress) -> None:
            bar.show(progress.phase, progress.done, progress.total)

        info = await reindex(settings, model, rebuild=rebuild, report=report)
    typer.echo(f"Searches are answered by {info.model} now.")
    if settings.model != info.model and "model" in settings.model_fields_set:
        typer.echo(f"CATALENS_MODEL={settings.model} is set: unset it, or no process starts any more.", err=True)


def _print_index(name: str, model: str, revision: str, *, current: bool) -> None:
    typer.echo(f"{name}\t{model}\t{revision}\t{'current' if current else ''}".rstrip())


class _Bar:
    """A progress bar on the terminal; nothing elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task("loading", total=None)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` are done; 0 of 0 is not known yet."""
        self._progress.update(self._task, description=what, completed=done, total=total or None)


def reconcile(
    export: Annotated[
        Path, typer.Argument(metavar="EXPORT", exists=True, dir_okay=False, help="The whole catalogue, as for import.")
    ],
    repair: Annotated[
        bool, typer.Option("--repair", help="Send what is missing or differs, delete what is extra.")
    ] = False,
    mapping: Annotated[
        list[str] | None, typer.Option("--map", metavar="FIELD=COLUMN", help="As for import. Repeatable.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Folder of pictures, as for import.")
    ] = None,
) -> None:
    """Compare what is indexed with an export of the catalogue, product by product.

    Exit code 1 if something differs that was not repaired. Safe to repeat.
    """
    from catalens.settings import load_settings
    from catalens_standalone.catalogue_file import parse_mapping
    from catalens_standalone.importer import Source

    settings = load_settings()
    source = Source(export, images, parse_mapping(mapping or []), max_picture=settings.pictures.max_bytes)
    if not asyncio.run(_reconcile(settings, source, repair=repair)):
        raise typer.Exit(1)


async def _reconcile(settings: Settings, source: Any, *, repair: bool) -> bool:
    from catalens_standalone.client import connect
    from catalens_standalone.reconciling import Reconciler

    async with connect(settings) as client:
        lag = (await client.stats()).lag
        if lag:
            typer.echo(f"{lag:,} events are still on their way: what they change may be shown as different.", err=True)
        reconciler = Reconciler(client, source)
        with _Bar() as bar:
            tally = await reconciler.compare(_printer(), bar.show)
        for kind, count in sorted(tally.items()):
            typer.echo(f"{count:,} {kind}")
        if not any(count for kind, count in tally.items() if kind != "equal"):
            return True
        if not repair:
            typer.echo("--repair sends what is missing or differs, and deletes what is extra.", err=True)
            return False
        with _Bar() as bar:
            left = await reconciler.repair(bar.show)
        for told in left:
            typer.echo(printable(told), err=True)
        return not left


def _printer() -> Callable[[Finding], None]:
    """Return what prints the first findings, one a line; the tally has them all."""
    shown = 0

    def show(finding: Finding) -> None:
        nonlocal shown
        shown += 1
        if shown <= _SHOWN:
            typer.echo(printable(f"{finding.kind}\t{finding.product_id}\t{finding.told}".rstrip()))
        elif shown == _SHOWN + 1:
            typer.echo("…")

    return show
