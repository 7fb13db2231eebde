"""Which requests can be on time together: the weighted on-time subset of a queue.

One server works off a queue in deadline order. Moore and Hodgson (1968): walk the jobs by deadline, keep each, and
whenever the kept ones no longer fit, drop the largest; this keeps the largest number on time. With values the problem
is NP-hard; dropping the largest work *per value* and comparing with the best single job is the usual heuristic (it is
optimal for equal values, and never worse than the best single one). Dropped requests are demoted, not refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import NamedTuple

ROUNDING_S = 1e-9
"""Sums of work are compared with this tolerance: taking a job out again leaves rounding behind."""


class Item(NamedTuple):
    """One queued job. ``due`` (on the caller's clock) and ``work_s`` in seconds. ``price`` is what is compared when
    something has to go: the work of keeping it, per value. Items compare by deadline; among equals the cheaper comes
    first, so that ties do not depend on arrival."""

    due: float
    price: float
    id: str
    work_s: float
    value: float


def on_time_subset(ordered: Sequence[Item], start: float = 0.0, speed: float = 1.0) -> Sequence[Item]:
    """The kept items, in deadline order, when service begins at ``start`` and does ``speed`` work seconds a second.

    ``ordered`` must be sorted. Values must be positive.
    """
    work = 0.0
    for item in ordered:
        work += item.work_s
        if work > (item.due - start) * speed + ROUNDING_S:
            return _moore_hodgson(ordered, start, speed)
    return ordered


def _moore_hodgson(ordered: Sequence[Item], start: float, speed: float) -> list[Item]:
    kept: dict[str, Item] = {}
    heap: list[tuple[float, str]] = []
    best_single: Item | None = None
    value = 0.0
    work = 0.0
    for item in ordered:
        room = (item.due - start) * speed
        if item.work_s <= room + ROUNDING_S and (best_single is None or item.value > best_single.value):
            best_single = item
        kept[item.id] = item
        heappush(heap, (-item.price, item.id))
        work += item.work_s
        value += item.value
        while work > room + ROUNDING_S and heap:
            dropped = kept.pop(heappop(heap)[1])
            work -= dropped.work_s
            value -= dropped.value
    if best_single is not None and value < best_single.value:
        return [best_single]
    return list(kept.values())


def on_time_value(ordered: Sequence[Item], start: float = 0.0, speed: float = 1.0) -> float:
    """Summed value of the on-time subset."""
    return sum(item.value for item in on_time_subset(ordered, start, speed))
