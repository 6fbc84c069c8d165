"""Looks at everything a process needs before it starts, and says what to do about each thing that is not right."""

from __future__ import annotations

import asyncio
import difflib
import errno
import platform
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Literal

from dotenv import dotenv_values
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from catalens.client import Unreachable
from catalens.domain import ModelSpec
from catalens.encoders.bundle import load_bundle, resolve
from catalens.errors import CatalensError, Misconfigured
from catalens.keys import Keyring
from catalens.settings import MIB, PREFIX, Settings, load_settings
from catalens_standalone.client import connect

LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
_ENOUGH_DISK: Final = 2048 * MIB
_LITTLE_DISK: Final = 256 * MIB
_SOON: Final = timedelta(days=14)

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Check:
    """One finding: what was looked at, how it is, and what to do if it is not well."""

    name: str
    status: Status
    finding: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Variable:
    """One environment variable that Catalens reads."""

    name: str
    field: FieldInfo


def variables(model: type[BaseModel] = Settings, prefix: str = PREFIX) -> Iterator[Variable]:
    """Yield every variable of the settings, sections flattened, in their order."""
    for name, field in model.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            yield from variables(section, f"{prefix}{name.upper()}__")
        else:
            yield Variable(f"{prefix}{name.upper()}", field)


async def examine(environ: Mapping[str, str], env_file: Path = Path(".env")) -> list[Check]:
    """Return all findings; those that need sound settings are left out when these are not."""
    checks = [_python()]
    named = [*environ, *dotenv_values(env_file)]
    checks += unknown_variables(named)
    try:
        settings = load_settings()
    except Misconfigured as error:
        return [*checks, Check("settings", "fail", str(error), "see docs/reference/settings.md")]
    checks.append(Check("settings", "ok", f"{_given(named)} set, the rest at its default"))
    checks += await asyncio.to_thread(access, settings)
    checks += await asyncio.to_thread(data_folder, settings.data_dir)
    spec, model = await asyncio.to_thread(_model, settings)
    checks.append(model)
    running = await _running(settings)
    if running is not None:
        return [*checks, running]
    checks.append(port(settings.http.host, settings.http.port))
    if spec is not None:
        checks += await _engines(settings, spec)
    return checks


def unknown_variables(names: Iterable[str]) -> list[Check]:
    """Return a warning for each CATALENS_ variable that no setting reads."""
    known = [variable.name for variable in variables()]
    sections = {name.rsplit("__", 1)[0] for name in known if "__" in name}  # these may be set whole, as JSON
    checks = []
    for name in sorted({name.upper() for name in names if name.upper().startswith(PREFIX)} - {*known, *sections}):
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
        advice = f"did you mean {close[0]}?" if close else "see docs/reference/settings.md for those that exist"
        checks.append(Check("settings", "warn", f"{name} is no setting and has no effect", advice))
    return checks


def access(settings: Settings) -> list[Check]:
    """Return who may call the service, and a failure if it would refuse to start (blocking)."""
    if settings.keyed:
        return _keys(settings)
    if settings.http.host in LOOPBACK:
        return [Check("access", "ok", "this machine only, without a key")]
    if settings.allow_anonymous:
        return [Check("access", "warn", f"anybody who reaches {settings.http.host} may write", "set CATALENS_API_KEYS")]
    advice = "set CATALENS_API_KEYS or CATALENS_API_KEYS_FILE, or CATALENS_ALLOW_ANONYMOUS=true where that is meant"
    return [Check("access", "fail", f"{settings.http.host} is beyond loopback and there is no API key", advice)]


def _keys(settings: Settings) -> list[Check]:
    try:
        keys = Keyring(settings).keys
    except Misconfigured as error:
        return [Check("access", "fail", str(error), "mend CATALENS_API_KEYS_FILE; see docs/how-to/protect.md")]
    if not keys:
        advice = "make one: catalens keys create NAME --scope query"
        return [Check("access", "warn", f"nobody may call: {settings.api_keys_file} holds no API key", advice)]
    checks = [Check("access", "ok", f"{len(keys)} API keys")]
    soon = datetime.now(UTC) + _SOON
    for key in keys:
        if key.expires is not None and key.expires < soon:
            state = "has expired" if key.expires < datetime.now(UTC) else f"expires on {key.expires:%Y-%m-%d}"
            checks.append(Check("access", "warn", f"the API key {key.name} {state}", "make it a successor"))
    return checks


def data_folder(folder: Path) -> list[Check]:
    """Return whether the data folder can be written and has room (blocking)."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        advice = "set CATALENS_DATA_DIR to a folder that this user may write"
        return [Check("data folder", "fail", f"{existing}: {error.strerror}", advice)]
    note = f"{folder} is writable" if existing == folder.absolute() else f"{folder} will be made at the first start"
    free = shutil.disk_usage(existing).free
    room = f"{free // MIB:,} MiB free"
    if free < _LITTLE_DISK:
        disk = Check("disk", "fail", room, "make room: a full disk is answered 503 and nothing is accepted")
    elif free < _ENOUGH_DISK:
        disk = Check("disk", "warn", room, "enough to try it; a catalogue with uploaded pictures needs more")
    else:
        disk = Check("disk", "ok", room)
    return [Check("data folder", "ok", note), disk]


def port(host: str, number: int) -> Check:
    """Return whether a server could listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, number))
    except OSError as error:
        nowhere = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        advice = (
            "set CATALENS_HTTP__HOST to an address of this machine"
            if nowhere
            else "stop what listens there, or choose another port with CATALENS_HTTP__PORT"
        )
        return Check("port", "fail", f"{host}:{number}: {error.strerror or error}", advice)
    return Check("port", "ok", f"{host}:{number} is free")


def _python() -> Check:
    # pip refuses to install under an older one; which it is matters in a report.
    return Check("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _given(names: Iterable[str]) -> str:
    known = {variable.name for variable in variables()}
    count = len(known & {name.upper() for name in names})
    return f"{count} variable{'' if count == 1 else 's'}"


def _model(settings: Settings) -> tuple[ModelSpec | None, Check]:
    try:
        bundle = load_bundle(resolve(settings.model, settings.data_dir))
    except CatalensError as error:
        return None, Check("model", "fail", str(error))
    spec = bundle.spec(settings.encoder.precision)
    size = sum(entry.bytes for entry in bundle.manifest.files.values()) / 1e6
    return spec, Check("model", "ok", f"{spec.id}, {spec.dimension} dimensions, {size:.0f} MB, checksums hold")


async def _running(settings: Settings) -> Check | None:
    """Return what a process that runs already says of itself; None if there is none."""
    client = connect(settings)
    url = client.url
    try:
        async with client:
            ready, report = await client.ready()
    except Unreachable:
        return None
    except CatalensError as error:
        return Check("service", "fail", str(error), "stop what listens there, or set CATALENS_URL")
    found = f"runs at {url}"
    if ready:
        return Check("service", "ok", f"{found} and is ready")
    return Check("service", "fail", f"{found} and is not ready: {report.get('detail') or report}", "look at its log")


async def _engines(settings: Settings, spec: ModelSpec) -> list[Check]:
    # Heavy, and only needed when no process runs.
    from catalens.embedding import probe  # noqa: PLC0415  # the quick checks go without
    from catalens.encoders import open_encoder  # noqa: PLC0415  # the quick checks go without
    from catalens.engines import open_engines  # noqa: PLC0415  # the quick checks go without
    from catalens.telemetry import Metrics  # noqa: PLC0415  # the quick checks go without

    checks = []
    try:
        async with open_encoder(settings, Metrics()) as encoder:
            tower, _ = await probe(encoder)
        checks.append(Check("encoder", "ok", "embeds a text" if tower == "text" else "embeds a picture"))
    except CatalensError as error:
        checks.append(Check("encoder", "fail", str(error), "look at CATALENS_MODEL and CATALENS_ENCODER__…"))
    if not settings.data_dir.exists():
        return checks
    try:
        async with open_engines(settings, spec):
            checks.append(Check("engines", "ok", f"log and index in {settings.data_dir} open"))
    except CatalensError as error:
        checks.append(Check("engines", "fail", str(error)))
    return checks
