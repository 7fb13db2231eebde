"""Arrivals from a workload: times, mix, lengths, phases, traces."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, pstdev

import pytest

import hyperflexis
from hyperflexis.core.slo import Slo
from hyperflexis.errors import ConfigError
from hyperflexis.sim.workload import (
    Arrival,
    LogNormal,
    Phase,
    RateArrivals,
    StatisticalLengths,
    TableLengths,
    TraceArrivals,
    TraceRow,
    Workload,
    WorkloadClass,
    generate,
    scaled,
    with_slos,
)

SHORT = StatisticalLengths(LogNormal(100, 0.5), LogNormal(20, 0.5))
LONG = StatisticalLengths(LogNormal(1000, 0.5, 500, 4000), LogNormal(200, 0.5))
CHAT = WorkloadClass("chat", Slo(1.0, 0.05), share=0.75, priority=2.0, lengths=SHORT)
BATCH = WorkloadClass("batch", Slo(e2e_s=60.0), share=0.25, lengths=LONG)


def workload(
    arrivals: RateArrivals | TraceArrivals | None, *classes: WorkloadClass, duration_s: float = 100.0
) -> Workload:
    return Workload("w", 7, duration_s, None, arrivals, classes or (CHAT, BATCH))


def rate(rps: float, cv: float = 1.0) -> RateArrivals:
    return RateArrivals(((0.0, rps),), cv)


def dispersion(arrivals: list[Arrival], window_s: float, duration_s: float) -> float:
    counts = Counter(int(a.t / window_s) for a in arrivals)
    values = [counts[i] for i in range(int(duration_s / window_s))]
    return pstdev(values) ** 2 / mean(values)


def test_rate_mix_and_promises() -> None:
    found = generate(workload(rate(50.0), duration_s=200.0))
    assert 9_500 < len(found) < 10_500
    assert all(0.0 <= a.t < 200.0 for a in found) and all(a.t <= b.t for a, b in pairwise(found))
    counts = Counter(a.slo_class for a in found)
    assert 0.73 < counts["chat"] / len(found) < 0.77
    assert {(a.slo, a.priority) for a in found if a.slo_class == "chat"} == {(CHAT.slo, 2.0)}
    assert 90 < median(a.num_prompt_tokens for a in found if a.slo_class == "chat") < 110
    assert 900 < median(a.num_prompt_tokens for a in found if a.slo_class == "batch") < 1100


def test_burstiness_follows_cv() -> None:
    for cv, low, high in ((0.2, 0.0, 0.3), (1.0, 0.75, 1.3), (3.0, 4.0, 14.0)):
        found = generate(workload(rate(20.0, cv), duration_s=2000.0))
        assert 19.0 < len(found) / 2000.0 < 21.0
        assert low < dispersion(found, 5.0, 2000.0) < high, cv


def test_steps_change_the_rate_at_their_seconds() -> None:
    found = generate(workload(RateArrivals(((0.0, 10.0), (50.0, 0.0), (60.0, 100.0)))))
    counts = [sum(low <= a.t < high for a in found) for low, high in ((0, 50), (50, 60), (60, 100))]
    assert 420 < counts[0] < 580 and counts[1] == 0 and 3_800 < counts[2] < 4_200


def test_changing_the_rate_keeps_classes_and_lengths() -> None:
    slow, fast = generate(workload(rate(5.0))), generate(scaled(workload(rate(5.0)), 2.0))
    assert len(fast) > 1.7 * len(slow)
    for a, b in zip(slow, fast, strict=False):
        assert (a.slo_class, a.num_prompt_tokens, a.num_output_tokens) == (
            b.slo_class,
            b.num_prompt_tokens,
            b.num_output_tokens,
        )
        assert b.t == pytest.approx(a.t / 2.0)


def test_seeds() -> None:
    w = workload(rate(5.0))
    assert generate(w) == generate(w, 7) != generate(w, 8)


def test_the_same_list_whatever_the_hash_seed() -> None:
    code = (
        "from hyperflexis.sim.workload import *; from hyperflexis.core.slo import Slo\n"
        "l = StatisticalLengths(LogNormal(100, 0.5), LogNormal(20, 0.5))\n"
        "c = tuple(WorkloadClass(n, Slo(), share=1, lengths=l) for n in 'abc')\n"
        "print(generate(Workload('w', 1, 5.0, None, RateArrivals(((0.0, 20.0),)), c)))"
    )
    root = str(Path(hyperflexis.__file__).parents[1])
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": root, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1 and len(outputs.pop()) > 1000


def test_generation_leaves_the_global_random_alone() -> None:
    random.seed(1)
    before = random.getstate()
    generate(workload(rate(5.0, 2.0)))
    assert random.getstate() == before


def test_own_arrivals_tenant_and_model() -> None:
    own = WorkloadClass("own", Slo(), lengths=SHORT, arrivals=rate(40.0), tenant="t", model="m")
    found = generate(workload(rate(10.0), CHAT, own))
    counts = Counter(a.slo_class for a in found)
    assert 3 < counts["own"] / counts["chat"] < 5
    assert {(a.tenant, a.model) for a in found if a.slo_class == "own"} == {("t", "m")}
    # A class's own arrivals do not depend on the others.
    alone = generate(workload(None, own))
    assert [a.t for a in alone] == [a.t for a in found if a.slo_class == "own"]


def test_phases_shift_the_mix() -> None:
    w = workload(rate(100.0))
    w = Workload(w.name, w.seed, w.duration_s, None, w.arrivals, w.classes, (Phase(50.0, (("chat", 0.0),)),))
    found = generate(w)
    assert {a.slo_class for a in found if a.t >= 50.0} == {"batch"}
    assert {a.slo_class for a in found if a.t < 50.0} == {"chat", "batch"}


def test_max_context_caps_prompt_and_output() -> None:
    rows = (TraceRow(0.0, 5000, 100), TraceRow(0.0, 100, 5000), TraceRow(0.0, 5000, 5000), TraceRow(0.0, 10, 10))
    c = WorkloadClass("c", Slo(), share=1.0, lengths=TableLengths("x.csv", rows))
    found = generate(Workload("w", 1, 100.0, 1000, rate(10.0), (c,)))
    assert {(a.num_prompt_tokens, a.num_output_tokens) for a in found} == {(900, 100), (100, 900), (500, 500), (10, 10)}


TRACE = tuple(TraceRow(float(t), 600 + t, 5 + t, (1, t + 2), f"s{t}") for t in range(10))


def replay(**options: float) -> list[Arrival]:
    c = WorkloadClass("c", Slo(), share=1.0)
    return generate(workload(TraceArrivals("x.csv", TRACE, **options), c, duration_s=25.0))  # type: ignore[arg-type]


def test_a_trace_is_replayed_and_wraps_round_with_other_prefixes() -> None:
    found = replay()
    assert [a.t for a in found] == pytest.approx(list(range(25)))
    assert [a.num_output_tokens for a in found] == [5 + t % 10 for t in range(25)]
    assert found[3].hash_ids == (1, 5) and found[3].session == "s3"
    assert not set(found[3].hash_ids) & set(found[13].hash_ids)
    assert found[13].session not in ("", "s3")
    # Prefixes shared within a round stay shared in the next.
    assert found[11].hash_ids[0] == found[12].hash_ids[0]


def test_a_trace_starts_late_and_is_compressed() -> None:
    found = replay(start_s=4.0, rate_scale=2.0)
    assert [a.t for a in found[:4]] == pytest.approx([0.0, 0.5, 1.0, 1.5])
    assert found[0].num_output_tokens == 9 and len(found) == 50


def test_copies_are_jittered_and_share_no_prefixes() -> None:
    found = replay(copies=3, jitter_s=0.5)
    assert 70 <= len(found) <= 75
    first = [a for a in found if a.num_output_tokens == 5 and a.t < 1.0]
    assert len({a.t for a in first}) == 3 and all(0.0 <= a.t < 0.5 for a in first)
    assert len({a.hash_ids for a in first}) == 3


def test_hash_ids_are_cut_with_the_prompt() -> None:
    c = WorkloadClass("c", Slo(), share=1.0)
    found = generate(Workload("w", 1, 10.0, 500, TraceArrivals("x.csv", TRACE), (c,)))
    assert all(len(a.hash_ids) == 1 for a in found)


def test_log_normal_is_cut_not_clipped() -> None:
    cut = LogNormal(1000, 1.5, 16, 512)
    values = [cut.quantile(i / 1000) for i in range(1001)]
    assert min(values) == 16 and max(values) == 512
    assert sum(v == 512 for v in values) < 10
    assert LogNormal(7, 0.0).quantile(0.3) == 7


def test_too_many_arrivals_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="lower the rate"):
        generate(workload(rate(1e6), duration_s=1e6))
    with pytest.raises(ConfigError, match="lower rate_scale"):
        generate(workload(TraceArrivals("x.csv", TRACE, rate_scale=1e9), WorkloadClass("c", Slo(), share=1.0)))


def test_scaling_refuses_nonsense() -> None:
    for factor in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="positive"):
            scaled(workload(rate(1.0)), factor)


def test_promises_can_be_replaced() -> None:
    w = with_slos(workload(rate(1.0)), {"chat": Slo(0.1)})
    assert w.classes[0].slo == Slo(0.1) and w.classes[1].slo == BATCH.slo
