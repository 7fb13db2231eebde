"""Prompts computed by one server, answers by another that pulls their KV over NIXL: the same tokens as from one server
alone, no prompt token computed twice, and no stream lost when either of the two goes."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import openai
import pytest
from tests.contract.support import LIMIT_S, Driver, driven
from tests.vllm.clients import Clients
from tests.vllm.servers import Server, metric, recipe, serving

from hyperflexis.core.links import KvSource
from hyperflexis.engines.vllm import handoff
from hyperflexis.engines.vllm.engine import VllmConfig, VllmEngine
from hyperflexis.policy.catalog import STEPS
from hyperflexis.wire import Sampling

pytestmark = pytest.mark.skipif(
    "HYPERFLEXIS_TEST_NIXL" not in os.environ,
    reason="two servers with NIXL keep more cores busy than a small machine has: `make test-nixl` runs this",
)
SOURCE, TARGET = "source", "target"
FLAVOURS = {SOURCE: "stock", TARGET: "scheduler"}
"""One of each kind: both the window and our scheduler take part."""
BLOCK = 32
STREAMS = 8
KV_LEASE_S = 30.0
"""For so long a server keeps the KV of a prompt that nobody comes for, by vLLM's default."""


@pytest.fixture(scope="module")
def pair(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    if find_spec("nixl") is None:
        pytest.skip("NIXL is not installed in this environment: `make test-vllm` installs it beside vLLM")
    logs = tmp_path_factory.mktemp("pair")
    servers = {
        name: Server(replace(recipe(model, flavour), gives_kv=True), logs / f"{name}.log")
        for name, flavour in FLAVOURS.items()
    }
    yield servers
    for server in servers.values():
        server.stop()


def external(server: Server) -> float:
    """Tokens of prompts whose KV came from the other server."""
    source = 'source="external_kv_transfer"'
    return metric(server.url, f'vllm:prompt_tokens_by_source_total{{engine="0",model_name="m",{source}')


@dataclass
class Pair:
    """Two instances of one epoch, linked to each other when they were asked to be."""

    source: Driver
    target: Driver
    servers: dict[str, Server]
    kv: KvSource
    wanted: dict[str, Callable[[], None]] = field(default_factory=dict)

    def counted(self, name: str, metric_name: str) -> float:
        return metric(self.servers[name].url, f"vllm:{metric_name}")

    def computed(self, name: str) -> float:
        return self.counted(name, 'prompt_tokens_by_source_total{engine="0",model_name="m",source="local_compute"}')

    def pulled(self) -> float:
        return external(self.servers[TARGET])

    def hand_over(self, prompt: list[int], sampling: Sampling, id: str) -> tuple[object, asyncio.Future[object]]:
        """The keys of both streams of a request; the second when its prompt is computed."""
        at_target: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self.wanted[id] = lambda: at_target.set_result(
            self.target.send(prompt, sampling=sampling, request_id=id, kv=self.kv)
        )
        return self.source.send(prompt, sampling=sampling, request_id=id, hands_over=True), at_target

    def prefill_ends(self, request_id: str, left_s: float) -> None:
        """What controller and gateway do in a fleet: open the second stream."""
        self.wanted.pop(request_id, lambda: None)()


@pytest.fixture
async def two(pair: dict[str, Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pair]:
    monkeypatch.setattr(handoff, "ASK_LIMIT_S", LIMIT_S)  # nobody says here what stays, and the machine may be busy
    async with AsyncExitStack() as stack:
        drivers = {}
        for name, server in pair.items():
            config = VllmConfig(
                *("m", server.wait_ready().url), step=STEPS["hyperflexis"].plan, kv_listen=f"unix:{tmp_path / name}"
            )
            drivers[name] = await stack.enter_async_context(driven(VllmEngine(config), name))
        info = drivers[SOURCE].info
        assert info is not None
        both = Pair(drivers[SOURCE], drivers[TARGET], pair, KvSource(info.kv_address, SOURCE, 1))
        both.source.ending = both.prefill_ends
        yield both


def prompt_of(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(20, 900) for _ in range(length)]


def greedy(max_tokens: int) -> Sampling:
    return Sampling(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


async def empties(pair: Pair, name: str) -> None:
    """The server holds no KV, at the latest when the lease of what nobody pulled is over."""
    driver = pair.source if name == SOURCE else pair.target
    async with asyncio.timeout(3 * KV_LEASE_S):
        while True:
            await driver.run(prompt_of(0, 5), 1)  # its gauge is set in steps
            if pair.counted(name, "kv_cache_usage_perc") == 0.0:
                return
            await asyncio.sleep(0.5)


async def test_an_answer_is_that_of_one_server_and_no_prompt_token_is_computed_twice(two: Pair) -> None:
    lengths = [200, 3 * BLOCK, 5 * BLOCK + 1, 300, 7, 33]
    prompts = [prompt_of(number, length) for number, length in enumerate(lengths)]
    computed, pulled = two.computed(TARGET), two.pulled()
    handed = [two.hand_over(prompt, greedy(24), f"handed-{number}") for number, prompt in enumerate(prompts)]
    answers = []
    for at_source, future in handed:
        at_target = await asyncio.wait_for(future, LIMIT_S)
        assert (await two.target.streams[at_target].ended()).finish == "length"
        end = await two.source.streams[at_source].ended()
        assert end.finish == "handed" and not two.source.streams[at_source].tokens
        answers.append(two.target.streams[at_target].tokens)
    assert two.computed(TARGET) == computed
    assert two.pulled() - pulled == sum(lengths)
    # Alone: prefixes that are cached by now change nothing in float32 either.
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer == (await two.source.run(prompt, sampling=greedy(24))).tokens, f"prompt of {len(prompt)} tokens"
    assert len({tuple(answer) for answer in answers}) == len(answers)


async def test_a_seeded_answer_is_the_same_too(two: Pair) -> None:
    # Short and alone: on a CPU vLLM dies of a seeded request whose prompt is computed in two steps.
    prompt, sampling = prompt_of(40, 50), Sampling(seed=5, max_tokens=24, ignore_eos=True)
    _, future = two.hand_over(prompt, sampling, "seeded")
    at_target = await asyncio.wait_for(future, LIMIT_S)
    assert (await two.target.streams[at_target].ended()).finish == "length"
    assert two.target.streams[at_target].tokens == (await two.source.run(prompt, sampling=sampling)).tokens


async def test_nobody_comes_and_it_goes_on_where_it_is(two: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handoff, "ASK_LIMIT_S", 0.2)
    prompt = prompt_of(50, 200)
    key = two.source.send(prompt, sampling=greedy(16), request_id="stays", hands_over=True)
    assert (await two.source.streams[key].ended()).finish == "length"
    assert two.source.streams[key].tokens == (await two.target.run(prompt, sampling=greedy(16))).tokens


async def test_what_is_not_there_is_refused_and_says_so(two: Pair) -> None:
    for kv in (two.kv, replace(two.kv, epoch=2), replace(two.kv, address="unix:/nowhere")):
        key = two.target.send(prompt_of(60, 40), sampling=greedy(4), request_id="unknown", kv=kv)
        end = await two.target.streams[key].ended()
        assert end.finish == "refused" and end.message
    assert two.target.engine.report().num_waiting == two.target.engine.report().num_running == 0


async def test_a_target_that_gives_up_leaves_it_at_its_source(two: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handoff, "ASK_LIMIT_S", 5.0)  # it may give up before it has asked
    prompt = prompt_of(70, 250)
    at_source, future = two.hand_over(prompt, greedy(16), "given-up")
    at_target = await asyncio.wait_for(future, LIMIT_S)
    two.target.engine.cancel(at_target)
    assert (await two.target.streams[at_target].ended()).finish == "cancelled"
    end = await two.source.streams[at_source].ended()
    assert end.finish == "length" and len(two.source.streams[at_source].tokens) == 16


async def test_a_cancel_on_both_sides_frees_what_was_held(two: Pair) -> None:
    at_source, future = two.hand_over(prompt_of(80, 250), greedy(200), "left")
    at_target = await asyncio.wait_for(future, LIMIT_S)
    await two.target.streams[at_target].started()
    two.target.engine.cancel(at_target)
    two.source.engine.cancel(at_source)
    await two.target.streams[at_target].ended()
    await asyncio.gather(empties(two, SOURCE), empties(two, TARGET))


async def test_kv_that_cannot_be_pulled_is_computed_anew(two: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(raw: bytes) -> handoff.msgspec.Raw:
        found = handoff.msgspec.json.decode(raw)
        return handoff.msgspec.Raw(handoff.msgspec.json.encode(found | {"remote_engine_id": "gone", "remote_port": 9}))

    prompt = prompt_of(90, 130)
    monkeypatch.setattr(handoff, "check_parameters", nowhere)  # as if the server had died after its answer
    computed = two.computed(TARGET)
    _, future = two.hand_over(prompt, greedy(12), "lost")
    at_target = await asyncio.wait_for(future, LIMIT_S)
    assert (await two.target.streams[at_target].ended()).finish == "length"
    assert two.computed(TARGET) - computed == len(prompt)
    monkeypatch.undo()
    alone = await two.source.run(prompt, sampling=greedy(12))
    assert two.target.streams[at_target].tokens == alone.tokens


async def test_a_fleet_hands_over_and_outlives_a_server(pair: dict[str, Server], model: Path, tmp_path: Path) -> None:
    """Last: it leaves one server."""
    entry = {
        "name": "m",
        "engine": "vllm",
        "path": str(model),
        "mode": "disaggregated",
        "prefill": 1,
        "roles": "static",
        "endpoints": [server.wait_ready().url for server in pair.values()],
        "args": {"max_batch": 8, "max_batch_tokens": 512},
    }
    with serving(entry, tmp_path) as url:
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        clients = Clients(client, [prompt_of(200 + number, 100) for number in range(STREAMS)], 100)
        pulled = sum(external(server) for server in pair.values())
        undisturbed: list[tuple[str, str | None]] = []
        async with asyncio.timeout(180):
            # A server that a busy machine holds up gets nothing new for some seconds, and hands nothing over.
            while sum(external(server) for server in pair.values()) - pulled < 100:
                undisturbed = await clients.answers()
        assert metric(url, "hyperflexis_handoffs_total") > 0
        streams = clients.start()
        await clients.have_begun(STREAMS // 2)
        pair[TARGET].stop()
        assert await asyncio.gather(*streams) == undisturbed
        assert [finish for _, finish in undisturbed] == ["length"] * STREAMS
        await client.close()
