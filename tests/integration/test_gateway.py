"""What clients see of a gateway: answers, streams, promises, headers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from tests.integration.gateway_support import CHAT, CLASSES, Site, events, site, soon

from hyperflexis import wire
from hyperflexis.core.effects import Reject
from hyperflexis.core.slo import Slo
from hyperflexis.gateway.config import Limits, Tenant


@pytest.fixture
async def one(tmp_path: Path) -> AsyncIterator[Site]:
    async with site(tmp_path, classes=CLASSES, default_class="chat") as found:
        yield found


async def test_a_whole_chat_answer(one: Site) -> None:
    answer = one.post({**CHAT, "max_tokens": 5, "temperature": 0.5, "top_k": 7, "seed": 3}, x_request_id="abc-1")
    stream = await one.stream()
    assert stream.prompt == "user: hi\nassistant:"
    assert stream.order.epoch == 7
    sampling = stream.order.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k, sampling.seed) == (5, 0.5, 7, 3)
    stream.say("hel")
    stream.say("lo", "length")
    found = await soon(answer)
    body = found.json()
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"content": "hello", "role": "assistant", "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
        }
    ]
    assert body["usage"]["completion_tokens"] == 5
    assert body["usage"]["prompt_tokens"] == len(stream.prompt)
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}
    assert body["object"] == "chat.completion"
    assert found.headers["x-request-id"] == "abc-1"
    assert found.headers["x-hfx-instance"] == "i0"
    assert found.headers["x-hfx-predicted-ttft-ms"] == "123"
    assert "50 ms saved by a cached prefix, a note" in found.headers["x-hfx-decision"]
    ended = await soon(one.fleet.ended.get())
    assert (ended.outcome, ended.output_tokens, ended.prompt_tokens_cached) == ("finished", 5, 1)
    assert 0 < ended.ttft_s <= ended.e2e_s
    assert ended.id.startswith("abc-1~")


async def test_tokens_of_a_stream_arrive_one_by_one(one: Site) -> None:
    body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    request = one.client.build_request("POST", "/v1/chat/completions", json=body)
    opening = asyncio.create_task(one.client.send(request, stream=True))
    stream = await one.stream()
    stream.say("a")
    answer = await soon(opening)
    pieces = answer.aiter_raw()
    text = b""
    while b'"a"' not in text:  # before the second token exists
        text += await soon(anext(pieces))
    stream.say("\N{SNOWMAN}", "stop")
    async for piece in pieces:
        text += piece
    found = events(text.decode())
    deltas = [event["choices"][0]["delta"] for event in found[:-1]]
    assert deltas == [
        {"role": "assistant", "content": ""},
        {"content": "a"},
        {"content": "\N{SNOWMAN}"},
        {"content": ""},
    ]
    assert [event["choices"][0]["finish_reason"] for event in found[:-1]] == [None, None, None, "stop"]
    assert found[-1]["choices"] == []
    assert found[-1]["usage"]["completion_tokens"] == 4
    assert all(event["usage"] is None for event in found[:-1])
    assert len({event["id"] for event in found}) == 1
    assert answer.headers["content-type"].startswith("text/event-stream")


async def test_a_character_split_over_tokens_is_sent_whole(one: Site) -> None:
    answer = one.post({**CHAT, "stream": True})
    stream = await one.stream()
    for byte in "\N{GRINNING FACE}!".encode():
        stream.say_ids([byte])
    stream.say_ids([0xE2, 0x98], "length")  # two thirds of a character
    found = events((await soon(answer)).text)
    texts = [event["choices"][0]["delta"].get("content") for event in found]
    assert texts == ["", "\N{GRINNING FACE}", "!", "\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_stop_string_across_tokens_cuts_the_text_and_cancels(one: Site, streamed: bool) -> None:
    answer = one.post({**CHAT, "stream": streamed, "stop": ["END", "never"]})
    stream = await one.stream()
    for piece in ("go E", "N", "ext E", "N", "D more"):
        stream.say(piece)
    assert await soon(one.fleet.cancels.get()) == ("i0", stream.order.stream)
    found = await soon(answer)
    if streamed:
        chunks = [event["choices"][0] for event in events(found.text)]
        text, reason = "".join(c["delta"]["content"] for c in chunks), chunks[-1]["finish_reason"]
    else:
        text, reason = found.json()["choices"][0]["message"]["content"], found.json()["choices"][0]["finish_reason"]
    assert (text, reason) == ("go ENext ", "stop")
    ended = await soon(one.fleet.ended.get())
    assert (ended.outcome, ended.output_tokens) == ("finished", 17)


async def test_text_that_only_began_like_a_stop_string_is_sent_at_the_end(one: Site) -> None:
    answer = one.post({**CHAT, "stop": "END"})
    (await one.stream()).say("the EN", "length")
    assert (await soon(answer)).json()["choices"][0]["message"]["content"] == "the EN"


async def test_several_choices(one: Site) -> None:
    answer = one.post({**CHAT, "n": 2, "seed": 10})
    streams = [await one.stream() for _ in range(2)]
    assert sorted(s.order.sampling.seed for s in streams) == [10, 11]
    assert len({s.order.request_id for s in streams}) == 2
    for stream in reversed(streams):
        stream.say(f"{stream.order.sampling.seed}", "stop")
    body = (await soon(answer)).json()
    assert [c["message"]["content"] for c in body["choices"]] == ["10", "11"]
    # The prompt is counted once.
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (len("user: hi\nassistant:"), 4)


async def test_completions_take_texts_and_token_ids(one: Site) -> None:
    answer = one.post({"model": "m", "prompt": ["ab", [99, 100]], "logprobs": 1}, "/v1/completions")
    for expected in ("ab", "cd"):
        stream = await one.stream()
        assert stream.prompt == expected
        assert stream.order.sampling.max_tokens == 16
        assert stream.order.sampling.logprobs == 1
        entries = [wire.TokenLogprob(ord(c), -0.5, [(ord(c), -0.5)]) for c in "xy"]
        stream.say("xy", "length", entries)
    body = (await soon(answer)).json()
    assert body["object"] == "text_completion"
    assert [c["text"] for c in body["choices"]] == ["xy", "xy"]
    assert body["choices"][1]["logprobs"] == {
        "tokens": ["x", "y"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"x": -0.5}, {"y": -0.5}],
        "text_offset": [0, 1],
    }


async def test_log_probabilities_of_a_chat_stream(one: Site) -> None:
    answer = one.post({**CHAT, "stream": True, "logprobs": True, "top_logprobs": 2})
    stream = await one.stream()
    assert stream.order.sampling.logprobs == 2
    stream.say("x", "stop", [wire.TokenLogprob(ord("x"), -0.1, [(ord("x"), -0.1), (ord("y"), -2.5)])])
    found = [e["choices"][0]["logprobs"] for e in events((await soon(answer)).text)]
    entry = {"token": "x", "logprob": -0.1, "bytes": [120]}
    other = {"token": "y", "logprob": -2.5, "bytes": [121]}
    assert found[1] == {"content": [{**entry, "top_logprobs": [entry, other]}]}


async def test_the_promise_reaches_controller_and_instance(one: Site) -> None:
    body = {**CHAT, "slo": {"ttft_ms": 300, "tpot_ms": 20, "class": "batch"}, "priority": 99}
    answer = one.post(body, x_slo_ttft_ms="250", x_llm_d_slo_ttft_ms="1", x_slo_fail_fast="true")
    stream = await one.stream()
    request = (await soon(one.fleet.asked.get())).request
    assert request.slo == Slo(0.25, 0.02, 60.0)
    assert (request.slo_class, request.value, request.fail_fast) == ("batch", 0.5, True)
    assert request.num_prompt_tokens == len(stream.prompt)
    assert request.max_output_tokens == 100 - len(stream.prompt)
    order = stream.order
    assert order.first_due_s is not None and 0.2 < order.first_due_s < 0.25
    assert order.last_due_s is not None and 59 < order.last_due_s < 60
    assert (order.pace_s, order.value, order.expected_output_tokens) == (0.02, 2.0, 40.0)
    stream.say("x", "stop")
    assert (await soon(answer)).status_code == 200


async def test_only_a_rate_promised_leaves_the_rest_open(tmp_path: Path) -> None:
    async with site(tmp_path) as found:
        answer = found.post(CHAT, x_llm_d_slo_tpot_ms="30")
        stream = await found.stream()
        assert (stream.order.first_due_s, stream.order.pace_s, stream.order.last_due_s) == (None, 0.03, None)
        stream.say("x", "stop")
        await soon(answer)


async def test_a_service_tier_chooses_a_class(tmp_path: Path) -> None:
    tiers = {"flex": "batch"}
    async with site(tmp_path, classes=CLASSES, default_class="chat", service_tiers=tiers) as found:
        found.fleet.reject = Reject("", "", "overloaded", "full", 3.4)
        for tier, expected in (("flex", "batch"), ("auto", "chat"), ("priority", "chat")):
            answer = await soon(found.post({**CHAT, "service_tier": tier}))
            assert (await soon(found.fleet.asked.get())).request.slo_class == expected
            assert (answer.status_code, answer.headers["retry-after"]) == (429, "4")
        assert (await found.error({**CHAT, "service_tier": "gold"}))[:3] == (400, "invalid_slo", "service_tier")


async def test_tenants(tmp_path: Path) -> None:
    tenants = (
        Tenant("big", weight=3.0),
        Tenant("small", default_class="batch", allowed_classes=frozenset({"batch"}), floor=Slo(ttft_s=2.0)),
    )
    keys = {"k-big": "big", "k-small": "small"}
    async with site(tmp_path, classes=CLASSES, default_class="chat", tenants=tenants, api_keys=keys) as found:
        found.fleet.reject = Reject("", "", "slo_infeasible", "no", 1.0)
        assert (await found.error(CHAT))[:2] == (401, "invalid_api_key")
        assert (await found.error(CHAT, authorization="Bearer nope"))[0] == 401
        assert (await found.client.get("/v1/models")).status_code == 401
        assert (await found.error(CHAT, authorization="Bearer k-big"))[:2] == (429, "slo_infeasible")
        request = (await soon(found.fleet.asked.get())).request
        assert (request.tenant, request.value, request.slo_class) == ("big", 6.0, "chat")
        assert (await found.error(CHAT, authorization="Bearer k-small"))[0] == 429
        request = (await soon(found.fleet.asked.get())).request
        assert (request.tenant, request.value, request.slo_class) == ("small", 0.5, "batch")
        small = {"authorization": "Bearer k-small"}
        assert (await found.error(CHAT, x_slo_class="chat", **small))[:3] == (403, "class_not_allowed", "x-slo-class")
        assert (await found.error(CHAT, x_slo_ttft_ms="1999", **small))[:3] == (403, "slo_not_allowed", "slo.ttft_ms")
        assert (await found.error(CHAT, x_slo_ttft_ms="2000", **small))[0] == 429


@pytest.mark.parametrize(
    ("reason", "status"),
    [("slo_infeasible", 429), ("overloaded", 429), ("no_instance_ready", 503)],
)
async def test_a_rejection_says_why(one: Site, reason: str, status: int) -> None:
    one.fleet.reject = Reject("", "", reason, "because", 2.0)  # type: ignore[arg-type]
    answer = await soon(one.post({**CHAT, "stream": True}))
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == reason
    assert answer.json()["error"]["message"] == "because"
    assert answer.headers["retry-after"] == "2"
    assert one.fleet.ended.empty()


async def test_an_engine_that_takes_text(tmp_path: Path) -> None:
    async with site(tmp_path, returns_token_ids=False) as found:
        body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}, "presence_penalty": 0.5}
        answer = found.post(body)
        stream = await found.stream()
        assert json.loads(stream.order.body) == body
        assert (stream.order.kind, stream.order.token_ids) == ("chat", b"")
        stream.say_text("hello ")
        stream.say_text("there")
        stream.finish("stop", prompt_tokens=11, output_tokens=7)
        chunks = events((await soon(answer)).text)
        assert "".join(c["choices"][0]["delta"]["content"] for c in chunks[:-1]) == "hello there"
        assert (chunks[-1]["usage"]["prompt_tokens"], chunks[-1]["usage"]["completion_tokens"]) == (11, 7)
        assert (await found.error({**CHAT, "tools": [{"type": "function"}]}))[2] == "tools"


async def test_models_health_ready_and_metrics(one: Site) -> None:
    models = (await one.client.get("/v1/models")).json()
    assert [(m["id"], m["object"], m["max_model_len"]) for m in models["data"]] == [("m", "model", 100)]
    assert (await one.client.get("/v1/models/m")).json()["id"] == "m"
    assert (await one.client.get("/health")).status_code == 200
    answer = one.post({**CHAT, "slo": {"ttft_ms": 60_000, "tpot_ms": 60_000}})
    (await one.stream()).say("abc", "stop")
    await soon(answer)
    one.fleet.reject = Reject("", "", "overloaded", "full", 1.0)
    await soon(one.post(CHAT))
    text = (await one.client.get("/metrics")).text
    labels = 'model="m",slo_class="chat"'
    for outcome in ("finished", "rejected"):
        assert f'hyperflexis_requests_total{{model="m",outcome="{outcome}",slo_class="chat"}} 1.0' in text
    for metric in ("slo_attained", "slo_ttft_attained", "slo_tpot_attained"):
        assert f"hyperflexis_{metric}_total{{{labels}}} 1.0" in text
    assert f"hyperflexis_generation_tokens_total{{{labels}}} 3.0" in text
    assert 'hyperflexis_http_errors_total{code="overloaded",status="429"} 1.0' in text
    assert "hyperflexis_controller_up 1.0" in text


async def test_ready_names_what_is_missing(tmp_path: Path) -> None:
    async with site(tmp_path, models={"m": None}) as found:
        found.fleet.send(wire.Fleet({"m": wire.ModelStatus([], 100, True)}, []))
        while (answer := await found.client.get("/ready")).status_code == 200:
            pass
        assert (answer.status_code, answer.json()["missing"]) == (503, ["m"])


async def test_open_requests_are_bounded(tmp_path: Path) -> None:
    async with site(tmp_path, limits=Limits(max_open_requests=2)) as found:
        found.fleet.to = ""
        waiting = [found.post(CHAT) for _ in range(2)]
        for _ in waiting:
            await soon(found.fleet.asked.get())
        answer = await soon(found.post(CHAT))
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "overloaded")
        assert answer.headers["retry-after"] == "1"
        for task in waiting:
            task.cancel()
        for _ in waiting:
            assert (await soon(found.fleet.ended.get())).outcome == "cancelled"
        found.fleet.to = "i0"
        answer2 = found.post(CHAT)
        (await found.stream()).say("x", "stop")
        assert (await soon(answer2)).status_code == 200


async def test_many_streams_at_once_do_not_mix(one: Site) -> None:
    answers: list[asyncio.Task[httpx.Response]] = []
    for number in range(50):
        message = {"role": "user", "content": f"<{number}>"}
        answers.append(one.post({**CHAT, "messages": [message], "stream": True}))
    streams = [await one.stream() for _ in answers]
    for step in range(3):
        for stream in streams:
            stream.say(
                stream.prompt[stream.prompt.index("<") : stream.prompt.index(">") + 1], "stop" if step == 2 else None
            )
    for number, answer in enumerate(answers):
        text = "".join(e["choices"][0]["delta"]["content"] for e in events((await soon(answer)).text))
        assert text == f"<{number}>" * 3
