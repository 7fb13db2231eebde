"""E7: what each part of the policy is worth: attainment with all of it, less that with the part in its plain form.

Each part is a policy file under benchmarks/ablations/, whose first line says what is swapped. All but the part is the
shipped policy.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .figures import Estimate, difference, estimate
from .measure import ROOT, Rows, Task
from .plan import OURS, Plan
from .tables import percent, points, table

FOLDER = Path("benchmarks", "ablations")
PREFIX_BLIND = FOLDER / "prefix_blind.py"
"""Measured where prompts share prefixes (prefixes.py)."""


def find_parts() -> list[str]:
    """The policy files of all parts that are measured here."""
    files = sorted((ROOT / FOLDER).glob("*.py"))
    return [str(FOLDER / path.name) for path in files if path.name not in ("__init__.py", PREFIX_BLIND.name)]


def what(part: str) -> str:
    """What a policy file says of itself: the first line of its docstring."""
    text = ast.get_docstring(ast.parse((ROOT / part).read_text())) or part
    return text.splitlines()[0].rstrip(".")


@dataclass(frozen=True, slots=True)
class Line:
    """A part at one load of a scenario; ``worth`` is what is lost without it."""

    part: str
    what: str
    scenario: str
    load: float
    without: Estimate
    worth: Estimate


def tasks(plan: Plan) -> list[Task]:
    """The runs."""
    policies = (OURS, *plan.parts)
    return [t for s in plan.ablated for policy in policies for t in plan.sweep(s, policy, plan.ablation_loads)]


def result(plan: Plan, rows: Rows) -> list[Line]:
    """The figures."""
    return [
        _line(plan, rows, part, scenario, load)
        for part in plan.parts
        for scenario in plan.ablated
        for load in plan.ablation_loads
    ]


def _line(plan: Plan, rows: Rows, part: str, scenario: str, load: float) -> Line:
    whole, without = (plan.attainment(rows, scenario, policy, load) for policy in (OURS, part))
    return Line(Path(part).stem, what(part), scenario, load, estimate(without), difference(whole, without))


def markdown(plan: Plan, found: Sequence[Line]) -> str:
    """One table: a line a part, a column a scenario and load."""
    places = list(dict.fromkeys((line.scenario, line.load) for line in found))
    worth = {(line.part, line.scenario, line.load): line for line in found}
    heads = ["in its plain form", *(f"{plan.title(scenario)}, load {load:g}" for scenario, load in places)]
    lines = [
        [f"`{part}`: {text}", *(_cell(worth[part, scenario, load]) for scenario, load in places)]
        for part, text in dict.fromkeys((line.part, line.what) for line in found)
    ]
    return table(heads, lines)


def _cell(line: Line) -> str:
    return f"{points(line.worth)}; without: {percent(Estimate(line.without.mean, None, ()))}"
