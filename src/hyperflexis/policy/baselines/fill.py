"""Chunked prefill with a fixed token budget, as Sarathi-Serve (Agrawal et al., OSDI 2024) introduced it and vLLM's V1
scheduler does it: all decodes, then chunks of prompts until ``max_batch_tokens`` tokens are in the iteration.

What differs between the baselines is only the order in which prompts are served. They look at the running requests only
to count them: with nothing waiting, the plan is to let them all decode.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter

from ..step import J, StepLimits, StepPlan

ARRIVED_AT = attrgetter("arrived_at")


def most_requests(limits: StepLimits) -> int:
    """Requests that may hold KV at once: each decode takes a token of the iteration (vLLM refuses to start with more
    requests than tokens)."""
    return min(limits.max_batch, limits.max_batch_tokens)


def fill(num_running: int, order: Iterable[J], started: int, limits: StepLimits) -> StepPlan[J]:
    """The iteration in which all ``num_running`` decode and waiting requests are served in ``order``.

    ``started`` of them hold KV. The others start while there is a place in the batch and any KV left; like vLLM this
    asks for the chunk's KV, not the prompt's. ``order`` is read no further than needed.
    """
    tokens_left = limits.max_batch_tokens - num_running
    holding = num_running + started
    most = most_requests(limits)
    free = limits.kv_free_tokens
    # An empty instance starts one whatever the cache says: the Batcher makes room.
    can_start = holding < most and (free > 0 or holding == 0)
    prefills: list[tuple[J, int]] = []
    jobs = iter(order)
    while tokens_left > 0 and (started or can_start):
        job = next(jobs, None)
        if job is None:
            break
        if job.started:
            started -= 1
        elif can_start:
            holding += 1
        else:
            continue
        n = min(job.remaining_prefill, tokens_left)
        prefills.append((job, n))
        tokens_left -= n
        free -= n
        can_start = holding < most and free > 0
    return StepPlan(prefills)
