"""A target's part of a weight transfer: everything that is missing in a shard, from one source after the other.

Several connections to a source take turns with the chunks, each in a thread. Over TCP bytes are received where they are
to be; on one host the source's memory is mapped and copied. What came stays: after a broken link, the same or another
source is asked for the rest. A source is given up when it brought nothing new.

While this runs the shard can be given on (weights.py): that is a relay, and a list of them a chain.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import msgspec

from ..core.weights import Attempt, Manifest, Path, WeightSource
from ..errors import ProtocolError
from . import arena, auth, tcp
from .links import Gone, Refusal
from .tcp import SocketChannel
from .weights import VERSION, Alive, Come, Describe, Described, Fetch, Map, MapAnswer, Shard, encode

SILENCE_S = 3.0
"""A source that says nothing for so long is taken for dead: three of its signs of life were due."""
PATIENCE_S = 10.0
"""One that lives and has nothing new for so long is left for the next: its own sources have left it, or nobody told it
to load."""
SOCKETS = 2
"""Connections to one source. One thread receives and digests at about the rate at which one socket is filled; a second
takes the other's turns."""
CHUNK = 16 << 20
_log = logging.getLogger(__name__)

_DESCRIBED: msgspec.msgpack.Decoder[Described | Gone | Alive] = msgspec.msgpack.Decoder(Described | Gone | Alive)
_MAPPED: msgspec.msgpack.Decoder[MapAnswer | Gone | Alive] = msgspec.msgpack.Decoder(MapAnswer | Gone | Alive)
_NEWS: msgspec.msgpack.Decoder[Come | Gone | Alive] = msgspec.msgpack.Decoder(Come | Gone | Alive)

T = TypeVar("T", Described, MapAnswer, Come)

BROKEN = (OSError, ValueError, ProtocolError, Refusal, msgspec.DecodeError)
"""What may go wrong with a source."""


@dataclass(frozen=True, slots=True)
class FetchConfig:
    """``chunk_bytes``: what a connection takes at a turn. ``digest``: the only weights that are wanted, "" for any.
    ``share``: map the memory of a source on this host, rather than having it sent."""

    token: str = ""
    digest: str = ""
    chunk_bytes: int = CHUNK
    sockets: int = SOCKETS
    silence_s: float = SILENCE_S
    patience_s: float = PATIENCE_S
    share: bool = True


class Fetcher:
    """Fills ``shard``. ``run`` once, in a thread; ``cancel`` from any."""

    def __init__(self, shard: Shard, config: FetchConfig) -> None:
        self._shard = shard
        self._config = config
        self._lock = threading.Lock()
        self._channels: set[SocketChannel] = set()
        self._cancelled = False

    def run(self, sources: Sequence[WeightSource]) -> list[Attempt]:
        """Ask one after the other until the shard is complete, or all have failed."""
        attempts: list[Attempt] = []
        for source in sources:
            while not self._shard.is_complete and not self._cancelled:
                attempt = self._try(source)
                attempts.append(attempt)
                if not attempt.problem:
                    break
                _log.warning("no weights from instance %s: %s", source.instance, attempt.problem)
                if not attempt.num_bytes:
                    break
        return attempts

    def attach(self, source: WeightSource) -> arena.Mapped | None:
        """The memory of a complete source on this host, to be used where it is; None when it cannot be mapped. Nothing
        is copied and nothing digested. Raises what is in BROKEN."""
        with self._connected(source) as channel:
            self._expect(channel)
            return _map(channel, source, self._shard.layout.size, self._config)

    def cancel(self) -> None:
        """``run`` ends soon."""
        with self._lock:
            self._cancelled = True
            for channel in self._channels:
                channel.close()

    def _try(self, source: WeightSource) -> Attempt:
        began, before = time.monotonic(), self._shard.bytes_missing()
        path: Path = "shared memory" if tcp.is_local(source.address) and self._config.share else "tcp"
        problem = ""
        try:
            self._from(source)
        except BlockingIOError:
            problem = f"it said nothing for {self._config.silence_s:g} s"
        except BROKEN as error:
            problem = str(error) or type(error).__name__
        return Attempt(path, source.instance, before - self._shard.bytes_missing(), time.monotonic() - began, problem)

    def _from(self, source: WeightSource) -> None:
        with self._connected(source) as channel:
            self._expect(channel)
            mapped = _map(channel, source, self._shard.layout.size, self._config)
            chunks = list(self._shard.layout.chunks(self._shard.missing(), self._config.chunk_bytes))
            lanes = [chunks[lane :: self._config.sockets] for lane in range(self._config.sockets)]
            problems: list[Exception] = []
            with contextlib.ExitStack() as stack:
                channels = [channel]
                channels += [stack.enter_context(self._connected(source)) for lane in lanes[1:] if lane]

                def take(channel: SocketChannel, lane: list[range]) -> None:
                    try:
                        self._take(channel, lane, mapped)
                    except BROKEN as error:
                        problems.append(error)
                        for other in channels:  # they would go on for long, and then to no end
                            other.close()

                pairs = zip(channels, lanes, strict=False)
                threads = [threading.Thread(target=partial(take, *pair), name="weights-target") for pair in pairs]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            if problems:
                raise problems[0]
            if not self._shard.is_complete:
                raise ProtocolError("something that was asked for did not come")

    @contextlib.contextmanager
    def _connected(self, source: WeightSource) -> Iterator[SocketChannel]:
        channel = SocketChannel(tcp.connect(source.address))
        try:
            with self._lock:
                if self._cancelled:
                    raise Refusal("the instance stopped")
                self._channels.add(channel)
            _ask_in(channel, source, self._config, self._shard.layout.rank, self._shard.layout.ranks)
            yield channel
        finally:
            with self._lock:
                self._channels.discard(channel)
            channel.close()
            channel.release()

    def _expect(self, channel: SocketChannel) -> None:
        """Hear which weights they are. Raises Refusal when they are not wanted."""
        channel.send(encode(Describe()))
        answer = _hear(channel, _DESCRIBED, self._config)
        wanted, found = self._config.digest, answer.manifest.digest
        if wanted and wanted != found:
            raise Refusal(f"its weights have digest {found}, and {wanted} are wanted")
        self._shard.expect(answer.manifest)

    def _take(self, channel: SocketChannel, lane: list[range], mapped: arena.Mapped | None) -> None:
        """All chunks of a lane. Raises Refusal when the source has no more."""
        channel.send(encode(Fetch([(chunk.start, chunk.stop) for chunk in lane], mapped is not None)))
        for chunk in lane:
            at = chunk.start
            while at < chunk.stop:
                come = _hear(channel, _NEWS, self._config)
                if come.first != at or not at < come.end <= chunk.stop:
                    raise ProtocolError(f"blocks {come.first} to {come.end} came, not {at} to {chunk.stop}")
                self._place(channel, range(at, come.end), mapped)
                at = come.end

    def _place(self, channel: SocketChannel, blocks: range, mapped: arena.Mapped | None) -> None:
        """Bring blocks to where they are to be, with the gaps between their tensors. Each is looked at while the core
        has it at hand."""
        own, where = self._shard.arena, self._shard.layout.blocks
        at = where[blocks.start].start
        if mapped is not None:
            mapped.prepare(at, where[blocks.stop - 1].stop)
        for block in blocks:
            end = where[block].stop
            if mapped is not None:
                arena.copy(mapped.address + at, own.address + at, end - at)
            else:
                channel.receive_bytes(own.view[at:end])
            self._shard.arrived(block)
            at = end


def look(source: WeightSource, config: FetchConfig) -> tuple[Manifest, arena.Mapped | None]:
    """What the only rank of a source has, and its memory as ``attach`` gives it, before there is a shard to put
    anything in. Raises what is in BROKEN."""
    channel = SocketChannel(tcp.connect(source.address))
    try:
        _ask_in(channel, source, config, rank=0, ranks=1)
        channel.send(encode(Describe()))
        manifest = _hear(channel, _DESCRIBED, config).manifest
        return manifest, _map(channel, source, manifest.layout.size, config)
    finally:
        channel.close()
        channel.release()


def _ask_in(channel: SocketChannel, source: WeightSource, config: FetchConfig, rank: int, ranks: int) -> None:
    channel.limit_receive(config.silence_s)
    hello = auth.Hello(VERSION, auth.nonce(), source.instance, source.epoch, rank, ranks)
    auth.ask_in(channel, hello, config.token)


def _hear(channel: SocketChannel, decoder: msgspec.msgpack.Decoder[T | Gone | Alive], config: FetchConfig) -> T:
    """What the source says next, besides that it lives. Raises Refusal when it has nothing more, or nothing new for
    too long."""
    until = time.monotonic() + config.patience_s
    while True:
        news = channel.receive(lambda frame: decoder.decode(frame.header))
        if isinstance(news, Gone):
            raise Refusal(news.reason)
        if not isinstance(news, Alive):
            return news
        if time.monotonic() > until:
            raise Refusal(f"it has had nothing new for {config.patience_s:g} s")


def _map(channel: SocketChannel, source: WeightSource, size: int, config: FetchConfig) -> arena.Mapped | None:
    """The source's memory; None when it is elsewhere or not shared, or cannot be mapped here."""
    if not (config.share and tcp.is_local(source.address)):
        return None
    channel.send(encode(Map()))
    answer = _hear(channel, _MAPPED, config)
    if not answer.size:
        return None
    data, descriptors, _, _ = socket.recv_fds(channel.sock, 1, 1)
    try:
        if not data:
            raise ConnectionResetError("closed by the peer")
        return arena.Mapped(descriptors[0], size) if descriptors else None
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
