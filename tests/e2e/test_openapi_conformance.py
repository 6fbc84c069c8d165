"""What the process answers is what its OpenAPI document says, for whatever a client may send."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.standalone import ROOT, Standalone

EXAMPLES = os.environ.get("SCHEMATHESIS_EXAMPLES", "15")
SEED = os.environ.get("SCHEMATHESIS_SEED", "20")


def test_schemathesis_finds_no_5xx_and_no_contradiction(server: Standalone, tmp_path: Path) -> None:
    ran = subprocess.run(
        [
            Path(sys.executable).parent / "schemathesis",
            *("run", f"{server.url}/openapi.json"),
            *("--checks", "all"),
            *("--max-examples", EXAMPLES),
            *("--phases", "examples,coverage,fuzzing"),
            *("--generation-database", "none"),
            *("--seed", SEED),
            *("--request-timeout", "30"),
            "--continue-on-failure",
            "--no-color",
        ],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "SCHEMATHESIS_HOOKS": str(Path(__file__).with_name("schemathesis_hooks.py")),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-12_000:] + ran.stderr[-2_000:]
