"""The parts of the evidence: what each runs, and that in markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..experiments.figures import Estimate, estimate
from ..experiments.tables import shown, table
from .cost import Cost, Runs, Setting, cost, cost_of, curves
from .runs import TARGET, Task
from .search import GRIDS, fixed_mean, foresight, tuned
from .step import PICTURES, draw, tick
from .step import STARTS as STEP_STARTS
from .step import curves as step_curves

SEEDS = (1, 2, 3, 4, 5)
FEW_SEEDS = SEEDS[:3]
"""Where runs are long, or differ little."""
CODE = Setting("Azure code", Task("scale-code.yaml", 0, 12), (6, 7, 8, 9, 10, 11, 12, 13, 14, 16), SEEDS)
CONVERSATION = Setting("Azure conversation", Task("scale-conversation.yaml", 0, 10), (9, 10, 11, 12, 13, 14), SEEDS)
CODE_LAX = Setting("Azure code, lax", replace(CODE.task, first=8, lax=True), (5, 6, 7, 8, 9), FEW_SEEDS)
CONVERSATION_LAX = Setting(
    "Azure conversation, lax", replace(CONVERSATION.task, first=8, lax=True), (6, 7, 8, 9), FEW_SEEDS[:1]
)
DAY = Setting("ServeGen day 4", Task("scale-day.yaml", 0, 9), (8, 9, 10, 11), (1,))
WEEK = Setting("ServeGen week 1", Task("scale-week.yaml", 0, 8), (7, 8, 9, 10), (1,))
SQUARE = Setting("square", Task("scale-square.yaml", 0, 4), (14, 16, 18, 20), FEW_SEEDS)
ASCEND = "ascend-910b3"
CODE_ASCEND = Setting(
    "Azure code, 4 copies",
    replace(CODE.task, first=7, copies=4, profile=ASCEND),
    (5, 6, 7, 8, 9, 10, 11, 12),
    FEW_SEEDS,
)
CONVERSATION_ASCEND = Setting(
    "Azure conversation, 8 copies",
    replace(CONVERSATION.task, first=5, copies=8, profile=ASCEND),
    (3, 4, 5, 6),
    (1,),
)
ROLES = 0.4
"""Share of a disaggregated fleet that is for prompts at first."""
STARTS = ("2", "10", "60")
TUNED_STARTS = ("2", "60")
BEST_KINDS = ("concurrency", "rate")
CONVERSATION_TUNING_S = 600.0
DAY_TUNING_S = 1200.0
SHELLS = (2, 4, 8, 12)
PRICES = (0.0, 0.05, 0.2)


@dataclass(frozen=True, slots=True)
class Part:
    """``found`` for the raw file, and the section of the page."""

    found: Any
    markdown: str


@dataclass(frozen=True, slots=True)
class Line:
    """A scaler on a setting. ``asked`` is the most percent that it may cost, None where nothing was asked."""

    setting: str
    start: str
    scaler: str
    cost: Cost
    asked: float | None = None


def code(runs: Runs) -> Part:
    """Azure code."""
    return _trace(runs, CODE, {"2": 50.19, "10": 105.0, "60": 105.0}, foresight_seeds=FEW_SEEDS)


def conversation(runs: Runs) -> Part:
    """Azure conversation."""
    return _trace(
        runs,
        CONVERSATION,
        {"2": 93.0},
        foresight_seeds=FEW_SEEDS,
        tuned_starts=TUNED_STARTS[:1],
        kinds=BEST_KINDS,
        tuning_s=CONVERSATION_TUNING_S,
    )


def day(runs: Runs) -> Part:
    """ServeGen day 4."""
    asked = {"2": 83.0, "60": 94.0}
    return _trace(runs, DAY, asked, starts=TUNED_STARTS, kinds=BEST_KINDS, tuning_s=DAY_TUNING_S)


def week(runs: Runs) -> Part:
    """ServeGen's rates of week 1."""
    return _trace(runs, WEEK, {}, tuned_starts=())


def square(runs: Runs) -> Part:
    """Five times the load, on and off."""
    return _trace(runs, SQUARE, {}, tuned_starts=())


def ascend(runs: Runs) -> Part:
    """Both Azure traces on another device."""
    return _ours(runs, (CODE_ASCEND, CONVERSATION_ASCEND))


def lax(runs: Runs) -> Part:
    """Both Azure traces, all requests with 4 s and 100 ms."""
    return _ours(runs, (CODE_LAX, CONVERSATION_LAX))


def roles(runs: Runs) -> Part:
    """Both Azure traces, by fleets that are scaled and disaggregated at once, beside colocated ones."""
    lines, cells = [], []
    for setting in (CODE, CONVERSATION):
        points = curves(runs, setting)
        for start in STARTS:
            line = [setting.title, f"{start} s"]
            for prefill in (0, round(ROLES * setting.task.first)):
                rows = runs(replace(setting.scaled(seed, "forecast", start), prefill=prefill) for seed in setting.seeds)
                lines.append(Line(setting.title, start, f"prefill {prefill}", cost_of(points, rows)))
                line += [_kept(lines[-1].cost), f"{lines[-1].cost.instances:.1f}"]
            cells.append(line)
    heads = ["trace", "start", "colocated: on time, %", "instances", "with roles: on time, %", "instances"]
    return Part(lines, table(heads, cells))


def _ours(runs: Runs, settings: Sequence[Setting]) -> Part:
    lines = []
    for setting in settings:
        points = curves(runs, setting)
        for start in STARTS:
            rows = runs(setting.scaled(seed, "forecast", start) for seed in setting.seeds)
            lines.append(Line(setting.title, start, "forecast", cost_of(points, rows)))
    heads = ["trace", "start", "on time, %", "cost, %"]
    cells = [[line.setting, f"{line.start} s", _kept(line.cost), shown(line.cost.percent)] for line in lines]
    return Part(lines, table(heads, cells))


def _trace(
    runs: Runs,
    setting: Setting,
    asked: dict[str, float],
    foresight_seeds: Sequence[int] = (),
    starts: Sequence[str] = STARTS,
    tuning_s: float = 0.0,
    tuned_starts: Sequence[str] = TUNED_STARTS,
    kinds: Sequence[str] = tuple(GRIDS),
) -> Part:
    points = curves(runs, setting)
    lines = []
    for start in starts:
        rows = runs(setting.scaled(seed, "forecast", start) for seed in setting.seeds)
        lines.append(Line(setting.title, start, "forecast", cost_of(points, rows), asked.get(start)))
        if foresight_seeds:
            known = [foresight(runs, setting, seed, start) for seed in foresight_seeds]
            lines.append(Line(setting.title, start, "foresight", cost_of(points[: len(known)], known)))
        for kind in kinds if start in tuned_starts else ():
            spec = tuned(runs, setting, kind, start, tuning_s)
            rows = runs(setting.scaled(seed, spec, start) for seed in setting.seeds)
            lines.append(Line(setting.title, start, spec, cost_of(points, rows)))
    demand = [row.demand for row in runs(setting.fixed(seed)[0] for seed in setting.seeds)]
    at_target = cost(points, [TARGET] * len(points), demand)
    heads = ["start", "", "on time, %", "cost, %", "asked"]
    cells = [
        [
            f"{line.start} s" if line.scaler == "forecast" else "",
            "**ours**" if line.scaler == "forecast" else line.scaler.join("``") if "@" in line.scaler else line.scaler,
            _kept(line.cost),
            shown(line.cost.percent),
            verdict(line.cost.percent, line.asked),
        ]
        for line in lines
    ]
    if tuned_starts:
        mean = runs([fixed_mean(demand[0], setting.fixed(setting.seeds[0])[0])])[0]
        cells.append(["", "fixed, of the mean demand (seed 1)", f"{100 * mean.attainment:.1f}", "", ""])
    cells.append(["", "work floor", "", shown(at_target.percent), ""])
    return Part({"lines": lines, "work_floor": at_target.percent, "fixed": points}, table(heads, cells))


def verdict(found: Estimate | None, most: float | None) -> str:
    """Whether a cost is what was asked for."""
    if most is None:
        return ""
    if found is None:
        return f"{most:g}: not known"
    over = found.mean - most
    return f"{abs(most):g}: met" if over <= 0.0 else f"{abs(most):g}: missed by {over:.1f}"


def _kept(found: Cost) -> str:
    return shown(found.attainment, 2, 100.0)


def standby(runs: Runs) -> Part:
    """What shells are worth on code: weights over a link then, by disk where no shell is left."""
    setting = replace(CODE, seeds=FEW_SEEDS)
    points = curves(runs, setting)
    found, cells = [], []
    for shells in (0, *SHELLS):
        free, dear = (
            runs(setting.scaled(seed, "forecast", "standby", shells, price) for seed in setting.seeds) if shells else []
            for price in (0.0, 1.0)
        )
        if not shells:
            free = dear = runs(setting.scaled(seed, "forecast", "d2d") for seed in setting.seeds)
        kept = [row.attainment for row in free]
        costs = []
        for price in PRICES:
            # A shell's seconds count with its price, which decides nothing: the cost is linear in it.
            means = [a.instances + price * (b.instances - a.instances) for a, b in zip(free, dear, strict=True)]
            costs.append(cost(points, kept, means))
        found.append({"shells": shells, "prices": PRICES, "costs": costs})
        cells.append([str(shells), _kept(costs[0]), *(shown(one.percent) for one in costs)])
    heads = ["shells", "on time, %", *(f"cost at {price:g} a shell, %" for price in PRICES)]
    return Part(found, table(heads, cells))


def means(runs: Runs) -> Part:
    """D2D starts against the best policy that starts from disk, a fixed fleet included."""
    found, cells = [], []
    for setting, asked in ((CODE, 40.0), (CONVERSATION, 5.0)):
        points = curves(runs, setting)

        def by(start: str, setting: Setting = setting, points: Any = points) -> Cost:
            return cost_of(points, runs(setting.scaled(seed, "forecast", start) for seed in setting.seeds))

        disk = by("disk")
        best = min(100.0, disk.percent.mean if disk.percent else 100.0)
        for start in ("2", "d2d"):
            one = by(start)
            saved = None if one.percent is None else estimate([100.0 * (1 - p / best) for p in one.percent.by_seed])
            found.append({"trace": setting.title, "start": start, "cost": one, "disk": disk, "saved": saved})
            title = "2 s" if start == "2" else "D2D of the profile"
            least = None if saved is None else estimate([-saved.mean])
            line = [setting.title, title, _kept(one), shown(one.percent), _kept(disk), shown(disk.percent)]
            cells.append([*line, shown(saved), verdict(least, -asked)])
    heads = ["trace", "start", "on time, %", "cost, %", "from disk: on time, %", "cost, %", "saved, %", "asked"]
    return Part(found, table(heads, cells))


def step(runs: Runs) -> Part:
    """The step, with the settings of baselines for starts of 2 s on Azure conversation, whose lengths it has."""
    specs = [tuned(runs, CONVERSATION, kind, TUNED_STARTS[0], CONVERSATION_TUNING_S) for kind in BEST_KINDS]
    found = step_curves(runs, specs)
    draw(found, PICTURES)
    heads = ["start", *("**ours**" if name == "forecast" else name for name in found)]
    cells = [
        [tick(at).replace("\n", ", "), *(shown(curve.get(at), 2, 100.0) for curve in found.values())]
        for at in STEP_STARTS
    ]
    return Part({"settings": specs, "on_time": found}, table(heads, cells))


PARTS = {
    "code": code,
    "conversation": conversation,
    "lax": lax,
    "standby": standby,
    "means": means,
    "step": step,
    "square": square,
    "ascend": ascend,
    "roles": roles,
    "week": week,
    "day": day,
}
