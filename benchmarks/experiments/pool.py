"""Many runs: what is left of them to do, and doing it in a pool of processes."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import active_children, parent_process

from hyperflexis.errors import HyperFlexisError

from .cache import Cache, Digests
from .measure import Row, Task, measure
from .scenarios import Windows

GC_THRESHOLD = 100_000
"""Looking for the little garbage in cycles takes a sixth of a run at Python's default."""
_windows: Windows | None = None
"""A worker process's own."""


@dataclass(frozen=True, slots=True)
class Work:
    """Tasks, of which ``todo`` (by key, the longest first) are not in the cache; they take about ``cpu_s``."""

    keys: Mapping[Task, str]
    todo: Mapping[str, Task]
    cpu_s: Mapping[str, float]


def plan_work(tasks: Iterable[Task], windows: Windows, digests: Digests, cache: Cache) -> Work:
    """What is to be done for ``tasks``."""
    keys = {task: digests.key(task) for task in tasks}
    todo = {key: task for task, key in keys.items() if cache.get(key) is None}

    def cpu_s(task: Task) -> float:
        rps = task.load * windows.yardstick(task.scenario, task.slowness * task.device_factor).capacity_rps
        return rps * task.duration_s * cache.request_s(task.policy)

    costs_s = {key: cpu_s(task) for key, task in todo.items()}
    return Work(keys, {key: todo[key] for key in sorted(todo, key=lambda key: -costs_s[key])}, costs_s)


def perform(work: Work, windows: Windows, cache: Cache, jobs: int, advance: Callable[[float], None]) -> dict[Task, Row]:
    """The rows of all tasks. ``advance`` hears after each run what it had been expected to take, in seconds of a core.

    Raises HyperFlexisError when the system killed a worker.
    """
    if jobs == 1:
        gc.set_threshold(GC_THRESHOLD)
        for key, task in work.todo.items():
            cache.put(key, task.policy, measure(windows, task))
            advance(work.cpu_s[key])
    elif work.todo:
        _perform_in_pool(work, windows, cache, jobs, advance)
    found = {task: cache.get(key) for task, key in work.keys.items()}
    return {task: row for task, row in found.items() if row is not None}


def _perform_in_pool(work: Work, windows: Windows, cache: Cache, jobs: int, advance: Callable[[float], None]) -> None:
    executor = ProcessPoolExecutor(min(jobs, len(work.todo)), initializer=_start_worker, initargs=(windows,))
    try:
        futures = {executor.submit(_measure, task): key for key, task in work.todo.items()}
        for future in as_completed(futures):
            key = futures[future]
            cache.put(key, work.todo[key].policy, future.result())
            advance(work.cpu_s[key])
    except BrokenProcessPool:
        raise HyperFlexisError("a worker process was killed, for lack of memory perhaps: try fewer --jobs") from None
    except BaseException:
        for child in active_children():
            child.terminate()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _start_worker(windows: Windows) -> None:
    global _windows
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    gc.set_threshold(GC_THRESHOLD)
    _windows = windows


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for its next task for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _measure(task: Task) -> Row:
    assert _windows is not None
    return measure(_windows, task)
