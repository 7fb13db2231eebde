"""The perfect-foresight programme: the cheapest fleet for a demand that is known beforehand, with the same start times.

    demand   per second, in instances, as the scaler counts it (core/demand.py), but with the true output lengths
    need     ceil(demand + margin * sqrt(demand)), the demand averaged over 5 s around each second
    plan     instance k is needed where need >= k. Between two such times it is kept where that is cheaper than to stop
             it and pay for another start: where they are less than a start apart. Each is launched a start before

Instances are alike, so that each can be planned by itself, and the sum is the least that covers the need. It is no
bound on what any scaler could do: attainment depends on more than the need, so the margin is searched for the
attainment that is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import ceil, sqrt

from ..core.demand import FAST_S, Tally
from ..core.latency import Coefficients, share_left
from ..policy.budget import CAP_S
from .workload import Arrival


def known_demand(arrivals: Sequence[Arrival], latency: Coefficients, duration_s: float) -> list[float]:
    """Instances kept busy, by second. Colocated, without what a KV cache may have."""
    tally, found, upcoming = Tally(0.0), [], 0
    for second in range(1, ceil(duration_s) + 1):
        while upcoming < len(arrivals) and arrivals[upcoming].t < second:
            arrival = arrivals[upcoming]
            upcoming += 1
            prompt, output, slo = arrival.num_prompt_tokens, arrival.num_output_tokens, arrival.slo
            pace_s = max(min(slo.pace_s(output, slo.first_token_by_s(output)), CAP_S), 1e-3)
            share = share_left(latency.c0, pace_s)
            for_s = output * pace_s
            decode = latency.output_s(output, prompt) / share / for_s
            tally.add(latency.prefill_s(prompt) / share, decode, for_s, arrival.t)
        sample = tally.take(float(second))
        found.append(sample.prefill + sample.decode)
    return found


def needs(demand: Sequence[float], margin: float, least: int) -> list[int]:
    """Instances needed, by second."""
    half = int(FAST_S) // 2
    means = [
        sum(demand[max(t - half, 0) : t + half + 1]) / len(demand[max(t - half, 0) : t + half + 1])
        for t in range(len(demand))
    ]
    return [max(ceil(mean + margin * sqrt(mean) - 1e-9), least) for mean in means]


def programme(need: Sequence[int], start_s: float) -> tuple[tuple[float, int], ...]:
    """(second, instances launched or there) where that changes."""
    size = len(need)
    change = [0] * (size + 1)
    for level in range(1, max(need, default=0) + 1):
        spans: list[tuple[float, int]] = []
        for second in (t for t in range(size) if need[t] >= level):
            begin, end = second - start_s, second + 1
            if spans and begin <= spans[-1][1]:
                spans[-1] = (spans[-1][0], end)
            else:
                spans.append((begin, end))
        for begin, end in spans:
            change[max(int(begin), 0)] += 1
            change[end] -= 1
    counts, have = [], 0
    for step in change:
        have += step
        counts.append(have)
    return ((0.0, counts[0]), *((float(t + 1), b) for t, (a, b) in enumerate(pairwise(counts)) if a != b))
