"""Holds a runtime to what the bundle says comes out of its model."""

from __future__ import annotations

from typing import Final

import numpy as np

from catalens.encoders.bundle import GRAPHS, TEXT, VISION, Bundle, ImageInput
from catalens.encoders.towers import Rows, Runtime
from catalens.errors import Misconfigured

# A runtime's rounding, bf16 included, stays well above; a wrong weight falls well below.
_CLOSE: Final = 0.97


def prove(bundle: Bundle, runtime: Runtime, *, towers: str, name: str) -> None:
    """Run each of `towers` once, on this thread, and compare with the bundle's check; raises Misconfigured.

    A bundle without one is taken at its word. `name` is the runtime's, for whoever must report it.
    """
    manifest = bundle.manifest
    ids = np.arange(1, 1 + min(8, manifest.text.max_tokens), dtype=np.int64)[None]
    for graph in GRAPHS[towers]:
        if graph == TEXT:
            [answer] = runtime.run_text(ids, np.ones_like(ids))
        else:
            [answer] = runtime.run_vision(pattern(manifest.image))
        if answer.shape != (manifest.dimension,):
            told = f"{len(answer)} values where bundle.json says {manifest.dimension} values an item"
            raise Misconfigured(f"{bundle.path(graph)} gives {told}")
        if manifest.check is None:
            continue
        expected = np.array(manifest.check.pixels if graph == VISION else manifest.check.input_ids, np.float32)
        cosine = float(answer @ expected / np.linalg.norm(answer))
        if not cosine >= _CLOSE:
            raise Misconfigured(
                f"{bundle.path(graph)} gives wrong vectors on this machine (cosine {cosine:.3f} to the reference): "
                f"report it, with the processor and the version of {name}"
            )


def pattern(image: ImageInput) -> Rows:
    """Return the picture of the bundle's check as pixels [1, 3, size, size]: rgb = (7x + 13y + 29c) mod 256."""
    channel, y, x = np.indices((3, image.size, image.size), np.float32)
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (image.mean, image.std))
    rgb = (7 * x + 13 * y + 29 * channel) % 256
    return np.asarray((rgb * image.rescale - mean) / std, np.float32)[None]
