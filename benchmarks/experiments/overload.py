"""E1: attainment at a load of 1.3 against round robin with its best chunk, and the ratio by the length of the run.

A ratio in overload grows with the run: who falls behind and does not give up falls further behind. So it says little
without the length, and less without the shares themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

from .figures import Estimate, difference, estimate, ratio
from .measure import Rows, Task
from .plan import OURS, OVERLOAD, Plan
from .scenarios import SCENARIOS
from .tables import percent, points, table, times


@dataclass(frozen=True, slots=True)
class Line:
    """A scenario, in runs of ``duration_s`` seconds of arrivals."""

    scenario: str
    duration_s: float
    round_robin: str
    ours: Estimate
    theirs: Estimate
    ratio: Estimate | None
    points: Estimate


@dataclass(frozen=True, slots=True)
class Result:
    """``lines`` are runs of the usual length, ``lengths`` the first scenario with bursts at all lengths."""

    load: float
    lines: list[Line]
    lengths: list[Line]


def _duration_s(plan: Plan, scenario: str) -> float:
    return plan.duration_s or SCENARIOS[scenario].duration_s


def tasks(plan: Plan) -> list[Task]:
    """The runs."""
    pairs = [(s, _duration_s(plan, s)) for s in plan.scenarios]
    pairs += [(s, _duration_s(plan, s)) for s in plan.fast]
    pairs += [(s, length_s) for s in plan.bursty[:1] for length_s in plan.lengths_s]
    return [
        task
        for scenario, duration_s in pairs
        for policy in (OURS, plan.tuned("round_robin", scenario))
        for task in plan.runs(scenario, policy, OVERLOAD, duration_s=duration_s)
    ]


def result(plan: Plan, rows: Rows) -> Result:
    """The figures."""
    return Result(
        OVERLOAD,
        [_line(plan, rows, scenario, _duration_s(plan, scenario)) for scenario in (*plan.scenarios, *plan.fast)],
        [_line(plan, rows, scenario, length_s) for scenario in plan.bursty[:1] for length_s in plan.lengths_s],
    )


def _line(plan: Plan, rows: Rows, scenario: str, duration_s: float) -> Line:
    spec = plan.tuned("round_robin", scenario)
    ours = plan.attainment(rows, scenario, OURS, OVERLOAD, duration_s=duration_s)
    theirs = plan.attainment(rows, scenario, spec, OVERLOAD, duration_s=duration_s)
    return Line(
        scenario,
        duration_s,
        spec,
        estimate(ours),
        estimate(theirs),
        ratio(ours, theirs),
        difference(ours, theirs),
    )


def markdown(plan: Plan, found: Result) -> str:
    """Two tables."""
    heads = ["", "`hyperflexis`", "round robin", "ratio", "points"]
    lines = [[f"{plan.title(line.scenario)} (`{line.round_robin}`)", *_cells(line)] for line in found.lines]
    lengths = [[f"{plan.title(line.scenario)}, {line.duration_s:g} s", *_cells(line)] for line in found.lengths]
    return f"{table(heads, lines)}\n\nBy the length of the run:\n\n{table(heads, lengths)}"


def _cells(line: Line) -> list[str]:
    return [percent(line.ours), percent(line.theirs), times(line.ratio), points(line.points)]
