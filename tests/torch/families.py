"""Small checkpoints with random weights, one of each kind that `catalens model pull` reads, and their makers' answers.

The answers come from the makers' libraries alone, processor and tokenizer included: nothing of ours is in them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
import transformers
from open_clip import transform
from open_clip.tokenizer import canonicalize_text
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SIZE, DIMENSION, MAX_TOKENS = 56, 48, 16
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
CORPUS = [
    "a red dress with blue stripes", "a wooden chair, hand made", "une chaise en bois d'été", "blue shoe for running",
    "robe rouge à rayures", "ein Kleid mit Streifen", "leather sofa 3-seater", "the quick brown fox",
] * 4  # fmt: skip
TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
NARROW = {**TOWER, "hidden_size": 32, "num_attention_heads": 2}


@dataclass(frozen=True, slots=True)
class Reference:
    """What the maker's library answers, not normalised, one row an item."""

    image: Callable[[Image.Image], torch.Tensor]
    text: Callable[[str], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of checkpoint."""

    write: Callable[[Path], None]
    reference: Callable[[Path], Reference]
    image_from: str | None = None  # the folder beside it with its image tower


# --- tokenizers -------------------------------------------------------------------------------------------


def byte_pairs(folder: Path, specials: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return words and merges as Gemma has them: spaces written as ▁, special tokens first."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=specials, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    model = json.loads(made.to_str())["model"]
    words = dict(model["vocab"])
    for number in range(256):
        words.setdefault(f"<0x{number:02X}>", len(words))
    return words, [(left, right) for left, right in model["merges"]]


def write_clip_tokenizer(folder: Path) -> int:
    """Write a tokenizer as OpenAI's CLIP has it, and return how many words it knows; the last two are begin and end."""
    made = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), end_of_word_suffix="</w>",
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(CORPUS, trainer)
    model = json.loads(made.to_str())["model"]
    words = dict(model["vocab"])
    for word in (*(letter + "</w>" for letter in pre_tokenizers.ByteLevel.alphabet()), BEGIN, END):
        words.setdefault(word, len(words))
    transformers.CLIPTokenizer(
        vocab=words, merges=[(left, right) for left, right in model["merges"]], model_max_length=MAX_TOKENS
    ).save_pretrained(folder)
    return len(words)


def write_gemma_tokenizer(folder: Path) -> int:
    words, merges = byte_pairs(folder, ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])
    transformers.GemmaTokenizer(
        vocab=words, merges=merges, add_bos_token=False, add_eos_token=True, padding_side="right",
        model_max_length=MAX_TOKENS,
    ).save_pretrained(folder)  # fmt: skip
    return len(words)


def pieces(specials: list[str]) -> list[tuple[str, float]]:
    """Return words and their scores as SentencePiece's unigram model has them."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=specials, unk_token="<unk>", show_progress=False)
    made.train_from_iterator([text.lower() for text in CORPUS], trainer)
    return [(word, score) for word, score in json.loads(made.to_str())["model"]["vocab"]]


def write_t5_tokenizer(folder: Path, tokenizer_class: str) -> int:
    """Write a unigram tokenizer with an end and no begin, as SigLIP's is; `</s>` pads."""
    words = pieces(["<pad>", "</s>", "<unk>"])
    made = Tokenizer(models.Unigram(words, unk_id=2, byte_fallback=False))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": tokenizer_class, "pad_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>",
                 "model_max_length": MAX_TOKENS, "extra_ids": 0, "additional_special_tokens": []}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return len(words)


def write_xlm_tokenizer(folder: Path) -> int:
    words = [*pieces(["<s>", "<pad>", "</s>", "<unk>"]), ("<mask>", 0.0)]
    transformers.XLMRobertaTokenizer(vocab=words, model_max_length=64).save_pretrained(folder)
    return len(words)


def write_bert_tokenizer(folder: Path) -> int:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    words = made.get_vocab()
    transformers.BertTokenizer(vocab=words, do_lower_case=False, model_max_length=512).save_pretrained(folder)
    described = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "DistilBertTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return len(words)


# --- transformers -----------------------------------------------------------------------------------------


def clip_writer(patch: int, width: dict[str, int] | None = None, *, old: bool = False) -> Callable[[Path], None]:
    """Return what writes a CLIP; `old` as before 2023, whose configuration names a wrong end and a bare processor."""

    def write(folder: Path) -> None:
        folder.mkdir(parents=True)
        words = write_clip_tokenizer(folder)
        torch.manual_seed(patch)
        config = transformers.CLIPConfig(
            projection_dim=DIMENSION,
            vision_config={**TOWER, **(width or {}), "image_size": SIZE, "patch_size": patch},
            text_config={
                **TOWER, "vocab_size": words, "max_position_embeddings": MAX_TOKENS,
                "bos_token_id": 0 if old else words - 2, "eos_token_id": 2 if old else words - 1, "pad_token_id": 1,
            },
        )  # fmt: skip
        shaken(transformers.CLIPModel(config)).save_pretrained(folder)
        processor = {
            "crop_size": SIZE, "size": SIZE + 8, "resample": 3, "do_center_crop": True, "do_normalize": True,
            "do_resize": True, "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28],
        }  # fmt: skip
        if not old:
            processor |= {
                "crop_size": {"height": SIZE, "width": SIZE}, "size": {"shortest_edge": SIZE + 8},
                "rescale_factor": 1 / 255, "do_rescale": True, "image_processor_type": "CLIPImageProcessor",
            }  # fmt: skip
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))

    return write


def siglip_writer(write_tokenizer: Callable[[Path], int], resample: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        folder.mkdir(parents=True)
        words = write_tokenizer(folder)
        torch.manual_seed(resample)
        config = transformers.SiglipConfig(
            vision_config={**TOWER, "image_size": SIZE, "patch_size": 14},
            text_config={**TOWER, "vocab_size": words, "max_position_embeddings": MAX_TOKENS, "projection_size": 64},
        )
        shaken(transformers.SiglipModel(config)).save_pretrained(folder)
        processor = {
            "image_processor_type": "SiglipImageProcessor", "size": {"height": SIZE, "width": SIZE},
            "resample": resample, "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        }  # fmt: skip
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))

    return write


def shaken(model: Any) -> Any:
    """Return the model with weights that carry differences of the input through: drawn by fan-in, biases too."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                weight.normal_(std=1.0 if "embed" in name else 1.5 / weight[0].numel() ** 0.5)
            elif "norm" not in name.lower() and "ln_" not in name:
                weight.normal_(std=0.1)
    return model.eval()


def clip_reference(folder: Path) -> Reference:
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def image(picture: Image.Image) -> torch.Tensor:
        return model.get_image_features(**processor(picture, return_tensors="pt")).pooler_output[0]

    def text(words: str) -> torch.Tensor:
        given = tokenizer(words, truncation=True, max_length=MAX_TOKENS, padding="max_length", return_tensors="pt")
        return model.get_text_features(given["input_ids"], given["attention_mask"]).pooler_output[0]

    return Reference(image, text)


def siglip_reference(folder: Path, tokenize: Callable[[str], torch.Tensor]) -> Reference:
    model = transformers.SiglipModel.from_pretrained(folder).eval()
    processor = transformers.SiglipImageProcessorPil.from_pretrained(folder)

    def image(picture: Image.Image) -> torch.Tensor:
        return model.get_image_features(**processor(picture, return_tensors="pt")).pooler_output[0]

    def text(words: str) -> torch.Tensor:
        return model.get_text_features(tokenize(words)).pooler_output[0]

    return Reference(image, text)


def siglip1_reference(folder: Path) -> Reference:
    """Return SigLIP's answers; its own tokenizer wants SentencePiece, so OpenCLIP cleans the text here."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding(pad_id=1, pad_token="</s>", length=MAX_TOKENS)

    def tokenize(words: str) -> torch.Tensor:
        # SigLIP's own removes an underscore, OpenCLIP's makes it a space; else they are the same.
        return torch.tensor([tokenizer.encode(canonicalize_text(words.replace("_", ""))).ids])

    return siglip_reference(folder, tokenize)


def siglip2_reference(folder: Path) -> Reference:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def tokenize(words: str) -> torch.Tensor:
        ids: torch.Tensor = tokenizer(
            words.lower(), truncation=True, max_length=MAX_TOKENS, padding="max_length", return_tensors="pt"
        )["input_ids"]
        return ids

    return siglip_reference(folder, tokenize)


# --- OpenCLIP ---------------------------------------------------------------------------------------------


def open_clip_writer(
    model_cfg: dict[str, Any],
    preprocess_cfg: dict[str, Any],
    write_tokenizer: Callable[[Path], int] | None = None,
    *,
    pickled: bool = False,
) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        folder.mkdir(parents=True)
        described = json.loads(json.dumps(model_cfg))
        text = described["text_cfg"]
        if write_tokenizer is not None:
            words = write_tokenizer(folder)
            if "hf_model_name" in text:
                beside = folder / text["hf_model_name"]
                transformers.XLMRobertaConfig(
                    **NARROW, vocab_size=words, max_position_embeddings=66, pad_token_id=1
                ).save_pretrained(beside)
            else:
                text["vocab_size"] = words
        (folder / "open_clip_config.json").write_text(
            json.dumps({"model_cfg": described, "preprocess_cfg": preprocess_cfg})
        )
        torch.manual_seed(5)
        model = shaken(open_clip_model(folder))
        if pickled:
            torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
        else:
            save_file(model.state_dict(), folder / "open_clip_model.safetensors")

    return write


def open_clip_model(folder: Path) -> Any:
    """Return OpenCLIP's model of the folder, whose text tower of transformers' is described beside it."""
    path = folder / "open_clip_config.json"
    before = path.read_text()
    config = json.loads(before)
    text = config["model_cfg"]["text_cfg"]
    if "hf_model_name" in text:
        text["hf_model_name"] = str(folder / text["hf_model_name"])
        path.write_text(json.dumps(config))
    try:
        return open_clip.create_model(f"local-dir:{folder}", pretrained_text=False).eval()
    finally:
        path.write_text(before)


def open_clip_reference(folder: Path) -> Reference:
    model = open_clip_model(folder)
    prepare = transform.image_transform_v2(transform.PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    return Reference(
        lambda picture: model.encode_image(prepare(picture)[None])[0],
        lambda words: model.encode_text(tokenizer(words))[0],
    )


VIT = {"image_size": SIZE, "layers": 2, "width": 64, "head_width": 16, "patch_size": 14}
OWN_TEXT = {"context_length": MAX_TOKENS, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
SIGLIP_TEXT = {
    "context_length": MAX_TOKENS, "hf_tokenizer_name": "somewhere/else", "tokenizer_kwargs": {"clean": "canonicalize"},
    "width": 64, "heads": 4, "layers": 2, "no_causal_mask": True, "proj_bias": True, "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"},
}  # fmt: skip
SIGLIP_VISION = {
    "image_size": 224, "timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False,
    "timm_pool": "map", "timm_proj": "none",
}  # fmt: skip
HALVES = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}


# --- sentence-transformers --------------------------------------------------------------------------------


def write_multilingual(folder: Path) -> None:
    """Write DistilBERT, mean pooling and a projection, as clip-ViT-B-32-multilingual-v1 is; its CLIP lies beside."""
    clip_writer(14)(folder.with_name("clip-for-pictures"))
    folder.mkdir(parents=True)
    words = write_bert_tokenizer(folder)
    torch.manual_seed(11)
    config = transformers.DistilBertConfig(vocab_size=words, dim=32, n_layers=2, n_heads=2, hidden_dim=64)
    shaken(transformers.DistilBertModel(config)).save_pretrained(folder)
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 24, "do_lower_case": False}))
    base = "sentence_transformers.models"
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{base}.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{base}.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Dense", "type": f"{base}.Dense"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "2_Dense").mkdir()
    dense = {"in_features": 32, "out_features": DIMENSION, "bias": False,
             "activation_function": "torch.nn.modules.linear.Identity"}  # fmt: skip
    (folder / "2_Dense" / "config.json").write_text(json.dumps(dense))
    torch.save({"linear.weight": torch.randn(DIMENSION, 32)}, folder / "2_Dense" / "pytorch_model.bin")


def multilingual_reference(folder: Path) -> Reference:
    clip = clip_reference(folder.with_name("clip-for-pictures"))
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    weight = torch.load(folder / "2_Dense" / "pytorch_model.bin", weights_only=True)["linear.weight"]

    def text(words: str) -> torch.Tensor:
        given = tokenizer(words, truncation=True, max_length=24, return_tensors="pt")
        states = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).last_hidden_state
        return states[0].mean(dim=0) @ weight.T

    return Reference(clip.image, text)


FAMILIES = {
    "clip-b32": Family(clip_writer(28), clip_reference),
    "clip-b16-old": Family(clip_writer(14, old=True), clip_reference),
    "clip-l14": Family(clip_writer(14, {"hidden_size": 96, "num_attention_heads": 6}), clip_reference),
    "siglip": Family(siglip_writer(lambda folder: write_t5_tokenizer(folder, "SiglipTokenizer"), 3), siglip1_reference),
    "siglip2": Family(siglip_writer(write_gemma_tokenizer, 2), siglip2_reference),
    "open-clip": Family(
        open_clip_writer({"embed_dim": DIMENSION, "quick_gelu": True, "vision_cfg": VIT, "text_cfg": OWN_TEXT}, {}),
        open_clip_reference,
    ),
    "open-clip-pickled": Family(
        open_clip_writer(
            {"embed_dim": DIMENSION, "vision_cfg": VIT, "text_cfg": OWN_TEXT},
            {"interpolation": "bilinear", "resize_mode": "longest"},
            pickled=True,
        ),
        open_clip_reference,
    ),
    "open-clip-siglip": Family(
        open_clip_writer(
            {"embed_dim": 192, "init_logit_bias": -10, "custom_text": True, "vision_cfg": SIGLIP_VISION,
             "text_cfg": SIGLIP_TEXT},
            HALVES,
            lambda folder: write_t5_tokenizer(folder, "T5TokenizerFast"),
        ),
        open_clip_reference,
    ),
    "open-clip-xlmr": Family(
        open_clip_writer(
            {"embed_dim": DIMENSION, "vision_cfg": VIT,
             "text_cfg": {"hf_model_name": "xlm-tiny", "hf_tokenizer_name": "xlm-tiny", "hf_proj_type": "mlp",
                          "hf_pooler_type": "mean_pooler", "context_length": 24}},
            {},
            write_xlm_tokenizer,
        ),
        open_clip_reference,
    ),
    "multilingual": Family(write_multilingual, multilingual_reference, image_from="clip-for-pictures"),
}  # fmt: skip
