"""Rings in a device's memory between two engines of one process, which needs no handle that another could open."""

from __future__ import annotations

import socket

import torch

from hyperflexis.engines.torch.device_ring import DeviceRing, TakenRing
from hyperflexis.transfer.ring import RING_BYTES


class OneProcess:
    """Rings of ``device``, by their number."""

    kind = "one process"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.made: list[torch.Tensor] = []

    def make(self) -> DeviceRing:
        self.made.append(torch.zeros(RING_BYTES, dtype=torch.uint8, device=self._device))
        return DeviceRing(self.made[-1], b"%d" % (len(self.made) - 1))

    def take(self, sock: socket.socket, handle: bytes) -> TakenRing:
        return TakenRing(self.made[int(handle)])
