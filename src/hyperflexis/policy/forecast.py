"""How much will be asked of a model's instances when one that is started now is ready, and how far off that may be.

    level     the larger of the mean demand of the last seconds and of the last 30 s: bursts count at once, and are not
              forgotten at once. Of as many seconds as a start takes, 5 to 30: a burst that is over by then is no reason
    surge     by how much the largest 5 s mean until a start is over exceeds the level: the root of the mean square of
              the last half hour. Where starts are quick or arrivals even, it is small; where bursts come faster than
              instances, it is what has to be there before
    noise     standard deviation of the level, if requests came independently of each other; where in the last half
              hour the demand varied as if they did, at least the usual one: a lull says nothing then
    error     mean relative error of the level as a forecast over the time of a start

Starts of at most QUICK_S can answer to a burst while it lasts. Then the last second alone counts too, and the level is
carried on by its slope, both less what independent arrivals vary by. Slower starts would follow bursts that are over by
then: with a slope at 60 s the fleet costs twice as much. No daily profile: without matching days to learn from it had
nothing to say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, hypot, log2, sqrt

from ..core.demand import FAST_S, SLOW_S, Sample

WINDOW_S = 1800.0
"""Surges are forgotten within about this time."""
LEAST_LEVEL = 0.25
"""In instances: errors are relative to at least this."""
ERROR_S = 300.0
"""Errors fade within about this time."""
QUICK_S = 10.0
INDEPENDENT = 2.0
"""So many times the variance of independent arrivals: half an hour of Poisson arrivals comes to 1.4 at most, recorded
code completion to 9 at least."""
LEARN_S = 300.0
"""Before, the variance is not known."""
BINS = 16
"""Of the distribution of means, for each doubling: 4% apart."""
FAST, SLOW = int(FAST_S), int(SLOW_S)


@dataclass(frozen=True, slots=True)
class History:
    """What is remembered, one entry a second: ``samples`` of the last SLOW seconds; 5 s ``means`` and ``levels`` of as
    many as a start takes; the mean ``square`` of ``count`` surges; of the means the ``usual`` one, their ``variance``,
    what it would be were requests ``independent``, and the ``shares`` of time at each."""

    samples: tuple[Sample, ...] = ()
    means: tuple[float, ...] = ()
    levels: tuple[float, ...] = ()
    square: float = 0.0
    count: int = 0
    error: float = 0.0
    seen: int = 0
    usual: float = 0.0
    shares: tuple[float, ...] = ()
    variance: float = 0.0
    independent: float = 0.0


@dataclass(frozen=True, slots=True)
class Forecast:
    """See the module; all in instances but ``error``. ``prefill`` and ``decode`` are the levels of either alone."""

    level: float
    prefill: float
    decode: float
    noise: float
    surge: float
    usual: float
    shares: tuple[float, ...]
    error: float
    horizon_s: float


def forecast(history: History, sample: Sample, horizon_s: float) -> tuple[Forecast, History]:
    """Take in the latest second and look ``horizon_s`` seconds, the time of a start, ahead."""
    samples = (*history.samples[1 - SLOW :], sample)
    quick = horizon_s <= QUICK_S
    horizon = max(ceil(horizon_s), 1)
    recent = samples[-min(max(horizon, FAST), SLOW) :]

    def level(of: Callable[[Sample], float], square: Callable[[Sample], float]) -> float:
        found = max(_mean(recent, of), _mean(samples, of))
        return max(found, of(sample) - sqrt(square(sample))) if quick else found

    both = level(_total, _total_square)
    mean = _mean(samples[-FAST:], _total)
    means = (*history.means[-horizon:], mean)[-horizon:]
    square, count, error = history.square, history.count, history.error
    if len(history.levels) >= horizon:
        before = history.levels[-horizon]
        count += 1
        square += (max(max(means) - before, 0.0) ** 2 - square) / min(count, WINDOW_S)
        error += (abs(mean - before) / max(mean, LEAST_LEVEL) - error) / min(count, ERROR_S)
    levels = (*history.levels[-horizon:], both)[-horizon:]
    noise = _noise(samples[-FAST:])
    seen = history.seen + 1
    weight = 1.0 / min(seen, WINDOW_S)
    usual = history.usual + (mean - history.usual) * weight
    variance = history.variance + ((mean - usual) ** 2 - history.variance) * weight
    independent = history.independent + (noise * noise - history.independent) * weight
    own = noise
    if seen > LEARN_S and variance < INDEPENDENT * independent:
        noise = max(own, sqrt(independent))
    if quick:
        earlier = samples[-2 * FAST : -FAST] or samples[-FAST:]
        rise = mean - _mean(earlier, _total) - hypot(own, _noise(earlier))
        both += max(rise, 0.0) / FAST * horizon_s
        noise *= max(horizon_s / FAST, 1.0)  # so much the slope adds to it
    prefill = level(lambda one: one.prefill, lambda one: one.prefill_square)
    decode = level(lambda one: one.decode, lambda one: 0.0)
    shares = _with(history.shares, _bin(mean), weight)
    found = Forecast(both, prefill, decode, noise, sqrt(square), usual, shares, error, horizon_s)
    return found, History(samples, means, levels, square, count, error, seen, usual, shares, variance, independent)


def enough(shares: Sequence[float], lost: float) -> float:
    """The smallest fleet, in instances, beyond which only a share ``lost`` of all demand was."""
    demand = sum(share * _edge(index) for index, share in enumerate(shares))
    above = tail = 0.0
    for index in range(len(shares) - 1, 0, -1):
        above += shares[index]
        tail += shares[index] * _edge(index)
        if tail - above * _edge(index - 1) > lost * demand:
            return _edge(index)
    return 0.0


def _bin(mean: float) -> int:
    return ceil(BINS * log2(1.0 + max(mean, 0.0)) - 1e-9)


def _edge(index: int) -> float:
    """The most of a bin."""
    return float(2.0 ** (index / BINS) - 1.0)


def _with(shares: Sequence[float], index: int, weight: float) -> tuple[float, ...]:
    """A distribution that forgets a part for each new value."""
    found = [share * (1.0 - weight) for share in shares]
    found += [0.0] * (index + 1 - len(found))
    found[index] += weight
    return tuple(found)


def _mean(samples: Sequence[Sample], of: Callable[[Sample], float]) -> float:
    return sum(of(one) for one in samples) / len(samples)


def _noise(samples: Sequence[Sample]) -> float:
    """Standard deviation of the mean, if prompts come independently and decodes as they are."""
    return sqrt(_mean(samples, lambda one: one.prefill_square) / len(samples) + samples[-1].decode_square)


def _total(one: Sample) -> float:
    return one.prefill + one.decode


def _total_square(one: Sample) -> float:
    return one.prefill_square + one.decode_square
