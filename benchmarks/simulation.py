"""How fast the simulator is: a whole day of production traffic, fleets of growing size, and where the time goes.

    python benchmarks/simulation.py [--traces DIR] [--parts day,leaping,instances,shares] [--json FILE]

    day        the 262,000 requests of workloads/servegen-day.yaml on four H100, at their own rate and compressed 50
               times (about the fleet's capacity), with the request log that `simulate --log` writes
    leaping    a slice with and without leaping over iterations that only decode: the log must be the same to the byte
    instances  cost of an event and of a request as the fleet grows and the rate with it
    shares     how much of a run each part takes, by cProfile, calm and overloaded

Without --traces, a folder that has arrivals/servegen_mlarge_day4.csv, workloads/mixed-synthetic.yaml stands in, for
less than a day. One process on one core. ``cpu_s`` is the process's own time: on a machine that does something else
too, wall_s says little.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import os
import pstats
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import Any

from common import RESULTS, command, environment, write_results
from hyperflexis.bench import load_workload
from hyperflexis.engines.profiles import load_profile
from hyperflexis.policy.catalog import find_policy
from hyperflexis.sim.config import SimConfig, SimResult
from hyperflexis.sim.driver import simulate
from hyperflexis.sim.oracle import capacity_rps
from hyperflexis.sim.workload import Workload, generate, scaled
from hyperflexis.simulate import log_lines
from hyperflexis.worker_pool import GC_THRESHOLD

WORKLOADS = Path(__file__).parent / "workloads"
TRACE = "servegen_mlarge_day4.csv"
PROFILE = "h100-llama-3.1-8b"
POLICY = "hyperflexis"
INSTANCES = 4
COMPRESSED = 50.0
FLEETS = (4, 16, 64, 256)
FLEET_LOAD = 0.7
FLEET_S = 30.0
"""Simulated seconds, several times what a request takes."""
PARTS = {
    "Controller.handle": ("controller.py:handle",),
    "Batcher.plan": ("batcher.py:plan",),
    "Batcher.commit and repeat": ("batcher.py:commit_sizes", "batcher.py:repeat"),
    "Batcher.take_progress": ("batcher.py:take_progress",),
}
"""Functions whose cumulated times add up to a part of a run; the driver and its clients are the rest."""
WITHIN = {
    "place": ("place.py:place",),
    "step policy": ("step.py:plan",),
    "on-time subsets": ("order.py:on_time_subset", "order.py:subset_with"),
    "KV blocks": ("kv_blocks.py:allocate", "kv_blocks.py:release", "kv_blocks.py:take_prefix", "kv_blocks.py:publish"),
    "latency fit": ("latency.py:observe", "latency.py:observe_decodes"),
}
"""The same for what lies within the parts."""


@dataclass(frozen=True)
class Timed:
    """A run with its cost."""

    result: SimResult
    requests: int
    cpu_s: float
    wall_s: float

    def figures(self) -> dict[str, Any]:
        counters = self.result.counters
        return {
            "requests": self.requests,
            "attainment": fmean(record.is_attained for record in self.result.run.records),
            "events": counters.events,
            "iterations": counters.iterations,
            "cpu_s": self.cpu_s,
            "wall_s": self.wall_s,
            "us_per_event": 1e6 * self.cpu_s / counters.events,
            "us_per_request": 1e6 * self.cpu_s / self.requests,
            "simulated_s_per_cpu_s": self.result.run.ended_s / self.cpu_s,
        }


def run(
    workload: Workload,
    instances: int,
    seed: int,
    leap: bool = True,
    around: Callable[[Callable[[], SimResult]], SimResult] = lambda work: work(),
) -> Timed:
    """One simulation, timed with the writing of its log but without making its arrivals."""
    arrivals = generate(workload, seed)
    config = SimConfig(load_profile(PROFILE), instances, POLICY, find_policy(POLICY), seed, leap=leap)
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    result = around(lambda: simulate(config, arrivals, workload.duration_s))
    log_lines(result.run.records)
    return Timed(result, len(arrivals), time.process_time() - cpu, time.perf_counter() - wall)


def digest(result: SimResult) -> str:
    return sha256(log_lines(result.run.records)).hexdigest()


def slice_of(workload: Workload, duration_s: float, faster: float = 1.0) -> Workload:
    return replace(scaled(workload, faster), duration_s=duration_s)


# The parts


def day(workload: Workload, seed: int) -> dict[str, Any]:
    found = {}
    for name, faster in (("own_rate", 1.0), ("compressed", COMPRESSED)):
        squeezed = slice_of(workload, workload.duration_s / faster, faster)
        timed = run(squeezed, INSTANCES, seed)
        load = (
            timed.requests
            / squeezed.duration_s
            / capacity_rps(generate(squeezed, seed), load_profile(PROFILE), INSTANCES)
        )
        found[name] = {
            "load": load,
            **timed.figures(),
            "max_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        }
        print(row(f"day, {name}", found[name]), flush=True)
    return found


def leaping(workload: Workload, seed: int) -> dict[str, Any]:
    found = {}
    for name, faster, duration_s in (("own_rate", 1.0, 3600.0), ("compressed", COMPRESSED, 60.0)):
        cut = slice_of(workload, min(duration_s, workload.duration_s), faster)
        leapt, stepped = run(cut, INSTANCES, seed), run(cut, INSTANCES, seed, leap=False)
        same = digest(leapt.result) == digest(stepped.result)
        assert same, "leaping changed the outcome"
        found[name] = {"leaping": leapt.figures(), "stepping": stepped.figures(), "equal_logs": same}
        print(row(f"leaping, {name}", found[name]["leaping"]))
        print(row(f"stepping, {name}", found[name]["stepping"]), flush=True)
    return found


def instances(workload: Workload, seed: int) -> dict[str, Any]:
    arrivals = generate(workload, seed)
    per_instance = capacity_rps(arrivals, load_profile(PROFILE), 1) * workload.duration_s / len(arrivals)
    found = {}
    for count in FLEETS:
        cut = slice_of(workload, FLEET_S, FLEET_LOAD * per_instance * count)
        found[str(count)] = run(cut, count, seed).figures()
        print(row(f"{count} instances", found[str(count)]), flush=True)
    return found


def shares(workload: Workload, seed: int) -> dict[str, Any]:
    found = {}
    for name, faster, duration_s in (("own_rate", 1.0, 1200.0), ("compressed", COMPRESSED, 60.0)):
        profiler = cProfile.Profile(time.process_time)
        run(slice_of(workload, min(duration_s, workload.duration_s), faster), INSTANCES, seed, around=profiler.runcall)
        found[name] = shares_of(pstats.Stats(profiler))
        for group, sizes in found[name].items():
            print(f"{name}, {group}: " + ", ".join(f"{part} {100 * share:.0f}%" for part, share in sizes.items()))
    return found


def shares_of(stats: pstats.Stats) -> dict[str, dict[str, float]]:
    """Of each part in the whole."""
    seconds: dict[str, float] = {}
    for (file, _, function), (_, _, _, cumulated, _) in stats.stats.items():  # type: ignore[attr-defined]
        key = f"{Path(file).name}:{function}"
        seconds[key] = seconds.get(key, 0.0) + cumulated
    total = stats.total_tt  # type: ignore[attr-defined]
    parts, within = (
        {name: sum(seconds.get(key, 0.0) for key in keys) / total for name, keys in group.items()}
        for group in (PARTS, WITHIN)
    )
    return {"parts": {**parts, "driver": 1.0 - sum(parts.values())}, "within": within}


def row(name: str, found: dict[str, Any]) -> str:
    return (
        f"{name:22} {found['requests']:>7} requests {found['cpu_s']:>7.1f} s CPU {found['wall_s']:>7.1f} s wall "
        f"{found['us_per_event']:>6.0f} us/event {found['us_per_request']:>6.0f} us/request"
    )


def find_workload(traces: Path | None) -> Workload:
    if traces is None:
        return load_workload(WORKLOADS / "mixed-synthetic.yaml")
    return load_workload(WORKLOADS / "servegen-day.yaml", {TRACE: traces / "arrivals" / TRACE})


def main() -> None:
    """Run, print and write JSON."""
    everything = {"day": day, "leaping": leaping, "instances": instances, "shares": shares}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, metavar="DIR")
    parser.add_argument("--parts", default=",".join(everything), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULTS / "simulation.json", metavar="FILE")
    args = parser.parse_args()
    gc.set_threshold(GC_THRESHOLD)
    workload = find_workload(args.traces)
    found = json.loads(args.json.read_text()) if args.json.exists() else {}
    for part in args.parts.split(","):
        busy = os.getloadavg()[0]
        print(f"load average {busy:.2f} before {part}")
        result = everything[part](workload, args.seed)
        found[part] = {
            **environment(args.seed),
            "command": command(),
            "workload": workload.name,
            "profile": PROFILE,
            "load_average_before": busy,
            **result,
        }
        write_results(args.json, found)


if __name__ == "__main__":
    main()
