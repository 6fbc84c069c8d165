"""Tags products with labels that the catalogue lists, by nothing but the model: zero-shot, as CLIP classifies."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import numpy as np
import structlog
from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from catalens.domain import AttributeKey, Tag, Tags, Value
from catalens.embedding import CachedEncoder
from catalens.errors import Misconfigured
from catalens.settings import Settings

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from catalens.domain import Embedding

log = structlog.get_logger(__name__)

_MOST_LISTS: Final = 32
_Label = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"\S")]


class LabelList(Value):
    """Labels of which a product has one, or none."""

    model_config = ConfigDict(extra="forbid")

    labels: Annotated[list[_Label], Field(min_length=2, max_length=1000)]
    template: Annotated[str, StringConstraints(max_length=256, pattern=r"\{\}")] = "a photo of a {} product"
    """What the model reads, with the label in place of {}."""
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The share of the best label below which there is no tag."""
    scale: Annotated[float, Field(gt=0, le=10_000)] = 100.0
    """What cosines are multiplied by before the softmax; 100 is CLIP's own logit scale."""


_LISTS: Final = TypeAdapter(Annotated[dict[AttributeKey, LabelList], Field(min_length=1, max_length=_MOST_LISTS)])


def read_lists(path: Path) -> Mapping[str, LabelList]:
    """Return the lists of a file; raises Misconfigured naming what is wrong with it."""
    try:
        return _LISTS.validate_json(path.read_bytes())
    except OSError as error:
        raise Misconfigured(f"CATALENS_TAGS_FILE: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise Misconfigured(f"CATALENS_TAGS_FILE: {path}: {f'{place}: ' if place else ''}{first['msg']}") from error


class Tagger:
    """Compares vectors with the labels' texts, which are embedded once."""

    def __init__(self, lists: Mapping[str, LabelList], encoder: CachedEncoder) -> None:
        self._lists = lists
        self._encoder = encoder
        self._vectors: dict[str, tuple[list[str], NDArray[np.float32]]] | None = None
        self._reading = asyncio.Lock()

    @classmethod
    def of(cls, settings: Settings, encoder: CachedEncoder) -> Tagger | None:
        """Return the tagger that the settings ask for, if they do; raises Misconfigured."""
        if settings.tags_file is None:
            return None
        if settings.encoder.towers == "image":
            raise Misconfigured(
                "CATALENS_TAGS_FILE needs the text tower to read the labels: set CATALENS_ENCODER__TOWERS to both here"
            )
        return cls(read_lists(settings.tags_file), encoder)

    async def read(self) -> None:
        """Embed the labels, unless that is done; errors as Encoder.embed_text."""
        async with self._reading:
            if self._vectors is None:
                self._vectors = {name: await self._embedded(name, one) for name, one in self._lists.items()}

    def tags(self, vector: Embedding | None) -> Tags:
        """Return the best label of each list whose share reaches the list's threshold; `read` was called before.

        None, and a vector of zeros, are told nothing about.
        """
        if self._vectors is None:
            raise RuntimeError("the labels are not read yet")
        if vector is None or not vector.any():
            return {}
        found = {}
        for name, (labels, vectors) in self._vectors.items():
            if not labels:
                continue
            logits = self._lists[name].scale * (vectors @ vector).astype(np.float64)
            shares = np.exp(logits - logits.max())
            best = int(shares.argmax())
            share = float(shares[best] / shares.sum())
            if share >= self._lists[name].threshold:
                found[name] = Tag(labels[best], round(share, 4))
        return found

    async def _embedded(self, name: str, one: LabelList) -> tuple[list[str], NDArray[np.float32]]:
        """Return the labels that the model knows, and their vectors."""
        known = []
        for label in dict.fromkeys(one.labels):
            vector = await self._encoder.text(one.template.replace("{}", label), bulk=True)
            if vector.any():
                known.append((label, vector))
            else:
                log.warning("tags.unknown_label", list=name, label=label)
        labels = [label for label, _ in known]
        return labels, np.array([vector for _, vector in known], np.float32).reshape(len(labels), -1)
