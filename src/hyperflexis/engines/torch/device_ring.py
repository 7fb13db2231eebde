"""Rings in a device's memory: KV goes from one device to another, or to the same one, and never through the host.

The ring lies on the target's device, and the source writes into it (CUDA IPC; over NVLink or PCIe where it is another
device). Checksums are made on the device too.
"""

from __future__ import annotations

import socket
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from zlib import crc32

import torch
from torch import Tensor

from ...transfer.ring import RING_BYTES
from ...transfer.transport import MAX_PAYLOAD
from .device import handle_of, opened

_FRACTION = 0x1E3779B97F4A7C15
"""Its multiples are spread over all integers: the golden ratio's, less the bits that a signed one has not."""


class DeviceRing:
    """A Ring in ``memory``, RING_BYTES of uint8 on a device. ``handle`` is that of an OwnRing."""

    def __init__(self, memory: Tensor, handle: bytes = b"") -> None:
        self._memory = memory
        self.handle = handle

    def slot(self, number: int, size: int) -> nullcontext[Tensor]:
        """See Ring."""
        return nullcontext(self._memory[number * MAX_PAYLOAD : number * MAX_PAYLOAD + size])

    def checksum(self, header: bytes, payload: Tensor) -> int:
        """See Ring. Of the payload a sum of its words, each with an odd weight of its own, modulo 2^64."""
        words = payload.view(torch.int32) if payload.numel() % 4 == 0 else payload
        with own_stream(payload.device):
            total = int((words * _weights(payload.device)[: words.numel()]).sum())
        return crc32(total.to_bytes(8, "big", signed=True), crc32(header))

    def pass_on(self, sock: socket.socket) -> None:
        """See OwnRing: the handle says all."""

    def close(self) -> None:
        """See Ring. Its memory is free when the peer has given it up too."""
        self._memory = self._memory[:0].clone()


class DeviceRings:
    """The Rings of processes on one host that compute on ``device`` and its like."""

    def __init__(self, device: torch.device) -> None:
        self.kind = device.type
        self._device = device

    def make(self) -> DeviceRing | None:
        """See Rings."""
        try:
            # Not zeroed: that might wait behind the model's work, and come after the first payload.
            memory = torch.empty(RING_BYTES, dtype=torch.uint8, device=self._device)
        except RuntimeError:
            return None
        handle = handle_of(memory)
        return DeviceRing(memory, handle) if handle else None

    def take(self, sock: socket.socket, handle: bytes) -> DeviceRing | None:
        """See Rings."""
        memory = opened(handle, RING_BYTES, self._device)
        return None if memory is None else DeviceRing(memory)


def own_stream(device: torch.device) -> AbstractContextManager[object]:
    """What is told to the device in it does not wait for what the model was told before."""
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


@cache
def _weights(device: torch.device) -> Tensor:
    return (torch.arange(MAX_PAYLOAD, dtype=torch.int64) * _FRACTION | 1).to(device)
