"""What a server is asked before it serves: a few requests that warm it up and tell how fast it is, and a fixed one, by
the answer to which it is known again after it slept."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from ...core.cold_fit import ColdFit

WARM_UP_TOKENS, WARM_UP_OUTPUT, WARM_UP_BATCH = 512, 16, 16
"""Of the requests with which a server is warmed up. Some of the ids in them are in any vocabulary."""
WARM_UP_ROUNDS = 2
"""What is quickest in any of them counts: the rest of the fleet starts at the same time."""
CHECK = {"prompt": [1 + 7 * place % 97 for place in range(16)], "temperature": 0, "logprobs": 5}
"""What a standby is asked before it sleeps and after it woke."""
CHECK_TOLERANCE = 0.05
"""In log-probabilities. The same kernels compute both, so they hardly differ; other weights are far off."""

Ask = Callable[[dict[str, Any]], Awaitable[bytes]]
"""The answer to a request for one token with these fields besides; an empty one where the server fails."""


class _Top(msgspec.Struct):
    top_logprobs: list[dict[str, float]]


class _Choice(msgspec.Struct):
    logprobs: _Top


class _Checked(msgspec.Struct):
    choices: list[_Choice] = []


async def warm_up(ask: Ask, fit: ColdFit, max_prompt_tokens: int, max_batch: int) -> None:
    """The first prompt of a server is slow, which must not look as if it hung. What the next ones take, one alone and
    some at once, tells the fits here and inside where to begin."""
    num_tokens, batch = min(WARM_UP_TOKENS, max_prompt_tokens), min(WARM_UP_BATCH, max_batch)
    first = itertools.count()

    async def seconds(requests: int, prompt: int, output: int) -> float:
        began = time.monotonic()
        await asyncio.gather(
            *(
                ask(
                    {
                        "prompt": [1 + (number + place * (number + 1)) % 97 for place in range(prompt)],
                        "max_tokens": output,
                        "ignore_eos": True,
                    }
                )
                for number in (next(first) for _ in range(requests))
            )
        )
        return time.monotonic() - began

    few = num_tokens // batch
    shapes = (
        (1, num_tokens, 1),
        (1, num_tokens, 1 + WARM_UP_OUTPUT),
        (batch, few, 1),
        (batch, few, 1 + WARM_UP_OUTPUT),
    )
    await seconds(1, num_tokens, 1)
    rounds = [[await seconds(*shape) for shape in shapes] for _ in range(WARM_UP_ROUNDS)]
    prefill_s, alone_s, begun_s, together_s = (min(found) for found in zip(*rounds, strict=True))
    for _ in range(WARM_UP_ROUNDS):
        fit.observe(num_tokens, 0.5 * num_tokens**2, 0, 0, prefill_s)
        fit.observe(0, 0.0, 1, num_tokens, (alone_s - prefill_s) / WARM_UP_OUTPUT)
        fit.observe(0, 0.0, batch, batch * few, (together_s - begun_s) / WARM_UP_OUTPUT)


async def fingerprint(ask: Ask) -> dict[str, float]:
    """The log-probabilities after a fixed prompt, by token; empty where the server tells none, or fails."""
    try:
        choices = msgspec.json.decode(await ask(CHECK), type=_Checked).choices
    except msgspec.DecodeError:
        return {}
    return choices[0].logprobs.top_logprobs[0] if choices and choices[0].logprobs.top_logprobs else {}


def agree(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether two fingerprints are of the same weights."""
    return one.keys() == other.keys() and all(abs(one[token] - other[token]) <= CHECK_TOLERANCE for token in one)
