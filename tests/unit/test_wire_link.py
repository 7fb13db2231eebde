"""Links over real sockets, on both event loops that we run on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from hyperflexis import wire

LIMIT_S = 20.0


class Peer:
    def __init__(self) -> None:
        self.log: list[object] = []
        self.link: wire.Link | None = None
        self.moved = asyncio.Event()

    def link_made(self, link: wire.Link, hello: wire.Hello) -> None:
        self.link = link
        self._note(f"made {hello.id}")

    def message_received(self, link: wire.Link, message: Any) -> None:
        self._note(message)

    def link_lost(self, link: wire.Link, reason: str) -> None:
        self._note(f"lost: {reason}")

    def _note(self, what: object) -> None:
        self.log.append(what)
        self.moved.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not holds():
                self.moved.clear()
                await self.moved.wait()


def hello(id: str, version: int = wire.VERSION) -> wire.Hello:
    return wire.Hello(version, "gateway", id)


def on_uvloop(work: Coroutine[Any, Any, None]) -> None:
    uvloop = pytest.importorskip("uvloop", reason="uvloop is not installed here")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work)


LOOPS = {"asyncio": asyncio.run, "uvloop": on_uvloop}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_messages_go_both_ways_and_the_end_is_told_once(loop: str, kind: str, tmp_path: Path) -> None:
    async def main() -> None:
        ours, theirs = Peer(), Peer()
        address = f"unix:{tmp_path}/s" if kind == "unix" else "127.0.0.1:0"
        server = await wire.listen(address, lambda: theirs, lambda: hello("server"))
        if kind == "tcp":
            address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        link = await wire.connect(address, ours, hello("client"))
        await ours.until(lambda: ours.link is not None)
        assert link.send(wire.Cancel(1))
        await theirs.until(lambda: len(theirs.log) == 2)
        assert theirs.log == ["made client", wire.Cancel(1)]
        assert theirs.link is not None
        theirs.link.send(wire.Cancel(3))
        theirs.link.close()
        await ours.until(lambda: len(ours.log) == 3)
        assert ours.log == ["made server", wire.Cancel(3), "lost: closed by the peer"]
        assert not link.send(wire.Cancel(2))
        server.close()

    LOOPS[loop](main())


async def test_another_version_is_refused_before_anything_is_heard(tmp_path: Path) -> None:
    ours, theirs = Peer(), Peer()
    server = await wire.listen(f"unix:{tmp_path}/s", lambda: theirs, lambda: hello("new"))
    link = await wire.connect(f"unix:{tmp_path}/s", ours, hello("old", wire.VERSION - 1))
    link.send(wire.Cancel(1))
    async with asyncio.timeout(LIMIT_S):
        await link.closed
    assert theirs.log == []
    server.close()


async def test_garbage_ends_the_link_with_its_reason(tmp_path: Path) -> None:
    theirs = Peer()
    server = await wire.listen(f"unix:{tmp_path}/s", lambda: theirs, lambda: hello("server"))
    reader, writer = await asyncio.open_unix_connection(f"{tmp_path}/s")
    writer.write(wire.encode(hello("client")))
    await theirs.until(lambda: theirs.link is not None)
    writer.write(b"\x00\x00\x00\x01\xff")
    async with asyncio.timeout(LIMIT_S):
        await reader.read()
    await theirs.until(lambda: len(theirs.log) == 2)
    assert "unknown message type 255" in str(theirs.log[1])
    writer.close()
    server.close()


async def test_a_peer_that_stops_reading_is_cut(tmp_path: Path) -> None:
    theirs = Peer()
    server = await wire.listen(f"unix:{tmp_path}/s", lambda: theirs, lambda: hello("server"))
    _, writer = await asyncio.open_unix_connection(f"{tmp_path}/s", limit=1024)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    writer.write(wire.encode(hello("client")))
    await theirs.until(lambda: theirs.link is not None)
    assert theirs.link is not None
    large = wire.Output([1], [[7] * 100_000])
    sent = 0
    while theirs.link.send(large):
        sent += len(wire.encode(large))
        assert sent < 4 * wire.HIGH_WATER
    await theirs.until(lambda: theirs.log[-1] == "lost: the peer stopped reading")
    writer.transport.abort()
    server.close()


async def test_keep_connected_waits_longer_after_each_failure_and_starts_anew_after_success(tmp_path: Path) -> None:
    peer, served = Peer(), Peer()
    waits: list[float] = []
    servers: list[asyncio.Server] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 7:
            servers.append(await wire.listen(f"unix:{tmp_path}/s", lambda: served, lambda: hello("server")))
        if len(waits) == 9:
            raise asyncio.CancelledError

    keeping = asyncio.create_task(wire.keep_connected(f"unix:{tmp_path}/s", peer, lambda: hello("client"), sleep))
    await served.until(lambda: served.link is not None)
    await peer.until(lambda: peer.link is not None)
    servers[0].close()
    assert served.link is not None
    served.link.close()
    async with asyncio.timeout(LIMIT_S):
        await asyncio.gather(keeping, return_exceptions=True)
    assert waits[:7] == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    assert waits[7:] == [0.05, 0.05]
    assert [entry for entry in peer.log if str(entry).startswith("lost")] == ["lost: closed by the peer"]
