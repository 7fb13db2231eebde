"""The evidence for the scaler: costs by seed, the search for a baseline's settings, and runs that are found again."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from benchmarks.experiments.figures import estimate
from benchmarks.scaling.cost import Setting, cost, curves
from benchmarks.scaling.parts import verdict
from benchmarks.scaling.runs import FORESIGHT, Row, Runs, Task, Traces, measure
from benchmarks.scaling.search import LEAST, MARGINS, foresight, rank, tuned

SETTING = Setting("a", Task("scale-step.yaml", 0, 4), (2, 4, 6), (1, 2))


def row(attainment: float, instances: float) -> Row:
    return Row(attainment, instances, 1.0, 9, 100, 0, 1.0)


def known(tasks: Iterable[Task]) -> list[Row]:
    """A model of a fleet with the best concurrency at a target of 4 and down after 60 s; foresight needs 1.6."""
    found = []
    for task in tasks:
        name, _, numbers = task.scaler.partition("@")
        if name == "concurrency":
            target, up_s, down_s = map(float, numbers.split(","))
            kept = 0.99 - (0.01 if target > 4 else 0.0) - (0.01 if down_s < 60 else 0.0) - 0.001 * up_s
            found.append(row(kept, 20.0 / target + down_s / 100))
        elif name == "foresight":
            found.append(row(0.98 + 0.01 * (float(numbers) >= 1.6), float(numbers)))
        else:
            found.append(row(0.9 + 0.01 * task.first + 0.001 * task.seed, task.first))
    return found


def test_cost_is_in_percent_of_the_fixed_fleet_that_keeps_as_much_seed_by_seed() -> None:
    points = curves(known, SETTING)
    assert points[1] == [(2, pytest.approx(0.922)), (4, pytest.approx(0.942)), (6, pytest.approx(0.962))]
    found = cost(points, [0.951, 0.942], [2.5, 3.0])
    assert found.percent is not None and found.percent.by_seed == pytest.approx((50.0, 75.0))
    assert found.instances == 2.75
    assert cost(points, [0.951, 0.99], [2.5, 3.0]).percent is None  # no fleet that was tried keeps 99%


def test_a_baseline_is_tuned_to_the_cheapest_that_keeps_enough() -> None:
    assert tuned(known, SETTING, "concurrency", "2", 0.0) == "concurrency@4,0,60"
    assert rank([row(LEAST, 9.0)]) < rank([row(LEAST - 0.001, 1.0)]) < rank([row(LEAST - 0.002, 1.0)])


def test_foresight_has_the_least_margin_that_keeps_the_target() -> None:
    assert foresight(known, SETTING, 1, "2").instances == 1.6 in MARGINS


@pytest.mark.parametrize(
    ("found", "most", "said"),
    [(50.6, 50.19, "50.19: missed by 0.4"), (92.0, 93.0, "93: met"), (None, 93.0, "93: not known"), (50.0, None, "")],
)
def test_what_was_asked_for_is_said_with_how_far_it_was_missed(
    found: float | None, most: float | None, said: str
) -> None:
    assert verdict(None if found is None else estimate([found]), most) == said


def test_a_run_is_performed_once_and_found_again(tmp_path: Path) -> None:
    lengths = tmp_path / "azure2023_conv.csv"
    lengths.write_text("t,prompt_tokens,output_tokens\n0,500,20\n1,700,30\n")
    traces = Traces({"azure2023_conv.csv": lengths})
    task = Task("scale-step.yaml", 1, 2, "forecast", "2", duration_s=20.0)
    runs = Runs(traces, tmp_path / "runs.jsonl", 1)
    first = runs([task])
    again = Runs(traces, tmp_path / "runs.jsonl", 1)
    assert again([task]) == first  # with its seconds of a processor, so it was read
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 1
    lengths.write_text("t,prompt_tokens,output_tokens\n0,500,21\n1,700,30\n")
    Runs(Traces(traces.files), tmp_path / "runs.jsonl", 1)([task])
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 2  # another trace is another run


def test_only_requests_of_the_window_are_judged(tmp_path: Path) -> None:
    lengths = tmp_path / "azure2023_conv.csv"
    lengths.write_text("t,prompt_tokens,output_tokens\n0,500,20\n1,700,30\n")
    traces = Traces({"azure2023_conv.csv": lengths})
    whole = measure(traces, Task("scale-step.yaml", 1, 2, duration_s=20.0))
    part = measure(traces, Task("scale-step.yaml", 1, 2, duration_s=20.0, since_s=10.0, for_s=5.0))
    assert 0 < part.requests < whole.requests
    known_all = measure(traces, Task("scale-step.yaml", 1, 2, f"{FORESIGHT}1", "2", duration_s=20.0))
    assert known_all.requests == whole.requests and known_all.most >= 1
