"""What the process answers is what its OpenAPI document says, for whatever a client may send."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.standalone import Standalone

EXAMPLES = os.environ.get("SCHEMATHESIS_EXAMPLES", "15")


def test_schemathesis_finds_no_5xx_and_no_contradiction(server: Standalone, tmp_path: Path) -> None:
    ran = subprocess.run(
        [
            Path(sys.executable).parent / "schemathesis",
            *("run", f"{server.url}/openapi.json"),
            *("--checks", "all"),
            *("--max-examples", EXAMPLES),
            *("--phases", "examples,coverage,fuzzing"),
            *("--generation-database", "none"),
            *("--seed", "20"),
            *("--request-timeout", "30"),
            "--continue-on-failure",
            "--no-color",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-12_000:] + ran.stderr[-2_000:]
