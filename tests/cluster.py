"""A whole cluster on this machine: Kafka, Redis, Qdrant's engine behind its API, and the services as processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.kafka import Kafka
from tests.models import install_models
from tests.qdrant_server import QdrantServer
from tests.redis_server import RedisServer

from catalens import events
from catalens.domain import IndexInfo
from catalens.encoders import open_encoder
from catalens.engines import EngineRoom
from catalens.ports import Encoder, EventLog, VectorIndex
from catalens.settings import Settings
from catalens.telemetry import Metrics

ROOT = Path(__file__).resolve().parent.parent
_START_SECONDS = 60.0


class Service:
    """One process of one service, with its log in a file."""

    def __init__(self, module: str, folder: Path, name: str, environment: dict[str, str]) -> None:
        self.name = name
        self.url = ""
        self._module = module
        self._log = folder / f"{name}.log"
        self._environment = environment
        self._begin = 0
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Start and return when it says that it is ready; raises with its log if it ends before."""
        self.launch()
        self.said("process.ready")
        return self

    def launch(self) -> None:
        """Start, and wait for nothing."""
        self._begin = self._log.stat().st_size if self._log.exists() else 0
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self._module],
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env={
                    **{name: value for name, value in os.environ.items() if not name.startswith("CATALENS_")},
                    **self._environment,
                },
                start_new_session=True,
            )

    def said(self, event: str) -> None:
        """Return once it has logged `event`, which tells its URL, since it was started; raises if it ends before."""
        assert self._process is not None
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            for line in self._log.read_bytes()[self._begin :].splitlines():
                if f'"{event}"'.encode() in line:
                    self.url = json.loads(line)["url"]
                    return
            if self._process.poll() is not None:
                break
            time.sleep(0.05)
        raise RuntimeError(f"{self.name} did not say {event}:\n{self.log()[-4000:]}")

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def log(self) -> str:
        """Return everything it has logged."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def kill(self) -> None:
        """Send SIGKILL and reap; one that is gone is no error."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def terminate(self) -> None:
        """Send SIGTERM and go on."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)

    def wait(self, timeout: float = 60.0) -> int:
        """Return the exit status."""
        assert self._process is not None
        status = self._process.wait(timeout)
        self._process = None
        return status

    def stop(self) -> int:
        """Send SIGTERM, wait for the graceful end and return the exit status; 0 if it is not there."""
        if self._process is None:
            return 0
        self.terminate()
        return self.wait()


class Cluster:
    """The engines, started, and the services that tests start on them; `with` ends everything."""

    def __init__(self, folder: Path, *, partitions: int = 6) -> None:
        self.folder = folder
        self.partitions = partitions
        self.kafka = Kafka(folder / "kafka")
        self.redis = RedisServer(folder / "redis")
        self.qdrant = QdrantServer(folder / "qdrant")
        self.services: list[Service] = []

    def __enter__(self) -> Self:
        for engine in (self.kafka, self.redis, self.qdrant):
            engine.start()
        done = subprocess.run(
            [sys.executable, "-m", "catalens_standalone.cli", "topics", "apply"],
            env={**os.environ, **self.environment()},
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        install_models(self.folder / "data")
        asyncio.run(self._make_index())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """Kill everything."""
        for service in self.services:
            service.kill()
        for engine in (self.qdrant, self.redis, self.kafka):
            engine.kill()

    async def _make_index(self) -> None:
        """Make the index of the model `first` the current one, which the services then follow."""
        settings = self.settings(CATALENS_MODEL="first")
        async with open_encoder(settings, Metrics()) as encoder, EngineRoom(settings) as room:
            await room.index(IndexInfo("first", encoder.spec))

    def environment(self, **more: str) -> dict[str, str]:
        """Return the settings that every process of this cluster shares."""
        return {
            "CATALENS_DATA_DIR": str(self.folder / "data"),
            "CATALENS_LOG_FORMAT": "json",
            "CATALENS_HTTP__PORT": "0",
            "CATALENS_KAFKA__BOOTSTRAP_SERVERS": self.kafka.bootstrap,
            "CATALENS_KAFKA__PARTITIONS": str(self.partitions),
            "CATALENS_KAFKA__REPLICATION": "1",
            "CATALENS_KAFKA__SESSION_TIMEOUT": "6",
            "CATALENS_REDIS__URL": self.redis.url,
            "CATALENS_QDRANT__URL": self.qdrant.url,
            "CATALENS_QDRANT__GRPC_PORT": str(self.qdrant.grpc_port),
            "CATALENS_BLOBS__URL": f"file://{self.folder / 'blobs'}",
            "CATALENS_PICTURES__ALLOW_PRIVATE_NETWORKS": "true",
            "CATALENS_ENCODER__LANES": "1",
            **more,
        }

    def service(self, role: str, module: str | None = None, **environment: str) -> Service:
        """Start one more process of `role`: ingest, embedder or query."""
        return self.prepared(role, module, **environment).start()

    def prepared(self, role: str, module: str | None = None, **environment: str) -> Service:
        """Return one more process of `role` that is not started yet."""
        name = f"{role}-{len(self.services)}"
        service = Service(module or f"catalens_{role}.main", self.folder, name, self.environment(**environment))
        self.services.append(service)
        return service

    def settings(self, **more: str) -> Settings:
        """Return the settings as a process of this cluster reads them."""
        kept = {name: value for name, value in os.environ.items() if name.startswith("CATALENS_")}
        try:
            for name in kept:
                del os.environ[name]
            os.environ.update(self.environment(**more))
            return Settings(_env_file=None)
        finally:
            for name in self.environment(**more):
                os.environ.pop(name, None)
            os.environ.update(kept)

    @asynccontextmanager
    async def log(self) -> AsyncIterator[EventLog]:
        """Open the event log as a service does."""
        async with EngineRoom(self.settings()) as room:
            yield await room.log()

    @asynccontextmanager
    async def index(self) -> AsyncIterator[tuple[VectorIndex, Encoder]]:
        """Open the index that is current, and its model."""
        settings = self.settings()
        async with EngineRoom(settings) as room:
            info = await (await room.indexes()).current()
            assert info is not None
            async with open_encoder(settings.model_copy(update={"model": info.model}), Metrics()) as encoder:
                yield await room.index(info), encoder


async def settled(log: EventLog) -> None:
    """Return when the workers have committed everything there is."""
    while any((await log.lag(events.EMBEDDER_GROUP, events.CONSUMED)).values()):
        await asyncio.sleep(0.2)  # polls real processes; nothing is asserted about the time it takes
