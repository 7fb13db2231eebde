"""Decodes ahead of their pace do not lend their lead: every step is as short as the tightest pace."""

from collections.abc import Iterable

from benchmarks.ablations import altered, stepping

from hyperflexis.policy import budget, step


def iteration_s(now: float, running: Iterable[budget.Pace], decode_s: float, q90: float = 0.0) -> float:
    """In place of the budget from slack."""
    paces = [job.pace_s for job in running if not budget.is_lost(job, now, decode_s)]
    return min([budget.CAP_S, *paces])


swapped = altered(step, budget=altered(budget, iteration_s=iteration_s))
POLICY = stepping(__name__, swapped)
