"""Settings of baselines, tuned on seeds of their own; the margin of the programme that knows every arrival.

One pass over a baseline's numbers, one after the other and the first once more, on the first tuning seed; the best few
of all that were tried then on the others. The best is the cheapest that keeps LEAST, else the one that keeps the most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from .cost import Runs, Setting
from .runs import FORESIGHT, TARGET, Row, Task

TUNING_SEEDS = (11, 12, 13)
LEAST = 0.988
"""The least that our own keeps anywhere: a baseline that stays a little below the target is not ruled out by that."""
FEW = 3
GRIDS: Mapping[str, tuple[tuple[float, ...], ...]] = {
    "concurrency": ((1.0, 0.5, 2.0, 4.0, 8.0, 12.0, 16.0), (20.0, 5.0, 60.0, 300.0), (0.0, 3.0)),
    "saturation": ((1.0, 0.25, 0.5, 2.0), (60.0, 10.0, 300.0, 900.0), (0.1, 0.3)),
    "rate": ((0.6, 0.3, 1.2, 1.8), (60.0, 10.0, 300.0, 900.0)),
    "reactive": ((60.0, 10.0, 300.0, 900.0), (1.0, 5.0), (0.01,)),
}
"""By baseline, its numbers in the order in which they are searched, each from its first value on."""
ORDER = {"concurrency": (0, 2, 1), "saturation": (2, 0, 1), "rate": (0, 1), "reactive": (2, 1, 0)}
"""Where in GRIDS the baseline's first, second and third number is."""
MARGINS = tuple(round(0.2 * step, 1) for step in range(16))


def tuned(runs: Runs, setting: Setting, kind: str, start: str, tuning_s: float) -> str:
    """The baseline's best spec; each tuning run is of ``tuning_s`` seconds, 0 for all."""
    tuning = replace(setting, task=replace(setting.task, duration_s=tuning_s))

    def rows(spec: str, seeds: Sequence[int]) -> list[Row]:
        return runs(tuning.scaled(seed, spec, start) for seed in seeds)

    tried: dict[str, tuple[bool, float]] = {}
    best = [values[0] for values in GRIDS[kind]]
    for axis in (*range(len(best)), 0):
        by_value = {}
        for value in GRIDS[kind][axis]:
            numbers = [*best[:axis], value, *best[axis + 1 :]]
            spec = f"{kind}@" + ",".join(f"{numbers[at]:g}" for at in ORDER[kind])
            by_value[value] = tried[spec] = rank(rows(spec, TUNING_SEEDS[:1]))
        best[axis] = min(by_value, key=lambda value: by_value[value])
    few = sorted(tried, key=lambda spec: tried[spec])[:FEW]
    return min(few, key=lambda spec: rank(rows(spec, TUNING_SEEDS)))


def rank(rows: Sequence[Row]) -> tuple[bool, float]:
    """Smaller is better."""
    kept = fmean(row.attainment for row in rows)
    return (False, fmean(row.instances for row in rows)) if kept >= LEAST else (True, -kept)


def foresight(runs: Runs, setting: Setting, seed: int, start: str) -> Row:
    """The programme with the least margin, of MARGINS, that keeps the target, found by halving."""
    low, high = 0, len(MARGINS) - 1

    def row(step: int) -> Row:
        return runs([setting.scaled(seed, f"{FORESIGHT}{MARGINS[step]:g}", start)])[0]

    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if row(middle).attainment >= TARGET else (middle + 1, high)
    return row(low)


def fixed_mean(demand: float, task: Task) -> Task:
    """A fixed fleet of the mean demand."""
    return replace(task, first=max(round(demand), 1))
