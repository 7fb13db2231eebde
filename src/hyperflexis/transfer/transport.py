"""A channel of frames between two threads of two processes: a small header, and a payload that is copied once at most.

Payloads are written in place and read in place, wherever the transport keeps them: a socket's buffer (tcp.py), or
memory that both processes share (ring.py). Each frame has a checksum, which is made here and checked here. The calls
block and are made from threads: one that sends, one that receives; ``close`` may come from any.

A broken channel raises OSError, bytes that are no frame ProtocolError; then the channel is of no more use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec

from ..errors import ProtocolError

T = TypeVar("T")

MAX_PAYLOAD = 1 << 20
"""Bytes of one frame's payload. Large enough that what a frame costs besides copying (about 50 us) is a tenth, small
enough that the next layer's begins to leave soon."""
PEER_LIMIT_S = 10.0
"""A peer that takes nothing for so long is as good as dead."""

Payload = Any
"""Bytes in place: a memoryview, or PyTorch's tensor of uint8 where the memory is a device's."""
Fill = Callable[[Payload], bool]
"""Writes a payload in place; False when it came to nothing, then the frame is not sent."""


@dataclass(frozen=True, slots=True)
class Frame:
    """``payload`` may be read until the function that was given the frame returns."""

    header: bytes
    payload: Payload
    checksum: int


def decode(decoder: msgspec.msgpack.Decoder[T], header: bytes) -> T:
    """What a peer said. Raises ProtocolError for what is no such message."""
    try:
        return decoder.decode(header)
    except msgspec.DecodeError as error:
        raise ProtocolError(str(error)) from error


class Channel(Protocol):
    """See the module."""

    def send(self, header: bytes, size: int = 0, fill: Fill | None = None) -> int | None:
        """Send a frame with a payload of ``size`` bytes. Blocks while the receiver is behind. Returns its checksum, or
        None when ``fill`` had nothing to send. Raises OSError."""

    def receive(self, take: Callable[[Frame], T]) -> T:
        """Wait for the next frame and give it to ``take``; returns what that returns. Raises OSError, and ProtocolError
        for what is no frame or has another checksum than it says."""

    def close(self) -> None:
        """End the channel at both ends: calls under way raise OSError."""
