"""An engine without a model: the Batcher, driven in real time by a profile's iteration times.

Everything but the device is real: queues, KV blocks, prefix reuse, the step policy, the latency fit. Iterations follow
each other on an ideal clock (the next one starts when the last one *should* have ended), so that a late timer delays
one emission by about a millisecond and never slows the device down.

Tokens are printable ASCII, one byte each. The next token is a hash of all tokens before it and of the seed, as a
model's greedy choice is a function of its context: so a request that is resumed elsewhere from prompt and sent tokens
goes on as it would have.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from binascii import crc32
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial

from ..batcher import Batch, Batcher, BatcherConfig, Emitted, RequestTooLong, Sampled
from ..core.latency import Coefficients, OnlineFit
from ..core.launch import Phase as StartPhase
from ..core.links import BYTES_PER_S, LATENCY_S, KvSource, Link
from ..core.profile import Profile
from ..core.weights import Attempt, LoadWeights, Path
from ..errors import HyperFlexisError, ProtocolError
from ..policy.catalog import StepFunctions
from ..sequences import Sequence
from ..transfer.kv import Give, Take
from ..transfer.links import HOST_RINGS
from ..wire import Generate, Sampling, TokenLogprob, pack_ids
from .base import STANDBY, Emission, EngineInfo, EngineReport, EngineStart, Linked, Loaded, Sink
from .driver import finished, report_of, sequence_of
from .emulated_kv import EmulatedKv, KvHistory
from .handoff import HandoffConfig, Handoffs

FIRST_TOKEN, NUM_TOKENS = 32, 95
"""Token ids drawn: printable ASCII."""
END_OF_TEXT = 3
"""The id that ends a text; ASCII's own."""
DIED = 70
"""Exit status of a process whose engine was told to die."""
MAX_LAG_S = 0.1
"""How far emissions may fall behind the ideal clock before it is set anew: the host is then too slow for this
profile, or was suspended, and catching up would show iterations faster than the device's."""

_WORD = [token.to_bytes(4, "little") for token in range(128)]
_SAMPLED = [Sampled(token) for token in range(128)]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong, for tests of what is around an engine. Counts are of output tokens since the start.

    ``die_after_tokens``: the process exits at once with status DIED. ``hang_after_tokens``: iterations stop, the
    process lives. ``slow_factor`` stretches iterations, after ``slow_after_tokens``. ``refuse``: every request is
    refused.
    """

    die_after_tokens: int | None = None
    hang_after_tokens: int | None = None
    slow_factor: float = 1.0
    slow_after_tokens: int | None = None
    refuse: bool = False


@dataclass(frozen=True, slots=True)
class EmulatedConfig:
    """An emulated instance of ``profile`` that serves under the name ``model``.

    ``noise`` is the relative standard deviation of iteration times. ``prior_scale`` multiplies the coefficients from
    which the fit starts, so that it has something to learn. With ``mean_output_tokens`` texts end by themselves after
    that many tokens on average (unless a request ignores that), else always at their limit. A start takes
    ``start_scale`` times what the profile's does; the process itself is a real one. Sizes that are None are
    the profile's. ``kv_listen``: address (``unix:PATH`` or HOST:PORT) at which other instances get the KV of requests
    from here, None for nowhere; ``kv_token``: the word that they share. What a request's real KV would take on its way
    is ``kv_link_latency_s`` and its bytes at ``kv_link_bytes_per_s``.
    """

    model: str
    profile: Profile
    step: StepFunctions
    kv_tokens: int | None = None
    context_length: int | None = None
    max_batch: int | None = None
    max_batch_tokens: int | None = None
    block_size: int = 16
    noise: float = 0.0
    seed: int = 0
    prior_scale: float = 1.0
    mean_output_tokens: float | None = None
    start_scale: float = 0.0
    faults: Faults = Faults()
    kv_listen: str | None = None
    kv_token: str = ""
    kv_link_latency_s: float = LATENCY_S
    kv_link_bytes_per_s: float = BYTES_PER_S


@dataclass(slots=True)
class _Stream:
    key: object
    sampling: Sampling
    state: int
    kv: KvHistory = field(default_factory=KvHistory)


class EmulatedEngine:
    """See the module."""

    def __init__(self, config: EmulatedConfig) -> None:
        self._config = config
        self._clock = time.monotonic
        profile = config.profile
        self._prior = _scaled(profile.coefficients, config.prior_scale)
        self._start = profile.start if config.start_scale else None
        block = config.block_size
        self._sizes = BatcherConfig(
            num_blocks=max((config.kv_tokens or profile.kv_capacity_tokens) // block, 1),
            block_size=block,
            max_batch=config.max_batch or profile.max_batch,
            max_batch_tokens=config.max_batch_tokens or profile.max_batch_tokens,
            context_length=config.context_length or profile.context_length,
        )
        self._batcher = Batcher(self._sizes, OnlineFit(self._prior), config.step.plan, config.step.victim)
        self._random = random.Random(config.seed)
        # A draw below this ends the text: a geometric length of the wanted mean.
        self._end_below = int(2**32 / config.mean_output_tokens) if config.mean_output_tokens else 0
        self._streams: dict[object, Sequence] = {}
        self._sink: Sink | None = None
        self._batch: Batch | None = None
        self._batch_s = 0.0
        self._ends_at = 0.0
        self._timer: asyncio.Handle | None = None
        self._draining = False
        self._standby = False
        self._hung = False
        self._refusing = config.faults.refuse
        self._slow = config.faults.slow_factor if config.faults.slow_after_tokens is None else 1.0
        self._failure: str | None = None
        self._warned_at = float("-inf")
        self._handoffs: Handoffs | None = None

    async def start(self, start: EngineStart) -> EngineInfo:
        """Ready at once, unless a start is to take what the profile says: there are no weights."""
        self._sink = start.sink
        self._standby = start.standby
        self._loop = asyncio.get_running_loop()
        for phase, seconds in self._phases(start.standby):
            await asyncio.sleep(seconds)
            if start.phase_over is not None:
                start.phase_over(phase, seconds)
        sizes, config = self._sizes, self._config
        self._kv = EmulatedKv(
            f"{config.model} of {config.profile.name}",
            config.profile.kv_bytes_per_token,
            sizes.context_length,
            config.kv_link_latency_s,
            config.kv_link_bytes_per_s,
        )
        self._handoffs = Handoffs(
            HandoffConfig(config.kv_listen, config.kv_token, start.instance, start.epoch),
            _Device(self._kv),
            self._batcher,
            self._streams,
            self._emit,
            start.ending,
            None if start.linked is None else partial(self._linked, start.linked),
            self._wake,
        )
        return EngineInfo(
            model=self._config.model,
            engine="emulated",
            device_kind=self._config.profile.device_kind,
            context_length=sizes.context_length,
            kv_capacity_tokens=sizes.kv_capacity_tokens,
            max_batch=sizes.max_batch,
            max_batch_tokens=sizes.max_batch_tokens,
            returns_token_ids=True,
            latency=self._prior,
            kv_address=self._handoffs.address,
            kv_bytes_per_token=config.profile.kv_bytes_per_token,
            weights_address="" if self._start is None else f"emulated:{start.instance}",
            weights_digest="" if self._start is None else config.profile.name,
            weights_bytes=config.profile.weight_bytes,
        )

    def _phases(self, standby: bool) -> list[tuple[StartPhase, float]]:
        start, scale = self._start, self._config.start_scale
        if start is None:
            return []
        weights: list[tuple[StartPhase, float]] = [] if standby else [("weights", scale * start.weights_s)]
        return [("engine_init", scale * start.engine_init_s), *weights, ("warm_up", scale * start.warm_up_s)]

    async def load(self, order: LoadWeights) -> Loaded:
        """There are no weights: at once, or after what they would take over a link, or from disk."""
        profile, began = self._config.profile, self._clock()
        if self._start is None:
            self._standby = False
            return Loaded()
        seconds = profile.weight_bytes / BYTES_PER_S if order.sources else self._start.weights_s
        await asyncio.sleep(self._config.start_scale * seconds)
        self._standby = False
        path: Path = "tcp" if order.sources else "disk"
        source = order.sources[0].instance if order.sources else profile.name
        attempt = Attempt(path, source, profile.weight_bytes, self._clock() - began)
        return Loaded((attempt,), (), profile.name)

    def set_send_rate(self, bytes_per_s: float | None) -> None:
        """Without effect: there are no weights to give."""

    def generate(self, key: object, request: Generate) -> None:
        """See the contract."""
        if self._refusing or self._draining or self._standby or self._failure is not None:
            reason = "the instance is draining" if self._draining else "the instance refuses requests"
            reason = STANDBY if self._standby else reason
            self._emit([Emission(key, [], finish="refused", message=reason)])
            return
        sampling = request.sampling
        # Greedy choice knows no seed.
        seed = (sampling.seed or 0) & 0xFFFFFFFF if sampling.temperature > 0.0 else 0
        now = self._clock()
        try:
            seq = sequence_of(request, now, _Stream(key, sampling, crc32(request.token_ids, seed)))
            if request.kv is not None:
                assert self._handoffs is not None
                self._handoffs.fetch(key, seq, request)
                return
            self._batcher.add(seq, now)
        except (RequestTooLong, ProtocolError, ValueError) as error:
            self._emit([Emission(key, [], finish="invalid", message=str(error))])
            return
        self._streams[key] = seq
        self._wake()

    def cancel(self, key: object) -> None:
        """See the contract."""
        seq = self._streams.pop(key, None)
        if seq is None:
            return
        self._left(seq, "it was cancelled")
        self._batcher.cancel(seq.id)
        self._emit([finished(key, seq, "cancelled")])
        self._wake()

    def report(self) -> EngineReport:
        """The state now. Raises HyperFlexisError after ``fail``."""
        if self._failure is not None:
            raise HyperFlexisError(self._failure)
        return report_of(self._batcher)

    def stay(self, request_id: str) -> None:
        """Without effect: it has gone on meanwhile."""

    def set_role(self, prefill_share: float) -> None:
        """Accepted and without effect: the instance takes what it is sent."""

    def keep_links(self, sources: Iterable[KvSource]) -> None:
        """See Engine."""
        assert self._handoffs is not None
        self._handoffs.keep_links(sources)

    def _linked(self, linked: Linked, source: KvSource, link: Link | None, problem: str) -> None:
        """What was measured is the memory of this machine; the link of the emulated device is as configured."""
        config = self._config
        if link is not None:
            link = Link(max(link.latency_s, config.kv_link_latency_s), config.kv_link_bytes_per_s)
        linked(source, link, problem)

    def drain(self) -> None:
        """See the contract."""
        self._draining = True

    async def stop(self) -> None:
        """See the contract."""
        self._draining = True
        if self._handoffs is not None:
            self._kv.close()
            await self._handoffs.close()
        self._end_all("the instance stopped")

    def fail(self, message: str) -> None:
        """Fault: the engine breaks, as after a device error; its host process finds out by ``report``."""
        self._failure = message
        self._end_all(message)

    def hang(self) -> None:
        """Fault: no iteration ends or begins any more, until ``recover``."""
        self._hung = True

    def slow(self, factor: float) -> None:
        """Fault: iterations take ``factor`` times as long from the next one on."""
        self._slow = factor

    def refuse(self) -> None:
        """Fault: requests are refused, until ``recover``."""
        self._refusing = True

    def recover(self) -> None:
        """End hang, slow and refuse."""
        self._refusing = False
        self._slow = 1.0
        if self._hung:
            self._hung = False
            if self._timer is None:
                self._timer = self._loop.call_soon(self._end if self._batch else self._begin, self._clock())

    def _wake(self) -> None:
        """Plan an iteration, if none is under way."""
        if self._batch is None and self._timer is None and not self._hung:
            # Soon, not now: all that arrived together shares the first iteration.
            self._timer = self._loop.call_soon(self._begin, self._clock())

    def _begin(self, start: float) -> None:
        """Plan the iteration that starts at ``start``, or rest when there is nothing to do."""
        if self._hung:
            self._timer = None
            return
        assert self._handoffs is not None
        self._handoffs.between()
        if self._timer is not None:  # it was this call's own, or is for what is planned now
            self._timer.cancel()
            self._timer = None
        batch = self._batch = self._batcher.plan(self._clock())
        if batch is None:
            return
        self._handoffs.planned(batch)
        iteration_s = self._config.profile.iteration_s
        seconds = iteration_s(batch.prefill_tokens, batch.attention, batch.num_decodes, batch.kv_tokens) * self._slow
        if self._config.noise:
            seconds *= max(self._random.gauss(1.0, self._config.noise), 0.1)
        self._batch_s = seconds
        self._ends_at = start + seconds
        self._timer = self._loop.call_later(max(self._ends_at - self._clock(), 0.0), self._end, self._ends_at)

    def _end(self, ended_at: float) -> None:
        """The iteration is over: tokens go out and the next one begins where this one ended."""
        self._timer = None
        batch = self._batch
        if self._hung or batch is None:
            return
        sampled = [self._sample(chunk.seq) for chunk in batch.chunks if chunk.samples]
        now = self._clock()
        for chunk in batch.prefills:
            _stream(chunk.seq).kv.computed.append((chunk.start + chunk.num_tokens, ended_at - self._batch_s, ended_at))
        emitted = self._batcher.commit(batch, sampled, now, self._batch_s)
        self._emit([self._emission(one) for one in emitted])
        self._apply_faults()
        self._batch = None
        if now - ended_at > MAX_LAG_S:
            if now - self._warned_at > 10.0:
                self._warned_at = now
                _log.warning(
                    "emulation is %.0f ms behind its profile: this machine is too busy", 1e3 * (now - ended_at)
                )
            ended_at = now
        self._begin(ended_at)

    def _sample(self, seq: Sequence) -> Sampled:
        stream = _stream(seq)
        state = stream.state
        sampling = stream.sampling
        # Multiplied, so that the end does not depend on the same bits as the token.
        if self._end_below and not sampling.ignore_eos and (state * 2654435761) & 0xFFFFFFFF < self._end_below:
            return Sampled(END_OF_TEXT, stop=True)
        token = FIRST_TOKEN + state % NUM_TOKENS
        stream.state = crc32(_WORD[token], state)
        if sampling.stop_token_ids and token in sampling.stop_token_ids:
            return Sampled(token, stop=True)
        return _SAMPLED[token]

    def _emission(self, one: Emitted) -> Emission:
        seq = one.seq
        stream = _stream(seq)
        if one.finish is None:
            out = Emission(stream.key, [one.token_id])
        else:
            del self._streams[stream.key]
            self._left(seq, "it has ended")
            out = finished(stream.key, seq, one.finish)
            if one.finish != "stop":
                out.token_ids.append(one.token_id)
        if stream.sampling.logprobs is not None and out.token_ids:
            out.logprobs = [_logprob(one.token_id, stream.sampling.logprobs)]
        return out

    def _emit(self, emissions: list[Emission]) -> None:
        if emissions and self._sink is not None:
            self._sink(emissions)

    def _end_all(self, message: str) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._batch = None
        out = []
        for key, seq in self._streams.items():
            self._left(seq, message)
            self._batcher.cancel(seq.id)
            out.append(finished(key, seq, "error", message))
        self._streams.clear()
        self._emit(out)

    def _left(self, seq: Sequence, reason: str) -> None:
        if self._handoffs is not None:
            self._handoffs.left(seq, reason)

    def _apply_faults(self) -> None:
        faults, sent = self._config.faults, self._batcher.counters.output_tokens
        if faults.die_after_tokens is not None and sent >= faults.die_after_tokens:
            os._exit(DIED)
        if faults.hang_after_tokens is not None and sent >= faults.hang_after_tokens:
            self._hung = True
        if faults.slow_after_tokens is not None and sent >= faults.slow_after_tokens:
            self._slow = faults.slow_factor


class _Device:
    """A Device (engines/handoff.py) whose KV is made up."""

    rings = HOST_RINGS

    def __init__(self, kv: EmulatedKv) -> None:
        self._kv = kv
        self.layout = kv.layout

    def give(self, seq: Sequence) -> Give:
        """See Device."""
        assert seq.token_ids is not None
        return self._kv.give(seq.token_ids, _stream(seq).kv)

    def take(self, seq: Sequence) -> Take:
        """See Device."""
        return self._kv.take(_stream(seq).kv, seq.computed)

    def mark(self, layers: Iterable[int]) -> None:
        """See Device. There is no device that would do anything later."""

    def key(self, seq: Sequence) -> object:
        """See Device."""
        return _stream(seq).key

    def state(self, seq: Sequence, since: int) -> bytes:
        """See Device. All that matters follows from the tokens."""
        return b""

    def resume(self, seq: Sequence, state: bytes, token_ids: list[int]) -> list[TokenLogprob] | None:
        """See Device."""
        assert seq.token_ids is not None
        stream = _stream(seq)
        self._kv.check(seq.token_ids + token_ids, stream.kv)
        stream.state = crc32(pack_ids(token_ids), stream.state)
        alternatives = stream.sampling.logprobs
        return None if alternatives is None else [_logprob(token, alternatives) for token in token_ids]


def _stream(seq: Sequence) -> _Stream:
    assert isinstance(seq.payload, _Stream)
    return seq.payload


def _scaled(c: Coefficients, k: float) -> Coefficients:
    return replace(c, c0=c.c0 * k, c1=c.c1 * k, c2=c.c2 * k, c3=c.c3 * k, c4=c.c4 * k)


def _logprob(token: int, alternatives: int) -> TokenLogprob:
    """The drawn token with half of the mass, the ids after it with half of what is left, and so on."""
    ln2 = 0.6931471805599453
    top = [(FIRST_TOKEN + (token - FIRST_TOKEN + i) % NUM_TOKENS, -ln2 * (i + 1)) for i in range(alternatives)]
    return TokenLogprob(token, -ln2, top)
