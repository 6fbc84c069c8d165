"""Typed settings: nested, frozen, from `CATALENS_…` variables and `.env`; no module-level instance."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, StringConstraints
from pydantic_settings import BaseSettings, SettingsConfigDict

from catalens.domain import DEFAULT_TENANT, Tenant

MIB = 1024 * 1024
Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A frozen group of settings; an unknown name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ApiKey(Section):
    """One client of the HTTP API."""

    name: Annotated[str, StringConstraints(min_length=1)] = Field(description="shown in logs")
    secret: SecretStr = Field(min_length=16, description="sent as `Authorization: Bearer …` or `X-API-Key`")
    tenant: Tenant = DEFAULT_TENANT


class HttpSettings(Section):
    """The HTTP side of a service."""

    host: str = Field(default="127.0.0.1", description="address to bind; elsewhere than loopback needs API keys")
    port: Port = Field(default=8080, description="port to bind; 0 takes a free one")
    max_body: Count = Field(default=25 * MIB, description="bytes of one request body (NDJSON excepted)")
    max_line: Count = Field(default=32 * MIB, description="bytes of one NDJSON line")
    max_batch: Count = Field(default=64, description="requests in one batch call")
    max_wait: Seconds = Field(default=60.0, description="longest `?wait=true&timeout=`, seconds")
    max_concurrent: Count = Field(default=256, description="requests in work; one more is answered 429")
    body_timeout: Seconds = Field(default=60.0, description="a request body must arrive within this, seconds")


class LogSettings(Section):
    """The embedded event log."""

    retention_hours: Annotated[float, Field(gt=0)] = Field(
        default=24 * 7, description="records that every group has read are kept this long"
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

    precision: Literal["f32", "bf16"] = Field(default="f32", description="part of the model's fingerprint")
    lanes: Annotated[int, Field(ge=0)] = Field(default=0, description="single-thread inference lanes; 0 = one a core")
    max_batch: Count = Field(default=16, description="items in one inference")
    linger: Annotated[float, Field(ge=0)] = Field(
        default=0.002, description="seconds a partial batch waits for company"
    )
    queue: Count = Field(default=256, description="items that may wait; beyond, queries get 429 and bulk work waits")
    cache_entries: Annotated[int, Field(ge=0)] = Field(
        default=100_000, description="vectors kept in the embedding cache"
    )


class EmbedderSettings(Section):
    """The worker between log and index."""

    batch: Count = Field(default=64, description="events processed together")
    in_flight: Count = Field(
        default=256,
        description="events in work at most, half of them on remote pictures; beyond, partitions are paused",
    )
    engine_attempts: Count = Field(
        default=5, description="tries of a write on an engine that is away, then a retry topic"
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
        env_prefix="CATALENS_",
        env_nested_delimiter="__",
        env_file=".env",
        env_ignore_empty=True,
        frozen=True,
        extra="ignore",  # .env may serve docker compose too; `catalens doctor` names unknown CATALENS_ variables
    )

    data_dir: Path = Field(default=Path("data"), description="log, index, uploaded pictures and caches of this process")
    model: str = Field(default="starter", description="bundled model's name, a name under DATA_DIR/models, or a folder")
    url: str = Field(default="http://127.0.0.1:8080", description="where the command line finds the service")
    api_key: SecretStr | None = Field(default=None, description="the key that the command line sends")
    api_keys: tuple[ApiKey, ...] = Field(
        default=(), description='keys that the service accepts, JSON: [{"name": "shop", "secret": "…"}]'
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
    pictures: PictureSettings = PictureSettings()
    encoder: EncoderSettings = EncoderSettings()
    embedder: EmbedderSettings = EmbedderSettings()
