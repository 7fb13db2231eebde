"""The requests with prompt tokens to compute on one instance, kept so that planning an iteration costs O(those that can
still be on time): in order of their deadlines, which do not change while they wait. Those that are late stand apart, in
the order in which leftovers serve them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator
from math import inf
from operator import attrgetter
from typing import Any, Generic, Protocol, TypeVar

from .running import Highest


class Waits(Protocol):
    """A waiting request, as this queue sees it when it joins."""

    @property
    def id(self) -> str:
        """Unique on the instance."""

    @property
    def arrived_at(self) -> float:
        """When the instance got it."""

    @property
    def next_due(self) -> float:
        """When its next token is due."""

    @property
    def remaining_prefill(self) -> int:
        """Tokens to compute before the next token can be sampled."""

    @property
    def value(self) -> float:
        """Priority times tenant weight, positive."""

    @property
    def started(self) -> bool:
        """True when it holds KV blocks."""

    memo: Any
    """For the policy alone: what it has computed of the request, and may find again while that waits. None at first."""


W = TypeVar("W", bound=Waits)
LAST_PROMISES = 64
MOST_CHANGES = 16
"""So many may as well be more: what was remembered of the queue is worth nothing any more."""
_ARRIVED_AT = attrgetter("arrived_at")


def leftover_rank(job: Waits) -> tuple[float, float]:
    """Which of the late ones is served first: the least work per value, then the oldest."""
    return job.remaining_prefill / job.value, job.arrived_at


class Waiting(Generic[W]):
    """See the module. Iterates in order of arrival. ``started`` are those that hold KV blocks, by id. ``promises_s``
    are the times to first token of the last LAST_PROMISES requests. ``changes`` are those of ``by_deadline`` since the
    step policy last emptied them: (place, who came there, or None where one went), MOST_CHANGES at most. ``memo`` is
    that policy's, as a request's is."""

    def __init__(self) -> None:
        self.changes: list[tuple[int, W | None]] = []
        self.memo: Any = None
        self.started: dict[str, W] = {}
        self.promises_s: deque[float] = deque(maxlen=LAST_PROMISES)
        self._jobs: dict[str, W] = {}
        self._open: list[tuple[float, int, W]] = []
        self._late: list[tuple[tuple[float, float], int, W]] = []
        self._open_place: dict[str, tuple[float, int, W]] = {}
        self._late_place: dict[str, tuple[tuple[float, float], int, W]] = {}
        self._values = Highest()
        self._newest = 0.0
        self._joined = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[W]:
        return iter(self._jobs.values())

    def __contains__(self, id: str) -> bool:
        return id in self._jobs

    def get(self, id: str) -> W | None:
        """The request of that id, or None when it is not here."""
        return self._jobs.get(id)

    @property
    def top_value(self) -> float:
        """The largest value of a request here; 0 when there is none."""
        return self._values.top

    @property
    def promise_s(self) -> float:
        """The tightest time to first token of late; inf when nothing was promised."""
        return min(self.promises_s, default=inf)

    def by_deadline(self) -> Iterator[W]:
        """Those that are not late, the earliest deadline first, among equals the first to join."""
        return (job for _, _, job in self._open)

    @property
    def open_count(self) -> int:
        """How many are not late."""
        return len(self._open)

    def by_arrival(self) -> Iterator[W]:
        """Those that have started, then the others, each in order of arrival."""
        yield from sorted(self.started.values(), key=_ARRIVED_AT)
        for job in self._jobs.values():
            if not job.started:
                yield job

    def late(self) -> Iterator[W]:
        """Those that are late and hold no KV, the least work per value first."""
        return (job for _, _, job in self._late)

    def is_late(self, id: str) -> bool:
        """True when that request has been given up."""
        return id in self._jobs and id not in self._open_place

    def add(self, job: W, fresh: bool = False) -> None:
        """A request that waits from now on: a ``fresh`` one, or one that was preempted or came from elsewhere."""
        self._jobs[job.id] = job
        job.memo = None  # of what it was when it waited before
        if fresh and job.next_due > job.arrived_at:
            self.promises_s.append(job.next_due - job.arrived_at)
        if job.arrived_at < self._newest:
            self._jobs = {one.id: one for one in sorted(self._jobs.values(), key=_ARRIVED_AT)}
        self._newest = max(self._newest, job.arrived_at)
        self._values.add(job.value)
        self._joined += 1
        entry = self._open_place[job.id] = (job.next_due, self._joined, job)
        place = bisect_left(self._open, entry)
        self._open.insert(place, entry)
        self._note(place, job)
        if job.started:
            self.started[job.id] = job

    def pop(self, id: str) -> W | None:
        """Take a request out; None when it is not here."""
        job = self._jobs.pop(id, None)
        if job is None:
            return None
        self._values.remove(job.value)
        self.started.pop(id, None)
        if id in self._open_place:
            self._leave_open(id)
        self._leave_late(id)
        return job

    def give_up(self, job: W) -> None:
        """It cannot make its deadline any more."""
        self._leave_open(job.id)
        if not job.started:
            self._join_late(job)

    def start(self, job: W) -> None:
        """It holds KV blocks from now on."""
        self.started[job.id] = job
        self._leave_late(job.id)

    def stop(self, job: W) -> None:
        """It holds none any more, and what was computed of it may be another now."""
        self.memo = None
        del self.started[job.id]
        if self.is_late(job.id):
            self._join_late(job)

    def _leave_open(self, id: str) -> None:
        place = bisect_left(self._open, self._open_place.pop(id))
        del self._open[place]
        self._note(place, None)

    def _note(self, place: int, job: W | None) -> None:
        if len(self.changes) < MOST_CHANGES:
            self.changes.append((place, job))

    def _join_late(self, job: W) -> None:
        self._joined += 1
        entry = leftover_rank(job), self._joined, job
        self._late_place[job.id] = entry
        insort(self._late, entry)

    def _leave_late(self, id: str) -> None:
        place = self._late_place.pop(id, None)
        if place is not None:
            del self._late[bisect_left(self._late, place)]
