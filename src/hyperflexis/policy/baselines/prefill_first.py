"""Whole prompts first: what vLLM did before chunked prefill (``_schedule_default`` in ``vllm/core/scheduler.py``, the
V0 scheduler). Orca's iteration-level batching (Yu et al., OSDI 2022) with prompts put first.

While prompts wait and fit, an iteration holds prompts alone and decodes stand still: the first token comes early, the
following ones stall. A prompt is not split; one longer than ``max_batch_tokens`` (which V0 refuses) is computed in
consecutive iterations of its own. A prompt starts only when all of its KV fits, with WATERMARK of the cache to spare.
When KV runs out the latest arrival is preempted (``first_come.victim``).
"""

from __future__ import annotations

from ...core.latency import Coefficients
from ..running import Running
from ..step import J, StepLimits, StepPlan
from ..waiting import Waiting
from .fill import most_requests

WATERMARK = 0.01
"""Share of the KV cache that starting prompts leave to decodes, so that these do not preempt at once (V0's default)."""


def plan(
    now: float, waiting: Waiting[J], running: Running[J], latency: Coefficients, limits: StepLimits
) -> StepPlan[J]:
    """The next iteration; see the module's rules."""
    if not waiting:
        return StepPlan([])
    prefills = _prompts(waiting, len(running), limits)
    if prefills:
        return StepPlan(prefills, decode=False)
    if len(running):
        return StepPlan([])
    # Nothing runs that could make room: the Batcher does, for the first.
    first = next(waiting.by_arrival())
    return StepPlan([(first, min(first.remaining_prefill, limits.max_batch_tokens))])


def _prompts(waiting: Waiting[J], num_decodes: int, limits: StepLimits) -> list[tuple[J, int]]:
    """The prompts of one iteration, none of them split unless it is alone."""
    tokens_left = limits.max_batch_tokens
    free = limits.kv_free_tokens - WATERMARK * limits.kv_capacity_tokens
    room = most_requests(limits) - num_decodes - len(waiting.started)
    chosen: list[tuple[J, int]] = []
    for job in waiting.by_arrival():
        n = min(job.remaining_prefill, limits.max_batch_tokens)
        # A prefix that is to be reused may lie in the free part of the cache, so it counts too.
        kv = job.remaining_prefill if job.started else job.computed + job.remaining_prefill
        if n > tokens_left or kv > free or not (job.started or room > 0):
            break
        chosen.append((job, n))
        tokens_left -= n
        free -= kv
        room -= not job.started
    return chosen
