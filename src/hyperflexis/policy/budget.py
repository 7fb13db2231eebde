"""From slack to the time budget of one iteration.

A decode that is due at ``d`` and was promised a pace of tau seconds per token has slack s = d - now. One iteration
may last until the tightest of them runs out, less a small lead that each decode keeps once (a shorter step each time
would pay the fixed cost c0 more often). A decode ahead of its pace may spend its lead in one long step (bank 1): that
is when prompts get in. A decode that has lost its promise for good does not bind: slowing others cannot help it.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from typing import Protocol

CAP_S = 0.150
"""The longest planned iteration with prompts: an arrival waits for about this at most. 100-400 ms differ little."""
LEAD = 0.1
"""Share of its pace that each decode keeps in hand against a slow iteration, besides the model's q90 error."""
MAX_LEAD = 1.0
"""More than a whole token in hand costs prompts more than it saves decodes."""
PACE_MARGIN = 0.95
"""A steady decode iteration may take this share of the tightest pace."""
SHORTEST = 0.6
"""A decode behind its lead still grants this share of its pace, so that it recovers over a few steps, not in one."""


class Pace(Protocol):
    """What the budget needs to know of a running request; times in seconds of the caller's clock."""

    @property
    def next_due(self) -> float:
        """When its next token is due."""

    @property
    def pace_s(self) -> float:
        """Seconds allowed per output token (inf: nothing promised)."""

    @property
    def missed_first(self) -> bool:
        """True when its first token was late: the request's promise is already broken."""

    @property
    def expected_remaining(self) -> float:
        """Output tokens still expected, at least 1."""


def is_lost(job: Pace, now: float, step_s: float) -> bool:
    """True when the request misses its SLO whatever is done: late first token, or so far behind that steps of
    ``step_s`` seconds do not catch up before its expected end."""
    if job.missed_first:
        return True
    behind = now + step_s - job.next_due
    return behind > 0.0 and behind > (job.expected_remaining - 1.0) * max(job.pace_s - step_s, 0.0)


def iteration_s(now: float, running: Iterable[Pace], decode_s: float, q90: float = 0.0) -> float:
    """The longest that the next iteration may last: at most CAP_S, at least nothing.

    ``decode_s`` is the predicted duration of an iteration that only decodes, ``q90`` the relative error that nine in
    ten predictions stay under: the noisier the device, the more each decode keeps in hand.
    """
    budget = CAP_S
    lead = min(LEAD + q90, MAX_LEAD)
    for job in running:
        pace = job.pace_s
        if pace == inf or is_lost(job, now, decode_s):
            continue
        slack = job.next_due - now - lead * pace
        usable = slack if slack > pace else max(slack, SHORTEST * pace)
        if usable < budget:
            budget = usable
    return budget
