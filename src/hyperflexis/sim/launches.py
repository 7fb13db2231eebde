"""Instances that come and go in a simulation: their starts, phase by phase, their end, and what they cost.

Launch        -> process, engine_init, weights, warm_up  -> LaunchProgressed after each, then InstanceJoined
as a shell    -> the same without weights                -> waits
from standby  -> weights                                 -> InstanceJoined
StopInstance  -> at once
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from ..core.effects import Launch
from ..core.events import Event, InstanceJoined, LaunchFailed, LaunchProgressed
from ..core.instance import InstanceState
from ..core.launch import Means
from ..core.launch import Phase as StartPhase
from ..core.links import BYTES_PER_S
from ..core.profile import Start
from .faults import LaunchFault
from .instance import Instance, Phase

Starts = Mapping[Means, tuple[tuple[StartPhase, float], ...]]
"""Seconds of each phase, in order, by the means that there are."""


def starts_of(start: Start, weight_bytes: int, best: Means) -> Starts:
    """What a profile says: by disk; with ``best`` "d2d" also with weights over a link (core/links.py: one port), with
    "standby" from shells besides."""
    before: tuple[tuple[StartPhase, float], ...] = (("process", start.process_s), ("engine_init", start.engine_init_s))
    after: tuple[tuple[StartPhase, float], ...] = (("warm_up", start.warm_up_s),)
    weights_s = weight_bytes / BYTES_PER_S
    found: dict[Means, tuple[tuple[StartPhase, float], ...]] = {"disk": (*before, ("weights", start.weights_s), *after)}
    if best != "disk":
        found["d2d"] = (*before, ("weights", weights_s), *after)
    if best == "standby":
        found["standby"] = (("weights", weights_s),)
    return found


def starts_in(seconds: float) -> Starts:
    """Every start takes so long."""
    return {"disk": (("process", seconds),)}


@dataclass(slots=True, eq=False)
class Meter:
    """What instances cost: seconds from launch to stop, of a shell times its ``shell_price``. ``sizes`` has the number
    of those that are no shells, where it changes."""

    shell_price: float = 1.0
    total_s: float = 0.0
    running: dict[str, tuple[float, float]] = field(default_factory=dict)
    sizes: list[tuple[float, int]] = field(default_factory=list)

    def start(self, id: str, shell: bool, now: float) -> None:
        """It holds its devices from now on, as a shell or whole; one that runs changes."""
        self._end(id, now)
        self.running[id] = (now, self.shell_price if shell else 1.0)
        self._note(now)

    def stop(self, id: str, now: float) -> None:
        """It gives them back."""
        self._end(id, now)
        self._note(now)

    def until(self, now: float) -> float:
        """Accelerator seconds, in instances, until ``now``."""
        return self.total_s + sum((now - since) * price for since, price in self.running.values())

    def _end(self, id: str, now: float) -> None:
        since, price = self.running.pop(id, (now, 0.0))
        self.total_s += (now - since) * price

    def _note(self, now: float) -> None:
        self.sizes.append((now, len(self.running)))


@dataclass(slots=True, eq=False)
class Coming:
    """An instance on its way: ``phases`` left."""

    effect: Launch
    phases: list[tuple[StartPhase, float]]
    over: bool = False


class Fleet(Protocol):
    """What launches need of the driver."""

    def tell(self, event: Event, now: float) -> None:
        """Let the controller know."""

    def push(self, at: float, phase: Phase, what: object) -> None:
        """Something is to happen."""

    def add(self, id: str, model: str) -> Instance:
        """Another instance, ready to serve."""


class Launches:
    """All starts of a run, numbered from 0; ``faults`` are by number. Their seconds deviate by ``noise``,
    relatively."""

    def __init__(
        self, fleet: Fleet, starts: Starts, faults: tuple[LaunchFault, ...], noise: float, random: Random, meter: Meter
    ) -> None:
        self._fleet = fleet
        self._starts = starts
        self._faults = {fault.number: fault for fault in faults}
        self._noise = noise
        self._random = random
        self._meter = meter
        self._coming: dict[str, Coming] = {}
        self.count = 0

    def begin(self, effect: Launch, now: float) -> None:
        """A start, or the waking of a shell."""
        fault = self._faults.get(self.count)
        self.count += 1
        phases = [(name, self._vary(seconds)) for name, seconds in self._starts[effect.means]]
        if effect.shell:
            phases = [(name, seconds) for name, seconds in phases if name != "weights"]
        coming = self._coming[effect.instance] = Coming(effect, phases)
        self._meter.start(effect.instance, effect.shell, now)
        if fault is None:
            self._fleet.push(now + phases[0][1], Phase.LAUNCH, coming)
        elif fault.kind == "fail":
            coming.phases = []
            self._fleet.push(now + phases[0][1], Phase.LAUNCH, coming)

    def go_on(self, coming: Coming, now: float) -> None:
        """A phase is over."""
        effect = coming.effect
        if coming.over:
            return
        if not coming.phases:
            self.stop(effect.instance, now)
            self._fleet.tell(
                LaunchFailed(effect.instance, "it ended while it started", f"place-{effect.instance}"), now
            )
            return
        name, seconds = coming.phases.pop(0)
        ready = not coming.phases
        state = InstanceState.LAUNCHING if name == "process" and not ready else InstanceState.LOADING
        if effect.shell:
            state = InstanceState.STANDBY if ready else InstanceState.LAUNCHING
        self._fleet.tell(LaunchProgressed(effect.instance, name, seconds, state), now)
        if not ready:
            self._fleet.push(now + coming.phases[0][1], Phase.LAUNCH, coming)
        elif not effect.shell:
            del self._coming[effect.instance]
            instance = self._fleet.add(effect.instance, effect.model)
            self._fleet.tell(InstanceJoined(instance.info, prefill_share=effect.prefill_share), now)

    def stop(self, id: str, now: float) -> None:
        """End one that is not ready yet, if there is such, and give the devices back of any."""
        coming = self._coming.pop(id, None)
        if coming is not None:
            coming.over = True
        self._meter.stop(id, now)

    def _vary(self, seconds: float) -> float:
        return seconds * max(self._random.gauss(1.0, self._noise), 0.1) if self._noise else seconds
