"""``config.json`` of a Hugging Face model directory -> ModelConfig, or an error that says what is not supported."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal, TypeVar, cast, get_args

import msgspec

from ...errors import HyperFlexisError

FAMILIES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
RopeKind = Literal["default", "linear", "llama3"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embeddings: base ``theta`` and how long contexts are scaled. ``linear`` divides all frequencies by
    ``factor``; ``llama3`` only those that turn less than ``low`` times in ``original_context`` tokens, keeps those that
    turn more than ``high`` times, and goes smoothly from one to the other."""

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original_context: int = 0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder's sizes and the four points in which the families differ.

    ``qkv_bias``: biases on query, key and value; ``o_bias``: on the attention's output; ``mlp_bias``: in the MLP;
    ``qk_norm``: RMSNorm over each query and key head. ``dtype`` is the checkpoint's.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    context_length: int
    tied_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    dtype: str
    eos_token_ids: frozenset[int]

    @property
    def kv_elements_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @property
    def digest(self) -> str:
        """Of all that the configuration says."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        fields["eos_token_ids"] = sorted(self.eos_token_ids)
        return blake2b(repr(fields).encode(), digest_size=8).hexdigest()


class _Rope(msgspec.Struct):
    rope_type: str | None = None
    type: str | None = None  # the older name of rope_type
    rope_theta: float | None = None
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int | None = None
    partial_rotary_factor: float = 1.0


class _Config(msgspec.Struct):
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    rope_theta: float = 10000.0
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None  # transformers 5 keeps theta and scaling here
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    use_sliding_window: bool = False
    layer_types: list[str] | None = None
    torch_dtype: str | None = None
    dtype: str | None = None
    eos_token_id: int | list[int] | None = None
    quantization_config: msgspec.Raw | None = None


class _Architectures(msgspec.Struct):
    architectures: list[str] | None = None


class _GenerationConfig(msgspec.Struct):
    eos_token_id: int | list[int] | None = None


def load_config(directory: Path) -> ModelConfig:
    """Read ``config.json`` (and end-of-text ids from ``generation_config.json``, which win).

    Raises HyperFlexisError naming the file, the field and what is supported.
    """
    path = directory / "config.json"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise HyperFlexisError(
            f"no model at {directory}: cannot read config.json ({error.strerror}); give a Hugging Face model "
            "directory, or make one with 'hyperflexis make-model DIR --size 20m'"
        ) from error
    architectures = _decode(path, data, _Architectures).architectures or []
    families = [FAMILIES[name] for name in architectures if name in FAMILIES]
    if not families:
        raise HyperFlexisError(
            f"{path}: architectures {architectures} are not supported by the torch engine; it runs "
            f"{', '.join(FAMILIES)}. Other models can be served by another engine"
        )
    raw = _decode(path, data, _Config)
    _refuse_unsupported(path, raw)
    generation_path = directory / "generation_config.json"
    eos = raw.eos_token_id
    if generation_path.exists():
        generation = _decode(generation_path, generation_path.read_bytes(), _GenerationConfig)
        eos = eos if generation.eos_token_id is None else generation.eos_token_id
    family = families[0]
    qwen2 = family == "qwen2"
    return ModelConfig(
        family=family,
        vocab_size=raw.vocab_size,
        hidden_size=raw.hidden_size,
        intermediate_size=raw.intermediate_size,
        num_layers=raw.num_hidden_layers,
        num_heads=raw.num_attention_heads,
        num_kv_heads=raw.num_key_value_heads or raw.num_attention_heads,
        head_dim=_head_dim(raw, family),
        rms_norm_eps=raw.rms_norm_eps,
        rope=_rope(path, raw),
        context_length=raw.max_position_embeddings,
        tied_embeddings=raw.tie_word_embeddings,
        qkv_bias=qwen2 or raw.attention_bias,
        o_bias=not qwen2 and raw.attention_bias,
        mlp_bias=family == "llama" and raw.mlp_bias,
        qk_norm=family == "qwen3",
        dtype=raw.dtype or raw.torch_dtype or "float32",
        eos_token_ids=frozenset([eos] if isinstance(eos, int) else eos or []),
    )


def _decode(path: Path, data: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise HyperFlexisError(f"{path}: {error}") from error


def _head_dim(raw: _Config, family: str) -> int:
    if raw.head_dim is not None:
        return raw.head_dim
    return 128 if family == "qwen3" else raw.hidden_size // raw.num_attention_heads


def _refuse_unsupported(path: Path, raw: _Config) -> None:
    """Raise for what would run and give wrong tokens."""
    if raw.quantization_config is not None:
        raise HyperFlexisError(f"{path}: quantization_config: quantised weights are not supported; use the original")
    if raw.hidden_act != "silu":
        raise HyperFlexisError(f"{path}: hidden_act {raw.hidden_act!r} is not supported, only 'silu'")
    if raw.use_sliding_window or any(kind != "full_attention" for kind in raw.layer_types or []):
        raise HyperFlexisError(f"{path}: use_sliding_window: sliding windows are not supported; set it to false")
    kv_heads = raw.num_key_value_heads or raw.num_attention_heads
    if raw.num_attention_heads % kv_heads:
        raise HyperFlexisError(
            f"{path}: num_attention_heads {raw.num_attention_heads} is no multiple of num_key_value_heads {kv_heads}"
        )


def _rope(path: Path, raw: _Config) -> RopeConfig:
    rope = raw.rope_parameters or raw.rope_scaling or _Rope()
    kind = rope.rope_type or rope.type or "default"
    if kind not in get_args(RopeKind):
        raise HyperFlexisError(
            f"{path}: rope type {kind!r} is not supported, only {', '.join(get_args(RopeKind))}; remove rope_scaling "
            "to run the model at its original context length"
        )
    if rope.partial_rotary_factor != 1.0:
        raise HyperFlexisError(f"{path}: partial_rotary_factor {rope.partial_rotary_factor} is not supported, only 1")
    return RopeConfig(
        theta=rope.rope_theta or raw.rope_theta,
        kind=cast(RopeKind, kind),
        factor=rope.factor,
        low=rope.low_freq_factor,
        high=rope.high_freq_factor,
        original_context=rope.original_max_position_embeddings or raw.max_position_embeddings,
    )
