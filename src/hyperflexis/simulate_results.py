"""What `hyperflexis simulate` gives back: figures over seeds, as JSON, as a table and as a report's contents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from statistics import fmean
from typing import Any

from rich import box
from rich.table import Table

from .sim.config import SimCounters
from .sim.oracle import LpBound, fluid_attainment, fluid_load_at
from .simulate_run import BoundTask, Cell, Outcomes, RunOutcome, RunTask, Setting, Task
from .telemetry import machine
from .telemetry.compare import Comparison, Point, carried_text
from .telemetry.plot import number, percent
from .telemetry.summary import Summary
from .telemetry.sweep import Carried, carried, combine, figures, worst_class

KEPT = 0.9
"""The share of requests that must be on time at the load that a policy carries."""
OUTSIDE_WARNING = 0.01
"""A run is extrapolated when more than this share of its time lies outside of the profile's domain."""
REFERENCE_LOAD = 1.0
"""Of a sweep, the load nearest to this is shown in detail."""
_PER_SEED = ("requests", "rejected", "unfinished", "failed", "accelerator_s")


@dataclass(frozen=True, slots=True)
class Plan:
    """A command's runs. ``rates`` has requests/s by load, in order; ``costs_s`` are seconds of an instance by request
    of a sample. ``detailed``: one load is to be shown in detail."""

    setting: Setting
    names: tuple[str, ...]
    seeds: tuple[int, ...]
    rates: Mapping[float, float]
    is_sweep: bool
    capacity_rps: float
    workload_rps: float
    costs_s: Sequence[float]
    bound: bool
    detailed: bool

    @property
    def chosen(self) -> float:
        """The load that stands for all, and is shown in detail."""
        return min(self.rates, key=lambda load: abs(load - REFERENCE_LOAD))

    def cell(self, load: float, seed: int) -> Cell:
        """The arrivals of one load and seed."""
        return Cell(load, self.rates[load] / self.workload_rps, seed)

    def run(self, name: str, load: float, seed: int) -> RunTask:
        """One policy on these arrivals."""
        detailed = self.detailed and load == self.chosen and seed == self.seeds[0]
        return RunTask(self.cell(load, seed), name, detailed)

    def tasks(self) -> list[Task]:
        """All, the longest first; the policies of one cell follow each other."""
        found: list[Task] = []
        for load in sorted(self.rates, reverse=True):
            for seed in self.seeds:
                found += [self.run(name, load, seed) for name in self.names]
                if self.bound:
                    found.append(BoundTask(self.cell(load, seed)))
        return found


class Results:
    """The outcomes of a plan's tasks, and ``wall_s`` seconds that all took together."""

    def __init__(self, plan: Plan, done: Outcomes, wall_s: float) -> None:
        self.plan = plan
        self.wall_s = wall_s
        self._done = done

    def outcomes(self, name: str, load: float) -> list[RunOutcome]:
        """A policy's runs at a load, in order of the seeds."""
        found = [self._done[self.plan.run(name, load, seed)] for seed in self.plan.seeds]
        return [outcome for outcome in found if isinstance(outcome, RunOutcome)]

    def bounds(self, load: float) -> list[LpBound]:
        """The LP bounds at a load, in order of the seeds; empty when they were not asked for."""
        found = [self._done.get(BoundTask(self.plan.cell(load, seed))) for seed in self.plan.seeds]
        return [bound for bound in found if isinstance(bound, LpBound)]

    @cached_property
    def summaries(self) -> dict[str, dict[float, Summary]]:
        """Over seeds, by policy and load."""
        return {
            name: {load: combine([o.summary for o in self.outcomes(name, load)]) for load in self.plan.rates}
            for name in self.plan.names
        }

    def fluid(self, load: float) -> float:
        """The shedding fluid's attainment."""
        return fluid_attainment(self.plan.costs_s, load)

    def lp(self, load: float) -> float | None:
        """The mean LP bound, None when a seed has none."""
        values = [bound.value for bound in self.bounds(load) if bound.value is not None]
        return fmean(values) if values and len(values) == len(self.plan.seeds) else None

    def percent_of_lp(self, name: str, load: float) -> float | None:
        """A policy's attainment in percent of the LP bound."""
        lp, attainment = self.lp(load), self.summaries[name][load].attainment
        return 100.0 * attainment / lp if lp and attainment is not None else None

    def carried(self, name: str) -> tuple[Carried, Carried]:
        """The load at which a policy keeps KEPT of all requests, and of each class's."""
        return _carried(self.summaries[name])

    def carried_by_seed(self, name: str) -> list[tuple[Carried, Carried]]:
        """The same for each seed alone."""
        runs = {load: self.outcomes(name, load) for load in self.plan.rates}
        return [_carried({load: o[i].summary for load, o in runs.items()}) for i in range(len(self.plan.seeds))]

    def outside_share(self, name: str, load: float) -> float:
        """The share of its iteration time that a policy spent outside of the profile's domain."""
        counters = [outcome.counters for outcome in self.outcomes(name, load)]
        busy_s = sum(c.busy_s for c in counters)
        return sum(c.outside_s for c in counters) / busy_s if busy_s else 0.0

    def warnings(self) -> list[str]:
        """What a reader of the figures must know."""
        found = []
        shares = {(n, load): self.outside_share(n, load) for n in self.plan.names for load in self.plan.rates}
        (name, load), worst = max(shares.items(), key=lambda item: item[1])
        if worst > OUTSIDE_WARNING:
            found.append(
                f"Extrapolated: up to {percent(worst)} of the time ({name}, load {load:.2f}) lies outside of what "
                f"profile {self.plan.setting.profile.name} was measured for."
            )
        losses: Counter[str] = Counter()
        for outcome in (o for o in self._done.values() if isinstance(o, RunOutcome)):
            losses += outcome.losses
        found += [f"{count} x {detail}" for detail, count in losses.most_common(3)]
        reasons = {bound.reason: None for load in self.plan.rates for bound in self.bounds(load) if bound.reason}
        found += [f"No LP bound: {reason}." for reason in reasons]
        return found

    # JSON

    def document(self) -> dict[str, Any]:
        """The command's JSON."""
        plan, setting = self.plan, self.plan.setting
        return {
            "workload": setting.workload.name,
            "profile": setting.profile.name,
            "seeds": list(plan.seeds),
            "instances": setting.instances,
            "duration_s": setting.workload.duration_s,
            "capacity_rps": plan.capacity_rps,
            "workload_rps": plan.workload_rps,
            "options": {
                "noise": setting.noise,
                "device_factor": setting.device_factor,
                "report_delay_ms": 1000.0 * setting.report_delay_s,
                "faults": [asdict(fault) for fault in setting.faults],
                "split": None if setting.split is None else asdict(setting.split),
                "scale": None if setting.scale is None else asdict(setting.scale) | {"starts": dict(setting.starts)},
            },
            "oracle": self._oracle(),
            "policies": {name: self._policy(name) for name in plan.names},
            "machine": machine.describe(),
            "wall_s": self.wall_s,
        }

    def _oracle(self) -> dict[str, Any]:
        points = []
        for load, rps in self.plan.rates.items():
            point: dict[str, Any] = {"load": load, "rps": rps, "fluid_attainment": self.fluid(load)}
            if bounds := self.bounds(load):
                point |= {"lp_bound": self.lp(load), "lp_by_seed": [asdict(bound) for bound in bounds]}
            points.append(point)
        return {"fluid_load_at_90": fluid_load_at(self.plan.costs_s, KEPT), "points": points}

    def _policy(self, name: str) -> dict[str, Any]:
        found = self._point(name, self.plan.chosen)
        if self.plan.is_sweep:
            found["sweep"] = [self._point(name, load) for load in self.plan.rates]
            pairs = [self.carried(name), *self.carried_by_seed(name)]
            for index, key in enumerate(("goodput_at_90", "knee_all_classes_90")):
                whole, *seeds = (self._rate(pair[index]) for pair in pairs)
                found[key] = whole | {"by_seed": seeds}
        return found

    def _rate(self, found: Carried) -> dict[str, Any]:
        rps = None if found.load is None else found.load * self.plan.capacity_rps
        return {"load": found.load, "rps": rps, "at_least": found.at_least}

    def _point(self, name: str, load: float) -> dict[str, Any]:
        outcomes = self.outcomes(name, load)
        summary = self.summaries[name][load]
        counters = [asdict(outcome.counters) for outcome in outcomes]
        found = asdict(summary) | {
            "load": load,
            "rps": self.plan.rates[load],
            "fluid_attainment": self.fluid(load),
            "by_seed": _by_seed([outcome.summary for outcome in outcomes]),
            "counters": {field.name: sum(c[field.name] for c in counters) for field in fields(SimCounters)}
            | {"outside_share": self.outside_share(name, load)},
            "simulated_s": sum(outcome.simulated_s for outcome in outcomes),
            "wall_s": sum(outcome.wall_s for outcome in outcomes),
        }
        if self.plan.bound:
            found |= {"lp_bound": self.lp(load), "percent_of_lp_bound": self.percent_of_lp(name, load)}
        return found

    # For people

    def table(self) -> Table:
        """Every policy at every load."""
        plan, setting = self.plan, self.plan.setting
        seeds = f"seed{'s' if len(plan.seeds) > 1 else ''} {', '.join(map(str, plan.seeds))}"
        title = (
            f"{setting.workload.name}, {setting.instances} x {setting.profile.name}, {seeds}, "
            f"{setting.workload.duration_s:g} s; load 1 is {plan.capacity_rps:.2f} requests/s"
        )
        shown = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        first = self.summaries[plan.names[0]][plan.chosen]
        shown.add_column("load", no_wrap=True)
        shown.add_column("policy", no_wrap=True)
        stages = ("TTFT %", "TPOT %") if setting.split is not None else ()
        for heading in ("on time %", *stages, *(name or "-" for name in first.classes)):
            shown.add_column(heading, justify="right", no_wrap=True)
        bound = ("% of LP\nbound",) if plan.bound else ()
        if setting.scale is not None:
            shown.add_column("instances\n(mean)", justify="right", no_wrap=True)
        for heading in ("on time\n/s", "mean\ne2e s", "capped\nmean s", "rejected\n+lost", *bound):
            shown.add_column(heading, justify="right", no_wrap=True)
        for load in plan.rates:
            for name in plan.names:
                s = self.summaries[name][load]
                shown.add_row(
                    f"{load:.2f}" if name == plan.names[0] else "",
                    name,
                    _with_interval(s),
                    *(number(_hundredfold(share), 1) for share in (s.ttft_attainment, s.tpot_attainment) if stages),
                    *(number(_hundredfold(s.attainment_by_class.get(c)), 1) for c in first.classes),
                    *(self._mean_instances(name, load) for _ in range(setting.scale is not None)),
                    number(s.goodput_rps, 2),
                    number(s.mean_e2e_s, 2),
                    number(s.mean_capped_e2e_s, 2),
                    str(s.rejected + s.failed + s.unfinished),
                    *(number(self.percent_of_lp(name, load), 1) for _ in bound),
                    end_section=name == plan.names[-1],
                )
        return shown

    def _mean_instances(self, name: str, load: float) -> str:
        outcomes = self.outcomes(name, load)
        return number(sum(o.summary.accelerator_s or 0.0 for o in outcomes) / sum(o.simulated_s for o in outcomes), 2)

    def carried_table(self) -> Table:
        """The load that each policy carries."""
        title = f"Largest load with {100 * KEPT:.0f}% on time"
        shown = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        shown.add_column("policy", no_wrap=True)
        for heading in ("of all", "requests/s", "of every class", "requests/s"):
            shown.add_column(heading, justify="right", no_wrap=True)
        capacity = self.plan.capacity_rps
        for name in self.plan.names:
            overall, worst = self.carried(name)
            cells = (carried_text(overall), carried_text(overall, capacity))
            shown.add_row(name, *cells, carried_text(worst), carried_text(worst, capacity))
        fluid = fluid_load_at(self.plan.costs_s, KEPT)
        shown.add_row("shedding fluid", f"{fluid:.2f}", f"{fluid * capacity:.2f}", "", "", style="dim")
        return shown

    def comparison(self) -> Comparison:
        """The contents of a report."""
        plan, setting = self.plan, self.plan.setting
        points = {
            name: [
                Point(load, rps, self.summaries[name][load], self.fluid(load), self.lp(load))
                for load, rps in plan.rates.items()
            ]
            for name in plan.names
        }
        detailed = {name: self.outcomes(name, plan.chosen)[0] for name in plan.names}
        spread = (
            "Intervals are 95% Student's t over seeds."
            if len(plan.seeds) > 1
            else "Intervals are 95% block bootstraps within the one seed: they say nothing of other seeds."
        )
        chosen = f"Details are of seed {plan.seeds[0]} at load {plan.chosen:.2f}." if plan.is_sweep else ""
        return Comparison(
            title=f"Simulation: {setting.workload.name} on {setting.instances} x {setting.profile.name}",
            facts=self._facts(),
            notes=[
                f"Load 1 is {plan.capacity_rps:.2f} requests/s: what the fleet sustains of this mix in steady state. "
                f"Attainment counts a request when every promise of it held, over all arrivals. {spread} {chosen}",
                *self.warnings(),
            ],
            points=points,
            chosen=plan.chosen,
            carried={name: self.carried(name) for name in plan.names},
            curves={name: o.curves for name, o in detailed.items() if o.curves is not None},
            timelines={name: o.timeline for name, o in detailed.items() if o.timeline is not None},
        )

    def _scaling_fact(self) -> str:
        scale = self.plan.setting.scale
        if scale is None:
            return "none: as many instances as there are"
        one = scale.models[0]
        return f"{scale.policy}, {one.least} to {one.most} instances of a model, {one.standby} shells"

    def _facts(self) -> dict[str, str]:
        plan, setting = self.plan, self.plan.setting
        found = {
            "workload": f"{setting.workload.name}, {setting.workload.duration_s:g} s of arrivals",
            "profile": f"{setting.profile.name}: {setting.profile.model} on {setting.profile.device_kind}",
            "instances": str(setting.instances),
            "seeds": ", ".join(map(str, plan.seeds)),
            "noise of iteration times": percent(setting.noise),
            "device's times / profile's": f"{setting.device_factor:g}",
            "reports late by": f"{1000.0 * setting.report_delay_s:g} ms",
            "faults": ", ".join(f"{f.kind} {f.instance} at {f.at_s:g} s" for f in setting.faults) or "none",
            "scaling": self._scaling_fact(),
            "wall-clock time": f"{self.wall_s:.1f} s",
        }
        return found | machine.describe()


def _carried(summaries: Mapping[float, Summary]) -> tuple[Carried, Carried]:
    overall = {load: s.attainment or 0.0 for load, s in summaries.items()}
    worst = {load: worst_class(s) or 0.0 for load, s in summaries.items()}
    return carried(overall, KEPT), carried(worst, KEPT)


def _by_seed(summaries: Sequence[Summary]) -> dict[str, list[Any]]:
    """Each figure's values in order of the seeds, from which differences between policies are computed in pairs."""
    rows = [figures(s) | {name: getattr(s, name) for name in _PER_SEED} for s in summaries]
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def _hundredfold(share: float | None) -> float | None:
    return None if share is None else 100.0 * share


def _with_interval(summary: Summary) -> str:
    text = number(_hundredfold(summary.attainment), 1)
    edges = summary.ci95.get("attainment")
    return text if edges is None else f"{text} ({100.0 * edges[0]:.1f}-{100.0 * edges[1]:.1f})"
