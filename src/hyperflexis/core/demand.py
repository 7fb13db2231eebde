"""What a model's requests ask of its instances: how many instances their prompts and their decodes would keep busy, if
each instance did nothing else.

``Demand`` has it as rates that fade, for roles. ``Tally`` has it second by second, with what became of the requests,
for scaling: there the decodes of a request count from its arrival on for as long as its pace allows, whether it is
served or waits, since what a fleet that is too small makes wait is no less demand.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil, exp, inf

from .latency import share_left

FAST_S, SLOW_S = 5.0, 30.0
"""Seconds after which a request counts a third in the fast and in the slow rate."""


@dataclass(slots=True, eq=False)
class Rate:
    """Amounts per second, fading over ``window_s``."""

    window_s: float
    value: float = 0.0
    at: float = 0.0

    def add(self, amount: float, now: float) -> None:
        """So much at once."""
        self.value = self.now(now) + amount / self.window_s
        self.at = now

    def now(self, now: float) -> float:
        """The rate at ``now``."""
        return self.value * exp(-max(now - self.at, 0.0) / self.window_s)


@dataclass(slots=True, eq=False)
class Demand:
    """One model's, counted from ``since`` on. ``paces`` says when a pace was last asked for."""

    since: float
    prefill_fast: Rate = field(default_factory=lambda: Rate(FAST_S))
    prefill_slow: Rate = field(default_factory=lambda: Rate(SLOW_S))
    decode_slow: Rate = field(default_factory=lambda: Rate(SLOW_S))
    paces: dict[float, float] = field(default_factory=dict)

    def add(self, prefill_s: float, decode_s: float, c0: float, pace_s: float, now: float) -> None:
        """A request whose prompt takes ``prefill_s`` seconds of an instance that computes nothing else, and whose
        decodes add ``decode_s`` to iterations that cost ``c0`` besides, a token every ``pace_s``."""
        self.prefill_fast.add(prefill_s, now)
        self.prefill_slow.add(prefill_s, now)
        if pace_s > c0:  # one that nobody can keep says nothing of the others
            self.decode_slow.add(decode_s / share_left(c0, pace_s), now)
            self.paces[pace_s] = now

    def prefill(self, now: float) -> float:
        """Instances that the prompts keep busy: the larger of two rates, so that bursts count at once and are not
        forgotten at once."""
        return max(self._full(self.prefill_fast, now), self._full(self.prefill_slow, now))

    def decode(self, now: float) -> float:
        """Instances that the decodes keep busy, each at its own pace: those of different paces part
        (policy/handoff.py). The slow rate, since decodes come over as long as the answers take."""
        return self._full(self.decode_slow, now)

    def tightest_s(self, now: float) -> float:
        """The tightest pace of the last SLOW_S; inf when there is none."""
        if any(now - at > SLOW_S for at in self.paces.values()):
            self.paces = {pace_s: at for pace_s, at in self.paces.items() if now - at <= SLOW_S}
        return min(self.paces, default=inf)

    def _full(self, rate: Rate, now: float) -> float:
        """A window that is younger than its length has seen a part of what it will."""
        seen = 1.0 - exp(-max(now - self.since, 1.0) / rate.window_s)
        return rate.now(now) / seen


@dataclass(frozen=True, slots=True)
class Sample:
    """What was asked for and what came of it in about a second until ``t``.

    ``prefill`` and ``decode`` are instances kept busy. ``prefill_square`` and ``decode_square`` are the variances that
    they would have if requests came independently of each other (Poisson). ``arrivals`` and ``outcomes`` count
    requests, ``misses`` those that will not keep their promise: less than nothing where some did against expectation.
    """

    t: float
    prefill: float = 0.0
    decode: float = 0.0
    prefill_square: float = 0.0
    decode_square: float = 0.0
    arrivals: int = 0
    outcomes: int = 0
    misses: int = 0


@dataclass(slots=True, eq=False)
class Tally:
    """One model's requests since ``since``, and the decodes that go on, by the second in which they will be over:
    (instances, their squares)."""

    since: float
    prefill: float = 0.0
    prefill_square: float = 0.0
    arrivals: int = 0
    outcomes: int = 0
    misses: int = 0
    decode: float = 0.0
    decode_square: float = 0.0
    ends: dict[int, tuple[float, float]] = field(default_factory=dict)

    def add(self, prefill_s: float, decode: float, for_s: float, now: float) -> None:
        """A request arrived whose prompt keeps an instance busy for ``prefill_s`` seconds, and whose decodes keep
        ``decode`` of one busy for ``for_s`` seconds from now on."""
        self.arrivals += 1
        self.prefill += prefill_s
        self.prefill_square += prefill_s * prefill_s
        self.decode += decode
        self.decode_square += decode * decode
        second = ceil(now + for_s)
        before, squares = self.ends.get(second, (0.0, 0.0))
        self.ends[second] = before + decode, squares + decode * decode

    def take(self, now: float) -> Sample:
        """What came since the last look, at least a moment ago; the next one begins."""
        for second in [second for second in self.ends if second <= now]:
            decode, square = self.ends.pop(second)
            self.decode -= decode
            self.decode_square -= square
        if not self.ends:
            self.decode = self.decode_square = 0.0  # what rounding left
        length_s = max(now - self.since, 1e-3)
        sample = Sample(
            now,
            self.prefill / length_s,
            self.decode,
            self.prefill_square / (length_s * length_s),
            self.decode_square,
            self.arrivals,
            self.outcomes,
            self.misses,
        )
        self.since = now
        self.prefill = self.prefill_square = 0.0
        self.arrivals = self.outcomes = self.misses = 0
        return sample
