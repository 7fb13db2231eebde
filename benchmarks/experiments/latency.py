"""E3: end-to-end times against round robin tuned for them.

Means are over *all* arrivals, late ones included; the capped mean counts no request beyond three times its promise. In
far overload a mean is mostly the queue of what was given up, so there the times are compared request by request, over
those that `hyperflexis` serves on time (a selection, and named as such), beside the capped mean over all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from .figures import Estimate, estimate, ratio
from .measure import Rows, Task
from .plan import FAR_OVERLOAD, OURS, Plan
from .tables import percent, shown, table, times


@dataclass(frozen=True, slots=True)
class Line:
    """Means over all arrivals of a scenario at a load, in seconds; ratios are ours over round robin's."""

    scenario: str
    load: float
    round_robin: str
    ours_s: Estimate
    theirs_s: Estimate
    ratio: Estimate | None
    ours_capped_s: Estimate
    theirs_capped_s: Estimate
    capped_ratio: Estimate | None


@dataclass(frozen=True, slots=True)
class Selected:
    """Means over the requests that `hyperflexis` serves on time, a ``share`` of all, in far overload."""

    scenario: str
    share: Estimate
    ours_s: Estimate
    theirs_s: Estimate
    ratio: Estimate | None


@dataclass(frozen=True, slots=True)
class Result:
    """``lines`` are over all arrivals, ``selected`` over those that ours serves on time at ``far_load``."""

    lines: list[Line]
    far_load: float
    selected: list[Selected]


def _round_robin(plan: Plan, scenario: str, load: float) -> str:
    return plan.tuned("quick_above" if load > 1.0 else "quick_below", scenario)


def tasks(plan: Plan) -> list[Task]:
    """The runs."""
    return [
        task
        for scenario in plan.scenarios
        for load in (*plan.latency_loads, FAR_OVERLOAD)
        for policy in (OURS, _round_robin(plan, scenario, load))
        for task in plan.runs(scenario, policy, load)
    ]


def result(plan: Plan, rows: Rows) -> Result:
    """The figures."""
    loads = (*plan.latency_loads, FAR_OVERLOAD)
    return Result(
        [_line(plan, rows, scenario, load) for scenario in plan.scenarios for load in loads],
        FAR_OVERLOAD,
        [_selected(plan, rows, scenario) for scenario in plan.scenarios],
    )


def _line(plan: Plan, rows: Rows, scenario: str, load: float) -> Line:
    spec = _round_robin(plan, scenario, load)
    ours, theirs = (plan.rows(rows, scenario, policy, load) for policy in (OURS, spec))
    means = [[row.mean_e2e_s for row in found] for found in (ours, theirs)]
    capped = [[row.mean_capped_e2e_s for row in found] for found in (ours, theirs)]
    return Line(
        scenario,
        load,
        spec,
        estimate(means[0]),
        estimate(means[1]),
        ratio(*means),
        estimate(capped[0]),
        estimate(capped[1]),
        ratio(*capped),
    )


def _selected(plan: Plan, rows: Rows, scenario: str) -> Selected:
    spec = _round_robin(plan, scenario, FAR_OVERLOAD)
    ours, theirs = (plan.rows(rows, scenario, policy, FAR_OVERLOAD) for policy in (OURS, spec))
    chosen = [row.on_time for row in ours]
    means = [[mean_over(r.e2e_s, c) for r, c in zip(found, chosen, strict=True)] for found in (ours, theirs)]
    return Selected(
        scenario,
        estimate([row.attainment for row in ours]),
        estimate(means[0]),
        estimate(means[1]),
        ratio(*means),
    )


def mean_over(values: Sequence[float], chosen: Sequence[bool]) -> float:
    """The mean of the chosen values; 0 when none is."""
    return fmean([value for value, of_them in zip(values, chosen, strict=True) if of_them] or [0.0])


def markdown(plan: Plan, found: Result) -> str:
    """Two tables."""
    heads = ["all arrivals", "load", "`hyperflexis`", "round robin", "ratio", "capped", "capped", "ratio"]
    lines = [
        [
            f"{plan.title(line.scenario)} (`{line.round_robin}`)",
            f"{line.load:g}",
            shown(line.ours_s, 2, unit=" s"),
            shown(line.theirs_s, 2, unit=" s"),
            times(line.ratio),
            shown(line.ours_capped_s, 2, unit=" s"),
            shown(line.theirs_capped_s, 2, unit=" s"),
            times(line.capped_ratio),
        ]
        for line in found.lines
    ]
    selected = table(
        ["requests that `hyperflexis` serves on time", "share of all", "`hyperflexis`", "round robin", "ratio"],
        [
            [
                f"{plan.title(line.scenario)}, load {found.far_load:g}",
                percent(line.share),
                shown(line.ours_s, 2, unit=" s"),
                shown(line.theirs_s, 2, unit=" s"),
                times(line.ratio),
            ]
            for line in found.selected
        ],
    )
    return f"{table(heads, lines)}\n\n{selected}"
