"""E5: what is lost when the world is not as the scheduler was told.

Each line compares two runs on the same windows, in pairs. What they are compared with matters: a policy whose latency
model is wrong by 20% is held against one that knows the device, and the load is that of the device as it is; a policy
that does not know output lengths against one that does; the classes of the tenant that sends no more than before
against a run in which the other does not either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .figures import Estimate, difference, estimate
from .measure import Row, Rows, Task
from .plan import OURS, Plan
from .tables import percent, points, table

NO_SHARES = "benchmarks/ablations/no_shares.py"
VICTIM = "-steady"
"""How the names of the classes end that belong to the tenant that does not change."""


@dataclass(frozen=True, slots=True)
class Side:
    """A run: a scenario, what is special about it, and the policy."""

    scenario: str
    variant: tuple[tuple[str, Any], ...] = ()
    policy: str = OURS


@dataclass(frozen=True, slots=True)
class Trial:
    """``hit`` against ``plain`` at each of ``loads``, by the share ``of`` a run's requests."""

    what: str
    plain: Side
    hit: Side
    loads: Sequence[float]
    of: Callable[[Row], float]


@dataclass(frozen=True, slots=True)
class Line:
    """A trial at one load."""

    what: str
    scenario: str
    load: float
    plain: Estimate
    hit: Estimate
    points: Estimate


def _all(row: Row) -> float:
    return row.attainment


def victims(row: Row) -> float:
    """The attainment of the tenant that does not change."""
    counts = [pair for name, pair in row.classes.items() if name.endswith(VICTIM)]
    return sum(kept for _, kept in counts) / sum(count for count, _ in counts)


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "device 25% slower than the profile says, against one told so": ({"slowness": 1.25}, {"device_factor": 1.25}),
    "device 20% faster than the profile says, against one told so": ({"slowness": 0.8}, {"device_factor": 0.8}),
    "iteration times vary by 10%": ({}, {"noise": 0.1}),
    "reports 100 ms late": ({}, {"report_delay_s": 0.1}),
    "lengths unknown, against known": ({"known_lengths": True}, {}),
}
"""The plain run and the one that is hit."""


def trials(plan: Plan) -> list[Trial]:
    """All comparisons."""
    found = [
        Trial(what, Side(scenario, tuple(plain.items())), Side(scenario, tuple(hit.items())), plan.robust_loads, _all)
        for what, (plain, hit) in VARIANTS.items()
        for scenario in plan.bursty
    ]
    if plan.stress:
        shift = "the mix of classes shifts twice, against the mean mix throughout"
        abuse = "one of two tenants sends tenfold for a third of the run: the other's requests"
        found.append(Trial(shift, Side("shift-none"), Side("shift"), plan.robust_loads, _all))
        found.append(Trial(abuse, Side("abuse-none"), Side("abuse"), plan.abuse_loads, victims))
        if NO_SHARES in plan.parts:
            unfair = Side("abuse", policy=NO_SHARES)
            found.append(Trial(f"{abuse}, without fair shares", Side("abuse-none"), unfair, plan.abuse_loads, victims))
    return found


def _runs(plan: Plan, side: Side, load: float) -> list[Task]:
    return plan.runs(side.scenario, side.policy, load, **dict(side.variant))


def tasks(plan: Plan) -> list[Task]:
    """The runs."""
    return [
        task
        for trial in trials(plan)
        for load in trial.loads
        for side in (trial.plain, trial.hit)
        for task in _runs(plan, side, load)
    ]


def result(plan: Plan, rows: Rows) -> list[Line]:
    """The figures."""
    found = []
    for trial in trials(plan):
        for load in trial.loads:
            plain, hit = (
                [trial.of(rows[task]) for task in _runs(plan, side, load)] for side in (trial.plain, trial.hit)
            )
            change = difference(hit, plain)
            found.append(Line(trial.what, trial.hit.scenario, load, estimate(plain), estimate(hit), change))
    return found


def markdown(plan: Plan, found: Sequence[Line]) -> str:
    """One table."""
    heads = ["", "", "load", "plain", "hit", "change, points"]
    lines = [
        [
            line.what,
            plan.title(line.scenario),
            f"{line.load:g}",
            percent(line.plain),
            percent(line.hit),
            points(line.points),
        ]
        for line in found
    ]
    return table(heads, lines)
