"""Admission at the door: what would be late is refused on arrival, what is admitted is served earliest deadline first.

Mooncake, which serves Kimi, refuses at arrival (Qin et al., FAST 2025, algorithm 1): it estimates the TTFT on each
instance, takes the least, and answers 429 when that or the time between tokens is beyond the SLO. SCORPIO (arXiv
2505.23022) refuses the unattainable in front of a queue in deadline order. A request is admitted where

    margin x its TTFT <= promised      its prompt behind those due earlier, in iterations of the fixed chunk
    margin x a step <= every pace      one that decodes with it aboard; its own pace and the tightest one there
    none admitted before becomes late  by the same measure

``margin`` above 1 leaves room for what the prediction cannot know: who comes later and is due earlier.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

from ...core.cluster import TrackedInstance, TrackedRequest
from ..place import PlaceMemory, Placement, load_s

_FIRST_DUE = attrgetter("first_due")


def reject_at_door(
    now: float,
    tracked: TrackedRequest,
    ready: Sequence[TrackedInstance],
    memory: PlaceMemory,
    margin: float = 1.0,
) -> tuple[Placement, PlaceMemory]:
    """The instance with the earliest predicted first token among those that can admit the request, else among all.

    ``on_time`` says whether it can be admitted; the policy's ``fail_fast`` makes the controller refuse it if not.
    """
    placements = (_predict(now, tracked, instance, len(ready), margin) for instance in ready)
    return min(placements, key=lambda placement: (not placement.on_time, placement.predicted_ttft_s)), memory


def _predict(
    now: float, tracked: TrackedRequest, instance: TrackedInstance, candidates: int, margin: float
) -> Placement:
    latency, decodes, kv_tokens = instance.latency, instance.num_decodes, instance.decode_kv_tokens
    chunk = max(instance.info.max_batch_tokens - decodes, 1)
    iteration_s = latency.predict(chunk, 0.5 * chunk * chunk, decodes, kv_tokens)
    # Seconds that a second of prompt work takes: decodes have their part of each iteration.
    stretch = iteration_s / max(latency.prefill_s(chunk), 1e-9)
    wait_s, tokens, harmless = _join(now, tracked, instance, stretch, margin)
    first = min(tokens, chunk)  # the least it takes: what is due later fills its iteration
    ttft_s = max(wait_s, latency.predict(first, 0.5 * first * first, decodes, kv_tokens)) + now - tracked.arrived_at
    step_s = latency.decode_s(decodes + 1, kv_tokens + tracked.expected_context())
    e2e_s = ttft_s + max(tracked.expected_output_tokens - 1.0, 0.0) * step_s
    on_time = (
        harmless
        and tracked.arrived_at + ttft_s <= _latest(tracked, margin)
        and margin * step_s <= min(tracked.pace_s, instance.min_pace_s)
    )
    return Placement(instance.id, candidates, 0.0, load_s(instance), ttft_s, e2e_s, on_time)


def _join(
    now: float, tracked: TrackedRequest, instance: TrackedInstance, stretch: float, margin: float
) -> tuple[float, int, bool]:
    """Seconds until the prompt is computed in deadline order, prompt tokens of all, and whether none becomes late."""
    hit = instance.prefix_hit_tokens(tracked.request)
    tokens = tracked.request.num_prompt_tokens - hit
    work_s = stretch * instance.latency.prefill_s(tokens, hit)
    wait_s, after_s = work_s, 0.0
    harmless = True
    for other in sorted(instance.requests.values(), key=_FIRST_DUE):
        remaining = other.remaining_prefill
        if not remaining:
            continue
        tokens += remaining
        other_s = stretch * other.work_s
        if other.first_due <= tracked.first_due:
            wait_s += other_s
        else:
            after_s += other_s
            ends_at = now + wait_s + after_s
            harmless &= not ends_at - work_s <= _latest(other, margin) < ends_at
    return wait_s, tokens, harmless


def _latest(tracked: TrackedRequest, margin: float) -> float:
    """The latest that a first token may be predicted for."""
    return tracked.arrived_at + (tracked.first_due - tracked.arrived_at) / margin
