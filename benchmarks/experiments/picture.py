"""The picture of docs/experiments.md: attainment against load, a panel a scenario."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hyperflexis.telemetry import plot

from .figures import KEPT, Estimate
from .goodput import PICTURE, Line
from .plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(plan: Plan, lines: Sequence[Line], folder: Path) -> None:
    """Write PICTURE into its place under ``folder``. Raises HyperFlexisError without matplotlib."""

    def pictures() -> Mapping[str, Figure]:
        figure, grid = plot.panels(len(lines), 3.6, 3.4, sharey="all")
        for axes, line in zip(grid[0], lines, strict=True):
            _panel(axes, plan, line)
        grid[0][0].set_ylabel("requests on time, %")
        return {Path(PICTURE).name: figure}

    plot.save((folder / PICTURE).parent, pictures)


def _panel(axes: Axes, plan: Plan, line: Line) -> None:
    for index, policy in enumerate(c.policy for c in line.carried):
        curve = {point.load: point.policies[policy] for point in line.sweep if policy in point.policies}
        _curve(axes, policy, curve, plot.colour(index))
    fluid = plan.yardsticks[line.scenario].fluid_load
    axes.axvline(fluid, color="#8a8a8a", linestyle=":", label="shedding fluid at 90%")
    axes.axhline(100.0 * KEPT, color="#8a8a8a", linewidth=0.8)
    axes.set_title(plan.title(line.scenario), fontsize=9)
    axes.set_xlabel("load, λ/λ*")
    axes.set_ylim(0.0, 101.0)
    axes.legend(fontsize=8, loc="lower left")


def _curve(axes: Axes, policy: str, curve: Mapping[float, Estimate], colour: str) -> None:
    loads = list(curve)
    axes.plot(loads, [100.0 * value.mean for value in curve.values()], color=colour, marker="o", ms=3, label=policy)
    ends = [value.ci95 or (value.mean, value.mean) for value in curve.values()]
    low, high = ([100.0 * pair[side] for pair in ends] for side in (0, 1))
    axes.fill_between(loads, low, high, color=colour, alpha=0.2)
