"""A target's part of a weight transfer: everything that is missing in a shard, from one source after the other.

Several connections to a source take turns with the chunks, each in a thread. Bytes come on one of several ways
(paths.py): one that was asked for, else through shared memory on one host, else over TCP. What came stays: after a
broken link, the same or another source is asked for the rest. A way, and a source, is given up when it brought nothing
new.

While this runs the shard can be given on (weights.py): that is a relay, and a list of them a chain.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import msgspec

from ..core.weights import Attempt, Manifest, Path, WeightSource
from ..errors import ProtocolError
from . import auth, paths, tcp
from .arena import Foreign, Mapped, Memory
from .links import Gone, Refusal
from .paths import SHARED, Copied, Inward, Over, Received
from .tcp import SocketChannel
from .weights import VERSION, Alive, Come, Describe, Described, Fetch, Open, Opened, Shard, encode

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
_OPENED: msgspec.msgpack.Decoder[Opened | Gone | Alive] = msgspec.msgpack.Decoder(Opened | Gone | Alive)
_NEWS: msgspec.msgpack.Decoder[Come | Gone | Alive] = msgspec.msgpack.Decoder(Come | Gone | Alive)

T = TypeVar("T", Described, Opened, Come)
M = TypeVar("M", bound=Foreign)

BROKEN = (OSError, ValueError, ProtocolError, Refusal, msgspec.DecodeError)
"""What may go wrong with a source."""


@dataclass(frozen=True, slots=True)
class FetchConfig:
    """``chunk_bytes``: what a connection takes at a turn. ``digest``: the only weights that are wanted, "" for any.
    ``share``: read the memory of a source on this host, rather than having it sent. ``over``: the way that is tried
    before these."""

    token: str = ""
    digest: str = ""
    chunk_bytes: int = CHUNK
    sockets: int = SOCKETS
    silence_s: float = SILENCE_S
    patience_s: float = PATIENCE_S
    share: bool = True
    over: Over = ""


class Fetcher:
    """Fills ``shard``. ``run`` once, in a thread; ``cancel`` from any.

    Raises HyperFlexisError when ``config.over`` is not to be had.
    """

    def __init__(self, shard: Shard, config: FetchConfig) -> None:
        paths.require(config.over)
        self._shard = shard
        self._config = config
        self._lock = threading.Lock()
        self._channels: set[SocketChannel] = set()
        self._cancelled = False
        self._path: Path = "tcp"
        self._opens = False

    def run(self, sources: Sequence[WeightSource]) -> list[Attempt]:
        """Ask one after the other until the shard is complete, or all have failed."""
        attempts: list[Attempt] = []
        for source in sources:
            over = self._config.over
            while not self._shard.is_complete and not self._cancelled:
                self._opens = False
                attempt = self._try(source, over)
                attempts.append(attempt)
                if not attempt.problem:
                    break
                _log.warning("no weights from instance %s: %s", source.instance, attempt.problem)
                if attempt.num_bytes:
                    continue
                if not (over and self._opens):
                    break
                over = ""
        return attempts

    def attach(self, source: WeightSource) -> Foreign | None:
        """The memory of a complete source on this host, to be used where it is; None when it cannot be mapped. Nothing
        is copied and nothing digested. Raises what is in BROKEN."""
        with self._connected(source) as channel:
            self._expect(channel)
            return _map(channel, source, self._config, self._own.open)

    def cancel(self) -> None:
        """``run`` ends soon."""
        with self._lock:
            self._cancelled = True
            for channel in self._channels:
                channel.close()

    def _try(self, source: WeightSource, over: Over) -> Attempt:
        began, before = time.monotonic(), self._shard.bytes_missing()
        problem = ""
        self._path = "shared memory" if _shares(source, self._config) else "tcp"
        try:
            self._from(source, over)
        except BlockingIOError:
            problem = f"it said nothing for {self._config.silence_s:g} s"
        except BROKEN as error:
            problem = str(error) or type(error).__name__
        return Attempt(
            self._path, source.instance, before - self._shard.bytes_missing(), time.monotonic() - began, problem
        )

    def _from(self, source: WeightSource, over: Over) -> None:
        with self._connected(source) as channel:
            self._expect(channel)
            chunks = list(self._shard.layout.chunks(self._shard.missing(), self._config.chunk_bytes))
            lanes = [chunks[lane :: self._config.sockets] for lane in range(self._config.sockets)]
            problems: list[Exception] = []
            with contextlib.ExitStack() as stack:
                channels = [channel]
                channels += [stack.enter_context(self._connected(source)) for lane in lanes[1:] if lane]
                ways = [stack.enter_context(contextlib.closing(self._way(one, source, over))) for one in channels]
                self._path = ways[0].path

                def take(channel: SocketChannel, way: Inward, lane: list[range]) -> None:
                    try:
                        self._take(channel, way, lane)
                    except BROKEN as error:
                        # Frames hold what the way has of the peer: sockets, and who writes what comes out of them.
                        error.__cause__ = error.__context__ = None
                        problems.append(error.with_traceback(None))
                        for other in channels:  # they would go on for long, and then to no end
                            other.close()

                turns = zip(channels, ways, lanes, strict=False)
                threads = [threading.Thread(target=partial(take, *turn), name="weights-target") for turn in turns]
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

    @property
    def _own(self) -> Memory:
        assert not isinstance(self._shard.arena, Mapped), "what was mapped is complete"
        return self._shard.arena

    def _expect(self, channel: SocketChannel) -> None:
        """Hear which weights they are. Raises Refusal when they are not wanted."""
        channel.send(encode(Describe()))
        answer = _hear(channel, _DESCRIBED, self._config)
        wanted, found = self._config.digest, answer.manifest.digest
        if wanted and wanted != found:
            raise Refusal(f"its weights have digest {found}, and {wanted} are wanted")
        self._shard.expect(answer.manifest)

    def _way(self, channel: SocketChannel, source: WeightSource, over: Over) -> Inward:
        """How bytes come on this connection. Raises Refusal when it is not to be the one that was asked for."""
        if not over:
            foreign = _map(channel, source, self._config, self._own.open)
            return Received(channel, self._own) if foreign is None else Copied(foreign, self._own)
        self._opens = True
        self._path = path = paths.path_over(over, self._own)
        channel.send(encode(Open(path)))
        answer = _hear(channel, _OPENED, self._config)
        if answer.problem:
            raise Refusal(answer.problem)
        return paths.inward(path, channel, self._own, answer.handle, self._config.silence_s)

    def _take(self, channel: SocketChannel, way: Inward, lane: list[range]) -> None:
        """All chunks of a lane. Raises Refusal when the source has no more."""
        channel.send(encode(Fetch([(chunk.start, chunk.stop) for chunk in lane])))
        for chunk in lane:
            at = chunk.start
            while at < chunk.stop:
                come = _hear(channel, _NEWS, self._config)
                if come.first != at or not at < come.end <= chunk.stop:
                    raise ProtocolError(f"blocks {come.first} to {come.end} came, not {at} to {chunk.stop}")
                way.bring(self._shard, range(at, come.end))
                at = come.end


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

        return manifest, _map(channel, source, config, opened)
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
    config: FetchConfig,
    opened: Callable[[int | None, bytes], M | None],
) -> M | None:
    """The source's memory, as ``opened`` makes it; None when it is elsewhere, not shared or cannot be mapped here."""
    if not _shares(source, config):
        return None
    channel.send(encode(Open(SHARED)))
    answer = _hear(channel, _OPENED, config)
    return None if answer.problem else paths.lent(channel, answer.handle, opened)
