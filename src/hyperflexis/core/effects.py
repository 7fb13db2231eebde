"""What to do: the only way the controller reaches the world."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .launch import Means
from .links import KvSource
from .weights import LoadWeights, SetSendRate

RejectReason = Literal["slo_infeasible", "overloaded", "no_instance_ready", "unknown_model"]


@dataclass(frozen=True, slots=True)
class Decision:
    """Why a request was placed where it was: enough to explain it to its sender.

    ``predicted_*`` are seconds after arrival. ``on_time`` is False for a request that is expected to miss its promise
    and is served from leftover budget (demoted). ``gain`` is the on-time value won, ``load_s`` the queue of
    the chosen instance in seconds, ``candidates`` how many instances were compared, ``saved_s`` the prompt work that a
    prefix in its KV cache saves.
    """

    policy: str
    candidates: int
    on_time: bool
    gain: float
    load_s: float
    predicted_ttft_s: float
    predicted_e2e_s: float
    saved_s: float = 0.0
    note: str = ""


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Send the request to an instance. ``expected_output_tokens`` is what core/lengths.py expects. With ``hands_over``
    the instance is to ask, when its prompt is nearly computed, where the request goes on."""

    request_id: str
    gateway: str
    instance: str
    epoch: int
    address: str
    value: float
    expected_output_tokens: float
    decision: Decision
    hands_over: bool = False


@dataclass(frozen=True, slots=True)
class Handoff:
    """Let a request go on at ``instance``, which gets its KV from ``source``, at ``kv_address``. Until it has all of it
    the source goes on computing."""

    request_id: str
    gateway: str
    source: str
    source_epoch: int
    kv_address: str
    instance: str
    epoch: int
    address: str
    value: float
    expected_output_tokens: float
    decision: Decision


@dataclass(frozen=True, slots=True)
class Stay:
    """A request whose prompt is computed goes on where it is. Told to instances whose requests stand still until then
    (InstanceInfo.parks)."""

    request_id: str
    instance: str
    epoch: int


@dataclass(frozen=True, slots=True)
class SetRole:
    """The share of prompts that an instance takes: 1 prefill only, 0 decode only, between: convertible."""

    instance: str
    epoch: int
    prefill_share: float
    reason: str


@dataclass(frozen=True, slots=True)
class SetLinks:
    """The instance is to be linked to these sources of KV, and to no others, and to say how each link was measured."""

    instance: str
    epoch: int
    sources: tuple[KvSource, ...]


@dataclass(frozen=True, slots=True)
class Reject:
    """Refuse the request. ``retry_after_s`` is the honest wait, None when waiting does not help."""

    request_id: str
    gateway: str
    reason: RejectReason
    message: str
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Suspect:
    """An instance is not as its latency model says: it gets nothing new for ``hold_s`` seconds."""

    instance: str
    epoch: int
    reason: str
    hold_s: float


@dataclass(frozen=True, slots=True)
class Evacuate:
    """What runs on an instance is to go on elsewhere. ``failed``: as after a failure of the instance."""

    instance: str
    epoch: int
    reason: str
    failed: bool


@dataclass(frozen=True, slots=True)
class Drain:
    """The instance takes nothing new, and gives back after ``limit_s`` seconds what still runs (None: nothing). Not
    ``on``: it takes requests again. ``ends``: it is to be stopped when it is empty, which it remembers and tells the
    next controller."""

    instance: str
    epoch: int
    limit_s: float | None
    reason: str
    on: bool = True
    ends: bool = False


@dataclass(frozen=True, slots=True)
class Launch:
    """Start an instance by ``means`` (core/launch.py): a new one of this id, or, from standby, the shell of this id. As
    a ``shell`` it is to stop before the weights, and to wait. ``prefill_share`` is the role that it is to join with
    (None: it has none). ``avoid`` are places where launches failed of late: only if there is no other.

    Answered by LaunchProgressed after each phase, and by InstanceJoined, or by LaunchFailed; by nothing, it is given up
    after a time and launched anew under another id. A launcher does not start again by itself what ends."""

    instance: str
    model: str
    means: Means
    shell: bool
    prefill_share: float | None
    avoid: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class StopInstance:
    """End an instance and give its devices back: it is empty, or not ready yet. Ids that are not known are ignored."""

    instance: str
    reason: str


Cause = Literal["demand", "surges", "kv", "waiting", "idle", "asked", "rule"]
"""What decides how many instances a model should have: its demand and what is kept for chance; surges that a start is
too slow for; the KV in use; requests that wait while there is no instance; that nothing comes any more; a person; the
rule of a baseline."""


@dataclass(frozen=True, slots=True)
class Planned:
    """How many instances a model is to have: once a second and model, for the journal, metrics and people.

    ``instances`` are there or on their way, without those that drain. ``desired`` is what ``cause`` asks for, which
    ``reason`` has in figures, ``held`` what is kept, within all limits. ``demand`` is in instances, ``margin`` in
    square roots of it; ``error`` is the mean relative error of what was forecast ``horizon_s``, the time that a start
    takes, ahead."""

    model: str
    instances: int
    desired: int
    held: int
    demand: float
    margin: float
    horizon_s: float
    error: float
    cause: Cause
    reason: str


Effect = (
    Dispatch
    | Handoff
    | Stay
    | Reject
    | Suspect
    | Evacuate
    | Drain
    | SetRole
    | SetLinks
    | Launch
    | StopInstance
    | Planned
    | LoadWeights
    | SetSendRate
)
