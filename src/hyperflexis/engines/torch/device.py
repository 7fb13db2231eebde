"""A model's weights in a device's memory: the same books, digests and ways as in the host's (transfer/arena.py).

    same host    another process opens the memory by a handle (CUDA IPC) and copies from device to device
    elsewhere    bytes go through a piece of the host's memory at each end, and over TCP

A handle is what PyTorch shares a storage by: bytes and numbers, packed as such; nothing is unpickled.

Digests are the host's work, so each byte that is checked crosses to the host once, in page-locked memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import torch

from ...errors import HyperFlexisError
from ...transfer.arena import Foreign, Mapped

_Handle = tuple[bytes, int, int, bytes, int, bytes, bool]
_HANDLE: msgspec.msgpack.Decoder[_Handle] = msgspec.msgpack.Decoder(_Handle)


@contextmanager
def told() -> Iterator[None]:
    """What a device refuses is an OSError, as from any memory: the next way is tried."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"the device: {error}") from error


class _Staged:
    """Device bytes, read through memory of the host that each thread has for itself."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self._local = threading.local()

    def staging(self, size: int) -> torch.Tensor:
        """At least ``size`` bytes of this thread's own."""
        held: torch.Tensor | None = getattr(self._local, "held", None)
        if held is None or held.numel() < size:
            held = torch.empty(size, dtype=torch.uint8, pin_memory=self.tensor.device.type == "cuda")
            self._local.held = held
        return held[:size]

    def read(self, start: int, stop: int) -> memoryview:
        """See Foreign: a copy in the host's memory."""
        with told():
            staging = self.staging(stop - start)
            staging.copy_(self.tensor[start:stop])
            return staging.numpy().data


class DeviceArena:
    """A Memory of ``size`` bytes on a device, zero at first. With ``shared`` other processes on this host can open it.

    Raises HyperFlexisError when there is not so much memory.
    """

    def __init__(self, size: int, device: torch.device, shared: bool = False) -> None:
        self.size = size
        self.descriptor: int | None = None
        try:
            self.tensor = torch.zeros(size, dtype=torch.uint8, device=device)
        except RuntimeError as error:
            raise HyperFlexisError(f"no memory on {device} for {size} bytes of weights: {error}") from error
        self._staged = _Staged(self.tensor)
        self._shares = shared and device.type == "cuda"

    def handle(self) -> bytes:
        """See Memory."""
        return handle_of(self.tensor) if self._shares else b""

    def read(self, start: int, stop: int) -> memoryview:
        """See Memory: a copy in the host's memory."""
        return self._staged.read(start, stop)

    def fill(self, start: int, stop: int, receive: Callable[[memoryview], None]) -> None:
        """See Memory."""
        with told():
            staging = self._staged.staging(stop - start)
        receive(staging.numpy().data)
        self._write(start, staging)

    def as_tensor(self, start: int, stop: int) -> torch.Tensor:
        """See Memory."""
        return self.tensor[start:stop]

    def open(self, descriptor: int | None, handle: bytes) -> Foreign | None:
        """See Memory: another device's, or the host's."""
        if descriptor is not None:
            return Mapped(descriptor, self.size)
        found = opened(handle, self.size, self.tensor.device) if self.tensor.device.type == "cuda" else None
        return None if found is None else _Staged(found)

    def take(self, other: Foreign, start: int, stop: int) -> None:
        """See Memory."""
        if isinstance(other, Mapped):
            with told():
                staging = self._staged.staging(stop - start)
            other.copy_to(staging.numpy().data, start)
            self._write(start, staging)
        else:
            assert isinstance(other, _Staged)
            self._write(start, other.tensor[start:stop])

    def release(self) -> None:
        """Others that have it open keep it until they end; nobody else is given the handle."""
        self._shares = False

    def _write(self, start: int, data: torch.Tensor) -> None:
        with told():
            self.tensor[start : start + data.numel()].copy_(data)
            if self.tensor.device.type == "cuda":
                torch.cuda.current_stream(self.tensor.device).synchronize()


def handle_of(tensor: torch.Tensor) -> bytes:
    """For one other process, which has to open it: until then PyTorch keeps the memory, unless it is told to
    ``withdraw`` it. Empty where the device's memory cannot be shared."""
    try:
        _, *rest = tensor.untyped_storage()._share_cuda_()  # type: ignore[no-untyped-call]
    except RuntimeError:
        return b""
    return msgspec.msgpack.encode(rest)


def withdraw(handle: bytes) -> None:
    """Nobody opens this handle, which was made here."""
    _, _, _, counter, offset, _, _ = _HANDLE.decode(handle)
    torch.UntypedStorage._release_ipc_counter_cuda(counter, offset)


def opened(handle: bytes, size: int, device: torch.device) -> torch.Tensor | None:
    """``size`` bytes of another process on this host; None when they cannot be had from here."""
    try:
        parts = _HANDLE.decode(handle)
        torch.cuda.init()  # type: ignore[no-untyped-call]
        storage = torch.UntypedStorage._new_shared_cuda(device.index or 0, *parts)
    except (msgspec.DecodeError, RuntimeError):
        return None
    tensor = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return tensor[:size] if tensor.numel() >= size else None
