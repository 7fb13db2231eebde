"""Placement does not see which instance has which prefix; all reuse what they have, and count their work so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hyperflexis.core.cluster import TrackedInstance, TrackedRequest
from hyperflexis.policy import place as hyperflexis
from hyperflexis.policy.catalog import POLICIES
from hyperflexis.policy.place import PlaceMemory, Placement


def place(
    now: float, tracked: TrackedRequest, ready: Sequence[TrackedInstance], memory: PlaceMemory
) -> tuple[Placement, PlaceMemory]:
    """HyperFlexis' placement of a request whose prompt nobody has seen."""
    unseen = replace(tracked, request=replace(tracked.request, prefix_keys=()))
    return hyperflexis.place(now, unseen, ready, memory)


POLICY = replace(POLICIES["hyperflexis"], place=place)
