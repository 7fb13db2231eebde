"""Blocks that a target reads out of its source's memory by NIXL, over RDMA.

The source registers its memory and tells where it is; the target reads a piece once it was granted, and says Took. NIXL
has no threads of its own here: its progress thread keeps a core busy as long as it lives (measured: 0.99 s of each).
What a source has to do in order to be read, such as the first connecting, it does while it waits for Took.

Not over UCX's TCP unless the user says so: there the source answers reads by software, and UCX ends its process when a
target left in the middle of one (docs/weight-transfer.md). Nor does UCX know of the fleet's token: whoever reaches its
ports while weights move may read and write this process's memory. So both ends have to ask for it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from secrets import token_hex
from typing import TYPE_CHECKING, Any

import msgspec

from ..core.weights import Path
from .arena import Mapped, Memory
from .tcp import SocketChannel
from .transport import PEER_LIMIT_S, decode

if TYPE_CHECKING:
    from .weights import Shard

_LONGEST_REST_S = 2e-4
"""Between two looks: a piece takes some milliseconds."""
TRANSPORTS = "UCX_TLS"
"""The variable by which a user chooses UCX's transports."""
_making = threading.Lock()


class _Place(msgspec.Struct, frozen=True):
    """Memory as NIXL names it: on which device, and whether in the host (DRAM) or on it (VRAM)."""

    address: int
    device: int
    kind: str


class _Handle(msgspec.Struct, frozen=True):
    """Where a source's memory is; ``agent``: NIXL's own words about how to reach it."""

    agent: bytes
    place: _Place


class Took(msgspec.Struct, frozen=True, tag=True):
    """From a target that has read all that was granted."""


_HANDLE = msgspec.msgpack.Decoder(_Handle)
_TOOK = msgspec.msgpack.Decoder(Took)


class _Agent:
    """NIXL, with a memory."""

    def __init__(self, memory: Memory | Mapped) -> None:
        """Raises OSError when NIXL cannot have it."""
        from nixl._api import nixl_agent, nixl_agent_config

        whole = memory.as_tensor(0, memory.size)
        on_device = whole.device.type != "cpu"
        self.place = _Place(whole.data_ptr(), whole.device.index or 0, "VRAM" if on_device else "DRAM")
        with told(), _making:
            self.nixl: Any = nixl_agent(token_hex(8), nixl_agent_config(enable_prog_thread=False, backends=[]))
            try:
                self.nixl.create_backend("UCX", {} if TRANSPORTS in os.environ else {"engine_config": "TLS=^tcp"})
            except Exception as error:
                raise OSError(
                    f"NIXL finds no RDMA here ({error}); set {TRANSPORTS} for another transport of UCX, which may end "
                    "the source's process when a target leaves"
                ) from error
            region = [(self.place.address, memory.size, self.place.device, "")]
            self._region: Any = self.nixl.register_memory(region, self.place.kind)

    def close(self) -> None:
        """With its worker ends all that was under way, and nothing is read or written any more."""
        with suppress(OSError), told():
            self.nixl.deregister_memory(self._region)
        self.nixl = self._region = None


class Read:
    """A source's end; see Outward."""

    def __init__(self, channel: SocketChannel, memory: Memory | Mapped) -> None:
        """Raises OSError."""
        self._channel = channel
        self._agent = _Agent(memory)
        with told():
            self.handle = msgspec.msgpack.encode(_Handle(self._agent.nixl.get_agent_metadata(), self._agent.place))

    def begin(self) -> None:
        """See Outward."""

    def give(self, start: int, stop: int) -> None:
        """See Outward: until the target has read them."""

        def took() -> bool:
            if self._channel.has_news():
                return True
            self._agent.nixl.get_new_notifs()  # which also does what is ours in the reading
            return False

        _until(took, PEER_LIMIT_S, "the target read nothing")
        decode(_TOOK, self._channel.receive(lambda frame: frame.header))

    def close(self) -> None:
        """See Outward."""
        self._agent.close()


class Reader:
    """A target's end; see Inward."""

    path: Path = "nixl"

    def __init__(self, channel: SocketChannel, own: Memory, handle: bytes, limit_s: float) -> None:
        """Raises OSError."""
        theirs = decode(_HANDLE, handle)
        self._channel = channel
        self._limit_s = limit_s
        self._theirs = theirs.place
        self._agent = _Agent(own)
        self._reading: Any = None
        try:
            with told():
                self._source = self._agent.nixl.add_remote_agent(theirs.agent)
        except OSError:
            self._agent.close()
            raise

    def bring(self, shard: Shard, blocks: range) -> None:
        """See Inward."""
        start, stop = shard.layout.extent(blocks)
        with told():
            here, there = (
                self._agent.nixl.get_xfer_descs([(place.address + start, stop - start, place.device)], place.kind)
                for place in (self._agent.place, self._theirs)
            )
            self._reading = self._agent.nixl.initialize_xfer("READ", here, there, self._source)
            state = self._agent.nixl.transfer(self._reading)

        def is_over() -> bool:
            nonlocal state
            if state == "PROC":
                if self._channel.has_news():  # it has nothing to say before it hears Took
                    raise ConnectionResetError("closed by the peer")
                state = self._agent.nixl.check_xfer_state(self._reading)
            return bool(state != "PROC")

        _until(is_over, self._limit_s, "nothing could be read from the source")
        if state != "DONE":
            raise OSError(f"NIXL: the reading ended as {state}")
        with told():
            self._reading.release()
        self._channel.send(msgspec.msgpack.encode(Took()))
        shard.came(blocks)

    def close(self) -> None:
        """See Inward."""
        with suppress(OSError), told():
            if self._reading is not None:
                self._reading.release()
        with suppress(OSError), told():
            self._agent.nixl.remove_remote_agent(self._source)
        self._reading = None
        self._agent.close()


def _until(is_over: Callable[[], bool], limit_s: float, problem: str) -> None:
    """Look again and again, less and less often. Raises OSError."""
    until, rest_s = time.monotonic() + limit_s, 1e-5
    with told():
        while not is_over():
            if time.monotonic() > until:
                raise TimeoutError(f"NIXL: {problem} for {limit_s:g} s")
            time.sleep(rest_s)
            rest_s = min(2.0 * rest_s, _LONGEST_REST_S)


@contextmanager
def told() -> Iterator[None]:
    """NIXL's exceptions, which have no base of their own, are OSErrors, as on any way."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"NIXL: {error or type(error).__name__}") from error
