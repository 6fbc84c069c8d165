"""A real Apache Kafka broker for tests, in a folder of its own, that can be killed, started again and frozen."""

from __future__ import annotations

import asyncio
import base64
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from aiokafka.admin import AIOKafkaAdminClient, NewTopic  # type: ignore[import-untyped]  # it has no py.typed
from aiokafka.errors import KafkaError  # type: ignore[import-untyped]  # it has no py.typed
from tests.missing import missing

from catalens.settings import KafkaSettings, Settings

ROOT: Final = Path(__file__).resolve().parent.parent
LIBS: Final = ROOT / ".cache" / "kafka" / "libs"
USER: Final = "catalens"
PASSWORD: Final = "only-for-tests"
_START_SECONDS: Final = 60.0

_PROPERTIES: Final = """\
process.roles=broker,controller
node.id=1
controller.quorum.bootstrap.servers=127.0.0.1:{controller}
listeners=PLAINTEXT://127.0.0.1:{port},SECURED://127.0.0.1:{secured},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port},SECURED://127.0.0.1:{secured}
controller.listener.names=CONTROLLER
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SECURED:SASL_PLAINTEXT
listener.name.secured.sasl.enabled.mechanisms=PLAIN
listener.name.secured.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required \\
  user_{user}="{password}";
log.dirs={data}
offsets.topic.replication.factor=1
offsets.topic.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
log.cleaner.dedupe.buffer.size=16777216
auto.create.topics.enable=false
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
"""


def kafka_missing() -> str | None:
    """Return what is missing on this machine to start a broker, None if nothing is."""
    if not (LIBS / "pom.xml").exists():
        return "there are no jars of Kafka: run scripts/ensure-kafka"
    if _java_version() < 17:
        return "there is no Java 17 or newer on PATH or in JAVA_HOME: run scripts/ensure-kafka"
    return None


@contextmanager
def running_kafka(folder: Path) -> Iterator[str]:
    """Yield the address of a broker to make topics on: CATALENS_TEST_KAFKA, or one started in `folder`.

    Where there is none to be had the test is skipped; with CI=true that is a failure.
    """
    if running := os.environ.get("CATALENS_TEST_KAFKA", ""):
        yield running
        return
    need_kafka()
    with Kafka(folder) as broker:
        yield broker.bootstrap


def need_kafka() -> None:
    """Skip the test where no broker can be started; with CI=true that is a failure."""
    if reason := kafka_missing():
        missing(reason)


def kafka_settings(bootstrap: str, **more: Any) -> Settings:
    """Return settings for that broker; `more` are Kafka settings."""
    kafka = {"bootstrap_servers": bootstrap, "replication": 1, "session_timeout": 6, **more}
    return Settings(_env_file=None, kafka=KafkaSettings(**kafka))


async def create_topics(bootstrap: str, partitions: Mapping[str, int], **config: str) -> None:
    """Create topics and return when they can be used; `config` names have _ where Kafka has a dot."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    try:
        await admin.start()
        configs = {name.replace("_", "."): value for name, value in config.items()}
        answer = await admin.create_topics(
            [NewTopic(topic, count, 1, topic_configs=configs) for topic, count in partitions.items()]
        )
        assert all(code == 0 for _, code, _ in answer.topic_errors), answer
        async with asyncio.timeout(_START_SECONDS):
            while not partitions.keys() <= await _usable(admin):
                await asyncio.sleep(0.02)
    finally:
        await admin.close()


async def _usable(admin: AIOKafkaAdminClient) -> set[str]:
    return {
        topic["topic"]
        for topic in await admin.describe_topics()
        if all(partition["leader"] >= 0 for partition in topic["partitions"])
    }


class Kafka:
    """One broker and controller on free ports of the loopback that keeps its log, kill -9 included."""

    def __init__(self, folder: Path, *properties: str) -> None:
        """Prepare a broker that keeps everything in `folder`; `properties` are added to server.properties."""
        self.folder = folder
        port, secured, controller = _free_ports(3)
        self.bootstrap = f"127.0.0.1:{port}"
        """host:port for clients that need no login."""
        self.secured = f"127.0.0.1:{secured}"
        """host:port for clients that log in by SASL PLAIN as USER with PASSWORD."""
        self._properties = "\n".join(
            [
                _PROPERTIES.format(
                    port=port,
                    secured=secured,
                    controller=controller,
                    data=folder / "data",
                    user=USER,
                    password=PASSWORD,
                ),
                *properties,
            ]
        )
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start on the same ports and log as before and return when it answers; raises with the broker's log."""
        missing = kafka_missing()
        assert missing is None, missing
        config, log = self.folder / "server.properties", self.folder / "broker.log"
        self.folder.mkdir(parents=True, exist_ok=True)
        config.write_text(self._properties, encoding="utf-8")
        if not (self.folder / "data" / "meta.properties").exists():
            # Its first byte is fixed: an id that begins with a hyphen would be taken for an option.
            cluster = base64.urlsafe_b64encode(b"c" + uuid.uuid4().bytes[1:]).rstrip(b"=").decode()
            done = subprocess.run(
                [*_java(), "kafka.tools.StorageTool", "format", "--standalone", "-t", cluster, "-c", str(config)],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                [*_java("-Xms256m", "-Xmx512m"), "kafka.Kafka", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        give_up = time.monotonic() + _START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > give_up:
                self.kill()
                raise RuntimeError(f"Kafka did not start:\n{log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.05)

    @property
    def pid(self) -> int:
        """The process id of the broker."""
        assert self._process is not None
        return self._process.pid

    def stop(self) -> None:
        """End it in good order; may be called twice."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Kill -9; may be called twice."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Kill -9 and start again on the same ports and log."""
        self.kill()
        self.start()

    def freeze(self) -> None:
        """Stop the process where it stands: connections stay open and take bytes, and no answer comes."""
        os.kill(self.pid, signal.SIGSTOP)
        # The signal reaches a busy machine's threads one by one: until the last one stands, an answer may come.
        while any(_state(thread) not in "TZX" for thread in Path(f"/proc/{self.pid}/task").iterdir()):
            time.sleep(0.01)

    def thaw(self) -> None:
        """Let a frozen one go on; it then answers what was asked meanwhile."""
        os.kill(self.pid, signal.SIGCONT)

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)  # a frozen one would not hear SIGTERM
            self._process.send_signal(number)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        """Return whether metadata can be had: the port opens earlier."""
        host, port = self.bootstrap.split(":")
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            return False
        with ThreadPoolExecutor(1) as thread:  # the caller may be on an event loop of its own
            return thread.submit(asyncio.run, _has_metadata(self.bootstrap)).result()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


async def _has_metadata(bootstrap: str) -> bool:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap, request_timeout_ms=2000)
    try:
        await admin.start()
        return bool((await admin.describe_cluster())["brokers"])
    except KafkaError:
        return False
    finally:
        await admin.close()


def _java_path() -> str | None:
    home = os.environ.get("JAVA_HOME")
    return shutil.which("java", path=str(Path(home) / "bin") if home else None)


def _java(*options: str) -> list[str]:
    path = _java_path()
    assert path is not None
    return [path, *options, "-XX:+UseSerialGC", "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", "-cp", f"{LIBS}/*"]


def _java_version() -> int:
    path = _java_path()
    if path is None:
        return 0
    said = subprocess.run([path, "-version"], capture_output=True, text=True, check=False).stderr
    found = re.search(r' version "(\d+)', said)
    return int(found[1]) if found else 0


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _state(thread: Path) -> str:
    """Return the letter that the kernel has for what a thread does; X once it is gone."""
    try:
        return (thread / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"
