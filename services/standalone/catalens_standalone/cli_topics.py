"""`catalens topics`: the topics on Kafka, shown and made."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

# Everything heavy is imported inside the commands, so that --help answers at once.
# ruff: noqa: PLC0415
if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer(help="The topics on Kafka; the embedded log makes its own.", invoke_without_command=True)


@app.callback()
def show(context: typer.Context) -> None:
    """Show the topics that there are."""
    if context.invoked_subcommand is not None:
        return
    from catalens import topics
    from catalens.events import TOPICS
    from catalens.settings import load_settings

    found = asyncio.run(topics.existing(load_settings()))
    table = _table("topic", "partitions", "copies", "kept")
    for name in TOPICS:
        topic = found.get(name)
        if topic is None:
            table.add_row(name, "", "", "[yellow]missing: run `catalens topics apply`[/yellow]")
        else:
            table.add_row(name, str(topic.partitions), str(topic.replication), _kept(topic.config))
    _console().print(table)


@app.command()
def apply(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be done")] = False,
) -> None:
    """Make the topics that are missing and change those that differ; safe to repeat, never shrinks anything."""
    from catalens import topics
    from catalens.settings import load_settings

    actions = asyncio.run(topics.apply(load_settings(), dry_run=dry_run))
    said = {"create": "made", "change": "changed", "keep": "as it should be"}
    if dry_run:
        said |= {"create": "would be made", "change": "would be changed"}
    table = _table("topic", "", "partitions", "copies", "kept", "note")
    for action in actions:
        new = action.new
        notes = "\n".join(action.notes)
        table.add_row(
            action.topic, said[action.kind], str(new.partitions), str(new.replication), _kept(new.config), notes
        )
    _console().print(table)


def _kept(config: Mapping[str, str]) -> str:
    """Return in words how long records stay."""
    from catalens.topics import CLEANUP, COMPACTION_LAG, RETENTION

    words = []
    policy = config.get(CLEANUP, "")
    if "compact" in policy:
        words.append(f"newest of each key, all of the last {_time(config.get(COMPACTION_LAG, '0'))}")
    if "delete" in policy:
        words.append(_time(config.get(RETENTION, "-1")))
    return ", ".join(words)


def _time(milliseconds: str) -> str:
    hours = int(milliseconds) / 3_600_000
    if hours < 0:
        return "for ever"
    return f"{hours / 24:g} days" if hours >= 48 else f"{hours:g} h"


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(*columns, box=box.SIMPLE_HEAD)


def _console() -> Console:
    return Console(highlight=False)
