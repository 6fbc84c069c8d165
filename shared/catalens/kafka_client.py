"""What every client of Kafka here shares: how to connect, what an error means, how large a record may be."""

from __future__ import annotations

import asyncio
import ssl
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from aiokafka import errors as kafka_errors  # type: ignore[import-untyped]  # it has no py.typed
from aiokafka.client import collect_hosts  # type: ignore[import-untyped]  # as above
from aiokafka.conn import create_conn  # type: ignore[import-untyped]  # as above
from aiokafka.helpers import create_ssl_context  # type: ignore[import-untyped]  # as above

from catalens import events
from catalens.errors import CatalensError, InvalidEvent, Misconfigured, Transient
from catalens.settings import KafkaSettings

ONWARD_BYTES: Final = 64 * 1024
"""What a retry or a dead letter may add to its event in headers: those topics take that much more."""

RETRY_SECONDS: Final = 0.1
"""Between two tries of what a broker may answer soon."""

_REFUSALS: Final = (
    kafka_errors.AuthenticationFailedError,
    kafka_errors.AuthenticationMethodNotSupported,
    kafka_errors.ClusterAuthorizationFailedError,
    kafka_errors.GroupAuthorizationFailedError,
    kafka_errors.IllegalSaslStateError,
    kafka_errors.SaslAuthenticationFailed,
    kafka_errors.SecurityDisabled,
    kafka_errors.TopicAuthorizationFailedError,
    kafka_errors.UnsupportedSaslMechanismError,
)


def translate(error: Exception) -> CatalensError:
    """Return what an error of aiokafka means to the caller: Misconfigured, InvalidEvent or Transient."""
    if isinstance(error, _REFUSALS):
        return Misconfigured(f"Kafka refuses us: {error}: see CATALENS_KAFKA__USERNAME and the cluster's ACLs")
    if isinstance(error, ssl.SSLError):
        return Misconfigured(f"Kafka and we do not agree on TLS: {error}: see CATALENS_KAFKA__CA_FILE")
    if isinstance(error, kafka_errors.UnknownTopicOrPartitionError | kafka_errors.InvalidTopicError):
        return Misconfigured(f"a topic does not exist: {error}: run `catalens topics apply`")
    if isinstance(error, kafka_errors.MessageSizeTooLargeError | kafka_errors.RecordListTooLargeError):
        return InvalidEvent(f"the event is larger than its topic takes (max.message.bytes): {error}")
    if isinstance(error, kafka_errors.IncompatibleBrokerVersion | kafka_errors.UnsupportedVersionError):
        return Misconfigured(f"Kafka is of a release that aiokafka cannot talk to: {error}")
    return Transient(f"Kafka is away: {str(error) or repr(error)}")


async def connection(kafka: KafkaSettings) -> dict[str, Any]:
    """Return how to connect, as every client of aiokafka takes it; raises Misconfigured for unreadable TLS files."""
    options: dict[str, Any] = {
        "bootstrap_servers": kafka.bootstrap_servers,
        "client_id": _client_id(),
        "security_protocol": kafka.security_protocol,
        "request_timeout_ms": round(kafka.request_timeout * 1000),
        "metadata_max_age_ms": 60_000,  # new partitions are found after this
        "connections_max_idle_ms": 180_000,  # load balancers forget one without a word: Azure's after 240 s
    }
    if kafka.security_protocol.startswith("SASL"):
        options |= {
            "sasl_mechanism": kafka.sasl_mechanism,
            "sasl_plain_username": kafka.username,
            "sasl_plain_password": kafka.password.get_secret_value(),
        }
    if kafka.security_protocol.endswith("SSL"):
        try:  # off the loop: it reads files
            options["ssl_context"] = await asyncio.to_thread(
                create_ssl_context, cafile=kafka.ca_file, certfile=kafka.cert_file, keyfile=kafka.key_file
            )
        except OSError as error:  # ssl.SSLError is one
            raise Misconfigured(f"CATALENS_KAFKA__CA_FILE, __CERT_FILE or __KEY_FILE: {error}") from error
    return options


async def start_client(client: Any, kafka: KafkaSettings, options: Mapping[str, Any]) -> None:
    """Start an aiokafka client, trying again for the request timeout; raises Transient or Misconfigured."""
    last: Exception | None = None
    try:
        async with asyncio.timeout(kafka.request_timeout):
            while True:
                try:
                    await client.start()
                except kafka_errors.KafkaConnectionError as error:
                    last = error
                    await _raise_refusal(options)
                    await asyncio.sleep(RETRY_SECONDS)
                except kafka_errors.KafkaError as error:
                    raise translate(error) from error
                else:
                    return
    except TimeoutError:
        reason = f": {last}" if last else ""
        raise Transient(f"Kafka is away: no answer within {kafka.request_timeout:g} s{reason}") from last


async def _raise_refusal(options: Mapping[str, Any]) -> None:
    """Raise Misconfigured if a broker is there but refuses us, which aiokafka only logs."""
    host, port, _ = collect_hosts(options["bootstrap_servers"])[0]
    names = ("client_id", "request_timeout_ms", "ssl_context", "security_protocol")
    wanted = {name: value for name, value in options.items() if name in names or name.startswith("sasl_")}
    try:
        probe = await create_conn(host, port, **wanted)
    except (*_REFUSALS, ssl.SSLError) as error:
        raise translate(error) from error
    except (OSError, TimeoutError, kafka_errors.KafkaError):
        return  # away
    probe.close()


def largest(topic: str, kafka: KafkaSettings) -> int:
    """Return how many bytes a record of `topic` may have: retries and dead letters carry an event and more headers."""
    return kafka.max_message + (0 if topic in (events.PRODUCTS, events.OFFERS) else ONWARD_BYTES)


def _client_id() -> str:
    """Return the name of the program: catalens-ingest, say."""
    program = Path(sys.argv[0])
    return program.parent.name if program.stem in ("main", "__main__") else program.stem or "catalens"
