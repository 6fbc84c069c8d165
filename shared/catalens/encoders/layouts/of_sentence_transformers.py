"""Text towers of sentence-transformers that were trained to meet the pictures of a CLIP, as the multilingual one."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import initialization

from catalens.encoders.bundle import ImageInput, TextInput
from catalens.encoders.layouts import (
    BROKEN,
    Model,
    auto_tokenizer,
    document,
    equal_sizes,
    first_of,
    padding_bias,
    parsed,
    precision,
    processor_image,
)
from catalens.encoders.layouts.of_transformers import ClipVision
from catalens.errors import Misconfigured

MODULES: Final = "modules.json"
IMAGE_CONFIG: Final = "image_config.json"
TEXT_CONFIG: Final = "text_config.json"
HEAD: Final = "text_head.json"
KEPT: tuple[str, ...] = (IMAGE_CONFIG, TEXT_CONFIG, HEAD)
_POOLING: Final = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
_ACTIVATIONS: Final = {"Identity": nn.Identity, "Tanh": nn.Tanh}


def recognises(names: Collection[str], folder: Path) -> bool:  # noqa: ARG001  # what other layouts look into
    """Tell whether a list of sentence-transformers' modules is there."""
    return MODULES in names


def read(folder: Path, image_from: Path | None) -> Model:
    """Return the model with its weights. Raises Misconfigured."""
    places = _places(folder)
    if image_from is None:
        raise Misconfigured(
            f"{folder} is a text tower alone: name with --image-from the CLIP whose pictures it was trained for"
        )
    where = places["Transformer"]
    pooling, dense = document(places["Pooling"] / "config.json"), document(places["Dense"] / "config.json")
    chosen = [name for name, value in pooling.items() if name.startswith("pooling_mode_") and value]
    activation = str(dense.get("activation_function", "")).rpartition(".")[2]
    if len(chosen) != 1 or chosen[0] not in _POOLING or activation not in _ACTIVATIONS:
        raise Misconfigured(f"{folder} pools ({', '.join(chosen)}) or activates ({activation}) in a way not known")
    limits = document(where / "sentence_bert_config.json")
    try:
        text = transformers.AutoModel.from_pretrained(
            where, dtype=torch.float32, local_files_only=True, trust_remote_code=False, weights_only=True
        )
        image = transformers.CLIPModel.from_pretrained(
            image_from, dtype=torch.float32, local_files_only=True, weights_only=True
        )
    except BROKEN as error:
        raise Misconfigured(f"{folder} or {image_from} cannot be loaded: {error}") from error
    tokenizer, pad_id = auto_tokenizer(where)
    head = {
        "pooling": _POOLING[chosen[0]],
        "in_features": dense["in_features"],
        "out_features": dense["out_features"],
        "bias": dense.get("bias", True),
        "activation": activation,
    }
    projection = _dense(head)
    try:
        weights = _dense_weights(places["Dense"])
        projection[0].load_state_dict({name.removeprefix("linear."): value for name, value in weights.items()})
    except BROKEN as error:
        raise Misconfigured(f"{places['Dense']} cannot be loaded: {error}") from error
    if image.config.projection_dim != head["out_features"]:
        raise Misconfigured(
            f"{folder} gives {head['out_features']} values where {image_from} gives {image.config.projection_dim}"
        )
    prepared = processor_image(image_from)
    equal_sizes(image_from, prepared, image.config.vision_config.image_size)
    spec = TextInput(
        max_tokens=limits["max_seq_length"], prefix="", pad_id=pad_id, lowercase=bool(limits.get("do_lower_case"))
    )
    return _model(image, text, projection, head, prepared, spec, tokenizer)


def weights(folder: Path, names: Collection[str]) -> list[str]:
    """Return which of the files hold the weights. Raises Misconfigured."""
    places = _places(folder)
    at = [places[kind].relative_to(folder) for kind in ("Transformer", "Dense")]
    files = ("model.safetensors", "pytorch_model.bin")
    return [name for place in at for name in first_of(names, *((place / file).as_posix() for file in files))]


def rebuild(kept: Mapping[str, bytes], image: ImageInput, text: TextInput, tokenizer: Tokenizer) -> Model:
    """Return the same modules; their weights are whatever memory held."""
    head = parsed(kept[HEAD], HEAD)
    text_config = parsed(kept[TEXT_CONFIG], TEXT_CONFIG)
    with initialization.no_init_weights():
        clip = transformers.CLIPModel(transformers.CLIPConfig(**parsed(kept[IMAGE_CONFIG], IMAGE_CONFIG)))
        reader = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**text_config))
    return _model(clip, reader, _dense(head), head, image, text, tokenizer)


def _places(folder: Path) -> dict[str, Path]:
    """Return where each module lies, by its kind."""
    try:
        modules = json.loads((folder / MODULES).read_bytes())
        places = {module["type"].rpartition(".")[2]: folder / module["path"] for module in modules}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Misconfigured(f"{folder / MODULES} cannot be read: {error!r}") from error
    if list(places) != ["Transformer", "Pooling", "Dense"]:
        raise Misconfigured(f"{folder} is made of {', '.join(places)}; known is Transformer, Pooling, Dense")
    if any(not path.resolve().is_relative_to(folder.resolve()) for path in places.values()):
        raise Misconfigured(f"{folder / MODULES} points out of its folder")
    return places


def _dense(head: Mapping[str, Any]) -> nn.Sequential:
    linear = nn.Linear(head["in_features"], head["out_features"], bias=head["bias"])
    return nn.Sequential(linear, _ACTIVATIONS[head["activation"]]())


def _dense_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / "model.safetensors"
    if path.is_file():
        return load_file(path)
    return torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)


def _model(
    clip: Any,
    reader: Any,
    projection: nn.Module,
    head: Mapping[str, Any],
    image: ImageInput,
    text: TextInput,
    tokenizer: Tokenizer,
) -> Model:
    files = {}
    for name, config in ((IMAGE_CONFIG, clip.config), (TEXT_CONFIG, reader.config)):
        described = config.to_dict()
        described.pop("_name_or_path", None)
        files[name] = json.dumps(described, sort_keys=True).encode()
    return Model(
        family="clip",
        dimension=head["out_features"],
        image=image,
        text=text,
        tokenizer=tokenizer,
        vision=ClipVision(clip.vision_model, clip.visual_projection),
        text_tower=_MeanText(reader, projection, head["pooling"]),
        files={**files, HEAD: json.dumps(head, sort_keys=True).encode()},
    )


class _MeanText(nn.Module):
    """ids → the mean of its tokens' states, or the first one's, projected into the pictures' space."""

    def __init__(self, reader: nn.Module, projection: nn.Module, pooling: str) -> None:
        super().__init__()
        self.reader = reader
        self.projection = projection
        self.pooling = pooling

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        bias = padding_bias(attention_mask, precision(self))
        states = self.reader(input_ids=input_ids, attention_mask=bias).last_hidden_state
        if self.pooling == "cls":
            return self.projection(states[:, 0])
        weights = attention_mask[:, :, None].to(states.dtype)
        return self.projection((states * weights).sum(dim=1) / weights.sum(dim=1))
