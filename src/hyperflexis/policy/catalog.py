"""All policies by name: where a request goes, what an instance runs next, and how many instances there are.

NAME                          `edf`
NAME@CHUNK                    `edf@512`: at most 512 tokens in an iteration, whatever the instance's own limit
reject_at_door@CHUNK,MARGIN   `reject_at_door@512,1.2`: refuses what is predicted within a fifth of its deadline

Scalers have a catalog of their own: NAME or NAME@NUMBER,..., as in `concurrency@8,30,300`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from math import isfinite
from typing import Any

from ..errors import ConfigError
from . import handoff, place, scale, step
from .baselines import door, edf, first_come, prefill_first, priority
from .baselines import handoff as decoding
from .baselines import place as baselines
from .baselines import scale as scalers
from .handoff import DecodePolicy
from .place import PlacePolicy
from .scale import ScalePolicy
from .step import StepPolicy


@dataclass(frozen=True, slots=True)
class StepFunctions:
    """What decides one instance's iterations: the next batch, and whom to preempt when KV runs out."""

    plan: StepPolicy[Any]
    victim: Callable[[float, Collection[Any]], Any]


STEPS: dict[str, StepFunctions] = {
    "hyperflexis": StepFunctions(step.plan, step.victim),
    "first_come": StepFunctions(first_come.plan, first_come.victim),
    "prefill_first": StepFunctions(prefill_first.plan, first_come.victim),
    "edf": StepFunctions(edf.plan, first_come.victim),
    "priority": StepFunctions(priority.plan, priority.victim),
}


@dataclass(frozen=True, slots=True)
class Policy:
    """A placement and the name of the step policy (a key of STEPS) that belongs with it. ``decode`` says where a prompt
    that was computed on a prefill instance decodes, in fleets that have such.

    ``chunk`` is the most tokens of an iteration, in place of the instance's own limit. With ``fail_fast`` a request
    that the placement does not expect on time is refused, whether its client chose so or not. With ``fair`` a request
    beyond its tenant's fair share (core/shares.py) counts for less.
    """

    place: PlacePolicy
    step: str
    chunk: int | None = None
    fail_fast: bool = False
    fair: bool = False
    decode: DecodePolicy = decoding.fewest_requests


POLICIES: dict[str, Policy] = {
    "hyperflexis": Policy(place.place, "hyperflexis", fair=True, decode=handoff.choose),
    "round_robin": Policy(baselines.round_robin, "first_come", decode=decoding.in_turn),
    "least_loaded": Policy(baselines.least_loaded, "first_come"),
    "power_of_two": Policy(baselines.power_of_two, "first_come"),
    "prefill_first": Policy(baselines.least_loaded, "prefill_first"),
    "edf": Policy(baselines.least_work, "edf"),
    "priority": Policy(baselines.least_loaded, "priority"),
    "kv_aware": Policy(baselines.kv_aware, "first_come", decode=decoding.least_kv),
    "reject_at_door": Policy(door.reject_at_door, "edf", fail_fast=True),
}


def find_policy(spec: str) -> Policy:
    """The policy that ``spec`` names, in one of the forms above. Raises ConfigError saying what is wrong with it."""
    name, at, numbers = spec.partition("@")
    policy = POLICIES.get(name)
    if policy is None:
        close = get_close_matches(name, POLICIES, n=2)
        guess = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(f"no policy is named {name!r}{guess} (policies: {', '.join(POLICIES)})")
    if not at:
        return policy
    chunk, comma, margin = numbers.partition(",")
    policy = replace(policy, chunk=_chunk(chunk, spec))
    if not comma:
        return policy
    if name != "reject_at_door":
        raise ConfigError(f"policy {spec!r}: only reject_at_door takes a margin; write {name}@{chunk}")
    return replace(policy, place=partial(door.reject_at_door, margin=_margin(margin, spec)))


SCALERS: dict[str, Callable[..., ScalePolicy]] = {
    "forecast": lambda: scale.desired,
    "fixed": scalers.fixed,
    "reactive": scalers.reactive,
    "concurrency": scalers.concurrency,
    "saturation": scalers.saturation,
    "rate": scalers.rate,
    "follow": scalers.follow,
}
"""By name, what makes a scaler of the numbers behind the @."""


def find_scaler(spec: str) -> ScalePolicy:
    """The scaler that ``spec`` names. Raises ConfigError saying what is wrong with it."""
    name, _, numbers = spec.partition("@")
    if name not in SCALERS:
        raise ConfigError(f"no scaler is named {name!r} (scalers: {', '.join(SCALERS)})")
    try:
        values = [float(text) for text in numbers.split(",") if text]
        if not all(isfinite(value) and value >= 0.0 for value in values):
            raise ValueError
        return SCALERS[name](*values)
    except (ValueError, TypeError):
        raise ConfigError(f"scaler {spec!r}: {numbers!r} are not the numbers that {name} takes") from None


def split_specs(text: str) -> list[str]:
    """The parts of a comma-separated list of policies, each once. A comma before a number belongs to a margin."""
    return list(dict.fromkeys(re.split(r",(?![0-9.]+(?:,|$))", text)))


def _chunk(text: str, spec: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) == 0:
        raise ConfigError(f"policy {spec!r}: {text!r} is no number of tokens; write it as in edf@512")
    return int(text)


def _margin(text: str, spec: str) -> float:
    try:
        margin = float(text)
    except ValueError:
        margin = 0.0
    if not (isfinite(margin) and margin > 0.0):
        raise ConfigError(
            f"policy {spec!r}: margin {text!r} is no number above 0; write it as in reject_at_door@512,1.2"
        )
    return margin
