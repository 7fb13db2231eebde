"""The numerics of ``calibrate``: from measured iterations to coefficients, a table, and an honest error.

*Formula.* Non-negative least squares on relative errors, with prefill, decode and mixed iterations weighted alike
however many of each were measured. With knots x1 < x2 < ... the cost of the linear layers is a piecewise linear
function of an iteration's tokens, c1 * E(tokens), whose rises between knots are unknowns like the coefficients. Which
of c1 * E and c3 * B is larger in a mixed iteration is found by repetition.

*Table.* The formula's value at each grid node plus a correction. Corrections are least squares on relative errors of
the interpolation itself, and as smooth as the data allows: where nothing was measured a node takes the correction of
its neighbours.

*Left-out lines.* A line is all that was measured at one chunk size, one number of decodes or one context. Each is left
out once, everything is fitted anew without it, and its iterations are predicted. The outermost lines of an axis are
extrapolations and counted apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, product
from typing import Any

from .core.latency import Coefficients
from .core.latency_table import Axis, DecodeGrid, LatencyTable, PromptGrid, place
from .core.profile import REGIMES
from .errors import HyperFlexisError

CURVE_UNTIL = 1024
"""Tokens up to which the curve may bend. From there on devices are bound by arithmetic: what still bends is
attention, and must stay for c2 to explain."""
SMOOTH, RIDGE = 1e-5, 1e-7
"""Weight of the differences between neighbouring corrections, and of the corrections themselves, against data whose
weight is 1 in each regime: small enough to move no node that was measured by a tenth of a percent."""

MAX_LINES = 16
"""Lines of an axis that are left out, evenly chosen among those measured: a line between close neighbours tells little
and each costs a fit."""

Predict = Callable[[float, float, float, float], float]
"""Seconds from prefill tokens, attention, decodes and KV tokens."""
Errors = dict[str, float | None]


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured iteration; ``attention`` as in the formula. ``lines`` are the grid lines that it lies on, by axis:
    ``tokens``, ``decodes``, ``context``."""

    prefill_tokens: float
    attention: float
    decodes: float
    kv_tokens: float
    seconds: float
    lines: Mapping[str, float] = field(default_factory=dict)

    @property
    def regime(self) -> str:
        """One of REGIMES."""
        if not self.decodes:
            return "prefill"
        return "mixed" if self.prefill_tokens else "decode"

    @property
    def shape(self) -> tuple[float, float, float, float]:
        """All but the measured time."""
        return self.prefill_tokens, self.attention, self.decodes, self.kv_tokens


@dataclass(frozen=True, slots=True)
class GridAxes:
    """The lines of a table's axes: tokens of an iteration with prompts, decodes, and their context."""

    tokens: Axis
    decodes: Axis
    contexts: Axis


def knots_of(samples: Sequence[Sample], until: float = CURVE_UNTIL) -> tuple[float, ...]:
    """The token lines on which the curve may bend: those measured, up to ``until``, but for the last two, which tell c1
    and c2 apart."""
    lines = sorted({s.lines["tokens"] for s in samples if "tokens" in s.lines})
    return tuple(x for x in lines[:-2] if x <= until)


def fit(samples: Sequence[Sample], knots: Sequence[float] = ()) -> Coefficients:
    """Coefficients with a curve through ``knots`` (none for a straight line), and the 90% quantile of their errors.

    Where attention explains all that prompts take beyond the last knot, which leaves nothing for c1, that knot is
    given up. Raises HyperFlexisError when scipy is missing or the samples cannot tell a decode's time.
    """
    if not any(s.regime == "decode" for s in samples):
        raise HyperFlexisError("no iteration of decodes alone was measured; calibration needs some")
    coefficients = _fit(samples, knots)
    while knots and coefficients.c1 <= 0.0:
        knots = knots[:-1]
        coefficients = _fit(samples, knots)
    return replace(coefficients, q90=_q90(samples, coefficients.predict))


def _fit(samples: Sequence[Sample], knots: Sequence[float]) -> Coefficients:
    numpy, optimize = numerics()
    weights = _weights(samples)
    target = numpy.array([s.seconds for s in samples]) * weights
    bound_by_tokens = [s.prefill_tokens > 0 for s in samples]
    for _ in range(20):
        table = numpy.array([_row(s, t, knots) for s, t in zip(samples, bound_by_tokens, strict=True)])
        table *= weights[:, None]
        scale = numpy.maximum(numpy.linalg.norm(table, axis=0), 1e-30)
        found = [float(x) for x in optimize.nnls(table / scale, target)[0] / scale]
        coefficients = _coefficients(found, knots)
        new = [s.prefill_tokens > 0 and bool(not knots or coefficients.row(*s.shape)[0]) for s in samples]
        if new == bound_by_tokens:
            break
        bound_by_tokens = new
    return coefficients


def _q90(samples: Sequence[Sample], predict: Predict) -> float:
    """By how much nine in ten iterations are at most slower than predicted, where regimes weigh alike."""
    counts = Counter(s.regime for s in samples)
    over = sorted((s.seconds / predict(*s.shape) - 1.0, 1.0 / counts[s.regime]) for s in samples)
    left = 0.9 * len(counts)
    for error, weight in over:
        left -= weight
        if left <= 0.0:
            return max(error, 0.0)
    return max(over[-1][0], 0.0)


def _row(sample: Sample, bound_by_tokens: bool, knots: Sequence[float]) -> list[float]:
    """What c0, the curve's rises, c1, c2, c3 and c4 are multiplied with."""
    tokens = sample.prefill_tokens
    if not knots:
        return [1.0, tokens, sample.attention, sample.decodes, sample.kv_tokens]
    tokens = sample.prefill_tokens + sample.decodes if bound_by_tokens else 0.0
    rises = [min(max((tokens - a) / (b - a), 0.0), 1.0) for a, b in pairwise((0.0, *knots))]
    decodes = 0.0 if bound_by_tokens else sample.decodes
    return [1.0, *rises, max(tokens - knots[-1], 0.0), sample.attention, decodes, sample.kv_tokens]


def _coefficients(found: Sequence[float], knots: Sequence[float]) -> Coefficients:
    c0, *rises, c1, c2, c3, c4 = found
    if not knots or c1 <= 0.0:
        return Coefficients(c0, c1, c2, c3, c4)
    curve, effective = [(0.0, 0.0)], 0.0
    for x, rise in zip(knots, rises, strict=True):
        effective += rise / c1
        curve.append((float(x), effective))
    return Coefficients(c0, c1, c2, c3, c4, curve=tuple(curve))


def fit_table(samples: Sequence[Sample], formula: Coefficients, axes: GridAxes) -> LatencyTable:
    """Grid values under which interpolation misses ``samples`` least. Raises HyperFlexisError when numpy is missing."""
    start = formula_table(formula, axes)
    decodes, prompts, alone = [], [], []
    for s in samples:
        if not s.prefill_tokens:
            decodes.append((s, (s.decodes, s.kv_tokens / s.decodes)))
        elif s.decodes:
            prompts.append((s, (s.prefill_tokens + s.decodes, s.decodes, s.kv_tokens / s.decodes)))
        else:
            alone.append(s)
    # Without decodes all contexts are the same.
    prompts += [(s, (s.prefill_tokens, 0.0, x)) for s in alone for x in axes.contexts]
    return replace(
        start,
        decode=replace(
            start.decode,
            seconds=_corrected(
                decodes,
                lambda _p, _a, d, kv: _on_line(start, d, kv),
                (axes.decodes, axes.contexts),
                start.decode.seconds,
            ),
        ),
        prompt=replace(
            start.prompt,
            seconds=_corrected(
                prompts, start.prompt_s, (axes.tokens, start.prompt.decodes, axes.contexts), start.prompt.seconds
            ),
        ),
    )


def formula_table(formula: Coefficients, axes: GridAxes) -> LatencyTable:
    """The formula's own values on the grid."""
    with_none = (0.0, *axes.decodes)
    decode = tuple(tuple(formula.decode_s(d, d * x) for x in axes.contexts) for d in axes.decodes)
    prompt = tuple(
        # More decodes than tokens cannot be; such a node only closes the grid, as if of one prompt token.
        tuple(tuple(formula.predict(max(n - d, 1.0), 0.0, d, d * x) for x in axes.contexts) for d in with_none)
        for n in axes.tokens
    )
    return LatencyTable(
        formula,
        DecodeGrid(axes.decodes, axes.contexts, decode),
        PromptGrid(axes.tokens, with_none, axes.contexts, prompt),
    )


def _on_line(table: LatencyTable, decodes: float, kv_tokens: float) -> float:
    a, b, _ = table.decode_line(decodes, kv_tokens)
    return a + b * kv_tokens


def _corrected(
    placed: Sequence[tuple[Sample, tuple[float, ...]]], predict: Predict, axes: Sequence[Axis], seconds: Any
) -> Any:
    """Nested tuples as ``seconds``, corrected so that the interpolation follows the samples at their places."""
    numpy, _ = numerics()
    base = numpy.array(seconds)
    size = base.size
    samples = [s for s, _ in placed]
    weights = _weights(samples)
    # Unknowns are corrections relative to the formula, so that smooth means smooth in percent.
    rows = numpy.zeros((len(samples), size))
    for row, (_, point), weight in zip(rows, placed, weights, strict=True):
        for node, share in _shares(axes, point):
            row[node] += weight * share * base.flat[node]
    misses = weights * numpy.array([s.seconds - predict(*s.shape) for s in samples])
    smooth = []
    for k, axis in enumerate(axes):
        stride = int(numpy.prod(base.shape[k + 1 :]))
        for node in numpy.ndindex(*base.shape):
            i = node[k]
            if i + 1 < len(axis):
                at = int(numpy.ravel_multi_index(node, base.shape))
                row = numpy.zeros(size)
                stiffness = SMOOTH * (axis[-1] - axis[0]) / (axis[i + 1] - axis[i])
                row[at], row[at + stride] = -(stiffness**0.5), stiffness**0.5
                smooth.append(row)
    rows = numpy.vstack([rows, *smooth, RIDGE**0.5 * numpy.eye(size)])
    target = numpy.concatenate([misses, numpy.zeros(len(rows) - len(misses))])
    # The ridge keeps the normal equations well conditioned, and they are much faster than an SVD.
    corrections = numpy.linalg.solve(rows.T @ rows, rows.T @ target)
    return _with_growing_rows((base * (1.0 + corrections.reshape(base.shape))).tolist())


def _shares(axes: Sequence[Axis], point: Sequence[float]) -> list[tuple[int, float]]:
    """The grid nodes around ``point``, numbered row by row, and their shares in the interpolation."""
    places = [place(axis, value) for axis, value in zip(axes, point, strict=True)]
    found = []
    for corner in product((0, 1), repeat=len(axes)):
        node, share = 0, 1.0
        for axis, (i, w, _), high in zip(axes, places, corner, strict=True):
            node = node * len(axis) + min(i + high, len(axis) - 1)
            share *= w if high else 1.0 - w
        if share:
            found.append((node, share))
    return found


def _with_growing_rows(values: Any) -> Any:
    """As tuples, each row without a fall: more context never takes less time, and where it seems to, measurements
    are noisy. Neighbours that fall take their mean (pool adjacent violators)."""
    if isinstance(values[0], list):
        return tuple(_with_growing_rows(value) for value in values)
    pools: list[list[float]] = []
    for value in values:
        pools.append([value])
        while len(pools) > 1 and _mean(pools[-2]) > _mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    return tuple(_mean(pool) for pool in pools for _ in pool)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def mape(samples: Sequence[Sample], predict: Predict) -> Errors:
    """The mean absolute relative error in each regime; None where there are no samples."""
    return _means([(s.regime, abs(predict(*s.shape) / s.seconds - 1.0)) for s in samples])


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Errors on left-out lines: ``inner`` between measured ones and ``outer`` beyond them, over all axes; and
    ``by_axis``, inner ones only."""

    inner: Errors
    outer: Errors
    by_axis: Mapping[str, Errors]


def left_out(samples: Sequence[Sample], build: Callable[[Sequence[Sample]], Predict]) -> LeftOut:
    """Leave out each line once, ``build`` on the rest, and measure on the line."""
    inner: dict[str, list[tuple[str, float]]] = {}
    outer: list[tuple[str, float]] = []
    for axis in ("tokens", "decodes", "context"):
        lines = sorted({s.lines[axis] for s in samples if axis in s.lines})
        found = inner[axis] = []
        for line in _spread(lines):
            rest = [s for s in samples if s.lines.get(axis) != line]
            # A line that is all there is of something leaves nothing to predict it from.
            if {s.regime for s in rest} != {s.regime for s in samples}:
                continue
            predict = build(rest)
            errors = [
                (s.regime, abs(predict(*s.shape) / s.seconds - 1.0)) for s in samples if s.lines.get(axis) == line
            ]
            (outer if line in (lines[0], lines[-1]) else found).extend(errors)
    return LeftOut(
        inner=_means([error for errors in inner.values() for error in errors]),
        outer=_means(outer),
        by_axis={axis: _means(errors) for axis, errors in inner.items()},
    )


def _spread(lines: Sequence[float]) -> list[float]:
    """At most MAX_LINES of them, the first and last among them."""
    last = len(lines) - 1
    steps = min(last, MAX_LINES - 1)
    return [lines[round(i * last / steps)] for i in range(steps + 1)] if steps else list(lines)


def _means(errors: Sequence[tuple[str, float]]) -> Errors:
    found = {regime: [error for of, error in errors if of == regime] for regime in REGIMES}
    return {regime: _mean(values) if values else None for regime, values in found.items()}


def _weights(samples: Sequence[Sample]) -> Any:
    """One over seconds, so that errors are relative, and so that each regime weighs 1 in all."""
    numpy, _ = numerics()
    counts = Counter(s.regime for s in samples)
    return numpy.array([1.0 / (s.seconds * counts[s.regime] ** 0.5) for s in samples])


def numerics() -> tuple[Any, Any]:
    """numpy and scipy.optimize. Raises HyperFlexisError when they are not installed."""
    try:
        import numpy
        import scipy.optimize
    except ImportError as error:
        raise HyperFlexisError(
            f"calibrate needs {error.name or 'scipy'}, which is not installed: pip install 'hyperflexis[report]'"
        ) from error
    return numpy, scipy.optimize
