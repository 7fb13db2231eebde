"""Where a choice runs: at one instance, or at two while it is handed over from one to the other."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.effects import Dispatch, Handoff
from .links import InstanceLink, InstanceLinks, Reader


@dataclass(slots=True, eq=False)
class Placement:
    """An attempt at an instance: the ``order`` that sent it there, and the ``number`` of its stream on the link."""

    attempt: int
    order: Dispatch | Handoff
    link: InstanceLink
    number: int = 0


class Placements:
    """The attempts of a choice that live, as its stream (core/stream.py) counts them."""

    def __init__(self, links: InstanceLinks, reader: Reader) -> None:
        self._links = links
        self._reader = reader
        self._live: dict[int, Placement] = {}

    @property
    def newest(self) -> Placement | None:
        """Where it is, or, while it is handed over, where it goes to."""
        return next(reversed(self._live.values()), None)

    def order(self, attempt: int) -> Dispatch | Handoff:
        """What sent a live attempt where it is. Raises KeyError when it is over."""
        return self._live[attempt].order

    def open(self, attempt: int, order: Dispatch | Handoff) -> None:
        """Begin a stream where the order says."""
        link = self._links.link(order.address, order.instance)
        placement = self._live[attempt] = Placement(attempt, order, link)
        placement.number = link.open(self._reader, attempt)

    def drop(self, attempt: int) -> Placement:
        """A live attempt ended at its instance. Returns what it was. Raises KeyError when it was over."""
        return self._live.pop(attempt)

    def cancel(self) -> None:
        """Nobody reads the answer any more: each instance that may still compute it is told."""
        for placement in self._live.values():
            placement.link.cancel(placement.number)
        self._live.clear()
