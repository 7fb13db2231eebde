"""From rows to choices, results and pages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from benchmarks.experiments import goodput, optimum, overload, robustness, split, tune
from benchmarks.experiments.__main__ import EXPERIMENTS, FULL, QUICK, chosen, extrapolated, playable
from benchmarks.experiments.figures import Bounded, Estimate
from benchmarks.experiments.measure import ROOT, Row, Rows, Task
from benchmarks.experiments.pages import SECTIONS
from benchmarks.experiments.plan import OURS, Plan
from benchmarks.experiments.scenarios import Yardstick
from benchmarks.experiments.tables import bounded, percent, points, replaced, table, times

from hyperflexis.errors import ConfigError

SCENARIO = "ascend-azure"
PLAN = Plan(
    scenarios=(SCENARIO,),
    bursty=(SCENARIO,),
    fast=(),
    best_loads=(0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1),
    door_loads=(0.5, 0.7, 0.9, 1.0, 1.1, 1.2, 1.3, 1.5),
    known_loads=(1.0, 1.2, 1.4, 1.6),
    seeds=(1, 2),
    tuning_seeds=(101,),
    chunks=(512, 1024),
    margins=(0.9, 1.1),
    choices={
        "round_robin": {SCENARIO: "round_robin@512"},
        "quick_below": {SCENARIO: "round_robin@512"},
        "quick_above": {SCENARIO: "round_robin@1024"},
        "best": {SCENARIO: "edf@1024"},
        "door": {SCENARIO: "reject_at_door@512,1.1"},
    },
    yardsticks={SCENARIO: Yardstick(34.0, 30.0, {}, 1.4, 1.2)},
)


def row(attainment: float, e2e_s: float = 5.0) -> Row:
    kept = round(1000 * attainment)
    return Row(attainment, {"chat": (1000, kept)}, e2e_s, e2e_s, 0, 0, 100, 0, 0.0, 1.0, [], [])


def rows_of(tasks: list[Task], attainment: Callable[[Task], float]) -> Rows:
    return {task: row(attainment(task)) for task in tasks}


def test_the_best_setting_is_chosen_for_each_purpose() -> None:
    def found(task: Task) -> Row:
        name, _, numbers = task.policy.partition("@")
        chunk = numbers.partition(",")[0]
        # edf is best; round robin keeps more with 512 in overload, and is quicker with 1,024.
        attainment = 0.5 + 0.3 * (name == "edf") + 0.1 * (chunk == "512") + 0.05 * numbers.endswith("1.1")
        return row(attainment, 3.0 if chunk == "1024" else 4.0)

    rows = {task: found(task) for task in tune.tasks(PLAN)}
    choices = tune.choose(tune.scores(PLAN, rows))
    assert {purpose: by_scenario[SCENARIO] for purpose, by_scenario in choices.items()} == {
        "best": "edf@512",
        "round_robin": "round_robin@512",
        "quick_below": "round_robin@1024",
        "quick_above": "round_robin@1024",
        "door": "reject_at_door@512,1.1",
    }
    page = tune.markdown(PLAN, tune.result(replace(PLAN, choices=choices), rows))
    assert "| `reject_at_door`, margin 1.1 | % on time, loads 0.8 and 1.2 | **65.0** | 55.0 |" in page


def test_tuning_sees_other_seeds_than_what_is_reported() -> None:
    reported = {task.seed for name in ("e1", "e2", "e3", "e4", "e5") for task in EXPERIMENTS[name].tasks(PLAN)}
    assert not reported & {task.seed for task in tune.tasks(PLAN)}
    assert min(FULL.tuning_seeds) > 100 > max(FULL.seeds)


def test_overload_has_ratio_and_points() -> None:
    rows = rows_of(overload.tasks(PLAN), lambda task: 0.9 if task.policy == OURS else 0.3)
    line = overload.result(PLAN, rows).lines[0]
    assert line.ratio is not None and line.ratio.mean == pytest.approx(3.0)
    assert line.points.mean == pytest.approx(0.6)
    assert "3.00 × (3.00 to 3.00) | +60.0 (60.0 to 60.0)" in overload.markdown(PLAN, overload.result(PLAN, rows))


def test_goodput_compares_with_the_better_baseline_at_each_load() -> None:
    def attainment(task: Task) -> float:
        match task.policy:
            case "hyperflexis":
                return 1.0 - 0.1 * task.load  # 90% at 1.0
            case "edf@1024":
                return 1.0 - 0.2 * task.load  # 90% at 0.5
            case _:
                return 0.905  # 90% at the end of its sweep, 1.5, and beyond

    rows = rows_of(goodput.tasks(PLAN), attainment)
    (line,) = goodput.result(PLAN, rows)
    ours, edf, door = line.carried
    assert ours.overall.value is not None and ours.overall.value.mean == pytest.approx(1.0)
    assert edf.ours_over_it.value is not None and edf.ours_over_it.value.mean == pytest.approx(2.0)
    assert door.overall.sign == "≥" and door.ours_over_it.sign == "≤"
    by_load = {point.load: point for point in line.sweep}
    compared = by_load[1.1].points
    assert compared is not None and compared.mean == pytest.approx(0.89 - 0.905)
    assert by_load[0.3].points is None and set(by_load[0.3].policies) == {"edf@1024"}
    assert "by more than 0.5 points in 4." in goodput.markdown(PLAN, [line])  # at 1.1, 1.2, 1.3, and 1.0 is equal


def test_what_is_left_is_a_share_of_the_fluid() -> None:
    rows = rows_of(optimum.tasks(PLAN), lambda task: 1.0 - (0.08 if task.known_lengths else 0.1) * task.load)
    text = optimum.markdown(PLAN, optimum.result(PLAN, rows))
    assert "| 1.00 (1.00 to 1.00) | 1.40 | 71.4% (71.4 to 71.4) | 1.20 | 83.3% (83.3 to 83.3) |" in text
    assert "| 1.25 (1.25 to 1.25) | 1.25 ×" in text


def test_a_wrong_model_is_held_against_a_right_one_on_the_same_device() -> None:
    trial = next(trial for trial in robustness.trials(PLAN) if "slower" in trial.what)
    assert (dict(trial.plain.variant), dict(trial.hit.variant)) == ({"slowness": 1.25}, {"device_factor": 1.25})
    rows = rows_of(robustness.tasks(replace(PLAN, stress=False)), lambda task: 0.9 - 0.2 * (task.device_factor > 1.0))
    lines = robustness.result(replace(PLAN, stress=False), rows)
    assert {round(line.points.mean, 3) for line in lines if "slower" in line.what} == {-0.2}
    assert {round(line.points.mean, 3) for line in lines if "noise" in line.what or "vary" in line.what} == {0.0}


def test_the_estimate_counts_every_run_that_there_may_be() -> None:
    unchosen = replace(PLAN, choices=tune.unchosen(PLAN))
    for experiment in ("e1", "e2", "e3"):
        assert len(set(EXPERIMENTS[experiment].tasks(unchosen))) >= len(set(EXPERIMENTS[experiment].tasks(PLAN)))


def test_what_is_extrapolated_is_said() -> None:
    tasks = PLAN.runs(SCENARIO, OURS, 1.0)
    rows = {task: replace(row(0.9), outside_share=share) for task, share in zip(tasks, (0.02, 0.4), strict=True)}
    assert "`ascend-910b3` 2 to 40%" in extrapolated(rows)


def test_an_unknown_experiment_is_named() -> None:
    assert chosen("e3,e1") == ["e3", "e1"] and chosen(None) == list(EXPERIMENTS)
    with pytest.raises(ConfigError, match="'e10'; there are e1, "):
        chosen("e1,e10")


def test_what_cannot_be_played_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert playable(["e2", "e6"], replace(FULL, prefix_blind=None)) == ["e2"]
    assert "e6 is left out" in capsys.readouterr().out


def test_quick_plans_have_the_loads_that_experiments_share() -> None:
    for plan in (FULL, QUICK):
        assert set(plan.latency_loads) <= set(plan.our_loads)


def test_figures_in_tables() -> None:
    assert percent(Estimate(0.912, (0.9, 0.92), ())) == "91.2% (90.0 to 92.0)"
    assert points(Estimate(-0.0123, (-0.02, 0.001), ())) == "−1.2 (−2.0 to 0.1)"
    assert times(Estimate(2.0, None, ())) == "2.00 ×" and times(None) == "–"
    assert bounded(Bounded(Estimate(1.5, None, ()), "≥"), " ×") == "≥1.50 ×" and bounded(Bounded(None)) == "–"
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |"


def test_generated_sections_are_written_anew_and_nothing_else() -> None:
    page = "top\n<!-- generated: e1 -->\nold\n<!-- /generated -->\nend"
    assert replaced(page, {"e1": "new"}) == "top\n<!-- generated: e1 -->\nnew\n<!-- /generated -->\nend"
    with pytest.raises(ValueError, match="no section 'e2'"):
        replaced(page, {"e2": "new"})


def test_the_page_has_a_section_for_everything_that_is_measured() -> None:
    page = (ROOT / "docs" / "experiments.md").read_text()
    assert set(SECTIONS) == {"targets", "setting", "tuning", *EXPERIMENTS}
    for section in SECTIONS:
        assert page.count(f"<!-- generated: {section} -->") == 1


def test_a_split_is_chosen_on_tuning_windows_and_auto_is_held_against_the_best_of_ours() -> None:
    plan = replace(PLAN, split=("split-code",), split_loads=(1.0,), split_chunks=(1024,), seeds=(1, 2))
    rows: dict[Task, Row] = {}
    for task in split.tuning(plan):
        assert task.seed in plan.tuning_seeds
        good = task.mode == "static:5" if task.policy == OURS else (task.policy, task.mode) == ("edf@1024", "static:3")
        rows[task] = row(0.9 if good else 0.5)
    plan = replace(plan, splits=split.choose(plan, rows))
    assert plan.splits == {"split-code": ("static:5", "edf@1024", "static:3")}
    kept = {"auto": 0.95, "convertible": 0.9, "colocated": 0.8, "static:5": 0.97, "static:3": 0.6}
    rows |= {task: replace(row(kept[task.mode]), handoffs=7, exposed_s=0.002) for task in split.tasks(plan)}
    (line,) = split.result(plan, rows)
    assert line.sweep[0].behind.mean == pytest.approx(-0.02)
    assert line.sweep[0].kept["baseline"].mean == pytest.approx(0.6)
    assert (line.sweep[0].handoffs, line.sweep[0].exposed_ms) == (7.0, pytest.approx(2.0))
    assert "(static:5)" in split.markdown(plan, [line])
