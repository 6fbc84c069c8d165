"""What the pipeline's benchmarks run on: a real Kafka and Redis of their own, and the services as processes.

The services get the settings' defaults; only addresses and folders are set.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Final, Self

from tests.cluster import Service
from tests.kafka import Kafka
from tests.qdrant_server import QdrantServer
from tests.redis_server import RedisServer

from catalens import events
from catalens.engines import EngineRoom
from catalens.ports import EventLog
from catalens.settings import Settings

PARTITIONS: Final = 12


class Stage:
    """Kafka with its topics, Redis, and Qdrant's engine behind its API (no real Qdrant server is at hand)."""

    def __init__(self) -> None:
        self._folder = TemporaryDirectory(prefix="catalens-bench-")
        self.folder = Path(self._folder.name)
        self.kafka = Kafka(self.folder / "kafka")
        self.redis = RedisServer(self.folder / "redis")
        self.qdrant = QdrantServer(self.folder / "qdrant")
        self._services: list[Service] = []

    def __enter__(self) -> Self:
        try:
            for engine in (self.kafka, self.redis, self.qdrant):
                engine.start()
            subprocess.run(
                [sys.executable, "-m", "catalens_standalone.cli", "topics", "apply"],
                env={**os.environ, **self.environment("topics")},
                cwd=self.folder,
                stdout=subprocess.DEVNULL,
                check=True,
            )
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def environment(self, name: str, *, qdrant: bool = False) -> dict[str, str]:
        """Return the settings of a process: a folder by its name, and the embedded index or the stand-in."""
        return {
            "CATALENS_DATA_DIR": str(self.folder / name),
            "CATALENS_LOG_FORMAT": "json",
            "CATALENS_HTTP__PORT": "0",
            "CATALENS_KAFKA__BOOTSTRAP_SERVERS": self.kafka.bootstrap,
            "CATALENS_KAFKA__PARTITIONS": str(PARTITIONS),
            "CATALENS_KAFKA__REPLICATION": "1",
            "CATALENS_REDIS__URL": self.redis.url,
            "CATALENS_QDRANT__URL": self.qdrant.url if qdrant else "",
            "CATALENS_QDRANT__GRPC_PORT": str(self.qdrant.grpc_port),
        }

    def service(self, name: str, module: str, *, qdrant: bool = False, **environment: str) -> Service:
        """Start a process and return when it is ready."""
        service = Service(module, self.folder, name, {**self.environment(name, qdrant=qdrant), **environment})
        self._services.append(service)
        return service.start()

    def settings(self, name: str) -> Settings:
        """Return the settings that a process of that name reads."""
        environment = self.environment(name)
        kept = {key: value for key, value in os.environ.items() if key.startswith("CATALENS_")}
        for key in kept:
            del os.environ[key]
        os.environ.update(environment)
        try:
            return Settings(_env_file=None)
        finally:
            for key in environment:
                del os.environ[key]
            os.environ.update(kept)

    def pids(self) -> dict[str, int]:
        """Return the process ids of everything that runs here, by name."""
        engines = {"Kafka (JVM)": self.kafka.pid, "Redis": self.redis.pid, "Qdrant stand-in": self.qdrant.pid}
        return {**{service.name: service.pid for service in self._services}, **engines}

    @asynccontextmanager
    async def log(self) -> AsyncIterator[EventLog]:
        """Open the event log as a service does."""
        async with EngineRoom(self.settings("benchmark")) as room:
            yield await room.log()

    def _end(self) -> None:
        for service in self._services:
            service.kill()
        for engine in (self.qdrant, self.redis, self.kafka):
            engine.kill()  # nothing here is needed any more
        self._folder.cleanup()


async def skip(log: EventLog) -> None:
    """Let the workers go on behind everything there is."""
    begin = await log.committed(events.EMBEDDER_GROUP, events.CONSUMED)
    lag = await log.lag(events.EMBEDDER_GROUP, events.CONSUMED)
    await log.set_committed(events.EMBEDDER_GROUP, {place: offset + lag[place] for place, offset in begin.items()})
