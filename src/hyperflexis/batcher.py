"""The instance's twin of the controller: queues, KV blocks, and what runs in the next iteration. Pure.

    add(...)                       a request joins the waiting queue
    plan(now) -> Batch             the next iteration: whose tokens, how many, into which KV blocks
    commit(batch, sampled, ...)    the iteration ran: new tokens, finishes, the latency model learns
    repeat(batch, seconds, ...)    the same for many iterations that only decode, at once: how the simulator leaps
    cancel(id)                     a request leaves; its blocks are free for the next plan
    park(id), unpark(id)           a running request stands still while its KV leaves for another instance
    expect(seq), arrived(id, ...)  the same on the other side: blocks for KV that comes, and the request runs

The queues are those of sequences.py. What the prefix cache still has of a preempted request is found again. Sequences
move only between plan and commit of the driver, one iteration at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from math import inf
from typing import Literal

from .core.instance import RequestProgress
from .core.latency import Coefficients, OnlineFit
from .kv_blocks import KvBlocks, block_keys
from .policy.step import StepLimits, StepPolicy
from .sequences import Queues, Sequence

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


@dataclass(frozen=True, slots=True)
class Chunk:
    """Run tokens [start, start + num_tokens) of ``seq``; when ``samples``, the last one's logits give a new token."""

    seq: Sequence
    start: int
    num_tokens: int
    samples: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """One iteration: ``decodes`` get one token each, ``prefills`` are chunks of prompts. ``attention`` and
    ``kv_tokens`` are the features of core/latency.py; ``budget_s`` is the time the plan allowed, ``predicted_s`` what
    it expects. For ``repeat`` iterations from this one on the batch stays the same, if no request comes, goes or ends.
    """

    decodes: tuple[Sequence, ...]
    prefills: tuple[Chunk, ...]
    prefill_tokens: int
    attention: float
    kv_tokens: int
    predicted_s: float
    budget_s: float
    repeat: int = 1

    @property
    def num_decodes(self) -> int:
        """Requests that decode."""
        return len(self.decodes)

    @property
    def chunks(self) -> list[Chunk]:
        """All that is computed, decodes first. Read it before the batch is committed."""
        return [*(Chunk(seq, seq.computed, 1, True) for seq in self.decodes), *self.prefills]


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
        self._queues = queues = Queues()
        self._waiting, self._running = queues.waiting, queues.running
        self._decodes: tuple[Sequence, ...] | None = ()
        self._needs_block: dict[int, list[Sequence]] = {}
        self._moved: dict[str, Sequence] = {}
        self._parked: dict[str, Sequence] = {}
        self._expected: dict[str, Sequence] = {}

    @property
    def num_waiting(self) -> int:
        """Requests with prompt tokens to compute."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that decode."""
        return len(self._running)

    @property
    def ticks(self) -> int:
        """Iterations so far in which the running requests got a token each."""
        return self._running.ticks

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
        self._enter(seq, now)
        self._queues.add(seq, now, self._reusable(seq))

    def cancel(self, request_id: str) -> Sequence | None:
        """Remove a request; returns it, or None when it is not here (any more)."""
        seq = self.get(request_id)
        if seq is not None:
            self._end(seq)
        return seq

    def get(self, request_id: str) -> Sequence | None:
        """The request of that id, or None when it is not here."""
        found = self._waiting.get(request_id) or self._running.get(request_id)
        return found or self._parked.get(request_id) or self._expected.get(request_id)

    def sequences(self) -> list[Sequence]:
        """All requests here, waiting ones first."""
        return [*self._waiting, *self._running, *self._parked.values(), *self._expected.values()]

    def runs(self, request_id: str) -> bool:
        """True when it gets a token in every iteration."""
        return request_id in self._running

    def park(self, request_id: str) -> None:
        """A running request gets no more tokens here, and keeps its blocks until it is cancelled or unparked.

        Raises KeyError when it does not run.
        """
        seq = self._running.get(request_id)
        if seq is None:
            raise KeyError(f"request {request_id!r} does not run here")
        self._stop_running(seq)
        self._publish(seq)
        self._parked[request_id] = seq

    def unpark(self, request_id: str) -> None:
        """It runs on here. Raises KeyError when it is not parked."""
        self._run(self._parked.pop(request_id))

    def expect(self, seq: Sequence, now: float) -> int | None:
        """A request whose KV comes from another instance: take the blocks of its prompt. Returns how many of its tokens
        the cache has already, or None, and nothing changes, when there is no room now.

        Raises as ``add`` does.
        """
        self._enter(seq, now)
        size = self.config.block_size
        if self._num_here >= self.config.max_batch:
            return None
        usable = (seq.num_tokens - 1) // size if self.config.prefix_reuse else 0
        found = self.kv.take_prefix(seq.keys, usable)
        more = self.kv.allocate(-(-seq.num_tokens // size) - len(found))
        if more is None:
            self.kv.release(found)
            return None
        seq.blocks = [*found, *more]
        seq.published = len(found)
        seq.started = True
        seq._computed = seq.cached_tokens = len(found) * size
        self._expected[seq.id] = seq
        return seq._computed

    def room_for(self, request_id: str, num_tokens: int) -> bool:
        """Blocks for ``num_tokens`` tokens of an expected request, which has more of them by now; False when there is
        no room now. Raises KeyError when it is not expected."""
        seq = self._expected[request_id]
        blocks = self.kv.allocate(max(-(-num_tokens // self.config.block_size) - len(seq.blocks), 0))
        seq.blocks.extend(blocks or ())
        return blocks is not None

    def arrived(
        self, request_id: str, computed: int, token_ids: SequenceOf[int], now: float, first_token_at: float | None
    ) -> None:
        """The KV of the first ``computed`` tokens of an expected request is in its blocks: it runs from now on, or
        waits for the rest to be computed. ``token_ids`` are output that the other instance has put out since, the first
        of it at ``first_token_at`` (None: there is none). Like ``park`` and ``unpark``, not while an iteration is under
        way. Raises KeyError when it is not expected.
        """
        seq = self._expected.pop(request_id)
        seq._output += len(token_ids)
        if seq.token_ids is not None:
            seq.token_ids.extend(token_ids)
        seq._computed = min(computed, seq.num_tokens - 1)
        seq._last_at = now
        if not self._running:
            self._running.last_at = now
        self._publish(seq)
        if first_token_at is not None:
            seq.first_token_at = first_token_at
            seq.missed_first = first_token_at > seq.first_due
        if token_ids and seq.remaining_prefill == 1:
            self._run(seq)
        else:
            self._waiting.add(seq)
        self._moved[seq.id] = seq

    def plan(self, now: float) -> Batch | None:
        """The next iteration, or None when there is nothing to run."""
        running, config = self._running, self.config
        if not self._waiting and not running:
            return None
        latency = self.fit.coefficients
        limits = StepLimits(
            config.max_batch - len(self._parked) - len(self._expected),
            config.max_batch_tokens,
            config.kv_capacity_tokens,
            self.kv.available * config.block_size,
        )
        step = self._step(now, self._waiting, running, latency, limits)
        for seq in step.late:
            self._waiting.give_up(seq)
        if step.decode:
            self._grow_decodes(now)
        decodes = self._all_decodes() if step.decode else ()
        kv_tokens = running.kv_tokens if decodes else 0
        chunks: list[Chunk] = []
        prefill_tokens = 0
        attention = 0.0
        full = False
        for seq, tokens in step.prefills:
            if full and not seq.started:
                continue
            n = self._grow_for_prefill(seq, tokens)
            if n == 0:
                full = True  # those that hold KV may go on; new ones must not overtake
                continue
            start = seq._computed
            chunks.append(Chunk(seq, start, n, start + n == seq.num_tokens))
            prefill_tokens += n
            attention += n * (start + 0.5 * n)
        if not chunks and not decodes and running:
            self._grow_decodes(now)  # the prompts for which they should have stood still found no room
            decodes, kv_tokens = self._all_decodes(), running.kv_tokens
        if not chunks and not decodes:
            return self._plan_one(now)
        predicted = latency.predict(prefill_tokens, attention, len(decodes), kv_tokens)
        repeat = 1
        if not self._waiting:
            # Each decode takes a block once in block_size tokens, and one that has the block for this token may need
            # the next at once.
            repeat += self.kv.available // len(decodes) * config.block_size
        return Batch(decodes, tuple(chunks), prefill_tokens, attention, kv_tokens, predicted, step.budget_s, repeat)

    def commit(self, batch: Batch, sampled: SequenceOf[Sampled], now: float, seconds: float) -> list[Emitted]:
        """Take in one iteration that lasted ``seconds`` and ended at ``now``.

        ``sampled`` holds one entry per sampling chunk, in order. Requests cancelled meanwhile are passed over.
        """
        self._ran(batch, now, seconds)
        emitted: list[Emitted] = []
        tokens = iter(sampled)
        for seq in batch.decodes:
            token = next(tokens)
            if not seq.finished:
                emitted.append(self._take_token(seq, token))
        emitted += self._prefilled(batch, tokens, now)
        for one in emitted:
            if one.finish is not None:
                self._end(one.seq)
        return emitted

    def commit_sizes(self, batch: Batch, ended: Collection[Sequence], now: float, seconds: float) -> list[Emitted]:
        """The same where tokens do not matter: ``ended`` are the requests whose last token this is. Returns first
        tokens and last tokens only, at a cost of O(those), not O(requests)."""
        self._ran(batch, now, seconds)
        emitted = [Emitted(seq, 0, "stop") for seq in ended if seq._running is not None]
        tokens = (Sampled(0, chunk.seq in ended) for chunk in batch.prefills if chunk.samples)
        emitted += self._prefilled(batch, tokens, now)
        for one in emitted:
            if one.finish is not None:
                self._end(one.seq)
        return emitted

    def repeat(self, batch: Batch, seconds: SequenceOf[float], now: float) -> Batch:
        """Take in ``len(seconds)`` iterations of ``batch`` in a row, of which no token was a request's last, and plan
        the next one; equal to as many calls of commit_sizes and plan. The last iteration ended at ``now``.

        There may be at most ``batch.repeat - 1``, with the requests as they were when ``batch`` was planned.
        """
        times, decodes = len(seconds), batch.num_decodes
        assert 0 < times < batch.repeat
        self.fit.observe_decodes(decodes, batch.kv_tokens, seconds)
        counters = self.counters
        counters.iterations += times
        counters.output_tokens += times * decodes
        for one in seconds:
            counters.busy_s += one
        running = self._running
        first = running.ticks + 1
        running.tick(now, times)
        for tick in range(first, first + times):
            for seq in self._needs_block.pop(tick, ()):
                if seq._needs_block_at(tick):
                    self._take_block(seq, tick)
        kv_tokens = running.kv_tokens
        predicted = self.latency.decode_s(decodes, kv_tokens)
        return Batch(batch.decodes, (), 0, 0.0, kv_tokens, predicted, batch.budget_s, batch.repeat - times)

    def take_progress(self) -> tuple[RequestProgress, ...]:
        """Requests that moved since the last call and where they are; a running one once in PROGRESS_EVERY tokens."""
        ticks = self._running.ticks
        for seq in self._running:
            if (seq._output + ticks) // PROGRESS_EVERY > seq._reported // PROGRESS_EVERY:
                self._moved[seq.id] = seq
        moved = []
        for seq in self._moved.values():
            seq._reported = seq.output_tokens
            output = seq.reported_before + seq._reported
            moved.append(RequestProgress(seq.id, min(seq.computed, seq.num_prompt_tokens), output))
        self._moved.clear()
        return tuple(moved)

    def _enter(self, seq: Sequence, now: float) -> None:
        """What is checked and set for each request that comes."""
        if self.get(seq.id) is not None:
            raise ValueError(f"request {seq.id!r} is already here")
        room = min(self.config.context_length, self.config.kv_capacity_tokens)
        if seq.num_prompt_tokens < 1:
            raise RequestTooLong("the prompt is empty")
        if seq.num_prompt_tokens + 1 > room:
            raise RequestTooLong(f"{seq.num_prompt_tokens} prompt tokens and one output token exceed {room}")
        seq.max_output_tokens = max(1, min(seq.max_output_tokens, room - seq.num_prompt_tokens))
        seq.arrived_at = now
        if self.config.prefix_reuse and seq.token_ids is not None and not seq.keys:
            seq.keys = block_keys(seq.token_ids, self.config.block_size, seq.salt)

    @property
    def _num_here(self) -> int:
        """Requests that hold KV."""
        return len(self._running) + len(self._waiting.started) + len(self._parked) + len(self._expected)

    def _ran(self, batch: Batch, now: float, seconds: float) -> None:
        """What every commit does: the model learns, the clock of the running requests goes on."""
        self.fit.observe(batch.prefill_tokens, batch.attention, batch.num_decodes, batch.kv_tokens, seconds)
        counters = self.counters
        counters.iterations += 1
        counters.prompt_tokens += batch.prefill_tokens
        counters.busy_s += seconds
        if batch.decodes:
            counters.output_tokens += len(self._running)
            self._running.tick(now)
        else:
            self._running.last_at = now

    def _prefilled(self, batch: Batch, sampled: Iterator[Sampled], now: float) -> list[Emitted]:
        """The prompts' part of a commit; those that got a token run from now on."""
        emitted = []
        for chunk in batch.prefills:
            seq = chunk.seq
            token = next(sampled) if chunk.samples else None
            if seq.finished:
                continue
            seq._computed = chunk.start + chunk.num_tokens
            self._moved[seq.id] = seq
            self._publish(seq)
            if token is not None:
                self.counters.output_tokens += 1
                self._queues.took_token(seq, now)
                emitted.append(self._take_token(seq, token))
                self._run(seq)
        return emitted

    def _take_token(self, seq: Sequence, token: Sampled) -> Emitted:
        if seq.token_ids is not None:
            seq.token_ids.append(token.token_id)
        finish: FinishReason | None = None
        if token.stop:
            finish = "stop"
        elif seq.output_tokens >= seq.max_output_tokens:
            finish = "length"
        return Emitted(seq, token.token_id, finish)

    def _run(self, seq: Sequence) -> None:
        """A waiting request becomes a running one."""
        self._queues.run(seq)
        self._decodes = None
        self._await_block(seq)

    def _end(self, seq: Sequence) -> None:
        seq.finished = True
        self._waiting.pop(seq.id)
        self._stop_running(seq)
        self._moved.pop(seq.id, None)
        self._parked.pop(seq.id, None)
        self._expected.pop(seq.id, None)
        self._publish(seq)
        self.kv.release(seq.blocks)
        seq.blocks = []

    def _stop_running(self, seq: Sequence) -> None:
        if self._queues.stop(seq):
            self._decodes = None

    def _all_decodes(self) -> tuple[Sequence, ...]:
        if self._decodes is None:
            self._decodes = tuple(self._running)
        return self._decodes

    def _reusable(self, seq: Sequence) -> int:
        """Tokens of ``seq`` that the cache holds now; one token is always left to compute, for its logits."""
        if not self.config.prefix_reuse:
            return 0
        usable = (seq.num_tokens - 1) // self.config.block_size
        return self.kv.count_prefix(seq.keys, usable) * self.config.block_size

    def _start(self, seq: Sequence) -> None:
        """Take the reusable prefix; from now on the sequence holds blocks."""
        size = self.config.block_size
        usable = (seq.num_tokens - 1) // size if self.config.prefix_reuse else 0
        seq.blocks = self.kv.take_prefix(seq.keys, usable)
        seq.published = len(seq.blocks)
        seq._computed = len(seq.blocks) * size
        seq.started = True
        self._waiting.start(seq)

    def _give_back(self, seq: Sequence) -> None:
        """The opposite of ``_start``: hold nothing."""
        self.kv.release(seq.blocks)
        seq.blocks = []
        seq.started = False
        seq.published = 0
        seq._computed = self._reusable(seq)

    def _grow_for_prefill(self, seq: Sequence, tokens: int) -> int:
        """Blocks for up to ``tokens`` more tokens of ``seq``; how many of them fit."""
        size = self.config.block_size
        new = not seq.started
        if new:
            self._start(seq)
        have = len(seq.blocks) * size
        tokens = min(tokens, seq.remaining_prefill, have + self.kv.available * size - seq._computed)
        if tokens <= 0:
            if new:  # it would hold its prefix and not move
                self._give_back(seq)
                self._waiting.stop(seq)
            return 0
        need = -(-(seq._computed + tokens) // size) - len(seq.blocks)
        if need > 0:
            blocks = self.kv.allocate(need)
            assert blocks is not None
            seq.blocks.extend(blocks)
        if new:
            self.counters.prefix_hit_tokens += seq._computed
            if seq.output_tokens == 0:
                seq.cached_tokens = seq._computed
        return tokens

    def _await_block(self, seq: Sequence) -> None:
        """Note the tick at which the tokens of a running request will fill its blocks."""
        tick = self._running.ticks + len(seq.blocks) * self.config.block_size - seq.computed
        seq._block_at = tick
        self._needs_block.setdefault(tick, []).append(seq)

    def _take_block(self, seq: Sequence, tick: int) -> bool:
        """One more block for a running request, if there is one; its full ones are offered for reuse."""
        self._publish(seq)
        blocks = self.kv.allocate(1)
        if blocks is None:
            return False
        seq.blocks.extend(blocks)
        seq._block_at = tick + self.config.block_size
        self._needs_block.setdefault(seq._block_at, []).append(seq)
        return True

    def _grow_decodes(self, now: float) -> None:
        """A block for the next token of each running request, preempting others where there is none."""
        tick = self._running.ticks
        for seq in self._needs_block.pop(tick, ()):
            while seq._needs_block_at(tick) and not self._take_block(seq, tick):
                holders = [*self._running, *self._waiting.started.values()]
                self._preempt(self._victim(now, holders))

    def _preempt(self, seq: Sequence) -> None:
        self.counters.preemptions += 1
        self._stop_running(seq)
        self._publish(seq)
        self._waiting.pop(seq.id)
        self._give_back(seq)
        self._waiting.add(seq)

    def _plan_one(self, now: float) -> Batch | None:
        """Nothing that the policy chose fits, since all decodes were preempted or half-computed prompts share the
        whole cache: one request goes on alone, those that hold KV first, and preempts others until it can."""
        while True:
            held = sorted(self._waiting.started.values(), key=lambda seq: seq.arrived_at)
            if not held and self._num_here >= self.config.max_batch:
                return None  # those that come or leave have all places
            for seq in held or list(self._waiting):
                n = self._grow_for_prefill(seq, self.config.max_batch_tokens)
                if n:
                    start = seq._computed
                    attention = n * (start + 0.5 * n)
                    predicted = self.latency.predict(n, attention, 0, 0)
                    chunk = Chunk(seq, start, n, start + n == seq.num_tokens)
                    return Batch((), (chunk,), n, attention, 0, predicted, inf)
            if not held:
                return None
            self._preempt(self._victim(now, held))

    def _publish(self, seq: Sequence) -> None:
        """Offer the blocks that have become full for reuse."""
        if not self.config.prefix_reuse or (seq.token_ids is None and seq.published >= len(seq.keys)):
            return
        size = self.config.block_size
        full = min(seq.computed // size, len(seq.blocks))
        if full <= seq.published:
            return
        if seq.token_ids is None:
            full = min(full, len(seq.keys))
        elif len(seq.keys) < full:
            done = len(seq.keys)
            parent = seq.keys[-1] if seq.keys else None
            ids = seq.token_ids[done * size : full * size]
            seq.keys = [*seq.keys, *block_keys(ids, size, seq.salt, parent)]
        for index in range(seq.published, full):
            self.kv.publish(seq.blocks[index], seq.keys[index])
        seq.published = max(seq.published, full)
