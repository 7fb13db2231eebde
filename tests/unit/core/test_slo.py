from math import inf

import pytest

from hyperflexis.core.slo import Slo


def test_strict_attainment_needs_every_promise():
    slo = Slo(ttft_s=1.0, tpot_s=0.05, e2e_s=3.0)
    assert slo.is_met(ttft_s=1.0, e2e_s=1.0 + 0.05 * 9, num_output_tokens=10)
    assert not slo.is_met(ttft_s=1.01, e2e_s=1.2, num_output_tokens=10)
    assert not slo.is_met(ttft_s=0.5, e2e_s=0.5 + 0.051 * 9, num_output_tokens=10)
    assert not slo.is_met(ttft_s=0.5, e2e_s=3.1, num_output_tokens=1000)


def test_each_stage_has_its_promise() -> None:
    slo = Slo(ttft_s=1.0, tpot_s=0.05, e2e_s=2.0)
    assert slo.is_first_met(1.0) and not slo.is_first_met(1.01)
    assert slo.is_pace_met(ttft_s=9.0, e2e_s=9.39, num_output_tokens=9), "whenever it began"
    assert not slo.is_pace_met(ttft_s=0.1, e2e_s=0.7, num_output_tokens=11)
    assert Slo().is_first_met(99.0) and Slo().is_pace_met(1.0, 99.0, 2)


def test_one_output_token_has_no_tpot():
    assert Slo(ttft_s=1.0, tpot_s=0.001).is_met(ttft_s=0.9, e2e_s=0.95, num_output_tokens=1)


def test_no_promise_is_always_kept():
    assert Slo().is_met(1e9, 1e9, 5)


def test_fields_merge_one_by_one():
    assert Slo(ttft_s=0.2).over(Slo(1.0, 0.05)) == Slo(0.2, 0.05)
    assert Slo(ttft_s=0.0).over(Slo(1.0)).ttft_s == 0.0


@pytest.mark.parametrize(
    ("asked", "floor", "field"),
    [
        (Slo(ttft_s=0.1), Slo(ttft_s=0.2), "ttft_s"),
        (Slo(tpot_s=0.01), Slo(ttft_s=0.2, tpot_s=0.02), "tpot_s"),
        (Slo(ttft_s=0.2), Slo(ttft_s=0.2), None),
        (Slo(), Slo(ttft_s=0.2), None),
    ],
)
def test_tighter_than_names_the_field(asked, floor, field):
    assert asked.tighter_than(floor) == field


def test_an_end_to_end_promise_becomes_a_pace_and_a_first_deadline():
    slo = Slo(e2e_s=10.0)
    assert slo.first_token_by_s(99) == 2.5
    assert slo.pace_s(expected_output_tokens=101, ttft_s=2.0) == pytest.approx(0.08)
    assert Slo().first_token_by_s(10) == inf
    assert Slo(ttft_s=1.0, tpot_s=0.05).pace_s(100, 1.0) == 0.05
