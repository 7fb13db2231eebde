from dataclasses import dataclass
from math import inf

import pytest

from hyperflexis.policy.budget import CAP_S, LEAD, SHORTEST, is_lost, iteration_s


@dataclass
class Running:
    next_due: float
    pace_s: float = 0.05
    missed_first: bool = False
    expected_remaining: float = 50.0


def test_nothing_binding_means_the_cap():
    assert iteration_s(0.0, [], 0.01) == CAP_S
    assert iteration_s(0.0, [Running(inf, inf)], 0.01) == CAP_S


def test_the_tightest_decode_binds_less_its_lead():
    jobs = [Running(10.09, 0.05), Running(10.12, 0.05)]
    assert iteration_s(10.0, jobs, 0.01) == pytest.approx(0.09 - LEAD * 0.05)


def test_a_decode_slightly_behind_its_lead_grants_a_share_of_its_pace():
    assert iteration_s(10.0, [Running(10.0)], 0.01) == pytest.approx(SHORTEST * 0.05)


def test_lost_requests_do_not_bind():
    late_first = Running(9.0, missed_first=True)
    hopeless = Running(9.0, expected_remaining=3.0)
    recovers = Running(9.9, expected_remaining=100.0)
    assert is_lost(late_first, 10.0, 0.01)
    assert is_lost(hopeless, 10.0, 0.01)
    assert not is_lost(recovers, 10.0, 0.01)
    assert iteration_s(10.0, [late_first, hopeless], 0.01) == CAP_S
    assert iteration_s(10.0, [recovers], 0.01) < CAP_S


def test_the_lead_grows_with_the_models_error_up_to_one_token():
    tight = Running(10.12, 0.05)
    assert iteration_s(10.0, [tight], 0.01, q90=0.5) == pytest.approx(0.12 - 0.6 * 0.05)
    assert iteration_s(10.0, [tight], 0.01, q90=9.0) == pytest.approx(0.12 - 0.05)
