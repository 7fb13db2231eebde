"""All experiments: ``python -m benchmarks.experiments --traces DIR``, from the repository's root.

1. the baselines are tuned on windows of their own
2. every experiment says which runs it needs; those that are not in the cache are performed, on all cores
3. results go to benchmarks/results/experiments/*.json, tables and a picture to docs/experiments.md

Ctrl-C stops it, and the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hyperflexis.errors import ConfigError
from hyperflexis.telemetry import plot
from hyperflexis.telemetry.machine import num_cores

from ..common import resumable
from . import goodput, latency, optimum, overload, parts, picture, prefixes, robustness, split, targets, tune
from .cache import Cache, Digests
from .measure import ROOT, Row, Rows, Task, row_from_dict
from .pages import Places, write_page, write_results
from .plan import Plan
from .pool import perform, plan_work
from .progress import Progress, minutes
from .scenarios import SCENARIOS, WITHOUT_TRACES, Windows, csv_names, find_traces
from .tables import table

CACHE = ROOT / ".experiments"
TRACKED = Places(ROOT / "docs", ROOT / "benchmarks" / "results" / "experiments")


@dataclass(frozen=True, slots=True)
class Experiment:
    """What runs it needs, its result, and that in markdown. ``tuned``: it needs the baselines' settings."""

    tasks: Callable[[Plan], list[Task]]
    result: Callable[[Plan, Rows], Any]
    markdown: Callable[[Plan, Any], str]
    tuned: bool = False


EXPERIMENTS: dict[str, Experiment] = {
    "e1": Experiment(overload.tasks, overload.result, overload.markdown, tuned=True),
    "e2": Experiment(goodput.tasks, goodput.result, goodput.markdown, tuned=True),
    "e3": Experiment(latency.tasks, latency.result, latency.markdown, tuned=True),
    "e4": Experiment(optimum.tasks, optimum.result, optimum.markdown),
    "e5": Experiment(robustness.tasks, robustness.result, robustness.markdown),
    "e6": Experiment(prefixes.tasks, prefixes.result, prefixes.markdown),
    "e7": Experiment(parts.tasks, parts.result, parts.markdown),
    "e8": Experiment(split.tasks, split.result, split.markdown),
    "e9": Experiment(
        lambda plan: split.tasks(split.turning(plan)),
        lambda plan, rows: split.result(split.turning(plan), rows),
        lambda plan, found: split.markdown(plan, found, split.TURNS_PICTURE),
    ),
}
TUNING = Experiment(tune.tasks, tune.result, tune.markdown)

FULL = Plan()
QUICK = Plan(
    seeds=(1,),
    duration_s=10.0,
    lengths_s=(5.0, 10.0),
    our_loads=(0.8, 1.2, 1.6),
    best_loads=(0.6, 0.8, 1.2),
    door_loads=(0.8, 1.2),
    latency_loads=(0.8,),
    known_loads=(0.8, 1.6),
    robust_loads=(1.2,),
    abuse_loads=(0.37,),
    prefix_loads=(0.7,),
    ablation_loads=(1.2,),
    split_loads=(0.9, 1.3),
    turns_loads=(1.3,),
    split_chunks=(4096,),
    tuning_seeds=(101,),
    tuning_s=5.0,
    chunks=(1024, 4096),
    margins=(1.0,),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen experiments and write what they gave."""
    args = parse(argv)
    return resumable(lambda: run(args))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--traces", type=Path, metavar="DIR", help="folder of the csv files that benchmarks/workloads/README.md names")
    add("--only", metavar="e1,e2", help=f"some of {', '.join(EXPERIMENTS)} (default: all)")
    add("--quick", action="store_true", help="seconds instead of hours: shows that it works, and nothing else")
    add("--jobs", type=int, default=num_cores(), metavar="N", help="processes (default: %(default)s)")
    add("--out", type=Path, metavar="DIR", help="where page, picture and JSON go (default: the repository)")
    add("--cache", type=Path, default=CACHE, metavar="DIR", help="where runs are kept (default: .experiments)")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Tune, measure and write. Raises HyperFlexisError for what a user can mend."""
    names = chosen(args.only)
    if args.jobs < 1:
        raise ConfigError(f"--jobs {args.jobs} must be at least 1")
    if {"e2", "e8", "e9"} & set(names):
        plot.require()  # better known before hours of runs than after
    windows = Windows(find_traces(args.traces) if args.traces else {})
    plan = make_plan(QUICK if args.quick else FULL, windows)
    names = playable(names, plan)
    digests, cache = Digests(windows.traces), Cache(args.cache / "runs.jsonl", row_from_dict)
    tracked = not args.quick and bool(args.traces) and args.out is None
    kind = "quick" if args.quick else "all" if args.traces else "synthetic"
    out = args.out or args.cache / kind
    places = TRACKED if tracked else Places(out, out)

    def measured(tasks: Sequence[Task]) -> Rows:
        work = plan_work(tasks, windows, digests, cache)
        with Progress(len(work.todo), sum(work.cpu_s.values()) / args.jobs) as progress:
            return perform(work, windows, cache, args.jobs, lambda cpu_s: progress.advance(cpu_s / args.jobs))

    tuned = any(EXPERIMENTS[name].tuned for name in names)
    estimate(
        replace(plan, choices=tune.unchosen(plan), splits=split.unchosen(plan)),
        names,
        tuned,
        windows,
        digests,
        cache,
        args.jobs,
    )
    stages: dict[str, Experiment] = {}
    rows: dict[Task, Any] = {}
    if tuned:
        rows |= measured(tune.tasks(plan))
        plan = replace(plan, choices=tune.choose(tune.scores(plan, rows)))
        stages["tuning"] = TUNING
    for name, narrowed in (("e8", plan), ("e9", split.turning(plan))):
        if name in names:
            plan = replace(plan, splits={**plan.splits, **split.choose(narrowed, measured(split.tuning(narrowed)))})
    stages |= {name: EXPERIMENTS[name] for name in names}
    rows |= measured([task for name in names for task in EXPERIMENTS[name].tasks(plan)])
    sections = {"setting": setting(plan, windows)}
    for name, stage in stages.items():
        found = stage.result(plan, rows)
        sections[name] = stage.markdown(plan, found)
        runs = {task: rows[task] for task in stage.tasks(plan)}
        sections[name] += f"\n\n{extrapolated(runs)}"
        raw = {} if stage is TUNING else runs  # its scores are enough
        write_results(places.results / f"{name}.json", plan, digests.sources, found, raw)
        if name == "e2":
            picture.draw(goodput.panels(plan, found), places.docs / goodput.PICTURE)
        if name == "e8":
            picture.draw(split.panels(plan, found), places.docs / split.PICTURE, lowest=40.0)
        if name == "e9":
            picture.draw(split.panels(plan, found), places.docs / split.TURNS_PICTURE, lowest=40.0)
    reached = targets.markdown(places.results, {name: plan.title(name) for name in plan.scenarios})
    write_page(ROOT / "docs" / "experiments.md", places, sections, {"targets": reached}, fresh=not tracked)
    print(f"written: {places.docs / 'experiments.md'}, {places.results}")


def chosen(only: str | None) -> list[str]:
    """The experiments that ``--only`` names. Raises ConfigError for one that there is not."""
    names = list(EXPERIMENTS) if only is None else list(dict.fromkeys(only.split(",")))
    for name in names:
        if name not in EXPERIMENTS:
            raise ConfigError(f"--only: there is no experiment {name!r}; there are {', '.join(EXPERIMENTS)}")
    return names


def make_plan(plan: Plan, windows: Windows) -> Plan:
    """``plan`` on what can be played: all scenarios with traces, without them the one of fitted distributions."""
    blind = str(parts.PREFIX_BLIND) if (ROOT / parts.PREFIX_BLIND).exists() else None
    plan = replace(plan, parts=tuple(parts.find_parts()), prefix_blind=blind)
    if not windows.traces:
        plan = replace(
            plan,
            scenarios=WITHOUT_TRACES,
            bursty=WITHOUT_TRACES,
            ablated=(*WITHOUT_TRACES, *(name for name in plan.ablated if not csv_names(SCENARIOS[name].workload))),
            split=WITHOUT_TRACES,
            turns=(),
            fast=(),
            prefixes=(),
            stress=False,
        )
    named = (*plan.scenarios, *plan.split, *plan.turns)
    return replace(plan, yardsticks={name: windows.yardstick(name) for name in named})


def playable(names: Sequence[str], plan: Plan) -> list[str]:
    """Those of ``names`` that have something to run; says which have not."""
    missing = {}
    if tuple(plan.scenarios) == WITHOUT_TRACES:
        print("no --traces: only the fitted distributions of mixed-synthetic.yaml are played, without shift and abuse")
        missing["e6"] = "prompts that share prefixes come with --traces"
        missing["e9"] = "the mix that turns comes with --traces"
    elif plan.prefix_blind is None:
        missing["e6"] = f"{parts.PREFIX_BLIND} is not there"
    for name in names:
        if name in missing:
            print(f"{name} is left out: {missing[name]}")
    return [name for name in names if name not in missing]


def estimate(
    plan: Plan, names: Sequence[str], tuned: bool, windows: Windows, digests: Digests, cache: Cache[Row], jobs: int
) -> None:
    """Say how many runs there are, and how long they will take."""
    stages = [*([TUNING] if tuned else []), *(EXPERIMENTS[name] for name in names)]
    work = plan_work((task for stage in stages for task in stage.tasks(plan)), windows, digests, cache)
    cpu_s = sum(work.cpu_s.values())
    print(
        f"{len(work.keys)} runs at most, {len(work.keys) - len(work.todo)} of them in the cache; the rest takes about "
        f"{minutes(cpu_s)} of a core, {minutes(cpu_s / jobs)} in {jobs} process{'es' if jobs > 1 else ''}",
        flush=True,
    )


def extrapolated(runs: Rows) -> str:
    """How much of the iteration time lies outside of what the profiles were measured for."""
    shares: dict[str, list[float]] = {}
    for task, row in runs.items():
        shares.setdefault(Path(SCENARIOS[task.scenario].profile).name.removesuffix(".json"), []).append(
            row.outside_share
        )
    spans = (f"`{name}` {100 * min(found):.0f} to {100 * max(found):.0f}%" for name, found in sorted(shares.items()))
    return f"Iteration time outside of what the profile was measured for, by run: {', '.join(spans)}."


def setting(plan: Plan, windows: Windows) -> str:
    """The scenarios in figures."""
    heads = [
        "",
        "λ*, requests/s",
        "90% of the shedding fluid",
        "requests of a run at load 1",
        "laps of its part of the trace",
    ]
    lines = []
    for name in plan.scenarios:
        yardstick = plan.yardsticks[name]
        duration_s = plan.duration_s or windows.workload(name).duration_s
        lines.append(
            [
                plan.title(name),
                f"{yardstick.capacity_rps:.1f}",
                f"{yardstick.fluid_load:.2f}",
                f"{yardstick.capacity_rps * duration_s:,.0f}",
                ", ".join(f"{source} {laps:.1f}" for source, laps in windows.laps(name).items()) or "–",
            ]
        )
    return table(heads, lines)


if __name__ == "__main__":
    sys.exit(main())
