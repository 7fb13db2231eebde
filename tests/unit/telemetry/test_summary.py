"""Figures from records: what counts, what does not, and how."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperflexis.core.record import Record, RecordOutcome, Run
from hyperflexis.core.slo import Slo
from hyperflexis.telemetry.summary import e2e_cap_s, quantile, resampled_median, summarise

SLO = Slo(ttft_s=1.0, tpot_s=0.1)


def done(at: float, ttft_s: float, e2e_s: float, tokens: int = 11, slo: Slo = SLO, slo_class: str = "chat") -> Record:
    return Record(slo_class, slo, at, 100, tokens, "finished", ttft_s, e2e_s, tokens)


def lost(at: float, outcome: RecordOutcome, ttft_s: float | None = None) -> Record:
    return Record("chat", SLO, at, 100, 11, outcome, ttft_s)


RUN = Run(
    (
        done(0.0, 0.5, 1.5),  # all promises held: 0.1 s a token
        done(1.0, 0.5, 1.6),  # 0.11 s a token: too slow
        done(2.0, 1.5, 2.0),  # late first token
        done(3.0, 0.9, 0.9, tokens=1),  # one token has no pace
        lost(4.0, "rejected"),
        lost(5.0, "failed", 0.2),
        lost(6.0, "unfinished"),
        lost(7.0, "cancelled"),
        done(8.0, 4.0, 9.0, slo=Slo(e2e_s=10.0), slo_class="batch"),
    ),
    duration_s=10.0,
    ended_s=20.0,
)


def test_attainment_is_strict_and_cancelled_do_not_count() -> None:
    s = summarise([RUN])
    assert s.requests == 8 and s.attainment == 3 / 8
    assert s.attainment_by_class == {"chat": 2 / 7, "batch": 1.0}
    assert s.goodput_rps == pytest.approx(0.3)
    assert (s.rejected, s.failed, s.unfinished, s.cancelled) == (1, 1, 1, 1)
    assert (s.classes["chat"].rejected, s.classes["chat"].failed, s.classes["chat"].unfinished) == (1, 1, 1)


def test_lost_requests_enter_the_mean_with_the_time_to_the_end() -> None:
    s = summarise([RUN])
    ends = [1.5, 1.6, 2.0, 0.9, 16.0, 15.0, 14.0, 9.0]
    assert s.mean_e2e_s == pytest.approx(sum(ends) / 8)
    # The cap of a chat request of 11 tokens is 3 x (1 + 10 x 0.1) = 6 s; of the batch request 30 s.
    assert s.mean_capped_e2e_s == pytest.approx((sum(min(e, 6.0) for e in ends[:7]) + 9.0) / 8)


def test_caps() -> None:
    assert e2e_cap_s(done(0, 1, 1, tokens=1)) == 3.0
    assert e2e_cap_s(done(0, 1, 1, slo=Slo())) == float("inf")
    assert e2e_cap_s(done(0, 1, 1, slo=Slo(1.0, 1.0, 2.0))) == 6.0


def test_latency_figures() -> None:
    s = summarise([RUN])
    assert s.p50_ttft_ms == pytest.approx(700.0)  # 0.2 0.5 0.5 0.9 1.5 4.0
    assert s.classes["chat"].p50_tpot_ms == pytest.approx(100.0)  # 50, 100, 110
    assert s.classes["batch"].p99_e2e_s == pytest.approx(9.0)


def test_runs_are_pooled() -> None:
    s = summarise([RUN, RUN])
    assert s.requests == 16 and s.attainment == 3 / 8 and s.goodput_rps == pytest.approx(0.3)


def test_nothing_gives_no_figures_and_no_error() -> None:
    s = summarise([Run((), 10.0, 10.0)])
    assert s.attainment is None and s.p50_ttft_ms is None and s.mean_e2e_s is None and s.ci95 == {}


def test_intervals_hold_the_figure_and_shrink_with_more_runs() -> None:
    def run(n: int) -> Run:
        ttfts = (0.5 if (i * 7) % 10 < 7 else 2.0 for i in range(n))
        return Run(tuple(done(float(i), ttft_s, ttft_s + 0.5) for i, ttft_s in enumerate(ttfts)), float(n), n + 5.0)

    narrow, wide = summarise([run(1000)]).ci95["attainment"], summarise([run(60)]).ci95["attainment"]
    assert narrow[0] <= 0.7 <= narrow[1] and wide[0] <= 0.7 <= wide[1]
    assert narrow[1] - narrow[0] < wide[1] - wide[0]
    assert summarise([run(60)]).ci95 == summarise([run(60)]).ci95


def test_classes_have_intervals_of_their_own() -> None:
    chat = [done(float(i), ttft_s, ttft_s + 0.5) for i in range(60) for ttft_s in (0.5 if i % 3 else 2.0,)]
    batch = [done(i + 0.5, 0.5, 2.0, slo=Slo(e2e_s=10.0), slo_class="batch") for i in range(60)]
    ci95 = summarise([Run(tuple(chat + batch), 60.0, 70.0)]).ci95
    assert ci95["attainment_by_class.batch"] == (1.0, 1.0)
    low, high = ci95["attainment_by_class.chat"]
    assert low <= 2 / 3 <= high and low < high


@given(st.lists(st.lists(st.integers(0, 9), min_size=0, max_size=8), min_size=2, max_size=8), st.randoms())
def test_the_median_of_a_resample_is_that_of_the_sample_written_out(parts: list[list[int]], random: Random) -> None:
    blocks = [(sorted(float(v) for v in part), random.randint(1, 3)) for part in parts]
    written_out = [v for part, times in blocks for v in part * times]
    if written_out:
        values = sorted({v for part, _ in blocks for v in part})
        assert resampled_median(blocks, values) == quantile(written_out, 0.5)


def test_classes_come_tightest_promise_first() -> None:
    slow, fast = Slo(2.0), Slo(0.2)
    records = (done(0, 1, 1, slo=Slo(), slo_class="z"), done(0, 1, 1, slo=slow, slo_class="a"), done(0, 1, 1))
    run = Run(
        (*records, done(0, 1, 1, slo=fast, slo_class="y"), done(0, 1, 1, slo=Slo(e2e_s=9.0), slo_class="x")), 1, 1
    )
    assert list(summarise([run]).classes) == ["y", "chat", "a", "x", "z"]


def test_quantiles() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([0.0, 10.0], 0.99) == pytest.approx(9.9)
    assert quantile([5.0], 0.01) == 5.0
