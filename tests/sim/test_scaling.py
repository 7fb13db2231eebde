"""Stories of fleets that follow their load, each with what must hold after every event."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.sim.support import device

from hyperflexis.controller import Controller, ControllerConfig, Snapshot
from hyperflexis.core.effects import Dispatch, Drain, Effect, Handoff, Launch, Planned, StopInstance
from hyperflexis.core.events import (
    Event,
    InstanceJoined,
    InstanceLeft,
    RequestFinished,
)
from hyperflexis.core.latency import Coefficients
from hyperflexis.core.links import Split
from hyperflexis.core.slo import Slo
from hyperflexis.policy.catalog import find_policy
from hyperflexis.policy.scale import ModelScale, ScaleConfig
from hyperflexis.sim.config import SimConfig, SimResult
from hyperflexis.sim.driver import MODEL, simulate
from hyperflexis.sim.faults import Fault, LaunchFault
from hyperflexis.sim.launches import Starts, starts_in
from hyperflexis.sim.workload import Arrival

COEFFICIENTS = Coefficients(0.005, 1e-4, 0.0, 1e-4, 1e-8)
STARTS: Starts = {
    "disk": (("process", 2.0), ("engine_init", 2.0), ("weights", 5.0), ("warm_up", 1.0)),
    "d2d": (("process", 2.0), ("engine_init", 2.0), ("weights", 0.5), ("warm_up", 1.0)),
    "standby": (("weights", 0.5),),
}


def config(starts: Starts | None = None, instances: int = 2, devices: int | None = None, **limits: int) -> SimConfig:
    starts = starts or starts_in(2.0)
    seconds = {means: sum(s for _, s in phases) for means, phases in starts.items()}
    scale = ModelScale(MODEL, start_s=seconds, latency=COEFFICIENTS, **limits)  # type: ignore[arg-type]
    profile = device(COEFFICIENTS, kv_capacity_tokens=200_000, max_batch_tokens=2048, context_length=8192)
    policy = find_policy("hyperflexis")
    return SimConfig(profile, instances, "hyperflexis", policy, scale=ScaleConfig((scale,), devices), starts=starts)


def steps(seed: int, *rates: tuple[float, float], model: str = "") -> list[Arrival]:
    """Requests at so many a second for so many seconds, each."""
    random, found, t, start = Random(seed), [], 0.0, 0.0
    for rate, seconds in rates:
        t = start
        while rate and (t := t + random.expovariate(rate)) < start + seconds:
            slo = Slo(random.choice((0.5, 4.0)), random.choice((0.03, 0.1)))
            found.append(Arrival(t, "c", slo, 1.0, random.randint(500, 3000), random.randint(1, 200), model=model))
        start += seconds
    return found


class Watch:
    """Checks after each event what must always hold."""

    def __init__(self, setup: SimConfig) -> None:
        self.setup = setup
        self.lines: list[str] = []
        self.up: set[str] = {str(n) for n in range(setup.instances)}
        self.draining: set[str] = set()
        self.launched: list[Launch] = []
        self.stopped: set[str] = set()
        self.ended: set[str] = set()
        self.plans: list[tuple[float, Planned]] = []

    def __call__(self, now: float, event: Event, effects: Sequence[Effect]) -> None:
        match event:
            case InstanceJoined():
                assert event.info.id not in self.stopped, "it was given up"
                self.up.add(event.info.id)
            case InstanceLeft():
                self.up.discard(event.id)
                self.draining.discard(event.id)
            case RequestFinished():
                assert event.id not in self.ended, "a request ends once"
                self.ended.add(event.id)
            case _:
                pass
        for effect in effects:
            match effect:
                case Dispatch() | Handoff():
                    assert effect.instance in self.up - self.draining, "placed where nothing may be placed"
                case Drain():
                    (self.draining.add if effect.on else self.draining.discard)(effect.instance)
                case StopInstance():
                    assert effect.instance in self.draining or effect.instance not in self.up, "stopped without a drain"
                    self.stopped.add(effect.instance)
                    self.up.discard(effect.instance)
                    self.draining.discard(effect.instance)
                case Launch():
                    self.launched.append(effect)
                case Planned():
                    self.plans.append((now, effect))
                    assert self.setup.scale is not None
                    limits = next(one for one in self.setup.scale.models if one.model == effect.model)
                    assert limits.least <= effect.held <= limits.most
                case _:
                    pass
        self.lines.append(f"{now!r} {event!r} {effects!r}")


def run(setup: SimConfig, arrivals: list[Arrival], duration_s: float) -> tuple[SimResult, Watch]:
    watch = Watch(setup)
    result = simulate(setup, arrivals, duration_s, watch)
    assert len(result.run.records) == len(arrivals)
    return result, watch


def lost(result: SimResult) -> list[str]:
    return [record.outcome for record in result.run.records if record.outcome != "finished"]


RISE_AND_FALL = ((2.0, 60.0), (25.0, 60.0), (2.0, 120.0))


def test_a_fleet_follows_its_load_up_and_down_and_loses_nothing():
    result, watch = run(config(), steps(1, *RISE_AND_FALL), 240.0)
    held = [plan.held for _, plan in watch.plans]
    assert max(held[60:120]) >= 4 and held[230] <= max(held) // 2
    assert not lost(result)
    assert result.accelerator_s < 0.75 * max(held) * result.run.ended_s
    assert all(plan.reason for _, plan in watch.plans)
    assert watch.plans[30][1].cause == "demand"


def test_the_same_seed_gives_the_same_log_and_another_another():
    logs = [run(replace(config(), seed=s, noise=0.1), steps(2, *RISE_AND_FALL), 240.0)[1].lines for s in (1, 1, 2)]
    assert logs[0] == logs[1] != logs[2]


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1 << 30))
def test_whatever_happens_each_request_ends_once_and_none_is_placed_on_what_drains(seed: int) -> None:
    random = Random(seed)
    rates = [(random.choice((0.0, 1.0, 10.0, 30.0)), random.uniform(5.0, 60.0)) for _ in range(4)]
    arrivals = steps(seed, *rates)
    if not arrivals:
        return
    faults = tuple(
        Fault(random.uniform(0.0, 60.0), random.randrange(2), kind, random.uniform(1.0, 5.0), 3.0)  # type: ignore[arg-type]
        for kind in random.sample(("kill", "hang", "slow", "drain"), random.choice((0, 1, 2)))
    )
    setup = replace(
        config(random.choice((STARTS, starts_in(2.0), starts_in(20.0))), least=random.choice((0, 1)), most=12),
        faults=faults,
        launch_faults=(LaunchFault(random.choice(("fail", "hang")), random.randrange(3)),),  # type: ignore[arg-type]
        split=random.choice((None, None, Split(), Split(1, 1, adapt=False))),
    )
    result, watch = run(setup, arrivals, sum(seconds for _, seconds in rates))
    assert not [outcome for outcome in lost(result) if outcome != "failed"]
    assert len(watch.ended) == len(arrivals)


@pytest.mark.parametrize("kind", ["fail", "hang"])
def test_a_launch_that_comes_to_nothing_is_tried_again_under_another_name(kind):
    setup = replace(config({"disk": STARTS["disk"]}), launch_faults=(LaunchFault(kind, 0),))
    result, watch = run(setup, steps(3, (25.0, 210.0)), 210.0)
    names = [launch.instance for launch in watch.launched]
    assert len(set(names)) == len(names)
    if kind == "fail":
        assert any(launch.avoid for launch in watch.launched), "elsewhere, if it can"
    else:
        assert names[0] in watch.stopped
    assert watch.plans[205][1].instances == watch.plans[205][1].held >= 4
    assert not lost(result)


def test_an_instance_that_is_killed_is_replaced():
    setup = replace(config(least=2), faults=(Fault(30.0, 0, "kill", 5.0),))
    result, watch = run(setup, steps(4, (3.0, 120.0)), 120.0)
    assert [launch.instance for launch in watch.launched]
    assert "0" not in watch.up and len(watch.up) >= 2
    assert not lost(result)


def test_from_zero_the_first_request_waits_for_an_instance():
    setup = config(starts_in(3.0), instances=0, least=0)
    result, watch = run(setup, steps(5, (0.0, 20.0), (1.0, 10.0), (0.0, 400.0), (1.0, 5.0)), 435.0)
    assert not lost(result)
    assert [plan.held for _, plan in watch.plans][400] == 0
    first = result.run.records[0]
    assert first.ttft_s is not None and 3.0 < first.ttft_s < 6.0


def test_shells_are_woken_first_and_replaced():
    setup = replace(config(STARTS, standby=2), shell_price=0.2)
    result, watch = run(setup, steps(6, (2.0, 60.0), (25.0, 60.0)), 120.0)
    shells = [launch.instance for launch in watch.launched if launch.shell]
    woken = [launch.instance for launch in watch.launched if launch.means == "standby"]
    assert woken[:2] == shells[:2] and len(shells) >= 3
    assert any(launch.means == "d2d" for launch in watch.launched), "where no shell is left"
    assert not lost(result)


def test_new_instances_get_the_role_that_lacks_most():
    setup = replace(config(instances=2), split=Split(1, 0))
    result, watch = run(setup, steps(7, *RISE_AND_FALL), 240.0)
    assert {launch.prefill_share for launch in watch.launched} <= {1.0, 0.5}
    assert 1.0 in {launch.prefill_share for launch in watch.launched}
    assert not lost(result)


def test_two_models_share_a_pool():
    base = config(instances=2, devices=6)
    assert base.scale is not None
    one = base.scale.models[0]
    scale = replace(base.scale, models=(replace(one, model="a"), replace(one, model="b")))
    arrivals = sorted(
        steps(8, (4.0, 60.0), (40.0, 60.0), model="a") + steps(9, (40.0, 60.0), (4.0, 60.0), model="b"),
        key=lambda arrival: arrival.t,
    )
    setup = replace(base, scale=scale)
    result, watch = run(setup, arrivals, 120.0)
    assert not lost(result)
    assert max(count for _, count in result.sizes) <= 6
    held = {model: [plan.held for _, plan in watch.plans if plan.model == model] for model in "ab"}
    assert held["b"][50] > held["a"][50] and held["a"][110] > held["b"][110]


def test_a_journal_of_a_scaled_run_replays_to_the_letter():
    setup = config(STARTS, standby=1)
    lines: list[tuple[float, Event, list[Effect]]] = []
    simulate(
        setup, steps(10, *RISE_AND_FALL), 240.0, lambda now, event, effects: lines.append((now, event, list(effects)))
    )
    made = ControllerConfig((MODEL,), "hyperflexis", scale=setup.scale)
    controller = Controller(msgspec.json.decode(msgspec.json.encode(made), type=ControllerConfig))
    for index, (now, event, effects) in enumerate(lines):
        if index == len(lines) // 2:
            snapshot = msgspec.msgpack.decode(msgspec.msgpack.encode(controller.snapshot()), type=Snapshot)
            controller = Controller.restore(made, snapshot)
        assert controller.handle(event, now) == effects


def test_what_a_person_drains_does_not_count_and_is_left_alone():
    setup = replace(config(least=2), faults=(Fault(10.0, 0, "drain", 60.0),))
    result, watch = run(setup, steps(11, (3.0, 90.0)), 90.0)
    asked = [line for line in watch.lines if "DrainAsked" in line]
    assert asked and watch.launched, "another one takes its place"
    assert "0" not in watch.stopped
    assert not lost(result)
