"""Conversations whose every turn begins with the one before: placement that knows prefixes computes fewer tokens."""

from __future__ import annotations

from pathlib import Path
from random import Random

from tests.sim.support import device

from hyperflexis.core.latency import Coefficients
from hyperflexis.core.slo import Slo
from hyperflexis.policy_file import load_policy
from hyperflexis.sim.config import SimConfig, SimResult
from hyperflexis.sim.driver import simulate
from hyperflexis.sim.workload import Arrival

PREFIX_BLIND = Path(__file__).parents[2] / "benchmarks" / "ablations" / "prefix_blind.py"
PROFILE = device(
    Coefficients(0.005, 5e-5, 1e-9, 1e-4, 1e-8),
    kv_capacity_tokens=200_000,
    max_batch_tokens=2048,
    context_length=32768,
)


def conversations(seed: int, count: int = 12, turns: int = 8) -> list[Arrival]:
    """Each turn asks 1,024 tokens more, to 26,000: longer than prefix keys reach."""
    random, arrivals = Random(seed), []
    for number in range(count):
        t, tokens = random.uniform(0.0, 10.0), random.randint(4, 34) * 512
        for _ in range(turns):
            tokens += 1024
            hash_ids = tuple(range(1000 * number, 1000 * number + tokens // 512))
            arrivals.append(Arrival(t, "chat", Slo(1.0, 0.05), 1.0, tokens, 20, hash_ids=hash_ids))
            t += random.uniform(1.0, 4.0)
    return sorted(arrivals, key=lambda arrival: arrival.t)


def run(spec: str, arrivals: list[Arrival]) -> SimResult:
    name, policy = load_policy(spec)
    return simulate(SimConfig(PROFILE, 4, name, policy), arrivals, 40.0)


def attained(result: SimResult) -> int:
    return sum(record.is_attained for record in result.run.records)


def test_prefill_falls_and_attainment_rises_where_prompts_share_prefixes() -> None:
    arrivals = conversations(seed=1)
    ours, blind = run("hyperflexis", arrivals), run(str(PREFIX_BLIND), arrivals)
    assert ours.counters.prompt_tokens < 0.5 * blind.counters.prompt_tokens
    assert attained(ours) >= attained(blind)
    first_turns = sum(arrivals[k].num_prompt_tokens for k in _firsts(arrivals))
    turns = 1024 * (len(arrivals) - len(_firsts(arrivals)))
    assert ours.counters.prompt_tokens <= 1.15 * (first_turns + turns), "little more than what is new"


def test_without_shared_prefixes_both_place_alike() -> None:
    unique = [
        Arrival(a.t, a.slo_class, a.slo, 1.0, a.num_prompt_tokens, 20, hash_ids=(k << 20,))
        for k, a in enumerate(conversations(seed=2))
    ]
    ours, blind = run("hyperflexis", unique), run(str(PREFIX_BLIND), unique)
    assert ours.run == blind.run


def _firsts(arrivals: list[Arrival]) -> list[int]:
    seen: set[int] = set()
    found = []
    for k, arrival in enumerate(arrivals):
        if arrival.hash_ids[0] not in seen:
            seen.add(arrival.hash_ids[0])
            found.append(k)
    return found
