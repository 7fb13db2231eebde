"""E4: how much is left at the knee: against the optimum of the shedding fluid, with each class on instances of its own
and with all on all, and against the same policy that is told every request's true length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .figures import Bounded, knee, knee_load, knee_ratio
from .measure import Rows, Task
from .plan import OURS, Plan
from .tables import bounded, shown, table


@dataclass(frozen=True, slots=True)
class Line:
    """A scenario's loads with 90% on time."""

    scenario: str
    fluid: float
    mixed_fluid: float
    ours: Bounded
    known: Bounded
    known_over_ours: Bounded


def tasks(plan: Plan) -> list[Task]:
    """The runs."""
    return [
        task
        for scenario in plan.scenarios
        for loads, known in ((plan.our_loads, {}), (plan.known_loads, {"known_lengths": True}))
        for task in plan.sweep(scenario, OURS, loads, **known)
    ]


def result(plan: Plan, rows: Rows) -> list[Line]:
    """The figures."""
    return [_line(plan, rows, scenario) for scenario in plan.scenarios]


def _line(plan: Plan, rows: Rows, scenario: str) -> Line:
    ours = knee(plan.curve(rows, scenario, OURS, plan.our_loads))
    known = knee(plan.curve(rows, scenario, OURS, plan.known_loads, known_lengths=True))
    yardstick = plan.yardsticks[scenario]
    return Line(
        scenario,
        yardstick.fluid_load,
        yardstick.mixed_fluid_load,
        knee_load(ours),
        knee_load(known),
        knee_ratio(known, ours),
    )


def markdown(plan: Plan, found: Sequence[Line]) -> str:
    """One table."""
    fluids = ["shedding fluid", "share of it", "mixed fluid", "share of it"]
    heads = ["", "`hyperflexis`", *fluids, "told true lengths", "gain"]
    return table(
        heads,
        [
            [
                plan.title(line.scenario),
                bounded(line.ours),
                f"{line.fluid:.2f}",
                shown(line.ours.value, 1, 100.0 / line.fluid, "%", line.ours.sign),
                f"{line.mixed_fluid:.2f}",
                shown(line.ours.value, 1, 100.0 / line.mixed_fluid, "%", line.ours.sign),
                bounded(line.known),
                bounded(line.known_over_ours, " ×"),
            ]
            for line in found
        ],
    )
