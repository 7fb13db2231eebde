"""Markdown of the results: figures with their intervals, tables, and the generated sections of docs/experiments.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .figures import Bounded, Estimate


def table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A markdown table; all columns but the first are aligned to the right."""
    rule = ["---", *("---:" for _ in headings[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in (headings, rule, *lines))


def shown(value: Estimate | None, digits: int = 1, scale: float = 1.0, unit: str = "", sign: str = "") -> str:
    """``1.23 (1.20 to 1.26)``, each times ``scale``; a dash for None."""
    if value is None:
        return "–"
    text = f"{sign}{scale * value.mean:.{digits}f}{unit}"
    if value.ci95 is None:
        return text
    return f"{text} ({scale * value.ci95[0]:.{digits}f} to {scale * value.ci95[1]:.{digits}f})"


def percent(value: Estimate) -> str:
    """A share."""
    return shown(value, 1, 100.0, "%")


def points(value: Estimate) -> str:
    """A difference of shares in percentage points, with its sign."""
    return ("+" if value.mean >= 0.0 else "") + shown(value, 1, 100.0).replace("-", "−")


def times(value: Estimate | None, sign: str = "") -> str:
    """A ratio."""
    return shown(value, 2, unit=" ×", sign=sign)


def bounded(found: Bounded, unit: str = "") -> str:
    """An estimate or its bound; a dash where nothing is known."""
    return shown(found.value, 2, unit=unit, sign=found.sign)


def replaced(page: str, sections: Mapping[str, str]) -> str:
    """``page`` with its generated sections of these names written anew. Raises ValueError for one that it has not."""
    for name, content in sections.items():
        start, end = f"<!-- generated: {name} -->", "<!-- /generated -->"
        before, found, rest = page.partition(start)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"no section {name!r}")
        page = f"{before}{start}\n{content}\n{end}{after}"
    return page
