"""The requests that decode on one instance, kept so that planning an iteration costs O(paces), not O(requests).

Each iteration gives each of them one token, so all of their counts move together: the set has a clock, ``ticks``, and a
request knows only at which tick it joined. Of the requests with one pace, the order by due time never changes, since
every due time moves by that pace each tick; so the tightest of each pace is the first of a sorted list.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from math import inf
from typing import Generic, Protocol, TypeVar

from . import budget


class Decoding(budget.Pace, Protocol):
    """A request that decodes, as this set sees it when it joins."""

    @property
    def id(self) -> str:
        """Unique on the instance."""

    @property
    def value(self) -> float:
        """Priority times tenant weight, positive."""

    @property
    def computed(self) -> int:
        """Context tokens whose KV is present."""

    @property
    def last_due(self) -> float:
        """When its last token is due (inf: no such promise). Its pace then changes with what is left."""


D = TypeVar("D", bound=Decoding)

LOOK_EVERY = 16
"""Paces that change are compared once in this many ticks: they change by little in a token."""


class Highest:
    """The largest of some numbers that come and go."""

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts: dict[float, int] = {}

    @property
    def top(self) -> float:
        """0 when there is none."""
        return max(self._counts, default=0.0)

    def add(self, number: float) -> None:
        """One more."""
        self._counts[number] = self._counts.get(number, 0) + 1

    def remove(self, number: float) -> None:
        """One less; it must be there."""
        self._counts[number] -= 1
        if not self._counts[number]:
            del self._counts[number]


class Running(Generic[D]):
    """See the module. ``ticks`` counts iterations, ``last_at`` is when the last one ended, ``kv_tokens`` the context
    tokens of all requests here."""

    def __init__(self) -> None:
        self.ticks = 0
        self.last_at = 0.0
        self.kv_tokens = 0
        self._jobs: dict[str, D] = {}
        self._by_pace: dict[float, list[tuple[float, int, D]]] = {}
        self._place: dict[str, tuple[float, tuple[float, int, D]]] = {}
        self._changing: dict[str, D] = {}
        self._shortest: D | None = None
        self._look_at = 0
        self._values = Highest()
        self._joined = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[D]:
        return iter(self._jobs.values())

    def __contains__(self, id: str) -> bool:
        return id in self._jobs

    def get(self, id: str) -> D | None:
        """The request of that id, or None when it is not here."""
        return self._jobs.get(id)

    @property
    def top_value(self) -> float:
        """The largest value of a request here; 0 when there is none."""
        return self._values.top

    def tightest(self, now: float, step_s: float) -> Iterator[D]:
        """Of each pace the request with the least slack that iterations of ``step_s`` seconds can still save, and of
        those whose pace changes the one with the shortest. No other can bind the next iteration."""
        for group in self._by_pace.values():
            for _, _, job in group:
                if not budget.is_lost(job, now, step_s):
                    yield job
                    break
        if self._changing and (self._shortest is None or self.ticks >= self._look_at):
            self._look_at = self.ticks + LOOK_EVERY
            self._shortest = min(self._changing.values(), key=lambda job: job.pace_s)
        if self._shortest is not None:
            yield self._shortest

    def tick(self, now: float, times: int = 1) -> None:
        """Each request here got ``times`` tokens, the last one at ``now``."""
        self.ticks += times
        self.last_at = now
        self.kv_tokens += times * len(self._jobs)

    def add(self, job: D) -> None:
        """A request that got a token at ``last_at`` and goes on."""
        self._jobs[job.id] = job
        self.kv_tokens += job.computed
        self._values.add(job.value)
        if job.missed_first:
            return
        if job.last_due < inf:
            self._changing[job.id] = job
            self._shortest = None
        elif job.pace_s < inf:
            pace = job.pace_s
            self._joined += 1
            entry = (job.next_due - self.ticks * pace, self._joined, job)
            insort(self._by_pace.setdefault(pace, []), entry)
            self._place[job.id] = (pace, entry)

    def pop(self, id: str, computed: int) -> D | None:
        """Take a request with ``computed`` context tokens out; None when it is not here."""
        job = self._jobs.pop(id, None)
        if job is None:
            return None
        self.kv_tokens -= computed
        self._values.remove(job.value)
        if self._changing.pop(id, None) is self._shortest:
            self._shortest = None
        place = self._place.pop(id, None)
        if place is not None:
            pace, entry = place
            group = self._by_pace[pace]
            group.remove(entry)
            if not group:
                del self._by_pace[pace]
        return job
