"""The plan of ``policy/scale.py`` under demand whose right answer is known: it settles, turns rarely, keeps limits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from math import pi, sin
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperflexis.core.demand import Sample, Tally
from hyperflexis.policy.catalog import find_scaler
from hyperflexis.policy.scale import (
    GUARD,
    QUICK_GUARD,
    RELEASE,
    ModelMemory,
    ModelScale,
    ScaleConfig,
    Seen,
    Wish,
    bound,
    desired,
    hold,
)

WORK_S = 0.3
"""Seconds of an instance that a prompt takes."""


def planned(samples: Iterable[Sample], start_s: float, first: int, **limits: int) -> list[int]:
    """What is held each second, if instances that are wanted are there when they are ready; no request misses."""
    scale = ModelScale("m", start_s={"disk": start_s}, **limits)  # type: ignore[arg-type]
    config = ScaleConfig((scale,))
    memory = ModelMemory()
    found, have = [], first
    for sample in samples:
        seen = Seen(sample.t, sample, have, have, 0, 0, 0.0, 0.0, start_s)
        wish, memory = desired(seen, scale, memory)
        granted = bound({"m": wish.instances}, config)
        held, memories = hold(sample.t, granted, {"m": have}, {"m": wish}, {"m": memory}, config)
        memory, have = memories["m"], held["m"]
        found.append(have)
    return found


def turns(plan: list[int]) -> int:
    """How often it goes the other way."""
    steps = [b - a for a, b in pairwise(plan) if a != b]
    return sum(a * b < 0 for a, b in pairwise(steps))


def even(load: Callable[[float], float], seconds: int) -> list[Sample]:
    """Demand without chance."""
    return [Sample(float(t), 0.6 * load(t), 0.4 * load(t), 0.0, 0.0, 10, 10) for t in range(1, seconds + 1)]


def poisson(load: float, seconds: int, seed: int) -> list[Sample]:
    """Independent requests of WORK_S on average, a third of it in decodes that go on for 10 s."""
    random, tally, found = Random(seed), Tally(0.0), []
    t = random.expovariate(load / WORK_S)
    for second in range(1, seconds + 1):
        while t < second:
            work_s = random.expovariate(1.0 / WORK_S)
            tally.add(work_s * 2.0 / 3.0, work_s / 30.0, 10.0, t)
            t += random.expovariate(load / WORK_S)
        tally.outcomes = tally.arrivals
        found.append(replace(tally.take(float(second)), misses=0))
    return found


@settings(max_examples=15, deadline=None)
@given(st.floats(0.0, 40.0), st.sampled_from((2.0, 20.0, 60.0, 400.0)), st.integers(0, 30))
def test_even_demand_leaves_the_plan_alone_once_it_has_settled(load: float, start_s: float, first: int) -> None:
    # The margin goes down until requests miss, and here none does: it has reached its least after 1.1 / 0.0005 s.
    plan = planned(even(lambda _: load, 4500), start_s, first)
    assert len(set(plan[-1200:])) == 1
    assert turns(plan) <= 1


@settings(max_examples=12, deadline=None)
@given(st.one_of(st.floats(1.0, 30.0), st.just(1.25)), st.sampled_from((2.0, 20.0, 60.0)), st.integers(0, 1 << 30))
def test_independent_arrivals_turn_the_plan_rarely(load: float, start_s: float, seed: int) -> None:
    plan = planned(poisson(load, 3600 + 600, seed), start_s, round(load) + 3)
    assert turns(plan[600:]) <= 10


@settings(max_examples=8, deadline=None)
@given(st.floats(5.0, 30.0), st.sampled_from((2.0, 20.0, 60.0)), st.sampled_from((1800.0, 3600.0)))
def test_a_sine_turns_the_plan_when_it_turns(mean: float, start_s: float, period_s: float) -> None:
    periods = 4
    load = even(lambda t: mean * (1.0 + 0.5 * sin(2.0 * pi * t / period_s)), int(periods * period_s))
    assert turns(planned(load, start_s, round(mean) + 3)) <= 2 * periods


@given(
    st.lists(
        st.tuples(st.integers(0, 50), st.integers(0, 5), st.integers(0, 20), st.integers(1, 4)), min_size=1, max_size=4
    ),
    st.one_of(st.none(), st.integers(0, 40)),
)
def test_what_is_granted_and_held_is_within_all_limits(
    models: list[tuple[int, int, int, int]], devices: int | None
) -> None:
    scales = tuple(
        ModelScale(f"m{i}", least, least + more, devices=size, value=1.0 + i)
        for i, (_, least, more, size) in enumerate(models)
    )
    config = ScaleConfig(scales, devices)
    wishes = {f"m{i}": wish for i, (wish, *_) in enumerate(models)}
    granted = bound(wishes, config)
    memories = {name: ModelMemory() for name in wishes}
    ahead, _ = desired(Seen(1.0, Sample(1.0), 0, 0, 0, 0, 0.0, 0.0, 60.0), scales[0], ModelMemory())
    asked = {name: Wish(wish, 300.0, 0.0, ahead.forecast, "demand", "") for name, wish in wishes.items()}
    held, _ = hold(1.0, granted, dict.fromkeys(wishes, 60), asked, memories, config)
    for scale in scales:
        assert granted[scale.model] <= held[scale.model] <= scale.most
        if devices is None:
            assert scale.least <= granted[scale.model]
    for plan in (granted, held):
        used = sum(plan[scale.model] * scale.devices for scale in scales)
        assert devices is None or used <= devices


def test_where_devices_are_short_the_more_valuable_model_gets_more_of_its_wish():
    scales = (ModelScale("cheap", 1, 10), ModelScale("dear", 1, 10, value=3.0))
    assert bound({"cheap": 8, "dear": 8}, ScaleConfig(scales, 8)) == {"cheap": 2, "dear": 6}
    assert bound({"cheap": 8, "dear": 0}, ScaleConfig(scales, 8)) == {"cheap": 7, "dear": 1}


def test_load_that_ends_goes_to_zero_where_that_is_allowed_and_comes_back():
    quiet = even(lambda t: 3.0 if t < 100 else 0.0, 2000)
    plan = planned(quiet, 2.0, 4, least=0)
    assert plan[50] >= 3 and plan[-1] == 0
    assert planned(quiet, 2.0, 4)[-1] == 1


@pytest.mark.parametrize("spec", ["fixed@3", "reactive", "concurrency@4,0,60", "saturation", "rate@2", "forecast"])
def test_every_scaler_answers(spec: str) -> None:
    policy = find_scaler(spec)
    memory = ModelMemory()
    for sample in poisson(5.0, 60, 1):
        wish, memory = policy(Seen(sample.t, sample, 4, 4, 30, 0, 2.0, 1.0, 20.0), ModelScale("m"), memory)
        assert 0 <= wish.instances < 50 and wish.reason


def held_at(now: float, memory: ModelMemory, have: int, hold_s: float, count: int) -> tuple[int, ModelMemory]:
    scale = ScaleConfig((ModelScale("m"),))
    ahead, _ = desired(Seen(1.0, Sample(1.0), 0, 0, 0, 0, 0.0, 0.0, 60.0), scale.models[0], ModelMemory())
    wish = Wish(count, hold_s, 0.0, ahead.forecast, "demand", "")
    held, memories = hold(now, {"m": count}, {"m": have}, {"m": wish}, {"m": memory}, scale)
    return held["m"], memories["m"]


def test_a_grant_is_held_as_long_as_was_said_with_it_whatever_comes_later():
    _, memory = held_at(0.0, ModelMemory(), 19, 25.0, 19)
    held, memory = held_at(10.0, memory, 19, 1800.0, 8)
    assert held == 19
    held, memory = held_at(26.0, memory, 19, 1800.0, 6)
    assert held == 8, "the spike is not held for half an hour"
    held, memory = held_at(30.0, memory, 12, 5.0, 12)
    assert held == 12
    held, memory = held_at(40.0, memory, 12, 5.0, 1)
    assert held == 8, "more in between does not end a longer hold"
    held, _ = held_at(1811.0, memory, 12, 5.0, 1)
    assert held == 6


@pytest.mark.parametrize("surges", [False, True])
def test_what_was_there_stays_until_it_is_known_how_the_demand_surges(surges: bool):
    def load(t: float) -> float:
        return 12.0 if surges and t % 60 < 2 else 0.5

    plan = planned(even(load, 2400), 60.0, 20)
    assert plan[290] == 20
    assert (plan[700] == 20) == surges
    assert plan[-1] < 20


@pytest.mark.parametrize(("misses", "sign"), [(0, -1), (1, 0), (2, 1)])
def test_the_margin_aims_at_half_of_the_misses_that_are_allowed(misses: int, sign: int):
    scale, memory, betas = ModelScale("m", target=0.99), ModelMemory(), []
    for t in range(1, 60):
        sample = Sample(float(t), 1.0, 1.0, 0.0, 0.0, 200, 200, misses)
        wish, memory = desired(Seen(float(t), sample, 4, 4, 9, 0, 0.0, 0.0, 2.0), scale, memory)
        betas.append(wish.margin)
    moved = betas[-1] - betas[0]
    assert moved == pytest.approx(0.0, abs=1e-9) if not sign else moved * sign > 0.1


def surging(height: float, start_s: float, guarded: float = 0.0) -> tuple[float, str]:
    """By how many roots of the usual demand bursts of two seconds a minute exceed the level, and what decides."""
    scale, memory = ModelScale("m", start_s={"disk": start_s}), ModelMemory(guarded=guarded)
    for sample in even(lambda t: height if t % 60 < 2 else 0.5, 1200):
        wish, memory = desired(Seen(sample.t, sample, 9, 9, 9, 0, 0.0, 0.0, start_s), scale, memory)
        memory = replace(memory, guarded=guarded)
    ahead = wish.forecast
    return ahead.surge / max(ahead.usual, 0.25) ** 0.5, wish.cause


def test_the_guard_stays_until_surges_are_well_below_what_brought_it():
    for height, start_s, guard in ((6.5, 5.0, QUICK_GUARD), (4.0, 20.0, GUARD)):
        surge, cause = surging(height, start_s)
        assert RELEASE * guard < surge < guard
        assert cause == "demand"
        assert surging(height, start_s, guard)[1] == "surges"
        assert surging(0.6, start_s, guard)[1] == "demand"
        assert surging(30.0, start_s)[1] == "surges"


def test_a_guard_that_slow_starts_brought_is_none_for_quick_ones():
    assert surging(6.5, 5.0, GUARD)[1] == "demand"


def test_quick_starts_are_guarded_at_smaller_surges_than_slow_ones():
    assert surging(5.6, 10.0)[1] == "surges"
    surge, cause = surging(5.6, 11.0)
    assert QUICK_GUARD < surge < GUARD
    assert cause == "demand"
