"""The Batcher against a machine that checks every token of KV that it is told to read or write."""

from __future__ import annotations

from math import inf
from random import Random

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from hyperflexis.batcher import Batch, Batcher, BatcherConfig, RequestTooLong, Sampled
from hyperflexis.core.latency import Coefficients, OnlineFit
from hyperflexis.policy.catalog import STEPS
from hyperflexis.sequences import Sequence

NOTHING = object()


class Machine:
    """A device whose KV slots remember the whole context that was computed into them."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.slots: list[list[object]] = [[NOTHING] * block_size for _ in range(num_blocks)]
        self.block_size = block_size

    def run(self, batch: Batch, live: list[Sequence]) -> list[Sampled]:
        tables = {id(seq): list(seq.blocks) for seq in live}
        drawn = []
        for chunk in batch.chunks:
            seq = chunk.seq
            assert seq.token_ids is not None
            end = chunk.start + chunk.num_tokens
            assert len(seq.blocks) * self.block_size >= end, "a token without a slot"
            assert len(set(seq.blocks)) == len(seq.blocks), "a block twice in one table"
            for position in range(chunk.start, end):
                block, offset = seq.blocks[position // self.block_size], position % self.block_size
                holders = [key for key, table in tables.items() if block in table]
                assert holders == [id(seq)], "a write into a block that another request holds"
                self.slots[block][offset] = self.context(seq, position)
            for position in range(end):
                block, offset = seq.blocks[position // self.block_size], position % self.block_size
                assert self.slots[block][offset] == self.context(seq, position), "attention over a wrong slot"
            assert chunk.samples == (end == seq.num_tokens)
            if chunk.samples:
                drawn.append(Sampled(next_token(seq.salt, seq.token_ids[:end])))
        return drawn

    def context(self, seq: Sequence, position: int) -> object:
        assert seq.token_ids is not None
        return (seq.salt, *seq.token_ids[: position + 1])


def next_token(salt: str, tokens: list[int]) -> int:
    """A draw that depends on all of the context, from few ids so that prefixes meet."""
    return (sum((i + 3) * token for i, token in enumerate(tokens)) + len(salt)) % 3


def continuation(salt: str, prompt: list[int], n: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(next_token(salt, tokens))
    return tokens[len(prompt) :]


# c1 of half a second a token stands for a device on which no chunk worth its place fits any budget.
SPEEDS = (Coefficients(0.01, 1e-3, 1e-6, 1e-3, 1e-5), Coefficients(0.3, 0.5, 0.0, 0.0, 0.0))


def draw_request(random: Random) -> dict[str, object]:
    due = (inf, inf, random.uniform(-1.0, 20.0), random.uniform(0.0, 0.5))
    start = random.choice(([0, 1, 0, 1, 1, 0], [0, 0, 1, 0, 1, 1], []))
    return {
        "prompt": start + [random.randrange(2) for _ in range(random.randint(1, 9))],
        "limit": random.randint(1, 10),
        "salt": random.choice(("", "", "other")),
        "value": random.choice((0.5, 1.0, 4.0)),
        "first_due_s": random.choice(due),
        "pace_s": random.choice((inf, random.uniform(1e-3, 1.0))),
        "last_due_s": random.choice(due),
        "expected": random.uniform(1.0, 20.0),
    }


class Run:
    """A Batcher, its machine, and what its requests should get."""

    def __init__(self, config: BatcherConfig, step: str, latency: Coefficients) -> None:
        functions = STEPS[step]
        self.config = config
        self.batcher = Batcher(config, OnlineFit(latency), functions.plan, functions.victim)
        self.machine = Machine(config.num_blocks, config.block_size)
        self.now = 0.0
        self.open: dict[str, Sequence] = {}
        self.limits: dict[str, int] = {}
        self.added = 0
        self.computed: dict[str, int] = {}

    def add(self, spec: dict[str, object]) -> None:
        prompt = list(spec["prompt"])  # type: ignore[call-overload]
        self.added += 1
        seq = Sequence(
            id=f"r{self.added}",
            num_prompt_tokens=len(prompt),
            max_output_tokens=spec["limit"],  # type: ignore[arg-type]
            token_ids=prompt,
            salt=spec["salt"],  # type: ignore[arg-type]
            value=spec["value"],  # type: ignore[arg-type]
            first_due=self.now + spec["first_due_s"],  # type: ignore[operator]
            pace_limit_s=spec["pace_s"],  # type: ignore[arg-type]
            last_due=self.now + spec["last_due_s"],  # type: ignore[operator]
            expected_output_tokens=spec["expected"],  # type: ignore[arg-type]
        )
        try:
            self.batcher.add(seq, self.now)
        except RequestTooLong:
            assert len(prompt) + 1 > min(self.config.context_length, self.config.kv_capacity_tokens)
            return
        self.open[seq.id] = seq
        self.limits[seq.id] = seq.max_output_tokens

    def cancel(self, index: int) -> None:
        if self.open:
            id = sorted(self.open)[index % len(self.open)]
            seq = self.open.pop(id)
            assert self.batcher.cancel(id) is seq
            assert self.batcher.cancel(id) is None
            assert not seq.blocks

    def iterate(self, cancel_in_flight: int | None = None) -> bool:
        batch = self.batcher.plan(self.now)
        if batch is None:
            assert not self.open, "nothing planned while work waits"
            return False
        self.check(batch)
        drawn = self.machine.run(batch, self.batcher.sequences())
        if cancel_in_flight is not None:
            self.cancel(cancel_in_flight)
        self.now += 0.05
        for one in self.batcher.commit(batch, drawn, self.now, 0.05):
            seq = one.seq
            assert seq.id in self.open, "a token of a request that had ended"
            assert seq.token_ids is not None
            output = seq.token_ids[seq.num_prompt_tokens :]
            assert output == continuation(seq.salt, seq.token_ids[: seq.num_prompt_tokens], seq.output_tokens)
            assert (one.finish == "length") == (seq.output_tokens == self.limits[seq.id])
            if one.finish:
                del self.open[seq.id]
        assert {seq.id for seq in self.batcher.sequences()} == set(self.open)
        held = {block for seq in self.batcher.sequences() for block in seq.blocks}
        assert self.batcher.kv.held == len(held), "blocks that nobody holds are not free"
        return True

    def check(self, batch: Batch) -> None:
        config = self.config
        assert batch.chunks
        assert len({chunk.seq.id for chunk in batch.chunks}) == len(batch.chunks)
        assert len(batch.chunks) <= config.max_batch
        assert sum(chunk.num_tokens for chunk in batch.chunks) <= config.max_batch_tokens
        decodes, prefills = batch.chunks[: batch.num_decodes], batch.chunks[batch.num_decodes :]
        assert all(chunk.num_tokens == 1 and chunk.samples for chunk in decodes)
        assert batch.kv_tokens == sum(chunk.start for chunk in decodes)
        assert batch.prefill_tokens == sum(chunk.num_tokens for chunk in prefills)
        assert all(chunk.start == chunk.seq.computed for chunk in batch.chunks)
        started = [seq for seq in self.batcher.sequences() if seq.started]
        assert len(started) <= config.max_batch


# Hypothesis picks seeds and prints one that fails; drawn step by step, its histories rarely fill the cache.
@pytest.mark.parametrize("step", sorted(STEPS))
@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_any_history_computes_each_token_once_in_order_and_ends(step: str, seed: int) -> None:
    random = Random(seed)
    max_batch = random.randint(1, 5)
    config = BatcherConfig(
        num_blocks=random.randint(2, 12),
        block_size=random.randint(1, 4),
        max_batch=max_batch,
        max_batch_tokens=max_batch + random.randint(1, 12),
        context_length=24,
        prefix_reuse=random.random() < 0.8,
    )
    run = Run(config, step, random.choice(SPEEDS))
    for _ in range(random.randint(5, 80)):
        match random.choice(("add", "add", "cancel", "run", "run", "run", "cancel in flight", "wait")):
            case "add":
                run.add(draw_request(random))
            case "cancel":
                run.cancel(random.randrange(30))
            case "cancel in flight":
                run.iterate(random.randrange(30))
            case "run":
                run.iterate()
            case _:
                run.now += random.choice((0.01, 1.0, 70.0))
    work = sum(seq.num_tokens + seq.max_output_tokens for seq in run.open.values())
    # Each preemption may cost its victim all of its tokens again; far beyond that nothing moves.
    for _ in range(100 + 40 * work):
        if not run.iterate():
            break
    assert not run.open, "requests that never end"
    assert run.batcher.kv.held == 0
    assert run.batcher.num_running == run.batcher.num_waiting == 0
    counters = run.batcher.counters
    event(f"preempted: {counters.preemptions > 0}, prefix hits: {counters.prefix_hit_tokens > 0}")


def test_the_machine_notices_a_wrong_block() -> None:
    run = Run(BatcherConfig(4, 2, 2, 8, 8), "first_come", Coefficients(0.01, 1e-3, 0.0, 0.0, 0.0))
    run.add({"prompt": [0, 1, 1], "limit": 3, "salt": "", "value": 1.0, "expected": 3.0} | DUE_NEVER)
    run.iterate()
    seq = run.open["r1"]
    seq.blocks[0] = next(block for block in range(4) if block not in seq.blocks)
    with pytest.raises(AssertionError, match="wrong slot"):
        run.iterate()


DUE_NEVER: dict[str, object] = {"first_due_s": inf, "pace_s": inf, "last_due_s": inf}
