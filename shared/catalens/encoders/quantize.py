"""Makes an int8 bundle of an fp32 one: calibrated with the shop's own pictures, its loss measured on others of them.

Needs the extras `encoder` and `quantize`. Everything here is blocking and takes a minute or two.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from catalens.encoders import load_runtime
from catalens.encoders.bundle import (
    MANIFEST,
    TEXT,
    TOKENIZER,
    VISION,
    Bundle,
    Loss,
    Quantization,
    load_bundle,
)
from catalens.encoders.choice import Choice
from catalens.encoders.fidelity import NEIGHBOURS, closeness, overlap
from catalens.encoders.preprocess import Preprocessor
from catalens.encoders.proof import pattern
from catalens.encoders.qdq import Int8Graph
from catalens.encoders.towers import PreparedPicture, Rows, Runtime, TextTower, VisionTower
from catalens.errors import CatalensError, Misconfigured
from catalens.settings import EncoderSettings, PictureSettings

METHOD: Final = "static QDQ, symmetric int8, weights per channel, activations per tensor, SmoothQuant 0.5"
CALIBRATION: Final = 300
"""Pictures that the ranges are taken from, at most, and as many others that the loss is measured on."""
ENOUGH: Final = 2 * (2 * NEIGHBOURS + 1)
"""Pictures at least: half of them are held out, and among fewer the ten nearest would be most of the others."""
_TEXTS: Final = 8  # at least, half of them held out
_AT_ONCE: Final = 8

Precision = Literal["f32", "bf16"]
Report = Callable[[str], None]
Inputs = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Samples:
    """What a model is calibrated and judged with."""

    pictures: Sequence[Path]
    texts: Sequence[str]


def quantize(
    source: Bundle,
    target: Path,
    samples: Samples,
    limits: PictureSettings,
    precision: Precision,
    *,
    force: bool = False,
    report: Report = lambda _: None,
) -> Quantization:
    """Write the int8 bundle of `source` to `target`, whole or not at all, and return how it was made and what it costs.

    The loss is measured in OpenVINO, what stays float computed in `precision`, against the source in f32. Raises
    Misconfigured: a source that is int8 already, too few pictures or texts, a graph with nothing to quantise.
    """
    if source.manifest.quantization is not None:
        raise Misconfigured(f"{source.manifest.id} is int8 already: name the bundle that it was made from")
    if target.exists() and not force:
        raise Misconfigured(f"{target} is there already: --force makes it again")
    pictures, texts = _halves(samples)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f".{target.name}.*.partial"):  # of a run that was killed
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.", suffix=".partial") as scratch:
            work = _Work(source, Path(scratch), limits, precision, report)
            made = work.make(target.name, pictures, texts)
            if target.exists():
                target.rename(Path(scratch) / "replaced")
            work.folder.rename(target)
    except OSError as error:
        raise CatalensError(f"{target} cannot be written: {error}") from error
    return made


def _halves(samples: Samples) -> tuple[tuple[list[Path], list[Path]], tuple[list[str], list[str]]]:
    """Return pictures and texts, each as those to calibrate with and those held out; the same at every call."""
    if len(samples.pictures) < ENOUGH:
        raise Misconfigured(
            f"{len(samples.pictures)} pictures are too few: half are calibrated with, half are held out to measure the "
            f"loss, and that takes {ENOUGH} at least"
        )
    texts = list(dict.fromkeys(text.strip() for text in samples.texts if text.strip()))
    if len(texts) < _TEXTS:
        raise Misconfigured(f"{len(texts)} different texts are too few: give {_TEXTS} or more, one a line")
    drawn = random.Random(0)  # noqa: S311  # a fair draw that anybody can repeat, not a secret
    mixed = drawn.sample(sorted(samples.pictures), min(len(samples.pictures), 2 * CALIBRATION))
    words = drawn.sample(texts, min(len(texts), 2 * CALIBRATION))
    return (mixed[::2], mixed[1::2]), (words[::2], words[1::2])


class _Work:
    """One run: a folder to make the bundle in, and the towers' input stages."""

    def __init__(
        self, source: Bundle, scratch: Path, limits: PictureSettings, precision: Precision, report: Report
    ) -> None:
        self.folder = scratch / "bundle"
        self._source = source
        self._cache = scratch / "cache"
        self._limits = limits
        self._precision = precision
        self._report = report

    def make(
        self, name: str, pictures: tuple[Sequence[Path], Sequence[Path]], texts: tuple[Sequence[str], Sequence[str]]
    ) -> Quantization:
        """Make the bundle, first without its loss, then measure that and write it in."""
        self.folder.mkdir()
        graphs = {file: Int8Graph(self._source.path(file)) for file in (VISION, TEXT)}
        if not any(graph.sites for graph in graphs.values()):
            raise Misconfigured(f"{self._source.manifest.id} multiplies by no constants: there is nothing to quantise")
        self._report(f"calibrating with {len(pictures[0])} pictures and {len(texts[0])} texts")
        ranges = _Ranges({self._source.path(file): graph.sites for file, graph in graphs.items()})
        [seen], _ = self._rows([ranges], pictures[0], texts[0])
        for file, graph in graphs.items():
            graph.quantize(ranges.largest(self._source.path(file)))
            graph.save(self.folder / file)
        shutil.copyfile(self._source.path(TOKENIZER), self.folder / TOKENIZER)
        fingerprint = self._source.spec("f32").fingerprint
        made = Quantization(method=METHOD, source=fingerprint, calibration=len(seen), loss=None)
        self._write_manifest(name, made, None)
        self._report(f"measuring the loss on {len(pictures[1])} other pictures and {len(texts[1])} other texts")
        reference = self._load(self._source, "f32")
        quantised = self._load(load_bundle(self.folder), "f32")
        check = self._check(quantised)
        if self._precision != "f32":
            quantised = self._load(load_bundle(self.folder), self._precision)
        images, words = self._rows([reference, quantised], pictures[1], texts[1])
        expected, given = images
        loss = Loss(
            pictures=len(given),
            texts=len(words[0]),
            precision=self._precision,
            image=closeness(expected, given),
            text=closeness(words[0], words[1]),
            overlap_at_10=round(overlap(expected, given), 5),
        )
        made = made.model_copy(update={"loss": loss})
        self._write_manifest(name, made, check)
        return made

    def _rows(
        self, runtimes: Sequence[Runtime], files: Sequence[Path], texts: Sequence[str]
    ) -> tuple[list[Rows], list[Rows]]:
        """Return what each runtime makes of the pictures among the files, and of the texts, one by one.

        Raises Misconfigured: too few of the files are pictures, vectors that are not finite.
        """
        manifest = self._source.manifest
        preprocessor = Preprocessor(manifest.image)
        vision = [VisionTower(runtime, preprocessor, self._limits) for runtime in runtimes]
        text = [TextTower(runtime, self._source.path(TOKENIZER), manifest.text) for runtime in runtimes]
        images: list[list[Rows]] = [[] for _ in runtimes]
        for at in range(0, len(files), _AT_ONCE):
            prepared = vision[0].prepare([path.read_bytes() for path in files[at : at + _AT_ONCE]])
            good = [one for one in prepared if isinstance(one, PreparedPicture)]
            for into, tower in zip(images, vision, strict=True):
                into.extend([tower.run(good)] if good else [])
        count = sum(map(len, images[0]))
        if count < ENOUGH // 2:
            raise Misconfigured(f"only {count} of {len(files)} files are pictures that can be read: too few")
        ids = [one for one in text[0].prepare(texts) if not isinstance(one, Exception)]
        words = [[tower.run([one]) for one in ids] for tower in text]
        return [_finite(rows) for rows in images], [_finite(rows) for rows in words]

    def _load(self, bundle: Bundle, precision: Precision) -> Runtime:
        settings = EncoderSettings(precision=precision, runtime="openvino")
        return load_runtime(bundle, settings, 1, self._cache, Choice("openvino", "cpu", "to quantise"))

    def _check(self, quantised: Runtime) -> dict[str, list[float]]:
        """Return what the bundle answers to the fixed inputs of docs/model-bundles.md, normalised."""
        manifest = self._source.manifest
        ids = np.arange(1, 1 + min(8, manifest.text.max_tokens), dtype=np.int64)[None]
        rows = {
            "pixels": quantised.run_vision(pattern(manifest.image)),
            "input_ids": quantised.run_text(ids, np.ones_like(ids)),
        }
        return {key: [round(float(value), 6) for value in row / np.linalg.norm(row)] for key, [row] in rows.items()}

    def _write_manifest(self, name: str, made: Quantization, check: Mapping[str, list[float]] | None) -> None:
        files = {}
        for file in (VISION, TEXT, TOKENIZER):
            data = (self.folder / file).read_bytes()
            files[file] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        manifest = json.loads(self._source.path(MANIFEST).read_bytes())
        manifest.pop("evaluation", None)  # of the source
        manifest |= {"id": name, "precision": "int8", "files": files, "check": check}
        manifest["quantization"] = made.model_dump(mode="json")
        (self.folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


class _Ranges:
    """A runtime that remembers the largest absolute value in each channel of each site, over all that it runs."""

    def __init__(self, graphs: Mapping[Path, Mapping[str, int]]) -> None:
        # Imported after the runtime's own module, which keeps its telemetry out.
        import openvino as ov  # noqa: PLC0415

        self._sites = graphs
        self._found: dict[Path, dict[str, NDArray[np.float32]]] = {path: {} for path in graphs}
        self._requests = {}
        for path, sites in graphs.items():
            try:
                core = ov.Core()
                model = core.read_model(str(path))
                model.add_outputs(list(sites))
                compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            except RuntimeError as error:
                raise Misconfigured(f"OpenVINO cannot run {path}: {error}") from error
            self._requests[path] = compiled.create_infer_request()

    def run_vision(self, pixels: NDArray[np.float32]) -> Rows:
        """Return [N, dimension] for pixels [N, 3, H, W]."""
        return self._run(VISION, pixels=pixels)

    def run_text(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> Rows:
        """Return [N, dimension] for ids and mask [N, T]."""
        return self._run(TEXT, input_ids=input_ids, attention_mask=attention_mask)

    def largest(self, path: Path) -> Mapping[str, NDArray[np.float32]]:
        """Return what was found in the graph `path`; raises Misconfigured where it was not finite."""
        for name, most in self._found[path].items():
            if not np.isfinite(most).all():
                raise Misconfigured(f"{path} gives values that are not finite at {name}: it cannot be quantised")
        return self._found[path]

    def _run(self, graph: str, **inputs: NDArray[Any]) -> Rows:
        [path] = [path for path in self._requests if path.name == graph]
        request, found = self._requests[path], self._found[path]
        request.infer(inputs, share_inputs=True)
        for name, axis in self._sites[path].items():
            values = np.abs(np.moveaxis(request.get_tensor(name).data, axis, -1))
            most = values.reshape(-1, values.shape[-1]).max(axis=0)
            found[name] = np.maximum(found[name], most) if name in found else most
        return np.array(request.get_output_tensor(0).data, np.float32)


def _finite(rows: Sequence[Rows]) -> Rows:
    joined = np.concatenate(rows)
    if not np.isfinite(joined).all():
        raise Misconfigured("the model gives vectors that are not finite: it cannot be quantised")
    return joined
