"""The weights of a torch instance: from others or from disk into its shell, checked, and from there to others.

    kv_pool     where the KV cache was not reserved, its memory, touched
    transfer    over the network or shared memory, into where the weights are to be
    check       a few logits against the source's: weights that are whole and in the wrong place are found
    disk        where no source gave them
    digest      of what came from disk, so that others can be sure of it

Weights that came count only when they are the wanted ones and compute what the source computes. Otherwise they are
forgotten and the next way is tried. So there is no way on which an instance comes to serve others than it says.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from ...core.weights import Attempt, LoadWeights, Phase
from ...errors import HyperFlexisError
from ...transfer.fetch import FetchConfig, Fetcher
from ...transfer.pace import TokenBucket
from ...transfer.paths import Over, require
from ...transfer.weights import WeightServer
from ..base import Loaded
from .loader import Shell

BESIDE = 0.08
"""Share of the time for which an instance that serves sends its weights. A core's part and some memory bandwidth go to
the sending; at full speed, on two cores, tokens take 1.7 times as long (docs/weight-transfer.md)."""
BESIDE_TIGHT, SPARE = 0.02, 1.5
"""The share where the tightest request has less time to spare than half an iteration takes."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """Who this instance is to others, and the fleet's word. ``listen``: where it gives its weights, None: nowhere.
    ``over``: the way on which they come and go before others."""

    listen: str | None
    token: str
    instance: str
    epoch: int
    over: Over = ""


class ShellWeights:
    """Fills one shell and gives its weights away. What does not say otherwise is for the model's thread."""

    def __init__(self, shell: Shell, fleet: Fleet) -> None:
        """Raises HyperFlexisError when nobody can be given weights there, or not on that way."""
        require(fleet.over)
        self._shell = shell
        self._fleet = fleet
        self._phases: list[Phase] = []
        self._fetcher: Fetcher | None = None
        self._server: WeightServer | None = None
        self._closed = False
        self._bucket = TokenBucket()
        self._yields = True
        if fleet.listen is None:
            return
        try:
            self._server = WeightServer(
                fleet.listen, shell.shard, fleet.instance, fleet.epoch, fleet.token, self._bucket, fleet.over
            )
        except (OSError, ValueError) as error:
            raise HyperFlexisError(f"weights cannot be given at {fleet.listen}: {error}") from error

    @property
    def address(self) -> str:
        """Where others get the weights; empty: nowhere."""
        return self._server.address if self._server is not None else ""

    def load(self, order: LoadWeights) -> Loaded:
        """See Engine.load. Takes as long as it takes."""
        self._phases = []
        cache = self._shell.runner.model.cache
        if cache.layers:
            return self._load(order)
        try:
            with self._phase("kv_pool"):
                cache.take(cache.num_blocks)
        except HyperFlexisError as error:
            return Loaded(phases=tuple(self._phases), problem=str(error))
        loaded = self._load(order)
        if loaded.problem:
            cache.release()
        return loaded

    def _load(self, order: LoadWeights) -> Loaded:
        self._shell.unpack()
        attempts = self._from_others(order)
        shard = self._shell.shard
        if shard.is_complete and shard.manifest is not None:
            return Loaded(tuple(attempts), tuple(self._phases), shard.manifest.digest)
        if self._closed:
            return Loaded(tuple(attempts), tuple(self._phases), problem="the instance stopped")
        attempt, digest = self._from_disk(order)
        return Loaded((*attempts, attempt), tuple(self._phases), digest, attempt.problem)

    def serves(self, budget_s: float, predicted_s: float) -> None:
        """An iteration begins that may take ``budget_s`` before a request loses its pace, and probably takes
        ``predicted_s``: what is given away meanwhile yields to it. From any thread; cheap."""
        if self._yields:
            self._bucket.set_share(BESIDE if budget_s >= SPARE * predicted_s else BESIDE_TIGHT)

    def idle(self) -> None:
        """No request is here: weights go as fast as the rate allows."""
        self._bucket.set_share(1.0)

    def set_send_rate(self, bytes_per_s: float | None) -> None:
        """See Engine. From any thread."""
        self._yields = bytes_per_s is not None
        self._bucket.set_rate(bytes_per_s)
        if not self._yields:
            self._bucket.set_share(1.0)

    def close(self) -> None:
        """Give nothing more, and get nothing more: a ``load`` under way fails soon. From any thread."""
        self._closed = True
        if self._fetcher is not None:
            self._fetcher.cancel()
        if self._server is not None:
            self._server.close()
        self._shell.shard.arena.release()

    def _from_others(self, order: LoadWeights) -> list[Attempt]:
        shard = self._shell.shard
        config = FetchConfig(self._fleet.token, order.digest, order.chunk_bytes, over=self._fleet.over)
        self._fetcher = Fetcher(shard, config)
        with self._phase("transfer"):
            attempts = self._fetcher.run(order.sources)
        if shard.is_complete and shard.manifest is not None:
            with self._phase("check"):
                agrees = not shard.manifest.check or self._shell.agrees(shard.manifest.check)
            if agrees:
                return attempts
            attempts[-1] = replace(attempts[-1], problem="what came computes other logits than its source does")
        shard.forget()
        return attempts

    def _from_disk(self, order: LoadWeights) -> tuple[Attempt, str]:
        began = time.monotonic()
        problem = digest = ""
        try:
            with self._phase("disk"):
                self._shell.read()
            with self._phase("digest"):
                digest = self._shell.publish()
            if order.digest and digest and digest != order.digest:
                problem = f"the weights on disk have digest {digest}, and {order.digest} are wanted"
                digest = ""
                self._shell.shard.forget()
        except HyperFlexisError as error:
            problem = str(error)
        num_bytes = 0 if problem else self._shell.num_bytes
        return Attempt("disk", str(self._shell.directory), num_bytes, time.monotonic() - began, problem), digest

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self._phases.append(Phase(name, time.monotonic() - began))
