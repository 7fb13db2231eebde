"""The tensors of the paged KV cache, and how many tokens the memory holds. Who holds which block: kv_blocks.py."""

from __future__ import annotations

import os
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ...errors import HyperFlexisError
from .config import ModelConfig

_CGROUP = Path("/sys/fs/cgroup")


class KvCache:
    """Keys and values of all layers in blocks of ``block_size`` tokens.

    ``layers[i]`` is [2 * kv heads, blocks, block_size, head_dim], keys in the first half. Heads come first so that
    gathered blocks of one head lie one after the other, as the matrix products of attention want them.
    The content starts at zero, never undefined: masked positions are multiplied by zero, and NaN times zero is NaN.
    Not to ``reserve`` leaves ``layers`` empty until ``take`` is called.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        reserve: bool = True,
    ) -> None:
        """Raises HyperFlexisError when there is not so much memory."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        self._num_layers = config.num_layers
        self._dtype = dtype
        self._device = device
        self.layers: list[Tensor] = []
        self._by_slot: list[Tensor] = []
        if reserve:
            self.take(num_blocks)

    def take(self, num_blocks: int) -> None:
        """Have the memory of the first ``num_blocks``, instead of what there was. Raises HyperFlexisError when there is
        not so much, and has none then."""
        self.release()
        shape = (2 * self.num_kv_heads, num_blocks, self.block_size, self.head_dim)
        needed, free = self._num_layers * prod(shape) * self._dtype.itemsize, available_bytes(self._device)
        problem = f"the KV cache of {num_blocks * self.block_size} tokens needs {needed / 1e9:.2f} GB on {self._device}"
        if needed > free:  # a CPU's system gives what it has not, and kills later
            raise HyperFlexisError(f"{problem}, and {free / 1e9:.2f} GB are available: free memory, or lower kv_tokens")
        try:
            # Written now, so that the first requests do not pay for first-touch page faults.
            self.layers = [
                torch.empty(shape, dtype=self._dtype, device=self._device).zero_() for _ in range(self._num_layers)
            ]
        except RuntimeError as error:
            self.release()
            raise HyperFlexisError(f"{problem}, which it does not give: {error}") from error
        self._by_slot = [layer.view(shape[0], -1, self.head_dim) for layer in self.layers]

    def release(self) -> None:
        """Give the memory back to the device."""
        self.layers, self._by_slot = [], []
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def write(self, layer: int, slots: Tensor, kv: Tensor) -> None:
        """Store keys and values ``kv`` [tokens, 2 * kv heads, head_dim] at ``slots`` (block * block_size + offset)."""
        self._by_slot[layer].index_copy_(1, slots, kv.transpose(0, 1))

    def read(self, layer: int, slots: Tensor, into: Tensor) -> None:
        """The inverse, into ``into`` [2 * kv heads, tokens, head_dim]."""
        torch.index_select(self._by_slot[layer], 1, slots, out=into)

    def gather(self, layer: int, blocks: Tensor, rows: int, context: int) -> list[Tensor]:
        """Keys and values [rows, kv heads, context, head_dim] of ``blocks``, a flat table of equally long rows."""
        gathered = self.layers[layer].index_select(1, blocks)
        gathered = gathered.view(2, self.num_kv_heads, rows, -1, self.head_dim)[..., :context, :]
        return list(gathered.transpose(1, 2).unbind(0))


def available_bytes(device: torch.device) -> int:
    """Memory that can still be taken on ``device``: free memory of an accelerator; on a CPU what the system calls
    available, and no more than the control group's limit leaves."""
    if device.type != "cpu":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    available = _system_available()
    limit, used = _number(_CGROUP / "memory.max"), _number(_CGROUP / "memory.current")
    if limit is not None and used is not None:
        # File pages count as used, but give way: the weights have just been read from such a file.
        available = min(available, max(limit - used + _field(_CGROUP / "memory.stat", "inactive_file"), 0))
    return available


def _system_available() -> int:
    kilobytes = _field(Path("/proc/meminfo"), "MemAvailable:")
    if kilobytes:
        return kilobytes << 10
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # not Linux: half of what there is


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no control group, or "max"
        return None


def _field(path: Path, name: str) -> int:
    """The number after ``name`` in a file of such lines; 0 when it is not there."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), 0)
