"""Requests that go on at another instance with their KV, in a simulation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..core import effects
from ..core.events import Event, HandoffFailed, InstanceLinked
from ..core.links import Links
from ..policy.handoff import LAYERS
from ..sequences import Sequence as BatcherSequence
from .client import Client
from .instance import Instance, Phase

LINK_S = 0.02
"""Seconds that it takes to make and to measure a link, as between processes of one host."""


class Fleet(Protocol):
    """What handoffs need of the driver."""

    block_size: int | None

    def find(self, id: str) -> Instance:
        """An instance by its id."""

    def tell(self, event: Event, now: float) -> None:
        """Let the controller know."""

    def push(self, at: float, phase: Phase, what: object) -> None:
        """Something is to happen."""

    def settle(self, instance: Instance, now: float, cut: bool = False) -> None:
        """Commit what is over of an instance's iterations."""

    def plan(self, instance: Instance, now: float) -> None:
        """Let an instance plan its next iterations."""

    def note_last_token(self, instance: Instance, seq: BatcherSequence) -> None:
        """A request runs there."""

    def lose(self, seq: BatcherSequence, moved_at: float, now: float, failed: bool = True) -> None:
        """A request's instance does not go on with it."""


@dataclass(slots=True, eq=False)
class Handoff:
    """A request on its way: ``leaves`` is what the ``source`` has of it and ``seq`` what the ``target`` will.
    ``is_there``: its KV is, but for what the iteration under way adds. ``over``: it has arrived, or is not to."""

    client: Client
    source: Instance
    target: Instance
    leaves: BatcherSequence
    seq: BatcherSequence
    is_there: bool = False
    is_parked: bool = False
    over: bool = False


class Handoffs:
    """All that are under way, over ``links``. ``count`` of them took ``exposed_s`` seconds more than their prompts."""

    def __init__(self, fleet: Fleet, links: Links) -> None:
        self._fleet = fleet
        self._links = links
        self.count = 0
        self.exposed_s = 0.0

    def link(self, order: effects.SetLinks, now: float) -> None:
        """Links are made and measured before the first request comes; later ones in LINK_S."""
        for source in order.sources:
            linked = InstanceLinked(order.instance, order.epoch, source.instance, source.epoch, self._links.usual)
            if now:
                self._fleet.push(now + LINK_S, Phase.HANDOFF, linked)
            else:
                self._fleet.tell(linked, now)

    def begin(self, client: Client, effect: effects.Handoff, now: float) -> None:
        """The target makes room, and the KV begins to move."""
        source, target = self._fleet.find(effect.source), self._fleet.find(effect.instance)
        self._fleet.settle(target, now, cut=True)
        leaves = client.seq
        assert leaves is not None
        seq = client.sequence(effect, self._fleet.block_size)
        found = target.batcher.expect(seq, now)
        if found is None:
            self._fleet.tell(HandoffFailed(client.id, source.info.id, source.info.epoch, "no room"), now)
            return
        handoff = client.handoff = Handoff(client, source, target, leaves, seq)
        size = float(max(leaves.num_tokens - found, 0) * source.info.kv_bytes_per_token)
        left_s, last = 0.0, 0.0
        if not leaves.output_tokens:  # its prompt ends with the iteration under way
            left_s, last = source.ends[-1] - now, size / LAYERS
            source.leaving.append(handoff)
        exposed_s = self._links.exposed_s(source.info.id, target.info.id, size, left_s, last, now)
        self._links.add(source.info.id, target.info.id, size, now)
        self.count += 1
        self.exposed_s += exposed_s
        self._fleet.push(now + left_s + exposed_s, Phase.HANDOFF, handoff)

    def kv_is_there(self, handoff: Handoff, now: float) -> None:
        """All but what an iteration under way adds."""
        source = handoff.source
        if handoff.over:
            return
        self._fleet.settle(source, now, cut=True)
        if handoff.is_parked or source.batch is None:
            self._go_on(handoff, now)
        else:
            handoff.is_there = True
            source.leaving.append(handoff)

    def _go_on(self, handoff: Handoff, now: float) -> None:
        """The source forgets the request, the target has it."""
        target = handoff.target
        handoff.source.batcher.cancel(handoff.client.id)
        handoff.client.moved(handoff.seq, target.info.id, handoff.leaves.output_tokens)
        handoff.over = True
        self._fleet.settle(target, now, cut=True)
        target.arriving.append(handoff)
        if target.batch is None:
            self._fleet.plan(target, now)

    def move_kv(self, instance: Instance, now: float) -> None:
        """What handoffs do between two iterations."""
        for seq in instance.returning:
            if instance.batcher.get(seq.id) is seq:
                instance.batcher.unpark(seq.id)
                self._fleet.note_last_token(instance, seq)
        instance.returning.clear()
        leaving, instance.leaving = instance.leaving, []
        for handoff in leaving:
            if handoff.over:
                continue
            if handoff.is_there:
                self._go_on(handoff, now)
            elif instance.batcher.runs(handoff.client.id):
                instance.batcher.park(handoff.client.id)
                handoff.is_parked = True
        arriving, instance.arriving = instance.arriving, []
        for handoff in arriving:
            seq, leaves = handoff.seq, handoff.leaves
            if instance.batcher.get(seq.id) is not seq:
                continue
            computed, output = leaves.computed, leaves.output_tokens
            if not instance.batcher.room_for(seq.id, leaves.num_tokens):
                instance.batcher.cancel(seq.id)
                self._fleet.lose(seq, now, now, failed=False)
                continue
            instance.batcher.arrived(seq.id, computed, range(output), now, leaves.first_token_at)
            self._fleet.note_last_token(instance, seq)

    def give_up(self, client: Client, seq: BatcherSequence, now: float) -> bool:
        """One side of a handoff is lost with ``seq``. True when the request goes on at its source."""
        handoff, client.handoff = client.handoff, None
        if handoff is None or handoff.over:
            return False
        handoff.over = True
        if seq is handoff.leaves:
            self._fleet.settle(handoff.target, now)
            handoff.target.batcher.cancel(client.id)
            return False
        source = handoff.source
        if handoff.is_parked:
            self._fleet.settle(source, now, cut=True)
            source.returning.append(handoff.leaves)
            if source.batch is None:
                self._fleet.plan(source, now)
        self._fleet.tell(HandoffFailed(client.id, source.info.id, source.info.epoch, "the target was lost"), now)
        return True
