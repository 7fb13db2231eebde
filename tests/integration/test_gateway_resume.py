"""Streams go on elsewhere from the tokens that their clients have."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.gateway_support import CHAT, Site, Stream, events, site, soon

from hyperflexis import wire
from hyperflexis.core.stream import Sent
from hyperflexis.gateway.config import Limits

STREAM: dict[str, Any] = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[Site]:
    async with site(tmp_path, instances=2) as found:
        yield found


def text_of(found: list[Any]) -> str:
    return "".join(e["choices"][0]["delta"].get("content", "") for e in found if e.get("choices"))


def lose(stream: Stream) -> None:
    """Its link ends; what it had sent arrives first."""
    stream.instance._links[-1].close("killed")


async def test_a_stream_goes_on_where_it_was(two: Site) -> None:
    answer = two.post({**STREAM, "max_tokens": 10, "seed": 7, "temperature": 1.0})
    first = await two.stream()
    first.say("abc")
    lose(first)
    second = await two.stream()
    assert second.instance.id == "i1"
    assert second.prompt == first.prompt + "abc"
    assert second.order.sampling.max_tokens == 7
    assert second.order.sampling.seed == first.order.sampling.seed == 7
    asked = [await soon(two.fleet.asked.get()) for _ in range(2)]
    assert asked[1].request.num_prompt_tokens == asked[0].request.num_prompt_tokens + 3
    assert asked[1].request.max_output_tokens == 7
    assert (asked[1].attempt, asked[1].avoid) == (1, "i0")
    assert isinstance(asked[1].sent, Sent) and asked[1].sent.num_tokens == 3
    second.say("de", "stop")
    found = events((await soon(answer)).text)
    assert text_of(found) == "abcde"
    usage = found[-1]["usage"]
    assert usage["completion_tokens"] == 5
    assert usage["prompt_tokens"] == asked[0].request.num_prompt_tokens
    ended = await soon(two.fleet.ended.get())
    assert (ended.outcome, ended.output_tokens) == ("finished", 5)


async def test_what_is_due_next_follows_from_the_first_token(two: Site) -> None:
    answer = two.post({**STREAM, "max_tokens": 100, "slo": {"ttft_ms": 1000, "tpot_ms": 2000}})
    first = await two.stream()
    assert first.order.first_due_s is not None and first.order.first_due_s <= 1.0
    first.say("abc")
    lose(first)
    second = await two.stream()
    assert second.order.pace_s == first.order.pace_s
    # Three tokens came at once, so the fourth is due three times the pace after the first.
    assert second.order.first_due_s is not None and second.order.pace_s is not None
    assert 2.5 * second.order.pace_s < second.order.first_due_s <= 3.0 * second.order.pace_s
    second.say("d", "stop")
    await soon(answer)


async def test_whole_answers_and_several_choices_go_on_too(two: Site) -> None:
    answer = two.post({**CHAT, "n": 2, "stop": "END"})
    first = [await two.stream() for _ in range(2)]
    for stream, said in zip(first, ("one E", "two"), strict=True):
        stream.say(said)
    lose(first[0])
    second = [await two.stream() for _ in range(2)]
    by_id = {stream.order.request_id: stream for stream in second}
    by_id[first[0].order.request_id].say("ND and what nobody sees")  # the stop string spans both instances
    by_id[first[1].order.request_id].say("!", "stop")
    body = (await soon(answer)).json()
    assert [c["message"]["content"] for c in body["choices"]] == ["one ", "two!"]
    assert [c["finish_reason"] for c in body["choices"]] == ["stop", "stop"]


async def test_characters_and_logprobs_that_span_instances(two: Site) -> None:
    answer = two.post({**STREAM, "logprobs": True})
    first = await two.stream()
    whole = "é".encode()
    first.say_ids([whole[0]], logprobs=[wire.TokenLogprob(whole[0], -0.5, [])])
    lose(first)
    second = await two.stream()
    second.say_ids([whole[1]], "stop", logprobs=[wire.TokenLogprob(whole[1], -0.25, [])])
    found = events((await soon(answer)).text)
    assert text_of(found) == "é"
    logprobs = [
        entry["logprob"]
        for event in found
        if event.get("choices") and event["choices"][0].get("logprobs")
        for entry in event["choices"][0]["logprobs"]["content"]
    ]
    assert logprobs == [-0.5, -0.25]


async def test_an_instance_lost_after_the_last_token_needs_no_other(two: Site) -> None:
    answer = two.post({**STREAM, "max_tokens": 3})
    first = await two.stream()
    first.say("abc")
    lose(first)
    found = events((await soon(answer)).text)
    assert text_of(found) == "abc"
    assert [e["choices"][0]["finish_reason"] for e in found if e.get("choices")][-1] == "length"
    assert two.fleet.asked.qsize() == 1


async def test_failures_are_bounded_and_end_in_one_error(two: Site) -> None:
    answer = two.post(STREAM)
    for said in "abc":
        stream = await two.stream()
        two.fleet.to, two.fleet.to_when_avoided = two.fleet.to_when_avoided, two.fleet.to
        stream.say(said)
        lose(stream)
    found = events((await soon(answer)).text)
    assert text_of(found[:-1]) == "abc"
    assert found[-1]["error"]["code"] == "attempts_exhausted"
    assert (await soon(two.fleet.ended.get())).outcome == "failed"
    assert two.fleet.asked.qsize() == 3


async def test_the_wait_for_another_instance_is_bounded(tmp_path: Path) -> None:
    async with site(tmp_path, limits=Limits(resume_wait_s=0.2, shutdown_grace_s=0.0)) as found:
        answer = found.post(STREAM)
        stream = await found.stream()
        stream.say("abc")
        found.fleet.to = ""
        lose(stream)
        error = events((await soon(answer)).text)[-1]["error"]
        assert error["code"] == "no_instance_ready" and "0.2 s" in error["message"]


async def test_a_request_waits_for_the_first_instance_of_its_model(tmp_path: Path) -> None:
    limits = Limits(controller_wait_s=0.1, start_wait_s=10.0, shutdown_grace_s=0.0)
    async with site(tmp_path, limits=limits) as found:
        status = found.fleet.models["m"]
        found.fleet.models = {"m": wire.ModelStatus([], status.context_length, True, holds=True)}
        found.fleet.send(wire.Fleet(found.fleet.models, []))
        while 'hyperflexis_instances_ready{model="m"} 0' not in (await found.client.get("/metrics")).text:
            pass
        assert (await found.client.get("/ready")).status_code == 200, "it takes requests"
        found.fleet.to = ""
        answer = found.post(STREAM)
        request = (await soon(found.fleet.asked.get())).request
        patient, _ = await asyncio.wait({answer}, timeout=0.5)
        assert not patient, "longer than for a controller that is away"
        found.fleet.dispatch(request.id, "i0")
        (await found.stream()).say("abc", "stop")
        assert text_of(events((await soon(answer)).text)) == "abc"


async def test_the_wait_for_the_first_instance_is_bounded(tmp_path: Path) -> None:
    async with site(tmp_path, limits=Limits(start_wait_s=0.1, shutdown_grace_s=0.0)) as found:
        status = found.fleet.models["m"]
        found.fleet.to = ""
        found.fleet.send(wire.Fleet({"m": wire.ModelStatus([], status.context_length, True, holds=True)}, []))
        status_code, code, _, message = await found.error(STREAM)
        assert (status_code, code) == (503, "no_instance_ready") and "within 0.1 s" in message


async def test_a_new_controller_hears_from_where_a_stream_went_on(two: Site) -> None:
    answer = two.post(STREAM)
    first = await two.stream()
    first.say("abc")
    lose(first)
    second = await two.stream()
    two.fleet.stop_controller()
    second.say("de")
    two.fleet.term = 2
    await soon(two.fleet.joined.get())
    await two.fleet.start()
    (opened,) = (await soon(two.fleet.joined.get())).open
    assert (opened.instance, opened.output_tokens, opened.sent.num_tokens) == ("i1", 2, 3)
    second.say("f", "stop")
    assert text_of(events((await soon(answer)).text)) == "abcdef"


async def test_without_token_ids_the_new_answer_must_repeat_the_old(tmp_path: Path) -> None:
    async with site(tmp_path, instances=2, returns_token_ids=False) as found:
        for said, ends in (("abcdef", None), ("abX", "instance_lost")):
            answer = found.post(STREAM)
            first = await found.stream()
            first.say_text("ab")
            first.say_text("c")
            lose(first)
            second = await found.stream()
            assert second.order.token_ids == first.order.token_ids
            second.say_text(said[:2])
            second.say_text(said[2:])
            if ends is None:
                second.finish("stop", output_tokens=6)
            events_found = events((await soon(answer)).text)
            if ends is None:
                assert text_of(events_found) == "abcdef"
                assert events_found[-1]["usage"]["completion_tokens"] == 6
            else:
                assert text_of(events_found[:-1]) == "abc"
                assert events_found[-1]["error"]["code"] == ends
