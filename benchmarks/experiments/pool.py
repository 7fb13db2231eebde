"""Many runs: what is left of them to do, and doing it in a pool of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from hyperflexis.worker_pool import performed

from .cache import Cache, Digests
from .measure import Row, Task, measure
from .scenarios import Windows


@dataclass(frozen=True, slots=True)
class Work:
    """Tasks, of which ``todo`` (by key, the longest first) are not in the cache; they take about ``cpu_s``."""

    keys: Mapping[Task, str]
    todo: Mapping[str, Task]
    cpu_s: Mapping[str, float]


def plan_work(tasks: Iterable[Task], windows: Windows, digests: Digests, cache: Cache[Row]) -> Work:
    """What is to be done for ``tasks``."""
    keys = {task: digests.key(task) for task in tasks}
    todo = {key: task for task, key in keys.items() if cache.get(key) is None}

    def cpu_s(task: Task) -> float:
        rps = task.load * windows.yardstick(task.scenario, task.slowness * task.device_factor).capacity_rps
        return rps * task.duration_s * cache.request_s(task.policy)

    costs_s = {key: cpu_s(task) for key, task in todo.items()}
    return Work(keys, {key: todo[key] for key in sorted(todo, key=lambda key: -costs_s[key])}, costs_s)


def perform(
    work: Work, windows: Windows, cache: Cache[Row], jobs: int, advance: Callable[[float], None]
) -> dict[Task, Row]:
    """The rows of all tasks. ``advance`` hears after each run what it had been expected to take, in seconds of a core.

    Raises HyperFlexisError when the system killed a worker.
    """
    missing = {task: key for key, task in work.todo.items()}
    with performed(_measurer, windows, list(missing), jobs) as rows:
        for task, row in rows:
            cache.put(missing[task], task.policy, row)
            advance(work.cpu_s[missing[task]])
    found = {task: cache.get(key) for task, key in work.keys.items()}
    return {task: row for task, row in found.items() if row is not None}


def _measurer(windows: Windows) -> Callable[[Task], Row]:
    return partial(measure, windows)
