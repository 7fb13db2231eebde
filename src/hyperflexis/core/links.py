"""What moves between instances costs time: the links' latency and bandwidth, and what is on its way already.

An instance sends and receives through one port each way, first come, first served. A transfer begins when both ports
are free, and takes latency + bytes / bandwidth. Like all of the controller's books it is an estimate: the transfers
themselves are the instances' business.
"""

from __future__ import annotations

from dataclasses import dataclass, field

LATENCY_S = 0.001
"""To ask for a transfer, and to confirm it, between two processes."""
BYTES_PER_S = 25e9
"""One port of 200 Gbit/s, as accelerators have on current hosts (NVIDIA ConnectX-7, one for each H100 of a DGX;
Ascend 910B has 200 Gbit/s of RoCE)."""


@dataclass(frozen=True, slots=True)
class Link:
    """From one instance to another: seconds, and bytes per second."""

    latency_s: float = LATENCY_S
    bytes_per_s: float = BYTES_PER_S


@dataclass(frozen=True, slots=True)
class Split:
    """How a model's instances share prefill and decode: ``prefill`` of them begin with prompts alone, ``decode`` with
    decodes alone, the others with both. With ``adapt`` that follows what is needed. KV moves over ``link``s."""

    prefill: int = 0
    decode: int = 0
    adapt: bool = True
    link: Link = field(default_factory=Link)

    @classmethod
    def of(cls, instances: int, prefill: int, static: bool, link: Link | None = None) -> Split:
        """``prefill`` of so many instances for prompts. Where roles are ``static`` and some are, the others decode."""
        return cls(prefill, instances - prefill if static and prefill else 0, not static, link or Link())


@dataclass(slots=True, eq=False)
class Links:
    """The ports of a model's instances, all alike, and until when each is taken."""

    usual: Link = field(default_factory=Link)
    sends_until: dict[str, float] = field(default_factory=dict)
    receives_until: dict[str, float] = field(default_factory=dict)

    def backlog_s(self, source: str, target: str, now: float) -> float:
        """Seconds until a transfer could begin."""
        return max(self.sends_until.get(source, now), self.receives_until.get(target, now), now) - now

    def exposed_s(self, source: str, target: str, size: float, left_s: float, last: float, now: float) -> float:
        """Seconds between the end of a prompt, in ``left_s``, and the arrival of its KV of ``size`` bytes, which leaves
        while it is computed but for the ``last`` bytes."""
        link = self.usual
        early_s = self.backlog_s(source, target, now) + size / link.bytes_per_s - left_s
        return link.latency_s + max(early_s, last / link.bytes_per_s)

    def add(self, source: str, target: str, size: float, now: float) -> None:
        """A transfer of ``size`` bytes is under way."""
        until = now + self.backlog_s(source, target, now) + size / self.usual.bytes_per_s
        self.sends_until[source] = self.receives_until[target] = until

    def forget(self, instance: str) -> None:
        """An instance is gone."""
        self.sends_until.pop(instance, None)
        self.receives_until.pop(instance, None)
