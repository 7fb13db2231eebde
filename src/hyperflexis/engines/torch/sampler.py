"""Logits -> tokens. Greedy at temperature 0, else one uniform number a token, inverted through the distribution.

The number depends only on the request's seed and the token's absolute index in its sequence. So a seeded request gets
the same tokens in any batch, and one that is resumed elsewhere with the tokens already sent goes on identically.
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
_MASK = (1 << 64) - 1


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


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that depends on nothing else: two rounds of splitmix64."""
    return (_mix(_mix(seed & _MASK) ^ index) >> 11) * 2.0**-53


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


@torch.inference_mode()
def sample(logits: Tensor, draws: Sequence[Draw]) -> list[Drawn]:
    """One token per row of ``logits`` [rows, vocabulary], fp32."""
    chosen = logits.argmax(-1)
    plain = [i for i, d in enumerate(draws) if d.sampling.temperature > 0.0 and not _is_cut(d.sampling)]
    cut = [i for i, d in enumerate(draws) if d.sampling.temperature > 0.0 and _is_cut(d.sampling)]
    if plain:
        chosen[plain] = _invert(_scaled(logits, draws, plain).softmax(-1), _uniforms(draws, plain, logits.device))
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


def _uniforms(draws: Sequence[Draw], rows: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([uniform(draws[i].seed, draws[i].index) for i in rows], dtype=torch.float64, device=device)


def _invert(weights: Tensor, numbers: Tensor) -> Tensor:
    """The first index at which the cumulated ``weights`` exceed the number's share of their sum. A weight of zero is
    never chosen. Sums are fp64: over a large vocabulary fp32 ones lose the tail."""
    sums = weights.cumsum(-1, dtype=torch.float64)
    target = numbers[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, target, right=True)[:, 0]


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
    picked = _invert(kept, _uniforms(draws, range(len(draws)), x.device))
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
