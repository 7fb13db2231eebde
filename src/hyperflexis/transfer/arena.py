"""Memory for a model's weights: in one piece, written once before it is used, and shared where that is wanted.

A first touch costs as much as three copies of the same memory, so all pages are there before weights come. They are
large ones where the system has them, unless the memory is read only once or twice: copies and matrix products then
spend less on translating addresses, but where free memory is in pieces the system takes seconds to make them. Shared
memory is a file without a name, as in shm.py: nothing of it is left when its processes have died.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from ..errors import HyperFlexisError

_POPULATE_READ, _POPULATE_WRITE = 22, 23
"""Advice of Linux 5.14 that Python has no names for."""
_madvise = getattr(ctypes.CDLL(None), "madvise", None)
if _madvise is not None:
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Foreign(Protocol):
    """Another process's memory on this host, to be read here."""

    def read(self, start: int, stop: int) -> memoryview:
        """These bytes, until this thread's next ``read``."""


class Memory(Protocol):
    """Where a model's weights are: the host's memory (Arena), or a device's. ``size`` in bytes. Others on this host get
    at it by ``descriptor``, or by a handle, or by neither (None, empty)."""

    size: int
    descriptor: int | None

    def handle(self) -> bytes:
        """For one who asks."""

    def read(self, start: int, stop: int) -> memoryview:
        """These bytes, until this thread's next ``read``."""

    def fill(self, start: int, stop: int, receive: Callable[[memoryview], None]) -> None:
        """Have these bytes written by ``receive``."""

    def as_tensor(self, start: int, stop: int) -> Any:
        """These bytes where they are, as PyTorch's tensor of uint8, which has to be installed."""

    def open(self, descriptor: int | None, handle: bytes) -> Foreign | None:
        """What another one's can be read through; None when this kind of memory cannot. Raises OSError."""

    def take(self, other: Foreign, start: int, stop: int) -> None:
        """Copy these bytes from the same place of another one; they are here when it returns."""

    def release(self) -> None:
        """Nobody else can map it from now on."""


class Arena:
    """``size`` bytes, zero at first. ``descriptor``: by which others on this host can map it; None: not shared."""

    def __init__(self, size: int, shared: bool = False, large_pages: bool = True) -> None:
        """Raises HyperFlexisError when there is not so much memory, or none that can be shared."""
        self.size = size
        self.descriptor: int | None = None
        try:
            if shared:
                self.descriptor = os.memfd_create("hyperflexis-weights")
                os.ftruncate(self.descriptor, size)
                self._memory = mmap.mmap(self.descriptor, size, flags=mmap.MAP_SHARED)
            else:
                self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            _prefault(self._memory, large_pages)
        except (OSError, AttributeError) as error:
            self.release()
            raise HyperFlexisError(f"no memory for {size} bytes of weights: {error}") from error
        self.view = memoryview(self._memory)
        self.address = _address(self._memory)

    def handle(self) -> bytes:
        """See Memory."""
        return b""

    def read(self, start: int, stop: int) -> memoryview:
        """See Memory; no copy."""
        return self.view[start:stop]

    def fill(self, start: int, stop: int, receive: Callable[[memoryview], None]) -> None:
        """See Memory; they are received where they are to be."""
        receive(self.view[start:stop])

    def as_tensor(self, start: int, stop: int) -> Any:
        """See Memory."""
        return _as_tensor(self.view[start:stop])

    def open(self, descriptor: int | None, handle: bytes) -> Mapped | None:
        """See Memory."""
        return None if descriptor is None else Mapped(descriptor, self.size)

    def take(self, other: Foreign, start: int, stop: int) -> None:
        """See Memory."""
        assert isinstance(other, Mapped)
        other.copy_to(self.view[start:stop], start)

    def release(self) -> None:
        """Nobody else can map it from now on. The memory itself goes when nothing here uses it any more."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


class Mapped:
    """The arena of another process. It may be written here, and the other does not see it: a page is copied then.
    ``descriptor``: by which it can be mapped once more, also when the other has ended."""

    def __init__(self, descriptor: int, size: int) -> None:
        """Raises OSError when it cannot be mapped, or is not so large: that would be a bus error later."""
        if os.fstat(descriptor).st_size != size:
            raise OSError(f"shared memory of {os.fstat(descriptor).st_size} bytes, not {size}")
        self.size = size
        self._memory = mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self.view = memoryview(self._memory)
        self.address = _address(self._memory)
        self.descriptor: int | None = os.dup(descriptor)
        self._closing = weakref.finalize(self, os.close, self.descriptor)

    def release(self) -> None:
        """See Arena."""
        self._closing()
        self.descriptor = None

    def handle(self) -> bytes:
        """See Memory."""
        return b""

    def read(self, start: int, stop: int) -> memoryview:
        """See Foreign; no copy."""
        return self.view[start:stop]

    def as_tensor(self, start: int, stop: int) -> Any:
        """See Memory."""
        return _as_tensor(self.view[start:stop])

    def copy_to(self, into: memoryview, start: int) -> None:
        """The bytes from ``start`` on, through the file: mapping pages of 4 KiB for one copy of each takes longer.

        Raises OSError where there are not so many any more.
        """
        assert self.descriptor is not None
        done = 0
        while done < len(into):
            count = os.preadv(self.descriptor, [into[done:]], start + done)
            if not count:
                raise OSError("its memory is shorter than it was")
            done += count

    def prepare(self, start: int, stop: int) -> None:
        """These bytes are to be read next: have their pages mapped at once, which takes half of the time of a fault for
        each."""
        start -= start % mmap.PAGESIZE
        # Not by mmap's madvise, which holds up all other threads. An older kernel does nothing: then by faults.
        if _madvise is not None:
            _madvise(self.address + start, stop - start, _POPULATE_READ)


def _as_tensor(view: memoryview) -> Any:
    import torch

    return torch.frombuffer(view, dtype=torch.uint8)


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _prefault(memory: mmap.mmap, large_pages: bool) -> None:
    if large_pages and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    try:
        memory.madvise(_POPULATE_WRITE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # An older kernel, or another system: one byte of each page does it too.
        for at in range(0, len(memory), mmap.PAGESIZE):
            memory[at] = 0
