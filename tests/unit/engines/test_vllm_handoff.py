"""Adapters of two servers hand requests over: whose a request is, whatever goes wrong. The servers' KV is made up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from tests.contract.openai_server import OpenAIServer
from tests.contract.support import LIMIT_S, Driver, driven

from hyperflexis.core.links import KvSource
from hyperflexis.engines.vllm import handoff
from hyperflexis.engines.vllm.engine import VllmConfig, VllmEngine
from hyperflexis.engines.vllm.handoff import MAX_PARAMETERS_BYTES, check_parameters
from hyperflexis.errors import HyperFlexisError, ProtocolError
from hyperflexis.policy.catalog import STEPS

PROMPT = list(range(40, 140))


@dataclass
class Pair:
    source: Driver
    target: Driver
    servers: list[OpenAIServer]
    kv: KvSource
    comes: bool = True

    def begin(self, id: str, max_tokens: int = 8) -> object:
        """At the source; when its prompt is computed, the target is told to get it. Its key is the id's."""
        return self.source.send(PROMPT, max_tokens, request_id=id, hands_over=True)

    def prefill_ends(self, request_id: str, left_s: float) -> None:
        if self.comes:
            self.at_target = self.target.send(PROMPT, 8, request_id=request_id, kv=self.kv)


async def server(gives_kv: bool = True) -> OpenAIServer:
    found = await OpenAIServer(token_ids=True).start()
    found.version, found.gives_kv = "0.32.0", gives_kv
    return found


def engine(one: OpenAIServer, listen: Path) -> VllmEngine:
    return VllmEngine(VllmConfig("m", one.url, step=STEPS["hyperflexis"].plan, kv_listen=f"unix:{listen}"))


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    async with AsyncExitStack() as stack:
        servers = [await server() for _ in range(2)]
        drivers = []
        for name, one in zip(("source", "target"), servers, strict=True):
            stack.push_async_callback(one.stop)
            drivers.append(await stack.enter_async_context(driven(engine(one, tmp_path / name), name)))
            one.bodies.clear()
        info = drivers[0].info
        assert info is not None and info.kv_address
        found = Pair(*drivers, servers, KvSource(info.kv_address, "source", 1))
        found.source.ending = found.prefill_ends
        yield found


async def test_a_request_goes_on_where_its_kv_went(pair: Pair) -> None:
    at_source = pair.begin("a")
    end = await pair.source.streams[at_source].ended()
    assert end.finish == "handed" and end.num_prompt_tokens == len(PROMPT) and not pair.source.streams[at_source].tokens
    there = pair.target.streams[pair.at_target]
    assert (await there.ended()).finish == "length" and len(there.tokens) == 8
    first, second = pair.servers[0].bodies[-1], pair.servers[1].bodies[-1]
    assert first["max_tokens"] == 1 and not first["stream"] and first["kv_transfer_params"]["do_remote_decode"]
    assert second["kv_transfer_params"]["remote_engine_id"] == pair.servers[0].url
    assert second["prompt"] == PROMPT and second["max_tokens"] == 8
    assert there.tokens == (await pair.source.run(PROMPT, 8)).tokens


async def test_nobody_comes_and_it_goes_on_here(pair: Pair) -> None:
    pair.comes = False
    at_source = pair.begin("b")
    assert (await pair.source.streams[at_source].ended()).finish == "length"
    assert len(pair.source.streams[at_source].tokens) == 8


async def test_one_that_is_told_to_stay_does_not_wait(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handoff, "ASK_LIMIT_S", 10 * LIMIT_S)
    pair.source.ending = lambda request_id, left_s: pair.source.engine.stay(request_id)
    at_source = pair.begin("stays")
    assert (await pair.source.streams[at_source].ended()).finish == "length"
    pair.source.engine.stay("stays")  # it has gone on


async def test_a_target_whose_server_fails_leaves_it_here(pair: Pair) -> None:
    pair.servers[1].fail_with = (500, "out of order")
    at_source = pair.begin("c")
    assert (await pair.source.streams[at_source].ended()).finish == "length"
    end = await pair.target.streams[pair.at_target].ended()
    assert end.finish == "refused" and "out of order" in end.message


async def test_a_target_that_is_cancelled_before_its_first_token_leaves_it_here(pair: Pair) -> None:
    pair.servers[1].go_on.clear()
    at_source = pair.begin("d")
    async with asyncio.timeout(LIMIT_S):
        while not pair.servers[1].open:
            await asyncio.sleep(0.01)
    for driver in (pair.source, pair.target):  # who has nothing to do but this does not hang
        report = driver.engine.report()
        assert report.num_running == report.num_waiting == 0
    pair.target.engine.cancel(pair.at_target)
    assert (await pair.source.streams[at_source].ended()).finish == "length"
    assert (await pair.target.streams[pair.at_target].ended()).finish == "cancelled"


async def test_a_source_that_is_cancelled_says_so_to_who_comes_later(pair: Pair) -> None:
    pair.comes = False
    at_source = pair.begin("e")
    pair.source.engine.cancel(at_source)
    assert (await pair.source.streams[at_source].ended()).finish == "cancelled"
    pair.comes = True
    pair.prefill_ends("e", 0.0)
    end = await pair.target.streams[pair.at_target].ended()
    assert end.finish == "refused" and "not here" in end.message


async def test_a_source_that_stops_ends_both_streams(pair: Pair) -> None:
    pair.servers[1].go_on.clear()
    at_source = pair.begin("f")
    async with asyncio.timeout(LIMIT_S):
        while not pair.servers[1].open:
            await asyncio.sleep(0.01)
    await pair.source.stop()
    assert (await pair.source.streams[at_source].ended()).finish in ("error", "moved")
    pair.servers[1].go_on.set()  # what the target has it keeps: its server can have the KV
    assert (await pair.target.streams[pair.at_target].ended()).finish == "length"


@pytest.mark.parametrize("change", [{"epoch": 2}, {"instance": "other"}, {"address": "unix:/nowhere"}])
async def test_what_is_not_there_is_refused(pair: Pair, change: dict[str, object]) -> None:
    key = pair.target.send(PROMPT, request_id="g", kv=replace(pair.kv, **change))  # type: ignore[arg-type]
    end = await pair.target.streams[key].ended()
    assert end.finish == "refused" and end.message


async def test_a_first_token_that_ends_the_text_ends_it_at_the_source(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handoff.NixlHandoffs, "offer", None)  # it must not come to that
    pair.servers[0].stops_at_once = True
    at_source = pair.begin("h")
    end = await pair.source.streams[at_source].ended()
    assert (end.finish, end.num_output_tokens) == ("stop", 1) and not pair.source.streams[at_source].tokens


async def test_a_server_without_a_connector_is_found_out_at_the_start(tmp_path: Path) -> None:
    one = await server(gives_kv=False)
    with pytest.raises(HyperFlexisError, match="--kv-transfer-config"):
        async with driven(engine(one, tmp_path / "kv")):
            pass
    await one.stop()


@pytest.mark.parametrize(
    "raw",
    [
        b"null",
        b"[]",
        b"not json",
        b"{}",
        b'{"do_remote_prefill": false, "remote_engine_id": "a"}',
        b'{"do_remote_prefill": true, "remote_engine_id": 3}',
        b'{"do_remote_prefill": true, "remote_engine_id": "' + b"a" * MAX_PARAMETERS_BYTES + b'"}',
    ],
)
def test_parameters_that_do_not_say_where_kv_is_go_nowhere(raw: bytes) -> None:
    with pytest.raises(ProtocolError):
        check_parameters(raw)
