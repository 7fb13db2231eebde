"""How many compute prompts alone, and how quickly that changes."""

from __future__ import annotations

from math import ceil

import pytest

from hyperflexis.core.cluster import CONVERTIBLE, TrackedInstance
from hyperflexis.core.demand import SLOW_S, Demand
from hyperflexis.core.instance import InstanceInfo
from hyperflexis.core.latency import Coefficients, share_left
from hyperflexis.policy.roles import (
    DWELL_S,
    GROW,
    SHRINK,
    RolesMemory,
    best_prefill,
    first_prefill,
    has_strays,
    needs_of,
    plan_roles,
    saving,
)

MODEL = Coefficients(c0=0.030, c1=1e-4, c2=0.0, c3=5e-4, c4=0.0)


def instances(count: int, prefill: int = 0, model: Coefficients = MODEL) -> list[TrackedInstance]:
    made = []
    for i in range(count):
        info = InstanceInfo(f"i{i}", 1, "m", "cpu", f"unix:{i}", "emulated", 32768, 100_000, 64, 8192, True, model)
        made.append(TrackedInstance(info, model, prefill_share=1.0 if i < prefill else CONVERTIBLE))
    return made


def demand(prefill: float, decode_work: float, until: float, pace_s: float = 0.05, c0: float = 0.030) -> Demand:
    """A load that has been steady for long: instances of prompts, and seconds of decodes a second without c0."""
    made = Demand(0.0)
    made.prefill_fast.value = made.prefill_slow.value = prefill
    made.decode_slow.value = decode_work / share_left(c0, pace_s)
    made.prefill_fast.at = made.prefill_slow.at = made.decode_slow.at = until
    made.paces = {pace_s: until}
    return made


def steps(fleet: list[TrackedInstance], prefill: float, decode_work: float, seconds: int, start: float = 1000.0):
    """(second, instance, share) of the changes under a steady load."""
    memory, changes = RolesMemory(), []
    for second in range(seconds):
        now = start + second
        found, memory = plan_roles(now, "m", fleet, demand(prefill, decode_work, now), memory)
        for instance, share, _ in found:
            instance.prefill_share, instance.role_at = share, now
            changes.append((second, instance.id, share))
    return changes


def test_as_many_as_prompts_keep_busy_and_decodes_leave_over():
    assert best_prefill(2.9, 1.2, 4) == 2
    assert best_prefill(9.0, 1.2, 4) == 2
    assert best_prefill(9.0, 0.0, 4) == 2, "two decode"
    assert best_prefill(9.0, 0.0, 2) == 1
    assert best_prefill(0.9, 0.0, 4) == 0
    assert best_prefill(3.0, 5.0, 4) == 0


def test_prompts_alone_are_worth_it_where_c0_is_much_of_the_pace():
    assert saving(0.030, 0.05) == pytest.approx(0.8 / 0.4)
    assert saving(0.005, 0.05) < 1.2
    assert saving(0.030, float("inf")) == pytest.approx(1.0)


def test_prefill_instances_come_one_by_one_and_then_stay():
    fleet = instances(4)
    changes = steps(fleet, 2.5, 0.4, 120)
    assert [(second, share) for second, _, share in changes] == [
        (ceil(GROW / 2) - 1, 1.0),
        (ceil(GROW / 2) + GROW - 1, 1.0),
    ], "the first of two sooner"


def test_they_come_sooner_the_more_are_missing():
    fleet = instances(8)
    changes = steps(fleet, 9.0, 0.4, 120)
    assert [share for *_, share in changes] == [1.0] * 6
    assert changes[0][0] + 1 == ceil(GROW / 6) and changes[-1][0] < 3 * GROW


def test_nothing_is_decided_on_the_first_seconds():
    memory, young = RolesMemory(), demand(9.0, 0.4, 2.0)
    for tick in range(20):
        found, memory = plan_roles(0.2 * tick, "m", instances(8), young, memory)
        assert found == [] and not memory.models


def test_a_planner_knows_the_mean_loads():
    assert first_prefill(4.1, 0.6, 0.030, 0.05, 8) == 4
    assert first_prefill(9.0, 0.6, 0.030, 0.05, 8) == 6
    assert first_prefill(4.1, 0.6, 0.005, 0.05, 8) == 0, "c0 is small"
    assert first_prefill(4.1, 0.6, 0.030, 0.05, 1) == 0


def test_none_comes_where_c0_is_small():
    quick = Coefficients(c0=0.003, c1=1e-4, c2=0.0, c3=5e-4, c4=0.0)
    memory = RolesMemory()
    for second in range(100):
        now = 1000.0 + second
        found, memory = plan_roles(now, "m", instances(4, model=quick), demand(2.5, 0.4, now, c0=0.003), memory)
        assert found == []


def test_one_goes_when_decodes_need_it_at_once_when_they_lack_much():
    assert steps(instances(4, prefill=2), 2.5, 0.75, 30)[0][0] == SHRINK - 1, "they need 2.4 of 2"
    assert steps(instances(4, prefill=2), 2.5, 1.3, 30)[0][0] == 0, "they need 4"


def test_one_goes_at_once_when_something_decodes_there_for_want_of_room():
    fleet = instances(4, prefill=2)
    fleet[1].num_decodes = 1
    assert steps(fleet, 2.5, 0.4, 1) == [(0, "i1", CONVERTIBLE)], "the one that decodes, though decodes need few"
    assert not has_strays(fleet[1], 1000.0), "it decodes now"


def test_what_decodes_where_a_role_is_new_ends_there():
    fleet = instances(4, prefill=2)
    fleet[1].num_decodes, fleet[1].role_at = 1, 1000.0
    assert not has_strays(fleet[1], 999.9 + DWELL_S) and has_strays(fleet[1], 1000.0 + DWELL_S)
    assert not has_strays(fleet[0], 2000.0), "nothing decodes there"


def test_none_goes_for_want_of_prompts():
    assert steps(instances(4, prefill=2), 0.1, 0.4, 100) == []


def test_a_full_kv_cache_needs_instances_too():
    fleet = instances(4)
    for one in fleet:
        one.decode_kv_tokens = 70_000.0
    assert needs_of(fleet, demand(1.0, 0.1, 100.0), 100.0).decode == pytest.approx(4.0)


def test_a_burst_of_prompts_changes_nothing():
    fleet, memory = instances(4), RolesMemory()
    for second in range(200):
        now = 1000.0 + second
        load = 6.0 if second % 20 < GROW // 2 else 0.5
        found, memory = plan_roles(now, "m", fleet, demand(load, 0.4, now), memory)
        assert found == [], "never right for as long as it has to be"


def test_demand_of_a_young_fleet_is_not_a_fraction():
    steady = Demand(0.0)
    for tick in range(20):
        steady.add(0.2, 0.1, 0.01, 0.05, 0.1 * tick)  # 2 instances of prompts, 1 of decode work at c0/pace = 0.2
    assert steady.prefill(2.0) == pytest.approx(2.0, rel=0.1)
    assert steady.decode(2.0) == pytest.approx(1.0 / 0.8, rel=0.1)
    assert steady.tightest_s(2.0) == 0.05
    assert steady.tightest_s(2.0 + SLOW_S + 1.0) == float("inf")
    assert steady.prefill(2.0 + 10 * SLOW_S) < 0.01


def test_decodes_count_at_their_own_pace():
    mixed = Demand(0.0)
    for pace_s in (0.05, 0.1):
        mixed.add(0.0, 1.0, 0.03, pace_s, 1000.0)
    assert mixed.decode(1000.0) == pytest.approx((1.0 / 0.4 + 1.0 / 0.7) / SLOW_S)
