"""Rings in a device's memory: KV goes from one device to another, or to the same one, and never through the host.

The ring lies on the target's device, and the source writes into it (CUDA IPC; over NVLink or PCIe where it is another
device). Checksums are made where the bytes are at hand, each side on its own device. All of that is told to the device
on one stream for all rings, so that it neither waits for the model's work nor holds that up.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from zlib import crc32

import torch
from torch import Tensor

from ...transfer.ring import RING_BYTES
from ...transfer.transport import MAX_PAYLOAD
from .device import handle_of, opened, told, withdraw

_FRACTION = 0x1E3779B97F4A7C15
"""Its multiples are spread over all integers: the golden ratio's, less the bits that a signed one has not."""


class DeviceRing:
    """A Ring in ``memory``, RING_BYTES of uint8 on a device. ``handle`` is that of an OwnRing."""

    def __init__(self, memory: Tensor, handle: bytes = b"") -> None:
        self._memory = memory
        self._device = memory.device
        self.handle = handle

    def slot(self, number: int, size: int) -> AbstractContextManager[Tensor]:
        """See Ring."""
        return nullcontext(self._memory[number * MAX_PAYLOAD : number * MAX_PAYLOAD + size])

    def checksum(self, header: bytes, payload: Tensor) -> int:
        """See Ring. Of the payload a sum of its words, each with an odd weight of its own, modulo 2^64."""
        words = payload.view(torch.int32) if payload.numel() % 4 == 0 else payload
        with _aside(self._device):
            total = int((words * _weights(self._device)[: words.numel()]).sum())
        return crc32(total.to_bytes(8, "big", signed=True), crc32(header))

    def pass_on(self, sock: socket.socket) -> None:
        """See OwnRing: the handle says all."""

    def withdraw(self) -> None:
        """See OwnRing."""
        withdraw(self.handle)
        self.close()

    def close(self) -> None:
        """See Ring. PyTorch keeps the memory as long as the peer has it."""
        with _aside(self._device):
            self._memory = self._memory.new_empty(0)


class TakenRing(DeviceRing):
    """A peer's, which may be on another device: what is written is put together here, and crosses once."""

    @contextmanager
    def slot(self, number: int, size: int) -> Iterator[Tensor]:
        """See Ring."""
        with _aside(self._device):
            payload = torch.empty(size, dtype=torch.uint8, device=self._device)
        yield payload
        with super().slot(number, size) as there, _aside(self._device) as stream:
            there.copy_(payload)
            if stream is not None:
                stream.synchronize()


class DeviceRings:
    """The Rings of processes on one host that compute on ``device`` and its like."""

    def __init__(self, device: torch.device) -> None:
        self.kind = device.type
        self._device = device

    def make(self) -> DeviceRing | None:
        """See Rings."""
        try:
            with _aside(self._device):
                memory = torch.empty(RING_BYTES, dtype=torch.uint8, device=self._device)
                handle = handle_of(memory)
        except OSError:
            return None
        return DeviceRing(memory, handle) if handle else None

    def take(self, sock: socket.socket, handle: bytes) -> TakenRing | None:
        """See Rings."""
        with _aside(self._device):
            memory = opened(handle, RING_BYTES, self._device)
        return None if memory is None else TakenRing(memory)


@contextmanager
def _aside(device: torch.device) -> Iterator[torch.cuda.Stream | None]:
    """On the stream of all rings, where there are streams. What the device refuses is an OSError."""
    with told():
        if device.type != "cuda":
            yield None
            return
        stream = _stream(device)
        with torch.cuda.stream(stream):
            yield stream


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@cache
def _weights(device: torch.device) -> Tensor:
    return (torch.arange(MAX_PAYLOAD, dtype=torch.int64) * _FRACTION | 1).to(device)
