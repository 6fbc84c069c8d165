"""The peers' own environments, under .cache/peers: made at the first run, and again when their pins change.

Those that need torch see the project's (its folder of packages comes behind their own): torch is gigabytes.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.report import ROOT

_FOLDER: Final = ROOT / ".cache" / "peers"
_SHARES_TORCH: Final = {"sentence": True, "infinity": True, "fastembed": False, "faiss": False}
ENCODERS: Final = ("sentence", "infinity", "fastembed")


def python(environment: str) -> Path:
    """Return the interpreter of an environment; "project" is the one that runs here."""
    return Path(sys.executable) if environment == "project" else _FOLDER / environment / "bin" / "python"


def make_environments(names: Sequence[str] = ENCODERS) -> dict[str, str]:
    """Make what is missing or pinned otherwise; return why an environment cannot be had, by its name."""
    failed: dict[str, str] = {}
    for name in names:
        pins = Path(__file__).with_name(f"requirements-{name}.txt")
        made = _FOLDER / name / "made-from.txt"
        if made.exists() and made.read_text(encoding="utf-8") == pins.read_text(encoding="utf-8"):
            continue
        print(f"installing {name} under {_FOLDER.relative_to(ROOT)}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(_FOLDER / name)], check=True)
        if _SHARES_TORCH[name]:
            packages = next((_FOLDER / name / "lib").glob("python*")) / "site-packages"
            (packages / "project.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
        pip = [str(python(name)), "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-input"]
        asked = subprocess.run([*pip, "-r", str(pins)], capture_output=True, text=True, check=False)
        if asked.returncode:
            failed[name] = asked.stderr.strip()[-500:]
        else:
            made.write_text(pins.read_text(encoding="utf-8"), encoding="utf-8")
    return failed
