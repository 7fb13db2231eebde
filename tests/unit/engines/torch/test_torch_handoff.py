"""Handoffs between two torch engines, as far as their tensors are concerned."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contract.support import Driver, driven
from tests.unit.engines.torch.ring_case import OneProcess

from hyperflexis.core.links import KvSource
from hyperflexis.engines.torch import handoff
from hyperflexis.engines.torch.engine import TorchConfig, TorchEngine
from hyperflexis.engines.torch.loader import load
from hyperflexis.engines.torch.runner import Runner, Work
from hyperflexis.policy.catalog import STEPS
from hyperflexis.wire import Sampling

PROMPT = [40 + (7 * i) % 900 for i in range(150)]


def engine(directory: Path, **options: Any) -> TorchEngine:
    sizes: dict[str, Any] = {"kv_tokens": 1024, "max_batch": 8, "max_batch_tokens": 64}
    return TorchEngine(TorchConfig("m", directory, STEPS["hyperflexis"], **(sizes | options)))


def kv_of(one: TorchEngine, blocks: list[int], tokens: int) -> list[torch.Tensor]:
    """[2 * kv heads, tokens, head_dim] of each layer."""
    cache = one._runner.model.cache
    return [layer[:, blocks].flatten(1, 2)[:, :tokens] for layer in cache.layers]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("way", ["host memory", "device memory", "tcp"])
async def test_kv_arrives_bit_by_bit_whatever_the_block_size(
    small_model: Path, tmp_path: Path, dtype: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    listen = "127.0.0.1:0" if way == "tcp" else f"unix:{tmp_path}/kv"
    device = OneProcess(torch.device("cpu"))
    if way == "device memory":
        monkeypatch.setattr(handoff, "HOST_RINGS", (device,))
    one = engine(small_model, dtype=dtype, kv_listen=listen, block_size=16)
    other = engine(small_model, dtype=dtype, block_size=7)
    async with driven(one, "one") as source, driven(other, "other") as target:
        assert source.info is not None
        where = KvSource(source.info.kv_address, "one", 1)
        sampling = Sampling(temperature=0.0, max_tokens=200, ignore_eos=True)
        tables: dict[str, list[int]] = {}

        def moves(request_id: str, left_s: float) -> None:
            seq = one._batcher.get(request_id)
            assert seq is not None
            tables["source"] = seq.blocks
            key = target.send(PROMPT, sampling=sampling, request_id=request_id, kv=where)
            seq = other._batcher.get(request_id)
            assert seq is not None
            tables["target"] = seq.blocks
            hands.append(target.streams[key])

        hands: list[Any] = []
        source.ending = moves
        key = source.send(PROMPT, sampling=sampling, request_id="r", hands_over=True)
        assert (await source.streams[key].ended()).finish == "handed"
        # Freed blocks keep their content, and nothing else runs there.
        sent, came = kv_of(one, tables["source"], 150), kv_of(other, tables["target"], 150)
        for a, b in zip(sent, came, strict=True):
            assert a.abs().sum() > 0
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        assert (await hands[0].ended()).finish == "length"
    assert any(bool(ring.any()) for ring in device.made) == (way == "device memory")


def test_layers_are_told_when_their_kv_is_in_the_cache(small_model: Path) -> None:
    model = load(small_model, torch.device("cpu"), None, 256, 16, 256).model
    from hyperflexis.engines.torch.attention import Span

    inputs = model.prepare([Span(0, 20, [3, 5])], list(range(20)), [19])
    told = []

    def wrote(layer: int) -> None:
        told.append((layer, [bool(one[:, [3, 5]].abs().sum()) for one in model.cache.layers]))

    model.forward(inputs, wrote)
    layers = model.config.num_layers
    assert told == [(layer, [True] * (layer + 1) + [False] * (layers - layer - 1)) for layer in range(layers)]


class Held(Runner):
    """Stands still after some layers of a prompt, each until its event is set."""

    def __init__(self, runner: Runner, layers: Sequence[int] = ()) -> None:
        super().__init__(runner.model)
        self.works: list[Work] = []
        self.go_on = {layer: threading.Event() for layer in layers}

    def run(self, work: Work) -> Any:
        self.works.append(work)
        wrote = work.wrote
        if wrote is None:
            return super().run(work)

        def held(layer: int) -> None:
            wrote(layer)
            if layer in self.go_on:
                assert self.go_on[layer].wait(20.0)

        return super().run(replace(work, wrote=held))


async def test_layers_leave_while_the_next_are_computed_even_if_asked_for_in_between(small_model: Path) -> None:
    """The whole prompt is one chunk. Its target asks in its middle, as it does when the first token is near."""
    one = engine(small_model, kv_listen="127.0.0.1:0", max_batch_tokens=256)
    other = engine(small_model)
    async with driven(one, "one") as source, driven(other, "other") as target:
        assert source.info is not None
        one._runner = runner = Held(one._runner, (1, 2))
        sampling = Sampling(temperature=0.0, max_tokens=100, ignore_eos=True)
        key = source.send(PROMPT, sampling=sampling, request_id="r")
        where = KvSource(source.info.kv_address, "one", 1)
        here = target.streams[target.send(PROMPT, sampling=sampling, request_id="r", kv=where)]
        await opened(source)
        runner.go_on[1].set()
        received = other._handoffs._imports["r"][0]._machine._received
        async with asyncio.timeout(20.0):
            while received.tokens != [150, 150, 150, 0]:
                await asyncio.sleep(0)
        assert not source.streams[key].tokens
        runner.go_on[2].set()
        assert (await here.ended()).finish == "length"
        assert (await source.streams[key].ended()).finish == "handed"


async def test_an_engine_that_gives_no_kv_has_nobody_to_tell(small_model: Path) -> None:
    one = engine(small_model)
    async with driven(one) as driver:
        one._runner = runner = Held(one._runner)
        await driver.run(PROMPT, 5)
    assert len(runner.works) >= 5 and all(work.wrote is None for work in runner.works)


async def test_a_block_that_is_still_being_written_is_not_written_by_what_comes(small_model: Path) -> None:
    """A request is cancelled while its iteration runs; its blocks go to one whose KV comes. It must be whole."""
    one, other = engine(small_model, kv_listen="127.0.0.1:0"), engine(small_model)
    async with driven(one, "one") as source, driven(other, "other") as target:
        assert source.info is not None
        where = KvSource(source.info.kv_address, "one", 1)
        sampling = Sampling(temperature=0.0, max_tokens=300, ignore_eos=True)
        whole = await source.run(PROMPT, sampling=sampling)
        held, goes_on = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()

        class Slow(Runner):
            def run(self, work: Any) -> Any:
                if len(work.token_ids) > 1 and not held.is_set():
                    loop.call_soon_threadsafe(held.set)
                    asyncio.run_coroutine_threadsafe(goes_on.wait(), loop).result(20.0)
                return super().run(work)

        other._runner = Slow(other._runner.model)
        victim = target.send([900 - i for i in range(64)], 4)
        await held.wait()
        key = source.send(PROMPT, sampling=sampling, request_id="r")
        await source.streams[key].started()
        freed = next(iter(other._batcher.sequences())).blocks
        target.engine.cancel(victim)
        here = target.streams[target.send(PROMPT, sampling=sampling, request_id="r", kv=where)]
        arriving = other._batcher.get("r")
        assert arriving is not None and set(freed) <= set(arriving.blocks)
        await opened(source)
        goes_on.set()
        assert (await here.ended()).finish == "length"
        assert (await source.streams[key].ended()).finish == "handed"
        assert here.tokens == whole.tokens


async def opened(source: Driver) -> None:
    async with asyncio.timeout(20.0):
        while "r" not in source.engine._handoffs._exports:  # type: ignore[attr-defined]
            await asyncio.sleep(0)
