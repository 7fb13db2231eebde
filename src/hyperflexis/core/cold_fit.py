"""The iteration latency of a device that nobody has measured, learnt from what it does.

The fit of latency.py stays close to a profile. This one starts at a guess that may be wrong tenfold, from observations
that are rough: those of a vLLM server begin while it may still be busy with others, and are seen through a network.

    estimate     recursive least squares on relative errors, in units of the guess, none negative
    forgetting   only along the direction of an observation: what was learnt of prompts is not lost over a thousand
                 decodes (Hägglund, Recursive estimation of slowly time-varying parameters, IFAC 1985)
    too fast     nothing is faster than it can be by accident: once observations are so by much or for long, what was
                 learnt before, of a busy machine, is a guess again (Page's cumulative sum, Biometrika 1954)
    too slow     by accident is common: once some is known, an observation counts as at most twice as slow as expected
"""

from __future__ import annotations

from math import inf

from .latency import REFRESH_EVERY, Coefficients

FAST_DRIFT, FAST_LIMIT = 0.15, 2.0
"""What an observation is faster than predicted, as a share, counts beyond the first; as much of it in all as the second
is too fast."""
KNOWN = 32
"""Observations after which some is known."""
NOISE = 0.1
"""Of the relative error of an observation, squared: single ones on a busy host are off by a third."""
FORGETTING = 0.99
FARTHEST = 3.0
"""An observation is weighed by what was predicted, within this factor of what was seen."""
SAME = 0.05
"""While what is observed is predicted alike, but for this share, and the quantile moved by no more, old coefficients
are as good as new ones, with which a scheduler ranks all that wait anew."""
SAME_PROMPT = 0.25
"""And while a prompt's token takes as long, but for this share: among many decodes it hardly shows."""


class ColdFit:
    """A fit that begins at ``guess``, whose coefficients may be wrong by a factor of about ``spread``. ``coefficients``
    change at most once in ``refresh_every`` observations, and not for next to nothing; their curve is the guess's."""

    def __init__(self, guess: Coefficients, spread: float, refresh_every: int = REFRESH_EVERY) -> None:
        self._theta = [guess.c0, guess.c1, guess.c2, guess.c3, guess.c4]
        self._scale = [max(c, 1e-7 * max(guess.c0, 1e-6)) for c in self._theta]
        self._variance = spread * spread
        self._q90 = guess.q90
        self._guess = guess
        self._refresh_every = refresh_every
        self._refresh_at = 1
        self._seen = 0
        self._moved = False
        self.coefficients = guess
        self._begin()

    def _begin(self) -> None:
        """Nothing is known but by guess."""
        self._p = [[self._variance if i == j else 0.0 for j in range(5)] for i in range(5)]
        self._known_at = self._seen + KNOWN
        self._fast = 0.0

    def observe(
        self, prefill_tokens: float, attention: float, decodes: float, kv_tokens: float, seconds: float
    ) -> None:
        """Take in an iteration's shape (see latency.py), or where there is no curve the mean of some, and how long it
        took.

        Durations that are not positive and finite are ignored.
        """
        if not 0.0 < seconds < inf:
            return
        self._seen += 1
        if self._guess.curve:
            # By the guess: were c1 once cut to zero here, prompts would be in no row any more.
            row = self._guess.row(prefill_tokens, attention, decodes, kv_tokens)
            prefill_tokens, attention, decodes, kv_tokens = row
        c0, c1, c2, c3, c4 = self._theta
        predicted = c0 + c1 * prefill_tokens + c2 * attention + c3 * decodes + c4 * kv_tokens
        if predicted > 0.0:
            self._fast = max(self._fast + 1.0 - seconds / predicted - FAST_DRIFT, 0.0)
        if self._fast >= FAST_LIMIT:
            self._begin()
        weight_s = min(max(predicted, seconds / FARTHEST), seconds * FARTHEST)
        error = (seconds - predicted) / weight_s
        if self._seen > self._known_at:
            error = min(error, 1.0)
        s0, s1, s2, s3, s4 = [scale / weight_s for scale in self._scale]
        self._update((s0, s1 * prefill_tokens, s2 * attention, s3 * decodes, s4 * kv_tokens), error)
        self._q90 = min(max(self._q90 + (0.018 if error > self._q90 else -0.002), 0.0), 1.0)
        c0, c1, c2, c3, c4 = self._theta
        known = self.coefficients
        was = known.c0 + known.c1 * prefill_tokens + known.c2 * attention + known.c3 * decodes + known.c4 * kv_tokens
        now = c0 + c1 * prefill_tokens + c2 * attention + c3 * decodes + c4 * kv_tokens
        self._moved = (
            self._moved
            or abs(now - was) > SAME * was
            or abs(self._q90 - known.q90) > SAME
            or (prefill_tokens > 0.0 and abs(c1 - known.c1) > SAME_PROMPT * known.c1)
        )
        if self._seen >= self._refresh_at:
            self._refresh_at += min(self._refresh_every, 1 + self._seen // 8)
            if self._moved:
                self._moved = False
                self.coefficients = Coefficients(c0, c1, c2, c3, c4, self._q90, self._guess.curve)

    def _update(self, y: tuple[float, float, float, float, float], error: float) -> None:
        """``y`` is the observation in units of the guess, over its weight."""
        # Written out where it can be: it runs in each of a server's steps.
        p, scale, theta = self._p, self._scale, self._theta
        y0, y1, y2, y3, y4 = y
        py = [a * y0 + b * y1 + c * y2 + d * y3 + e * y4 for a, b, c, d, e in p]
        q0, q1, q2, q3, q4 = py
        known = q0 * y0 + q1 * y1 + q2 * y2 + q3 * y3 + q4 * y4
        if known <= 0.0:
            return
        # What is known along y fades, down to what a guess knows of it.
        faded = min(known / FORGETTING, max(known, self._variance * (y0 * y0 + y1 * y1 + y2 * y2 + y3 * y3 + y4 * y4)))
        gain = faded / (known * (faded + NOISE))
        change = (faded - known) / (known * known) - (faded / known) ** 2 / (faded + NOISE)
        for line, moved in zip(p, py, strict=True):
            a, b, c, d, e = line
            by = change * moved
            line[:] = a + by * q0, b + by * q1, c + by * q2, d + by * q3, e + by * q4
        for i, moved in enumerate(py):
            theta[i] += gain * moved * error * scale[i]
            shrink = 1.0
            if theta[i] < 0.0:
                theta[i] = shrink = 0.0  # it is cut off: the others do not make up for what it did not do
            if p[i][i] > self._variance:  # no coefficient is less known than by guess
                shrink = min(shrink, (self._variance / p[i][i]) ** 0.5)
            if shrink < 1.0:
                own = min(p[i][i], self._variance)
                p[i] = [v * shrink for v in p[i]]
                for other in p:
                    other[i] *= shrink
                p[i][i] = own
