"""E6: placement by prefix, on traces whose prompts begin alike: load carried and prefill saved, against the same policy
blind to prefixes. Both reuse what they find in an instance's cache; only one looks for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .figures import Bounded, Estimate, difference, estimate, knee, knee_load, knee_ratio, ratio
from .measure import Row, Rows, Task
from .plan import OURS, Plan
from .tables import bounded, percent, points, table, times


@dataclass(frozen=True, slots=True)
class Point:
    """One load: attainment, and the share of all prompt tokens that a cache brought."""

    load: float
    ours: Estimate
    blind: Estimate
    points: Estimate
    ours_reused: Estimate
    blind_reused: Estimate
    prefill_ratio: Estimate | None


@dataclass(frozen=True, slots=True)
class Line:
    """A scenario: loads with 90% on time, and the sweep."""

    scenario: str
    ours: Bounded
    blind: Bounded
    gain: Bounded
    sweep: list[Point]


def _blind(plan: Plan) -> str:
    assert plan.prefix_blind is not None
    return plan.prefix_blind


def tasks(plan: Plan) -> list[Task]:
    """The runs."""
    policies = (OURS, _blind(plan))
    return [t for s in plan.prefixes for policy in policies for t in plan.sweep(s, policy, plan.prefix_loads)]


def result(plan: Plan, rows: Rows) -> list[Line]:
    """The figures."""
    return [_line(plan, rows, scenario) for scenario in plan.prefixes]


def _line(plan: Plan, rows: Rows, scenario: str) -> Line:
    ours, blind = (knee(plan.curve(rows, scenario, p, plan.prefix_loads)) for p in (OURS, _blind(plan)))
    points = [_point(plan, rows, scenario, load) for load in plan.prefix_loads]
    return Line(scenario, knee_load(ours), knee_load(blind), knee_ratio(ours, blind), points)


def _point(plan: Plan, rows: Rows, scenario: str, load: float) -> Point:
    ours, blind = (plan.rows(rows, scenario, policy, load) for policy in (OURS, _blind(plan)))
    kept = [[row.attainment for row in found] for found in (ours, blind)]
    return Point(
        load,
        estimate(kept[0]),
        estimate(kept[1]),
        difference(*kept),
        estimate([reused(row) for row in ours]),
        estimate([reused(row) for row in blind]),
        ratio([row.prompt_tokens for row in ours], [row.prompt_tokens for row in blind]),
    )


def reused(row: Row) -> float:
    """Of the prompt tokens, the share that a cache brought."""
    return row.prefix_hit_tokens / max(row.prefix_hit_tokens + row.prompt_tokens, 1)


def markdown(plan: Plan, found: Sequence[Line]) -> str:
    """What is carried, and the sweeps."""
    carried = table(
        ["90% on time at load", "`hyperflexis`", "blind to prefixes", "ratio"],
        [
            [plan.title(line.scenario), bounded(line.ours), bounded(line.blind), bounded(line.gain, " ×")]
            for line in found
        ],
    )
    heads = ["", "load", "on time", "blind", "points", "reused", "blind", "tokens computed"]
    lines = [
        [
            plan.title(line.scenario),
            f"{point.load:g}",
            percent(point.ours),
            percent(point.blind),
            points(point.points),
            percent(point.ours_reused),
            percent(point.blind_reused),
            times(point.prefill_ratio),
        ]
        for line in found
        for point in line.sweep
    ]
    return f"{carried}\n\n{table(heads, lines)}"
