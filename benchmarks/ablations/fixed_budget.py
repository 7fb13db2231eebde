"""A fixed time budget for each iteration, whatever slack the decodes have."""

from collections.abc import Iterable

from benchmarks.ablations import altered

from hyperflexis.policy import budget, step
from hyperflexis.policy import place as placement


def iteration_s(now: float, running: Iterable[budget.Pace], decode_s: float, q90: float = 0.0) -> float:
    """In place of the budget from slack."""
    return budget.CAP_S


swapped = altered(step, budget=altered(budget, iteration_s=iteration_s))
place, plan, victim = placement.place, swapped.plan, swapped.victim
