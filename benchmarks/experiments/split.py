"""E8: prefill and decode on different instances: roles that the fleet chooses itself, against the best static split
found by search, against colocated, and against what disaggregated fleets run today on *their* best split. E9: the same
where the mix turns from prompts to decodes halfway."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .figures import Bounded, Estimate, difference, estimate, knee, knee_load, knee_ratio
from .measure import Row, Rows, Task
from .picture import Panel
from .plan import OURS, Plan
from .scenarios import SCENARIOS
from .tables import bounded, percent, points, table

BASELINES = ("round_robin", "least_loaded", "kv_aware", "edf")
PICTURE, TURNS_PICTURE = "img/experiments-split.png", "img/experiments-turns.png"
AUTO, CONVERTIBLE, COLOCATED = "auto", "convertible", "colocated"


@dataclass(frozen=True, slots=True)
class Point:
    """One load: attainment of each way by its name; auto less the best of the other ways of ours; the two stages,
    handoffs and their exposed time of auto."""

    load: float
    kept: dict[str, Estimate]
    behind: Estimate
    ttft: Estimate
    tpot: Estimate
    handoffs: float
    exposed_ms: float
    transitions: float


@dataclass(frozen=True, slots=True)
class Line:
    """A scenario. ``carried`` is the load with 90% on time, by way; ``gain`` that of auto over the best baseline."""

    scenario: str
    static: str
    baseline: str
    carried: dict[str, Bounded]
    gain: Bounded
    sweep: list[Point]


def turning(plan: Plan) -> Plan:
    """The plan of E9."""
    return replace(plan, split=plan.turns, split_loads=plan.turns_loads)


def _splits(plan: Plan, scenario: str) -> list[str]:
    """All static splits of a few instances, those in the middle of more."""
    instances = SCENARIOS[scenario].instances
    return [f"static:{k}" for k in range(1, instances)]


def tuning(plan: Plan) -> list[Task]:
    """What is tried on the tuning windows: all splits for ours, splits and chunks for the baselines."""
    return [task for scenario in plan.split for _, _, task in _tried(plan, scenario)]


def _tried(plan: Plan, scenario: str) -> list[tuple[str, str, Task]]:
    seed, load = plan.tuning_seeds[0], plan.split_tuning_load
    found = []
    for mode in _splits(plan, scenario):
        for spec in (OURS, *(f"{name}@{chunk}" for name in BASELINES for chunk in plan.split_chunks)):
            found.append((spec, mode, Task(scenario, spec, load, seed, plan.duration_s or plan.tuning_s, mode=mode)))
    return found


def choose(plan: Plan, rows: Rows) -> dict[str, tuple[str, str, str]]:
    """By scenario: the best split of ours, the best baseline and its split."""
    found = {}
    for scenario in plan.split:
        tried = [(rows[task].attainment, spec, mode) for spec, mode, task in _tried(plan, scenario)]
        _, _, static = max((one for one in tried if one[1] == OURS), key=lambda one: one[0])
        _, spec, mode = max((one for one in tried if one[1] != OURS), key=lambda one: one[0])
        found[scenario] = (static, spec, mode)
    return found


def unchosen(plan: Plan) -> dict[str, tuple[str, str, str]]:
    """Any choice: it tells how many runs there will be."""
    choice = "static:1", f"{BASELINES[0]}@{plan.split_chunks[0]}", "static:1"
    return dict.fromkeys((*plan.split, *plan.turns), choice)


def _ways(plan: Plan, scenario: str) -> dict[str, tuple[str, str]]:
    """(policy, mode) by name."""
    static, spec, mode = plan.splits[scenario]
    return {
        AUTO: (OURS, AUTO),
        CONVERTIBLE: (OURS, CONVERTIBLE),
        COLOCATED: (OURS, COLOCATED),
        "static": (OURS, static),
        "baseline": (spec, mode),
    }


def _runs(plan: Plan, scenario: str, way: tuple[str, str], load: float) -> list[Task]:
    duration_s = plan.duration_s or plan.split_s
    return [Task(scenario, way[0], load, seed, duration_s, mode=way[1]) for seed in plan.seeds]


def tasks(plan: Plan) -> list[Task]:
    """The reported runs."""
    return [
        task
        for scenario in plan.split
        for way in _ways(plan, scenario).values()
        for load in plan.split_loads
        for task in _runs(plan, scenario, way, load)
    ]


def result(plan: Plan, rows: Rows) -> list[Line]:
    """The figures."""
    return [_line(plan, rows, scenario) for scenario in plan.split]


def _line(plan: Plan, rows: Rows, scenario: str) -> Line:
    ways = _ways(plan, scenario)
    found: dict[str, dict[float, list[Row]]] = {
        name: {load: [rows[task] for task in _runs(plan, scenario, way, load)] for load in plan.split_loads}
        for name, way in ways.items()
    }
    knees = {
        name: knee({load: [row.attainment for row in of_load] for load, of_load in by_load.items()})
        for name, by_load in found.items()
    }
    static, spec, mode = plan.splits[scenario]
    return Line(
        scenario,
        static,
        f"{spec}, {mode}",
        {name: knee_load(one) for name, one in knees.items()},
        knee_ratio(knees[AUTO], knees["baseline"]),
        [_point(load, {name: by_load[load] for name, by_load in found.items()}) for load in plan.split_loads],
    )


def _point(load: float, found: dict[str, list[Row]]) -> Point:
    kept = {name: [row.attainment for row in of_way] for name, of_way in found.items()}
    best = [max(values) for values in zip(kept[CONVERTIBLE], kept[COLOCATED], kept["static"], strict=True)]
    auto = found[AUTO]
    return Point(
        load,
        {name: estimate(values) for name, values in kept.items()},
        difference(kept[AUTO], best),
        estimate([row.ttft_kept for row in auto]),
        estimate([row.tpot_kept for row in auto]),
        sum(row.handoffs for row in auto) / len(auto),
        1e3 * sum(row.exposed_s for row in auto) / len(auto),
        sum(row.transitions for row in auto) / len(auto),
    )


def panels(plan: Plan, found: Sequence[Line]) -> list[Panel]:
    """What PICTURE shows."""
    return [
        Panel(
            plan.title(line.scenario),
            {name: {point.load: point.kept[name] for point in line.sweep} for name in line.carried},
            plan.yardsticks[line.scenario].fluid_load,
        )
        for line in found
    ]


def markdown(plan: Plan, found: Sequence[Line], picture: str = PICTURE) -> str:
    """Loads carried, and the sweeps."""
    heads = [
        "90% on time at load",
        "auto",
        "convertible",
        "colocated",
        "best static split",
        "best baseline",
        "auto over it",
    ]
    carried = table(
        heads,
        [
            [
                plan.title(line.scenario),
                *(bounded(line.carried[name]) for name in (AUTO, CONVERTIBLE, COLOCATED)),
                f"{bounded(line.carried['static'])} ({line.static})",
                f"{bounded(line.carried['baseline'])} (`{line.baseline}`)",
                bounded(line.gain, " ×"),
            ]
            for line in found
        ],
    )
    heads = ["", "load", "auto", "convertible", "colocated", "static", "baseline", "auto less the best of ours, points"]
    heads += ["TTFT kept", "TPOT kept", "handoffs", "exposed ms", "transitions"]
    lines = [
        [
            plan.title(line.scenario),
            f"{point.load:g}",
            *(percent(point.kept[name]) for name in (AUTO, CONVERTIBLE, COLOCATED, "static", "baseline")),
            points(point.behind),
            percent(point.ttft),
            percent(point.tpot),
            f"{point.handoffs:,.0f}",
            f"{point.exposed_ms:.1f}",
            f"{point.transitions:.1f}",
        ]
        for line in found
        for point in line.sweep
    ]
    return f"{carried}\n\n![Attainment against load]({picture})\n\n{table(heads, lines)}"
