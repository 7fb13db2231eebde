"""Write the generated parts of the documentation: ``python docs/generate.py`` (``--check`` only compares)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from hyperflexis.core.instance import INSTANCE_TRANSITIONS
from hyperflexis.core.request import REQUEST_TRANSITIONS
from hyperflexis.core.transfer import SOURCE_TRANSITIONS, TARGET_TRANSITIONS

DOCS = Path(__file__).parent
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


PAGES = {
    DOCS / "architecture.md": {
        "request": state_diagram(REQUEST_TRANSITIONS),
        "instance": state_diagram(INSTANCE_TRANSITIONS),
    },
    DOCS / "handoff.md": {
        "source": state_diagram(SOURCE_TRANSITIONS),
        "target": state_diagram(TARGET_TRANSITIONS),
    },
}


def main() -> int:
    """Write, or with ``--check`` say which pages are out of date."""
    outdated = 0
    for page, sections in PAGES.items():
        old = new = page.read_text()
        for name, content in sections.items():
            new = replaced(new, name, content)
        if "--check" not in sys.argv:
            page.write_text(new)
        elif old != new:
            print(f"{page} is out of date: run python docs/generate.py")
            outdated = 1
    return outdated


if __name__ == "__main__":
    sys.exit(main())
