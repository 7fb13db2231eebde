"""Safetensors files: which tensor lies where. A length (u64, little endian), a JSON header, and the tensors' bytes."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path

import msgspec

from ..errors import HyperFlexisError

DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Of an element, for the types that are read."""
_MAX_HEADER = 100 << 20
"""The limit of the format."""


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in an open file: ``size`` bytes from ``start`` on."""

    path: Path
    descriptor: int
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


_HEADER = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ENTRY = msgspec.json.Decoder(_Entry)


def files_of(directory: Path) -> list[Path]:
    """The files of a checkpoint. Raises HyperFlexisError when there are none."""
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


def tensors_of(stack: ExitStack, path: Path) -> dict[str, Stored]:
    """The tensors of a file, which stays open as long as ``stack``. Raises HyperFlexisError when it is none."""
    try:
        file = stack.enter_context(path.open("rb", buffering=0))
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size - 8, _MAX_HEADER):
            raise ValueError("it has no header")
        entries = _HEADER.decode(file.read(length))
        entries.pop("__metadata__", None)
        found: dict[str, Stored] = {}
        for name, raw in entries.items():
            entry = _ENTRY.decode(raw)
            start, end = entry.data_offsets
            if entry.dtype not in DTYPE_BYTES:
                raise ValueError(f"tensor {name} is of type {entry.dtype}, which is not supported")
            num_bytes = prod(entry.shape) * DTYPE_BYTES[entry.dtype]
            if end - start != num_bytes or not 0 <= start <= end <= size - 8 - length:
                raise ValueError(f"tensor {name} is not where the header says")
            found[name] = Stored(path, file.fileno(), entry.dtype, entry.shape, 8 + length + start, num_bytes)
        return found
    except (OSError, ValueError, msgspec.DecodeError) as error:
        raise HyperFlexisError(f"{path}: cannot be read ({error}); download or make the model again") from error


def read(stored: Stored, at: int, into: memoryview) -> None:
    """Fill ``into`` with the tensor's bytes from ``at`` on. Raises HyperFlexisError when they cannot be read."""
    at += stored.start
    try:
        while into:
            count = os.preadv(stored.descriptor, [into], at)
            if not count:
                raise OSError("the file ends too early")
            into, at = into[count:], at + count
    except OSError as error:
        raise HyperFlexisError(f"{stored.path}: cannot be read ({error}); download or make the model again") from error
