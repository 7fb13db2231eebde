"""Rings in the host's memory, by a file that never has a name: when both processes have died, in whatever way, nothing
of it is left. Its descriptor is passed over the link's Unix socket."""

from __future__ import annotations

import mmap
import os
import socket
from zlib import crc32

from .ring import RING_BYTES
from .transport import MAX_PAYLOAD


class HostRing:
    """A Ring."""

    def __init__(self, descriptor: int) -> None:
        """Maps the file. Raises OSError when that cannot be."""
        populate = getattr(mmap, "MAP_POPULATE", 0)  # page faults now, and not while KV waits for them
        self._memory = mmap.mmap(descriptor, RING_BYTES, flags=mmap.MAP_SHARED | populate)
        self._view = memoryview(self._memory)

    def slot(self, number: int, size: int) -> memoryview:
        """See Ring."""
        return self._view[number * MAX_PAYLOAD : number * MAX_PAYLOAD + size]

    def checksum(self, header: bytes, payload: memoryview) -> int:
        """See Ring."""
        return crc32(payload, crc32(header))

    def close(self) -> None:
        """Unmap it."""
        self._view.release()
        self._memory.close()


class OwnHostRing(HostRing):
    """An OwnRing."""

    handle = b""

    def __init__(self) -> None:
        """Makes the memory. Raises OSError when that cannot be."""
        self._descriptor = os.memfd_create("hyperflexis-kv")
        try:
            os.ftruncate(self._descriptor, RING_BYTES)
            super().__init__(self._descriptor)
        except BaseException:
            os.close(self._descriptor)
            raise

    def pass_on(self, sock: socket.socket) -> None:
        """See OwnRing."""
        socket.send_fds(sock, [b"\0"], [self._descriptor])

    def withdraw(self) -> None:
        """See OwnRing."""
        self.close()

    def close(self) -> None:
        """Unmap it, and have it freed when the peer has done so too."""
        super().close()
        os.close(self._descriptor)


class HostRings:
    """The Rings that any two processes on one host can have."""

    kind = "host"

    def make(self) -> OwnHostRing | None:
        """See Rings."""
        if not hasattr(os, "memfd_create"):
            return None
        try:
            return OwnHostRing()
        except OSError:
            return None

    def take(self, sock: socket.socket, handle: bytes) -> HostRing | None:
        """See Rings."""
        data, descriptors, _, _ = socket.recv_fds(sock, 1, 1)
        if not data:
            raise ConnectionResetError("closed by the peer")
        try:
            # A shorter file would be a bus error later.
            if not descriptors or os.fstat(descriptors[0]).st_size != RING_BYTES:
                return None
            return HostRing(descriptors[0])
        except OSError:
            return None
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
