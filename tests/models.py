"""Two tiny models whose vectors differ, so that an answer made from both would show."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

TINY = Path(__file__).parent / "fixtures" / "bundles" / "tiny"


def install_models(data_dir: Path, tiny: Path = TINY) -> None:
    """Put the models `first` and `second` under `data_dir`; the second sees other colours and reads other texts."""
    for name in ("first", "second"):
        folder = data_dir / "models" / name
        shutil.copytree(tiny, folder)
        manifest = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
        manifest["id"] = name
        if name == "second":
            manifest["image"]["mean"] = [0.1, 0.5, 0.9]
            manifest["text"]["prefix"] = "blue "
            del manifest["check"]  # it holds what the first one answers
        (folder / "bundle.json").write_text(json.dumps(manifest), encoding="utf-8")
