"""Disaggregated: where prompts go, where their requests decode, and what the books say meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import pytest
from tests.unit.test_controller import ask, info, report, request

from hyperflexis.controller import Controller, ControllerConfig, Snapshot
from hyperflexis.core.effects import Dispatch, Effect, Evacuate, Handoff, SetLinks, SetRole, Stay, Suspect
from hyperflexis.core.events import (
    DrainAsked,
    GatewayJoined,
    HandoffFailed,
    InstanceDraining,
    InstanceJoined,
    InstanceLeft,
    InstanceLinked,
    InstanceReported,
    OpenRequest,
    PrefillEnding,
    RequestArrived,
    RequestFinished,
    Tick,
)
from hyperflexis.core.instance import InstanceInfo, InstanceState, RequestProgress
from hyperflexis.core.links import Link, Split
from hyperflexis.core.slo import Slo
from hyperflexis.policy.links import LINK_LIMIT_S
from hyperflexis.policy.roles import GROW

APART = Split(prefill=1, decode=1, adapt=False)


def fleet(
    split: Split | None = APART, instances: int = 2, policy: str = "hyperflexis"
) -> tuple[Controller, list[object]]:
    made = Controller(ControllerConfig(("m",), policy, split=split))
    effects: list[object] = []
    for i in range(instances):
        effects += join(made, info(f"i{i}", kv_address=f"unix:kv{i}", kv_bytes_per_token=1000))
    return made, effects


def join(c: Controller, joined: InstanceInfo, now: float = 0.0) -> list[object]:
    """It joins, and is linked with the others. The effects of both."""
    effects: list[object] = list(c.handle(InstanceJoined(joined), now))
    for order in [e for e in effects if isinstance(e, SetLinks)]:
        for source in order.sources:
            effects += c.handle(InstanceLinked(order.instance, order.epoch, source.instance, source.epoch, Link()), now)
    return effects


def ending(id: str = "r", instance: str = "i0", epoch: int = 1, left_s: float = 0.01) -> PrefillEnding:
    return PrefillEnding(id, instance, epoch, left_s)


def loads(c: Controller) -> list[tuple[int, int]]:
    """(prompts, decodes) by instance."""
    return [(len(one.prompts), one.num_decodes) for one in c.cluster.instances.values()]


def test_the_first_instances_compute_prompts_and_the_others_decode():
    _, effects = fleet(Split(prefill=1, decode=2, adapt=False), 4)
    assert [(e.instance, e.prefill_share) for e in effects if isinstance(e, SetRole)] == [
        ("i0", 1.0),
        ("i1", 0.0),
        ("i2", 0.0),
        ("i3", 0.5),
    ], "the fourth is told too: it may have been something else before"


def test_a_prompt_goes_to_a_prefill_instance_and_its_request_on_to_one_that_decodes():
    c, _ = fleet()
    sent = ask(c, request("r"))
    assert isinstance(sent, Dispatch) and sent.instance == "i0" and sent.hands_over
    assert loads(c) == [(1, 0), (0, 0)]
    (handoff,) = c.handle(ending(), 0.05)
    assert isinstance(handoff, Handoff)
    assert (handoff.source, handoff.kv_address, handoff.instance, handoff.address) == (
        "i0",
        "unix:kv0",
        "i1",
        "unix:i1",
    )
    assert "ms of handoff" in handoff.decision.note
    assert loads(c) == [(0, 0), (0, 1)]
    assert c.handle(ending(), 0.06) == [], "it has gone already"
    c.handle(InstanceReported(report("i1", [RequestProgress("r", 500, 40)])), 0.2)
    assert c.cluster.requests["r"].output_tokens == 40
    c.handle(RequestFinished("r", "finished", 50, 0.1, 1.0), 1.0)
    assert loads(c) == [(0, 0), (0, 0)]


def test_a_handoff_that_failed_leaves_the_request_where_it_was():
    c, _ = fleet()
    ask(c, request("r"))
    c.handle(ending(), 0.05)
    c.handle(HandoffFailed("r", "i0", 1, "no room"), 0.06)
    assert loads(c) == [(0, 1), (0, 0)]
    c.handle(HandoffFailed("r", "i0", 1, "no room"), 0.07)
    assert loads(c) == [(0, 1), (0, 0)], "said twice, it counts once"
    c.handle(HandoffFailed("r", "i0", 7, "an older launch"), 0.07)
    c.handle(HandoffFailed("gone", "i0", 1, "it ended"), 0.07)


def test_a_handoff_that_failed_while_its_source_was_away_is_bound_there_again():
    c, _ = fleet()
    ask(c, request("r"))
    c.handle(ending(), 0.05)
    c.handle(InstanceLeft("i0", 1, "its link broke"), 0.06)
    c.handle(HandoffFailed("r", "i0", 1, "refused"), 0.07)
    assert loads(c) == [(0, 0)]
    c.handle(InstanceJoined(info("i0", kv_address="unix:kv0"), prefill_share=1.0, served=True), 0.2)
    assert loads(c) == [(0, 0), (0, 1)]
    c.handle(InstanceReported(report("i0", [RequestProgress("r", 500, 3)])), 0.3)
    assert loads(c) == [(0, 0), (0, 1)]


def test_a_failure_said_of_a_request_that_waits_changes_nothing():
    c, _ = fleet()
    ask(c, request("r"))
    for id in ("i0", "i1"):
        c.handle(InstanceLeft(id, 1, "killed"), 0.01)
    assert c.handle(RequestArrived(request("r"), "g", 0.02, 1, "i0"), 0.02) == []
    c.handle(InstanceJoined(info("i0", 2, kv_address="unix:kv0")), 0.03)
    c.handle(HandoffFailed("r", "i1", 1, "late"), 0.04)
    c.handle(RequestFinished("r", "finished", 5, 0.1, 0.2), 0.5)
    assert loads(c) == [(0, 0)]


def test_a_source_that_hangs_with_what_it_hands_over_is_found_out():
    c, _ = fleet()
    ask(c, request("r"))
    c.handle(InstanceReported(replace(report("i0"), num_running=0, num_waiting=1)), 0.01)
    c.handle(ending(), 0.05)
    found = []
    for tick in range(1, 60):
        c.handle(InstanceReported(report("i1")), 0.25 * tick)
        found += c.handle(Tick(), 0.25 * tick)
    assert {e.instance for e in found if isinstance(e, Suspect)} == {"i0"}
    assert {e.instance for e in found if isinstance(e, Evacuate)} == {"i0"}, "what it still has goes on elsewhere"


def test_an_idle_instance_that_gets_a_handoff_is_not_suspected_for_its_silence():
    c, _ = fleet()
    c.handle(InstanceReported(report("i1")), 0.0)
    ask(c, request("r"), 1.0)
    c.handle(ending(), 1.09)
    assert c.handle(Tick(), 1.1) == []


def test_a_first_token_in_time_is_not_late_for_the_time_on_the_way():
    c, _ = fleet()
    ask(c, request("r", ttft_s=0.5))
    c.handle(ending(left_s=0.01), 0.4)
    c.handle(InstanceReported(report("i1", [RequestProgress("r", 500, 1)])), 0.9)
    assert not c.cluster.requests["r"].missed_first
    ask(c, request("late", ttft_s=0.5), 1.0)
    c.handle(ending("late", left_s=0.01), 1.6)
    assert c.cluster.requests["late"].missed_first


def test_a_request_that_was_never_asked_about_counts_where_it_decodes():
    c, _ = fleet()
    ask(c, request("r"))
    c.handle(InstanceReported(report("i0", [RequestProgress("r", 500, 4)])), 0.2)
    assert c.cluster.instances["i0"].min_pace_s == 0.05


def test_a_controller_that_knows_a_request_only_from_its_gateway_hands_it_over():
    c, _ = fleet()
    c.handle(GatewayJoined("g", (OpenRequest(request("r"), 0.1, "i0", 1, 0),)), 0.1)
    (handoff,) = c.handle(ending(), 0.2)
    assert handoff.instance == "i1"


def test_a_pace_that_nobody_can_keep_stops_no_watch_and_turns_no_role():
    c = Controller(ControllerConfig(("m",), split=Split()))
    for i in range(4):
        join(c, info(f"i{i}", kv_address=f"unix:kv{i}"))
    for step in range(300):
        now = 0.1 * step
        slo = Slo(1.0, 0.0001 if step % 2 else 1e-323)
        ask(c, request(f"r{step}", prompt=1500, slo=slo), now)
        c.handle(RequestFinished(f"r{step}", "finished", 5, 0.1, 0.2), now)
        assert c.handle(Tick(), now) == []


@pytest.mark.parametrize("policy", ["hyperflexis", "round_robin", "least_loaded", "kv_aware", "edf"])
def test_where_nobody_else_decodes_the_request_stays(policy):
    c, _ = fleet(policy=policy)
    ask(c, request("r"))
    c.handle(InstanceLeft("i1", 1, "killed"), 0.01)
    assert c.handle(ending(), 0.05) == []
    assert loads(c) == [(0, 1)]


def test_a_full_decode_instance_gets_no_more():
    c, _ = fleet()
    c.cluster.instances["i1"].kv_tokens = 99_900.0
    ask(c, request("r"))
    assert c.handle(ending(), 0.05) == []
    assert loads(c) == [(0, 1), (0, 0)]
    assert c.cluster.instances["i0"].min_pace_s == 0.05, "its pace binds here now"


def test_a_pace_that_is_kept_elsewhere_binds_nobody_here():
    c, _ = fleet()
    ask(c, request("r"))
    assert c.cluster.instances["i0"].min_pace_s == float("inf")


def test_with_one_output_token_there_is_nothing_to_hand_over():
    c, _ = fleet()
    sent = ask(c, request("r", max_output_tokens=1))
    assert not sent.hands_over


def test_one_that_stands_still_is_told_when_it_stays():
    c, _ = fleet(Split(prefill=1, decode=0, adapt=False), 0)
    for i in range(2):
        join(c, info(f"i{i}", kv_address=f"unix:kv{i}", kv_bytes_per_token=1000, parks=True))
    ask(c, request("r", 2000, 64), 0.0)
    (handed,) = c.handle(ending(), 0.1)
    assert isinstance(handed, Handoff)
    assert c.handle(HandoffFailed("r", "i0", 1, "its target is gone"), 0.2) == [Stay("r", "i0", 1)]
    assert c.handle(ending("unknown"), 0.3) == [Stay("unknown", "i0", 1)]
    assert c.handle(ending("r", epoch=7), 0.3) == []


def test_stale_and_unknown_endings_are_ignored():
    c, _ = fleet()
    ask(c, request("r"))
    for event in (ending(epoch=2), ending(id="who"), ending(instance="i9")):
        assert c.handle(event, 0.01) == []
    assert loads(c) == [(1, 0), (0, 0)]


def test_colocated_fleets_hand_nothing_over():
    c, effects = fleet(None)
    assert effects == []
    assert not ask(c, request("r")).hands_over
    assert c.handle(ending(), 0.05) == []


def test_an_instance_that_comes_back_takes_the_role_that_is_missing():
    c, _ = fleet()
    c.handle(InstanceLeft("i0", 1, "killed"), 1.0)
    (role,) = [e for e in join(c, info("i0", 2, kv_address="unix:kv0"), 2.0) if isinstance(e, SetRole)]
    assert isinstance(role, SetRole) and role.prefill_share == 1.0


def test_a_restarted_controller_keeps_the_roles_that_instances_have():
    c = Controller(ControllerConfig(("m",), split=APART))
    effects = c.handle(InstanceJoined(info("i1", kv_address="unix:kv1"), prefill_share=0.0, served=True), 0.0)
    effects += c.handle(InstanceJoined(info("i0", kv_address="unix:kv0"), prefill_share=1.0, served=True), 0.0)
    assert [type(effect) for effect in effects] == [SetLinks, SetLinks]
    assert len(c.cluster.ready("m")) == 2, "they served before, and need not wait for their links"
    assert [one.prefill_share for one in c.cluster.instances.values()] == [0.0, 1.0]


def test_a_drained_instance_hands_over_what_decodes():
    c, _ = fleet(Split(adapt=False), 2)
    sent = ask(c, request("r"))
    assert c.handle(ending(instance=sent.instance), 0.05) == [], "both compute and decode: it stays"
    c.handle(InstanceReported(report(sent.instance, [RequestProgress("r", 500, 20)])), 0.2)
    effects = c.handle(DrainAsked(sent.instance, 30.0), 0.3)
    (handoff,) = [e for e in effects if isinstance(e, Handoff)]
    assert handoff.source == sent.instance and handoff.instance != sent.instance
    assert handoff.expected_output_tokens < sent.expected_output_tokens


def test_the_last_instance_that_decodes_is_drained_to_one_for_prompts():
    c, _ = fleet()
    ask(c, request("r"))
    c.handle(ending(), 0.05)
    c.handle(InstanceReported(report("i1", [RequestProgress("r", 500, 20)])), 0.2)
    (handoff,) = [e for e in c.handle(DrainAsked("i1", 30.0), 0.3) if isinstance(e, Handoff)]
    assert (handoff.source, handoff.instance) == ("i1", "i0")


def test_what_found_no_room_goes_on_elsewhere_when_there_is_some():
    c, _ = fleet()
    other = c.cluster.instances["i1"]
    other.kv_tokens = 99_900.0
    ask(c, request("r"))
    assert c.handle(ending(), 0.05) == [], "it decodes where its prompt was computed"
    c.handle(InstanceReported(report("i0", [RequestProgress("r", 500, 3)])), 6.0)
    assert not any(isinstance(e, Handoff) for e in c.handle(Tick(), 6.0))
    other.kv_tokens = 0.0
    (handoff,) = [e for e in c.handle(Tick(), 7.0) if isinstance(e, Handoff)]
    assert (handoff.source, handoff.instance) == ("i0", "i1")
    assert loads(c) == [(0, 0), (0, 1)]


def test_roles_follow_what_is_needed_and_one_changes_at_a_time():
    slow = replace(info("x").latency, c0=0.03)  # at 50 ms a token c0 takes three fifths of the time
    c = Controller(ControllerConfig(("m",), split=Split()))
    for i in range(4):
        join(c, info(f"i{i}", kv_address=f"unix:kv{i}", latency=slow))
    roles = []
    for step in range(400):
        now = 0.1 * step
        ask(c, request(f"r{step}", prompt=2000), now)  # 2 s of prompts a second
        c.handle(RequestFinished(f"r{step}", "finished", 5, 0.1, 0.2), now)
        roles += [e for e in c.handle(Tick(), now) if isinstance(e, SetRole)]
    assert [role.prefill_share for role in roles[:2]] == [1.0, 1.0]
    assert roles[0].instance != roles[1].instance
    assert "prompts keep" in roles[0].reason
    assert sum(one.prefill_share == 1.0 for one in c.cluster.instances.values()) == 2
    assert len(roles) == 2, "then nothing changes any more"
    assert GROW >= 3


def test_a_snapshot_goes_on_alike():
    c, _ = fleet()
    ask(c, request("r"))
    ask(c, request("q"))
    c.handle(ending(), 0.05)
    packed = msgspec.msgpack.encode(c.snapshot())
    again = Controller.restore(c.config, msgspec.msgpack.decode(packed, type=Snapshot))
    assert again.handle(ending("q"), 0.06) == c.handle(ending("q"), 0.06)
    assert loads(again) == loads(c)


FAST = Link()


def linked(c: Controller, target: str, source: str, link: Link | None = FAST, now: float = 0.0) -> list[Effect]:
    epochs = {one.id: one.info.epoch for one in c.cluster.instances.values()}
    return c.handle(InstanceLinked(target, epochs[target], source, epochs[source], link), now)


def orders(effects: Sequence[object]) -> dict[str, list[str]]:
    """Who is to be linked to which sources."""
    return {e.instance: [source.instance for source in e.sources] for e in effects if isinstance(e, SetLinks)}


def test_a_newcomer_takes_work_once_it_is_linked_both_ways():
    c, _ = fleet(instances=2)
    effects = c.handle(InstanceJoined(info("i2", kv_address="unix:kv2")), 1.0)
    assert orders(effects) == {"i2": ["i0", "i1"], "i0": ["i1", "i2"], "i1": ["i0", "i2"]}
    for target, source in (("i2", "i0"), ("i2", "i1"), ("i0", "i2")):
        linked(c, target, source, now=1.01)
        assert c.cluster.instances["i2"].state is InstanceState.LOADING
    linked(c, "i1", "i2", None, 1.02)
    assert c.cluster.instances["i2"].state is InstanceState.READY, "one link that cannot be made does not keep it out"


def test_a_newcomer_whose_links_do_not_come_about_takes_work_after_a_while():
    c, _ = fleet(instances=1)
    c.handle(InstanceJoined(info("i1", kv_address="unix:kv1")), 1.0)
    c.handle(Tick(), 1.0 + LINK_LIMIT_S / 2)
    assert [one.id for one in c.cluster.ready("m")] == ["i0"]
    c.handle(Tick(), 1.0 + LINK_LIMIT_S)
    assert [one.id for one in c.cluster.ready("m")] == ["i0", "i1"]


def test_a_request_decodes_where_there_is_a_link():
    c, _ = fleet(Split(prefill=1, decode=2, adapt=False), 3)
    linked(c, "i1", "i0", None, 0.1)  # it broke
    for number in range(4):
        ask(c, request(f"r{number}"), 0.2)
        (handoff,) = c.handle(ending(f"r{number}"), 0.25)
        assert isinstance(handoff, Handoff) and handoff.instance == "i2"


def test_a_measured_link_that_is_slow_is_not_chosen():
    c, _ = fleet(Split(prefill=1, decode=2, adapt=False), 3)
    linked(c, "i1", "i0", Link(0.001, 1e3), 0.1)
    ask(c, request("r"), 0.2)
    (handoff,) = c.handle(ending(), 0.25)
    assert isinstance(handoff, Handoff) and handoff.instance == "i2"


def test_an_instance_that_drains_gets_nothing_more_and_one_that_left_is_unlinked():
    c, _ = fleet(instances=3)
    effects = c.handle(DrainAsked("i2", None), 1.0)
    assert orders(effects) == {"i2": []}
    assert c.cluster.links.is_up("i2", "i0"), "what it has goes on elsewhere"
    assert orders(c.handle(DrainAsked("i2", None, on=False), 2.0)) == {"i2": ["i0", "i1"]}
    assert orders(c.handle(InstanceLeft("i2", 1, "killed"), 3.0)) == {"i0": ["i1"], "i1": ["i0"]}
    assert not c.cluster.links.unheard


def test_an_instance_that_is_told_to_end_before_it_was_linked_takes_no_work():
    c, _ = fleet(instances=1)
    c.handle(InstanceJoined(info("i1", kv_address="unix:kv1")), 1.0)
    c.handle(InstanceDraining("i1", 1, 30.0), 1.1)
    c.handle(Tick(), 10.0)
    assert [one.id for one in c.cluster.ready("m")] == ["i0"]


def test_a_colocated_fleet_has_no_links():
    _, effects = fleet(split=None, instances=3)
    assert effects == []
