"""A rate, and a share of the time, that several threads keep to together, and that may be changed while they wait.

The rate is the link's part: bytes per second. The share is the host's: whoever serves requests beside has its cores and
its memory disturbed by sending, however fast the link is. So after each piece a sender rests, for as long as makes its
work that share of the time.
"""

from __future__ import annotations

import threading
import time
from math import inf

BURST_S = 0.02
"""Seconds of the rate that may leave at once: a few turns of the scheduler, and well below a decode's pace."""
MAX_REST_S = 0.25
"""After a piece. What would rest for longer was held up by the link, not by a core, and who waits would give up."""
SMALL = 512 << 10
"""Bytes that leave at once beside requests: a fraction of a millisecond."""


class TokenBucket:
    """Lets ``bytes_per_s`` through; None: everything."""

    def __init__(self, bytes_per_s: float | None = None) -> None:
        self._changed = threading.Condition()
        self._rate = _checked(bytes_per_s)
        self._credit = 0.0
        self._at = time.monotonic()
        self._share = 1.0
        self._rests_until = self._at

    def set_rate(self, bytes_per_s: float | None) -> None:
        """From now on, for those who wait too. Raises ValueError unless it is positive."""
        with self._changed:
            self._refill()
            self._rate = _checked(bytes_per_s)
            self._credit = min(self._credit, 0.0 if self._rate == inf else self._rate * BURST_S)
            self._changed.notify_all()

    def set_share(self, share: float) -> None:
        """Of the time that may be spent on sending from now on, in (0, 1]; 1: all. Who rests then may go on."""
        assert 0.0 < share <= 1.0
        if share == self._share:
            return
        with self._changed:
            self._share = share
            self._rests_until = min(self._rests_until, time.monotonic())
            self._changed.notify_all()

    def at_once(self, most: int) -> int:
        """How many bytes are to be taken at a time, so that the rate is even."""
        return int(min(self._rate * BURST_S, most if self._share == 1.0 else min(most, SMALL)))

    def worked(self, seconds: float) -> None:
        """Sending something took so long: nobody sends before that is the share of the time, or MAX_REST_S is over."""
        if self._share < 1.0:
            with self._changed:
                now = time.monotonic()
                rest_s = seconds * (1.0 / self._share - 1.0)
                self._rests_until = min(max(self._rests_until, now) + rest_s, now + MAX_REST_S)

    def take(self, size: int) -> None:
        """Wait until ``size`` bytes may leave. Who takes more than there is leaves a debt, for which the next waits."""
        with self._changed:
            while (rest_s := self._rests_until - time.monotonic()) > 0.0 and self._share < 1.0:
                self._changed.wait(rest_s)
            while self._rate < inf:
                self._refill()
                if self._credit >= 0.0:
                    self._credit -= size
                    return
                self._changed.wait(-self._credit / self._rate)

    def _refill(self) -> None:
        now = time.monotonic()
        if self._rate < inf:
            self._credit = min(self._credit + (now - self._at) * self._rate, self._rate * BURST_S)
        self._at = now


def _checked(bytes_per_s: float | None) -> float:
    if bytes_per_s is None:
        return inf
    if not bytes_per_s > 0.0:
        raise ValueError(f"a rate of {bytes_per_s} bytes per second")
    return bytes_per_s
