"""Starts the standalone process as a user would, and stops or kills it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).resolve().parent.parent


class Standalone:
    """One `catalens serve` on a port of its own; `with` starts it and waits until it says that it is ready."""

    def __init__(self, data_dir: Path, **environment: str) -> None:
        self.data_dir = data_dir
        self.url = ""
        self._environment = environment
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start and wait for the line on stdout that names the address; raises with the log if there is none."""
        log = (self.data_dir.parent / f"{self.data_dir.name}.log").open("a", encoding="utf-8")
        with log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "catalens_standalone.cli", "serve"],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=self.data_dir.parent,  # so that no .env of the working directory is read
                env={
                    **{name: value for name, value in os.environ.items() if not name.startswith("CATALENS_")},
                    "CATALENS_DATA_DIR": str(self.data_dir),
                    "CATALENS_HTTP__PORT": "0",
                    "CATALENS_LOG_FORMAT": "json",
                    **self._environment,
                },
                start_new_session=True,
            )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            where = line.find("http://")
            if where >= 0:
                self.url = line[where:].split()[0].rstrip("/.")
                return
        raise RuntimeError(f"catalens serve did not start:\n{Path(log.name).read_text(encoding='utf-8')[-4000:]}")

    @property
    def pid(self) -> int:
        """The process id of the server."""
        assert self._process is not None
        return self._process.pid

    def children(self) -> list[int]:
        """Return the process ids of the server's children (Linux)."""
        return [
            int(child)
            for task in Path(f"/proc/{self.pid}/task").iterdir()
            for child in (task / "children").read_text(encoding="utf-8").split()
        ]

    def kill(self, *, children: bool = False) -> None:
        """Send SIGKILL, to the server's children first when asked to, and reap."""
        if self._process is not None:
            for child in self.children() if children else ():
                os.kill(child, signal.SIGKILL)
            self._process.kill()
            self._close()

    def stop(self) -> int:
        """Send SIGTERM, wait for the graceful end and return the exit status."""
        if self._process is None:
            return 0
        self._process.terminate()
        return self._close()

    def _close(self) -> int:
        process, self._process = self._process, None
        assert process is not None
        status = process.wait(timeout=60)
        if process.stdout is not None:
            process.stdout.close()
        return status

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
