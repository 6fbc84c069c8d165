"""`catalens model`: models fetched, listed and verified; tuned by cli_tune."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from catalens.errors import Misconfigured
from catalens_standalone import cli_tune

# Everything heavy is imported inside the commands, so that --help answers at once.
# ruff: noqa: PLC0415
if TYPE_CHECKING:
    from rich.status import Status
    from rich.table import Table

    from catalens.encoders.bundle import Manifest
    from catalens.settings import Settings

app = typer.Typer(help="Models: fetch, list, verify, quantize, bench.", no_args_is_help=True)


class Precision(StrEnum):
    """What a runtime computes in."""

    F32 = "f32"
    BF16 = "bf16"


@app.command()
def pull(
    model: Annotated[str, typer.Argument(metavar="NAME|OWNER/NAME|FOLDER", help="`catalens model list` shows names.")],
    name: Annotated[str | None, typer.Option(help="The model's name here; its own by default.")] = None,
    revision: Annotated[
        str | None, typer.Option(help="The hub's commit, tag or branch; the newest by default.")
    ] = None,
    image_from: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME|FOLDER", help="For a text tower alone: the CLIP it belongs to.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Make it again where it is there already.")] = False,
) -> None:
    """Make a model bundle of a checkpoint: of a known name, of a model hub's, or of a folder."""
    from catalens.encoders.known import caution
    from catalens.settings import load_settings
    from catalens_standalone.pulling import pull as make

    settings = load_settings()
    _quiet(settings)
    with _status() as status:
        folder, manifest = make(
            model,
            settings.data_dir,
            name=name,
            revision=revision,
            image_from=image_from,
            force=force,
            report=_reporter(status),
        )
    console = _console()
    console.print(f"{folder}: {manifest.id}, {manifest.dimension} values, {_size(manifest)}", soft_wrap=True)
    warning = caution(manifest.licence)
    if warning is not None:
        console.print(f"[yellow]{warning}[/yellow]", soft_wrap=True)
    if settings.model != folder.name:
        console.print(f"`catalens reindex --model {folder.name}` changes to it.", soft_wrap=True)


@app.command("list")
def list_models() -> None:
    """Show the models that are here and those that can be pulled."""
    from catalens.encoders.bundle import read_manifest
    from catalens.encoders.known import KNOWN
    from catalens.settings import load_settings

    settings = load_settings()
    console = _console()
    table = _table("", "name", "family", "values", "weights", "size", "licence", "languages")
    current, folders = _current(settings), _folders(settings)
    for folder in sorted({*folders, *([current] if current else [])}):
        name = folders.get(folder, str(folder))
        mark = "*" if folder == current else ""
        try:
            manifest = read_manifest(folder)
        except Misconfigured as error:
            table.add_row(mark, name, f"[red]{_plain(str(error))}[/red]")
            continue
        table.add_row(
            mark, name, manifest.family, str(manifest.dimension), manifest.precision, _size(manifest),
            _plain(manifest.licence) or "unknown", " ".join(manifest.languages),
        )  # fmt: skip
    console.print(table)
    if current is None:
        console.print(f"[yellow]CATALENS_MODEL={_plain(settings.model)} is none of them.[/yellow]", soft_wrap=True)
    known = _table("name", "values", "licence", "languages", "when to choose it", title="can be pulled")
    for model in KNOWN.values():
        if model.name not in folders.values():
            known.add_row(model.name, str(model.dimension), model.licence, " ".join(model.languages), model.choose)
    if known.row_count:
        console.print(known)


@app.command()
def verify(
    model: Annotated[str | None, typer.Argument(metavar="NAME", help="CATALENS_MODEL by default.")] = None,
    images: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="A folder of pictures; the demo's by default.")
    ] = None,
    precision: Annotated[Precision | None, typer.Option(help="The installation's by default.")] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Pictures and texts at most, each.")] = 200,
) -> None:
    """Compare a pulled model, in every runtime installed, with torch; exit code 1 if a vector is wrong."""
    from catalens.settings import load_settings
    from catalens_standalone.verifying import BOUNDS
    from catalens_standalone.verifying import verify as compare

    settings = load_settings()
    _quiet(settings)
    chosen = precision.value if precision else settings.encoder.precision
    bound = BOUNDS[chosen]
    pictures, texts = _samples(images, count)
    with _status() as status:
        findings = compare(model or settings.model, settings, chosen, pictures, texts, _reporter(status))
    if not findings:
        raise Misconfigured(f"no runtime is installed here, beside torch, that computes in {chosen}: nothing to verify")
    console = _console()
    table = _table("runtime", "tower", "compared", "cosine mean", "cosine min", "centred min", "")
    for finding in findings:
        close = finding.close
        good = close.cosine_min >= bound
        table.add_row(
            finding.runtime, finding.tower, str(finding.items), f"{close.cosine_mean:.5f}", f"{close.cosine_min:.5f}",
            f"{close.centred_min:.5f}", "[green]good[/green]" if good else f"[red]below {bound}[/red]",
        )  # fmt: skip
    console.print(table)
    if any(finding.close.cosine_min < bound for finding in findings):
        raise typer.Exit(1)


app.command()(cli_tune.quantize)
app.command()(cli_tune.bench)


# --- what they share --------------------------------------------------------------------------------------


def _samples(images: Path | None, count: int) -> tuple[list[bytes], list[str]]:
    """Return pictures of the folder, or the demo's, and texts of the demo's catalogue."""
    from catalens_standalone.cli import demo_folder

    demo = demo_folder()
    folder = images or demo / "images"
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    products = [json.loads(line) for line in (demo / "catalog.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [text for field in ("name", "category", "description") for one in products if (text := one.get(field))]
    return [path.read_bytes() for path in files[:count]], list(dict.fromkeys(texts))[:count]


def _folders(settings: Settings) -> dict[Path, str]:
    """Return every bundle that has a name, by its folder."""
    from catalens.encoders.bundle import MANIFEST, bundled

    pulled = sorted(settings.data_dir.joinpath("models").glob(f"[!.]*/{MANIFEST}"))
    return bundled() | {path.parent.resolve(): path.parent.name for path in pulled}


def _current(settings: Settings) -> Path | None:
    """Return the folder of the model that the settings name, if it is there."""
    from catalens.encoders.bundle import resolve

    try:
        return resolve(settings.model, settings.data_dir).resolve()
    except Misconfigured:
        return None


def _quiet(settings: Settings) -> None:
    """Keep the log to what is worth a warning, unless the settings ask for more."""
    from catalens.telemetry import configure_logging

    level = settings.log_level if "log_level" in settings.model_fields_set else "warning"
    configure_logging(settings.model_copy(update={"log_level": level}))


def _size(manifest: Manifest) -> str:
    return f"{sum(entry.bytes for entry in manifest.files.values()) / 1e6:,.0f} MB"


def _reporter(status: Status) -> Callable[[str], None]:
    """Return what shows each step: on a terminal in place, elsewhere a line each."""

    def report(step: str) -> None:
        if status.console.is_terminal:
            status.update(_plain(step))
        else:
            status.console.print(_plain(step), soft_wrap=True)

    return report


def _status() -> Status:
    return Console(stderr=True, highlight=False).status("")


def _table(*columns: str, title: str | None = None) -> Table:
    from rich import box
    from rich.table import Column, Table

    whole = {"name", "values", "size", "runtime", "tower"}
    made = (Column(column, no_wrap=column in whole, overflow="fold") for column in columns)
    return Table(*made, box=box.SIMPLE_HEAD, title=title, title_justify="left", padding=(0, 1, 0, 0))


def _console() -> Console:
    return Console(highlight=False)


def _plain(text: str) -> str:
    from rich.markup import escape

    from catalens_standalone.terminal import printable

    return escape(printable(text))
