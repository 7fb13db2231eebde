"""Weights that one process gives to others: a source has all of them, a relay passes on what has come so far.

    target -> source   Describe                  which weights are they?
    source -> target   Described | Gone          tensors, and the digest of each block
    target -> source   Open                      may their bytes come on this way, and not over TCP?
    source -> target   Opened                    by this handle | it may not, because
    target -> source   Fetch                     these blocks, in this order
    source -> target   Come, Come, ...           some of them are here: their bytes come now, on the way that is open
    source -> target   Alive                     nothing has come here for a second

All that on a connection that has been let in (auth.py), as often as wanted; a target opens several. A source does not
tell targets apart from each other, nor whether they pass on what they get: a chain is a list of them. Ways: paths.py.

**Integrity.** The digests of all blocks are in the manifest, which the first source made of weights that it serves
with. Each target digests each block once, right after it came, where it lies: so nothing damaged is passed on, and the
link that did it is known. Bytes need no checksum of their own on their way, and who sends reads them once.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import msgspec
from xxhash import xxh3_128_digest

from ..core.weights import Ledger, Manifest, WeightLayout, difference
from ..errors import ProtocolError
from .arena import Mapped, Memory
from .auth import Hello, let_in
from .links import Gone, Refusal
from .listener import Listener
from .pace import TokenBucket
from .paths import Outward, Over, Sent, outward, require
from .tcp import MAX_HEADER, SocketChannel
from .transport import PEER_LIMIT_S

VERSION = 4
ALIVE_S = 1.0
PIECE = 4 << 20
"""Bytes that leave at once: the next in a chain has them after so many, whatever the size of a chunk; what a piece
costs besides (two threads' turns, some 100 us) is a few per cent of its time at 1 GB/s."""
COPY_BYTES_PER_S = 5e9
"""At which bytes that leave keep one core of the host busy, here or where they are copied: at this rate at most."""
MAX_CONNECTIONS = 64
_log = logging.getLogger(__name__)
T = TypeVar("T")


class Describe(msgspec.Struct, frozen=True, tag=True):
    """Which weights are they?"""


class Open(msgspec.Struct, frozen=True, tag=True):
    """May what is fetched on this connection come on this way?"""

    path: str


class Described(msgspec.Struct, frozen=True, tag=True):
    """These."""

    manifest: Manifest


class Fetch(msgspec.Struct, frozen=True, tag=True):
    """Blocks that are wanted: (first, one past the last), in this order."""

    spans: list[tuple[int, int]]


class Opened(msgspec.Struct, frozen=True, tag=True):
    """It may, and ``handle`` is what the way needs; or there is a ``problem``, and it comes over TCP."""

    handle: bytes = b""
    problem: str = ""


class Come(msgspec.Struct, frozen=True, tag=True):
    """The blocks ``first`` to ``end`` are here."""

    first: int
    end: int


class Alive(msgspec.Struct, frozen=True, tag=True):
    """There is nothing to send now."""


_ASKED: msgspec.msgpack.Decoder[Describe | Open | Fetch] = msgspec.msgpack.Decoder(Describe | Open | Fetch)
encode = msgspec.msgpack.encode
_ALIVE = encode(Alive())


class Shard:
    """One rank's weights in this process's memory, as far as they are there. Threads wait here for more to come."""

    def __init__(self, layout: WeightLayout, arena: Memory | Mapped) -> None:
        assert arena.size == layout.size
        self.layout = layout
        self.arena = arena
        self._changed = threading.Condition()
        self._manifest: Manifest | None = None
        self._ledger = Ledger(len(layout.blocks))
        self._closed = False

    @property
    def manifest(self) -> Manifest | None:
        """Of the weights that are here or on their way; None before that is known."""
        return self._manifest

    @property
    def is_complete(self) -> bool:
        """Whether all blocks are here."""
        with self._changed:
            return self._ledger.is_complete

    def described(self) -> Described | None:
        """For who asks; None before it is known which weights are to be here. For ``wait``."""
        return None if self._manifest is None else Described(self._manifest)

    def digests(self, threads: int = 2) -> bytes:
        """Of all blocks of what is in the memory now. Takes as long as reading it."""
        with ThreadPoolExecutor(threads) as pool:
            return b"".join(pool.map(self._digest, range(len(self.layout.blocks)), chunksize=64))

    def publish(self, manifest: Manifest) -> None:
        """All weights are here, from elsewhere."""
        with self._changed:
            self._manifest = manifest
            for span in self._ledger.missing():
                for block in span:
                    self._ledger.enter(block)
            self._changed.notify_all()

    def expect(self, manifest: Manifest) -> None:
        """These weights are to come. Raises Refusal when they do not fit, or are others than those that have come."""
        problem = difference(self.layout, manifest.layout)
        if problem:
            raise Refusal(f"its weights do not fit: {problem}")
        if len(manifest.blocks) != len(self.layout.blocks) * len(xxh3_128_digest(b"")):
            raise ProtocolError(f"{len(manifest.blocks)} bytes of digests for {len(self.layout.blocks)} blocks")
        with self._changed:
            if self._manifest is not None and self._manifest.digest != manifest.digest:
                raise Refusal("its weights are others than those that have come from another source")
            self._manifest = manifest
            self._changed.notify_all()

    def came(self, blocks: range) -> None:
        """Blocks are in their place, and are to be checked there. Raises ProtocolError, at the first that is not what
        the manifest says."""
        assert self._manifest is not None
        for block in blocks:
            if self._digest(block) != self._manifest.block(block):
                tensor = self.layout.tensor_at(block).name
                raise ProtocolError(f"tensor {tensor} was damaged on its way: the digest of block {block} is another")
            with self._changed:
                self._ledger.enter(block)
                self._changed.notify_all()

    def missing(self) -> list[range]:
        """Blocks that are still to come."""
        with self._changed:
            return self._ledger.missing()

    def bytes_missing(self) -> int:
        """How much that is."""
        return sum(len(self.layout.blocks[block]) for span in self.missing() for block in span)

    def forget(self) -> None:
        """What is in the memory is of no use, and is written over from now on. Who was told of it finds it damaged."""
        with self._changed:
            self._manifest = None
            self._ledger = Ledger(len(self.layout.blocks))

    def close(self) -> None:
        """Wake all who wait: nothing more comes."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def wait(self, find: Callable[[Shard], T | None], alive: Callable[[], object]) -> T:
        """What ``find`` finds, once it does; ``alive`` is called each second until then. Raises Refusal once closed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or find(self) is not None, ALIVE_S)
                if self._closed:
                    raise Refusal("the instance stopped")
                found = find(self)
            if found is not None:
                return found
            alive()

    def run_from(self, block: int, end: int) -> int | None:
        """How far blocks are here without a gap; None: not one. For ``wait``."""
        found = self._ledger.end_of_run(block, end)
        return found if found > block else None

    def _digest(self, block: int) -> bytes:
        where = self.layout.blocks[block]
        return xxh3_128_digest(self.arena.read(where.start, where.stop))


class WeightServer:
    """Gives a shard to the fleet's instances at ``address``, as fast as ``bucket`` lets all of them together, and
    ``over`` NIXL or PyTorch too, to those that ask for it.

    Raises OSError when the address is taken, ValueError when it is none, and HyperFlexisError when ``over`` is not to
    be had.
    """

    def __init__(
        self,
        address: str,
        shard: Shard,
        instance: str,
        epoch: int,
        token: str,
        bucket: TokenBucket | None = None,
        over: Over = "",
    ) -> None:
        require(over)
        self.bucket = bucket or TokenBucket()
        self._shard = shard
        self._instance = instance
        self._epoch = epoch
        self._token = token
        self._over: Over = over
        self._listener = Listener(address, self._serve, MAX_CONNECTIONS, "weights-source")
        self.address = self._listener.address

    def close(self) -> None:
        """Cut all connections and free the address. Returns when no thread is left."""
        self._shard.close()
        self.bucket.set_rate(None)
        self.bucket.set_share(1.0)
        self._listener.close()

    def _serve(self, channel: SocketChannel) -> None:
        try:
            limit = threading.Timer(PEER_LIMIT_S, channel.close)
            limit.daemon = True
            limit.start()
            try:
                let_in(channel, self._token, self._refusal)
            finally:
                limit.cancel()
            channel.max_header = MAX_HEADER
            self._answer(channel)
        except Refusal as refusal:
            with contextlib.suppress(OSError):
                channel.send(encode(Gone(str(refusal))))
        except ConnectionResetError:
            pass  # it has all that it wanted
        except (OSError, ProtocolError, msgspec.DecodeError) as error:
            _log.warning("somebody who asked for weights broke off: %s", error)

    def _refusal(self, hello: Hello) -> str:
        layout = self._shard.layout
        if hello.version != VERSION:
            return f"weights are given by version {VERSION} here, not {hello.version}: run one release everywhere"
        if (hello.instance, hello.epoch) != (self._instance, self._epoch):
            return f"this is epoch {self._epoch} of instance {self._instance}, not {hello.epoch} of {hello.instance}"
        if (hello.rank, hello.ranks) != (layout.rank, layout.ranks):
            return f"this is rank {layout.rank} of {layout.ranks}, not {hello.rank} of {hello.ranks}"
        return ""

    def _answer(self, channel: SocketChannel) -> None:
        way: Outward = Sent(channel, self._shard.arena)
        try:
            while True:
                match channel.receive(lambda frame: _ASKED.decode(frame.header)):
                    case Describe():
                        channel.send(encode(self._shard.wait(Shard.described, partial(channel.send, _ALIVE))))
                    case Open(path):
                        try:
                            opened = outward(path, channel, self._shard.arena, self._over)
                        except (Refusal, OSError) as problem:
                            channel.send(encode(Opened(problem=str(problem))))
                            continue
                        way.close()
                        way = opened
                        channel.send(encode(Opened(way.handle)))
                        way.begin()
                    case Fetch(spans):
                        for first, end in spans:
                            self._give(channel, first, end, way)
        finally:
            way.close()

    def _give(self, channel: SocketChannel, first: int, end: int, way: Outward) -> None:
        """Some blocks, as they come. Raises ProtocolError when there are no such blocks."""
        blocks = self._shard.layout.blocks
        if not 0 <= first < end <= len(blocks):
            raise ProtocolError(f"blocks {first} to {end} of {len(blocks)}")
        while first < end:
            found = self._shard.wait(partial(Shard.run_from, block=first, end=end), partial(channel.send, _ALIVE))
            for piece in self._shard.layout.chunks([range(first, found)], self.bucket.at_once(PIECE)):
                start, stop = self._shard.layout.extent(piece)
                self.bucket.take(stop - start)
                began = time.monotonic()
                channel.send(encode(Come(piece.start, piece.stop)))
                way.give(start, stop)
                least_s = (stop - start) / COPY_BYTES_PER_S
                self.bucket.worked(max(time.monotonic() - began, least_s))
            first = found
