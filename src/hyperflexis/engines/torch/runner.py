"""A planned iteration on the device: which rows in which order, the forward pass, the new tokens.

``work_of`` copies what it needs from the Batcher's sequences on the event loop, so that a request may be cancelled
there while ``run`` is under way in the engine's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...batcher import Batch, Chunk
from ...wire import Sampling, TokenLogprob
from .attention import Span
from .model import Model
from .sampler import Draw, Drawn, sample


@dataclass(slots=True)
class Stream:
    """The engine's part of a sequence (its ``payload``). ``stop_ids`` end it, end-of-text ids among them. ``logprobs``
    are those of all its output, None where they were not asked for: who takes the request over may need them."""

    key: object
    sampling: Sampling
    seed: int
    stop_ids: frozenset[int]
    logprobs: list[TokenLogprob] | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """One iteration's rows. ``sampling`` are rows among them, in the order of the batch's sampling chunks. ``wrote`` is
    called in the engine's thread with each layer whose KV has been filled."""

    spans: tuple[Span, ...]
    token_ids: list[int]
    sampling: list[int]
    draws: list[Draw]
    wrote: Callable[[int], None] | None = None


class Runner:
    """Runs iterations of one model, one at a time."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._block_size = model.cache.block_size

    def work_of(self, batch: Batch, wrote: Callable[[int], None] | None = None) -> Work:
        """The rows of ``batch``: single tokens first, longest context first, as attention groups them."""
        chunks = batch.chunks
        order = sorted(range(len(chunks)), key=lambda i: (chunks[i].num_tokens > 1, -chunks[i].start))
        spans: list[Span] = []
        token_ids: list[int] = []
        last_row = [0] * len(chunks)
        for i in order:
            chunk = chunks[i]
            end = chunk.start + chunk.num_tokens
            assert chunk.seq.token_ids is not None
            spans.append(Span(chunk.start, chunk.num_tokens, chunk.seq.blocks[: -(-end // self._block_size)]))
            token_ids += chunk.seq.token_ids[chunk.start : end]
            last_row[i] = len(token_ids) - 1
        sampling = [i for i, chunk in enumerate(chunks) if chunk.samples]
        draws = [_draw(chunks[i]) for i in sampling]
        return Work(tuple(spans), token_ids, [last_row[i] for i in sampling], draws, wrote)

    def run(self, work: Work) -> Sequence[Drawn]:
        """Compute the rows' KV and one token per sampling row, in their order."""
        logits = self.model.forward(self.model.prepare(work.spans, work.token_ids, work.sampling), work.wrote)
        return sample(logits, work.draws)


def stream_of(chunk_payload: object) -> Stream:
    """A sequence's payload as what it is."""
    assert isinstance(chunk_payload, Stream)
    return chunk_payload


def _draw(chunk: Chunk) -> Draw:
    stream = stream_of(chunk.seq.payload)
    return Draw(stream.sampling, stream.seed, chunk.start + chunk.num_tokens)
