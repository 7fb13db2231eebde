"""The ways on which the bytes of granted blocks get from a source's memory into a target's. All else, who may have
them, which they are, what has come and whether it is right, is the same on each (weights.py).

    shared    on one host: the target reads the source's memory, or a device's, itself         asked for by itself
    tcp       the bytes follow on the connection on which they were granted                    where nothing else goes
    nixl      the target reads them out of the source's memory (nixl.py)                       where it is set, at both
    gloo, nccl, hccl   PyTorch sends and receives them between the two alone (group.py)          ends: ``Over``

A way belongs to one connection, and ends with it. On the wire:

    target -> source   Open(path)        may what I fetch from now on come on this way?
    source -> target   Opened            by this handle | it may not, because; then it comes over TCP
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from ..core.weights import Path
from ..errors import HyperFlexisError
from .arena import Foreign, Mapped, Memory
from .links import Refusal
from .tcp import SocketChannel

if TYPE_CHECKING:
    from .weights import Shard

Over = Literal["", "nixl", "torch"]
"""What is tried before shared memory and TCP, and what a source allows besides these; empty: nothing."""
SHARED = "shared"
M = TypeVar("M", bound=Foreign)


class Outward(Protocol):
    """A source's end. ``handle``: what a target needs to know."""

    handle: bytes

    def begin(self) -> None:
        """The target has the handle. Raises OSError."""

    def give(self, start: int, stop: int) -> None:
        """These bytes were granted; returns when they have left. Raises OSError."""

    def close(self) -> None:
        """Nothing more leaves."""


class Inward(Protocol):
    """A target's end."""

    path: Path

    def bring(self, shard: Shard, blocks: range) -> None:
        """These were granted: to where they are to be, with the gaps between their tensors, checked, and entered in the
        shard's books. Raises OSError, and ProtocolError for what was damaged."""

    def close(self) -> None:
        """Nothing more is written here when it returns."""


class Sent:
    """Over TCP: bytes follow the word that grants them."""

    handle = b""

    def __init__(self, channel: SocketChannel, memory: Memory | Mapped) -> None:
        self._channel = channel
        self._memory = memory

    def begin(self) -> None:
        """See Outward."""

    def give(self, start: int, stop: int) -> None:
        """See Outward."""
        self._channel.send_bytes(self._memory.read(start, stop))

    def close(self) -> None:
        """See Outward."""


class Received:
    """The same at the other end: bytes are received where they are to be."""

    path: Path = "tcp"

    def __init__(self, channel: SocketChannel, own: Memory) -> None:
        self._channel = channel
        self._own = own

    def bring(self, shard: Shard, blocks: range) -> None:
        """See Inward."""
        _bring_each(shard, blocks, lambda at, end: self._own.fill(at, end, self._channel.receive_bytes))

    def close(self) -> None:
        """See Inward."""


class Lent:
    """Memory that others on this host open: by a device's handle, or by a descriptor that follows."""

    def __init__(self, channel: SocketChannel, memory: Memory | Mapped) -> None:
        """Raises Refusal when it is not shared."""
        self._channel = channel
        self._descriptor = memory.descriptor
        self.handle = memory.handle()
        if channel.sock.family != socket.AF_UNIX or not (self.handle or self._descriptor is not None):
            raise Refusal("its memory is not shared")

    def begin(self) -> None:
        """See Outward."""
        if not self.handle:
            assert self._descriptor is not None
            socket.send_fds(self._channel.sock, [b"\0"], [self._descriptor])

    def give(self, start: int, stop: int) -> None:
        """See Outward: they are copied without us."""

    def close(self) -> None:
        """See Outward."""


class Copied:
    """The same at the other end."""

    def __init__(self, foreign: Foreign, own: Memory) -> None:
        self.path: Path = "shared memory" if isinstance(foreign, Mapped) else "device"
        self._foreign = foreign
        self._own = own

    def bring(self, shard: Shard, blocks: range) -> None:
        """See Inward."""
        _bring_each(shard, blocks, lambda at, end: self._own.take(self._foreign, at, end))

    def close(self) -> None:
        """See Inward. The memory goes when nothing here uses it any more."""


def _bring_each(shard: Shard, blocks: range, bring: Callable[[int, int], None]) -> None:
    """One block after the other, each digested while the core has it at hand."""
    where = shard.layout.blocks
    at = where[blocks.start].start
    for block in blocks:
        bring(at, where[block].stop)
        shard.came(range(block, block + 1))
        at = where[block].stop


def lent(channel: SocketChannel, handle: bytes, opened: Callable[[int | None, bytes], M | None]) -> M | None:
    """What Lent gives, as ``opened`` makes it of a descriptor or a handle; None when it cannot be opened here. Raises
    OSError."""
    if handle:
        return opened(None, handle)
    data, descriptors, _, _ = socket.recv_fds(channel.sock, 1, 1)
    try:
        if not data:
            raise ConnectionResetError("closed by the peer")
        return opened(descriptors[0], b"") if descriptors else None
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def require(over: Over) -> None:
    """Load what that way needs, which takes seconds: before a peer waits. Raises HyperFlexisError with the remedy."""
    try:
        if over == "nixl":
            os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
            import nixl._api  # noqa: F401
            import torch  # noqa: F401
        elif over == "torch":
            from . import group  # noqa: F401
    except ImportError as error:
        what, package = ("NIXL", "nixl") if over == "nixl" else ("torch.distributed", "'hyperflexis[torch]'")
        raise HyperFlexisError(
            f"weights are to come over {what}, and it does not load: {error}; pip install {package}, or leave "
            "weights_over out"
        ) from error


def path_over(over: Over, memory: Memory | Mapped) -> Path:
    """What ``over`` comes to for such memory. Raises Refusal when it comes to nothing."""
    if over != "torch":
        return "nixl"
    from .group import backend_of

    return backend_of(memory)


def outward(path: str, channel: SocketChannel, memory: Memory | Mapped, over: Over) -> Outward:
    """A source's end of the way that a target asks for. Raises Refusal when it may not, or cannot."""
    if path == SHARED:
        return Lent(channel, memory)
    offered = path_over(over, memory) if over else ""
    if path != offered:
        raise Refusal(
            f"it gives weights over {offered or 'shared memory and TCP'}, not over {path}: set weights_over, the same "
            "at both ends, where both have memory of one kind"
        )
    if path == "nixl":
        from .nixl import Read

        return Read(channel, memory)
    from .group import GroupSource

    return GroupSource(channel, memory)


def inward(path: Path, channel: SocketChannel, own: Memory, handle: bytes, limit_s: float) -> Inward:
    """A target's end of one that ``over`` stands for. A piece of it takes ``limit_s`` at most. Raises OSError and
    Refusal."""
    if path == "nixl":
        from .nixl import Reader

        return Reader(channel, own, handle, limit_s)
    from .group import GroupTarget

    return GroupTarget(channel, own, limit_s)
