"""Where finished prompts decode in the disaggregated fleets that users run today: always on one of the decode
instances, by a rule that looks at no promise. Ties go to the instance that joined first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ...core.cluster import TrackedInstance, TrackedRequest
from ...core.links import Links
from ..handoff import DecodePolicy, Move, exposed_s
from ..place import PlaceMemory

_TURN = "decode of "


def in_turn(
    now: float,
    tracked: TrackedRequest,
    move: Move,
    ready: Sequence[TrackedInstance],
    links: Links,
    memory: PlaceMemory,
) -> tuple[TrackedInstance | None, float, PlaceMemory]:
    """Each decode instance in turn: what a proxy in front of two pools does."""
    key = _TURN + tracked.request.model
    turn = memory.turn.get(key, 0)
    memory = replace(memory, turn={**memory.turn, key: turn + 1})
    return _to(ready[turn % len(ready)], move, links, now, memory)


def _least(measure: Callable[[TrackedInstance], float]) -> DecodePolicy:
    def choose(
        now: float,
        tracked: TrackedRequest,
        move: Move,
        ready: Sequence[TrackedInstance],
        links: Links,
        memory: PlaceMemory,
    ) -> tuple[TrackedInstance | None, float, PlaceMemory]:
        return _to(min(ready, key=measure), move, links, now, memory)

    return choose


fewest_requests = _least(lambda instance: instance.num_requests)
"""The fewest requests."""
least_kv = _least(lambda instance: instance.kv_tokens / instance.info.kv_capacity_tokens)
"""The emptiest KV cache: what Dynamo's and llm-d's decode routers weigh most."""


def _to(
    instance: TrackedInstance, move: Move, links: Links, now: float, memory: PlaceMemory
) -> tuple[TrackedInstance | None, float, PlaceMemory]:
    if instance is move.source:
        return None, 0.0, memory
    return instance, exposed_s(move, instance, links, now), memory
