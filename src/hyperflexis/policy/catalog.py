"""All policies by name: where a request goes, and what an instance runs next."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from . import place, step
from .baselines import first_come
from .baselines import place as baselines
from .place import PlacePolicy
from .step import StepPolicy


@dataclass(frozen=True, slots=True)
class StepFunctions:
    """What decides one instance's iterations: the next batch, and whom to preempt when KV runs out."""

    plan: StepPolicy[Any]
    victim: Callable[[float, Collection[Any]], Any]


STEPS: dict[str, StepFunctions] = {
    "hyperflexis": StepFunctions(step.plan, step.victim),
    "first_come": StepFunctions(first_come.plan, first_come.victim),
}


@dataclass(frozen=True, slots=True)
class Policy:
    """A placement and the name of the step policy (a key of STEPS) that belongs with it."""

    place: PlacePolicy
    step: str


POLICIES: dict[str, Policy] = {
    "hyperflexis": Policy(place.place, "hyperflexis"),
    "round_robin": Policy(baselines.round_robin, "first_come"),
    "least_loaded": Policy(baselines.least_loaded, "first_come"),
}
