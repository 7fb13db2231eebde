"""Strict priority: by value, then by arrival, as ``vllm serve --scheduling-policy priority`` does (there the smaller
number comes first, here the larger value).

As in vLLM a waiting request takes no one's place: it starts before those of less value. When KV runs out the request of
the least value is preempted, among equals the latest arrival.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import chain
from operator import attrgetter

from ...core.latency import Coefficients
from ..running import Running
from ..step import J, StepLimits, StepPlan
from ..waiting import Waiting
from .fill import ARRIVED_AT, fill

_VALUE = attrgetter("value")


def plan(
    now: float, waiting: Waiting[J], running: Running[J], latency: Coefficients, limits: StepLimits
) -> StepPlan[J]:
    """The next iteration; see the module's rules."""
    if not waiting:
        return StepPlan([])
    started = _by_value(list(waiting.started.values()))
    return fill(len(running), chain(started, _new(waiting)), len(started), limits)


def _new(waiting: Waiting[J]) -> Iterator[J]:
    yield from _by_value([job for job in waiting if not job.started])


def _by_value(jobs: list[J]) -> list[J]:
    jobs.sort(key=ARRIVED_AT)
    jobs.sort(key=_VALUE, reverse=True)  # a stable sort, reversed or not
    return jobs


def victim(now: float, jobs: Collection[J]) -> J:
    """The least value, among equals the latest arrival."""
    return min(jobs, key=lambda job: (job.value, -job.arrived_at))
