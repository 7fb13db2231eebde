"""Who sends weights to whom, when instances start: chains that reach many in about the time of one.

    chain       source -> receiver -> receiver -> ...     each passes on what it has while the rest still comes

A chunk is at the last of n receivers (n - 1) chunks' time after it is at the first, so a chain takes about

    (S + (n - 1) * chunk) / rate        instead of  n * S / rate  when one source serves them all

1. One chain for each source that is used. No node sends to more than one other, so all of its rate is one's.
2. A source sends at SHARE of what its link has free: its own traffic comes in bursts. Those whose requests have time to
   spare are used first; one that has none is used only where there is no other.
3. Each receiver joins the chain over which its bytes come fastest; among equals the nearer, then the shorter. So each
   leaf switch has a chain of its own where it has a source, and a slow way between leaves is crossed once.
4. In a chain near ones come first, and among those the fast ones: whoever is behind a slow link is slow himself, those
   before it are not, since each keeps all that it has got.
5. When a node fails, its successor goes on with its predecessor, which has no other now. When a source fails, its chain
   goes on behind the last of another one; where there is none, its head reads from disk and the others follow it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from ..core.instance import TOPOLOGY
from ..core.links import BYTES_PER_S

SHARE = 0.5
"""Of a source's free rate. Iterations exchange their KV and tokens in bursts; with half of the link free between them a
burst waits for one piece at most."""
MIN_CHUNK, MAX_CHUNK = 16 << 20, 64 << 20
"""Bytes. Below, what a chunk costs besides its bytes (a millisecond on a busy host) would be seen at 25 GB/s; above,
the last of a long chain would wait for long."""
FILL = 0.1
"""Share of a chain's time that filling it may take, where MIN_CHUNK allows that."""
HOP_S = 2e-4
"""From a chunk's arrival until it leaves again: the turns of two threads on a host that is busy."""
MIN_SLACK_S = 0.05
"""A source whose tightest request has less time to spare than an iteration takes is not to be disturbed."""


@dataclass(frozen=True, slots=True)
class Node:
    """One end: ``free`` is what its link has free, bytes per second each way. For topology ``labels`` see InstanceInfo.
    Of a source, ``slack_s`` is the time that its tightest running request has to spare."""

    id: str
    free: float = BYTES_PER_S
    labels: Mapping[str, str] = field(default_factory=dict)
    slack_s: float = inf


@dataclass(frozen=True, slots=True)
class Hop:
    """From one to the next: ``rate`` is the most that the sender is to send, bytes per second."""

    sender: str | None
    receiver: str
    rate: float
    done_s: float


@dataclass(frozen=True, slots=True)
class Chain:
    """``hops`` in their order, each receiver the next one's sender. The first sender is None where there is no source:
    that receiver reads from disk."""

    hops: tuple[Hop, ...]

    @property
    def source(self) -> str | None:
        """Who begins."""
        return self.hops[0].sender

    @property
    def receivers(self) -> tuple[str, ...]:
        """In their order."""
        return tuple(hop.receiver for hop in self.hops)


@dataclass(frozen=True, slots=True)
class Plan:
    """``chunk`` in bytes. A hop's ``done_s`` counts from the beginning."""

    chains: tuple[Chain, ...]
    chunk: int

    @property
    def done_s(self) -> float:
        """When the last is expected to have everything."""
        return max((hop.done_s for chain in self.chains for hop in chain.hops), default=0.0)

    def senders_for(self, receiver: str) -> tuple[str, ...]:
        """Whom a receiver asks, in this order: its predecessor, that one's predecessor, ..., the source of its chain,
        then those of the others."""
        chain = next(chain for chain in self.chains if receiver in chain.receivers)
        before = [hop.sender for hop in chain.hops[: chain.receivers.index(receiver) + 1]]
        others = [one.source for one in self.chains if one is not chain]
        return tuple(sender for sender in [*reversed(before), *others] if sender is not None)


@dataclass(frozen=True, slots=True)
class Network:
    """What is known of the way between two nodes: ``measured`` rates by (sender, receiver), where there are any."""

    nodes: Mapping[str, Node]
    measured: Mapping[tuple[str, str], float] = field(default_factory=dict)

    def rate(self, sender: str, receiver: str, is_source: bool) -> float:
        """Bytes per second."""
        free = self.nodes[sender].free * (SHARE if is_source else 1.0)
        return min(free, self.nodes[receiver].free, self.measured.get((sender, receiver), inf))

    def distance(self, one: str, other: str) -> int:
        """0: the same host, 1: the same rack, 2: the same zone, 3: neither."""
        mine, theirs = self.nodes[one].labels, self.nodes[other].labels
        for level, name in enumerate(TOPOLOGY):
            if name in mine and mine[name] == theirs.get(name):
                return level
        return len(TOPOLOGY)


def plan(
    size: int, sources: Sequence[Node], receivers: Sequence[Node], measured: Mapping[tuple[str, str], float]
) -> Plan:
    """Chains for ``size`` bytes of weights to all receivers."""
    network = Network({node.id: node for node in (*sources, *receivers)}, measured)
    chunk = chunk_for(size, -(-len(receivers) // max(len(sources), 1)))
    easy = [one for one in sources if one.slack_s >= MIN_SLACK_S and one.free > 0.0]
    used = easy or sorted(sources, key=lambda one: (-one.slack_s, one.id))[:1]
    if not used:
        return Plan(_from_disk(network, size, chunk, [one.id for one in receivers]), chunk)
    order: dict[str, list[str]] = {one.id: [] for one in sorted(used, key=lambda one: (-one.slack_s, one.id))}

    def joined(source: str, receiver: Node) -> list[str]:
        """The chain's receivers with this one among them, where it belongs."""
        return sorted([*order[source], receiver.id], key=lambda id: _rank(network, source, id))

    def cost(source: str, receiver: Node) -> tuple[float, int, int]:
        hops = _timed(network, size, chunk, source, joined(source, receiver)).hops
        way = hops[: 1 + next(i for i, hop in enumerate(hops) if hop.receiver == receiver.id)]
        return -min(hop.rate for hop in way), network.distance(source, receiver.id), len(order[source])

    for receiver in sorted(receivers, key=lambda one: (-one.free, one.id)):
        source = min(order, key=lambda source: cost(source, receiver))
        order[source] = joined(source, receiver)
    chains = (_timed(network, size, chunk, source, ids) for source, ids in order.items() if ids)
    return Plan(tuple(chains), chunk)


def replan(old: Plan, size: int, network: Network, failed: Collection[str], complete: Collection[str] = ()) -> Plan:
    """``old`` without those that ``failed``; the times are as if all began anew, since what each has already is its own
    business. ``complete``: receivers that have all weights; one of them takes the place of a source that failed."""
    whole: list[tuple[str, list[str]]] = []
    orphans: list[str] = []
    for chain in old.chains:
        alive = [id for id in chain.receivers if id not in failed]
        if chain.source is not None and chain.source not in failed:
            whole.append((chain.source, alive))
        elif any(id in complete for id in alive):
            head = next(id for id in alive if id in complete)
            whole.append((head, [id for id in alive if id != head]))
        else:
            orphans += alive
    if orphans and not whole:
        return Plan(_from_disk(network, size, old.chunk, orphans), old.chunk)
    if orphans:
        shortest = min(range(len(whole)), key=lambda i: len(whole[i][1]))
        whole[shortest] = (whole[shortest][0], whole[shortest][1] + orphans)
    chains = (_timed(network, size, old.chunk, source, ids) for source, ids in whole if ids)
    return Plan(tuple(chains), old.chunk)


def chunk_for(size: int, length: int) -> int:
    """Bytes of a chunk in a chain of ``length`` receivers: as large as filling the chain allows."""
    return int(min(max(FILL * size / max(length - 1, 1), MIN_CHUNK), MAX_CHUNK))


def _rank(network: Network, source: str, receiver: str) -> tuple[int, tuple[str, ...], float, str]:
    """Near first; then what is in one place together; then the fast ones."""
    node = network.nodes[receiver]
    place = tuple(node.labels.get(name, "") for name in reversed(TOPOLOGY))
    return network.distance(source, receiver), place, -node.free, receiver


def _timed(network: Network, size: int, chunk: int, source: str | None, receivers: Sequence[str]) -> Chain:
    """The chain with its rates and times. Behind a slow hop nothing is faster, and each hop adds a chunk."""
    hops: list[Hop] = []
    sender, slowest, filled_s = source, inf, 0.0
    for receiver in receivers:
        rate = inf if sender is None else network.rate(sender, receiver, sender == source)
        if sender is not None:
            slowest = min(slowest, rate)
            hops.append(Hop(sender, receiver, rate, filled_s + HOP_S + size / slowest))
            filled_s += HOP_S + min(chunk, size) / rate
        else:
            hops.append(Hop(None, receiver, rate, 0.0))
        sender = receiver
    return Chain(tuple(hops))


def _from_disk(network: Network, size: int, chunk: int, receivers: Sequence[str]) -> tuple[Chain, ...]:
    return (_timed(network, size, chunk, None, receivers),) if receivers else ()
