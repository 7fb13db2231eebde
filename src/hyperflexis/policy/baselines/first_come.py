"""First come, first served with chunked prefill: the default step policy of vLLM's V1 scheduler.

Decodes first, then prompts in arrival order, up to a token budget (``max_batch_tokens``, vLLM's
``max_num_batched_tokens``) and a number of requests (``max_num_seqs``). It looks at no deadline. When KV runs out the
latest arrival is preempted.
"""

from __future__ import annotations

from collections.abc import Collection
from math import inf

from ...core.latency import Coefficients
from ..step import J, StepLimits, StepPlan


def plan(
    now: float, waiting: Collection[J], running: Collection[J], latency: Coefficients, limits: StepLimits
) -> StepPlan[J]:
    """The next iteration; see the module's rules."""
    decodes = list(running)
    tokens_left = limits.max_batch_tokens - len(decodes)
    batch = len(decodes) + sum(1 for job in waiting if job.started)
    free = limits.kv_free_tokens
    prefills: list[tuple[J, int]] = []
    # Started prompts first, as vLLM serves its running queue before its waiting queue.
    for job in sorted(waiting, key=lambda job: (not job.started, job.arrived_at)):
        if tokens_left <= 0:
            break
        if not job.started:
            if batch >= limits.max_batch or (free <= 0 and batch > 0):
                break
            batch += 1
        n = min(job.remaining_prefill, tokens_left)
        prefills.append((job, n))
        tokens_left -= n
        free -= n
    return StepPlan(decodes, prefills, inf, 0)


def victim(now: float, jobs: Collection[J]) -> J:
    """The latest arrival."""
    return max(jobs, key=lambda job: job.arrived_at)
