"""Writing results: raw JSON, and the generated sections of docs/experiments.md."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import msgspec

from ..common import environment
from .measure import Row, Task
from .plan import Plan
from .tables import replaced

SECTIONS = ("targets", "setting", "tuning", "e1", "e2", "e3", "e4", "e5", "e6", "e7", "e8", "e9")
UNMEASURED = "*Not measured in this run.*"
DIGITS = 6
"""Significant digits of raw results."""
_UNSHARED = ("requests", "cpu_s", "e2e_s", "on_time")
"""Of a run: what depends on the machine, and what is too long."""


@dataclass(frozen=True, slots=True)
class Places:
    """Folders: ``docs`` gets the page and its picture, ``results`` the JSON."""

    docs: Path
    results: Path


def write_results(path: Path, plan: Plan, sources: str, found: Any, runs: Mapping[Task, Row]) -> None:
    """``found`` and ``runs`` behind it, with what made them; a line for each element of a list."""
    result = msgspec.to_builtins(found)
    document = {
        "made_with": made_with(sources),
        "seeds": list(plan.seeds),
        "tuning_seeds": list(plan.tuning_seeds),
        **(result if isinstance(result, dict) else {"lines": result}),
        "runs": [settings(task, _UNSHARED) | _figures(row) for task, row in runs.items()],
    }
    write_document(path, document)


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """JSON with a line for each element of a list."""
    lines = [f"{json.dumps(key)}: {_text(value)}" for key, value in document.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def made_with(sources: str) -> dict[str, Any]:
    """The machine and the code, of which ``sources`` is the digest."""
    made = environment(0)
    del made["seed"]
    return made | {"sources": sources}


def settings(task: Any, unshared: Collection[str] = ()) -> dict[str, Any]:
    """Those of a task, a dataclass, that are not as usual, nor ``unshared``."""
    usual = {field.name: field.default for field in fields(task)}
    return {key: value for key, value in asdict(task).items() if key not in unshared and value != usual[key]}


def _figures(row: Row) -> dict[str, Any]:
    return {key: value for key, value in asdict(row).items() if key not in _UNSHARED}


def _text(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(_compact(element) for element in value) + "\n]"
    return _compact(value)


def _compact(value: Any) -> str:
    return json.dumps(_rounded(value), separators=(",", ":"), ensure_ascii=False)


def _rounded(value: Any) -> Any:
    match value:
        case float():
            return float(f"{value:.{DIGITS}g}")
        case dict():
            return {key: _rounded(one) for key, one in value.items()}
        case list() | tuple():
            return [_rounded(one) for one in value]
        case _:
            return value


def write_page(
    template: Path, places: Places, sections: Mapping[str, str], derived: Mapping[str, str], fresh: bool
) -> None:
    """The page with these sections, and those ``derived`` from results that may be of several commits. The others keep
    what the template says, unless the page is ``fresh``: then it holds what this run gave and nothing else."""
    kept = dict.fromkeys(SECTIONS, UNMEASURED) if fresh else {}
    commit = environment(0)["commit"]
    signed = {name: f"{content}\n\n*Measured at commit `{commit}`.*" for name, content in sections.items()}
    places.docs.mkdir(parents=True, exist_ok=True)
    (places.docs / template.name).write_text(replaced(template.read_text(), kept | signed | dict(derived)))
