"""The model bundle: a folder that says what a model is, how its inputs are prepared and what it may be used for.

The format is described in docs/model-bundles.md. Nothing here needs a model runtime, so that a service
which only wants a model's family and dimension stays without one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

import catalens
from catalens.domain import ModelSpec
from catalens.encoders.known import KNOWN
from catalens.errors import Misconfigured

MANIFEST = "bundle.json"
VISION = "vision.onnx"
TEXT = "text.onnx"
TOKENIZER = "tokenizer.json"
WEIGHTS = "weights.safetensors"
GRAPHS: Final[Mapping[str, tuple[str, ...]]] = {"both": (TEXT, VISION), "image": (VISION,), "text": (TEXT,)}
"""What a runtime loads, by `encoder.towers`."""

Channels = tuple[float, float, float]
Word = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class Part(BaseModel):
    """A frozen part of bundle.json. Fields of a later release are ignored; none that matters has a default."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class ImageInput(Part):
    """How a picture becomes `pixels`: resize, crop, then (rgb × rescale − mean) / std per channel."""

    size: Annotated[int, Field(ge=8, le=2048)]
    resize_to: Annotated[int, Field(ge=8, le=4096)]
    resize: Literal["shortest_edge", "squash", "pad"]
    crop: Literal["center", "center_rounded"]  # rounded: half of an odd rest goes to the even side, as in torchvision
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"]
    rescale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    mean: Channels
    std: Channels
    decode: Literal["fine", "fast"] = "fine"
    """fine: as the model's own processor decodes, to 3 of 255 levels; fast: shrunk by the codec (docs/adr/0018)."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.resize_to < self.size:
            raise ValueError("resize_to is smaller than size, so the crop would reach beyond the picture")
        if self.resize != "shortest_edge" and self.resize_to != self.size:
            raise ValueError(f'resize "{self.resize}" leaves nothing to crop: set resize_to to size')
        if min(self.std) <= 0:
            raise ValueError("std must be positive")
        return self


class TextInput(Part):
    """How a text becomes `input_ids`: prefix, lower case, tokenizer, cut at `max_tokens`."""

    max_tokens: Annotated[int, Field(ge=1, le=8192)]
    prefix: str
    pad_id: Annotated[int, Field(ge=0)]
    lowercase: bool
    fixed: bool = False
    """The graph itself fills every text up to `max_tokens`, so that a short one costs what a long one does."""


class FileEntry(Part):
    """What a file must be, to the bit."""

    sha256: Annotated[str, StringConstraints(pattern=r"^[a-f0-9]{64}$")]
    bytes: Annotated[int, Field(ge=1)]


Vector = tuple[Annotated[float, Field(allow_inf_nan=False)], ...]


class Check(Part):
    """What a reference runtime answered to two fixed inputs (docs/model-bundles.md), normalised."""

    pixels: Vector
    input_ids: Vector


Share = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]


class Closeness(Part):
    """How near one tower's vectors are to the reference's; centred = with the mean vector removed first."""

    cosine_mean: Share
    cosine_min: Share
    centred_mean: Share
    centred_min: Share


class Loss(Part):
    """What a quantisation costs, measured against the model that it was made from (encoders/fidelity.py)."""

    pictures: Annotated[int, Field(ge=1)] = Field(description="none of which it was calibrated with")
    texts: Annotated[int, Field(ge=0)]
    precision: Literal["f32", "bf16"] = Field(description="of what is computed and not quantised, when measured")
    image: Closeness
    text: Closeness | None
    overlap_at_10: Share = Field(description="share of each picture's ten nearest pictures that stay the same")


class Quantization(Part):
    """How an int8 bundle was made."""

    method: Word
    source: Word = Field(description="fingerprint of the bundle that it was made from")
    calibration: Annotated[int, Field(ge=1)] = Field(description="pictures that the ranges were taken from")
    loss: Loss | None = Field(description="None: nobody measured it")


class Manifest(Part):
    """bundle.json, format 1."""

    format: Literal[1]
    id: Word
    revision: Word
    family: Word
    dimension: Annotated[int, Field(ge=1, le=65_536)]
    precision: Literal["fp32", "int8"]
    image: ImageInput
    text: TextInput
    licence: str
    source: str
    languages: tuple[str, ...]
    files: Mapping[Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._\-]*$")], FileEntry]
    check: Check | None = None
    quantization: Quantization | None = None
    evaluation: Mapping[str, object] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        missing = {VISION, TEXT, TOKENIZER} - self.files.keys()
        if missing:
            raise ValueError(f"files lacks {', '.join(sorted(missing))}")
        if (self.precision == "int8") != (self.quantization is not None):
            raise ValueError("an int8 bundle says under quantization how it was made, and no other does")
        if self.check and {len(self.check.pixels), len(self.check.input_ids)} != {self.dimension}:
            raise ValueError(f"check holds vectors of another length than dimension {self.dimension}")
        return self


@dataclass(frozen=True, slots=True)
class Bundle:
    """A folder whose files are exactly those that its manifest lists."""

    folder: Path
    manifest: Manifest

    def path(self, name: str) -> Path:
        """Return where the file `name` of the bundle lies."""
        return self.folder / name

    def spec(self, precision: str) -> ModelSpec:
        """Return the model's identity when run at `precision`; equal fingerprints give comparable vectors."""
        manifest = self.manifest
        identity = {
            "id": manifest.id,
            "revision": manifest.revision,
            "precision": precision,
            # Without what is left at its default: a field that a later release adds changes no fingerprint by itself.
            "image": manifest.image.model_dump(exclude_defaults=True),
            "text": manifest.text.model_dump(exclude_defaults=True),
            "files": {name: entry.sha256 for name, entry in manifest.files.items()},
        }
        canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
        return ModelSpec(
            id=manifest.id,
            revision=manifest.revision,
            family=manifest.family,
            dimension=manifest.dimension,
            fingerprint=hashlib.sha256(canonical.encode()).hexdigest()[:32],
        )


def resolve(model: str, data_dir: Path) -> Path:
    """Return the folder of `model`: a bundled model's name, a name under data_dir/models, or a folder.

    Raises Misconfigured with every place that was tried, or with the command that fetches a model known by that name.
    """
    package = Path(catalens.__file__).parent
    tried = [
        package / "bundles" / model,  # a wheel carries its models
        package.parents[1] / "models" / model / "bundle",  # a checkout, installed editable
        data_dir / "models" / model,
        Path(model).expanduser(),
    ]
    for folder in tried:
        if (folder / MANIFEST).is_file():
            return folder
    if model in KNOWN:
        raise Misconfigured(
            f"CATALENS_MODEL={model}: it is not in {data_dir / 'models'} yet: `catalens model pull {model}` fetches "
            f"{KNOWN[model].hub}; without a hub, docs/how-to/models.md says how"
        )
    places = ", ".join(str(folder) for folder in tried)
    raise Misconfigured(
        f"CATALENS_MODEL={model}: no model bundle of that name ({MANIFEST} was looked for in {places}); "
        "set it to 'starter', to a name under CATALENS_DATA_DIR/models or to a bundle's folder"
    )


def bundled() -> dict[Path, str]:
    """Return the folders of the models that come with Catalens, and their names."""
    package = Path(catalens.__file__).parent
    inside = {path.parent.resolve(): path.parent.name for path in package.glob(f"bundles/*/{MANIFEST}")}
    checkout = {
        path.parent.resolve(): path.parents[1].name for path in package.parents[1].glob(f"models/*/bundle/{MANIFEST}")
    }
    return inside | checkout


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of the bundle in `folder`, without a look at its other files. Raises Misconfigured."""
    path = folder / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise Misconfigured(f"{path} cannot be read ({error.strerror}): point CATALENS_MODEL at a bundle") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        raise Misconfigured(
            f"{path} is no bundle manifest of format 1: {where}: {first['msg']}; see docs/model-bundles.md"
        ) from error


def load_bundle(folder: Path, *, verified: Path | None = None) -> Bundle:
    """Return the bundle in `folder` once every file in it has the size and SHA-256 that the manifest states.

    Reads all files (blocking), half a second for a CLIP; with `verified`, a file of that name remembers which were
    read, and one that has not been touched since (size, inode, times of its content and its entry) is not read again.
    Raises Misconfigured naming the file that is not as it should be.
    """
    manifest = read_manifest(folder)
    known = {} if verified is None else _read_verified(verified)
    seen = {}
    for name, entry in manifest.files.items():
        path = folder / name
        mark = f"{entry.sha256} {_touched(path)}"
        if known.get(name) != mark:
            _check_file(path, entry)
        seen[name] = mark
    if verified is not None and seen != known:
        _write_verified(verified, seen)
    return Bundle(folder, manifest)


def _touched(path: Path) -> str:
    """Return what changes whenever the file is written or replaced."""
    try:
        found = path.stat()
    except OSError:
        return ""  # the check says what is wrong with it
    return f"{found.st_dev} {found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


def _read_verified(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}  # never written, or half: everything is read
    return found if isinstance(found, dict) else {}


def _write_verified(path: Path, seen: Mapping[str, str]) -> None:
    with suppress(OSError):  # a full or read-only disk: the next start reads everything again
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(seen), encoding="utf-8")
        partial.replace(path)


def refuse_unmeasured(manifest: Manifest, *, allow: bool) -> None:
    """Raise Misconfigured for a quantised model whose loss nobody measured, unless that is allowed."""
    made = manifest.quantization
    if made is not None and made.loss is None and not allow:
        raise Misconfigured(
            f"nobody measured what the quantisation of {manifest.id} costs: make it with `catalens model quantize "
            "NAME --images FOLDER`, which measures it, or set CATALENS_ENCODER__ALLOW_UNMEASURED=true"
        )


def _check_file(path: Path, entry: FileEntry) -> None:
    mend = "copy the bundle again, or write the new checksums to bundle.json if the change was meant"
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            raise Misconfigured(f"{path} has {size} bytes where bundle.json says {entry.bytes}: {mend}")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Misconfigured(f"{path} cannot be read ({error.strerror}): {mend}") from error
    if digest != entry.sha256:
        raise Misconfigured(f"{path} has SHA-256 {digest} where bundle.json says {entry.sha256}: {mend}")
