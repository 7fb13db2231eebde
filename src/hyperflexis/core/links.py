"""What moves between instances costs time: the links' latency and bandwidth, and what is on its way already.

A *link* is a target's open connection to a source of KV. Which there are to be is policy/links.py's; how long the way
takes is measured when a link is made.

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
class KvSource:
    """Where the KV of an instance's requests is to be had."""

    address: str
    instance: str
    epoch: int


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
    """Who can get KV from whom, at what cost; and until when each instance's ports are taken.

    ``table``: by target, its sources, each with its measured link, or None while there is none. ``unheard``: pairs
    (target, source) of which nothing was heard yet. ``targets``: those of each source. ``orphans`` lost
    a source that is gone. ``usual`` is what is
    expected of a link that was not measured.
    """

    usual: Link = field(default_factory=Link)
    table: dict[str, dict[str, Link | None]] = field(default_factory=dict)
    unheard: set[tuple[str, str]] = field(default_factory=set)
    targets: dict[str, list[str]] = field(default_factory=dict)
    orphans: list[str] = field(default_factory=list)
    sends_until: dict[str, float] = field(default_factory=dict)
    receives_until: dict[str, float] = field(default_factory=dict)

    def is_up(self, source: str, target: str) -> bool:
        """Whether there is a link."""
        return self.table.get(target, {}).get(source) is not None

    def is_planned(self, source: str, target: str) -> bool:
        """Whether there is to be one."""
        return source in self.table.get(target, {})

    def awaits(self, instance: str) -> bool:
        """Whether some link from or to it is not heard of yet."""
        return any(instance in pair for pair in self.unheard)

    def plan(self, target: str, source: str) -> None:
        """There is to be a link."""
        if not self.is_planned(source, target):
            self.table.setdefault(target, {})[source] = None
            self.unheard.add((target, source))
            self.targets.setdefault(source, []).append(target)

    def drop(self, target: str, source: str) -> None:
        """There is to be none."""
        if self.is_planned(source, target):
            del self.table[target][source]
            self.unheard.discard((target, source))
            self.targets[source].remove(target)

    def heard(self, target: str, source: str, link: Link | None) -> None:
        """What became of a link that was planned."""
        if self.is_planned(source, target):
            self.table[target][source] = link
            self.unheard.discard((target, source))

    def between(self, source: str, target: str) -> Link:
        """What is known of the way from one to the other."""
        return self.table.get(target, {}).get(source) or self.usual

    def backlog_s(self, source: str, target: str, now: float) -> float:
        """Seconds until a transfer could begin."""
        return max(self.sends_until.get(source, now), self.receives_until.get(target, now), now) - now

    def exposed_s(self, source: str, target: str, size: float, left_s: float, last: float, now: float) -> float:
        """Seconds between the end of a prompt, in ``left_s``, and the arrival of its KV of ``size`` bytes, which leaves
        while it is computed but for the ``last`` bytes."""
        link = self.between(source, target)
        early_s = self.backlog_s(source, target, now) + size / link.bytes_per_s - left_s
        return link.latency_s + max(early_s, last / link.bytes_per_s)

    def add(self, source: str, target: str, size: float, now: float) -> None:
        """A transfer of ``size`` bytes is under way."""
        until = now + self.backlog_s(source, target, now) + size / self.between(source, target).bytes_per_s
        self.sends_until[source] = self.receives_until[target] = until

    def forget(self, instance: str) -> None:
        """An instance is gone."""
        self.sends_until.pop(instance, None)
        self.receives_until.pop(instance, None)
        for source in list(self.table.get(instance, {})):
            self.drop(instance, source)
        for target in list(self.targets.get(instance, [])):
            self.drop(target, instance)
            self.orphans.append(target)
        self.table.pop(instance, None)
        self.targets.pop(instance, None)

    def take_orphans(self) -> list[str]:
        """The targets that lost a source since the last call, each once."""
        orphans, self.orphans = self.orphans, []
        return list(dict.fromkeys(orphans))
