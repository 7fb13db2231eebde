"""Where the experiments happen: workloads on fleets, and the window of a trace that each run sees.

*Load* is the arrival rate over lambda*, the capacity of the fleet for the mix (sim/oracle.py). lambda* is computed once
a scenario, from the workload file's own arrivals.

*Windows.* A trace is cut in two: runs of tuning seeds (101 and above) read its first 40%, reported runs the rest, so
that nothing is reported on a second that a policy was tuned on. In its part each class begins at a place that the seed
draws, wraps round at the end, and is played at the speed at which the class gets exactly its number of requests: the
mix and the load are the same in every window, the bursts are the trace's. A reported window of 600 s takes in most of
the part, or all of it, so windows of different seeds overlap: they differ in where they begin, in how the bursts of
the classes meet, and in the lengths, which are drawn anew.

*More users, not faster ones.* Where a class needs several times the requests that its trace has a second, it plays as
many *copies* of the trace, each from a place of its own on, so that each goes at about the speed at which it was
recorded. A trace played three times as fast has bursts three times as high; a service with three times the users has
more of them. The scenarios named *fast* play one copy all the same, for those who think otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from random import Random

from hyperflexis.bench import load_workload
from hyperflexis.core.profile import Profile, profile_from_dict, profile_to_dict
from hyperflexis.engines.profiles import load_profile
from hyperflexis.errors import ConfigError
from hyperflexis.sim.oracle import fluid_load_at, request_costs_s
from hyperflexis.sim.workload import (
    Arrival,
    Arrivals,
    RateArrivals,
    TraceArrivals,
    TraceRow,
    Workload,
    generate,
    scaled,
)

WORKLOADS = Path(__file__).resolve().parents[1] / "workloads"
PROFILES = WORKLOADS.with_name("profiles")
FIRST_TUNING_SEED = 101
TUNING_SHARE = 0.4
"""Share of each trace, from its start, that is kept for tuning."""
SUFFIXES = ("", "_h1")
"""Endings of a trace's name that are looked for: `_h1` is its first half."""
SHARED = ""
"""The source of arrivals of the classes that have none of their own."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A workload on a fleet. ``yardstick`` names the scenario whose lambda* and request rates loads refer to (its own
    by default); with ``fast`` each class plays one copy of its trace at whatever speed that takes; ``change`` is made
    to the workload before it is played."""

    title: str
    workload: str
    profile: str = "ascend-910b3"
    instances: int = 4
    duration_s: float = 600.0
    yardstick: str | None = None
    fast: bool = False
    change: Callable[[Workload], Workload] | None = None


def without_phases(workload: Workload) -> Workload:
    """The mix that the phases have on average, from start to end."""
    starts = [0.0, *(phase.at_s for phase in workload.phases)]
    ends = [*starts[1:], workload.duration_s]
    shares = {c.name: c.share for c in workload.classes}
    mean = dict.fromkeys(shares, 0.0)
    for start, end, change in zip(starts, ends, [(), *(phase.shares for phase in workload.phases)], strict=True):
        shares |= dict(change)
        total = sum(shares.values())
        for name, share in shares.items():
            mean[name] += share / total * (end - start) / workload.duration_s
    return replace(workload, classes=tuple(replace(c, share=mean[c.name]) for c in workload.classes), phases=())


def without_steps(workload: Workload) -> Workload:
    """Every class at its first rate for good."""

    def first(arrivals: Arrivals | None) -> Arrivals | None:
        return replace(arrivals, steps=arrivals.steps[:1]) if isinstance(arrivals, RateArrivals) else arrivals

    return replace(workload, classes=tuple(replace(c, arrivals=first(c.arrivals)) for c in workload.classes))


def lasting(workload: Workload, duration_s: float) -> Workload:
    """The workload's whole course in ``duration_s``: its phases and steps of rate come as much sooner."""
    factor = duration_s / workload.duration_s

    def moved(arrivals: Arrivals | None) -> Arrivals | None:
        if not isinstance(arrivals, RateArrivals):
            return arrivals
        return replace(arrivals, steps=tuple((t * factor, rps) for t, rps in arrivals.steps))

    return replace(
        workload,
        duration_s=duration_s,
        phases=tuple(replace(phase, at_s=phase.at_s * factor) for phase in workload.phases),
        arrivals=moved(workload.arrivals),
        classes=tuple(replace(c, arrivals=moved(c.arrivals)) for c in workload.classes),
    )


H100 = "h100-llama-3.1-8b"
H100_70B = "h100-llama-2-70b-tp4"
SCENARIOS: dict[str, Scenario] = {
    "ascend-azure": Scenario("4 Ascend 910B3, Azure bursts", "mixed-ascend.yaml"),
    "ascend-poisson": Scenario("4 Ascend 910B3, Poisson", "mixed-ascend-poisson.yaml"),
    "h100-azure": Scenario("4 H100, Azure bursts", "mixed-h100.yaml", H100),
    "h100-poisson": Scenario("4 H100, Poisson", "mixed-h100-poisson.yaml", H100),
    "ascend-azure-fast": Scenario("4 Ascend 910B3, Azure played fast", "mixed-ascend.yaml", fast=True),
    "h100-azure-fast": Scenario("4 H100, Azure played fast", "mixed-h100.yaml", H100, fast=True),
    "ascend-synthetic": Scenario("4 Ascend 910B3, fitted distributions", "mixed-synthetic.yaml"),
    "shift": Scenario("4 Ascend 910B3, the mix shifts", "shift.yaml", yardstick="shift-none"),
    "shift-none": Scenario("4 Ascend 910B3, its mean mix throughout", "shift.yaml", change=without_phases),
    "abuse": Scenario("4 Ascend 910B3, one tenant sends tenfold", "abuse.yaml", yardstick="abuse-none"),
    "abuse-none": Scenario("4 Ascend 910B3, both tenants steady", "abuse.yaml", change=without_steps),
    "split-conversation": Scenario("8 H100 x 4 (70B), Azure conversation", "split-conversation.yaml", H100_70B, 8),
    "split-code": Scenario("8 H100 x 4 (70B), Azure code", "split-code.yaml", H100_70B, 8),
    "split-shift": Scenario(
        "8 H100 x 4 (70B), code turns to conversation", "split-shift.yaml", H100_70B, 8, yardstick="split-shift-none"
    ),
    "split-shift-none": Scenario(
        "8 H100 x 4 (70B), code and conversation", "split-shift.yaml", H100_70B, 8, change=without_phases
    ),
    "torch": Scenario("2 torch engines on a CPU", "../../examples/demo.yaml", str(PROFILES / "torch-20m.json"), 2),
    "mooncake": Scenario("4 H100, Mooncake conversations", "mooncake.yaml", H100),
    "sessions": Scenario("4 H100, sessions of coding agents", "sessions.yaml", H100, duration_s=900.0),
}
MIXED = ("ascend-azure", "ascend-poisson", "h100-azure", "h100-poisson")
BURSTY = ("ascend-azure", "h100-azure")
FAST = ("ascend-azure-fast", "h100-azure-fast")
SPLIT = ("split-conversation", "split-code", "mooncake", "ascend-azure")
TURNS = ("split-shift",)
ABLATED = (*BURSTY, "torch")
WITHOUT_TRACES = ("ascend-synthetic",)


@dataclass(frozen=True, slots=True)
class Yardstick:
    """What a load means in a scenario: ``capacity_rps`` is lambda*, ``nominal_rps`` the workload file's rate, and
    ``source_rps`` that of each source of arrivals (a class, or SHARED). ``fluid_load`` is where the shedding fluid
    keeps 90%, ``mixed_fluid_load`` where it does with all classes at the tightest pace."""

    capacity_rps: float
    nominal_rps: float
    source_rps: Mapping[str, float]
    fluid_load: float
    mixed_fluid_load: float


class Windows:
    """Workloads, profiles and arrivals of the scenarios, each read once. ``traces`` are csv files by the name that
    workload files give them."""

    def __init__(self, traces: Mapping[str, Path]) -> None:
        self.traces = dict(traces)
        self._workloads: dict[str, Workload] = {}
        self._yardsticks: dict[tuple[str, float], Yardstick] = {}

    def workload(self, name: str) -> Workload:
        """A scenario's workload at its file's rate. Raises ConfigError where a trace is missing."""
        if name not in self._workloads:
            scenario = SCENARIOS[name]
            path = WORKLOADS / scenario.workload
            text = path.read_text()
            workload = load_workload(path, {csv: file for csv, file in self.traces.items() if csv in text})
            self._workloads[name] = workload if scenario.change is None else scenario.change(workload)
        return self._workloads[name]

    def profile(self, name: str, slowness: float = 1.0) -> Profile:
        """The scenario's profile, on a device that takes ``slowness`` times as long."""
        profile = load_profile(SCENARIOS[name].profile)
        return profile if slowness == 1.0 else slower(profile, slowness)

    def yardstick(self, name: str, slowness: float = 1.0) -> Yardstick:
        """What a load means on a device that takes ``slowness`` times what the profile says."""
        name = SCENARIOS[name].yardstick or name
        key = (name, slowness)
        if key not in self._yardsticks:
            workload = self.workload(name)
            arrivals = generate(workload)
            own = {c.name for c in workload.classes if c.arrivals is not None}
            counts = Counter(a.slo_class if a.slo_class in own else SHARED for a in arrivals)
            profile = self.profile(name, slowness)
            costs_s, mixed_s = request_costs_s(arrivals, profile), request_costs_s(arrivals, profile, mixed=True)
            self._yardsticks[key] = Yardstick(
                capacity_rps=SCENARIOS[name].instances * len(costs_s) / sum(costs_s),
                nominal_rps=len(arrivals) / workload.duration_s,
                source_rps={source: count / workload.duration_s for source, count in counts.items()},
                fluid_load=fluid_load_at(costs_s),
                mixed_fluid_load=fluid_load_at(mixed_s) * sum(costs_s) / sum(mixed_s),
            )
        return self._yardsticks[key]

    def laps(self, name: str) -> dict[str, float]:
        """How often a reported run of the usual length at load 1 plays its part of a trace, by source of arrivals."""
        workload, yardstick = self.workload(name), self.yardstick(name)
        requests = SCENARIOS[name].duration_s * yardstick.capacity_rps / yardstick.nominal_rps
        sources = {SHARED: workload.arrivals, **{c.name: c.arrivals for c in workload.classes}}
        return {
            source: yardstick.source_rps[source] * requests / len(_part_rows(arrivals, part_of(1)))
            for source, arrivals in sources.items()
            if isinstance(arrivals, TraceArrivals)
        }

    def arrivals(self, name: str, load: float, seed: int, duration_s: float, slowness: float = 1.0) -> list[Arrival]:
        """The requests of a run: ``load`` times lambda* a second, in the window of ``seed``."""
        yardstick = self.yardstick(name, slowness)
        factor = load * yardstick.capacity_rps / yardstick.nominal_rps
        workload = lasting(scaled(self.workload(name), factor), duration_s)

        def window(source: str, arrivals: Arrivals | None) -> Arrivals | None:
            if not isinstance(arrivals, TraceArrivals):
                return arrivals
            rps = yardstick.source_rps[source] * yardstick.capacity_rps / yardstick.nominal_rps
            copies = 1 if SCENARIOS[name].fast else num_copies(arrivals, part_of(seed), rps)
            count, random = round(rps * load * duration_s), Random(f"{seed}:window:{source}")
            return windowed(arrivals, part_of(seed), random, count, duration_s, copies)

        return generate(
            replace(
                workload,
                arrivals=window(SHARED, workload.arrivals),
                classes=tuple(replace(c, arrivals=window(c.name, c.arrivals)) for c in workload.classes),
            ),
            seed,
        )


def part_of(seed: int) -> tuple[float, float]:
    """The part of every trace, in shares of its length, that runs of ``seed`` may read."""
    return (0.0, TUNING_SHARE) if seed >= FIRST_TUNING_SEED else (TUNING_SHARE, 1.0)


def num_copies(source: TraceArrivals, part: tuple[float, float], rps: float) -> int:
    """How many copies of a part of the trace bring ``rps`` requests a second at about the speed it was recorded at."""
    rows = _part_rows(source, part)
    return max(round(rps * (rows[-1].t - rows[0].t) / (len(rows) - 1)), 1)


def windowed(
    source: TraceArrivals,
    part: tuple[float, float],
    random: Random,
    count: int,
    duration_s: float,
    copies: int = 1,
) -> TraceArrivals:
    """``count`` requests in ``duration_s`` seconds: ``copies`` of a part of the trace, each from a random place on."""
    rows = _part_rows(source, part)
    first = rows[0].t
    rows = [replace(row, t=row.t - first) for row in rows]
    if copies == 1:
        start_s, span_s, _ = _window(rows, random, count)
        return replace(source, rows=tuple(rows), start_s=start_s, rate_scale=span_s / duration_s)
    found: list[TraceRow] = []
    for copy in range(copies):
        share = count * (copy + 1) // copies - count * copy // copies
        start_s, span_s, before = _window(rows, random, share)
        for index in range(before, before + share):
            found.append(replace(rows[index % len(rows)], t=(_time(rows, index) - start_s) * duration_s / span_s))
    found.sort(key=attrgetter("t"))
    # Stretched by less than a gap, so that it is exactly over when it would wrap.
    stretch = duration_s * (count - 1) / (count * found[-1].t)
    return replace(source, rows=tuple(replace(row, t=row.t * stretch) for row in found), start_s=0.0, rate_scale=1.0)


def _window(rows: list[TraceRow], random: Random, count: int) -> tuple[float, float, int]:
    """Where ``count`` requests begin, how long they take, and the index of the first."""
    start_s = random.uniform(0.0, rows[-1].t)
    before = sum(row.t < start_s for row in rows)
    # Halfway between the last one and the next, so that rounding lets in neither more nor less.
    return start_s, 0.5 * (_time(rows, before + count - 1) + _time(rows, before + count)) - start_s, before


def _time(rows: list[TraceRow], index: int) -> float:
    """When the request of that index comes, counted on over the trace's end, as generate wraps it."""
    laps, index = divmod(index, len(rows))
    return laps * rows[-1].t * len(rows) / (len(rows) - 1) + rows[index].t


def _part_rows(source: TraceArrivals, part: tuple[float, float]) -> list[TraceRow]:
    end = source.rows[-1].t
    return [row for row in source.rows if part[0] * end <= row.t and (row.t < part[1] * end or part[1] == 1.0)]


def slower(profile: Profile, factor: float) -> Profile:
    """The profile of a device that takes ``factor`` times as long for everything."""
    data = profile_to_dict(profile)
    for key in ("c0", "c1", "c2", "c3", "c4"):
        data["coefficients"][key] *= factor
    for grid in data.get("table", {}).values():
        grid["ms"] = _times(grid["ms"], factor)
    return profile_from_dict(data, f"{profile.name} x {factor:g}")


def _times(values: object, factor: float) -> object:
    return [_times(value, factor) for value in values] if isinstance(values, list) else factor * float(str(values))


def find_traces(folder: Path, workloads: Iterable[str] | None = None) -> dict[str, Path]:
    """The csv files that ``workloads`` name, or those of the scenarios, wherever under ``folder`` they lie.

    Raises ConfigError naming what is missing.
    """
    files = {path.name: path for path in sorted(folder.rglob("*.csv"))}
    found, missing = {}, []
    if workloads is None:
        workloads = {scenario.workload for scenario in SCENARIOS.values()}
    for name in sorted({name for workload in workloads for name in csv_names(workload)}):
        stem = name.removesuffix(".csv")
        path = next((files[f"{stem}{suffix}.csv"] for suffix in SUFFIXES if f"{stem}{suffix}.csv" in files), None)
        if path is None:
            missing.append(name)
        else:
            found[name] = path
    if missing:
        raise ConfigError(f"{folder} has no {', '.join(missing)}: benchmarks/workloads/README.md says how to get them")
    return found


def csv_names(workload: str) -> set[str]:
    """The csv files that a workload file names outside of its comments."""
    lines = (WORKLOADS / workload).read_text().splitlines()
    words = " ".join(line.partition("#")[0] for line in lines)
    for sign in "{},":
        words = words.replace(sign, " ")
    return {word for word in words.split() if word.endswith(".csv")}
