"""Bounds on cases that can be counted by hand."""

from __future__ import annotations

import sys

import pytest
from tests.sim.support import arrival, device

from hyperflexis.core.latency import Coefficients
from hyperflexis.core.latency_table import DecodeGrid, LatencyTable, PromptGrid
from hyperflexis.core.slo import Slo
from hyperflexis.errors import ConfigError
from hyperflexis.sim.oracle import (
    MAX_REQUESTS,
    capacity_rps,
    fluid_attainment,
    fluid_load_at,
    lp_bound,
    request_costs_s,
)

LINE = Coefficients(c0=0.01, c1=1e-4, c2=0.0, c3=1e-3, c4=0.0)


ROOMY = device(LINE, max_batch=10**9, max_batch_tokens=10**9, kv_capacity_tokens=10**12)


def test_capacity_is_that_of_the_mix():
    chat = [arrival(0.0, 1000, 101, Slo(1.0, 0.05), "chat")] * 3  # 0.2 s of work, taxed 1 / 0.8
    code = [arrival(0.0, 500, 1, Slo(0.5, 0.02), "code")]  # 0.05 s, taxed 1 / 0.5
    mean = (3 * 0.25 + 0.1) / 4
    assert capacity_rps(chat + code, ROOMY, 1) == pytest.approx(1 / mean)
    assert capacity_rps(chat + code, ROOMY, 8) == pytest.approx(8 / mean)


def test_mixed_all_classes_pay_for_the_tightest_pace():
    chat = arrival(0.0, 1000, 101, Slo(1.0, 0.05), "chat")  # 0.2 s of work
    code = arrival(0.0, 500, 1, Slo(0.5, 0.02), "code")  # 0.05 s
    assert request_costs_s([chat, code], ROOMY, mixed=True) == pytest.approx([0.2 / 0.5, 0.05 / 0.5])


def test_a_request_costs_its_share_of_its_class_by_its_work():
    c = Coefficients(0.01, 1e-4, 1e-8, 1e-3, 1e-6)
    requests = [arrival(0.0, 1000, 101, Slo(1.0, 0.05)), arrival(0.0, 2000, 1, Slo(1.0, 0.05))]
    work = [1000 * 1e-4 + 1000 * 500 * 1e-8 + 100 * (1e-3 + 1e-6 * 1049.5), 2000 * 1e-4 + 2000 * 1000 * 1e-8]
    costs = request_costs_s(requests, device(c, max_batch_tokens=10**9))
    assert costs == pytest.approx([work[0] / 0.8, work[1] / 0.8])


@pytest.mark.parametrize(
    ("slo", "tax"),
    [
        (Slo(ttft_s=1.0), 1.0),
        (Slo(), 1.0),
        (Slo(e2e_s=8.0), 6 / 5),  # a quarter for the first token, the rest over 100 steps: 60 ms
        (Slo(e2e_s=8.0, ttft_s=1.0), 7 / 6),
        (Slo(e2e_s=8.0, tpot_s=0.03), 3 / 2),
    ],
)
def test_a_class_without_tpot_takes_its_pace_from_the_end_to_end_promise(slo, tax):
    (cost,) = request_costs_s([arrival(0.0, 1000, 101, slo)], ROOMY)
    assert cost == pytest.approx(0.2 * tax, rel=1e-4)


def test_where_the_batch_or_the_kv_cache_is_full_first_its_share_of_c0_is_the_cost():
    c = Coefficients(0.01, 0.0, 0.0, 1e-5, 0.0)
    requests = [arrival(0.0, 1000, 101, Slo(1.0, 0.05))]
    wide = {"max_batch": 10**6, "max_batch_tokens": 10**9}
    assert request_costs_s(requests, device(c, **wide, kv_capacity_tokens=10**9)) == pytest.approx([0.001 / 0.8])
    assert request_costs_s(requests, device(c, max_batch=20)) == pytest.approx([100 * (1e-5 + 0.01 / 20)])
    per_step = 0.01 * 1049.5 / 18_000
    assert request_costs_s(requests, device(c, **wide, kv_capacity_tokens=20_000)) == pytest.approx(
        [100 * (1e-5 + per_step)]
    )
    prompt = [arrival(0.0, 1000, 1, Slo(1.0))]
    assert request_costs_s(prompt, device(LINE, max_batch_tokens=500)) == pytest.approx([0.1 + 2 * 0.01])


def test_the_capacity_follows_the_curve_and_the_table_of_a_device():
    # The curve: 300 tokens in the time of 100. The table: 400 tokens in 13 ms.
    formula = Coefficients(0.01, 1e-4, 0.0, 0.0, 0.0, curve=((0.0, 0.0), (300.0, 100.0)))
    decode = DecodeGrid((1.0,), (1.0,), ((0.01,),))
    prompt = PromptGrid((0.0, 400.0), (0.0,), (1.0,), (((0.01,),), ((0.013,),)))
    requests = [arrival(0.0, 100, 1, Slo(1.0, 0.02))]
    assert capacity_rps(requests, device(formula), 1) == pytest.approx(3 / 0.02)
    requests = [arrival(0.0, 100, 1, Slo(1.0, 0.013))]
    assert capacity_rps(requests, device(LINE, table=LatencyTable(LINE, decode, prompt)), 1) == pytest.approx(4 / 0.013)


def test_a_device_at_its_best_below_the_largest_iteration_is_used_there():
    decode = DecodeGrid((1.0,), (1.0,), ((0.01,),))
    prompt = PromptGrid((0.0, 300.0, 400.0), (0.0,), (1.0,), (((0.01,),), ((0.01,),), ((0.03,),)))
    requests = [arrival(0.0, 100, 1, Slo(1.0, 0.03))]
    found = capacity_rps(requests, device(LINE, table=LatencyTable(LINE, decode, prompt)), 1)
    assert found == pytest.approx(3 / 0.01, rel=0.03)


def test_prefixes_of_earlier_arrivals_cost_nothing():
    slo = Slo(ttft_s=1.0)
    requests = [
        arrival(0.0, 1100, 1, slo, hash_ids=(1, 2, 3)),
        arrival(1.0, 1024, 1, slo, hash_ids=(1, 2)),
        arrival(2.0, 1024, 1, slo, hash_ids=(2, 1)),
    ]
    assert request_costs_s(requests, ROOMY) == pytest.approx([0.11, 1e-4, 0.1024], rel=1e-3)


def test_a_pace_below_any_iteration_is_told_with_its_class():
    requests = [arrival(0.0, 10, 10, Slo(1.0, 0.008), "fast")]
    with pytest.raises(ConfigError, match=r"class 'fast': 8.0 ms per token, but .* at least 10.0 ms: raise"):
        capacity_rps(requests, device(LINE), 1)
    with pytest.raises(ConfigError, match="no arrivals"):
        capacity_rps([], device(LINE), 1)


def test_the_fluid_keeps_the_cheapest():
    costs = [4.0, 1.0, 3.0, 2.0]
    assert fluid_attainment(costs, 1.0) == 1.0
    assert fluid_attainment(costs, 2.0) == pytest.approx((2 + 2 / 3) / 4)  # 5 of 10 seconds: 1, 2 and 2/3 of the third
    assert fluid_load_at(costs, 0.5) == pytest.approx(10 / 3)
    assert fluid_load_at(costs, 1.0) == pytest.approx(1.0)


def test_the_fluid_keeps_the_cheapest_per_value():
    costs, values = [4.0, 1.0], [8.0, 1.0]
    assert fluid_attainment(costs, 1.25, values) == pytest.approx(8 / 9)
    assert fluid_attainment(costs, 1.25) == pytest.approx(1.75 / 2)
    assert fluid_load_at(costs, 8 / 9, values) == pytest.approx(1.25)


@pytest.mark.parametrize(
    ("output", "kept", "missed"),
    [
        (1, Slo(ttft_s=0.111), Slo(ttft_s=0.109)),  # c0 and 1000 tokens: 0.11 s
        (50, Slo(1.0, 0.0111), Slo(1.0, 0.0109)),  # a step: 11 ms
        (11, Slo(e2e_s=0.221), Slo(e2e_s=0.219)),
        (11, Slo(), Slo(0.109, 1.0, 1.0)),
    ],
)
def test_a_single_request_is_on_time_or_cannot_be(output, kept, missed):
    assert lp_bound([arrival(0.0, 1000, output, kept)], device(LINE), 1).value == 1.0
    assert lp_bound([arrival(0.0, 1000, output, missed)], device(LINE), 9).value == 0.0


def test_of_equal_prompts_as_many_are_kept_as_fit():
    # One iteration of 4 prompts lasts 0.41 s, of 5 prompts 0.51 s.
    requests = [arrival(0.0, 1000, 1, Slo(ttft_s=0.46))] * 10
    assert lp_bound(requests, device(LINE), 1).value == 0.4
    assert lp_bound(requests, device(LINE), 2).value == 0.9  # 8 in truth: the programme cuts a prompt in two
    apart = [arrival(10.0 * i, 1000, 1, Slo(ttft_s=0.46)) for i in range(10)]
    assert lp_bound(apart, device(LINE), 1).value == 1.0


def test_of_equal_streams_as_many_are_kept_as_their_pace_allows():
    # A step of 10 lasts 20 ms, one of 11 lasts 21 ms; the work alone would let 20 through.
    requests = [arrival(0.0, 1, 101, Slo(0.05, 0.0205))] * 25
    assert lp_bound(requests, device(LINE), 1).value == 10 / 25


def test_of_equal_streams_as_many_are_kept_as_the_batch_holds_one_after_the_other():
    # Two at a time, about a second each: three pairs in 3.3 seconds.
    c = Coefficients(0.01, 1e-6, 0.0, 1e-7, 0.0)
    requests = [arrival(0.0, 1, 101, Slo(e2e_s=3.3))] * 20
    assert lp_bound(requests, device(c, max_batch=2), 1).value == 6 / 20
    assert lp_bound(requests, device(c, max_batch=64), 1).value == 1.0


def test_of_equal_streams_as_many_are_kept_as_the_kv_cache_holds_one_after_the_other():
    c = Coefficients(0.01, 1e-6, 0.0, 1e-7, 0.0)
    requests = [arrival(0.0, 10_000, 101, Slo(e2e_s=3.3))] * 20
    assert lp_bound(requests, device(c, kv_capacity_tokens=20_200), 1).value == 6 / 20


def test_prompts_that_others_have_too_count_as_free():
    slo = Slo(ttft_s=0.46)
    requests = [arrival(0.0, 1024, 1, slo, hash_ids=(1, 2))] * 10
    assert lp_bound(requests, device(LINE), 1).value == 1.0
    requests = [arrival(0.0, 1024, 1, slo, hash_ids=(2 * i, 2 * i + 1)) for i in range(10)]
    assert lp_bound(requests, device(LINE), 1).value == 0.4


def test_where_a_table_tells_more_than_the_formula_the_bound_follows_the_table():
    # The device takes 30 ms for anything up to 100 tokens; the formula would say 10 to 20 ms.
    decode = DecodeGrid((1.0, 100.0), (1.0, 1000.0), ((0.03, 0.03), (0.03, 0.03)))
    prompt = PromptGrid((1.0, 1000.0), (0.0, 100.0), (1.0,), (((0.03,), (0.03,)), ((0.2,), (0.2,))))
    slow = device(LINE, table=LatencyTable(LINE, decode, prompt))
    requests = [arrival(0.0, 1, 11, Slo(1.0, 0.025))]
    assert lp_bound(requests, device(LINE), 1).value == 1.0
    assert lp_bound(requests, slow, 1).value == 0.0


def test_no_bound_says_why():
    slo = Slo(ttft_s=1.0)
    many = lp_bound([arrival(0.0, 10, 1, slo)] * (MAX_REQUESTS + 1), device(LINE), 1)
    assert many.value is None
    assert many.reason == "2001 arrivals; the bound is computed for at most 2000"
    assert lp_bound([], device(LINE), 1).reason == "no arrivals"


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ConfigError, match=r"hyperflexis\[report\]"):
        lp_bound([arrival(0.0, 10, 1, Slo())], device(LINE), 1)
