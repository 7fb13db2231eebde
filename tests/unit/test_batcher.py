from __future__ import annotations

from math import inf

import pytest

from hyperflexis.batcher import Batcher, BatcherConfig, RequestTooLong, Sampled
from hyperflexis.core.latency import Coefficients, OnlineFit
from hyperflexis.policy.catalog import STEPS
from hyperflexis.sequences import Sequence

LATENCY = Coefficients(0.01, 1e-4, 0.0, 1e-3, 0.0)


def batcher(step: str = "first_come", num_blocks: int = 16, max_batch: int = 4, tokens: int = 8) -> Batcher:
    functions = STEPS[step]
    config = BatcherConfig(num_blocks, 4, max_batch, tokens, 48)
    return Batcher(config, OnlineFit(LATENCY), functions.plan, functions.victim)


def request(id: str, prompt: int, limit: int = 4, first: int = 1) -> Sequence:
    return Sequence(id, prompt, limit, token_ids=[first] * prompt)


def run(one: Batcher, now: float = 0.0, stop: bool = False) -> list[tuple[str, str | None]]:
    batch = one.plan(now)
    assert batch is not None
    drawn = [Sampled(9, stop) for chunk in batch.chunks if chunk.samples]
    return [(emitted.seq.id, emitted.finish) for emitted in one.commit(batch, drawn, now, batch.predicted_s)]


def test_a_prompt_longer_than_an_iteration_is_computed_in_chunks() -> None:
    one = batcher()
    one.add(request("a", 19, limit=2), 0.0)
    assert [run(one) for _ in range(4)] == [[], [], [("a", None)], [("a", "length")]]
    assert one.plan(0.0) is None
    assert one.counters.prompt_tokens == 19
    assert one.counters.output_tokens == 2


def test_decodes_go_with_the_next_prompt_in_one_iteration() -> None:
    one = batcher()
    one.add(request("a", 4), 0.0)
    run(one)
    one.add(request("b", 4, first=2), 0.0)
    batch = one.plan(0.0)
    assert batch is not None
    assert [(chunk.seq.id, chunk.start, chunk.num_tokens) for chunk in batch.chunks] == [("a", 4, 1), ("b", 0, 4)]
    assert (batch.num_decodes, batch.kv_tokens, batch.prefill_tokens, batch.attention) == (1, 4, 4, 8.0)
    assert batch.predicted_s == pytest.approx(0.01 + 4e-4 + 1e-3)


def test_a_stop_token_ends_a_request() -> None:
    one = batcher()
    one.add(request("a", 4), 0.0)
    assert run(one, stop=True) == [("a", "stop")]
    assert one.kv_used_tokens == 0


def test_a_second_request_reuses_the_first_ones_prefix_but_not_its_last_token() -> None:
    one = batcher()
    one.add(request("a", 8, limit=1), 0.0)
    run(one)
    again = request("b", 8, limit=1)
    one.add(again, 0.0)
    batch = one.plan(0.0)
    assert batch is not None
    assert (batch.chunks[0].start, batch.chunks[0].num_tokens) == (4, 4)
    assert again.cached_tokens == one.counters.prefix_hit_tokens == 4


def test_output_is_reused_as_a_prefix_too() -> None:
    one = batcher()
    first = request("a", 6, limit=4)
    one.add(first, 0.0)
    while run(one)[-1][1] is None:
        pass
    assert first.token_ids is not None
    resumed = Sequence("b", 10, 4, token_ids=list(first.token_ids))
    one.add(resumed, 0.0)
    run(one)
    assert resumed.cached_tokens == 8


def test_when_kv_runs_out_the_latest_gives_way_and_both_still_end() -> None:
    one = batcher(num_blocks=5)
    one.add(request("a", 8, limit=8), 0.0)
    one.add(request("b", 8, limit=8, first=2), 1.0)
    ended: list[str] = []
    while one.sequences():
        ended += [id for id, finish in run(one, 2.0) if finish]
    assert ended == ["a", "b"]
    assert one.counters.preemptions > 0


def test_a_new_request_that_finds_no_room_does_not_hold_its_prefix_idle() -> None:
    # "a" holds three of four blocks; the cached prefix of "b" is the fourth, so "b" could take it and never move on.
    one = batcher(num_blocks=4, tokens=12)
    one.add(request("warm", 4, limit=1, first=2), 0.0)
    run(one)
    one.add(request("a", 9, limit=3), 0.0)
    run(one)
    late = request("b", 8, limit=1, first=2)
    one.add(late, 0.0)
    run(one)
    assert (late.started, late.blocks) == (False, [])


@pytest.mark.parametrize(("prompt", "says"), [(0, "empty"), (48, "48 prompt tokens and one output token exceed 48")])
def test_what_can_never_be_served_is_refused_at_once(prompt: int, says: str) -> None:
    one = batcher()
    with pytest.raises(RequestTooLong, match=says):
        one.add(request("a", prompt), 0.0)
    assert one.sequences() == []


def test_an_output_limit_beyond_the_context_is_cut() -> None:
    one = batcher()
    seq = request("a", 40, limit=1000)
    one.add(seq, 0.0)
    assert seq.max_output_tokens == 8


def test_one_id_cannot_be_here_twice() -> None:
    one = batcher()
    one.add(request("a", 4), 0.0)
    with pytest.raises(ValueError, match="already here"):
        one.add(request("a", 4), 0.0)


def test_a_prompt_that_waited_a_minute_runs_even_where_its_share_of_the_time_holds_no_chunk() -> None:
    slow = Coefficients(0.3, 0.5, 0.0, 0.0, 0.0)
    functions = STEPS["hyperflexis"]
    one = Batcher(BatcherConfig(16, 4, 4, 8, 48), OnlineFit(slow), functions.plan, functions.victim)
    seq = request("a", 20)
    seq.first_due = 1.0
    one.add(seq, 0.0)
    assert one.plan(100.0) is not None


def test_an_end_to_end_deadline_becomes_the_pace_of_what_is_left() -> None:
    one = batcher()
    seq = request("a", 4, limit=11)
    seq.expected_output_tokens = 11.0
    seq.last_due = 10.0
    one.add(seq, 0.0)
    run(one, 0.0)
    assert seq.pace_s == pytest.approx(1.0)
    assert seq.next_due == pytest.approx(1.0)
    run(one, 5.5)
    assert seq.pace_s == pytest.approx(0.5)


def test_without_promises_nothing_is_due() -> None:
    one = batcher()
    seq = request("a", 4)
    one.add(seq, 0.0)
    run(one)
    assert seq.next_due == inf
