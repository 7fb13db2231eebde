"""A copy of a model's weights in this machine's memory: a source for instances that come while no instance serves.

A process beside the instances, so that it outlives all of them. It reads the checkpoint once, into the engine's layout,
and gives it by the protocol that instances speak (transfer/weights.py); its memory can be mapped. It listens once all
is there: who asks before is refused at once and reads from disk, which is no slower.
"""

from __future__ import annotations

import logging
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from .core.weights import WeightSource
from .errors import HyperFlexisError
from .transfer.weights import WeightServer

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CopyConfig:
    """Of the checkpoint in ``directory``, cast to ``dtype`` (None: its own), to be had at ``source``."""

    source: WeightSource
    directory: Path
    dtype: str | None


def keep(config: CopyConfig, token: str) -> NoReturn:
    """Read the weights, and give them to those that know the fleet's ``token`` until the process is ended.

    Raises HyperFlexisError when the model, its files or the memory will not do, or the address is taken.
    """
    import torch

    from .engines.torch.loader import CHECK_TOKENS, allocate

    torch.set_num_threads(1)
    began = time.monotonic()
    # All that it computes is the fingerprint of its weights.
    shell = allocate(
        config.directory, torch.device("cpu"), config.dtype, CHECK_TOKENS, CHECK_TOKENS, CHECK_TOKENS, shared=True
    )
    shell.read()
    read_s = time.monotonic() - began
    digest = shell.publish()
    source = config.source
    try:
        server = WeightServer(source.address, shell.shard, source.instance, source.epoch, token)
    except (OSError, ValueError) as error:
        raise HyperFlexisError(f"weights cannot be given at {source.address}: {error}") from error
    _log.info(
        "%s: %.2f GB of weights are kept in memory, read in %.2f s, %.2f s in all; digest %s, at %s",
        *(source.instance, shell.num_bytes / 1e9, read_s, time.monotonic() - began, digest, server.address),
    )
    while True:
        signal.pause()
