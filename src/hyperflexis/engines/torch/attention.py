"""Attention over the paged KV cache: what is the same in all layers is worked out once an iteration.

Rows of one token each (decodes) are attended in groups: their pages are gathered, padded to the group's longest
context and masked. Longer chunks are attended one by one; each sees its own context only. A chunk that starts at
zero needs nothing from the cache. Query heads that share a key head are folded into one matrix.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias, causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from .cache import KvCache

CPU_GROUP_BYTES = 2 << 20
"""Gathered keys and values of one decode group on a CPU: they are read again at once and should still be in its cache.
Measured on 32 contexts of 1024 tokens (20M model): a step takes 51 ms with 2 MiB and 69 ms with 8 MiB."""
ACCELERATOR_GROUP_BYTES = 1 << 30
"""An accelerator wants few large kernels; the limit only bounds the memory for the gathered copy."""
CPU_QUERY_PIECE = 128
"""Queries of a chunk attended at once on a CPU, whose kernel computes masked keys too: a piece sees no later key."""


@dataclass(frozen=True, slots=True)
class Span:
    """``num_tokens`` new tokens on top of ``start`` computed ones, and the sequence's block table."""

    start: int
    num_tokens: int
    blocks: list[int]

    @property
    def context(self) -> int:
        """Tokens that the last new one sees, itself included."""
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Rows ``first..last`` of the batch, one token each, and their first ``context`` tokens. ``mask``
    [rows, 1, 1, context] is added to the scores; None when all contexts are equally long."""

    first: int
    last: int
    blocks: Tensor
    context: int
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class Piece:
    """Queries ``first..last`` of the batch against the first ``context`` tokens of their sequence."""

    first: int
    last: int
    context: int
    mask: Tensor | CausalBias | None


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    """Rows ``first..last`` of one chunk; ``blocks`` is None when no earlier context has to be read."""

    first: int
    last: int
    blocks: Tensor | None
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Everything about one iteration's attention that does not depend on the layer."""

    decodes: tuple[DecodeGroup, ...]
    prefills: tuple[PrefillSpan, ...]


def plan_attention(spans: Sequence[Span], cache: KvCache) -> AttentionPlan:
    """``spans`` in the order of their rows in the batch: those of one token first, longest context first."""
    dtype, device = cache.layers[0].dtype, cache.layers[0].device
    on_cpu = device.type == "cpu"
    num_decodes = sum(span.num_tokens == 1 for span in spans)
    token_bytes = 2 * cache.num_kv_heads * cache.head_dim * dtype.itemsize
    group_tokens = (CPU_GROUP_BYTES if on_cpu else ACCELERATOR_GROUP_BYTES) // token_bytes
    decodes = tuple(
        _decode_group(first, spans[first:last], cache.block_size, dtype, device)
        for first, last in _group(spans[:num_decodes], group_tokens)
    )
    prefills = []
    row = num_decodes
    for span in spans[num_decodes:]:
        prefills.append(_prefill_span(row, span, cache.block_size, dtype, device, on_cpu))
        row += span.num_tokens
    return AttentionPlan(decodes, tuple(prefills))


def _group(spans: Sequence[Span], group_tokens: int) -> list[tuple[int, int]]:
    """Cut spans of falling context into groups of ``group_tokens`` padded tokens, at most half of them padding."""
    groups = []
    first = 0
    for i in range(1, len(spans) + 1):
        longest = spans[first].context
        if i == len(spans) or (i + 1 - first) * longest > group_tokens or 2 * spans[i].context < longest:
            groups.append((first, i))
            first = i
    return groups


def _table(spans: Sequence[Span], num_blocks: int, block_size: int, device: torch.device) -> Tensor:
    """Block tables of ``spans`` one after the other, each padded with its first block to ``num_blocks``."""
    flat = array("q")
    for span in spans:
        used = -(-span.context // block_size)
        flat.extend(span.blocks[:used])
        flat.extend(span.blocks[:1] * (num_blocks - used))
    return torch.frombuffer(flat, dtype=torch.int64).to(device)


def _decode_group(
    first: int, spans: Sequence[Span], block_size: int, dtype: torch.dtype, device: torch.device
) -> DecodeGroup:
    context = spans[0].context
    last = first + len(spans)
    blocks = _table(spans, -(-context // block_size), block_size, device)
    lengths = [span.context for span in spans]
    if lengths[-1] == context:
        return DecodeGroup(first, last, blocks, context, None)
    hidden = torch.arange(context, device=device) >= torch.tensor(lengths, device=device)[:, None]
    mask = torch.zeros(len(spans), context, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
    return DecodeGroup(first, last, blocks, context, mask[:, None, None, :])


def _prefill_span(
    row: int, span: Span, block_size: int, dtype: torch.dtype, device: torch.device, on_cpu: bool
) -> PrefillSpan:
    blocks = _table([span], -(-span.context // block_size), block_size, device) if span.start else None
    step = CPU_QUERY_PIECE if on_cpu else span.num_tokens
    pieces = []
    for begin in range(0, span.num_tokens, step):
        end = min(begin + step, span.num_tokens)
        context = span.start + end
        mask: Tensor | CausalBias | None = None
        if context > end - begin:
            if on_cpu:
                hidden = torch.ones(end - begin, context, dtype=torch.bool).triu_(context - (end - begin) + 1)
                mask = torch.zeros(end - begin, context, dtype=dtype).masked_fill_(hidden, -torch.inf)
            else:
                mask = causal_lower_right(end - begin, context)
        pieces.append(Piece(row + begin, row + end, context, mask))
    return PrefillSpan(row, row + span.num_tokens, blocks, tuple(pieces))


def attend(plan: AttentionPlan, cache: KvCache, layer: int, qkv: Tensor) -> Tensor:
    """Attention of all rows of a batch: [rows, heads + 2 * kv heads, head_dim] -> [rows, heads * head_dim].

    The batch's own keys and values are part of ``qkv`` and already in the cache.
    """
    kv_heads, head_dim = cache.num_kv_heads, cache.head_dim
    heads = qkv.shape[1] - 2 * kv_heads
    out = []
    for group in plan.decodes:
        k, v = cache.gather(layer, group.blocks, group.last - group.first, group.context)
        q = qkv[group.first : group.last, :heads].view(-1, kv_heads, heads // kv_heads, head_dim)
        out.append(scaled_dot_product_attention(q, k, v, attn_mask=group.mask).view(-1, heads * head_dim))
    for span in plan.prefills:
        if span.blocks is None:
            k, v = qkv[None, span.first : span.last, heads:].transpose(1, 2).chunk(2, 1)
        else:
            k, v = cache.gather(layer, span.blocks, 1, span.pieces[-1].context)
        for piece in span.pieces:
            result = scaled_dot_product_attention(
                qkv[None, piece.first : piece.last, :heads].transpose(1, 2),
                k[:, :, : piece.context],
                v[:, :, : piece.context],
                attn_mask=piece.mask,
                is_causal=piece.mask is None,
                enable_gqa=heads != kv_heads,
            )
            out.append(result[0].transpose(0, 1).reshape(-1, heads * head_dim))
    return out[0] if len(out) == 1 else torch.cat(out)
