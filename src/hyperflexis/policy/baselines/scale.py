"""How fleets are scaled today, each with its numbers so that it can be tuned; times in seconds.

fixed@N                      always N
reactive@SHARE,UP,QUIET      one more when more than SHARE of a second's outcomes were misses and the last change is UP
                             ago; one less after QUIET without such
concurrency@TARGET,UP,DOWN   requests in flight / TARGET, as Ray Serve does (target_ongoing_requests): more after that
                             was wanted for UP, fewer after DOWN
saturation@KV,QUEUE,DOWN     the larger of KV in use / (KV of a cache) and prompts that wait / QUEUE, by the rule of
                             Kubernetes' horizontal autoscaler: nothing within a tenth of the target, the largest
                             wish of the last DOWN
rate@RPS,DOWN                arrivals per second of the last minute / RPS
follow@T,N,T,N,...           from each time on so many
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from math import ceil, inf

from ..forecast import Forecast, forecast
from ..scale import RATE_S, ModelMemory, ModelScale, ScalePolicy, Seen, Wish

TOLERANCE = 0.1
"""Of Kubernetes' horizontal pod autoscaler: ratios this near to 1 change nothing."""


def fixed(instances: float) -> ScalePolicy:
    """Always so many."""
    return _policy(lambda seen, memory: (ceil(instances), memory, f"always {instances:.0f}"), 0.0)


def reactive(share: float = 0.01, up_s: float = 10.0, quiet_s: float = 300.0) -> ScalePolicy:
    """Scales after promises have broken."""

    def wish(seen: Seen, memory: ModelMemory) -> tuple[int, ModelMemory, str]:
        sample = seen.sample
        broke = sample.misses > share * max(sample.outcomes, 1)
        # Votes count the seconds since the last change, below nothing while promises hold.
        votes = max(memory.votes, 0) + 1 if broke else min(memory.votes, 0) - 1
        count = seen.instances
        if broke and votes >= up_s:
            count, votes = count + 1, 0
        elif -votes >= quiet_s:
            count, votes = count - 1, 0
        return max(count, 0), replace(memory, votes=votes), f"{sample.misses} of {sample.outcomes} missed"

    return _policy(wish, 0.0)


def concurrency(target: float = 8.0, up_s: float = 30.0, down_s: float = 600.0) -> ScalePolicy:
    """A target of requests in flight per instance; the delays are Ray Serve's defaults."""

    def wish(seen: Seen, memory: ModelMemory) -> tuple[int, ModelMemory, str]:
        count = ceil(seen.ongoing / max(target, 1e-3))
        votes = memory.votes
        votes = max(votes, 0) + 1 if count > seen.instances else min(votes, 0) - 1 if count < seen.instances else 0
        if (count > seen.instances and votes < up_s) or (count < seen.instances and -votes < down_s):
            count = seen.instances
        return count, replace(memory, votes=votes), f"{seen.ongoing} requests, {target:g} an instance"

    return _policy(wish, 0.0)


def saturation(kv: float = 0.8, queue: float = 4.0, down_s: float = 300.0) -> ScalePolicy:
    """What is full says that more are needed."""

    def wish(seen: Seen, memory: ModelMemory) -> tuple[int, ModelMemory, str]:
        ready = max(seen.ready, 1)
        ratio = max(seen.kv / ready / max(kv, 1e-3), seen.queued / max(queue, 1e-3))
        count = seen.instances if abs(ratio - 1.0) <= TOLERANCE else ceil(ratio * ready)
        if not seen.ready and seen.held:
            count = max(count, 1)
        return count, memory, f"{ratio:.2f} of the target"

    return _policy(wish, down_s)


def rate(rps: float = 2.0, down_s: float = 300.0) -> ScalePolicy:
    """So many requests a second for each instance."""

    def wish(seen: Seen, memory: ModelMemory) -> tuple[int, ModelMemory, str]:
        per_s = memory.rate + (seen.sample.arrivals - memory.rate) / RATE_S
        return ceil(per_s / max(rps, 1e-3)), replace(memory, rate=per_s), f"{per_s:.2f} requests a second"

    return _policy(wish, down_s)


def follow(*numbers: float) -> ScalePolicy:
    """What a programme says (sim/foresight.py): from each time on so many."""
    steps = list(zip(numbers[::2], map(int, numbers[1::2]), strict=True))

    def wish(seen: Seen, memory: ModelMemory) -> tuple[int, ModelMemory, str]:
        at = bisect_right(steps, (seen.now, inf))
        count = steps[at - 1][1] if at else seen.instances
        return count, memory, "as planned"

    return _policy(wish, 0.0)


def fixed_equal(points: list[tuple[int, float]], attainment: float) -> float | None:
    """The smallest fixed fleet that keeps ``attainment``, interpolated between (instances, attainment) of those that
    were tried; None outside of them: where the largest does not, or the smallest keeps more."""
    before: tuple[int, float] | None = None
    for count, kept in sorted(points):
        if kept >= attainment:
            if before is None:
                return float(count) if kept == attainment else None
            return before[0] + (attainment - before[1]) / (kept - before[1]) * (count - before[0])
        before = count, kept
    return None


def _policy(wish: Callable[[Seen, ModelMemory], tuple[int, ModelMemory, str]], hold_s: float) -> ScalePolicy:
    """Baselines look at no forecast; it is made all the same, to report its error."""

    def policy(seen: Seen, scale: ModelScale, memory: ModelMemory) -> tuple[Wish, ModelMemory]:
        ahead: Forecast
        ahead, history = forecast(memory.history, seen.sample, seen.start_s)
        count, memory, reason = wish(seen, replace(memory, history=history))
        return Wish(count, hold_s, 0.0, ahead, "rule", reason), memory

    return policy
