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

from ..errors import HyperFlexisError

_POPULATE_READ, _POPULATE_WRITE = 22, 23
"""Advice of Linux 5.14 that Python has no names for."""


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

    def prepare(self, start: int, stop: int) -> None:
        """These bytes are to be read next: have their pages mapped at once, which takes half of the time of a fault for
        each."""
        start -= start % mmap.PAGESIZE
        with contextlib.suppress(OSError):  # an older kernel: then by faults
            self._memory.madvise(_POPULATE_READ, start, stop - start)


def copy(source: int, target: int, size: int) -> None:
    """Between two addresses, while other threads run: assigning a memoryview would hold them up."""
    ctypes.memmove(target, source, size)


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
