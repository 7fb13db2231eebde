"""Many long calculations at once, one a process: runs of the simulator."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, parent_process
from typing import Any, TypeVar

from .errors import HyperFlexisError

Context = TypeVar("Context")
Task = TypeVar("Task")
Result = TypeVar("Result")

GC_THRESHOLD = 100_000
"""Looking for the little garbage in cycles takes a sixth of a run at Python's default."""


@contextmanager
def performed(
    make: Callable[[Context], Callable[[Task], Result]], context: Context, tasks: Sequence[Task], jobs: int
) -> Iterator[Iterator[tuple[Task, Result]]]:
    """Gives an iterator over the tasks and their results, in the order in which they are ready.

    Every worker calls ``make(context)`` once and what it gives for each task; ``make`` is a function of a module. With
    one job, or one task, all is done in this process. Workers run when the body begins: what starts threads (a view of
    the progress) belongs there, since a fork copies locks as they are. An interrupt or an error ends them at once.
    Raises HyperFlexisError when the system killed one.
    """
    if jobs == 1 or len(tasks) <= 1:
        before = gc.get_threshold()
        gc.set_threshold(GC_THRESHOLD)
        try:
            perform = make(context)
            yield ((task, perform(task)) for task in tasks)
        finally:
            gc.set_threshold(*before)
        return
    executor = ProcessPoolExecutor(min(jobs, len(tasks)), initializer=_start_worker, initargs=(make, context))
    try:
        futures = {executor.submit(_perform, task): task for task in tasks}
        yield ((futures[future], future.result()) for future in as_completed(futures))
    except BrokenProcessPool:
        raise HyperFlexisError("a worker process was killed, for lack of memory perhaps: try fewer --jobs") from None
    except BaseException:
        for child in active_children():
            child.terminate()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


_performer: Callable[[Any], Any] | None = None
"""A worker process's own."""


def _start_worker(make: Callable[[Context], Callable[[Any], Any]], context: Context) -> None:
    global _performer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    gc.set_threshold(GC_THRESHOLD)
    _performer = make(context)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for its next task for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _perform(task: Any) -> Any:
    assert _performer is not None
    return _performer(task)
