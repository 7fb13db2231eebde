"""How many tokens an answer will have, as far as can be told at arrival: learnt from requests that have finished.

What tells most are the request's class, its tenant and its prompt's length, in that order of how often they are known
well. So there is a *ladder* of means, from general to specific: all prompts, prompts of about that length (a factor of
1.41), of nearly that length (1.09). Each rung is drawn towards the one before it by its counts (shrinkage):

    estimate = (count * mean + PULL * estimate of the rung before) / (count + PULL)

and a rung without any request leaves the estimate as it is. One ladder is the class's; the tenant's own, of the same
rungs, begins where the class's ends. It is used once it has told the lengths of this tenant's requests better: where
tenants differ it halves the error, where they do not, it would only have fewer requests to learn from.

Means forget: old requests count for less, so that a new kind of work is followed. Memory is bounded: of all rungs the
MAX_MEANS that learnt last are kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import log, log2

from .request import Request

PRIOR = 128.0
"""Expected output tokens of a class before any of its requests has finished."""
PULL = 4.0
"""Requests of its own after which a rung counts for as much as the one before it. 2 to 8 differ by few per cent."""
MEMORY = 100.0
"""A mean stands for about this many of its latest requests. 50 to 200 differ by few per cent."""
MAX_MEANS = 4096
"""Means kept; a class takes about a hundred, and as many for each of its tenants."""
RUNGS = (0, 2, 8)
"""Buckets of the prompt's length per doubling of it, for each rung."""

Key = tuple[str, str, str | None, int, int]
"""(model, class, tenant or None for all, buckets per doubling, bucket)."""


@dataclass(slots=True, eq=False)
class Mean:
    """A rung: ``count`` of requests that it stands for and their ``mean`` output tokens. ``gain``, of a tenant's first
    rung, is by how much its ladder has been nearer than the class's, as a difference of mean losses."""

    count: float = 0.0
    mean: float = 0.0
    gain: float = 0.0


@dataclass(slots=True, eq=False)
class LengthModel:
    """See the module. ``means`` are in the order of their latest lesson."""

    means: dict[Key, Mean] = field(default_factory=dict)

    def predict(self, request: Request) -> float:
        """Expected output tokens: at least 1, within the client's limit."""
        keys = _keys(request, request.tenant)
        expected = self._climb(_keys(request, None), None)
        first = self.means.get(keys[0])
        if first is not None and first.gain > 0.0:
            expected = self._climb(keys, expected)
        return max(1.0, min(expected, float(request.max_output_tokens)))

    def learn(self, request: Request, output_tokens: int) -> None:
        """Take in a finished request's length."""
        tokens = max(output_tokens, 1)
        of_class, of_tenant = _keys(request, None), _keys(request, request.tenant)
        by_class = self._climb(of_class, None)
        by_tenant = self._climb(of_tenant, by_class)
        for key in (*of_class, *of_tenant):
            rung = self.means.pop(key) if key in self.means else Mean()
            self.means[key] = rung
            rung.count = min(rung.count + 1.0, MEMORY)
            rung.mean += (tokens - rung.mean) / rung.count
        first = self.means[of_tenant[0]]
        nearer = _loss(tokens, by_class) - _loss(tokens, by_tenant)
        first.gain += (nearer - first.gain) / first.count
        while len(self.means) > MAX_MEANS:
            del self.means[next(iter(self.means))]

    def _climb(self, keys: list[Key], estimate: float | None) -> float:
        """The estimate at the top of a ladder that begins with ``estimate``, None where nothing is known before it."""
        for key in keys:
            rung = self.means.get(key)
            if rung is not None:
                count, mean = rung.count, rung.mean
                estimate = mean if estimate is None else (count * mean + PULL * estimate) / (count + PULL)
        return PRIOR if estimate is None else estimate


def _loss(tokens: int, expected: float) -> float:
    """The deviance of the gamma distribution, up to a constant: relative, and smallest at the mean. Absolute errors are
    smallest at the median, which is far below the mean of most classes."""
    return tokens / expected + log(expected)


def _keys(request: Request, tenant: str | None) -> list[Key]:
    """The rungs of a ladder, from general to specific."""
    doublings = log2(max(request.num_prompt_tokens, 1))
    model, slo_class = request.model, request.slo_class
    return [(model, slo_class, tenant, per, int(per * doublings)) for per in RUNGS]
