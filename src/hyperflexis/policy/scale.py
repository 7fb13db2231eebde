"""How many instances a model is to have: ``desired`` from what is asked, ``bound`` to what there is, ``hold`` a while.

Once a second, per model, with the demand in *instances kept busy* at each class's own pace (core/demand.py):

    L, S    level of the demand, and by how much it surges until a start is over (forecast.py)
    need    L + beta sqrt(L + S^2)     chance within a second, and what comes before an instance can
            at least what the KV cache in use fills
    guard   where S > GUARD sqrt(usual demand), following comes too late: instead the fleet beyond which only LOST times
            the share that may be missed of the last half hour's demand was, held for half an hour; until S is well
            below that again
    beta    += GAIN (misses - AIM (1 - target) outcomes) / (requests of a second): so it settles where the target is
            met. A miss counts when a request is demoted, or late, not when it ends: overload would hide it
    desired ceil(need); fewer than there are only with a tenth to spare
    bound   least and most instances of the model; of a pool of devices each model gets first its least, then one
            instance after the other goes to where most of the wish is unmet, by value
    hold    up at once, down late: what was granted is held for HOLD_STARTS times a start, so that it pays back; where
            the demand fell by no more than independent arrivals vary, QUIET_S: then it will be back

Means to get more, cheapest first: cancel a drain, wake a standby, start with weights from another instance, start from
disk. Fewer: the youngest that is not ready yet, else the one with the fewest requests drains. docs/policies/scale.md
has the evidence for the constants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, sqrt
from typing import NamedTuple

from ..core.demand import Sample
from ..core.effects import Cause
from ..core.latency import Coefficients
from ..core.launch import Means
from ..core.weights import WeightSource
from .forecast import LEAST_LEVEL, QUICK_S, WINDOW_S, Forecast, History, enough, forecast

EVERY_S = 1.0
"""How often this is asked."""
FIRST_BETA, LEAST_BETA, MOST_BETA = 0.8, -0.3, 3.0
"""At constant Poisson load with a TTFT of 1 s, 0.83 keeps 99%; looser promises need less than nothing."""
GAIN = 0.1
AIM = 0.5
"""Share of the misses allowed that the margin aims at. Misses come in bunches, which it takes minutes to answer."""
RATE_S = 60.0
"""The rate of arrivals fades within this time."""
SPARE = 1.10
GUARD, QUICK_GUARD = 1.2, 0.9
"""Of starts of more than QUICK_S, and of others. Independent arrivals surge by 0.2 to 0.7 roots of the demand within 2
to 60 s, code completion by 0.4 within 2 s, where following halves the cost, by 1 within 5 s, where it costs more than a
fixed fleet, and by 5 within 60 s."""
RELEASE = 0.7
"""Share of what brought the guard down to which it stays, where starts are as quick as they were: one that comes and
goes has let go of the fleet that it then needs."""
LOST = 5.0
"""What a fixed fleet cannot serve at once is late, and about a third of that is missed: the rest has time to spare. Of
what this gives from second to second the largest is kept, which is more than what it gives over the half hour."""
LEARN_START_S = 4.0
"""Where starts take longer, nothing goes before MOST_HOLD_S have shown how the demand surges, and what was there until
then stays while the guard rules in the first half hour."""
KV_SHARE = 0.9
"""Share of the KV cache that can be planned with: blocks are rounded up, and contexts grow."""
LEAST_HOLD_S, MOST_HOLD_S, HOLD_STARTS = 5.0, 300.0, 2.5
QUIET_S = 300.0
QUIET_NOISE = 6.0
"""A fall within so many standard deviations of independent arrivals says nothing: with 2 the plan turns 30 times an
hour under Poisson load, with 6 at most 10."""
IDLE_S = 300.0
"""Without any request for so long, nothing is needed: surges are not counted with any more."""


@dataclass(frozen=True, slots=True)
class ModelScale:
    """What a model may have: ``least`` to ``most`` instances, ``standby`` shells besides, each on so many ``devices``.
    ``start_s`` has the seconds that a start takes by each of the means that there are, until measured; ``latency``
    where no instance has reported one. ``copy``: of its weights, in the host's memory. ``target`` is the attainment
    that is wanted, ``value`` what an instance is worth where models compete."""

    model: str
    least: int = 1
    most: int = 64
    standby: int = 0
    target: float = 0.99
    devices: int = 1
    value: float = 1.0
    start_s: dict[Means, float] = field(default_factory=lambda: {"disk": 60.0})
    latency: Coefficients | None = None
    copy: WeightSource | None = None


@dataclass(frozen=True, slots=True)
class ScaleConfig:
    """Models that are scaled by ``policy``, a spec of ``catalog.find_scaler``, on ``devices`` that they share (None: no
    limit). At most ``max_held`` requests of a model wait for its first instance."""

    models: tuple[ModelScale, ...]
    devices: int | None = None
    policy: str = "forecast"
    max_held: int = 1000


@dataclass(frozen=True, slots=True)
class Seen:
    """One model at one moment. ``instances`` take work or will, ``ready`` of them do. ``ongoing`` requests are in
    flight, ``held`` of them wait for an instance; ``queued`` is what waits for its prompt on an instance, on average.
    ``kv`` is the KV in use, in caches of an instance. ``start_s`` is what the next start takes."""

    now: float
    sample: Sample
    instances: int
    ready: int
    ongoing: int
    held: int
    queued: float
    kv: float
    start_s: float


class Grant(NamedTuple):
    """``instances`` that a model was given ``at`` a time, to be held ``until`` another."""

    at: float
    until: float
    instances: int


@dataclass(frozen=True, slots=True)
class ModelMemory:
    """What is remembered of one model. ``beta``: the margin; ``rate``: arrivals per second; ``idle_s``: without any
    request; ``votes``: how many seconds in a row more (positive) or fewer instances were wanted; ``grants``: what
    ``bound`` gave, only what no later one exceeds and outlives; ``guarded``: the guard that ruled at the last look,
    0: none; ``asked``: what a person wants."""

    history: History = field(default_factory=History)
    beta: float = FIRST_BETA
    rate: float = 0.0
    idle_s: float = 0.0
    votes: int = 0
    grants: tuple[Grant, ...] = ()
    guarded: float = 0.0
    asked: int | None = None


@dataclass(frozen=True, slots=True)
class Wish:
    """``instances`` that a model should have, and not fewer for ``hold_s``, or for QUIET_S where it would lose less
    than ``quiet``. ``prefill`` and ``decode`` are the needs of the two sides."""

    instances: int
    hold_s: float
    margin: float
    forecast: Forecast
    cause: Cause
    reason: str
    prefill: float = 0.0
    decode: float = 0.0
    quiet: float = 0.0


ScalePolicy = Callable[[Seen, ModelScale, ModelMemory], tuple[Wish, ModelMemory]]
"""What wants more or fewer: ``desired`` or a baseline."""


def desired(seen: Seen, scale: ModelScale, memory: ModelMemory) -> tuple[Wish, ModelMemory]:
    """HyperFlexis' wish; see the module's rules."""
    sample = seen.sample
    ahead, history = forecast(memory.history, sample, seen.start_s)
    rate = memory.rate + (sample.arrivals - memory.rate) / RATE_S
    beta = memory.beta
    if rate > 0.0:
        beta += GAIN * (sample.misses - AIM * (1.0 - scale.target) * sample.outcomes) / max(rate, 1.0 / RATE_S)
        beta = min(max(beta, LEAST_BETA), MOST_BETA)
    need = _with_margin(ahead.level, ahead.surge, beta)
    cause: Cause = "demand"
    reason = f"demand {ahead.level:.2f}, surges {ahead.surge:.2f}, margin {beta:.2f}"
    hold_s = max(LEAST_HOLD_S, min(HOLD_STARTS * seen.start_s, MOST_HOLD_S), 2.0 * seen.start_s)
    unknown_s = MOST_HOLD_S
    guard = QUICK_GUARD if seen.start_s <= QUICK_S else GUARD
    least = guard * (RELEASE if memory.guarded == guard else 1.0)
    guarded = guard if ahead.surge > least * sqrt(max(ahead.usual, LEAST_LEVEL)) else 0.0
    if guarded:
        hold_s = unknown_s = WINDOW_S
        need = max(enough(ahead.shares, LOST * (1.0 - scale.target)) + (beta - FIRST_BETA) * sqrt(ahead.usual), 0.0)
        cause = "surges"
        reason = f"{need:.2f}, held for half an hour: demand surges by {ahead.surge:.2f} within a start"
    if seen.kv / KV_SHARE > need:
        need = seen.kv / KV_SHARE
        cause, reason = "kv", f"KV in use fills {seen.kv:.2f} caches"
    idle_s = 0.0 if sample.arrivals or seen.ongoing else memory.idle_s + EVERY_S
    if idle_s >= IDLE_S:
        need, cause, reason = 0.0, "idle", f"nothing has come for {idle_s:.0f} s"
    count = ceil(need - 1e-9)
    if not count and seen.held:
        count, cause, reason = 1, "waiting", f"{seen.held} requests wait"
    if count < seen.instances:
        count = min(seen.instances, max(count, ceil(SPARE * need - 1e-9)))
    grants = memory.grants
    if seen.start_s > LEARN_START_S and history.count < unknown_s:  # how it surges is not known yet
        early, until = seen.now - EVERY_S * history.count + MOST_HOLD_S, seen.now + LEAST_HOLD_S
        grants = tuple(one._replace(until=max(one.until, until)) if one.at <= early else one for one in grants)
    memory = replace(memory, history=history, beta=beta, rate=rate, idle_s=idle_s, grants=grants, guarded=guarded)
    prefill, decode = (_with_margin(side, ahead.surge, beta) for side in (ahead.prefill, ahead.decode))
    quiet = 1.0 + QUIET_NOISE * ahead.noise
    return Wish(count, hold_s, beta, ahead, cause, reason, prefill, decode, quiet), memory


def _with_margin(level: float, surge: float, beta: float) -> float:
    return max(level + beta * sqrt(level + surge * surge), 0.0)


def bound(wishes: Mapping[str, int], scale: ScaleConfig) -> dict[str, int]:
    """What each model gets of what it wishes."""
    models = [model for model in scale.models if model.model in wishes]
    wanted = {one.model: min(max(wishes[one.model], one.least), one.most) for one in models}
    if scale.devices is None or sum(wanted[one.model] * one.devices for one in models) <= scale.devices:
        return wanted
    free = scale.devices
    granted = dict.fromkeys(wanted, 0)
    for least in (True, False):
        while True:
            open_ = [
                one
                for one in models
                if granted[one.model] < (one.least if least else wanted[one.model]) and one.devices <= free
            ]
            if not open_:
                break
            # Compared by name too, so that ties do not depend on anything else.
            best = max(open_, key=lambda m: (m.value * (1.0 - granted[m.model] / wanted[m.model]), m.model))
            granted[best.model] += 1
            free -= best.devices
    return granted


def hold(
    now: float,
    granted: Mapping[str, int],
    instances: Mapping[str, int],
    wishes: Mapping[str, Wish],
    memories: Mapping[str, ModelMemory],
    scale: ScaleConfig,
) -> tuple[dict[str, int], dict[str, ModelMemory]]:
    """The largest grant of each model that is still held, of what is left of its ``instances``, as far as the others
    leave devices for it. What has gone is not held."""
    free = None
    if scale.devices is not None:
        free = scale.devices - sum(granted[one.model] * one.devices for one in scale.models if one.model in granted)
    held, after = {}, {}
    for one in scale.models:
        if one.model not in granted:
            continue
        count, memory, wish = granted[one.model], memories[one.model], wishes[one.model]
        # What there is at the first look is held as if it had been granted.
        grants = memory.grants or (Grant(now, now + wish.hold_s, instances[one.model]),)
        alive = [old for old in grants if wish.hold_s and max(old.until, old.at + QUIET_S) > now]
        past = max((old.instances for old in alive if old.until > now), default=0)
        if instances[one.model] - max(past, count) < wish.quiet:
            past = max((old.instances for old in alive), default=0)
        more = max(min(past, one.most, instances[one.model]) - count, 0)
        if free is not None:
            more = min(more, max(free, 0) // one.devices)
            free -= more * one.devices
        held[one.model] = count + more
        new = Grant(now, now + wish.hold_s, count)
        kept = [old for old in alive if old.instances > count or old.until > new.until]
        after[one.model] = replace(memory, grants=(*kept, new))
    return held, after


def with_override(wish: Wish, asked: int | None) -> Wish:
    """What a person wants counts instead."""
    if asked is None:
        return wish
    return replace(wish, instances=asked, hold_s=0.0, quiet=0.0, cause="asked", reason=f"{asked} were asked for")


def more_prefill(wish: Wish, prefill: float, decode: float) -> bool:
    """Whether prompts lack more than decodes of what ``prefill`` and ``decode`` instances can do."""
    return wish.prefill - prefill > wish.decode - decode


def shells_to_start(scale: ModelScale, shells: int, free: int | None) -> int:
    """Shells that are missing and for which there are devices."""
    missing = max(scale.standby - shells, 0)
    return missing if free is None else min(missing, max(free, 0) // scale.devices)


def best_means(scale: ModelScale, start_s: Mapping[Means, float], shells: int, ready: int) -> Means:
    """How the next instance is started the soonest: a shell is there, another instance can give its weights, else from
    disk."""
    can: Sequence[Means] = [
        means for means in start_s if means == "disk" or (means == "standby" and shells) or (means == "d2d" and ready)
    ]
    return min(can, key=lambda means: start_s[means]) if can else "disk"
