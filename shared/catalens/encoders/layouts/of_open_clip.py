"""Checkpoints of OpenCLIP: CLIP, SigLIP-like towers of timm, and text towers of transformers such as XLM-RoBERTa."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import open_clip
import transformers
from open_clip import factory
from open_clip.hf_model import HFTextEncoder
from open_clip.tokenizer import SimpleTokenizer
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
    first_of,
    padding_bias,
    parsed,
    precision,
)
from catalens.errors import Misconfigured

CONFIG: Final = "open_clip_config.json"
KEPT: tuple[str, ...] = (CONFIG,)
_WEIGHTS: Final = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin",
)


def recognises(names: Collection[str], folder: Path) -> bool:  # noqa: ARG001  # what other layouts look into
    """Tell whether OpenCLIP's configuration is there."""
    return CONFIG in names


def read(folder: Path, image_from: Path | None) -> Model:
    """Return the model with its weights. Raises Misconfigured."""
    if image_from is not None:
        raise Misconfigured(f"{folder} has an image tower of its own: leave --image-from out")
    config = document(folder / CONFIG)
    config["text_config"] = _text_config(folder, config["model_cfg"]["text_cfg"])
    model = _build(config)
    [name] = weights(folder, {path.name for path in folder.glob("*")})
    path = folder / name
    try:
        factory.load_checkpoint(model, str(path), strict=True, weights_only=True)
    except BROKEN as error:
        raise Misconfigured(f"{path} cannot be loaded: {error}") from error
    tokenizer, pad_id, lowercase = _tokenizer(folder, config["model_cfg"]["text_cfg"])
    text_cfg = config["model_cfg"]["text_cfg"]
    length = text_cfg.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
    text = TextInput(max_tokens=length, prefix="", pad_id=pad_id, lowercase=lowercase)
    return _model(model, config, _image(folder, model.visual.preprocess_cfg), text, tokenizer)


def weights(folder: Path, names: Collection[str]) -> list[str]:  # noqa: ARG001  # what other layouts look into
    """Return which of the files hold the weights. Raises Misconfigured."""
    return first_of(names, *_WEIGHTS)


def rebuild(kept: Mapping[str, bytes], image: ImageInput, text: TextInput, tokenizer: Tokenizer) -> Model:
    """Return the same modules; their weights are whatever memory held."""
    config = parsed(kept[CONFIG], CONFIG)
    with initialization.no_init_weights():
        model = _build(config)
    return _model(model, config, image, text, tokenizer)


def _build(config: Mapping[str, Any]) -> Any:
    """Return OpenCLIP's own model, without weights; it wants to read its configuration from a folder."""
    if "multimodal_cfg" in config["model_cfg"]:
        raise Misconfigured("a CoCa model, which also writes captions, is not known")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        model_cfg = json.loads(json.dumps(config["model_cfg"]))
        if config["text_config"] is not None:
            (scratch / "config.json").write_text(json.dumps(config["text_config"]), encoding="utf-8")
            model_cfg["text_cfg"]["hf_model_name"] = name
        changed = {"model_cfg": model_cfg, "preprocess_cfg": config.get("preprocess_cfg", {})}
        (scratch / CONFIG).write_text(json.dumps(changed), encoding="utf-8")
        try:
            return open_clip.create_model(f"local-dir:{name}", load_weights=False, pretrained_text=False).eval()
        except (RuntimeError, ValueError, TypeError, KeyError, AssertionError) as error:
            raise Misconfigured(f"OpenCLIP cannot build what {CONFIG} describes: {error}") from error


def _text_config(folder: Path, text_cfg: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the configuration of the text tower where it is a model of transformers', named in OpenCLIP's."""
    name = text_cfg.get("hf_model_name")
    if not name:
        return None
    beside = folder / name.rpartition("/")[2]
    try:
        config = transformers.AutoConfig.from_pretrained(
            beside if (beside / "config.json").is_file() else name, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise Misconfigured(
            f"{folder} has the text tower {name}, and no hub answers: put the config.json of {name} into {beside}"
        ) from error
    described: dict[str, Any] = config.to_dict()
    described.pop("_name_or_path", None)
    return described


# --- towers -----------------------------------------------------------------------------------------------


def _model(model: Any, config: Mapping[str, Any], image: ImageInput, text: TextInput, tokenizer: Tokenizer) -> Model:
    tower = getattr(model, "text", None)
    own = model if tower is None else tower  # where the parts of the text tower lie
    if isinstance(tower, HFTextEncoder):
        text_tower: nn.Module = _HfText(tower)
    elif _ends_where_it_ends(own):
        text_tower = _CausalText(own)
    elif tower is not None and not tower.use_pad_mask and tower.cls_emb is None:
        text = text.model_copy(update={"fixed": True})
        text_tower = FixedText(tower, text.max_tokens, text.pad_id)
    else:
        raise Misconfigured(f"{CONFIG} describes a text tower that is not known")
    return Model(
        family="siglip" if model.logit_bias is not None else "clip",
        dimension=config["model_cfg"]["embed_dim"],
        image=image,
        text=text,
        tokenizer=tokenizer,
        vision=model.visual,
        text_tower=text_tower,
        files={CONFIG: json.dumps(config, sort_keys=True).encode()},
    )


def _ends_where_it_ends(own: Any) -> bool:
    """Tell whether no token that counts sees the padding after a text's end."""
    pool = getattr(own, "pool_type", getattr(own, "text_pool_type", None))
    return own.attn_mask is not None and getattr(own, "cls_emb", None) is None and pool in {"argmax", "eos"}


class _CausalText(nn.Module):
    """OpenCLIP's own text tower, whose model computes all of the 77 places; here only those that are taken."""

    def __init__(self, own: Any) -> None:
        super().__init__()
        self.token_embedding = own.token_embedding
        self.positional_embedding = own.positional_embedding
        self.transformer = own.transformer
        self.ln_final = own.ln_final
        self.text_projection = own.text_projection
        pool = getattr(own, "pool_type", getattr(own, "text_pool_type", None))
        eos = own.eos_id if hasattr(own, "eos_id") else getattr(own, "text_eos_id", None)
        # "argmax" takes the highest id, which is the end's.
        self.end = eos if pool == "eos" else own.vocab_size - 1

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.token_embedding(input_ids) + self.positional_embedding[: input_ids.shape[1]]
        states = self.ln_final(self.transformer(states, attn_mask=causal_bias(input_ids, states.dtype)))
        pooled = at_first(states, input_ids == self.end, attention_mask)
        if self.text_projection is None:
            return pooled
        return self.text_projection(pooled) if callable(self.text_projection) else pooled @ self.text_projection


class _HfText(nn.Module):
    """A text tower of transformers: the mask decides what is seen."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.transformer = tower.transformer
        self.pooler = tower.pooler
        self.proj = tower.proj
        self.pad_id = tower.config.pad_token_id

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = (attention_mask > 0) & (input_ids != self.pad_id)
        ids = input_ids.masked_fill(~mask, self.pad_id)
        dtype = precision(self)
        read = self.transformer(input_ids=ids, attention_mask=padding_bias(mask, dtype))
        return self.proj(self.pooler(read, mask.to(dtype)))


# --- inputs -----------------------------------------------------------------------------------------------


def _image(folder: Path, settings: Mapping[str, Any]) -> ImageInput:
    """Return OpenCLIP's settings, its defaults filled in by itself."""
    size = settings["size"]
    sides = {size} if isinstance(size, int) else set(size)
    resize = {"shortest": "shortest_edge", "squash": "squash", "longest": "pad"}.get(settings["resize_mode"])
    interpolation = "bicubic" if settings["interpolation"] == "random" else settings["interpolation"]
    if len(sides) != 1 or resize is None or (resize == "pad" and settings["fill_color"] != 0):
        raise Misconfigured(f"{folder / CONFIG} prepares pictures in a way that is not known: {dict(settings)}")
    side = sides.pop()
    return ImageInput(
        size=side,
        resize_to=side,
        resize=resize,
        crop="center_rounded" if resize == "shortest_edge" else "center",
        interpolation=interpolation,
        rescale=1 / 255,
        mean=settings["mean"],
        std=settings["std"],
        decode="fast",
    )


def _tokenizer(folder: Path, text_cfg: Mapping[str, Any]) -> tuple[Tokenizer, int, bool]:
    """Return the tokenizer with OpenCLIP's cleaning before it, the id that it pads with, and whether to lower-case."""
    settings = dict(text_cfg.get("tokenizer_kwargs") or {})
    named = text_cfg.get("hf_tokenizer_name")
    clean = settings.pop("clean", "whitespace" if named else "lower")
    unknown = [*settings, *(["tokenizer_mode"] if text_cfg.get("tokenizer_mode") else [])]
    if unknown or clean not in {"whitespace", "lower", "canonicalize"}:
        raise Misconfigured(f"{folder / CONFIG} has a tokenizer that is not known: {unknown or clean}")
    if named:
        if not (folder / TOKENIZER).is_file():
            raise Misconfigured(f"{folder} holds no tokenizer: put the tokenizer files of {named} there")
        tokenizer, pad_id = auto_tokenizer(folder)
    else:
        tokenizer, pad_id = _clip_tokenizer(), 0
    canonical = clean == "canonicalize"
    return cleaned(tokenizer, punctuation=not canonical, underscores=canonical), pad_id, clean != "whitespace"


def _clip_tokenizer() -> Tokenizer:
    """Return the tokenizer that every CLIP of OpenCLIP's own has; the library carries its words."""
    simple = SimpleTokenizer()
    begin, end = "<start_of_text>", "<end_of_text>"
    made = transformers.CLIPTokenizer(
        vocab=simple.encoder,
        merges=list(simple.bpe_ranks),
        bos_token=begin,
        eos_token=end,
        unk_token=end,
        pad_token=end,
    )
    return bare(made.backend_tokenizer)
