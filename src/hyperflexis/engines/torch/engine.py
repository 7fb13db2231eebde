"""The torch engine: the Batcher's iterations, run by PyTorch.

    event loop:  handoffs -> plan -> copy the rows' ids and blocks -> (thread) forward and sampling -> commit -> sink

One thread runs the model and nothing else; queues, KV blocks and streams belong to the event loop. Iterations follow
each other without a pause, and the loop waits on an event when there is nothing to do.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from ...batcher import Batch, Batcher, BatcherConfig, Emitted, RequestTooLong, Sampled
from ...core.latency import Coefficients, OnlineFit
from ...core.launch import Phase as StartPhase
from ...core.links import KvSource
from ...core.weights import LoadWeights
from ...errors import HyperFlexisError, ProtocolError
from ...policy.catalog import StepFunctions
from ...sequences import Sequence
from ...transfer.paths import Over
from ...transfer.tcp import is_local
from ...wire import Generate
from ..base import STANDBY, Emission, EngineInfo, EngineReport, EngineStart, Loaded, PhaseOver
from ..driver import finished, report_of, sequence_of
from ..handoff import HandoffConfig, Handoffs
from .handoff import TorchDevice
from .loader import allocate, find_device
from .probe import blocks_for, probe, shapes
from .runner import Runner, Stream, stream_of
from .sampler import Drawn
from .standby import Fleet, ShellWeights

MAX_FAILURES = 3
"""Iterations in a row that may fail before the engine gives up: once is a request's fault or a full memory, three
times is a broken device."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TorchConfig:
    """An instance of the model in ``directory`` that serves under the name ``model``.

    ``device``: cpu, cuda or cuda:N. ``dtype``: float32, bfloat16 or float16, None for the checkpoint's. ``threads``:
    of a CPU instance. ``kv_tokens``: size of the KV cache, None for what the memory allows. ``context_length``: None
    for the model's own. ``device_kind``: its name in profiles, None for the device's own. ``kv_listen``: address
    (``unix:PATH`` or HOST:PORT) at which other instances get the KV of requests from here, None for nowhere;
    ``kv_token``: the word that they share. ``weights_listen``: the same for its weights. ``reserve_kv``: whether a
    standby has the memory of its KV cache already; else it takes it when it loads. ``weights_over``: how weights come
    and go before shared memory and TCP are tried (``nixl``, ``torch``), None for no such way.
    """

    model: str
    directory: Path
    step: StepFunctions
    device: str = "cpu"
    dtype: str | None = None
    threads: int = 1
    kv_tokens: int | None = None
    context_length: int | None = None
    max_batch: int = 64
    max_batch_tokens: int = 2048
    block_size: int = 16
    device_kind: str | None = None
    kv_listen: str | None = None
    kv_token: str = ""
    weights_listen: str | None = None
    reserve_kv: bool = True
    weights_over: Over | None = None


class TorchEngine:
    """See the module and the contract in engines/base.py."""

    def __init__(self, config: TorchConfig) -> None:
        self._config = config
        self._clock = time.monotonic
        self._thread = ThreadPoolExecutor(1, "torch", torch.set_num_threads, (config.threads,))
        self._wake = asyncio.Event()
        self._streams: dict[object, Sequence] = {}
        self._draining = False
        self._stopping = False
        self._failures = 0
        self._failure: str | None = None
        self._task: asyncio.Task[None] | None = None
        self._standby = False
        self._packing = ThreadPoolExecutor(1, "torch-pack", torch.set_num_threads, (config.threads,))

    async def start(self, start: EngineStart) -> EngineInfo:
        """Load the weights, unless in standby, measure a few iterations, and take requests from then on."""
        self._sink = start.sink
        self._standby = start.standby
        config = self._config
        loop = asyncio.get_running_loop()
        weights_over = config.weights_over or ""
        fleet = Fleet(config.weights_listen, config.kv_token, start.instance, start.epoch, weights_over)

        def over(phase: StartPhase, seconds: float) -> None:
            if start.phase_over is not None:
                loop.call_soon_threadsafe(start.phase_over, phase, seconds)

        prior, digest = await loop.run_in_executor(self._thread, self._prepare, fleet, over)
        self._runner = self._shell.runner
        model = self._runner.model
        self._vocab_size = model.config.vocab_size
        self._eos = model.config.eos_token_ids
        sizes = self._sizes(self._runner)
        self._batcher = Batcher(sizes, OnlineFit(prior), config.step.plan, config.step.victim)
        device = TorchDevice(model, config.model)
        self._handoffs = Handoffs(
            HandoffConfig(config.kv_listen, config.kv_token, start.instance, start.epoch),
            device,
            self._batcher,
            self._streams,
            start.sink,
            start.ending,
            start.linked,
            self._wake.set,
        )
        self._task = loop.create_task(self._run())
        return EngineInfo(
            model=config.model,
            engine="torch",
            device_kind=config.device_kind or device_kind(model.device),
            context_length=sizes.context_length,
            kv_capacity_tokens=sizes.kv_capacity_tokens,
            max_batch=sizes.max_batch,
            max_batch_tokens=sizes.max_batch_tokens,
            returns_token_ids=True,
            latency=prior,
            kv_address=self._handoffs.address,
            kv_bytes_per_token=device.layout.num_layers * device.layout.token_bytes,
            weights_address=self._weights.address,
            weights_digest=digest,
            weights_bytes=self._shell.num_bytes,
        )

    async def load(self, order: LoadWeights) -> Loaded:
        """See Engine. Batches are slow for the first second or so, until the weights are packed."""
        loaded = await asyncio.get_running_loop().run_in_executor(self._thread, self._weights.load, order)
        if not loaded.problem:
            self._standby = False
            self._packing.submit(self._shell.pack)
        return loaded

    def set_send_rate(self, bytes_per_s: float | None) -> None:
        """See Engine."""
        self._weights.set_send_rate(bytes_per_s)

    def generate(self, key: object, request: Generate) -> None:
        """See the contract."""
        refusal = self._failure or ("the instance is draining" if self._draining else "")
        refusal = refusal or (STANDBY if self._standby else "")
        if refusal:
            self._sink([Emission(key, [], finish="refused", message=refusal)])
            return
        sampling = request.sampling
        stop_ids = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self._eos)
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        now = self._clock()
        try:
            stream = Stream(key, sampling, seed, stop_ids, None if sampling.logprobs is None else [])
            seq = sequence_of(request, now, stream)
            if seq.token_ids and max(seq.token_ids) >= self._vocab_size:
                raise ProtocolError(f"token id {max(seq.token_ids)} is outside the vocabulary of {self._vocab_size}")
            if request.kv is not None:
                self._handoffs.fetch(key, seq, request)
                return
            self._batcher.add(seq, now)
        except (RequestTooLong, ProtocolError, ValueError) as error:
            self._sink([Emission(key, [], finish="invalid", message=str(error))])
            return
        self._streams[key] = seq
        self._wake.set()

    def cancel(self, key: object) -> None:
        """See the contract."""
        seq = self._streams.pop(key, None)
        if seq is not None:
            self._handoffs.left(seq, "it was cancelled")
            self._batcher.cancel(seq.id)
            self._sink([finished(key, seq, "cancelled")])
            self._wake.set()

    def report(self) -> EngineReport:
        """The state now. Raises HyperFlexisError when the engine has given up; its process should then end."""
        if self._failure is not None:
            raise HyperFlexisError(self._failure)
        return report_of(self._batcher)

    def stay(self, request_id: str) -> None:
        """Without effect: it has gone on meanwhile."""

    def set_role(self, prefill_share: float) -> None:
        """Accepted and without effect: the instance takes what it is sent."""

    def keep_links(self, sources: Iterable[KvSource]) -> None:
        """See Engine."""
        self._handoffs.keep_links(sources)

    def drain(self) -> None:
        """See the contract."""
        self._draining = True

    async def stop(self) -> None:
        """See the contract. Returns when the iteration under way has ended."""
        self._draining = self._stopping = True
        self._wake.set()
        if self._task is not None:
            await self._task
            self._shell.stop()
            await asyncio.to_thread(self._weights.close)
            await self._handoffs.close()
            self._end(list(self._streams.values()), "the instance stopped")
            del self._runner, self._shell, self._weights
        self._thread.shutdown()
        self._packing.shutdown()

    def _prepare(self, fleet: Fleet, phase_over: PhaseOver) -> tuple[Coefficients, str]:
        """Memory, weights unless in standby, warm kernels. Returns how long iterations take, and the weights' digest if
        others can have them. Without a reserved KV cache as much is taken as the warm-up touches, and given back."""
        config, began = self._config, self._clock()
        device = find_device(config.device)
        most = config.max_batch * (config.context_length or 1 << 20)
        shared = fleet.listen is not None and is_local(fleet.listen)
        reserve = config.reserve_kv or not self._standby
        self._shell = shell = allocate(
            config.directory, device, config.dtype, config.kv_tokens, config.block_size, most, shared, reserve
        )
        self._weights = ShellWeights(shell, fleet)
        allocated = read = self._clock()
        phase_over("engine_init", allocated - began)
        if not self._standby:
            shell.read()
            read = self._clock()
            phase_over("weights", read - allocated)
        shell.pack()
        sizes = self._sizes(shell.runner)
        wanted = shapes(sizes.max_batch, sizes.max_batch_tokens, sizes.context_length, sizes.kv_capacity_tokens)
        cache = shell.runner.model.cache
        if not reserve:
            cache.take(min(blocks_for(wanted, cache.block_size), cache.num_blocks))
        prior = probe(shell.runner, wanted)
        if not reserve:
            cache.release()
        digest = shell.publish() if fleet.listen is not None and not self._standby else ""
        phase_over("warm_up", self._clock() - read)
        return prior, digest

    def _sizes(self, runner: Runner) -> BatcherConfig:
        config, model = self._config, runner.model
        kv_tokens = model.cache.num_blocks * config.block_size
        context = min(model.config.context_length, kv_tokens)
        return BatcherConfig(
            num_blocks=model.cache.num_blocks,
            block_size=config.block_size,
            max_batch=config.max_batch,
            max_batch_tokens=config.max_batch_tokens,
            context_length=min(config.context_length or context, context),
        )

    async def _run(self) -> None:
        """Iterate until stopped. What no single request can be blamed for ends the engine."""
        loop = asyncio.get_running_loop()
        try:
            while not self._stopping and self._failure is None:
                self._wake.clear()
                self._handoffs.between()
                began = self._clock()
                batch = self._batcher.plan(began)
                if batch is None:
                    self._weights.idle()
                    await self._wake.wait()
                    continue
                self._weights.serves(batch.budget_s, batch.predicted_s)
                self._handoffs.planned(batch)
                work = self._runner.work_of(batch, self._handoffs.watch(batch))
                try:
                    drawn = await loop.run_in_executor(self._thread, self._runner.run, work)
                except Exception as error:
                    self._iteration_failed(batch, error)
                    continue
                self._failures = 0
                self._commit(batch, drawn, began)
        except Exception:
            _log.exception("the torch engine's loop failed")
            self._give_up("the engine failed; see its log")

    def _commit(self, batch: Batch, drawn: SequenceOf[Drawn], began: float) -> None:
        sampling = [stream_of(chunk.seq.payload) for chunk in batch.chunks if chunk.samples]
        sampled = [Sampled(d.token_id, d.token_id in s.stop_ids) for d, s in zip(drawn, sampling, strict=True)]
        logprobs = {s.key: d for d, s in zip(drawn, sampling, strict=True) if d.logprob is not None}
        now = self._clock()
        emitted = self._batcher.commit(batch, sampled, now, now - began)
        if emitted:
            self._sink([self._emission(one, logprobs) for one in emitted])

    def _emission(self, one: Emitted, logprobs: dict[object, Drawn]) -> Emission:
        stream = stream_of(one.seq.payload)
        key = stream.key
        if one.finish is None:
            out = Emission(key, [one.token_id])
        else:
            del self._streams[key]
            self._handoffs.left(one.seq, "it has ended")
            # The token that ended the text is counted and not part of it.
            out = finished(key, one.seq, one.finish)
            if one.finish != "stop":
                out.token_ids.append(one.token_id)
        drawn = logprobs.get(key)
        if drawn is not None and drawn.logprob is not None and out.token_ids:
            out.logprobs = [drawn.logprob]
            if stream.logprobs is not None:
                stream.logprobs.append(drawn.logprob)
        return out

    def _iteration_failed(self, batch: Batch, error: Exception) -> None:
        """End the streams of the batch; after MAX_FAILURES in a row, everything."""
        self._failures += 1
        _log.error("iteration of %d requests failed (%d in a row)", len(batch.chunks), self._failures, exc_info=error)
        if self._failures >= MAX_FAILURES:
            self._give_up(f"{self._failures} iterations failed in a row, the last with: {error}")
        else:
            self._end([chunk.seq for chunk in batch.chunks if not chunk.seq.finished], f"iteration failed: {error}")

    def _give_up(self, message: str) -> None:
        self._failure = message
        _log.critical("the torch engine gives up: %s", message)
        self._end(list(self._streams.values()), message)

    def _end(self, sequences: SequenceOf[Sequence], message: str) -> None:
        out = []
        for seq in sequences:
            key = stream_of(seq.payload).key
            self._handoffs.left(seq, message)
            self._batcher.cancel(seq.id)
            del self._streams[key]
            out.append(finished(key, seq, "error", message))
        if out:
            self._sink(out)


def device_kind(device: torch.device) -> str:
    """The device's name in profiles."""
    if device.type == "cpu":
        return "cpu"
    return torch.cuda.get_device_name(device).lower().replace(" ", "-")
