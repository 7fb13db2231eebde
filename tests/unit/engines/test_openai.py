"""The adapter against a server that misbehaves in every way that a server can."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from tests.contract.openai_server import OpenAIServer
from tests.contract.support import LIMIT_S, Driver, Stream, driven, fast_profile

from hyperflexis.core.links import KvSource
from hyperflexis.engines.base import EngineStart
from hyperflexis.engines.openai import OpenAIConfig, OpenAIEngine
from hyperflexis.errors import HyperFlexisError
from hyperflexis.wire import Generate, Sampling, TokenLogprob


@pytest.fixture
async def server() -> AsyncIterator[OpenAIServer]:
    one = await OpenAIServer(token_ids=True).start()
    yield one
    await one.stop()


def engine(server: OpenAIServer, **options: object) -> OpenAIEngine:
    return OpenAIEngine(OpenAIConfig("m", server.url, **options))  # type: ignore[arg-type]


async def text(driver: Driver, body: dict[str, object], kind: str = "chat") -> Stream:
    key = object()
    stream = driver.streams[key] = Stream()
    request = Generate(1, "r", 1, b"", Sampling(), kind=kind, body=json.dumps(body).encode())
    driver.engine.generate(key, request)
    await stream.ended()
    return stream


async def test_kv_is_refused_and_the_server_is_not_asked(server: OpenAIServer) -> None:
    async with driven(engine(server)) as driver:
        key = driver.send([65, 66], kv=KvSource("unix:/kv", "i", 1))
        end = await driver.streams[key].ended()
    assert end.finish == "refused" and "KV" in end.message
    assert not server.bodies


async def test_the_clients_body_goes_on_but_for_what_is_the_gateways(server: OpenAIServer) -> None:
    body: dict[str, object] = {
        "model": "m",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 4,
        "stop": ["###"],
        "logit_bias": {"5": 1},
        "stream": False,
        "n": 3,
        "slo": {"ttft_ms": 100},
        "service_tier": "priority",
        "priority": -1,
    }
    async with driven(engine(server)) as driver:
        stream = await text(driver, body)
    assert stream.end is not None
    assert (stream.end.finish, stream.end.num_prompt_tokens, stream.end.num_output_tokens) == ("length", 5, 4)
    assert len(stream.text) == 4
    assert "seed" not in server.bodies[0]
    kept = {name: body[name] for name in ("messages", "max_tokens", "stop", "logit_bias")}
    ours = {"model": "served", "stream": True, "stream_options": {"include_usage": True}}
    assert server.bodies == [kept | ours]


async def test_each_choice_keeps_the_seed_that_the_gateway_gave_it(server: OpenAIServer) -> None:
    async with driven(engine(server)) as driver:
        await driver.run([65], sampling=Sampling(seed=8, max_tokens=2))
    assert server.bodies[-1]["seed"] == 8


async def test_token_ids_go_with_the_sampling(server: OpenAIServer) -> None:
    sampling = Sampling(0.5, 0.9, 40, 7, 3, True, (11,))
    async with driven(engine(server, token_ids=True)) as driver:
        await driver.run([65, 66], sampling=sampling)
    assert server.bodies[-1] == {
        "model": "served",
        "prompt": [65, 66],
        "max_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "seed": 7,
        "ignore_eos": True,
        "stop_token_ids": [11],
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }


async def test_the_token_that_stopped_the_server_is_counted_and_left_out(server: OpenAIServer) -> None:
    server.finish_reason = "stop"
    async with driven(engine(server, token_ids=True)) as driver:
        stream = await driver.run([65, 66], 5)
    assert stream.end is not None
    assert (stream.end.finish, stream.end.num_output_tokens, len(stream.tokens)) == ("stop", 5, 4)


@pytest.mark.parametrize(
    ("status", "finish"),
    [(429, "refused"), (503, "refused"), (400, "invalid"), (422, "invalid"), (404, "error"), (500, "error")],
)
async def test_an_http_error_keeps_its_message(server: OpenAIServer, status: int, finish: str) -> None:
    async with driven(engine(server)) as driver:
        server.fail_with = (status, "says why")
        stream = await driver.run([65], 3)
    assert stream.end is not None
    assert (stream.end.finish, stream.end.message) == (finish, "says why")


async def test_a_stream_that_just_ends_is_an_error(server: OpenAIServer) -> None:
    server.finish_reason = None
    async with driven(engine(server)) as driver:
        stream = await driver.run([65], 3)
    assert stream.end is not None
    assert (stream.end.finish, stream.end.num_output_tokens) == ("error", 3)
    assert "without a finish_reason" in stream.end.message


async def test_a_finish_reason_that_no_client_expects_is_an_error(server: OpenAIServer) -> None:
    server.finish_reason = "content_filter"
    async with driven(engine(server)) as driver:
        stream = await driver.run([65], 3)
    assert stream.end is not None
    assert stream.end.finish == "error"
    assert "content_filter" in stream.end.message


async def test_a_connection_that_breaks_is_an_error(server: OpenAIServer) -> None:
    server.cut_after = 2
    async with driven(engine(server)) as driver:
        stream = await driver.run([65], 50)
    assert stream.end is not None
    assert stream.end.finish == "error"
    assert "broke off" in stream.end.message


@pytest.mark.parametrize(
    "garbage",
    [
        b"data: {\n\n",
        b'data: {"choices": 5}\n\n',
        b'data: {"choices": [{"text": "\xff"}]}\n\n',
        b"data: " + b"x" * (1 << 21),
    ],
    ids=["no-json", "no-schema", "no-utf8", "no-end"],
)
async def test_garbage_ends_its_stream_with_an_error(server: OpenAIServer, garbage: bytes) -> None:
    server.garbage = garbage
    async with driven(engine(server)) as driver:
        stream = await driver.run([65], 3)
    assert stream.end is not None
    assert stream.end.finish == "error"
    assert "not OpenAI's format" in stream.end.message


async def test_an_error_within_a_stream_keeps_its_message(server: OpenAIServer) -> None:
    server.garbage = b'data: {"error": {"message": "out of memory", "code": 500}}\n\n'
    async with driven(engine(server)) as driver:
        stream = await driver.run([65], 3)
    assert stream.end is not None
    assert (stream.end.finish, stream.end.message) == ("error", "out of memory")


async def test_tool_calls_are_an_error_and_not_lost_in_silence(server: OpenAIServer) -> None:
    server.garbage = b'data: {"choices": [{"delta": {"tool_calls": [{"index": 0}]}}]}\n\n'
    async with driven(engine(server)) as driver:
        stream = await driver.run([65], 3)
    assert stream.end is not None
    assert stream.end.finish == "error"
    assert "tool calls" in stream.end.message


async def test_logprobs_come_back_with_token_ids(server: OpenAIServer) -> None:
    async with driven(engine(server, token_ids=True)) as driver:
        stream = await driver.run([65], sampling=Sampling(max_tokens=3, logprobs=2))
    assert server.bodies[-1]["logprobs"] == 2
    assert stream.logprobs == [TokenLogprob(token, -0.5, [(token, -0.5), (token + 1, -1.5)]) for token in stream.tokens]
    assert len(stream.logprobs) == 3


async def test_cancel_reaches_the_server(server: OpenAIServer) -> None:
    async with driven(engine(server)) as driver:
        key = driver.send([65], 400)
        await driver.streams[key].started()
        assert server.open == 1
        driver.engine.cancel(key)
        async with asyncio.timeout(LIMIT_S):
            await server.idle.wait()


async def test_no_more_than_max_batch_are_sent_at_once(server: OpenAIServer) -> None:
    server.go_on.clear()
    async with driven(engine(server, max_batch=2)) as driver:
        keys = [driver.send([65, i], 3) for i in range(5)]
        assert driver.engine.report().num_waiting == 5
        async with asyncio.timeout(LIMIT_S):
            while len(server.bodies) < 2:
                await asyncio.sleep(0)
        server.go_on.set()
        most = 0
        for key in keys:
            stream = driver.streams[key]
            while stream.end is None:
                most = max(most, server.open)
                stream.moved.clear()
                async with asyncio.timeout(LIMIT_S):
                    await stream.moved.wait()
        assert most == 2


async def test_a_server_that_is_gone_refuses_and_then_breaks_the_engine(server: OpenAIServer) -> None:
    async with driven(engine(server, probe_every_s=0.02)) as driver:
        await server.stop()
        stream = await driver.run([65], 3)
        assert stream.end is not None
        assert stream.end.finish == "refused"
        assert "cannot be reached" in stream.end.message

        async def broken() -> str:
            while True:
                try:
                    driver.engine.report()
                except HyperFlexisError as error:
                    return str(error)
                await asyncio.sleep(0.005)

        async with asyncio.timeout(LIMIT_S):
            assert server.url in await broken()


async def test_the_fit_follows_the_servers_pace(server: OpenAIServer) -> None:
    server.pace_s = 0.01
    async with driven(engine(server, profile=fast_profile())) as driver:
        before = driver.engine.report().latency.decode_s(1, 50)
        await driver.run([65] * 40, 60)
        after = driver.engine.report().latency.decode_s(1, 50)
    assert before < 0.002
    assert 0.004 < after < 0.1


async def test_start_names_what_is_wrong(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def failure(one: OpenAIEngine) -> str:
        with pytest.raises(HyperFlexisError) as error:
            await one.start(EngineStart(lambda emissions: None))
        return str(error.value)

    assert "does not serve 'other'; its models are served" in await failure(engine(server, server_model="other"))
    assert "without /v1?" in await failure(OpenAIEngine(OpenAIConfig("m", server.url + "/v1")))
    assert "is it running?" in await failure(OpenAIEngine(OpenAIConfig("m", "http://127.0.0.1:9", start_limit_s=0.0)))
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    assert "NO_SUCH_KEY" in await failure(engine(server, api_key_env="NO_SUCH_KEY"))
    server.token_ids = False
    assert "returns no token ids" in await failure(engine(server, token_ids=True))


async def test_sizes_come_from_the_server_then_from_the_profile(server: OpenAIServer) -> None:
    async with driven(engine(server, profile=fast_profile())) as driver:
        assert driver.info is not None
        assert (driver.info.context_length, driver.info.kv_capacity_tokens) == (512, 128 * 16)
        assert (driver.info.max_batch, driver.info.device_kind) == (8, "test")
    async with driven(engine(server, context_length=100, kv_tokens=200, max_batch=3)) as driver:
        assert driver.info is not None
        assert (driver.info.context_length, driver.info.kv_capacity_tokens, driver.info.max_batch) == (100, 200, 3)
