"""One decoder for Llama, Qwen2 and Qwen3: a batch of token rows in, logits of the sampling rows out.

All rows of an iteration, decodes and prompt chunks of many sequences, go through the linear layers together; only
attention looks at whose rows they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .attention import AttentionPlan, Span, attend, plan_attention
from .cache import KvCache
from .config import ModelConfig, RopeConfig

STRIP = 64
"""Rows of a matrix that are turned at a time: a strip's columns stay in the core's first cache, which is five times as
fast as the whole matrix at once."""


class Linear:
    """y = x W + b with W stored [in, out], which CPUs multiply by one row about twice as fast as [out, in].

    ``pack`` adds a second copy in oneDNN's blocked layout: without it the library reorders the weights on every call,
    which takes half of the time at 8 rows.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self._packed: Tensor | None = None
        # A single fp32 row against a wide matrix is read faster as it is.
        self._direct_rows = 1 if weight.dtype == torch.float32 and weight.shape[1] >= weight.shape[0] else 0

    def pack(self) -> None:
        """Make the blocked copy. Call again when ``weight`` has changed."""
        rows_hint = 16  # any number above one gives the layout that suits all row counts
        turned = torch.empty(self.weight.shape[::-1], dtype=self.weight.dtype)
        for row in range(0, self.weight.shape[0], STRIP):
            turned[:, row : row + STRIP].copy_(self.weight[row : row + STRIP].t())
        self._packed = torch.ops.mkldnn._reorder_linear_weight(turned, rows_hint)

    def unpack(self) -> None:
        """Give the blocked copy up."""
        self._packed = None

    def __call__(self, x: Tensor) -> Tensor:
        """Rows [rows, in] -> [rows, out]."""
        if self._packed is not None and x.shape[0] > self._direct_rows:
            result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
            return result
        return torch.mm(x, self.weight) if self.bias is None else torch.addmm(self.bias, x, self.weight)


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN's blocked layout exists here."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's weights. ``qkv`` and ``gate_up`` are joined along their outputs, in that order."""

    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Weights:
    """A whole model. ``embedding`` is [vocabulary, hidden]."""

    embedding: Tensor
    layers: tuple[Layer, ...]
    norm: Tensor
    head: Linear

    def linears(self) -> list[Linear]:
        """All matrices."""
        return [m for layer in self.layers for m in (layer.qkv, layer.o, layer.gate_up, layer.down)] + [self.head]


@dataclass(frozen=True, slots=True)
class Inputs:
    """One iteration as tensors. ``rows`` are the tokens of all spans; ``sampling`` the rows whose logits are wanted."""

    token_ids: Tensor
    slots: Tensor
    cos: Tensor
    sin: Tensor
    sampling: Tensor
    attention: AttentionPlan


class Model:
    """The decoder's forward pass. Holds no state of any request but the KV cache."""

    def __init__(self, config: ModelConfig, weights: Weights, cache: KvCache, context_length: int) -> None:
        self.config = config
        self.weights = weights
        self.cache = cache
        self.dtype = weights.embedding.dtype
        self.device = weights.embedding.device
        self._rope = rope_table(config.rope, config.head_dim, context_length).to(self.device, self.dtype)

    def prepare(self, spans: Sequence[Span], token_ids: Sequence[int], sampling: Sequence[int]) -> Inputs:
        """Tensors of an iteration. ``spans``: those of one token first, longest context first; ``token_ids``: the new
        tokens of all spans in a row; ``sampling``: rows among them."""
        size = self.cache.block_size
        positions: list[int] = []
        slots: list[int] = []
        for span in spans:
            positions.extend(range(span.start, span.context))
            slots.extend(span.blocks[p // size] * size + p % size for p in range(span.start, span.context))
        rope = self._rope.index_select(0, torch.tensor(positions, device=self.device))
        return Inputs(
            token_ids=torch.tensor(token_ids, device=self.device),
            slots=torch.tensor(slots, device=self.device),
            cos=rope[:, 0:1],
            sin=rope[:, 1:2],
            sampling=torch.tensor(sampling, dtype=torch.int64, device=self.device),
            attention=plan_attention(spans, self.cache),
        )

    @torch.inference_mode()
    def forward(self, inputs: Inputs, wrote: Callable[[int], None] | None = None) -> Tensor:
        """Run the rows, fill their KV, and return fp32 logits [sampling rows, vocabulary]. ``wrote`` is called with
        each layer whose KV has just been filled."""
        hidden = functional.embedding(inputs.token_ids, self.weights.embedding)
        for index, layer in enumerate(self.weights.layers):
            qkv = self._qkv(index, layer, inputs, self._norm(hidden, layer.input_norm))
            if wrote is not None:
                wrote(index)
            hidden += layer.o(attend(inputs.attention, self.cache, index, qkv))
            hidden += self._mlp(layer, self._norm(hidden, layer.mlp_norm))
        last = hidden.index_select(0, inputs.sampling)
        return self.weights.head(self._norm(last, self.weights.norm)).float()

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), weight, self.config.rms_norm_eps)

    def _qkv(self, index: int, layer: Layer, inputs: Inputs, x: Tensor) -> Tensor:
        """Queries, keys and values [rows, heads + 2 * kv heads, head_dim]; keys and values are in the cache too."""
        config = self.config
        heads, kv_heads = config.num_heads, config.num_kv_heads
        qkv = layer.qkv(x).view(-1, heads + 2 * kv_heads, config.head_dim)
        qk = qkv[:, : heads + kv_heads]
        if layer.q_norm is not None and layer.k_norm is not None:
            qk[:, :heads] = self._norm(qk[:, :heads], layer.q_norm)
            qk[:, heads:] = self._norm(qk[:, heads:], layer.k_norm)
        # Channel i turns with channel i + head_dim/2; in place, so that keys and values stay side by side.
        turned = qk.roll(config.head_dim // 2, -1).mul_(inputs.sin)
        torch.addcmul(turned, qk, inputs.cos, out=qk)
        self.cache.write(index, inputs.slots, qkv[:, heads:])
        return qkv

    def _mlp(self, layer: Layer, x: Tensor) -> Tensor:
        gate, up = layer.gate_up(x).chunk(2, -1)
        return layer.down(functional.silu(gate).mul_(up))


def rope_table(rope: RopeConfig, head_dim: int, context_length: int) -> Tensor:
    """Cosines and sines of every position [context_length, 2, head_dim], fp32. The first half of the sines is negative:
    in a pair, that channel's partner is subtracted."""
    angles = torch.arange(context_length, dtype=torch.float32)[:, None] * rope_frequencies(rope, head_dim)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), 1)


def rope_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position of each channel pair, fp32 as the models were trained with: in higher precision the
    angles at far positions would differ."""
    plain = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    match rope.kind:
        case "default":
            return plain
        case "linear":
            return plain / rope.factor
        case "llama3":
            turns = rope.original_context * plain / (2.0 * math.pi)
            keep = ((turns - rope.low) / (rope.high - rope.low)).clamp(0.0, 1.0)
            return plain * keep + plain / rope.factor * (1.0 - keep)
