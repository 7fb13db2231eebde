"""First come, first served with chunked prefill: what vLLM's V1 scheduler does by default (``schedule`` in
``vllm/v1/core/sched/scheduler.py``, policy ``fcfs``).

Decodes first, then prompts in arrival order, up to a token budget (``max_batch_tokens``, vLLM's
``max_num_batched_tokens``) and a number of requests (``max_num_seqs``). It looks at no deadline. When KV runs out the
latest arrival is preempted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import chain

from ...core.latency import Coefficients
from ..running import Running
from ..step import J, StepLimits, StepPlan
from .fill import ARRIVED_AT, fill


def plan(
    now: float, waiting: Collection[J], running: Running[J], latency: Coefficients, limits: StepLimits
) -> StepPlan[J]:
    """The next iteration; see the module's rules."""
    if not waiting:
        return StepPlan([])
    # Started prompts first, as vLLM serves its running queue before its waiting queue.
    started = sorted([job for job in waiting if job.started], key=ARRIVED_AT)
    return fill(len(running), chain(started, _new(waiting)), len(started), limits)


def _new(waiting: Collection[J]) -> Iterator[J]:
    """Those not started, in arrival order. The queue has it, but that preempted ones come back at its end: hence the
    sort, which runs only when one of them may start."""
    yield from sorted([job for job in waiting if not job.started], key=ARRIVED_AT)


def victim(now: float, jobs: Collection[J]) -> J:
    """The latest arrival."""
    return max(jobs, key=ARRIVED_AT)
