"""A peer that keeps what it is sent, for tests of the controller's process over real sockets."""

from __future__ import annotations

import asyncio
from typing import Any

from hyperflexis import wire
from hyperflexis.core.effects import SetLinks
from hyperflexis.core.events import InstanceLinked, RequestArrived
from hyperflexis.core.instance import InstanceInfo, InstanceReport
from hyperflexis.core.latency import Coefficients
from hyperflexis.core.links import Link
from hyperflexis.core.request import Request
from hyperflexis.core.slo import Slo

LATENCY = Coefficients(0.005, 2e-5, 1e-9, 1e-4, 1e-8)


class Recorder:
    """Collects messages; ``get`` waits for the next of a type and drops others."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[Any] = asyncio.Queue()
        self.made: asyncio.Future[wire.Hello] = asyncio.get_running_loop().create_future()
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def link_made(self, link: wire.Link, hello: wire.Hello) -> None:
        self.made.set_result(hello)

    def message_received(self, link: wire.Link, message: Any) -> None:
        self.messages.put_nowait(message)

    def link_lost(self, link: wire.Link, reason: str) -> None:
        self.lost.set_result(reason)

    async def get(self, kind: type, where: Any = lambda message: True) -> Any:
        async with asyncio.timeout(5):
            while True:
                message = await self.messages.get()
                if isinstance(message, kind) and where(message):
                    return message


class Instance(Recorder):
    """It is linked as soon as it is told to."""

    def message_received(self, link: wire.Link, message: Any) -> None:
        if isinstance(message, SetLinks):
            for source in message.sources:
                link.send(InstanceLinked(message.instance, message.epoch, source.instance, source.epoch, Link()))
        super().message_received(link, message)


async def join(address: str, role: str, id: str, kind: type[Recorder] = Recorder) -> tuple[wire.Link, Recorder]:
    recorder = kind()
    link = await wire.connect(address, recorder, wire.Hello(wire.VERSION, role, id))
    async with asyncio.timeout(5):
        await recorder.made
    return link, recorder


def info(id: str, epoch: int = 1, model: str = "tiny", kv_address: str = "") -> InstanceInfo:
    sizes = (4096, 65536, 32, 512)
    return InstanceInfo(id, epoch, model, "cpu", f"unix:/{id}", "emulated", *sizes, True, LATENCY, kv_address, 1000)


def report(id: str, epoch: int = 1, iterations: int = 0, **changes: Any) -> InstanceReport:
    values: dict[str, Any] = dict.fromkeys(
        (
            "num_running",
            "num_waiting",
            "kv_used_tokens",
            "prompt_tokens",
            "output_tokens",
            "prefix_hit_tokens",
            "preemptions",
        ),
        0,
    )
    return InstanceReport(
        **{**values, "busy_s": 0.0, "latency": LATENCY, **changes}, id=id, epoch=epoch, iterations=iterations
    )


def arrival(
    id: str, gateway: str = "g", model: str = "tiny", prompt: int = 200, ttft_s: float | None = 1.0
) -> RequestArrived:
    slo = Slo(ttft_s, 0.05 if ttft_s is not None else None)
    return RequestArrived(Request(id, model, "t", "chat", slo, 1.0, prompt, 64), gateway, 0.001)
