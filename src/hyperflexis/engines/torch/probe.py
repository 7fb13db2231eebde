"""Where the latency model starts: a few iterations of different shapes, timed, and a non-negative fit to them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...core.latency import Coefficients, attention_of
from ...wire import Sampling
from .attention import Span
from .runner import Runner, Work
from .sampler import Draw

TIME_LIMIT_S = 2.0
"""Probing stops here; shapes come cheapest first."""
REPEATS = 2
"""The faster of so many runs counts: the first of a shape pays for allocations."""
ASSUMED_Q90 = 0.1
"""Relative error to plan with until the online fit has its own."""


@dataclass(frozen=True, slots=True)
class Shape:
    """``decodes`` requests of ``decode_context`` tokens each, and a prompt chunk of ``prefill`` on ``prefill_context``
    computed tokens."""

    decodes: int = 0
    decode_context: int = 0
    prefill: int = 0
    prefill_context: int = 0

    def features(self) -> tuple[float, float, float, float]:
        """What the latency model sees of it."""
        attention = attention_of([(self.prefill, self.prefill_context)])
        return float(self.prefill), attention, float(self.decodes), float(self.decodes * self.decode_context)


def shapes(max_batch: int, max_batch_tokens: int, context_length: int, kv_tokens: int) -> list[Shape]:
    """Shapes within the limits that tell the five coefficients apart, cheapest first."""
    room = min(context_length, kv_tokens) - 1
    long = min(room, 2048)
    short = min(room, 64)
    some, many = min(8, max_batch), min(32, max_batch)
    piece = min(256, max_batch_tokens, room)
    wanted = [
        Shape(1, short),
        Shape(some, short),
        Shape(0, 0, min(32, piece), 0),
        Shape(1, long),
        Shape(many, short),
        Shape(0, 0, piece, 0),
        Shape(some, long // 2),
        Shape(0, 0, piece // 2, max(long - piece // 2, 0)),
        Shape(0, 0, min(512, max_batch_tokens, room), 0),
    ]
    return [s for s in dict.fromkeys(wanted) if s.decodes * (s.decode_context + 1) <= kv_tokens]


def blocks_for(wanted: Sequence[Shape], block_size: int) -> int:
    """KV blocks that any of these uses."""
    return max(
        s.decodes * -(-(s.decode_context + 1) // block_size) + -(-(s.prefill_context + s.prefill) // block_size)
        for s in wanted
    )


def probe(runner: Runner, wanted: Sequence[Shape], clock: Callable[[], float] = time.perf_counter) -> Coefficients:
    """Run ``wanted`` on whatever the cache holds and fit. The first shape is run once more before, to warm up."""
    began = clock()
    runner.run(work_of_shape(runner, wanted[0]))
    rows, seconds = [], []
    for shape in wanted:
        work = work_of_shape(runner, shape)
        best = float("inf")
        for _ in range(REPEATS):
            start = clock()
            runner.run(work)
            best = min(best, clock() - start)
        rows.append(shape.features())
        seconds.append(best)
        if clock() - began > TIME_LIMIT_S:
            break
    return fit(rows, seconds)


def work_of_shape(runner: Runner, shape: Shape) -> Work:
    """An iteration of that shape on whatever the cache holds."""
    cache = runner.model.cache
    next_block = 0

    def blocks(tokens: int) -> list[int]:
        nonlocal next_block
        count = -(-tokens // cache.block_size)
        taken = [(next_block + i) % cache.num_blocks for i in range(count)]
        next_block += count
        return taken

    spans = [Span(shape.decode_context, 1, blocks(shape.decode_context + 1)) for _ in range(shape.decodes)]
    if shape.prefill:
        context = shape.prefill_context
        spans.append(Span(context, shape.prefill, blocks(context + shape.prefill)))
    num_rows = sum(span.num_tokens for span in spans)
    sampling = [*range(shape.decodes), *([num_rows - 1] if shape.prefill else [])]
    draws = [Draw(Sampling(temperature=0.0), 0, 0) for _ in sampling]
    return Work(tuple(spans), [0] * num_rows, sampling, draws)


def fit(rows: Sequence[tuple[float, float, float, float]], seconds: Sequence[float]) -> Coefficients:
    """Non-negative least squares on relative errors, by coordinate descent on columns of equal norm."""
    table = [[1.0 / t, *(v / t for v in row)] for row, t in zip(rows, seconds, strict=True)]
    norms = [max(sum(r[j] ** 2 for r in table) ** 0.5, 1e-30) for j in range(5)]
    table = [[v / n for v, n in zip(row, norms, strict=True)] for row in table]
    gram = [[sum(r[i] * r[j] for r in table) for j in range(5)] for i in range(5)]
    target = [sum(r[i] for r in table) for i in range(5)]
    x = [0.0] * 5
    for _ in range(2000):
        for i in range(5):
            if gram[i][i] > 0.0:
                rest = target[i] - sum(gram[i][j] * x[j] for j in range(5) if j != i)
                x[i] = max(rest / gram[i][i], 0.0)
    c0, c1, c2, c3, c4 = (v / n for v, n in zip(x, norms, strict=True))
    return Coefficients(c0, c1, c2, c3, c4, ASSUMED_Q90)
