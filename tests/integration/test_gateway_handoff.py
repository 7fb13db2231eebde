"""A request goes on at another instance with its KV, and its client notices nothing, whatever happens in between."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.integration.gateway_support import CHAT, LIMIT_S, Site, Stream, events, site, soon
from tests.integration.test_gateway_resume import STREAM, lose, text_of

from hyperflexis import wire
from hyperflexis.core.effects import Evacuate
from hyperflexis.core.events import HandoffFailed
from hyperflexis.core.links import KvSource


@pytest.fixture
async def three(tmp_path: Path) -> AsyncIterator[Site]:
    async with site(tmp_path, instances=3) as found:
        found.fleet.hands_over = True
        yield found


class Reading:
    """A streamed answer while it comes."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self.text = ""
        self._reader = reader

    async def until(self, text: str) -> None:
        """Its text so far is this."""
        while self.text != text:
            line = (await soon(self._reader.readline())).decode()
            assert line and "[DONE]" not in line, f"the answer ended with {self.text!r}"
            if line.startswith("data: {"):
                self.text += text_of([json.loads(line.removeprefix("data: "))])


@asynccontextmanager
async def reading(site: Site, body: Any) -> AsyncIterator[Reading]:
    reader, writer = await site.connect()
    content = json.dumps(body)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n"
    writer.write((head + content).encode())
    try:
        yield Reading(reader)
    finally:
        writer.close()


async def hand_over(site: Site, source: Stream, to: str = "i1") -> Stream:
    """Returns the stream at the instance that is to go on."""
    site.fleet.hand_over(source.order.request_id, source.instance.id, to, source.order.epoch)
    target = await site.stream()
    assert (target.instance.id, target.order.request_id) == (to, source.order.request_id)
    return target


async def taken_in(site: Site, instance: str) -> None:
    """The gateway has read all that the instance has said, and the controller too: another request went through."""
    before, site.fleet.to = site.fleet.to, instance
    answer = site.post(CHAT)
    stream = await site.stream()
    assert stream.instance.id == instance
    stream.say("x", "stop")
    assert (await soon(answer)).status_code == 200
    site.fleet.to = before


async def handoffs(site: Site) -> dict[str, float]:
    """What the metrics count."""
    text = (await site.client.get("/metrics")).text
    found = re.findall(r'^hyperflexis_handoffs_total\{model="m",outcome="(\w+)"\} (\S+)$', text, re.M)
    found += [("gaps", n) for n in re.findall(r"^hyperflexis_handoff_gap_seconds_count\{.*\} (\S+)$", text, re.M)]
    total_s = sum(float(n) for n in re.findall(r"^hyperflexis_handoff_gap_seconds_sum\{.*\} (\S+)$", text, re.M))
    assert 0.0 <= total_s < LIMIT_S
    return {name: float(value) for name, value in found}


async def test_a_prompt_is_computed_here_and_the_answer_there(three: Site) -> None:
    answer = three.post({**STREAM, "max_tokens": 10, "seed": 7, "temperature": 1.0})
    source = await three.stream()
    assert source.order.hands_over and source.order.kv is None
    target = await hand_over(three, source)
    order = target.order
    assert order.kv == KvSource("unix:kv-i0", "i0", 7)
    assert (order.epoch, order.value, order.expected_output_tokens) == (8, 3.0, 10.0)
    assert not order.hands_over
    assert (order.token_ids, order.sampling) == (source.order.token_ids, source.order.sampling)
    source.say("a", "handed")
    target.say("ab")
    target.say("c", "stop")
    found = await soon(answer)
    assert found.headers["x-hfx-instance"] == "i0", "that of its decision and of its predicted time"
    assert "a note" in found.headers["x-hfx-decision"]
    assert text_of(events(found.text)) == "abc"
    usage = events(found.text)[-1]["usage"]
    assert (usage["completion_tokens"], usage["prompt_tokens_details"]["cached_tokens"]) == (3, 1)
    ended = await soon(three.fleet.ended.get())
    assert (ended.outcome, ended.output_tokens) == ("finished", 3)
    assert three.fleet.asked.qsize() == 1, "the controller is not asked again"
    assert three.fleet.not_handed_over.empty() and three.fleet.cancels.empty()


async def test_those_that_are_not_to_be_handed_over_do_not_ask(three: Site) -> None:
    three.fleet.hands_over = False
    answer = three.post(CHAT)
    stream = await three.stream()
    assert not stream.order.hands_over
    stream.say("x", "stop")
    await soon(answer)


@pytest.mark.parametrize("first", ["source", "target"])
async def test_what_both_send_counts_once_whoever_is_first(three: Site, first: str) -> None:
    answer = three.post(STREAM)
    source = await three.stream()
    target = await hand_over(three, source)
    if first == "source":
        source.say("ab")
        source.say("c")
        source.finish("handed", output_tokens=3)
        await taken_in(three, "i0")
        target.say("abcd")
    else:
        target.say("abc")
        target.say("d")
        await taken_in(three, "i1")
        source.say("ab")
        source.say("c")
        source.finish("handed", output_tokens=3)
        await taken_in(three, "i0")
    target.say("e", "stop")
    found = events((await soon(answer)).text)
    assert text_of(found) == "abcde"
    assert found[-1]["usage"]["completion_tokens"] == 5
    gaps = {"gaps": 1.0} if first == "source" else {}  # else the client had nothing to wait after
    assert await handoffs(three) == {"handed": 1.0, **gaps}


async def test_a_request_that_decodes_already_goes_on_from_its_tokens(three: Site) -> None:
    slo = {"ttft_ms": 1000, "tpot_ms": 2000}
    async with reading(three, {**STREAM, "max_tokens": 50, "slo": slo}) as client:
        source = await three.stream()
        source.say("abc")
        await client.until("abc")
        target = await hand_over(three, source)
        assert target.prompt == source.prompt + "abc"
        assert target.order.sampling.max_tokens == 47
        # Three tokens came at once, so the fourth is due three times the pace after the first.
        assert target.order.pace_s == source.order.pace_s == 2.0
        assert target.order.first_due_s is not None and 5.0 < target.order.first_due_s <= 6.0
        source.say("d")
        await client.until("abcd")
        target.say("de")
        await client.until("abcde")
        source.finish("handed", output_tokens=4)
        target.say("f", "stop")
        await client.until("abcdef")
    ended = await soon(three.fleet.ended.get())
    assert (ended.outcome, ended.output_tokens) == ("finished", 6)
    assert await handoffs(three) == {"handed": 1.0, "gaps": 1.0}


async def test_the_order_counts_from_where_the_handoff_began(three: Site, tmp_path: Path) -> None:
    """The link to the other instance takes its time; meanwhile more tokens come."""
    frames, connected = wire.Framer(), asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]]()
    server = await asyncio.start_unix_server(lambda r, w: connected.put_nowait((r, w)), str(tmp_path / "late"))
    async with reading(three, {**STREAM, "max_tokens": 50}) as client:
        source = await three.stream()
        source.say("ab")
        await client.until("ab")
        id, late = source.order.request_id, f"unix:{tmp_path}/late"
        three.fleet.hand_over(id, "i0", "late", address=late)
        reader, writer = await soon(connected.get())
        source.say("cd")
        await client.until("abcd")
        writer.write(wire.encode(wire.Hello(wire.VERSION, "instance", "late")))
        found: list[Any] = []
        while not any(isinstance(message, wire.Generate) for message in found):
            found += frames.feed(await soon(reader.read(65536)))
        order = found[-1]
        assert bytes(wire.unpack_ids(order.token_ids)).decode() == source.prompt + "ab"
        assert order.sampling.max_tokens == 48
        writer.write(wire.encode(wire.Output([order.stream], [list(b"cde")])))
        await client.until("abcde")
        end = wire.Finish(order.stream, "stop", 4, 3)
        writer.write(wire.encode(wire.Output([], [], finished=[end])))
        assert (await soon(three.fleet.ended.get())).output_tokens == 5
    writer.close()
    server.close()


async def test_what_is_due_first_is_the_first_token_until_there_is_one(three: Site) -> None:
    answer = three.post({**STREAM, "slo": {"ttft_ms": 5000, "tpot_ms": 100}})
    source = await three.stream()
    target = await hand_over(three, source)
    assert target.order.first_due_s is not None and source.order.first_due_s is not None
    assert 4.0 < target.order.first_due_s <= source.order.first_due_s
    target.say("a", "stop")
    await soon(answer)


async def test_whole_answers_and_several_choices(three: Site) -> None:
    answer = three.post({**CHAT, "n": 2})
    sources = [await three.stream() for _ in range(2)]
    targets = [await hand_over(three, source, to) for source, to in zip(sources, ("i1", "i2"), strict=True)]
    for source, target, said in zip(sources, targets, ("one", "two"), strict=True):
        source.say(said, "handed")
        target.say(f"{said}!", "stop")
    found = await soon(answer)
    body = found.json()
    assert [choice["message"]["content"] for choice in body["choices"]] == ["one!", "two!"]
    assert body["usage"]["completion_tokens"] == 8
    assert found.headers["x-hfx-instance"] == "i0"


async def test_logprobs_stay_with_their_tokens(three: Site) -> None:
    answer = three.post({**STREAM, "logprobs": True})
    source = await three.stream()
    target = await hand_over(three, source)

    def entries(text: str) -> list[wire.TokenLogprob]:
        return [wire.TokenLogprob(byte, -byte / 100, []) for byte in text.encode()]

    source.say("ab", logprobs=entries("ab"))
    await taken_in(three, "i0")
    target.say("abcd", logprobs=entries("abcd"))
    await taken_in(three, "i1")
    source.say("cd", logprobs=entries("cd"))
    source.finish("handed", output_tokens=4)
    await taken_in(three, "i0")
    target.say("e", "stop", logprobs=entries("e"))
    found = [event for event in events((await soon(answer)).text) if event.get("choices")]
    content = [entry for event in found for entry in (event["choices"][0].get("logprobs") or {}).get("content", ())]
    assert "".join(entry["token"] for entry in content) == "abcde"
    assert [entry["logprob"] for entry in content] == [-byte / 100 for byte in b"abcde"]


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_stop_string_that_spans_both_ends_both(three: Site, streamed: bool) -> None:
    answer = three.post({**CHAT, "stream": streamed, "stop": "END"})
    source = await three.stream()
    target = await hand_over(three, source)
    source.say("one E")
    await taken_in(three, "i0")
    target.say("one END and what nobody sees")
    body = (await soon(answer)).text
    assert ("nobody" in body, "END" in body) == (False, False)
    cancels = {await soon(three.fleet.cancels.get()) for _ in range(2)}
    assert cancels == {("i0", source.order.stream), ("i1", target.order.stream)}
    ended = [await soon(three.fleet.ended.get()) for _ in range(2)]
    assert ended[-1].outcome == "finished"


async def test_a_client_that_leaves_cancels_both(three: Site) -> None:
    async with reading(three, STREAM) as client:
        source = await three.stream()
        target = await hand_over(three, source)
        source.say("a")
        await client.until("a")
    cancels = {await soon(three.fleet.cancels.get()) for _ in range(2)}
    assert cancels == {("i0", source.order.stream), ("i1", target.order.stream)}
    assert (await soon(three.fleet.ended.get())).outcome == "cancelled"


async def test_an_answer_that_ends_before_its_kv_has_left_is_whole(three: Site) -> None:
    answer = three.post(STREAM)
    source = await three.stream()
    target = await hand_over(three, source)
    source.say("abc", "stop")
    assert text_of(events((await soon(answer)).text)) == "abc"
    assert await soon(three.fleet.cancels.get()) == ("i1", target.order.stream)
    assert (await soon(three.fleet.ended.get())).output_tokens == 3
    target.finish("error")
    await taken_in(three, "i1")
    assert three.fleet.not_handed_over.empty() and await handoffs(three) == {}


async def test_an_answer_that_ends_there_is_cancelled_here(three: Site) -> None:
    answer = three.post(STREAM)
    source = await three.stream()
    target = await hand_over(three, source)
    target.say("abc", "stop")
    assert text_of(events((await soon(answer)).text)) == "abc"
    assert await soon(three.fleet.cancels.get()) == ("i0", source.order.stream)


async def test_an_answer_that_ends_there_with_what_was_sent_here(three: Site) -> None:
    answer = three.post(STREAM)
    source = await three.stream()
    target = await hand_over(three, source)
    source.say("abc", "handed")
    await taken_in(three, "i0")
    target.say("abc", "stop")
    found = events((await soon(answer)).text)
    assert text_of(found) == "abc"
    assert found[-1]["usage"]["completion_tokens"] == 3
    assert (await handoffs(three))["handed"] == 1.0


@pytest.mark.parametrize("how", ["refused", "error", "invalid", "breaks", "dead", "says too much", "evacuated"])
async def test_a_target_that_cannot_have_it_leaves_it_where_it_was(three: Site, how: str) -> None:
    answer = three.post({**STREAM, "max_tokens": 4})
    source = await three.stream()
    if how == "dead":
        three.fleet.instances["i1"].die()
        three.fleet.hand_over(source.order.request_id, "i0", "i1")
    else:
        target = await hand_over(three, source)
        match how:
            case "breaks":
                lose(target)
            case "says too much":
                target.say("abcde")
                assert await soon(three.fleet.cancels.get()) == ("i1", target.order.stream)
            case "evacuated":
                three.fleet.send(Evacuate("i1", 8, "it is slow", failed=True))
                assert await soon(three.fleet.cancels.get()) == ("i1", target.order.stream)
            case reason:
                target.finish(reason)
    failed: HandoffFailed = await soon(three.fleet.not_handed_over.get())
    assert (failed.id, failed.instance, failed.epoch) == (source.order.request_id, "i0", 7)
    assert failed.reason
    source.say("ab")
    again = await hand_over(three, source, "i2")
    assert again.order.kv == KvSource("unix:kv-i0", "i0", 7)
    source.say("c", "handed")
    again.say(("abc" if again.prompt == source.prompt else "c") + "d", "stop")
    found = events((await soon(answer)).text)
    assert text_of(found) == "abcd"
    assert found[-1]["usage"]["completion_tokens"] == 4
    assert three.fleet.asked.qsize() == 1
    assert (await handoffs(three))["failed"] == 1.0


async def test_a_source_that_dies_once_the_other_has_it_is_not_missed(three: Site) -> None:
    answer = three.post(STREAM)
    source = await three.stream()
    target = await hand_over(three, source)
    source.say("a")
    await taken_in(three, "i0")
    target.say("ab")
    await taken_in(three, "i1")
    lose(source)
    target.say("c", "stop")
    assert text_of(events((await soon(answer)).text)) == "abc"
    assert three.fleet.not_handed_over.empty()
    asked = {(await soon(three.fleet.asked.get())).attempt for _ in range(three.fleet.asked.qsize())}
    assert asked == {0}
    assert (await handoffs(three))["handed"] == 1.0


@pytest.mark.parametrize("first", ["source", "target"])
async def test_when_both_are_lost_it_goes_on_at_a_third_from_its_tokens(three: Site, first: str) -> None:
    three.fleet.to_when_avoided = "i2"
    answer = three.post({**STREAM, "max_tokens": 10})
    source = await three.stream()
    target = await hand_over(three, source)
    source.say("abc")
    if first == "source":
        lose(source)
        await taken_in(three, "i2")
        assert three.fleet.asked.qsize() == 2, "nothing to ask while the other may have it"
        three.fleet.to = "i1"  # which is to be avoided
        target.finish("error")
    else:
        target.finish("error")
        await soon(three.fleet.not_handed_over.get())
        lose(source)
    third = await three.stream()
    assert (third.instance.id, third.prompt) == ("i2", source.prompt + "abc")
    assert third.order.kv is None and third.order.hands_over
    third.say("de", "stop")
    found = events((await soon(answer)).text)
    assert text_of(found) == "abcde"
    assert found[-1]["usage"]["completion_tokens"] == 5
    asked = [await soon(three.fleet.asked.get()) for _ in range(three.fleet.asked.qsize())]
    assert (asked[-1].sent.num_tokens, asked[-1].avoid) == (3, "i1" if first == "source" else "i0")
    assert await handoffs(three) == {"failed": 1.0}


async def test_handed_over_to_one_that_is_lost(three: Site) -> None:
    """It had the KV, and its failure is heard of before the other's farewell."""
    three.fleet.to, three.fleet.to_when_avoided = "i0", "i2"
    answer = three.post(STREAM)
    source = await three.stream()
    target = await hand_over(three, source)
    target.say("ab")
    await taken_in(three, "i1")
    lose(target)
    assert (await soon(three.fleet.not_handed_over.get())).instance == "i0"
    three.fleet.to = "i1"
    source.finish("handed")
    third = await three.stream()
    assert (third.instance.id, third.prompt) == ("i2", source.prompt + "ab")
    third.say("c", "stop")
    assert text_of(events((await soon(answer)).text)) == "abc"
    assert await handoffs(three) == {"handed": 1.0}


async def test_an_order_that_comes_too_late_is_ignored(three: Site) -> None:
    answer = three.post(STREAM)
    source = await three.stream()
    source.say("a")
    lose(source)
    resumed = await three.stream()
    assert resumed.instance.id == "i1"
    id = source.order.request_id
    three.fleet.hand_over(id, "i0", "i2")
    three.fleet.hand_over(id, "i1", "i2", source_epoch=6)
    await taken_in(three, "i2")
    resumed.say("b", "stop")
    assert text_of(events((await soon(answer)).text)) == "ab"
    three.fleet.hand_over(id, "i1", "i2")
    await taken_in(three, "i2")
    assert three.fleet.not_handed_over.empty() and three.fleet.streams.empty()


async def test_one_at_a_time(three: Site) -> None:
    """An order to hand on what has not quite arrived is answered: the controller believes that it was carried out."""
    answer = three.post(STREAM)
    source = await three.stream()
    target = await hand_over(three, source)
    target.say("ab")
    three.fleet.hand_over(source.order.request_id, "i1", "i2", source_epoch=8)
    failed = await soon(three.fleet.not_handed_over.get())
    assert (failed.instance, failed.epoch) == ("i1", 8)
    source.finish("handed")
    await taken_in(three, "i0")
    await taken_in(three, "i1")
    third = await hand_over(three, target, "i2")
    assert third.order.kv == KvSource("unix:kv-i1", "i1", 8)
    assert third.prompt == source.prompt + "ab"
    target.say("c", "handed")
    third.say("cd", "stop")
    found = events((await soon(answer)).text)
    assert text_of(found) == "abcd"
    assert found[-1]["usage"]["completion_tokens"] == 4
    assert (await handoffs(three))["handed"] == 2.0


async def test_a_new_controller_hears_where_a_request_is_now(three: Site) -> None:
    async with reading(three, {**STREAM, "max_tokens": 50}) as client:
        source = await three.stream()
        source.say("abc")
        await client.until("abc")
        target = await hand_over(three, source)
        source.say("de")
        await client.until("abcde")
        (opened,) = await restart_controller(three, term=2)
        assert (opened.instance, opened.epoch, opened.output_tokens, opened.sent) == ("i1", 8, 5, None)
        assert target.order.reported_before == 3, "so that its reports count from where the controller does"
        prompt = len(source.prompt)
        assert (opened.request.num_prompt_tokens, opened.request.max_output_tokens) == (prompt, 50)
        target.finish("error")
        assert (await soon(three.fleet.not_handed_over.get())).instance == "i0"
        (opened,) = await restart_controller(three, term=3)
        assert (opened.instance, opened.epoch, opened.output_tokens, opened.sent) == ("i0", 7, 5, None)
        assert (opened.request.num_prompt_tokens, opened.request.max_output_tokens) == (prompt, 50)
        source.say("f", "stop")
        await client.until("abcdef")
    assert (await soon(three.fleet.ended.get())).output_tokens == 6


async def restart_controller(site: Site, term: int) -> tuple[Any, ...]:
    """Returns what the new one is told."""
    site.fleet.stop_controller()
    while not site.fleet.joined.empty():
        site.fleet.joined.get_nowait()
    site.fleet.term = term
    await site.fleet.start()
    found: tuple[Any, ...] = (await soon(site.fleet.joined.get())).open
    return found


async def test_engines_without_token_ids_hand_nothing_over(tmp_path: Path) -> None:
    async with site(tmp_path, instances=2, returns_token_ids=False) as found:
        answer = found.post(STREAM)
        stream = await found.stream()
        stream.say_text("ab")
        found.fleet.hand_over(stream.order.request_id, "i0", "i1")
        assert (await soon(found.fleet.not_handed_over.get())).instance == "i0"
        stream.say_text("c")
        stream.finish("stop", output_tokens=3)
        assert text_of(events((await soon(answer)).text)) == "abc"
        assert found.fleet.streams.empty()
