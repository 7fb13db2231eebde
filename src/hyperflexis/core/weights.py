"""A model's weights as what travels: tensors in one piece of memory, blocks of it with digests, and the books of which
blocks are there. No I/O.

    memory    | tensor 0          | pad | tensor 1 | pad | ...
    blocks    | 0 | 1 | 2 | 3 | 4 |     | 5 | 6 |       ...     at most BLOCK bytes, none of two tensors
    chunks    | 0         | 1               | 2         ...     runs of blocks: one socket's turn

Two processes that agree in the layout have each byte at the same place, so a block needs no other name than its number.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Literal

from ..errors import ProtocolError
from .instance import InstanceInfo

ALIGN = 64
"""Bytes: tensors begin at cache lines."""
BLOCK = 512 << 10
"""Bytes. Small enough that a block is still in a core's second-level cache (1 to 2 MiB on current servers) when it is
digested right after it came, large enough that what a block costs besides (some 5 us of Python) is a tenth of a copy's
time."""
DIGEST_BYTES = 16
"""Of a block: 128 bits, so that equal digests mean equal weights, among any number of models."""


@dataclass(frozen=True, slots=True)
class WeightSource:
    """Where an instance's weights are to be had."""

    address: str
    instance: str
    epoch: int


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor as an engine keeps it: ``size`` in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class WeightLayout:
    """What both ends have to agree in: tensors in their order, as ``rank`` of ``ranks`` keeps them. ``model`` names the
    configuration by a digest; weights of one configuration fit in any shell of it."""

    model: str
    tensors: tuple[TensorSpec, ...]
    rank: int = 0
    ranks: int = 1

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each tensor begins."""
        found, at = [], 0
        for tensor in self.tensors:
            found.append(at)
            at += -(-tensor.size // ALIGN) * ALIGN
        return tuple(found)

    @cached_property
    def size(self) -> int:
        """Bytes of memory for all of them."""
        return self.offsets[-1] + self.tensors[-1].size if self.tensors else 0

    @cached_property
    def blocks(self) -> tuple[range, ...]:
        """The bytes of each block."""
        return tuple(
            range(at, min(at + BLOCK, offset + tensor.size))
            for tensor, offset in zip(self.tensors, self.offsets, strict=True)
            for at in range(offset, offset + tensor.size, BLOCK)
        )

    def extent(self, blocks: range) -> tuple[int, int]:
        """The bytes of some blocks, from the first to the last, with the gaps between their tensors."""
        return self.blocks[blocks.start].start, self.blocks[blocks.stop - 1].stop

    def tensor_at(self, block: int) -> TensorSpec:
        """The tensor that a block is of."""
        return self.tensors[bisect_right(self.offsets, self.blocks[block].start) - 1]

    def chunks(self, spans: Iterable[range], chunk_bytes: int) -> Iterator[range]:
        """``spans`` of blocks, cut where a chunk would be larger than ``chunk_bytes``, in order."""
        for span in spans:
            first = span.start
            for number in span:
                if number > first and self.blocks[number].stop - self.blocks[first].start > chunk_bytes:
                    yield range(first, number)
                    first = number
            if first < span.stop:
                yield range(first, span.stop)


def difference(mine: WeightLayout, theirs: WeightLayout) -> str:
    """In what two layouts differ, for a person; empty when they do not."""
    if mine.ranks != theirs.ranks or mine.rank != theirs.rank:
        return f"rank {theirs.rank} of {theirs.ranks} there, {mine.rank} of {mine.ranks} here"
    here, there = ({tensor.name: tensor for tensor in one.tensors} for one in (mine, theirs))
    for name, tensor in here.items():
        other = there.get(name)
        if other is None:
            return f"tensor {name} is not there"
        if other.dtype != tensor.dtype:
            return f"tensor {name} is {other.dtype} there, {tensor.dtype} here"
        if other.shape != tensor.shape:
            return f"tensor {name} has shape {list(other.shape)} there, {list(tensor.shape)} here"
    if mine.model != theirs.model:
        return f"the model's configuration is {theirs.model} there, {mine.model} here"
    return "" if mine == theirs else "the tensors are others, or in another order"


@dataclass(frozen=True, slots=True)
class Manifest:
    """Weights by their digests. ``blocks``: DIGEST_BYTES for each block. ``check`` is the engine's own, to see that
    what it has loaded computes what its source computes."""

    layout: WeightLayout
    blocks: bytes
    check: bytes = b""

    def block(self, number: int) -> bytes:
        """The digest of a block."""
        return self.blocks[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]

    @property
    def digest(self) -> str:
        """Of all weights, and of how they lie."""
        return blake2b(repr(self.layout).encode() + self.blocks, digest_size=16).hexdigest()


class Ledger:
    """Which of ``count`` blocks are there. Each comes once."""

    def __init__(self, count: int) -> None:
        self._there = bytearray(count)
        self._left = count

    @property
    def is_complete(self) -> bool:
        """Whether all are there."""
        return not self._left

    def enter(self, block: int) -> None:
        """One came. Raises ProtocolError when it is none, or was there."""
        if not 0 <= block < len(self._there) or self._there[block]:
            raise ProtocolError(f"block {block} of {len(self._there)} came, and was not asked for")
        self._there[block] = 1
        self._left -= 1

    def end_of_run(self, block: int, end: int) -> int:
        """The first block from ``block`` on that is not there, at most ``end``."""
        found = self._there.find(0, block, end)
        return end if found < 0 else found

    def missing(self) -> list[range]:
        """What is still to come, in order."""
        found, at = [], 0
        while (first := self._there.find(0, at)) >= 0:
            after = self._there.find(1, first)
            at = len(self._there) if after < 0 else after
            found.append(range(first, at))
        return found


Path = Literal["shared memory", "device", "tcp", "nixl", "gloo", "nccl", "hccl", "disk"]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One way to the weights that was tried: ``num_bytes`` came over it in ``seconds``. ``source`` is an instance, or a
    directory. ``problem`` says why it was not enough; empty: it was."""

    path: Path
    source: str
    num_bytes: int
    seconds: float
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a start, and how long it took."""

    name: str
    seconds: float


# Between controller and instance. A standby introduces itself, is told once to load, and then joins as any other.


@dataclass(frozen=True, slots=True)
class InstanceStandby:
    """An instance connected that has no weights yet; all else that ``info`` says holds already."""

    info: InstanceInfo
    phases: tuple[Phase, ...]


@dataclass(frozen=True, slots=True)
class LoadWeights:
    """A standby is to get its weights from the first of ``sources`` that gives them, else from disk, and to be ready.
    With ``digest`` (that of InstanceInfo.weights_digest) it takes no others."""

    instance: str
    epoch: int
    sources: tuple[WeightSource, ...] = ()
    digest: str = ""
    chunk_bytes: int = 16 << 20


@dataclass(frozen=True, slots=True)
class WeightsLoaded:
    """How that went, and how long each part took. With a ``problem`` it is still a standby and may be told again; else
    it has just joined."""

    instance: str
    epoch: int
    attempts: tuple[Attempt, ...]
    phases: tuple[Phase, ...]
    problem: str = ""


@dataclass(frozen=True, slots=True)
class SetSendRate:
    """How fast an instance may give weights away from now on, in all: bytes per second, and slower while it serves.
    None: as fast as it goes, whatever that does to its requests."""

    instance: str
    epoch: int
    bytes_per_s: float | None
