"""Holds a bundle, in every runtime that is installed, to the same model computed by torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
from numpy.typing import NDArray

from catalens.encoders import load_runtime
from catalens.encoders.bundle import TOKENIZER, WEIGHTS, Closeness, load_bundle, resolve
from catalens.encoders.choice import NAMES, Choice, this_machine
from catalens.encoders.fidelity import closeness
from catalens.encoders.preprocess import Preprocessor
from catalens.encoders.towers import PreparedPicture, Rows, TextTower, VisionTower
from catalens.errors import Misconfigured
from catalens.settings import EncoderSettings, Settings

if TYPE_CHECKING:
    from catalens.encoders.checkpoints import Checkpoint

Precision = Literal["f32", "bf16"]
BOUNDS: Final[dict[Precision, float]] = {"f32": 0.9999, "bf16": 0.99}
"""The cosine below which a vector counts as wrong."""
_AT_ONCE: Final = 8


@dataclass(frozen=True, slots=True)
class Finding:
    """How near one tower in one runtime is to torch."""

    runtime: str
    tower: Literal["image", "text"]
    items: int
    close: Closeness


def verify(
    model: str,
    settings: Settings,
    precision: Precision,
    pictures: Sequence[bytes],
    texts: Sequence[str],
    report: Callable[[str], None],
) -> list[Finding]:
    """Return how near each installed runtime comes to torch in float32 on the same prepared inputs. Blocking.

    Raises Misconfigured: a bundle that torch cannot rebuild, no picture or no text to compare with.
    """
    bundle = load_bundle(resolve(model, settings.data_dir))
    if bundle.manifest.quantization is not None:
        raise Misconfigured(f"{model} is an int8 bundle: its loss was measured when it was made (bundle.json)")
    if WEIGHTS not in bundle.manifest.files:
        raise Misconfigured(
            f"{model} was not made by `catalens model pull`: there is no torch model to compare it with"
        )
    report("the reference: torch")
    checkpoint = _checkpoint(bundle.folder)
    reference = _Torch(checkpoint)
    vision = VisionTower(reference, Preprocessor(bundle.manifest.image), settings.pictures)
    text = TextTower(reference, bundle.path(TOKENIZER), bundle.manifest.text)
    good = [picture for picture in vision.prepare(pictures) if isinstance(picture, PreparedPicture)]
    ids = [item for item in text.prepare(texts) if not isinstance(item, Exception)]
    if not good or not ids:
        raise Misconfigured("there is no picture or no text to compare with")
    parts = [good[at : at + _AT_ONCE] for at in range(0, len(good), _AT_ONCE)]
    expected = np.concatenate([vision.run(part) for part in parts]), np.concatenate([text.run([one]) for one in ids])
    findings = []
    for name in sorted(this_machine().installed - {"torch"}):
        if name == "onnx" and precision == "bf16":
            continue
        report(NAMES[name])
        chosen = EncoderSettings(runtime=name, precision=precision, device="cpu")
        runtime = load_runtime(bundle, chosen, 1, settings.data_dir / "cache", Choice(name, "cpu", "to verify it"))
        vision = VisionTower(runtime, Preprocessor(bundle.manifest.image), settings.pictures)
        text = TextTower(runtime, bundle.path(TOKENIZER), bundle.manifest.text)
        rows = np.concatenate([vision.run(part) for part in parts])
        findings.append(Finding(NAMES[name], "image", len(good), closeness(expected[0], rows)))
        # All in one batch here and one by one above: a text that feels its neighbours is found out.
        findings.append(Finding(NAMES[name], "text", len(ids), closeness(expected[1], text.run(ids))))
    return findings


def _checkpoint(folder: Path) -> Checkpoint:
    try:
        from catalens.encoders.checkpoints import load_checkpoint  # noqa: PLC0415  # imports torch
    except ModuleNotFoundError as error:
        raise Misconfigured(f"`catalens model verify` needs {error.name}: install catalens[torch]") from error
    return load_checkpoint(folder)


class _Torch:
    """The makers' modules as they are, in float32, on as many threads as torch likes."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        import torch  # noqa: PLC0415  # as above

        self._torch = torch
        self._checkpoint = checkpoint

    def run_vision(self, pixels: NDArray[np.float32]) -> Rows:
        """Return [N, dimension] for pixels [N, 3, H, W]."""
        with self._torch.inference_mode():
            return np.asarray(self._checkpoint.vision(self._torch.from_numpy(pixels)).numpy())

    def run_text(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> Rows:
        """Return [N, dimension] for ids and mask [N, T]."""
        given = self._torch.from_numpy(input_ids), self._torch.from_numpy(attention_mask)
        with self._torch.inference_mode():
            return np.asarray(self._checkpoint.text_model(*given).numpy())
