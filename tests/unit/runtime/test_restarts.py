from __future__ import annotations

from hyperflexis.runtime.restarts import HEALTHY_S, LOOP_DEATHS, LOOP_DELAY_S, MAX_DELAY_S, Restarts, Verdict


def test_the_wait_doubles_up_to_its_limit() -> None:
    restarts = Restarts()
    # Far enough apart that it never is a crash loop, too short-lived to be healthy.
    delays = [restarts.died(now=20.0 * i, lived_s=19.0).delay_s for i in range(7)]
    assert delays == [0.5, 1.0, 2.0, 4.0, 8.0, MAX_DELAY_S, MAX_DELAY_S]


def test_a_healthy_life_starts_the_wait_over() -> None:
    restarts = Restarts()
    for i in range(3):
        restarts.died(now=float(i), lived_s=0.1)
    assert restarts.died(now=100.0, lived_s=HEALTHY_S).delay_s == 0.5


def test_five_deaths_within_a_minute_are_a_loop_and_it_is_said_once() -> None:
    restarts = Restarts()
    verdicts = [restarts.died(now=float(i), lived_s=0.1) for i in range(LOOP_DEATHS + 2)]
    assert [v.loop_began for v in verdicts] == [False] * (LOOP_DEATHS - 1) + [True, False, False]
    assert verdicts[LOOP_DEATHS - 1].delay_s == LOOP_DELAY_S
    # Now tried so rarely that five deaths no longer fit into a minute: it still is the same loop.
    assert restarts.died(now=500.0, lived_s=0.1) == Verdict(LOOP_DELAY_S, in_loop=True, loop_began=False)


def test_a_loop_ends_with_a_healthy_life_and_can_begin_again() -> None:
    restarts = Restarts()
    for i in range(LOOP_DEATHS):
        restarts.died(now=float(i), lived_s=0.1)
    assert restarts.died(now=200.0, lived_s=HEALTHY_S) == Verdict(0.5, in_loop=False, loop_began=False)
    began = [restarts.died(now=201.0 + i, lived_s=0.1).loop_began for i in range(LOOP_DEATHS)]
    assert began.count(True) == 1
