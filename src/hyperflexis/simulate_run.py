"""The runs of `hyperflexis simulate`: one policy, load and seed at a time, in a pool of processes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

from .controller import ControllerConfig
from .core.links import Split
from .core.profile import Profile
from .errors import HyperFlexisError
from .policy.catalog import Policy
from .policy.scale import ScaleConfig
from .policy_file import TOLD, load_policy, where
from .sim.config import Observer, SimConfig, SimCounters, SimResult
from .sim.driver import simulate
from .sim.faults import Fault, LaunchFault
from .sim.launches import Starts, starts_in
from .sim.oracle import LpBound, lp_bound
from .sim.planned import planned_prefill
from .sim.workload import Arrival, Workload, generate, scaled
from .telemetry.compare import Curves, Timeline, curves
from .telemetry.summary import Summary, summarise
from .worker_pool import performed

TIMELINE_POINTS = 400


@dataclass(frozen=True, slots=True)
class Setting:
    """What all runs of a command share. ``policies`` are specs of ``load_policy``; ``workload`` is at its own rate.
    ``plans_split``: how many instances begin with prompts alone is planned for each cell."""

    workload: Workload
    profile: Profile
    instances: int
    policies: tuple[str, ...]
    noise: float = 0.0
    device_factor: float = 1.0
    report_delay_s: float = 0.0
    leap: bool = True
    faults: tuple[Fault, ...] = ()
    split: Split | None = None
    plans_split: bool = False
    scale: ScaleConfig | None = None
    starts: Starts = field(default_factory=lambda: starts_in(0.0))
    shell_price: float = 1.0
    launch_faults: tuple[LaunchFault, ...] = ()


@dataclass(frozen=True, slots=True)
class Cell:
    """One set of arrivals: the workload's rate times ``rate_scale``, which makes ``load`` (rate over capacity)."""

    load: float
    rate_scale: float
    seed: int


@dataclass(frozen=True, slots=True)
class RunTask:
    """One policy on one cell; ``detailed`` runs bring their curves and timeline for the report."""

    cell: Cell
    policy: str
    detailed: bool = False


@dataclass(frozen=True, slots=True)
class BoundTask:
    """The LP bound of one cell, whatever the policy."""

    cell: Cell


Task = RunTask | BoundTask


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """``losses`` counts why requests were rejected or failed; ``sizes`` are (time, instances) where that changes."""

    summary: Summary
    counters: SimCounters
    losses: Counter[str]
    simulated_s: float
    wall_s: float
    sizes: tuple[tuple[float, int], ...] = ()
    curves: Curves | None = None
    timeline: Timeline | None = None


Outcomes = dict[Task, RunOutcome | LpBound]
"""What each task gave."""


class Runner:
    """Runs tasks of one setting. Keeps the last cell's arrivals, since policies come one after the other on it."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.policies: dict[str, Policy] = dict(load_policy(spec) for spec in setting.policies)
        plain = (spec.removesuffix(TOLD) for spec in setting.policies)
        self._files = {Path(spec).stem: Path(spec) for spec in plain if spec.endswith(".py")}
        self._cell: Cell | None = None
        self._arrivals: list[Arrival] = []

    def arrivals(self, cell: Cell) -> list[Arrival]:
        """The requests of ``cell``."""
        if cell != self._cell:
            self._arrivals = []  # the old ones go before the new ones come: a day's requests take hundreds of MB
            self._arrivals = generate(scaled(self.setting.workload, cell.rate_scale), cell.seed)
            self._cell = cell
        return self._arrivals

    def controller_config(self, models: tuple[str, ...], task: RunTask) -> ControllerConfig:
        """That of the controller which ``simulate`` runs."""
        policy = task.policy.removesuffix(TOLD)
        return ControllerConfig(models, policy, split=self._split(task.cell), scale=self.setting.scale)

    def _split(self, cell: Cell) -> Split | None:
        setting = self.setting
        if setting.split is None or not setting.plans_split:
            return setting.split
        duration_s = setting.workload.duration_s
        return replace(
            setting.split,
            prefill=planned_prefill(self.arrivals(cell), setting.profile, setting.instances, duration_s),
        )

    def perform(self, task: Task) -> RunOutcome | LpBound:
        """Any task, for a pool."""
        if isinstance(task, BoundTask):
            return lp_bound(self.arrivals(task.cell), self.setting.profile, self.setting.instances)
        began = time.perf_counter()
        result = self.simulate(task)
        return self.outcome(task, result, time.perf_counter() - began)

    def simulate(self, task: RunTask, observe: Observer | None = None) -> SimResult:
        """One run. Raises HyperFlexisError naming file and line when a user's policy file fails in it."""
        setting = self.setting
        duration_s = setting.workload.duration_s
        config = SimConfig(
            profile=setting.profile,
            instances=setting.instances,
            policy=task.policy.removesuffix(TOLD),
            rules=self.policies[task.policy],
            seed=task.cell.seed,
            noise=setting.noise,
            device_factor=setting.device_factor,
            report_delay_s=setting.report_delay_s,
            known_lengths=task.policy.endswith(TOLD),
            leap=setting.leap,
            faults=setting.faults,
            split=self._split(task.cell),
            scale=setting.scale,
            starts=setting.starts,
            shell_price=setting.shell_price,
            launch_faults=setting.launch_faults,
            sample_s=duration_s / TIMELINE_POINTS if task.detailed else 0.0,
        )
        try:
            return simulate(config, self.arrivals(task.cell), duration_s, observe)
        except HyperFlexisError:
            raise
        except Exception as error:
            file = self._files.get(config.policy)
            if file is None:
                raise
            place = where(error, file)
            raise HyperFlexisError(f"policy {place}: {type(error).__name__}: {error}") from error

    def outcome(self, task: RunTask, result: SimResult, wall_s: float) -> RunOutcome:
        """The figures of a run."""
        setting, run = self.setting, result.run
        return RunOutcome(
            summary=summarise([run], result.accelerator_s),
            counters=result.counters,
            losses=Counter(r.detail for r in run.records if r.outcome in ("rejected", "failed")),
            simulated_s=run.ended_s,
            wall_s=wall_s,
            sizes=result.sizes,
            curves=curves(run.records) if task.detailed else None,
            timeline=timeline(result, setting.profile.kv_capacity_tokens) if task.detailed else None,
        )


def timeline(result: SimResult, kv_capacity_tokens: int) -> Timeline:
    """A run's samples as one series an instance."""
    times = sorted({sample.t for sample in result.timeline})
    at = {t: index for index, t in enumerate(times)}
    numbers = dict.fromkeys(sample.instance for sample in result.timeline)
    # Before an instance is launched, and after it is stopped, nothing is there.
    waiting, kv, budget_ms = ({number: [0.0] * len(times) for number in numbers} for _ in range(3))
    for sample in result.timeline:
        waiting[sample.instance][at[sample.t]] = sample.waiting
        kv[sample.instance][at[sample.t]] = 100.0 * sample.kv_tokens / kv_capacity_tokens
        budget_ms[sample.instance][at[sample.t]] = 1000.0 * sample.budget_s
    by_instance = list(waiting.values()), list(budget_ms.values()), list(kv.values())
    return Timeline(result.run.duration_s, times, *by_instance, result.sizes)


def perform_all(
    setting: Setting, tasks: Sequence[Task], jobs: int, show: Callable[[], AbstractContextManager[Callable[[], None]]]
) -> Outcomes:
    """All tasks, in this process when ``jobs`` is 1, else in so many. ``show`` opens a view of the progress and gives
    what is called after each task. Raises HyperFlexisError when the system killed a process.
    """
    done: Outcomes = {}
    with performed(_performer, setting, tasks, jobs) as results, show() as advance:
        for task, outcome in results:
            done[task] = outcome
            advance()
    return {task: done[task] for task in tasks}


def _performer(setting: Setting) -> Callable[[Task], RunOutcome | LpBound]:
    return Runner(setting).perform
