"""Service-level objectives (SLOs): what one request was promised, and what that means in time.

All durations are seconds. ``ttft_s``: arrival at our gateway until the first token is sent.
``tpot_s``: (e2e - ttft) / (output tokens - 1). ``e2e_s``: arrival until the last token is sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf


@dataclass(frozen=True, slots=True)
class Slo:
    """A request's latency promise. ``None`` means that nothing is promised for that figure."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def over(self, weaker: Slo) -> Slo:
        """This SLO with its unset fields taken from ``weaker``."""
        return Slo(
            ttft_s=weaker.ttft_s if self.ttft_s is None else self.ttft_s,
            tpot_s=weaker.tpot_s if self.tpot_s is None else self.tpot_s,
            e2e_s=weaker.e2e_s if self.e2e_s is None else self.e2e_s,
        )

    def names(self) -> str:
        """The fields that promise something, as clients write them: ``ttft_ms, e2e_ms``."""
        fields = {"ttft_ms": self.ttft_s, "tpot_ms": self.tpot_s, "e2e_ms": self.e2e_s}
        return ", ".join(name for name, value in fields.items() if value is not None) or "none"

    def tighter_than(self, floor: Slo) -> str | None:
        """The name of a field that promises more than ``floor`` does, or None."""
        for name in ("ttft_s", "tpot_s", "e2e_s"):
            ours, allowed = getattr(self, name), getattr(floor, name)
            if ours is not None and allowed is not None and ours < allowed:
                return name
        return None

    def first_token_by_s(self, expected_output_tokens: float) -> float:
        """Seconds after arrival by which the first token is due (``inf`` when nothing is promised).

        With only an end-to-end promise, the first token takes a share of it: one part in
        ``expected_output_tokens + 1``, but never less than a quarter, since prefill costs more than a step.
        """
        due = inf if self.ttft_s is None else self.ttft_s
        if self.e2e_s is not None:
            due = min(due, self.e2e_s * max(0.25, 1.0 / (expected_output_tokens + 1.0)))
        return due

    def pace_s(self, expected_output_tokens: float, ttft_s: float) -> float:
        """Seconds allowed per output token after a first token at ``ttft_s`` (``inf`` when nothing is promised)."""
        pace = inf if self.tpot_s is None else self.tpot_s
        if self.e2e_s is not None:
            remaining = max(self.e2e_s - ttft_s, 0.0)
            pace = min(pace, remaining / max(expected_output_tokens - 1.0, 1.0))
        return pace

    def is_met(self, ttft_s: float, e2e_s: float, num_output_tokens: int) -> bool:
        """Strict attainment: every promise holds. With one output token TPOT holds."""
        return (
            self.is_first_met(ttft_s)
            and self.is_pace_met(ttft_s, e2e_s, num_output_tokens)
            and (self.e2e_s is None or e2e_s <= self.e2e_s)
        )

    def is_first_met(self, ttft_s: float) -> bool:
        """The prefill stage's promise: TTFT."""
        return self.ttft_s is None or ttft_s <= self.ttft_s

    def is_pace_met(self, ttft_s: float, e2e_s: float, num_output_tokens: int) -> bool:
        """The decode stage's: TPOT."""
        if self.tpot_s is None or num_output_tokens <= 1:
            return True
        return (e2e_s - ttft_s) / (num_output_tokens - 1) <= self.tpot_s


@dataclass(frozen=True, slots=True)
class SloClass:
    """A named promise of the fleet. ``priority`` multiplies a request's value; ``target`` is the wanted attainment."""

    name: str
    slo: Slo
    priority: float = 1.0
    target: float = 0.99
