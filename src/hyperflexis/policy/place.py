"""Which instance gets a request: the one where it adds the most value on time, at the least cost.

    gain = on-time value of the queue with the request - without it     (order.py, at the speed that decodes leave)
           - 2 x its value if a steady decode iteration would break a pace, or KV cache or batch would overflow
    cost = seconds of the queue it joins: prompts to compute, and ten times what its decodes add to a step
           - five times the seconds that a prefix in its KV cache saves
           + a second where prompts are not wanted (roles.py)

Best (gain, -cost) among the least loaded and the cheapest that holds a prefix of the prompt. Bound at arrival and not
moved: holding at the gateway and moving later both lost in our experiments.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import nsmallest
from operator import attrgetter

from ..core.cluster import TrackedInstance, TrackedRequest, prefix_holders
from ..core.request import QueuedJob, Request
from .budget import CAP_S, PACE_MARGIN
from .order import subset_with

MAX_CANDIDATES = 8
"""How many of the least loaded are looked at closely."""
DECODE_WEIGHT = 10.0
"""Seconds of load per second that an instance's decodes add to each of its steps."""
SAVING_WEIGHT = 5.0
"""Seconds of load that a second of prompt work saved is worth: what is not computed again is not held twice either, and
leaves time and KV cache to the requests that follow. In simulation 0 / 1 / 3 / 5 / 10 give 91.4 / 97.4 / 97.7 / 98.3 /
98.6% on time (coding agents, load 1.5)."""
ROLE_WEIGHT = 1.0
"""Seconds of load that a prompt is worth to an instance that computes prompts alone, over one that decodes alone."""
MIN_SHARE = 0.35
"""Share of an instance's time that prompts get in the end even where decodes leave less now: those ahead of their pace
lend theirs, and the batch drains. In simulation 0.05 / 0.35 / 0.5 / 0.7 give 89.5 / 90.5 / 89.9 / 88.7% on time."""
MAX_RANKED = 64
"""Queued requests ranked per candidate, those due first. In simulation 64 and 128 give the same, 32 0.2% less."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request goes and what is expected of it; ``predicted_*`` are seconds after its arrival. ``on_time``: its
    first token and its pace are expected to hold. ``saved_s``: prompt work that a prefix in the KV cache saves."""

    instance: str
    candidates: int
    gain: float
    load_s: float
    predicted_ttft_s: float
    predicted_e2e_s: float
    on_time: bool
    saved_s: float = 0.0


@dataclass(frozen=True, slots=True)
class PlaceMemory:
    """What a placement policy remembers from one request to the next: ``turn`` of round robin, by model."""

    turn: dict[str, int] = field(default_factory=dict)


PlacePolicy = Callable[[float, TrackedRequest, Sequence[TrackedInstance], PlaceMemory], tuple[Placement, PlaceMemory]]
"""(now, request, ready instances of its model (at least one), memory) -> (placement, new memory)."""


def load_s(instance: TrackedInstance) -> float:
    """Seconds of work in front of a newcomer."""
    latency = instance.latency
    decode_s = latency.c3 * instance.num_decodes + latency.c4 * instance.decode_kv_tokens
    return instance.prefill_s + DECODE_WEIGHT * decode_s


def prefill_share(instance: TrackedInstance) -> float:
    """Share of the instance's time that prompts get: what decodes at their tightest pace leave."""
    step_s = min(CAP_S, instance.min_pace_s)
    decode_s = instance.latency.decode_s(instance.num_decodes, instance.decode_kv_tokens)
    return max(1.0 - decode_s / step_s, MIN_SHARE) if step_s > 0.0 else MIN_SHARE


def queue_of(instance: TrackedInstance, now: float) -> list[QueuedJob]:
    """The requests whose prompts wait or run on the instance and whose first token is not overdue, by deadline."""
    jobs = instance.prompts
    first = bisect_left(jobs, (now,))
    return jobs[first : first + MAX_RANKED]


def place(
    now: float, tracked: TrackedRequest, ready: Sequence[TrackedInstance], memory: PlaceMemory
) -> tuple[Placement, PlaceMemory]:
    """HyperFlexis' placement; see the module's rules."""
    request = tracked.request
    offers = [_Offer(instance, request) for instance in _candidates(request, ready)]
    offers.sort(key=_COST)
    best: Placement | None = None
    for offer in offers:
        placement = _evaluate(now, tracked, offer, len(ready))
        if best is None or placement.gain > best.gain:
            best = placement
        if best.gain >= tracked.value:
            break  # no other can gain more, and this one is the cheapest
    assert best is not None
    return best, memory


class _Offer:
    """An instance that may get a request: the tokens and seconds of the prompt that are in its KV cache, its load and
    what the request would cost there."""

    __slots__ = ("cost_s", "hit", "instance", "load_s", "saved_s")

    def __init__(self, instance: TrackedInstance, request: Request) -> None:
        self.instance = instance
        self.load_s = load_s(instance)
        self.hit = instance.prefix_hit_tokens(request)
        self.saved_s = instance.latency.prefill_s(self.hit)
        self.cost_s = self.load_s - SAVING_WEIGHT * self.saved_s + ROLE_WEIGHT * (1.0 - instance.prefill_share)


_COST = attrgetter("cost_s")


def _candidates(request: Request, ready: Sequence[TrackedInstance]) -> Sequence[TrackedInstance]:
    """The least loaded, and of those that hold a prefix of the prompt the cheapest."""
    if len(ready) <= MAX_CANDIDATES:
        return ready
    candidates = nsmallest(MAX_CANDIDATES, ready, key=load_s)
    holders = prefix_holders(request, ready)
    if holders:
        candidates.append(min((_Offer(holder, request) for holder in holders), key=_COST).instance)
    return candidates


def _evaluate(now: float, tracked: TrackedRequest, offer: _Offer, candidates: int) -> Placement:
    request, instance, hit = tracked.request, offer.instance, offer.hit
    latency = instance.latency
    work_s = latency.prefill_s(request.num_prompt_tokens - hit, hit)
    share = prefill_share(instance)
    mine = tracked.queued_job(work_s)
    queue = queue_of(instance, now)
    start = now + latency.c0
    # Late requests are served last, so only those that can be kept stand in front of one that can.
    kept, gain = subset_with(queue, mine, start, share)
    at = bisect_left(kept, mine)
    starts_on_time = at < len(kept) and kept[at] == mine
    before_s = 0.0
    for job in kept if starts_on_time else queue:
        if job.due > mine.due:
            break
        if job is not mine:
            before_s += job.work_s
    ttft_s = now - tracked.arrived_at + latency.c0 + (before_s + work_s) / share
    context = tracked.expected_context()
    step_s = latency.decode_s(instance.num_decodes + 1, instance.decode_kv_tokens + context)
    pace_s = min(instance.min_pace_s, tracked.pace_s)
    if (
        step_s > PACE_MARGIN * pace_s
        or instance.kv_tokens_with(tracked) > instance.info.kv_capacity_tokens
        or instance.num_requests >= instance.info.max_batch
    ):
        gain -= 2.0 * tracked.value
    e2e_s = ttft_s + max(tracked.expected_output_tokens - 1.0, 0.0) * step_s
    on_time = starts_on_time and step_s <= tracked.pace_s
    return Placement(instance.id, candidates, gain, offer.load_s, ttft_s, e2e_s, on_time, offer.saved_s)


def predict_first_come(now: float, tracked: TrackedRequest, instance: TrackedInstance, candidates: int) -> Placement:
    """What to expect on an instance that serves in arrival order: the baselines' prediction."""
    latency = instance.latency
    work_s = instance.prompt_s(tracked.request)
    context = tracked.expected_context()
    step_s = latency.decode_s(instance.num_decodes + 1, instance.decode_kv_tokens + context)
    ttft_s = now - tracked.arrived_at + latency.c0 + instance.prefill_s + work_s
    e2e_s = ttft_s + max(tracked.expected_output_tokens - 1.0, 0.0) * step_s
    on_time = tracked.arrived_at + ttft_s <= tracked.first_due and step_s <= tracked.pace_s
    return Placement(instance.id, candidates, 0.0, load_s(instance), ttft_s, e2e_s, on_time)
