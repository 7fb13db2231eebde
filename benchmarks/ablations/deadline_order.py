"""The queue in deadline order and nobody demoted: where not all can be on time, all become late together."""

from collections.abc import Sequence
from typing import Any

from benchmarks.ablations import altered, stepping

from hyperflexis.policy import step


def everything(ordered: Sequence[Any], start: float = 0.0, speed: float = 1.0) -> Sequence[Any]:
    """In place of the on-time subset."""
    return ordered


swapped = altered(step, on_time_subset=everything)
POLICY = stepping(__name__, swapped)
