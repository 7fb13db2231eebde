"""What every engine must do; one suite over all of them. See docs/engines.md."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.contract.openai_server import OpenAIServer
from tests.contract.support import CONTEXT, LIMIT_S, Driver, driven, emulated

from hyperflexis.core.weights import LoadWeights
from hyperflexis.engines.base import Engine
from hyperflexis.engines.openai import OpenAIConfig, OpenAIEngine
from hyperflexis.policy.catalog import STEPS
from hyperflexis.wire import Sampling


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch", reason="the torch engine needs PyTorch")
    make_model = pytest.importorskip("hyperflexis.make_model", reason="the torch engine's test model needs make_model")
    directory: Path = tmp_path_factory.mktemp("model") / "1m"
    make_model.make_model(directory, make_model.Recipe("1m"))
    return directory


ENGINES = ["emulated", "emulated-first-come", "openai", "openai-token-ids", "torch"]


@asynccontextmanager
async def started(name: str, request: pytest.FixtureRequest, standby: bool = False) -> AsyncIterator[Driver]:
    server: OpenAIServer | None = None
    engine: Engine
    if name.startswith("emulated"):
        engine = emulated("first_come" if name.endswith("first-come") else "hyperflexis")
    elif name.startswith("openai"):
        server = await OpenAIServer(token_ids=name.endswith("token-ids")).start()
        engine = OpenAIEngine(OpenAIConfig("m", server.url, token_ids=server.token_ids))
    else:
        directory = request.getfixturevalue("tiny_model")
        from hyperflexis.engines.torch.engine import TorchConfig, TorchEngine

        engine = TorchEngine(
            TorchConfig("m", directory, STEPS["hyperflexis"], kv_tokens=2048, context_length=CONTEXT, max_batch=8)
        )
    async with driven(engine, standby=standby) as one:
        yield one
    if server is not None:
        await server.stop()


@pytest.fixture(params=ENGINES)
async def driver(request: pytest.FixtureRequest) -> AsyncIterator[Driver]:
    async with started(request.param, request) as one:
        yield one


@pytest.mark.parametrize("name", ["emulated", "openai", "torch"])
async def test_a_standby_refuses_until_it_was_told_to_load(name: str, request: pytest.FixtureRequest) -> None:
    async with started(name, request, standby=True) as one:
        assert one.info is not None and one.info.context_length == CONTEXT
        refused = await one.run([1, 2, 3])
        assert refused.end is not None and refused.end.finish == "refused" and "standby" in refused.end.message
        loaded = await one.engine.load(LoadWeights("", 1))
        assert loaded.problem == ""
        one.engine.set_send_rate(1e6)
        served = await one.run(list(range(40, 80)), 3)
        assert served.end is not None and served.end.finish == "length"


def settled(driver: Driver) -> bool:
    report = driver.engine.report()
    return report.num_running == report.num_waiting == report.kv_used_tokens == 0


async def test_describes_itself(driver: Driver) -> None:
    info = driver.info
    assert info is not None
    assert info.model == "m"
    assert info.engine and info.device_kind
    assert info.context_length == CONTEXT
    assert info.kv_capacity_tokens == 2048
    assert info.max_batch >= 8
    assert info.latency.decode_s(1, 1) > 0.0
    assert settled(driver)


@pytest.mark.parametrize("max_tokens", [1, 2, 17])
async def test_generates_exactly_what_is_asked_for(driver: Driver, max_tokens: int) -> None:
    assert driver.info is not None
    stream = await driver.run(list(range(40, 80)), max_tokens)
    assert stream.end is not None
    assert stream.end.finish == "length"
    assert stream.end.num_output_tokens == max_tokens
    assert stream.end.num_prompt_tokens >= 40
    if driver.info.returns_token_ids:
        assert len(stream.tokens) == max_tokens
        assert stream.end.num_prompt_tokens == 40
        assert stream.text == ""
    else:
        assert stream.text and not stream.tokens
    assert settled(driver)


async def test_many_streams_at_once_each_end_once_with_their_own_tokens(driver: Driver) -> None:
    prompts = [[40 + i, *range(50, 60 + i)] for i in range(24)]
    alone = await driver.run(prompts[5], 5)
    streams = [driver.streams[driver.send(prompt, i)] for i, prompt in enumerate(prompts, start=1)]
    ends = await asyncio.gather(*(stream.ended() for stream in streams))
    assert [end.finish for end in ends] == ["length"] * 24
    assert [end.num_output_tokens for end in ends] == list(range(1, 25))
    assert (streams[5].tokens[:5], streams[5].text[:5]) == (alone.tokens, alone.text)
    assert settled(driver)


async def test_cancel_ends_a_stream_once_and_frees_its_kv(driver: Driver) -> None:
    keys = [driver.send([60 + i] * 30, 400) for i in range(3)]
    for key in keys:
        await driver.streams[key].started()
    # A busy machine may deliver all of a stream at once.
    open_ = [key for key in keys if driver.streams[key].end is None]
    assert driver.engine.report().kv_used_tokens > 0 or not open_
    for key in open_:
        driver.engine.cancel(key)
    for key in open_:
        assert (await driver.streams[key].ended()).finish == "cancelled"
        driver.engine.cancel(key)  # a second time: nothing, and the driver would notice an emission
    # A stream that comes later is served, so the engine has freed what they held by then.
    await driver.run([70] * 30, 2)
    assert settled(driver)


async def test_cancel_of_an_ended_stream_is_silent(driver: Driver) -> None:
    key = driver.send([70, 71], 2)
    await driver.streams[key].ended()
    driver.engine.cancel(key)
    await driver.run([72], 1)
    assert driver.streams[key].end is not None
    assert driver.streams[key].end.finish == "length"


async def test_a_prompt_beyond_the_context_is_invalid_and_says_so(driver: Driver) -> None:
    stream = await driver.run([65] * (CONTEXT + 1), 4)
    assert stream.end is not None
    assert stream.end.finish == "invalid"
    assert str(CONTEXT) in stream.end.message
    assert not stream.tokens and not stream.text
    assert settled(driver)


async def test_drain_refuses_the_new_and_finishes_the_old(driver: Driver) -> None:
    old = driver.streams[driver.send([65, 66, 67], 40)]
    await old.started()
    driver.engine.drain()
    new = await driver.run([65, 66], 4)
    assert new.end is not None
    assert new.end.finish == "refused"
    assert not new.tokens and not new.text
    end = await old.ended()
    assert (end.finish, end.num_output_tokens) == ("length", 40)


async def test_stop_ends_open_streams_with_an_error(driver: Driver) -> None:
    streams = [driver.streams[driver.send([65, i], 450)] for i in range(66, 70)]
    for stream in streams:
        await stream.started()
    over = [stream.end is not None for stream in streams]  # on a busy machine some may be
    await driver.stop()
    for stream, was_over in zip(streams, over, strict=True):
        assert stream.end is not None
        assert stream.end.finish == ("length" if was_over else "error")
        assert stream.end.message or was_over


@pytest.mark.parametrize("seed", [None, 12345])
async def test_a_resumed_stream_goes_on_as_it_would_have(driver: Driver, seed: int | None) -> None:
    assert driver.info is not None
    if not driver.info.returns_token_ids:
        pytest.skip("only engines that return token ids can be resumed")
    temperature = 0.0 if seed is None else 1.0
    prompt = [65, 70, 75, 80] * 9

    def sampling(max_tokens: int) -> Sampling:
        return Sampling(temperature=temperature, seed=seed, max_tokens=max_tokens, ignore_eos=True)

    whole = await driver.run(prompt, sampling=sampling(40))
    for sent in (1, 16, 39):
        rest = await driver.run(prompt + whole.tokens[:sent], sampling=sampling(40 - sent), sent_tokens=sent)
        assert whole.tokens[:sent] + rest.tokens == whole.tokens
    assert len(set(whole.tokens)) > 1, "one token repeated would prove nothing"


async def test_a_known_prefix_is_reported_as_cached(driver: Driver) -> None:
    prompt = [65 + i % 20 for i in range(100)]
    first = await driver.run(prompt, 2)
    second = await driver.run(prompt, 2)
    assert first.end is not None and second.end is not None
    assert first.end.cached_tokens == 0
    assert 64 <= second.end.cached_tokens < second.end.num_prompt_tokens
    assert (first.tokens, first.text) == (second.tokens, second.text)
    assert driver.engine.report().prefix_hit_tokens == second.end.cached_tokens


async def test_reports_only_grow_and_tell_progress(driver: Driver) -> None:
    key = driver.send([65] * 20, 300)
    stream = driver.streams[key]
    before = driver.engine.report()
    told: list[int] = []
    moves = 0  # that a report can tell of: a busy machine may deliver the last tokens, or all, with the end
    while stream.end is None:
        stream.moved.clear()
        async with asyncio.timeout(LIMIT_S):
            await stream.moved.wait()
        report = driver.engine.report()
        for name in ("iterations", "prompt_tokens", "output_tokens", "prefix_hit_tokens", "preemptions", "busy_s"):
            assert getattr(report, name) >= getattr(before, name), name
        told += [progress.output_tokens for progress in report.progress]
        moves += stream.end is None
        before = report
    assert len(told) >= moves // 32  # own engines tell of each 16 tokens
    assert told == sorted(told)
    assert max(told, default=0) <= 300
    assert before.output_tokens == 300
    assert before.iterations >= 300
    assert before.busy_s > 0.0


async def test_an_id_that_is_used_again_after_its_end_is_served(driver: Driver) -> None:
    for _ in range(2):
        stream = await driver.run([66, 67, 68], 3)
        assert stream.end is not None
        assert stream.end.finish == "length"
