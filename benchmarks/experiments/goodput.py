"""E2: the load at which 90% of all requests are on time, against the best baseline without admission and against
admission at the door, each with its best settings; and attainment load by load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from .figures import Bounded, Estimate, difference, estimate, knee, knee_load, knee_ratio
from .measure import Rows, Task
from .picture import Panel
from .plan import OURS, Plan
from .tables import bounded, percent, points, table

PICTURE = "img/experiments-attainment.png"
"""What picture.py draws, beside the page."""
MARGIN = 0.005
"""`hyperflexis` should be no worse than the best baseline by more than this share, at any load."""


@dataclass(frozen=True, slots=True)
class Carried:
    """What one policy carries: the load with 90% of all and of every class on time, the first against ours in pairs."""

    policy: str
    overall: Bounded
    every_class: Bounded
    ours_over_it: Bounded


@dataclass(frozen=True, slots=True)
class Point:
    """One load. ``policies`` has attainment under those that were run at it, ``points`` ours less the best of the
    others."""

    load: float
    policies: Mapping[str, Estimate]
    points: Estimate | None


@dataclass(frozen=True, slots=True)
class Line:
    """A scenario; ``carried`` begins with ours."""

    scenario: str
    carried: list[Carried]
    sweep: list[Point]


def _policies(plan: Plan, scenario: str) -> dict[str, Sequence[float]]:
    """Policies and their loads, ours first."""
    best, door = plan.tuned("best", scenario), plan.tuned("door", scenario)
    return {OURS: plan.our_loads, best: plan.best_loads, door: plan.door_loads}


def tasks(plan: Plan) -> list[Task]:
    """The runs."""
    return [
        task
        for scenario in plan.scenarios
        for policy, loads in _policies(plan, scenario).items()
        for task in plan.sweep(scenario, policy, loads)
    ]


def result(plan: Plan, rows: Rows) -> list[Line]:
    """The figures."""
    return [_line(plan, rows, scenario) for scenario in plan.scenarios]


def _line(plan: Plan, rows: Rows, scenario: str) -> Line:
    policies = _policies(plan, scenario)
    knees = {p: knee(plan.curve(rows, scenario, p, loads)) for p, loads in policies.items()}
    worst = {p: knee(plan.worst_curve(rows, scenario, p, loads)) for p, loads in policies.items()}
    carried = [
        Carried(policy, knee_load(found), knee_load(worst[policy]), knee_ratio(knees[OURS], found))
        for policy, found in knees.items()
    ]
    loads = sorted({load for swept in policies.values() for load in swept})
    return Line(scenario, carried, [_point(plan, rows, scenario, load) for load in loads])


def _point(plan: Plan, rows: Rows, scenario: str, load: float) -> Point:
    kept = {
        policy: plan.attainment(rows, scenario, policy, load)
        for policy, loads in _policies(plan, scenario).items()
        if load in loads
    }
    best = max((values for policy, values in kept.items() if policy != OURS), key=fmean, default=None)
    points = None if best is None or OURS not in kept else difference(kept[OURS], best)
    return Point(load, {policy: estimate(values) for policy, values in kept.items()}, points)


def panels(plan: Plan, found: Sequence[Line]) -> list[Panel]:
    """What PICTURE shows."""
    return [
        Panel(
            plan.title(line.scenario),
            {
                c.policy: {point.load: point.policies[c.policy] for point in line.sweep if c.policy in point.policies}
                for c in line.carried
            },
            plan.yardsticks[line.scenario].fluid_load,
        )
        for line in found
    ]


def markdown(plan: Plan, found: Sequence[Line]) -> str:
    """What is carried, then a table of loads for each scenario."""
    heads = ["", "90% of all", "90% of every class", "`hyperflexis` carries"]
    lines = [
        [
            f"{plan.title(line.scenario)}: `{c.policy}`",
            bounded(c.overall),
            bounded(c.every_class),
            "" if c.policy == OURS else bounded(c.ours_over_it, " ×"),
        ]
        for line in found
        for c in line.carried
    ]
    sweeps = "\n\n".join(f"**{plan.title(line.scenario)}**\n\n{_sweep(line)}" for line in found)
    return f"{table(heads, lines)}\n\n![Attainment against load]({PICTURE})\n\n{_verdict(found)}\n\n{sweeps}"


def _sweep(line: Line) -> str:
    names = [c.policy for c in line.carried]
    return table(
        ["load", *(f"`{name}`" for name in names), "first less the better of the others, points"],
        [
            [
                f"{point.load:g}",
                *(percent(point.policies[name]) if name in point.policies else "–" for name in names),
                "–" if point.points is None else points(point.points),
            ]
            for point in line.sweep
        ],
    )


def _verdict(found: Sequence[Line]) -> str:
    compared = [point.points.mean for line in found for point in line.sweep if point.points is not None]
    worse = sum(mean < -MARGIN for mean in compared)
    return (
        f"Of {len(compared)} comparisons at one load, `hyperflexis` is worse than the better baseline by more than "
        f"{100 * MARGIN:g} points in {worse}."
    )
