"""Blocks between a source and a target by PyTorch's own transports: a process group of the two, for one connection.

The group is of this pair alone: who dies ends it for nobody else, and the next try makes another one. It is made over
the connection on which both have shown that they know the fleet's token, so no store listens anywhere. What it moves
goes directly from tensor to tensor: from device to device where both are on devices of one kind.

NCCL and HCCL have not been run here, and one thing is NCCL's own: with its watchdog a dead peer takes the whole process
down (TORCH_NCCL_ASYNC_ERROR_HANDLING is 3 unless set), so there is none (TORCH_NCCL_BLOCKING_WAIT); waiting is ours.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import msgspec
import torch
import torch.distributed as dist

from ..core.weights import Path
from .arena import Mapped, Memory
from .links import Refusal
from .tcp import SocketChannel
from .transport import PEER_LIMIT_S, decode

if TYPE_CHECKING:
    from .weights import Shard

if not dist.is_available():
    raise ImportError("this build of PyTorch has no torch.distributed")

_BACKENDS: dict[str, Path] = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
"""By the kind of device that the memory is of."""
_SOURCE, _TARGET = 0, 1
"""Ranks."""
_LONGEST_REST_S = 5e-4


class Kept(msgspec.Struct, frozen=True, tag=True):
    """What one end puts into the store of both."""

    key: str
    value: bytes


_KEPT = msgspec.msgpack.Decoder(Kept)


def backend_of(memory: Memory | Mapped) -> Path:
    """The transport for such memory. Raises Refusal when there is none in this PyTorch."""
    kind = memory.as_tensor(0, 1).device.type
    backend = _BACKENDS.get(kind)
    if backend is None or not hasattr(dist, f"ProcessGroup{_name(backend)}"):
        raise Refusal(f"PyTorch {torch.__version__} here has no transport between memories of {kind}")
    return backend


class GroupSource:
    """A source's end; see Outward."""

    handle = b""

    def __init__(self, channel: SocketChannel, memory: Memory | Mapped) -> None:
        self._channel = channel
        self._memory = memory
        self._group: _Group | None = None

    def begin(self) -> None:
        """See Outward: both make the group now."""
        self._channel.limit_receive(PEER_LIMIT_S)
        try:
            self._group = _Group(_SOURCE, self._channel, backend_of(self._memory), PEER_LIMIT_S)
        finally:
            self._channel.limit_receive(None)

    def give(self, start: int, stop: int) -> None:
        """See Outward."""
        assert self._group is not None
        self._group.move(self._memory.as_tensor(start, stop))

    def close(self) -> None:
        """See Outward."""
        if self._group is not None:
            self._group.close()


class GroupTarget:
    """A target's end; see Inward."""

    def __init__(self, channel: SocketChannel, own: Memory, limit_s: float) -> None:
        """Raises OSError when there comes no group about."""
        self.path = backend_of(own)
        self._own = own
        self._group = _Group(_TARGET, channel, self.path, limit_s)

    def bring(self, shard: Shard, blocks: range) -> None:
        """See Inward."""
        self._group.move(self._own.as_tensor(*shard.layout.extent(blocks)))
        shard.came(blocks)

    def close(self) -> None:
        """See Inward."""
        self._group.close()


class _Store(dist.Store):  # type: ignore[misc, name-defined]
    """What the two tell each other in order to connect: over the connection that they have."""

    def __init__(self, channel: SocketChannel) -> None:
        super().__init__()
        self._channel = channel
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: bytes) -> None:
        """See torch.distributed.Store, as the others."""
        self._values[key] = bytes(value)
        self._channel.send(msgspec.msgpack.encode(Kept(key, bytes(value))))

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """The connection has a limit of its own."""
        while not self.check(keys):
            kept = decode(_KEPT, self._channel.receive(lambda frame: frame.header))
            self._values[kept.key] = kept.value


class _Group:
    """The two. A dead peer is an OSError, at the latest after ``limit_s``; then the group is of no more use."""

    def __init__(self, rank: int, channel: SocketChannel, backend: Path, limit_s: float) -> None:
        self._rank = rank
        self._limit_s = limit_s
        self._store = _Store(channel)
        limit = timedelta(seconds=limit_s)
        with _told(backend):
            if backend == "gloo":
                options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
                options._devices = [dist.ProcessGroupGloo.create_device(hostname=channel.own_host)]
                options._timeout, options._threads = limit, 1
                self._group: Any = dist.ProcessGroupGloo(self._store, rank, 2, options)
            else:
                os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
                os.environ.setdefault("HCCL_BLOCKING_WAIT", "1")
                make = getattr(dist, f"ProcessGroup{_name(backend)}")
                self._group = make(self._store, rank, 2, limit)
        self._backend = backend

    def move(self, tensor: torch.Tensor) -> None:
        """Send it, or receive it; returns when that is done."""
        with _told(self._backend):
            if self._rank == _SOURCE:
                work = self._group.send([tensor], _TARGET, 0)
            else:
                work = self._group.recv([tensor], _SOURCE, 0)
            if self._backend == "gloo":
                work.wait(timedelta(seconds=self._limit_s))
            else:
                self._await(work)

    def close(self) -> None:
        """Cut the connection to the peer: what comes late is written nowhere."""
        with suppress(OSError), _told(self._backend):
            self._group.abort()
        self._group = None

    def _await(self, work: Any) -> None:
        """Until a device has done it: waiting for it in PyTorch has no limit that holds while the device hangs."""
        until, rest_s = time.monotonic() + self._limit_s, 1e-5
        while not work.is_completed():
            if time.monotonic() > until:
                raise TimeoutError(f"{self._backend}: nothing moved for {self._limit_s:g} s")
            time.sleep(rest_s)
            rest_s = min(2.0 * rest_s, _LONGEST_REST_S)
        work.wait()


def _name(backend: Path) -> str:
    return backend.upper() if backend != "gloo" else "Gloo"


@contextmanager
def _told(backend: Path) -> Iterator[None]:
    """What PyTorch cannot do is an OSError, as on any way."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"{backend}: {error}") from error
