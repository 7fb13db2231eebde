from dataclasses import replace

import msgspec
import pytest

from hyperflexis.controller import Controller, ControllerConfig, Snapshot
from hyperflexis.core.effects import Dispatch, Evacuate, Reject, Suspect
from hyperflexis.core.events import (
    GatewayJoined,
    GatewayLeft,
    InstanceJoined,
    InstanceLeft,
    InstanceReported,
    OpenRequest,
    RequestArrived,
    RequestFinished,
    Tick,
)
from hyperflexis.core.instance import InstanceInfo, InstanceReport, RequestProgress
from hyperflexis.core.latency import Coefficients
from hyperflexis.core.request import Request
from hyperflexis.core.shares import EXCESS_VALUE
from hyperflexis.core.slo import Slo
from hyperflexis.core.stream import Sent
from hyperflexis.errors import ConfigError

MODEL = Coefficients(c0=0.010, c1=1e-4, c2=0.0, c3=5e-4, c4=0.0)


def info(id: str, epoch: int = 1, **changes) -> InstanceInfo:
    base = InstanceInfo(id, epoch, "m", "cpu", f"unix:{id}", "emulated", 8192, 100_000, 64, 8192, True, MODEL)
    return replace(base, **changes)


def request(id: str, prompt: int = 500, ttft_s: float | None = 1.0, **changes) -> Request:
    base = Request(id, "m", "t", "chat", Slo(ttft_s, 0.05), 1.0, prompt, 100)
    return replace(base, **changes)


def controller(policy: str = "hyperflexis", instances: int = 2, **changes) -> Controller:
    made = Controller(ControllerConfig(("m",), policy, **changes))
    for i in range(instances):
        made.handle(InstanceJoined(info(f"i{i}")), 0.0)
    return made


def ask(c: Controller, r: Request, now: float = 0.0, **changes):
    (effect,) = c.handle(RequestArrived(r, "g", 0.0, **changes), now)
    return effect


def report(id: str, progress=(), epoch: int = 1) -> InstanceReport:
    return InstanceReport(id, epoch, 0, 0, 0, 1, 0, 0, 0, 0, 0.0, MODEL, tuple(progress))


def test_round_robin_takes_turns_and_least_loaded_counts():
    rr = controller("round_robin")
    assert [ask(rr, request(f"r{k}")).instance for k in range(4)] == ["i0", "i1", "i0", "i1"]
    least = controller("least_loaded")
    assert [ask(least, request(f"r{k}")).instance for k in range(3)] == ["i0", "i1", "i0"]
    least.handle(RequestFinished("r0", "finished", 5, 0.1, 0.2), 1.0)
    least.handle(RequestFinished("r2", "finished", 5, 0.1, 0.2), 1.0)
    assert ask(least, request("r3")).instance == "i0"


def test_placement_prefers_the_instance_where_the_request_is_on_time():
    c = controller()
    ask(c, request("big", prompt=8000, ttft_s=60.0))
    first = ask(c, request("tight", prompt=1000, ttft_s=0.3))
    assert first.instance == "i1"
    assert first.decision.on_time
    assert first.decision.predicted_ttft_s < 0.3


def _abuse(c: Controller, rate: int, start: float) -> list[Dispatch]:
    """Twenty seconds in which one tenant asks twice a second and another ``rate`` times as often; its answers."""
    found = []
    for k in range(40):
        now = start + 0.5 * k
        ask(c, request(f"s{now}", tenant="steady"), now)
        found += [ask(c, request(f"a{now}.{n}", tenant="abuser"), now) for n in range(rate)]
        for id in (f"s{now}", *(f"a{now}.{n}" for n in range(rate))):
            c.handle(RequestFinished(id, "finished", 5, 0.1, 0.1), now)
    return found


def test_a_request_beyond_its_tenants_share_counts_for_less_and_says_so():
    c = controller()
    assert {answer.value for answer in _abuse(c, 1, 0.0)} == {1.0}
    late = _abuse(c, 20, 20.0)[-400:]
    assert {answer.value for answer in late} == {1.0, EXCESS_VALUE}
    assert {answer.decision.note for answer in late if answer.value < 1.0} == {"beyond its tenant's fair share"}
    steady = ask(c, request("steady", tenant="steady"), 40.0)
    assert steady.value == 1.0 and not steady.decision.note
    replayed = msgspec.msgpack.decode(msgspec.msgpack.encode(c.snapshot()), type=Snapshot)
    copy = Controller.restore(c.config, replayed)
    for k in range(20):
        assert ask(copy, request(f"n{k}", tenant="abuser"), 40.1) == ask(c, request(f"n{k}", tenant="abuser"), 40.1)


def test_baselines_know_no_shares():
    assert {answer.value for answer in _abuse(controller("least_loaded"), 20, 0.0)} == {1.0}


def test_an_earlier_deadline_overtakes_a_long_queue_in_the_prediction():
    c = controller(instances=1)
    for k in range(4):
        ask(c, request(f"batch{k}", prompt=8000, ttft_s=60.0))
    decision = ask(c, request("tight", prompt=500, ttft_s=0.5)).decision
    assert decision.on_time
    assert decision.predicted_ttft_s < 0.2
    assert decision.load_s == pytest.approx(3.2, rel=0.1)


def test_a_prediction_passes_over_requests_that_are_late_anyway():
    c = controller(instances=1)
    for k in range(5):
        ask(c, request(f"late{k}", prompt=8000, ttft_s=0.1))
    decision = ask(c, request("ok", prompt=500, ttft_s=1.0)).decision
    assert decision.on_time
    assert decision.predicted_ttft_s < 0.2


def test_hopeless_requests_are_demoted_or_refused_as_the_client_chose():
    c = controller(instances=1)
    dispatched = ask(c, request("r", prompt=8000, ttft_s=0.1))
    assert isinstance(dispatched, Dispatch) and not dispatched.decision.on_time
    refused = ask(c, request("f", prompt=8000, ttft_s=0.1, fail_fast=True))
    assert isinstance(refused, Reject)
    assert (refused.reason, refused.retry_after_s is not None) == ("slo_infeasible", True)
    assert "f" not in c.cluster.requests
    assert "ttft_ms" in refused.message


def test_a_pace_that_no_step_can_hold_is_refused_too_when_the_client_fails_fast():
    c = controller(instances=1)
    slow = ask(c, request("r", slo=Slo(1.0, 0.001)))
    assert isinstance(slow, Dispatch) and not slow.decision.on_time
    refused = ask(c, request("f", slo=Slo(1.0, 0.001), fail_fast=True))
    assert isinstance(refused, Reject) and "promised every 1 ms" in refused.message


def test_admission_at_the_door_refuses_whether_the_client_chose_so_or_not():
    c = controller("reject_at_door", instances=1)
    assert isinstance(ask(c, request("ok", prompt=5000)), Dispatch)
    refused = ask(c, request("late", prompt=8000))
    assert isinstance(refused, Reject) and refused.reason == "slo_infeasible"
    assert "promised within 1e+03 ms" in refused.message
    assert isinstance(ask(c, request("tight", prompt=100, ttft_s=0.6)), Dispatch), "it overtakes"
    strict = controller("reject_at_door@8192,1.5", instances=1)
    refused = ask(strict, request("r", prompt=7500))
    assert isinstance(refused, Reject) and refused.message.startswith("too close to late: the first token is expected")


def test_observing_admission_refuses_nothing_but_notes_it():
    c = controller("reject_at_door", observe=True)
    sent = ask(c, request("late", prompt=8000, ttft_s=0.1))
    assert isinstance(sent, Dispatch) and sent.decision.policy == "round_robin"
    assert c.shadow is not None and (c.shadow.policy, c.shadow.note) == ("reject_at_door", "would be refused")


def test_a_policy_that_there_is_not_is_refused_at_the_start():
    with pytest.raises(ConfigError, match="did you mean least_loaded"):
        controller("least_load")


def test_refusals_say_why():
    c = controller(max_backlog_s=1.0)
    assert ask(c, request("u", model="nope")).reason == "unknown_model"
    for k in range(8):
        ask(c, request(f"r{k}", prompt=8000))
    overloaded = ask(c, request("o", prompt=8000))
    assert overloaded.reason == "overloaded" and overloaded.retry_after_s >= 1.0
    assert "o" not in c.cluster.requests
    assert ask(controller(instances=0), request("n")).reason == "no_instance_ready"


def test_progress_frees_load_and_output_lengths_are_learnt():
    c = controller(instances=1)
    ask(c, request("r", prompt=5000))
    before = ask(c, request("p1", prompt=10)).decision.load_s
    c.handle(InstanceReported(report("i0", [RequestProgress("r", 5000, 3)])), 0.2)
    after = ask(c, request("p2", prompt=10)).decision.load_s
    assert after < before - 0.4
    c.handle(RequestFinished("r", "finished", 40, 0.5, 1.0), 1.0)
    assert ask(c, request("p3")).expected_output_tokens == 40.0
    assert ask(c, request("p4", max_output_tokens=7)).expected_output_tokens == 7.0


def test_answers_to_short_and_to_long_prompts_are_told_apart_also_by_a_restored_controller():
    c = controller()
    for k in range(60):
        ask(c, request(f"short{k}", prompt=300, max_output_tokens=1000))
        ask(c, request(f"long{k}", prompt=1000, max_output_tokens=1000))
        c.handle(RequestFinished(f"short{k}", "finished", 50, 0.1, 1.0), 1.0)
        c.handle(RequestFinished(f"long{k}", "finished", 400, 0.1, 1.0), 1.0)
    ask(c, request("gone", prompt=300))
    c.handle(RequestFinished("gone", "cancelled", 9000, 0.1, 1.0), 1.0)
    copy = msgspec.msgpack.decode(msgspec.msgpack.encode(c.snapshot()), type=Snapshot)
    for one in (c, Controller.restore(c.config, copy)):
        assert ask(one, request("s", prompt=310, max_output_tokens=1000)).expected_output_tokens < 100.0
        assert ask(one, request("l", prompt=990, max_output_tokens=1000)).expected_output_tokens > 350.0


def test_a_request_asked_again_avoids_the_instance_that_failed_it_and_is_counted_once():
    c = controller()
    where = ask(c, request("r")).instance
    again = ask(c, request("r"), attempt=1, avoid=where)
    assert again.instance != where
    assert sum(i.num_requests for i in c.cluster.instances.values()) == 1
    assert c.cluster.instances[where].prefill_s == 0.0


def test_stale_epochs_change_nothing():
    c = controller(instances=1)
    c.handle(InstanceJoined(info("i0", epoch=2)), 1.0)
    c.handle(InstanceLeft("i0", 1, "late news"), 1.1)
    c.handle(InstanceReported(report("i0", epoch=1)), 1.1)
    c.handle(InstanceJoined(info("i0", epoch=1)), 1.1)
    assert c.cluster.instances["i0"].info.epoch == 2
    assert ask(c, request("r")).epoch == 2


def test_accepted_requests_wait_for_an_instance():
    c = controller(instances=1)
    again = RequestArrived(request("r"), "g", 1.0, 1, "i0")
    ask(c, request("r"))
    c.handle(InstanceLeft("i0", 1, "killed"), 1.0)
    assert c.handle(again, 1.0) == []
    assert ask(c, request("new")).reason == "no_instance_ready"
    (effect,) = c.handle(InstanceJoined(info("i0", epoch=2)), 2.0)
    assert isinstance(effect, Dispatch) and (effect.request_id, effect.epoch) == ("r", 2)
    assert not c.cluster.waiting


def test_a_request_waits_for_a_sign_of_life_of_the_only_instance_that_failed_it():
    c = controller(instances=1, max_backlog_s=0.0)
    assert c.handle(RequestArrived(request("r", prompt=9000), "g", 1.0, 1, "i0"), 1.0) == []
    assert c.handle(RequestArrived(request("gone"), "g", 1.0, 1, "i0"), 1.0) == []
    c.handle(RequestFinished("gone", "cancelled", 0, None, 1.0), 1.1)
    (effect,) = c.handle(InstanceReported(report("i0")), 1.2)
    assert isinstance(effect, Dispatch) and effect.request_id == "r"
    assert c.handle(InstanceReported(report("i0")), 1.3) == []


def test_a_continuation_keeps_its_deadlines_and_counts_what_was_sent():
    c = controller(instances=2)
    for k in range(20):
        c.handle(RequestFinished(ask(c, request(f"r{k}")).request_id, "finished", 80, 0.1, 1.0), 0.0)
    longer = request("s", prompt=530, max_output_tokens=70)
    sent = ask(c, longer, now=10.0, attempt=1, avoid="i0", sent=Sent(30, 0.25))
    assert sent.instance == "i1"
    assert sent.expected_output_tokens == pytest.approx(50.0, abs=1.0)
    assert sent.decision.note == "goes on after 30 tokens"
    tracked = c.cluster.requests["s"]
    assert tracked.first_due == pytest.approx(10.0 + 0.25 + 30 * 0.05)
    c.handle(InstanceReported(report("i1", [RequestProgress("s", 530, 5)])), 10.1)
    c.handle(RequestFinished("s", "finished", 80, 0.25, 4.0), 14.0)
    assert ask(c, request("t")).expected_output_tokens == pytest.approx(80.0, abs=1.0)


def test_gateways_bring_their_open_requests_and_take_them_away():
    c = controller()
    opened = OpenRequest(request("r", prompt=3000), 0.5, "i1", 1, 0)
    c.handle(GatewayJoined("g", (opened, replace(opened, request=request("q"), instance="i9"))), 1.0)
    assert c.cluster.instances["i1"].num_requests == 1
    assert c.cluster.requests["r"].arrived_at == 0.5
    c.handle(InstanceJoined(info("i9")), 1.1)
    assert c.cluster.instances["i9"].num_requests == 1
    c.handle(GatewayLeft("g"), 2.0)
    assert not c.cluster.requests
    assert c.cluster.instances["i1"].num_requests == 0


def test_observe_dispatches_round_robin_and_notes_the_other_decision():
    c = controller(observe=True)
    ask(c, request("big", prompt=8000, ttft_s=60.0))
    ask(c, request("b", prompt=10))
    second = ask(c, request("tight", prompt=1000, ttft_s=0.3))
    assert second.instance == "i0" and second.decision.policy == "round_robin"
    assert c.shadow is not None and c.shadow.policy == "hyperflexis" and "i1" in c.shadow.note


def test_a_restored_controller_decides_the_same():
    c = controller()
    for k in range(6):
        ask(c, request(f"r{k}", prompt=300 * (k + 1)), now=0.1 * k)
    c.handle(RequestFinished("r1", "finished", 33, 0.1, 0.4), 0.7)
    c.handle(InstanceLeft("i1", 1, "killed"), 0.8)
    c.handle(InstanceJoined(info("i1", 2)), 0.9)
    copy = msgspec.msgpack.decode(msgspec.msgpack.encode(c.snapshot()), type=Snapshot)
    twin = Controller.restore(c.config, copy)
    for k in range(6, 20):
        event = RequestArrived(request(f"r{k}", prompt=100 + 37 * k), "g", 0.01 * k)
        assert twin.handle(event, 1.0 + k) == c.handle(event, 1.0 + k)


def moved(id: str, iterations: int, busy_s: float, output: int, epoch: int = 1) -> InstanceReported:
    """A report of decodes: so many iterations in so much time."""
    made = InstanceReport(id, epoch, 1, 0, 0, iterations, 0, output, 0, 0, busy_s, MODEL)
    return InstanceReported(made)


def test_a_tick_without_effects_changes_nothing():
    c = controller()
    ask(c, request("r"))
    before = msgspec.msgpack.encode(c.snapshot())
    assert c.handle(Tick(), 0.5) == []
    assert msgspec.msgpack.encode(c.snapshot()) == before


def test_a_hung_instance_is_evacuated_gets_nothing_and_is_tried_again():
    c = controller()
    hung = ask(c, request("r", prompt=8000)).instance
    (other,) = {"i0", "i1"} - {hung}
    # One second and five times the prompt (0.81 s): longer is no iteration.
    assert c.handle(Tick(), 5.0) == []
    suspect, evacuate = c.handle(Tick(), 6.0)
    assert isinstance(suspect, Suspect) and suspect.instance == hung and "no iteration for 6.0 s" in suspect.reason
    assert evacuate == Evacuate(hung, 1, "it hangs", True)
    again = ask(c, request("r", prompt=8000), now=6.1, attempt=1, avoid=hung)
    assert again.instance == other
    assert [ask(c, request(f"n{k}"), now=6.2).instance for k in range(6)] == [other] * 6
    assert c.handle(Tick(), 6.25) == []
    c.handle(InstanceReported(report(hung)), 6.5)
    assert ask(c, request("early"), now=6.6).instance == other
    c.handle(InstanceReported(report(hung)), 6.0 + suspect.hold_s)
    assert ask(c, request("later"), now=9.0).instance == hung


def test_the_last_instance_is_suspected_and_still_serves():
    c = controller(instances=1)
    ask(c, request("r"))
    (suspect,) = c.handle(Tick(), 10.0)
    assert isinstance(suspect, Suspect)
    assert ask(c, request("s"), now=10.1).instance == "i0"
    assert c.handle(InstanceJoined(info("i1")), 10.2) == []
    (evacuate,) = c.handle(Tick(), 10.25)
    assert isinstance(evacuate, Evacuate) and evacuate.instance == "i0"


def test_an_instance_that_falls_behind_its_model_is_relieved():
    c = controller()
    slow = ask(c, request("r", prompt=10)).instance
    step_s = MODEL.decode_s(1, 60)
    c.handle(InstanceReported(report(slow, [RequestProgress("r", 10, 1)])), 0.1)
    n, busy_s, now = 1, 0.0, 0.1
    while now < 3.0:
        n, busy_s, now = n + 10, busy_s + 10 * step_s, now + 0.1
        c.handle(moved(slow, n, busy_s, n), now)
    assert c.handle(Tick(), now) == []
    while now < 4.5:
        n, busy_s, now = n + 2, busy_s + 20 * step_s, now + 0.2
        c.handle(moved(slow, n, busy_s, n), now)
    suspect, evacuate = c.handle(Tick(), now)
    assert "times as long as expected" in suspect.reason
    assert evacuate == Evacuate(slow, 1, "it is slow", False)


def test_an_idle_instance_is_never_suspected():
    c = controller()
    assert c.handle(Tick(), 1000.0) == []
    ask(c, request("r"), now=1000.0)
    assert c.handle(Tick(), 1000.5) == []
