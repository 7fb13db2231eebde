"""Two Batchers that hand requests to each other: KV goes from one machine's slots into the other's, and nobody may
notice but by the time that passes."""

from __future__ import annotations

from math import inf
from random import Random

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from tests.property.test_batcher_property import SPEEDS, Run, draw_request

from hyperflexis.batcher import BatcherConfig
from hyperflexis.core.latency import Coefficients
from hyperflexis.sequences import Sequence


class Pair:
    """Two instances and what moves between them: of each request on its way the sequence at both ends."""

    def __init__(self, random: Random, step: str) -> None:
        speed = random.choice(SPEEDS)
        self.runs = [Run(self.sizes(random), step, speed) for _ in range(2)]
        self.random = random
        self.moving: dict[str, tuple[int, Sequence, Sequence]] = {}
        self.moved = 0
        self.added = 0

    @staticmethod
    def sizes(random: Random) -> BatcherConfig:
        max_batch = random.randint(1, 5)
        return BatcherConfig(
            num_blocks=random.randint(2, 12),
            block_size=random.randint(1, 4),
            max_batch=max_batch,
            max_batch_tokens=max_batch + random.randint(1, 12),
            context_length=24,
            prefix_reuse=random.random() < 0.8,
        )

    def add(self, at: int) -> None:
        # Ids are unique in a fleet.
        run = self.runs[at]
        run.added = self.added = self.added + 1
        run.add(draw_request(self.random))

    def expect(self, at: int) -> None:
        """The other instance makes room for a request of this one, in whatever state that is."""
        run, other = self.runs[at], self.runs[1 - at]
        ids = sorted(id for id in run.open if id not in self.moving)
        if not ids:
            return
        seq = run.open[self.random.choice(ids)]
        assert seq.token_ids is not None
        if seq.num_tokens + 1 > min(other.config.context_length, other.config.kv_capacity_tokens):
            return
        twin = Sequence(
            id=seq.id,
            num_prompt_tokens=seq.num_prompt_tokens,
            max_output_tokens=seq.max_output_tokens,
            token_ids=seq.token_ids[: seq.num_prompt_tokens],
            salt=seq.salt,
            value=seq.value,
            first_due=seq.first_due,
            pace_limit_s=seq.pace_limit_s,
            last_due=seq.last_due,
            expected_output_tokens=seq.expected_output_tokens,
        )
        if other.batcher.expect(twin, other.now) is not None:
            self.moving[seq.id] = (at, seq, twin)

    def hand_over(self) -> None:
        """All KV that a request has goes over, and it goes on there; not while an iteration is under way."""
        ready = [id for id, (at, seq, _) in self.moving.items() if seq in self.runs[at].batcher.sequences()]
        if not ready:
            return
        id = self.random.choice(ready)
        at, seq, twin = self.moving.pop(id)
        source, target = self.runs[at], self.runs[1 - at]
        runs = source.batcher.runs(id)
        if runs:
            source.batcher.park(id)
            if self.random.random() < 0.2:
                source.batcher.unpark(id)  # the other did not take it
                target.batcher.cancel(id)
                return
        # A target that holds less ends it at once: what engines do then is theirs.
        if seq.output_tokens >= twin.max_output_tokens or not target.batcher.room_for(id, seq.num_tokens):
            if runs:
                source.batcher.unpark(id)
            target.batcher.cancel(id)
            return
        assert seq.token_ids is not None
        held = seq.computed if seq.started else 0  # what waits may count on a prefix that it does not hold yet
        for position in range(twin.computed, held):
            slot = source.machine.slots[seq.blocks[position // source.config.block_size]]
            block = twin.blocks[position // target.config.block_size]
            target.machine.slots[block][position % target.config.block_size] = slot[position % source.config.block_size]
        computed = max(twin.computed, held)
        output = seq.token_ids[seq.num_prompt_tokens :]
        source.batcher.cancel(id)
        del source.open[id]
        target.batcher.arrived(id, computed, output, target.now, target.now if output else None)
        target.open[id] = twin
        target.limits[id] = twin.max_output_tokens
        self.moved += 1

    def give_up(self) -> None:
        """The one that expects it is not to have it after all."""
        if self.moving:
            id = self.random.choice(sorted(self.moving))
            at, _, _ = self.moving.pop(id)
            assert self.runs[1 - at].batcher.cancel(id) is not None

    def iterate(self, at: int) -> bool:
        run = self.runs[at]
        expected = {id: twin for id, (source, _, twin) in self.moving.items() if source != at}
        run.open |= expected
        try:
            # What is expected may hold all that the others need: they wait for it.
            return not (expected and run.batcher.plan(run.now) is None) and run.iterate()
        finally:
            for id in expected:
                del run.open[id]


@pytest.mark.parametrize("step", ["hyperflexis", "first_come"])
@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_requests_that_are_handed_over_go_on_as_if_nothing_had_happened(step: str, seed: int) -> None:
    random = Random(seed)
    pair = Pair(random, step)
    for _ in range(random.randint(5, 100)):
        at = random.randrange(2)
        match random.choice(("add", "expect", "hand over", "hand over", "give up", "cancel", "run", "run", "run")):
            case "add":
                pair.add(at)
            case "expect":
                pair.expect(at)
            case "hand over":
                pair.hand_over()
            case "give up":
                pair.give_up()
            case "cancel":
                pair.runs[at].cancel(random.randrange(30))
                for id, (source, seq, _) in list(pair.moving.items()):
                    if seq.finished:
                        assert pair.runs[1 - source].batcher.cancel(id) is not None
                        del pair.moving[id]
            case _:
                pair.iterate(at)
    while pair.moving:
        pair.give_up()
    for run in pair.runs:
        work = sum(seq.num_tokens + seq.max_output_tokens for seq in run.open.values())
        for _ in range(100 + 40 * work):
            if not run.iterate():
                break
        assert not run.open, "requests that never end"
        assert run.batcher.kv.held == 0, "blocks that nobody holds are not free"
    event(f"moved: {pair.moved > 0}")


def test_an_expected_request_takes_its_blocks_and_place_at_once() -> None:
    latency = Coefficients(0.01, 1e-3, 0.0, 0.0, 0.0)
    run = Run(BatcherConfig(4, 4, 2, 16, 16, prefix_reuse=False), "first_come", latency)
    seq = Sequence("a", 9, 4, [1] * 9)
    assert run.batcher.expect(seq, 0.0) == 0
    assert run.batcher.kv.held == 3
    assert run.batcher.expect(Sequence("b", 5, 4, [1] * 5), 0.0) is None, "two blocks are needed, one is free"
    assert run.batcher.kv.held == 3
    run.add({"prompt": [1], "limit": 1, "salt": "", "value": 1.0, "expected": 1.0} | NEVER)
    run.add({"prompt": [1], "limit": 1, "salt": "", "value": 1.0, "expected": 1.0} | NEVER)
    batch = run.batcher.plan(0.0)
    assert batch is not None and len(batch.prefills) == 1, "one of two places is taken"
    assert run.batcher.cancel("a") is seq
    assert run.batcher.kv.held == 1


def test_what_is_due_after_a_handoff_follows_the_first_token() -> None:
    run = Run(BatcherConfig(8, 4, 2, 16, 32), "hyperflexis", Coefficients(0.01, 1e-3, 0.0, 0.0, 0.0))
    seq = Sequence("a", 5, 8, [1] * 5, first_due=10.0, pace_limit_s=0.5)
    seq.reported_before = 4
    run.batcher.expect(seq, 0.0)
    run.batcher.arrived("a", 5, [7], now=9.2, first_token_at=9.0)
    assert [(one.id, one.output_tokens) for one in run.batcher.take_progress()] == [("a", 5)]
    assert seq.next_due == pytest.approx(9.5)
    early = Sequence("b", 5, 8, [1] * 5, first_due=10.0, pace_limit_s=0.5)
    run.batcher.expect(early, 0.0)
    run.batcher.arrived("b", 4, [], now=9.2, first_token_at=None)
    assert early.next_due == pytest.approx(10.0), "it has had none"


NEVER: dict[str, object] = {"first_due_s": inf, "pace_s": inf, "last_due_s": inf}
