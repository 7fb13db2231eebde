"""First come, first served with chunked prefill: what vLLM's V1 scheduler does by default (``schedule`` in
``vllm/v1/core/sched/scheduler.py``, policy ``fcfs``).

Decodes first, then prompts in arrival order, up to a token budget (``max_batch_tokens``, vLLM's
``max_num_batched_tokens``) and a number of requests (``max_num_seqs``). It looks at no deadline. When KV runs out the
latest arrival is preempted.
"""

from __future__ import annotations

from collections.abc import Collection

from ...core.latency import Coefficients
from ..running import Running
from ..step import J, StepLimits, StepPlan
from ..waiting import Waiting
from .fill import ARRIVED_AT, fill


def plan(
    now: float, waiting: Waiting[J], running: Running[J], latency: Coefficients, limits: StepLimits
) -> StepPlan[J]:
    """The next iteration; see the module's rules."""
    if not waiting:
        return StepPlan([])
    # Started prompts first, as vLLM serves its running queue before its waiting queue.
    return fill(len(running), waiting.by_arrival(), len(waiting.started), limits)


def victim(now: float, jobs: Collection[J]) -> J:
    """The latest arrival."""
    return max(jobs, key=ARRIVED_AT)
