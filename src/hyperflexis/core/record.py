"""What became of one request, as its client saw it: what the bench and the simulator both report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .slo import Slo

RecordOutcome = Literal["finished", "rejected", "failed", "unfinished", "cancelled"]
"""``rejected``: refused before its first token. ``failed``: ended by an error. ``unfinished``: still open when the
run's time limit came. ``cancelled``: ended by the client; the only outcome that is no miss."""


@dataclass(frozen=True, slots=True)
class Record:
    """One request's end. ``arrived_at`` is seconds after the start of the run; ``ttft_s`` and ``e2e_s`` are seconds
    after arrival, None when there was no first or no last token. ``num_output_tokens`` is what was asked for,
    ``received_tokens`` what came. ``pause_s`` is the longest time without a token while it moved from an instance to
    another, where that is known."""

    slo_class: str
    slo: Slo
    arrived_at: float
    num_prompt_tokens: int
    num_output_tokens: int
    outcome: RecordOutcome
    ttft_s: float | None = None
    e2e_s: float | None = None
    received_tokens: int = 0
    instance: str = ""
    detail: str = ""
    pause_s: float = 0.0

    @property
    def is_attained(self) -> bool:
        """Strict: it finished and every promise held."""
        if self.outcome != "finished" or self.ttft_s is None or self.e2e_s is None:
            return False
        return self.slo.is_met(self.ttft_s, self.e2e_s, self.received_tokens)

    @property
    def is_first_attained(self) -> bool:
        """The promise of the prefill stage held: its first token came in time."""
        return self.ttft_s is not None and self.slo.is_first_met(self.ttft_s)

    @property
    def is_pace_attained(self) -> bool:
        """The promise of the decode stage held: it finished at its pace."""
        if self.outcome != "finished" or self.ttft_s is None or self.e2e_s is None:
            return False
        return self.slo.is_pace_met(self.ttft_s, self.e2e_s, self.received_tokens)

    @property
    def tpot_s(self) -> float | None:
        """Seconds per output token after the first; None unless it finished with at least two tokens."""
        if self.outcome != "finished" or self.ttft_s is None or self.e2e_s is None or self.received_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.received_tokens - 1)


@dataclass(frozen=True, slots=True)
class Run:
    """All requests of one run. Arrivals lie in 0..``duration_s``; the last request ended, or was given up, at
    ``ended_s`` after the start."""

    records: tuple[Record, ...]
    duration_s: float
    ended_s: float
