"""Iteration latency of an engine, and its online fit.

    t = c0 + c1 * sum(n) + c2 * sum(n * (ctx + n/2)) + c3 * B + c4 * KV                      [seconds]

over the prefill chunks (n new tokens on top of ctx computed ones) and B decodes holding KV context tokens in all.
c0: weights read and launch overhead; c1: linear layers per prompt token; c2: attention of prompt tokens;
c3: cost of one more decode; c4: reading one token's KV. All are non-negative.

Accelerators are not linear at small sizes: while the weights are read, some hundred tokens are computed for nothing.
Where that is known, ``curve`` gives E, the *effective tokens* of the linear layers, and an iteration with prompts
costs what all of its tokens cost together, if that is more than its decodes cost alone:

    t = c0 + max(c1 * E(sum(n) + B), c3 * B) + c2 * sum(n * (ctx + n/2)) + c4 * KV           [seconds]

The fit is recursive least squares on relative errors (a 10 ms miss matters more in a 20 ms iteration than in a
400 ms one), started at the profile, with a bounded covariance; after each update negative coefficients are cut to
zero. A *new operating point* is required: in steady decode the same row arrives thousands of times, and plain
recursive least squares then winds up (its covariance collapses along one direction and explodes in the others).
After the first PATIENCE iterations, one that takes SURPRISE times as long as predicted is not learnt from, unless
PATIENCE of them come in a row: a device that is sick for a moment must not be remembered as a slow one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf

NUM_COEFFICIENTS = 5
REFRESH_EVERY = 16
"""The estimate that is given out changes once in this many iterations (at first in fewer, since it learns faster then),
so that what is derived from it can be kept."""

SURPRISE = 3.0
PATIENCE = 32

THRIFT = 0.8
"""Prompt tokens are cheap in an iteration where they cost at most this share of what they cost in a full one."""
THRIFTY_RATE = 0.6
"""A cheap chunk must still compute prompts at this share of the speed of a full one."""
MOST_TOKENS = 1 << 30
"""How many prompt tokens fit where they cost nothing."""

Row = tuple[float, float, float, float]
"""What c1 to c4 are multiplied with."""


LEAST_SHARE = 0.1
"""What c0 leaves of an iteration, at least: paces that nobody can keep must not ask for a fleet."""


def share_left(c0: float, pace_s: float) -> float:
    """Share of an instance's time that it has for tokens when an iteration lasts ``pace_s``: each costs c0 besides."""
    return max(1.0 - c0 / pace_s, LEAST_SHARE)


@dataclass(frozen=True, slots=True)
class Coefficients:
    """The five coefficients, in seconds (per token, per token squared, per request, per KV token), and the
    relative error ``q90`` that nine in ten iterations stay under (0.1: at most 10% slower than predicted).

    ``curve`` is empty, or knots (tokens, effective tokens) from (0, 0) on, growing in the first and not falling in
    the second; straight lines in between, slope 1 beyond the last.
    """

    c0: float
    c1: float
    c2: float
    c3: float
    c4: float
    q90: float = 0.0
    curve: tuple[tuple[float, float], ...] = ()

    def effective_tokens(self, tokens: float) -> float:
        """E(tokens); the tokens themselves where there is no curve."""
        curve = self.curve
        if not curve:
            return tokens
        at = bisect_right(curve, (tokens, inf))
        x, y = curve[at - 1]
        if at == len(curve):
            return y + tokens - x
        x1, y1 = curve[at]
        return y + (tokens - x) * (y1 - y) / (x1 - x)

    def row(self, prefill_tokens: float, attention: float, decodes: float, kv_tokens: float) -> Row:
        """The features of an iteration with ``attention`` = sum n*(ctx + n/2), so that its time is c0 plus their
        product with c1 to c4."""
        if not self.curve:
            return prefill_tokens, attention, decodes, kv_tokens
        if prefill_tokens:
            effective = self.effective_tokens(prefill_tokens + decodes)
            if self.c1 * effective > self.c3 * decodes:
                return effective, attention, 0.0, kv_tokens
        return 0.0, attention, decodes, kv_tokens

    def predict(self, prefill_tokens: float, attention: float, decodes: float, kv_tokens: float) -> float:
        """Seconds of an iteration with ``attention`` = sum n*(ctx + n/2)."""
        x1, x2, x3, x4 = self.row(prefill_tokens, attention, decodes, kv_tokens)
        return self.c0 + self.c1 * x1 + self.c2 * x2 + self.c3 * x3 + self.c4 * x4

    def decode_s(self, decodes: float, kv_tokens: float) -> float:
        """Seconds of an iteration that only decodes."""
        return self.c0 + self.c3 * decodes + self.c4 * kv_tokens

    def prefill_s(self, num_tokens: float, context: float = 0.0) -> float:
        """Marginal seconds of prefilling ``num_tokens`` after ``context`` computed ones in large chunks, without c0."""
        return num_tokens * (self.c1 + self.c2 * (context + 0.5 * num_tokens))

    def output_s(self, num_output_tokens: float, num_prompt_tokens: float) -> float:
        """Marginal seconds of decoding ``num_output_tokens`` after a prompt, without c0."""
        steps = max(num_output_tokens - 1.0, 0.0)
        return steps * (self.c3 + self.c4 * (num_prompt_tokens + 0.5 * num_output_tokens))

    def tokens_within(
        self,
        seconds: float,
        context: float,
        decodes: int = 0,
        kv_tokens: float = 0.0,
        used_tokens: int = 0,
        used_attention: float = 0.0,
    ) -> int:
        """The most prompt tokens of a chunk after ``context`` computed ones that an iteration has room for, when it
        may last ``seconds`` in all and already has ``decodes`` and ``used_tokens`` other prompt tokens. 0 for none."""
        left = seconds - self.c0 - self.c2 * used_attention - self.c4 * kv_tokens
        curve = self.curve
        if not curve:
            return self._root(left - self.c1 * used_tokens - self.c3 * decodes, context)
        if left < self.c3 * decodes:
            return 0
        first = used_tokens + decodes
        at = bisect_right(curve, (first, inf))
        while at < len(curve):
            x1, y1 = curve[at]
            n = x1 - first
            if self.c1 * y1 + self.c2 * n * (context + 0.5 * n) > left:
                break
            at += 1
        # In the segment that starts at (x, y): c1*(y + slope*(first + n - x)) + c2*n*(context + n/2) <= left.
        x, y = curve[at - 1]
        slope = 1.0
        if at < len(curve):
            slope = (curve[at][1] - y) / (curve[at][0] - x)
        n = self._root(left - self.c1 * (y + slope * (first - x)), context, slope)
        if at < len(curve):
            n = min(n, int(curve[at][0] - first))
        return min(n, self._root(left - self.c3 * decodes, context, 0.0)) if decodes else n

    def thrifty_tokens(self, most: int, decodes: int) -> int:
        """The chunk, of at most ``most`` tokens, whose tokens cost an iteration with ``decodes`` the least time each;
        ``most`` where none is cheap and still quick. While the weights are read, some hundred tokens cost little:
        larger chunks hold up the decodes for longer than they save. Contexts, which cost any chunk the same, are left
        out."""
        if most <= 0:
            return most
        alone_s = self.c3 * decodes

        def extra_s(tokens: int) -> float:
            return max(self.c1 * self.effective_tokens(tokens + decodes) - alone_s, 0.0)

        base_s, whole_s = self.c0 + alone_s, extra_s(most)
        best, price = most, THRIFT * whole_s / most
        rate = THRIFTY_RATE * most / (base_s + whole_s)
        for total, _ in self.curve:
            tokens = int(total) - decodes
            if 0 < tokens < most:
                more_s = extra_s(tokens)
                if more_s < price * tokens and tokens >= rate * (base_s + more_s):
                    best, price = tokens, more_s / tokens
        return best

    def _root(self, seconds: float, context: float, slope: float = 1.0) -> int:
        """The most n with ``slope*c1*n + c2*n*(context + n/2) <= seconds``."""
        if seconds <= 0.0:
            return 0
        linear, square = slope * self.c1 + self.c2 * context, 0.5 * self.c2
        # The stable form of the quadratic's positive root.
        per_token = 0.5 * (linear + (linear * linear + 4.0 * square * seconds) ** 0.5)
        return int(min(seconds / per_token, MOST_TOKENS)) if per_token > 0.0 else MOST_TOKENS


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
        self._curve = prior.curve
        self._last_row: Row | None = None
        self._repeats = 0
        self._q90 = prior.q90
        self._bias = 1.0
        self._surprises = 0
        self._coefficients = prior
        self._refresh_at = 1
        self.observations = 0

    @property
    def coefficients(self) -> Coefficients:
        """The current estimate. A steady drift of the whole device is folded in as a common factor."""
        return self._coefficients

    def observe(self, prefill_tokens: int, attention: float, decodes: int, kv_tokens: int, seconds: float) -> None:
        """Take in one iteration's shape and its measured duration.

        Durations that are not positive and finite are ignored (a suspended process or a clock step).
        """
        self._observe(self.coefficients.row(prefill_tokens, attention, decodes, kv_tokens), (seconds,))

    def observe_decodes(self, decodes: int, kv_tokens: int, seconds: Sequence[float]) -> None:
        """As many calls of ``observe``, for iterations that only decode, each with ``decodes`` more KV tokens than
        the one before."""
        self._observe((0, 0.0, decodes, kv_tokens), seconds)

    def _observe(self, row: Row, measured: Sequence[float]) -> None:
        x1, x2, x3, kv = row
        theta, last = self._theta, self._last_row
        bias, q90, repeats = self._bias, self._q90, self._repeats
        base = theta[0] + theta[1] * x1 + theta[2] * x2 + theta[3] * x3
        near = last is not None and _near(x1, last[0]) and _near(x2, last[1]) and _near(x3, last[2])
        for seconds in measured:
            if 0.0 < seconds < inf:
                self.observations += 1
                predicted = bias * (base + theta[4] * kv)
                ratio = seconds / (predicted if predicted > 1e-9 else 1e-9)
                if ratio > SURPRISE and self.observations > PATIENCE:
                    self._surprises += 1
                    if self._surprises <= PATIENCE:
                        kv += x3
                        continue
                elif self._surprises:
                    self._surprises = 0
                error = (0.2 if ratio < 0.2 else 5.0 if ratio > 5.0 else ratio) - 1.0
                # A quantile tracked by asymmetric steps: up 0.9, down 0.1 of a step sized to the residual's scale.
                q90 += 0.018 if error > q90 else -0.002
                q90 = 0.0 if q90 < 0.0 else 1.0 if q90 > 1.0 else q90
                same = near and last is not None and _near(kv, last[3])
                repeats = repeats + 1 if same else 0
                if same and repeats % 64:
                    # Steady state: the direction is known, only the level may drift.
                    bias *= 1.0 + 0.02 * (-0.5 if error < -0.5 else 0.5 if error > 0.5 else error)
                    bias = 0.2 if bias < 0.2 else 5.0 if bias > 5.0 else bias
                else:
                    last = self._last_row = (x1, x2, x3, kv)
                    self._update(last, min(seconds, 5.0 * predicted) / bias)
                    base = theta[0] + theta[1] * x1 + theta[2] * x2 + theta[3] * x3
                    near = True
                if self.observations == self._refresh_at:
                    self._refresh_at += min(REFRESH_EVERY, 1 + self.observations // 8)
                    c0, c1, c2, c3, c4 = (c * bias for c in theta)
                    self._coefficients = Coefficients(c0, c1, c2, c3, c4, q90, self._curve)
            kv += x3
        self._bias, self._q90, self._repeats = bias, q90, repeats

    def _update(self, row: Row, seconds: float) -> None:
        # Written out: it runs in every iteration, and loops over five numbers cost more than the numbers.
        theta, scale, p, f = self._theta, self._scale, self._p, self._forgetting
        x1, x2, x3, x4 = row
        predicted = theta[0] + (theta[1] * x1 + theta[2] * x2 + theta[3] * x3 + theta[4] * x4)
        weight = 1.0 / (predicted if predicted > 1e-9 else 1e-9)
        s0, s1, s2, s3, s4 = scale
        y0, y1, y2, y3, y4 = s0 * weight, s1 * x1 * weight, s2 * x2 * weight, s3 * x3 * weight, s4 * x4 * weight
        px = [p0 * y0 + p1 * y1 + p2 * y2 + p3 * y3 + p4 * y4 for p0, p1, p2, p3, p4 in p]
        px0, px1, px2, px3, px4 = px
        denominator = f + (y0 * px0 + y1 * px1 + y2 * px2 + y3 * px3 + y4 * px4)
        error = seconds * weight - 1.0
        for i, (p0, p1, p2, p3, p4) in enumerate(p):
            g = px[i] / denominator
            theta[i] = max(theta[i] + g * error * scale[i], 0.0)
            p[i] = [(p0 - g * px0) / f, (p1 - g * px1) / f, (p2 - g * px2) / f, (p3 - g * px3) / f, (p4 - g * px4) / f]
        top = max(p[0][0], p[1][1], p[2][2], p[3][3], p[4][4])
        if top > self._p_max:
            shrink = self._p_max / top
            for i in range(5):
                p[i] = [v * shrink for v in p[i]]


def _near(a: float, b: float) -> bool:
    """Within 2%: the same operating point."""
    return abs(a - b) <= 0.02 * max(a, b)
