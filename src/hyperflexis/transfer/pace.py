"""A rate that several threads keep to together, and that may be changed while they wait."""

from __future__ import annotations

import threading
import time
from math import inf

BURST_S = 0.02
"""Seconds of the rate that may leave at once: a few turns of the scheduler, and well below a decode's pace."""


class TokenBucket:
    """Lets ``bytes_per_s`` through; None: everything."""

    def __init__(self, bytes_per_s: float | None = None) -> None:
        self._changed = threading.Condition()
        self._rate = _checked(bytes_per_s)
        self._credit = 0.0
        self._at = time.monotonic()

    def set_rate(self, bytes_per_s: float | None) -> None:
        """From now on, for those who wait too. Raises ValueError unless it is positive."""
        with self._changed:
            self._refill()
            self._rate = _checked(bytes_per_s)
            self._credit = min(self._credit, 0.0 if self._rate == inf else self._rate * BURST_S)
            self._changed.notify_all()

    def at_once(self, most: int) -> int:
        """How many bytes are to be taken at a time, so that the rate is even."""
        return int(min(self._rate * BURST_S, most))

    def take(self, size: int) -> None:
        """Wait until ``size`` bytes may leave. Who takes more than there is leaves a debt, for which the next waits."""
        with self._changed:
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
