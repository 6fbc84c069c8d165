"""Writes a CLIP ViT-B/32 with random weights, as a Hugging Face folder: its speed is that of the real one.

Needs the torch extra. What it finds is meaningless; what it costs is not.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

SIZE, VOCABULARY, MAX_TOKENS = 224, 49_408, 77
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def write_checkpoint(folder: Path, texts: list[str]) -> None:
    """Write config, weights, processor and a tokenizer fitted to `texts`; the same weights every time."""
    import torch  # noqa: PLC0415  # gigabytes, and only here
    from transformers import CLIPConfig, CLIPModel  # noqa: PLC0415

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    text = {"bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1, "pad_token_id": VOCABULARY - 1}
    config = CLIPConfig(text_config=text)  # its defaults are ViT-B/32's
    CLIPModel(config).eval().save_pretrained(folder)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": SIZE, "width": SIZE},
        "size": {"shortest_edge": SIZE},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=1), encoding="utf-8")
    _write_tokenizer(folder, texts)


def _write_tokenizer(folder: Path, texts: list[str]) -> None:
    from tokenizers import (  # noqa: PLC0415
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    made = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=END))
    # CLIP's own, without which transformers before 5 refuses the tokenizer.
    space = normalizers.Replace(Regex(r"\s+"), " ")
    made.normalizer = normalizers.Sequence([normalizers.NFC(), space, normalizers.Lowercase()])
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, behavior="removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    document = json.loads(made.to_str())
    begin, end = VOCABULARY - 2, VOCABULARY - 1
    document["model"]["vocab"] |= {BEGIN: begin, END: end}
    document["added_tokens"] = [
        {"id": number, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for number, content in ((begin, BEGIN), (end, END))
    ]  # fmt: skip
    made = Tokenizer.from_str(json.dumps(document))
    made.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}", special_tokens=[(BEGIN, begin), (END, end)]
    )
    made.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": BEGIN,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "model_max_length": MAX_TOKENS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=1), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(described | {"tokenizer_class": None}), encoding="utf-8")


def catalogue_texts() -> list[str]:
    """Return the names and descriptions of the demo catalogue, over and over: what a shop's texts look like."""
    root = Path(__file__).resolve().parent.parent
    return [path.read_text(encoding="utf-8") for path in sorted((root / "demo").rglob("*.jsonl"))] or ["red shoe"]


if __name__ == "__main__":
    write_checkpoint(Path(sys.argv[1]), catalogue_texts())
