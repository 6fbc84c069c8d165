"""The ways in which checkpoints lie on a disk, each a module that reads one; and what they share."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError  # only its name: nothing is unpickled
from typing import Any, Final, Protocol

import torch
import transformers
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, normalizers
from torch import Tensor, nn

from catalens.encoders.bundle import ImageInput, TextInput
from catalens.errors import Misconfigured

BROKEN: Final = (OSError, ValueError, RuntimeError, KeyError, TypeError, UnpicklingError, SafetensorError)
"""What the libraries raise for files that are not what their names say."""


@dataclass(frozen=True, slots=True)
class Model:
    """What a layout reads out of a folder."""

    family: str
    dimension: int
    image: ImageInput
    text: TextInput
    tokenizer: Tokenizer
    vision: nn.Module
    text_tower: nn.Module
    files: Mapping[str, bytes]


class Layout(Protocol):
    """A module of this package."""

    KEPT: tuple[str, ...]  # the files that a bundle keeps, from which `rebuild` builds the modules

    def recognises(self, names: Collection[str], folder: Path) -> bool:
        """Tell whether the folder, which holds files of these names, is laid out this way."""
        ...

    def read(self, folder: Path, image_from: Path | None) -> Model:
        """Return the model with its weights. Raises Misconfigured."""
        ...

    def weights(self, folder: Path, names: Collection[str]) -> list[str]:
        """Return which of the files `names` hold the weights, `folder` holding the small ones. Raises Misconfigured."""
        ...

    def rebuild(self, kept: Mapping[str, bytes], image: ImageInput, text: TextInput, tokenizer: Tokenizer) -> Model:
        """Return the same modules; their weights are whatever memory held."""
        ...


# --- towers -----------------------------------------------------------------------------------------------


class FixedText(nn.Module):
    """A text tower that was trained on texts padded to one length and sees the padding: so it is given it, always."""

    def __init__(self, tower: nn.Module, length: int, pad_id: int) -> None:
        super().__init__()
        self.tower = tower
        self.length = length
        self.pad_id = pad_id

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        ids = torch.where(attention_mask > 0, input_ids, self.pad_id)
        padding = ids.new_full((ids.shape[0], self.length), self.pad_id)
        return self.tower(torch.cat([ids, padding], dim=1)[:, : self.length])


def causal_bias(input_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Return [T, T] to add to attention scores: nothing for what came before, the lowest number for what comes."""
    length = input_ids.shape[1]
    return torch.full((length, length), torch.finfo(dtype).min, dtype=dtype, device=input_ids.device).triu(1)


def padding_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return [N, 1, 1, T] to add to attention scores: the lowest number for what the mask leaves out."""
    return (1 - mask[:, None, None, :].to(dtype)) * torch.finfo(dtype).min


def precision(module: nn.Module) -> torch.dtype:
    """Return what a module computes in."""
    return next(module.parameters()).dtype


def at_first(states: Tensor, marks: Tensor, attention_mask: Tensor) -> Tensor:
    """Return each text's state at the first mark, or at its last token where there is no mark.

    No text from the tokenizer is without a mark, which is its end token; the check of a bundle is.
    """
    marks = marks & (attention_mask > 0)
    place = torch.where(marks.any(dim=1), marks.int().argmax(dim=1), attention_mask.sum(dim=1) - 1)
    return states[torch.arange(states.shape[0], device=states.device), place]


# --- files ------------------------------------------------------------------------------------------------


def document(path: Path) -> dict[str, Any]:
    """Return a JSON object. Raises Misconfigured."""
    try:
        return parsed(path.read_bytes(), path.name)
    except OSError as error:
        raise Misconfigured(f"{path} cannot be read ({error.strerror})") from error


def parsed(data: bytes, name: str) -> dict[str, Any]:
    """Return a JSON object out of its bytes. Raises Misconfigured."""
    try:
        found = json.loads(data)
    except ValueError as error:
        raise Misconfigured(f"{name} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise Misconfigured(f"{name} is no JSON object")
    return found


def first_of(names: Collection[str], *choices: str) -> list[str]:
    """Return the first of the choices that is there, in a list. Raises Misconfigured."""
    found = [name for name in choices if name in names][:1]
    if not found:
        raise Misconfigured(f"there is none of {', '.join(choices)}: nothing to read weights from")
    return found


# --- pictures ---------------------------------------------------------------------------------------------

_RESAMPLING: Final = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
_PROCESSORS: Final = {
    "CLIPImageProcessor": "shortest_edge",
    "CLIPFeatureExtractor": "shortest_edge",
    "SiglipImageProcessor": "squash",
}
_STEPS: Final = ("do_resize", "do_rescale", "do_normalize")


def processor_image(folder: Path) -> ImageInput:
    """Return what a processor of transformers does to a picture. Raises Misconfigured where it is not known."""
    path = folder / "preprocessor_config.json"
    if path.is_file():
        settings = document(path)
    else:
        path = folder / "processor_config.json"
        settings = document(path).get("image_processor", {})
    kind = str(settings.get("image_processor_type", settings.get("feature_extractor_type")))
    resize = _PROCESSORS.get(kind.removesuffix("Fast").removesuffix("Pil"))
    if resize is None:
        raise Misconfigured(f"{path} names the image processor {kind}; known are {', '.join(_PROCESSORS)}")
    crops = resize == "shortest_edge"
    for step in (*_STEPS, "do_center_crop") if crops else _STEPS:
        if settings.get(step) is False:
            raise Misconfigured(f"{path} leaves out {step}, which every model that is known does")
    try:
        size = _side(settings["crop_size" if crops else "size"])
        resize_to = _side(settings["size"])
        return ImageInput(
            size=size,
            resize_to=resize_to,
            resize=resize,
            crop="center",
            interpolation=_RESAMPLING[settings["resample"]],
            rescale=settings.get("rescale_factor", 1 / 255),
            mean=settings["image_mean"],
            std=settings["image_std"],
            decode="fast",
        )
    except (KeyError, ValueError, TypeError) as error:
        raise Misconfigured(f"{path} does not say how pictures are prepared: {error!r}") from error


def _side(size: Any) -> int:
    """Return the side of a square in any of the ways in which processors write it."""
    if isinstance(size, int):
        return size
    sides = set(size.values()) if size.keys() <= {"height", "width", "shortest_edge"} else set()
    if len(sides) != 1:
        raise ValueError(f"{size} is no square")
    return int(sides.pop())


# --- texts ------------------------------------------------------------------------------------------------

_PUNCTUATION: Final = r"[!-/:-@\[-`{-~]"  # string.punctuation
_SPACES: Final = r"\s+"


def auto_tokenizer(folder: Path) -> tuple[Tokenizer, int]:
    """Return the tokenizer as transformers builds it from the folder's files, and the id that it pads with."""
    try:
        made = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, AttributeError, TypeError) as error:
        raise Misconfigured(f"{folder} holds no tokenizer that transformers can build: {error}") from error
    backend = getattr(made, "backend_tokenizer", None)
    if backend is None:
        raise Misconfigured(f"{folder}: its tokenizer is none of the `tokenizers` library: add its tokenizer.json")
    if made.pad_token_id is None:
        raise Misconfigured(f"{folder}: its tokenizer names no padding token")
    return bare(backend), made.pad_token_id


def bare(tokenizer: Any) -> Tokenizer:
    """Return a copy that neither pads nor cuts: the encoder does."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy


def cleaned(tokenizer: Tokenizer, *, punctuation: bool, underscores: bool = False) -> Tokenizer:
    """Return the tokenizer with white space made single before all else, without punctuation where so told."""
    steps: list[Any] = []
    if underscores:
        steps.append(normalizers.Replace("_", " "))
    if not punctuation:
        steps.append(normalizers.Replace(Regex(_PUNCTUATION), ""))
    steps += [normalizers.Replace(Regex(_SPACES), " "), normalizers.Strip()]
    if tokenizer.normalizer is not None:
        steps.append(tokenizer.normalizer)
    tokenizer.normalizer = normalizers.Sequence(steps)
    return tokenizer


def equal_sizes(folder: Path, image: ImageInput, size: object) -> None:
    """Refuse a processor whose pictures the model does not take."""
    if image.size != size:
        raise Misconfigured(f"{folder}: its processor makes pictures of {image.size} px, its model takes {size}")
