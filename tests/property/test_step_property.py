"""What a plan remembers from the one before changes nothing in it."""

from __future__ import annotations

from math import inf
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from hyperflexis.core.latency import Coefficients
from hyperflexis.policy import step
from hyperflexis.sequences import Queues, Sequence

LATENCIES = (
    Coefficients(c0=0.010, c1=1e-4, c2=1e-9, c3=5e-4, c4=1e-7, q90=0.1),
    Coefficients(c0=0.012, c1=1.3e-4, c2=1e-9, c3=4e-4, c4=1e-7, q90=0.1),
)
LIMITS = step.StepLimits(max_batch=12, max_batch_tokens=1024, kv_capacity_tokens=100_000, kv_free_tokens=60_000)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1_000_000), st.integers(1, 60))
def test_a_queue_that_was_ranked_before_is_planned_as_one_that_was_not(seed: int, arrivals: int) -> None:
    random, queues, now, number = Random(seed), Queues(), 0.0, 0
    latency, remembered = LATENCIES[0], 0
    for _ in range(120):
        for _ in range(random.choice((0, 0, 1)) if number else arrivals):
            tokens, due_s = random.randrange(1, 3000), random.choice((0.2, 1.0, 5.0, inf))
            seq = Sequence(str(number), tokens, random.randrange(1, 60), first_due=now + due_s)
            seq.pace_limit_s, seq.value = random.choice((0.05, 0.2, inf)), random.choice((1.0, 4.0))
            queues.add(seq, now)
            number += 1
        if random.random() < 0.05:
            latency = random.choice(LATENCIES)
        if len(queues.running) and random.random() < 0.05:
            queues.preempt(next(iter(queues.running)))
        before = queues.waiting.memo
        found = step.plan(now, queues.waiting, queues.running, latency, LIMITS)
        ranked = queues.waiting.memo
        remembered += before is not None and ranked is before
        queues.waiting.memo = None
        for seq in queues.waiting:
            seq.memo = None
        assert step.plan(now, queues.waiting, queues.running, latency, LIMITS) == found
        queues.waiting.memo = ranked

        for seq in found.late:
            queues.waiting.give_up(seq)
        now += random.choice((0.005, 0.02, 0.3))
        if queues.running:
            queues.running.tick(now)
        for seq, tokens in found.prefills:
            queues.begin(seq)
            queues.prefilled(seq, seq.computed + tokens)
            if not seq.remaining_prefill:
                queues.took_token(seq, now)
                queues.run(seq)
        for seq in [seq for seq in queues.running if seq.output_tokens >= seq.max_output_tokens]:
            queues.end(seq)
    assert remembered > 10, "else this compares nothing"
