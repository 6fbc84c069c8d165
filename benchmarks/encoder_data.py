"""What the encoder benchmark works on: photographs, short texts, a random ViT-B/32 and its bundles, all made here.

Everything is kept under .cache/bench-encoder and made once; delete the folder to make it again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from benchmarks.report import ROOT
from PIL import Image

import catalens

CACHE: Final = ROOT / ".cache" / "bench-encoder"
CHECKPOINT: Final = ROOT / ".cache" / "checkpoints" / "clip-vit-b32"
BUNDLE: Final = CACHE / "clip-b32"
INT8: Final = CACHE / "clip-b32-int8"
FASTEMBED: Final = CACHE / "fastembed"
FASTER: Final = CACHE / "faster-clip"
PICTURES: Final = {800: 200, 2000: 64}
QUALITY: Final = 85


def pictures(side: int) -> list[bytes]:
    """Return different photographs of `side` × `side` pixels as JPEG, always the same."""
    folder = CACHE / "pictures" / str(side)
    if len(list(folder.glob("*.jpg"))) != PICTURES[side]:
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(PICTURES[side]):
            (folder / f"{number:03}.jpg").write_bytes(_photograph(side, number))
    return [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]


def _photograph(side: int, number: int) -> bytes:
    """Return a square cut from one of the demo's photographs, scaled up, with the grain that scaling up lacks."""
    sources = sorted((ROOT / "demo" / "images").iterdir())
    chance = random.Random(number)
    with Image.open(sources[number % len(sources)]) as opened:
        source = opened.convert("RGB")
    cut = round(min(source.size) * chance.uniform(0.75, 1.0))
    left, top = (chance.randint(0, length - cut) for length in source.size)
    image = source.crop((left, top, left + cut, top + cut)).resize((side, side), Image.Resampling.LANCZOS)
    if number >= len(sources) and chance.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    grain = np.random.default_rng(number).normal(0, 3, (side, side, 1))
    levels = np.clip(np.asarray(image, np.float32) + grain, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def texts() -> list[str]:
    """Return different short texts, English and French, as a shop's customers write them."""
    lines = (ROOT / "demo" / "queries.jsonl").read_text(encoding="utf-8").splitlines()
    things = [query for line in lines for key, query in json.loads(line).items() if key.startswith("query_")]
    colours = ["red", "blue", "black", "white", "green", "small", "large", "new", "cheap", "wooden"]
    return [f"{colour} {thing.lower()}" for colour in colours for thing in dict.fromkeys(things)]


_EXPORT: Final = """
import sys
from pathlib import Path
from catalens.encoders.checkpoints import load_checkpoint
from catalens.encoders.export import export_bundle
export_bundle(load_checkpoint(Path(sys.argv[1])), Path(sys.argv[2]))
"""
_QUANTIZE: Final = """
import sys
from pathlib import Path
from benchmarks.encoder_data import texts
from catalens.encoders.bundle import load_bundle
from catalens.encoders.quantize import Samples, quantize
from catalens.settings import PictureSettings
pictures = sorted(Path(sys.argv[3]).iterdir())
quantize(load_bundle(Path(sys.argv[1])), Path(sys.argv[2]), Samples(pictures, texts()), PictureSettings(), "bf16")
"""


def prepare() -> None:
    """Make what is missing: the pictures, the checkpoint, its bundles, and the folders that peers read."""
    for side in PICTURES:
        pictures(side)
    if not (CHECKPOINT / "special_tokens_map.json").exists():
        print("writing a random ViT-B/32")
        subprocess.run([sys.executable, "-m", "benchmarks.checkpoint", str(CHECKPOINT)], cwd=ROOT, check=True)
    if _made(BUNDLE, _EXPORT, ("checkpoints.py", "export.py"), str(CHECKPOINT), str(BUNDLE)):
        shutil.rmtree(FASTEMBED, ignore_errors=True)
    folder = str(CACHE / "pictures" / "800")
    _made(INT8, _QUANTIZE, ("checkpoints.py", "export.py", "qdq.py", "quantize.py"), str(BUNDLE), str(INT8), folder)
    _fastembed()
    weights = FASTER / "sentence-transformers__clip-ViT-B-32" / "0_CLIPModel" / "model.safetensors"
    if not weights.exists():  # where faster-clip keeps what it downloads
        weights.parent.mkdir(parents=True)
        os.link(CHECKPOINT / "model.safetensors", weights)


def _made(folder: Path, script: str, modules: Sequence[str], *arguments: str) -> bool:
    """Make a bundle that is missing or was made by other code than today's, in a process; return whether it was."""
    encoders = Path(catalens.__file__).parent / "encoders"
    code = b"".join((encoders / module).read_bytes() for module in modules) + script.encode()
    mark = folder.with_name(f"{folder.name}.made-by")
    now = hashlib.sha256(code).hexdigest()
    if mark.exists() and mark.read_text(encoding="utf-8") == now:
        return False
    print(f"making {folder.relative_to(ROOT)}")
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    mark.write_text(now, encoding="utf-8")
    return True


def _fastembed() -> None:
    """Lay the bundle out as fastembed reads it: a folder a tower, with the processor and the tokenizer of the model."""
    manifest: dict[str, Any] = json.loads((BUNDLE / "bundle.json").read_text(encoding="utf-8"))
    for tower in ("vision", "text"):
        folder = FASTEMBED / tower
        if (folder / "model.onnx").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        for path in CHECKPOINT.glob("*.json"):
            (folder / path.name).write_bytes(path.read_bytes())
        # Copies, and beside the graph: onnx and its runtime take no weights from elsewhere, nor links to them.
        for name in manifest["files"]:
            if name.endswith((".safetensors", ".data")):
                shutil.copyfile(BUNDLE / name, folder / name)
        shutil.copyfile(BUNDLE / f"{tower}.onnx", folder / "model.onnx")


if __name__ == "__main__":
    prepare()
