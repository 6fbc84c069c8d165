"""Traces that are off cost nothing and need nothing installed; what libraries say becomes our log lines."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from structlog.testing import capture_logs

from catalens import events, tracing
from catalens.domain import Product, Record
from catalens.errors import Misconfigured
from catalens.settings import Settings, TracingSettings
from catalens.telemetry import configure_logging
from catalens_embedder import letters

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SERVICES = ("catalens_ingest.main", "catalens_embedder.main", "catalens_query.main", "catalens_standalone.process")


@pytest.fixture
def configured() -> Iterator[Settings]:
    """Logging as a process sets it up, and as it was afterwards."""
    settings = Settings(_env_file=None, log_format="json")
    root, before = logging.getLogger(), logging.getLogger().handlers.copy()
    configure_logging(settings)
    yield settings
    root.handlers[:] = before
    structlog.reset_defaults()


def settings(endpoint: str) -> Settings:
    return Settings(_env_file=None, tracing=TracingSettings(endpoint=endpoint))


def test_services_without_an_endpoint_import_no_opentelemetry() -> None:
    script = (
        "import importlib, sys\n"
        f"for name in {SERVICES!r}: importlib.import_module(name)\n"
        "from catalens import tracing\n"
        "from catalens.settings import Settings\n"
        "tracing.configure(Settings(_env_file=None))\n"
        "with tracing.follow('a', {None: {}}), tracing.span('b'): assert tracing.traceparent() is None\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_off_every_span_is_the_same_nothing() -> None:
    tracing.configure(settings(""))
    assert not tracing.on()
    assert tracing.span("a", {"b": 1}) is tracing.follow("c", {TRACEPARENT: {}}) is tracing.NOTHING


@pytest.mark.parametrize("endpoint", ["localhost:4318", "grpc://collector:4317"])
def test_an_endpoint_that_is_no_url_is_refused(endpoint: str) -> None:
    with pytest.raises(Misconfigured, match="http"):
        tracing.configure(settings(endpoint))
    assert not tracing.on()


def test_traces_without_the_extra_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "catalens.otel", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(Misconfigured, match=r"catalens\[tracing\]"):
        tracing.configure(settings("http://127.0.0.1:1/v1/traces"))


@pytest.mark.parametrize(
    ("header", "trace"),
    [
        (TRACEPARENT, "0af7651916cd43dd8448eb211c80319c"),
        ("ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", None),
        ("00-00000000000000000000000000000000-b7ad6b7169203331-01", None),
        ("00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01", None),
        ("00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01", None),
        (TRACEPARENT + "\n", None),
        ("", None),
        (None, None),
    ],
)
def test_what_is_a_traceparent(header: str | None, trace: str | None) -> None:
    assert tracing.trace_id(header) == trace
    assert tracing.valid(header) == (header if trace else None)


def test_a_retry_and_a_dead_letter_keep_the_trace() -> None:
    product = Product(product_id="a", name="A", version=1)
    event = events.new_event(product, "default", traceparent=TRACEPARENT)
    message = events.encode(event)
    record = Record(message.topic, 0, 7, message.key, message.value, message.headers, 1_800_000_000.0)
    again = letters.retry(event, record, 1_800_000_001.0, "away")
    assert again is not None
    assert again.headers["ce_traceparent"] == TRACEPARENT
    assert letters.dead_letter(record, "expired", "late").headers["ce_traceparent"] == TRACEPARENT


def test_a_librarys_warning_is_a_line_of_ours(configured: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    with capture_logs() as logs:
        logging.getLogger("aiokafka.conn").warning("Unable to connect to %s", "broker-1")
        logging.getLogger("aiokafka.conn").info("Connected")
    (line,) = logs
    assert (line["event"], line["library"], line["message"], line["log_level"]) == (
        "library.warned", "aiokafka.conn", "Unable to connect to broker-1", "warning",
    )  # fmt: skip
    assert capsys.readouterr().err == ""


def test_a_library_that_repeats_itself_is_told_once(configured: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("catalens.telemetry.time.monotonic", lambda: now)
    noisy = logging.getLogger("redis.connection")
    with capture_logs() as logs:
        for number in range(100):
            noisy.error("lost %d", number)
        noisy.error("something else")
        now += 61
        noisy.error("lost %d", 100)
    assert [(line["message"], line.get("unsaid")) for line in logs] == [
        ("lost 0", None), ("something else", None), ("lost 100", 99),
    ]  # fmt: skip
    assert {line["log_level"] for line in logs} == {"error"}


def test_setting_up_logging_twice_tells_things_once(configured: Settings) -> None:
    configure_logging(configured)
    with capture_logs() as logs:
        logging.getLogger("grpc").warning("once")
    assert len(logs) == 1


def test_only_the_facade_imports_the_sdk() -> None:
    shared = Path(__file__).parents[2]
    users = {
        path.name
        for folder in ("shared", "services")
        for path in (shared / folder).rglob("*.py")
        if "opentelemetry" in path.read_text(encoding="utf-8").replace("opentelemetry-", "")
    }
    assert users <= {"otel.py"}
