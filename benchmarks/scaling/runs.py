"""One run of a fleet on a trace, and many of them: performed once, then found in a file.

A run is found again by a digest of all that decides its figures: its settings, the sources of the simulator and what it
runs, this file, the profile, the workload and its traces.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from hyperflexis.bench import load_workload
from hyperflexis.core.links import Split
from hyperflexis.core.profile import Profile
from hyperflexis.engines.profiles import load_profile, shipped_profiles
from hyperflexis.policy.catalog import find_policy
from hyperflexis.policy.scale import ModelScale, ScaleConfig
from hyperflexis.sim.config import SimConfig
from hyperflexis.sim.driver import MODEL, simulate
from hyperflexis.sim.foresight import known_demand, needs, programme
from hyperflexis.sim.workload import Arrival, TraceArrivals, Workload, generate
from hyperflexis.simulate_options import parse_start
from hyperflexis.worker_pool import performed

from ..experiments.cache import SOURCES, Cache, Files
from ..experiments.scenarios import WORKLOADS, csv_names

TARGET = 0.99
LAX = "soon"
"""The class that all requests are of in a lax mix."""
FORESIGHT = "foresight@"
"""The scaler that knows every arrival, with its margin behind."""


@dataclass(frozen=True, slots=True)
class Task:
    """A run of ``workload``, a file's name, on ``profile``. ``scaler`` "" is a fixed fleet of ``first`` instances;
    others begin with as many, and ``start`` is seconds, or the best means of the profile. With ``prefill`` the fleet is
    disaggregated, and begins with so many instances for prompts. ``copies`` of a trace, 0: as the workload says. With
    ``lax`` all requests are of the class LAX. Judged are those that come from ``since_s`` on for ``for_s``, 0: all."""

    workload: str
    seed: int
    first: int
    scaler: str = ""
    start: str = ""
    shells: int = 0
    shell_price: float = 0.0
    prefill: int = 0
    copies: int = 0
    lax: bool = False
    profile: str = "h100-llama-2-70b-tp4"
    duration_s: float = 0.0
    since_s: float = 0.0
    for_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Row:
    """``instances`` is the mean, shells with their price; ``demand`` the mean of what the requests keep busy, in
    instances; ``most`` the largest fleet."""

    attainment: float
    instances: float
    demand: float
    most: int
    requests: int
    launches: int
    cpu_s: float


class Traces:
    """Workloads with the csv files of a folder, and their arrivals; the last ones are kept."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = files
        self._last: tuple[tuple[object, ...], Workload, list[Arrival]] | None = None

    def arrivals(self, task: Task) -> tuple[Workload, list[Arrival]]:
        """What is asked of the fleet."""
        key = (task.workload, task.seed, task.copies, task.lax, task.duration_s)
        if self._last is None or self._last[0] != key:
            names = csv_names(task.workload)
            workload = load_workload(WORKLOADS / task.workload, {name: self.files[name] for name in names})
            if task.lax:
                classes = tuple(replace(one, share=1.0) for one in workload.classes if one.name == LAX)
                workload = replace(workload, classes=classes)
            if task.copies and isinstance(workload.arrivals, TraceArrivals):
                workload = replace(workload, arrivals=replace(workload.arrivals, copies=task.copies))
            if task.duration_s:
                workload = replace(workload, duration_s=task.duration_s)
            self._last = key, workload, generate(workload, task.seed)
        return self._last[1:]


def measure(traces: Traces, task: Task) -> Row:
    """Perform a run."""
    workload, arrivals = traces.arrivals(task)
    profile = load_profile(task.profile)
    demand = known_demand(arrivals, profile.coefficients, workload.duration_s)
    began = time.process_time()
    config = _config(task, profile, demand)
    result = simulate(config, arrivals, workload.duration_s)
    until_s = task.since_s + task.for_s if task.for_s else workload.duration_s
    pairs = zip(arrivals, result.run.records, strict=True)
    kept = [record.is_attained for arrival, record in pairs if task.since_s <= arrival.t < until_s]
    return Row(
        sum(kept) / len(kept),
        result.accelerator_s / result.run.ended_s,
        sum(demand) / len(demand),
        max((count for _, count in result.sizes), default=task.first),
        len(kept),
        result.counters.launches,
        time.process_time() - began,
    )


def _config(task: Task, profile: Profile, demand: list[float]) -> SimConfig:
    rules = find_policy("hyperflexis")
    split = Split.of(task.first, task.prefill, static=False) if task.prefill else None
    if not task.scaler:
        return SimConfig(profile, task.first, "hyperflexis", rules, split=split)
    starts, first, scaler = parse_start(task.start, profile), task.first, task.scaler
    seconds = {means: sum(length for _, length in phases) for means, phases in starts.items()}
    if scaler.startswith(FORESIGHT):
        steps = programme(needs(demand, float(scaler.removeprefix(FORESIGHT)), 1), min(seconds.values()))
        first, scaler = steps[0][1], "follow@" + ",".join(f"{t:g},{n}" for t, n in steps)
    model = ModelScale(MODEL, target=TARGET, standby=task.shells, start_s=dict(seconds), latency=profile.coefficients)
    scale = ScaleConfig((model,), None, scaler)
    fleet = SimConfig(profile, first, "hyperflexis", rules, split=split)
    return replace(fleet, scale=scale, starts=starts, shell_price=task.shell_price)


class Runs:
    """Rows by task, performed once and kept in ``path``; see Cache."""

    def __init__(self, traces: Traces, path: Path, jobs: int) -> None:
        self._traces, self._jobs = traces, jobs
        self._cache = Cache(path, lambda row: Row(**row))
        self._files = Files()
        self.sources = self._files.code(SOURCES, [Path(__file__)])
        self.used: dict[Task, Row] = {}

    def __call__(self, tasks: Iterable[Task]) -> list[Row]:
        """The row of each task; those that are not known are performed, and kept at once."""
        wanted = list(tasks)
        keys = {task: self._key(task) for task in wanted}
        found = {task: row for task, key in keys.items() if (row := self._cache.get(key)) is not None}
        missing = [task for task in keys if task not in found]
        with performed(_measurer, self._traces, missing, self._jobs) as rows:
            for task, row in rows:
                found[task] = row
                self._cache.put(keys[task], task.scaler, row)
                what = f"{task.scaler or 'fixed'} {task.start}, {task.first} at first, seed {task.seed}"
                figures = f"{100 * row.attainment:.2f}%, {row.instances:.2f} instances, {row.cpu_s:.0f} s"
                print(f"  {task.workload}{' lax' * task.lax}: {what}: {figures}", flush=True)
        self.used |= {task: found[task] for task in keys}
        return [found[task] for task in wanted]

    def _key(self, task: Task) -> str:
        files = [WORKLOADS / task.workload, shipped_profiles()[task.profile]]
        files += [self._traces.files[name] for name in sorted(csv_names(task.workload))]
        return self._files.key(task, self.sources, files)


def _measurer(traces: Traces) -> Callable[[Task], Row]:
    return partial(measure, traces)
