"""A request as its client sees it: the gateway's part of a simulation, on the gateway's own stream code."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Any

from ..core.effects import Dispatch, Handoff
from ..core.events import RequestArrived
from ..core.record import Record, RecordOutcome
from ..core.request import Request
from ..core.stream import Loss, Stream, continued, due
from ..sequences import Sequence
from .workload import Arrival, block_keys

GATEWAY = "gateway"


@dataclass(slots=True, eq=False)
class Client:
    """``request`` is what was asked first. ``seq`` is what its instance has of it, and ``length`` the output tokens
    that it will compute, which no scheduler knows. ``first_token_at`` is on the run's clock. Tokens of ``stream`` are
    their positions. ``handoff`` is under way; ``carried`` are the output tokens that came with the last one."""

    arrival: Arrival
    request: Request
    stream: Stream = field(init=False)
    seq: Sequence | None = None
    instance: str = ""
    length: int = 0
    avoid: str | None = None
    first_token_at: float | None = None
    ended: bool = False
    paused_at: float | None = None
    pause_s: float = 0.0
    handoff: Any = None
    carried: int = 0

    def __post_init__(self) -> None:
        self.stream = Stream(self.request.max_output_tokens)

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.id

    @property
    def num_tokens(self) -> int:
        """Tokens that it has."""
        return len(self.stream.tokens) + self._running

    @property
    def _running(self) -> int:
        """Tokens since it was placed."""
        return 0 if self.seq is None else max(self.seq.output_tokens, self.carried)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were found in the KV cache."""
        return 0 if self.seq is None else self.seq.cached_tokens

    def ask(self, now: float) -> RequestArrived:
        """Where to send it?"""
        sent = self.stream.sent(self.ttft_s)
        request = continued(self.request, sent)
        return RequestArrived(request, GATEWAY, now - self.arrival.t, self.stream.attempt, self.avoid, sent)

    def dispatched(self, to: Dispatch, block_size: int | None) -> Sequence:
        """What the instance gets; ``block_size`` None: its cache shares no prefixes."""
        self.stream.begin()
        self.instance, self.carried = to.instance, 0
        self.length = min(self.arrival.num_output_tokens, self.request.max_output_tokens) - self.stream.before
        self.seq = self.sequence(to, block_size)
        self.seq.hands_over = to.hands_over
        return self.seq

    def moved(self, seq: Sequence, instance: str, output_tokens: int) -> None:
        """Another instance has it now, with the tokens since it was placed."""
        self.seq, self.instance, self.carried, self.handoff = seq, instance, output_tokens, None

    def sequence(self, to: Dispatch | Handoff, block_size: int | None) -> Sequence:
        """What an instance gets to know of it."""
        slo, arrived_at, count = self.request.slo, self.arrival.t, self.stream.before
        expected = to.expected_output_tokens
        due_s, _ = due(slo, count + expected, self.stream.sent(self.ttft_s))
        return Sequence(
            self.id,
            self.request.num_prompt_tokens + count,
            self.request.max_output_tokens - count,
            keys=[] if block_size is None else block_keys(self.arrival, block_size),
            value=to.value,
            first_due=arrived_at + due_s,
            pace_limit_s=inf if slo.tpot_s is None else slo.tpot_s,
            last_due=inf if slo.e2e_s is None else arrived_at + slo.e2e_s,
            expected_output_tokens=expected,
            payload=self,
        )

    def lost(self, moved_at: float, failed: bool = True) -> Loss | None:
        """Its instance is gone, or is not to go on with it; the last tokens came at ``moved_at``."""
        assert self.seq is not None
        if self._running:
            self.paused_at = moved_at
        count, attempt = len(self.stream.tokens), self.stream.attempt
        self.stream.take(attempt, range(count, count + self._running))
        self.seq = None
        self.avoid = self.instance
        return self.stream.lose(attempt, failed)

    @property
    def ttft_s(self) -> float | None:
        """Seconds from its arrival to its first token."""
        return None if self.first_token_at is None else self.first_token_at - self.arrival.t

    def first_token(self, now: float) -> None:
        """The first token of this attempt."""
        if self.first_token_at is None:
            self.first_token_at = now
        if self.paused_at is not None:
            self.pause_s = max(self.pause_s, now - self.paused_at)
            self.paused_at = None

    def record(self, outcome: RecordOutcome, now: float, detail: str) -> Record:
        """What became of it."""
        arrival = self.arrival
        return Record(
            arrival.slo_class,
            arrival.slo,
            arrival.t,
            arrival.num_prompt_tokens,
            arrival.num_output_tokens,
            outcome,
            self.ttft_s,
            now - arrival.t if outcome == "finished" else None,
            self.num_tokens,
            self.instance,
            detail,
            self.pause_s,
        )
