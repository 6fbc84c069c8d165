"""Writes docs/reference/settings.md and .env.example from the settings model, so that neither can lie."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic import SecretStr

from catalens.settings import Settings
from catalens_standalone.doctor import Variable, variables

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference" / "settings.md"
EXAMPLE = ROOT / ".env.example"

_HEAD = """# Settings

Everything is set by environment variables, or by the same names in a file `.env` in the working directory; the
environment wins. An empty value counts as not set. Lists are JSON. `catalens doctor` names variables that are wrong
or unknown. This page is written by `scripts/settings_reference.py` from the settings model.
"""
_EXAMPLE_HEAD = """# Every setting with its default; copy to .env and uncomment what you change.
# Written by scripts/settings_reference.py; the same as a page: docs/reference/settings.md
"""


def reference() -> str:
    """Return docs/reference/settings.md."""
    parts = [_HEAD]
    for title, members in _sections():
        parts.append(f"\n## {title}\n\n| variable | type | default | meaning |\n|---|---|---|---|\n")
        for variable in members:
            default = _default(variable)
            shown = f"`{default}`" if default else "–"
            meaning = (variable.field.description or "").replace("|", "\\|")
            parts.append(f"| `{variable.name}` | {_kind(variable)} | {shown} | {meaning} |\n")
    return "".join(parts)


def example() -> str:
    """Return .env.example."""
    parts = [_EXAMPLE_HEAD]
    for title, members in _sections():
        parts.append(f"\n# --- {title}\n")
        for variable in members:
            meaning = f"{variable.field.description} " if variable.field.description else ""
            parts.append(f"# {meaning}({_kind(variable).replace('`', '')})\n#{variable.name}={_default(variable)}\n")
    return "".join(parts)


def _sections() -> Iterator[tuple[str, list[Variable]]]:
    """Yield the variables by section, with the section's title."""
    found: dict[str, list[Variable]] = {}
    for variable in variables():
        section = variable.name.split("__")[0].removeprefix("CATALENS_").lower() if "__" in variable.name else ""
        found.setdefault(section, []).append(variable)
    for section, members in found.items():
        if not section:
            yield "The process", members
            continue
        model = Settings.model_fields[section].annotation
        title = (model.__doc__ or section).strip().splitlines()[0].rstrip(".")
        yield title, members


def _kind(variable: Variable) -> str:
    annotation = variable.field.annotation
    options = [option for option in get_args(annotation) if option is not type(None)]
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{option}`" for option in options)
    if get_origin(annotation) is tuple:
        return "JSON list"
    single: Any = options[0] if options else annotation
    names = {int: "whole number", float: "number", bool: "`true`, `false`", str: "text", Path: "path"}
    kind = "secret" if single is SecretStr else names[single]
    bounds = [f"{sign} {bound:g}" for entry in variable.field.metadata for sign, bound in _bounds(entry)]
    return f"{kind} {', '.join(bounds)}" if bounds else kind


def _bounds(entry: object) -> Iterator[tuple[str, float]]:
    if isinstance(entry, Ge):
        yield "≥", float(str(entry.ge))
    elif isinstance(entry, Gt):
        yield ">", float(str(entry.gt))
    elif isinstance(entry, Le):
        yield "≤", float(str(entry.le))


def _default(variable: Variable) -> str:
    value = variable.field.default
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return json.dumps(value)
    return str(value)


def main() -> None:
    """Write both files."""
    for path, text in ((REFERENCE, reference()), (EXAMPLE, example())):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
