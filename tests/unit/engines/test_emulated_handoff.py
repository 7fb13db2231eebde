"""What emulated KV is, and how long it takes."""

from __future__ import annotations

import time
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest
from tests.contract.support import Stream, driven, emulated, fast_profile

from hyperflexis.core.latency import Coefficients
from hyperflexis.core.links import KvSource
from hyperflexis.core.transfer import Piece
from hyperflexis.engines.emulated_kv import NUM_LAYERS, EmulatedKv, KvHistory
from hyperflexis.errors import ProtocolError
from hyperflexis.wire import Sampling

TOKENS = list(range(100, 140))


def kv(latency_s: float = 0.0, bytes_per_s: float = inf, bytes_per_token: int = 1) -> EmulatedKv:
    return EmulatedKv("m", bytes_per_token, 64, latency_s, bytes_per_s)


def moved(source: EmulatedKv, target: EmulatedKv, given: list[Piece], taken: list[Piece], tokens: list[int]) -> None:
    """KV of TOKENS goes over; the target is to have that of ``tokens``, from token 8 on."""
    history = KvHistory()
    give, take = source.give(TOKENS, KvHistory()), target.take(history, 8)
    for a, b in zip(given, taken, strict=True):
        memory = memoryview(bytearray(4 * a.count))
        give(a, memory)
        take(b, memory)
    target.check(tokens, history)


WHOLE = [Piece(layer, 8, 31) for layer in range(NUM_LAYERS)]


def test_kv_of_the_right_tokens_places_and_layers_is_taken() -> None:
    moved(kv(), kv(), WHOLE, WHOLE, TOKENS)
    halves = [Piece(layer, start, count) for layer in range(NUM_LAYERS) for start, count in ((8, 15), (23, 16))]
    moved(kv(), kv(), halves, halves, TOKENS)


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        ([Piece(layer, 7, 31) for layer in range(NUM_LAYERS)], TOKENS),
        ([Piece(layer + (layer < 1), 8, 31) for layer in range(NUM_LAYERS)], TOKENS),
        (WHOLE, [*TOKENS[:20], 7, *TOKENS[21:]]),
        (WHOLE, TOKENS[:-1]),
    ],
    ids=["place", "layer", "token", "length"],
)
def test_kv_of_another_token_place_or_layer_is_noticed(given: list[Piece], tokens: list[int]) -> None:
    with pytest.raises(ProtocolError, match="KV of other tokens"):
        moved(kv(), kv(), given, WHOLE, tokens)


def test_pieces_take_their_time_one_after_the_other() -> None:
    source = kv(latency_s=0.02, bytes_per_s=1e5, bytes_per_token=NUM_LAYERS * 100)
    began = time.monotonic()
    give = source.give(TOKENS, KvHistory())
    for layer in range(3):
        give(Piece(layer, 0, 10), memoryview(bytearray(40)))
    assert time.monotonic() - began >= 0.02 + 3 * 0.01


def test_what_can_leave_while_it_is_computed_does() -> None:
    """An iteration of 0.4 s, and 0.04 s for each layer: only the last one's come after it."""
    source = kv(bytes_per_s=1e4 / 0.4, bytes_per_token=NUM_LAYERS * 100)
    history = KvHistory()
    give = source.give(TOKENS, history)
    began = time.monotonic()
    history.computed.append((10, began, began + 0.4))
    for layer in range(NUM_LAYERS):
        give(Piece(layer, 0, 10), memoryview(bytearray(40)))
    assert 0.44 <= time.monotonic() - began < 0.4 + 0.04 * NUM_LAYERS


def profile(bytes_per_token: int) -> Any:
    """400 tokens of prompt take 0.2 s, a decode 0.02 s."""
    slow = replace(fast_profile(), kv_bytes_per_token=bytes_per_token)
    return replace(slow, coefficients=Coefficients(0.02, 4.5e-4, 0.0, 0.0, 0.0, 0.0))


async def test_a_handoff_takes_what_its_bytes_take(tmp_path: Path) -> None:
    """0.4 s of KV, of which 0.2 s hide behind the prompt. The source decodes meanwhile."""
    fields = {"profile": profile(4000), "max_batch_tokens": 400, "kv_link_bytes_per_s": 4e6}
    prompt, sampling = [40 + i % 50 for i in range(400)], Sampling(temperature=0.0, max_tokens=60, ignore_eos=True)
    async with (
        driven(emulated("hyperflexis", kv_listen=f"unix:{tmp_path}/kv", **fields), "source") as source,
        driven(emulated("hyperflexis", **fields), "target") as target,
    ):
        assert source.info is not None
        where = KvSource(source.info.kv_address, "source", 1)
        came: list[Stream] = []

        def ask(request_id: str, left_s: float) -> None:
            key = target.send(prompt, sampling=sampling, request_id=request_id, kv=where)
            came.append(target.streams[key])

        source.ending = ask
        there = source.streams[source.send(prompt, sampling=sampling, request_id="r", hands_over=True)]
        await there.started()
        began = time.monotonic()
        await came[0].started()
        assert time.monotonic() - began >= 0.19
        assert len(there.tokens) > 5
        assert (await there.ended()).finish == "handed"
        assert (await came[0].ended()).finish == "length"
        assert came[0].tokens[: len(there.tokens)] == there.tokens
