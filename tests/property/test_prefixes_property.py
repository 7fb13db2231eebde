"""Prefixes on an instance: bounded, never more than the prompt, counted as a walk over the requests would count."""

from __future__ import annotations

from collections import Counter
from math import inf
from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperflexis.controller import Controller, ControllerConfig, Snapshot
from hyperflexis.core.cluster import TrackedInstance, TrackedRequest
from hyperflexis.core.events import InstanceJoined, InstanceReported, RequestArrived, RequestFinished
from hyperflexis.core.instance import InstanceInfo, InstanceReport, RequestProgress
from hyperflexis.core.latency import Coefficients
from hyperflexis.core.prefixes import MAX_PREFIX_KEYS, PREFIX_KEY_TOKENS
from hyperflexis.core.request import Request
from hyperflexis.core.slo import Slo

SEEDS = st.integers(0, 1 << 32)
MODEL = Coefficients(0.01, 1e-4, 1e-9, 5e-4, 1e-7)


def draw_request(random: Random, id: str) -> Request:
    """Of a few conversations that begin alike and part at some block."""
    prompt = random.choice((random.randint(1, 300), random.randint(300, 6000), random.randint(16_000, 40_000)))
    parts_at, conversation = random.choice((0, 3, 40)), random.randrange(4)
    count = min(prompt // PREFIX_KEY_TOKENS, random.choice((MAX_PREFIX_KEYS, MAX_PREFIX_KEYS, 5)))
    path = f"{parts_at}:{conversation}"
    keys = tuple(Random(f"{'' if k < parts_at else path}:{k}").getrandbits(64) for k in range(count))
    return Request(id, "m", "t", "c", Slo(random.choice((0.2, 2.0)), 0.05), 1.0, prompt, 1000, keys)


def info(id: str, kv_tokens: int) -> InstanceInfo:
    return InstanceInfo(id, 1, "m", "cpu", f"unix:{id}", "e", 65536, kv_tokens, 64, 2048, True, MODEL)


def report(id: str, *progress: RequestProgress) -> InstanceReport:
    return InstanceReport(id, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0.0, MODEL, progress)


def blocks(request: Request, num_tokens: int) -> list[int]:
    """The names of a context's whole blocks, one by one."""
    keys, names = request.prefix_keys, []
    for index in range(num_tokens // PREFIX_KEY_TOKENS):
        if index < len(keys):
            names.append(keys[index])
        elif len(keys) == MAX_PREFIX_KEYS:
            names.append(keys[-1] ^ (index - len(keys) + 1))
    return names


def check(instance: TrackedInstance, newcomer: Request) -> None:
    """What must hold at any time."""
    recent = instance.prefixes.recent
    assert len(recent) * PREFIX_KEY_TOKENS <= instance.info.kv_capacity_tokens
    found = 0
    for name in blocks(newcomer, newcomer.num_prompt_tokens):
        if name not in recent:
            break
        found += PREFIX_KEY_TOKENS
    assert instance.prefix_hit_tokens(newcomer) == min(found, newcomer.num_prompt_tokens - 1)
    bound = instance.requests.values()
    holders = Counter(name for one in bound for name in blocks(one.request, one.request.num_prompt_tokens))
    contexts = sum(one.context_tokens for one in bound)
    shared = sum(count - 1 for count in holders.values()) * PREFIX_KEY_TOKENS
    assert instance.kv_tokens == pytest.approx(contexts - shared)
    assert instance.prefixes.held == holders


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_counts_equal_a_walk_over_requests_and_never_exceed_prompt_and_cache(seed: int) -> None:
    random = Random(seed)
    instance = TrackedInstance(info("i", random.choice((200, 10_000, 100_000))), MODEL)
    for step in range(80):
        match random.choice(("bind", "bind", "unbind", "report")):
            case "bind":
                bound = TrackedRequest(draw_request(random, f"r{step}"), "g", 0.0, inf, inf, 100.0)
                instance.bind(bound)
                assert 0 <= bound.prefilled < bound.request.num_prompt_tokens
            case "unbind" if instance.requests:
                instance.unbind(random.choice(list(instance.requests.values())))
            case "report" if instance.requests:
                one = random.choice(list(instance.requests.values()))
                prompt = one.request.num_prompt_tokens
                done = random.choice((prompt, random.randint(0, prompt)))
                output = random.randint(1, 900) if done == prompt else 0
                instance.take_report(report("i", RequestProgress(one.request.id, done, output)), 0.0)
        check(instance, draw_request(random, "newcomer"))
    for bound in list(instance.requests.values()):
        instance.unbind(bound)
    assert instance.kv_tokens == pytest.approx(0.0, abs=1e-6) and instance.prefill_s == pytest.approx(0.0, abs=1e-6)
    assert not instance.prefixes.held


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.sampled_from(("hyperflexis", "kv_aware", "reject_at_door")))
def test_a_restored_controller_knows_the_same_prefixes(seed: int, policy: str) -> None:
    random = Random(seed)
    controller = Controller(ControllerConfig(("m",), policy))
    for n in range(3):
        controller.handle(InstanceJoined(info(f"i{n}", random.choice((5000, 60_000)))), 0.0)
    twins = [controller]
    for step in range(60):
        if step == 30:
            encoded = msgspec.msgpack.encode(controller.snapshot())
            twins.append(Controller.restore(controller.config, msgspec.msgpack.decode(encoded, type=Snapshot)))
        open_ids = list(controller.cluster.requests)
        event = random.choice(
            (
                RequestArrived(draw_request(random, f"r{step}"), "g", 0.0),
                RequestArrived(draw_request(random, f"r{step}"), "g", 0.0),
                RequestFinished(random.choice([*open_ids, "?"]), "finished", random.randint(1, 500), 0.1, 1.0),
                InstanceReported(report("i0", *(RequestProgress(id, 250, 0) for id in open_ids[:3]))),
            )
        )
        effects = [twin.handle(event, 0.1 * step) for twin in twins]
        assert effects == effects[:1] * len(twins)
