"""Weights: the tensors of a checkpoint, those that the engine keeps, and the way from one to the other.

A checkpoint has matrices as [out, in], one for each projection. The engine keeps them as [in, out] and joins those that
read the same rows (model.Linear). ``kept`` says what it keeps, ``Weights`` is made of that, and ``read`` fills it from
safetensors files: every expected tensor once, of the expected shape, and nothing else.

Several threads read, each a piece at a time into memory that is touched already, and turn it while the others read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from queue import SimpleQueue

import msgspec
import torch
from torch import Tensor

from ...errors import HyperFlexisError
from .config import ModelConfig
from .model import STRIP, Layer, Linear, Weights

Shape = tuple[int, ...]

READERS = 4
"""Threads that read a checkpoint: a virtual disk gives its rate to two requests at once, the others turn meanwhile."""
PIECE = 8 << 20
"""Bytes that a thread reads at once."""
_MAX_HEADER = 100 << 20
"""The limit of the safetensors format."""


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


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor in a file: bytes from ``start`` on."""

    path: Path
    descriptor: int
    dtype: torch.dtype
    shape: Shape
    start: int


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_HEADER = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ENTRY = msgspec.json.Decoder(_Entry)


def read(directory: Path, config: ModelConfig, kept: Mapping[str, Tensor], readers: int = READERS) -> None:
    """Fill ``kept`` from a checkpoint, one file or several with an index, cast to the dtype of what is kept.

    Raises HyperFlexisError naming the missing, unexpected or misshapen tensors and the file.
    """
    shapes = expected_shapes(config)
    with ExitStack() as stack:
        stored: dict[str, _Stored] = {}
        for path in _files(directory):
            stored |= _open(stack, path)
        _check_names(directory, set(shapes), set(stored), config)
        for name, shape in shapes.items():
            if stored[name].shape != shape:
                raise HyperFlexisError(
                    f"{directory}: tensor {name} has shape {stored[name].shape}, config.json asks for {shape}"
                )
        _, where = parts(config)
        order = sorted(shapes, key=lambda name: (stored[name].path, stored[name].start))
        largest_row = max(prod(one.shape[1:]) * one.dtype.itemsize for one in stored.values())
        buffers: SimpleQueue[bytearray] = SimpleQueue()
        for _ in range(readers):
            buffers.put(bytearray(max(PIECE, largest_row)))
        with ThreadPoolExecutor(readers, "weights-read", torch.set_num_threads, (1,)) as pool:
            filled = [pool.submit(_fill, stored[n], kept[where[n].into], where[n].first, buffers) for n in order]
            for one in filled:
                one.result()


def _fill(stored: _Stored, into: Tensor, first: int | None, buffers: SimpleQueue[bytearray]) -> None:
    """One tensor, in pieces of whole rows."""
    rows = stored.shape[0]
    row_bytes = prod(stored.shape[1:]) * stored.dtype.itemsize
    most = max(PIECE // row_bytes, 1)
    buffer = buffers.get()
    try:
        for row in range(0, rows, most):
            count = min(most, rows - row)
            data = memoryview(buffer)[: count * row_bytes]
            _read_exactly(stored, stored.start + row * row_bytes, data)
            piece = torch.frombuffer(data, dtype=stored.dtype).view(count, *stored.shape[1:]).to(into.device)
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


def _read_exactly(stored: _Stored, at: int, into: memoryview) -> None:
    try:
        while into:
            count = os.preadv(stored.descriptor, [into], at)
            if not count:
                raise OSError("the file ends too early")
            into, at = into[count:], at + count
    except OSError as error:
        raise HyperFlexisError(f"{stored.path}: cannot be read ({error}); download or make the model again") from error


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


def _open(stack: ExitStack, path: Path) -> dict[str, _Stored]:
    """The tensors of a safetensors file: a length (u64, little endian), a JSON header, and the tensors' bytes."""
    try:
        file = stack.enter_context(path.open("rb", buffering=0))
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size - 8, _MAX_HEADER):
            raise ValueError("it has no header")
        entries = _HEADER.decode(file.read(length))
        entries.pop("__metadata__", None)
        found: dict[str, _Stored] = {}
        for name, raw in entries.items():
            entry = _ENTRY.decode(raw)
            start, end = entry.data_offsets
            dtype = _DTYPES.get(entry.dtype)
            if dtype is None:
                raise ValueError(f"tensor {name} is of type {entry.dtype}, which is not supported")
            if end - start != prod(entry.shape) * dtype.itemsize or not 0 <= start <= end <= size - 8 - length:
                raise ValueError(f"tensor {name} is not where the header says")
            found[name] = _Stored(path, file.fileno(), dtype, entry.shape, 8 + length + start)
        return found
    except (OSError, ValueError, msgspec.DecodeError) as error:
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
