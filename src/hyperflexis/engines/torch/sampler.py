"""Logits -> tokens. Greedy at temperature 0, else the winner of a race: each token of the vocabulary takes an
exponentially distributed time, divided by its probability, and the first one is drawn (the Gumbel-max trick).

The times depend only on the request's seed, the new token's absolute index in its sequence and the token's id. So a
seeded request gets the same tokens in any batch, and one that is resumed elsewhere with the tokens already sent goes on
identically. Other batches round logits otherwise, in the last digits: that decides a race as rarely as a greedy choice.
One number inverted through the cumulated distribution would not do: it is near a border as often as there are borders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...wire import Sampling, TokenLogprob

MAX_LOGPROBS = 20
NUCLEUS_WINDOW = 1024
"""Likeliest tokens looked at first for top_p: sorting a whole vocabulary costs more than the rest of sampling."""
MOST_TIMES = 1 << 20
"""Times drawn at once, to bound the memory."""
_MASK = (1 << 64) - 1
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""splitmix64 (Steele, Lea and Flood, OOPSLA 2014), for rows."""
_STEP, _FIRST_32, _SECOND_32 = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35
"""The finaliser of MurmurHash3 (Appleby, public domain), for the tokens of a row."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One row's request: how to draw, the seed, and the new token's index in its sequence (prompt included)."""

    sampling: Sampling
    seed: int
    index: int


@dataclass(frozen=True, slots=True)
class Drawn:
    """A new token, with log-probabilities of the unmodified distribution if they were asked for."""

    token_id: int
    logprob: TokenLogprob | None


def times(seeds: Sequence[int], indices: Sequence[int], ids: Tensor) -> Tensor:
    """Exponentially distributed numbers of mean 1, fp32 [rows, n], that depend on a row's seed and index and on the
    token's id alone. ``ids`` are int32 [rows, n], or [n] for all rows."""
    bases = [_signed(_mix(_mix(seed & _MASK) ^ index) >> 32) for seed, index in zip(seeds, indices, strict=True)]
    x = ids * _signed(_STEP) + torch.tensor(bases, dtype=torch.int32, device=ids.device)[:, None]
    x.bitwise_xor_(_shifted(x, 16)).mul_(_signed(_FIRST_32))
    x.bitwise_xor_(_shifted(x, 13)).mul_(_signed(_SECOND_32))
    x.bitwise_xor_(_shifted(x, 16))
    # Small times win: log1p keeps them exact.
    return _shifted(x, 8).float().add_(0.5).mul_(-(2.0**-24)).log1p_().neg_()


def _shifted(x: Tensor, bits: int) -> Tensor:
    """As of unsigned numbers."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _signed(x: int) -> int:
    """The int32 with these bits."""
    return x - (1 << 32) if x >> 31 else x


def _mix(x: int) -> int:
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * _FIRST) & _MASK
    x = ((x ^ (x >> 27)) * _SECOND) & _MASK
    return x ^ (x >> 31)


@torch.inference_mode()
def sample(logits: Tensor, draws: Sequence[Draw]) -> list[Drawn]:
    """One token per row of ``logits`` [rows, vocabulary], fp32."""
    chosen = logits.argmax(-1)
    plain = [i for i, d in enumerate(draws) if d.sampling.temperature > 0.0 and not _is_cut(d.sampling)]
    cut = [i for i, d in enumerate(draws) if d.sampling.temperature > 0.0 and _is_cut(d.sampling)]
    if plain:
        ids = torch.arange(logits.shape[-1], dtype=torch.int32, device=logits.device)
        chosen[plain] = _winners(_scaled(logits, draws, plain).softmax(-1), ids, [draws[i] for i in plain])
    if cut:
        chosen[cut] = _sample_cut(_scaled(logits, draws, cut), [draws[i] for i in cut])
    wanted = [i for i, d in enumerate(draws) if d.sampling.logprobs is not None]
    logprobs = _logprobs(logits, chosen, draws, wanted) if wanted else {}
    return [Drawn(token, logprobs.get(i)) for i, token in enumerate(chosen.tolist())]


def _is_cut(sampling: Sampling) -> bool:
    return sampling.top_p < 1.0 or sampling.top_k > 0


def _scaled(logits: Tensor, draws: Sequence[Draw], rows: list[int]) -> Tensor:
    temperatures = torch.tensor([draws[i].sampling.temperature for i in rows], device=logits.device)
    # Shifted first, so that a tiny temperature gives -inf and not inf.
    x = logits[rows]
    return (x - x.amax(-1, keepdim=True)) / temperatures[:, None]


def _winners(weights: Tensor, ids: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The column drawn of each row of ``weights`` [rows, n], of which the tokens are ``ids`` [rows, n] or [n]. A weight
    of zero is never drawn."""
    step = max(MOST_TIMES // weights.shape[-1], 1)
    found = []
    for first in range(0, len(draws), step):
        part = draws[first : first + step]
        of_part = ids[first : first + step] if ids.dim() == 2 else ids
        race = times([draw.seed for draw in part], [draw.index for draw in part], of_part)
        found.append((weights[first : first + step] / race).argmax(-1))
    return torch.cat(found)


def _sample_cut(x: Tensor, draws: Sequence[Draw]) -> Tensor:
    """top_k first, then top_p of what is left, as other engines do."""
    vocabulary = x.shape[-1]
    top_k = torch.tensor([d.sampling.top_k or vocabulary for d in draws], device=x.device)[:, None]
    top_p = torch.tensor([d.sampling.top_p for d in draws], dtype=torch.float64, device=x.device)[:, None]
    mass = x.softmax(-1)
    width = min(vocabulary, max([NUCLEUS_WINDOW, *(d.sampling.top_k for d in draws)]))
    while True:
        weights, ids = mass.topk(width)
        beyond = torch.arange(width, device=x.device) >= top_k
        weights = weights.masked_fill(beyond, 0.0).double()
        whole = torch.where(top_k > width, 1.0, weights.sum(-1, keepdim=True))
        before = weights.cumsum(-1) - weights
        if width == vocabulary or bool(((top_k <= width) | (before[:, -1:] >= top_p * whole)).all()):
            break
        width = vocabulary
    kept = weights.masked_fill(before >= top_p * whole, 0.0)
    kept[:, 0] = weights[:, 0]  # the likeliest token stays even at top_p 0
    picked = _winners(kept, ids.int(), draws)
    return ids.gather(1, picked[:, None])[:, 0]


def _logprobs(logits: Tensor, chosen: Tensor, draws: Sequence[Draw], rows: list[int]) -> dict[int, TokenLogprob]:
    table = logits[rows].log_softmax(-1)
    counts = [min(draws[i].sampling.logprobs or 0, MAX_LOGPROBS) for i in rows]
    ids = chosen[rows]
    own = table.gather(1, ids[:, None])[:, 0].tolist()
    values, tops = (t.tolist() for t in table.topk(min(max(counts), table.shape[-1])))
    return {
        row: TokenLogprob(token, own[n], list(zip(tops[n][: counts[n]], values[n][: counts[n]], strict=True)))
        for n, (row, token) in enumerate(zip(rows, ids.tolist(), strict=True))
    }
