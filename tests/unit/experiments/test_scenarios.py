"""Windows of traces, and what loads refer to."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from benchmarks.experiments.scenarios import (
    SCENARIOS,
    TUNING_SHARE,
    WITHOUT_TRACES,
    WORKLOADS,
    Windows,
    csv_names,
    find_traces,
    part_of,
    slower,
    windowed,
    without_phases,
    without_steps,
)
from hypothesis import given
from hypothesis import strategies as st

from hyperflexis.core.slo import Slo
from hyperflexis.engines.profiles import load_profile
from hyperflexis.errors import ConfigError
from hyperflexis.sim.workload import (
    Phase,
    RateArrivals,
    TableLengths,
    TraceArrivals,
    TraceRow,
    Workload,
    WorkloadClass,
    generate,
)

ROWS = tuple(TraceRow(t, 100 + int(t), 10) for t in (0.0, 1.0, 1.5, 4.0, 7.0, 7.5, 8.0, 12.0, 13.0, 20.0))
LENGTHS = TableLengths("lengths.csv", (TraceRow(0.0, 100, 10),))


def played(source: TraceArrivals, duration_s: float) -> list[TraceRow]:
    workload = Workload("w", 1, duration_s, None, source, (WorkloadClass("all", Slo(1.0), 1.0),))
    return [TraceRow(a.t, a.num_prompt_tokens, a.num_output_tokens) for a in generate(workload)]


@given(st.integers(0, 1000), st.integers(1, 60), st.floats(0.5, 50.0), st.sampled_from([1, 101]))
def test_a_window_holds_exactly_its_requests_and_only_those_of_its_part(
    draw: int, count: int, duration_s: float, seed: int
) -> None:
    source = windowed(TraceArrivals("t.csv", ROWS), part_of(seed), Random(draw), count, duration_s)
    found = played(source, duration_s)
    assert len(found) == count
    tuning = {row.num_prompt_tokens for row in ROWS if row.t < TUNING_SHARE * ROWS[-1].t}
    assert {row.num_prompt_tokens for row in found} <= (
        tuning if seed >= 101 else {row.num_prompt_tokens for row in ROWS} - tuning
    )


def test_windows_of_seeds_begin_at_different_places() -> None:
    starts = {windowed(TraceArrivals("t.csv", ROWS), (0.0, 1.0), Random(seed), 5, 10.0).start_s for seed in range(5)}
    assert len(starts) == 5


def test_the_mean_mix_of_phases() -> None:
    classes = tuple(WorkloadClass(name, Slo(1.0), share, lengths=LENGTHS) for name, share in (("a", 3.0), ("b", 1.0)))
    workload = Workload("w", 1, 100.0, None, RateArrivals(((0.0, 10.0),)), classes, (Phase(75.0, (("a", 0.0),)),))
    mean = without_phases(workload)
    assert not mean.phases
    assert {c.name: c.share for c in mean.classes} == pytest.approx({"a": 0.75 * 0.75, "b": 0.75 * 0.25 + 0.25})


def test_without_steps_a_class_stays_at_its_first_rate() -> None:
    steps = RateArrivals(((0.0, 2.0), (10.0, 20.0)))
    workload = Workload("w", 1, 50.0, None, None, (WorkloadClass("a", Slo(1.0), lengths=LENGTHS, arrivals=steps),))
    assert without_steps(workload).classes[0].arrivals == replace(steps, steps=((0.0, 2.0),))


@pytest.mark.parametrize("name", ["ascend-910b3", "h100-llama-3.1-8b"])
@pytest.mark.parametrize("shape", [(0, 0.0, 1, 500), (0, 0.0, 100, 90_000), (2048, 2e6, 0, 0), (700, 3e5, 60, 40_000)])
def test_a_slower_device_takes_longer_for_everything(name: str, shape: tuple[int, float, int, int]) -> None:
    profile = load_profile(name)
    assert slower(profile, 1.25).iteration_s(*shape) == pytest.approx(1.25 * profile.iteration_s(*shape))
    assert slower(profile, 1.25).coefficients.predict(*shape) == pytest.approx(
        1.25 * profile.coefficients.predict(*shape)
    )


def test_a_load_is_a_rate_over_the_capacity_of_the_device_as_it_is() -> None:
    windows, name = Windows({}), WITHOUT_TRACES[0]
    yardstick = windows.yardstick(name)
    found = len(windows.arrivals(name, 1.0, 1, 300.0)) / 300.0
    assert found == pytest.approx(yardstick.capacity_rps, rel=0.05)
    assert windows.yardstick(name, 2.0).capacity_rps < 0.6 * yardstick.capacity_rps


@pytest.fixture
def windows(tmp_path: Path) -> Windows:
    random = Random(1)
    for csv in set().union(*(csv_names(scenario.workload) for scenario in SCENARIOS.values())):
        times = sorted(random.uniform(0.0, 1800.0) for _ in range(400))
        lines = "".join(f"{t},{random.randint(50, 900)},{random.randint(5, 90)},\n" for t in times)
        (tmp_path / csv.replace(".csv", "_h1.csv")).write_text(f"t,prompt_tokens,output_tokens,hash_ids\n{lines}")
    return Windows(find_traces(tmp_path))


def test_a_trace_s_classes_keep_their_mix_in_every_window(windows: Windows) -> None:
    mixes = []
    for load, seed in ((0.5, 1), (0.5, 2), (0.5, 101)):
        arrivals = windows.arrivals("ascend-azure", load, seed, 20.0)
        mixes.append(Counter(arrival.slo_class for arrival in arrivals))
    assert mixes[0] == mixes[1] == mixes[2]
    chats = mixes[0]["chat"] / 0.5 * 600.0 / 20.0  # at load 1 in a run of the usual length
    assert windows.laps("ascend-azure")["chat"] == pytest.approx(chats / (0.6 * 400), rel=0.1)
    assert windows.arrivals("ascend-azure", 0.5, 1, 20.0) != windows.arrivals("ascend-azure", 0.5, 2, 20.0)


@pytest.mark.parametrize("duration_s", [30.0, 60.0])
def test_a_short_run_shifts_as_a_long_one_does(windows: Windows, duration_s: float) -> None:
    arrivals = windows.arrivals("split-shift", 1.0, 1, duration_s)
    first = Counter(arrival.slo_class for arrival in arrivals if arrival.t < duration_s / 2)
    second = Counter(arrival.slo_class for arrival in arrivals if arrival.t >= duration_s / 2)
    assert first["code"] > 5 * first["chat"] > 0
    assert set(second) == {"chat"}


def test_a_short_run_sees_the_steps_of_a_long_one(windows: Windows) -> None:
    sent = [a.t for a in windows.arrivals("abuse", 1.0, 1, 60.0) if a.slo_class == "batch-abuser"]
    assert sum(20.0 <= t < 40.0 for t in sent) > sum(not 20.0 <= t < 40.0 for t in sent)


def test_a_missing_trace_is_named(tmp_path: Path) -> None:
    (tmp_path / "bwb.csv").write_text("")
    with pytest.raises(ConfigError, match=r"azure2023_code\.csv"):
        find_traces(tmp_path)


def test_every_workload_is_there() -> None:
    for scenario in SCENARIOS.values():
        assert (WORKLOADS / scenario.workload).is_file()
        assert scenario.yardstick is None or scenario.yardstick in SCENARIOS
    assert csv_names("mixed-ascend.yaml") == {
        "azure2023_conv.csv",
        "azure2023_code.csv",
        "arxiv_summarization.csv",
        "bwb.csv",
    }
