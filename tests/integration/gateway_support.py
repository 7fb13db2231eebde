"""A gateway in this process, in front of a fleet whose every word the test decides; all over real sockets.

The fleet's tokens are bytes: ``say("abc")`` sends three tokens.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from hyperflexis import wire
from hyperflexis.core.effects import Decision, Dispatch, Handoff, Reject
from hyperflexis.core.events import GatewayJoined, HandoffFailed, RequestArrived, RequestFinished
from hyperflexis.core.slo import Slo, SloClass
from hyperflexis.gateway.app import Gateway
from hyperflexis.gateway.config import GatewayConfig, Limits

LIMIT_S = 10.0
DECISION = Decision("test", 2, True, 1.5, 0.004, 0.123, 0.5, 0.05, "a note")
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
CLASSES = (SloClass("chat", Slo(1.0, 0.05), 2.0), SloClass("batch", Slo(e2e_s=60.0), 0.5))


async def soon(awaitable: Any) -> Any:
    return await asyncio.wait_for(awaitable, LIMIT_S)


class Stream:
    """One stream that the gateway opened on an instance."""

    def __init__(self, instance: Instance, order: wire.Generate) -> None:
        self.instance = instance
        self.order = order
        self.sent = 0

    @property
    def prompt(self) -> str:
        return bytes(wire.unpack_ids(self.order.token_ids)).decode()

    def say(self, text: str, finish: str | None = None, logprobs: list[wire.TokenLogprob] | None = None) -> None:
        self.say_ids(list(text.encode()), finish, logprobs)

    def say_ids(
        self, ids: list[int], finish: str | None = None, logprobs: list[wire.TokenLogprob] | None = None
    ) -> None:
        self.sent += len(ids)
        prompt = len(self.order.token_ids) // 4
        ends = [] if finish is None else [wire.Finish(self.order.stream, finish, prompt, self.sent, 1, "a reason")]
        streams = [self.order.stream] if ids else []
        tokens = [ids] if ids else []
        self.instance.send(wire.Output(streams, tokens, None, [logprobs] if logprobs else None, ends))

    def say_text(self, text: str) -> None:
        self.instance.send(wire.Output([self.order.stream], [[]], [text]))

    def finish(self, reason: str, prompt_tokens: int = 3, output_tokens: int = 0) -> None:
        end = wire.Finish(self.order.stream, reason, prompt_tokens, output_tokens, 0, "a reason")
        self.instance.send(wire.Output([], [], finished=[end]))


class Instance:
    def __init__(self, fleet: Fleet, id: str, address: str) -> None:
        self.id = id
        self.address = address
        self._fleet = fleet
        self._links: list[wire.Link] = []
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await wire.listen(
            self.address, lambda: self, lambda: wire.Hello(wire.VERSION, "instance", self.id)
        )

    def send(self, message: Any) -> None:
        self._links[-1].send(message)

    def die(self) -> None:
        """As a process that is killed: links end and nobody listens."""
        assert self._server is not None
        self._server.close()
        for link in self._links:
            link.close("killed", abort=True)

    def link_made(self, link: wire.Link, hello: wire.Hello) -> None:
        self._links.append(link)

    def link_lost(self, link: wire.Link, reason: str) -> None:
        pass

    def message_received(self, link: wire.Link, message: Any) -> None:
        match message:
            case wire.Generate():
                self._fleet.streams.put_nowait(Stream(self, message))
            case wire.Cancel():
                self._fleet.cancels.put_nowait((self.id, message.stream))


class Fleet:
    """Controller and instances. ``to`` names the instance that requests go to; "" leaves them undecided. Those that
    are dispatched while it ``hands_over`` are to ask where they go on."""

    def __init__(self, dir: Path, instances: int, returns_token_ids: bool, context_length: int) -> None:
        self.address = f"unix:{dir}/c"
        self.instances = {f"i{n}": Instance(self, f"i{n}", f"unix:{dir}/i{n}") for n in range(instances)}
        self.to = "i0"
        self.to_when_avoided = "i1"
        self.hands_over = False
        self.reject: Reject | None = None
        self.term = 1
        self.asked: asyncio.Queue[RequestArrived] = asyncio.Queue()
        self.ended: asyncio.Queue[RequestFinished] = asyncio.Queue()
        self.not_handed_over: asyncio.Queue[HandoffFailed] = asyncio.Queue()
        self.joined: asyncio.Queue[GatewayJoined] = asyncio.Queue()
        self.streams: asyncio.Queue[Stream] = asyncio.Queue()
        self.cancels: asyncio.Queue[tuple[str, int]] = asyncio.Queue()
        self.models = {"m": wire.ModelStatus(list(self.instances), context_length, returns_token_ids)}
        self._link: wire.Link | None = None
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await wire.listen(
            self.address, lambda: self, lambda: wire.Hello(wire.VERSION, "controller", "c", self.term)
        )

    async def start_all(self) -> None:
        await self.start()
        for instance in self.instances.values():
            await instance.start()

    def stop_controller(self) -> None:
        assert self._server is not None
        self._server.close()
        if self._link is not None:
            self._link.close("killed", abort=True)

    def stop_all(self) -> None:
        self.stop_controller()
        for instance in self.instances.values():
            instance.die()

    def send(self, message: Any) -> None:
        assert self._link is not None
        self._link.send(message)

    def dispatch(self, request_id: str, instance: str) -> None:
        address = self.instances[instance].address
        self.send(Dispatch(request_id, "g", instance, 7, address, 2.0, 40.0, DECISION, self.hands_over))

    def hand_over(
        self, request_id: str, source: str, instance: str, source_epoch: int = 7, address: str | None = None
    ) -> None:
        where = address or self.instances[instance].address
        kv, decision = f"unix:kv-{source}", replace(DECISION, note="handed over")
        self.send(Handoff(request_id, "g", source, source_epoch, kv, instance, 8, where, 3.0, 30.0, decision))

    def link_made(self, link: wire.Link, hello: wire.Hello) -> None:
        self._link = link

    def link_lost(self, link: wire.Link, reason: str) -> None:
        pass

    def message_received(self, link: wire.Link, message: Any) -> None:
        match message:
            case GatewayJoined():
                link.send(wire.Fleet(self.models, []))
                self.joined.put_nowait(message)
            case HandoffFailed():
                self.not_handed_over.put_nowait(message)
            case RequestFinished():
                self.ended.put_nowait(message)
            case RequestArrived(request=request):
                self.asked.put_nowait(message)
                if self.reject is not None:
                    reason, text, retry = self.reject.reason, self.reject.message, self.reject.retry_after_s
                    link.send(Reject(request.id, "g", reason, text, retry))
                elif self.to:
                    self.dispatch(request.id, self.to_when_avoided if message.avoid == self.to else self.to)


class Site:
    """A gateway, its fleet, and a client of it."""

    def __init__(self, gateway: Gateway, fleet: Fleet, port: int, client: httpx.AsyncClient) -> None:
        self.gateway = gateway
        self.fleet = fleet
        self.port = port
        self.client = client

    def post(self, body: Any, path: str = "/v1/chat/completions", **headers: str) -> asyncio.Task[httpx.Response]:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return asyncio.create_task(self.client.post(path, content=content, headers=named))

    async def error(self, body: Any, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, Any, Any, str]:
        """(status, code, param, message) of an error in OpenAI's shape."""
        answer = await soon(self.post(body, path, **headers))
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return answer.status_code, error["code"], error["param"], error["message"]

    async def stream(self) -> Stream:
        found: Stream = await soon(self.fleet.streams.get())
        return found

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def connect_reading_nothing(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """With a small window, so that little sent is much unread."""
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        reader, writer = await asyncio.open_connection(sock=sock)
        writer.transport.pause_reading()
        return reader, writer

    async def wait_ready(self) -> None:
        while (await self.client.get("/ready")).status_code != 200:
            pass


@asynccontextmanager
async def site(
    dir: Path,
    instances: int = 1,
    returns_token_ids: bool = True,
    context_length: int = 100,
    models: dict[str, Path | None] | None = None,
    limits: Limits | None = None,
    **settings: Any,
) -> AsyncIterator[Site]:
    fleet = Fleet(dir, instances, returns_token_ids, context_length)
    await fleet.start_all()
    config = GatewayConfig(
        id="g",
        controller=fleet.address,
        models=models or {"m": None},
        port=0,
        limits=limits or Limits(shutdown_grace_s=0.0),
        **settings,
    )
    gateway = Gateway(config)
    port = gateway.http.start("127.0.0.1", 0, False)
    links = asyncio.create_task(gateway.controller.run())
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=LIMIT_S, verify=False) as client:
            found = Site(gateway, fleet, port, client)
            async with asyncio.timeout(LIMIT_S):
                await found.wait_ready()
            yield found
    finally:
        links.cancel()
        await gateway.http.stop(0.0, gateway.cut)
        gateway.close()
        fleet.stop_all()
        await asyncio.gather(links, return_exceptions=True)


def events(body: str) -> list[Any]:
    """The data of a stream's events, JSON decoded; the last must be [DONE]."""
    found = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    assert found[-1] == "[DONE]"
    return [json.loads(data) for data in found[:-1]]
