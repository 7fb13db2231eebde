"""Figures over seeds: in pairs, with their intervals, and bounds where a sweep ended first."""

from __future__ import annotations

from math import exp, log, sqrt
from statistics import stdev

import pytest
from benchmarks.experiments.figures import Bounded, difference, estimate, knee, knee_load, knee_ratio, ratio
from hypothesis import given
from hypothesis import strategies as st

SHARES = st.lists(st.floats(0.01, 1.0), min_size=2, max_size=6)


def test_an_estimate_has_the_interval_of_student_s_t() -> None:
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.ci95 == pytest.approx((2.0 - 4.303 / sqrt(3), 2.0 + 4.303 / sqrt(3)), abs=1e-3)
    assert estimate([0.7]).ci95 is None


def test_differences_are_taken_in_pairs() -> None:
    # Seeds differ by a lot, the policies by the same in each: the interval must be of the latter.
    found = difference([0.9, 0.6, 0.3], [0.8, 0.5, 0.2])
    assert found.mean == pytest.approx(0.1)
    assert found.ci95 == pytest.approx((0.1, 0.1))


def test_a_ratio_by_hand() -> None:
    found = ratio([0.8, 0.9], [0.2, 0.1])
    assert found is not None and found.ci95 is not None
    assert found.mean == pytest.approx(6.0)  # the geometric mean of 4 and 9
    half = 12.706 * stdev([log(4), log(9)]) / sqrt(2)
    assert found.ci95 == pytest.approx((exp(log(6) - half), exp(log(6) + half)), rel=1e-3)
    assert found.by_seed == pytest.approx((4.0, 9.0))


def test_there_is_no_ratio_to_nothing() -> None:
    assert ratio([0.5, 0.5], [0.5, 0.0]) is None
    assert ratio([0.0, 0.5], [0.5, 0.5]) is None


@given(st.data(), SHARES)
def test_a_ratio_and_its_inverse_agree(data: st.DataObject, ours: list[float]) -> None:
    theirs = data.draw(st.lists(st.floats(0.01, 1.0), min_size=len(ours), max_size=len(ours)))
    there, back = ratio(ours, theirs), ratio(theirs, ours)
    assert there is not None and back is not None
    assert there.mean * back.mean == pytest.approx(1.0)
    assert min(there.by_seed) <= there.mean * (1 + 1e-9) and there.mean <= max(there.by_seed) * (1 + 1e-9)


def test_a_knee_is_found_seed_by_seed() -> None:
    found = knee({1.0: [0.95, 0.92], 1.2: [0.85, 0.88]})
    load = knee_load(found)
    assert load.sign == "" and load.value is not None
    assert load.value.by_seed == pytest.approx((1.1, 1.1))


CARRIED = knee({1.0: [0.95, 0.92], 1.2: [0.85, 0.88]})  # 1.1 in both
TOO_LITTLE = knee({0.5: [0.8, 0.95], 0.7: [0.7, 0.85]})  # less than 0.5, and 0.6
TOO_GOOD = knee({1.5: [0.95, 0.95], 2.2: [0.94, 0.8]})  # at least 2.2, and between


def test_a_sweep_that_ends_first_gives_a_bound_of_the_load() -> None:
    assert knee_load(TOO_GOOD).sign == "≥"
    found = knee_load(TOO_LITTLE)
    assert found.sign == "≤" and found.value is not None
    assert found.value.by_seed == pytest.approx((0.5, 0.6))


def test_a_ratio_of_knees_is_a_bound_where_one_of_them_is() -> None:
    exact = knee_ratio(CARRIED, CARRIED)
    assert exact.sign == "" and exact.value is not None and exact.value.mean == pytest.approx(1.0)
    over_little = knee_ratio(CARRIED, TOO_LITTLE)
    assert over_little.sign == "≥" and over_little.value is not None
    assert over_little.value.by_seed == pytest.approx((1.1 / 0.5, 1.1 / 0.6))
    under_good = knee_ratio(CARRIED, TOO_GOOD)
    assert under_good.sign == "≤" and under_good.value is not None
    assert under_good.value.by_seed[0] == pytest.approx(1.1 / 2.2)
    assert knee_ratio(TOO_GOOD, TOO_GOOD) == Bounded(None)
