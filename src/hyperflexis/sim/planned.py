"""The roles that a planner gives to a fleet before it serves: it knows the workload's mean rates, not its bursts."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.latency import share_left
from ..core.profile import Profile
from ..policy.budget import CAP_S
from ..policy.roles import first_prefill
from .workload import Arrival


def planned_prefill(arrivals: Sequence[Arrival], profile: Profile, instances: int, duration_s: float) -> int:
    """How many of ``instances`` begin with prompts alone when ``arrivals`` come in ``duration_s``."""
    latency = profile.coefficients
    prefill_s = sum(latency.prefill_s(one.num_prompt_tokens) for one in arrivals)
    decode_s = sum(
        latency.output_s(one.num_output_tokens, one.num_prompt_tokens)
        / share_left(latency.c0, min(_pace_s(one), CAP_S))
        for one in arrivals
    )
    pace_s = max(min(min(map(_pace_s, arrivals), default=CAP_S), CAP_S), latency.c0)
    return first_prefill(
        prefill_s / duration_s / share_left(latency.c0, CAP_S),
        decode_s / duration_s,
        latency.c0,
        pace_s,
        instances,
    )


def _pace_s(one: Arrival) -> float:
    return one.slo.pace_s(one.num_output_tokens, one.slo.first_token_by_s(one.num_output_tokens))
