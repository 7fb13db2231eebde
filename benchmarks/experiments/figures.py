"""From the runs of several seeds to figures with intervals: pure functions.

Policies see the same requests in the window of a seed, so differences and ratios are taken seed by seed, and their
intervals are of those. Ratios are averaged on a logarithmic scale: the mean of a/b is then one over the mean of b/a.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, log
from statistics import fmean

from hyperflexis.telemetry.sweep import Carried, carried, t_interval

KEPT = 0.9
"""The share of requests on time that makes a load carried."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """The mean of what seeds gave, and its 95% interval (Student's t); None for a single seed."""

    mean: float
    ci95: tuple[float, float] | None
    by_seed: tuple[float, ...]


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of ``values``, one a seed and at least one."""
    return Estimate(fmean(values), t_interval(values) if len(values) > 1 else None, tuple(values))


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """ours - theirs, in pairs."""
    return estimate([a - b for a, b in zip(ours, theirs, strict=True)])


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Estimate | None:
    """ours / theirs, in pairs: their geometric mean. None where a value is 0 or infinite."""
    if not all(0.0 < value < inf for value in (*ours, *theirs)):
        return None
    values = [a / b for a, b in zip(ours, theirs, strict=True)]
    logs = estimate([log(value) for value in values])
    ci95 = None if logs.ci95 is None else (exp(logs.ci95[0]), exp(logs.ci95[1]))
    return Estimate(exp(logs.mean), ci95, tuple(values))


@dataclass(frozen=True, slots=True)
class Knee:
    """The largest loads that the seeds' runs carry, in a sweep from the load ``smallest`` on."""

    by_seed: tuple[Carried, ...]
    smallest: float


def knee(curves: Mapping[float, Sequence[float]], share: float = KEPT) -> Knee:
    """Where each seed's curve last crosses ``share``. ``curves`` has the seeds' values by load."""
    seeds = range(len(next(iter(curves.values()))))
    found = (carried({load: values[seed] for load, values in curves.items()}, share) for seed in seeds)
    return Knee(tuple(found), min(curves))


@dataclass(frozen=True, slots=True)
class Bounded:
    """An estimate, or a bound of it where sweeps ended first: ``sign`` is "", "≥" or "≤". ``value`` None: not even a
    bound is known."""

    value: Estimate | None
    sign: str = ""


def knee_load(found: Knee) -> Bounded:
    """The mean load at the knee."""
    low, high = _between(found)
    if low == high:
        return Bounded(estimate(low))
    return Bounded(estimate(high), "≤") if max(high) < inf else Bounded(estimate(low), "≥")


def knee_ratio(ours: Knee, theirs: Knee) -> Bounded:
    """How many times the load is carried, in pairs; the lower bound where it is not known exactly."""
    (our_low, our_high), (their_low, their_high) = _between(ours), _between(theirs)
    least, most = ratio(our_low, their_high), ratio(our_high, their_low)
    if least is not None:
        return Bounded(least, "" if least == most else "≥")
    return Bounded(most, "" if most is None else "≤")


def _between(found: Knee) -> tuple[list[float], list[float]]:
    """Ends of the intervals that the seeds' knees lie in."""
    low = [0.0 if c.load is None else c.load for c in found.by_seed]
    high = [found.smallest if c.load is None else inf if c.at_least else c.load for c in found.by_seed]
    return low, high
