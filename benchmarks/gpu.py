"""A random CLIP ViT-B/32 on this machine's GPU, through Catalens and beside what else one would use, from JPEG bytes.

Needs the torch extra, sentence-transformers for its rows and a GPU; `--rehearse` runs a few items on the CPU instead,
which shows whether the script works and nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import io
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
from benchmarks import checkpoint, encoder_data, report
from numpy.typing import NDArray
from PIL import Image

from catalens.encoders import cores, load_runtime, open_encoder
from catalens.encoders.bundle import Bundle, load_bundle
from catalens.encoders.fidelity import closeness, overlap
from catalens.encoders.preprocess import Preprocessor
from catalens.encoders.towers import Runtime, VisionTower
from catalens.errors import CatalensError
from catalens.ports import Encoder
from catalens.settings import EncoderSettings, PictureSettings, Settings
from catalens.telemetry import Metrics

CACHE: Final = report.ROOT / ".cache" / "gpu"
GFLOP: Final = 8.82  # of the image tower, a picture
SIDE: Final = 800
SECONDS: Final = 2.0

Rows = NDArray[np.float32]


class Bench:
    """Measures one thing after the other and collects the rows; what fails is a row too."""

    def __init__(self, *, rehearse: bool) -> None:
        self.rehearse = rehearse
        self.device = "cpu" if rehearse else "cuda"
        self.rows: list[dict[str, Any]] = []
        photographs = encoder_data.pictures(SIDE)
        self.pictures = photographs[:20] if rehearse else photographs
        self.texts = encoder_data.texts()
        self.bundle = _bundle()

    def row(self, what: str, who: str, **figures: object) -> None:
        """Keep a row, and print it at once: the machine may go."""
        self.rows.append({"measured": what, "contender": who, **figures})
        print("·", what, "·", who, "·", figures, flush=True)

    @contextmanager
    def part(self, what: str, who: str) -> Iterator[None]:
        """Note what fails instead of ending: the other figures were paid for."""
        try:
            yield
        except (CatalensError, ImportError, RuntimeError, ValueError, TypeError, AttributeError, OSError) as error:
            self.row(what, who, failed=f"{type(error).__name__}: {error}"[:300])

    def rate(self, work: Callable[[], int]) -> float:
        """Return items a second of `work`, which returns how many it did; repeated for a few seconds, warm."""
        work()
        done, begin = 0, time.perf_counter()
        while not done or (not self.rehearse and time.perf_counter() - begin < SECONDS):
            done += work()
        return done / (time.perf_counter() - begin)

    def latency(self, work: Callable[[int], object]) -> dict[str, float]:
        """Return p50 and p99 of single calls in milliseconds; each item is another one."""
        count = 5 if self.rehearse else 400
        for number in range(count // 4):
            work(number)
        took = []
        for number in range(count):
            begin = time.perf_counter()
            work(number)
            took.append((time.perf_counter() - begin) * 1000)
        return {"p50_ms": round(statistics.median(took), 2), "p99_ms": round(report.percentile(took, 0.99), 2)}

    def settings(self, **encoder: Any) -> Settings:
        """Return the settings of one run."""
        chosen = EncoderSettings(**{"runtime": "torch", "device": self.device, **encoder})
        return Settings(_env_file=None, data_dir=CACHE, model=str(self.bundle.folder), encoder=chosen)


def _bundle() -> Bundle:
    """Return the random model as a bundle, made by our own export."""
    from catalens.encoders.checkpoints import load_checkpoint  # noqa: PLC0415  # torch, and only here
    from catalens.encoders.export import export_bundle  # noqa: PLC0415

    folder = CACHE / "clip-vit-b32"
    if not (encoder_data.CHECKPOINT / "special_tokens_map.json").exists():
        checkpoint.write_checkpoint(encoder_data.CHECKPOINT, checkpoint.catalogue_texts())
    if not (folder / "bundle.json").exists():
        export_bundle(load_checkpoint(encoder_data.CHECKPOINT), folder, lambda step: print("export:", step))
    return load_bundle(folder)


# --- what the machine allows ----------------------------------------------------------------------------------


def limits(bench: Bench) -> None:
    """Decode alone, the GPU alone, and its plain matrix product."""
    manifest = bench.bundle.manifest
    runtime = load_runtime(bench.bundle, bench.settings(precision="bf16", max_batch=256).encoder, 1, CACHE)
    for decode in ("fast", "fine"):
        image = manifest.image.model_copy(update={"decode": decode})
        tower = VisionTower(runtime, Preprocessor(image), PictureSettings())
        for threads in (1, cores()):
            with ThreadPoolExecutor(threads) as pool:
                parts = [bench.pictures[at::threads] for at in range(threads)]
                speed = bench.rate(functools.partial(_decode, pool, tower, parts))
            told = f"{threads} threads, decode {decode}"
            bench.row(f"decode and preprocess alone, {SIDE} px JPEG", "Catalens", setting=told, per_s=speed)
    rng = np.random.default_rng(0)
    for batch in (1, 4) if bench.rehearse else (1, 4, 16, 64, 256):
        pixels = rng.normal(size=(batch, 3, manifest.image.size, manifest.image.size)).astype(np.float32)
        for threads in (1, 4):
            with ThreadPoolExecutor(threads) as pool:
                speed = bench.rate(
                    functools.partial(_infer, pool, runtime, [pixels] * threads * (1 if bench.rehearse else 8))
                )
            told = f"batch {batch}, {threads} threads"
            bench.row("image tower from ready pixels, copies included", "Catalens torch bf16", setting=told,
                      per_s=speed, tflop_s=round(speed * GFLOP / 1000, 2))  # fmt: skip
    bench.row("matrix product bf16, 12,800 × 768 × 3072", "torch", tflop_s=round(_matrix_product(bench), 1))


def _decode(pool: ThreadPoolExecutor, tower: VisionTower, parts: Sequence[Sequence[bytes]]) -> int:
    return sum(len(prepared) for prepared in pool.map(tower.prepare, parts))


def _infer(pool: ThreadPoolExecutor, runtime: Runtime, batches: Sequence[Rows]) -> int:
    return sum(len(rows) for rows in pool.map(runtime.run_vision, batches))


def _matrix_product(bench: Bench) -> float:
    """Return TFLOP/s of the product that the tower's largest layer is, at batch 256."""
    import torch  # noqa: PLC0415

    shape = (64, 768, 3072) if bench.rehearse else (256 * 50, 768, 3072)
    one, other = (torch.randn(size, dtype=torch.bfloat16, device=bench.device) for size in (shape[:2], shape[1:]))

    def work() -> int:
        for _ in range(50):
            torch.mm(one, other)
        if not bench.rehearse:
            torch.cuda.synchronize()
        return 50

    return bench.rate(work) * 2 * shape[0] * shape[1] * shape[2] / 1e12


# --- Catalens -------------------------------------------------------------------------------------------------


def ours(bench: Bench) -> None:
    """The Encoder port as the services use it: decoding bounds it, so how many lanes there are is what matters."""
    who = "Catalens torch bf16"
    for lanes, batch in [(cores(), 16)] if bench.rehearse else [(4, 64), (8, 64), (16, 16)]:
        with bench.part("bulk", who):
            chosen = bench.settings(precision="bf16", lanes=lanes, max_batch=batch)
            begin = time.perf_counter()
            asyncio.run(_through(chosen, functools.partial(_bulk, bench, lanes, batch, begin)))
    for workers, lanes in [(2, 1)] if bench.rehearse else [(4, 4), (8, 2)]:
        with bench.part("bulk, several workers", who):
            _workers(bench, workers, lanes)
    with bench.part("one text", "Catalens torch bf16"):
        asyncio.run(_through(bench.settings(precision="bf16"), functools.partial(_single, bench)))


async def _through(settings: Settings, work: Callable[[Encoder], Coroutine[Any, Any, None]]) -> None:
    async with open_encoder(settings, Metrics()) as encoder:
        await work(encoder)


async def _bulk(bench: Bench, lanes: int, batch: int, begin: float, encoder: Encoder) -> None:
    who, told = "Catalens torch bf16", f"{lanes} lanes, batch {batch}"
    bench.row("start: from nothing to ready, torch imported", who, setting=told, seconds=time.perf_counter() - begin)
    count = 20 if bench.rehearse else 3000
    for _ in range(2):  # the first warms up
        begin = time.perf_counter()
        some = (bench.pictures[n % len(bench.pictures)] for n in range(count))
        await asyncio.gather(*(encoder.embed_image(data, bulk=True) for data in some))
        speed = count / (time.perf_counter() - begin)
    bench.row("pictures/s from 800 px JPEG bytes, bulk", who, setting=told, per_s=speed)
    count *= 1 if bench.rehearse else 4
    for _ in range(2):
        begin = time.perf_counter()
        await asyncio.gather(*(encoder.embed_text(f"{bench.texts[n % 97]} {n}", bulk=True) for n in range(count)))
        speed = count / (time.perf_counter() - begin)
    bench.row("texts/s, bulk", who, setting=told, per_s=speed)


def _workers(bench: Bench, workers: int, lanes: int) -> None:
    """Measure several processes that share the GPU, as several embedders do."""
    context = multiprocessing.get_context("spawn")
    settings = bench.settings(precision="bf16", lanes=lanes, max_batch=64, towers="image")
    count = 10 if bench.rehearse else 2000
    with context.Manager() as manager, ProcessPoolExecutor(workers, mp_context=context) as pool:
        together = manager.Barrier(workers)
        jobs = [pool.submit(_worker, settings.model_dump(), count, together) for _ in range(workers)]
        spans = [job.result() for job in jobs]
    seconds = max(end for _, end in spans) - min(begin for begin, _ in spans)
    bench.row("pictures/s from 800 px JPEG bytes, bulk", "Catalens torch bf16",
              setting=f"{workers} processes of {lanes} lanes, batch 64", per_s=workers * count / seconds)  # fmt: skip


def _worker(chosen: dict[str, Any], count: int, together: Any) -> tuple[float, float]:
    """Embed `count` pictures in this process when all are ready; returns when it began and ended."""
    pictures = encoder_data.pictures(SIDE)
    spans: list[tuple[float, float]] = []

    async def work(encoder: Encoder) -> None:
        for number in (count // 4, count):  # the first warms up
            await asyncio.to_thread(together.wait)
            begin = time.time()
            some = (pictures[n % len(pictures)] for n in range(number))
            await asyncio.gather(*(encoder.embed_image(data, bulk=True) for data in some))
            spans.append((begin, time.time()))

    asyncio.run(_through(Settings(_env_file=None, **chosen), work))
    return spans[-1]


async def _single(bench: Bench, encoder: Encoder) -> None:
    count = 5 if bench.rehearse else 400
    for what, ask in (
        ("one text", lambda n: encoder.embed_text(bench.texts[n % len(bench.texts)])),
        (f"one picture from {SIDE} px JPEG bytes", lambda n: encoder.embed_image(bench.pictures[n % 20])),
    ):
        took = []
        for number in range(count + count // 4):
            begin = time.perf_counter()
            await ask(number)
            took.append((time.perf_counter() - begin) * 1000)
        warm = took[count // 4 :]
        figures = {"p50_ms": statistics.median(warm), "p99_ms": report.percentile(warm, 0.99)}
        bench.row(what, "Catalens torch bf16", **{name: round(value, 2) for name, value in figures.items()})


def equality(bench: Bench) -> None:
    """How near the GPU's vectors are to those of the CPU in f32, which is the reference."""
    found: dict[str, tuple[Rows, Rows]] = {}
    for device, precision in (("cpu", "f32"), (bench.device, "f32"), (bench.device, "bf16"), ("cpu", "bf16")):
        chosen = bench.settings(precision=precision, device=device)
        with bench.part("closeness to CPU f32", f"torch {device} {precision}"):
            asyncio.run(_through(chosen, functools.partial(_vectors, bench, found, f"torch {device} {precision}")))
    if "torch cpu f32" not in found:
        return
    images, texts = found["torch cpu f32"]
    for who, (others, words) in found.items():
        for what, reference, rows in (("pictures", images, others), ("texts", texts, words)):
            near = closeness(reference, rows)
            bench.row(f"closeness to CPU f32, {len(rows)} {what}", who, cosine_min=near.cosine_min,
                      centred_mean=near.centred_mean, centred_min=near.centred_min,
                      overlap_at_10=round(overlap(reference, rows), 4),
                      largest_difference=f"{np.abs(reference - rows).max():.1e}")  # fmt: skip


async def _vectors(bench: Bench, found: dict[str, tuple[Rows, Rows]], who: str, encoder: Encoder) -> None:
    images = await asyncio.gather(*(encoder.embed_image(data, bulk=True) for data in bench.pictures))
    texts = await asyncio.gather(*(encoder.embed_text(text, bulk=True) for text in bench.texts[:200]))
    found[who] = np.stack([image.embedding for image in images]), np.stack(texts)


# --- what else one would use ----------------------------------------------------------------------------------


class _Transformers:
    """CLIPModel in bf16, as its documentation shows it, with torch's own ways of feeding a GPU."""

    def __init__(self, bench: Bench) -> None:
        import torch  # noqa: PLC0415
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel  # noqa: PLC0415

        self.torch, self.device = torch, bench.device
        folder = encoder_data.CHECKPOINT
        clip: Any = CLIPModel.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
        self.clip = clip.to(bench.device).eval()
        self.processor = CLIPImageProcessor.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def opened(self, picture: bytes) -> Any:
        """Decode by torchvision on the CPU: uint8 [3, H, W]."""
        from torchvision.io import ImageReadMode, decode_jpeg  # noqa: PLC0415

        return decode_jpeg(self.torch.frombuffer(bytearray(picture), dtype=self.torch.uint8), ImageReadMode.RGB)

    def opened_on_gpu(self, pictures: Sequence[bytes]) -> list[Any]:
        """Decode by nvJPEG."""
        from torchvision.io import ImageReadMode, decode_jpeg  # noqa: PLC0415

        raw = [self.torch.frombuffer(bytearray(picture), dtype=self.torch.uint8) for picture in pictures]
        decoded: list[Any] = decode_jpeg(raw, ImageReadMode.RGB, device="cuda")
        return decoded

    def see(self, opened: Sequence[Any]) -> Rows:
        """Preprocess on the model's device, and embed."""
        with self.torch.inference_mode():
            pixels = self.processor(list(opened), return_tensors="pt", device=self.device)["pixel_values"]
            return self._unit(self.clip.get_image_features(pixel_values=pixels.to(self.device, self.torch.bfloat16)))

    def read(self, texts: Sequence[str]) -> Rows:
        """Tokenise and embed."""
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(self.device)
        with self.torch.inference_mode():
            return self._unit(self.clip.get_text_features(**tokens))

    def _unit(self, rows: Any) -> Rows:
        rows = getattr(rows, "pooler_output", rows)  # transformers 5 wraps it
        return np.asarray(self.torch.nn.functional.normalize(rows.float(), dim=-1).cpu().numpy())


def transformers(bench: Bench) -> None:
    """Its own pipeline, decoded by threads beside it, and by nvJPEG on the GPU."""
    who, what = "transformers bf16", "pictures/s from 800 px JPEG bytes, bulk"
    with bench.part(what, who):
        model = _Transformers(bench)
        for batch in (16,) if bench.rehearse else (64, 256):
            parts = [bench.pictures[at : at + batch] for at in range(0, len(bench.pictures), batch)]
            with bench.part(what, who), ThreadPoolExecutor(cores()) as pool:
                speed = bench.rate(functools.partial(_ahead, pool, model, parts))
                bench.row(what, who, setting=f"{cores()} threads decode ahead, processor on the GPU, batch {batch}",
                          per_s=speed)  # fmt: skip
            if not bench.rehearse:
                with bench.part(what, f"{who}, nvJPEG"):
                    speed = bench.rate(functools.partial(_on_gpu, model, parts))
                    told = f"decoded by nvJPEG and processed on the GPU, batch {batch}"
                    bench.row(what, f"{who}, nvJPEG", setting=told, per_s=speed)
        texts = bench.texts[:20] if bench.rehearse else bench.texts * 5
        for size in (64, 256):
            parts_of_text = [texts[at : at + size] for at in range(0, len(texts), size)]
            speed = bench.rate(lambda parts=parts_of_text: sum(len(model.read(part)) for part in parts))  # type: ignore[misc]
            bench.row("texts/s, bulk", who, setting=f"batch {size}", per_s=speed)
        bench.row("one text", who, **bench.latency(lambda n: model.read([bench.texts[n % len(bench.texts)]])))
        one = bench.latency(lambda n: model.see([model.opened(bench.pictures[n % 20])]))
        bench.row(f"one picture from {SIDE} px JPEG bytes", who, **one)


def _ahead(pool: ThreadPoolExecutor, model: _Transformers, parts: Sequence[Sequence[bytes]]) -> int:
    """Embed batch after batch while the threads decode those that follow."""
    coming = [[pool.submit(model.opened, picture) for picture in part] for part in parts]
    return sum(len(model.see([one.result() for one in part])) for part in coming)


def _on_gpu(model: _Transformers, parts: Sequence[Sequence[bytes]]) -> int:
    return sum(len(model.see(model.opened_on_gpu(part))) for part in parts)


def sentence_transformers(bench: Bench) -> None:
    """Given opened pictures, as its documentation shows; decoded by threads, which is more than it does itself."""
    who, what = "sentence-transformers bf16", "pictures/s from 800 px JPEG bytes, bulk"
    with bench.part(what, who):
        import torch  # noqa: PLC0415
        from sentence_transformers import SentenceTransformer  # noqa: PLC0415

        options = {"dtype": torch.bfloat16, "attn_implementation": "sdpa"}
        model = SentenceTransformer(str(encoder_data.CHECKPOINT), device=bench.device, model_kwargs=options)
        encode = functools.partial(model.encode, show_progress_bar=False, normalize_embeddings=True)

        def opened(picture: bytes) -> Image.Image:
            return Image.open(io.BytesIO(picture)).convert("RGB")

        def bulk(pool: ThreadPoolExecutor) -> int:
            return len(encode(list(pool.map(opened, bench.pictures)), batch_size=64))

        with ThreadPoolExecutor(cores()) as pool:
            speed = bench.rate(functools.partial(bulk, pool))
        bench.row(what, who, setting=f"{cores()} threads decode, batch 64", per_s=speed)
        texts = bench.texts[:20] if bench.rehearse else bench.texts * 5
        speed = bench.rate(lambda: len(encode(texts, batch_size=256)))
        bench.row("texts/s, bulk", who, setting="batch 256", per_s=speed)
        bench.row("one text", who, **bench.latency(lambda n: encode(bench.texts[n % len(bench.texts)])))
        one = bench.latency(lambda n: encode([opened(bench.pictures[n % 20])]))
        bench.row(f"one picture from {SIDE} px JPEG bytes", who, **one)


# --- all of it ------------------------------------------------------------------------------------------------


def main() -> None:
    """Print the table and write benchmarks/results/gpu.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="a few items on the CPU: does the script work?")
    rehearse: bool = parser.parse_args().rehearse
    bench = Bench(rehearse=rehearse)
    for measure in (limits, ours, equality, transformers, sentence_transformers):
        begin = time.perf_counter()
        measure(bench)
        print(f"— {measure.__name__}: {time.perf_counter() - begin:.0f} s", flush=True)
    if not rehearse:
        report.publish("gpu", bench.rows)
        _tell_gpu(report.ROOT / "benchmarks" / "results" / "gpu.json")


def _tell_gpu(path: Path) -> None:
    """Add to the results what they were taken on; COMMIT says what was measured where there is no repository."""
    import torch  # noqa: PLC0415
    import transformers as hf  # noqa: PLC0415

    document = json.loads(path.read_text(encoding="utf-8"))
    document["machine"] |= {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": hf.__version__,
    }
    document["commit"] = os.environ.get("COMMIT") or document["commit"]
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
