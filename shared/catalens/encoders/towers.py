"""The stages around a model runtime: prepare (bytes or text → tensors) → run → finish (rows → unit vectors)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from catalens.domain import PictureInfo
from catalens.encoders.bundle import TextInput
from catalens.encoders.preprocess import Pixels, Preprocessor
from catalens.errors import InvalidEvent, InvalidPicture, Misconfigured
from catalens.pictures import Picture
from catalens.ports import EncodedImage
from catalens.settings import PictureSettings

if TYPE_CHECKING:
    from catalens.domain import Embedding

Rows = NDArray[np.float32]
# One more inference costs what this many tokens do (ViT-B/32's text tower on one thread: 25 in fp32, 95 in bf16).
_INFERENCE: Final = 64
# No tokenizer makes fewer than one token of this many characters on average: what is beyond is cut off anyway.
_CHARACTERS_PER_TOKEN: Final = 64

Item_contra = TypeVar("Item_contra", contravariant=True)
Prepared = TypeVar("Prepared")
Result_co = TypeVar("Result_co", covariant=True)


class Tower(Protocol[Item_contra, Prepared, Result_co]):
    """One half of a model. All of it is blocking and may run on several threads at once."""

    def prepare(self, items: Sequence[Item_contra]) -> Sequence[Prepared | Exception]:
        """Return what the model takes for each item, or the reason why the item is none."""
        ...

    def run(self, prepared: Sequence[Prepared]) -> Rows:
        """Return the model's raw rows [N, dimension], N ≥ 1. Raises Transient."""
        ...

    def finish(self, prepared: Sequence[Prepared], rows: Rows) -> Sequence[Result_co | Exception]:
        """Return the results, or the reason why there is none."""
        ...


class Runtime(Protocol):
    """What executes a bundle's graphs."""

    def run_vision(self, pixels: NDArray[np.float32]) -> Rows:
        """Return [N, dimension] for pixels [N, 3, H, W]. Raises Transient."""
        ...

    def run_text(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> Rows:
        """Return [N, dimension] for ids and mask [N, T]. Raises Transient."""
        ...


@dataclass(frozen=True, slots=True)
class PreparedPicture:
    """A decoded and normalised picture: row `row` of `batch`, which it shares with its neighbours."""

    batch: Pixels
    row: int
    info: PictureInfo


class VisionTower:
    """Encoded pictures → vectors."""

    def __init__(self, runtime: Runtime, preprocessor: Preprocessor, limits: PictureSettings) -> None:
        self._runtime = runtime
        self._preprocessor = preprocessor
        self._limits = limits

    def prepare(self, items: Sequence[bytes]) -> Sequence[PreparedPicture | Exception]:
        """Decode, check, resize and normalise; InvalidPicture in the place of what is no picture."""
        batch = np.empty((len(items), *self._preprocessor.shape), np.float32)
        prepared: list[PreparedPicture | Exception] = []
        row = 0
        for item in items:
            try:
                picture = Picture(item, self._limits)
                self._preprocessor.read(picture, batch[row])
            except InvalidPicture as error:
                prepared.append(error)
            else:
                prepared.append(PreparedPicture(batch, row, picture.info))
                row += 1
        return prepared

    def run(self, prepared: Sequence[PreparedPicture]) -> Rows:
        """Return the vision graph's rows."""
        batch = prepared[0].batch
        if all(picture.batch is batch and picture.row == row for row, picture in enumerate(prepared)):
            return self._runtime.run_vision(batch[: len(prepared)])  # what one `prepare` gave lies together already
        return self._runtime.run_vision(np.stack([picture.batch[picture.row] for picture in prepared]))

    def finish(self, prepared: Sequence[PreparedPicture], rows: Rows) -> Sequence[EncodedImage | Exception]:
        """Normalise; a picture whose vector is not finite gets InvalidPicture (not_encodable)."""
        return [
            InvalidPicture("not_encodable", "the model gives no finite vector for this picture")
            if vector is None
            else EncodedImage(vector, picture.info)
            for picture, vector in zip(prepared, unit_vectors(rows), strict=True)
        ]


class TextTower:
    """Texts → vectors."""

    def __init__(self, runtime: Runtime, tokenizer: Path, spec: TextInput) -> None:
        self._runtime = runtime
        self._spec = spec
        try:
            self._tokenizer = Tokenizer.from_file(str(tokenizer))
            self._tokenizer.no_padding()
            self._tokenizer.enable_truncation(spec.max_tokens)
        except Exception as error:  # the boundary: the library raises bare Exception for every kind of broken file
            raise Misconfigured(f"{tokenizer} is no tokenizer that can be read: {error}") from error

    def prepare(self, items: Sequence[str]) -> Sequence[list[int] | Exception]:
        """Return the token ids of each text, at least one."""
        # One by one: the library's batches are no faster, and bring threads of their own that would fight the lanes.
        return [self._tokenizer.encode(self._clean(item)).ids or [self._spec.pad_id] for item in items]

    def _clean(self, text: str) -> str:
        text = text[: self._spec.max_tokens * _CHARACTERS_PER_TOKEN]
        text = text.encode("utf-8", "replace").decode()  # half a surrogate pair is legal JSON but no text
        return self._spec.prefix + (text.lower() if self._spec.lowercase else text)

    def run(self, prepared: Sequence[list[int]]) -> Rows:
        """Return the text graph's rows; padded to texts of about the same length only, which changes no vector."""
        parts = [range(len(prepared))] if self._spec.fixed else alike([len(ids) for ids in prepared])
        if len(parts) == 1:
            return self._rows(prepared)
        rows = [self._rows([prepared[place] for place in part]) for part in parts]
        merged = np.empty((len(prepared), rows[0].shape[1]), np.float32)
        for part, found in zip(parts, rows, strict=True):
            merged[part] = found
        return merged

    def _rows(self, prepared: Sequence[list[int]]) -> Rows:
        longest = max(len(ids) for ids in prepared)
        input_ids = np.full((len(prepared), longest), self._spec.pad_id, np.int64)
        attention_mask = np.zeros_like(input_ids)
        for row, ids in enumerate(prepared):
            input_ids[row, : len(ids)] = ids
            attention_mask[row, : len(ids)] = 1
        return self._runtime.run_text(input_ids, attention_mask)

    def finish(self, prepared: Sequence[list[int]], rows: Rows) -> Sequence[Embedding | Exception]:
        """Normalise; a text whose vector is not finite gets InvalidEvent."""
        return [
            InvalidEvent("the model gives no finite vector for this text") if vector is None else vector
            for _, vector in zip(prepared, unit_vectors(rows), strict=True)
        ]


def alike(lengths: Sequence[int]) -> list[list[int]]:
    """Return the places of `lengths` in the groups that cost least when each is padded to its longest."""
    places: dict[int, list[int]] = {}
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        places.setdefault(lengths[place], []).append(place)
    steps = list(places.items())
    # For the shortest so many steps: the least cost, and where the last group then begins.
    best: list[tuple[int, int]] = [(0, 0)]
    for end, (length, _) in enumerate(steps, 1):
        costs, texts = [], 0
        for start in range(end - 1, -1, -1):
            texts += len(steps[start][1])
            costs.append((best[start][0] + texts * length + _INFERENCE, start))
        best.append(min(costs))
    groups: list[list[int]] = []
    end = len(steps)
    while end:
        start = best[end][1]
        groups.append([place for _, same in steps[start:end] for place in same])
        end = start
    return groups


def unit_vectors(rows: Rows) -> list[Embedding | None]:
    """Return each row L2-normalised, None where it is not finite.

    A row of zeros stays as it is: it is as near to everything as to nothing, which is what the model said.
    """
    # In float64, because the squares of large float32 values overflow.
    norms = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):  # infinite by infinite: seen below
        units = (rows / np.where(norms > 0, norms, 1.0)).astype(np.float32)
    return [unit if np.isfinite(unit).all() else None for unit in units]
