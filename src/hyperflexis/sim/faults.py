"""What goes wrong in a simulation, and when."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast

from ..errors import ConfigError

FaultKind = Literal["kill", "hang", "slow", "drain"]


@dataclass(frozen=True, slots=True)
class Fault:
    """At ``at_s`` instance number ``instance`` (from 0) is hit, for ``for_s`` seconds.

    ``kill``: its process ends, and a new one is ready after ``for_s``. ``hang``: its iteration stops for ``for_s``.
    ``slow``: iterations that begin meanwhile take ``factor`` times as long. ``drain``: it takes nothing new meanwhile,
    and what runs goes on elsewhere, if it can.
    """

    at_s: float
    instance: int
    kind: FaultKind
    for_s: float
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class LaunchFault:
    """Launch ``number`` (from 0) ends with a failure after its first phase, or hangs: it never comes up."""

    kind: Literal["fail", "hang"]
    number: int


_LAUNCH = re.compile(r"(fail|hang)-launch:(\d{1,6})")
_FAULT = re.compile(r"(kill|hang|slow|drain):(\d{1,6})@([\d.]+)\+([\d.]+)(?:x([\d.]+))?")


def parse_fault(text: str, instances: int) -> Fault:
    """``kill:0@60+10``: instance 0 is killed after 60 s and back 10 s later; ``slow:1@60+10x5``: five times as slow.

    Raises ConfigError saying what is wrong.
    """
    found = _FAULT.fullmatch(text)
    try:
        if found is None:
            raise ValueError
        at_s, for_s, factor = float(found[3]), float(found[4]), float(found[5] or 1.0)
    except ValueError:
        raise ConfigError(
            f"--fault {text!r} is not KIND:INSTANCE@SECONDS+SECONDS, as in kill:0@60+10, hang:1@30+5 or slow:1@60+10x5"
        ) from None
    if int(found[2]) >= instances:
        raise ConfigError(f"--fault {text!r}: there are instances 0 to {instances - 1}")
    if (found[1] == "slow") != (factor > 1.0):
        raise ConfigError(f"--fault {text!r}: a factor above 1 belongs to slow, as in slow:1@60+10x5")
    return Fault(at_s, int(found[2]), cast(FaultKind, found[1]), for_s, factor)


def parse_launch_fault(text: str) -> LaunchFault | None:
    """``fail-launch:0`` or ``hang-launch:2``; None for anything else."""
    found = _LAUNCH.fullmatch(text)
    return None if found is None else LaunchFault(cast(Literal["fail", "hang"], found[1]), int(found[2]))
