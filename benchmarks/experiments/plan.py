"""What is run: scenarios, seeds, loads and, once they are tuned, the baselines' settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .measure import Row, Rows, Task
from .scenarios import ABLATED, BURSTY, FAST, MIXED, SCENARIOS, SPLIT, TURNS, Yardstick

OURS = "hyperflexis"
OVERLOAD = 1.3
"""The load of the attainment ratio."""
FAR_OVERLOAD = 1.6
"""The load at which requests are compared one by one."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The runs of all experiments. Loads are rates over lambda*, durations seconds of arrivals (``duration_s`` None:
    the scenario's own). ``stress`` says whether shifts and abuse can be played. ``choices`` has the baselines' tuned
    settings by purpose (tune.PURPOSES) and scenario, ``parts`` the files of the ablations. ``splits`` has, by scenario,
    the best static split of ours, and the best baseline on a static split with its mode."""

    scenarios: Sequence[str] = MIXED
    bursty: Sequence[str] = BURSTY
    ablated: Sequence[str] = ABLATED
    fast: Sequence[str] = FAST
    prefixes: Sequence[str] = ("mooncake", "sessions")
    split: Sequence[str] = SPLIT
    turns: Sequence[str] = TURNS
    stress: bool = True
    seeds: Sequence[int] = (1, 2, 3, 4, 5)
    duration_s: float | None = None
    lengths_s: Sequence[float] = (60.0, 300.0, 600.0, 1800.0)
    our_loads: Sequence[float] = (0.5, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, FAR_OVERLOAD)
    best_loads: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    door_loads: Sequence[float] = (0.5, 0.8, 1.0, 1.1, 1.3)
    latency_loads: Sequence[float] = (0.5, 0.8, 0.9)
    known_loads: Sequence[float] = (1.1, 1.3, 1.5)
    robust_loads: Sequence[float] = (1.0,)
    abuse_loads: Sequence[float] = (0.37, 0.49)
    prefix_loads: Sequence[float] = (0.5, 0.7, 0.9, 1.1, 1.3)
    ablation_loads: Sequence[float] = (1.2,)
    split_loads: Sequence[float] = (0.7, 0.9, 1.1, 1.3, 1.5)
    turns_loads: Sequence[float] = (1.1, 1.3, 1.5, 1.7)
    split_tuning_load: float = 1.0
    split_chunks: Sequence[int] = (1024, 4096)
    split_s: float = 300.0
    splits: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)
    tuning_seeds: Sequence[int] = (101,)
    tuning_s: float = 150.0
    chunks: Sequence[int] = (512, 1024, 2048, 4096, 8192)
    margins: Sequence[float] = (0.9, 1.0, 1.1, 1.2)
    choices: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    parts: Sequence[str] = ()
    prefix_blind: str | None = None
    yardsticks: Mapping[str, Yardstick] = field(default_factory=dict)

    def title(self, scenario: str) -> str:
        """The scenario in words."""
        return SCENARIOS[scenario].title

    def tuned(self, purpose: str, scenario: str) -> str:
        """A baseline with the settings that were chosen for it; those of fast windows are those of the plain ones."""
        return self.choices[purpose][scenario.removesuffix("-fast")]

    def runs(
        self, scenario: str, policy: str, load: float, duration_s: float | None = None, **variant: Any
    ) -> list[Task]:
        """A policy at a load in the windows of all seeds."""
        duration_s = duration_s or self.duration_s or SCENARIOS[scenario].duration_s
        requests = load == FAR_OVERLOAD and scenario in self.scenarios and not variant
        return [Task(scenario, policy, load, s, duration_s, requests=requests, **variant) for s in self.seeds]

    def sweep(self, scenario: str, policy: str, loads: Sequence[float], **variant: Any) -> list[Task]:
        """A policy at several loads."""
        return [task for load in loads for task in self.runs(scenario, policy, load, **variant)]

    def rows(self, rows: Rows, scenario: str, policy: str, load: float, **variant: Any) -> list[Row]:
        """What ``runs`` gave, by seed."""
        return [rows[task] for task in self.runs(scenario, policy, load, **variant)]

    def attainment(self, rows: Rows, scenario: str, policy: str, load: float, **variant: Any) -> list[float]:
        """Shares of requests on time, by seed."""
        return [row.attainment for row in self.rows(rows, scenario, policy, load, **variant)]

    def curve(
        self, rows: Rows, scenario: str, policy: str, loads: Sequence[float], **variant: Any
    ) -> dict[float, list[float]]:
        """Attainment by load and seed."""
        return {load: self.attainment(rows, scenario, policy, load, **variant) for load in loads}

    def worst_curve(self, rows: Rows, scenario: str, policy: str, loads: Sequence[float]) -> dict[float, list[float]]:
        """The attainment of the class that fares worst, by load and seed."""
        return {load: [row.worst_class for row in self.rows(rows, scenario, policy, load)] for load in loads}
