"""Iteration times of a device as measured: a coarse grid with straight lines in between.

A formula of few coefficients misses what real devices do: steps where another kernel or compiled graph takes over,
a floor while the weights are read. Where iterations were measured densely, a table follows them. It has two parts:

- *decode*: iterations that only decode, over the number of decodes and their mean context;
- *prompt*: iterations with prompt tokens, over all of their tokens (prompt tokens and decodes: what the linear
  layers see), the decodes among them and those decodes' mean context. The attention of the prompt tokens is *not* in
  it: it depends on chunks and their contexts, and is added as the formula's c2 * sum(n * (ctx + n/2)).

Inside the grid: multilinear interpolation in seconds. Outside: the value at the nearest point of the grid, and the
formula's difference between there and here.

With the number of decodes fixed, seconds are so a piecewise linear function of their KV tokens, which is what makes it
cheap to advance thousands of decode iterations at once (``decode_line``).
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from math import inf

from .latency import Coefficients

Axis = tuple[float, ...]
"""Grid lines: at least one, growing."""
Line = tuple[float, float, float]
"""``(a, b, kv_until)``: a + b * KV seconds for KV tokens below ``kv_until``."""


@dataclass(frozen=True, slots=True)
class DecodeGrid:
    """``seconds[i][j]`` with ``decodes[i]`` decodes of ``contexts[j]`` tokens each."""

    decodes: Axis
    contexts: Axis
    seconds: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class PromptGrid:
    """``seconds[i][j][k]`` without the prompt's attention, with ``tokens[i]`` tokens in all, of which ``decodes[j]``
    are decodes of ``contexts[k]`` tokens each. The largest of ``tokens`` is more than the largest of ``decodes``."""

    tokens: Axis
    decodes: Axis
    contexts: Axis
    seconds: tuple[tuple[tuple[float, ...], ...], ...]


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """Both grids, and the ``formula`` that goes on outside of them and prices prompt attention."""

    formula: Coefficients
    decode: DecodeGrid
    prompt: PromptGrid
    _lines: dict[float, tuple[list[float], list[Line]]] = field(
        init=False, default_factory=dict, repr=False, compare=False
    )
    """Decode lines by number of decodes: at most as many entries as a batch has requests."""

    def prompt_s(self, prefill_tokens: float, attention: float, decodes: float, kv_tokens: float) -> float:
        """Seconds of an iteration with prompt tokens, ``attention`` = sum n*(ctx + n/2)."""
        grid, formula = self.prompt, self.formula
        tokens = prefill_tokens + decodes
        context = kv_tokens / decodes if decodes else grid.contexts[0]
        i, u, near_tokens = place(grid.tokens, tokens)
        j, v, near_decodes = place(grid.decodes, decodes)
        k, w, near_context = place(grid.contexts, context)
        seconds = 0.0
        for plane, weight in ((grid.seconds[i], 1.0 - u), (grid.seconds[min(i + 1, len(grid.tokens) - 1)], u)):
            if weight:
                seconds += weight * _bilinear(plane, j, v, k, w)
        if (near_tokens, near_decodes, near_context) != (tokens, decodes, context):
            here = formula.predict(prefill_tokens, 0.0, decodes, kv_tokens)
            there = formula.predict(near_tokens - near_decodes, 0.0, near_decodes, near_decodes * near_context)
            seconds += here - there
        return seconds + formula.c2 * attention

    def decode_line(self, decodes: float, kv_tokens: float) -> Line:
        """The line that holds from ``kv_tokens`` on, for an iteration that only decodes."""
        found = self._lines.get(decodes)
        if found is None:
            lines = self._decode_lines(decodes)
            found = self._lines[decodes] = ([until for _, _, until in lines[:-1]], lines)
        ends, lines = found
        return lines[bisect_right(ends, kv_tokens)]

    def _decode_lines(self, decodes: float) -> list[Line]:
        grid, formula = self.decode, self.formula
        i, u, near = place(grid.decodes, decodes)
        low, high = grid.seconds[i], grid.seconds[min(i + 1, len(grid.decodes) - 1)]
        values = [(1.0 - u) * a + u * b for a, b in zip(low, high, strict=True)]
        contexts = grid.contexts
        # The formula's difference for decodes outside of the grid: one part of it grows with the context.
        beyond, beyond_slope = formula.c3 * (decodes - near), formula.c4 * (decodes - near)
        edge = formula.c4 * near
        slopes = [edge]
        for k in range(1, len(contexts)):
            slopes.append((values[k] - values[k - 1]) / (contexts[k] - contexts[k - 1]))
        slopes.append(edge)
        lines: list[Line] = []
        for k, slope in enumerate(slopes):
            at = min(k, len(contexts) - 1)
            constant = values[at] - slope * contexts[at] + beyond
            until = contexts[k] * decodes if k < len(contexts) else inf
            lines.append((constant, (slope + beyond_slope) / decodes, until))
        return lines


def place(axis: Axis, value: float) -> tuple[int, float, float]:
    """``(i, w, near)``: ``near`` is ``value`` moved into the axis, and lies at the share w between lines i and i+1."""
    if value <= axis[0]:
        return 0, 0.0, axis[0]
    last = len(axis) - 1
    if value >= axis[last]:
        return last, 0.0, axis[last]
    i = bisect_right(axis, value) - 1
    return i, (value - axis[i]) / (axis[i + 1] - axis[i]), value


def _bilinear(plane: tuple[tuple[float, ...], ...], j: int, v: float, k: int, w: float) -> float:
    low = plane[j]
    seconds = low[k] + w * (low[k + 1] - low[k]) if w else low[k]
    if v:
        high = plane[j + 1]
        seconds += v * ((high[k] + w * (high[k + 1] - high[k]) if w else high[k]) - seconds)
    return seconds
