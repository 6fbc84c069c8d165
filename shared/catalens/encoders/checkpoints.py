"""Checkpoints as their makers publish them, read without running any of their code; needs the torch extra.

A checkpoint is the reference that a bundle is made from (encoders/export.py), is verified against and, by the torch
runtime, is executed as. What its files do not say is refused, never guessed: a wrong crop costs relevance and tells
nobody.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer
from torch import nn

from catalens.encoders.bundle import MANIFEST, TOKENIZER, WEIGHTS, ImageInput, TextInput, read_manifest
from catalens.encoders.layouts import BROKEN, Layout, Model, of_open_clip, of_sentence_transformers, of_transformers
from catalens.errors import Misconfigured

_LAYOUTS: Final[tuple[Layout, ...]] = (of_sentence_transformers, of_transformers, of_open_clip)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A two-tower model on the CPU in float32: how its inputs are prepared, and its towers as torch modules.

    `vision`: pixels [N, 3, H, W] → [N, dimension]; `text_model`: input_ids, attention_mask [N, T] → [N, dimension].
    Rows are as the graphs of a bundle give them: not normalised, dependent on their own item alone.
    """

    id: str
    revision: str
    family: str
    dimension: int
    image: ImageInput
    text: TextInput
    tokenizer: Tokenizer
    licence: str  # "" where its files do not say
    source: str
    languages: tuple[str, ...]
    vision: nn.Module
    text_model: nn.Module
    files: Mapping[str, bytes]  # by flat names: the small files from which the modules are built again


def load_checkpoint(folder: Path, image_from: Path | None = None) -> Checkpoint:
    """Return the model in `folder`: of transformers, OpenCLIP or sentence-transformers, or a bundle made from one.

    `image_from` is the folder of the CLIP whose pictures a text tower alone was trained for. Blocking. Raises
    Misconfigured: a kind that is not known, a setting that is missing, a file that is broken.
    """
    if (folder / MANIFEST).is_file():
        return _from_bundle(folder)
    try:
        model = layout_of(folder).read(folder, image_from)
    except BROKEN as error:
        raise Misconfigured(f"{folder} is broken, or says things in a way that is not known: {error!r}") from error
    licence, languages = _card(folder / "README.md")
    return _checkpoint(model, folder.name, _digest(folder), licence, folder.name, languages)


def layout_of(folder: Path) -> Layout:
    """Return who can read the checkpoint in `folder`. Raises Misconfigured."""
    names = {path.name for path in folder.glob("*")}
    for layout in _LAYOUTS:
        if layout.recognises(names, folder):
            return layout
    raise Misconfigured(f"{folder} holds no config.json, open_clip_config.json or modules.json: no checkpoint is there")


def _checkpoint(
    model: Model, name: str, revision: str, licence: str, source: str, languages: tuple[str, ...]
) -> Checkpoint:
    pair = nn.ModuleDict({"vision": model.vision, "text": model.text_tower})
    pair.float().requires_grad_(requires_grad=False).eval()
    return Checkpoint(
        id=name,
        revision=revision,
        family=model.family,
        dimension=model.dimension,
        image=model.image,
        text=model.text,
        tokenizer=model.tokenizer,
        licence=licence,
        source=source,
        languages=languages,
        vision=model.vision,
        text_model=model.text_tower,
        files=model.files,
    )


def _from_bundle(folder: Path) -> Checkpoint:
    """Return what `export_bundle` wrote, with its weights mapped, not copied."""
    from safetensors.torch import load_file  # noqa: PLC0415  # has no types where torch is not installed

    manifest = read_manifest(folder)
    names = manifest.files.keys()
    layout = next((layout for layout in _LAYOUTS if names >= {WEIGHTS, *layout.KEPT}), None)
    if layout is None:
        raise Misconfigured(f"{folder} holds no {WEIGHTS}: torch runs only bundles that `catalens model pull` made")
    kept = {name: (folder / name).read_bytes() for name in layout.KEPT}
    model = layout.rebuild(kept, manifest.image, manifest.text, Tokenizer.from_file(str(folder / TOKENIZER)))
    pair = nn.ModuleDict({"vision": model.vision, "text": model.text_tower})
    try:
        pair.load_state_dict(load_file(folder / WEIGHTS), assign=True)
    except BROKEN as error:
        raise Misconfigured(f"{folder / WEIGHTS} does not fit its configuration: {error}") from error
    return _checkpoint(model, manifest.id, manifest.revision, manifest.licence, manifest.source, manifest.languages)


def _card(path: Path) -> tuple[str, tuple[str, ...]]:
    """Return the licence and the languages that a model card's head names, as far as it does."""
    from huggingface_hub import metadata_load  # noqa: PLC0415  # as above
    from yaml import YAMLError  # noqa: PLC0415  # as above

    try:
        head = (metadata_load(path) if path.is_file() else None) or {}
    except (OSError, ValueError, YAMLError) as error:
        raise Misconfigured(f"the head of {path} is broken: mend it, or take the file away: {error}") from error
    licence = head.get("license", "")
    licence = head.get("license_name", licence) if licence == "other" else licence
    languages = head.get("language") or []
    languages = [languages] if isinstance(languages, str) else languages
    return str(licence), tuple(str(language) for language in languages)


def _digest(folder: Path) -> str:
    """Return what tells these weights from any other, for a folder to which no hub gave a revision."""
    digest = hashlib.sha256()
    for path in sorted(path for ending in ("*.safetensors", "*.bin") for path in folder.rglob(ending)):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]
