"""Weights in a device's memory, in the same books as the host's. The device here is the CPU: all but its handles."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the torch engine needs PyTorch")

from tests.unit.transfer.weights_case import empty, fetched, free_address, full, layout, served  # noqa: E402

from hyperflexis.core.weights import Manifest  # noqa: E402
from hyperflexis.engines.torch.device import DeviceArena  # noqa: E402
from hyperflexis.transfer.weights import Shard  # noqa: E402

CPU = torch.device("cpu")


def on_device() -> Shard:
    return Shard(layout(), DeviceArena(layout().size, CPU, shared=True))


def full_device() -> Shard:
    shard = on_device()
    assert isinstance(shard.arena, DeviceArena)
    generator = torch.Generator().manual_seed(1)
    shard.arena.tensor.copy_(torch.randint(0, 256, (shard.arena.size,), dtype=torch.uint8, generator=generator))
    shard.publish(Manifest(shard.layout, shard.digests()))
    return shard


@pytest.mark.parametrize("kind", ["tcp", "unix"])
@pytest.mark.parametrize("way", ["to the device", "from the device", "between devices"])
def test_weights_move_between_host_and_device(kind: str, way: str, tmp_path: Path) -> None:
    source = full() if way == "to the device" else full_device()
    target = empty() if way == "from the device" else on_device()
    with served(source, free_address(kind, tmp_path)) as at:
        (attempt,) = fetched(target, at)
    assert attempt.problem == ""
    mapped = kind == "unix" and way == "to the device"
    assert attempt.path == ("shared memory" if mapped else "tcp")
    assert target.is_complete and target.digests() == source.digests()


def test_they_go_from_tensor_to_tensor_by_torch_distributed() -> None:
    source, target = full_device(), on_device()
    with served(source, "127.0.0.1:0", over="torch") as at:
        (attempt,) = fetched(target, at, over="torch")
    assert (attempt.path, attempt.problem) == ("gloo", "")
    assert target.is_complete and target.digests() == source.digests()


def test_a_damaged_byte_on_the_device_is_found() -> None:
    source, target = full_device(), on_device()
    assert isinstance(source.arena, DeviceArena)
    source.arena.tensor[1000] ^= 1
    with served(source, "127.0.0.1:0") as at:
        attempts = fetched(target, at)
    assert "was damaged on its way: the digest of block 0" in attempts[0].problem
    assert not target.is_complete
