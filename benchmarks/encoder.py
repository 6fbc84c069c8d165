"""CLIP ViT-B/32 from JPEG bytes and short texts: Catalens in each runtime beside what else one would use.

The weights are random, which changes no speed. Each contender runs in a process of its own; they take turns in
rounds, so that what the machine does besides hits all alike. Ratios are taken inside a round, medians over the rounds.
Every part writes its rows to benchmarks/results/encoder.json when it ends; the other parts' rows stay.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from base64 import b64decode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from benchmarks import encoder_data as data
from benchmarks.encoder_contenders import (
    BY_HAND,
    DATA,
    OURS,
    PEERS,
    TUNE,
    Contender,
    Failed,
    Running,
    catalens,
    machine_spent,
    start_all,
)
from benchmarks.encoder_inside import BATCHES, LINEAR_GFLOP, TOWER_GFLOP
from benchmarks.peers.environments import make_environments
from benchmarks.report import ROOT, Row, commit, percentile, show, write
from numpy.typing import NDArray

from catalens.encoders.fidelity import closeness, overlap

RESULTS: Final = ROOT / "benchmarks" / "results" / "encoder.json"
PRECISIONS: Final = ("bf16", "int8", "f32")
ISAS: Final = {"AVX512_CORE": "AVX512", "AVX2": "AVX2"}
"""oneDNN's name of an instruction set to MKL's."""
TEXTS: Final = data.texts()
Rows: TypeAlias = list[dict[str, Any]]

# Two threads in step lose most of their speed to a third that wants a core: such a turn is taken again.
_QUIET: Final = 0.05
_TRIES: Final = 3


class Turn(NamedTuple):
    """A rate, and the share of the cores that others took meanwhile."""

    rate: float
    others: float


Samples: TypeAlias = dict[str, list[Turn]]


class Meanwhile:
    """Watches what share of the cores goes to others than those that are measured."""

    def __init__(self, spent: Callable[[], float]) -> None:
        self._spent = spent
        self._before = time.perf_counter(), machine_spent(), spent()

    def others(self) -> float:
        """Return the share since then, from 0 to 1."""
        begin, machine, own = self._before
        cores = (time.perf_counter() - begin) * (os.cpu_count() or 1)
        return max(0.0, (machine_spent() - machine - (self._spent() - own)) / cores)


class Bench:
    """The parts; each returns its rows."""

    def __init__(self, *, quick: bool, bulk: int) -> None:
        self.quick = quick
        self.bulk_count = bulk
        self.rounds = 2 if quick else 5
        self.seconds = 1.5 if quick else 4.0

    # --- what one would pick instead ---

    def bulk(self) -> Iterator[Rows]:
        """Images/s from 800 and 2000 px and texts/s, many at once."""
        running = start_all((*OURS, *PEERS, *BY_HAND), print)
        named = {one.contender.name: one.contender for one in running}
        fewer = max(2, self.rounds - 2)
        try:
            for side, rounds in ((800, self.rounds), (2000, fewer)):

                def images(one: Running, start: int, count: int, side: int = side) -> float:
                    return one.images(side, start, count)

                samples = self._take_turns(running, images, 16, rounds, self.seconds)
                yield _compared(f"images/s from {side} px", samples, named)

            def texts(one: Running, start: int, count: int) -> float:
                return one.texts(TEXTS, start, count)

            yield _compared("texts/s", self._take_turns(running, texts, 64, fewer, self.seconds / 2), named)
        finally:
            _end(running)

    def _take_turns(
        self,
        running: Sequence[Running],
        measure: Callable[[Running, int, int], float],
        batch: int,
        rounds: int,
        seconds: float,
    ) -> Samples:
        """Return each contender's rates, one a round; one that fails is left out from then on."""
        counts: dict[str, int] = {}
        samples: Samples = {}
        for number in range(rounds + 1):
            for one in running:
                name = one.contender.name
                if number and name not in counts:
                    continue
                try:
                    if not number:  # a warm-up, and then a guess at how many fit into the time
                        measure(one, 0, batch)
                        counts[name] = max(1, round(measure(one, batch, batch) * seconds / 32)) * 32
                        continue
                    for _ in range(_TRIES):
                        meanwhile = Meanwhile(one.spent)
                        rate = measure(one, number * counts[name], counts[name])
                        others = meanwhile.others()
                        if others < _QUIET:
                            break
                except Failed as error:
                    print(f"{name}: {error}")
                    counts.pop(name, None)
                    samples.pop(name, None)
                    continue
                samples.setdefault(name, []).append(Turn(rate, others))
        return samples

    def latency(self) -> Iterator[Rows]:
        """One text, one picture of 800 px, one after the other: what an idle service answers in."""
        running = start_all((*OURS, *PEERS), print)
        rows: Rows = []
        try:
            for kind, count in (("text", 40), ("image", 20)):
                taken: dict[str, list[float]] = {}
                for number in range(self.rounds + 1):
                    for one in running:
                        start = number * count
                        try:
                            took = one.queries(kind, TEXTS, start, 5 if not number else count)
                        except Failed as error:
                            if not number:
                                print(f"{one.contender.name}: {error}")
                            continue
                        if number:
                            taken.setdefault(one.contender.name, []).extend(took)
                what = {"text": "one text", "image": "one picture of 800 px"}[kind]
                rows += [
                    {"what": what, "contender": name, "p50 ms": percentile(took, 0.5), "p95 ms": percentile(took, 0.95)}
                    for name, took in taken.items()
                ]
            yield rows
        finally:
            _end(running)

    def tune(self) -> Iterator[Rows]:
        """What each peer reaches at its other settings; the tables of the other parts use the best."""
        for peer in PEERS:
            rows: Rows = []
            tried = [peer, *(replace(peer, setting={**peer.setting, **more}) for more in TUNE.get(peer.module, ()))]
            for contender in tried:
                setting = {name: value for name, value in contender.setting.items() if name != "model"}
                row: dict[str, Any] = {"contender": peer.name, "setting": json.dumps(setting)}
                try:
                    with Running(contender) as one:
                        guess = max(one.images(800, 0, 16), one.images(800, 16, 16))
                        count = max(1, round(guess * self.seconds / 32)) * 32
                        row["images/s from 800 px"] = statistics.median(
                            one.images(800, number * count, count) for number in range(2)
                        )
                        row["one picture p50 ms"] = percentile(one.queries("image", TEXTS, 0, 10), 0.5)
                        one.texts(TEXTS, 0, 64)
                        row["texts/s"] = one.texts(TEXTS, 64, 256)
                        row["one text p50 ms"] = percentile(one.queries("text", TEXTS, 0, 20), 0.5)
                except Failed as error:
                    row["failed"] = str(error)[:120]
                rows.append(row)
            yield rows

    # --- what the machine allows ---

    def lanes(self) -> Iterator[Rows]:
        """End to end against what decoding and inference, each alone, allow."""
        rows: Rows = []
        for precision in PRECISIONS:
            answer = self._inside(
                "lanes", precision, folder=_folder(800), rounds=max(2, self.rounds - 2), seconds=self.seconds / 2
            )
            if "failed" in answer:
                rows.append({"precision": precision, **answer})
                continue
            rates, batch, many = answer["rates"], answer["batch"], answer["lanes"]
            figures = {name: statistics.median(values) for name, values in rates.items()}
            for threads, meaning in ((1, "one core busy"), (many, "all cores busy")):
                decode, infer = (figures[f"{what} {threads}"] * batch / threads for what in ("decode", "infer"))
                allowed = many / (1 / decode + 1 / infer)
                shares = [
                    got / (many / (threads / batch / one + threads / batch / two))
                    for one, two, got in zip(
                        rates[f"decode {threads}"], rates[f"infer {threads}"], rates["end to end"], strict=True
                    )
                ]
                rows.append(
                    {
                        "precision": precision,
                        "times taken with": meaning,
                        "decode ms": 1000 / decode,
                        "inference ms": 1000 / infer,
                        "allowed images/s": allowed,
                        "end to end images/s": figures["end to end"],
                        "reached %": 100 * statistics.median(shares),
                    }
                )
        yield rows

    def silicon(self) -> Iterator[Rows]:
        """The machine's own GEMM rate at the tower's shapes, the image tower's, and where its time goes."""
        rows: Rows = []
        for precision in PRECISIONS:
            rates: dict[str, dict[str, list[float]]] = {}
            for _ in range(2 if self.quick else 3):
                gemm = self._inside("gemm", precision, seconds=self.seconds / 8)
                tower = self._inside("tower", precision, seconds=self.seconds / 8)
                for library, found in gemm.get("GFLOP/s", {}).items():
                    for batch, rate in found.items():
                        rates.setdefault(f"GEMM {library}", {}).setdefault(batch, []).append(rate)
                for batch, rate in tower.get("rates", {}).items():
                    rates.setdefault("image tower", {}).setdefault(batch, []).append(rate * TOWER_GFLOP)
            medians = {
                name: {int(batch): statistics.median(values) for batch, values in found.items()}
                for name, found in rates.items()
            }
            own = max((max(found.values()) for name, found in medians.items() if name.startswith("GEMM")), default=0.0)
            for name, found in medians.items():
                best = max(found, key=lambda batch, found=found: found[batch])  # type: ignore[misc]
                rows.append(
                    {
                        "precision": precision,
                        "what": name,
                        **{f"batch {batch}": found.get(batch) for batch in BATCHES},
                        "best GFLOP/s": found[best],
                        "images/s": found[best] / (TOWER_GFLOP if name == "image tower" else LINEAR_GFLOP),
                        "of the machine's own %": 100 * found[best] / own if own else None,
                    }
                )
        yield rows

    def profile(self) -> Iterator[Rows]:
        """Where the image tower's time goes, by OpenVINO's counters, on one thread."""
        rows: Rows = []
        for precision in PRECISIONS:
            rows += self._profile(catalens("openvino", precision), least=0.01)
        yield rows

    def _profile(self, contender: Contender, least: float) -> Rows:
        precision = contender.precision
        answer = self._inside("profile", contender, batch=16, times=5 if self.quick else 15)
        if "failed" in answer:
            return [{"precision": precision, **answer}]
        counted = sum(row["ms a picture"] for row in answer["nodes"])
        rows = [
            {
                "precision": precision,
                "node": row["node"],
                "kernel": row["kernel"],
                "ms a picture": round(row["ms a picture"], 3),
                "share %": 100 * row["ms a picture"] / counted,
            }
            for row in answer["nodes"]
            if row["ms a picture"] / counted > least
        ]
        return [{"precision": precision, "node": "all", "ms a picture": round(answer["wall ms a picture"], 3)}, *rows]

    # --- what a process costs ---

    def start(self) -> Iterator[Rows]:
        """From a process' start to its first vectors, and its memory."""
        taken: dict[str, list[dict[str, Any]]] = {precision: [] for precision in PRECISIONS}
        for number in range(4 if self.quick else 11):
            for precision in PRECISIONS:
                answer = self._inside(
                    "start", precision, folder=_folder(800), texts=TEXTS[:64], work=64, begun=time.monotonic()
                )
                if "failed" in answer:
                    print(f"{precision}: {answer['failed']}")
                elif number:  # the first one fills the cache of compiled models
                    taken[precision].append(answer)
        rows: Rows = []
        for precision, answers in taken.items():
            if not answers:
                continue
            row: dict[str, Any] = {"precision": precision, "runs": len(answers)}
            for name in ("imported", "ready", "first text", "first picture"):
                row[f"{name} s"] = round(statistics.median(answer[name] for answer in answers), 3)
            for moment in ("memory", "memory after work"):
                for name, title in (("VmRSS", "RSS"), ("RssAnon", "anonymous"), ("VmHWM", "peak")):
                    row[f"{moment}: {title} MiB"] = statistics.median(answer[moment][name] for answer in answers)
            rows.append(row)
        yield rows

    def closeness(self) -> Iterator[Rows]:
        """How near the vectors are to transformers' in fp32, and f32 runtimes to torch behind the same decoding."""
        count = 50 if self.quick else 200
        reference_setting = {**PEERS[0].setting, "decode": "pil", "processor": "pil", "workers": 0}
        reference = _vectors(replace(PEERS[0], setting=reference_setting), count)
        torch = _vectors(catalens("torch", "f32"), count)
        rows: Rows = []
        for contender in (*OURS, *(peer for peer in PEERS if peer.precision == "bf16")):
            try:
                found = _vectors(contender, count)
            except Failed as error:
                rows.append({"contender": contender.name, "failed": str(error)[:200]})
                continue
            for kind, what in (("images", "pictures"), ("texts", "texts")):
                near = closeness(reference[kind], found[kind])
                rows.append(
                    {
                        "contender": contender.name,
                        "of": f"{count} {what}",
                        "cosine min": f"{near.cosine_min:.5f}",
                        "centred mean": f"{near.centred_mean:.5f}",
                        "centred min": f"{near.centred_min:.5f}",
                        "overlap@10": f"{overlap(reference[kind], found[kind]):.3f}",
                        "largest difference to torch f32": f"{np.abs(found[kind] - torch[kind]).max():.1e}",
                    }
                )
        yield rows

    def mixed(self) -> Iterator[Rows]:
        """Five queries a second, text and picture in turn, alone and beside a bulk of pictures."""
        rows: Rows = []
        for precision in PRECISIONS:
            answer = self._inside(
                "mixed", precision, folder=_folder(800), texts=TEXTS, pace=5, seconds=10 if self.quick else 40,
                count=self.bulk_count if precision != "f32" else self.bulk_count // 3,
            )  # fmt: skip
            if "failed" in answer:
                rows.append({"precision": precision, **answer})
                continue
            for kind in ("text", "picture"):
                idle, busy = (answer[when][kind] for when in ("idle", "busy"))
                rows.append(
                    {
                        "precision": precision,
                        "query": kind,
                        "idle p50 ms": percentile(idle, 0.5),
                        "idle p95 ms": percentile(idle, 0.95),
                        "busy p50 ms": percentile(busy, 0.5),
                        "busy p95 ms": percentile(busy, 0.95),
                        "p95 ratio": round(percentile(busy, 0.95) / percentile(idle, 0.95), 2),
                        "bulk images/s meanwhile": answer["images/s"],
                    }
                )
        yield rows

    # --- without AMX ---

    def isa(self) -> Iterator[Rows]:
        """The bulk of 800 px with oneDNN told to use AVX-512 or AVX2 only, and the kernels that ran: was it heeded?

        Without bf16, which such a processor computes step by step at a fraction of its f32 rate, in every library.
        ONNX Runtime's own kernels (MLAS), so fastembed and a part of OpenVINO's in f32, cannot be told.
        """
        for onednn, mkl in ISAS.items():
            told = {"ONEDNN_MAX_CPU_ISA": onednn, "MKL_ENABLE_INSTRUCTIONS": mkl, "ATEN_CPU_CAPABILITY": mkl.lower()}
            folder = str(DATA / onednn)  # what was compiled for other instructions serves nobody here
            ours = [
                replace(one, env=told, setting={**one.setting, "precision": "f32", "data": folder})
                for one in (catalens("openvino", "f32"), catalens("openvino", "int8"))
            ]
            peers = [replace(one, env=told) for one in PEERS if one.precision == "f32" and one.module != "faster"]
            running = start_all((*ours, *peers), print)

            def images(one: Running, start: int, count: int) -> float:
                return one.images(800, start, count)

            try:
                samples = self._take_turns(running, images, 16, max(2, self.rounds - 2), self.seconds)
            finally:
                _end(running)
            named = {one.name: one for one in (*ours, *peers)}
            compared = _compared(f"images/s from 800 px, {onednn} at most", samples, named)
            for row in compared:
                if named[row["contender"]] in ours:
                    nodes = self._profile(named[row["contender"]], least=0.3)
                    row["kernels"] = ", ".join(dict.fromkeys(str(node.get("kernel", "")) for node in nodes[1:]))
            yield compared

    def _inside(self, part: str, contender: Contender | str, **given: object) -> dict[str, Any]:
        """Run a part of encoder_inside in a process and return its answer, or `failed` with its last words.

        For Catalens at a setting, or at a precision in its default runtime.
        """
        one = catalens("openvino", contender) if isinstance(contender, str) else contender
        setting = {"precision": one.precision} if part == "gemm" else one.setting
        meanwhile = Meanwhile(_children_spent)
        asked = subprocess.run(
            [sys.executable, "-m", "benchmarks.encoder_inside", part, json.dumps({**setting, **given})],
            cwd=ROOT, env={**os.environ, **one.env}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if asked.returncode:
            lines = asked.stderr.strip().splitlines()
            return {"failed": lines[-1][-200:] if lines else f"exit status {asked.returncode}"}
        if (others := meanwhile.others()) > _QUIET:
            print(f"{part}, {one.precision}: others took {others:.0%} of the cores meanwhile")
        answer: dict[str, Any] = json.loads(asked.stdout.strip().splitlines()[-1])
        return answer


def _compared(what: str, samples: Samples, contenders: Mapping[str, Contender]) -> Rows:
    """Return a row a contender: its median and spread, and its ratio to the best fp32 and the best bf16 peer."""
    rates = {name: [turn.rate for turn in turns] for name, turns in samples.items()}
    medians = {name: statistics.median(values) for name, values in rates.items()}
    best: dict[str, str] = {}
    for precision in ("f32", "bf16"):
        peers = [
            name for name in medians if contenders[name].kind == "peer" and contenders[name].precision == precision
        ]
        if peers:
            best[precision] = max(peers, key=lambda name: medians[name])
    rows: Rows = []
    for name, median in sorted(medians.items(), key=lambda item: -item[1]):
        row: dict[str, Any] = {
            "what": what,
            "contender": name,
            "median": median,
            "least": min(rates[name]),
            "most": max(rates[name]),
            "others took %": 100 * max(turn.others for turn in samples[name]),
        }
        for precision, other in best.items():
            ratios = [one / two for one, two in zip(rates[name], rates[other], strict=True)]
            row[f"× best {precision} peer"] = round(statistics.median(ratios), 2)
        rows.append(row)
    for precision, other in best.items():
        print(f"{what}: the best {precision} peer is {other}")
    return rows


def _vectors(contender: Contender, count: int) -> dict[str, NDArray[np.float32]]:
    with Running(contender) as one:
        packed = one.vectors(TEXTS, count)
    return {
        kind: np.stack([np.frombuffer(b64decode(vector), np.float32) for vector in vectors])
        for kind, vectors in packed.items()
    }


def _children_spent() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


def _folder(side: int) -> str:
    return str(data.CACHE / "pictures" / str(side))


def _end(running: Iterable[Running]) -> None:
    for one in running:
        one.end()


PARTS: Final = ("bulk", "latency", "lanes", "silicon", "profile", "start", "closeness", "mixed", "isa")


def main() -> None:
    """Run the parts that are asked for and keep their rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts: {', '.join(PARTS)} and tune")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds: to see whether it works")
    parser.add_argument("--bulk", type=int, default=5000, help="pictures embedded beside the queries (5000)")
    arguments = parser.parse_args()
    wanted = arguments.only.split(",")
    unknown = set(wanted) - {*PARTS, "tune"}
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    data.prepare()
    for name, why in make_environments().items():
        print(f"{name} cannot be installed here, its rows are left out: {why}")
    DATA.mkdir(parents=True, exist_ok=True)
    bench = Bench(quick=arguments.quick, bulk=500 if arguments.quick else arguments.bulk)
    for name in wanted:
        begin = time.perf_counter()
        rows: Rows = []
        for more in getattr(bench, name)():
            show(f"encoder, {name}", more)
            rows += more
            _keep(name, rows, quick=arguments.quick)
        print(f"{name} took {time.perf_counter() - begin:.0f} s")


def _keep(part: str, rows: Sequence[Row], *, quick: bool) -> None:
    """Write the rows in the place of the part's earlier ones."""
    before: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    taken = {"taken": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit(), "quick": quick}
    others = [row for row in before.get("rows", []) if row["part"] != part]
    kept = [*others, *({"part": part, **row} for row in rows)]
    write("encoder", kept, parts={**before.get("parts", {}), part: taken})


if __name__ == "__main__":
    main()
