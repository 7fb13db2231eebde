"""What happened: the only way the world reaches the controller. Durations, never stamps of another process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .effects import Launch
from .instance import InstanceInfo, InstanceReport, InstanceState
from .launch import Phase
from .links import Link
from .request import Request
from .stream import Sent
from .weights import InstanceStandby, WeightsLoaded

Outcome = Literal["finished", "cancelled", "failed"]


@dataclass(frozen=True, slots=True)
class RequestArrived:
    """A gateway asks where to send a request that reached it ``age_s`` ago.

    ``attempt`` counts the instances that it was sent to before; ``avoid`` names the last of them. A request that goes
    on from tokens that were ``sent`` counts them in its prompt.
    """

    request: Request
    gateway: str
    age_s: float
    attempt: int = 0
    avoid: str | None = None
    sent: Sent | None = None


@dataclass(frozen=True, slots=True)
class RequestFinished:
    """A request ended at its gateway. ``output_tokens`` are all that its client got. ``ttft_s`` is None when no token
    was sent; ``prompt_tokens_cached`` counts prompt tokens whose KV was found."""

    id: str
    outcome: Outcome
    output_tokens: int
    ttft_s: float | None
    e2e_s: float
    prompt_tokens_cached: int = 0
    detail: str = ""


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """A request that a gateway has in flight, told to a controller that has just started. ``request`` and ``sent`` are
    those of its last RequestArrived, ``output_tokens`` what came since."""

    request: Request
    age_s: float
    instance: str
    epoch: int
    output_tokens: int
    sent: Sent | None = None


@dataclass(frozen=True, slots=True)
class GatewayJoined:
    """A gateway connected; ``open`` are its requests in flight."""

    gateway: str
    open: tuple[OpenRequest, ...] = ()


@dataclass(frozen=True, slots=True)
class GatewayLeft:
    """A gateway's connection ended; its requests died with it."""

    gateway: str


@dataclass(frozen=True, slots=True)
class InstanceJoined:
    """An instance connected and is ready to serve, unless it is ``draining``. ``prefill_share`` is the role that it was
    given before, by this controller or an earlier one; None: none yet. ``served``: it was ready before, and its link to
    the controller is what is new. ``ends``: it drains in order to be stopped."""

    info: InstanceInfo
    draining: bool = False
    prefill_share: float | None = None
    served: bool = False
    ends: bool = False


@dataclass(frozen=True, slots=True)
class InstanceDraining:
    """An instance was told to end, or that its machine goes: it takes nothing new, and gives back after ``limit_s``
    seconds what still runs."""

    id: str
    epoch: int
    limit_s: float


@dataclass(frozen=True, slots=True)
class DrainAsked:
    """A person wants an instance to take nothing new, and to be empty after ``limit_s`` seconds (None: when its
    requests have ended). Not ``on``: it is to take requests again. ``hard``: it is gone then, so what still runs is
    given back before, also where nobody else is ready."""

    instance: str
    limit_s: float | None
    on: bool = True
    hard: bool = False


@dataclass(frozen=True, slots=True)
class InstanceReported:
    """A periodic report of an instance."""

    report: InstanceReport


@dataclass(frozen=True, slots=True)
class InstanceLinked:
    """An instance is linked to ``source`` and can get KV from there; ``link`` is what was measured. None: it is not, or
    not any more, and tries again; ``problem`` says why."""

    id: str
    epoch: int
    source: str
    source_epoch: int
    link: Link | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class PrefillEnding:
    """The last chunk of a prompt runs now, and its request is to be handed over: where to? ``left_s`` are the seconds
    until its first token is expected."""

    id: str
    instance: str
    epoch: int
    left_s: float


@dataclass(frozen=True, slots=True)
class HandoffFailed:
    """A request was not handed over: it goes on where it was (``instance``, ``epoch``)."""

    id: str
    instance: str
    epoch: int
    reason: str


@dataclass(frozen=True, slots=True)
class InstanceLeft:
    """An instance's process or connection ended. Ignored when ``epoch`` is not the current one."""

    id: str
    epoch: int
    reason: str


@dataclass(frozen=True, slots=True)
class LaunchProgressed:
    """A ``phase`` of an instance's start took ``seconds`` and is over: it is STANDBY or LOADING now. Its InstanceJoined
    says that it is READY."""

    instance: str
    phase: Phase
    seconds: float
    state: InstanceState


@dataclass(frozen=True, slots=True)
class LaunchFailed:
    """An instance that was to be launched will not come up, or a shell ended. ``place`` is where that was (a node, a
    device; empty: not known): the next launch rather goes elsewhere."""

    instance: str
    reason: str
    place: str = ""


@dataclass(frozen=True, slots=True)
class LauncherJoined:
    """Who starts and ends instances connected. ``launches``: the last order for each of those that it runs and was not
    told to stop. ``asked``: what people want of each model (ScaleAsked), as the launcher remembers it."""

    launches: tuple[Launch, ...] = ()
    asked: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ScaleAsked:
    """A person wants a model to have so many instances, whatever is asked of it (None: as many as it needs)."""

    model: str
    instances: int | None


@dataclass(frozen=True, slots=True)
class Tick:
    """Time went by: is every instance well? One without effects changes nothing."""


Event = (
    RequestArrived
    | RequestFinished
    | GatewayJoined
    | GatewayLeft
    | InstanceJoined
    | InstanceReported
    | InstanceLeft
    | InstanceDraining
    | InstanceLinked
    | PrefillEnding
    | HandoffFailed
    | DrainAsked
    | LauncherJoined
    | LaunchProgressed
    | LaunchFailed
    | InstanceStandby
    | WeightsLoaded
    | ScaleAsked
    | Tick
)
