"""The smallest fleets that keep a workload's promises, found by simulating them.

way      a kind of fleet on one profile: colocated, disaggregated, scaled, or planned with perfect foresight
trial    a way at one size, over all seeds. A disaggregated size is tried with roles that adapt, and with
         1:n-1 ... splits next to the planned one; the best of them counts
search   the size doubles until the target is kept, then the gap is halved. All ways go on side by side
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Literal

from .core.links import Link, Split
from .core.profile import Profile
from .policy.scale import ModelScale, ScaleConfig
from .sim.driver import MODEL
from .sim.foresight import known_demand, needs, programme
from .sim.launches import Starts
from .sim.oracle import capacity_rps
from .sim.planned import planned_prefill
from .sim.workload import Workload, generate
from .simulate_run import Cell, Runner, RunOutcome, RunTask, Setting
from .telemetry.summary import Summary
from .telemetry.sweep import combine
from .worker_pool import performed

Kind = Literal["colocated", "disaggregated", "scaled", "foresight"]
POLICY = "hyperflexis"
MARGINS = [-2.0 + 0.1 * step for step in range(61)]
"""A foresight's sizes are places in this list: what is needed beyond the known demand, in its square roots."""


@dataclass(frozen=True, slots=True)
class Way:
    """``profile`` is the place in Question.profiles. ``adaptive``: a scaled fleet whose instances also take roles."""

    profile: int
    kind: Kind
    adaptive: bool = False


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be carried, at which share of requests on time, and by what. ``starts`` are each profile's."""

    workload: Workload
    profiles: tuple[Profile, ...]
    starts: tuple[Starts, ...]
    target: float
    seeds: tuple[int, ...]
    most: int
    link: Link


@dataclass(frozen=True, slots=True)
class Fleet:
    """What a run needs to know. ``prefill`` instances compute prompts alone, all others decode; None: roles adapt,
    and where the way is colocated there are none."""

    way: Way
    size: int
    prefill: int | None = None


@dataclass(frozen=True, slots=True)
class Trial:
    """A fleet over all seeds. ``runs`` are in their order."""

    fleet: Fleet
    summary: Summary
    runs: tuple[RunOutcome, ...]

    @property
    def attainment(self) -> float:
        """Share of the requests on time, the mean over seeds."""
        return self.summary.attainment or 0.0

    @property
    def mean_instances(self) -> float:
        """Over time and seeds."""
        return (self.summary.accelerator_s or 0.0) / sum(run.simulated_s for run in self.runs)

    @property
    def peak_instances(self) -> int:
        """The most at any time."""
        return max(count for run in self.runs for _, count in run.sizes)


@dataclass(slots=True)
class Search:
    """The least whole number in [least, most] that passes, where all above one that passes do. ``guess`` is tried
    first. Takes 2 log2 of how far off that is."""

    least: int
    most: int
    guess: int
    failed: int = field(init=False)
    passed: int | None = None

    def __post_init__(self) -> None:
        self.failed = self.least - 1
        self.guess = min(max(self.guess, self.least), self.most)

    def next(self) -> int | None:
        """What to try; None when the answer is known, or that there is none."""
        if self.passed is None:
            if self.failed < self.least:
                return self.guess
            return min(max(2 * self.failed, 1), self.most) if self.failed < self.most else None
        if self.passed - self.failed <= 1:
            return None
        if self.failed < self.least:
            # One fewer is the likeliest answer after a good guess; then the steps grow.
            return max(self.passed - max(1, self.guess - self.passed), self.least)
        return (self.failed + self.passed) // 2

    def note(self, size: int, passes: bool) -> None:
        """How the trial ended."""
        if passes:
            self.passed = size
        else:
            self.failed = size


Show = Callable[[int], AbstractContextManager[Callable[[], None]]]


def search(question: Question, ways: Sequence[Way], jobs: int, show: Show) -> Iterator[Trial]:
    """Each way's trials, in order of trial; whether there is an answer follows from them (``answer``). ``show`` opens
    a view of the progress of so many runs and gives what is called after each."""
    searches = {way: _search(question, way) for way in ways}
    while sizes := {way: size for way, one in searches.items() if (size := one.next()) is not None}:
        fleets = [fleet for way, size in sizes.items() for fleet in _fleets(question, way, size)]
        for trial in _tried(question, fleets, jobs, show):
            fleet = trial.fleet
            searches[fleet.way].note(fleet.size, trial.attainment >= question.target)
            yield trial


def tried_once(question: Question, fleets: Sequence[Fleet], jobs: int, show: Show) -> list[Trial]:
    """These fleets, without a search."""
    return list(_tried(question, fleets, jobs, show))


def answer(question: Question, trials: Sequence[Trial], way: Way) -> Trial | None:
    """The smallest fleet of a way that keeps the target; None: none of those that were allowed does."""
    kept = [trial for trial in trials if trial.fleet.way == way and trial.attainment >= question.target]
    return min(kept, key=lambda trial: trial.fleet.size, default=None)


def _search(question: Question, way: Way) -> Search:
    if way.kind == "foresight":
        return Search(0, len(MARGINS) - 1, len(MARGINS) // 3)
    workload = question.workload
    arrivals = generate(workload)
    busy = len(arrivals) / workload.duration_s / capacity_rps(arrivals, question.profiles[way.profile], 1)
    return Search(2 if way.kind == "disaggregated" else 1, question.most, ceil(busy))


def _fleets(question: Question, way: Way, size: int) -> list[Fleet]:
    found = [Fleet(way, size)]
    if way.kind == "disaggregated":
        workload = question.workload
        planned = planned_prefill(generate(workload), question.profiles[way.profile], size, workload.duration_s)
        near = range(max(planned - 1, 1), min(max(planned, 1) + 1, size - 1) + 1)
        found += [Fleet(way, size, prefill) for prefill in near]
    return found


def _tried(question: Question, fleets: Sequence[Fleet], jobs: int, show: Show) -> Iterator[Trial]:
    """The best fleet of each way and size."""
    tasks = [(fleet, seed) for fleet in fleets for seed in question.seeds]
    with performed(_performer, question, tasks, jobs) as results, show(len(tasks)) as advance:
        done = {}
        for task, outcome in results:
            done[task] = outcome
            advance()
    best: dict[tuple[Way, int], Trial] = {}
    for fleet in fleets:
        runs = tuple(done[fleet, seed] for seed in question.seeds)
        trial = Trial(fleet, combine([run.summary for run in runs]), runs)
        key = fleet.way, fleet.size
        if key not in best or trial.attainment > best[key].attainment:
            best[key] = trial
    yield from best.values()


def _performer(question: Question) -> Callable[[tuple[Fleet, int]], RunOutcome]:
    def perform(task: tuple[Fleet, int]) -> RunOutcome:
        fleet, seed = task
        outcome = Runner(setting_of(question, fleet, seed)).perform(RunTask(Cell(1.0, 1.0, seed), POLICY))
        assert isinstance(outcome, RunOutcome)
        return outcome

    return perform


def setting_of(question: Question, fleet: Fleet, seed: int) -> Setting:
    """How a fleet is simulated."""
    way, profile = fleet.way, question.profiles[fleet.way.profile]
    setting = Setting(question.workload, profile, fleet.size, (POLICY,))
    if way.kind == "disaggregated" or way.adaptive:
        prefill = fleet.prefill or 0
        split = Split.of(fleet.size, prefill, fleet.prefill is not None, question.link)
        setting = replace(setting, split=split, plans_split=fleet.prefill is None)
    if way.kind in ("scaled", "foresight"):
        scaler = "forecast"
        starts = question.starts[way.profile]
        seconds = {means: sum(length for _, length in phases) for means, phases in starts.items()}
        if way.kind == "foresight":
            arrivals = generate(question.workload, seed)
            demand = known_demand(arrivals, profile.coefficients, question.workload.duration_s)
            steps = programme(needs(demand, MARGINS[fleet.size], 1), min(seconds.values()))
            scaler = "follow@" + ",".join(f"{t:g},{count}" for t, count in steps)
            setting = replace(setting, instances=steps[0][1])
        model = ModelScale(MODEL, 1, question.most, 0, question.target, start_s=seconds, latency=profile.coefficients)
        setting = replace(setting, scale=ScaleConfig((model,), None, scaler), starts=starts)
    return setting
