"""What a server answers with our scheduler inside is what it answers without, token for token (greedy, float32): with
prompts in other chunks, other batches, preemptions and prefix hits."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import aiohttp
from tests.vllm.servers import FLAVOURS, Servers

from hyperflexis.engines.vllm.terms import Promise

REQUESTS = 24


async def _answer(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> list[int]:
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
        found = await answer.json()
    tokens: list[int] = found["choices"][0]["token_ids"]
    assert found["choices"][0]["finish_reason"] == "length"
    return tokens


async def _counted(session: aiohttp.ClientSession, url: str) -> tuple[float, float]:
    """Preemptions, and tokens found in the prefix cache."""
    return await _counter(session, url, "num_preemptions"), await _counter(session, url, "prefix_cache_hits")


async def _counter(session: aiohttp.ClientSession, url: str, name: str) -> float:
    async with session.get(f"{url}/metrics") as answer:
        text = await answer.text()
    values = [float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(f"vllm:{name}_total{{")]
    assert values, f"{name} is not among the metrics"
    return sum(values)


async def test_the_scheduler_changes_no_token(servers: Servers) -> None:
    rng = random.Random(11)
    bodies: list[dict[str, Any]] = []
    shared = [rng.randrange(20, 900) for _ in range(100)]
    for number in range(REQUESTS):
        prompt = shared * (number % 2) + [rng.randrange(20, 900) for _ in range(rng.randrange(40, 140))]
        # Expecting one token, the policy lets in more than the cache holds in the end.
        promise = Promise(rng.choice([0.05, 2.0, 60.0]), rng.choice([0.02, 0.5]), None, rng.choice([1.0, 4.0]), 1.0)
        bodies.append(
            {
                "model": "m",
                "prompt": prompt,
                "max_tokens": rng.randrange(120, 250),
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
                "vllm_xargs": promise.to_xargs(),
                "priority": number,
            }
        )
    answers: dict[str, list[list[list[int]]]] = {}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
        for flavour in FLAVOURS:
            url = servers.url(flavour)
            before = await _counted(session, url)
            rounds = []
            for _ in range(2):
                rounds.append(list(await asyncio.gather(*(_answer(session, url, body) for body in bodies))))
            after = await _counted(session, url)
            assert after[0] > before[0], f"{flavour}: no preemption, so this proves less than it says"
            assert after[1] > before[1], f"{flavour}: no prefix hit, so this proves less than it says"
            answers[flavour] = rounds
    stock, ours = (answers[flavour] for flavour in FLAVOURS)
    assert stock[0] == stock[1] == ours[0] == ours[1]
    assert all(len(set(tokens)) > 5 for tokens in ours[0]), "one token repeated would prove nothing"
