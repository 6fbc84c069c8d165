"""How the workers should be scaled: a simulator of KEDA, the autoscaler behind it and the group; how one starts.

The simulator is arithmetic: no Kafka, no cluster. What it takes from measurements stands in benchmarks/results
(throughput of one worker, its start, a rebalance); what nobody measured here is in ASSUMED, and in every report. Lag
is a fluid, served first in first out by whole workers, second by second.

    python -m benchmarks.autoscaling                    # all of it
    python -m benchmarks.autoscaling --only coldstart   # the start of a real embedder process: median of COLD_STARTS
    python -m benchmarks.autoscaling --only simulate    # the rest, with the last measured start
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from benchmarks import coldstart
from benchmarks.report import ROOT, Row, commit, show, write

from catalens.settings import EmbedderSettings

RESULTS: Final = ROOT / "benchmarks" / "results"
DOCUMENT: Final = ROOT / "docs" / "capacity.md"
PLOT: Final = ROOT / "docs" / "images" / "autoscaling.svg"
DAY: Final = 86_400

ASSUMED: Final[dict[str, float]] = {
    "seconds from the autoscaler's word to the process (scheduling, image on the node)": 15.0,
    "US$ an hour for a machine of 2 cores and 8 GiB (on demand, large cloud, list price as of 2026-11)": 0.10,
    "US$ a GiB and month of memory in a memory-optimised machine (the same)": 6.0,
    "US$ a GiB and month of SSD (the same)": 0.08,
    "US$ a month for three brokers and a Redis (the same)": 700.0,
    "share of the catalogue whose content changes in a day": 0.02,
    "peak of a day over its mean": 3.0,
    "bytes of a product's payload and words on disk": 4096,
    "bytes of a product's words in memory": 600,
}
"""What is no measurement of ours."""
SCHEDULING, MACHINE_HOUR, MEMORY_MONTH, DISK_MONTH, BROKERS_MONTH, CHANGED, PEAK, PAYLOAD, WORDS = ASSUMED.values()


# --- what is scaled, and by what ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Worker:
    """One embedder process."""

    per_second: float
    start: float
    """Seconds from the autoscaler's word until it takes events."""
    rebalance: float = 2.0
    """Seconds that the whole group stands still when a member comes or goes."""
    commit: int = 1
    """Seconds for which what is finished still counts as lag."""
    batch: int = EmbedderSettings().batch
    """Events that it takes from one partition before it turns to the next."""


@dataclass(frozen=True, slots=True)
class Scaler:
    """A ScaledObject with one Kafka trigger, and the HorizontalPodAutoscaler that KEDA makes of it.

    The defaults are those of k8s/components/keda/scaledobject.yaml.
    """

    lag_threshold: int = 2000
    partitions: int = 12
    maximum: int = 12
    activation: int = 0
    """A lag above it wakes the first worker."""
    even: bool = True
    """ensureEvenDistributionOfPartitions."""
    polling: int = 15
    """Seconds between KEDA's own looks, which wake and put to sleep."""
    excludes: bool = True
    """excludePersistentLag: partitions whose offset has not moved since the last look count to wake, not to scale."""
    cached: bool = True
    """useCachedMetrics: the autoscaler is told what KEDA's own last look saw, and looks not itself."""
    cooldown: int = 600
    """Seconds without work until the last worker goes."""
    fallback: int = 1
    """Workers at least while KEDA could not ask the broker four times in a row."""
    period: int = 15
    """Seconds between the autoscaler's looks."""
    phase: int = 7
    """Seconds from KEDA's look to the autoscaler's; no setting, it comes as it comes."""
    up_window: int = 15
    """Seconds whose lowest recommendation holds against scaling up."""
    up_pods: int = 3
    up_percent: int = 200
    up_seconds: int = 60
    """As many workers, or as many per cent, may come in this time: whichever is more."""
    down_window: int = 300
    """Seconds whose highest recommendation holds against scaling down."""
    down_percent: int = 50
    down_seconds: int = 180

    def wanted(self, lag: float, current: int) -> int:
        """Return the autoscaler's recommendation for an active object.

        KEDA reports the lag, at most that of one worker a partition, or of the next divisor of the partitions; the
        autoscaler divides by the threshold, and leaves a difference of a tenth alone.
        """
        threshold = self.lag_threshold
        if self.even:
            divisors = (number for number in range(1, self.partitions + 1) if self.partitions % number == 0)
            lag = threshold * next((number for number in divisors if number * threshold >= lag), self.partitions)
        lag = min(lag, self.partitions * threshold)
        close = current and abs(lag / (threshold * current) - 1) <= 0.1
        return max(1, min(current if close else math.ceil(lag / threshold), self.maximum, self.partitions))


@dataclass(frozen=True, slots=True)
class Trace:
    """What arrives, second by second, and when the broker is away: callers then keep what they have."""

    name: str
    arrivals: Sequence[float]
    away: range = range(0)


@dataclass(slots=True)
class Outcome:
    """What a run of the simulator found."""

    arrived: float = 0.0
    finished: float = 0.0
    left: float = 0.0
    most_lag: float = 0.0
    worker_seconds: float = 0.0
    most_workers: int = 0
    rebalances: int = 0
    waits: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    """Events by the seconds from their arrival, at the caller's or the broker's, until they were searchable."""
    lag: list[float] = field(default_factory=list)
    workers: list[int] = field(default_factory=list)

    def freshness(self, share: float) -> float:
        """Return the seconds within which this share of the finished events was searchable."""
        wanted, seen = share * self.finished, 0.0
        for wait in sorted(self.waits):
            seen += self.waits[wait]
            if seen >= wanted * (1 - 1e-9):
                return float(wait)
        return 0.0

    @property
    def dollars_a_million(self) -> float:
        """What the workers of a million finished events cost."""
        return self.worker_seconds / 3600 * MACHINE_HOUR / self.finished * 1e6 if self.finished else 0.0


class _Group:
    """The workers: those asked for, those that have come up, and the standstill when that changes."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._ready: list[float] = []
        self._members = 0
        self._still_until = 0.0
        self.rebalances = 0

    def __len__(self) -> int:
        return len(self._ready)

    def scale(self, now: int, count: int) -> None:
        """Start what is missing; of what is too much, the youngest goes first."""
        self._ready += [now + self._worker.start] * (count - len(self._ready))
        del self._ready[count:]

    def capacity(self, now: int, partitions: int) -> float:
        """Return how many events the group can finish in this second."""
        members = sum(ready <= now for ready in self._ready)
        if members != self._members:
            self._members = members
            self.rebalances += 1
            self._still_until = now + self._worker.rebalance
        if not members:
            return 0.0
        share = min(1.0, max(0.0, now + 1 - self._still_until))
        # The one with the most partitions holds up the rest of what waits.
        return share * self._worker.per_second * min(members, partitions / math.ceil(partitions / members))


class _Autoscaler:
    """The HorizontalPodAutoscaler: recommends, holds against haste both ways, and goes in steps."""

    def __init__(self, scaler: Scaler) -> None:
        self._scaler = scaler
        self._recommended: deque[tuple[int, int]] = deque()
        self._changes: deque[tuple[int, int]] = deque()

    def forget(self) -> None:
        """The object was put to sleep."""
        self._recommended.clear()
        self._changes.clear()

    def look(self, now: int, lag: float, current: int) -> int:
        """Return how many workers there should be."""
        scaler, recommended = self._scaler, self._recommended
        recommended.append((now, scaler.wanted(lag, current)))
        while recommended[0][0] <= now - max(scaler.down_window, scaler.up_window):
            recommended.popleft()
        lowest = min(count for at, count in recommended if at > now - scaler.up_window)
        highest = max(count for at, count in recommended if at > now - scaler.down_window)
        desired = max(current, lowest) if lowest > current else min(current, highest)
        if desired > current:
            begin = current - sum(step for at, step in self._changes if at > now - scaler.up_seconds)
            desired = min(
                desired, max(begin + scaler.up_pods, math.ceil(begin * (1 + scaler.up_percent / 100)), current)
            )
        elif desired < current:
            begin = current - sum(step for at, step in self._changes if at > now - scaler.down_seconds)
            desired = max(desired, min(current, math.floor(begin * (1 - scaler.down_percent / 100))))
        if desired != current:
            self._changes.append((now, desired - current))
        while self._changes and self._changes[0][0] <= now - max(scaler.up_seconds, scaler.down_seconds):
            self._changes.popleft()
        return desired


class _Eyes:
    """What KEDA sees of the lag; each look compares with the look before, whoever asked for it."""

    def __init__(self, scaler: Scaler, worker: Worker) -> None:
        self._scaler = scaler
        self._batch = worker.batch
        self._committed = 0.0

    def look(self, lag: float, committed: float) -> float:
        """Return the lag that wants workers, where that many events have been committed in all.

        Partitions have their turns: in the time of one batch, one of them moves for each worker.
        """
        moved, self._committed = committed - self._committed, committed
        if not self._scaler.excludes or lag <= 0:
            return lag
        turn = min(self._batch, max(1.0, (lag + moved) / self._scaler.partitions))
        return lag * min(1.0, moved / (turn * self._scaler.partitions))


def simulate(trace: Trace, scaler: Scaler, worker: Worker, *, every: int = 60) -> Outcome:
    """Run `trace`, then on without arrivals until all is done and scaled to zero (a day at most); sample `every` s."""
    out, group = Outcome(), _Group(worker)
    queue: deque[tuple[int, float]] = deque()
    kept: list[tuple[int, float]] = []
    lag, active_at, failures = 0.0, 0, 0
    uncommitted: deque[float] = deque([0.0] * worker.commit, maxlen=worker.commit)
    autoscaler, eyes, seen = _Autoscaler(scaler), _Eyes(scaler, worker), 0.0
    now, length = 0, len(trace.arrivals)
    while now < length or ((queue or kept or len(group)) and now < length + DAY):
        arriving = trace.arrivals[now] if now < length else 0.0
        away = now in trace.away
        if arriving:
            out.arrived += arriving
            kept.append((now, arriving))
        if not away and kept:
            queue.extend(kept)
            lag += sum(count for _, count in kept)
            kept.clear()
        capacity = 0.0 if away else group.capacity(now, scaler.partitions)
        finished = out.finished
        while queue and capacity > 1e-9:
            arrived, count = queue[0]
            done = min(count, capacity)
            capacity -= done
            lag -= done
            out.finished += done
            out.waits[now - arrived] += done
            if done < count:
                queue[0] = (arrived, count - done)
            else:
                queue.popleft()
        if not queue:
            lag = 0.0  # what rounding left would keep a worker awake for ever
        uncommitted.append(out.finished - finished)
        told, committed = lag + sum(uncommitted), out.finished - sum(uncommitted)
        if now % scaler.period == scaler.phase and len(group) and not away:
            if not scaler.cached:
                seen = eyes.look(told, committed)
            group.scale(now, autoscaler.look(now, seen, len(group)))
        if now % scaler.polling == 0:
            if not away:
                seen = eyes.look(told, committed)
            failures = failures + 1 if away else 0
            if away:
                if failures >= 4:
                    group.scale(now, max(len(group), scaler.fallback))
            elif told > scaler.activation:
                active_at = now
                if not len(group):
                    group.scale(now, 1)
            elif len(group) and now - active_at >= scaler.cooldown:
                group.scale(now, 0)
                autoscaler.forget()
        out.worker_seconds += len(group)
        out.most_lag, out.most_workers = max(out.most_lag, lag), max(out.most_workers, len(group))
        if now % every == 0:
            out.lag.append(round(lag, 1))
            out.workers.append(len(group))
        now += 1
    out.left = sum(count for _, count in (*queue, *kept))
    out.rebalances = group.rebalances
    return out


# --- what arrives ------------------------------------------------------------------------------------------------


def daily(mean: float = 120.0) -> Trace:
    """A day of ten million changes: nights at a sixth of the evening."""
    return Trace("daily curve", [mean * (1 - 0.7 * math.cos(2 * math.pi * second / DAY)) for second in range(DAY)])


def flash_sale(base: float = 5.0, factor: float = 50.0) -> Trace:
    """Two hours, of which twenty minutes are fifty times as busy, from one second to the next."""
    return Trace("flash sale ×50", [base * (factor if 2400 <= second < 3600 else 1) for second in range(7200)])


def reindex(products: int = 1_000_000, per_second: float = 10_000.0) -> Trace:
    """A whole catalogue at once, as fast as one ingest takes it, into a group that sleeps."""
    seconds = math.ceil(products / per_second)
    return Trace("full re-index of 1 M", [0.0] * 60 + [products / seconds] * seconds)


def outage(mean: float = 120.0) -> Trace:
    """Four busy hours; the broker is away for twenty minutes of them, and callers come again when it is back."""
    return Trace("broker outage of 20 min", [mean] * 4 * 3600, range(3600, 4800))


def quiet(minutes: int = 7) -> Trace:
    """A day of a small shop: one change every few minutes, so that the cool-down decides who is awake."""
    return Trace(f"a change every {minutes} min", [float(second % (minutes * 60) == 0) for second in range(DAY)])


def traces() -> list[Trace]:
    """Return the four that a choice is made by."""
    return [daily(), flash_sale(), reindex(), outage()]


# --- what was measured -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Measured:
    """Figures of other benchmarks, each with the file, commit and machine that it comes from."""

    clip: float
    starter: float
    index: float
    gpu: float
    start: float | None
    rebalance: float | None
    sources: dict[str, Any]


def measured(folder: Path = RESULTS) -> Measured:
    """Read the committed figures; KeyError names a row that is not there any more."""
    files = {name: _read(folder / f"{name}.json") for name in ("pipeline", "encoder", "gpu")}
    encoder = files["encoder"]["rows"]
    clip = [
        _row(encoder, "median", part="bulk", what=what, contender="Catalens OpenVINO bf16")
        for what in ("images/s from 800 px", "texts/s")
    ]
    own = folder / "autoscaling.json"
    cold = [row for row in _read(own)["rows"] if row.get("part") == "coldstart"] if own.exists() else []
    pipeline = files["pipeline"]["rows"]
    return Measured(
        clip=1 / sum(1 / rate for rate in clip),
        starter=_row(
            pipeline, "per s", what="one worker, starter model, embedded index: the same pictures and texts"
        ),
        index=_row(pipeline, "per s", what="one worker, free encoder, embedded index"),
        gpu=_row(
            files["gpu"]["rows"], "per_s", measured="pictures/s from 800 px JPEG bytes, bulk",
            setting="8 lanes, batch 64",
        ),
        start=_row(cold, "median s", what="to the first vector") if cold else None,
        rebalance=_row(cold, "median s", what="group join") if cold else None,
        sources={
            name: {key: document.get(key) for key in ("taken", "commit", "machine")}
            for name, document in files.items()
        },
    )  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def _row(rows: Iterable[Row], column: str, **wanted: str) -> float:
    for row in rows:
        if all(row.get(key) == value for key, value in wanted.items()) and column in row:
            return float(row[column])
    raise KeyError(f"no row {wanted} with {column!r}: run that benchmark, or mend what is asked for here")


# --- choosing ----------------------------------------------------------------------------------------------------

THRESHOLDS: Final = (250, 500, 1000, 2000, 4000, 8000)
PARTITIONS: Final = (6, 12, 24)
COOLDOWNS: Final = (120, 300, 600)
DAILY_BOUND: Final = 60.0
SALE_BOUND: Final = 180.0
"""Seconds of freshness p99 that a choice must keep on the daily curve, and in the sale."""


def sweep(worker: Worker) -> tuple[list[Row], Scaler]:
    """Try every combination on every trace; return the rows and the cheapest that keeps the bounds.

    Cheapest is the mean cost of a million over the traces; of equals (one in a hundred) the fewest rebalances.
    """
    runs = traces()
    rows: list[Row] = []
    best: tuple[float, int, Scaler] | None = None
    for partitions in PARTITIONS:
        for threshold in THRESHOLDS:
            for cooldown in COOLDOWNS:
                scaler = Scaler(threshold, partitions, maximum=partitions, cooldown=cooldown)
                found = [simulate(trace, scaler, worker) for trace in runs]
                cost = sum(one.dollars_a_million for one in found) / len(found)
                times = sum(one.rebalances for one in found)
                kept = found[0].freshness(0.99) <= DAILY_BOUND and found[1].freshness(0.99) <= SALE_BOUND
                rows.append({
                    "part": "sweep", "partitions": partitions, "lagThreshold": threshold, "cooldown s": cooldown,
                    "daily p99 s": found[0].freshness(0.99), "sale p99 s": found[1].freshness(0.99),
                    "re-index h": max(found[2].waits, default=0) / 3600, "outage p99 s": found[3].freshness(0.99),
                    "US$/million": cost, "rebalances": times, "keeps the bounds": kept,
                })  # fmt: skip
                if kept and (best is None or cost < best[0] * 0.99 or (cost < best[0] * 1.01 and times < best[1])):
                    best = (cost, times, scaler)
    if best is None:
        raise RuntimeError("no combination keeps the bounds: see the sweep's rows")
    return rows, best[2]


def report(worker: Worker, scaler: Scaler, part: str) -> tuple[list[Row], list[tuple[Trace, Outcome]]]:
    """Return what a scaler does on each trace, as rows and as it went."""
    found = [(trace, simulate(trace, scaler, worker)) for trace in (*traces(), quiet())]
    return [
        {
            "part": part, "trace": trace.name, "events": round(one.arrived), "most waiting": round(one.most_lag),
            "workers at most": one.most_workers, "worker hours": one.worker_seconds / 3600,
            "rebalances": one.rebalances, "p50 s": one.freshness(0.5), "p99 s": one.freshness(0.99),
            "US$/million": one.dollars_a_million, "left": round(one.left),
        }
        for trace, one in found
    ], found  # fmt: skip


SIGHTS: Final[dict[str, dict[str, Any]]] = {
    "as shipped": {},
    "looks itself, 1 s after KEDA": {"cached": False, "phase": 1},
    "looks itself, 7 s after KEDA": {"cached": False},
    "as shipped, KEDA looks every 30 s": {"polling": 30},
    "without excludePersistentLag": {"excludes": False},
}
SLOW: Final = 17.0
"""Events a second of a worker with a slower model, for comparison."""


def sights(worker: Worker) -> list[Row]:
    """Return what comes of how the autoscaler learns of the lag, for this worker and for a slow one.

    The slow one has as much less to do, and its lagThreshold is as much lower.
    """
    rows: list[Row] = []
    for rate in (worker.per_second, SLOW):
        share = rate / worker.per_second
        slower = replace(worker, per_second=rate)
        shipped = replace(Scaler(), lag_threshold=round(Scaler().lag_threshold * share))
        for name, changes in SIGHTS.items():
            scaler = replace(shipped, **changes)
            day, sale = (
                simulate(Trace(trace.name, [share * count for count in trace.arrivals]), scaler, slower)
                for trace in (daily(), flash_sale())
            )
            rows.append({
                "part": "sight", "the autoscaler": name, "worker/s": rate, "lagThreshold": shipped.lag_threshold,
                "daily p99 s": day.freshness(0.99), "sale p99 s": sale.freshness(0.99),
                "workers at most": max(day.most_workers, sale.most_workers),
            })  # fmt: skip
    return rows


# --- how much is needed ------------------------------------------------------------------------------------------

CATALOGUES: Final = (10_000_000, 100_000_000, 1_000_000_000)
DIMENSION: Final = 512
VECTORS: Final = 2
"""Dense ones of a product: image and text."""
COPIES: Final = 2
NODE_GIB: Final = 64
SHARD_POINTS: Final = 20_000_000


def plan(products: int, figures: Measured, *, quantised: bool) -> Row:
    """Return what a catalogue of that size needs: Qdrant's documentation's formula, measured rates, assumed prices."""
    plain = products * VECTORS * DIMENSION * 4
    vectors = plain * 1.5 if not quantised else plain / 4 * 1.5
    memory = (vectors + products * WORDS) * COPIES / 2**30
    disk = (plain * (1.25 if quantised else 1) + products * PAYLOAD) * 1.3 * COPIES / 2**30
    nodes = max(3, math.ceil(memory / (NODE_GIB * 0.8)))
    shards = max(math.ceil(products / SHARD_POINTS), 2 * nodes // COPIES)
    steady = products * CHANGED / DAY
    workers = max(1, math.ceil(steady * PEAK / figures.clip))
    for_a_day = math.ceil(products / DAY / figures.clip)
    partitions = next(number for number in (12, 24, 48, 96, 192, 384) if number >= max(workers, for_a_day))
    machines = {
        "Qdrant": nodes * NODE_GIB * MEMORY_MONTH + disk * DISK_MONTH,
        "workers": steady / figures.clip * 730 * MACHINE_HOUR,
        "brokers": BROKERS_MONTH * max(1, partitions / 48),
        "services": 4 * 730 * MACHINE_HOUR,
    }
    return {
        "part": "capacity", "products": products, "vectors": "int8, originals on disk" if quantised else "float32",
        "Qdrant memory GiB": round(memory), "Qdrant disk GiB": round(disk), f"nodes of {NODE_GIB} GiB": nodes,
        "shards": shards, "copies": COPIES, "partitions": partitions, "changes/s, mean": steady,
        "workers at peak": workers, "workers for all in a day": for_a_day,
        "GPU days for all": products / figures.gpu / DAY,
        **{f"US$/month {name}": round(price) for name, price in machines.items()},
        "US$/month": round(sum(machines.values())),
    }  # fmt: skip


# --- the picture -------------------------------------------------------------------------------------------------


def plot(found: Sequence[tuple[Trace, Outcome]]) -> str:
    """Return an SVG: for each trace, what waited (area, square-root scale) and how many workers there were (line)."""
    width, height, gap = 760, 120, 52
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width + 110} {len(found) * (height + gap) + 24}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    for number, (trace, one) in enumerate(found):
        top = 28 + number * (height + gap)
        lag, workers = max(one.most_lag, 1.0), max(one.most_workers, 1)
        step = width / max(1, len(one.lag) - 1)
        area = " ".join(
            f"{50 + index * step:.1f},{top + height * (1 - math.sqrt(min(1.0, value / lag))):.1f}"
            for index, value in enumerate(one.lag)
        )
        line = " ".join(
            f"{50 + index * step:.1f},{top + height * (1 - value / workers):.1f}"
            for index, value in enumerate(one.workers)
        )
        parts += [
            f'<text x="50" y="{top - 8}" font-weight="bold">{trace.name}</text>',
            f'<polygon points="50,{top + height} {area} {50 + width},{top + height}" fill="#f4b183"/>',
            f'<polyline points="{line}" fill="none" stroke="#1f4e79" stroke-width="1.5"/>',
            f'<path d="M50 {top}V{top + height}H{50 + width}" fill="none" stroke="#888888"/>',
            f'<text x="46" y="{top + 10}" text-anchor="end" fill="#c55a11">{one.most_lag:,.0f}</text>',
            f'<text x="{54 + width}" y="{top + 10}" fill="#1f4e79">{workers}</text>',
            f'<text x="50" y="{top + height + 16}">0</text>',
            f'<text x="{50 + width}" y="{top + height + 16}" text-anchor="end">{len(one.lag) / 60:.1f} h</text>',
            f'<text x="{50 + width / 2}" y="{top + height + 16}" text-anchor="middle">'
            '<tspan fill="#c55a11">events waiting</tspan> · <tspan fill="#1f4e79">workers</tspan></text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


# --- the document ------------------------------------------------------------------------------------------------

_BEGIN: Final = "<!-- figures, written by benchmarks/autoscaling.py -->\n"
_END: Final = "<!-- end of figures -->\n"
_TABLES: Final = {
    "coldstart": ("what", "median s", "least s", "most s", "starts"),
    "chosen": ("trace", "events", "most waiting", "workers at most", "worker hours", "rebalances", "p50 s", "p99 s",
               "US$/million"),
    "sweep": ("partitions", "lagThreshold", "cooldown s", "daily p99 s", "sale p99 s", "re-index h", "outage p99 s",
              "US$/million", "rebalances", "keeps the bounds"),
    "sight": ("the autoscaler", "worker/s", "lagThreshold", "daily p99 s", "sale p99 s", "workers at most"),
}  # fmt: skip


def document(text: str, results: dict[str, Any]) -> str:
    """Return docs/capacity.md with the figures of `results` in it."""
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}{_figures(results)}{_END}{after}"


def _figures(results: dict[str, Any]) -> str:
    rows, worker, chosen, rates = (results[part] for part in ("rows", "worker", "chosen", "rates"))
    shipped = Scaler()
    measured_at = "; ".join(
        f"`{name}.json` of {source['taken'][:10]}, {source['machine']['cores']} cores of {source['machine']['cpu']}"
        for name, source in results["measured elsewhere"].items()
    )
    cost = [row for row in rows if row["part"] == "capacity"]
    needs = [column for column in cost[0] if column not in ("part", "products") and not column.startswith("US$")]
    tried = [row for row in rows if row["part"] == "sweep" and row["partitions"] == chosen["partitions"]]
    parts = [
        "### What one worker does (measured)\n",
        f"{worker['per_second']:.0f} products a second: CLIP ViT-B/32, bf16, one picture of 800 px and one text each, "
        f"from their two rates in the encoder's benchmark. {rates['starter']:.0f} with the starter model through the "
        f"whole pipeline. The index took {rates['index']:,.0f} a second from a worker whose encoder costs nothing. "
        f"A GPU (H100): {rates['gpu']:.0f} pictures a second. Sources: {measured_at}.\n",
        "### From nothing to the first vector (measured)\n",
        _markdown([row for row in rows if row["part"] == "coldstart"], _TABLES["coldstart"]),
        f"The simulator adds {SCHEDULING:g} s until there is a process at all (assumed).\n",
        "### What was tried (simulated)\n",
        _markdown(tried, _TABLES["sweep"]),
        f"With {chosen['partitions']} partitions; the others are in `benchmarks/results/autoscaling.json`. The bounds "
        f"are {DAILY_BOUND:g} s on the daily curve and {SALE_BOUND:g} s in the sale, p99.\n",
        f"### Chosen (simulated): lagThreshold {chosen['lag_threshold']}, {chosen['partitions']} partitions, cool-down "
        f"{chosen['cooldown']} s\n",
        _markdown([row for row in rows if row["part"] == "chosen"], _TABLES["chosen"]),
        f"### Shipped (simulated): lagThreshold {shipped.lag_threshold}, {shipped.partitions} partitions, cool-down "
        f"{shipped.cooldown} s\n",
        _markdown([row for row in rows if row["part"] == "shipped"], _TABLES["chosen"]),
        "### What the autoscaler sees (simulated)\n",
        _markdown([row for row in rows if row["part"] == "sight"], _TABLES["sight"]),
        "With `excludePersistentLag` a partition counts only if it moved since the last look, and a worker moves one "
        f"after the other, {worker['batch']} events at a time. For the worker above, and for one of {SLOW:g}/s with as "
        "much less to do.\n",
        "### What a catalogue needs (arithmetic)\n",
        _upright(cost, needs),
        "### What it costs a month, US$ (assumed prices)\n",
        _upright(cost, [column for column in cost[0] if column.startswith("US$")]),
        "### What is assumed\n",
        "".join(f"- {what}: {value:g}\n" for what, value in results["assumed"].items()),
    ]
    return "\n" + "\n".join(parts) + "\n"


def _markdown(rows: Sequence[Row], columns: Sequence[str]) -> str:
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' + '---:|' * (len(columns) - 1)}"]
    lines += [f"| {' | '.join(_cell(row[column]) for column in columns)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _upright(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Return a table with a column for each of `rows`."""
    turned = [
        {"": column, **{f"{row['products']:,} {row['vectors']}": row[column] for row in rows}}
        for column in columns
        if column != "vectors"
    ]
    return _markdown(turned, list(turned[0]))


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}".rstrip("0").rstrip(".")
    return f"{value:,}" if isinstance(value, int) else str(value)


def main() -> None:
    """Measure the start, simulate, choose, plan, and write all of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0] if __doc__ else "")
    parser.add_argument("--only", choices=("coldstart", "simulate"))
    only = parser.parse_args().only
    own = RESULTS / "autoscaling.json"
    more = _read(own) if own.exists() else {"rows": []}
    before = more.pop("rows")
    for stale in ("taken", "machine", "commit"):
        more.pop(stale, None)
    cold = [row for row in before if row["part"] == "coldstart"]
    rest = [row for row in before if row["part"] != "coldstart"]
    if only != "simulate":
        cold = [{"part": "coldstart", **row} for row in coldstart.measure()]
        show("coldstart", cold)
        more["coldstart"] = {"taken": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit()}
        write("autoscaling", [*cold, *rest], **more)
    if only != "coldstart":
        figures = measured()
        if figures.start is None or figures.rebalance is None:
            raise SystemExit("the start of an embedder was never measured: run --only coldstart first")
        worker = Worker(figures.clip, SCHEDULING + figures.start, max(figures.rebalance, 1.0))
        tried, chosen = sweep(worker)
        simulated, found = report(worker, chosen, "chosen")
        simulated += report(worker, Scaler(), "shipped")[0] + sights(worker)
        planned = [plan(products, figures, quantised=way) for products in CATALOGUES for way in (False, True)]
        show("autoscaling: everything tried", tried)
        show("autoscaling: chosen", simulated)
        show("capacity", planned)
        rest = [*tried, *simulated, *planned]
        more |= {"chosen": asdict(chosen), "worker": asdict(worker), "assumed": ASSUMED}
        more["measured elsewhere"] = figures.sources
        more["rates"] = {"starter": figures.starter, "index": figures.index, "gpu": figures.gpu}
        PLOT.write_text(plot(found[:-1]), encoding="utf-8")
        write("autoscaling", [*cold, *rest], **more)
        DOCUMENT.write_text(document(DOCUMENT.read_text(encoding="utf-8"), _read(own)), encoding="utf-8")


if __name__ == "__main__":
    main()
