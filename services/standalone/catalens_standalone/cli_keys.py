"""`catalens keys`: makes API keys of which only the hash is kept."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console

# Everything heavy is imported inside the commands, so that --help answers at once.
# ruff: noqa: PLC0415
if TYPE_CHECKING:
    from catalens.settings import ApiKey

app = typer.Typer(help="API keys, of which a service keeps the hash only.", no_args_is_help=True)

_RANDOM_BYTES: Final = 32


class Scope(StrEnum):
    """What a key may do."""

    INGEST = "ingest"
    QUERY = "query"
    ADMIN = "admin"


@app.callback()
def _group() -> None:
    """Hold the commands together, one that it is."""


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Whose key it is; logs say it.")],
    scope: Annotated[list[Scope], typer.Option(help="What it may do. Repeatable.")],
    tenant: Annotated[str, typer.Option(help="Whose products it sees and changes.")] = "default",
    rate: Annotated[float | None, typer.Option(help="Requests a second; five seconds' worth may come at once.")] = None,
    expires: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="The day (UTC) from which on it is refused.")
    ] = None,
) -> None:
    """Make a key: its secret is printed once, its hash goes into CATALENS_API_KEYS_FILE.

    Without that setting the entry for the file is printed too. A running service takes it within seconds.
    """
    import secrets

    from pydantic import ValidationError

    from catalens.keys import digest_of
    from catalens.settings import ApiKey, load_settings

    secret = f"catalens_{secrets.token_urlsafe(_RANDOM_BYTES)}"
    told: dict[str, Any] = {"name": name, "sha256": digest_of(secret), "tenant": tenant}
    told["scopes"] = [one.value for one in dict.fromkeys(scope)]
    if expires is not None:
        told["expires"] = expires.replace(tzinfo=UTC)
    if rate is not None:
        told["rate"] = rate
    try:
        key = ApiKey.model_validate(told)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise typer.BadParameter(f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from error
    path = load_settings().api_keys_file
    entry = _entry(key)
    if path is not None:
        _append(path, entry)
    typer.echo(secret)
    console = Console(stderr=True)
    if path is None:
        typer.echo(entry)
        console.print("The first line is the secret, told this once. The second goes into CATALENS_API_KEYS_FILE.")
    else:
        console.print(f"This is the secret, told this once; its hash is in {path}.", highlight=False, soft_wrap=True)


def _entry(key: ApiKey) -> str:
    return key.model_dump_json(exclude_unset=True)


def _append(path: Path, entry: str) -> None:
    """Add a line to the file, made if there is none; Misconfigured if what is there is broken."""
    from catalens.errors import Misconfigured
    from catalens.keys import parse_keys

    try:
        before = path.read_bytes() if path.exists() else b""
        parse_keys(before, path)
        start = "" if not before or before.endswith(b"\n") else "\n"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "ab") as file:
            file.write(f"{start}{entry}\n".encode())
    except OSError as error:
        raise Misconfigured(f"{path} cannot be written: {error.strerror}") from error
