"""The commands that copy a data folder and bring one back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# Everything heavy is imported inside the commands, so that --help answers at once.
# ruff: noqa: PLC0415

_WITHOUT = (
    "A process runs: its index is not in the backup and will be made anew of the log. For a copy with the index, stop "
    "it first."
)


def backup(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to; it must not exist yet.")],
) -> None:
    """Copy the data folder: the event log and the uploaded pictures, and the index too if no process runs.

    Safe while one runs: all that was acknowledged before is in the copy.
    """
    from catalens.engines.backup import back_up
    from catalens.settings import load_settings

    found = back_up(load_settings(), folder)
    typer.echo(f"{folder}: {found.records:,} records of the log, {found.pictures:,} pictures.")
    if not found.index:
        typer.echo(_WITHOUT, err=True)


def restore(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", exists=True, file_okay=False, help="A backup.")],
) -> None:
    """Make the data folder of a backup; it must be empty or not there. Everything is checked first."""
    from catalens.engines.backup import restore as bring_back
    from catalens.settings import load_settings

    target = load_settings().data_dir
    found = bring_back(folder, target)
    typer.echo(f"{target} is as it was at {found.taken}: {found.records:,} records of the log.")
    if not found.index:
        typer.echo("Its index is made anew when the process starts: searches find more by the minute.", err=True)
