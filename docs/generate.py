"""Write the generated parts of the documentation: ``python docs/generate.py`` (``--check`` only compares)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from hyperflexis.core.instance import INSTANCE_TRANSITIONS
from hyperflexis.core.request import REQUEST_TRANSITIONS

ARCHITECTURE = Path(__file__).parent / "architecture.md"
S = TypeVar("S", bound=StrEnum)


def state_diagram(table: Mapping[S, frozenset[S]]) -> str:
    """A Mermaid state diagram of a transition table; the first state is where things start."""
    states = list(table)
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {states[0]}"]
    for state in states:
        moves = sorted(table[state], key=states.index)
        lines += [f"    {state} --> {move}" for move in moves] or [f"    {state} --> [*]"]
    return "\n".join([*lines, "```"])


def replaced(text: str, name: str, content: str) -> str:
    """``text`` with the generated section ``name`` replaced. Raises ValueError when it has none."""
    start, end = f"<!-- generated: {name} -->", "<!-- /generated -->"
    before, mark, rest = text.partition(start)
    _, close, after = rest.partition(end)
    if not mark or not close:
        raise ValueError(f"no section {name!r}")
    return f"{before}{start}\n{content}\n{end}{after}"


def architecture(text: str) -> str:
    """The architecture page with its diagrams brought up to date."""
    text = replaced(text, "request", state_diagram(REQUEST_TRANSITIONS))
    return replaced(text, "instance", state_diagram(INSTANCE_TRANSITIONS))


def main() -> int:
    """Write, or with ``--check`` say whether a page is out of date."""
    old = ARCHITECTURE.read_text()
    new = architecture(old)
    if "--check" in sys.argv:
        if old != new:
            print(f"{ARCHITECTURE} is out of date: run python docs/generate.py")
        return int(old != new)
    ARCHITECTURE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
