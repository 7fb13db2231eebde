"""Which requests can be on time together: the weighted on-time subset of a queue.

One server works off a queue in deadline order. Moore and Hodgson (1968): walk the jobs by deadline, keep each, and
whenever the kept ones no longer fit, drop the largest; this keeps the largest number on time. With values the problem
is NP-hard; dropping the largest work *per value* and comparing with the best single job is the usual heuristic (it is
optimal for equal values, and never worse than the best single one). Dropped requests are demoted, not refused.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from heapq import heapify, heappop, heappush, heappushpop

from ..core.request import QueuedJob

ROUNDING_S = 1e-9
"""Sums of work are compared with this tolerance: taking a job out again leaves rounding behind."""


def on_time_subset(ordered: Sequence[QueuedJob], start: float = 0.0, speed: float = 1.0) -> Sequence[QueuedJob]:
    """The kept jobs, in deadline order, when service begins at ``start`` and does ``speed`` work seconds a second.

    ``ordered`` must be sorted. Values must be positive.
    """
    if all_fit(ordered, start, speed):
        return ordered
    walk = _Walk(start, speed)
    walk.take(ordered)
    return walk.kept_of(ordered)[0]


def subset_with(
    ordered: Sequence[QueuedJob], job: QueuedJob, start: float = 0.0, speed: float = 1.0
) -> tuple[Sequence[QueuedJob], float]:
    """The on-time subset of ``ordered`` and ``job`` together, and how much more value it has than without ``job``."""
    place = bisect_left(ordered, job)
    before, after = ordered[:place], ordered[place:]
    joined = [*before, job, *after]
    if all_fit(joined, start, speed):
        return joined, job.value
    without = _Walk(start, speed)
    without.take(before)
    with_job = without.fork()
    with_job.take((job,))
    is_alone = job.id in with_job.dropped and len(with_job.dropped) == len(without.dropped) + 1
    without.take(after)
    kept_without, value_without = without.kept_of(ordered)
    if is_alone and job.value <= value_without:
        return kept_without, 0.0  # both walks are the same from here on
    with_job.take(after)
    kept, value = with_job.kept_of(joined)
    return kept, value - value_without


def all_fit(ordered: Sequence[QueuedJob], start: float, speed: float) -> bool:
    """Whether all can be on time, as ``on_time_subset`` counts."""
    work = 0.0
    for job in ordered:
        work += job.work_s
        if work > (job.due - start) * speed + ROUNDING_S:
            return False
    return True


class _Walk:
    """Moore and Hodgson's walk, taken in parts: queues that begin alike share the beginning. ``dropped`` has the ids of
    the jobs dropped so far."""

    __slots__ = ("_fitting", "_heap", "_speed", "_start", "_work", "dropped")

    def __init__(self, start: float, speed: float) -> None:
        self._start = start
        self._speed = speed
        self._work = 0.0
        # The heap is made of the jobs so far when the first of them must go: many queues never come to that.
        self._fitting: list[QueuedJob] = []
        self._heap: list[tuple[float, str, float]] = []
        self.dropped: set[str] = set()

    def fork(self) -> _Walk:
        """Another walk that has come as far."""
        other = _Walk(self._start, self._speed)
        other._work, other._fitting, other._heap = self._work, self._fitting.copy(), self._heap.copy()
        other.dropped = self.dropped.copy()
        return other

    def take(self, jobs: Sequence[QueuedJob]) -> None:
        """The next jobs in deadline order."""
        start, speed, work, heap = self._start, self._speed, self._work, self._heap
        taken = 0
        if not self.dropped:
            for job in jobs:
                more = work + job[3]
                if more > (job[0] - start) * speed + ROUNDING_S:
                    break
                work = more
                taken += 1
            self._fitting += jobs[:taken]
            if taken < len(jobs):
                heap += [(-price, id, work_s) for _, price, id, work_s, _ in self._fitting]
                heapify(heap)
        for due, price, id, work_s, _ in jobs[taken:]:
            work += work_s
            room = (due - start) * speed + ROUNDING_S
            if work <= room:
                heappush(heap, (-price, id, work_s))
                continue
            _, dropped, less_s = heappushpop(heap, (-price, id, work_s))
            work -= less_s
            self.dropped.add(dropped)
            while work > room and heap:
                _, dropped, less_s = heappop(heap)
                work -= less_s
                self.dropped.add(dropped)
        self._work = work

    def kept_of(self, ordered: Sequence[QueuedJob]) -> tuple[Sequence[QueuedJob], float]:
        """Those of ``ordered``, all jobs that were taken, which are kept, and their value."""
        dropped = self.dropped
        kept = [job for job in ordered if job.id not in dropped] if dropped else ordered
        value = _value(kept)
        best: QueuedJob | None = None
        for job in ordered if dropped else ():
            if job.value > value and job.work_s <= (job.due - self._start) * self._speed + ROUNDING_S:
                best, value = job, job.value
        return ([best], value) if best is not None else (kept, value)


def _value(jobs: Sequence[QueuedJob]) -> float:
    value = 0.0
    for job in jobs:
        value += job.value
    return value
