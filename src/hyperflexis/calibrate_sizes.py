"""Bytes of a model and the room that they leave on a device: from public model configurations, no weights needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .engines.torch.config import load_config
from .errors import HyperFlexisError

MEMORY_SHARE = 0.9
"""Share of a device's memory that engines take by default (vLLM's gpu_memory_utilization)."""
RESERVE_BYTES = 4_000_000_000
"""Of that, on each device, kept for activations and graphs: vLLM logs a peak of 2.4 GiB for an 8B model."""
MEMORY_GB = {"a100": 80.0, "h100": 80.0, "ascend-910b3": 64.0}
"""Memory of one device, 1e9 bytes each: NVIDIA's and Huawei's data sheets (the 80 GB A100 and H100 SXM)."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the sizes of a Llama-like decoder follow from. ``biases`` are elements of a layer's bias vectors."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context_length: int
    tied_embeddings: bool = False
    qk_norm: bool = False
    biases: int = 0
    bytes_per_value: int = 2


MODELS = {
    # From the config.json of meta-llama/Llama-3.1-8B, Qwen/Qwen3-32B and meta-llama/Llama-2-70b-hf; all bfloat16.
    "llama-3.1-8b": ModelShape(32, 4096, 14336, 32, 8, 128, 128256, 131072),
    "qwen3-32b": ModelShape(64, 5120, 25600, 64, 8, 128, 151936, 40960, qk_norm=True),
    "llama-2-70b": ModelShape(80, 8192, 28672, 64, 8, 128, 32000, 4096),
}


def kv_bytes_per_token(shape: ModelShape) -> int:
    """Keys and values of one token in all layers."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * shape.bytes_per_value


def weight_bytes(shape: ModelShape) -> int:
    """All parameters: embeddings in and out, and per layer attention, gated MLP and two norms; one norm at the end."""
    attention = 2 * shape.hidden * (shape.heads + shape.kv_heads) * shape.head_dim
    norms = 2 * shape.hidden + (2 * shape.head_dim if shape.qk_norm else 0)
    layer = attention + 3 * shape.hidden * shape.inner + norms + shape.biases
    embeddings = (1 if shape.tied_embeddings else 2) * shape.vocab * shape.hidden
    return (embeddings + shape.layers * layer + shape.hidden) * shape.bytes_per_value


def kv_capacity_tokens(shape: ModelShape, memory_gb: float, devices: int) -> int:
    """Context that ``devices`` together hold beside the weights.

    Raises HyperFlexisError when the weights leave no room.
    """
    room = devices * (MEMORY_SHARE * memory_gb * 1e9 - RESERVE_BYTES) - weight_bytes(shape)
    tokens = int(room // kv_bytes_per_token(shape))
    if tokens < 1:
        raise HyperFlexisError(
            f"{weight_bytes(shape) / 1e9:.1f} GB of weights leave no room for KV on {devices} x {memory_gb:g} GB; "
            "give more --devices or a larger --memory-gb"
        )
    return tokens


def find_shape(model: str) -> ModelShape:
    """The shape of a model known by name, or of the one in a Hugging Face directory.

    Raises HyperFlexisError when it is neither.
    """
    if model in MODELS:
        return MODELS[model]
    if not Path(model).is_dir():
        raise HyperFlexisError(f"--model {model!r} is neither a directory with a config.json nor {', '.join(MODELS)}")
    config = load_config(Path(model))
    qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    return ModelShape(
        layers=config.num_layers,
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab=config.vocab_size,
        context_length=config.context_length,
        tied_embeddings=config.tied_embeddings,
        qk_norm=config.qk_norm,
        biases=qkv * config.qkv_bias
        + config.hidden_size * config.o_bias
        + (2 * config.intermediate_size + config.hidden_size) * config.mlp_bias,
        bytes_per_value=4 if config.dtype == "float32" else 2,
    )
