"""A link that can be cut: a relay between a target and a source that knows where frames begin."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable

PREFIX = struct.Struct("!III")
Watch = Callable[[bytes, int], bool]
"""Sees a frame's header and the size of its payload before the frame goes on; False: cut the link instead."""


class Relay:
    """Listens at ``address`` for targets and goes on to ``source``. The ``damage_piece``-th payload has a wrong bit."""

    def __init__(self, source: str) -> None:
        self._host, _, port = source.rpartition(":")
        self._port = int(port)
        self.from_source: Watch = lambda header, size: True
        self.from_target: Watch = lambda header, size: True
        self.damage_piece = 0
        self.address = ""
        self._links: list[asyncio.StreamWriter] = []

    async def start(self) -> Relay:
        self._server = await asyncio.start_server(self._link, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def cut(self) -> None:
        for writer in self._links:
            writer.transport.abort()
        self._links.clear()

    async def stop(self) -> None:
        self._server.close()
        self.cut()

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        source_reader, source_writer = await asyncio.open_connection(self._host, self._port)
        self._links += [writer, source_writer]
        await asyncio.gather(
            self._pass(source_reader, writer, lambda *frame: self.from_source(*frame)),
            self._pass(reader, source_writer, lambda *frame: self.from_target(*frame)),
        )

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, watch: Watch) -> None:
        try:
            while True:
                prefix = await reader.readexactly(PREFIX.size)
                length, size, _ = PREFIX.unpack(prefix)
                header = await reader.readexactly(length)
                if not watch(header, size):
                    self.cut()
                    return
                payload = await reader.readexactly(size)
                if size:
                    self.damage_piece -= 1
                    if self.damage_piece == 0:
                        payload = bytes([payload[0] ^ 1]) + payload[1:]
                writer.write(prefix + header + payload)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            writer.close()
