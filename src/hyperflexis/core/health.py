"""Is an instance as fast as its latency model says? If not, it is *suspected*: it gets no new work for a while, its
requests go on elsewhere, and then it is tried again.

    hung   no iteration for HANG_S + HANG_FACTOR times the longest one that the model expects of it, with work to do
    slow   its latest WINDOW_S seconds of work took SLOW_FACTOR times as long, compared with the model, as it usually
           does: a model that is wrong from the start, or a host on which all is slow, raises no suspicion for long

An instance whose iterations are *guessed* from what a server sends has GUESSED_HANG_S, and is never called slow.

Each suspicion suspends an instance twice as long as the one before. The first report after that ends it; an instance
that still hangs sends none, and one that is still slow is suspected again, unless its fit has learnt by then how slow
it is: then placement knows what to expect of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

WATCH_S = 0.25
"""How often the controller looks."""
HANG_S = 1.0
"""What reports, scheduling and a busy host may take, at most; reports come every 0.1 s from an instance that works."""
GUESSED_HANG_S = 15.0
"""A server may compute prompts in an order of its own, compile or preempt meanwhile, and a request that is taken from
it begins anew elsewhere."""
HANG_FACTOR = 5.0
SLOW_FACTOR = 3.0
WINDOW_S = 0.3
"""Work after which what was seen before counts half."""
SEEN_S = 0.3
"""Work that must be seen before it says anything."""
USUAL_S = 10.0
"""The same for what is usual."""
FIRST_HOLD_S, MAX_HOLD_S = 2.0, 60.0


@dataclass(slots=True, eq=False)
class Health:
    """``alive_at``: when the instance last moved or had nothing to do. ``work_s`` and ``expected_s`` are its fading
    window, ``usual`` the usual ratio of the two (0: not known yet). ``until``: how long it is suspended."""

    alive_at: float = -inf
    work_s: float = 0.0
    expected_s: float = 0.0
    usual: float = 0.0
    suspicions: int = 0
    suspected_at: float = -inf
    until: float = -inf

    def worked(self, now: float, work_s: float, expected_s: float) -> None:
        """Iterations that took ``work_s`` where the model expects ``expected_s`` are over at ``now``."""
        self.alive_at = max(self.alive_at, now)
        if expected_s <= 0.0:
            return
        fade = 0.5 ** (work_s / WINDOW_S)
        self.work_s = fade * self.work_s + work_s
        self.expected_s = fade * self.expected_s + expected_s
        if self.work_s >= SEEN_S and not self.is_slow():
            ratio = self.work_s / self.expected_s
            share = 1.0 if not self.usual else 1.0 - 0.5 ** (work_s / USUAL_S)
            self.usual += share * (ratio - self.usual)

    def is_slow(self) -> bool:
        """See the module."""
        usual = max(self.usual, 1.0)
        return self.usual > 0.0 and self.work_s >= SEEN_S and self.work_s > SLOW_FACTOR * usual * self.expected_s

    def is_hung(self, now: float, iteration_s: float, guessed: bool = False) -> bool:
        """See the module; ``iteration_s`` is the longest iteration that is expected."""
        limit_s = GUESSED_HANG_S if guessed else HANG_S
        return now - self.alive_at > limit_s + HANG_FACTOR * iteration_s

    def suspect(self, now: float) -> float:
        """Suspend it; returns for how long, in seconds."""
        if now - self.suspected_at > 2.0 * MAX_HOLD_S:
            self.suspicions = 0
        hold_s = min(FIRST_HOLD_S * 2.0**self.suspicions, MAX_HOLD_S)
        self.suspicions += 1
        self.suspected_at, self.until = now, now + hold_s
        return hold_s

    def trust(self, now: float) -> None:
        """It is tried again: what was seen before does not count."""
        self.alive_at = now
        self.work_s = self.expected_s = 0.0
