"""Rings in a device's memory, which is the CPU's here. What only a GPU has, tests/gpu looks at."""

from __future__ import annotations

import socket

import pytest
import torch

from hyperflexis.engines.torch.device_ring import DeviceRing, DeviceRings
from hyperflexis.transfer.ring import RING_BYTES
from hyperflexis.transfer.transport import MAX_PAYLOAD


@pytest.mark.parametrize("size", [1, 6, 4096, 4097, MAX_PAYLOAD])
def test_a_checksum_tells_each_change(size: int) -> None:
    memory = torch.randint(0, 256, (RING_BYTES,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    ring, same = DeviceRing(memory), DeviceRing(memory.clone())
    with ring.slot(2, size) as payload, same.slot(2, size) as other:
        assert len(payload) == size
        right = ring.checksum(b"header", payload)
        assert same.checksum(b"header", other) == right < 1 << 32
        assert ring.checksum(b"headed", payload) != right
        for place in {0, size // 3, size - 1}:
            payload[place] ^= 0x80
            assert ring.checksum(b"header", payload) != right
            payload[place] ^= 0x80
        if size > 1:
            payload.copy_(other.roll(4 if size % 4 == 0 else 1))
            assert ring.checksum(b"header", payload) != right, "the same bytes in other places"


def test_memory_that_nobody_else_can_open_makes_no_ring() -> None:
    rings = DeviceRings(torch.device("cpu"))
    assert rings.make() is None
    with socket.socket() as unused:
        assert rings.take(unused, b"no handle") is None
