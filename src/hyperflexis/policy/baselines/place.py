"""Placements that users run today. Ties go to the instance that joined first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...core.cluster import TrackedInstance, TrackedRequest
from ..place import PlaceMemory, Placement, predict_first_come

QUEUE_WEIGHT, KV_WEIGHT, PREFIX_WEIGHT = 2.0, 2.0, 3.0
"""llm-d's default weights of ``queue-scorer``, ``kv-cache-utilization-scorer`` and ``prefix-cache-scorer``."""


def round_robin(
    now: float, tracked: TrackedRequest, ready: Sequence[TrackedInstance], memory: PlaceMemory
) -> tuple[Placement, PlaceMemory]:
    """Each ready instance in turn: a Kubernetes service, nginx, vLLM production-stack's default."""
    turn, memory = _next_turn(tracked, memory)
    return predict_first_come(now, tracked, ready[turn % len(ready)], len(ready)), memory


def least_loaded(
    now: float, tracked: TrackedRequest, ready: Sequence[TrackedInstance], memory: PlaceMemory
) -> tuple[Placement, PlaceMemory]:
    """The fewest requests in flight: nginx' ``least_conn``, LiteLLM's ``least-busy``, most gateways."""
    return predict_first_come(now, tracked, min(ready, key=_in_flight), len(ready)), memory


def least_work(
    now: float, tracked: TrackedRequest, ready: Sequence[TrackedInstance], memory: PlaceMemory
) -> tuple[Placement, PlaceMemory]:
    """The fewest seconds of prompts to compute, among equals the fewest requests in flight."""
    instance = min(ready, key=lambda instance: (instance.prefill_s, instance.num_requests))
    return predict_first_come(now, tracked, instance, len(ready)), memory


def power_of_two(
    now: float, tracked: TrackedRequest, ready: Sequence[TrackedInstance], memory: PlaceMemory
) -> tuple[Placement, PlaceMemory]:
    """Of two instances at random, the one with fewer requests in flight (Mitzenmacher, 2001): Ray Serve's default,
    ``power_of_two`` in the routers of vLLM and SGLang."""
    turn, memory = _next_turn(tracked, memory)
    instance = min(two_of(ready, turn), key=_in_flight)
    return predict_first_come(now, tracked, instance, min(len(ready), 2)), memory


def kv_aware(
    now: float, tracked: TrackedRequest, ready: Sequence[TrackedInstance], memory: PlaceMemory
) -> tuple[Placement, PlaceMemory]:
    """The highest weighted sum of scores, as llm-d's endpoint picker takes it by default.

    Queue: requests without a first token, 1 for the shortest and 0 for the longest queue of all. KV: the free share of
    the cache. llm-d scrapes both from the engines; here they are the controller's own counts, which are never stale.
    Prefix: the share of the prompt that the cache is expected to hold, estimated there as here from what was sent.
    """
    queues = [instance.num_requests - instance.num_decodes for instance in ready]
    longest, spread = max(queues), max(max(queues) - min(queues), 1)

    def score(index: int) -> float:
        instance = ready[index]
        kv_free = 1.0 - min(instance.kv_tokens / instance.info.kv_capacity_tokens, 1.0)
        held = instance.prefix_hit_tokens(tracked.request) / tracked.request.num_prompt_tokens
        return QUEUE_WEIGHT * (longest - queues[index]) / spread + KV_WEIGHT * kv_free + PREFIX_WEIGHT * held

    instance = ready[max(range(len(ready)), key=score)]
    return predict_first_come(now, tracked, instance, len(ready)), memory


def two_of(ready: Sequence[TrackedInstance], turn: int) -> Sequence[TrackedInstance]:
    """Two different instances, or the only one; each pair is equally likely over the turns."""
    count = len(ready)
    if count == 1:
        return ready
    draw = _mixed(turn)
    first = draw % count
    second = (first + 1 + (draw >> 32) % (count - 1)) % count
    return ready[first], ready[second]


def _next_turn(tracked: TrackedRequest, memory: PlaceMemory) -> tuple[int, PlaceMemory]:
    model = tracked.request.model
    turn = memory.turn.get(model, 0)
    return turn, replace(memory, turn={**memory.turn, model: turn + 1})


def _in_flight(instance: TrackedInstance) -> int:
    return instance.num_requests


def _mixed(counter: int) -> int:
    """64 random-looking bits of a counter: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014). A counter in the policy's
    memory makes the choice repeatable and replayable, where a generator's state would not be a value."""
    mask = (1 << 64) - 1
    z = (counter + 1) * 0x9E3779B97F4A7C15 & mask
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    return z ^ (z >> 31)
