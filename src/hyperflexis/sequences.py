"""The requests of one instance, whoever keeps their KV: those that wait, those that decode, the clock of these. Pure.

A *sequence* is a request here. It waits while prompt tokens are missing, runs while it decodes. A preempted one goes
back to waiting with all of its tokens to compute again. The Batcher keeps the KV blocks besides; for engines that keep
them themselves, these queues are all that the step policy needs.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from math import inf
from typing import Any

from .kv_blocks import BlockKey
from .policy.running import Running
from .policy.waiting import Waiting

GOES_ON = 0.2
"""Share of its output so far for which a request is expected to go on at least. On real lengths the error of what
remains is within a sixth of what a survival curve learnt for each kind of request gives."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One request's state. Times in seconds of the driver's clock, ``inf`` where nothing is due.

    ``token_ids`` are prompt and output so far, or None where only sizes are known (then give ``keys``). With
    ``hands_over`` another instance is sought when the last chunk of its prompt is planned. ``reported_before`` are
    output tokens that another instance put out, and that are part of the prompt here. ``payload`` is the engine's own,
    ``memo`` the step policy's, all else is changed by the Batcher alone. While it runs, its counts follow from the
    clock of the running set, which all of them share."""

    id: str
    num_prompt_tokens: int
    max_output_tokens: int
    token_ids: list[int] | None = None
    keys: SequenceOf[BlockKey] = ()
    salt: str = ""
    value: float = 1.0
    first_due: float = inf
    pace_limit_s: float = inf
    last_due: float = inf
    expected_output_tokens: float = 128.0
    payload: object = None
    hands_over: bool = False
    reported_before: int = 0

    memo: Any = None
    arrived_at: float = 0.0
    cached_tokens: int = 0
    blocks: list[int] = field(default_factory=list)
    first_token_at: float | None = None
    missed_first: bool = False
    started: bool = False
    finished: bool = False
    published: int = 0
    _computed: int = 0
    _output: int = 0
    _last_at: float = 0.0
    _running: Running[Sequence] | None = None
    _block_at: int = -1
    _reported: int = 0

    @property
    def output_tokens(self) -> int:
        """Tokens generated so far."""
        running = self._running
        return self._output if running is None else self._output + running.ticks

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far."""
        return self.num_prompt_tokens + self.output_tokens

    @property
    def computed(self) -> int:
        """Tokens whose KV is present or known to be reusable: all but the last of a running request."""
        running = self._running
        return self._computed if running is None else self.num_prompt_tokens + self._output + running.ticks - 1

    @property
    def remaining_prefill(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return self.num_prompt_tokens + self._output - self._computed if self._running is None else 1

    @property
    def expected_remaining(self) -> float:
        """Output tokens still expected, at least 1. The longer a request already is, the longer it goes on past what
        was expected of it."""
        # Written out: it is asked for each request that waits whenever the coefficients are new.
        output = self.output_tokens
        expected, least, most = self.expected_output_tokens - output, GOES_ON * output, self.max_output_tokens - output
        if expected < least:
            expected = least
        if expected > most:
            expected = most
        return expected if expected > 1.0 else 1.0

    @property
    def pace_s(self) -> float:
        """Seconds allowed per output token. With an end-to-end deadline it changes with what is left."""
        if self.last_due == inf or self.first_token_at is None:
            return self.pace_limit_s
        return min(self.pace_limit_s, max(self.last_due - self._last_token_at(), 1e-3) / self.expected_remaining)

    @property
    def next_due(self) -> float:
        """When its next token is due."""
        if self.first_token_at is None:
            return self.first_due
        if self.last_due < inf:
            return self._last_token_at() + self.pace_s
        return self.first_token_at + self.output_tokens * self.pace_limit_s

    def _last_token_at(self) -> float:
        return self._last_at if self._running is None else self._running.last_at

    def _needs_block_at(self, tick: int) -> bool:
        """True when it runs and its blocks are full; False for what was noted before it was preempted."""
        return self._running is not None and self._block_at == tick

    def _join(self, running: Running[Sequence]) -> None:
        """Follow the clock of ``running`` from the token on that came at ``running.last_at``."""
        self._output -= running.ticks
        self._running = running

    def _leave(self) -> None:
        """Keep the counts as they are now."""
        running = self._running
        if running is not None:
            self._computed, self._output, self._last_at = self.computed, self.output_tokens, running.last_at
            self._running = None


class Queues:
    """The requests of one instance. Between ``add`` and ``end`` each is in one of ``waiting`` and ``running``."""

    def __init__(self) -> None:
        self.waiting: Waiting[Sequence] = Waiting()
        self.running: Running[Sequence] = Running()

    def add(self, seq: Sequence, now: float, computed: int = 0) -> None:
        """A new request waits; ``computed`` of its tokens are known to be reusable."""
        seq.arrived_at = now
        seq._computed = computed
        self.waiting.add(seq, fresh=True)

    def begin(self, seq: Sequence) -> None:
        """A waiting request holds KV from now on."""
        if not seq.started:
            seq.started = True
            self.waiting.start(seq)

    def prefilled(self, seq: Sequence, computed: int) -> None:
        """``computed`` tokens of a waiting request have their KV by now."""
        seq._computed = computed

    def took_token(self, seq: Sequence, now: float) -> None:
        """A waiting request got a token."""
        seq._output += 1
        seq._last_at = now
        if seq.first_token_at is None:
            seq.first_token_at = now
            seq.missed_first = now > seq.first_due

    def run(self, seq: Sequence) -> None:
        """A waiting request that has its token becomes a running one."""
        self.waiting.pop(seq.id)
        seq._join(self.running)
        self.running.add(seq)

    def stop(self, seq: Sequence) -> bool:
        """A running request is in neither queue now and keeps its counts. False when it did not run."""
        if self.running.pop(seq.id, seq.computed) is None:
            return False
        seq._leave()
        return True

    def correct(self, seq: Sequence, output_tokens: int) -> None:
        """A running request has so many output tokens: its engine did not keep to one for each in every iteration."""
        if seq.output_tokens != output_tokens and self.stop(seq):
            seq._computed += output_tokens - seq._output
            seq._output = output_tokens
            self.run(seq)

    def preempt(self, seq: Sequence) -> None:
        """A request lost its KV and waits again."""
        self.end(seq)
        seq.started = False
        seq._computed = 0
        self.waiting.add(seq)

    def end(self, seq: Sequence) -> None:
        """It leaves."""
        self.waiting.pop(seq.id)
        self.stop(seq)
