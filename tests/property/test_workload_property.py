"""Whatever the workload, its arrivals keep the rules."""

from __future__ import annotations

from array import array
from itertools import pairwise
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from hyperflexis.bench_client import make_token_ids
from hyperflexis.core.slo import Slo
from hyperflexis.gateway import text
from hyperflexis.sim.workload import (
    Arrival,
    Arrivals,
    LogNormal,
    RateArrivals,
    SessionArrivals,
    SessionRow,
    StatisticalLengths,
    TraceArrivals,
    TraceRow,
    Workload,
    WorkloadClass,
    block_keys,
    generate,
    prefix_keys,
    scaled,
)

lognormals = st.builds(
    lambda median, sigma, low, span: LogNormal(median, sigma, low, low + span),
    st.floats(1, 5000),
    st.floats(0, 3),
    st.integers(1, 100),
    st.integers(0, 5000),
)
rates = st.builds(
    lambda rates, cv: RateArrivals(tuple((5.0 * i, r) for i, r in enumerate(rates)), cv),
    st.lists(st.floats(0, 20), min_size=1, max_size=4),
    st.floats(0.2, 4),
)
traces = st.builds(
    lambda gaps, start, scale, copies, jitter: TraceArrivals(
        "x", tuple(TraceRow(sum(gaps[:i]), 10 + i, 1 + i, (i,)) for i in range(len(gaps))), start, scale, copies, jitter
    ),
    st.lists(st.floats(0.5, 5), min_size=3, max_size=20),
    st.floats(0, 1),
    st.floats(0.1, 10),
    st.integers(1, 3),
    st.floats(0, 3),
)


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    arrivals: Arrivals = draw(st.one_of(rates, traces))
    classes = tuple(
        WorkloadClass(
            f"c{i}",
            Slo(),
            share=draw(st.floats(0.01, 1)),
            lengths=StatisticalLengths(draw(lognormals), draw(lognormals)),
        )
        for i in range(draw(st.integers(1, 3)))
    )
    return Workload(
        "w", draw(st.integers(0, 99)), draw(st.floats(1, 20)), draw(st.integers(2, 3000)), arrivals, classes
    )


@given(workloads())
@settings(max_examples=60, deadline=None)
def test_arrivals_keep_the_rules(workload: Workload) -> None:
    found = generate(workload)
    assert found == generate(workload)
    assert all(0.0 <= a.t < workload.duration_s for a in found)
    assert all(a.t <= b.t for a, b in pairwise(found))
    assert workload.max_context is not None
    for a in found:
        assert a.num_prompt_tokens >= 1 and a.num_output_tokens >= 1
        assert a.num_prompt_tokens + a.num_output_tokens <= workload.max_context


@given(lognormals, st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_quantiles_grow_and_stay_inside(lengths: LogNormal, u: float, v: float) -> None:
    low, high = sorted((lengths.quantile(min(u, v)), lengths.quantile(max(u, v))))
    assert low == lengths.quantile(min(u, v))
    assert lengths.minimum <= low <= high <= lengths.maximum


@given(traces, st.floats(0.2, 5))
@settings(max_examples=40, deadline=None)
def test_scaling_a_trace_only_compresses_its_time(trace: TraceArrivals, factor: float) -> None:
    classes = (WorkloadClass("c", Slo(), share=1.0),)
    whole = generate(Workload("w", 1, 20.0, None, trace, classes))
    fast = generate(scaled(Workload("w", 1, 20.0 / factor, None, trace, classes), factor))
    # Rounding may move a request across the end of the run.
    assert abs(len(whole) - len(fast)) <= 3
    for a, b in list(zip(whole, fast, strict=False))[:-3]:
        assert abs(a.t / factor - b.t) < 1e-6


@st.composite
def session_rows(draw: st.DrawFn) -> tuple[SessionRow, ...]:
    rows: list[SessionRow] = []
    longest = 0
    for _ in range(draw(st.integers(1, 8))):
        prompt = draw(st.integers(1, 6000))
        output = draw(st.integers(0, 1500))
        rows.append(
            SessionRow(float(draw(st.integers(0, 30))), prompt, output, draw(st.integers(0, min(prompt, longest))))
        )
        longest = max(longest, prompt + output)
    return tuple(rows)


def equal_at_the_start(a: list[bytes], b: list[bytes]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@given(session_rows(), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_each_request_of_a_session_finds_its_prefix(rows: tuple[SessionRow, ...], seed: int) -> None:
    source = SessionArrivals("s", (rows,), RateArrivals(((0.0, 0.2),)))
    found = generate(Workload("w", seed, 60.0, None, source, (WorkloadClass("c", Slo(), share=1.0),)))
    sent = [row for row in rows if row.num_output_tokens]
    sessions = {a.session: [b for b in found if b.session == a.session] for a in found}
    for arrivals in sessions.values():
        if len(arrivals) != len(sent):  # the end of the run cut it off
            continue
        in_order = [arrivals[at] for at in _places(sent)]
        for index, (row, arrival) in enumerate(zip(sent, in_order, strict=True)):
            assert (arrival.num_prompt_tokens, arrival.num_output_tokens) == (
                row.num_prompt_tokens,
                row.num_output_tokens,
            )
            earlier = [equal_at_the_start(block_keys(arrival, 16), block_keys(b, 16)) for b in in_order[:index]]
            if len(sent) == len(rows):  # else it may be in common with a prompt that was not sent
                assert max(earlier, default=0) >= 32 * (row.reusable_prefix_tokens // 512)


def _places(rows: list[SessionRow]) -> list[int]:
    """Where each row comes when all are sorted by time."""
    order = sorted(range(len(rows)), key=lambda index: rows[index].t)
    return [order.index(index) for index in range(len(rows))]


named = st.builds(
    lambda ids, prompt: Arrival(0.0, "c", Slo(), 1.0, prompt, 5, "", "", tuple(ids[: -(-prompt // 512)])),
    st.lists(st.integers(0, 2), min_size=8, max_size=8),
    st.integers(1, 4096),
)


@given(named, named)
@settings(max_examples=150, deadline=None)
def test_equal_keys_are_equal_tokens(a: Arrival, b: Arrival) -> None:
    """The simulator's keys say of two prompts what the gateway's say of the tokens that the bench sends for them."""
    tokens = [make_token_ids(arrival, Random(1)) for arrival in (a, b)]
    ours = [list(prefix_keys(arrival)) for arrival in (a, b)]
    theirs = [list(text.prefix_keys(array("I", ids).tobytes(), "")) for ids in tokens]
    assert [len(keys) for keys in ours] == [len(keys) for keys in theirs]
    # An entry that differs has two keys: the simulator's differ from its first on, as random tokens do.
    assert [x == y for x, y in zip(*ours, strict=False)] == [x == y for x, y in zip(*theirs, strict=False)]
    shared = equal_at_the_start(*(block_keys(arrival, 16) for arrival in (a, b))) * 16
    assert tokens[0][:shared] == tokens[1][:shared]
