"""Cost of one decision: ``Controller.handle`` on an arrival, by fleet size, with 1,000 requests waiting; and of a look
of the scaler at 256 instances with 50 requests each.

    python benchmarks/decision.py [--json FILE]

Arrivals are mixed with progress reports and finishes as in service, so that totals and queues keep changing; only
arrivals are timed, and of the scaler only its ticks. One process, one core. CPU time is what a decision takes; wall
time is the same on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from collections import deque
from pathlib import Path

from common import RESULTS, environment, write_results
from hyperflexis.controller import Controller, ControllerConfig
from hyperflexis.core.events import (
    InstanceJoined,
    InstanceReported,
    LauncherJoined,
    RequestArrived,
    RequestFinished,
    Tick,
)
from hyperflexis.core.instance import InstanceInfo, InstanceReport, RequestProgress
from hyperflexis.core.latency import Coefficients
from hyperflexis.core.request import Request
from hyperflexis.core.slo import Slo
from hyperflexis.policy.scale import ModelScale, ScaleConfig

LATENCY = Coefficients(c0=8e-3, c1=4e-5, c2=2e-10, c3=5e-5, c4=4e-8)
CLASSES = (
    ("chat", Slo(1.0, 0.05), 2.0, 600),
    ("code", Slo(0.2, 0.03), 3.0, 2000),
    ("summary", Slo(8.0, 0.1), 1.0, 6000),
    ("batch", Slo(60.0, 0.2), 0.5, 1500),
)


def measure(instances: int, waiting: int, arrivals: int, seed: int) -> dict[str, float]:
    """Microseconds per arrival at ``instances`` with ``waiting`` requests in their queues."""
    rng = random.Random(seed)
    controller = Controller(ControllerConfig(("m",)))
    for i in range(instances):
        info = InstanceInfo(f"i{i}", 1, "m", "h100", f"unix:i{i}", "emulated", 32768, 400_000, 256, 8192, True, LATENCY)
        controller.handle(InstanceJoined(info), 0.0)
    open_ids: deque[str] = deque()
    now = 0.0
    wall_s: list[float] = []
    cpu_s: list[float] = []
    count = 0

    def arrive(timed: bool) -> None:
        nonlocal count
        name, slo, value, prompt = CLASSES[rng.randrange(len(CLASSES))]
        size = max(1, int(rng.lognormvariate(0, 0.8) * prompt))
        request = Request(f"r{count}", "m", "t", name, slo, value, min(size, 30_000), 512)
        count += 1
        event = RequestArrived(request, "g", 0.0)
        wall, cpu = time.perf_counter(), time.thread_time()
        effects = controller.handle(event, now)
        if timed:
            cpu_s.append(time.thread_time() - cpu)
            wall_s.append(time.perf_counter() - wall)
        if effects and type(effects[0]).__name__ == "Dispatch":
            open_ids.append(request.id)

    for _ in range(waiting):
        arrive(timed=False)
    gc.collect()
    gc.freeze()
    for k in range(arrivals):
        now += 0.005
        arrive(timed=True)
        done = open_ids.popleft()
        controller.handle(RequestFinished(done, "finished", rng.randint(1, 400), 0.5, 2.0), now)
        instance = controller.cluster.instances[f"i{k % instances}"]
        progress = tuple(
            RequestProgress(t.request.id, t.request.num_prompt_tokens // 2, 0)
            for t in list(instance.requests.values())[:2]
        )
        report = InstanceReport(instance.id, 1, 0, 0, 0, k, 0, 0, 0, 0, 0.0, LATENCY, progress)
        controller.handle(InstanceReported(report), now)
    found = {}
    for name, times in (("cpu", sorted(cpu_s)), ("wall", sorted(wall_s))):
        for percent in (50, 99):
            found[f"{name}_p{percent}_us"] = 1e6 * times[percent * len(times) // 100]
        found[f"{name}_max_us"] = 1e6 * times[-1]
    return found


def measure_scaler(instances: int, requests_each: int, looks: int, seed: int) -> dict[str, float]:
    """Milliseconds of a tick in which the scaler plans; between two of them a tenth of the requests are replaced."""
    rng = random.Random(seed)
    scale = ScaleConfig((ModelScale("m", most=instances, start_s={"disk": 60.0}),))
    controller = Controller(ControllerConfig(("m",), scale=scale))
    controller.handle(LauncherJoined(), 0.0)
    for i in range(instances):
        info = InstanceInfo(f"i{i}", 1, "m", "h100", f"unix:i{i}", "emulated", 32768, 400_000, 256, 8192, True, LATENCY)
        controller.handle(InstanceJoined(info), 0.0)
    open_ids: deque[str] = deque()
    count = 0

    def arrive(now: float) -> None:
        nonlocal count
        name, slo, value, prompt = CLASSES[rng.randrange(len(CLASSES))]
        request = Request(f"r{count}", "m", "t", name, slo, value, prompt, 512)
        count += 1
        controller.handle(RequestArrived(request, "g", 0.0), now)
        open_ids.append(request.id)

    for _ in range(instances * requests_each):
        arrive(0.0)
    gc.collect()
    gc.freeze()
    cpu_s: list[float] = []
    for second in range(1, looks + 1):
        for _ in range(len(open_ids) // 10):
            controller.handle(RequestFinished(open_ids.popleft(), "finished", 100, 0.5, 2.0), float(second))
            arrive(float(second))
        for instance in list(controller.cluster.instances.values()):
            report = InstanceReport(instance.id, 1, 1, 0, 0, second, 0, 0, 0, 0, 0.0, LATENCY)
            controller.handle(InstanceReported(report), float(second))
        cpu = time.thread_time()
        controller.handle(Tick(), float(second))
        cpu_s.append(time.thread_time() - cpu)
    cpu_s.sort()
    return {f"cpu_p{p}_ms": 1e3 * cpu_s[p * len(cpu_s) // 100] for p in (50, 99)} | {"cpu_max_ms": 1e3 * cpu_s[-1]}


def main() -> None:
    """Run, print a table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--waiting", type=int, default=1000)
    parser.add_argument("--arrivals", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULTS / "decision.json", metavar="FILE")
    args = parser.parse_args()
    rows = {n: measure(n, args.waiting, args.arrivals, args.seed) for n in (10, 100, 1000)}
    print(f"{'instances':>10} {'CPU p50':>9} {'p99 us':>8} {'max us':>8} {'wall p50':>9} {'p99 us':>8} {'max us':>8}")
    for n, row in rows.items():
        print(f"{n:>10} " + " ".join(f"{value:>{9 if 'p50' in key else 8}.0f}" for key, value in row.items()))
    look = measure_scaler(256, 50, 200, args.seed)
    print(f"scaler at 256 instances, CPU: p50 {look['cpu_p50_ms']:.1f} ms, p99 {look['cpu_p99_ms']:.1f} ms")
    found = {**environment(args.seed), "waiting": args.waiting, "instances": rows, "scaler_at_256": look}
    write_results(args.json, found)


if __name__ == "__main__":
    main()
