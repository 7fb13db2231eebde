"""Which requests can be on time together: the weighted on-time subset of a queue.

One server works off a queue in deadline order. Moore and Hodgson (1968): walk the jobs by deadline, keep each, and
whenever the kept ones no longer fit, drop the largest; this keeps the largest number on time. With values the problem
is NP-hard; dropping the largest work *per value* and comparing with the best single job is the usual heuristic (it is
optimal for equal values, and never worse than the best single one). Dropped requests are demoted, not refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from heapq import heappop, heappush


@dataclass(frozen=True, slots=True)
class Item:
    """One queued job. ``due`` (on the caller's clock) and ``work_s`` in seconds; ``cost`` is what is compared per
    ``value`` when something has to go: usually work_s, or all the work that keeping it entails."""

    id: str
    due: float
    work_s: float
    value: float
    cost: float


def by_deadline(items: Iterable[Item]) -> list[Item]:
    """Items by deadline; among equals the cheaper first, so that ties do not depend on arrival."""
    return sorted(items, key=lambda item: (item.due, item.cost / item.value, item.id))


def on_time_subset(ordered: Iterable[Item], start: float = 0.0, speed: float = 1.0) -> list[Item]:
    """The kept items, in deadline order, when service begins at ``start`` and does ``speed`` work seconds a second.

    ``ordered`` must be sorted by deadline. Values must be positive.
    """
    kept: dict[str, Item] = {}
    heap: list[tuple[float, str]] = []
    best_single: Item | None = None
    value = 0.0
    work = 0.0
    for item in ordered:
        room = (item.due - start) * speed
        if item.work_s <= room and (best_single is None or item.value > best_single.value):
            best_single = item
        kept[item.id] = item
        heappush(heap, (-item.cost / item.value, item.id))
        work += item.work_s
        value += item.value
        while work > room and heap:
            dropped = kept.pop(heappop(heap)[1])
            work -= dropped.work_s
            value -= dropped.value
    if best_single is not None and value < best_single.value:
        return [best_single]
    return list(kept.values())


def on_time_value(ordered: Iterable[Item], start: float = 0.0, speed: float = 1.0) -> float:
    """Summed value of the on-time subset."""
    return sum(item.value for item in on_time_subset(ordered, start, speed))
