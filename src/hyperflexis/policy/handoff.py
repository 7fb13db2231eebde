"""Where a request decodes whose prompt is nearly computed: on the instance that keeps its pace, and everybody else's,
at the least cost; or where it is.

    feasible  an iteration of the decodes there, this one among them at its largest context, lasts at most PACE_MARGIN
              of the tightest pace; KV cache and batch have room; the KV is there before the second token is due
    cost      seconds that the handoff is exposed, in paces of the request
              + pace loss: by how much more of the time c0 takes at its pace than at those there, on average;
                a part of the difference where the request is the one that must keep theirs
              + share of the KV cache in use

The tightest pace binds all that are there. The loss is taken from the average, so that paces part: where every instance
has a tight one, the tightest tells none from another, and loose requests would stay among tight ones for good.

The source is a candidate when it decodes too: nothing moves, but prompts and decodes then disturb each other, which
its step policy sees to. Where no other is feasible the request stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..core.cluster import TrackedInstance, TrackedRequest
from ..core.links import Links
from .budget import CAP_S, PACE_MARGIN
from .place import PlaceMemory

LOSS_WEIGHT = 10.0
"""What a loss of all of the time would cost, in paces."""
MOVE = 0.5
"""What a handoff costs besides its time, in paces: where c0 is small there is little to win by one, and the instance
that has the KV is as good as any."""
OWN = 0.3
"""Share of the loss that counts where the request is the one that loses. In simulation 0 / 0.3 / 1 give 92.7 / 92.8 /
92.0% on time on Ascend (load 1.2) and 91.4 / 97.3 / 96.7% with Llama-2-70B on H100 (load 1.1), roles adaptive."""
LAYERS = 32
"""KV leaves layer by layer: what is left when a prompt ends is about one of so many."""


@dataclass(frozen=True, slots=True)
class Move:
    """A prompt's end: ``left_s`` seconds from now, on ``source``; its KV has ``size`` bytes."""

    source: TrackedInstance
    left_s: float
    size: float


DecodePolicy = Callable[
    [float, TrackedRequest, Move, Sequence[TrackedInstance], Links, PlaceMemory],
    "tuple[TrackedInstance | None, float, PlaceMemory]",
]
"""(now, request, its move, instances that decode, links, memory) -> (where to, or None to stay; exposed seconds; new
memory)."""


def exposed_s(move: Move, target: TrackedInstance, links: Links, now: float) -> float:
    """Seconds that the handoff adds between the first and the second token."""
    return links.exposed_s(move.source.id, target.id, move.size, move.left_s, move.size / LAYERS, now)


def choose(
    now: float,
    tracked: TrackedRequest,
    move: Move,
    ready: Sequence[TrackedInstance],
    links: Links,
    memory: PlaceMemory,
) -> tuple[TrackedInstance | None, float, PlaceMemory]:
    """HyperFlexis' choice; see the module's rules."""
    best: tuple[float, float, TrackedInstance] | None = None
    for instance in ready:
        stays = instance is move.source
        seconds = 0.0 if stays else exposed_s(move, instance, links, now)
        if not stays and not is_feasible(tracked, instance, seconds):
            continue
        cost = _cost(tracked, instance, seconds, not stays)
        if best is None or cost < best[0]:
            best = cost, seconds, instance
    if best is None or best[2] is move.source:
        return None, 0.0, memory
    return best[2], best[1], memory


def is_feasible(tracked: TrackedRequest, instance: TrackedInstance, seconds: float) -> bool:
    """Whether the request can decode there on time, if its KV arrives ``seconds`` after its first token."""
    context = tracked.request.num_prompt_tokens + tracked.expected_output_tokens
    pace_s = tracked.pace_s
    step_s = instance.latency.decode_s(instance.num_decodes + 1, instance.decode_kv_tokens + context)
    # Later tokens make up for a late second one as far as the steps are shorter than the pace.
    gain_s = max(tracked.expected_output_tokens - 1.0, 1.0) * max(pace_s - step_s, 0.0)
    return (
        step_s <= PACE_MARGIN * min(instance.min_pace_s, pace_s)
        and instance.kv_tokens + context <= instance.info.kv_capacity_tokens
        and instance.num_requests < instance.info.max_batch
        and seconds <= max(pace_s, gain_s)
    )


def _cost(tracked: TrackedRequest, instance: TrackedInstance, seconds: float, moves: bool) -> float:
    latency = instance.latency
    pace_s = min(tracked.pace_s, CAP_S)
    difference = latency.c0 / pace_s - _overhead(instance)
    loss = difference if difference > 0.0 else -OWN * difference
    return (
        (MOVE if moves else 0.0)
        + seconds / pace_s
        + LOSS_WEIGHT * loss
        + instance.kv_tokens / instance.info.kv_capacity_tokens
    )


def _overhead(instance: TrackedInstance) -> float:
    """Share of the time that c0 takes at the paces there, on average."""
    paces, c0 = instance.paces, instance.latency.c0
    if not paces:
        return c0 / CAP_S
    return c0 * sum(count / min(pace_s, CAP_S) for pace_s, count in paces.items()) / sum(paces.values())
