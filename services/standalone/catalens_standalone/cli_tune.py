"""`catalens model quantize` and `catalens model bench`: a model in int8, and the best settings for this machine."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console

from catalens.errors import CatalensError, Misconfigured

# Everything heavy is imported inside the commands, so that --help answers at once.
# ruff: noqa: PLC0415
if TYPE_CHECKING:
    from rich.table import Table

    from catalens.encoders.bundle import Bundle, Loss
    from catalens.settings import Settings
    from catalens_standalone.tuning import Bench, Trial, Way

ENV_FILE: Final = Path(".env")
# Below these a search is likely to find other products; measured with the demo's pictures (docs/adr/0017).
_CENTRED: Final = 0.97
_OVERLAP: Final = 0.9


class Precision(StrEnum):
    """What a runtime computes in."""

    F32 = "f32"
    BF16 = "bf16"


def quantize(
    images: Annotated[Path, typer.Option(exists=True, file_okay=False, help="A folder of your own pictures.")],
    model: Annotated[str | None, typer.Argument(metavar="NAME", help="CATALENS_MODEL by default.")] = None,
    texts: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Your products' names, one a line; or the demo's."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The new model's name; NAME-int8 by default.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Make it again where it is there already.")] = False,
) -> None:
    """Make an int8 model of one that is here, with your own pictures, and measure what that costs."""
    from catalens.encoders.bundle import load_bundle, resolve
    from catalens.settings import load_settings
    from catalens_standalone.pulling import place_of

    settings = load_settings()
    _quiet(settings)
    try:
        from catalens.encoders import quantize as making
    except ModuleNotFoundError as error:
        raise Misconfigured(
            f"`catalens model quantize` needs {error.name}: install catalens[standalone,quantize]"
        ) from error
    source = load_bundle(resolve(model or settings.model, settings.data_dir))
    chosen = name or f"{Path(model or settings.model).name}-int8"
    target = place_of(chosen, settings.data_dir)
    samples = making.Samples(_files(images), _texts(texts))
    made = making.quantize(
        source, target, samples, settings.pictures, settings.encoder.precision, force=force, report=_report
    )
    console = _console()
    size = sum(path.stat().st_size for path in target.iterdir()) / 1e6
    console.print(f"{target}: {size:,.0f} MB, calibrated with {made.calibration} pictures", soft_wrap=True)
    if made.loss is not None:
        _print_loss(console, made.loss)
    console.print(f"`catalens reindex --model {_plain(chosen)}` changes to it.", soft_wrap=True)


def bench(
    model: Annotated[str | None, typer.Argument(metavar="NAME", help="CATALENS_MODEL by default.")] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="The installation's by default: another one costs a reindex.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="A folder of pictures; the demo's by default.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what was measured; write nothing.")] = False,
) -> None:
    """Time the model in every runtime installed, by lanes and batches, and write the best settings into .env."""
    from catalens.encoders.bundle import load_bundle, resolve
    from catalens.encoders.choice import this_machine
    from catalens.settings import load_settings
    from catalens_standalone import tuning

    settings = load_settings()
    _quiet(settings)
    bundle = load_bundle(resolve(model or settings.model, settings.data_dir))
    encoder = settings.encoder
    if precision is not None:
        encoder = encoder.model_copy(update={"precision": precision.value})
    with tempfile.TemporaryDirectory(prefix="catalens-bench-") as scratch:
        pictures = Path(scratch)
        tuning.put_pictures(_files(images or _demo() / "images"), settings.pictures, pictures)
        runs = tuning.Bench(bundle.folder, pictures, tuning.SECONDS)
        trials = tuning.search(tuning.ways(bundle, encoder, this_machine()), _heard(runs))
        found = tuning.best(trials)
        if found is None:
            raise CatalensError("; ".join(dict.fromkeys(trial.error for trial in trials)))
        _report(f"again, with what is compiled already: {_words(found.way)}")
        again = runs(found.way, warm=True)
        others = _others(settings, bundle, found.way, pictures)
    console = _console()
    console.print(f"{_plain(bundle.manifest.id)}, {found.way.precision}; bulk pictures a second, one query alone")
    console.print(_table_of(trials, found))
    if again.figures is not None:
        console.print(f"Once compiled it is ready in {again.figures.start_seconds:.1f} s.")
    _print_others(console, others, found)
    _write(console, settings, bundle, found.way, dry_run=dry_run)


# --- quantize ---------------------------------------------------------------------------------------------


def _print_loss(console: Console, loss: Loss) -> None:
    table = _table("tower", "held out", "cosine mean", "cosine min", "centred mean", "centred min", "same 10 nearest")
    for tower, count, close in (("image", loss.pictures, loss.image), ("text", loss.texts, loss.text)):
        if close is not None:
            overlap = f"{loss.overlap_at_10:.1%}" if tower == "image" else ""
            figures = (close.cosine_mean, close.cosine_min, close.centred_mean, close.centred_min)
            table.add_row(tower, str(count), *(f"{figure:.4f}" for figure in figures), overlap)
    console.print(table)
    least = min(close.centred_mean for close in (loss.image, loss.text) if close is not None)
    if least < _CENTRED or loss.overlap_at_10 < _OVERLAP:
        console.print("[yellow]That is much: a search would find other products. Better stay with the source.[/yellow]")


def _texts(file: Path | None) -> list[str]:
    """Return the lines of `file`, or the texts of the demo's catalogue."""
    if file is not None:
        try:
            return file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise CatalensError(f"{file} is not UTF-8 text: {error}") from error
    products = [json.loads(line) for line in (_demo() / "catalog.jsonl").read_text(encoding="utf-8").splitlines()]
    return [text for field in ("name", "category", "description") for one in products if (text := one.get(field))]


# --- bench ------------------------------------------------------------------------------------------------


def _heard(runs: Bench) -> Callable[[Way], Trial]:
    def run(way: Way) -> Trial:
        _report(_words(way))
        return runs(way)

    return run


def _others(settings: Settings, bundle: Bundle, way: Way, pictures: Path) -> list[tuple[str, str, Trial]]:
    """Return what the other precision, and an int8 model of this one, would give, and what they cost."""
    from dataclasses import replace

    from catalens_standalone import tuning

    found = []
    runs = tuning.Bench(bundle.folder, pictures, tuning.SECONDS)
    other = replace(way, precision="bf16" if way.precision == "f32" else "f32")
    if way.runtime == "onnx":  # it has but one
        other = replace(other, runtime="openvino")
    _report(_words(other))
    found.append((other.precision, f"--precision {other.precision}", runs(other)))
    int8 = tuning.int8_of(bundle, settings.data_dir / "models")
    if int8 is not None:
        same = replace(way, runtime="openvino", device="cpu")
        _report(f"{int8.name}, {_words(same)}")
        found.append((int8.name, f"CATALENS_MODEL={int8.name}", tuning.Bench(int8, pictures, tuning.SECONDS)(same)))
    return found


def _print_others(console: Console, others: Sequence[tuple[str, str, Trial]], found: Trial) -> None:
    for name, setting, trial in others:
        if trial.figures is None:
            console.print(f"{name}: [dim]{_plain(trial.error)}[/dim]", soft_wrap=True)
            continue
        rates = [one.figures.pictures_per_second if one.figures else None for one in (trial, found)]
        times = f", {rates[0] / rates[1]:.1f} times the pictures a second" if rates[0] and rates[1] else ""
        line = f"{name}: {_figures(trial)}{times}. Vectors change: {setting}, then `catalens reindex`."
        console.print(line, soft_wrap=True)
    if all("int8" not in name and "CATALENS_MODEL" not in setting for name, setting, _ in others):
        console.print("int8: `catalens model quantize NAME --images FOLDER` makes one, and says what it costs.")


def _figures(trial: Trial) -> str:
    figures = trial.figures
    if figures is None:
        return trial.error
    parts = [
        None if figures.pictures_per_second is None else f"{figures.pictures_per_second:.1f} pictures/s",
        None if figures.picture_ms is None else f"one picture {figures.picture_ms:.0f} ms",
        None if figures.text_ms is None else f"one text {figures.text_ms:.1f} ms",
        f"{figures.memory_mib:,.0f} MiB",
    ]
    return ", ".join(part for part in parts if part)


def _table_of(trials: Sequence[Trial], found: Trial) -> Table:
    table = _table("", "runtime", "lanes", "batch", "at once", "bulk /s", "picture ms", "text ms", "MiB", "start s")
    for trial in trials:
        way = trial.way
        runtime = way.runtime if way.device == "cpu" else f"{way.runtime}, {way.device}"
        setting = (runtime, str(way.lanes), str(way.max_batch), str(way.inference_batch or "auto"))
        mark = "[green]best[/green]" if trial is found else ""
        if trial.figures is None:
            table.add_row(mark, *setting, f"[red]{_plain(trial.error)}[/red]")
            continue
        figures = trial.figures
        table.add_row(
            mark, *setting, _shown(figures.pictures_per_second), _shown(figures.picture_ms), _shown(figures.text_ms),
            f"{figures.memory_mib:,.0f}", f"{figures.start_seconds:.1f}",
        )  # fmt: skip
    return table


def _shown(figure: float | None) -> str:
    return "" if figure is None else f"{figure:.1f}"


def _words(way: Way) -> str:
    at_once = f", {way.inference_batch} at once" if way.inference_batch else ""
    return f"{way.runtime}, {way.precision}, lanes {way.lanes}, batches of {way.max_batch}{at_once}"


def _write(console: Console, settings: Settings, bundle: Bundle, way: Way, *, dry_run: bool) -> None:
    """Write the best way's settings into .env, unless they are not for the model that is served."""
    from catalens.encoders.bundle import resolve
    from catalens_standalone.env_file import set_variables
    from catalens_standalone.tuning import shadowed

    values = way.variables()
    if way.precision != settings.encoder.precision:
        values["CATALENS_ENCODER__PRECISION"] = way.precision
    lines = "\n".join(f"  {name}={value}" for name, value in values.items())
    served = resolve(settings.model, settings.data_dir)
    if dry_run or served.resolve() != bundle.folder.resolve():
        why = "" if dry_run else f": {_plain(settings.model)} is served here, not {_plain(bundle.manifest.id)}"
        console.print(f"Not written{why}:\n{lines}", soft_wrap=True)
        return
    set_variables(ENV_FILE, values)
    console.print(f"Written to {ENV_FILE}; it counts from the next start:\n{lines}", soft_wrap=True)
    if "CATALENS_ENCODER__PRECISION" in values:
        console.print("[yellow]The precision changed, and with it every vector: `catalens reindex`.[/yellow]")
    for name in shadowed(values, os.environ):
        console.print(f"[yellow]{name} is set in the environment, which wins over {ENV_FILE}.[/yellow]")


# --- what they share --------------------------------------------------------------------------------------


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def _demo() -> Path:
    from catalens_standalone.cli import demo_folder

    return demo_folder()


def _quiet(settings: Settings) -> None:
    """Keep the log to what is worth a warning, unless the settings ask for more."""
    from catalens.telemetry import configure_logging

    level = settings.log_level if "log_level" in settings.model_fields_set else "warning"
    configure_logging(settings.model_copy(update={"log_level": level}))


def _report(step: str) -> None:
    """Say on stderr what is done now; stdout carries results only."""
    Console(stderr=True, highlight=False).print(f"[dim]{_plain(step)}[/dim]", soft_wrap=True)


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Column, Table

    made = (Column(column, no_wrap=column != "", overflow="fold") for column in columns)
    return Table(*made, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _console() -> Console:
    return Console(highlight=False)


def _plain(text: str) -> str:
    from rich.markup import escape

    from catalens_standalone.terminal import printable

    return escape(printable(text))
