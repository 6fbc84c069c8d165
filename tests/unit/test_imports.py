"""The import rule: catalens ← {ingest, embedder, query} ← standalone, and adapters are chosen in one place."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGES = {
    "catalens": ROOT / "shared" / "catalens",
    "catalens_ingest": ROOT / "services" / "ingest" / "catalens_ingest",
    "catalens_embedder": ROOT / "services" / "embedder" / "catalens_embedder",
    "catalens_query": ROOT / "services" / "query" / "catalens_query",
    "catalens_standalone": ROOT / "services" / "standalone" / "catalens_standalone",
}
MAY_IMPORT = {
    "catalens": {"catalens"},
    "catalens_ingest": {"catalens", "catalens_ingest"},
    "catalens_embedder": {"catalens", "catalens_embedder"},
    "catalens_query": {"catalens", "catalens_query"},
    "catalens_standalone": set(PACKAGES),
}
ADAPTERS = {path.stem for path in (PACKAGES["catalens"] / "engines").glob("*.py")} - {"__init__", "backup"}
"""Modules that implement a port, and their parts; `backup` copies the files of a folder and opens none as an engine."""
HEAVY = {"torch", "transformers"}
OF_TORCH = ("catalens.encoders.checkpoints", "catalens.encoders.export", "catalens.encoders.layouts")
RUNTIMES = {"numpy", "openvino", "onnxruntime", "tokenizers", "qdrant_edge", "qdrant_client", *HEAVY}


def sources(package: str) -> Iterator[Path]:
    yield from sorted(PACKAGES[package].rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield every module that is imported anywhere in `tree`, `from a import b` as both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_import_time(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements that run when the module is imported."""
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            yield from at_import_time(statement.orelse)
            continue
        yield statement
        for field in ("body", "orelse", "finalbody"):
            yield from at_import_time(getattr(statement, field, []))
        for handler in getattr(statement, "handlers", []):
            yield from at_import_time(handler.body)


def imported_first(tree: ast.Module) -> set[str]:
    """Return the top-level packages that importing the module imports."""
    return {name.partition(".")[0] for name in imported_at_once(tree)}


def imported_at_once(tree: ast.Module) -> set[str]:
    """Return the modules that importing the module imports."""
    return {
        name
        for statement in at_import_time(tree.body)
        if isinstance(statement, ast.Import | ast.ImportFrom)
        for name in imported(statement)
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_is_below_them(package: str) -> None:
    ours = set(PACKAGES)
    for path in sources(package):
        used = {name.partition(".")[0] for name in imported(ast.parse(path.read_text(encoding="utf-8")))} & ours
        assert used <= MAY_IMPORT[package], f"{path.relative_to(ROOT)} imports {sorted(used - MAY_IMPORT[package])}"


@pytest.mark.parametrize("package", PACKAGES)
def test_adapters_are_chosen_in_one_place_only(package: str) -> None:
    adapters = {f"catalens.engines.{name}" for name in ADAPTERS}
    for path in sources(package):
        if path.parent == PACKAGES["catalens"] / "engines":
            continue
        used = adapters.intersection(imported(ast.parse(path.read_text(encoding="utf-8"))))
        assert not used, f"{path.relative_to(ROOT)} imports {sorted(used)}: go through catalens.engines"


def of_torch(path: Path) -> bool:
    """Tell whether the module is about torch's modules: a checkpoint is nothing else."""
    encoders = PACKAGES["catalens"] / "encoders"
    return path.parent == encoders / "layouts" or path in {encoders / "checkpoints.py", encoders / "export.py"}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_needs_torch_to_be_imported(package: str) -> None:
    for path in sources(package):
        if of_torch(path):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        used = imported_first(tree) & HEAVY
        assert not used, f"{path.relative_to(ROOT)} imports {sorted(used)} at module level"
        used = {name for name in imported_at_once(tree) if name.startswith(OF_TORCH)}
        assert not used, f"{path.relative_to(ROOT)} imports {sorted(used)} at module level, and they import torch"


def test_ingest_runs_without_a_model_runtime() -> None:
    """Its image contains none: importing all of it, with a finder that refuses them, must do."""
    modules = [
        ".".join(path.relative_to(PACKAGES["catalens_ingest"].parent).with_suffix("").parts).removesuffix(".__init__")
        for path in sources("catalens_ingest")
    ]
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({sorted(RUNTIMES)!r}))\n"  # None: import raises
        f"import importlib\nfor name in {modules!r}: importlib.import_module(name)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)


def test_the_rule_sees_what_it_must() -> None:
    tree = ast.parse(
        "from typing import TYPE_CHECKING\n"
        "import os.path\n"
        "if TYPE_CHECKING:\n    import torch.nn\n"
        "try:\n    import transformers\nexcept ImportError:\n    from catalens_query import service\n"
        "class Lazy:\n    import openvino\n    def run(self):\n        import numpy\n"
        "def later():\n    from catalens.engines import edge\n"
    )
    assert imported_first(tree) == {"typing", "os", "transformers", "catalens_query", "openvino"}
    assert {"torch.nn", "catalens_query.service", "numpy", "catalens.engines.edge"} <= set(imported(tree))
