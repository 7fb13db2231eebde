"""An instance: one engine process serving one copy of a model's weights; its states and what it reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from ..errors import IllegalTransition
from .latency import Coefficients


class InstanceState(StrEnum):
    """Lifecycle of an instance. STANDBY and LOADING are passed through at once by engines that load at start.
    SUSPECTED: hung or slow (core/health.py)."""

    LAUNCHING = "launching"
    STANDBY = "standby"
    LOADING = "loading"
    READY = "ready"
    SUSPECTED = "suspected"
    DRAINING = "draining"
    STOPPED = "stopped"
    LOST = "lost"


INSTANCE_TRANSITIONS: dict[InstanceState, frozenset[InstanceState]] = {
    InstanceState.LAUNCHING: frozenset({InstanceState.STANDBY, InstanceState.STOPPED, InstanceState.LOST}),
    InstanceState.STANDBY: frozenset({InstanceState.LOADING, InstanceState.STOPPED, InstanceState.LOST}),
    # LOADING -> STANDBY: nothing gave it the weights that it was to have.
    InstanceState.LOADING: frozenset(
        {InstanceState.STANDBY, InstanceState.READY, InstanceState.STOPPED, InstanceState.LOST}
    ),
    InstanceState.READY: frozenset({InstanceState.SUSPECTED, InstanceState.DRAINING, InstanceState.LOST}),
    # SUSPECTED -> READY: it is tried again.
    InstanceState.SUSPECTED: frozenset({InstanceState.READY, InstanceState.DRAINING, InstanceState.LOST}),
    # DRAINING -> READY: the drain was cancelled because load returned.
    InstanceState.DRAINING: frozenset({InstanceState.READY, InstanceState.STOPPED, InstanceState.LOST}),
    InstanceState.STOPPED: frozenset(),
    InstanceState.LOST: frozenset(),
}


def check_instance_move(old: InstanceState, new: InstanceState) -> None:
    """Raise IllegalTransition unless ``old -> new`` is an edge of the table."""
    if new not in INSTANCE_TRANSITIONS[old]:
        raise IllegalTransition(f"instance cannot move from {old} to {new}")


LEAVE_S = 2.0
"""What is given back leaves within an iteration, and gateways have asked where to go on within another second."""


def in_time(limit_s: float) -> float:
    """When an instance that is gone after ``limit_s`` is to give back what still runs, in seconds from now."""
    return max(limit_s - LEAVE_S, 0.5 * limit_s)


TOPOLOGY = ("host", "rack", "zone")
"""Labels that say where an instance is, nearest first."""


@dataclass(frozen=True, slots=True)
class InstanceInfo:
    """What an instance is, fixed for one epoch (one launch of it).

    ``address`` is where gateways reach it (``unix:PATH`` or ``HOST:PORT``). ``kv_capacity_tokens`` is the number of
    context tokens its KV cache holds; ``max_batch`` the most requests it decodes at once. ``returns_token_ids`` is
    False for engines that stream text only. ``latency`` is where the fit of iteration times starts. ``kv_address`` is
    where other instances get the KV of its requests (empty: it gives none), ``kv_bytes_per_token`` how much that is.
    ``labels`` say where it is, by the names of TOPOLOGY. ``weights_address`` is where others get its weights (empty: it
    gives none), ``weights_digest`` says which these are (empty: none yet, or its engine does not know),
    ``weights_bytes`` how much that is. ``guessed``: its iterations are not measured but guessed from what comes of
    them. ``structured_outputs``: its answers can be made to look as a client says. ``parks``: requests that are to be
    handed over stand still there when their prompt is computed, until they are asked for or are told to stay.
    """

    id: str
    epoch: int
    model: str
    device_kind: str
    address: str
    engine: str
    context_length: int
    kv_capacity_tokens: int
    max_batch: int
    max_batch_tokens: int
    returns_token_ids: bool
    latency: Coefficients
    kv_address: str = ""
    kv_bytes_per_token: int = 0
    labels: dict[str, str] = field(default_factory=dict)
    weights_address: str = ""
    weights_digest: str = ""
    weights_bytes: int = 0
    guessed: bool = False
    structured_outputs: bool = False
    parks: bool = False


@dataclass(frozen=True, slots=True)
class RequestProgress:
    """How far one request is on its instance: prompt tokens whose KV is computed or was found, tokens sent."""

    id: str
    prefilled_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class InstanceReport:
    """What an instance says of itself, at most every 100 ms and at least every second.

    ``running``/``waiting`` count requests; ``kv_used_tokens`` includes reusable prefixes that are in use, not idle
    cached ones. ``progress`` covers requests that moved since the last report. Counters grow over the epoch.
    """

    id: str
    epoch: int
    num_running: int
    num_waiting: int
    kv_used_tokens: int
    iterations: int
    prompt_tokens: int
    output_tokens: int
    prefix_hit_tokens: int
    preemptions: int
    busy_s: float
    latency: Coefficients
    progress: tuple[RequestProgress, ...] = ()
