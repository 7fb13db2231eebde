"""The baselines' settings: the best on tuning windows, of which no reported run sees a second.

Chunk sizes for all, for admission at the door the margin too. Every baseline has what suits the claim in question:
round robin is tuned for attainment in overload, and for the end-to-end time below and in overload.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from .measure import Row, Rows, Task
from .plan import OVERLOAD, Plan
from .tables import table

BASELINES = ("round_robin", "least_loaded", "power_of_two", "kv_aware", "prefill_first", "edf", "priority")
"""Those without admission."""
DOOR = "reject_at_door"


@dataclass(frozen=True, slots=True)
class Purpose:
    """What settings of ``names`` are wanted for: the highest mean ``score`` over runs at ``loads``."""

    what: str
    names: Sequence[str]
    loads: Sequence[float]
    score: Callable[[Row], float]


def _percent(row: Row) -> float:
    return 100.0 * row.attainment


def _quickness(row: Row) -> float:
    return -row.mean_e2e_s


# The loads of `best` and `door` lie on both sides of where most of them keep 90%.
PURPOSES: dict[str, Purpose] = {
    "best": Purpose("% on time, loads 0.6 and 0.9", BASELINES, (0.6, 0.9), _percent),
    "round_robin": Purpose(f"% on time, load {OVERLOAD}", ("round_robin",), (OVERLOAD,), _percent),
    "quick_below": Purpose("mean e2e s, load 0.8", ("round_robin",), (0.8,), _quickness),
    "quick_above": Purpose(f"mean e2e s, load {OVERLOAD}", ("round_robin",), (OVERLOAD,), _quickness),
    "door": Purpose("% on time, loads 0.8 and 1.2", (DOOR,), (0.8, 1.2), _percent),
}


def specs(plan: Plan, purpose: Purpose) -> list[str]:
    """The settings that are tried."""
    margins = [f",{margin}" for margin in plan.margins]
    return [
        f"{name}@{chunk}{margin}"
        for name in purpose.names
        for margin in (margins if name == DOOR else [""])
        for chunk in plan.chunks
    ]


def _runs(plan: Plan, scenario: str, spec: str, purpose: Purpose) -> list[Task]:
    seeds = plan.tuning_seeds
    return [Task(scenario, spec, load, seed, plan.tuning_s) for load in purpose.loads for seed in seeds]


def tasks(plan: Plan) -> list[Task]:
    """All tuning runs; some serve several purposes."""
    return [
        task
        for scenario in plan.scenarios
        for purpose in PURPOSES.values()
        for spec in specs(plan, purpose)
        for task in _runs(plan, scenario, spec, purpose)
    ]


def scores(plan: Plan, rows: Rows) -> dict[str, dict[str, dict[str, float]]]:
    """What each setting gave, by purpose and scenario."""
    return {
        name: {
            scenario: {
                spec: fmean(purpose.score(rows[task]) for task in _runs(plan, scenario, spec, purpose))
                for spec in specs(plan, purpose)
            }
            for scenario in plan.scenarios
        }
        for name, purpose in PURPOSES.items()
    }


def choose(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, str]]:
    """The setting with the best of ``scores``, by purpose and scenario."""
    return {
        name: {scenario: max(tried, key=lambda spec: tried[spec]) for scenario, tried in by_scenario.items()}
        for name, by_scenario in found.items()
    }


def unchosen(plan: Plan) -> dict[str, dict[str, str]]:
    """Any settings, all different: they tell how many runs there will be at most, not which."""
    first = {
        name: specs(plan, purpose)[index % len(plan.chunks)] for index, (name, purpose) in enumerate(PURPOSES.items())
    }
    return {name: dict.fromkeys(plan.scenarios, spec) for name, spec in first.items()}


def result(plan: Plan, rows: Rows) -> dict[str, Any]:
    """What was tried and what was chosen."""
    return {"chosen": plan.choices, "scores": scores(plan, rows)}


def markdown(plan: Plan, found: Mapping[str, Any]) -> str:
    """A table for each scenario, the chosen settings in bold."""
    return "\n\n".join(_table(plan, found, scenario) for scenario in plan.scenarios)


def _table(plan: Plan, found: Mapping[str, Any], scenario: str) -> str:
    lines = []
    for name, purpose in PURPOSES.items():
        tried, chosen = found["scores"][name][scenario], found["chosen"][name][scenario]
        for label in dict.fromkeys(_label(spec) for spec in tried):
            cells = [_cell(value, spec == chosen) for spec, value in tried.items() if _label(spec) == label]
            lines.append([label, purpose.what, *cells])
    return f"**{plan.title(scenario)}**\n\n" + table(["", "tuned for", *(f"@{chunk}" for chunk in plan.chunks)], lines)


def _label(spec: str) -> str:
    name, _, numbers = spec.partition("@")
    margin = numbers.partition(",")[2]
    return f"`{name}`" + (f", margin {margin}" if margin else "")


def _cell(score: float, chosen: bool) -> str:
    text = f"{abs(score):.1f}"
    return f"**{text}**" if chosen else text
