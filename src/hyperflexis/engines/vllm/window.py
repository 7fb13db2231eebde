"""Which requests a vLLM server gets next, and which wait here: the queue that matters stays in our hands.

A stock server runs what it was sent in an order of its own, and its queue cannot be changed from outside. So it is sent
only what it would begin now: at each event the step policy plans an iteration as if it ran inside the server, and what
would start in it is sent. All else waits here and is ordered anew each time.

How far a prompt that was sent has come is not told before its first token. It is taken to advance at the fitted speed,
one after the other in the order sent, so that the next one is there when the server gets to it. Pure.
"""

from __future__ import annotations

from math import inf

from ...core.latency import Coefficients
from ...policy.step import StepLimits, StepPolicy
from ...sequences import Queues, Sequence

MOST_DONE = 0.9
"""An unfinished prompt is never taken for more than this share done."""
LATE_MS = 2_000_000_000
"""What is late goes behind all that can be on time, also in a server that orders by priority."""
NO_DEADLINE_MS = 1_900_000_000
"""Three weeks of milliseconds: the latest that a deadline is told."""


class Window:
    """``add``, then ``due`` says which requests to send; ``took`` and ``end`` tell what became of them."""

    def __init__(self, step: StepPolicy[Sequence], max_batch: int, max_batch_tokens: int, kv_tokens: int) -> None:
        self._step = step
        self._max_batch = max_batch
        self._max_batch_tokens = max_batch_tokens
        self._kv_tokens = kv_tokens
        self._queues = Queues()
        self._output: dict[str, int] = {}
        self._sent_at: dict[str, float] = {}
        self._first_at = 0.0

    def add(self, seq: Sequence, now: float, computed: int = 0) -> None:
        """A new request waits here; of its prompt the server will have the KV of ``computed`` tokens."""
        seq.cached_tokens = computed
        self._queues.add(seq, now, computed)

    def took(self, seq: Sequence, output_tokens: int, now: float) -> None:
        """A request that was sent has so many output tokens by now."""
        if self._sent_at.pop(seq.id, None) is not None:
            self._first_at = now
            self._queues.prefilled(seq, seq.num_prompt_tokens)
            self._queues.took_token(seq, now)
            self._queues.run(seq)
        self._output[seq.id] = output_tokens

    def end(self, seq: Sequence) -> None:
        """It has ended, wherever it was."""
        self._queues.end(seq)
        self._sent_at.pop(seq.id, None)
        self._output.pop(seq.id, None)

    def due(self, now: float, latency: Coefficients) -> list[Sequence]:
        """The requests to send now, in order."""
        queues = self._queues
        if len(queues.waiting) == len(self._sent_at):
            return []
        queues.running.last_at = now
        for seq in list(queues.running):
            queues.correct(seq, self._output[seq.id])
        self._advance(now, latency)
        held = queues.running.kv_tokens + sum(seq.num_prompt_tokens for seq in queues.waiting.started.values())
        limits = StepLimits(self._max_batch, self._max_batch_tokens, self._kv_tokens, max(self._kv_tokens - held, 0))
        plan = self._step(now, queues.waiting, queues.running, latency, limits)
        for seq in plan.late:
            queues.waiting.give_up(seq)
        chosen = [seq for seq, _ in plan.prefills if not seq.started]
        for seq in chosen:
            queues.begin(seq)
            self._sent_at[seq.id] = now
        return chosen

    def look_again_s(self, latency: Coefficients) -> float | None:
        """In how many seconds the server may have room for another request, if nothing happens before; None when no
        request waits here."""
        queues = self._queues
        if len(queues.waiting) == len(self._sent_at):
            return None
        left_s = sum(latency.prefill_s(seq.remaining_prefill) for seq in queues.waiting.started.values())
        return max(0.5 * left_s, latency.decode_s(len(queues.running), queues.running.kv_tokens))

    def priority(self, seq: Sequence, now: float, began: float) -> int:
        """The request's place for a server with ``--scheduling-policy priority``: lower is earlier. Milliseconds of
        its deadline after ``began``."""
        due = seq.next_due
        place = NO_DEADLINE_MS if due == inf else min(max(round(1e3 * (due - began)), 0), NO_DEADLINE_MS)
        return place + LATE_MS if due < now or self._queues.waiting.is_late(seq.id) else place

    def _advance(self, now: float, latency: Coefficients) -> None:
        """Where the prompts that were sent are thought to be."""
        at = self._first_at
        for id, sent_at in self._sent_at.items():
            seq = self._queues.waiting.started[id]
            work = seq.num_prompt_tokens - seq.cached_tokens
            whole_s = latency.c0 + latency.prefill_s(work)
            begins = max(at, sent_at)
            at = begins + whole_s
            share = min(max((now - begins) / whole_s, 0.0), MOST_DONE)
            self._queues.prefilled(seq, seq.cached_tokens + int(share * work))
