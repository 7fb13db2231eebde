"""How many instances of a disaggregated model compute prompts alone.

An instance is *prefill* (share 1: prompts alone), *decode* (0) or *convertible* (between: both, as in a colocated
fleet). Convertible ones take what comes: prompts when the prefill instances are busy, and any decode whose pace they
keep. A prefill instance makes no decode wait, and spends c0 on whole iterations of prompts. So it computes prompts at

    saving = (1 - c0/CAP) / (1 - c0/tau)          times the speed of one that keeps the tightest pace tau

That is worth a role from SAVING on. Below, or where decodes need all instances, all stay convertible.

    needs     instances that prompts, and decodes, each at its own pace, keep busy:  load / RHO + MARGIN * sqrt(load);
              decodes also need the KV cache that they hold
    best      as many prefill instances as prompts keep busy, and decodes, at their largest need of PEAK_S, leave over;
              two instances decode at least, where there are three

One more comes when that was right GROW times in a row, a second apart, or GROW / k times when k are missing: what
decodes need is known late, as answers end. Before SETTLE_S nothing is known. One less when decodes need it SHRINK times
in a row; at once when they lack more than half an instance, or when one decodes on an instance for prompts, having
found no room elsewhere: that instance computes prompts at half its speed for the one, and may as well take others. For
want of prompts alone none goes: it does no harm. A role is kept for DWELL_S. A transition moves no weights; what
decodes on an instance that turns to prompts goes on elsewhere with its KV where its pace can be kept, else to its end
there. In simulation pure decode instances only harm: bursts of prompts find them closed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import floor, sqrt

from ..core.cluster import CONVERTIBLE, TrackedInstance
from ..core.demand import Demand
from ..core.latency import share_left
from .budget import CAP_S

RHO = 0.94
MARGIN = 0.3
KV_SHARE = 0.7
"""Share of the KV cache that decodes may hold: contexts grow, and where it is full they stay where prompts are
computed."""
SAVING = 1.2
PEAK_S = 60.0
SETTLE_S = 5.0
"""Of a model that has had its first request so long ago, needs are extrapolated too far."""
GROW, SHRINK = 15, 3
DWELL_S = 5.0
EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Needs:
    """Instances that each side needs, at ``t``."""

    t: float
    prefill: float
    decode: float


@dataclass(frozen=True, slots=True)
class ModelRoles:
    """What is remembered of one model: needs of the last PEAK_S, and how often in a row more (positive) or fewer
    (negative) prefill instances were right."""

    needs: tuple[Needs, ...] = ()
    votes: int = 0


@dataclass(frozen=True, slots=True)
class RolesMemory:
    """By model."""

    models: dict[str, ModelRoles] = field(default_factory=dict)


Change = tuple[TrackedInstance, float, str]
"""(instance, its new prefill share, why)."""


def needs_of(instances: Sequence[TrackedInstance], demand: Demand, now: float) -> Needs:
    """What the two sides need now."""
    kv_tokens = sum(one.decode_kv_tokens for one in instances)
    kv = kv_tokens / (KV_SHARE * instances[0].info.kv_capacity_tokens)
    return Needs(now, _need(demand.prefill(now)), max(_need(demand.decode(now)), kv))


def _need(load: float) -> float:
    return load / RHO + MARGIN * sqrt(load)


def saving(c0: float, pace_s: float) -> float:
    """How many times as fast prompts are computed where no decode keeps ``pace_s``."""
    return share_left(c0, CAP_S) / share_left(c0, min(pace_s, CAP_S))


def best_prefill(prefill_need: float, decode_need: float, instances: int) -> int:
    """How many of ``instances`` should compute prompts alone."""
    return max(min(floor(prefill_need), floor(instances - decode_need), max(instances - 2, 1)), 0)


def first_prefill(prefill_load: float, decode_load: float, c0: float, pace_s: float, instances: int) -> int:
    """How many of ``instances`` should begin so, when the mean loads and the tightest pace are known: instances that
    prompts and decodes keep busy."""
    if instances < 2 or saving(c0, pace_s) < SAVING:
        return 0
    return best_prefill(_need(prefill_load), _need(decode_load), instances)


def plan_roles(
    now: float, model: str, instances: Sequence[TrackedInstance], demand: Demand, memory: RolesMemory
) -> tuple[list[Change], RolesMemory]:
    """At most one change; see the module's rules. ``instances`` are those that are ready."""
    known = memory.models.get(model, ModelRoles())
    if len(instances) < 2 or now - demand.since < SETTLE_S or (known.needs and now - known.needs[-1].t < EVERY_S):
        return [], memory
    needs = needs_of(instances, demand, now)
    recent = (*(one for one in known.needs if now - one.t < PEAK_S), needs)
    have = sum(one.prefill_share == 1.0 for one in instances)
    best = 0
    if saving(instances[0].latency.c0, demand.tightest_s(now)) >= SAVING:
        best = best_prefill(needs.prefill, max(one.decode for one in recent), len(instances))
    votes = 0
    change: Change | None = None
    if any(has_strays(one, now) for one in instances):
        change = _turn(now, instances, False, "decodes find no room elsewhere")
    elif best > have:
        votes = max(known.votes, 0) + 1
        if votes * (best - have) >= GROW:
            change = _turn(now, instances, True, f"prompts keep {needs.prefill:.1f} instances busy")
    elif len(instances) - needs.decode < have:
        votes = min(known.votes, 0) - 1
        if -votes >= SHRINK or len(instances) - needs.decode < have - 0.5:
            change = _turn(now, instances, False, f"decodes need {needs.decode:.1f} instances")
    if change is not None:
        votes = 0
    memory = replace(memory, models={**memory.models, model: ModelRoles(recent, votes)})
    return ([] if change is None else [change]), memory


def has_strays(instance: TrackedInstance, now: float) -> bool:
    """Whether something decodes on an instance for prompts, and not since it was none."""
    return instance.prefill_share == 1.0 and instance.num_decodes > 0 and now - instance.role_at >= DWELL_S


def _turn(now: float, instances: Sequence[TrackedInstance], to_prefill: bool, reason: str) -> Change | None:
    """To prompts alone the instance with the fewest decodes; back to both the one with the most, or the fewest
    prompts."""
    free = [one for one in instances if now - one.role_at >= DWELL_S and (one.prefill_share < 1.0) == to_prefill]
    if not free:
        return None
    if to_prefill:
        return min(free, key=lambda one: one.num_decodes), 1.0, reason
    return min(free, key=lambda one: (-one.num_decodes, one.prefill_s)), CONVERTIBLE, reason
