"""What clients get wrong, and what they do to a gateway on purpose; all through the socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.gateway_support import CHAT, CLASSES, Site, site, soon

from hyperflexis.fd_limit import raise_fd_limit
from hyperflexis.gateway.config import Limits

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
LONG = 1 << 30
COMPLETION = {"model": "m", "prompt": "hi"}


@pytest.fixture
async def one(tmp_path: Path) -> AsyncIterator[Site]:
    async with site(tmp_path, classes=CLASSES) as found:
        yield found


def framed(body: Any, head: bytes = HEAD) -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return head + b"content-length: %d\r\n\r\n" % len(content) + content


@pytest.mark.parametrize(
    ("change", "status", "param", "code"),
    [
        ({"model": "nope"}, 404, "model", "model_not_found"),
        ({"messages": []}, 400, "messages", None),
        ({"messages": [{"role": "king", "content": "hi"}]}, 400, "messages[0].role", None),
        ({"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content", None),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            400,
            "messages[0].content[0]",
            "unsupported_parameter",
        ),
        ({"messages": [{"role": "user", "content": "x" * 100}]}, 400, "messages", "context_length_exceeded"),
        ({"temperature": -1}, 400, "temperature", None),
        ({"temperature": "hot"}, 400, "temperature", None),
        ({"top_p": 0}, 400, "top_p", None),
        ({"max_tokens": 0}, 400, "max_tokens", None),
        ({"max_completion_tokens": 1.5}, 400, "max_completion_tokens", None),
        ({"n": 129}, 400, "n", None),
        ({"stop": ["a"] * 5}, 400, "stop", None),
        ({"stop": ""}, 400, "stop", None),
        ({"stop": "x" * 257}, 400, "stop", None),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", None),
        ({"top_logprobs": 2}, 400, "top_logprobs", None),
        ({"stream": "yes"}, 400, "stream", None),
        ({"tools": [{"type": "function"}]}, 400, "tools", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", "unsupported_parameter"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias", "unsupported_parameter"),
        ({"frequency_penalty": 0.1}, 400, "frequency_penalty", "unsupported_parameter"),
        ({"audio": {"voice": "alloy"}}, 400, "audio", "unsupported_parameter"),
        ({"slo": {"ttft_ms": -5}}, 400, "slo.ttft_ms", None),
        ({"slo": {"ttft_ms": "soon"}}, 400, "slo.ttft_ms", None),
        ({"slo": {"ttft": 5}}, 400, "slo.ttft", None),
        ({"slo": {"class": "gold"}}, 400, "slo.class", "unknown_class"),
        ({"service_tier": "gold"}, 400, "service_tier", "invalid_slo"),
    ],
)
async def test_a_bad_field_is_named(one: Site, change: dict[str, Any], status: int, param: str, code: str) -> None:
    found = await one.error({**CHAT, **change})
    assert found[:3] == (status, code, param)
    assert found[3].startswith(param.split("[")[0]) or code in ("model_not_found", "context_length_exceeded")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [256]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a"] * 129}, "n"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": 6}, "logprobs"),
    ],
)
async def test_a_bad_field_of_completions_is_named(one: Site, change: dict[str, Any], param: str) -> None:
    found = await one.error({**COMPLETION, **change}, "/v1/completions")
    assert (found[0], found[2]) == (400, param)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-slo-ttft-ms", "-1"),
        ("x-slo-ttft-ms", "0"),
        ("x-slo-tpot-ms", "nan"),
        ("x-slo-e2e-ms", "inf"),
        ("x-slo-e2e-ms", "fast"),
        ("x-llm-d-slo-tpot-ms", "-3"),
        ("x-slo-class", "gold"),
        ("x-slo-fail-fast", "perhaps"),
    ],
)
async def test_a_bad_header_is_named(one: Site, name: str, value: str) -> None:
    found = await one.error(CHAT, **{name.replace("-", "_"): value})
    assert (found[0], found[2]) == (400, name)


@pytest.mark.parametrize("body", [b"{", b"", b"[1]", b"\xff", b'{"model": NaN}', b'{"metadata":' + b"[" * 100_000])
async def test_a_body_that_is_no_json_object(one: Site, body: bytes) -> None:
    assert (await one.error(body))[0] == 400


async def test_fields_that_change_nothing_are_ignored(one: Site) -> None:
    body = {**CHAT, "user": "u", "metadata": {"a": "b"}, "store": False, "priority": 7, "seed": None, "logit_bias": {}}
    answer = one.post({**body, "tools": [{"type": "function"}], "tool_choice": "none", "frequency_penalty": 0})
    (await one.stream()).say("x", "stop")
    assert (await soon(answer)).status_code == 200


async def test_a_long_body_is_read_in_a_thread_with_the_same_errors(one: Site) -> None:
    padded = {**CHAT, "user": "x" * 100_000}
    assert (await one.error({**padded, "temperature": 9}))[:3] == (400, None, "temperature")
    answer = one.post(padded)
    (await one.stream()).say("x", "stop")
    assert (await soon(answer)).status_code == 200


async def test_paths_and_methods(one: Site) -> None:
    assert (await one.client.get("/v1/nothing")).status_code == 404
    assert (await one.client.get("/v1/models/nothing")).json()["error"]["code"] == "model_not_found"
    found = await one.client.get("/v1/completions")
    assert (found.status_code, found.json()["error"]["code"]) == (405, "method_not_allowed")
    head = await one.client.head("/health")
    assert (head.status_code, head.content) == (200, b"")


async def test_an_insane_request_id_is_not_passed_on(one: Site) -> None:
    answer = await soon(one.post({}, x_request_id="a b\tc"))
    assert answer.headers["x-request-id"].startswith("g-")


async def test_a_body_of_100_mb_is_refused_before_it_is_sent(one: Site) -> None:
    reader, writer = await one.connect()
    writer.write(HEAD + b"content-length: 104857600\r\n\r\n")
    head = await soon(reader.readuntil(b"\r\n\r\n"))
    assert b" 413 " in head and b"connection: close" in head
    assert json.loads(await soon(reader.read()))["error"]["code"] == "body_too_large"


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_of_100_mb_that_is_sent_all_the_same(one: Site, chunked: bool) -> None:
    _reader, writer = await one.connect()
    block = b"x" * (1 << 20)
    writer.write(HEAD + (b"transfer-encoding: chunked\r\n\r\n" if chunked else b"content-length: 104857600\r\n\r\n"))
    sent = 0
    try:
        for _ in range(100):
            writer.write(b"100000\r\n" + block + b"\r\n" if chunked else block)
            await soon(writer.drain())
            sent += 1
    except OSError:
        pass
    # Nothing like the whole was taken in: the limit, what lingers, and the buffers of two sockets.
    assert sent < 50
    assert (await one.client.get("/health")).status_code == 200


async def test_a_chunked_body_and_100_continue(one: Site) -> None:
    reader, writer = await one.connect()
    content = json.dumps(CHAT).encode()
    writer.write(HEAD + b"expect: 100-continue\r\ntransfer-encoding: chunked\r\n\r\n")
    assert await soon(reader.readuntil(b"\r\n\r\n")) == b"HTTP/1.1 100 Continue\r\n\r\n"
    for at in range(0, len(content), 10):
        piece = content[at : at + 10]
        writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
    writer.write(b"0\r\n\r\n")
    (await one.stream()).say("x", "stop")
    assert b" 200 OK" in await soon(reader.readuntil(b"\r\n\r\n"))


async def test_requests_sent_ahead_are_answered_in_order(one: Site) -> None:
    reader, writer = await one.connect()
    writer.write(framed(CHAT) + b"GET /health HTTP/1.1\r\n\r\nGET /v1/models/m HTTP/1.1\r\nconnection: close\r\n\r\n")
    (await one.stream()).say("first", "stop")
    found = (await soon(reader.read())).decode()
    assert found.index("first") < found.index('"ok"') < found.index('"id":"m"')


async def test_too_many_requests_sent_ahead_end_the_connection(one: Site) -> None:
    reader, writer = await one.connect()
    writer.write(framed(CHAT))
    stream = await one.stream()
    writer.write(b"GET /health HTTP/1.1\r\n\r\n" * 100)
    await soon(reader.read())
    assert await soon(one.fleet.cancels.get()) == ("i0", stream.order.stream)


async def test_http_1_0_reads_a_stream_to_its_end(one: Site) -> None:
    reader, writer = await one.connect()
    writer.write(framed({**CHAT, "stream": True}, HEAD.replace(b"1.1", b"1.0")))
    (await one.stream()).say("x", "stop")
    head, _, body = (await soon(reader.read())).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head
    assert body.startswith(b"data: ") and body.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\ncontent-length: -1\r\n\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\nx: " + b"y" * 400_000, b"431"),
    ],
)
async def test_what_is_not_http(one: Site, data: bytes, status: bytes) -> None:
    reader, writer = await one.connect()
    writer.write(data)
    assert (await soon(reader.readline())).split()[1] == status
    await soon(reader.read())


@pytest.fixture
def many_files() -> None:
    """Both ends of a thousand connections are in this process."""
    if raise_fd_limit(4096) < 2500:
        pytest.skip("the hard limit on open files is too low")


@pytest.mark.usefixtures("many_files")
async def test_a_thousand_idle_connections_hurt_nobody(one: Site) -> None:
    idle = await soon(asyncio.gather(*(one.connect() for _ in range(1000))))
    for _, writer in idle[::2]:
        writer.write(b"POST /v1/chat/comp")
    answer = one.post(CHAT)
    (await one.stream()).say("x", "stop")
    assert (await soon(answer)).status_code == 200
    assert b"hyperflexis_connections 100" in (await one.client.get("/metrics")).content
    for _, writer in idle:
        writer.transport.abort()


async def test_connections_are_bounded(tmp_path: Path) -> None:
    async with site(tmp_path, limits=Limits(max_connections=3, shutdown_grace_s=0.0)) as found:
        await found.client.aclose()
        kept = [await found.connect() for _ in range(3)]
        for reader, writer in kept:
            writer.write(b"GET /health HTTP/1.1\r\n\r\n")
            await soon(reader.readuntil(b'"ok"}'))
        reader, writer = await found.connect()
        assert b" 503 " in await soon(reader.readline())
        await soon(reader.read())


async def test_slow_and_idle_connections_are_closed(tmp_path: Path) -> None:
    limits = Limits(request_timeout_s=0.2, idle_timeout_s=0.4, shutdown_grace_s=0.0)
    async with site(tmp_path, limits=limits) as found:
        (silent, a), (slow_head, b), (slow_body, c), (served, d) = [await found.connect() for _ in range(4)]
        b.write(b"GET /heal")
        c.write(HEAD + b"content-length: 10\r\n\r\n{")
        d.write(framed(CHAT))
        stream = await found.stream()
        assert await soon(silent.read()) == b""
        assert b" 408 " in await soon(slow_head.read())
        assert b" 408 " in await soon(slow_body.read())
        # One that waits for its answer is not idle.
        stream.say("x", "stop")
        assert b" 200 OK" in await soon(served.readline())
        a.close()


async def test_a_client_that_reads_nothing_is_cut_and_its_request_cancelled(tmp_path: Path) -> None:
    limits = Limits(max_unsent_bytes=100_000, shutdown_grace_s=0.0)
    async with site(tmp_path, limits=limits, context_length=LONG) as found:
        _reader, writer = await found.connect_reading_nothing()
        writer.write(framed({**CHAT, "stream": True}))
        stream = await found.stream()
        cancel = asyncio.create_task(found.fleet.cancels.get())
        while not cancel.done():  # until the sockets' buffers and ours are full
            stream.say("x" * 50_000)
            await found.client.get("/health")
        assert cancel.result() == ("i0", stream.order.stream)


async def test_a_client_that_reads_late_but_reads_gets_everything(tmp_path: Path) -> None:
    limits = Limits(max_unsent_bytes=50 << 20, stall_timeout_s=60.0, shutdown_grace_s=0.0)
    async with site(tmp_path, limits=limits, context_length=LONG) as found:
        reader, writer = await found.connect_reading_nothing()
        writer.write(framed({**CHAT, "stream": True}))
        stream = await found.stream()
        for _ in range(60):
            stream.say("x" * 100_000)
            await found.client.get("/health")
        now = asyncio.get_running_loop().time()
        for connection in list(found.gateway.http.connections):
            connection.sweep(now)  # the first look at a connection that has much unsent
            connection.sweep(now + 50)
        writer.transport.resume_reading()
        stream.say("", "stop")
        body = bytearray()
        while not body.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            piece = await soon(reader.read(1 << 20))
            assert piece, "cut"
            body += piece
        assert body.count(b"x") > 60 * 100_000


async def test_a_client_that_stops_reading_for_long_is_cut(tmp_path: Path) -> None:
    limits = Limits(max_unsent_bytes=50 << 20, stall_timeout_s=0.3, shutdown_grace_s=0.0)
    async with site(tmp_path, limits=limits, context_length=LONG) as found:
        _reader, writer = await found.connect_reading_nothing()
        writer.write(framed({**CHAT, "stream": True}))
        stream = await found.stream()
        for _ in range(60):
            stream.say("x" * 100_000)
            await found.client.get("/health")
        assert await soon(found.fleet.cancels.get()) == ("i0", stream.order.stream)


@pytest.fixture
async def long(tmp_path: Path) -> AsyncIterator[Site]:
    async with site(tmp_path, context_length=LONG) as found:
        yield found


async def test_a_client_that_reads_one_byte_at_a_time_slows_nobody_and_is_cut(long: Site) -> None:
    loop = asyncio.get_running_loop()
    got = bytearray()
    size = 1

    async def read_bytes() -> None:
        with contextlib.suppress(ConnectionError):
            while piece := await loop.sock_recv(slow_socket, size):
                got.extend(piece)
                await asyncio.sleep(0)  # sock_recv itself does not wait while there is something

    # Without asyncio's streams, which read ahead as much as there is.
    with socket.socket() as slow_socket:
        slow_socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow_socket.setblocking(False)
        await loop.sock_connect(slow_socket, ("127.0.0.1", long.port))
        await loop.sock_sendall(slow_socket, framed({**CHAT, "stream": True}))
        slow = await long.stream()
        (connection,) = (
            c
            for c in long.gateway.http.connections
            if c.transport.get_extra_info("peername") == slow_socket.getsockname()
        )
        reading = asyncio.create_task(read_bytes())
        said = 0
        while connection.transport.get_write_buffer_size() < Limits().max_unsent_bytes // 2:
            assert said < 64 << 20
            slow.say("a" * 50_000)
            said += 50_000
            await long.client.get("/health")
        async with asyncio.timeout(1.0):
            answer = long.post(CHAT)
            (await long.stream()).say("x", "stop")
            assert (await answer).status_code == 200
        assert (await soon(long.fleet.ended.get())).outcome == "finished"
        assert not reading.done() and 0 < len(got) < said, "the slow one is neither cut nor done meanwhile"
        assert long.fleet.cancels.empty()
        cancel = asyncio.create_task(long.fleet.cancels.get())
        while not cancel.done():
            assert said < 64 << 20, "its unread bytes are without bound"
            slow.say("a" * 50_000)
            said += 50_000
            await long.client.get("/health")
        assert cancel.result() == ("i0", slow.order.stream)
        assert (await soon(long.fleet.ended.get())).outcome == "cancelled"
        size = 1 << 20  # the system's buffers had megabytes
        await soon(reading)
        assert b"[DONE]" not in got
        assert len(got) < said
