"""From a model directory to a Runner, within the memory that there is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ...errors import HyperFlexisError
from .cache import KvCache, available_bytes
from .config import ModelConfig, load_config
from .model import Model, can_pack
from .runner import Runner
from .weights import load_weights, num_parameters

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU_KV_BYTES = 1 << 30
"""KV cache of an instance on a CPU unless told otherwise, and never more than a quarter of the memory left: other
instances and the user's own programs live there too."""
ACCELERATOR_SHARE = 0.9
"""Share of a device's free memory that weights and KV may take; the rest is for activations."""
LEAST_KV_TOKENS = 512
"""With less KV than this an instance serves nobody."""


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


def load(
    directory: Path,
    device: torch.device,
    dtype_name: str | None,
    kv_tokens: int | None,
    block_size: int,
    most_kv_tokens: int,
) -> Runner:
    """Load a model. ``kv_tokens`` None takes what the memory allows, at most ``most_kv_tokens``.

    Raises HyperFlexisError when the model, its files, or the memory will not do.
    """
    config = load_config(directory)
    name = dtype_name or config.dtype
    if name not in DTYPES:
        raise HyperFlexisError(f"{directory}: dtype {name!r} is not supported; give one of {', '.join(DTYPES)}")
    dtype = DTYPES[name]
    memory = _plan_memory(directory, config, device, dtype, kv_tokens, block_size, most_kv_tokens)
    weights = load_weights(directory, config, dtype, device)
    if memory.pack:
        for linear in weights.linears():
            linear.pack()
    cache = KvCache(config, memory.num_blocks, block_size, dtype, device)
    context = min(config.context_length, memory.num_blocks * block_size)
    return Runner(Model(config, weights, cache, context))


def _plan_memory(
    directory: Path,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    kv_tokens: int | None,
    block_size: int,
    most_kv_tokens: int,
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
    if kv_bytes > room:
        raise HyperFlexisError(
            f"too little memory on {device} for {directory}: weights need {_gb(weight_bytes)} as {dtype} and "
            f"{kv_tokens} tokens of KV cache {_gb(kv_bytes)}, together {weight_bytes + kv_bytes} bytes, but {free} "
            "bytes are available; free memory, lower --kv-tokens, or choose a smaller model or --dtype bfloat16"
        )
    pack = can_pack(dtype, device) and 2 * weight_bytes + kv_bytes <= free // 2
    return Memory(num_blocks, pack)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
