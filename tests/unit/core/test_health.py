"""Suspicion: how it begins, how long it lasts, and what does not raise it."""

from __future__ import annotations

import pytest

from hyperflexis.core.health import FIRST_HOLD_S, GUESSED_HANG_S, HANG_FACTOR, HANG_S, MAX_HOLD_S, SLOW_FACTOR, Health


def steady(health: Health, ratio: float, seconds: float, now: float = 0.0) -> float:
    """Reports of 0.1 s of work each."""
    until = now + seconds
    while now < until:
        now += 0.1
        health.worked(now, 0.1, 0.1 / ratio)
    return now


def test_hanging_is_measured_in_iterations() -> None:
    health = Health(alive_at=10.0)
    assert not health.is_hung(10.0 + HANG_S + 0.9 * HANG_FACTOR, 1.0)
    assert health.is_hung(10.0 + HANG_S + 1.1 * HANG_FACTOR, 1.0)
    health.worked(12.0, 0.1, 0.1)
    assert not health.is_hung(12.0 + HANG_S, 0.01)
    assert not health.is_hung(12.0 + 0.9 * GUESSED_HANG_S, 0.01, guessed=True)
    assert health.is_hung(12.0 + 1.1 * GUESSED_HANG_S, 0.01, guessed=True)


@pytest.mark.parametrize("usual", [0.5, 1.0, 2.0, 5.0])
def test_slow_is_slower_than_usual(usual: float) -> None:
    health = Health()
    now = steady(health, usual, 5.0)
    assert not health.is_slow()
    now = steady(health, 0.9 * SLOW_FACTOR * max(usual, 1.0), 0.2, now)
    assert not health.is_slow()
    steady(health, 2.0 * SLOW_FACTOR * max(usual, 1.0), 1.0, now)
    assert health.is_slow()


def test_nothing_is_slow_before_anything_is_known() -> None:
    health = Health()
    steady(health, 50.0, 5.0)
    assert not health.is_slow()


def test_what_becomes_slower_by_and_by_is_usual() -> None:
    health, now = Health(), 0.0
    for step in range(100):
        now = steady(health, 1.0 + 0.1 * step, 5.0, now)
        assert not health.is_slow()


def test_holds_double_to_a_limit_and_are_forgotten() -> None:
    health, now, holds = Health(), 100.0, []
    for _ in range(8):
        holds.append(health.suspect(now))
        now = health.until + 1.0
        health.trust(now)
        assert not health.is_slow() and not health.is_hung(now + 0.5 * HANG_S, 0.0)
    assert holds[:3] == [FIRST_HOLD_S, 2 * FIRST_HOLD_S, 4 * FIRST_HOLD_S]
    assert holds[-1] == MAX_HOLD_S
    assert health.suspect(now + 3 * MAX_HOLD_S) == FIRST_HOLD_S
