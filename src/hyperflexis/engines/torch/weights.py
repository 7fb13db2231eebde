"""Weights: the tensors of a checkpoint, those that the engine keeps, and the way from one to the other.

A checkpoint has matrices as [out, in], one for each projection. The engine keeps them as [in, out] and joins those that
read the same rows (model.Linear). ``kept`` says what it keeps, ``Weights`` is made of that, and ``read`` fills it from
safetensors files: every expected tensor once, of the expected shape, and nothing else.

Several threads read, each a piece at a time into memory that is touched already, and turn it while the others read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor

from ...errors import HyperFlexisError
from .. import safetensors
from ..safetensors import DTYPE_BYTES, Stored
from .config import ModelConfig
from .model import STRIP, Layer, Linear, Weights

Shape = tuple[int, ...]

READERS = 4
"""Threads that read a checkpoint: a virtual disk gives its rate to two requests at once, the others turn meanwhile."""
PIECE = 8 << 20
"""Bytes that a thread reads at once."""


@dataclass(frozen=True, slots=True)
class Part:
    """Where a tensor of a checkpoint goes: the columns from ``first`` of the kept tensor ``into``, turned; or all of
    it, as it is, when ``first`` is None."""

    into: str
    first: int | None


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


_JOINED = {
    "self_attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
}


def parts(config: ModelConfig) -> tuple[dict[str, Shape], dict[str, Part]]:
    """Name and shape of what the engine keeps, in the order in which the layers use it; and where each tensor of a
    checkpoint goes."""
    shapes = expected_shapes(config)
    joined = {one: whole for whole, ones in _JOINED.items() for one in ones}
    kept: dict[str, Shape] = {}
    where: dict[str, Part] = {}
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        prefix, _, short = module.partition("layers.")
        number, _, inner = short.partition(".")
        whole = joined.get(inner, "")
        into = f"{prefix}layers.{number}.{whole}.{kind}" if whole else name
        if name == "model.embed_tokens.weight" or (len(shape) == 1 and not whole):
            kept[into], where[name] = shape, Part(into, None)
            continue
        first = kept[into][-1] if into in kept else 0
        kept[into] = (*reversed(shape[1:]), first + shape[0])
        where[name] = Part(into, first)
    return kept, where


def assemble(config: ModelConfig, kept: Mapping[str, Tensor]) -> Weights:
    """A model of the tensors that ``parts`` names. They may be filled later."""

    def linear(name: str) -> Linear:
        return Linear(kept[f"{name}.weight"], kept.get(f"{name}.bias"))

    def layers() -> Iterator[Layer]:
        for i in range(config.num_layers):
            layer = f"model.layers.{i}."
            yield Layer(
                input_norm=kept[layer + "input_layernorm.weight"],
                qkv=linear(layer + "self_attn.qkv"),
                q_norm=kept.get(layer + "self_attn.q_norm.weight"),
                k_norm=kept.get(layer + "self_attn.k_norm.weight"),
                o=linear(layer + "self_attn.o_proj"),
                mlp_norm=kept[layer + "post_attention_layernorm.weight"],
                gate_up=linear(layer + "mlp.gate_up"),
                down=linear(layer + "mlp.down_proj"),
            )

    embedding = kept["model.embed_tokens.weight"]
    head = Linear(embedding.t()) if config.tied_embeddings else linear("lm_head")
    return Weights(embedding, tuple(layers()), kept["model.norm.weight"], head)


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read(directory: Path, config: ModelConfig, kept: Mapping[str, Tensor], readers: int = READERS) -> None:
    """Fill ``kept`` from a checkpoint, one file or several with an index, cast to the dtype of what is kept.

    Raises HyperFlexisError naming the missing, unexpected or misshapen tensors and the file.
    """
    shapes = expected_shapes(config)
    with ExitStack() as stack:
        stored: dict[str, Stored] = {}
        for path in safetensors.files_of(directory):
            stored |= safetensors.tensors_of(stack, path)
        _check_names(directory, set(shapes), set(stored), config)
        for name, shape in shapes.items():
            if stored[name].shape != shape:
                raise HyperFlexisError(
                    f"{directory}: tensor {name} has shape {stored[name].shape}, config.json asks for {shape}"
                )
            if stored[name].dtype not in _DTYPES:
                raise HyperFlexisError(
                    f"{stored[name].path}: tensor {name} is of type {stored[name].dtype}, which is not supported"
                )
        _, where = parts(config)
        order = sorted(shapes, key=lambda name: (stored[name].path, stored[name].start))
        largest_row = max(prod(one.shape[1:]) * DTYPE_BYTES[one.dtype] for one in stored.values())
        buffers: SimpleQueue[bytearray] = SimpleQueue()
        for _ in range(readers):
            buffers.put(bytearray(max(PIECE, largest_row)))
        with ThreadPoolExecutor(readers, "weights-read", torch.set_num_threads, (1,)) as pool:
            filled = [pool.submit(_fill, stored[n], kept[where[n].into], where[n].first, buffers) for n in order]
            for one in filled:
                one.result()


def _fill(stored: Stored, into: Tensor, first: int | None, buffers: SimpleQueue[bytearray]) -> None:
    """One tensor, in pieces of whole rows."""
    rows = stored.shape[0]
    row_bytes = prod(stored.shape[1:]) * DTYPE_BYTES[stored.dtype]
    most = max(PIECE // row_bytes, 1)
    buffer = buffers.get()
    try:
        for row in range(0, rows, most):
            count = min(most, rows - row)
            data = memoryview(buffer)[: count * row_bytes]
            safetensors.read(stored, row * row_bytes, data)
            piece = torch.frombuffer(data, dtype=_DTYPES[stored.dtype]).view(count, *stored.shape[1:]).to(into.device)
            if first is None:
                into[row : row + count].copy_(piece)
                continue
            width = STRIP if into.device.type == "cpu" else count
            for at in range(0, count, width):
                strip = piece[at : at + width]
                begin = first + row + at
                into[..., begin : begin + strip.shape[0]].copy_(strip.t())
    finally:
        buffers.put(buffer)


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
