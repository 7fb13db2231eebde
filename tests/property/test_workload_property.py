"""Whatever the workload, its arrivals keep the rules."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from hyperflexis.core.slo import Slo
from hyperflexis.sim.workload import (
    Arrivals,
    LogNormal,
    RateArrivals,
    StatisticalLengths,
    TraceArrivals,
    TraceRow,
    Workload,
    WorkloadClass,
    generate,
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
