"""What goes wrong in a simulation, and when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FaultKind = Literal["kill", "hang", "slow"]


@dataclass(frozen=True, slots=True)
class Fault:
    """At ``at_s`` instance number ``instance`` (from 0) is hit, for ``for_s`` seconds.

    ``kill``: its process ends, and a new one is ready after ``for_s``. ``hang``: its iteration stops for ``for_s``.
    ``slow``: iterations that begin meanwhile take ``factor`` times as long.
    """

    at_s: float
    instance: int
    kind: FaultKind
    for_s: float
    factor: float = 1.0
