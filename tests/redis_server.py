"""A real redis-server for tests, in a folder of its own, that can be killed, started again and frozen."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import redis
from tests.missing import missing

EXECUTABLE: Final = shutil.which("redis-server")
_START_SECONDS: Final = 30.0


def need_server() -> None:
    """Skip the test where no redis-server is installed; with CI=true that is a failure."""
    if EXECUTABLE is None:
        missing("there is no redis-server on PATH: run scripts/ensure-redis")


@contextmanager
def redis_url(folder: Path) -> Iterator[str]:
    """Yield the URL of an empty Redis: database 15 of CATALENS_TEST_REDIS, or a server started in `folder`."""
    running = os.environ.get("CATALENS_TEST_REDIS", "")
    if running:
        url = f"redis://{running}/15"
        _empty(url)
        yield url
        return
    need_server()
    with RedisServer(folder) as server:
        yield server.url


class RedisServer:
    """One redis-server on a free port of the loopback that keeps what it was told, kill -9 included."""

    def __init__(self, folder: Path, *options: str) -> None:
        """Prepare a server that keeps its data in `folder`; `options` are added to its command line."""
        self.folder = folder
        self.port = _free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start on the same port and data as before and wait for the first PONG; raises with the server's log."""
        assert EXECUTABLE is not None, "ask need_server() first"
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / "redis.log"
        self._process = subprocess.Popen(
            [
                *(EXECUTABLE, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)),
                *("--logfile", str(log), "--save", "", "--appendonly", "yes"),
                *self._options,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        give_up = time.monotonic() + _START_SECONDS
        with self.client() as client:
            while True:
                try:
                    client.ping()
                except (redis.ConnectionError, redis.TimeoutError) as error:  # not up yet, or reading its file
                    if self._process.poll() is not None or time.monotonic() > give_up:
                        self.kill()
                        raise RuntimeError(f"redis-server did not start:\n{log.read_text()[-4000:]}") from error
                    time.sleep(0.01)
                else:
                    return

    def client(self) -> redis.Redis:
        """Return a client that blocks, for a look at what the server holds."""
        return redis.Redis.from_url(self.url, socket_timeout=5, socket_connect_timeout=5)

    @property
    def pid(self) -> int:
        """The process id of the server."""
        assert self._process is not None
        return self._process.pid

    def stop(self) -> None:
        """End it in good order; may be called twice."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Kill -9; may be called twice."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Kill -9 and start again on the same port and data."""
        self.kill()
        self.start()

    def freeze(self) -> None:
        """Stop the process where it stands: connections stay open and take bytes, and no answer comes."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen one go on; it then answers what was asked meanwhile."""
        os.kill(self.pid, signal.SIGCONT)

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)  # a frozen one would not hear SIGTERM
            self._process.send_signal(number)
            self._process.wait()
            self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _empty(url: str) -> None:
    with redis.Redis.from_url(url, socket_timeout=5, socket_connect_timeout=5) as client:
        client.flushdb()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
