"""Answers that must look a certain way go on at another instance as they would have gone on where they were."""

from __future__ import annotations

import json

import pytest
from tests.contract.support import Driver, driven
from tests.vllm.servers import Servers

from hyperflexis.engines.vllm.engine import VllmConfig, VllmEngine
from hyperflexis.policy.catalog import STEPS
from hyperflexis.wire import Sampling

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}, "tags": {"type": "array"}},
    "required": ["name", "age", "tags"],
}
STRUCTURED = {
    "json": {"json": SCHEMA},
    "regex": {"regex": "[a-c]{8}-[0-9]{12}-(yes|no)"},
    "choice": {"choice": ["the first of two long answers", "the second of them, which is longer"]},
}
PROMPT = [65, 70, 75, 80] * 9
TOKENS = 48


def sampling(kind: str, seed: int | None, sent: int) -> Sampling:
    temperature = 0.0 if seed is None else 1.0
    text = json.dumps(STRUCTURED[kind])
    return Sampling(temperature=temperature, seed=seed, max_tokens=TOKENS - sent, structured=text)


def engine(url: str) -> VllmEngine:
    return VllmEngine(VllmConfig("m", url, step=STEPS["hyperflexis"].plan))


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("kind", list(STRUCTURED))
async def test_a_structured_answer_goes_on_within_its_grammar(servers: Servers, kind: str, seed: int | None) -> None:
    async with driven(engine(servers.url("scheduler"))) as driver:
        whole = await driver.run(PROMPT, sampling=sampling(kind, seed, 0))
        assert whole.end is not None and whole.end.finish in ("stop", "length") and len(whole.tokens) > 4
        for sent in range(1, len(whole.tokens), 3):
            rest = await driver.run(PROMPT + whole.tokens[:sent], sampling=sampling(kind, seed, sent), sent_tokens=sent)
            assert rest.end is not None and rest.end.finish == whole.end.finish
            assert whole.tokens[:sent] + rest.tokens == whole.tokens, f"after {sent} of {len(whole.tokens)} tokens"


async def test_without_the_scheduler_one_is_given_and_none_goes_on_wrongly(servers: Servers) -> None:
    async with driven(engine(servers.url("stock"))) as driver:
        whole = await driver.run(PROMPT, sampling=sampling("regex", None, 0))
        assert whole.end is not None and whole.end.finish in ("stop", "length")
        await refused(driver, whole.tokens[:5])


async def refused(driver: Driver, sent: list[int]) -> None:
    rest = await driver.run(PROMPT + sent, sampling=sampling("regex", None, len(sent)), sent_tokens=len(sent))
    assert rest.end is not None and rest.end.finish == "invalid" and "cannot go on" in rest.end.message
    assert not rest.tokens
