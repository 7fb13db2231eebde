"""The official client, unchanged, against gateway, controller and emulated engines; each behind its real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import openai
import pytest
from tests.integration.gateway_support import CLASSES, soon
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from hyperflexis import wire
from hyperflexis.controller import Controller, ControllerConfig
from hyperflexis.engines.emulated import EmulatedConfig, EmulatedEngine
from hyperflexis.engines.host import InstanceHost, InstanceIdentity
from hyperflexis.engines.profiles import load_profile
from hyperflexis.gateway.app import Gateway
from hyperflexis.gateway.config import GatewayConfig, Limits, Tenant
from hyperflexis.policy.catalog import STEPS
from hyperflexis.runtime.server import Server, ServerConfig

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(dir: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 20], trainer)
    tokenizer.save(str(dir / "tokenizer.json"))
    (dir / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "<|end|>"}))


@pytest.fixture
async def gateway_port(tmp_path: Path) -> AsyncIterator[int]:
    make_tokenizer(tmp_path)
    address = f"unix:{tmp_path}/c"
    config = ControllerConfig(("m",), "hyperflexis")
    server = Server(ServerConfig(address, 1, tmp_path / "journal", "digest"), Controller(config))
    listener = await wire.listen(address, lambda: server, server.hello)
    profile = replace(load_profile("h100-llama-3.1-8b"), context_length=512)
    hosts = []
    for number in range(2):
        engine = EmulatedEngine(EmulatedConfig("m", profile, STEPS["hyperflexis"]))
        hosts.append(InstanceHost(engine, InstanceIdentity(f"i{number}", 1)))
        await hosts[-1].start(f"unix:{tmp_path}/i{number}", address)
    tenants = (Tenant("t", default_class="chat"),)
    gateway = Gateway(
        GatewayConfig(
            "g",
            address,
            {"m": tmp_path},
            classes=CLASSES,
            tenants=tenants,
            api_keys={"key": "t"},
            limits=Limits(shutdown_grace_s=0.0),
        )
    )
    port = gateway.http.start("127.0.0.1", 0, False)
    links = asyncio.create_task(gateway.controller.run())
    try:
        while True:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /ready HTTP/1.1\r\nconnection: close\r\n\r\n")
            ready = b" 200 " in await soon(reader.readline())
            writer.close()
            if ready:
                break
        yield port
    finally:
        links.cancel()
        await gateway.http.stop(0.0, gateway.cut)
        gateway.close()
        for host in hosts:
            await host.stop()
        listener.close()
        server.journal.close()
        await asyncio.gather(links, return_exceptions=True)


@pytest.fixture
async def client(gateway_port: int) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{gateway_port}/v1", api_key="key", max_retries=0) as it:
        yield it


async def test_chat_and_completions_streamed_and_not(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["m"]
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the quick fox"}]
    arguments = {"model": "m", "messages": messages, "max_tokens": 12, "temperature": 0}
    whole = await client.chat.completions.create(**arguments)  # type: ignore[call-overload]
    assert whole.usage.completion_tokens == 12
    assert whole.choices[0].finish_reason == "length"
    text = whole.choices[0].message.content
    assert text

    stream = await client.chat.completions.create(  # type: ignore[call-overload]
        **arguments, stream=True, stream_options={"include_usage": True}, extra_headers={"x-slo-ttft-ms": "500"}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].usage.completion_tokens == 12
    # Greedy, so the same: pieces and whole agree over the tokenizer's partial characters.
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text

    plain = await client.completions.create(model="m", prompt=["the lazy", "the quick"], max_tokens=5, logprobs=2)
    assert [len(choice.logprobs.tokens) for choice in plain.choices if choice.logprobs] == [5, 5]
    pieces = await client.completions.create(model="m", prompt="the lazy", max_tokens=5, temperature=0, stream=True)
    assert [p.choices[0].finish_reason async for p in pieces if p.choices[0].finish_reason] == ["length"]


async def test_raw_headers_and_log_probabilities(client: openai.AsyncOpenAI) -> None:
    raw = await client.chat.completions.with_raw_response.create(
        model="m",
        messages=[{"role": "user", "content": "hi"}],
        max_completion_tokens=3,
        logprobs=True,
        top_logprobs=2,
        n=2,
        extra_body={"slo": {"class": "batch"}, "top_k": 5, "ignore_eos": True},
    )
    assert raw.headers["x-hfx-instance"] in ("i0", "i1")
    assert raw.headers["x-hfx-decision"].startswith("hyperflexis: on time, best of ")
    assert float(raw.headers["x-hfx-predicted-ttft-ms"]) >= 0
    parsed = raw.parse()
    for choice in parsed.choices:
        assert choice.logprobs is not None and choice.logprobs.content is not None
        assert [len(entry.top_logprobs) for entry in choice.logprobs.content] == [2, 2, 2]


async def test_errors_become_the_clients_exceptions(client: openai.AsyncOpenAI) -> None:
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="nope", messages=messages)  # type: ignore[arg-type]
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(model="m", messages=messages, temperature=7)  # type: ignore[arg-type]
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        await client.completions.create(model="m", prompt="x y " * 3000, stream=True)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.RateLimitError) as infeasible:
        await client.completions.create(
            model="m", prompt="hi", extra_headers={"x-slo-ttft-ms": "0.001", "x-slo-fail-fast": "true"}
        )
    assert infeasible.value.code == "slo_infeasible"
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="other").models.list()
