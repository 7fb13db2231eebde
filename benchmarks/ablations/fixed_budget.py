"""A fixed time budget for each iteration, whatever slack the decodes have."""

from collections.abc import Iterable

from benchmarks.ablations import altered, stepping

from hyperflexis.policy import budget, step


def iteration_s(now: float, running: Iterable[budget.Pace], decode_s: float, q90: float = 0.0) -> float:
    """In place of the budget from slack."""
    return budget.CAP_S


swapped = altered(step, budget=altered(budget, iteration_s=iteration_s))
POLICY = stepping(__name__, swapped)
