"""One batch with every kind of span, and what attention gives by its definition."""

from __future__ import annotations

import torch

from hyperflexis.engines.torch.attention import Span, attend, plan_attention
from hyperflexis.engines.torch.cache import KvCache
from hyperflexis.engines.torch.config import ModelConfig

BLOCK = 8
# (start, new tokens): long and short decodes, a first token, fresh chunks, chunks on context, one over many pieces.
SHAPES = [(700, 1), (300, 1), (64, 1), (63, 1), (7, 1), (0, 1), (0, 5), (0, 8), (13, 40), (0, 300), (70, 290)]


def mixed_batch(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of SHAPES through a cache with scattered blocks, and the dense result in fp32."""
    random = torch.Generator().manual_seed(1)
    cache = KvCache(config, 400, BLOCK, dtype, device)
    free = torch.randperm(400, generator=random).tolist()
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    spans, rows, expected = [], [], []
    for start, new in SHAPES:
        total = start + new
        blocks = [free.pop() for _ in range(-(-total // BLOCK))]
        qkv = torch.randn(total, heads + 2 * kv_heads, dim, generator=random).to(device, dtype)
        slots = torch.tensor([blocks[p // BLOCK] * BLOCK + p % BLOCK for p in range(total)], device=device)
        cache.write(1, slots, qkv[:, heads:])
        spans.append(Span(start, new, blocks))
        rows.append(qkv[start:])
        expected.append(_dense(qkv, heads, kv_heads)[start:])
    assert not cache.layers[0].any()
    with torch.inference_mode():
        got = attend(plan_attention(spans, cache), cache, 1, torch.cat(rows))
    return got.float(), torch.cat(expected)


def _dense(qkv: torch.Tensor, heads: int, kv_heads: int) -> torch.Tensor:
    """Causal attention of one whole sequence, in fp64."""
    q, k, v = qkv.double().transpose(0, 1).split([heads, kv_heads, kv_heads])
    k, v = (t.repeat_interleave(heads // kv_heads, 0) for t in (k, v))
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    scores.masked_fill_(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).reshape(len(qkv), -1).float()
