"""What requests have in common: hash_ids of traces and sessions, and the keys made of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import takewhile

import pytest

from hyperflexis.core.slo import Slo
from hyperflexis.errors import ConfigError
from hyperflexis.sim.workload import (
    Arrival,
    Phase,
    RateArrivals,
    SessionArrivals,
    SessionRow,
    TraceArrivals,
    TraceRow,
    Workload,
    WorkloadClass,
    block_keys,
    generate,
    prefix_keys,
    scaled,
)

AGENT = WorkloadClass("agent", Slo(1.0), share=1.0)
# A conversation of three requests, and a helper's request beside it that shares the first block only.
SESSION = (
    SessionRow(0.0, 1000, 100, 0),
    SessionRow(4.0, 2000, 100, 1090),
    SessionRow(1.0, 700, 10, 600),
    SessionRow(8.0, 2500, 50, 2048),
)


def arrival(prompt: int, output: int, hash_ids: tuple[int, ...], tenant: str = "") -> Arrival:
    return Arrival(0.0, "c", Slo(), 1.0, prompt, output, tenant, "", hash_ids)


def sessions(
    *rows: tuple[SessionRow, ...], rate: float = 0.1, think_scale: float = 1.0, max_context: int | None = None
) -> Workload:
    source = SessionArrivals("s.csv", rows, RateArrivals(((0.0, rate),)), think_scale)
    return Workload("w", 1, 200.0, max_context, source, (AGENT,))


def by_session(found: list[Arrival]) -> list[list[Arrival]]:
    return [[a for a in found if a.session == session] for session in dict.fromkeys(a.session for a in found)]


def in_common(a: Arrival, b: Arrival) -> int:
    pairs = zip(block_keys(a, 16), block_keys(b, 16), strict=False)
    return 16 * sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def test_a_session_replays_its_times_lengths_and_prefixes() -> None:
    whole = [s for s in by_session(generate(sessions(SESSION))) if len(s) == len(SESSION)]
    assert len(whole) > 5
    for first, helper, second, third in whole:
        assert [a.t - first.t for a in (helper, second, third)] == pytest.approx([1.0, 4.0, 8.0])
        assert [(a.num_prompt_tokens, a.num_output_tokens) for a in (first, second)] == [(1000, 100), (2000, 100)]
        # 1,090 of the first context (prompt and answer) are two whole blocks, 600 one, 2,048 four.
        assert in_common(first, second) == 1024 and in_common(second, third) == 2048
        assert in_common(second, helper) == 512
        assert len(third.hash_ids) == 5


def test_a_prefix_is_that_of_the_latest_context_as_long() -> None:
    rows = (SessionRow(0.0, 2000, 10, 0), SessionRow(1.0, 2000, 10, 600), SessionRow(2.0, 2000, 10, 1100))
    first, second, third = by_session(generate(sessions(rows)))[0]
    assert (in_common(first, third), in_common(second, third)) == (512, 1024)


def test_sessions_share_nothing_with_each_other() -> None:
    found = by_session(generate(sessions(SESSION)))
    ids = [{h for a in session for h in a.hash_ids} for session in found]
    assert len(found) > 10 and sum(map(len, ids)) == len(set.union(*ids))


def test_the_times_in_a_session_are_scaled_and_its_starts_are_not() -> None:
    slow, fast = (by_session(generate(sessions(SESSION, think_scale=scale))) for scale in (1.0, 0.5))
    assert [s[0].t for s in slow] == [s[0].t for s in fast]
    assert [a.t - fast[0][0].t for a in fast[0]] == pytest.approx([0.0, 0.5, 2.0, 4.0])


def test_another_rate_keeps_the_sessions() -> None:
    w = sessions(SESSION, (SessionRow(0.0, 30, 3, 0),))
    slow, fast = by_session(generate(w)), by_session(generate(scaled(w, 2.0)))
    assert len(fast) > 1.5 * len(slow)
    for a, b in zip(slow, fast, strict=False):
        assert a[0].num_prompt_tokens == b[0].num_prompt_tokens and a[0].t == pytest.approx(2.0 * b[0].t)


def test_a_session_ends_where_it_outgrows_the_context() -> None:
    found = by_session(generate(sessions(SESSION, max_context=2099)))
    assert {tuple(a.num_prompt_tokens for a in session) for session in found} == {(1000,)}
    found = by_session(generate(sessions(SESSION, max_context=2100)))
    assert (1000, 700, 2000) in {tuple(a.num_prompt_tokens for a in session) for session in found}


def test_sessions_that_begin_beyond_the_context_are_never_drawn() -> None:
    long = (SessionRow(0.0, 5000, 100, 0),)
    both = generate(sessions(SESSION, long, max_context=4000))
    alone = generate(sessions(SESSION, max_context=4000))
    assert {a.t for a in both} == {a.t for a in alone}
    with pytest.raises(
        ConfigError, match=r"s.csv: every session begins with more than max_context \(4000\) tokens; raise"
    ):
        generate(sessions(long, max_context=4000))


def test_a_request_cut_off_before_its_answer_leaves_its_prompt() -> None:
    rows = (SessionRow(0.0, 600, 10, 0), SessionRow(1.0, 1100, 0, 600), SessionRow(2.0, 1200, 10, 1100))
    first, last = by_session(generate(sessions(rows)))[0]
    assert (first.num_prompt_tokens, last.num_prompt_tokens) == (600, 1200)
    # Block 3 was the end of the prompt that was not sent, block 2 is in common with it.
    assert (first.hash_ids, last.hash_ids) == ((0, 1), (0, 2, 4))


def test_all_requests_of_a_session_are_of_one_class() -> None:
    w = sessions(SESSION)
    classes = (replace(AGENT, share=0.5), WorkloadClass("other", Slo(), share=0.5))
    w = replace(w, classes=classes, phases=(Phase(50.0, (("agent", 0.2),)),))
    found = by_session(generate(w))
    assert all(len({a.slo_class for a in session}) == 1 for session in found)
    assert {session[0].slo_class for session in found} == {"agent", "other"}


def test_too_many_requests_of_sessions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperflexis.sim.workload.MAX_ARRIVALS", 50)
    with pytest.raises(ConfigError, match="lower rate_rps or duration_s"):
        generate(sessions(SESSION, rate=0.2))


def test_classes_with_arrivals_of_their_own_share_nothing() -> None:
    rows = tuple(TraceRow(float(t), 600, 5, (1, 2), "s") for t in range(10))
    trace = TraceArrivals("x.csv", rows)
    classes = tuple(WorkloadClass(name, Slo(), arrivals=trace) for name in "ab")
    found = generate(Workload("w", 1, 10.0, None, None, classes))
    ids = {name: {h for a in found if a.slo_class == name for h in a.hash_ids} for name in "ab"}
    assert not ids["a"] & ids["b"]
    assert len({a.session for a in found}) == 2


def test_prefix_keys_are_two_an_entry_of_whole_blocks_and_64_at_most() -> None:
    keys = prefix_keys(arrival(1800, 10, (7, 8, 9, 10)))
    assert len(keys) == 1800 // 256 and len(set(keys)) == 7
    assert all(0 <= key < 1 << 64 for key in keys)
    assert len(prefix_keys(arrival(30_000, 10, tuple(range(59))))) == 64
    assert prefix_keys(arrival(255, 10, (7,))) == prefix_keys(arrival(5000, 10, ())) == ()
    # Only what is named has keys.
    assert len(prefix_keys(arrival(5000, 10, (7,)))) == 2


@pytest.mark.parametrize("keys_of", [prefix_keys, lambda a: block_keys(a, 16)], ids=["prefix", "block"])
def test_keys_are_equal_as_far_as_the_prompts_are(keys_of: object) -> None:
    assert callable(keys_of)
    a, b = keys_of(arrival(1536, 10, (1, 2, 3))), keys_of(arrival(1536, 99, (1, 4, 3)))
    third = len(a) // 3
    assert a[:third] == b[:third] and not set(a[third:]) & set(b[third:])  # chained: the last entry is equal
    assert not set(a) & set(keys_of(arrival(1536, 10, (1, 2, 3), "other tenant")))


def test_block_keys_end_with_what_is_named() -> None:
    assert len(block_keys(arrival(1000, 500, (1, 2)), 16)) == 1000 // 16
    assert len(block_keys(arrival(1000, 500, (1, 2, 3)), 16)) == 1500 // 16  # the third entry is the answer's
    assert len(block_keys(arrival(1000, 500, (1,)), 16)) == 512 // 16
    assert block_keys(arrival(1000, 500, ()), 16) == []
    assert len(set(block_keys(arrival(30_000, 1, tuple(range(59))), 16))) == 1875
    with pytest.raises(ValueError, match="must divide 512"):
        block_keys(arrival(1000, 500, (1, 2)), 48)


def test_keys_are_the_same_on_every_machine() -> None:
    named = arrival(600, 10, (1, 2), "acme")
    assert prefix_keys(named) == PREFIX_KEYS
    assert block_keys(named, 256)[1].hex() == BLOCK_KEY


PREFIX_KEYS = (887560740628864047, 9844724298389454323)
BLOCK_KEY = "2f1cc485ca3f510cf3fd28fd967c9f880100"
