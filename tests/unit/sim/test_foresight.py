from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tests.sim.support import arrival

from hyperflexis.core.latency import Coefficients
from hyperflexis.core.slo import Slo
from hyperflexis.sim.foresight import known_demand, needs, programme

LATENCY = Coefficients(0.01, 1e-4, 0.0, 1e-3, 0.0)


def counts(steps: tuple[tuple[float, int], ...], seconds: int) -> list[int]:
    return [next(n for t, n in reversed(steps) if t <= second) for second in range(seconds)]


def test_demand_is_what_requests_keep_busy_at_their_pace():
    demand = known_demand([arrival(0.5, 1000, 21, Slo(1.0, 0.1))], LATENCY, 4.0)
    decode = 20 * 1e-3 / 0.9 / (21 * 0.1)  # for 2.1 s, of which the last is not counted
    assert abs(demand[0] - (0.1 / 0.9 + decode)) < 1e-9
    assert abs(demand[1] - decode) < 1e-9
    assert demand[2:] == [0.0, 0.0]


def test_gaps_shorter_than_a_start_are_bridged_and_starts_come_before():
    need = [1, 1, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1]
    assert counts(programme(need, 3.0), 15) == [2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 2, 2, 2, 2, 1]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(0, 10))
def test_a_programme_covers_its_need_and_is_no_dearer_than_the_peak(need: list[int], start: int) -> None:
    plan = counts(programme(need, float(start)), len(need))
    assert all(have >= wanted for have, wanted in zip(plan, need, strict=True))
    assert sum(plan) <= max(need) * len(need)


def test_need_has_a_margin_and_a_least():
    assert needs([4.0] * 9, 0.5, 1) == [5] * 9
    assert needs([0.0] * 3, 0.5, 2) == [2, 2, 2]
