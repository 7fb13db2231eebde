"""How much will be asked of a model's instances when an instance that is started now is ready, and how far off that may
be.

    level     the larger of the mean demand of the last 5 s and of the last 30 s: bursts count at once, and are not
              forgotten at once
    noise     standard deviation of the 5 s mean, if requests came independently of each other
    surge     by how much the demand exceeds the level at some time until a start is over, in square roots of the level:
              what one second in a hundred of the last half hour exceeded. Independent arrivals have 1 to 2
    peak      the largest 5 s mean of the last half hour
    error     mean relative error of the level as a forecast over the time of a start

No slope: where starts take a minute it follows bursts that are over by then, and costs twice as much. No daily profile:
without matching days to learn from it had nothing to say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil, sqrt

from ..core.demand import FAST_S, SLOW_S, Sample

WINDOW_S = 1800
"""Samples, one a second, from which surges and peaks are told."""
SURGE = 0.99
LEAST_LEVEL = 0.25
"""In instances: below that, a single request is a surge."""
ERROR_S = 300.0
"""Errors fade within about this time."""
FAST, SLOW = int(FAST_S), int(SLOW_S)


@dataclass(frozen=True, slots=True)
class History:
    """What is remembered: ``samples`` of the last SLOW seconds; of the last WINDOW_S the 5 s ``means``, and of as many
    as a start takes the ``levels``; ``surges`` so far."""

    samples: tuple[Sample, ...] = ()
    means: tuple[float, ...] = ()
    levels: tuple[float, ...] = ()
    surges: tuple[float, ...] = ()
    error: float = 0.0


@dataclass(frozen=True, slots=True)
class Forecast:
    """See the module; all in instances but ``surge`` and ``error``. ``prefill`` and ``decode`` are the levels of either
    alone."""

    level: float
    prefill: float
    decode: float
    noise: float
    surge: float
    peak: float
    error: float
    horizon_s: float


def forecast(history: History, sample: Sample, horizon_s: float) -> tuple[Forecast, History]:
    """Take in the latest second and look ``horizon_s`` seconds ahead."""
    samples = (*history.samples[1 - SLOW :], sample)
    prefill, decode = _level(samples, lambda one: one.prefill), _level(samples, lambda one: one.decode)
    level = _level(samples, lambda one: one.prefill + one.decode)
    mean = _mean(samples[-FAST:], lambda one: one.prefill + one.decode)
    means = (*history.means[1 - WINDOW_S :], mean)
    horizon = max(ceil(horizon_s), 1)
    levels, surges, error = history.levels, history.surges, history.error
    if len(levels) >= horizon:
        before = levels[-horizon]
        surge = (max(means[-horizon:]) - before) / sqrt(max(before, LEAST_LEVEL))
        surges = (*surges[1 - WINDOW_S :], surge)
        error += (abs(mean - before) / max(mean, LEAST_LEVEL) - error) / ERROR_S
    levels = (*levels[1 - horizon :], level) if horizon > 1 else (level,)
    noise = sqrt(sum(one.prefill_square for one in samples[-FAST:]) / FAST**2 + sample.decode_square)
    top = sorted(surges)[int(SURGE * len(surges))] if surges else 0.0
    found = Forecast(level, prefill, decode, noise, top, max(means), error, horizon_s)
    return found, replace(history, samples=samples, means=means, levels=levels, surges=surges, error=error)


def _level(samples: Sequence[Sample], of: Callable[[Sample], float]) -> float:
    return max(_mean(samples[-FAST:], of), _mean(samples, of))


def _mean(samples: Sequence[Sample], of: Callable[[Sample], float]) -> float:
    return sum(of(one) for one in samples) / len(samples)
