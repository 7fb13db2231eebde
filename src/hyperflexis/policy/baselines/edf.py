"""Earliest deadline first with chunked prefill and a fixed token budget.

Optimal on one machine as long as everything can be on time (Liu and Layland, 1973); past that point it serves first
what is lost already, and all become late together. llm-d's router orders its queue so
(``slo-deadline-ordering-policy``: arrival + ``x-llm-d-slo-ttft-ms``), and SLO-aware forks of engines do within one.

A half-computed prompt waits for one that is due earlier. When KV runs out the latest arrival is preempted
(``first_come.victim``): by deadline, two requests could preempt each other for ever.
"""

from __future__ import annotations

from ...core.latency import Coefficients
from ..running import Running
from ..step import J, StepLimits, StepPlan
from ..waiting import Waiting
from .fill import fill


def plan(
    now: float, waiting: Waiting[J], running: Running[J], latency: Coefficients, limits: StepLimits
) -> StepPlan[J]:
    """The next iteration; see the module's rules. Among equal deadlines the queue's order holds."""
    if not waiting:
        return StepPlan([])
    return fill(len(running), waiting.by_deadline(), len(waiting.started), limits)
