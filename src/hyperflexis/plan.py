"""`hyperflexis plan`: the fewest instances that keep a workload's promises, by simulation, and what they cost.

Fixed fleets are searched for each profile and mode (fleet_search.py); from the smallest of each a fleet that follows
the demand begins; perfect foresight with the same start times says what is left to gain.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from .bench import load_workload, parse_csv_options, write_json
from .core.links import Link
from .core.profile import Profile
from .engines.profiles import load_profile
from .errors import ConfigError, HyperFlexisError
from .fleet_search import MARGINS, Fleet, Kind, Question, Trial, Way, answer, search, tried_once
from .sim.driver import MODEL
from .sim.oracle import capacity_rps
from .sim.workload import generate
from .simulate_options import at_least, number, parse_seeds, parse_start, progress, try_to_write
from .telemetry import machine, plot
from .telemetry.sweep import worst_class

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MODES = ("colocated", "disaggregated")
PICTURE = "plan.png"
PIPE_WIDTH = 140  # characters of a table that goes to a file or a pipe, which have no width of their own


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hyperflexis plan`."""
    add = parser.add_argument
    add("workload", type=Path, metavar="WORKLOAD", help="workload file (YAML); see docs/workloads.md")
    add(
        "--profile",
        action="append",
        required=True,
        metavar="NAME|FILE[=PRICE]",
        help="model and device, and what an instance costs an hour (default: the profile's list price); may be given "
        "again, to choose between devices",
    )
    add("--target", type=float, default=0.99, metavar="X", help="wanted share of requests on time (default: 0.99)")
    add(
        "--modes",
        default=",".join(MODES),
        metavar="A,B",
        help="fixed fleets to try: colocated, disaggregated (default: both)",
    )
    add("--no-scale", action="store_true", help="fixed fleets only, none that follows the demand")
    add(
        "--start",
        default="60",
        metavar="disk|d2d|FILE|SECONDS",
        help="how instances start in a fleet that follows the demand; FILE: as transfer bench --json measured it "
        "(default: in 60 s)",
    )
    add("--max", type=int, default=64, metavar="N", help="most instances to try (default: 64)")
    add("--seeds", default="1,2,3", metavar="1,2", help="each fleet is tried with each (default: %(default)s)")
    add("--csv", action="append", default=[], metavar="NAME=FILE", help="read FILE where the workload names NAME")
    add("--duration", type=float, metavar="S", help="seconds of arrivals (default: the workload's)")
    add("--link-gbps", type=float, default=200.0, metavar="X", help="port of each instance (default: %(default)g)")
    add("--jobs", type=int, metavar="N", help="processes (default: one a core)")
    add("--json", metavar="FILE", help="write the figures as JSON ('-': standard output)")
    add("--report", type=Path, metavar="DIR", help=f"draw them, as DIR/{PICTURE}")


@dataclass(frozen=True, slots=True)
class Priced:
    """A fleet that keeps the target, or, where ``kept`` is false, comes nearest. ``cost`` is per hour, in US dollars
    where prices are known, else in instances."""

    trial: Trial
    kept: bool
    cost: float


def main(args: argparse.Namespace) -> int:
    """Run `hyperflexis plan`: 0 when some fleet keeps the target, else 1."""
    if args.report is not None:
        plot.require()
    question, prices = make_question(args)
    modes = _modes(args.modes)
    if "disaggregated" in modes and question.most < 2:
        if len(modes) == 1:
            raise ConfigError(f"--modes disaggregated needs at least two instances (--max {question.most})")
        modes.remove("disaggregated")
    ways = [Way(index, kind) for index in range(len(question.profiles)) for kind in modes]
    if args.json and args.json != "-":
        try_to_write(Path(args.json))
    jobs = machine.num_cores() if args.jobs is None else at_least("--jobs", args.jobs, 1)
    began = time.monotonic()
    plan = Plan(question, prices, ways, jobs)
    plan.find(scaled=not args.no_scale)
    out = Console(stderr=args.json == "-")
    if not out.is_terminal:
        out.width = PIPE_WIDTH
    out.print(plan.table())
    for line in plan.words():
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    if args.report is not None:
        _save(plan, args.report)
        out.print(f"Picture: {args.report / PICTURE}", markup=False, highlight=False, soft_wrap=True)
    if args.json:
        write_json(plan.document() | {"machine": machine.describe(), "wall_s": time.monotonic() - began}, args.json)
    return 0 if plan.best is not None else 1


def make_question(args: argparse.Namespace) -> tuple[Question, list[float] | None]:
    """What is asked, and the price of an instance-hour of each profile, None where nobody says one.

    Raises ConfigError for anything wrong in the options or the files that they name.
    """
    workload = load_workload(args.workload, parse_csv_options(args.csv))
    if args.duration is not None:
        workload = replace(workload, duration_s=number("--duration", args.duration, above=0.0))
    models = sorted({one.model or MODEL for one in workload.classes})
    if len(models) > 1:
        raise ConfigError(
            f"{args.workload} has requests for {', '.join(models)}: plan sizes one model's fleet at a time; give it a "
            "workload for each"
        )
    if not generate(workload):
        raise ConfigError(f"{args.workload} has no arrival within {workload.duration_s:g} s; raise rate or duration")
    target = number("--target", args.target, above=0.0)
    if target >= 1.0:
        raise ConfigError(f"--target {target:g} must be below 1: no finite fleet keeps every promise")
    priced = [_profile(text) for text in args.profile]
    names = [profile.name for profile, _ in priced]
    if len(set(names)) < len(names):
        raise ConfigError(f"--profile {max(names, key=names.count)} is given twice; give it once")
    prices = [price for _, price in priced if price is not None]
    if 0 < len(prices) < len(priced) or (not prices and len(priced) > 1):
        unknown = next(profile.name for profile, price in priced if price is None)
        raise ConfigError(f"--profile {unknown}: to choose between devices, say its price: {unknown}=DOLLARS_AN_HOUR")
    profiles = tuple(profile for profile, _ in priced)
    question = Question(
        workload=workload,
        profiles=profiles,
        starts=tuple(parse_start(args.start, profile) for profile in profiles),
        target=target,
        seeds=parse_seeds(args.seeds),
        most=at_least("--max", args.max, 1),
        link=Link(bytes_per_s=number("--link-gbps", args.link_gbps, above=0.0) * 1e9 / 8.0),
    )
    return question, prices or None


def _profile(text: str) -> tuple[Profile, float | None]:
    name, equals, price = text.rpartition("=")
    if not equals:
        profile = load_profile(text)
        return profile, profile.price_per_hour
    try:
        return load_profile(name), number("--profile", float(price), above=0.0)
    except ValueError:
        raise ConfigError(f"--profile {text}: {price!r} is no price an hour; write it as in {name}=6.88") from None


def _modes(text: str) -> list[Kind]:
    found: list[Kind] = []
    for name in text.split(","):
        if name not in MODES:
            raise ConfigError(f"--modes {text!r}: {name!r} is none of {', '.join(MODES)}")
        found.append("colocated" if name == "colocated" else "disaggregated")
    return list(dict.fromkeys(found))


class Plan:
    """All that was tried, and what is best."""

    def __init__(self, question: Question, prices: Sequence[float] | None, ways: Sequence[Way], jobs: int) -> None:
        self.question = question
        self.ways = list(ways)
        self.trials: list[Trial] = []
        self._prices = prices
        self._jobs = jobs
        self._console = Console(stderr=True)
        self._too_slow: dict[int, str] = {}

    def find(self, scaled: bool) -> None:
        """Search. Raises ConfigError when no profile is fast enough for the workload at all."""
        question = self.question
        for index, profile in enumerate(question.profiles):
            try:
                capacity_rps(generate(question.workload), profile, 1)
            except ConfigError as error:
                self._too_slow[index] = str(error)
        if len(self._too_slow) == len(question.profiles):
            raise ConfigError("; ".join(self._too_slow.values()))
        self.ways = [way for way in self.ways if way.profile not in self._too_slow]
        if scaled:
            self.ways += [Way(index, "foresight") for index in sorted({way.profile for way in self.ways})]
        self.trials = list(search(question, self.ways, self._jobs, self._show))
        if not scaled:
            return
        fleets = []
        for way in [way for way in self.ways if way.kind != "foresight"]:
            if (fixed := answer(question, self.trials, way)) is not None:
                follows = Way(way.profile, "scaled", way.kind == "disaggregated")
                fleets.append(Fleet(follows, fixed.fleet.size))
        self.ways += [fleet.way for fleet in fleets]
        self.trials += tried_once(question, fleets, self._jobs, self._show)

    def _show(self, total: int) -> Any:
        return progress(self._console, total)

    def priced(self, way: Way) -> Priced:
        """What a way comes to."""
        found = answer(self.question, self.trials, way)
        trial = found or max((t for t in self.trials if t.fleet.way == way), key=lambda trial: trial.attainment)
        price = 1.0 if self._prices is None else self._prices[way.profile]
        return Priced(trial, found is not None, trial.mean_instances * price)

    @property
    def options(self) -> list[Priced]:
        """Of all ways, those that keep the target first, the cheapest first."""
        return sorted(map(self.priced, self.ways), key=lambda one: (not one.kept, one.cost, -one.trial.attainment))

    @property
    def best(self) -> Priced | None:
        """The cheapest that can be had: foresight cannot."""
        return next((one for one in self.options if one.kept and one.trial.fleet.way.kind != "foresight"), None)

    # For people

    def table(self) -> Table:
        """A line a way."""
        workload, question = self.question.workload, self.question
        seeds = f"seed{'s' if len(question.seeds) > 1 else ''} {', '.join(map(str, question.seeds))}"
        title = (
            f"{workload.name}, {workload.duration_s:g} s, {seeds}: the smallest fleets that keep "
            f"{100 * question.target:g}% on time"
        )
        shown = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        shown.add_column("profile", no_wrap=True)
        shown.add_column("fleet", no_wrap=True)
        unit = "instances" if self._prices is None else "US$ an hour"
        for heading in ("instances", unit, "on time %", "worst class %", "one fewer %"):
            if heading != "instances" or self._prices is not None:
                shown.add_column(heading, justify="right", no_wrap=True)
        for one in self.options:
            trial = one.trial
            worst = worst_class(trial.summary)
            edges = trial.summary.ci95.get("attainment")
            spread = "" if edges is None else f" ({100 * edges[0]:.1f}-{100 * edges[1]:.1f})"
            shown.add_row(
                self.question.profiles[trial.fleet.way.profile].name,
                describe(trial),
                *([f"{trial.mean_instances:.2f}"] if self._prices is not None else []),
                f"{one.cost:.2f}" if one.kept else "-",
                f"{100 * trial.attainment:.2f}{spread}",
                "-" if worst is None else f"{100 * worst:.1f}",
                self._one_fewer(trial),
                style="" if one.kept else "dim",
            )
        return shown

    def _one_fewer(self, trial: Trial) -> str:
        way, size = trial.fleet.way, trial.fleet.size
        fewer = [t for t in self.trials if t.fleet.way == way and t.fleet.size == size - 1]
        return f"{100 * fewer[0].attainment:.2f}" if fewer and way.kind in MODES else "-"

    def words(self) -> list[str]:
        """What the table comes to."""
        found = [f"{self.question.profiles[index].name}: {why}" for index, why in self._too_slow.items()]
        best = self.best
        if best is None:
            nearest = self.options[0].trial if self.options else None
            kept = (
                "" if nearest is None else f"; {describe(nearest)} came nearest, with {100 * nearest.attainment:.2f}%"
            )
            return [*found, f"No fleet of at most {self.question.most} instances keeps the target{kept}."]
        name = self.question.profiles[best.trial.fleet.way.profile].name
        unit = "instances" if self._prices is None else "US$ an hour"
        return [*found, f"Cheapest: {name}, {describe(best.trial)}: {best.cost:.2f} {unit} on average."]

    # JSON

    def document(self) -> dict[str, Any]:
        """The command's JSON."""
        question = self.question
        return {
            "workload": question.workload.name,
            "duration_s": question.workload.duration_s,
            "seeds": list(question.seeds),
            "target": question.target,
            "prices_per_hour": self._prices,
            "too_slow": {question.profiles[index].name: why for index, why in self._too_slow.items()},
            "options": [self._row(one) for one in self.options],
            "best": None if self.best is None else self._row(self.best),
            "tried": [_figures(question, trial) for trial in self.trials],
        }

    def _row(self, one: Priced) -> dict[str, Any]:
        trial = one.trial
        return _figures(self.question, trial) | {
            "kept": one.kept,
            "cost_per_hour": one.cost,
            "peak_instances": trial.peak_instances,
            "summary": asdict(trial.summary),
        }


def describe(trial: Trial) -> str:
    """A fleet in words."""
    fleet, way = trial.fleet, trial.fleet.way
    if way.kind == "foresight":
        return f"perfect foresight, margin {MARGINS[fleet.size]:.1f}"
    if way.kind == "scaled":
        roles = ", with roles" if way.adaptive else ""
        return f"follows the demand{roles}, up to {trial.peak_instances}"
    if way.kind == "colocated":
        return f"{fleet.size} colocated"
    split = (
        "roles as needed" if fleet.prefill is None else f"{fleet.prefill} prefill, {fleet.size - fleet.prefill} decode"
    )
    return f"{fleet.size} disaggregated, {split}"


def _figures(question: Question, trial: Trial) -> dict[str, Any]:
    fleet = trial.fleet
    return {
        "profile": question.profiles[fleet.way.profile].name,
        "kind": fleet.way.kind,
        "roles": fleet.way.adaptive or fleet.way.kind == "disaggregated",
        "size": MARGINS[fleet.size] if fleet.way.kind == "foresight" else fleet.size,
        "prefill": fleet.prefill,
        "attainment": trial.attainment,
        "mean_instances": trial.mean_instances,
    }


# The picture


def _save(plan: Plan, out: Path) -> None:
    try:
        plot.save(out, lambda: {PICTURE: figure(plan)})
    except OSError as error:
        raise HyperFlexisError(f"cannot write {error.filename or out}: {error.strerror}") from None


def figure(plan: Plan) -> Figure:
    """Attainment against the mean number of instances, and the fleets of the best profile over time."""
    drawn, ((left, right),) = plot.panels(2, 5.2, 3.6)
    _tried(left, plan)
    _sizes(right, plan)
    return drawn


def _tried(axes: Axes, plan: Plan) -> None:
    several = len(plan.question.profiles) > 1
    for index, way in enumerate(plan.ways):
        trials = sorted((t for t in plan.trials if t.fleet.way == way), key=lambda trial: trial.mean_instances)
        name = f"{plan.question.profiles[way.profile].name}, " if several else ""
        axes.plot(
            [t.mean_instances for t in trials],
            [100 * t.attainment for t in trials],
            marker="o",
            ms=4,
            lw=1.4,
            color=plot.colour(index),
            label=name + _label(way),
        )
    axes.axhline(100 * plan.question.target, color="#555555", lw=0.9, ls="--")
    axes.set_ylim(
        top=100.3, bottom=max(min(100 * t.attainment for t in plan.trials) - 1, 100 * plan.question.target - 20)
    )
    axes.set_xlabel("instances (mean over time)")
    axes.set_title("requests on time, %")
    axes.legend(fontsize=8)


def _sizes(axes: Axes, plan: Plan) -> None:
    best = plan.best or plan.options[0]
    for index, way in enumerate(plan.ways):
        if way.profile != best.trial.fleet.way.profile:
            continue
        run = plan.priced(way).trial.runs[0]
        times, counts = [t for t, _ in run.sizes], [count for _, count in run.sizes]
        axes.step([*times, run.simulated_s], [*counts, counts[-1]], where="post", color=plot.colour(index), lw=1.4)
    axes.set_xlim(0, plan.question.workload.duration_s)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds")
    axes.set_title(f"instances over time, seed {plan.question.seeds[0]}")


def _label(way: Way) -> str:
    labels: Mapping[Kind, str] = {
        "colocated": "colocated",
        "disaggregated": "disaggregated",
        "scaled": "follows the demand" + (", with roles" if way.adaptive else ""),
        "foresight": "perfect foresight",
    }
    return labels[way.kind]
