"""Reading the csv files of workloads: traces, tables of lengths, sessions, rates. Text in, rows out.

The first row names the columns, in any order; columns that are not needed are left alone. Whatever cannot be meant is
refused with file, line and remedy: a row that is guessed at would bend a measurement without a word.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from math import isfinite

from ..errors import ConfigError
from .workload import SessionRow, TraceRow

LENGTHS = ("prompt_tokens", "output_tokens")
SESSIONS = ("session", "t_in_session", *LENGTHS, "reusable_prefix_tokens")
RATES = ("t", "rate_rps")
ROW_REMEDY = "correct the row or remove it"


class _Row:
    """One row: its cells by column, and errors that say where it is."""

    __slots__ = ("_cells", "_columns", "_line", "_path")

    def __init__(self, path: str, line: int, columns: dict[str, int], cells: list[str]) -> None:
        self._path, self._line, self._columns, self._cells = path, line, columns, cells

    def error(self, message: str) -> ConfigError:
        return ConfigError(f"{self._path}:{self._line}: {message}")

    def text(self, column: str) -> str:
        """The cell, empty where there is none."""
        index = self._columns.get(column, len(self._cells))
        return self._cells[index].strip() if index < len(self._cells) else ""

    def whole(self, column: str, minimum: int) -> int:
        text = self.text(column)
        try:
            value = int(text)
        except ValueError:
            raise self.error(f"{column} must be a whole number, not {text!r}; {ROW_REMEDY}") from None
        if value < minimum:
            raise self.error(f"{column} must be at least {minimum}, not {value}; {ROW_REMEDY}")
        return value

    def number(self, column: str, what: str, remedy: str) -> float:
        """One of at least 0."""
        text = self.text(column)
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not isfinite(value):
            raise self.error(f"{column} must be a number of {what}, not {text!r}; {ROW_REMEDY}")
        if value < 0.0:
            raise self.error(f"{column} must not be negative ({text}); {remedy}")
        return value

    def seconds(self, column: str) -> float:
        return self.number(column, "seconds", "subtract the earliest time from all rows")

    def hash_ids(self) -> tuple[int, ...]:
        text = self.text("hash_ids")
        try:
            ids = tuple(map(int, text.split()))
        except ValueError:
            ids = (-1,)
        if ids and min(ids) < 0:
            raise self.error("hash_ids must be whole numbers of at least 0, apart by spaces; " + ROW_REMEDY)
        return ids


def parse_table(text: str, path: str, timed: bool) -> tuple[TraceRow, ...]:
    """A table of lengths, or when ``timed`` a trace, from csv ``text``; ``path`` is its name for messages.

    Columns: prompt_tokens and output_tokens, whole numbers of at least 1; for a trace also t in seconds, not negative
    and sorted; optionally hash_ids (numbers apart by spaces) and session. Raises ConfigError naming file, line, column
    and remedy.
    """
    rows: list[TraceRow] = []
    last = 0.0
    for row in _rows(text, path, ("t", *LENGTHS) if timed else LENGTHS):
        t = row.seconds("t") if timed else 0.0
        if t < last:
            raise row.error(f"t goes back from {last} to {t}; sort the rows by t")
        last = t
        rows.append(
            TraceRow(
                t, row.whole("prompt_tokens", 1), row.whole("output_tokens", 1), row.hash_ids(), row.text("session")
            )
        )
    return tuple(rows)


def parse_rates(text: str, path: str) -> tuple[tuple[float, float], ...]:
    """(from second, requests per second) from csv ``text``; ``path`` is its name for messages.

    Columns: t in seconds, 0 at first and growing, and rate_rps, not negative. Raises ConfigError naming file, line,
    column and remedy.
    """
    steps: list[tuple[float, float]] = []
    for row in _rows(text, path, RATES, "step"):
        t = row.seconds("t")
        if not steps and t > 0.0:
            raise row.error(f"the first t must be 0, not {t:g}; subtract it from all rows")
        if steps and t <= steps[-1][0]:
            raise row.error(f"t must grow, and {t:g} comes after {steps[-1][0]:g}; sort the rows by t, one for each t")
        steps.append((t, row.number("rate_rps", "requests per second", ROW_REMEDY)))
    return tuple(steps)


def parse_sessions(text: str, path: str) -> tuple[tuple[SessionRow, ...], ...]:
    """Sessions, each with its requests in the order of the file, from csv ``text``; ``path`` is its name for messages.

    Columns: session (any name), t_in_session in seconds, not negative, prompt_tokens of at least 1, output_tokens of
    at least 0, reusable_prefix_tokens. Times may go back within a session, whose requests need not follow each
    other: an agent's helpers work beside it. Raises ConfigError naming file, line, column and remedy.
    """
    sessions: dict[str, list[SessionRow]] = {}
    longest: dict[str, int] = {}
    for row in _rows(text, path, SESSIONS):
        name = row.text("session")
        if not name:
            raise row.error("session must not be empty; name the session that the request belongs to")
        prompt, output = row.whole("prompt_tokens", 1), row.whole("output_tokens", 0)
        reusable = row.whole("reusable_prefix_tokens", 0)
        available = min(prompt, longest.get(name, 0))
        if reusable > available:
            raise row.error(
                f"reusable_prefix_tokens is {reusable}, but the prompt and the session's earlier ones with their"
                f" answers have {available}; lower it"
            )
        longest[name] = max(longest.get(name, 0), prompt + output)
        sessions.setdefault(name, []).append(SessionRow(row.seconds("t_in_session"), prompt, output, reusable))
    return tuple(map(tuple, sessions.values()))


def _rows(text: str, path: str, needed: Sequence[str], each: str = "request") -> Iterator[_Row]:
    """The rows below the header, at least one, blank lines left out."""
    reader = csv.reader(io.StringIO(text))
    try:
        header = next(reader, [])
        columns = {name.strip(): index for index, name in enumerate(header)}
        if not columns:
            raise ConfigError(f"{path}:1: the file is empty; it needs a row of column names ({', '.join(needed)})")
        for column in needed:
            if column not in columns:
                has = ", ".join(columns)
                raise ConfigError(f"{path}:1: column {column!r} is missing; add it, or rename the one meant ({has})")
        empty = True
        for cells in reader:
            if cells:
                empty = False
                yield _Row(path, reader.line_num, columns, cells)
    except csv.Error as error:
        raise ConfigError(f"{path}:{reader.line_num}: not csv: {error}; {ROW_REMEDY}") from None
    if empty:
        raise ConfigError(f"{path}:{reader.line_num + 1}: no rows below the header; add one for each {each}")
