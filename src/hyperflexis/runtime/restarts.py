"""When a child that died is started again. Pure: the time is an argument.

The wait doubles from ``FIRST_DELAY_S`` to ``MAX_DELAY_S`` and starts over once the child has lived ``HEALTHY_S``. Five
deaths within a minute are a crash loop: it is said once, and the child is then tried every ``LOOP_DELAY_S`` only,
since what kills it (a wrong file, too little memory) rarely goes away by itself but sometimes does.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

FIRST_DELAY_S = 0.5
MAX_DELAY_S = 10.0
HEALTHY_S = 30.0
LOOP_DEATHS = 5
LOOP_WINDOW_S = 60.0
LOOP_DELAY_S = 30.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """Start again after ``delay_s``. ``loop_began`` is True for the death that made it a crash loop."""

    delay_s: float
    in_loop: bool
    loop_began: bool


class Restarts:
    """The deaths of one child."""

    def __init__(self) -> None:
        self._deaths: deque[float] = deque(maxlen=LOOP_DEATHS)
        self._delay_s = FIRST_DELAY_S
        self._in_loop = False

    def died(self, now: float, lived_s: float) -> Verdict:
        """The child ended at ``now`` after ``lived_s`` seconds."""
        if lived_s >= HEALTHY_S:
            self._delay_s = FIRST_DELAY_S
            self._deaths.clear()
            self._in_loop = False
        self._deaths.append(now)
        looping = len(self._deaths) == LOOP_DEATHS and now - self._deaths[0] <= LOOP_WINDOW_S
        # Once slowed down, deaths are too far apart for the window: only a healthy life ends the loop.
        began = looping and not self._in_loop
        self._in_loop |= looping
        delay_s, self._delay_s = self._delay_s, min(2.0 * self._delay_s, MAX_DELAY_S)
        return Verdict(LOOP_DELAY_S if self._in_loop else delay_s, self._in_loop, began)
