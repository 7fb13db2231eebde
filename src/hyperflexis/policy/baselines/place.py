"""Placements that users run today, for comparison."""

from __future__ import annotations

from collections.abc import Sequence

from ...core.cluster import TrackedInstance, TrackedRequest
from ..place import PlaceMemory, Placement, predict_first_come


def round_robin(
    now: float, tracked: TrackedRequest, ready: Sequence[TrackedInstance], memory: PlaceMemory
) -> tuple[Placement, PlaceMemory]:
    """Each ready instance in turn."""
    model = tracked.request.model
    turn = memory.turn.get(model, 0)
    instance = ready[turn % len(ready)]
    return predict_first_come(now, tracked, instance, len(ready)), PlaceMemory({**memory.turn, model: turn + 1})


def least_loaded(
    now: float, tracked: TrackedRequest, ready: Sequence[TrackedInstance], memory: PlaceMemory
) -> tuple[Placement, PlaceMemory]:
    """The instance with the fewest requests in flight, as most gateways count load; ties go to the first."""
    instance = min(ready, key=lambda i: i.num_requests)
    return predict_first_come(now, tracked, instance, len(ready)), memory
