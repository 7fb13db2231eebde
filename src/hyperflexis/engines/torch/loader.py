"""From a model directory to a Runner, within the memory that there is. First a shell: everything but the weights."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ...core.weights import Manifest, TensorSpec, WeightLayout
from ...errors import HyperFlexisError
from ...transfer.arena import Arena
from ...transfer.weights import Shard
from . import weights
from .attention import Span
from .cache import KvCache, available_bytes
from .config import ModelConfig, load_config
from .device import DeviceArena
from .model import Model, can_pack
from .runner import Runner
from .weights import num_parameters

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU_KV_BYTES = 1 << 30
"""KV cache of an instance on a CPU unless told otherwise, and never more than a quarter of the memory left: other
instances and the user's own programs live there too."""
ACCELERATOR_SHARE = 0.9
"""Share of a device's free memory that weights and KV may take; the rest is for activations."""
LEAST_KV_TOKENS = 512
"""With less KV than this an instance serves nobody."""
CHECK_TOKENS, CHECK_LOGITS = 16, 1024
"""Enough that each matrix of each layer, and most of a row of the vocabulary, has a part in a fingerprint."""
_STRIDE = 7919
"""A prime, so that the tokens are spread over the vocabulary."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What an instance takes. ``pack``: keep the second copy of the weights that makes batches fast on CPUs."""

    num_blocks: int
    pack: bool


def find_device(name: str) -> torch.device:
    """``cpu``, ``cuda`` or ``cuda:N``. Raises HyperFlexisError when it is not here."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise HyperFlexisError(f"device {name!r} is unknown; use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise HyperFlexisError(f"device {name!r} is not supported; use cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise HyperFlexisError(
            f"device {name!r}: PyTorch sees {torch.cuda.device_count()} CUDA devices; use --device cpu, or install a "
            "CUDA build of PyTorch and check the driver"
        )
    return device


class Shell:
    """A ``runner`` whose memory is there, and whose weights may not be yet: they are zero then, and it computes in the
    same time. All weights lie in one ``shard``, to be had from and given to other processes."""

    def __init__(
        self, directory: Path, runner: Runner, kept: Mapping[str, Tensor], shard: Shard, memory: Memory
    ) -> None:
        self.directory = directory
        self.runner = runner
        self.shard = shard
        self._kept = kept
        self._packs = memory.pack
        self._stopped = False

    @property
    def num_bytes(self) -> int:
        """Of its weights."""
        return sum(tensor.nbytes for tensor in self._kept.values())

    def read(self) -> None:
        """The weights from disk. Raises HyperFlexisError when the files will not do."""
        weights.read(self.directory, self.runner.model.config, self._kept)

    def publish(self) -> str:
        """The weights are there, from disk, and others may have them. Returns their digest."""
        manifest = Manifest(self.shard.layout, self.shard.digests(), self.fingerprint())
        self.shard.publish(manifest)
        return manifest.digest

    def pack(self) -> None:
        """Make the copies that make batches fast, one matrix after the other; from another thread they come into use
        while iterations run."""
        for linear in self.runner.model.weights.linears() if self._packs else ():
            if self._stopped:
                return
            linear.pack()

    def unpack(self) -> None:
        """Give these copies up: the weights are about to be others."""
        for linear in self.runner.model.weights.linears():
            linear.unpack()

    def stop(self) -> None:
        """A ``pack`` under way ends soon."""
        self._stopped = True

    def fingerprint(self) -> bytes:
        """What the weights compute: a few logits after a few fixed tokens, as little-endian fp32. Writes over the first
        KV blocks."""
        model = self.runner.model
        vocabulary = model.config.vocab_size
        size = model.cache.block_size
        ids = [_STRIDE * i % vocabulary for i in range(1, min(CHECK_TOKENS, model.cache.num_blocks * size) + 1)]
        blocks = list(range(-(-len(ids) // size)))
        logits = model.forward(model.prepare([Span(0, len(ids), blocks)], ids, [len(ids) - 1]))[0]
        chosen = logits[:: -(-vocabulary // CHECK_LOGITS)].cpu()
        return struct.pack(f"<{len(chosen)}f", *chosen.tolist())

    def agrees(self, fingerprint: bytes) -> bool:
        """Whether it computes what another with this fingerprint does. Kernels may differ in the last bits."""
        theirs = torch.tensor([one for (one,) in struct.iter_unpack("<f", fingerprint)])
        mine = torch.tensor([one for (one,) in struct.iter_unpack("<f", self.fingerprint())])
        if theirs.shape != mine.shape or not bool(mine.isfinite().all()):
            return False
        tolerance = 1e-3 if self.runner.model.dtype == torch.float32 else 5e-2
        return bool((mine - theirs).abs().max() <= tolerance * theirs.abs().max())


def allocate(
    directory: Path,
    device: torch.device,
    dtype_name: str | None,
    kv_tokens: int | None,
    block_size: int,
    most_kv_tokens: int,
    shared: bool = False,
    reserve_kv: bool = True,
) -> Shell:
    """All memory of an instance, touched. ``kv_tokens`` None takes what there is, at most ``most_kv_tokens``. With
    ``shared`` other processes can map the weights. Without ``reserve_kv`` the memory of the KV cache is not taken yet.

    Raises HyperFlexisError when the model's configuration or the memory will not do.
    """
    config = load_config(directory)
    name = dtype_name or config.dtype
    if name not in DTYPES:
        raise HyperFlexisError(f"{directory}: dtype {name!r} is not supported; give one of {', '.join(DTYPES)}")
    dtype = DTYPES[name]
    memory = _plan_memory(directory, config, device, dtype, kv_tokens, block_size, most_kv_tokens, reserve_kv)
    shapes, _ = weights.parts(config)
    specs = (TensorSpec(n, name, shape, prod(shape) * dtype.itemsize) for n, shape in shapes.items())
    layout = WeightLayout(config.digest, tuple(specs))
    if device.type == "cpu":
        arena = Arena(layout.size, shared)
        whole = torch.frombuffer(arena.view, dtype=torch.uint8)
        shard = Shard(layout, arena)
    else:
        on_device = DeviceArena(layout.size, device, shared)
        whole = on_device.tensor
        shard = Shard(layout, on_device)
    kept = {
        tensor.name: whole[offset : offset + tensor.size].view(dtype).view(tensor.shape)
        for tensor, offset in zip(layout.tensors, layout.offsets, strict=True)
    }
    cache = KvCache(config, memory.num_blocks, block_size, dtype, device, reserve_kv)
    context = min(config.context_length, memory.num_blocks * block_size)
    runner = Runner(Model(config, weights.assemble(config, kept), cache, context))
    return Shell(directory, runner, kept, shard, memory)


def load(
    directory: Path,
    device: torch.device,
    dtype_name: str | None,
    kv_tokens: int | None,
    block_size: int,
    most_kv_tokens: int,
) -> Runner:
    """``allocate``, and the weights from disk. Raises HyperFlexisError when model, files, or memory will not do."""
    shell = allocate(directory, device, dtype_name, kv_tokens, block_size, most_kv_tokens)
    shell.read()
    shell.pack()
    return shell.runner


def _plan_memory(
    directory: Path,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    kv_tokens: int | None,
    block_size: int,
    most_kv_tokens: int,
    reserve_kv: bool,
) -> Memory:
    """Sizes that fit, decided before anything large is allocated: a CPU's system kills without a word."""
    free = available_bytes(device)
    weight_bytes = num_parameters(config) * dtype.itemsize
    token_bytes = config.kv_elements_per_token * dtype.itemsize
    if device.type == "cpu":
        room = free - weight_bytes
        derived = min(CPU_KV_BYTES, max(room, 0) // 4)
    else:
        room = int(ACCELERATOR_SHARE * free) - weight_bytes
        derived = room
    if kv_tokens is None:
        kv_tokens = max(min(derived // token_bytes, most_kv_tokens), LEAST_KV_TOKENS)
    num_blocks = -(-kv_tokens // block_size)
    kv_bytes = num_blocks * block_size * token_bytes
    now_tokens, now_bytes = (kv_tokens, kv_bytes) if reserve_kv else (0, 0)
    if now_bytes > room:
        raise HyperFlexisError(
            f"too little memory on {device} for {directory}: weights need {_gb(weight_bytes)} as {dtype} and "
            f"{now_tokens} tokens of KV cache {_gb(now_bytes)}, together {weight_bytes + now_bytes} bytes, but {free} "
            "bytes are available; free memory, lower --kv-tokens, or choose a smaller model or --dtype bfloat16"
        )
    pack = can_pack(dtype, device) and 2 * weight_bytes + kv_bytes <= free // 2
    return Memory(num_blocks, pack)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
