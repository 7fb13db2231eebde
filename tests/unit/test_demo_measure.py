"""The demo's arithmetic: promises from idle latency, windows of a wanted load."""

from __future__ import annotations

import pytest

from hyperflexis.core.record import Record
from hyperflexis.core.slo import Slo
from hyperflexis.demo_measure import MULTIPLES, Cost, Idle, promises, sample, share_out, window_arrivals
from hyperflexis.errors import ConfigError
from hyperflexis.sim.workload import (
    LogNormal,
    Phase,
    RateArrivals,
    StatisticalLengths,
    TraceArrivals,
    TraceRow,
    Workload,
    WorkloadClass,
)

LENGTHS = StatisticalLengths(LogNormal(300, 1.0, 10, 3000), LogNormal(50, 0.8, 1, 500))
COST = Cost(prompt_s=0.0005, output_s=0.001)


def workload(cv: float = 2.0) -> Workload:
    classes = tuple(
        WorkloadClass(name, Slo(), lengths=LENGTHS, arrivals=RateArrivals(((0.0, 0.7),), cv))
        for name in ("code", "batch")
    )
    return Workload("w", 1, 25.0, None, None, classes)


def test_promises_are_the_multiples_of_the_idle_latency() -> None:
    idle = Idle({"code": 0.05, "batch": 0.4}, 0.006, {"code": (114, 43), "batch": (800, 101)})
    found = promises(idle)
    code, batch = MULTIPLES["code"], MULTIPLES["batch"]
    assert code.ttft and code.tpot and batch.e2e
    assert found["code"] == Slo(pytest.approx(0.05 * code.ttft), pytest.approx(0.006 * code.tpot))
    assert found["batch"] == Slo(e2e_s=pytest.approx(1.0 * batch.e2e))


def test_time_is_shared_out_to_prompts_and_outputs() -> None:
    # One instance, prompts of 1000 tokens take 0.5 s by the idle slope; ten requests end at 10 s: 1 s each.
    idle = Idle({"a": 0.05, "b": 0.55}, 0.005, {"a": (100, 10), "b": (1100, 10)})
    done = [
        Record(
            "a", Slo(), 0.0, 1000, 100, "finished", ttft_s=0.5 * (i + 1), e2e_s=5.0 + 0.5 * (i + 1), received_tokens=100
        )
        for i in range(10)
    ]
    cost = share_out(done, idle, instances=1, in_flight=2)
    assert cost.prompt_s == pytest.approx(0.0005)
    assert cost.output_s == pytest.approx(0.005, rel=0.1)
    # A dearer prompt than there was time for costs all of the time.
    slow = Idle({"a": 0.05, "b": 5.0}, 0.005, idle.lengths)
    assert share_out(done, slow, 1, 2).output_s == 0.0


def test_a_class_without_multiples_is_refused() -> None:
    with pytest.raises(ConfigError, match="'other'"):
        promises(Idle({"other": 0.05}, 0.006, {"other": (1, 1)}))


@pytest.mark.parametrize("seed", range(6))
def test_a_window_holds_the_wanted_work_however_bursty(seed: int) -> None:
    arrivals = window_arrivals(workload(), COST, 1.3, 2, seed)
    work_s = sum(COST.of(a) for a in arrivals)
    # Within the work of the largest request.
    assert abs(work_s - 1.3 * 2 * 25.0) < max(COST.of(a) for a in arrivals) + 1.0
    assert all(0.0 <= a.t < 25.0 for a in arrivals)
    assert arrivals == window_arrivals(workload(), COST, 1.3, 2, seed)


def test_windows_of_a_trace_begin_elsewhere() -> None:
    rows = tuple(TraceRow(float(i), 100 + i, 10) for i in range(500))
    c = WorkloadClass("c", Slo(), share=1.0)
    w = Workload("w", 1, 25.0, None, TraceArrivals("x.csv", rows), (c,))
    firsts = {window_arrivals(w, COST, 1.0, 2, seed)[0].num_prompt_tokens for seed in range(5)}
    assert len(firsts) == 5


def test_the_sample_of_the_mix_sees_its_shifts_as_windows_do() -> None:
    c = tuple(WorkloadClass(n, Slo(), share=s, lengths=LENGTHS) for n, s in (("a", 1.0), ("b", 0.0)))
    w = Workload("w", 1, 10.0, None, RateArrivals(((0.0, 20.0),)), c, (Phase(5.0, (("a", 0.0), ("b", 1.0))),))
    found = sample(w, 1)
    assert 0.45 < sum(a.slo_class == "a" for a in found) / len(found) < 0.55
