"""Checkpoints of transformers: CLIP, SigLIP and SigLIP2 of fixed resolution."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import initialization

from catalens.encoders.bundle import TOKENIZER, ImageInput, TextInput
from catalens.encoders.layouts import (
    BROKEN,
    FixedText,
    Model,
    at_first,
    auto_tokenizer,
    bare,
    causal_bias,
    cleaned,
    document,
    equal_sizes,
    first_of,
    parsed,
    precision,
    processor_image,
)
from catalens.errors import Misconfigured

CONFIG: Final = "config.json"
KEPT: tuple[str, ...] = (CONFIG,)


def recognises(names: Collection[str], folder: Path) -> bool:
    """Tell whether a config.json is there that transformers understands without code of the checkpoint's."""
    if CONFIG not in names:
        return False
    return "open_clip_config.json" not in names or "auto_map" not in document(folder / CONFIG)


def read(folder: Path, image_from: Path | None) -> Model:
    """Return the model with its weights. Raises Misconfigured."""
    if image_from is not None:
        raise Misconfigured(f"{folder} has an image tower of its own: leave --image-from out")
    kind = document(folder / CONFIG).get("model_type")
    if kind == "siglip2":
        raise Misconfigured(
            f"{folder} is a SigLIP2 of variable resolution (NaFlex), whose pictures have no fixed size: take one of "
            "the fixed ones, such as google/siglip2-base-patch16-224"
        )
    classes = {"clip": transformers.CLIPModel, "siglip": transformers.SiglipModel}
    if kind not in classes:
        raise Misconfigured(f"{folder / CONFIG} says model_type {kind!r}; known are {', '.join(classes)}")
    try:
        model, report = classes[kind].from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, weights_only=True, output_loading_info=True
        )
    except BROKEN as error:
        raise Misconfigured(f"{folder} cannot be loaded: {error}") from error
    if report["missing_keys"]:
        raise Misconfigured(f"{folder} lacks weights: {', '.join(sorted(report['missing_keys'])[:3])} …")
    text = model.config.text_config
    if kind == "clip":
        tokenizer, pad_id = auto_tokenizer(folder)
        lowercase = False  # the tokenizer's own normalizer does it
    else:
        tokenizer, pad_id, lowercase = _siglip_tokenizer(folder)
    image = processor_image(folder)
    equal_sizes(folder, image, model.config.vision_config.image_size)
    spec = TextInput(max_tokens=text.max_position_embeddings, prefix="", pad_id=pad_id, lowercase=lowercase)
    return _model(model, image, spec, tokenizer)


def weights(folder: Path, names: Collection[str]) -> list[str]:  # noqa: ARG001  # what other layouts look into
    """Return which of the files hold the weights. Raises Misconfigured."""
    [chosen] = first_of(
        names,
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    )
    stem, _, rest = chosen.removesuffix(".index.json").rpartition(".")
    shards = [name for name in names if name.startswith(f"{stem}-") and name.endswith(f".{rest}")]
    return sorted(shards) if chosen.endswith(".index.json") else [chosen]


def rebuild(kept: Mapping[str, bytes], image: ImageInput, text: TextInput, tokenizer: Tokenizer) -> Model:
    """Return the same modules; their weights are whatever memory held."""
    config = parsed(kept[CONFIG], CONFIG)
    with initialization.no_init_weights():
        if config["model_type"] == "clip":
            model = transformers.CLIPModel(transformers.CLIPConfig(**config))
        else:
            model = transformers.SiglipModel(transformers.SiglipConfig(**config))
    return _model(model, image, text, tokenizer)


def _model(model: Any, image: ImageInput, text: TextInput, tokenizer: Tokenizer) -> Model:
    config = model.config
    if config.model_type == "clip":
        # Before 2023 configurations said 2, and transformers then takes the highest id, which is the end's.
        end = config.text_config.eos_token_id
        end = config.text_config.vocab_size - 1 if end == 2 else end
        dimension = config.projection_dim
        vision: nn.Module = ClipVision(model.vision_model, model.visual_projection)
        text_tower: nn.Module = _ClipText(model.text_model, model.text_projection, end)
    else:
        dimension = config.vision_config.hidden_size
        vision = ClipVision(model.vision_model, nn.Identity())
        text = text.model_copy(update={"fixed": True})
        text_tower = FixedText(_SiglipText(model.text_model), text.max_tokens, text.pad_id)
    return Model(
        family=config.model_type,
        dimension=dimension,
        image=image,
        text=text,
        tokenizer=tokenizer,
        vision=vision,
        text_tower=text_tower,
        files={CONFIG: _portable(config.to_dict())},
    )


def _portable(config: dict[str, Any]) -> bytes:
    """Return the configuration without what only says where it was loaded from."""
    config.pop("_name_or_path", None)
    return json.dumps(config, sort_keys=True).encode()


class ClipVision(nn.Module):
    """pixels → embedding."""

    def __init__(self, tower: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        self.projection = projection

    def forward(self, pixels: Tensor) -> Tensor:
        return self.projection(self.tower(pixel_values=pixels).pooler_output)


class _ClipText(nn.Module):
    """CLIP's text tower: each token sees those before it, and the first end token stands for the text.

    Padding comes after the end, hence no token that counts sees it.
    """

    def __init__(self, tower: nn.Module, projection: nn.Module, end: int) -> None:
        super().__init__()
        self.tower = tower
        self.projection = projection
        self.end = end

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        bias = causal_bias(input_ids, precision(self))[None, None]
        states = self.tower(input_ids=input_ids, attention_mask=bias).last_hidden_state
        return self.projection(at_first(states, input_ids == self.end, attention_mask))


class _SiglipText(nn.Module):
    """SigLIP's text tower without the mask that it would make: every place is seen, padding too."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.embeddings = tower.embeddings
        self.encoder = tower.encoder
        self.final_layer_norm = tower.final_layer_norm
        self.head = tower.head

    def forward(self, ids: Tensor) -> Tensor:
        states = self.encoder(inputs_embeds=self.embeddings(input_ids=ids)).last_hidden_state
        return self.head(self.final_layer_norm(states[:, -1]))


def _siglip_tokenizer(folder: Path) -> tuple[Tokenizer, int, bool]:
    """Return SigLIP's or SigLIP2's tokenizer, the id that it pads with and whether the text is lower-cased first.

    Both were trained on lower case, SigLIP also without punctuation. Its own tokenizer does that in Python, around
    SentencePiece; that of SigLIP2 is Gemma's, and only transformers' newest class for it lower-cases.
    """
    config = document(folder / "tokenizer_config.json")
    name = str(config.get("tokenizer_class", ""))
    if name.removesuffix("Fast") in {"GemmaTokenizer", "Siglip2Tokenizer"}:
        tokenizer, pad_id = auto_tokenizer(folder)
        return tokenizer, pad_id, True
    if name.removesuffix("Fast") not in {"SiglipTokenizer", "T5Tokenizer"}:
        raise Misconfigured(
            f"{folder / 'tokenizer_config.json'} names {name or 'no class'}, which no SigLIP is known for"
        )
    path = folder / TOKENIZER
    if not path.is_file():
        raise Misconfigured(f"{folder} holds no {TOKENIZER}: a SentencePiece model alone cannot be used")
    tokenizer = bare(Tokenizer.from_file(str(path)))
    pad = config.get("pad_token", "</s>")
    number = tokenizer.token_to_id(pad["content"] if isinstance(pad, dict) else pad)
    if number is None:
        raise Misconfigured(f"{path} lacks the padding token {pad}")
    return cleaned(tokenizer, punctuation=False), number, bool(config.get("do_lower_case", True))
