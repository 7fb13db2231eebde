"""vLLM's model loader for ``--load-format hyperflexis``: as vLLM's own, but the checkpoint's tensors come from a server
that has them, where one gives them (weights.py). What vLLM makes of tensors is vLLM's code alone: names, ranks,
quantisation, packing.

It is registered by a plug-in that vLLM finds (``vllm.general_plugins``) in each of its processes. The model is loaded
in the workers, one for each rank, and each takes the whole checkpoint, as it would read all files; only the first gives
it on. ``reload_weights`` goes the same way, which is what wakes a server at sleep level 2.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

import vllm

from ... import __version__
from ...errors import HyperFlexisError
from ...transfer.arena import Mapped
from ...transfer.auth import TOKEN_VARIABLE
from ...transfer.paths import require
from ...transfer.weights import Shard, WeightServer
from .weights import EPOCH, LOAD_FORMAT, NAME, Model, Settings, configuration, take

TESTED = ("0.32",)
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_log = init_logger(f"vllm.{__name__}")
Weights = Generator[tuple[str, torch.Tensor], None, None]


@dataclass(frozen=True, slots=True)
class _Given:
    """What this process gives to others, as long as it lives."""

    path: str
    digest: str
    shard: Shard
    server: WeightServer


_given: list[_Given] = []


class Loader(DefaultModelLoader):  # type: ignore[misc]
    """See the module."""

    def __init__(self, load_config: Any) -> None:
        if not any(f"{vllm.__version__}.".startswith(f"{release}.") for release in TESTED):
            raise ValueError(
                f"--load-format {LOAD_FORMAT} of HyperFlexis {__version__} is for vLLM {' and '.join(TESTED)}, and "
                f"this is vLLM {vllm.__version__}: install one of these, or leave the format out"
            )
        self._token = os.environ.get(TOKEN_VARIABLE, "")
        try:
            self._settings = Settings.parse(load_config.model_loader_extra_config, self._token)
            require(self._settings.weights_over)
        except HyperFlexisError as error:
            raise ValueError(str(error)) from error
        self._main: Any = None
        self.counter_before_loading_weights = 0.0
        self._gives = self._keeps = False
        # What is read from disk, vLLM reads as ever.
        super().__init__(replace(load_config, load_format="auto", model_loader_extra_config={}))

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> torch.nn.Module:
        """See vLLM's."""
        parallel = vllm_config.parallel_config
        first = parallel.rank == 0 and not parallel.data_parallel_rank
        # A draft model has the same loader, and there is one address.
        self._gives = self._settings.listen is not None and first and model_config is vllm_config.model_config
        return super().load_model(vllm_config, model_config, prefix)  # type: ignore[no-any-return]

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        """See vLLM's. What came from disk is kept for others after that."""
        super().load_weights(model, model_config)
        if self._keeps:
            threading.Thread(target=self._keep, args=(model_config,), name="weights-keep", daemon=True).start()

    def get_all_weights(self, model_config: Any, model: torch.nn.Module) -> Weights:
        """See vLLM's, which asks ``_get_weights_iterator`` for each part of the model."""
        self._main = model_config
        yield from super().get_all_weights(model_config, model)

    def _get_weights_iterator(self, source: DefaultModelLoader.Source) -> Weights:
        shard = self._from_others(source)
        if shard is None:
            return super()._get_weights_iterator(source)  # type: ignore[no-any-return]
        if self._gives and not _given:
            self._give(source.model_or_path, shard)
        return _tensors(shard)

    def _from_others(self, source: DefaultModelLoader.Source) -> Shard | None:
        """The checkpoint, from this process or a source; None: from disk."""
        whole = not source.prefix and source.subfolder is None and source.allow_patterns_overrides is None
        # torchao makes its own tensors of what it reads from files.
        packs = self.load_config.safetensors_load_strategy == "torchao"
        if not whole or packs or source.model_or_path != self._main.model:
            return None
        if not self.counter_before_loading_weights:
            self.counter_before_loading_weights = time.perf_counter()
        for own in _given:
            if own.path == source.model_or_path and self._settings.digest in ("", own.digest):
                return own.shard
        # Files that are to be downloaded are not compared with.
        model = self._model(self._main, os.path.isdir(source.model_or_path))
        shard, attempts = take(model, self._settings, self._token)
        for one in attempts:
            if one.problem:
                _log.warning("no weights from %s over %s: %s", one.source, one.path, one.problem)
            else:
                size, speed = one.num_bytes, one.num_bytes / 1e9 / one.seconds
                _log.info("weights from %s over %s: %d bytes at %.2f GB/s", one.source, one.path, size, speed)
        if shard is None and attempts:
            _log.warning("no source gave the weights of %s: they are read from disk", source.model_or_path)
        self._keeps = self._gives and shard is None
        return shard

    def _model(self, model_config: Any, are_files_here: bool) -> Model:
        config = get_hf_file_to_dict("config.json", model_config.model, model_config.revision) or {}
        files: tuple[Path, ...] = ()
        if are_files_here:
            try:
                _, found, are_safetensors, _ = self._prepare_weights(model_config.model, None, None, True, None)
            except RuntimeError:  # there are none
                found, are_safetensors = [], False
            files = tuple(Path(name) for name in found) if are_safetensors else ()
        return Model(configuration(config), files)

    def _keep(self, model_config: Any) -> None:
        """Give what is on disk, from memory."""
        try:
            model = self._model(model_config, are_files_here=True)
            if not model.files:
                raise HyperFlexisError(f"{model_config.model} is not in safetensors files")
            self._give(model_config.model, model.read(shared=True))
        except HyperFlexisError as error:
            _log.warning("no weights are given at %s: %s", self._settings.listen, error)

    def _give(self, path: str, shard: Shard) -> None:
        assert self._settings.listen is not None and shard.manifest is not None
        try:
            over = self._settings.weights_over
            server = WeightServer(self._settings.listen, shard, NAME, EPOCH, self._token, over=over)
        except (OSError, ValueError) as error:
            _log.warning("no weights are given at %s: %s", self._settings.listen, error)
            return
        _given.append(_Given(path, shard.manifest.digest, shard, server))
        _log.info("weights are given at %s: digest %s", server.address, shard.manifest.digest)


def register() -> None:
    """Called by vLLM, in each of its processes."""
    register_model_loader(LOAD_FORMAT)(Loader)


def _tensors(shard: Shard) -> Weights:
    """What vLLM writes into them is not seen by those who get the weights from here."""
    arena, layout = shard.arena, shard.layout
    memory = arena if arena.descriptor is None else Mapped(arena.descriptor, layout.size)
    flat_bytes = memory.read(0, layout.size)
    for tensor, at in zip(layout.tensors, layout.offsets, strict=True):
        dtype = DTYPES[tensor.dtype]
        if isinstance(memory, Mapped) and tensor.size:
            memory.prepare(at, at + tensor.size)
        flat = torch.frombuffer(flat_bytes, dtype=dtype, count=prod(tensor.shape), offset=at) if tensor.size else None
        yield tensor.name, torch.empty(tensor.shape, dtype=dtype) if flat is None else flat.view(tensor.shape)
