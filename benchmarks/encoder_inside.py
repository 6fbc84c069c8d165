"""What the encoder benchmark measures inside a process of its own: `python -m benchmarks.encoder_inside PART JSON`.

Each part prints its answer as the last line of stdout, JSON.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from catalens.settings import Settings

# ViT-B/32's image tower, a picture: what its linear layers and its attention multiply, two operations each.
TOWER_GFLOP: Final = 8.82
_TOKENS, _WIDTH, _HIDDEN, _LAYERS = 50, 768, 3072, 12
LINEAR_GFLOP: Final = _LAYERS * 2 * _TOKENS * (4 * _WIDTH**2 + 2 * _WIDTH * _HIDDEN) / 1e9
BATCHES: Final = (1, 2, 4, 8, 16)


def _settings(given: dict[str, Any]) -> Settings:
    from catalens.settings import EncoderSettings, Settings  # noqa: PLC0415  # the start is measured without

    encoder = {name: value for name, value in given.items() if name not in ("model", "data")}
    folder = Path(given["data"])
    return Settings(_env_file=None, model=given["model"], data_dir=folder, encoder=EncoderSettings(**encoder))


def start(given: dict[str, Any]) -> dict[str, Any]:
    """From the process' start to the first vectors, and the memory then and after some work."""
    from catalens.encoders import open_encoder  # noqa: PLC0415  # the start is what is measured
    from catalens.telemetry import Metrics  # noqa: PLC0415  # as above

    begun = given.pop("begun")
    pictures = [path.read_bytes() for path in sorted(Path(given.pop("folder")).iterdir())[: given.pop("work")]]
    words = given.pop("texts")[: len(pictures)]
    answer: dict[str, Any] = {"imported": time.monotonic() - begun}

    async def run() -> None:
        async with open_encoder(_settings(given), Metrics()) as encoder:
            answer["ready"] = time.monotonic() - begun
            await encoder.embed_text(words[0])
            answer["first text"] = time.monotonic() - begun
            await encoder.embed_image(pictures[0])
            answer["first picture"] = time.monotonic() - begun
            answer["memory"] = _memory()
            await asyncio.gather(*(encoder.embed_image(picture, bulk=True) for picture in pictures))
            await asyncio.gather(*(encoder.embed_text(text, bulk=True) for text in words))
            answer["memory after work"] = _memory()

    asyncio.run(run())
    return answer


def _memory() -> dict[str, float]:
    from benchmarks.peers.protocol import memory  # noqa: PLC0415  # small, but the start is measured without

    found: dict[str, float] = memory()
    return found


def lanes(given: dict[str, Any]) -> dict[str, Any]:
    """Decoding alone, inference alone (on one core and on all of them at once), and both as the encoder does it."""
    from catalens.encoders import cores, load_runtime, open_encoder  # noqa: PLC0415  # as in start
    from catalens.encoders.bundle import load_bundle  # noqa: PLC0415
    from catalens.encoders.preprocess import Preprocessor  # noqa: PLC0415
    from catalens.encoders.towers import VisionTower  # noqa: PLC0415
    from catalens.telemetry import Metrics  # noqa: PLC0415

    pictures = [path.read_bytes() for path in sorted(Path(given.pop("folder")).iterdir())]
    rounds, seconds = given.pop("rounds"), given.pop("seconds")
    settings = _settings(given)
    many = settings.encoder.lanes or cores()
    batch = settings.encoder.max_batch
    bundle = load_bundle(Path(settings.model))
    runtime = load_runtime(bundle, settings.encoder, many, settings.data_dir / "cache")
    tower = VisionTower(runtime, Preprocessor(bundle.manifest.image), settings.pictures)
    parts = [pictures[place : place + batch] for place in range(0, len(pictures) - batch + 1, batch)]
    prepared = [[one for one in tower.prepare(part) if not isinstance(one, Exception)] for part in parts[:4]]
    taken: dict[str, list[float]] = {}

    def note(what: str, rate: float) -> None:
        taken.setdefault(what, []).append(rate)

    async def run() -> None:
        async with open_encoder(settings, Metrics()) as encoder:

            async def bulk(count: int) -> float:
                wanted = [pictures[place % len(pictures)] for place in range(count)]
                begin = time.perf_counter()
                await asyncio.gather(*(encoder.embed_image(picture, bulk=True) for picture in wanted))
                return count / (time.perf_counter() - begin)

            guess = await bulk(4 * batch * many)
            for _ in range(rounds):
                for threads in dict.fromkeys((1, many)):
                    note(f"decode {threads}", _pace(lambda n: tower.prepare(parts[n % len(parts)]), threads, seconds))
                    note(f"infer {threads}", _pace(lambda n: tower.run(prepared[n % len(prepared)]), threads, seconds))
                note("end to end", await bulk(max(4, round(guess * 2 * seconds / batch / many)) * batch * many))

    asyncio.run(run())
    return {"batch": batch, "lanes": many, "rates": taken, "per_call": batch}


def _pace(work: Callable[[int], object], threads: int, seconds: float) -> float:
    """Return calls/s of all threads together, each calling `work` in turn for so long."""
    begin = time.perf_counter()

    def one(number: int) -> tuple[int, float]:
        done = 0
        while time.perf_counter() - begin < seconds:
            work(number + done * threads)
            done += 1
        return done, time.perf_counter() - begin

    with ThreadPoolExecutor(threads) as pool:
        return sum(done / took for done, took in pool.map(one, range(threads)))


def mixed(given: dict[str, Any]) -> dict[str, Any]:
    """Queries at a steady pace, text and picture in turn: first alone, then beside a bulk of pictures."""
    from catalens.encoders import open_encoder  # noqa: PLC0415  # as in start
    from catalens.telemetry import Metrics  # noqa: PLC0415

    pictures = [path.read_bytes() for path in sorted(Path(given.pop("folder")).iterdir())]
    words = given.pop("texts")
    count, pace, seconds = given.pop("count"), given.pop("pace"), given.pop("seconds")
    answer: dict[str, Any] = {}

    async def run() -> None:
        async with open_encoder(_settings(given), Metrics()) as encoder:

            async def query(number: int, due: float, kind: str, took: dict[str, list[float]]) -> None:
                if kind == "text":
                    await encoder.embed_text(words[number % len(words)])
                else:
                    await encoder.embed_image(pictures[number % len(pictures)])
                took[kind].append((time.perf_counter() - due) * 1000)

            async def queries(until: Callable[[], bool]) -> dict[str, list[float]]:
                took: dict[str, list[float]] = {"text": [], "picture": []}
                begin, number = time.perf_counter(), 0
                async with asyncio.TaskGroup() as group:
                    while not until():
                        due = begin + number / pace
                        await asyncio.sleep(max(0.0, due - time.perf_counter()))
                        kind = "text" if number % 2 else "picture"
                        group.create_task(query(number, due, kind, took))  # open loop: a slow one delays no other
                        number += 1
                return took

            await asyncio.gather(*(encoder.embed_image(picture, bulk=True) for picture in pictures[:64]))
            await asyncio.gather(*(encoder.embed_text(text) for text in words[:8]))
            end = time.perf_counter() + seconds
            answer["idle"] = await queries(lambda: time.perf_counter() >= end)
            wanted = [pictures[place % len(pictures)] for place in range(count)]
            begin = time.perf_counter()
            bulk = asyncio.gather(*(encoder.embed_image(picture, bulk=True) for picture in wanted))
            answer["busy"] = await queries(bulk.done)
            await bulk
            answer["images/s"] = count / (time.perf_counter() - begin)

    asyncio.run(run())
    return answer


def tower(given: dict[str, Any]) -> dict[str, Any]:
    """The image tower alone, as the runtime runs it: pictures/s a batch, a thread a lane."""
    import numpy as np  # noqa: PLC0415  # as in start

    from catalens.encoders import cores, load_runtime  # noqa: PLC0415
    from catalens.encoders.bundle import load_bundle  # noqa: PLC0415

    seconds = given.pop("seconds")
    settings = _settings(given)
    many = settings.encoder.lanes or cores()
    runtime = load_runtime(load_bundle(Path(settings.model)), settings.encoder, many, settings.data_dir / "cache")
    pixels = np.random.default_rng(0).normal(size=(max(BATCHES), 3, 224, 224)).astype(np.float32)
    rates = {}
    for batch in BATCHES:
        given_batch = pixels[:batch]
        _pace(lambda _, part=given_batch: runtime.run_vision(part), many, seconds / 4)  # type: ignore[misc]
        rates[batch] = batch * _pace(lambda _, part=given_batch: runtime.run_vision(part), many, seconds)  # type: ignore[misc]
    return {"rates": rates}


def gemm(given: dict[str, Any]) -> dict[str, Any]:
    """The machine's own rate at the tower's shapes: its linear layers alone, in OpenVINO and in torch, GFLOP/s."""
    precision, seconds = given["precision"], given["seconds"]
    found: dict[str, dict[int, float]] = {"OpenVINO": _openvino_gemm(precision, seconds)}
    if precision != "int8":
        found["torch"] = _torch_gemm(precision, seconds)
    return {"GFLOP/s": found}


def _openvino_gemm(precision: str, seconds: float) -> dict[int, float]:
    import numpy as np  # noqa: PLC0415  # as in start

    from catalens.encoders import cores  # noqa: PLC0415

    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # as in encoders/openvino.py
    import openvino as ov  # noqa: PLC0415
    from openvino import opset13 as ops  # noqa: PLC0415

    chance = np.random.default_rng(0)
    source = ops.parameter([-1, _WIDTH], np.float32)
    flow = source
    for _ in range(_LAYERS):
        for width, wide in (*[(_WIDTH, _WIDTH)] * 4, (_WIDTH, _HIDDEN), (_HIDDEN, _WIDTH)):
            if precision == "int8":
                weights = ops.constant(chance.integers(-127, 128, (wide, width), np.int8))
                scales = ops.constant(np.full((wide, 1), 1 / 73 / np.sqrt(width), np.float32))
                matrix = ops.multiply(ops.convert(weights, np.float32), scales)
                ends = [ops.constant(np.float32(end)) for end in (-4, 4 * 127 / 128)]
                flow = ops.fake_quantize(flow, *ends, *ends, 256)
            else:
                matrix = ops.constant((chance.normal(size=(wide, width)) / np.sqrt(width)).astype(np.float32))
            flow = ops.matmul(flow, matrix, False, True)
    model = ov.Model([flow], [source], "gemm")
    many = cores()
    config = {
        "INFERENCE_PRECISION_HINT": "f32" if precision == "f32" else "bf16",
        "NUM_STREAMS": many,
        "INFERENCE_NUM_THREADS": many,
        "ENABLE_CPU_PINNING": False,
    }
    compiled = ov.Core().compile_model(model, "CPU", config)
    requests = [compiled.create_infer_request() for _ in range(many)]
    rates = {}
    for batch in BATCHES:
        rows = chance.normal(size=(batch * _TOKENS, _WIDTH)).astype(np.float32)
        for request in requests:
            request.infer([rows], share_inputs=True)  # the first inference of a shape prepares it

        def call(number: int, rows: NDArray[np.float32] = rows) -> None:
            requests[number % many].infer([rows], share_inputs=True)

        rates[batch] = batch * LINEAR_GFLOP * _pace(call, many, seconds)
    return rates


def _torch_gemm(precision: str, seconds: float) -> dict[int, float]:
    import torch  # noqa: PLC0415  # gigabytes
    from torch.nn.functional import linear  # noqa: PLC0415

    from catalens.encoders import cores  # noqa: PLC0415

    kind = {"f32": torch.float32, "bf16": torch.bfloat16}[precision]
    shapes = (*[(_WIDTH, _WIDTH)] * 4, (_WIDTH, _HIDDEN), (_HIDDEN, _WIDTH))
    layers = [(torch.randn(wide, width) / width**0.5).to(kind) for _ in range(_LAYERS) for width, wide in shapes]
    torch.set_num_threads(1)
    rates = {}
    for batch in BATCHES:
        rows = torch.randn(batch * _TOKENS, _WIDTH).to(kind)

        def call(_: int, rows: Any = rows) -> None:
            torch.set_num_threads(1)  # a thread's own setting
            with torch.inference_mode():
                flow = rows
                for weights in layers:
                    flow = linear(flow, weights)

        call(0)
        rates[batch] = batch * LINEAR_GFLOP * _pace(call, cores(), seconds)
    return rates


def profile(given: dict[str, Any]) -> dict[str, Any]:
    """Where the image tower's time goes by OpenVINO's own counters, on one thread, as the product compiles it."""
    import numpy as np  # noqa: PLC0415  # as in start

    from catalens.encoders import load_runtime  # noqa: PLC0415
    from catalens.encoders.bundle import load_bundle  # noqa: PLC0415

    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # as in encoders/openvino.py
    import openvino as ov  # noqa: PLC0415

    batch, times = given.pop("batch"), given.pop("times")
    compile_model, infer = ov.Core.compile_model, ov.InferRequest.infer
    sums: dict[tuple[str, str], float] = {}
    walls = [0.0]

    def compile_counting(core: Any, model: Any, device: Any = None, config: Any = None, **more: Any) -> Any:
        return compile_model(core, model, device, {**(config or {}), "PERF_COUNT": True}, **more)

    def infer_counting(request: Any, *inputs: Any, **more: Any) -> Any:
        begin = time.perf_counter()
        answer = infer(request, *inputs, **more)
        walls[-1] += (time.perf_counter() - begin) * 1000
        for node in request.get_profiling_info():
            key = (node.node_type, node.exec_type)
            sums[key] = sums.get(key, 0.0) + node.real_time.total_seconds() * 1000
        return answer

    # The product has no switch for counters, so they are switched on from outside.
    ov.Core.compile_model, ov.InferRequest.infer = compile_counting, infer_counting
    settings = _settings({**given, "lanes": 1, "towers": "image"})
    folder = settings.data_dir / "counting"
    runtime = load_runtime(load_bundle(Path(settings.model)), settings.encoder, 1, folder)
    pixels = np.random.default_rng(0).normal(size=(batch, 3, 224, 224)).astype(np.float32)
    spent: dict[tuple[str, str], list[float]] = {}
    runtime.run_vision(pixels)  # the first one prepares
    walls.clear()
    for _ in range(times):
        sums.clear()
        walls.append(0.0)
        runtime.run_vision(pixels)
        for key, value in sums.items():
            spent.setdefault(key, []).append(value)
    nodes = [
        {"node": node, "kernel": kernel, "ms a picture": statistics.median(values) / batch}
        for (node, kernel), values in spent.items()
    ]
    nodes.sort(key=lambda row: -float(str(row["ms a picture"])))
    return {"wall ms a picture": statistics.median(walls) / batch, "nodes": nodes}


PARTS: Final = {
    "start": start,
    "lanes": lanes,
    "mixed": mixed,
    "tower": tower,
    "gemm": gemm,
    "profile": profile,
}


def main(arguments: Sequence[str]) -> None:
    """Do the part that is named."""
    name, given = arguments
    print(json.dumps(PARTS[name](json.loads(given))))


if __name__ == "__main__":
    main(sys.argv[1:])
