"""Weights from safetensors files: every expected tensor once, of the expected shape, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import HyperFlexisError
from .config import ModelConfig
from .model import Layer, Linear, Weights

Shape = tuple[int, ...]


def expected_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Name and shape of every tensor that a checkpoint of ``config`` has."""
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * dim, config.num_kv_heads * dim
    shapes: dict[str, Shape] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    linears = [
        ("self_attn.q_proj", q, hidden, config.qkv_bias),
        ("self_attn.k_proj", kv, hidden, config.qkv_bias),
        ("self_attn.v_proj", kv, hidden, config.qkv_bias),
        ("self_attn.o_proj", hidden, q, config.o_bias),
        ("mlp.gate_proj", inner, hidden, config.mlp_bias),
        ("mlp.up_proj", inner, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, inner, config.mlp_bias),
    ]
    for i in range(config.num_layers):
        layer = f"model.layers.{i}."
        shapes[layer + "input_layernorm.weight"] = (hidden,)
        shapes[layer + "post_attention_layernorm.weight"] = (hidden,)
        if config.qk_norm:
            shapes[layer + "self_attn.q_norm.weight"] = (dim,)
            shapes[layer + "self_attn.k_norm.weight"] = (dim,)
        for name, outputs, inputs, bias in linears:
            shapes[f"{layer}{name}.weight"] = (outputs, inputs)
            if bias:
                shapes[f"{layer}{name}.bias"] = (outputs,)
    return shapes


def num_parameters(config: ModelConfig) -> int:
    """Elements of all tensors."""
    return sum(prod(shape) for shape in expected_shapes(config).values())


def load_weights(directory: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Weights:
    """Read a checkpoint, one file or several with an index, cast to ``dtype``.

    Raises HyperFlexisError naming the missing, unexpected or misshapen tensors and the file.
    """
    shapes = expected_shapes(config)
    with ExitStack() as stack:
        handles = {path: _open(stack, path) for path in _files(directory)}
        where = {name: handle for handle in handles.values() for name in handle.keys()}  # noqa: SIM118 (not a dict)
        _check_names(directory, set(shapes), set(where), config)

        def read(name: str) -> Tensor:
            tensor: Tensor = where[name].get_tensor(name)
            if tuple(tensor.shape) != shapes[name]:
                raise HyperFlexisError(
                    f"{directory}: tensor {name} has shape {tuple(tensor.shape)}, config.json asks for {shapes[name]}"
                )
            return tensor

        return _assemble(config, read, dtype, device)


def _files(directory: Path) -> list[Path]:
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if index.exists():
        try:
            names = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values()
        except msgspec.DecodeError as error:
            raise HyperFlexisError(f"{index}: {error}") from error
        return [directory / name for name in sorted(set(names))]
    if single.exists():
        return [single]
    raise HyperFlexisError(
        f"{directory}: neither model.safetensors nor model.safetensors.index.json is here; other formats (.bin, .gguf) "
        "are not read, convert the model to safetensors"
    )


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _open(stack: ExitStack, path: Path) -> Any:
    try:
        return stack.enter_context(safe_open(path, framework="pt"))
    except (OSError, SafetensorError) as error:
        raise HyperFlexisError(f"{path}: cannot be read ({error}); download or make the model again") from error


def _check_names(directory: Path, expected: set[str], found: set[str], config: ModelConfig) -> None:
    missing = sorted(expected - found)
    if missing:
        raise HyperFlexisError(
            f"{directory}: {len(missing)} tensors are missing, first {', '.join(missing[:3])}; the checkpoint does not "
            "match its config.json"
        )
    # Old checkpoints carry the rotary table, tied ones often a copy of the embedding: both say nothing new.
    known = {"lm_head.weight"} if config.tied_embeddings else set()
    unexpected = sorted(n for n in found - expected - known if not n.endswith("rotary_emb.inv_freq"))
    if unexpected:
        raise HyperFlexisError(
            f"{directory}: {len(unexpected)} tensors are not expected, first {', '.join(unexpected[:3])}; config.json "
            "describes another model"
        )


def _assemble(config: ModelConfig, read: Callable[[str], Tensor], dtype: torch.dtype, device: torch.device) -> Weights:
    def vector(name: str) -> Tensor:
        return read(name).to(device=device, dtype=dtype, copy=True)  # not a view of the mapped file

    def linear(*names: str, bias: bool) -> Linear:
        parts = [read(f"{name}.weight") for name in names]
        outputs = sum(part.shape[0] for part in parts)
        weight = torch.empty(parts[0].shape[1], outputs, dtype=dtype, device=device)
        first = 0
        for part in parts:
            weight[:, first : first + part.shape[0]].copy_(part.t())
            first += part.shape[0]
        return Linear(weight, torch.cat([vector(f"{name}.bias") for name in names]) if bias else None)

    def layers() -> Iterator[Layer]:
        for i in range(config.num_layers):
            layer = f"model.layers.{i}."
            attention, mlp = layer + "self_attn.", layer + "mlp."
            yield Layer(
                input_norm=vector(layer + "input_layernorm.weight"),
                qkv=linear(attention + "q_proj", attention + "k_proj", attention + "v_proj", bias=config.qkv_bias),
                q_norm=vector(attention + "q_norm.weight") if config.qk_norm else None,
                k_norm=vector(attention + "k_norm.weight") if config.qk_norm else None,
                o=linear(attention + "o_proj", bias=config.o_bias),
                mlp_norm=vector(layer + "post_attention_layernorm.weight"),
                gate_up=linear(mlp + "gate_proj", mlp + "up_proj", bias=config.mlp_bias),
                down=linear(mlp + "down_proj", bias=config.mlp_bias),
            )

    embedding = vector("model.embed_tokens.weight")
    head = Linear(embedding.t()) if config.tied_embeddings else linear("lm_head", bias=False)
    return Weights(embedding, tuple(layers()), vector("model.norm.weight"), head)
