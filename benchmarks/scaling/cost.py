"""What a fleet costs: mean instances in percent of the fixed fleet of equal attainment, seed by seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from hyperflexis.policy.baselines.scale import fixed_equal

from ..experiments.figures import Estimate, estimate
from .runs import Row, Task

Runs = Callable[[Iterable[Task]], list[Row]]
"""Performs tasks; see runs.Runs."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Something to serve, as ``task`` has it but for seed, fleet and scaler; the fixed ``sizes`` that are tried, and
    the seeds. All fleets that change begin with ``task.first``."""

    title: str
    task: Task
    sizes: tuple[int, ...]
    seeds: tuple[int, ...]

    def scaled(self, seed: int, scaler: str, start: str, shells: int = 0, shell_price: float = 0.0) -> Task:
        """A run of a scaler."""
        return replace(self.task, seed=seed, scaler=scaler, start=start, shells=shells, shell_price=shell_price)

    def fixed(self, seed: int) -> list[Task]:
        """The runs of the fixed fleets."""
        return [replace(self.task, seed=seed, first=size) for size in self.sizes]


@dataclass(frozen=True, slots=True)
class Cost:
    """Over the seeds. ``percent`` is None where a seed's attainment lies outside of those of the fixed fleets."""

    attainment: Estimate
    percent: Estimate | None
    instances: float


def curves(runs: Runs, setting: Setting) -> list[list[tuple[int, float]]]:
    """(size, attainment) of the fixed fleets, by seed."""
    rows = runs(task for seed in setting.seeds for task in setting.fixed(seed))
    found = [(size, row.attainment) for size, row in zip(setting.sizes * len(setting.seeds), rows, strict=True)]
    return [found[at : at + len(setting.sizes)] for at in range(0, len(found), len(setting.sizes))]


def cost(points: Sequence[list[tuple[int, float]]], attainments: Sequence[float], instances: Sequence[float]) -> Cost:
    """Of one scaler's runs, in the order of the seeds."""
    equal = [fixed_equal(one, kept) for one, kept in zip(points, attainments, strict=True)]
    percents = [100.0 * mean / size for mean, size in zip(instances, equal, strict=True) if size]
    percent = estimate(percents) if len(percents) == len(equal) else None
    return Cost(estimate(attainments), percent, fmean(instances))


def cost_of(points: Sequence[list[tuple[int, float]]], rows: Sequence[Row]) -> Cost:
    """The same from rows."""
    return cost(points, [row.attainment for row in rows], [row.instances for row in rows])
