"""What a simulated fleet is, and what a run of it gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..core.effects import Effect
from ..core.events import Event
from ..core.health import WATCH_S
from ..core.lengths import LengthModel
from ..core.links import Split
from ..core.profile import Profile
from ..core.record import Run
from ..core.request import Request
from ..policy.catalog import Policy
from ..policy.scale import EVERY_S, ScaleConfig
from .faults import Fault, LaunchFault
from .launches import Starts, starts_in

Observer = Callable[[float, Event, Sequence[Effect]], None]
"""Sees each event that the controller took, with its time and effects."""


@dataclass(frozen=True, slots=True)
class SimConfig:
    """A fleet of ``instances`` equal instances under ``policy``.

    ``noise`` is the relative standard deviation of iteration times. ``device_factor`` stretches the device's times but
    not the profile that the scheduler starts from: 1.25 is a scheduler whose model is a fifth too optimistic.
    ``report_delay_s`` is how late reports arrive. ``known_lengths`` tells the scheduler each request's output length.
    ``exact_limits`` makes clients ask for exactly the tokens they get (as `bench` does), else for all that the context
    allows. ``sample_s`` is the spacing of the timeline, 0 for none.

    With a ``split`` instances have roles, and KV moves between them. With ``scale`` there are as many at first as
    ``instances`` says, then as many as the controller launches, which takes ``starts``; a shell costs ``shell_price``
    instances. What is killed does not come back by itself then.
    """

    profile: Profile
    instances: int
    policy: str
    rules: Policy
    seed: int = 0
    noise: float = 0.0
    device_factor: float = 1.0
    report_delay_s: float = 0.0
    known_lengths: bool = False
    exact_limits: bool = False
    prefix_reuse: bool = True
    block_size: int = 16
    leap: bool = True
    sample_s: float = 0.0
    faults: tuple[Fault, ...] = ()
    split: Split | None = None
    scale: ScaleConfig | None = None
    starts: Starts = field(default_factory=lambda: starts_in(60.0))
    shell_price: float = 1.0
    launch_faults: tuple[LaunchFault, ...] = ()

    @property
    def tick_s(self) -> float | None:
        """How often the controller has to look round; None: never."""
        if self.faults or self.launch_faults or (self.split is not None and self.split.adapt):
            return WATCH_S
        return None if self.scale is None else EVERY_S


@dataclass(frozen=True, slots=True)
class Sample:
    """An instance at one moment: requests, KV tokens held and the time budget of its last plan in seconds."""

    t: float
    instance: int
    waiting: int
    running: int
    kv_tokens: int
    budget_s: float


@dataclass(slots=True)
class SimCounters:
    """What a run took. ``outside_s`` is the iteration time spent outside of the profile's domain, ``exposed_s`` the
    time between first tokens and the arrival of their KV elsewhere, over all ``handoffs``; ``transitions`` counts
    roles, ``launches`` and ``stops`` instances."""

    events: int = 0
    iterations: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    busy_s: float = 0.0
    outside_s: float = 0.0
    handoffs: int = 0
    exposed_s: float = 0.0
    transitions: int = 0
    launches: int = 0
    stops: int = 0


@dataclass(frozen=True, slots=True)
class SimResult:
    """Records are in order of arrival. ``accelerator_s`` is in seconds of an instance, from launch to stop; ``sizes``
    are (time, instances that cost) where that changes."""

    run: Run
    counters: SimCounters
    timeline: tuple[Sample, ...]
    accelerator_s: float = 0.0
    sizes: tuple[tuple[float, int], ...] = ()


class KnownLengths(LengthModel):
    """What a scheduler expects that is told lengths: clients then ask for exactly the tokens that they get."""

    def predict(self, request: Request) -> float:
        """See LengthModel."""
        return float(request.max_output_tokens)
