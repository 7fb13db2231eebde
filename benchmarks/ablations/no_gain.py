"""Placement by load alone, prefixes counted, whatever becomes late by it."""

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
    """HyperFlexis' placement at the cheapest of its candidates, without a look at the others' queues."""
    request = tracked.request
    offers = [hyperflexis._Offer(instance, request) for instance in hyperflexis._candidates(request, ready)]
    cheapest = min(offers, key=hyperflexis._COST)
    return hyperflexis._evaluate(now, tracked, cheapest, len(ready)), memory


POLICY = replace(POLICIES["hyperflexis"], place=place)
