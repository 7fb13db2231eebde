"""What our scheduler adds to a step of vLLM: schedule() and update_from_output() beside vLLM's own, without a model.

    .venv-vllm/bin/python benchmarks/vllm_schedule.py      # about two minutes; `make test-vllm` makes .venv-vllm

256 requests decode; each that ends is followed by another, and 64 more wait, of four classes. The tokens are invented.
Both schedulers run in turn, and the time is the thread's own, so that what else the machine does counts for little.
``own``: what our methods take beside vLLM's, which they call. ``added``: the difference between whole steps of both, as
large as the noise of vLLM's own.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.vllm.inside import Driven, scheduler_of
from vllm.utils.gc_utils import freeze_gc_heap
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from common import RESULTS, command, environment, write_results
from hyperflexis.engines.vllm import SloScheduler
from hyperflexis.engines.vllm.terms import Promise
from hyperflexis.make_model import Recipe, make_model

BATCH, WAITING, WARM_UP = 256, 64, 100
PROMISES = (Promise(30.0, 5.0, None, 4.0, 100.0), Promise(60.0, 6.0, None, 2.0, 100.0), Promise(90.0, 7.0), Promise())
"""So loose that none of the 256 has to wait, whatever a step takes here: both run the same batches."""
TARGET_MS = 0.3


class Timed(AsyncScheduler):
    """vLLM's scheduler, and how long its part took."""

    taken_s = 0.0

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        began = time.thread_time()
        try:
            return super().schedule(*args, **kwargs)
        finally:
            self.taken_s += time.thread_time() - began

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        began = time.thread_time()
        try:
            return super().update_from_output(*args, **kwargs)
        finally:
            self.taken_s += time.thread_time() - began


class TimedSlo(SloScheduler, Timed):
    """Ours, on top of that."""


class Load:
    """A scheduler that is kept full."""

    def __init__(self, kind: type[Any], model: Path, seed: int) -> None:
        self.driven = Driven(scheduler_of(kind, model, BATCH, 8192, blocks=40_000))
        self._random = random.Random(seed)
        self._number = 0
        self._scheduled = self._steps = 0

    @property
    def mean_batch(self) -> float:
        return self._scheduled / self._steps

    def fill(self) -> None:
        while len(self.driven.scheduler.requests) < BATCH + WAITING:
            rng = self._random
            prompt = [rng.randrange(1000) for _ in range(rng.randrange(50, 600))]
            self.driven.add(f"r{self._number}", prompt, rng.randrange(60, 300), rng.choice(PROMISES))
            self._number += 1

    def step(self) -> tuple[float, float]:
        """Milliseconds of one step, and of them what vLLM's part took."""
        scheduler = self.driven.scheduler
        scheduler.taken_s = 0.0
        began = time.thread_time()
        output = scheduler.schedule()
        taken_s = time.thread_time() - began
        self._steps += 1
        self._scheduled += len(output.num_scheduled_tokens)
        answer = self.driven.answer(output)
        began = time.thread_time()
        scheduler.update_from_output(output, answer)
        return 1e3 * (taken_s + time.thread_time() - began), 1e3 * scheduler.taken_s


def quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "p50_ms": round(statistics.median(ordered), 4),
        "p99_ms": round(ordered[min(int(0.99 * len(ordered)), len(ordered) - 1)], 4),
        "mean_ms": round(statistics.fmean(ordered), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "vllm_schedule.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "1m"
        make_model(model, Recipe("1m", context=2048))
        loads = {"vllm": Load(Timed, model, args.seed), "hyperflexis": Load(TimedSlo, model, args.seed)}
    freeze_gc_heap()  # as vLLM's engine does, or a collection of what was imported counts as a step's
    times: dict[str, list[float]] = {"vllm": [], "hyperflexis": [], "own": []}
    for number in range(WARM_UP + args.steps):
        for name, load in loads.items():
            load.fill()
            whole, base = load.step()
            if number >= WARM_UP:
                times[name].append(whole)
                if name == "hyperflexis":
                    times["own"].append(whole - base)
    gc.unfreeze()  # or its libraries report leaks at the end
    found: dict[str, Any] = {"command": command(), "environment": environment(args.seed), "batch": BATCH}
    found |= {"steps": args.steps, "target_own_p99_ms": TARGET_MS}
    found |= {name: quantiles(values) for name, values in times.items()}
    found["added"] = {key: round(found["hyperflexis"][key] - found["vllm"][key], 4) for key in found["vllm"]}
    found["batch_mean"] = {name: round(load.mean_batch, 1) for name, load in loads.items()}
    for name in ("vllm", "hyperflexis", "own", "added", "batch_mean"):
        print(f"{name:12} {found[name]}")
    write_results(args.out, found)


if __name__ == "__main__":
    main()
