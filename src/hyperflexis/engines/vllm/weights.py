"""The weights of a vLLM server: a checkpoint's tensors as they are in its files, from another server or from disk, and
from here to others. vLLM's own parameters are of no use for that: they are joined, cut by rank, and packed.

    settings    what --model-loader-extra-config says
    take        the first source that has this model's checkpoint gives it: over TCP copied, on one host mapped
    read        the files, into memory that others can have

A checkpoint counts when its source knows the fleet's token, it is of the same configuration, has the tensors that the
files here have, where there are any, and what comes has the digests that the source names; a sample of blocks of the
files must have these digests too. What does not is left, with the reason, and the next source asked. This module needs
neither vLLM nor PyTorch; ``loader.py`` makes tensors of it.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import msgspec
from xxhash import xxh3_128_digest

from ...core.weights import Attempt, Manifest, TensorSpec, WeightLayout, WeightSource, difference
from ...core.weights import Path as Way
from ...errors import HyperFlexisError
from ...transfer import tcp
from ...transfer.arena import Arena
from ...transfer.auth import TOKEN_VARIABLE
from ...transfer.fetch import BROKEN, FetchConfig, Fetcher, look
from ...transfer.paths import Over
from ...transfer.weights import Shard
from .. import safetensors
from ..safetensors import DTYPE_BYTES, Stored

LOAD_FORMAT = "hyperflexis"
FLAG = "--model-loader-extra-config"
NAME, EPOCH = "checkpoint", 0
"""What a source of a checkpoint is called: whose it is does not matter, and its digests say which one it is."""
SAMPLE = 64
"""Blocks of the files that are compared with a source's digests: at most 32 MiB."""
READERS = 4
"""Threads that read files, as in the torch engine."""
PIECE = 8 << 20
_VOLATILE = ("transformers_version", "_name_or_path")
"""Parts of config.json that say nothing about the weights."""


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``sources``: addresses, asked in this order. ``listen``: where others get the checkpoint; None: nowhere, and it
    is not kept. ``digest``: the only checkpoint that is taken; empty: any that passes. ``weights_over``: how it comes
    and goes before shared memory and TCP are tried."""

    sources: tuple[str, ...] = ()
    listen: str | None = None
    digest: str = ""
    weights_over: Over = ""

    @classmethod
    def parse(cls, given: Mapping[str, Any], token: str) -> Settings:
        """Raises HyperFlexisError naming the field and what to do."""
        try:
            found = msgspec.convert(given, cls)
        except msgspec.ValidationError as error:
            raise HyperFlexisError(
                f'{FLAG}: {error}; write {{"sources": ["HOST:PORT" or "unix:PATH", ...], "listen": ADDRESS, '
                '"digest": DIGEST, "weights_over": "nixl" or "torch"}, each of them optional'
            ) from error
        for name, address in [("listen", found.listen), *(("sources", one) for one in found.sources)]:
            if address is not None and not re.fullmatch(r"unix:.+|.+:\d{1,5}", address):
                raise HyperFlexisError(f"{FLAG}: {name}: {address!r} is no address; write HOST:PORT or unix:PATH")
            if address is not None and not tcp.is_local(address) and not token:
                whom = "gives the model's weights to" if name == "listen" else "takes the model's weights from"
                raise HyperFlexisError(
                    f"{FLAG}: {name}: {address} {whom} anybody: set {TOKEN_VARIABLE}, the same for all servers, or use "
                    "unix:PATH on one host"
                )
        if found.digest and not re.fullmatch(r"[0-9a-f]{32}", found.digest):
            raise HyperFlexisError(
                f"{FLAG}: digest: {found.digest!r} is none; copy the 32 digits that a server logs when it gives weights"
            )
        return found


def configuration(config: Mapping[str, Any]) -> str:
    """A digest of a model's config.json."""
    lasting = {key: value for key, value in config.items() if key not in _VOLATILE}
    return hashlib.blake2b(json.dumps(lasting, sort_keys=True).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Model:
    """What a server is to serve: the digest of its configuration, and its safetensors files; none where they are not
    here."""

    configuration: str
    files: tuple[Path, ...] = ()

    def objection(self, manifest: Manifest) -> str:
        """Why this is not the model's checkpoint; empty when nothing speaks against it. Raises HyperFlexisError when
        the files cannot be read."""
        theirs = manifest.layout
        if theirs.model != self.configuration:
            return f"its model's configuration is {theirs.model}, and {self.configuration} here"
        for tensor in theirs.tensors:
            if prod(tensor.shape) * DTYPE_BYTES.get(tensor.dtype, 0) != tensor.size:
                return f"tensor {tensor.name} has {tensor.size} bytes, as {tensor.dtype} of shape {list(tensor.shape)}"
        if not self.files:
            return ""
        with ExitStack() as stack:
            stored = _stored(stack, self.files)
            problem = difference(_layout(self.configuration, stored), theirs)
            return f"its checkpoint is another: {problem}" if problem else self._sample(manifest, stored)

    def read(self, shared: bool) -> Shard:
        """The files, in memory. Raises HyperFlexisError when they cannot be read or do not fit."""
        with ExitStack() as stack:
            stored = _stored(stack, self.files)
            layout = _layout(self.configuration, stored)
            arena = Arena(layout.size, shared, large_pages=False)
            shard = Shard(layout, arena)

            def fill(name: str, offset: int, at: int) -> None:
                end = min(at + PIECE, stored[name].size)
                safetensors.read(stored[name], at, arena.view[offset + at : offset + end])

            with ThreadPoolExecutor(READERS, "weights-read") as pool:
                places = zip((tensor.name for tensor in layout.tensors), layout.offsets, strict=True)
                in_files = sorted(places, key=lambda place: (stored[place[0]].path, stored[place[0]].start))
                pieces = [
                    pool.submit(fill, name, offset, at)
                    for name, offset in in_files
                    for at in range(0, stored[name].size, PIECE)
                ]
                for piece in pieces:
                    piece.result()
            shard.publish(Manifest(layout, shard.digests()))
            return shard

    def _sample(self, manifest: Manifest, stored: Mapping[str, Stored]) -> str:
        layout = manifest.layout
        offsets = dict(zip((tensor.name for tensor in layout.tensors), layout.offsets, strict=True))
        for block in sorted({number * len(layout.blocks) // SAMPLE for number in range(SAMPLE)}):
            where, name = layout.blocks[block], layout.tensor_at(block).name
            mine = bytearray(len(where))
            safetensors.read(stored[name], where.start - offsets[name], memoryview(mine))
            if xxh3_128_digest(mine) != manifest.block(block):
                return f"its checkpoint is another: tensor {name} has other values than in {stored[name].path}"
        return ""


def take(model: Model, settings: Settings, token: str) -> tuple[Shard | None, list[Attempt]]:
    """The checkpoint from the first source that gives it, or None; and each way that was tried. What came stays when a
    source breaks off, for the next one that has the same."""
    attempts: list[Attempt] = []
    shard: Shard | None = None
    for address in settings.sources:
        source = WeightSource(address, NAME, EPOCH)
        path: Way = "shared memory" if tcp.is_local(address) else "tcp"
        began = time.monotonic()
        try:
            manifest, mapped = look(source, FetchConfig(token, share=not settings.weights_over))
            problem = _unwanted(manifest, settings.digest) or model.objection(manifest)
            if not problem and mapped is not None:
                borrowed = Shard(manifest.layout, mapped)
                if borrowed.digests() == manifest.blocks:
                    borrowed.publish(manifest)
                    taken = Attempt(path, address, manifest.layout.size, time.monotonic() - began)
                    return borrowed, [*attempts, taken]
            if not problem and (shard is None or shard.manifest is None or shard.manifest.digest != manifest.digest):
                arena = Arena(manifest.layout.size, settings.listen is not None, large_pages=False)
                shard = Shard(manifest.layout, arena)
        except BlockingIOError:
            problem = "it said nothing in time"
        except (*BROKEN, HyperFlexisError) as error:
            problem = str(error) or type(error).__name__
        if problem or shard is None:
            attempts.append(Attempt(path, address, 0, time.monotonic() - began, problem))
            continue
        # What is not there yet, or was damaged, shows here, with its name.
        tried = Fetcher(shard, FetchConfig(token, manifest.digest, over=settings.weights_over)).run([source])
        attempts += [replace(one, source=address) for one in tried]
        if shard.is_complete:
            return shard, attempts
    return None, attempts


def _unwanted(manifest: Manifest, digest: str) -> str:
    if not manifest.layout.tensors:
        return "it has no tensors"
    if digest and manifest.digest != digest:
        return f"its checkpoint has digest {manifest.digest}, and {digest} is wanted"
    return ""


def _stored(stack: ExitStack, files: Iterable[Path]) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for path in files:
        found |= safetensors.tensors_of(stack, path)
    return found


def _layout(model: str, stored: Mapping[str, Stored]) -> WeightLayout:
    """By name, so that it does not matter into which files a checkpoint is cut."""
    named = sorted(stored.items())
    return WeightLayout(model, tuple(TensorSpec(name, one.dtype, one.shape, one.size) for name, one in named))
