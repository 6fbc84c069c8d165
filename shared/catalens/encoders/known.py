"""Models that have a short name here: where they come from, what they may be used for and when to choose them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

_MANY: Final = ("many",)
_ENGLISH: Final = ("en",)


@dataclass(frozen=True, slots=True)
class Known:
    """One model; `image_from` is the hub's name of the CLIP whose pictures a text tower alone belongs to."""

    name: str
    hub: str
    family: str
    dimension: int
    licence: str
    languages: tuple[str, ...]
    choose: str
    image_from: str | None = None


KNOWN: Final[Mapping[str, Known]] = {
    model.name: model
    for model in (
        Known("clip-b32", "openai/clip-vit-base-patch32", "clip", 512, "MIT", _ENGLISH,
              "small, fast, known everywhere; English"),
        Known("clip-b16", "openai/clip-vit-base-patch16", "clip", 512, "MIT", _ENGLISH,
              "finer detail than clip-b32 for four times the work a picture; English"),
        Known("clip-l14", "openai/clip-vit-large-patch14", "clip", 768, "MIT", _ENGLISH,
              "OpenAI's large one, eighteen times the work of clip-b32 a picture; English"),
        Known("clip-laion-b32", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "clip", 512, "MIT", _ENGLISH,
              "clip-b32's speed, better vectors"),
        Known("clip-xlmr-b32", "laion/CLIP-ViT-B-32-xlm-roberta-base-laion5B-s13B-b90k", "clip", 512, "MIT", _MANY,
              "clip-b32's speed for pictures, a hundred languages; French better than English models by far"),
        Known("clip-multilingual-b32", "sentence-transformers/clip-ViT-B-32-multilingual-v1", "clip", 512,
              "Apache-2.0 AND MIT", _MANY, "pictures exactly as clip-b32, texts in fifty languages",
              image_from="openai/clip-vit-base-patch32"),
        Known("siglip2-b32", "google/siglip2-base-patch32-256", "siglip", 768, "Apache-2.0", _MANY,
              "many languages at nearly the speed of clip-b32"),
        Known("siglip2-base", "google/siglip2-base-patch16-224", "siglip", 768, "Apache-2.0", _MANY,
              "the best for its size in many languages"),
        Known("siglip2-so400m", "google/siglip2-so400m-patch14-224", "siglip", 1152, "Apache-2.0", _MANY,
              "the best there is here; for a GPU"),
        Known("fashion-siglip", "Marqo/marqo-fashionSigLIP", "siglip", 768, "Apache-2.0", _ENGLISH,
              "clothes and shoes, English"),
        Known("ecommerce-b", "Marqo/marqo-ecommerce-embeddings-B", "siglip", 768, "Apache-2.0", _ENGLISH,
              "a marketplace of everything, English"),
        Known("ecommerce-l", "Marqo/marqo-ecommerce-embeddings-L", "siglip", 1024, "Apache-2.0", _ENGLISH,
              "as ecommerce-b, larger; for a GPU"),
    )
}  # fmt: skip

_OPEN: Final = re.compile(r"apache-2\.0|mit|bsd(-[23]-clause)?|cc0-1\.0|cc-by-4\.0|isc|unlicense", re.IGNORECASE)
_CLOSED: Final = re.compile(r"\bnc\b|non-?commercial|amlr|research", re.IGNORECASE)


def caution(licence: str) -> str | None:
    """Return what there is to say about a licence before the model is used; None where it lets everybody."""
    if all(_OPEN.fullmatch(part.strip()) for part in licence.split(" AND ")):
        return None
    if _CLOSED.search(licence):
        return f"its licence ({licence}) does not allow commercial use"
    return f"its licence ({licence or 'its files name none'}) is not one of the open ones known here: read it first"
