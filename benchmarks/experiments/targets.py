"""What HyperFlexis set out to reach, beside what the raw results of E1 to E4 say."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .plan import FAR_OVERLOAD, OURS
from .tables import table

Results = Mapping[str, Any]
"""One experiment's JSON."""
H100, POISSON = "h100", "poisson"
MISSED = "**{}**"


@dataclass(frozen=True, slots=True)
class Target:
    """``asked`` of ``experiment``: ``figure`` of a scenario, None where there is none, is at least ``least`` of it, or
    at most ``most``."""

    asked: str
    experiment: str
    figure: Callable[[Results, str], float | None]
    least: Callable[[str], float] | None = None
    most: Callable[[str], float] | None = None
    unit: str = " ×"
    scale: float = 1.0

    def cell(self, results: Results, scenario: str) -> str:
        """The figure, in bold where it was missed; a dash where there is none."""
        value = None if _line(results, scenario) is None else self.figure(results, scenario)
        if value is None:
            return "–"
        missed = (self.least is not None and value < self.least(scenario)) or (
            self.most is not None and value > self.most(scenario)
        )
        digits = 1 if self.unit == "%" else 2
        text = f"{self.scale * value:.{digits}f}{self.unit}".replace("-", "−")
        return MISSED.format(text) if missed else text


def _line(results: Results, scenario: str, key: str = "lines", **where: Any) -> Any:
    for line in results[key]:
        if line["scenario"] == scenario and all(line[name] == value for name, value in where.items()):
            return line
    return None


def _over(policy: Callable[[str], bool]) -> Callable[[Results, str], float | None]:
    def figure(results: Results, scenario: str) -> float | None:
        for one in _line(results, scenario)["carried"]:
            if one["policy"] != OURS and policy(one["policy"]):
                return float(one["ours_over_it"]["value"]["mean"])
        return None

    return figure


def _is_door(policy: str) -> bool:
    return policy.startswith("reject_at_door")


def _every_class(results: Results, scenario: str) -> float:
    ours = next(one for one in _line(results, scenario)["carried"] if one["policy"] == OURS)
    return float(ours["every_class"]["value"]["mean"])


def _worst(results: Results, scenario: str) -> float | None:
    compared = (point["points"]["mean"] for point in _line(results, scenario)["sweep"] if point["points"])
    return min(compared, default=None)


def _latency(load: float, key: str = "ratio") -> Callable[[Results, str], float | None]:
    def figure(results: Results, scenario: str) -> float | None:
        line = _line(results, scenario, load=load)
        return None if line is None else float(line[key]["mean"])

    return figure


def _always(value: float) -> Callable[[str], float]:
    return lambda scenario: value


def _by_device(ascend: float, h100: float) -> Callable[[str], float]:
    return lambda scenario: h100 if scenario.startswith(H100) else ascend


TARGETS = (
    Target(
        "E1: at load 1.3, at least 4.44 times round robin's share",
        "e1",
        lambda found, scenario: float(_line(found, scenario)["ratio"]["mean"]),
        _always(4.44),
    ),
    Target(
        "E1: and at least 85% on time",
        "e1",
        lambda found, scenario: float(_line(found, scenario)["ours"]["mean"]),
        _always(0.85),
        unit="%",
        scale=100.0,
    ),
    Target(
        "E2: at least 1.3 times the load of the best baseline without admission",
        "e2",
        _over(lambda policy: not _is_door(policy)),
        _always(1.3),
    ),
    Target(
        "E2: with admission at the door, 1.18 times; on H100 1.12",
        "e2",
        _over(_is_door),
        _by_device(1.18, 1.12),
    ),
    Target("E2: every class at 90% up to a load of 1", "e2", _every_class, _always(1.0), unit=""),
    Target(
        "E2: nowhere worse than the better one by more than 0.5 points",
        "e2",
        _worst,
        _always(-0.005),
        unit=" points",
        scale=100.0,
    ),
    Target("E3: end-to-end at 0.8, at most 1.10 times round robin's", "e3", _latency(0.8), most=_always(1.1)),
    Target("E3: at 0.9, at most 1.16; on H100 below 1", "e3", _latency(0.9), most=_by_device(1.16, 1.0)),
    Target(
        "E3: at 1.6, of the requests served on time, at most 0.34",
        "e3",
        lambda found, scenario: float(_line(found, scenario, "selected")["ratio"]["mean"]),
        most=_always(1.0 - 0.6582),
    ),
    Target(
        "E3: at 1.6, of all, each counted three times its promise at most, 0.65",
        "e3",
        _latency(FAR_OVERLOAD, "capped_ratio"),
        most=_always(0.65),
    ),
    Target(
        "E4: 85% of the shedding fluid's load; Poisson 88%",
        "e4",
        lambda found, scenario: (line := _line(found, scenario))["ours"]["value"]["mean"] / line["fluid"],
        lambda scenario: 0.88 if scenario.endswith(POISSON) else 0.85,
        unit="%",
        scale=100.0,
    ),
    Target(
        "E4: told the true lengths, at most 1.05 times the load",
        "e4",
        lambda found, scenario: float(_line(found, scenario)["known_over_ours"]["value"]["mean"]),
        most=_always(1.05),
    ),
)


def markdown(folder: Path, titles: Mapping[str, str]) -> str:
    """A line for each target whose experiment has results in ``folder``; a column for each scenario of ``titles``."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("e?.json"))}
    lines: Sequence[Sequence[str]] = [
        [target.asked, *(target.cell(results[target.experiment], scenario) for scenario in titles)]
        for target in TARGETS
        if target.experiment in results
    ]
    return table(["", *titles.values()], lines)
