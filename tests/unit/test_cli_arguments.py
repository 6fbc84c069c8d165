"""What the command line makes of its arguments, and that its page names them all."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from catalens_standalone.cli import app, parse_filters

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reference" / "cli.md"
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]


def understood(words: list[str]) -> None:
    """Prove that `catalens` followed by those words is a command with all that it must have; it is not carried out."""
    command: Any = typer.main.get_command(app)
    said, context = " ".join(words), None
    while True:
        try:
            context = command.make_context(command.name, list(words), parent=context)
            if not hasattr(command, "commands"):
                return
            _, command, words = command.resolve_command(context, [*context._protected_args, *context.args])
        except USAGE_ERROR as error:
            if type(error) is typer.BadParameter:  # such as a file that only the reader has
                return
            pytest.fail(f"catalens {said}: {error}", pytrace=False)


def documented() -> list[str]:
    """Return the command lines of Catalens that the documents show, each once."""
    found: dict[str, None] = {}
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for line in path.read_text(encoding="utf-8").splitlines():
            shown = re.match(r" {4}(?:[A-Z_]+=\S+ +|docker compose run --rm )*catalens ([a-z].*)$", line)
            if shown and not line.endswith("status 0"):  # of a transcript
                found[shown[1]] = None
    return list(found)


@pytest.mark.parametrize("line", documented())
def test_a_command_of_the_documents_is_one(line: str) -> None:
    understood(shlex.split(line, comments=True))


def test_a_wrong_command_would_be_seen() -> None:
    for line in ("keys create shop", "reindex --modle x", "reidnex", "keys"):
        with pytest.raises(pytest.fail.Exception, match=line):
            understood(line.split())


@pytest.mark.parametrize(
    ("arguments", "filters"),
    [
        (["brand=Nike"], {"brand": ["Nike"]}),
        (["brand=Nike", "brand = Adidas"], {"brand": ["Nike", "Adidas"]}),
        (["category=Sport > Shoes"], {"category": ["Sport > Shoes"]}),
        (["price>=20", "price<=80.5"], {"price": {"gte": 20, "lte": 80.5}}),
        (["stock>0"], {"stock": {"gt": 0}}),
        (["price=5"], {"price": [5]}),
        (["in_stock=true"], {"in_stock": [True]}),
        (["attributes.color=red"], {"attributes.color": ["red"]}),
        (["attributes.size=42"], {"attributes.size": [42, "42"]}),
        (["attributes.weight<2"], {"attributes.weight": {"lt": 2}}),
        (["brand=3"], {"brand": ["3"]}),
        (["attributes.x=a=b"], {"attributes.x": ["a=b"]}),
    ],
)
def test_filters(arguments: list[str], filters: dict[str, Any]) -> None:
    assert parse_filters(arguments) == filters


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["brand"], "key=value"),
        (["=Nike"], "key=value"),
        (["price>=cheap"], "cheap is no number"),
        (["price=5", "price>=2"], "already has a value"),
        (["price>=2", "price=5"], "already has a range"),
    ],
)
def test_filters_that_make_no_sense(arguments: list[str], said: str) -> None:
    with pytest.raises(typer.BadParameter, match=said):
        parse_filters(arguments)


def test_the_page_names_every_command_and_option() -> None:
    page = PAGE.read_text(encoding="utf-8")
    group = typer.main.get_group(app)
    assert len(group.commands) == 14
    for name, command in group.commands.items():
        _, _, section = page.partition(f"\n## `catalens {name}")
        assert section, name
        section = section.split("\n## ")[0]
        below = command.commands.values() if isinstance(command, typer.core.TyperGroup) else ()
        for parameter in [*command.params, *(one for each in below for one in each.params)]:
            for option in parameter.opts:
                if option.startswith("--") and option != "--help":
                    assert f"`{option}" in section, f"{name} {option}"
