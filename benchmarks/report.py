"""What every benchmark shares: the machine, the commit, the table and the results file."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
Row: TypeAlias = Mapping[str, Any]


def machine() -> dict[str, Any]:
    """Return what the figures were taken on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    flags: set[str] = set()
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                cpu = value.strip()
            elif name.strip() == "flags":
                flags = set(value.split())
    known = ("avx2", "avx512f", "avx512_vnni", "amx_bf16", "amx_int8")
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "instructions": [flag for flag in known if flag in flags],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }


def commit() -> str:
    """Return the commit that was measured, marked when the tree differs from it."""
    asked = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return asked.stdout.strip() or "unknown"


def publish(name: str, rows: Sequence[Row]) -> None:
    """Print the table and write benchmarks/results/NAME.json."""
    show(name, rows)
    write(name, rows)


def show(name: str, rows: Sequence[Row]) -> None:
    """Print the rows as a table."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=f"Catalens: {name}")
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def write(name: str, rows: Sequence[Row], **more: object) -> None:
    """Write benchmarks/results/NAME.json."""
    target = ROOT / "benchmarks" / "results" / f"{name}.json"
    target.parent.mkdir(exist_ok=True)
    taken = datetime.now(UTC).isoformat(timespec="seconds")
    document = {"taken": taken, "machine": machine(), "commit": commit(), **more, "rows": list(rows)}
    target.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"written to {target.relative_to(ROOT)}")


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least `share` of `values` do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 10_000) * len(ordered) // 10_000) - 1))]


def trend(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the least-squares slope and half its 95 % interval (normal, which looks' correlation makes too narrow)."""
    count = len(points)
    if count < 3:
        return 0.0, math.inf
    mean_x, mean_y = sum(x for x, _ in points) / count, sum(y for _, y in points) / count
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    left = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in points)
    return slope, 1.96 * math.sqrt(left / (count - 2) / spread)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:,.1f}" if isinstance(value, float) else str(value)
