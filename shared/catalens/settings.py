"""Typed settings: nested, frozen, from `CATALENS_…` variables and `.env`; no module-level instance."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from catalens.domain import DEFAULT_LANGUAGES, DEFAULT_TENANT, Language, Tenant
from catalens.errors import Misconfigured

MIB = 1024 * 1024
PREFIX = "CATALENS_"
Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Scope = Literal["ingest", "query", "admin"]
SCOPES: Final[tuple[Scope, ...]] = ("ingest", "query", "admin")
Origin = Annotated[str, StringConstraints(pattern=r"^https?://[a-z0-9.\-_\[\]:]+$")]


class Section(BaseModel):
    """A frozen group of settings; an unknown name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ApiKey(Section):
    """One client of the HTTP API, by its secret or by the SHA-256 of it (docs/adr/0022)."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=128)] = Field(description="shown in logs")
    secret: Annotated[SecretStr, Field(min_length=16)] | None = Field(
        default=None, description="sent as `Authorization: Bearer …` or `X-API-Key`"
    )
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = Field(
        default=None, description="hex SHA-256 of a secret that is not written down here"
    )
    tenant: Tenant = DEFAULT_TENANT
    scopes: tuple[Scope, ...] = Field(default=SCOPES, min_length=1, description="what it may do; all, if not given")
    expires: AwareDatetime | None = Field(default=None, description="from then on it is refused")
    rate: Annotated[float, Field(ge=1e-6, le=1e6)] | None = Field(
        default=None, description="requests a second; five seconds' worth may come at once"
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.secret is None) == (self.sha256 is None):
            raise ValueError("give either secret or sha256")
        return self


class HttpSettings(Section):
    """The HTTP side of a service."""

    host: str = Field(default="127.0.0.1", description="address to bind; elsewhere than loopback needs API keys")
    port: Port = Field(default=8080, description="port to bind; 0 takes a free one")
    max_body: Count = Field(default=25 * MIB, description="bytes of one request body (NDJSON excepted)")
    max_line: Count = Field(default=32 * MIB, description="bytes of one NDJSON line")
    max_batch: Count = Field(default=64, description="requests in one batch call")
    max_wait: Seconds = Field(default=60.0, description="longest `?wait=true&timeout=`, seconds")
    max_concurrent: Count = Field(
        default=64,
        description="requests in work, those with `?wait=true` included; one more is answered 429. Under more than can "
        "be done each takes as long as all of them take",
    )
    body_timeout: Seconds = Field(default=60.0, description="a request body must arrive within this, seconds")
    search_timeout: Seconds = Field(
        default=15.0,
        description="a search is answered within this, seconds; the encoder has two thirds of it, then words alone are "
        "searched; facets and numbers of variants that are late are left out, hits that are late are answered 503, a "
        "picture that is fetched and late 422",
    )
    cors_origins: tuple[Origin, ...] = Field(
        default=(),
        description='sites whose pages may call the service from a browser, JSON list: ["https://shop.example"]',
    )


class LogSettings(Section):
    """How long events are kept, in the embedded log and on Kafka."""

    retention_hours: Annotated[float, Field(gt=0)] = Field(
        default=24 * 7,
        description="the embedded log keeps what every group has read this long, and each product's newest for ever",
    )
    dead_letter_days: Annotated[float, Field(gt=0)] = Field(
        default=21, description="dead letters are kept, and can be replayed, this long; at least 7 below tombstone_days"
    )


class KafkaSettings(Section):
    """Apache Kafka as the event log."""

    bootstrap_servers: str = Field(
        default="", description="host:port, several joined by commas; empty: the embedded log of one process"
    )
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        default="PLAINTEXT", description="how to talk to the brokers"
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(
        default="PLAIN", description="how to log in, with the SASL protocols"
    )
    username: str = Field(default="", description="SASL user name")
    password: SecretStr = Field(default=SecretStr(""), description="SASL password")
    ca_file: Path | None = Field(default=None, description="PEM file of the authorities that sign the brokers")
    cert_file: Path | None = Field(default=None, description="PEM file of this client's certificate")
    key_file: Path | None = Field(default=None, description="PEM file of this client's private key")
    compression: Literal["none", "gzip", "lz4", "zstd"] = Field(default="zstd", description="of what is appended")
    linger: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="seconds a partial batch waits for company; while one is on its way the next fills anyway",
    )
    max_message: Count = Field(default=8 * MIB, description="bytes of one record at most, here and in the topics")
    max_request: Count = Field(
        default=32 * MIB,
        description="bytes on their way to the brokers at once, before compression, which bounds one request too: less "
        "than their socket.request.max.bytes",
    )
    partitions: Count = Field(
        default=12, description="of each topic that `catalens topics apply` creates: the most workers that can share"
    )
    replication: Count = Field(default=3, description="copies of each partition that `catalens topics apply` asks for")
    compaction_lag_hours: Annotated[float, Field(gt=0)] = Field(
        default=24, description="products and offers are compacted by key only after this time"
    )
    session_timeout: Seconds = Field(
        default=30.0, description="a worker not heard of for this long loses its partitions, seconds"
    )
    request_timeout: Seconds = Field(default=20.0, description="longest wait for a broker's answer, seconds")


class RedisSettings(Section):
    """Redis as the embedding cache and the memory of Idempotency-Keys."""

    url: SecretStr | None = Field(
        default=None, description="redis://[user:password@]host:port/db or rediss://…; none: caches in the process"
    )
    timeout: Seconds = Field(default=0.25, description="a call that takes longer counts as a miss, seconds")
    precision: Literal["float16", "float32"] = Field(default="float16", description="how vectors are kept in the cache")
    ttl_days: Annotated[float, Field(gt=0)] = Field(default=30, description="a vector is kept this long")


class QdrantSettings(Section):
    """A Qdrant server as the vector index."""

    url: str = Field(default="", description="http(s)://host of the server; empty: the embedded index of one process")
    grpc_port: Port = Field(default=6334, description="the server's gRPC port, which everything goes through")
    api_key: SecretStr | None = Field(default=None, description="the server's API key")
    collection: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")] = Field(
        default="catalens", description="name of the alias, and what collection names begin with"
    )
    shards: Annotated[int, Field(ge=0)] = Field(
        default=0, description="of a new collection; 0: what the server thinks right. Open source cannot reshard"
    )
    replication: Count = Field(default=1, description="copies of each shard of a new collection")
    write_consistency: Count = Field(default=1, description="copies that must acknowledge a write")
    quantization: Literal["none", "int8"] = Field(
        default="int8", description="of a new collection; int8 is searched in memory and rescored by the originals"
    )
    on_disk: bool = Field(
        default=True,
        description="a new collection keeps original vectors and payloads on disk: above a million products",
    )
    timeout: Seconds = Field(default=10.0, description="longest wait for an answer, seconds")


class BlobSettings(Section):
    """Where uploaded pictures are kept."""

    url: str = Field(
        default="",
        description="s3://bucket/prefix, az://container/prefix, gs://bucket/prefix, or file:///folder for the "
        "processes of one machine; empty: the data folder. "
        "Credentials come from the provider's own environment variables",
    )


class TracingSettings(Section):
    """OpenTelemetry traces."""

    endpoint: str = Field(
        default="", description="OTLP over HTTP, such as http://127.0.0.1:4318/v1/traces; empty: no traces"
    )
    sample: Annotated[float, Field(ge=0, le=1)] = Field(
        default=1.0, description="share of requests that begin a trace; one that comes with a trace is followed"
    )


class PictureSettings(Section):
    """Limits for pictures, uploaded or fetched."""

    max_bytes: Count = Field(default=20 * MIB, description="bytes of one encoded picture")
    max_pixels: Count = Field(default=64_000_000, description="width × height of one picture")
    fetch_timeout: Seconds = Field(default=15.0, description="whole download of one picture, seconds")
    fetch_concurrency: Count = Field(default=16, description="downloads at once")
    fetch_per_host: Count = Field(default=4, description="downloads at once from one host")
    allowed_hosts: tuple[str, ...] = Field(
        default=(),
        description='when set, pictures come from these hosts only, JSON list; ".example.com" with all below',
    )
    allow_private_networks: bool = Field(
        default=False,
        description="fetch from private and loopback addresses too: for tests and closed networks only",
    )


class EncoderSettings(Section):
    """How the model runs."""

    runtime: Literal["auto", "openvino", "onnx", "torch"] = Field(
        default="auto", description="what executes the model; auto = the best that is installed, and the log says why"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where it is executed; auto = a GPU if there is one that the runtime can use"
    )
    precision: Literal["f32", "bf16"] = Field(
        default="f32", description="of what is computed and not quantised; part of the model's fingerprint"
    )
    towers: Literal["both", "image", "text"] = Field(
        default="both",
        description="the half of the model that is loaded: without `text` products are embedded by their pictures "
        "alone and queries are lexical or by picture; a query service without `image` takes no pictures",
    )
    lanes: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="batches that are prepared and computed side by side; 0 = one a core, at most eight before a GPU",
    )
    max_batch: Count = Field(default=16, description="items in one batch of a lane")
    inference_batch: Annotated[int, Field(ge=0)] = Field(
        default=0, description="pictures in one inference; 0 = what suits the model and the runtime"
    )
    allow_unmeasured: bool = Field(
        default=False, description="serve a quantised model although nobody measured what the quantisation costs"
    )
    linger: Annotated[float, Field(ge=0)] = Field(
        default=0.002, description="seconds a partial batch waits for company"
    )
    queue: Count = Field(default=256, description="items that may wait; beyond, queries get 429 and bulk work waits")
    cache_entries: Annotated[int, Field(ge=0)] = Field(
        default=100_000,
        description="vectors kept in the embedding cache of a process without Redis, each 4 bytes a dimension and 330 "
        "more: of 512 dimensions 230 MiB once it is full",
    )


class EmbedderSettings(Section):
    """The worker between log and index."""

    batch: Count = Field(default=64, description="events processed together")
    in_flight: Count = Field(
        default=256,
        description="events in work at most, half of them on remote pictures; beyond, partitions are paused",
    )
    engine_attempts: Count = Field(
        default=5,
        description="tries on an engine that is away before a batch is halved, to find an event that is at fault; "
        "while nobody gets an answer the worker waits",
    )
    dead_letter_limit: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.5, description="share of dead letters among the last 200 events that stops the worker"
    )
    tombstone_days: Annotated[float, Field(gt=0)] = Field(
        default=30, description="a deletion is remembered this long: longer than any retry or replay can take"
    )
    drain_deadline: Seconds = Field(default=20.0, description="time to finish what is in flight at shutdown, seconds")


class Settings(BaseSettings):
    """Everything that can be set, with its default. Nested names join with two underscores."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        env_file=".env",
        env_ignore_empty=True,
        frozen=True,
        extra="ignore",  # .env may serve docker compose too; `catalens doctor` names unknown CATALENS_ variables
    )

    data_dir: Path = Field(default=Path("data"), description="log, index, uploaded pictures and caches of this process")
    model: str = Field(default="starter", description="bundled model's name, a name under DATA_DIR/models, or a folder")
    tags_file: Path | None = Field(
        default=None, description="labels that the model tags products with, a JSON file (docs/how-to/tags.md)"
    )
    languages: Annotated[tuple[Language, ...], Field(min_length=1)] = Field(
        default=DEFAULT_LANGUAGES,
        description='languages of the catalogue and its queries, JSON list of "en", "fr", "de", "es": inflections of '
        "their words meet. The same for every process; what is indexed already follows with `catalens reindex`",
    )
    url: str = Field(default="http://127.0.0.1:8080", description="where the command line finds the service")
    api_key: SecretStr | None = Field(default=None, description="the key that the command line sends")
    api_keys: tuple[ApiKey, ...] = Field(
        default=(), description='keys that the service accepts, JSON: [{"name": "shop", "secret": "…"}]'
    )
    api_keys_file: Path | None = Field(
        default=None,
        description="more keys, by the SHA-256 of their secrets, one JSON object a line as `catalens keys create` "
        "writes it; read again when it changes",
    )
    allow_anonymous: bool = Field(default=False, description="bind beyond loopback without any API key")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="the least that is logged"
    )
    log_format: Literal["auto", "json", "console"] = Field(
        default="auto", description="auto: readable on a terminal, JSON elsewhere"
    )
    http: HttpSettings = HttpSettings()
    log: LogSettings = LogSettings()
    kafka: KafkaSettings = KafkaSettings()
    redis: RedisSettings = RedisSettings()
    qdrant: QdrantSettings = QdrantSettings()
    blobs: BlobSettings = BlobSettings()
    tracing: TracingSettings = TracingSettings()
    pictures: PictureSettings = PictureSettings()
    encoder: EncoderSettings = EncoderSettings()
    embedder: EmbedderSettings = EmbedderSettings()

    @property
    def keyed(self) -> bool:
        """True when callers need an API key."""
        return bool(self.api_keys) or self.api_keys_file is not None

    @model_validator(mode="after")
    def _tombstones_outlive_replays(self) -> Self:
        """Refuse a tombstone that an old event could outlive (docs/adr/0008)."""
        if self.embedder.tombstone_days < self.log.dead_letter_days + 7:
            raise ValueError(
                "embedder.tombstone_days must be at least 7 above log.dead_letter_days, or a replayed event could "
                "bring a deleted product back"
            )
        return self


def load_settings() -> Settings:
    """Return the settings of environment and .env; raises Misconfigured naming each variable that is wrong."""
    try:
        return Settings()
    except ValidationError as error:
        raise Misconfigured(
            "; ".join(
                f"{PREFIX + '__'.join(str(part) for part in entry['loc']).upper() if entry['loc'] else 'settings'}: "
                f"{entry['msg']}"
                for entry in error.errors(include_url=False, include_input=False)
            )
        ) from error
    except ValueError as error:  # a list or section that is no JSON
        raise Misconfigured(f"settings: {error}: it is written as JSON, see docs/reference/settings.md") from error
