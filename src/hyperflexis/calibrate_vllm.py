"""Live calibration of a vLLM server: iterations of chosen shapes, timed by what a client of it sees.

Requests go through the adapter that a fleet uses, to a server that does nothing else. Prompts are random, so that none
is found in the prefix cache. Which iteration a token is of follows from what is sent when:

    prefill   the first token of a prompt alone, which fits into one iteration
    decode    the time of GAPS tokens of one stream while so many run, by their number
    mixed     what a running stream loses while a prompt is computed, and a decode's time

Single gaps say nothing: a client that is late finds several tokens at once.

What a request costs beside its iterations, HTTP and the way to the engine and back, is in each first token and in no
gap: a prompt of one token takes it and an iteration that is as short as a decode's. It is measured so, taken off, and
stated.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

from .calibrate_fit import Sample
from .engines.base import Emission, Engine, EngineInfo, EngineStart
from .errors import HyperFlexisError
from .wire import Generate, Sampling, pack_ids

GAPS = 24
"""Of one stream, for a decode's time."""
MOST_TOKENS = 40 * GAPS
"""Of a stream that is cancelled when it has been timed: enough that none ends before, however late the client is."""
LIMIT_S = 300.0
"""A server that gives no token for so long is broken."""
IDS = range(100, 900)
"""Of prompts: in any vocabulary."""


@dataclass(frozen=True, slots=True)
class Live:
    """What was measured: ``overhead_s`` is what a request costs beside its iterations. ``left_out`` are shapes that the
    server does not come to: the first of the streams has put out all that its context allows before the last begins."""

    samples: tuple[Sample, ...]
    info: EngineInfo
    overhead_s: float
    left_out: tuple[Shape, ...]


class Shape(NamedTuple):
    """``decodes`` of ``context`` tokens each, and a prompt of ``prefill``; 0: none."""

    prefill: int
    decodes: int
    context: int


class _Full(HyperFlexisError):
    """A stream has put out all that it may."""


@dataclass(slots=True, eq=False)
class _Stream:
    """When its tokens came. Several may come at once."""

    at: list[float] = field(default_factory=list)
    end: Emission | None = None
    moved: asyncio.Event = field(default_factory=asyncio.Event)

    async def has(self, tokens: int) -> None:
        """Wait until so many tokens are there. Raises HyperFlexisError when they will not come."""
        async with asyncio.timeout(LIMIT_S):
            while len(self.at) < tokens:
                if self.end is not None and self.end.finish == "length":
                    raise _Full("the server's context is too short to time anything: give it more (--max-model-len)")
                if self.end is not None:
                    raise HyperFlexisError(f"the server ends a request early: {self.end.finish} {self.end.message}")
                self.moved.clear()
                await self.moved.wait()


class _Client:
    """Sends requests to one engine and notes when tokens come."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self._engine = engine
        self._streams: dict[object, _Stream] = {}
        self._random = random.Random(seed)
        self._sent = 0

    def sink(self, emissions: list[Emission]) -> None:
        """The engine's."""
        now = time.monotonic()
        for one in emissions:
            stream = self._streams[one.key]
            stream.at += [now] * len(one.token_ids)
            stream.end = one if one.finish is not None else None
            stream.moved.set()

    def send(self, prompt_tokens: int, output_tokens: int) -> tuple[object, _Stream]:
        """A request with a prompt of its own."""
        self._sent += 1
        key, stream = object(), _Stream()
        self._streams[key] = stream
        ids = pack_ids(self._random.choices(IDS, k=prompt_tokens))
        sampling = Sampling(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
        self._engine.generate(key, Generate(self._sent, f"calibrate-{self._sent}", 1, ids, sampling))
        return key, stream

    async def cancel(self, keys: Sequence[object]) -> None:
        """End them, and wait until the server has noticed: a request after it is served alone."""
        for key in keys:
            self._engine.cancel(key)
        _, last = self.send(1, 1)
        await last.has(1)


async def measure(engine: Engine, rounds: int, progress: Callable[[int], None], seed: int = 0) -> Live:
    """Start the adapter, and time ``rounds`` times each shape that fits its server, in turns. ``progress`` is called
    with the rounds done. Raises HyperFlexisError when the server is not there or fails."""
    client = _Client(engine, seed)
    info = await engine.start(EngineStart(client.sink))
    try:
        wanted = shapes(info.max_batch, info.max_batch_tokens, info.context_length, info.kv_capacity_tokens)
        seconds: dict[Shape, list[float]] = {shape: [] for shape in wanted}
        overheads = []
        for done in range(rounds + 1):
            one_token_s = await _prefill_s(client, 1)
            decode_s = await _decode_s(client, Shape(0, 1, 16), info.context_length)
            for shape in list(seconds):
                try:
                    taken_s = await _taken_s(client, shape, info.context_length)
                except _Full:
                    del seconds[shape]
                    continue
                if done:  # the first of a shape may take what others do not
                    seconds[shape].append(taken_s)
            if done:
                overheads.append(one_token_s - decode_s)
                progress(done)
    finally:
        await engine.stop()
    overhead_s = max(median(overheads), 0.0)
    samples = tuple(
        _sample(shape, max(median(times) - (0.0 if shape.decodes else overhead_s), 1e-6))
        for shape, times in seconds.items()
    )
    return Live(samples, info, overhead_s, tuple(shape for shape in wanted if shape not in seconds))


def shapes(max_batch: int, max_batch_tokens: int, context_length: int, kv_tokens: int) -> list[Shape]:
    """Shapes on lines of prompts, decodes and contexts, within the limits; prompts alone, decodes alone, both."""
    room = GAPS + 8
    prompts = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    batches = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    wanted = [Shape(n, 0, 0) for n in prompts]
    wanted += [Shape(0, n, context) for n in batches for context in (64, 256, 1024, 4096)]
    wanted += [Shape(prefill, n, context) for n in (4, 16) for context in (64, 512) for prefill in (64, 256, 512)]
    return [
        shape
        for shape in wanted
        if shape.decodes + (shape.prefill > 0) <= max_batch
        and shape.prefill + shape.decodes <= max_batch_tokens
        and max(shape.prefill, shape.context) + room <= context_length
        and shape.decodes * (shape.context + room) + shape.prefill + room <= kv_tokens
    ]


async def _taken_s(client: _Client, shape: Shape, context_length: int) -> float:
    if not shape.decodes:
        return await _prefill_s(client, shape.prefill)
    return await _decode_s(client, shape, context_length)


async def _prefill_s(client: _Client, tokens: int) -> float:
    began = time.monotonic()
    _, stream = client.send(tokens, 1)
    await stream.has(1)
    return stream.at[0] - began


async def _decode_s(client: _Client, shape: Shape, context_length: int) -> float:
    """An iteration of ``shape.decodes`` that run together, or one with a prompt beside them."""
    tokens = min(MOST_TOKENS, context_length - shape.context)
    sent = [client.send(shape.context, tokens) for _ in range(shape.decodes)]
    streams = [stream for _, stream in sent]
    try:
        for stream in streams:
            await stream.has(2)
        lead = streams[0]
        found, _ = await _gap_s(lead, GAPS)
        if shape.prefill:
            first = len(lead.at)
            _, prompt = client.send(shape.prefill, 1)
            await prompt.has(1)
            mean_s, gaps = await _gap_s(lead, len(lead.at) - first + 2, first)
            found += gaps * max(mean_s - found, 0.0)
    finally:
        await client.cancel([key for key, _ in sent])
    return found


async def _gap_s(stream: _Stream, tokens: int, first: int | None = None) -> tuple[float, int]:
    """The mean gap of the next ``tokens`` tokens, or those behind the ``first``, and how many there were."""
    first = len(stream.at) if first is None else first
    await stream.has(first + tokens)
    gaps = len(stream.at) - first
    return (stream.at[-1] - stream.at[first - 1]) / gaps, gaps


def _sample(shape: Shape, seconds: float) -> Sample:
    lines = {"tokens": float(shape.prefill)} if shape.prefill else {}
    if shape.decodes:
        lines |= {"decodes": float(shape.decodes), "context": float(shape.context)}
    # Streams are some tokens past their prompts when they are timed.
    kv_tokens = shape.decodes * (shape.context + GAPS / 2)
    return Sample(shape.prefill, 0.5 * shape.prefill**2, shape.decodes, kv_tokens, seconds, lines)
