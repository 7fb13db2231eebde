"""Iteration latency of an engine, and its online fit.

    t = c0 + c1 * sum(n) + c2 * sum(n * (ctx + n/2)) + c3 * B + c4 * KV                      [seconds]

over the prefill chunks (n new tokens on top of ctx computed ones) and B decodes holding KV context tokens in all.
c0: weights read and launch overhead; c1: linear layers per prompt token; c2: attention of prompt tokens;
c3: cost of one more decode; c4: reading one token's KV. All are non-negative.

The fit is recursive least squares on relative errors (a 10 ms miss matters more in a 20 ms iteration than in a
400 ms one), started at the profile, with a bounded covariance; after each update negative coefficients are cut to
zero. A *new operating point* is required: in steady decode the same row arrives thousands of times, and plain
recursive least squares then winds up (its covariance collapses along one direction and explodes in the others).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

NUM_COEFFICIENTS = 5


@dataclass(frozen=True, slots=True)
class Coefficients:
    """The five coefficients, in seconds (per token, per token squared, per request, per KV token), and the
    relative error ``q90`` that nine in ten iterations stay under (0.1: at most 10% slower than predicted)."""

    c0: float
    c1: float
    c2: float
    c3: float
    c4: float
    q90: float = 0.0

    def predict(self, prefill_tokens: float, attention: float, decodes: float, kv_tokens: float) -> float:
        """Seconds of an iteration with ``attention`` = sum n*(ctx + n/2)."""
        return self.c0 + self.c1 * prefill_tokens + self.c2 * attention + self.c3 * decodes + self.c4 * kv_tokens

    def decode_s(self, decodes: float, kv_tokens: float) -> float:
        """Seconds of an iteration that only decodes."""
        return self.c0 + self.c3 * decodes + self.c4 * kv_tokens

    def prefill_s(self, num_tokens: float, context: float = 0.0) -> float:
        """Marginal seconds of prefilling ``num_tokens`` after ``context`` computed ones, without c0."""
        return num_tokens * (self.c1 + self.c2 * (context + 0.5 * num_tokens))

    def output_s(self, num_output_tokens: float, num_prompt_tokens: float) -> float:
        """Marginal seconds of decoding ``num_output_tokens`` after a prompt, without c0."""
        steps = max(num_output_tokens - 1.0, 0.0)
        return steps * (self.c3 + self.c4 * (num_prompt_tokens + 0.5 * num_output_tokens))

    def tokens_within(self, seconds: float, context: float) -> int:
        """The most prompt tokens n of one chunk with ``prefill_s(n, context) <= seconds``."""
        if seconds <= 0.0:
            return 0
        linear, square = self.c1 + self.c2 * context, 0.5 * self.c2
        if square > 0.0:
            root = (linear * linear + 4.0 * square * seconds) ** 0.5
            return int(2.0 * seconds / (linear + root))  # the stable form of the quadratic's positive root
        return int(seconds / linear) if linear > 0.0 else 1 << 30


def attention_of(chunks: Iterable[tuple[int, int]]) -> float:
    """Sum of n*(ctx + n/2) over ``(n, ctx)`` chunks."""
    return sum(n * (ctx + 0.5 * n) for n, ctx in chunks)


class OnlineFit:
    """Non-negative recursive least squares towards a prior, one observation an iteration.

    ``prior_strength`` is how many observations the prior is worth along each direction; ``forgetting`` weighs
    older observations down so that a device that slows (heat, neighbours) is followed.
    """

    def __init__(self, prior: Coefficients, prior_strength: float = 4.0, forgetting: float = 0.995) -> None:
        self._theta = [prior.c0, prior.c1, prior.c2, prior.c3, prior.c4]
        # Scale each unknown by its prior so that one covariance bound fits all; a zero prior gets a small scale.
        floor = max(prior.c0, 1e-6) * 1e-7
        self._scale = [max(c, floor) for c in self._theta]
        self._p = [[(1.0 / prior_strength if i == j else 0.0) for j in range(5)] for i in range(5)]
        self._p_max = 1.0 / prior_strength
        self._forgetting = forgetting
        self._last_row: tuple[float, float, float, float] | None = None
        self._repeats = 0
        self._q90 = prior.q90
        self._bias = 1.0
        self.observations = 0

    @property
    def coefficients(self) -> Coefficients:
        """The current estimate. A steady drift of the whole device is folded in as a common factor."""
        c = self._theta
        k = self._bias
        return Coefficients(c[0] * k, c[1] * k, c[2] * k, c[3] * k, c[4] * k, self._q90)

    def observe(self, prefill_tokens: int, attention: float, decodes: int, kv_tokens: int, seconds: float) -> None:
        """Take in one iteration's shape and its measured duration.

        Durations that are not positive and finite are ignored (a suspended process or a clock step).
        """
        if not 0.0 < seconds < inf:
            return
        row = (float(prefill_tokens), attention, float(decodes), float(kv_tokens))
        predicted = self.coefficients.predict(*row)
        ratio = min(max(seconds / max(predicted, 1e-9), 0.2), 5.0)
        self.observations += 1
        # A quantile tracked by asymmetric steps: up 0.9, down 0.1 of a step sized to the residual's scale.
        error = ratio - 1.0
        self._q90 += 0.02 * (0.9 if error > self._q90 else -0.1)
        self._q90 = min(max(self._q90, 0.0), 1.0)
        if self._is_repeat(row):
            # Steady state: the direction is known, only the level may drift.
            self._bias *= 1.0 + 0.02 * max(min(ratio - 1.0, 0.5), -0.5)
            self._bias = min(max(self._bias, 0.2), 5.0)
            return
        self._last_row = row
        self._update(row, min(seconds, 5.0 * predicted))

    def _is_repeat(self, row: tuple[float, float, float, float]) -> bool:
        last = self._last_row
        if last is None:
            return False
        near = all(abs(a - b) <= 0.02 * max(a, b) for a, b in zip(row, last, strict=True))
        self._repeats = self._repeats + 1 if near else 0
        return near and self._repeats % 64 != 0

    def _update(self, row: tuple[float, float, float, float], seconds: float) -> None:
        scale, p = self._scale, self._p
        seconds /= self._bias
        predicted = self._theta[0] + sum(c * x for c, x in zip(self._theta[1:], row, strict=True))
        weight = 1.0 / max(predicted, 1e-9)
        x = [scale[0] * weight, *(s * v * weight for s, v in zip(scale[1:], row, strict=True))]
        px = [sum(p[i][j] * x[j] for j in range(5)) for i in range(5)]
        denominator = self._forgetting + sum(x[i] * px[i] for i in range(5))
        gain = [v / denominator for v in px]
        error = seconds * weight - 1.0
        for i in range(5):
            self._theta[i] = max(self._theta[i] + gain[i] * error * scale[i], 0.0)
            for j in range(5):
                p[i][j] = (p[i][j] - gain[i] * px[j]) / self._forgetting
        top = max(p[i][i] for i in range(5))
        if top > self._p_max:
            shrink = self._p_max / top
            for i in range(5):
                for j in range(5):
                    p[i][j] *= shrink
