"""A step to five times the load within 30 s: what is on time of the ten minutes after, by how instances start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hyperflexis.telemetry import plot

from ..experiments.figures import Estimate, estimate
from ..experiments.measure import ROOT
from .cost import Runs, Setting
from .runs import Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEP = Setting("step", Task("scale-step.yaml", 0, 3, since_s=300.0, for_s=600.0), (), (1,))
STARTS: Mapping[str, float] = {"2": 2.0, "standby": 5.5, "10": 10.0, "d2d": 63.6, "disk": 142.1}
"""Seconds of each start; those by name are the profile's."""
OURS_ONLY = "10"
"""The start of which only ours is measured."""
NAMES = {"standby": "standby", "d2d": "D2D", "disk": "disk"}
PICTURE = "scale-step.png"
PICTURES = ROOT / "docs" / "img"
SHELLS = 8
"""As many as the step asks for."""

Curves = Mapping[str, Mapping[str, Estimate]]
"""On time, by scaler and start."""


def curves(runs: Runs, baselines: Sequence[str]) -> Curves:
    """Of ours and ``baselines``."""
    found: dict[str, dict[str, Estimate]] = {}
    for start in STARTS:
        shells = SHELLS if start == "standby" else 0
        for spec in ("forecast", *(() if start == OURS_ONLY else baselines)):
            rows = runs(replace(STEP.scaled(seed, spec, start), shells=shells) for seed in STEP.seeds)
            found.setdefault(spec.partition("@")[0], {})[start] = estimate([row.attainment for row in rows])
    return found


def draw(found: Curves, folder: Path) -> None:
    """Write the picture. Raises HyperFlexisError without matplotlib."""

    def pictures() -> Mapping[str, Figure]:
        figure, grid = plot.panels(1, 6.4, 3.6)
        axes = grid[0][0]
        for index, (name, curve) in enumerate(found.items()):
            seconds, kept = [STARTS[start] for start in curve], [100.0 * one.mean for one in curve.values()]
            label = "ours" if name == "forecast" else name
            axes.plot(seconds, kept, color=plot.colour(index), marker="o", ms=3, label=label)
        axes.axhline(99.0, color="#8a8a8a", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_xticks(list(STARTS.values()), [tick(start) for start in STARTS], fontsize=8)
        axes.minorticks_off()
        axes.set_xlabel("how an instance starts")
        axes.set_ylabel("requests on time, %")
        axes.set_title("Ten minutes from a step to five times the load", fontsize=9)
        axes.legend(fontsize=8, loc="lower left")
        return {PICTURE: figure}

    plot.save(folder, pictures)


def tick(start: str) -> str:
    """How a start is called."""
    name = NAMES.get(start, "")
    return f"{name}\n{STARTS[start]:.3g} s" if name else f"{STARTS[start]:g} s"
