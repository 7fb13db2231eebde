"""What every policy of the catalog owes, whatever is in its queues."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperflexis.core.cluster import TrackedInstance, TrackedRequest
from hyperflexis.core.instance import InstanceInfo
from hyperflexis.core.latency import Coefficients
from hyperflexis.core.request import Request
from hyperflexis.core.slo import Slo
from hyperflexis.policy.baselines import place
from hyperflexis.policy.catalog import POLICIES, STEPS, find_policy
from hyperflexis.policy.place import PlaceMemory
from hyperflexis.policy.running import Running
from hyperflexis.policy.step import StepLimits
from hyperflexis.policy.waiting import Waiting

SEEDS = st.integers(0, 1 << 32)
FAST = Coefficients(0.01, 1e-4, 1e-8, 5e-4, 1e-7)
SLOW = Coefficients(1.0, 1.0, 0.0, 0.1, 1e-3)
CURVED = replace(FAST, curve=((0.0, 0.0), (256.0, 40.0), (1024.0, 900.0)))


@dataclass(eq=False)
class Job:
    id: str
    remaining_prefill: int
    computed: int
    arrived_at: float
    next_due: float
    pace_s: float
    last_due: float
    value: float
    started: bool
    missed_first: bool
    expected_remaining: float
    memo: object = None


def draw_job(random: Random, id: str, waits: bool) -> Job:
    return Job(
        id,
        remaining_prefill=random.choice((1, random.randint(1, 40), random.randint(1, 9000))) if waits else 1,
        computed=random.choice((0, random.randint(1, 4000))) if waits else random.randint(1, 4000),
        arrived_at=random.uniform(-100.0, 0.0),
        next_due=random.choice((inf, random.uniform(-5.0, 5.0), random.uniform(0.0, 0.1))),
        pace_s=random.choice((inf, 0.05, random.uniform(1e-3, 1.0))),
        last_due=random.choice((inf, inf, random.uniform(-5.0, 50.0))),
        value=random.choice((0.5, 1.0, 4.0)),
        started=waits and random.random() < 0.2,
        missed_first=random.random() < 0.1,
        expected_remaining=random.uniform(1.0, 500.0),
    )


@pytest.mark.parametrize("step", sorted(STEPS))
@settings(max_examples=300, deadline=None)
@given(seed=SEEDS)
def test_a_step_keeps_the_limits_and_always_makes_progress(step: str, seed: int) -> None:
    random = Random(seed)
    running: Running[Job] = Running()
    for k in range(random.choice((0, 0, random.randint(1, 40)))):
        running.add(draw_job(random, f"d{k}", waits=False))
    waiting: Waiting[Job] = Waiting()
    for k in range(random.choice((0, 1, random.randint(2, 60)))):
        waiting.add(draw_job(random, f"w{k}", waits=True))
    holding = len(running) + sum(job.started for job in waiting)
    capacity = random.randint(20_000, 500_000)
    limits = StepLimits(
        max_batch=max(holding, random.randint(1, 80)),
        # As few as can be: an instance takes no more requests than it has tokens for their decodes.
        max_batch_tokens=max(holding, random.choice((1, random.randint(1, 64), random.randint(256, 8192)))),
        kv_capacity_tokens=capacity,
        kv_free_tokens=random.choice((0, random.randint(0, capacity))),
    )
    latency = random.choice((FAST, SLOW, CURVED))
    plan = STEPS[step].plan(0.0, waiting, running, latency, limits)
    if random.random() < 0.5:
        for job in plan.late:
            waiting.give_up(job)
        plan = STEPS[step].plan(0.0, waiting, running, latency, limits)
        assert not plan.late, "given up already"

    if not waiting:
        assert plan.decode and not plan.prefills, "with nothing waiting all decode"
    assert plan.prefills or len(running) or not waiting, "nothing runs while work waits"
    assert plan.decode or plan.prefills, "an iteration without a token"
    chosen = [job for job, _ in plan.prefills]
    assert len({job.id for job in chosen}) == len(chosen), "a request twice"
    assert all(job.id in waiting for job in chosen)
    assert all(1 <= n <= job.remaining_prefill for job, n in plan.prefills)
    tokens = sum(n for _, n in plan.prefills) + (len(running) if plan.decode else 0)
    assert tokens <= limits.max_batch_tokens or not chosen
    assert holding + sum(not job.started for job in chosen) <= limits.max_batch
    jobs = [*running, *waiting]
    if jobs:
        assert STEPS[step].victim(0.0, jobs) in jobs


def draw_request(random: Random, id: str) -> TrackedRequest:
    slo = Slo(
        random.choice((None, random.uniform(0.05, 5.0))),
        random.choice((None, random.uniform(0.005, 0.2))),
        random.choice((None, None, random.uniform(1.0, 60.0))),
    )
    prompt = random.randint(1, 8000)
    inner = Request(id, "m", "t", "c", slo, random.choice((0.5, 1.0, 4.0)), prompt, 1000)
    expected = random.uniform(1.0, 500.0)
    arrived_at = random.uniform(-3.0, 0.0)
    ttft_s = slo.first_token_by_s(expected)
    pace_s = slo.pace_s(expected, ttft_s if ttft_s < inf else 0.0)
    tracked = TrackedRequest(inner, "g", arrived_at, arrived_at + ttft_s, pace_s, expected)
    tracked.prefilled = random.choice((0, 0, random.randint(0, prompt)))
    tracked.output_tokens = random.choice((0, 0, random.randint(1, 900)))
    return tracked


def draw_fleet(random: Random) -> list[TrackedInstance]:
    fleet = []
    for k in range(random.choice((1, 2, random.randint(3, 20)))):
        tokens = random.choice((32, 512, 8192))
        info = InstanceInfo(f"i{k}", 1, "m", "cpu", f"unix:{k}", "e", 8192, 100_000, 64, tokens, True, FAST)
        one = TrackedInstance(info, FAST)
        for n in range(random.choice((0, random.randint(0, 40)))):
            one.bind(draw_request(random, f"i{k}-{n}"))
        fleet.append(one)
    return fleet


@pytest.mark.parametrize("spec", [*POLICIES, "reject_at_door@512,1.3"])
@settings(max_examples=60, deadline=None)
@given(seed=SEEDS)
def test_a_placement_is_a_ready_instance_and_a_function_of_its_arguments(spec: str, seed: int) -> None:
    random = Random(seed)
    policy, fleet, memory = find_policy(spec), draw_fleet(random), PlaceMemory(turn={"m": random.randrange(1 << 40)})
    tracked = draw_request(random, "r")
    placement, after = policy.place(0.0, tracked, fleet, memory)
    assert placement.instance in {one.id for one in fleet}
    assert 1 <= placement.candidates <= len(fleet)
    assert placement.predicted_ttft_s >= 0.0 and placement.predicted_e2e_s >= placement.predicted_ttft_s
    assert policy.place(0.0, tracked, fleet, memory) == (placement, after)


@settings(max_examples=200, deadline=None)
@given(seed=SEEDS, turn=st.integers(0, 1 << 60))
def test_power_of_two_never_takes_the_worse_of_its_two(seed: int, turn: int) -> None:
    fleet = draw_fleet(Random(seed))
    pair = place.two_of(fleet, turn)
    assert len({one.id for one in pair}) == min(len(fleet), 2)
    chosen, after = place.power_of_two(0.0, draw_request(Random(seed), "r"), fleet, PlaceMemory(turn={"m": turn}))
    loads = {one.id: one.num_requests for one in pair}
    assert loads[chosen.instance] == min(loads.values())
    assert after.turn == {"m": turn + 1}
