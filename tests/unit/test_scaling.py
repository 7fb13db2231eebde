"""The controller starts and ends instances: by which means, how drains go, what waits, what is learnt."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.unit.test_controller import MODEL as LATENCY
from tests.unit.test_controller import info, report, request

from hyperflexis.controller import Controller, ControllerConfig
from hyperflexis.core.effects import Dispatch, Drain, Effect, Handoff, Launch, Planned, Reject, SetLinks, StopInstance
from hyperflexis.core.events import (
    DrainAsked,
    GatewayJoined,
    InstanceDraining,
    InstanceJoined,
    InstanceLeft,
    InstanceReported,
    LauncherJoined,
    LaunchFailed,
    LaunchProgressed,
    OpenRequest,
    RequestArrived,
    RequestFinished,
    ScaleAsked,
    Tick,
)
from hyperflexis.core.instance import InstanceState, RequestProgress
from hyperflexis.core.links import Split
from hyperflexis.core.request import Request
from hyperflexis.errors import ConfigError
from hyperflexis.policy.scale import ModelScale, ScaleConfig


def fleet(instances: int = 2, policy: str = "forecast", devices: int | None = None, **limits: object) -> Controller:
    limits = {"start_s": {"disk": 10.0, "d2d": 4.0, "standby": 1.0}, "latency": LATENCY} | limits
    scale = ScaleConfig((ModelScale("m", **limits),), devices, policy, max_held=3)  # type: ignore[arg-type]
    made = Controller(ControllerConfig(("m",), scale=scale))
    made.handle(LauncherJoined(), 0.0)
    for i in range(instances):
        made.handle(InstanceJoined(info(f"i{i}", kv_address=f"unix:kv{i}", kv_bytes_per_token=1)), 0.0)
    return made


def of(kind: type, effects: list[Effect]) -> list[Effect]:
    return [effect for effect in effects if isinstance(effect, kind)]


def tick(c: Controller, *seconds: float) -> list[Effect]:
    return [effect for now in seconds for effect in c.handle(Tick(), now)]


def bound_to(c: Controller, instance: str, id: str, output_tokens: int = 0, **changes: object) -> Request:
    """A request that runs on ``instance``."""
    asked = replace(request(id), **changes)  # type: ignore[arg-type]
    c.handle(GatewayJoined(f"g{id}", (OpenRequest(asked, 0.0, instance, 1, output_tokens),)), 0.0)
    return asked


def test_a_plan_is_made_once_a_second_and_says_why():
    c = fleet(policy="fixed@2")
    effects = tick(c, 1.0, 1.25, 1.5, 2.0)
    plans = of(Planned, effects)
    assert [plan.held for plan in plans] == [2, 2]
    assert (plans[0].cause, plans[0].reason) == ("rule", "always 2")


def test_new_instances_get_their_weights_from_others_where_that_is_quicker():
    c = fleet(policy="fixed@3")
    (launch,) = of(Launch, tick(c, 1.0))
    assert (launch.means, launch.shell, launch.prefill_share) == ("d2d", False, None)
    assert not of(Launch, tick(c, 2.0)), "it is on its way"
    none = fleet(0, policy="fixed@1")
    (launch,) = of(Launch, tick(none, 1.0))
    assert launch.means == "disk", "nobody has the weights"


def test_what_a_start_took_is_learnt_and_is_the_horizon():
    c = fleet(policy="fixed@3")
    (launch,) = of(Launch, tick(c, 1.0))
    c.handle(LaunchProgressed(launch.instance, "process", 3.0, InstanceState.LOADING), 4.0)
    assert c.cluster.launches[launch.instance].state is InstanceState.LOADING
    c.handle(InstanceJoined(info(launch.instance)), 9.0)
    assert not c.cluster.launches
    (plan,) = of(Planned, tick(c, 10.0))
    assert plan.horizon_s == 8.0 and plan.instances == 3


def test_a_launch_that_fails_is_tried_again_at_once_then_later_and_elsewhere():
    c = fleet(policy="fixed@3")
    (first,) = of(Launch, tick(c, 1.0))
    c.handle(LaunchFailed(first.instance, "no memory", "node-1"), 2.0)
    (second,) = of(Launch, tick(c, 2.1))
    assert second.instance != first.instance and second.avoid == ("node-1",)
    c.handle(LaunchFailed(second.instance, "no memory", "node-2"), 3.0)
    assert not of(Launch, tick(c, 3.2, 4.2))
    (third,) = of(Launch, tick(c, 5.3))
    assert third.avoid == ("node-1", "node-2")
    c.handle(LaunchFailed("unknown", "x"), 6.0)


def test_a_launch_that_never_comes_up_is_given_up_and_replaced():
    c = fleet(policy="fixed@3")
    (first,) = of(Launch, tick(c, 1.0))
    effects = tick(c, 20.0, 40.0, 60.0)
    assert [stop.instance for stop in of(StopInstance, effects)] == [first.instance]
    (second,) = of(Launch, effects)
    assert second.instance != first.instance


def test_fewer_stops_the_youngest_that_is_not_ready_then_drains_the_one_with_the_least():
    c = fleet(3)
    bound_to(c, "i0", "a", 1)
    bound_to(c, "i2", "b", 1)
    c.handle(ScaleAsked("m", 5), 0.5)
    first, second = of(Launch, tick(c, 1.0))
    c.handle(ScaleAsked("m", 2), 1.5)
    effects = tick(c, 2.0)
    assert {stop.instance for stop in of(StopInstance, effects)} == {first.instance, second.instance}
    assert [drain.instance for drain in of(Drain, effects)] == ["i1"]


def test_a_drained_instance_is_stopped_when_it_is_empty_at_two_looks():
    c = fleet(2)
    asked = bound_to(c, "i0", "a", 1)
    bound_to(c, "i1", "b", 1)
    bound_to(c, "i1", "c", 1)
    c.handle(ScaleAsked("m", 1), 0.5)
    assert [drain.instance for drain in of(Drain, tick(c, 1.0))] == ["i0"]
    assert not of(StopInstance, tick(c, 2.0, 3.0)), "a request runs there"
    c.handle(RequestFinished(asked.id, "finished", 10, 0.1, 3.0), 3.5)
    assert not of(StopInstance, tick(c, 4.0))
    (stop,) = of(StopInstance, tick(c, 5.0))
    assert stop.instance == "i0" and "i0" not in c.cluster.instances


def test_what_would_run_long_on_a_drained_instance_goes_on_elsewhere():
    c = fleet(2)
    bound_to(c, "i0", "short", 99, max_output_tokens=100)
    bound_to(c, "i1", "other", 1)
    bound_to(c, "i1", "another", 1)
    long = bound_to(c, "i0", "long", 1, max_output_tokens=2000)
    c.cluster.requests[long.id].expected_output_tokens = 2000.0
    bound_to(c, "i1", "third", 1)
    c.handle(ScaleAsked("m", 1), 0.5)
    effects = tick(c, 1.0)
    assert [drain.instance for drain in of(Drain, effects)] == ["i0"]
    assert [handoff.request_id for handoff in of(Handoff, effects)] == ["long"]


def test_a_drain_is_cancelled_before_anything_is_launched():
    c = fleet(2)
    for name in "ab":
        bound_to(c, "i0", f"x{name}", 1)
        bound_to(c, "i1", f"y{name}", 1)
    c.handle(ScaleAsked("m", 1), 0.5)
    (drain,) = of(Drain, tick(c, 1.0))
    c.handle(ScaleAsked("m", 3), 1.5)
    effects = tick(c, 2.0)
    assert [(back.instance, back.on) for back in of(Drain, effects)] == [(drain.instance, False)]
    assert len(of(Launch, effects)) == 1
    assert c.cluster.instances[drain.instance].state is InstanceState.READY


def test_whom_a_person_drains_neither_counts_nor_is_brought_back():
    c = fleet(2, policy="fixed@2")
    bound_to(c, "i0", "a", 1)
    c.handle(DrainAsked("i0", None), 0.5)
    effects = tick(c, 1.0, 2.0, 3.0)
    assert len(of(Launch, effects)) == 1
    assert not of(Drain, effects) and not of(StopInstance, effects)


def test_shells_wait_are_woken_and_replaced():
    c = fleet(1, standby=1, policy="fixed@1")
    (shell,) = of(Launch, tick(c, 1.0))
    assert shell.shell
    c.handle(LaunchProgressed(shell.instance, "warm_up", 1.0, InstanceState.STANDBY), 5.0)
    assert not of(StopInstance, tick(c, 500.0)), "a shell waits as long as it is wanted to"
    c.handle(ScaleAsked("m", 2), 500.5)
    woken, another = of(Launch, tick(c, 501.0))
    assert (woken.instance, woken.means, woken.shell) == (shell.instance, "standby", False)
    assert another.shell and another.instance != shell.instance


def test_a_pool_is_never_overdrawn_not_even_by_what_drains():
    c = fleet(2, devices=3, standby=1)
    bound_to(c, "i0", "a", 1)
    c.handle(ScaleAsked("m", 9), 0.5)
    effects = tick(c, 1.0, 2.0, 3.0)
    assert len(of(Launch, effects)) == 1
    assert of(Planned, effects)[-1].held == 3


def test_requests_wait_for_the_first_instance_within_bounds():
    c = fleet(0, least=0)
    effects = [c.handle(RequestArrived(request(f"r{k}"), "g", 0.0), 0.1) for k in range(4)]
    assert effects[:3] == [[], [], []]
    (refused,) = effects[3]
    assert isinstance(refused, Reject) and refused.reason == "overloaded"
    launch = of(Launch, tick(c, 1.0))[0]
    sent = c.handle(InstanceJoined(info(launch.instance)), 11.0)
    assert [effect.request_id for effect in of(Dispatch, sent)] == ["r0", "r1", "r2"]


def test_a_miss_counts_when_a_request_is_demoted_and_not_again():
    c = fleet(1, most=1)
    for k in range(40):
        c.handle(RequestArrived(request(f"r{k}", prompt=4000, ttft_s=0.5), "g", 0.0), 0.1)
    tally = c.cluster.tallies["m"]
    missed = tally.misses
    assert 30 <= missed < 40 and tally.arrivals == 40
    tick(c, 1.0)
    assert c.cluster.tallies["m"].misses == 0
    c.handle(RequestFinished("r39", "finished", 5, 9.0, 9.5), 9.6)
    assert (tally.outcomes, tally.misses) == (1, 0), "it was counted before"
    first = next(tracked for tracked in c.cluster.requests.values() if tracked.counted_missed)
    c.handle(RequestFinished(first.request.id, "finished", 5, 0.1, 0.2), 9.7)
    assert tally.misses == -1, "against expectation it was kept"


def test_a_controller_that_starts_anew_keeps_what_is_there():
    c = fleet(6)
    for k in range(60):
        bound_to(c, f"i{k % 6}", f"r{k}", 1, max_output_tokens=4000)
    effects = tick(c, *(float(t) for t in range(1, 6)))
    assert not of(Drain, effects)
    assert of(Planned, effects)[-1].demand > 0.0


def test_an_instance_keeps_taking_work_while_the_fleet_is_as_it_should_be():
    c = fleet(2, policy="fixed@2")
    sent = c.handle(RequestArrived(request("r"), "g", 0.0), 0.1)
    assert isinstance(sent[0], Dispatch)
    c.handle(InstanceReported(report(sent[0].instance, [RequestProgress("r", 500, 3)])), 0.3)
    effects = tick(c, 1.0, 2.0)
    assert not of(Launch, effects) and not of(Drain, effects) and not of(StopInstance, effects)


@pytest.mark.parametrize("spec", ["nothing", "rate@x", "rate@-1", "fixed", "fixed@1,2"])
def test_a_scaler_that_there_is_not_is_refused(spec):
    with pytest.raises(ConfigError, match="scaler"):
        Controller(ControllerConfig(("m",), scale=ScaleConfig((ModelScale("m"),), policy=spec)))


def split_fleet(instances: int, policy: str) -> Controller:
    """They have joined; nothing was heard of their links yet."""
    scale = ScaleConfig((ModelScale("m", start_s={"disk": 10.0}, latency=LATENCY),), None, policy)
    made = Controller(ControllerConfig(("m",), scale=scale, split=Split()))
    made.handle(LauncherJoined(), 0.0)
    for i in range(instances):
        made.handle(InstanceJoined(info(f"i{i}", kv_address=f"unix:kv{i}", kv_bytes_per_token=1)), 0.0)
    return made


def test_one_that_is_still_to_be_linked_is_not_launched_for_again():
    c = split_fleet(2, "fixed@2")
    assert [one.id for one in c.cluster.ready("m")] == ["i0"]
    assert not of(Launch, tick(c, 1.0))


def test_an_instance_that_is_stopped_is_unlinked_from_the_others():
    c = split_fleet(3, "fixed@2")
    effects = [effect for second in range(1, 60) for effect in tick(c, float(second))]
    (stopped,) = of(StopInstance, effects)
    left = [id for id in ("i0", "i1", "i2") if id != stopped.instance]
    after = effects[effects.index(stopped) :]
    told = {order.instance: [source.instance for source in order.sources] for order in of(SetLinks, after)}
    assert told == {left[0]: [left[1]], left[1]: [left[0]]}


def order(instance: str, shell: bool = False) -> Launch:
    return Launch(instance, "m", "disk", shell, None, (), "")


def test_nothing_is_planned_before_the_launcher_has_said_what_runs():
    c = Controller(ControllerConfig(("m",), scale=ScaleConfig((ModelScale("m"),), policy="fixed@2")))
    assert tick(c, 1.0, 2.0) == []
    c.handle(InstanceJoined(info("m-4"), served=True), 2.5)
    told = LauncherJoined((order("m-4"), order("m-5"), order("m-6", shell=True)), {"m": 3})
    assert c.handle(told, 3.0) == []
    assert {one.id: (one.shell, one.adopted) for one in c.cluster.launches.values()} == {
        "m-5": (False, True),
        "m-6": (True, True),
    }
    (plan,) = of(Planned, tick(c, 3.1))
    assert (plan.instances, plan.held, plan.reason) == (2, 3, "3 were asked for"), "as people wanted it before"
    assert plan.cause == "asked"
    c.handle(ScaleAsked("m", 0), 3.5)
    effects = tick(c, 4.1)
    assert [(drain.instance, drain.reason) for drain in of(Drain, effects)] == [("m-4", "0 were asked for")]
    assert "m-5" not in [stop.instance for stop in of(StopInstance, effects)], "it may serve already"
    c.handle(InstanceJoined(info("m-5"), served=True), 4.2)
    assert not c.scaling.start_s, "how long ago that began is not known"


def test_what_came_to_nothing_while_the_launcher_was_away_is_launched_anew():
    c = fleet(0, policy="fixed@2")
    first, second = of(Launch, tick(c, 1.0))
    assert c.handle(LauncherJoined((order(first.instance),)), 2.0) == []
    assert list(c.cluster.launches) == [first.instance]
    (third,) = of(Launch, tick(c, 2.1))
    assert third.instance not in (first.instance, second.instance)


def test_who_was_to_end_while_the_launcher_was_away_is_told_again():
    c = fleet(0, policy="fixed@2")
    first, second = of(Launch, tick(c, 1.0))
    c.handle(ScaleAsked("m", 1), 1.5)
    (stop,) = of(StopInstance, tick(c, 2.0))
    left = second if stop.instance == first.instance else first
    effects = c.handle(LauncherJoined((order(first.instance), order(second.instance))), 3.0)
    assert [effect.instance for effect in of(StopInstance, effects)] == [stop.instance]
    assert list(c.cluster.launches) == [left.instance]


def test_a_drain_of_ours_goes_on_under_the_next_controller_and_a_persons_stays_theirs():
    c = fleet(3, policy="fixed@3")
    c.handle(ScaleAsked("m", 2), 0.5)
    (drain,) = of(Drain, tick(c, 1.0))
    assert drain.ends
    c = fleet(0, policy="fixed@1")
    c.handle(InstanceJoined(info("a"), served=True), 1.0)
    c.handle(InstanceJoined(info("b"), draining=True, served=True, ends=True), 1.0)
    c.handle(InstanceJoined(info("c"), draining=True, served=True), 1.0)
    c.handle(InstanceLeft("b", 1, "its link was cut"), 1.5)
    c.handle(InstanceJoined(info("b"), draining=True, served=True, ends=True), 1.6)
    assert c.scaling.drains == ("b",)
    assert [stop.instance for stop in of(StopInstance, tick(c, 2.0, 3.0, 4.0))] == ["b"]


def test_the_first_start_that_is_measured_replaces_what_was_expected():
    c = fleet(0, policy="fixed@2", start_s={"disk": 100.0})
    first, second = of(Launch, tick(c, 1.0))
    c.handle(InstanceJoined(info(first.instance)), 5.0)
    assert of(Planned, tick(c, 6.0))[0].horizon_s == 4.0
    c.handle(InstanceJoined(info(second.instance)), 3.0)
    assert of(Planned, tick(c, 7.0))[0].horizon_s == pytest.approx(4.0 - 0.3 * 2.0), "then quicker ones count a part"


def test_a_way_that_was_guessed_too_slow_is_tried_all_the_same():
    c = fleet(0, policy="fixed@1", start_s={"disk": 100.0, "d2d": 80.0})
    (first,) = of(Launch, tick(c, 1.0))
    assert first.means == "disk", "nobody has the weights"
    c.handle(InstanceJoined(info(first.instance)), 11.0)
    c.handle(ScaleAsked("m", 2), 11.0)
    effects = tick(c, 12.0)
    assert of(Launch, effects)[0].means == "d2d"
    assert of(Planned, effects)[0].horizon_s == 8.0, "a tenth of what was expected, as from disk"


def test_phases_of_starts_are_summed_once_each():
    c = fleet(0, policy="fixed@1")
    (launch,) = of(Launch, tick(c, 1.0))
    for phase, seconds in (("process", 2.0), ("process", 2.0), ("engine_init", 3.0)):
        c.handle(LaunchProgressed(launch.instance, phase, seconds, InstanceState.LAUNCHING), 2.0)
    c.handle(LaunchProgressed("unknown", "process", 9.0, InstanceState.LAUNCHING), 2.0)
    assert c.scaling.phases == {"m": {"process": (1, 2.0), "engine_init": (1, 3.0)}}


def test_what_comes_to_decode_on_a_machine_that_goes_follows_however_short_it_is():
    for notice in (InstanceDraining("i0", 1, 28.0), DrainAsked("i0", 30.0, hard=True)):
        c = fleet(2, policy="fixed@2")
        asked = bound_to(c, "i0", "a")
        assert not of(Handoff, c.handle(notice, 1.0)), "its prompt is not computed yet"
        c.handle(InstanceReported(replace(report("i0", (RequestProgress(asked.id, 500, 1),)), num_running=1)), 1.5)
        effects = tick(c, 2.0)
        assert [handoff.request_id for handoff in of(Handoff, effects)] == ["a"]
        assert len(of(Launch, effects)) == 1, "and another is launched in its place"
        assert c.scaling.leaving == ("i0",)
        c.handle(InstanceLeft("i0", 1, "it ended"), 2.5)
        tick(c, 3.0)
        assert c.scaling.leaving == ()


def test_a_machine_that_goes_is_drained_in_time_even_where_no_other_is_ready():
    c = fleet(1)
    (drain,) = of(Drain, c.handle(DrainAsked("i0", 30.0, hard=True), 1.0))
    assert drain.limit_s == 28.0
    c = fleet(1)
    (drain,) = of(Drain, c.handle(DrainAsked("i0", 30.0), 1.0))
    assert drain.limit_s is None
