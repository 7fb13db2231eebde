"""The pictures of docs/experiments.md: attainment against load, a panel a scenario."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hyperflexis.telemetry import plot

from .figures import KEPT, Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Panel:
    """One scenario: attainment by load of each curve, and the load at which the shedding fluid keeps 90%."""

    title: str
    curves: Mapping[str, Mapping[float, Estimate]]
    fluid_load: float


def draw(panels: Sequence[Panel], path: Path, lowest: float = 0.0) -> None:
    """Write a picture whose axis begins at ``lowest`` percent. Raises HyperFlexisError without matplotlib."""

    def pictures() -> Mapping[str, Figure]:
        width = 3.6 if len(panels) > 1 else 4.6  # room for a title
        figure, grid = plot.panels(len(panels), width, 3.4, sharey="all")
        for axes, panel in zip(grid[0], panels, strict=True):
            _draw(axes, panel, lowest)
        grid[0][0].set_ylabel("requests on time, %")
        return {path.name: figure}

    plot.save(path.parent, pictures)


def _draw(axes: Axes, panel: Panel, lowest: float) -> None:
    for index, (name, curve) in enumerate(panel.curves.items()):
        _curve(axes, name, curve, plot.colour(index))
    axes.axvline(panel.fluid_load, color="#8a8a8a", linestyle=":", label="shedding fluid at 90%")
    axes.axhline(100.0 * KEPT, color="#8a8a8a", linewidth=0.8)
    axes.set_title(panel.title, fontsize=9)
    axes.set_xlabel("load, λ/λ*")
    axes.set_ylim(lowest, 101.0)
    axes.legend(fontsize=8, loc="lower left")


def _curve(axes: Axes, name: str, curve: Mapping[float, Estimate], colour: str) -> None:
    loads = list(curve)
    axes.plot(loads, [100.0 * value.mean for value in curve.values()], color=colour, marker="o", ms=3, label=name)
    ends = [value.ci95 or (value.mean, value.mean) for value in curve.values()]
    low, high = ([100.0 * pair[side] for pair in ends] for side in (0, 1))
    axes.fill_between(loads, low, high, color=colour, alpha=0.2)
