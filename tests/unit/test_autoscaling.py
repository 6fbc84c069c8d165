"""The simulator of KEDA and the group: KEDA's formula, nothing lost, more is never slower."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
import yaml
from benchmarks.autoscaling import (
    DOCUMENT,
    RESULTS,
    Scaler,
    Trace,
    Worker,
    document,
    measured,
    plan,
    plot,
    simulate,
)
from benchmarks.report import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from catalens.settings import KafkaSettings

WORKER = Worker(per_second=50, start=20, rebalance=2)
EVEN = Scaler(lag_threshold=500, polling=30, cooldown=300, excludes=False, cached=False, phase=0)
"""What KEDA has seen at once: what it sees and what not has tests of its own."""
PLAIN = replace(EVEN, even=False)


@pytest.mark.parametrize(
    ("scaler", "lag", "current", "wanted"),
    [
        (PLAIN, 0, 1, 1),
        (PLAIN, 500, 1, 1),
        (PLAIN, 549, 1, 1),  # within the tenth that the autoscaler leaves alone
        (PLAIN, 551, 1, 2),
        (PLAIN, 2400, 3, 5),
        (PLAIN, 1_000_000, 3, 12),  # a worker a partition
        (replace(PLAIN, maximum=8), 1_000_000, 3, 8),
        (EVEN, 2400, 3, 6),  # 5 do not share 12 evenly
        (EVEN, 3001, 6, 12),
        (EVEN, 501, 1, 2),
        (replace(EVEN, partitions=7), 501, 1, 7),  # of 7 there is no other divisor
    ],
)
def test_wanted_is_kedas_formula(scaler: Scaler, lag: float, current: int, wanted: int) -> None:
    assert scaler.wanted(lag, current) == wanted


@given(
    arrivals=st.lists(st.floats(0, 400), min_size=1, max_size=300),
    away=st.tuples(st.integers(0, 300), st.integers(0, 200)),
    threshold=st.sampled_from([10, 200, 1000]),
    partitions=st.sampled_from([1, 6, 12]),
    even=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_what_arrives_is_finished_or_left(
    arrivals: list[float], away: tuple[int, int], threshold: int, partitions: int, even: bool
) -> None:
    trace = Trace("any", arrivals, range(away[0], away[0] + away[1]))
    scaler = Scaler(threshold, partitions, maximum=12, even=even, cooldown=60, down_window=60)
    out = simulate(trace, scaler, WORKER)
    assert out.arrived == pytest.approx(sum(arrivals))
    assert out.finished + out.left == pytest.approx(out.arrived, abs=1e-6)
    assert sum(out.waits.values()) == pytest.approx(out.finished)
    assert out.left == pytest.approx(0, abs=1e-6)
    assert out.most_workers <= partitions
    assert out.worker_seconds * WORKER.per_second >= out.finished - 1e-6


def test_nobody_is_woken_by_nothing_and_everybody_goes_when_it_is_over() -> None:
    asleep = simulate(Trace("nothing", [0.0] * 600), EVEN, WORKER)
    assert (asleep.worker_seconds, asleep.most_workers, asleep.rebalances) == (0, 0, 0)
    woken = simulate(Trace("one", [0.0] * 100 + [1.0]), EVEN, WORKER)
    # Seen at second 120, up at 140, standing still for 2, then done; asleep 300 s after the only look with lag.
    assert dict(woken.waits) == {42: 1.0}
    assert woken.worker_seconds == pytest.approx(300)
    assert woken.rebalances == 1


def test_rounding_keeps_nobody_awake() -> None:
    out = simulate(Trace("thirds", [100 / 3 + 0.1] * 3000), EVEN, replace(WORKER, per_second=100 / 7))
    idle = next(at for at, lag in enumerate(reversed(out.lag)) if lag)
    assert idle * 60 <= EVEN.cooldown + 120
    assert out.finished == pytest.approx(out.arrived)


@pytest.mark.parametrize(
    ("rate", "cached", "phase", "wants"),
    [  # of 12 workers, as a model of KEDA's scaler partition by partition has it
        (70, True, 7, 12),
        (70, False, 1, 1),
        (70, False, 3, 3),
        (70, False, 12, 12),
        (17, True, 7, 4),
        (17, False, 1, 1),
    ],
)
def test_of_a_lag_whose_partitions_move_in_turns_only_a_part_is_seen(
    rate: float, cached: bool, phase: int, wants: int
) -> None:
    """One worker has 24,000 before it, which is work for twelve."""
    scaler = Scaler(cached=cached, phase=phase)
    waiting = Trace("backlog", [0.0] * 30 + [24_000.0] + [0.0] * 60)
    frozen = replace(scaler, up_pods=0, up_percent=0, down_window=1)  # what is wanted is what is looked at, not done
    told: list[int] = []

    class Noting(Scaler):
        def wanted(self, lag: float, current: int) -> int:
            told.append(super().wanted(lag, current))
            return told[-1]

    simulate(waiting, Noting(**asdict(frozen)), Worker(per_second=rate, start=1, rebalance=0))
    assert told[4] == wants


def test_what_stands_still_wants_nobody_and_keeps_the_one_that_is_there() -> None:
    stuck = simulate(Trace("stuck", [0.0] * 30 + [24_000.0]), Scaler(), Worker(per_second=1e-6, start=1))
    assert stuck.most_workers == 1
    assert set(stuck.workers[5:]) == {1}
    assert simulate(Trace("stuck", [24_000.0]), Scaler(excludes=False), Worker(1e-6, start=1)).most_workers == 12


def test_an_event_below_the_activation_waits_for_company() -> None:
    out = simulate(Trace("few", [1.0] * 5 + [0.0] * 200), replace(EVEN, activation=10), WORKER)
    assert out.most_workers == 0
    assert out.left == 5


def test_a_surge_wakes_in_steps_and_leaves_in_steps() -> None:
    scaler = replace(EVEN, cooldown=1500)
    out = simulate(Trace("surge", [2000.0] * 60 + [0.0] * 2400), scaler, replace(WORKER, start=5), every=15)
    steps = [(at * 15, after) for at, (before, after) in enumerate(pairwise([0, *out.workers])) if before != after]
    # Three more or three times as many a minute; half of them every three minutes; to none by KEDA alone.
    assert [count for _, count in steps] == [1, 4, 12, 6, 3, 1, 0]
    times = [at for at, _ in steps]
    assert times[:3] == [0, 15, 75]
    assert times[4] - times[3] == times[5] - times[4] == 180
    assert out.left == pytest.approx(0)


def test_while_the_broker_is_away_nothing_is_finished_and_nothing_is_lost() -> None:
    trace = Trace("away", [10.0] * 900, range(300, 600))
    out = simulate(trace, EVEN, WORKER)
    assert out.finished == pytest.approx(9000)
    assert out.freshness(1.0) >= 300
    assert out.workers[8] == 1  # who is away is not asked
    assert simulate(trace, replace(EVEN, fallback=6), WORKER).workers[8] == 6


@pytest.mark.parametrize("name", ["per_second", "partitions", "start", "rebalance"])
def test_better_is_never_slower(name: str) -> None:
    trace = Trace("surge", [0.0] * 30 + [300.0] * 600)
    waits = []
    for step in (1, 2, 4):
        worker, scaler = WORKER, replace(PLAIN, lag_threshold=200)
        if name == "partitions":
            scaler = replace(scaler, partitions=3 * step)
        elif name == "per_second":
            worker = replace(worker, per_second=25 * step)
        elif name == "start":
            worker = replace(worker, start=40 / step)
        else:
            worker = replace(worker, rebalance=8 / step)
        waits.append(simulate(trace, scaler, worker).freshness(0.99))
    assert waits == sorted(waits, reverse=True)
    assert waits[0] > waits[-1]


def test_the_plan_follows_the_formula_and_grows_with_the_catalogue() -> None:
    figures = measured()
    small, large = (plan(products, figures, quantised=False) for products in (10_000_000, 100_000_000))
    # n · d · 4 · 1.5 of two vectors, and the words, in two copies
    assert small["Qdrant memory GiB"] == round((10_000_000 * 2 * 512 * 4 * 1.5 + 10_000_000 * 600) * 2 / 2**30)
    packed = plan(10_000_000, figures, quantised=True)
    assert packed["Qdrant memory GiB"] < small["Qdrant memory GiB"] / 3
    assert packed["Qdrant disk GiB"] > small["Qdrant disk GiB"]
    for column in ("Qdrant memory GiB", "shards", "workers for all in a day", "US$/month"):
        assert small[column] < large[column]
    for row in (small, large):
        assert row["workers for all in a day"] <= row["partitions"]


def test_the_picture_is_an_svg_of_every_trace() -> None:
    trace = Trace("a trace", [10.0] * 120)
    drawn = plot([(trace, simulate(trace, EVEN, WORKER))])
    assert drawn.startswith("<svg ")
    assert drawn.rstrip().endswith("</svg>")
    assert "a trace" in drawn


def test_the_document_has_the_figures_of_the_last_run() -> None:
    results = json.loads((RESULTS / "autoscaling.json").read_text(encoding="utf-8"))
    text = DOCUMENT.read_text(encoding="utf-8")
    assert document(text, results) == text
    changed = {**results, "chosen": {**results["chosen"], "lag_threshold": 1}}
    assert document(text, changed) != text


def test_what_was_chosen_is_what_is_simulated_now() -> None:
    results = json.loads((RESULTS / "autoscaling.json").read_text(encoding="utf-8"))
    assert asdict(Scaler(**results["chosen"])) == results["chosen"]


def test_what_is_shipped_is_what_the_manifest_says() -> None:
    spec = yaml.safe_load((ROOT / "k8s" / "components" / "keda" / "scaledobject.yaml").read_text("utf-8"))["spec"]
    behaviour = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    products = next(trigger["metadata"] for trigger in spec["triggers"] if trigger["name"] == "products")
    up = {policy["type"]: policy for policy in behaviour["scaleUp"]["policies"]}
    (down,) = behaviour["scaleDown"]["policies"]
    assert Scaler() == Scaler(
        lag_threshold=int(products["lagThreshold"]),
        partitions=KafkaSettings().partitions,
        maximum=spec["maxReplicaCount"],
        activation=int(products["activationLagThreshold"]),
        even=products["ensureEvenDistributionOfPartitions"] == "true",
        polling=spec["pollingInterval"],
        excludes=products["excludePersistentLag"] == "true",
        cached=next(trigger["useCachedMetrics"] for trigger in spec["triggers"] if trigger["name"] == "products"),
        cooldown=spec["cooldownPeriod"],
        fallback=spec["fallback"]["replicas"],
        up_window=behaviour["scaleUp"]["stabilizationWindowSeconds"],
        up_pods=up["Pods"]["value"],
        up_percent=up["Percent"]["value"],
        up_seconds=up["Pods"]["periodSeconds"],
        down_window=behaviour["scaleDown"]["stabilizationWindowSeconds"],
        down_percent=down["value"],
        down_seconds=down["periodSeconds"],
    )
