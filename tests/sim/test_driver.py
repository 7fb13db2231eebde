"""The driver: leaping equals stepping, runs repeat to the last bit, queues obey their closed forms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import sqrt
from random import Random
from statistics import mean, stdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.sim.support import device

from hyperflexis.controller import Controller
from hyperflexis.core.effects import Dispatch, Drain, Effect, Reject, Suspect
from hyperflexis.core.events import Event, InstanceJoined, InstanceLeft, RequestFinished
from hyperflexis.core.latency import Coefficients
from hyperflexis.core.links import Link, Split
from hyperflexis.core.profile import Profile
from hyperflexis.core.slo import Slo
from hyperflexis.policy.catalog import find_policy
from hyperflexis.sim.config import SimConfig, SimResult
from hyperflexis.sim.driver import Simulation, simulate
from hyperflexis.sim.faults import Fault
from hyperflexis.sim.instance import Instance
from hyperflexis.sim.workload import Arrival

DEVICE = Coefficients(0.005, 5e-5, 1e-9, 1e-4, 1e-8)


def profile(coefficients: Coefficients = DEVICE, **changes: int) -> Profile:
    return device(
        coefficients, **{"kv_capacity_tokens": 200_000, "max_batch_tokens": 2048, "context_length": 8192} | changes
    )


def config(policy: str = "hyperflexis", instances: int = 2, **changes: object) -> SimConfig:
    made = SimConfig(profile(), instances, policy.partition("@")[0], find_policy(policy))
    return replace(made, **changes)  # type: ignore[arg-type]


def draw_arrivals(random: Random, count: int, rate: float) -> list[Arrival]:
    arrivals, t = [], 0.0
    for _ in range(count):
        t += random.expovariate(rate)
        slo = Slo(
            random.choice((None, 0.3, 2.0)),
            random.choice((None, 0.01, 0.05)),
            random.choice((None, None, 5.0, 60.0)),
        )
        prompt, output = random.randint(1, 3000), random.choice((1, random.randint(1, 30), random.randint(1, 600)))
        hashes = tuple(range(random.randint(0, 6))) if random.random() < 0.5 else ()
        arrivals.append(Arrival(t, "c", slo, random.choice((1.0, 4.0)), prompt, output, hash_ids=hashes))
    return arrivals


class Watch:
    """Sees all events; checks what must hold after each of them."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.instances: Sequence[Instance] = ()
        self.up: set[tuple[str, int]] = set()
        self.draining: set[str] = set()
        self.ended: set[str] = set()

    def __call__(self, now: float, event: Event, effects: object) -> None:
        assert isinstance(effects, list)
        match event:
            case InstanceJoined():
                self.up.add((event.info.id, event.info.epoch))
            case InstanceLeft():
                self.up.remove((event.id, event.epoch))
                self.draining.discard(event.id)
            case RequestFinished():
                assert event.id not in self.ended, "a request ended twice"
                self.ended.add(event.id)
            case _:
                pass
        for effect in effects:
            assert isinstance(effect, Effect)
            match effect:
                case Dispatch():
                    assert (effect.instance, effect.epoch) in self.up, "placed on an instance that is not there"
                    assert effect.instance not in self.draining, "placed on an instance that drains"
                    assert effect.request_id not in self.ended
                case Drain():
                    (self.draining.add if effect.on else self.draining.discard)(effect.instance)
                case Reject():
                    assert effect.request_id not in self.ended
                    self.ended.add(effect.request_id)
        self.lines.append(f"{now!r} {event!r} {effects!r}")
        for instance in self.instances:
            check_kv(instance)


def check_kv(instance: Instance) -> None:
    """Each block that is held belongs to somebody, each token that was computed has its place, and none is computed
    that is not there."""
    batcher = instance.batcher
    sequences = batcher.sequences()
    assert batcher.kv.held == len({block for seq in sequences for block in seq.blocks}), (
        "blocks are lost, or lent twice"
    )
    for seq in sequences:
        if not seq.started:
            continue  # what the cache has of it is its own only then
        assert seq.computed <= len(seq.blocks) * batcher.config.block_size, "tokens without a place"
        assert seq.computed <= seq.num_prompt_tokens + seq.output_tokens, "tokens that nobody has sent or sampled"


def run(config: SimConfig, arrivals: list[Arrival], duration_s: float) -> tuple[SimResult, Watch]:
    watch = Watch()
    simulation = Simulation(config, arrivals, duration_s, watch)
    watch.instances = simulation.instances
    result = simulation.run()
    assert len(result.run.records) == len(arrivals)
    for record, arrival in zip(result.run.records, arrivals, strict=True):
        if record.outcome == "finished":
            assert record.received_tokens == arrival.num_output_tokens
            assert record.ttft_s is not None and record.e2e_s is not None and 0.0 < record.ttft_s <= record.e2e_s
    if not config.faults:
        assert result.counters.output_tokens == sum(record.received_tokens for record in result.run.records)
    return result, watch


SLOW_LINK = Link(0.002, 2e4)  # a byte a token: 50 microseconds each
SPLITS = (None, Split(), Split(link=SLOW_LINK), Split(1, 0), Split(1, 1, adapt=False, link=SLOW_LINK))
POLICY_NAMES = ("hyperflexis", "round_robin@256", "prefill_first", "edf@512", "priority")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32))
def test_leaping_equals_stepping(seed: int) -> None:
    random = Random(seed)
    arrivals = draw_arrivals(random, random.randint(1, 40), random.choice((1.0, 10.0, 50.0)))
    small = random.random() < 0.4
    faults = tuple(
        Fault(random.uniform(0.0, 4.0), random.randrange(2), kind, random.uniform(0.1, 2.0), 3.0)  # type: ignore[arg-type]
        for kind in random.sample(("kill", "hang", "slow", "drain"), random.choice((0, 0, 1, 2)))
    )
    setup = config(
        random.choice(POLICY_NAMES),
        profile=profile(kv_capacity_tokens=8192 if small else 200_000),
        noise=random.choice((0.0, 0.1)),
        device_factor=random.choice((1.0, 1.2)),
        report_delay_s=random.choice((0.0, 0.1)),
        faults=faults,
        seed=seed,
        split=random.choice(SPLITS),
    )
    leapt, leapt_log = run(setup, arrivals, 10.0)
    stepped, stepped_log = run(replace(setup, leap=False), arrivals, 10.0)
    assert leapt_log.lines == stepped_log.lines
    assert leapt.run == stepped.run
    assert replace_events(leapt) == replace_events(stepped)


def replace_events(result: SimResult) -> object:
    """Counters without the number of the driver's own events, which leaping is there to lower."""
    counters = result.counters
    return (counters.iterations, counters.prompt_tokens, counters.output_tokens, counters.busy_s, counters.preemptions)


def test_leaps_are_taken() -> None:
    arrivals = [Arrival(0.0, "c", Slo(), 1.0, 100, 1000)]
    leapt, _ = run(config(), arrivals, 10.0)
    assert leapt.counters.iterations == 1000
    assert leapt.counters.events < 120, "reports aside, a thousand decodes are few events"


def _waits(service: str, seed: int, load: float, count: int) -> tuple[list[float], float]:
    """Waiting times at one instance that serves one-token requests, one at a time, in order of arrival."""
    random = Random(seed)
    per_token = 1e-3
    alone = profile(Coefficients(1e-9, per_token, 0.0, 0.0, 0.0), max_batch=1, context_length=1 << 20)
    mean_tokens = 1000
    arrivals, t = [], 0.0
    for _ in range(count):
        t += random.expovariate(load / (mean_tokens * per_token))
        tokens = mean_tokens if service == "D" else max(round(random.expovariate(1.0 / mean_tokens)), 1)
        arrivals.append(Arrival(t, "c", Slo(), 1.0, tokens, 1))
    sized = replace(alone, max_batch_tokens=1 << 20, kv_capacity_tokens=1 << 21)
    setup = config("round_robin", 1, profile=sized, prefix_reuse=False)
    result, _ = run(setup, arrivals, t)
    waits = []
    for record in result.run.records:
        assert record.ttft_s is not None
        waits.append(record.ttft_s - per_token * record.num_prompt_tokens)
    return waits, mean_tokens * per_token


@pytest.mark.parametrize("service", ["M", "D"])
def test_waiting_times_of_a_single_server_are_those_of_the_closed_form(service: str) -> None:
    load, means = 0.7, []
    for seed in range(12):
        waits, service_s = _waits(service, seed, load, 3000)
        means.append(mean(waits[300:]) / service_s)
    expected = load / (1.0 - load) * (1.0 if service == "M" else 0.5)  # Pollaczek-Khinchine
    error = 2.2 * stdev(means) / sqrt(len(means))  # t of 11 degrees of freedom at 95%
    assert abs(mean(means) - expected) < error, f"M/{service}/1: {mean(means):.3f} +- {error:.3f}, not {expected:.3f}"


def test_the_streams_of_a_killed_instance_go_on_elsewhere() -> None:
    arrivals = [Arrival(0.001 * k, "c", Slo(5.0, 0.05), 1.0, 2000, 100) for k in range(20)]
    result, watch = run(config(faults=(Fault(0.5, 0, "kill", 1.0),)), arrivals, 10.0)
    calm, _ = run(config(), arrivals, 10.0)
    assert {record.outcome for record in result.run.records} == {"finished"}
    assert all(record.received_tokens == 100 for record in result.run.records)
    assert ("0", 2) in watch.up, "a new process with a newer epoch"
    moved = [k for k, record in enumerate(calm.run.records) if record.instance == "0"]
    begun = [k for k in moved if result.run.records[k].ttft_s == calm.run.records[k].ttft_s]
    assert begun, "some had their first token from the instance that died"
    assert all(result.run.records[k].instance == "1" for k in moved)
    # Prompts and what was sent are computed once more, the rest of the output is not.
    assert result.counters.output_tokens >= 20 * 100
    assert result.counters.output_tokens < 20 * 100 + 5


def test_streams_wait_for_the_only_instance_to_come_back() -> None:
    arrivals = [Arrival(0.1 * k, "c", Slo(5.0, 0.05), 1.0, 100, 200) for k in range(4)]
    result, _ = run(config(instances=1, faults=(Fault(0.5, 0, "kill", 3.0),)), arrivals, 10.0)
    assert {record.outcome for record in result.run.records} == {"finished"}
    assert all(record.e2e_s is not None and record.e2e_s > 3.0 for record in result.run.records)


def test_a_drained_instance_is_empty_at_once_and_serves_again() -> None:
    arrivals = [Arrival(0.05 * k, "c", Slo(5.0, 0.05), 1.0, 500, 100) for k in range(200)]
    result, _ = run(config(faults=(Fault(2.0, 0, "drain", 4.0),)), arrivals, 10.0)
    assert {record.outcome for record in result.run.records} == {"finished"}
    during = [record.instance for record in result.run.records if 2.0 <= record.arrived_at < 6.0]
    assert set(during) == {"1"}
    assert any(record.pause_s > 0.0 for record in result.run.records), "some moved"
    assert any(record.instance == "0" for record in result.run.records if record.arrived_at > 6.0)


@pytest.mark.parametrize("roles", ["colocated", "static", "adaptive"])
def test_ten_thousand_streams_under_random_faults_end_once_with_all_their_tokens(roles: str) -> None:
    random, arrivals, t = Random(3), [], 0.0
    for _ in range(10_000):
        t += random.expovariate(100.0)
        arrivals.append(Arrival(t, "c", Slo(2.0, 0.1), 1.0, random.randint(1, 500), random.randint(1, 60)))
    faults, at = [], 0.0
    while at < t:
        at += random.expovariate(2.0)
        kind = random.choice(("kill", "kill", "hang", "slow", "drain"))
        faults.append(Fault(at, random.randrange(6), kind, random.uniform(0.05, 2.0), 10.0))  # type: ignore[arg-type]
    split = None if roles == "colocated" else Split(2, 2, adapt=roles == "adaptive", link=SLOW_LINK)
    result, _ = run(config(instances=6, faults=tuple(faults), split=split), arrivals, t)
    assert (result.counters.handoffs > 1000) == (split is not None)
    outcomes = Counter(record.outcome for record in result.run.records)
    assert outcomes.total() == 10_000 and set(outcomes) <= {"finished", "rejected", "failed"}
    # With a split each request needs two instances, and gives up after three failures all the same.
    assert outcomes["finished"] > (9_900 if split is None else 9_700), outcomes
    for record in result.run.records:
        if record.outcome == "finished":
            assert record.received_tokens == record.num_output_tokens


def test_a_slow_instance_is_slow_and_the_fit_follows() -> None:
    arrivals = [Arrival(0.1 * k, "c", Slo(), 1.0, 100, 50) for k in range(50)]
    plain, _ = run(config(instances=1), arrivals, 10.0)
    slow, _ = run(config(instances=1, faults=(Fault(0.0, 0, "slow", 100.0, 2.0),)), arrivals, 10.0)
    ratio = slow.counters.busy_s / slow.counters.iterations / (plain.counters.busy_s / plain.counters.iterations)
    assert 1.5 < ratio < 3.0


def test_the_controller_is_the_live_one() -> None:
    """A journal of the run, replayed through a fresh Controller, gives the same effects."""
    lines: list[tuple[float, Event, list[Effect]]] = []
    setup = config()
    arrivals = draw_arrivals(Random(5), 60, 20.0)
    simulate(setup, arrivals, 10.0, lambda now, event, effects: lines.append((now, event, list(effects))))
    from hyperflexis.controller import ControllerConfig

    twin = Controller(ControllerConfig(("model",), "hyperflexis"))
    assert [twin.handle(event, now) for now, event, _ in lines] == [effects for _, _, effects in lines]


def test_a_scheduler_that_is_told_lengths_expects_each_and_one_that_is_not_learns() -> None:
    arrivals = [Arrival(0.5 * k, "c", Slo(), 1.0, *((100, 30) if k % 2 else (1000, 200))) for k in range(80)]

    def expected(known_lengths: bool) -> list[float]:
        found: list[float] = []
        simulate(
            config(known_lengths=known_lengths),
            arrivals,
            60.0,
            lambda _, __, effects: found.extend(e.expected_output_tokens for e in effects if isinstance(e, Dispatch)),
        )
        return found

    assert expected(True) == [float(arrival.num_output_tokens) for arrival in arrivals]
    learnt = expected(False)
    assert learnt[0] == learnt[1] == 128.0, "nothing is known yet"
    assert max(learnt[-9::2]) < 60.0 < 150.0 < min(learnt[-10::2])


def suspicions(setup: SimConfig, arrivals: list[Arrival], duration_s: float) -> tuple[SimResult, list[Suspect]]:
    found: list[Suspect] = []

    def observe(now: float, event: Event, effects: object) -> None:
        assert isinstance(effects, list)
        found.extend(effect for effect in effects if isinstance(effect, Suspect))

    return simulate(setup, arrivals, duration_s, observe), found


def test_a_hung_instance_is_found_out_by_its_latency_model_and_its_streams_go_on() -> None:
    arrivals = [Arrival(0.05 * k, "c", Slo(5.0, 0.05), 1.0, 500, 200) for k in range(100)]
    setup = config(faults=(Fault(2.0, 0, "hang", 30.0),))
    result, found = suspicions(setup, arrivals, 10.0)
    assert found and found[0].instance == "0" and "no iteration for" in found[0].reason
    assert {record.outcome for record in result.run.records} == {"finished"}
    paused = [record.pause_s for record in result.run.records if record.pause_s]
    assert paused and min(paused) > 1.0 and max(paused) < 5.0, "detection, and the prompts once more"
    # 200 tokens take 1.3 s when all is well; nobody waits for the 30 s.
    assert max(record.e2e_s or 0.0 for record in result.run.records) < 6.0
    assert sum(not record.is_attained for record in result.run.records) < 30


def test_an_instance_that_became_slow_is_relieved_and_tried_again() -> None:
    arrivals = [Arrival(0.1 * k, "c", Slo(5.0, 0.05), 1.0, 500, 200) for k in range(300)]
    slow = config(faults=(Fault(5.0, 0, "slow", 8.0, 10.0),))
    result, found = suspicions(slow, arrivals, 30.0)
    assert found and {one.instance for one in found} == {"0"}
    assert all("times as long as expected" in one.reason or "no iteration" in one.reason for one in found)
    attained = [record.is_attained for record in result.run.records]
    assert sum(attained) > 0.9 * len(attained)
    assert any(record.instance == "0" and record.arrived_at > 25.0 for record in result.run.records), "tried again"


@pytest.mark.parametrize("factor", [0.5, 1.5, 2.5, 5.0])
def test_a_model_that_is_wrong_from_the_start_raises_no_suspicion(factor: float) -> None:
    arrivals = [Arrival(0.05 * k, "c", Slo(5.0, 0.2), 1.0, 500, 100) for k in range(200)]
    # A fault that never comes has the driver look after the instances.
    setup = config(device_factor=factor, noise=0.2, faults=(Fault(1e6, 0, "slow", 1.0, 1.0),))
    _, found = suspicions(setup, arrivals, 10.0)
    assert not found
