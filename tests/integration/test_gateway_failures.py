"""Instances and controllers that refuse, die, hang or talk nonsense; clients that leave; gateways that stop."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.integration.gateway_support import CHAT, Fleet, Site, events, site, soon

from hyperflexis import wire
from hyperflexis.gateway.config import Limits

STREAM = {**CHAT, "stream": True}


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[Site]:
    async with site(tmp_path, instances=2) as found:
        yield found


async def test_a_refusal_is_asked_for_again_elsewhere(two: Site) -> None:
    answer = two.post(STREAM)
    (await two.stream()).finish("refused")
    stream = await two.stream()
    assert stream.instance.id == "i1"
    first, again = await soon(two.fleet.asked.get()), await soon(two.fleet.asked.get())
    assert (first.attempt, first.avoid) == (0, None)
    assert (again.attempt, again.avoid) == (1, "i0")
    assert again.request == first.request and again.age_s > first.age_s
    stream.say("ok", "stop")
    assert (await soon(answer)).headers["x-hfx-instance"] == "i1"


@pytest.mark.parametrize("body", [CHAT, STREAM])
async def test_an_instance_killed_before_the_first_token_costs_only_an_attempt(two: Site, body: dict[str, str]) -> None:
    answer = two.post(body)
    await two.stream()
    two.fleet.instances["i0"].die()
    (await two.stream()).say("ok", "stop")
    found = await soon(answer)
    assert (found.status_code, "ok" in found.text) == (200, True)
    assert (await soon(two.fleet.ended.get())).outcome == "finished"
    assert "hyperflexis_redispatched_total" in (await two.client.get("/metrics")).text


async def test_attempts_are_bounded(two: Site) -> None:
    two.fleet.to_when_avoided = "i0"
    answer = two.post(CHAT)
    for _ in range(3):
        (await two.stream()).finish("refused")
    found = await soon(answer)
    assert (found.status_code, found.json()["error"]["code"]) == (503, "attempts_exhausted")
    assert [(await soon(two.fleet.asked.get())).attempt for _ in range(3)] == [0, 1, 2]
    assert two.fleet.asked.empty()


async def test_an_instance_that_is_not_there_or_not_who_it_should_be(two: Site, tmp_path: Path) -> None:
    two.fleet.instances["i0"].address = f"unix:{tmp_path}/nobody"
    answer = two.post(CHAT)
    (await two.stream()).say("ok", "stop")
    assert (await soon(answer)).headers["x-hfx-instance"] == "i1"
    two.fleet.instances["i0"].address = two.fleet.instances["i1"].address
    two.fleet.instances["i1"]._links[-1].close("so that a new link is made")
    await two.wait_ready()
    answer = two.post(CHAT)
    (await two.stream()).say("ok", "stop")
    assert (await soon(answer)).headers["x-hfx-instance"] == "i1"


async def test_a_request_that_no_engine_can_serve_is_the_clients_fault_and_not_tried_again(two: Site) -> None:
    answer = two.post(CHAT)
    (await two.stream()).finish("invalid")
    found = await soon(answer)
    assert (found.status_code, found.json()["error"]["code"]) == (400, "invalid_request")
    assert (await soon(two.fleet.asked.get())).attempt == 0
    assert two.fleet.asked.empty()


async def test_an_engines_error_is_tried_elsewhere_and_then_told(two: Site) -> None:
    answer = two.post(STREAM)
    for _ in range(3):
        (await two.stream()).finish("error")
    found = await soon(answer)
    assert (found.status_code, found.json()["error"]["code"]) == (503, "attempts_exhausted")
    assert "a reason" in found.json()["error"]["message"]
    assert two.fleet.asked.qsize() == 3


async def test_tokens_that_cannot_be_read_end_one_stream_only(two: Site) -> None:
    bad = two.post(CHAT)
    bad_stream = await two.stream()
    good = two.post(CHAT)
    good_stream = await two.stream()
    two.fleet.to_when_avoided = "i0"
    bad_stream.instance.send(wire.Output([bad_stream.order.stream], []))
    assert (await soon(two.fleet.cancels.get())) == ("i0", bad_stream.order.stream)
    good_stream.say("fine", "stop")
    assert "fine" in (await soon(good)).text
    (await two.stream()).say("again", "stop")
    assert "again" in (await soon(bad)).text


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_client_that_leaves_cancels(two: Site, streamed: bool) -> None:
    reader, writer = await two.connect()
    content = json.dumps({**CHAT, "stream": streamed, "n": 2}).encode()
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(content) + content)
    streams = [await two.stream() for _ in range(2)]
    if streamed:
        streams[0].say("a")
        await soon(reader.readuntil(b'"a"'))
    writer.close()
    cancelled = {await soon(two.fleet.cancels.get()) for _ in streams}
    assert cancelled == {("i0", s.order.stream) for s in streams}
    assert {(await soon(two.fleet.ended.get())).outcome for _ in streams} == {"cancelled"}


async def test_a_client_that_leaves_before_the_decision(two: Site) -> None:
    two.fleet.to = ""
    answer = two.post(CHAT)
    asked = await soon(two.fleet.asked.get())
    answer.cancel()
    ended = await soon(two.fleet.ended.get())
    assert (ended.id, ended.outcome, ended.ttft_s) == (asked.request.id, "cancelled", None)
    two.fleet.dispatch(ended.id, "i0")  # crossed with the news
    two.fleet.to = "i0"
    later = two.post(CHAT)
    stream = await two.stream()
    assert stream.order.request_id != ended.id
    stream.say("x", "stop")
    await soon(later)


async def test_streams_outlive_the_controller_and_are_told_to_the_next(two: Site) -> None:
    running = two.post(STREAM)
    stream = await two.stream()
    stream.say("a")
    two.fleet.to = ""
    undecided = two.post(CHAT)
    await soon(two.fleet.asked.get())
    asked = await soon(two.fleet.asked.get())
    await soon(two.fleet.joined.get())

    two.fleet.stop_controller()
    while (await two.client.get("/ready")).status_code == 200:
        pass
    waiting = two.post(CHAT)
    stream.say("b")
    two.fleet.to, two.fleet.term = "i1", 2
    await two.fleet.start()

    joined = await soon(two.fleet.joined.get())
    assert [(o.request.id, o.instance, o.epoch, o.output_tokens) for o in joined.open] == [
        (stream.order.request_id, "i0", 7, 2)
    ]
    again = [await soon(two.fleet.asked.get()) for _ in range(2)]
    assert asked.request.id in {a.request.id for a in again}
    for _ in range(2):
        (await two.stream()).say("x", "stop")
    assert (await soon(undecided)).status_code == (await soon(waiting)).status_code == 200
    stream.say("c", "stop")
    assert "".join(e["choices"][0]["delta"]["content"] for e in events((await soon(running)).text)) == "abc"


async def test_a_controller_of_an_older_term_is_refused(two: Site) -> None:
    two.fleet.stop_controller()
    two.fleet.term = 5
    await two.fleet.start()
    await two.wait_ready()
    while two.fleet.joined.qsize() < 2:
        await two.client.get("/health")
    two.fleet.stop_controller()
    two.fleet.term = 4
    await two.fleet.start()
    links = []
    two.fleet.link_lost = lambda link, reason: links.append(reason)  # type: ignore[method-assign]
    while not links:
        await two.client.get("/health")
    assert two.fleet.joined.qsize() == 2


async def test_the_wait_for_a_controller_is_bounded_in_time_and_number(tmp_path: Path) -> None:
    limits = Limits(controller_wait_s=0.3, max_waiting_requests=1, shutdown_grace_s=0.0)
    async with site(tmp_path, limits=limits) as found:
        found.fleet.stop_controller()
        while (await found.client.get("/ready")).status_code == 200:
            pass
        waiting = found.post(CHAT)
        while "hyperflexis_requests_open 1.0" not in (await found.client.get("/metrics")).text:
            pass
        over = await soon(found.post(CHAT))
        late = await soon(waiting)
        for answer in (over, late):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "controller_unavailable")
            assert answer.headers["retry-after"] == "2"


async def test_stopping_cuts_open_streams_with_an_error_event(two: Site) -> None:
    streaming = two.post(STREAM)
    stream = await two.stream()
    waiting = two.post(CHAT)
    await two.stream()
    stream.say("a")
    while two.fleet.asked.qsize() < 2:
        await two.client.get("/health")
    await soon(two.gateway.http.stop(0.0, two.gateway.cut))
    found = await soon(streaming)
    assert events(found.text)[-1]["error"]["code"] == "shutting_down"
    assert ((await soon(waiting)).status_code, (await soon(waiting)).headers["connection"]) == (503, "close")
    with pytest.raises(OSError):
        await two.connect()


PROCESS = """
import sys
import uvloop
from hyperflexis.errors import HyperFlexisError
from hyperflexis.gateway.config import GatewayConfig, Limits
from hyperflexis.gateway.server import serve
config = GatewayConfig("g", sys.argv[1], {"m": None}, port=int(sys.argv[2]))
try:
    uvloop.run(serve(config, on_ready=lambda port: print(port, flush=True)))
except HyperFlexisError as error:
    print(error, flush=True)
    sys.exit(3)
"""


async def test_a_process_finishes_its_streams_on_sigterm_and_a_taken_port_is_named(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, 1, True, 100)
    await fleet.start_all()

    def start(port: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", PROCESS, fleet.address, str(port)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": "src"},
        )

    process = start(0)
    try:
        assert process.stdout is not None
        port = int(await soon(asyncio.to_thread(process.stdout.readline)))
        second = start(port)
        out, _ = await soon(asyncio.to_thread(second.communicate))
        assert second.returncode == 3
        assert f"127.0.0.1:{port}" in out and "listen" in out

        await soon(fleet.joined.get())
        content = json.dumps(STREAM).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(content)
        while True:  # 503 until the gateway has read the first Fleet
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head + content)
            fetch = asyncio.create_task(fleet.streams.get())
            first = asyncio.create_task(reader.readuntil(b"\r\n"))
            done, _ = await asyncio.wait({fetch, first}, timeout=10, return_when=asyncio.FIRST_COMPLETED)
            if fetch in done:
                break
            fetch.cancel()
        stream = fetch.result()
        stream.say("a")
        await soon(first)
        process.send_signal(signal.SIGTERM)
        while True:  # until nobody listens any more
            try:
                (await asyncio.open_connection("127.0.0.1", port))[1].close()
            except OSError:
                break
        stream.say("b", "stop")
        rest = await soon(reader.read())
        assert b'"b"' in rest and rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert await soon(asyncio.to_thread(process.wait)) == 0
    finally:
        process.kill()
        process.wait()
        fleet.stop_all()
