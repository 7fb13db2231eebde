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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import msgspec

from ..core.weights import Attempt, Manifest, Path, WeightSource
from ..errors import ProtocolError
from . import auth, tcp
from .arena import Foreign, Mapped, Memory
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
M = TypeVar("M", bound=Foreign)

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
        self._path: Path = "tcp"

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

    def attach(self, source: WeightSource) -> Foreign | None:
        """The memory of a complete source on this host, to be used where it is; None when it cannot be mapped. Nothing
        is copied and nothing digested. Raises what is in BROKEN."""
        with self._connected(source) as channel:
            self._expect(channel)
            return _map(channel, source, self._shard.layout.size, self._config, self._own.open)

    def cancel(self) -> None:
        """``run`` ends soon."""
        with self._lock:
            self._cancelled = True
            for channel in self._channels:
                channel.close()

    def _try(self, source: WeightSource) -> Attempt:
        began, before = time.monotonic(), self._shard.bytes_missing()
        problem = ""
        self._path = "shared memory" if _shares(source, self._config) else "tcp"
        try:
            self._from(source)
        except BlockingIOError:
            problem = f"it said nothing for {self._config.silence_s:g} s"
        except BROKEN as error:
            problem = str(error) or type(error).__name__
        return Attempt(
            self._path, source.instance, before - self._shard.bytes_missing(), time.monotonic() - began, problem
        )

    def _from(self, source: WeightSource) -> None:
        with self._connected(source) as channel:
            writing = self._expect(channel)
            mapped = _map(channel, source, self._shard.layout.size, self._config, self._own.open)
            if not isinstance(mapped, Mapped):
                self._path = "tcp" if mapped is None else "device"
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
            confirmed = mapped is None
            try:
                if problems:
                    raise problems[0]
                confirmed = confirmed or self._expect(channel) == writing
            finally:
                if not confirmed:
                    self._shard.recheck(chunks)
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

    @property
    def _own(self) -> Memory:
        assert not isinstance(self._shard.arena, Mapped), "what was mapped is complete"
        return self._shard.arena

    def _expect(self, channel: SocketChannel) -> int:
        """Hear which weights they are, and how often their memory was written over. Raises Refusal when they are not
        wanted."""
        channel.send(encode(Describe()))
        answer = _hear(channel, _DESCRIBED, self._config)
        wanted, found = self._config.digest, answer.manifest.digest
        if wanted and wanted != found:
            raise Refusal(f"its weights have digest {found}, and {wanted} are wanted")
        self._shard.expect(answer.manifest)
        return answer.writing

    def _take(self, channel: SocketChannel, lane: list[range], mapped: Foreign | None) -> None:
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

    def _place(self, channel: SocketChannel, blocks: range, mapped: Foreign | None) -> None:
        """Bring blocks to where they are to be, with the gaps between their tensors. Each is looked at while the core
        has it at hand: a copy leaves its source there, and writes past the caches where it can (arena.py)."""
        own, where = self._own, self._shard.layout.blocks
        at = where[blocks.start].start
        if mapped is None:
            for block in blocks:
                own.fill(at, where[block].stop, channel.receive_bytes)
                self._shard.check(block, own)
                self._shard.arrived(range(block, block + 1))
                at = where[block].stop
            return
        mapped.prepare(at, where[blocks.stop - 1].stop)
        for block in blocks:
            self._shard.check(block, mapped)
            own.take(mapped, at, where[block].stop)
            at = where[block].stop
        self._shard.arrived(blocks)


def look(source: WeightSource, config: FetchConfig) -> tuple[Manifest, Mapped | None]:
    """What the only rank of a source has, and its memory as ``attach`` gives it, before there is a shard to put
    anything in. Raises what is in BROKEN."""
    channel = SocketChannel(tcp.connect(source.address))
    try:
        _ask_in(channel, source, config, rank=0, ranks=1)
        channel.send(encode(Describe()))
        manifest = _hear(channel, _DESCRIBED, config).manifest
        size = manifest.layout.size

        def opened(descriptor: int | None, handle: bytes) -> Mapped | None:
            return None if descriptor is None else Mapped(descriptor, size)

        return manifest, _map(channel, source, size, config, opened)
    finally:
        channel.close()
        channel.release()


def _shares(source: WeightSource, config: FetchConfig) -> bool:
    return config.share and tcp.is_local(source.address)


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


def _map(
    channel: SocketChannel,
    source: WeightSource,
    size: int,
    config: FetchConfig,
    opened: Callable[[int | None, bytes], M | None],
) -> M | None:
    """The source's memory, as ``opened`` makes it; None when it is elsewhere, not shared or cannot be mapped here."""
    if not _shares(source, config):
        return None
    channel.send(encode(Map()))
    answer = _hear(channel, _MAPPED, config)
    if answer.size != size:
        return None
    if answer.handle:
        return opened(None, answer.handle)
    data, descriptors, _, _ = socket.recv_fds(channel.sock, 1, 1)
    try:
        if not data:
            raise ConnectionResetError("closed by the peer")
        return opened(descriptors[0], b"") if descriptors else None
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
