"""The instance's twin of the controller: queues, KV blocks, and what runs in the next iteration. Pure.

    add(...)                       a request joins the waiting queue
    plan(now) -> Batch             the next iteration: whose tokens, how many, into which KV blocks
    commit(batch, sampled, ...)    the iteration ran: new tokens, finishes, the latency model learns
    cancel(id)                     a request leaves; its blocks are free for the next plan

A *sequence* is a request here. It waits while prompt tokens are missing, runs while it decodes. A preempted one goes
back to waiting with all of its tokens to compute again (what the prefix cache still has is found again). Sequences
move only between plan and commit of the driver, one iteration at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from math import inf
from typing import Literal

from .core.instance import RequestProgress
from .core.latency import Coefficients, OnlineFit
from .kv_blocks import BlockKey, KvBlocks, block_keys
from .policy.step import StepLimits, StepPolicy

PROGRESS_EVERY = 16
"""Decodes are reported once in this many tokens: in between, the controller extrapolates."""

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class BatcherConfig:
    """Sizes of one instance. ``max_batch``: requests at once; ``max_batch_tokens``: tokens in one iteration."""

    num_blocks: int
    block_size: int
    max_batch: int
    max_batch_tokens: int
    context_length: int
    prefix_reuse: bool = True

    @property
    def kv_capacity_tokens(self) -> int:
        """Context tokens that the KV cache holds."""
        return self.num_blocks * self.block_size


class RequestTooLong(ValueError):
    """The request can never be served here; the message gives both sizes."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One request's state. Times in seconds of the driver's clock, ``inf`` where nothing is due.

    ``token_ids`` are prompt and output so far, or None where only sizes are known (then give ``keys``).
    ``payload`` is the engine's own. Changed by the Batcher alone.
    """

    id: str
    num_prompt_tokens: int
    max_output_tokens: int
    token_ids: list[int] | None = None
    keys: list[BlockKey] = field(default_factory=list)
    salt: str = ""
    value: float = 1.0
    first_due: float = inf
    pace_limit_s: float = inf
    last_due: float = inf
    expected_output_tokens: float = 128.0
    payload: object = None

    arrived_at: float = 0.0
    num_tokens: int = 0
    computed: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    blocks: list[int] = field(default_factory=list)
    pace_s: float = inf
    first_token_at: float | None = None
    next_due: float = inf
    missed_first: bool = False
    started: bool = False
    finished: bool = False
    published: int = 0

    @property
    def remaining_prefill(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return self.num_tokens - self.computed

    @property
    def expected_remaining(self) -> float:
        """Output tokens still expected, at least 1. Past its class's mean a request is expected to go on for half of
        what it has produced."""
        expected = min(self.expected_output_tokens, self.max_output_tokens) - self.output_tokens
        if expected < 1.0:
            expected = min(0.5 * self.output_tokens, self.max_output_tokens - self.output_tokens)
        return max(expected, 1.0)

    def _token_emitted(self, now: float) -> None:
        if self.first_token_at is None:
            self.first_token_at = now
            self.missed_first = now > self.first_due
            self.pace_s = self.pace_limit_s
        if self.last_due < inf:
            self.pace_s = min(self.pace_limit_s, max(self.last_due - now, 1e-3) / self.expected_remaining)
            self.next_due = now + self.pace_s
        else:
            self.next_due = self.first_token_at + self.output_tokens * self.pace_s


@dataclass(frozen=True, slots=True)
class Chunk:
    """Run tokens [start, start + num_tokens) of ``seq``; when ``samples``, the last one's logits give a new token."""

    seq: Sequence
    start: int
    num_tokens: int
    samples: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """One iteration. The first ``num_decodes`` chunks are decodes of one token each. ``attention`` and ``kv_tokens``
    are the features of core/latency.py; ``budget_s`` is the time the plan allowed, ``predicted_s`` what it expects."""

    chunks: tuple[Chunk, ...]
    num_decodes: int
    prefill_tokens: int
    attention: float
    kv_tokens: int
    predicted_s: float
    budget_s: float


@dataclass(frozen=True, slots=True)
class Sampled:
    """The engine's new token of one sampling chunk; ``stop`` when it ends the request (end of text, stop token)."""

    token_id: int
    stop: bool = False


@dataclass(frozen=True, slots=True)
class Emitted:
    """A new token of ``seq``; ``finish`` is set on its last one."""

    seq: Sequence
    token_id: int
    finish: FinishReason | None


@dataclass(slots=True)
class Counters:
    """Totals over the Batcher's life. ``prompt_tokens`` counts computed prompt tokens, ``busy_s`` iteration time."""

    iterations: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    busy_s: float = 0.0


VictimPolicy = Callable[[float, Collection[Sequence]], Sequence]


class Batcher:
    """Queues and KV of one instance. ``step`` and ``victim`` are functions of policy/."""

    def __init__(self, config: BatcherConfig, fit: OnlineFit, step: StepPolicy[Sequence], victim: VictimPolicy) -> None:
        self.config = config
        self.fit = fit
        self.counters = Counters()
        self.kv = KvBlocks(config.num_blocks, config.block_size)
        self._step = step
        self._victim = victim
        self._waiting: dict[str, Sequence] = {}
        self._running: dict[str, Sequence] = {}
        self._moved: dict[str, Sequence] = {}

    @property
    def num_waiting(self) -> int:
        """Requests with prompt tokens to compute."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that decode."""
        return len(self._running)

    @property
    def kv_used_tokens(self) -> int:
        """Tokens of KV that requests hold (whole blocks)."""
        return self.kv.held * self.config.block_size

    @property
    def latency(self) -> Coefficients:
        """The fitted iteration model."""
        return self.fit.coefficients

    def add(self, seq: Sequence, now: float) -> None:
        """Put a new request into the waiting queue.

        Raises RequestTooLong when prompt and at least one output token do not fit the context or the KV cache, and
        ValueError for an id already here. An output limit beyond the context is cut to it.
        """
        if seq.id in self._waiting or seq.id in self._running:
            raise ValueError(f"request {seq.id!r} is already here")
        room = min(self.config.context_length, self.config.kv_capacity_tokens)
        if seq.num_prompt_tokens < 1:
            raise RequestTooLong("the prompt is empty")
        if seq.num_prompt_tokens + 1 > room:
            raise RequestTooLong(f"{seq.num_prompt_tokens} prompt tokens and one output token exceed {room}")
        seq.max_output_tokens = max(1, min(seq.max_output_tokens, room - seq.num_prompt_tokens))
        seq.arrived_at = now
        seq.num_tokens = seq.num_prompt_tokens
        seq.next_due = seq.first_due
        seq.pace_s = seq.pace_limit_s
        if self.config.prefix_reuse and seq.token_ids is not None and not seq.keys:
            seq.keys = block_keys(seq.token_ids, self.config.block_size, seq.salt)
        seq.computed = self._reusable(seq)
        self._waiting[seq.id] = seq

    def cancel(self, request_id: str) -> Sequence | None:
        """Remove a request; returns it, or None when it is not here (any more)."""
        seq = self._waiting.pop(request_id, None) or self._running.pop(request_id, None)
        if seq is not None:
            self._end(seq)
        return seq

    def sequences(self) -> list[Sequence]:
        """All requests here, waiting ones first."""
        return [*self._waiting.values(), *self._running.values()]

    def plan(self, now: float) -> Batch | None:
        """The next iteration, or None when there is nothing to run."""
        if not self._waiting and not self._running:
            return None
        config = self.config
        latency = self.fit.coefficients
        limits = StepLimits(
            config.max_batch,
            config.max_batch_tokens,
            config.kv_capacity_tokens,
            self.kv.available * config.block_size,
        )
        step = self._step(now, self._waiting.values(), self._running.values(), latency, limits)
        chunks: list[Chunk] = []
        kv_tokens = 0
        for seq in step.decodes:
            if seq.id not in self._running:
                continue  # preempted for an earlier decode of this plan
            if not self._grow_for_decode(now, seq):
                continue
            chunks.append(Chunk(seq, seq.computed, 1, True))
            kv_tokens += seq.computed
        if len(chunks) and any(chunk.seq.id not in self._running for chunk in chunks):
            chunks = [chunk for chunk in chunks if chunk.seq.id in self._running]
            kv_tokens = sum(chunk.start for chunk in chunks)
        num_decodes = len(chunks)
        prefill_tokens = 0
        attention = 0.0
        full = False
        for seq, tokens in step.prefills:
            if seq.id not in self._waiting or (full and not seq.started):
                continue
            n = self._grow_for_prefill(seq, tokens)
            if n == 0:
                full = True  # those that hold KV may go on; new ones must not overtake
                continue
            chunks.append(Chunk(seq, seq.computed, n, seq.computed + n == seq.num_tokens))
            prefill_tokens += n
            attention += n * (seq.computed + 0.5 * n)
        if not chunks:
            return self._plan_one(now)
        predicted = latency.predict(prefill_tokens, attention, num_decodes, kv_tokens)
        return Batch(tuple(chunks), num_decodes, prefill_tokens, attention, kv_tokens, predicted, step.budget_s)

    def commit(self, batch: Batch, sampled: SequenceOf[Sampled], now: float, seconds: float) -> list[Emitted]:
        """Take in one iteration that lasted ``seconds`` and ended at ``now``.

        ``sampled`` holds one entry per sampling chunk, in order. Requests cancelled meanwhile are passed over.
        """
        self.fit.observe(batch.prefill_tokens, batch.attention, batch.num_decodes, batch.kv_tokens, seconds)
        counters = self.counters
        counters.iterations += 1
        counters.prompt_tokens += batch.prefill_tokens
        counters.busy_s += seconds
        emitted: list[Emitted] = []
        tokens = iter(sampled)
        for chunk in batch.chunks:
            seq = chunk.seq
            token = next(tokens) if chunk.samples else None
            if seq.finished:
                continue
            seq.computed = chunk.start + chunk.num_tokens
            if chunk.num_tokens > 1 or seq.output_tokens % PROGRESS_EVERY == 0:
                self._moved[seq.id] = seq
            if token is not None:
                emitted.append(self._take_token(seq, token, now))
            self._publish(seq)
            if seq.finished:
                self._end(seq)
        return emitted

    def take_progress(self) -> tuple[RequestProgress, ...]:
        """Requests that moved since the last call and where they are."""
        moved = tuple(
            RequestProgress(seq.id, min(seq.computed, seq.num_prompt_tokens), seq.output_tokens)
            for seq in self._moved.values()
        )
        self._moved.clear()
        return moved

    def _take_token(self, seq: Sequence, token: Sampled, now: float) -> Emitted:
        self.counters.output_tokens += 1
        seq.output_tokens += 1
        seq.num_tokens += 1
        if seq.token_ids is not None:
            seq.token_ids.append(token.token_id)
        seq._token_emitted(now)
        finish: FinishReason | None = None
        if token.stop:
            finish = "stop"
        elif seq.output_tokens >= seq.max_output_tokens:
            finish = "length"
        seq.finished = finish is not None
        if seq.id in self._waiting:
            self._running[seq.id] = self._waiting.pop(seq.id)
        return Emitted(seq, token.token_id, finish)

    def _end(self, seq: Sequence) -> None:
        seq.finished = True
        self._waiting.pop(seq.id, None)
        self._running.pop(seq.id, None)
        self._moved.pop(seq.id, None)
        self.kv.release(seq.blocks)
        seq.blocks = []

    def _reusable(self, seq: Sequence) -> int:
        """Tokens of ``seq`` that the cache holds now; one token is always left to compute, for its logits."""
        if not self.config.prefix_reuse:
            return 0
        usable = (seq.num_tokens - 1) // self.config.block_size
        return self.kv.count_prefix(seq.keys[:usable]) * self.config.block_size

    def _start(self, seq: Sequence) -> None:
        """Take the reusable prefix; from now on the sequence holds blocks."""
        size = self.config.block_size
        usable = (seq.num_tokens - 1) // size if self.config.prefix_reuse else 0
        seq.blocks = self.kv.take_prefix(seq.keys[:usable])
        seq.published = len(seq.blocks)
        seq.computed = len(seq.blocks) * size
        seq.started = True

    def _give_back(self, seq: Sequence) -> None:
        """The opposite of ``_start``: hold nothing."""
        self.kv.release(seq.blocks)
        seq.blocks = []
        seq.started = False
        seq.published = 0
        seq.computed = self._reusable(seq)

    def _grow_for_prefill(self, seq: Sequence, tokens: int) -> int:
        """Blocks for up to ``tokens`` more tokens of ``seq``; how many of them fit."""
        size = self.config.block_size
        new = not seq.started
        if new:
            self._start(seq)
        have = len(seq.blocks) * size
        tokens = min(tokens, seq.remaining_prefill, have + self.kv.available * size - seq.computed)
        if tokens <= 0:
            if new:  # it would hold its prefix and not move
                self._give_back(seq)
            return 0
        need = -(-(seq.computed + tokens) // size) - len(seq.blocks)
        if need > 0:
            blocks = self.kv.allocate(need)
            assert blocks is not None
            seq.blocks.extend(blocks)
        if new:
            self.counters.prefix_hit_tokens += seq.computed
            if seq.output_tokens == 0:
                seq.cached_tokens = seq.computed
        return tokens

    def _grow_for_decode(self, now: float, seq: Sequence) -> bool:
        """A block for the next token of ``seq``, preempting others if need be; False when ``seq`` itself had to go."""
        if seq.computed < len(seq.blocks) * self.config.block_size:
            return True
        while True:
            blocks = self.kv.allocate(1)
            if blocks is not None:
                seq.blocks.extend(blocks)
                return True
            holders = [*self._running.values(), *(w for w in self._waiting.values() if w.started)]
            victim = self._victim(now, holders)
            self._preempt(victim)
            if victim is seq:
                return False

    def _preempt(self, seq: Sequence) -> None:
        self.counters.preemptions += 1
        self._running.pop(seq.id, None)
        self._give_back(seq)
        self._waiting[seq.id] = seq

    def _plan_one(self, now: float) -> Batch | None:
        """Nothing that the policy chose fits, since all decodes were preempted or half-computed prompts share the
        whole cache: one request goes on alone, those that hold KV first, and preempts others until it can."""
        while True:
            held = [seq for seq in self._waiting.values() if seq.started]
            for seq in sorted(held or self._waiting.values(), key=lambda seq: seq.arrived_at):
                n = self._grow_for_prefill(seq, self.config.max_batch_tokens)
                if n:
                    start = seq.computed
                    attention = n * (start + 0.5 * n)
                    predicted = self.latency.predict(n, attention, 0, 0)
                    chunk = Chunk(seq, start, n, start + n == seq.num_tokens)
                    return Batch((chunk,), 0, n, attention, 0, predicted, inf)
            if not held:
                return None
            self._preempt(self._victim(now, held))

    def _publish(self, seq: Sequence) -> None:
        """Offer the blocks that have become full for reuse."""
        if not self.config.prefix_reuse:
            return
        size = self.config.block_size
        full = seq.computed // size
        if full <= seq.published:
            return
        if len(seq.keys) < full:
            if seq.token_ids is None:
                return
            done = len(seq.keys)
            parent = seq.keys[-1] if seq.keys else None
            seq.keys += block_keys(seq.token_ids[done * size : full * size], size, seq.salt, parent)
        for index in range(seq.published, full):
            self.kv.publish(seq.blocks[index], seq.keys[index])
        seq.published = full
