"""What a fleet that follows its load costs, in percent of the fixed fleet of equal attainment.

    python benchmarks/scale.py WORKLOAD --csv NAME=FILE --fixed 8,10,12 [--scalers forecast,rate@2,60,...]
        [--starts 2,60] [--first N] [--foresight] [--seeds 1] [--jobs 1] [--json FILE]

Each fixed size and each scaler is one run a seed. ``fixed_equal`` is interpolated between the two sizes around the
scaler's attainment (null beyond the largest, so try sizes enough). Scalers and foresight begin with --first instances.
``foresight`` is the programme of sim/foresight.py with the margin, searched in steps, that first reaches the target.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import RESULTS, command, environment, write_results
from hyperflexis.bench import load_workload, parse_csv_options
from hyperflexis.core.profile import Profile
from hyperflexis.engines.profiles import load_profile
from hyperflexis.policy.baselines.scale import fixed_equal
from hyperflexis.policy.catalog import find_policy, split_specs
from hyperflexis.policy.scale import ModelScale, ScaleConfig
from hyperflexis.sim.config import SimConfig, SimResult
from hyperflexis.sim.driver import MODEL, simulate
from hyperflexis.sim.foresight import known_demand, needs, programme
from hyperflexis.sim.launches import starts_in
from hyperflexis.sim.workload import Arrival, generate

MARGINS = [0.2 * step for step in range(16)]


def run(
    profile: Profile,
    arrivals: list[Arrival],
    duration_s: float,
    instances: int,
    scaler: str,
    start_s: float,
    target: float,
) -> tuple[float, float, SimResult]:
    """Attainment and mean instances, of a fixed fleet where ``scaler`` is empty."""
    scale = None
    if scaler:
        one = ModelScale(MODEL, target=target, start_s={"disk": start_s}, latency=profile.coefficients)
        scale = ScaleConfig((one,), None, scaler)
    policy = find_policy("hyperflexis")
    config = SimConfig(profile, instances, "hyperflexis", policy, scale=scale, starts=starts_in(start_s))
    result = simulate(config, arrivals, duration_s)
    records = result.run.records
    kept = sum(record.is_attained for record in records) / len(records)
    return kept, result.accelerator_s / result.run.ended_s, result


def main() -> None:
    """Run, print a line a run, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", type=Path)
    parser.add_argument("--csv", action="append", default=[])
    parser.add_argument("--profile", default="h100-llama-2-70b-tp4")
    parser.add_argument("--fixed", required=True, help="sizes of fixed fleets")
    parser.add_argument("--scalers", default="forecast")
    parser.add_argument("--starts", default="2,60", help="seconds that a start takes")
    parser.add_argument("--first", type=int, help="instances at first (default: the middle one of --fixed)")
    parser.add_argument("--foresight", action="store_true")
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--duration", type=float)
    parser.add_argument("--target", type=float, default=0.99)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    workload = load_workload(args.workload, parse_csv_options(args.csv))
    if args.duration:
        workload = replace(workload, duration_s=args.duration)
    profile = load_profile(args.profile)
    sizes = [int(size) for size in args.fixed.split(",")]
    first = args.first or sizes[len(sizes) // 2]
    found: list[dict[str, Any]] = []
    for seed in map(int, args.seeds.split(",")):
        arrivals = generate(workload, seed)
        demand = known_demand(arrivals, profile.coefficients, workload.duration_s)
        print(f"seed {seed}: {len(arrivals)} requests, demand {sum(demand) / len(demand):.2f} instances on average")
        points = []
        for size in sizes:
            kept, mean, _ = run(profile, arrivals, workload.duration_s, size, "", 0.0, args.target)
            points.append((size, kept))
            found.append({"seed": seed, "scaler": f"fixed@{size}", "attainment": kept, "instances": mean})
            print(f"  fixed {size:3d}: {100 * kept:.2f}%", flush=True)
        at_target = fixed_equal(points, args.target)

        def note(
            name: str,
            start_s: float,
            kept: float,
            mean: float,
            result: SimResult,
            points: list[tuple[int, float]],
            at: Any,
        ) -> None:
            equal = fixed_equal(points, kept)
            row = {
                "seed": seed,  # noqa: B023
                "scaler": name,
                "start_s": start_s,
                "attainment": kept,
                "instances": mean,
                "fixed_equal": equal,
                "percent_of_fixed_equal": 100.0 * mean / equal if equal else None,
                "percent_of_fixed_at_target": 100.0 * mean / at if at else None,
                "launches": result.counters.launches,
            }
            found.append(row)
            shown = "" if equal is None else f"{row['percent_of_fixed_equal']:.1f}% of {equal:.2f}"
            print(f"  {name} start {start_s:g} s: {100 * kept:.2f}%, {mean:.2f} instances, {shown}", flush=True)

        for start_s in map(float, args.starts.split(",")):
            for scaler in split_specs(args.scalers):
                outcome = run(profile, arrivals, workload.duration_s, first, scaler, start_s, args.target)
                note(scaler, start_s, *outcome, points, at_target)
            for margin in MARGINS if args.foresight else []:
                steps = programme(needs(demand, margin, 1), start_s)
                spec = "follow@" + ",".join(f"{t:g},{n}" for t, n in steps)
                kept, mean, result = run(
                    profile, arrivals, workload.duration_s, steps[0][1], spec, start_s, args.target
                )
                if kept >= args.target or margin == MARGINS[-1]:
                    note(f"foresight {margin:.1f}", start_s, kept, mean, result, points, at_target)
                    break
    written = {"command": command(), "workload": args.workload.name, "profile": args.profile, "runs": found}
    name = f"scale-{args.workload.stem.removeprefix('scale-')}-{time.strftime('%H%M%S')}.json"
    write_results(args.json or RESULTS / name, {**environment(int(args.seeds.split(",")[0])), **written})


if __name__ == "__main__":
    main()
